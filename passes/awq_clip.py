"""AWQ's clipping: give up the largest weights of a group where that makes its output error smaller (arXiv 2306.00978).

Before:  linear(x, W)
After:   linear(x, clamp(W, -c, c)),   c = r·max|W| per row and group, 1 - shrink < r ≤ 1

For a row w of a group, c minimises (ŵ - w)ᵀ·H·(ŵ - w), ŵ = Q(clamp(w, -c, c)): the squared error of the group's part of the
output over all calibration rows, with H = Σ c·xᵀx cut to the group. Groups are independent in this, errors between them do
not count (nor do they in the official code). r = 1 is a candidate, so no group gets worse.

The function changes: this pass rounds away what it clips. Linears that make queries or keys are left alone, since the
scores of attention react to clipping out of proportion. They are found by dataflow: whatever reaches the queries or keys of
an attention without another linear between.

Differences from the official code: the second moments of all rows with their token weights, there 512 tokens; queries and
keys are found by dataflow, there by name. The grid is the same: shrink·points steps of 1/points.

Declines:
    - linears that make queries or keys, if skip_scores
    - a width that the group does not divide
    - a linear that no clipping improves

Run it after awq_scale and before quantize_weights, with the same format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.errors import RecipeError
from dlqc.formats.integer import IntFormat
from dlqc.graph import LINEAR, args_of, is_call, linears
from dlqc.regions import attentions
from dlqc.weights import Clamp, Weights

_CHUNK = 1 << 22  # weights that are searched at a time


@dataclass(frozen=True)
class AwqClip(Pass):
    """Clamp each group of each row to the range with the smallest output error.

    Options:
        bits, group_size, symmetric: the format the weights are going to be rounded to.
        points: steps of the grid a unit. shrink: part of the range that may be given up.
        skip_scores: leave linears alone that make queries or keys.
    """

    name: ClassVar[str] = "awq_clip"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    scope: ClassVar = "block"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    points: int = 20
    shrink: float = 0.5
    skip_scores: bool = True

    def __post_init__(self) -> None:
        self.format  # noqa: B018  a wrong width or group is refused here
        if not 0 < self.shrink < 1:
            what = f"{self.shrink} is no part of a range"
            raise RecipeError(what, where="awq_clip.shrink", remedy="Use a number between 0 and 1, such as 0.5")
        if self.points * self.shrink < 1:
            what = f"{self.points} points leave no step within {self.shrink}"
            raise RecipeError(what, where="awq_clip.points", remedy="20 is the usual number")

    @property
    def format(self) -> IntFormat:
        return IntFormat(self.bits, self.group_size, self.symmetric)

    @property
    def ratios(self) -> list[float]:
        """1, 1 - 1/points, … as many as lie above 1 - shrink."""
        return [1 - i / self.points for i in range(int(self.shrink * self.points))]

    def statistics(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        scores = score_makers(graph) if self.skip_scores else set()
        done = set[str]()
        for site in linears(ctx.nodes(graph), ctx.weights):
            if site.weight in done:
                continue
            done.add(site.weight)
            reason = self.format.check(site.in_features)
            if site.node in scores:
                reason = "its output makes queries or keys"
            if reason is None:
                reason = self.clip(site.weight, site.name, ctx, report)
            if reason is not None:
                report.declined.append(Declined(site.name, reason))
        return report

    def clip(self, weight: str, name: str, ctx: Context, report: PassReport) -> str | None:
        """Clamp one weight; or why not."""
        limits, ratio, before, after = self.search(weight, ctx.weights, ctx.stats[weight]["hessian"])
        clipped = float((ratio < 1).float().mean())
        if clipped == 0:
            return "no clipping lowers its error"
        ctx.weights.fold(weight, Clamp(limits))
        report.sites += 1
        report.details[name] = {
            "error_before": before,
            "error_after": after,
            "ratio": after / before if before > 0 else 1.0,
            "clipped_groups": clipped,
        }
        return None

    def search(
        self, name: str, weights: Weights, hessian: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """Limits and ratios [N, G] in float32, and the sum of all groups' errors before and after."""
        weight = weights.value(name, torch.float64).float()
        n, k = weight.shape
        groups = self.format.groups(k)
        size = k // groups
        moments = torch.stack([hessian[i : i + size, i : i + size].float() for i in range(0, k, size)])
        limits, chosen = torch.empty(n, groups), torch.empty(n, groups)
        before = after = 0.0
        for rows in _chunks(n, k):
            part = weight[rows]
            peak = part.reshape(-1, groups, size).abs().amax(dim=-1)
            least, best = self._error(part, peak, moments), torch.ones_like(peak)
            before += float(least.sum(dtype=torch.float64))
            for ratio in self.ratios[1:]:
                error = self._error(part, peak * ratio, moments)
                better = error < least
                least, best = torch.where(better, error, least), torch.where(better, ratio, best)
            after += float(least.sum(dtype=torch.float64))
            limits[rows], chosen[rows] = peak * best, best
        return limits, chosen, before, after

    def _error(self, weight: torch.Tensor, limit: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """(ŵ - w)ᵀ·H·(ŵ - w) of each row and group, [n, G]."""
        n, groups = limit.shape
        noise = self.format.quantize(Clamp(limit)(weight)).dequantize().sub_(weight)
        cut = noise.reshape(n, groups, -1).transpose(0, 1)
        return (torch.bmm(cut, moments) * cut).sum(dim=-1).T


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // width)
    return (slice(i, i + step) for i in range(0, rows, step))


def score_makers(graph: fx.Graph) -> set[fx.Node]:
    """The linears whose output reaches the queries or keys of an attention without another linear between."""
    found, seen = set[fx.Node](), set[fx.Node]()
    work = [a for attention in attentions(list(graph.nodes)) for a in args_of(attention)[:2]]
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, LINEAR):
            found.add(node)
        else:
            work += node.all_input_nodes
    return found
