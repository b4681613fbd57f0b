"""calibrate: states are made as asked, from text or from the model itself, and the graph is not touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.calibration import (
    Certainty,
    Clean,
    ForwardProcess,
    MaskedSimulation,
    TokenRows,
    Uniform,
    draw_states,
    rollout_rows,
)
from dlqc.errors import CalibrationError, FeasibilityError
from dlqc.graph import fingerprint
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate

CaseMaker = Callable[..., Any]


@pytest.mark.parametrize("sampler", [Clean(), ForwardProcess(), MaskedSimulation(0.5, 4)])
@pytest.mark.parametrize("weight", [Uniform(), Certainty()])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_states_are_those_of_the_sampler_and_the_weight(case: CaseMaker, sampler: Any, weight: Any, name: str) -> None:
    k = case(name)
    k.ctx.seed = 7
    report = k.apply(Calibrate(sampler, weight, sequences=6))
    expected = draw_states(k.ctx.rows, sampler, weight, k.ctx.spec, seed=7, logits=k.forward)
    assert torch.equal(k.ctx.states.ids, expected.ids)
    assert torch.equal(k.ctx.states.weights, expected.weights)
    assert torch.equal(k.ctx.states.t, expected.t)
    assert k.ctx.spec.shift == (name == "dream")
    masked = float((expected.ids == k.ctx.spec.mask_id).float().mean())
    assert report.metrics == {"states": 6, "tokens": 96, "masked_share": masked}
    head = f"6 states of 16 tokens from 6 rows of random, {masked:.0%} masked; "
    assert report.notes[0].startswith(
        f"{head}sampler {sampler.name}, uniform emphasis, weight {weight.name}; states by "
    )
    assert report.sites == 6


@pytest.mark.parametrize(
    ("count", "sequences", "expected"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 3, [0, 2, 4]),
        (6, 1, [0]),
        (3, 7, [0, 1, 2, 0, 1, 2, 0]),
    ],
)
def test_rows_are_spread_over_the_text_and_used_again(
    case: CaseMaker, count: int, sequences: int, expected: list[int]
) -> None:
    k = case("llada")
    k.ctx.rows = TokenRows(torch.arange(count)[:, None].expand(count, 16), "numbers")
    k.apply(Calibrate(MaskedSimulation(prefix=0.5), sequences=sequences))
    assert k.ctx.states.clean[:, 0].tolist() == expected
    again = k.ctx.states.ids[k.ctx.states.clean[:, 0] == 0]
    if len(again) > 1:
        assert not torch.equal(again[0], again[1])  # other masks


def test_without_text_the_model_gives_its_own(case: CaseMaker) -> None:
    k = case("dream")
    k.ctx.rows = None
    report = k.apply(Calibrate(Clean(), sequences=70, length=12))
    expected = rollout_rows(k.forward, k.ctx.spec, rows=64, length=12, seed=0)
    assert torch.equal(k.ctx.states.ids[:64], expected.ids)
    assert torch.equal(k.ctx.states.ids[64:], expected.ids[:6])
    assert report.notes == [
        "70 states of 12 tokens from 64 rows of the model's own rollouts (64 rows, data-free), 0% masked; sampler clean, "
        "uniform emphasis, weight uniform; states by mask ratio: 70 at 0, 0 to 0.25, 0 to 0.5, 0 to 0.75, 0 to 1"
    ]
    assert k.ctx.rows is not None


def test_the_graph_is_not_touched(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    k.apply(Calibrate(weight=Certainty(), sequences=2))
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_twice_gives_the_same_states_and_another_seed_others(case: CaseMaker) -> None:
    k = case("llada")
    found = []
    for seed in (0, 0, 1):
        k.ctx.seed = seed
        k.apply(Calibrate(sequences=6))
        found.append(k.ctx.states.ids)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("sequences", "length"), [(0, 16), (4, 1), (-1, 0)])
def test_nothing_to_hold_is_infeasible(case: CaseMaker, sequences: int, length: int) -> None:
    k = case("llada")
    message = rf"^calibrate: {sequences} sequences of {length} tokens hold nothing\. Nothing was changed or written$"
    with pytest.raises(FeasibilityError, match=message):
        PassManager((Calibrate(sequences=sequences, length=length),)).run(k.graph, k.ctx)


def test_no_rows(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.rows = TokenRows(torch.zeros(0, 16, dtype=torch.int64), "nothing")
    with pytest.raises(CalibrationError, match=r"^calibration: there are no token rows\. Give more text$"):
        k.apply(Calibrate())
