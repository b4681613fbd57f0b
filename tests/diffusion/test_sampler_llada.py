from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlqc.diffusion.denoising import Step, draw, most_certain, quota
from dlqc.diffusion.masking import generator
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError

Model = Callable[[Tensor], Tensor]


def naive(model: Model, prompt: Tensor, steps: int, length: int, block: int, cfg: float, mask: int) -> list[list[int]]:
    """LLaDA's published loop at temperature 0, token by token. (The mask token is left out of the argmax.)"""
    size = prompt.shape[1]
    x = [row + [mask] * length for row in prompt.tolist()]
    blocks = length // block
    for number in range(blocks):
        start, stop = size + number * block, size + (number + 1) * block
        plan = [block // (steps // blocks)] * (steps // blocks)
        for extra in range(block % (steps // blocks)):
            plan[extra] += 1
        for count in plan:
            logits = model(torch.tensor(x))
            if cfg:
                blind = [[mask] * size + row[size:] for row in x]
                other = model(torch.tensor(blind))
                logits = other + (cfg + 1) * (logits - other)
            for b, row in enumerate(x):
                scored = []
                for i in range(start, stop):
                    if row[i] != mask:
                        continue
                    best = 0
                    for token in range(logits.shape[2]):
                        if token != mask and (logits[b, i, token] > logits[b, i, best] or best == mask):
                            best = token
                    scored.append((-float(torch.softmax(logits[b, i], -1)[best]), i, best))
                for _, i, token in sorted(scored)[:count]:
                    row[i] = token
    return x


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    prompt=st.integers(0, 7),
    blocks=st.integers(1, 4),
    block=st.integers(1, 8),
    per_block=st.integers(1, 9),
    decimals=st.sampled_from([None, 0, 1]),
    cfg=st.sampled_from([0.0, 0.0, 0.5, 2.0]),
)
def test_equals_the_published_loop(
    toy: Callable[..., Model],
    spec: DiffusionSpec,
    seed: int,
    batch: int,
    prompt: int,
    blocks: int,
    block: int,
    per_block: int,
    decimals: int | None,
    cfg: float,
) -> None:
    model = toy(seed, decimals=decimals)
    ids = torch.randint(0, 10, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    sampler = LLaDASampler(steps=per_block * blocks, gen_length=block * blocks, block_length=block, cfg_scale=cfg)
    result = sampler.run(model, ids, spec, seed=0)
    expected = naive(model, ids, per_block * blocks, block * blocks, block, cfg, 10)
    assert result.ids.tolist() == expected
    assert result.nfe == min(per_block, block) * blocks * (2 if cfg else 1)
    assert result.committed_at.shape == (batch, block * blocks)
    assert int(result.committed_at.min()) >= 0
    assert result.tokens_per_forward == pytest.approx(block * blocks / result.nfe)


def test_steps_are_committed_block_by_block_in_quotas(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    seen: list[Step] = []
    sampler = LLaDASampler(steps=6, gen_length=14, block_length=7)
    result = sampler.run(toy(0), torch.tensor([[1, 2]]), spec, seed=0, on_step=seen.append)
    assert [int(step.committed.sum()) for step in seen] == [3, 2, 2, 3, 2, 2]
    assert [(step.index, step.total, step.block, step.prompt_length) for step in seen] == [
        (i, 6, i // 3, 2) for i in range(6)
    ]
    for i, step in enumerate(seen):
        assert torch.equal(step.masked, step.canvas == 10)
        assert torch.equal(step.committed[:, 2:], result.committed_at == i)
        assert not bool((step.committed & ~step.masked).any())
        assert bool((step.confidence[step.committed] > 0).all())
    assert (result.committed_at[:, :7] < 3).all()
    assert (result.committed_at[:, 7:] >= 3).all()
    assert torch.equal(result.generated, result.ids[:, 2:])


def test_defaults_are_one_block_and_one_token_a_forward(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    result = LLaDASampler(gen_length=5).run(toy(0), torch.tensor([[1]]), spec, seed=0)
    assert result.nfe == 5
    assert sorted(result.committed_at[0].tolist()) == [0, 1, 2, 3, 4]


def test_the_prompt_is_not_changed_and_gradients_are_off(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    prompt = torch.tensor([[1, 2, 3]])

    def model(ids: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return toy(3)(ids)

    result = LLaDASampler(gen_length=4).run(model, prompt, spec, seed=0)
    assert prompt.tolist() == [[1, 2, 3]]
    assert result.ids[:, :3].tolist() == [[1, 2, 3]]


def test_the_mask_token_is_never_committed(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    def stubborn(ids: Tensor) -> Tensor:
        logits: Tensor = toy(1)(ids)
        logits[..., 10] = 30.0
        return logits

    for temperature in (0.0, 1.0):
        result = LLaDASampler(gen_length=8, temperature=temperature).run(stubborn, torch.tensor([[1]]), spec, seed=0)
        assert not bool((result.ids == 10).any())


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_the_seed_decides_all_noise(toy: Callable[..., Model], spec: DiffusionSpec, remasking: str) -> None:
    sampler = LLaDASampler(gen_length=16, temperature=1.0, remasking=remasking)
    torch.manual_seed(0)
    first = sampler.run(toy(0), torch.tensor([[1, 2]]), spec, seed=5)
    torch.manual_seed(1)
    again = sampler.run(toy(0), torch.tensor([[1, 2]]), spec, seed=5)
    others = [sampler.run(toy(0), torch.tensor([[1, 2]]), spec, seed=seed) for seed in (6, 7, 8)]
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.committed_at, again.committed_at)
    assert not all(torch.equal(first.committed_at, other.committed_at) for other in others)


def test_random_remasking_commits_every_position_equally_often(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    prompt = torch.ones(4000, 1, dtype=torch.long)
    result = LLaDASampler(steps=2, gen_length=4, remasking="random").run(toy(0), prompt, spec, seed=0)
    first = (result.committed_at == 0).double().mean(0)
    assert torch.allclose(first, torch.full((4,), 0.5, dtype=torch.float64), atol=0.04)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 5.0], dtype=torch.float64)
    rng = generator(0)
    drawn = draw(
        logits.expand(40_000, 4),
        temperature,
        3,
        lambda: torch.rand(40_000, 4, generator=rng, dtype=torch.float64),
    )
    share = torch.bincount(drawn, minlength=4) / 40_000
    expected = torch.cat([(logits[:3] / temperature).softmax(0), torch.zeros(1)])
    assert torch.allclose(share.double(), expected.double(), atol=0.01)


def test_fill_has_quotas_for_each_row(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    canvas = torch.tensor([[10, 1, 10, 10, 2, 10, 10], [1, 10, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    model = toy(4)
    result = LLaDASampler(steps=2).fill(model, canvas, spec, seed=0)
    assert (result.ids != 10).all()
    assert torch.equal(result.ids[canvas != 10], canvas[canvas != 10])
    assert torch.equal(result.committed_at == -1, canvas != 10)
    assert [(result.committed_at == step).sum(1).tolist() for step in (0, 1)] == [[3, 1, 0], [2, 0, 0]]
    assert result.nfe == 2
    assert result.tokens_per_forward == 1.0
    assert (canvas == 10).sum() == 6
    alone = naive(model, torch.zeros(1, 0, dtype=torch.long), 2, 6, 6, 0.0, 10)
    assert LLaDASampler(steps=2).fill(model, torch.full((1, 6), 10), spec, seed=0).ids.tolist() == alone


def test_fill_without_masks_runs_no_forward(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    result = LLaDASampler(steps=2).fill(toy(0), torch.tensor([[1, 2]]), spec, seed=0)
    assert (result.nfe, result.tokens_per_forward) == (0, 0.0)


@given(masks=st.lists(st.integers(0, 40), min_size=1, max_size=4), steps=st.integers(1, 12))
def test_quota_adds_up_evenly(masks: list[int], steps: int) -> None:
    plan = quota(torch.tensor(masks), steps)
    assert plan.sum(1).tolist() == masks
    assert int((plan.max(1).values - plan.min(1).values).max()) <= 1
    assert bool((plan.diff(dim=1) <= 0).all())


def test_ties_go_to_the_lowest_position() -> None:
    ranking = torch.tensor([[0.5, 0.5, 0.5, 0.7], [0.1, 0.2, 0.2, 0.2]])
    assert most_certain(ranking, torch.tensor([2, 3])).long().tolist() == [[1, 0, 0, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gen_length": 100, "block_length": 32},
            "gen_length: 100 tokens do not divide into blocks of 32. Use gen_length=96, or block_length=25",
        ),
        (
            {"gen_length": 64, "block_length": 16, "steps": 30},
            "steps: 30 steps do not divide among 4 blocks. Use steps=32",
        ),
        ({"gen_length": 0}, "gen_length: 0 is less than 1. Use 1 or more"),
        ({"steps": 0}, "steps: 0 is less than 1"),
        ({"block_length": -1}, "block_length: -1 is less than 1"),
        ({"temperature": -0.5}, "temperature: -0.5 is not at least 0. Use 0 or more"),
        ({"temperature": float("nan")}, "temperature: nan is not at least 0"),
        ({"cfg_scale": -1.0}, "cfg_scale: -1.0 is not at least 0"),
        ({"remasking": "low-confidence"}, "remasking: 'low-confidence' is unknown. Did you mean 'low_confidence'?"),
        ({"remasking": "x"}, "remasking: 'x' is unknown. Known: low_confidence, random"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(FeasibilityError) as caught:
        LLaDASampler(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            torch.ones(1, 60, dtype=torch.long),
            "prompt_ids: 60 with 8 to generate are 68 tokens, the model was made for 64. Use gen_length=4 or less",
        ),
        (
            torch.ones(1, 64, dtype=torch.long),
            "are 72 tokens, the model was made for 64. Cut the prompt below 64 tokens",
        ),
        (torch.tensor([[1, 10]]), "prompt_ids: row 0 has the mask token 10 at position 1. Give text without masks"),
        (torch.zeros(0, 3, dtype=torch.long), "prompt_ids: the batch is empty. Give at least one row"),
        (torch.tensor([1, 2]), "prompt_ids: a torch.int64 tensor of shape [2]"),
        (torch.tensor([[99]]), "ids from 99 to 99, the vocabulary has 11"),
    ],
)
def test_prompts_that_cannot_be(toy: Callable[..., Model], spec: DiffusionSpec, prompt: Tensor, message: str) -> None:
    with pytest.raises(FeasibilityError) as caught:
        LLaDASampler(gen_length=8).run(toy(0), prompt, spec, seed=0)
    assert message in str(caught.value)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_the_step(
    toy: Callable[..., Model], spec: DiffusionSpec, poison: float
) -> None:
    calls = 0

    def breaks(ids: Tensor) -> Tensor:
        nonlocal calls
        logits: Tensor = toy(0)(ids)
        if calls == 2:
            logits[1, 4, 3] = poison
        calls += 1
        return logits

    with pytest.raises(
        ModelError, match=r"step 2: the logits of 1 of 8 positions are not finite, first in row 1 at pos"
    ):
        LLaDASampler(gen_length=4).run(breaks, torch.ones(2, 2, dtype=torch.long), spec, seed=0)


def test_fill_needs_steps_and_ids(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    with pytest.raises(FeasibilityError, match=r"steps: filling needs a number of steps. Give steps=, say 4"):
        LLaDASampler().fill(toy(0), torch.tensor([[10]]), spec, seed=0)
    with pytest.raises(FeasibilityError, match=r"canvas: the batch is empty"):
        LLaDASampler(steps=1).fill(toy(0), torch.zeros(0, 2, dtype=torch.long), spec, seed=0)
