from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlqc.diffusion.denoising import Step
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.diffusion.trajectory import compare_trajectories, kendall, ratio_interval, spearman
from dlqc.errors import FeasibilityError

Model = Callable[[Tensor], Tensor]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7))
def test_correlations_of_ranks_with_ties(pairs: list[tuple[int, int]]) -> None:
    """Kendall's tau-b by counting pairs, Spearman's rho as the covariance of mean ranks."""
    x, y = (torch.tensor(values) for values in zip(*pairs, strict=True))
    agree = ties_x = ties_y = total = 0
    for (a, b), (c, d) in itertools.combinations(pairs, 2):
        total += 1
        agree += (a - c) * (b - d) > 0
        agree -= (a - c) * (b - d) < 0
        ties_x += a == c
        ties_y += b == d
    norm = math.sqrt((total - ties_x) * (total - ties_y))
    if norm:
        assert kendall(x, y) == pytest.approx(agree / norm)
    ranks = []
    for values in zip(*pairs, strict=True):
        places: dict[int, list[int]] = {}
        for place, value in enumerate(sorted(values)):
            places.setdefault(value, []).append(place)
        ranks.append([sum(places[v]) / len(places[v]) for v in values])
    spread = [math.sqrt(sum((v - sum(r) / len(r)) ** 2 for v in r)) for r in ranks]
    if all(spread):
        shared = sum(
            (a - sum(ranks[0]) / len(pairs)) * (b - sum(ranks[1]) / len(pairs)) for a, b in zip(*ranks, strict=True)
        )
        assert spearman(x, y) == pytest.approx(shared / spread[0] / spread[1])


def test_orders_that_rank_nothing() -> None:
    same, other = torch.tensor([3, 3, 3]), torch.tensor([0, 1, 2])
    assert kendall(same, same) == spearman(same, same) == 1.0
    assert kendall(same, other) == spearman(same, other) == 0.0
    assert kendall(other, other.flip(0)) == spearman(other, other.flip(0)) == -1.0


def test_a_model_goes_along_with_itself(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    prompts = torch.randint(0, 10, (6, 3), generator=torch.Generator().manual_seed(0))
    sampler = LLaDASampler(gen_length=8, temperature=1.0)
    table = compare_trajectories(toy(0), toy(0), prompts, spec, sampler, batch_size=4)
    assert table.identical == 6
    assert table.first_difference.tolist() == [8.0] * 6
    assert table.horizon == 8
    assert table.kendall.tolist() == table.spearman.tolist() == [1.0] * 6
    assert float(table.flips.sum()) == float(table.divergence.abs().sum()) == 0.0
    assert table.nfe_ratio.tolist() == [1.0] * 6
    found = table.intervals()
    assert (found["nfe_ratio"].mean, found["nfe_ratio"].low) == (1.0, 1.0)
    assert found["tokens_per_forward"].mean == 1.0
    assert found["tokens_per_second_ratio"].low <= found["tokens_per_second_ratio"].mean


def test_equals_counting_by_hand(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    prompts = torch.randint(0, 10, (8, 3), generator=torch.Generator().manual_seed(1))
    sampler = FastDLLMSampler(gen_length=8, block_length=4, cache="none", threshold=0.6)
    plain = toy(0)

    def other(ids: Tensor) -> Tensor:
        return plain(ids) * 0.8 + 0.5 * toy(1)(ids)

    table = compare_trajectories(plain, other, prompts, spec, sampler)
    differing = 0
    for row in range(8):
        held: list[dict[int, list[int]]] = []
        results = []
        for model in (plain, other):
            steps: list[Step] = []
            results.append(sampler.run(model, prompts[row : row + 1], spec, seed=row, on_step=steps.append))
            held.append({step.index: step.after[0, 3:].tolist() for step in steps})
        now = [[10] * 8, [10] * 8]
        first, shares = None, []
        for mark in table.marks:
            now = [held[k].get(mark, now[k]) for k in (0, 1)]
            fixed = [i for i in range(8) if now[0][i] != 10 or now[1][i] != 10]
            apart = [i for i in fixed if now[0][i] != now[1][i]]
            shares.append(len(apart) / max(1, len(fixed)))
            if apart and first is None:
                first = mark
        assert table.divergence[row].tolist() == pytest.approx(shares)
        assert table.first_difference[row] == (table.horizon if first is None else first)
        a, b = results
        assert table.flips[row] == (a.generated != b.generated).double().mean()
        assert table.nfe_ratio[row] == pytest.approx(b.nfe / a.nfe)
        assert table.tokens_per_forward[row].tolist() == pytest.approx([8 / a.nfe, 8 / b.nfe])
        assert table.kendall[row] == pytest.approx(kendall(a.committed_at[0], b.committed_at[0]))
        differing += first is not None
    assert 2 < differing
    assert table.identical == 8 - differing
    plainly = table.to_plain()
    assert plainly["prompts"] == 8
    assert plainly["nfe_ratio"]["low"] < plainly["nfe_ratio"]["mean"] < plainly["nfe_ratio"]["high"]


def test_ratios_are_averaged_as_logarithms() -> None:
    interval = ratio_interval(torch.tensor([0.25, 4.0, 1.0, 1.0]))
    assert interval.mean == pytest.approx(1.0)
    assert interval.low * interval.high == pytest.approx(1.0)


def test_refusals(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    sampler = LLaDASampler(gen_length=4)
    with pytest.raises(
        FeasibilityError, match=r"prompts: 1 prompt gives no interval. Give two at least, better twenty"
    ):
        compare_trajectories(toy(0), toy(0), [[1]], spec, sampler)
    with pytest.raises(FeasibilityError, match=r"batch_size: prompts of several lengths ran apart. Use batch_size=1"):
        compare_trajectories(toy(0), toy(0), [[1], [1, 2]], spec, sampler, batch_size=2)
    assert compare_trajectories(toy(0), toy(0), [[1], [1, 2]], spec, sampler).identical == 2
