"""Cross-layer equalization: give both sides of an edge the same range by channel (Nagel et al. 2019, arXiv 1906.04721, eq. 11).

Before:  linear(f(linear(x, W₁, b)), W₂)
After:   linear(f(linear(x, diag(1/s)·W₁, b/s)), W₂·diag(s)),   s_j = √(r₁_j / r₂_j)

r₁_j is max|row j of W₁|, r₂_j is max|column j of W₂|; after it both are √(r₁·r₂). f is anything that a positive diagonal
passes: nothing, relu, the other factor of a gated product, an attention (per KV head, its query heads share s). Exact in
real arithmetic, and from the weights alone: no data. Where several linears read the edge, r₂ runs over all of them. A
projection can have its columns scaled by one edge and its rows by the next, so all edges are done in turn until no s is
further from 1 than `tolerance`.

The report has by edge the imbalance max_j(r₁/r₂) / min_j(r₁/r₂), 1 when equalized, and the paper's precision, the mean of
r₁_j/max r₁ · r₂_j/max r₂ (eq. 9), before and after.

Differences from the official code: gated products and attention; with norms=True the gain of a norm takes the part of
r₁, |g_j|, which is smoothing by the gain instead of by data. Biases are not absorbed into the next layer. A channel with a range
of zero on either side keeps s = 1.

Declines:
    - an edge whose region does not close (`dlqc.regions`)
    - an edge that no linear makes
    - an edge that is equalized already
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.errors import RecipeError
from dlqc.graph import EMBEDDING, LINEAR, NORMS, arg, constant_name, is_call
from dlqc.motion import Absorb
from dlqc.scaling import Edge, EdgeKind, scalable
from dlqc.weights import Weights

_KINDS: tuple[EdgeKind, ...] = ("product", "value", "other")


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalize the ranges of the weights on both sides of an edge.

    Options:
        norms: also edges from a norm to its linears, with the gain as the first range.
        rounds: at most so many rounds over all edges. tolerance: of |s - 1|, below which a channel counts as equalized.
    """

    name: ClassVar[str] = "equalize"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    preserves: ClassVar = "exact"

    norms: bool = False
    rounds: int = 20
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise RecipeError(f"{self.rounds} rounds do nothing", where="equalize.rounds", remedy="20 is plenty")
        if not 0 < self.tolerance < 1:
            what = f"{self.tolerance} is no tolerance of a factor"
            raise RecipeError(what, where="equalize.tolerance", remedy="Use a number between 0 and 1, such as 1e-3")

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report, sites = PassReport(), list[Edge]()
        for found in scalable(graph, ctx, (*_KINDS, "norm") if self.norms else _KINDS):
            if isinstance(found, Edge) and not any(_ranged(a) for a in found.region.sources):
                found = Declined(f"input of {found.name}", "no linear makes it")
            if isinstance(found, Declined):
                report.declined.append(found)
            else:
                sites.append(found)
                report.details[found.name] = judged(ranges(found, ctx.weights), "before")
        totals = self.settle(sites, ctx.weights)
        for found, s in zip(sites, totals, strict=True):
            if s is None:
                report.declined.append(Declined(f"input of {found.name}", "it is equalized already"))
                del report.details[found.name]
                continue
            found.scale(ctx.weights, s)
            report.sites += 1
        for found in sites:
            if found.name in report.details:
                report.details[found.name] |= judged(ranges(found, ctx.weights), "after")
        return report

    def settle(self, sites: list[Edge], weights: Weights) -> list[torch.Tensor | None]:
        """s of each edge when no edge moves any more, or None where it never did."""
        trial, totals = weights.clone(), [torch.ones(found.width, dtype=torch.float64) for found in sites]
        pending = set(range(len(sites)))
        for _ in range(self.rounds):
            moved = []
            for i in sorted(pending):
                r1, r2 = ranges(sites[i], trial)
                s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
                if bool(((s - 1).abs() > self.tolerance).any()):
                    sites[i].scale(trial, s)
                    totals[i] *= s
                    moved.append(i)
            pending = {j for i in moved for j in range(len(sites)) if j != i and _touch(sites[i], sites[j])}
            if not pending:
                break
        return [None if bool((s == 1).all()) else s for s in totals]


def ranges(found: Edge, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """r₁ and r₂, float64 [width]."""
    peaks = []
    for absorb in filter(_ranged, found.region.sources):
        value = weights.value(absorb.name, torch.float64).abs()
        if value.dim() == 2:
            value = value.amax(dim=1 if absorb.rows else 0)
        peaks.append(found.narrow(value, absorb.repeat))
    return torch.stack(peaks).amax(dim=0), found.column_peaks(weights)


def judged(sides: tuple[torch.Tensor, torch.Tensor], when: str) -> dict[str, float]:
    """Imbalance and precision of an edge, over channels with a range on both sides."""
    r1, r2 = sides
    live = (r1 > 0) & (r2 > 0)
    if not bool(live.any()):
        return {f"imbalance_{when}": 1.0, f"precision_{when}": 1.0}
    r1, r2 = r1[live], r2[live]
    quotient = r1 / r2
    precision = (r1 / r1.max()) * (r2 / r2.max())
    return {f"imbalance_{when}": float(quotient.max() / quotient.min()), f"precision_{when}": float(precision.mean())}


def _ranged(absorb: Absorb) -> bool:
    """Whether a constant multiplies what passes; a bias is only added."""
    if is_call(absorb.by, LINEAR):
        return absorb.rows
    if is_call(absorb.by, *NORMS):
        return absorb.name == constant_name(arg(absorb.by, 2, "weight"))
    return is_call(absorb.by, EMBEDDING)


def _touch(a: Edge, b: Edge) -> bool:
    return not a.region.absorbs.keys().isdisjoint(b.region.absorbs)
