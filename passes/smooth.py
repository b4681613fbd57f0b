"""SmoothQuant: move the outliers of activations into the weights (Xiao et al. 2023, arXiv 2211.10438, eq. 4).

Before:  linear(norm(x; g), W)
After:   linear(norm(x; g/s), W·diag(s)),   s_j = max|X_j|^α / max|W_j|^(1-α)

On the edge the pass inserts D⁻¹·D with D = diag(s); D moves down into every linear that reads the edge, D⁻¹ up into
the gain of the norm (or, for sites="product", through the gated product into the projection that feeds it). Exact
in real arithmetic. s is shared by all readers of the edge: max|W_j| runs over all of them.

Differences from the official code: s comes from the denoising states and their token weights (rows of weight zero do
not count), and a channel that is never active keeps s = 1.

Declines:
    - a reader that is not a linear on a constant weight, or whose weight somebody else reads
    - a producer that a diagonal cannot move through, or that has other readers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport, Plan
from dlqc.errors import RecipeError
from dlqc.graph import NORMS, as_linear, aten, is_call, linears
from dlqc.motion import Diagonal, can_move_down, can_move_up, insert_pair, move_down, move_up

_SMALLEST = 1e-5  # lower bound of both factors, as in the official code


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide activation channels by s, multiply weight columns by s.

    Options:
        alpha: migration strength α in [0, 1]; 0.5 splits evenly, 1 moves all of the range into the weights.
        sites: "norm" smooths the inputs that come from a norm; "product" also those from a gated product.
    """

    name: ClassVar[str] = "smooth"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    alpha: float = 0.5
    sites: Literal["norm", "product"] = "norm"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise RecipeError(f"{self.alpha} is outside [0, 1]", where="smooth.alpha", remedy="0.5 is the usual value")

    def statistics(self) -> frozenset[str]:
        return frozenset({"absmax"})

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        producers = (*NORMS, *((aten.mul.Tensor,) if self.sites == "product" else ()))
        if not any(is_call(s.x, *producers) for s in linears(graph.nodes, ctx.weights)) and self.required:
            plan.problems.append("smooth: no linear reads a norm in this model")

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        edges = list(dict.fromkeys(site.x for site in linears(ctx.nodes(graph), ctx.weights)))
        for value in edges:
            found = self.match(value, graph, ctx)
            if isinstance(found, Declined):
                report.declined.append(found)
            elif found is not None:
                upper, lower = insert_pair(graph, ctx.weights, value, Diagonal(found))
                move_down(graph, ctx.weights, lower)
                move_up(graph, ctx.weights, upper)
                report.sites += 1
        return report

    def match(self, value: fx.Node, graph: fx.Graph, ctx: Context) -> torch.Tensor | Declined | None:
        """The smoothing vector s [d] for an edge, or why not, or None if the edge is not of the kind asked for."""
        if not (is_call(value, *NORMS) or (self.sites == "product" and is_call(value, aten.mul.Tensor))):
            return None
        reason = can_move_down(graph, ctx.weights, value) or can_move_up(graph, ctx.weights, value)
        if reason is not None:
            reader = next(linears(value.users, ctx.weights))
            return Declined(f"input of {reader.name}", reason)
        return self.scales(value, ctx)

    def scales(self, value: fx.Node, ctx: Context) -> torch.Tensor:
        """s [d] in float64 from the activations' and the weights' largest magnitudes by channel."""
        sites = [site for user in value.users if (site := as_linear(user, ctx.weights)) is not None]
        active = ctx.stats[sites[0].weight]["absmax"].double()
        peak = torch.stack([ctx.weights.value(s.weight, torch.float64).abs().amax(dim=0) for s in sites]).amax(dim=0)
        s = active.clamp_min(_SMALLEST) ** self.alpha / peak.clamp_min(_SMALLEST) ** (1 - self.alpha)
        return torch.where(active > 0, s, torch.ones_like(s))
