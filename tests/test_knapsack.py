"""The knapsack against exhaustive search, at every limit; its bounds where it is not exact."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError
from dlqc.knapsack import Option, frontier, hull

COSTS = st.integers(-3, 40).map(float) | st.floats(-1, 100)
ITEMS = st.lists(st.lists(st.tuples(st.integers(0, 30), COSTS), min_size=1, max_size=4), min_size=1, max_size=5)


def everything(items: list[list[Option]]) -> list[tuple[int, float]]:
    """Size and cost of all assignments."""
    return [(sum(s for s, _ in c), math.fsum(k for _, k in c)) for c in itertools.product(*items)]


def least(items: list[list[Option]], limit: int) -> float:
    return min((cost for size, cost in everything(items) if size <= limit), default=math.inf)


@settings(max_examples=60, deadline=None)
@given(ITEMS)
def test_every_limit_gets_the_cheapest_assignment(items: list[list[Option]]) -> None:
    found = frontier(items)
    assert found.slack == 0
    assert found.sizes == sorted(set(found.sizes))
    assert found.costs == sorted(set(found.costs), reverse=True)
    assert found.sizes[0] == sum(min(s for s, _ in item) for item in items)
    for limit in range(found.sizes[0], found.sizes[-1] + 2):
        index = found.at(limit)
        assert found.sizes[index] <= limit
        assert found.costs[index] == pytest.approx(least(items, limit), abs=1e-9)
    for index, (size, cost) in enumerate(zip(found.sizes, found.costs, strict=True)):
        chosen = [item[c] for item, c in zip(items, found.choice(index), strict=True)]
        assert sum(s for s, _ in chosen) == size
        assert sum(k for _, k in chosen) == pytest.approx(cost, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(ITEMS, st.integers(1, 12))
def test_a_thinned_frontier_keeps_its_bound(items: list[list[Option]], most: int) -> None:
    found = frontier(items, most=most)
    assert len(found.sizes) <= most + 2
    smallest = sum(min(s for s, _ in item) for item in items)
    assert found.sizes[0] == smallest  # whatever can be met is met
    for limit in range(smallest, sum(max(s for s, _ in item) for item in items) + 1):
        index = found.at(limit)
        assert found.sizes[index] <= limit
        assert found.costs[index] >= least(items, limit) - 1e-9
        assert found.costs[index] <= least(items, limit - found.slack) + 1e-9


def test_thinning_happens_and_costs_something() -> None:
    items = [[(i + 1, 0.0), (0, float(2**i))] for i in range(10)]
    exact, coarse = frontier(items), frontier(items, most=8)
    assert coarse.slack > 0
    assert any(coarse.costs[coarse.at(s)] > c for s, c in zip(exact.sizes, exact.costs, strict=True))


@settings(max_examples=60, deadline=None)
@given(ITEMS)
def test_the_hull_is_optimal_at_its_points_and_a_bound_between_them(items: list[list[Option]]) -> None:
    found = hull(items)
    for index, (size, cost) in enumerate(zip(found.sizes, found.costs, strict=True)):
        chosen = [item[c] for item, c in zip(items, found.choice(index), strict=True)]
        assert sum(s for s, _ in chosen) == size
        assert math.fsum(k for _, k in chosen) == pytest.approx(cost, abs=1e-9)
        # Steps of one price come in some order, so a point between two corners may lie on the hull of a flat piece.
        assert cost == pytest.approx(found.lower_bound(size), abs=1e-9)
        assert cost <= least(items, size) + 1e-9
    for limit in range(found.sizes[0], found.sizes[-1] + 2):
        assert found.lower_bound(limit) <= least(items, limit) + 1e-9
    assert found.lower_bound(found.sizes[0] - 1) == math.inf


def test_equal_options_and_one_item() -> None:
    found = frontier([[(3, 1.0), (3, 1.0), (5, 1.0)]])
    assert (found.sizes, found.choice(0)) == ([3], (0,))
    assert hull([[(3, 1.0), (3, 0.5)]]).costs == [0.5]


def test_sizes_of_a_large_model_stay_few() -> None:
    """224 units of four widths, of sizes as an 8-billion-parameter model has them: exact at once."""
    sizes = [3, 1, 6, 3] * 56
    items = [
        [(4096**2 * s * (129 * b + 16) // 128, s / 4.0**b * (1 + i % 7)) for b in (2, 3, 4, 8)]
        for i, s in enumerate(sizes)
    ]
    found = frontier(items)
    assert found.slack == 0
    limit = int(3.2 * sum(sizes) * 4096**2)
    index = found.at(limit)
    bound = hull(items).lower_bound(limit)
    assert bound <= found.costs[index] <= 1.01 * bound


def test_a_limit_that_nothing_meets() -> None:
    with pytest.raises(
        FeasibilityError, match=r"^limit: the smallest assignment has size 4, more than 3\. Allow 4 or more$"
    ):
        frontier([[(4, 1.0)]]).at(3)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], r"^items: 0 of 0 items have no option\. Give every item an option or more$"),
        ([[(1, 1.0)], []], r"^items: 1 of 2 items have no option\."),
        ([[(-1, 1.0)]], r"^items: an option of size -1 and cost 1\.0\. Sizes must be 0 or more, costs finite$"),
        ([[(1, math.nan)]], r"^items: an option of size 1 and cost nan\."),
    ],
)
def test_items_that_are_none(items: list[list[Option]], message: str) -> None:
    for solve in (frontier, hull):
        with pytest.raises(ContractError, match=message):
            solve(items)


def test_no_states() -> None:
    with pytest.raises(ContractError, match=r"^most: 0 states hold nothing\. Use 65536$"):
        frontier([[(1, 1.0)]], most=0)
