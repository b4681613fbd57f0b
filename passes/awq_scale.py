"""AWQ: scale the weights that meet large activations up before they are rounded (Lin et al. 2023, arXiv 2306.00978, eq. 4, 5).

Before:  linear(x, W)
After:   linear(x·diag(1/s), W·diag(s)),   s_j = m_j^a / √(max m^a · min m^a),   m_j = mean|X_j|

1/s folds into what makes x: the gain of a norm, the projection behind a gated product, the values of an attention. Exact
in real arithmetic; what changes is how the readers of x will round. a is the one of {0, 1/n, … (n-1)/n} that minimises

    Σ_readers tr((Ŵ - W)·H·(Ŵ - W)ᵀ),   Ŵ = Q(W·diag(s))·diag(1/s),   H = Σ c·xᵀx

the squared error of the readers' outputs over all calibration rows, each weighed by c. a = 0 is s = 1, so this error
never grows; with relative=True it is the error of each output over the energy of that output. The rows of the
projection that takes 1/s round as before, since the scales of its rows follow. Give the format that quantize_weights is
to use; the search rounds to nearest. The report has a and the error before and after by edge.

Differences from the official code: the error is that of the linears that read the edge, exactly and over all rows; there it
is that of the forward of the attention or of the feed-forward as a whole, on one batch. Values go with grouped queries,
too, where s is shared by the query heads of a KV head; the official code skips them. A channel that is never active keeps
s = 1 and is left out of the normalisation. Token weights count.

Declines:
    - an edge whose region does not close (`dlqc.regions`), or is made outside of the block
    - readers whose width the group does not divide
    - an edge at which no scale lowers the error
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport, Plan
from dlqc.errors import RecipeError
from dlqc.formats.integer import IntFormat
from dlqc.graph import linears
from dlqc.rounding.hessian import output_energy
from dlqc.scaling import Edge, EdgeKind, kind_of, scalable

_SMALLEST = 1e-4  # lower bound of m^a, as in the official code
_SILENT = 1e-30  # energy of an output below which it counts as silent


@dataclass(frozen=True)
class AwqScale(Pass):
    """Divide activation channels by s, multiply weight columns by s, so that important weights round well.

    Options:
        bits, group_size, symmetric: the format the weights are going to be rounded to.
        points: n, of the grid of a. The search costs n times what the readers' error costs, N·K² products a weight [N, K].
        relative: divide the error of each output by its energy, (W·H·Wᵀ)_nn. Else outputs of a large size, which a later
            matrix may make small again, decide alone.
        rows: evaluate the grid on so many rows of each weight, evenly spaced; the best a must then beat a = 0 on all
            rows. None evaluates all.
        sites: kinds of edges: "norm", "product", "value", "other" (relu).
    """

    name: ClassVar[str] = "awq_scale"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    points: int = 20
    relative: bool = False
    rows: int | None = None
    sites: tuple[EdgeKind, ...] = ("norm", "product", "value", "other")

    def __post_init__(self) -> None:
        self.format  # noqa: B018  a wrong width or group is refused here
        if self.points < 2:
            what = f"a grid of {self.points} leaves nothing to choose"
            raise RecipeError(what, where="awq_scale.points", remedy="20 is the usual number")
        if self.rows is not None and self.rows < 1:
            raise RecipeError(f"{self.rows} rows have no error", where="awq_scale.rows", remedy="Use 512, or None")
        for kind in self.sites:
            if kind not in ("norm", "product", "value", "other"):
                remedy = "Use norm, product, value, other"
                raise RecipeError(f"no edge is of kind {kind!r}", where="awq_scale.sites", remedy=remedy)

    @property
    def format(self) -> IntFormat:
        return IntFormat(self.bits, self.group_size, self.symmetric)

    def statistics(self) -> frozenset[str]:
        return frozenset({"meanabs", "hessian"})

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        sites = [s for s in linears(graph.nodes, ctx.weights) if kind_of(s.x) in self.sites]
        if self.required and not any(self.format.check(s.in_features) is None for s in sites):
            reasons = sorted({str(self.format.check(s.in_features)) for s in sites})
            plan.problems.append(f"awq_scale: {'; '.join(reasons) or 'no linear reads an edge of these kinds'}")

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for found in scalable(graph, ctx, self.sites):
            if isinstance(found, Edge) and (reason := self._undivided(found, ctx)) is not None:
                found = Declined(f"input of {found.name}", reason)
            if isinstance(found, Declined):
                report.declined.append(found)
                continue
            exponent, s, before, after = self.search(found, ctx)
            ratio = after / before if before > 0 else 1.0
            numbers = {"exponent": exponent, "error_before": before, "error_after": after, "ratio": ratio}
            report.details[found.name] = numbers
            if exponent == 0:
                report.declined.append(Declined(f"input of {found.name}", "no scale lowers the error"))
                continue
            found.scale(ctx.weights, s)
            report.sites += 1
        return report

    def _undivided(self, found: Edge, ctx: Context) -> str | None:
        reasons = (self.format.check(int(ctx.weights[name].shape[1])) for name in found.readers)
        return next((reason for reason in reasons if reason is not None), None)

    def search(self, found: Edge, ctx: Context) -> tuple[float, torch.Tensor, float, float]:
        """The best exponent, its s, and the error before and after."""
        grid = [i / self.points for i in range(self.points)]
        tried = scales(found, ctx, grid)
        errors = self.errors(found, ctx, tried, self.rows)
        best = min(range(len(tried)), key=errors.__getitem__)
        if self.rows is not None:
            ends = self.errors(found, ctx, [tried[0], tried[best]], None)
            errors = [ends[0], *[ends[1]] * (len(tried) - 1)]
            best = best if ends[1] < ends[0] else 0
        return grid[best], tried[best], errors[0], errors[best]

    def errors(self, found: Edge, ctx: Context, tried: Sequence[torch.Tensor], rows: int | None) -> list[float]:
        """Σ tr(E·H·Eᵀ) over the readers, for each s."""
        total = [0.0] * len(tried)
        for name, repeat in found.readers.items():
            weight = ctx.weights.value(name, torch.float64).float()
            if rows is not None and rows < weight.shape[0]:
                weight = weight[torch.linspace(0, weight.shape[0] - 1, rows).round().long()]
            hessian = ctx.stats[name]["hessian"]
            energy = output_energy(weight, hessian).clamp_min(_SILENT) if self.relative else None
            for i, narrow in enumerate(tried):
                s = found.wide(narrow, repeat).float()
                noise = (self.format.quantize(weight * s).dequantize() / s).sub_(weight)
                error = output_energy(noise, hessian)
                total[i] += float((error if energy is None else error / energy).sum())
        return total


def scales(found: Edge, ctx: Context, exponents: Sequence[float]) -> list[torch.Tensor]:
    """s [width] in float64 for each exponent, from the activations' mean magnitudes by channel."""
    means = [found.mean(ctx.stats[name]["meanabs"].double(), repeat) for name, repeat in found.readers.items()]
    m = torch.stack(means).mean(dim=0)
    live = m > 0
    if not bool(live.any()):
        return [torch.ones_like(m) for _ in exponents]
    powers = [(m**a).clamp_min(_SMALLEST) for a in exponents]
    return [torch.where(live, p / (p[live].max() * p[live].min()).sqrt(), 1.0) for p in powers]
