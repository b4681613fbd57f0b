"""The multiple-choice knapsack: one option for each item, least total cost within a total size.

    least Σ_i cost[i][c_i]   with   Σ_i size[i][c_i] ≤ limit          sizes are whole numbers, costs any finite ones

`frontier` finds it for all limits at once: it grows the list of partial assignments that no other one beats in size and
cost together (Nemhauser and Ullmann 1969), item after item. The list is no longer than there are distinct sizes, which are
few where sizes have a large common divisor, as stored weights do. Then it is exact. Should it grow beyond `most` states, those
that fall into one cell of a grid are thinned to the cheapest, and

    cost(found for limit) ≤ least cost for (limit - slack)        slack = (items where that happened) · (width of a cell)

while the sizes stay exact, so that a limit is never exceeded.

`hull` keeps only what some price λ of a bit makes optimal, argmin Σ cost + λ·size (Everett 1963): each item steps along
the lower convex hull of its options, and all steps are taken in order of what they save for a bit. n items with m options take
n·m·log(n·m) operations. Its points lie on the convex hull of the frontier, and the line through them is a lower bound for
every limit, whole or not (the bound of the linear relaxation, Sinha and Zoltners 1979).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dlqc.errors import ContractError, FeasibilityError

Option = tuple[int, float]
"""(size, cost)."""

MOST = 1 << 16


@dataclass(frozen=True, eq=False)
class Frontier:
    """Assignments that no other one beats, from the smallest to the cheapest.

    Attributes:
        sizes: rising. costs: falling.
        slack: 0 if the frontier is exact, else how far it may be off, in units of size (see the module docstring).
    """

    sizes: list[int]
    costs: list[float]
    slack: int
    _steps: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def at(self, limit: int) -> int:
        """Index of the cheapest assignment of at most `limit`.

        Raises:
            FeasibilityError: all are larger; it says how large the smallest is.
        """
        index = bisect.bisect_right(self.sizes, limit) - 1
        if index < 0:
            what = f"the smallest assignment has size {self.sizes[0]}, more than {limit}"
            raise FeasibilityError(what, where="limit", remedy=f"Allow {self.sizes[0]} or more")
        return index

    def choice(self, index: int) -> tuple[int, ...]:
        """The option of each item in the assignment at `index`."""
        found = []
        for options, parents in reversed(self._steps):
            found.append(int(options[index]))
            index = int(parents[index])
        return tuple(reversed(found))


def frontier(items: Sequence[Sequence[Option]], *, most: int = MOST) -> Frontier:
    """All assignments that no other one beats; exact if there are at most `most` at every stage.

    >>> found = frontier([[(2, 5.0), (3, 1.0)], [(2, 4.0), (4, 0.0)]])
    >>> found.sizes, found.costs, found.choice(found.at(5))
    ([4, 5, 7], [9.0, 5.0, 1.0], (1, 0))
    """
    _check(items, most)
    cell = max(1, math.ceil(sum(max(size for size, _ in item) for item in items) / most))
    sizes, costs = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps, thinned = [], 0
    for item in items:
        size = torch.cat([sizes + s for s, _ in item])
        cost = torch.cat([costs + c for _, c in item])
        order = torch.argsort(cost, stable=True)
        order = order[torch.argsort(size[order], stable=True)]
        best = torch.cummin(cost[order], dim=0).values
        order = order[torch.cat((torch.ones(1, dtype=torch.bool), best[1:] < best[:-1]))]
        if len(order) > most:
            cells = size[order] // cell
            last = torch.cat((cells[1:] != cells[:-1], torch.ones(1, dtype=torch.bool)))
            last[0] = True  # the smallest of all stays, so that what can be met is met
            thinned += 1
            order = order[last]
        steps.append(((order // len(sizes)).to(torch.int16), (order % len(sizes)).to(torch.int32)))
        sizes, costs = size[order], cost[order]
    return Frontier(sizes.tolist(), costs.tolist(), thinned * cell, tuple(steps))


@dataclass(frozen=True)
class Hull:
    """The convex hull of the frontier.

    Attributes:
        sizes: rising. costs: falling, and ever more slowly.
    """

    sizes: list[int]
    costs: list[float]
    _start: tuple[int, ...]
    _moves: tuple[tuple[int, int], ...]

    def choice(self, index: int) -> tuple[int, ...]:
        """The option of each item in the assignment at `index`."""
        found = list(self._start)
        for item, option in self._moves[:index]:
            found[item] = option
        return tuple(found)

    def lower_bound(self, limit: int) -> float:
        """No assignment of at most `limit` costs less; infinity where there is none."""
        index = bisect.bisect_right(self.sizes, limit) - 1
        if index < 0:
            return math.inf
        if index + 1 == len(self.sizes):
            return self.costs[-1]
        (a, b), (x, y) = self.sizes[index : index + 2], self.costs[index : index + 2]
        return x + (y - x) * (limit - a) / (b - a)


def hull(items: Sequence[Sequence[Option]]) -> Hull:
    """The assignments that are optimal at some price of a unit of size.

    >>> found = hull([[(2, 5.0), (3, 1.0)], [(2, 4.0), (4, 0.0)]])
    >>> found.sizes, found.costs, found.choice(1), found.lower_bound(6)
    ([4, 5, 7], [9.0, 5.0, 1.0], (1, 0), 3.0)
    """
    _check(items, 1)
    start, moves = [], []
    for i, item in enumerate(items):
        corners = _corners(item)
        start.append(corners[0])
        for a, b in itertools.pairwise(corners):
            gained, size = item[a][1] - item[b][1], item[b][0] - item[a][0]
            moves.append((-gained / size, i, b, size, gained))
    moves.sort(key=lambda m: m[0])  # stable: the steps of one item stay in order
    sizes = [sum(items[i][c][0] for i, c in enumerate(start))]
    costs = [math.fsum(items[i][c][1] for i, c in enumerate(start))]
    for _, _, _, size, gained in moves:
        sizes.append(sizes[-1] + size)
        costs.append(costs[-1] - gained)
    return Hull(sizes, costs, tuple(start), tuple((i, b) for _, i, b, _, _ in moves))


def _corners(item: Sequence[Option]) -> list[int]:
    """Options on the lower left convex hull, by rising size."""
    found: list[int] = []
    for c in sorted(range(len(item)), key=lambda c: item[c]):
        size, cost = item[c]
        if found and cost >= item[found[-1]][1]:
            continue
        while len(found) > 1:
            (s0, c0), (s1, c1) = item[found[-2]], item[found[-1]]
            if (c1 - c0) * (size - s1) < (cost - c1) * (s1 - s0):
                break
            found.pop()
        found.append(c)
    return found


def _check(items: Sequence[Sequence[Option]], most: int) -> None:
    if not items or not all(items):
        what = f"{sum(not item for item in items)} of {len(items)} items have no option"
        raise ContractError(what, where="items", remedy="Give every item an option or more")
    if most < 1:
        raise ContractError(f"{most} states hold nothing", where="most", remedy=f"Use {MOST}")
    wrong = [(s, c) for item in items for s, c in item if s < 0 or not math.isfinite(c)]
    if wrong:
        what = f"an option of size {wrong[0][0]} and cost {wrong[0][1]}"
        raise ContractError(what, where="items", remedy="Sizes must be 0 or more, costs finite")
