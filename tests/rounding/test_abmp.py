"""ABMP: who gets a plane more, who one less, and that the mean is kept."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, RecipeError
from dlqc.rounding.abmp import GAUSSIAN, allocate, allocate_model, scores, spend


def test_scores_are_sums_of_saliencies() -> None:
    weight, spread = torch.randn(5, 12), torch.rand(12, dtype=torch.float64) + 0.1
    saliency = (weight.double() / spread) ** 2
    torch.testing.assert_close(scores(weight, spread, 3), torch.stack([p.sum() for p in saliency.split(4, dim=1)]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 0.5))
def test_as_many_go_up_as_down_and_by_rank(values: list[float], share: float) -> None:
    ranking = torch.tensor(values, dtype=torch.float64)
    orders = torch.tensor(allocate(ranking, share))
    moved = int(share * len(values) + 1e-9)
    assert int((orders == 3).sum()) == int((orders == 1).sum()) == moved
    assert int(orders.sum()) == 2 * len(values)
    for high, low in product((3, 2), (2, 1)):
        if high > low and moved and bool((orders == high).any()) and bool((orders == low).any()):
            assert ranking[orders == high].min() >= ranking[orders == low].max()


def test_the_share_of_the_paper() -> None:
    orders = allocate(torch.arange(96, 0, -1))
    assert orders == (3,) * 4 + (2,) * 88 + (1,) * 4
    assert allocate(torch.arange(19)) == (2,) * 19
    assert allocate(torch.ones(20)) == (3,) + (2,) * 18 + (1,)
    assert allocate(torch.ones(40), 0.0, mean=3) == (3,) * 40


def test_a_model_is_ranked_by_groups_of_one_cost() -> None:
    found = allocate_model(
        {
            "a": torch.tensor([1.0, 2, 3, 4]),
            "wide": torch.tensor([500.0, 6, 7, 800]),
            "b": torch.tensor([10.0, 20, 30, 40]),
        },
        {"a": 64, "wide": 256, "b": 64},
        0.25,
    )
    assert found == {"a": (1, 1, 2, 2), "wide": (2, 1, 2, 3), "b": (2, 2, 3, 3)}
    assert list(found) == ["a", "wide", "b"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), st.integers(0, 12))
def test_spending_is_optimal_for_the_estimate(values: list[float], extra: int) -> None:
    extra = min(extra, 2 * len(values))
    found = spend(torch.tensor(values, dtype=torch.float64), 1 + extra / len(values))
    assert sum(found) == len(values) + extra
    every = [o for o in product((1, 2, 3), repeat=len(values)) if sum(o) == sum(found)]

    def left(orders: tuple[int, ...]) -> float:
        return sum(value * GAUSSIAN[order] for value, order in zip(values, orders, strict=True))

    assert left(found) <= min(map(left, every)) * (1 + 1e-9)


def test_errors() -> None:
    ranking = torch.arange(20.0)
    with pytest.raises(RecipeError, match=r"^share: a share of 0.6 of the groups cannot go up and another go down\. U"):
        allocate(ranking, 0.6)
    with pytest.raises(
        RecipeError, match=r"^mean: groups of 3 planes cannot both gain and lose one\. Use 2 planes, or "
    ):
        allocate(ranking, mean=3)
    with pytest.raises(RecipeError, match=r"^mean: a mean of 3.5 planes is not within 1 and 3\. Use 2$"):
        spend(ranking, 3.5)
    ranking[3] = float("nan")
    for function in (allocate, spend):
        with pytest.raises(ContractError, match=r"^scores: 1 of 20 group scores are not finite\. Check the weight and"):
            function(ranking)
    with pytest.raises(
        ContractError, match=r"^spread: 3 groups and a spread of \(8,\) do not fit 8 input features\. T"
    ):
        scores(torch.ones(2, 8), torch.ones(8), 3)
