"""Schedules of precision: the bits of stored weights that a forward reads, and those it rounds activations to, by mask ratio.

    mask ratio          0 ──── edges[0] ──── edges[1] ──── … ──── 1
    bits of weights       widths[0]   widths[1]        …   widths[-1]
    bits of activations   act_widths[0]                …   act_widths[-1]

The mask ratio of a row is the share of [MASK] among the tokens that are to be filled: those that were [MASK] when the run began,
so neither prompt nor padding. Whoever asks a model says it (`mask_ratio=`); where nobody does, all tokens count.

`cheapest` finds the schedule: least bit operations on average with the divergence from full precision within a budget,

    least Σ_b f_b·w_b·a_b    with   Σ_b f_b·KL_b(w_b, a_b) ≤ budget          f_b the share of forwards in bucket b

A product of w and a bits is w·a operations on bits; where one of both has one width only, it is the bits of the other. This is
a multiple-choice knapsack with w·a for sizes; `dlqc.knapsack` lists everything that no other choice beats, so the answer is exact
for the KL that was measured. Mask ratios fall evenly along a denoising run, so f_b is the width of the bucket unless told.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from dlqc.errors import FeasibilityError, RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.formats.coded import decode
from dlqc.formats.nested import NestedFormat
from dlqc.graph import args_of, copy_graph, is_call
from dlqc.knapsack import frontier
from dlqc.ops import LINEAR_NESTED, MASK_BUCKET, QUANTIZE_ACT_ADAPTIVE

#: Shares of forwards are counted in parts of this.
_PARTS = 10_000


@dataclass(frozen=True)
class PrecisionSchedule:
    """Bits of weights and activations by mask ratio.

    Attributes:
        edges: rising mask ratios between 0 and 1; a ratio r is in bucket b if edges[b-1] < r <= edges[b].
        widths: bits of the weights in each bucket, one more than edges, from the lowest mask ratio on; () where they have one
            width in all.
        act_widths: bits of the activations likewise.
    """

    edges: tuple[float, ...]
    widths: tuple[int, ...] = ()
    act_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_edges(self.edges)
        for where, given in (("widths", self.widths), ("act_widths", self.act_widths)):
            if given and len(given) != len(self.edges) + 1:
                what = f"{len(given)} widths for {len(self.edges) + 1} buckets of mask ratio"
                raise RecipeError(what, where=where, remedy="Give one for each bucket, the lowest ratio first")
        if not self.widths and not self.act_widths:
            what = "a schedule without widths says nothing"
            raise RecipeError(what, where="widths", remedy="Give bits of weights, or of activations, for each bucket")

    def width(self, ratio: float) -> int:
        """Bits of the weights at a mask ratio.

        >>> PrecisionSchedule((0.25, 0.5), (4, 3, 2)).width(0.3)
        3
        """
        return self.widths[self._bucket(ratio)]

    def act_width(self, ratio: float) -> int:
        """Bits of the activations at a mask ratio."""
        return self.act_widths[self._bucket(ratio)]

    def average(self, ratios: Iterable[float] | None = None) -> float:
        """Mean bits of the weights in forwards at these mask ratios; None: spread evenly from 0 to 1.

        >>> PrecisionSchedule((0.25, 0.5), (4, 3, 2)).average()
        2.75
        """
        return self._mean(self.widths, ratios)

    def act_average(self, ratios: Iterable[float] | None = None) -> float:
        """Mean bits of the activations, as `average`.

        >>> PrecisionSchedule((0.5,), act_widths=(8, 4)).act_average()
        6.0
        """
        return self._mean(self.act_widths, ratios)

    def _bucket(self, ratio: float) -> int:
        return sum(ratio > edge for edge in self.edges)

    def _mean(self, widths: Sequence[int], ratios: Iterable[float] | None) -> float:
        if ratios is None:
            return sum(f * w for f, w in zip(shares(self.edges), widths, strict=True))
        found = [widths[self._bucket(ratio)] for ratio in ratios]
        return sum(found) / len(found)

    @classmethod
    def of(cls, graph: fx.Graph) -> PrecisionSchedule | None:
        """The schedule that a graph computes by; None where weights and activations have one width."""
        found = {}
        for target, (at, among) in _PLACES.items():
            node = next((node for node in graph.nodes if is_call(node, target)), None)
            if node is not None:
                bucket, found[target] = args_of(node)[at], tuple(args_of(node)[among])
        if not found:
            return None
        while bucket is not None and not is_call(bucket, MASK_BUCKET):
            bucket = args_of(bucket)[0]  # laid out as the linear's input
        edges = () if bucket is None else tuple(args_of(bucket)[2])
        return cls(edges, found.get(LINEAR_NESTED, ()), found.get(QUANTIZE_ACT_ADAPTIVE, ()))

    def written(self, graph: fx.Graph) -> fx.Graph:
        """A copy of a graph that computes by this schedule, which has the same edges. What it has no widths for stays.

        Raises:
            FeasibilityError: weights are not nested (or activations not adapted), or masks are counted in other buckets.
            ContractError: there is no such width.
        """
        held = PrecisionSchedule.of(graph)
        for what, there, asked in (
            ("weights are stored for", held and held.widths, self.widths),
            ("activations are rounded to", held and held.act_widths, self.act_widths),
        ):
            if asked and not there:
                remedy = "Compile with adapt_precision in the recipe"
                raise FeasibilityError(f"the {what} one width", where="schedule", remedy=remedy)
        if held is not None and held.edges != self.edges:
            what = f"the graph counts masks in buckets with edges {held.edges}, the schedule has {self.edges}"
            raise FeasibilityError(what, where="schedule", remedy="Give one width for each of the graph's buckets")
        made = copy_graph(graph)
        for node in made.nodes:
            if is_call(node, LINEAR_NESTED) and self.widths:
                fmt = decode(args_of(node)[3])
                for width in self.widths:
                    if isinstance(fmt, NestedFormat):
                        fmt.level(width)
                write(node, self.widths)
            elif is_call(node, QUANTIZE_ACT_ADAPTIVE) and self.act_widths:
                ActFormat(max(self.act_widths), widths=self.act_widths)  # refuses what is no width
                write(node, self.act_widths)
        return made


#: Which argument of an op is the bucket, and which the widths.
_PLACES = {LINEAR_NESTED: (5, 6), QUANTIZE_ACT_ADAPTIVE: (1, 2)}


def write(node: fx.Node, widths: Sequence[int]) -> None:
    """Let a nested linear, or a quantizer of activations, take these widths, one for each bucket."""
    at = _PLACES[node.target][1]  # type: ignore[index]
    node.args = (*args_of(node)[:at], list(widths), *args_of(node)[at + 1 :])


@dataclass(frozen=True)
class WidthPair:
    """Bits of weights and of activations in a forward; 0 where they have one width.

    >>> str(WidthPair(4, 8)), str(WidthPair(0, 8)), WidthPair(4, 8).operations
    ('4 bits and 8-bit activations', '8-bit activations', 32)
    """

    weights: int
    activations: int

    @property
    def operations(self) -> int:
        """Operations on bits in a product; what has one width does not count."""
        return (self.weights or 1) * (self.activations or 1)

    def numbers(self) -> dict[str, int]:
        """By name, for reports."""
        found = {"bits": self.weights, "activation_bits": self.activations}
        return {what: bits for what, bits in found.items() if bits}

    def __str__(self) -> str:
        weights, activations = f"{self.weights} bits", f"{self.activations}-bit activations"
        return " and ".join(([weights] if self.weights else []) + ([activations] if self.activations else []))


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
    kl: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: float, parts: Sequence[float]
) -> tuple[tuple[int, ...], float]:
    """The option that each bucket takes, for least size on average and a divergence within the budget; and that divergence.

    Args:
        kl: nats per masked position, by bucket and option.
        sizes: of the options (bits, or bit operations of a product), by bucket and option.
        budget: the most divergence on average over forwards.
        parts: share of the forwards that is in each bucket.

    Raises:
        FeasibilityError: no choice is within the budget; it says what the best one has.
    """
    items = [
        [(round(_PARTS * part) * size, part * cost) for size, cost in zip(own, row, strict=True)]
        for part, own, row in zip(parts, sizes, kl, strict=True)
    ]
    found = frontier(items)
    within = [i for i, cost in enumerate(found.costs) if cost <= budget]
    if not within:
        what = f"the divergence is {found.costs[-1]:.4g} nats at the best widths, the budget is {budget:g}"
        remedy = f"Allow {found.costs[-1]:.2g} or more, store more planes, or let activations have more bits"
        raise FeasibilityError(what, where="budget", remedy=remedy)
    return found.choice(within[0]), found.costs[within[0]]
