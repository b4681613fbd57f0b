"""Frontier weights are their formula; the emphasis of states is its formula; block states look like their sampler."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlqc.calibration import (
    SAMPLERS,
    BlockStates,
    Certainty,
    Clean,
    ForwardProcess,
    Frontier,
    States,
    StateSampler,
    TokenRows,
    TokenWeight,
    Uniform,
    draw_states,
)
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import RecipeError
from dlqc.samplers import emphasize

VOCAB, MASK = 50, 49
SPEC = DiffusionSpec(MASK, VOCAB, 64)
SHIFTED = DiffusionSpec(MASK, VOCAB, 64, shift=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(ids: torch.Tensor) -> torch.Tensor:
    table = torch.randn(VOCAB, VOCAB, generator=generator(3))
    place = torch.randn(64, VOCAB, generator=generator(4))
    return table[ids] + 2 * place[: ids.shape[1]] + 0.1 * (ids == MASK).float().sum(1)[:, None, None] * table[0]


def states(sampler: StateSampler, weight: TokenWeight, spec: DiffusionSpec = SPEC, count: int = 12) -> States:
    text = TokenRows(torch.randint(0, MASK, (count, 16), generator=generator()), "random")
    return draw_states(text, sampler, weight, spec, seed=0, logits=model)


# Frontier


@pytest.mark.parametrize("spec", [SPEC, SHIFTED], ids=["plain", "shifted"])
def test_in_one_step_the_frontier_is_what_is_masked(spec: DiffusionSpec) -> None:
    """K = 1: all masked tokens are committed at once, so the weights do not depend on the order."""
    found = states(ForwardProcess(), Frontier(commit=2.0, boost=3.0, confidence=0.5, floor=0.2, steps=1), spec)
    expected = torch.zeros(12, 16, dtype=torch.float64)
    for s in range(12):
        start = found.ids[s] if bool((found.ids[s] == MASK).any()) else torch.full((16,), MASK)
        confidence = model(start[None])[0].double().softmax(-1).amax(-1)
        masked = [i for i in range(16) if int(start[i]) == MASK]
        about = {i: float(confidence[max(i - 1, 0) if spec.shift else i]) for i in masked}
        for i in range(16):
            expected[s, i] = 0.2
            if i in about:
                expected[s, i] += 2.0 * (1 + 3.0 * len(masked) / 16)
                expected[s, i] += 0.5 * about[i] / (sum(about.values()) / len(about))
    if spec.shift:
        expected = torch.stack([expected[:, min(i + 1, 15)] for i in range(16)], dim=1)
    torch.testing.assert_close(found.weights.double(), expected / expected.mean(), rtol=1e-5, atol=0)


def test_clean_text_is_committed_once_early_ones_count_more() -> None:
    """Without confidences only λ0 is left: K groups of equal size, at t = 1, 3/4, 1/2, 1/4."""
    found = states(Clean(), Frontier(commit=1.0, boost=1.0, confidence=0.0, floor=0.0, steps=4))
    for row in found.weights.double():
        levels = row.sort(descending=True).values.reshape(4, 4).mean(1)
        torch.testing.assert_close(levels / levels[-1], torch.tensor([2.0, 1.75, 1.5, 1.25]).double() / 1.25)
    assert len({tuple(row.tolist()) for row in found.weights}) == 12  # every state has an order of its own


def test_the_frontier_commits_the_text_and_sees_it() -> None:
    """Each canvas has the text where the last one had some of its masks, and the state is where it begins."""
    seen: list[torch.Tensor] = []

    def watch(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return model(ids)

    text = torch.randint(0, MASK, (3, 16), generator=generator())
    found = draw_states(TokenRows(text, "random"), BlockStates(8), Frontier(steps=4), SPEC, seed=0, logits=watch)
    assert torch.equal(seen[0], found.ids)
    assert len(seen) == 4
    for before, after in itertools.pairwise(seen):
        assert bool(((after == MASK) <= (before == MASK)).all())
        assert torch.equal(after[after != MASK], text[after != MASK])
        assert int((after == MASK).sum()) < int((before == MASK).sum())
    visible = found.weights[found.ids != MASK]
    torch.testing.assert_close(visible, visible[:1].expand_as(visible))
    assert float(visible[0]) < float(found.weights[found.ids == MASK].min())


def test_a_frontier_without_steps() -> None:
    with pytest.raises(RecipeError, match=r"^frontier\.steps: 0 steps commit nothing\. Use 8$"):
        Frontier(steps=0)


# Emphasis


@given(t=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_emphasis_is_its_formula(t: list[float]) -> None:
    times = torch.tensor(t, dtype=torch.float64)
    for emphasis, raw in (("early", [0.5 + x for x in t]), ("late", [1.5 - x for x in t])):
        expected = torch.tensor(raw, dtype=torch.float64) / (sum(raw) / len(raw))
        found = emphasize(times, emphasis)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
        assert 1 / 3 - 1e-9 <= float(found.min()) <= float(found.max()) <= 3 + 1e-9
    assert torch.equal(emphasize(times, "uniform"), torch.ones_like(times))


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("weight", [Uniform(), Certainty()])
def test_emphasis_multiplies_token_weights(cls: Any, weight: TokenWeight) -> None:
    plain, late = states(cls(), weight), states(cls(emphasis="late"), weight)
    assert torch.equal(plain.ids, late.ids)
    expected = plain.weights.double() * (1.5 - plain.t.double())[:, None]
    torch.testing.assert_close(late.weights.double(), expected / expected.mean(), rtol=1e-5, atol=0)
    assert float(late.weights.double().mean()) == pytest.approx(1, abs=1e-6)


# Block states


@given(
    count=st.integers(1, 20),
    length=st.integers(2, 40),
    block=st.integers(1, 12),
    prompt=st.sampled_from([0.0, 0.25, 0.5]),
    seed=st.integers(0, 3),
)
def test_block_states_are_clean_then_partly_then_wholly_masked(
    count: int, length: int, block: int, prompt: float, seed: int
) -> None:
    masked, t = BlockStates(block, prompt).sample(torch.zeros(count, length, dtype=torch.int64), generator(seed))
    first = int(prompt * length)
    assert not bool(masked[:, :first].any())
    assert sorted((t * count).floor().tolist()) == list(range(count))
    for row in masked[:, first:].tolist():
        blocks = [row[i : i + block] for i in range(0, len(row), block)]
        current = next(i for i, part in enumerate(blocks) if any(part))
        assert all(all(part) for part in blocks[current + 1 :])


def test_every_block_is_current_as_often_and_masked_at_its_t() -> None:
    masked, t = BlockStates(50, prompt=0.0).sample(torch.zeros(400, 200), generator())
    current = masked.reshape(400, 4, 50).any(2).float().argmax(1)
    assert torch.bincount(current).tolist() == [100] * 4
    share = masked.reshape(400, 4, 50)[torch.arange(400), current].float().mean(1)
    assert bool(((share - t).abs() <= 5 * (t * (1 - t) / 50).sqrt() + 0.03).all())


def test_with_later_blocks_absent_the_row_ends_with_the_current_one() -> None:
    masked, t = BlockStates(8, later="absent").sample(torch.zeros(200, 32), generator())
    assert not bool(masked[:, :24].any())
    assert bool(masked[:, 24:].any(1).all())
    assert abs(float(masked[:, 24:].float().mean() - t.mean())) < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockStates(0), r"^block_states\.block_length: blocks of 0 tokens hold nothing\. Use 32$"),
        (lambda: BlockStates(prompt=1.0), r"^block_states\.prompt: 1\.0 is outside \[0, 1\)"),
    ],
)
def test_impossible_blocks_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()
