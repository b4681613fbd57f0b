"""Schedules of precision: how many bits of the stored weights a forward reads, by the share of [MASK] among a row's tokens.

    share of [MASK]   0 ──── edges[0] ──── edges[1] ──── … ──── 1
    bits                widths[0]   widths[1]        …   widths[-1]

`cheapest` finds the schedule: least bits on average with the divergence from full precision within a budget,

    least Σ_b f_b·w_b    with   Σ_b f_b·KL_b(w_b) ≤ budget          f_b the share of forwards in bucket b

which is a multiple-choice knapsack with bits for sizes; `dlqc.knapsack` lists everything that no other choice beats, so the
answer is exact for the KL that was measured. Mask ratios fall evenly along a denoising run, so f_b is the width of the bucket
unless told.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from dlqc.errors import FeasibilityError, RecipeError
from dlqc.formats.coded import decode
from dlqc.formats.nested import NestedFormat
from dlqc.graph import args_of, copy_graph, is_call
from dlqc.knapsack import frontier
from dlqc.ops import LINEAR_NESTED, MASK_BUCKET

#: Shares of forwards are counted in parts of this.
_PARTS = 10_000


@dataclass(frozen=True)
class PrecisionSchedule:
    """Bits of the weights by mask ratio.

    Attributes:
        edges: rising mask ratios between 0 and 1; a ratio r is in bucket b if edges[b-1] < r <= edges[b].
        widths: bits of each bucket, one more than edges, from the lowest mask ratio on.
    """

    edges: tuple[float, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        check_edges(self.edges)
        if len(self.widths) != len(self.edges) + 1:
            what = f"{len(self.widths)} widths for {len(self.edges) + 1} buckets of mask ratio"
            raise RecipeError(what, where="widths", remedy="Give one for each bucket, the lowest ratio first")

    def width(self, ratio: float) -> int:
        """Bits at a mask ratio.

        >>> PrecisionSchedule((0.25, 0.5), (4, 3, 2)).width(0.3)
        3
        """
        return self.widths[sum(ratio > edge for edge in self.edges)]

    def average(self, ratios: Iterable[float] | None = None) -> float:
        """Mean bits of forwards at these mask ratios; None: spread evenly from 0 to 1.

        >>> PrecisionSchedule((0.25, 0.5), (4, 3, 2)).average()
        2.75
        """
        if ratios is None:
            return sum(f * w for f, w in zip(shares(self.edges), self.widths, strict=True))
        found = [self.width(ratio) for ratio in ratios]
        return sum(found) / len(found)

    @classmethod
    def of(cls, graph: fx.Graph) -> PrecisionSchedule | None:
        """The schedule that a graph computes by; None where its weights have one width."""
        node = next((node for node in graph.nodes if is_call(node, LINEAR_NESTED)), None)
        if node is None:
            return None
        bucket, widths = args_of(node)[5:7]
        while bucket is not None and not is_call(bucket, MASK_BUCKET):
            bucket = args_of(bucket)[0]  # laid out as the linear's input
        return cls(() if bucket is None else tuple(args_of(bucket)[2]), tuple(widths))

    def written(self, graph: fx.Graph) -> fx.Graph:
        """A copy of a graph of nested weights that reads them by this schedule, which has the same edges.

        Raises:
            FeasibilityError: the weights are not nested, or masks are counted in other buckets.
            ContractError: there is no such width.
        """
        held = PrecisionSchedule.of(graph)
        if held is None:
            what, remedy = "the weights are stored for one width", "Compile with adapt_precision in the recipe"
            raise FeasibilityError(what, where="schedule", remedy=remedy)
        if held.edges != self.edges:
            what = f"the graph counts masks in buckets with edges {held.edges}, the schedule has {self.edges}"
            raise FeasibilityError(what, where="schedule", remedy="Give one width for each of the graph's buckets")
        made = copy_graph(graph)
        for node in made.nodes:
            if is_call(node, LINEAR_NESTED):
                fmt = decode(args_of(node)[3])
                for width in self.widths:
                    if isinstance(fmt, NestedFormat):
                        fmt.level(width)
                node.args = (*args_of(node)[:6], list(self.widths))
        return made


def shares(edges: Sequence[float]) -> tuple[float, ...]:
    """Width of each bucket.

    >>> shares((0.25, 0.5))
    (0.25, 0.25, 0.5)
    """
    return tuple(high - low for low, high in itertools.pairwise((0.0, *edges, 1.0)))


def check_edges(edges: Sequence[float]) -> None:
    """Refuse edges that are no rising ratios."""
    if any(not low < high for low, high in itertools.pairwise((0.0, *edges, 1.0))):
        what = f"{tuple(edges)} are no rising mask ratios between 0 and 1"
        raise RecipeError(what, where="edges", remedy="Write for example (0.25, 0.5, 0.75)")


def cheapest(
    kl: Sequence[Sequence[float]], widths: Sequence[int], budget: float, parts: Sequence[float]
) -> tuple[tuple[int, ...], float]:
    """The widths of least bits on average whose divergence is within the budget, and that divergence.

    Args:
        kl: nats per masked position, by bucket and width.
        widths: bits, rising.
        budget: the most divergence on average over forwards.
        parts: share of the forwards that is in each bucket.

    Raises:
        FeasibilityError: no choice is within the budget; it says what the best one has.
    """
    items = [
        [(round(_PARTS * part) * width, part * cost) for width, cost in zip(widths, row, strict=True)]
        for part, row in zip(parts, kl, strict=True)
    ]
    found = frontier(items)
    within = [i for i, cost in enumerate(found.costs) if cost <= budget]
    if not within:
        what = f"the divergence is {found.costs[-1]:.4g} nats at the best widths, the budget is {budget:g}"
        raise FeasibilityError(
            what, where="budget", remedy=f"Allow {found.costs[-1]:.2g} or more, or store more planes"
        )
    chosen = found.choice(within[0])
    return tuple(widths[option] for option in chosen), found.costs[within[0]]
