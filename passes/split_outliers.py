"""LLM.int8(): the few columns that hold outliers leave a linear before it is quantized (Dettmers et al., arXiv 2208.07339).

Before:  linear(x, W, b)
After:   linear(x ∘ k, W·diag(k), b) + linear(x[o], W[:, o]),   k_j = 0 for j in o, else 1

Exact, since the columns are disjoint: x·Wᵀ = Σ_{j∉o} x_j·W_jᵀ + Σ_{j∈o} x_j·W_jᵀ. Quantized afterwards to 8 bits, one scale
per token and one per output channel, it is the paper's equation 8,

    y = s_x·s_w·(X_i8·W_i8ᵀ) + X_o·W_oᵀ.

Later passes and kernels see two linears of the ordinary kind. The first keeps all K columns, those of o being zero on both
sides: zeros are exact on every grid and move neither the largest magnitude of a token nor that of an output channel, and K
keeps dividing by groups and tiles. The second, [N, |o|], is left alone by `quantize_weights` (`dlqc.kept`).

o are the columns with max |x_j| > `threshold` on the calibration states (rows of weight zero do not count), the largest
`share`·K of them at most: a limit of ours, for inputs that are large throughout. Linears that read the same value share
the two inputs.

Differences from the paper, and from bitsandbytes, where o is found anew in each call: here o is fixed at calibration. A static
graph has no sizes that depend on values; and a dynamic o needs W_o for any o, so bitsandbytes takes it from the 8-bit
codes and saves the error of the activations only, while W_o is exact here. Its price: a column that first exceeds the
threshold after calibration is quantized as in W8A8. The paper finds the same few columns in all layers and for nearly all
tokens, so calibration on all mask ratios should see them.

Declines:
    - a linear that `skip` names
    - a router, or a head that is tied to an embedding (`dlqc.kept`)
    - a linear whose columns are all outliers, or that is split already
    - a weight that something else than a linear of the block reads
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport, Plan, matches
from dlqc.errors import RecipeError, nearest
from dlqc.graph import LINEAR, Linear, arg, args_of, aten, call_before, linears, read, sweep, uses
from dlqc.graph import replace as put_in_place
from dlqc.kept import reason_to_keep
from dlqc.transform import Diagonal
from dlqc.weights import Columns, OnColumns


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Give the outlier columns of a linear's input a linear of their own.

    Options:
        threshold: magnitude of an activation above which its column is an outlier.
        share: of the columns of an input that may be outliers, those with the largest magnitude; one column at least, and
            1 sets no limit.
        skip: glob patterns of module names to leave alone.
    """

    name: ClassVar[str] = "split_outliers"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    threshold: float = 6.0
    share: float = 0.05
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            what = f"{self.threshold} is no magnitude"
            raise RecipeError(what, where="split_outliers.threshold", remedy="Use 6.0, or 0 to go by share= alone")
        if not 0 < self.share <= 1:
            remedy = "Use 0.01 for one column in a hundred, or 1 for no limit"
            raise RecipeError(f"{self.share} is no share", where="split_outliers.share", remedy=remedy)

    def statistics(self) -> frozenset[str]:
        return frozenset({"absmax"})

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        names = [site.name for site in linears(graph.nodes, ctx.weights)]
        for pattern in (p for p in self.skip if not any(matches(name, [p]) for name in names)):
            plan.problems.append(f"skip pattern {pattern!r} matches no linear; {nearest(pattern, names[:8])}, …")

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        sites = list(linears(ctx.nodes(graph), ctx.weights))
        inside = {site.node for site in sites}
        split: dict[str, torch.Tensor] = {}
        pairs: dict[tuple[fx.Node, tuple[int, ...]], tuple[fx.Node, fx.Node]] = {}
        for site in sites:
            if site.weight not in split:
                reason, columns = self.choose(site, ctx)
                if len(columns) and any(user not in inside for user in uses(graph, site.weight)):
                    reason = "something else than a linear of the block reads its weight"
                split[site.weight] = columns[:0] if reason is not None else columns
                if reason is not None:
                    report.declined.append(Declined(site.name, reason))
                elif len(columns):
                    report.sites += 1
                    report.details[site.name] = self.details(site, columns, ctx)
                    self.split_weight(site, columns, ctx)
            columns = split[site.weight]
            if len(columns):
                key = (site.x, tuple(columns.tolist()))
                if key not in pairs:
                    pairs[key] = self.split_input(site, columns, graph, ctx)
                self.rewrite(site, pairs[key], graph, ctx)
        sweep(graph, ctx.weights)
        return report

    def choose(self, site: Linear, ctx: Context) -> tuple[str | None, torch.Tensor]:
        """The outlier columns, rising, int32; or why the site is left alone."""
        none = torch.zeros(0, dtype=torch.int32)
        if matches(site.name, self.skip):
            return "named by skip=", none
        kept = reason_to_keep(site)
        if kept is not None:
            return kept, none
        if _outliers(site) in ctx.weights:
            return "it is split already", none
        peaks = ctx.stats[site.weight]["absmax"]
        most = max(1, int(self.share * site.in_features))
        largest = peaks.topk(most).indices
        columns = largest[peaks[largest] > self.threshold].sort().values.to(torch.int32)
        if len(columns) == site.in_features:
            return f"all {site.in_features} columns exceed {self.threshold:g}", none
        return None, columns

    def details(self, site: Linear, columns: torch.Tensor, ctx: Context) -> dict[str, float]:
        peaks = ctx.stats[site.weight]["absmax"]
        rest = peaks.index_fill(0, columns.long(), 0.0)
        share = len(columns) / site.in_features
        return {
            "columns": len(columns),
            "share": share,
            "largest": float(peaks.max()),
            "largest_left": float(rest.max()),
        }

    def split_weight(self, site: Linear, columns: torch.Tensor, ctx: Context) -> None:
        """Define W[:, o] as a constant of its own, and zero these columns of W."""
        whole = ctx.weights[site.weight]
        ctx.weights.define(_outliers(site), replace(whole, folds=(*whole.folds, Columns(columns)), aliases=()))
        kept = torch.ones(site.in_features, dtype=torch.float64).index_fill(0, columns.long(), 0.0)
        ctx.weights.fold(site.weight, OnColumns(Diagonal(kept)))

    def split_input(
        self, site: Linear, columns: torch.Tensor, graph: fx.Graph, ctx: Context
    ) -> tuple[fx.Node, fx.Node]:
        """x ∘ k and x[o], in front of the site."""
        x, first = site.x, site.node
        kept = torch.ones(site.in_features, dtype=x.meta["val"].dtype).index_fill(0, columns.long(), 0.0)
        free = (n for i in itertools.count() if (n := f"outliers.{x.name}.{i}") not in ctx.weights)
        nodes = []
        for constant in (kept, columns):
            name = next(free)
            ctx.weights.put(name, constant)
            nodes.append(read(graph, ctx.weights, name, first))
        inliers = call_before(graph, first, aten.mul.Tensor, (x, nodes[0]))
        outliers = call_before(graph, first, aten.index_select.default, (x, x.meta["val"].dim() - 1, nodes[1]))
        return inliers, outliers

    def rewrite(self, site: Linear, pair: tuple[fx.Node, fx.Node], graph: fx.Graph, ctx: Context) -> None:
        """y = linear(x, W, b) becomes the sum."""
        node, (inliers, outliers) = site.node, pair
        weight, bias = args_of(node)[1], arg(node, 2, "bias")
        taken = read(graph, ctx.weights, _outliers(site), node)
        taken.meta["val"] = taken.meta["val"].to(weight.meta["val"].dtype)
        main = call_before(graph, node, LINEAR, (inliers, weight, bias))
        side = call_before(graph, node, LINEAR, (outliers, taken))
        for part in (main, side):
            part.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        put_in_place(node, call_before(graph, node, aten.add.Tensor, (main, side)))


def _outliers(site: Linear) -> str:
    return f"{site.name}.outliers.weight"
