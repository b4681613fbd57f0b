"""Rollouts: snapshots are canvases the sampler really showed, in the shares that were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.calibration import Certainty, States, TokenRows, Uniform, draw_states
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, RecipeError
from dlqc.rollout import Rollout, deal, snapshot_in

VOCAB, MASK = 50, 49
SPEC = DiffusionSpec(MASK, VOCAB, 64)
SHIFTED = DiffusionSpec(MASK, VOCAB, 64, shift=True)
EDGES = [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int = 40, length: int = 32) -> TokenRows:
    return TokenRows(torch.randint(0, MASK, (count, length), generator=generator()), "random")


def model(ids: torch.Tensor) -> torch.Tensor:
    """Logits that depend on the token, the place and the whole canvas; no token wins everywhere."""
    table = torch.randn(VOCAB, VOCAB, generator=generator(3))
    place = torch.randn(64, VOCAB, generator=generator(4))
    return table[ids] + 2 * place[: ids.shape[1]] + 0.1 * (ids == MASK).float().sum(1)[:, None, None] * table[0]


def roll(sampler: Rollout, spec: DiffusionSpec = SPEC, seed: int = 0, **options: Any) -> States:
    given_rows = options.pop("rows", rows())
    return draw_states(given_rows, sampler, Uniform(), spec, seed=seed, logits=options.pop("logits", model), **options)


@pytest.mark.parametrize("spec", [SPEC, SHIFTED], ids=["llada", "dream"])
def test_snapshots_are_canvases_of_the_model_s_own_sampler(spec: DiffusionSpec) -> None:
    """Restated with the sampler called by hand, prompt by prompt (greedy, so batches do not matter)."""
    found = roll(Rollout(steps=12), spec)
    text = rows().ids
    for state in range(40):
        prompt = text[state // 4 * 4, :8]
        seen: list[torch.Tensor] = []
        own = (DreamSampler if spec.shift else LLaDASampler)(steps=12, gen_length=24)
        end = own.run(model, prompt[None], spec, seed=0, on_step=lambda step, seen=seen: seen.append(step.canvas[0]))
        assert torch.equal(found.clean[state], end.ids[0])
        assert any(torch.equal(found.ids[state], canvas) for canvas in seen)
        share = float((found.ids[state, 8:] == MASK).float().mean())
        assert float(found.t[state]) == pytest.approx(share)
    assert not torch.equal(found.clean, text)


def test_each_bucket_has_its_share() -> None:
    found = roll(Rollout(steps=24))
    counts = [int(((found.t > low) & (found.t <= high)).sum()) for low, high in EDGES]
    assert counts == [12, 8, 8, 12]
    upper = roll(Rollout(steps=24, proportions=(0.0, 1.0)))
    assert float(upper.t.min()) > 0.5


def test_states_of_one_rollout_are_of_different_buckets() -> None:
    found = roll(Rollout(steps=24, proportions=(0.25,) * 4))
    for first in range(0, 40, 4):
        assert sorted((found.t[first : first + 4].double() * 4 - 1e-9).floor().tolist()) == [0, 1, 2, 3]


def test_blocks_are_filled_from_left_to_right() -> None:
    """With blocks, everything after a masked block is masked, and what came before is done."""
    found = roll(Rollout(steps=12, block_length=8))
    masked = (found.ids[:, 8:] == MASK).reshape(40, 3, 8)
    partly = masked.any(2) & ~masked.all(2)
    assert bool((partly.sum(1) <= 1).all())
    assert bool(partly.any())
    for state in masked:
        full, none = state.all(1).tolist(), (~state).all(1).tolist()
        assert none == sorted(none, reverse=True)
        assert full == sorted(full)


def test_the_prompt_takes_what_blocks_do_not_fill() -> None:
    found = roll(Rollout(prompt=0.25, steps=16, block_length=16))
    assert torch.equal(found.ids[:, :16], rows().ids[::4].repeat_interleave(4, 0)[:, :16])
    assert bool((found.ids[:, 16:] == MASK).any(0).all())


def test_seed_and_temperature() -> None:
    warm = Rollout(steps=8, temperature=1.0)
    first, again, other = roll(warm), roll(warm), roll(warm, seed=1)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.clean, other.clean)
    assert not torch.equal(first.clean, roll(Rollout(steps=8)).clean)
    assert torch.equal(roll(warm, batch=3).ids, first.ids)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 9),
    length=st.integers(4, 20),
    steps=st.integers(4, 40),
    snapshots=st.integers(1, 5),
    shift=st.booleans(),
)
def test_any_shape(count: int, length: int, steps: int, snapshots: int, shift: bool) -> None:
    found = roll(
        Rollout(steps=steps, snapshots=snapshots, temperature=1.0),
        SHIFTED if shift else SPEC,
        rows=rows(count, length),
    )
    assert found.ids.shape == found.clean.shape == (count, length)
    hidden = found.ids == MASK
    assert torch.equal(found.ids[~hidden], found.clean[~hidden])
    assert not bool((found.clean == MASK).any())
    assert bool(hidden.any(1).all())


def test_certainty_goes_with_rollouts() -> None:
    found = draw_states(rows(), Rollout(steps=8), Certainty(), SPEC, seed=0, logits=model)
    c = torch.where(found.ids == MASK, model(found.ids).double().softmax(-1).amax(-1), 0.7)
    torch.testing.assert_close(found.weights.double(), c / c.mean(), rtol=1e-5, atol=0)


def test_degenerate_rollouts_are_refused_with_numbers() -> None:
    one = torch.zeros(VOCAB)
    one[7] = 60.0
    message = (
        r"^rollout: the model's own rollouts are degenerate: 100% of 240 generated tokens are token 7\. "
        r"Raise temperature to 1, use more steps or blocks, or calibrate with masked_simulation$"
    )
    with pytest.raises(CalibrationError, match=message):
        roll(Rollout(steps=8), logits=lambda ids: one.expand(*ids.shape, VOCAB))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 1.0}, r"^rollout\.prompt: 1\.0 is outside \[0, 1\)"),
        (
            {"proportions": (0.3, 0.3)},
            r"^rollout\.proportions: the shares 0\.3, 0\.3 do not sum to 1\. Use \(0\.3, 0\.2",
        ),
        ({"proportions": (-0.5, 1.5)}, r"^rollout\.proportions: the shares -0\.5, 1\.5 do not"),
        ({"proportions": ()}, r"^rollout\.proportions: the shares of no bucket do not"),
        ({"steps": 3}, r"^rollout\.steps: 3 steps do not reach 4 buckets of mask ratio\. Use 32 steps, at least 4$"),
        ({"snapshots": 0}, r"^rollout\.snapshots: 0 states per rollout are none\. Use 4$"),
        ({"block_length": 0}, r"^rollout\.block_length: blocks of 0 tokens hold nothing\. Use 32, or none"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Rollout(**options)


def test_blocks_that_do_not_go_with_the_model() -> None:
    with pytest.raises(
        CalibrationError, match=r"^rollout\.block_length: a row of 32 tokens leaves 24 after the prompt, le"
    ):
        roll(Rollout(block_length=25))
    with pytest.raises(
        CalibrationError, match=r"^rollout\.block_length: the logits of this model are shifted, and Dream"
    ):
        roll(Rollout(block_length=8), SHIFTED)


@given(count=st.integers(1, 60), hand=st.integers(1, 6), seed=st.integers(0, 5))
def test_dealing_is_fair(count: int, hand: int, seed: int) -> None:
    shares = (0.3, 0.2, 0.2, 0.3)
    dealt = deal(shares, count, hand, generator(seed))
    assert len(dealt) == count
    for bucket, share in enumerate(shares):
        assert abs(dealt.count(bucket) - share * count) < 1


@pytest.mark.parametrize(
    ("ratios", "bucket", "u", "step"),
    [
        ([1.0, 0.9, 0.8, 0.1], 3, 0.0, 0),
        ([1.0, 0.9, 0.8, 0.1], 3, 0.34, 1),
        ([1.0, 0.9, 0.8, 0.1], 3, 0.999, 2),
        ([1.0, 0.75, 0.5, 0.25], 2, 0.9, 1),  # the upper edge belongs to the bucket, the lower to the next
        ([1.0, 0.9, 0.6], 0, 0.5, 2),  # nothing inside: the nearest
    ],
)
def test_the_snapshot_of_a_bucket(ratios: list[float], bucket: int, u: float, step: int) -> None:
    assert snapshot_in(torch.tensor(ratios), bucket, 4, u) == step
