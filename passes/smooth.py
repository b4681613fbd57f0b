"""SmoothQuant: move the outliers of activations into the weights (Xiao et al. 2023, arXiv 2211.10438, eq. 4).

Before:  linear(norm(x; g), W)
After:   linear(norm(x; g/s), W·diag(s)),   s_j = max|X_j|^α / max|W_j|^(1-α)

The value on the edge becomes x·diag(1/s): every linear that reads it undoes that, and the gain of the norm takes it (or,
through a gated product or an attention, the projection that feeds it). Exact in real arithmetic. s is shared by all
readers of the edge: max|W_j| runs over all of them, and with grouped queries over the query heads of a group.

alpha="search" takes for each edge the α of an even grid on [0, 1] that minimises, over a sample of up to 512 rows X,

    Σ_readers ‖Q(X·diag(1/s))·Q(W·diag(s))ᵀ - X·Wᵀ‖²

with weights rounded per channel and activations per token, both symmetric. s = 1 is one of the candidates: the error on
the sample is never above that of the model as it was. The report has α, and the error with it and without, by edge.

Differences from the official code: s comes from the denoising states and their token weights (rows of weight zero do
not count), and a channel that is never active keeps s = 1. There, α is one number for the model, found by hand, and only
edges behind norms are smoothed.

Declines an edge whose region does not close (`dlqc.regions`): a reader that is no linear on a constant weight, a weight or
gain that somebody else reads, a producer that a diagonal cannot pass; and, with alpha="search", one that no strength improves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport, Plan
from dlqc.errors import RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.graph import linears
from dlqc.scaling import Edge, EdgeKind, kind_of, scalable

_SMALLEST = 1e-5  # lower bound of both factors, as in the official code

_KINDS: dict[str, tuple[EdgeKind, ...]] = {
    "norm": ("norm",),
    "product": ("norm", "product"),
    "value": ("norm", "value"),
    "all": ("norm", "product", "value"),
}


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide activation channels by s, multiply weight columns by s.

    Options:
        alpha: migration strength α in [0, 1]; 0.5 splits evenly, 1 moves all of the range into the weights. "search" finds
            one for each edge.
        sites: "norm" smooths the inputs that come from a norm; "product" also those from a gated product; "value" also
            those from an attention; "all" all three.
        points: of the grid that is searched; 21 are steps of 0.05.
        weight_bits, act_bits: what is rounded to in the search; act_bits=None leaves the activations alone.
    """

    name: ClassVar[str] = "smooth"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    alpha: float | Literal["search"] = 0.5
    sites: Literal["norm", "product", "value", "all"] = "norm"
    points: int = 21
    weight_bits: int = 8
    act_bits: int | None = 8

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str) and self.alpha not in ("search",):
            remedy = 'Give a number in [0, 1], or "search"'
            raise RecipeError(f"{self.alpha!r} is no migration strength", where="smooth.alpha", remedy=remedy)
        if not isinstance(self.alpha, str) and not 0.0 <= self.alpha <= 1.0:
            raise RecipeError(f"{self.alpha} is outside [0, 1]", where="smooth.alpha", remedy="0.5 is the usual value")
        if self.sites not in _KINDS:
            raise RecipeError(f"unknown sites {self.sites!r}", where="smooth.sites", remedy=f"Use {', '.join(_KINDS)}")
        if self.points < 2:
            what = f"a grid of {self.points} has no two ends"
            raise RecipeError(what, where="smooth.points", remedy="21 are steps of 0.05")
        self.formats  # noqa: B018  a wrong width is refused here

    @property
    def formats(self) -> tuple[IntFormat, ActFormat | None]:
        return IntFormat(self.weight_bits, None), None if self.act_bits is None else ActFormat(self.act_bits)

    def statistics(self) -> frozenset[str]:
        return frozenset({"absmax", "sample"} if self.alpha == "search" else {"absmax"})

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        wanted = _KINDS[self.sites]
        if not any(kind_of(site.x) in wanted for site in linears(graph.nodes, ctx.weights)) and self.required:
            plan.problems.append("smooth: no linear reads a norm in this model")

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for found in scalable(graph, ctx, _KINDS[self.sites]):
            if isinstance(found, Declined):
                report.declined.append(found)
                continue
            if isinstance(self.alpha, str):
                s = self.search(found, ctx, report)
            else:
                s = scales(found, ctx, [self.alpha])[0]
                report.details[found.name] = {"alpha": self.alpha}
            if s is not None:
                found.scale(ctx.weights, s)
                report.sites += 1
        return report

    def search(self, found: Edge, ctx: Context, report: PassReport) -> torch.Tensor | None:
        """s of the best α, or None if no α has a smaller error than s = 1."""
        grid = [i / (self.points - 1) for i in range(self.points)]
        tried = [torch.ones(found.width, dtype=torch.float64), *scales(found, ctx, grid)]
        errors = self.errors(found, ctx, tried)
        best = min(range(len(tried)), key=errors.__getitem__)
        report.details[found.name] = {"error_before": errors[0], "error_after": errors[best]}
        if best == 0:
            report.declined.append(
                Declined(f"input of {found.name}", f"none of {self.points} strengths lowers the error")
            )
            return None
        report.details[found.name]["alpha"] = grid[best - 1]
        return tried[best]

    def errors(self, found: Edge, ctx: Context, tried: Sequence[torch.Tensor]) -> list[float]:
        """Squared error of all readers' outputs on the sample, for each s."""
        weight_format, act_format = self.formats
        total = [0.0] * len(tried)
        for name, repeat in found.readers.items():
            x = ctx.stats[name]["sample"].float()
            weight = ctx.weights.value(name, torch.float64).float()
            exact = x @ weight.T
            for i, narrow in enumerate(tried):
                s = found.wide(narrow, repeat).float()
                scaled = x / s if act_format is None else act_format.fake_quantize(x / s)
                rounded = weight_format.quantize(weight * s).dequantize()
                total[i] += float((scaled @ rounded.T - exact).square().sum(dtype=torch.float64))
        return total


def scales(found: Edge, ctx: Context, alphas: Sequence[float]) -> list[torch.Tensor]:
    """s [width] in float64, for each α, from the activations' and the weights' largest magnitudes by channel."""
    peaks = [found.narrow(ctx.stats[name]["absmax"].double(), repeat) for name, repeat in found.readers.items()]
    active, column = torch.stack(peaks).amax(dim=0), found.column_peaks(ctx.weights)
    a, w = active.clamp_min(_SMALLEST), column.clamp_min(_SMALLEST)
    return [torch.where(active > 0, a**alpha / w ** (1 - alpha), 1.0) for alpha in alphas]
