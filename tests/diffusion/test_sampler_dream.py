from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlqc.diffusion.denoising import Step
from dlqc.diffusion.sampler_dream import DreamSampler, keep_top_k, keep_top_p
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError

Model = Callable[[Tensor], Tensor]

SHIFTED = DiffusionSpec(mask_id=10, vocab_size=11, max_length=64, eos_id=9, shift=True)


def filtered(row: list[float], top_p: float | None, top_k: int | None) -> list[float]:
    """Logits with -inf where Dream's top_p and then top_k drop the token."""
    if top_p is not None and top_p < 1:
        p = torch.tensor(row, dtype=torch.float64).softmax(-1).tolist()
        order = sorted(range(len(row)), key=lambda token: (-row[token], token))
        mass, kept = 0.0, []
        for token in order:
            if kept and mass > top_p:
                break
            kept.append(token)
            mass += p[token]
        row = [value if token in kept else -math.inf for token, value in enumerate(row)]
    if top_k is not None and top_k < len(row):
        bound = sorted(row)[-top_k]
        row = [value if value >= bound else -math.inf for value in row]
    return row


def naive(
    model: Model,
    prompt: Tensor,
    steps: int,
    length: int,
    alg: str,
    top_p: float | None,
    top_k: int | None,
    eps: float,
    mask: int,
) -> tuple[list[list[int]], int]:
    """Dream's published loop at temperature 0 and alg_temp 0; also the number of steps that revealed something."""
    x = [row + [mask] * length for row in prompt.tolist()]
    grid, used = torch.linspace(1, eps, steps + 1), 0
    for i in range(steps):
        logits = model(torch.tensor(x))
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        left = torch.tensor(sum(row.count(mask) for row in x)) / len(x)
        count = int(left * (1 - grid[i + 1] / grid[i])) if i < steps - 1 else int(left)
        used += count > 0
        for b, row in enumerate(x):
            scored = []
            for position, token in enumerate(row):
                if token != mask:
                    continue
                values = filtered(logits[b, position].tolist(), top_p, top_k)
                p = torch.tensor(values, dtype=torch.float64).softmax(-1)
                best = values.index(max(values))
                if alg == "maskgit_plus":
                    score = float(p[best])
                elif alg == "topk_margin":
                    first, second = p.sort(descending=True).values[:2].tolist()
                    score = first - second
                else:
                    score = float((p * (p + 1e-10).log()).sum())
                scored.append((-score, position, best))
            for _, position, token in sorted(scored)[:count]:
                row[position] = token
    return x, used


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    prompt=st.integers(0, 6),
    length=st.integers(1, 16),
    steps=st.integers(1, 20),
    alg=st.sampled_from(["maskgit_plus", "topk_margin", "entropy"]),
    top_p=st.sampled_from([None, 0.3, 0.9, 1.0]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    eps=st.sampled_from([1e-3, 0.1]),
    decimals=st.sampled_from([None, 1]),
)
def test_equals_the_published_loop(
    toy: Callable[..., Model],
    seed: int,
    batch: int,
    prompt: int,
    length: int,
    steps: int,
    alg: str,
    top_p: float | None,
    top_k: int | None,
    eps: float,
    decimals: int | None,
) -> None:
    model = toy(seed, decimals=decimals)
    ids = torch.randint(0, 10, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    sampler = DreamSampler(steps=steps, gen_length=length, alg=alg, top_p=top_p, top_k=top_k, eps=eps)
    result = sampler.run(model, ids, SHIFTED, seed=0)
    expected, used = naive(model, ids, steps, length, alg, top_p, top_k, eps, 10)
    assert result.ids.tolist() == expected
    assert result.nfe == used
    assert int(result.committed_at.min()) >= 0


def test_origin_reveals_each_position_with_the_share_of_the_grid(toy: Callable[..., Model]) -> None:
    prompt = torch.ones(3000, 1, dtype=torch.long)
    result = DreamSampler(steps=4, gen_length=4, alg="origin").run(toy(0), prompt, SHIFTED, seed=0)
    grid = torch.linspace(1, 1e-3, 5)
    left = 1.0
    for step in range(4):
        share = 1.0 if step == 3 else float(1 - grid[step + 1] / grid[step])
        assert float((result.committed_at == step).double().mean()) == pytest.approx(left * share, abs=0.015)
        left *= 1 - share
    assert not bool((result.ids == 10).any())


def test_origin_in_one_step_is_the_argmax_everywhere(toy: Callable[..., Model]) -> None:
    model, prompt = toy(7), torch.tensor([[1, 2, 3]])
    result = DreamSampler(steps=1, gen_length=6, alg="origin").run(model, prompt, SHIFTED, seed=0)
    logits = model(torch.tensor([[1, 2, 3, 10, 10, 10, 10, 10, 10]]))
    assert result.generated.tolist() == logits[:, 2:8].argmax(-1).tolist()


def test_steps_equal_to_the_length_leave_the_first_without_a_forward(toy: Callable[..., Model]) -> None:
    seen: list[Step] = []
    result = DreamSampler(gen_length=8).run(toy(0), torch.tensor([[1]]), SHIFTED, seed=0, on_step=seen.append)
    assert [step.index for step in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert [int(step.committed.sum()) for step in seen] == [1, 1, 1, 1, 1, 1, 2]
    assert (result.nfe, result.tokens_per_forward) == (7, pytest.approx(8 / 7))
    for step in seen:
        assert torch.equal(step.masked, step.canvas == 10)
        assert torch.equal(step.committed[:, 1:], result.committed_at == step.index)


def test_positions_are_drawn_from_the_softmax_of_the_certainty() -> None:
    table = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)

    def model(ids: Tensor) -> Tensor:
        return torch.nn.functional.pad(table, (0, 1), value=-50.0).expand(ids.shape[0], 3, 3)

    spec = DiffusionSpec(mask_id=2, vocab_size=3, max_length=8)
    sampler = DreamSampler(steps=2, gen_length=3, alg="maskgit_plus", alg_temp=0.2, eps=0.2)
    seen: list[Step] = []
    sampler.run(model, torch.zeros(30_000, 0, dtype=torch.long), spec, seed=0, on_step=seen.append)
    assert int(seen[0].committed.sum()) == 30_000
    certainty = table.softmax(-1).max(-1).values
    expected = (certainty / 0.2).softmax(0)
    assert torch.allclose(seen[0].committed.double().mean(0), expected, atol=0.012)


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_tokens_follow_the_filtered_softmax(alg: str) -> None:
    logits = torch.tensor([1.0, 0.5, 0.0, -3.0, -50.0], dtype=torch.float64)
    spec = DiffusionSpec(mask_id=4, vocab_size=5, max_length=8)
    sampler = DreamSampler(steps=1, gen_length=1, alg=alg, temperature=0.5, top_p=0.8)
    prompt = torch.zeros(30_000, 0, dtype=torch.long)
    result = sampler.run(lambda ids: logits.expand(*ids.shape, 5), prompt, spec, seed=0)
    share = torch.bincount(result.ids.flatten(), minlength=5) / 30_000
    expected = torch.tensor([*(logits[:2] / 0.5).softmax(0).tolist(), 0.0, 0.0, 0.0])
    assert torch.allclose(share, expected, atol=0.012)


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_the_seed_decides_all_noise(toy: Callable[..., Model], alg: str) -> None:
    sampler = DreamSampler(gen_length=16, alg=alg, temperature=1.0, alg_temp=0.5)
    torch.manual_seed(0)
    first = sampler.run(toy(0), torch.tensor([[1, 2]]), SHIFTED, seed=5)
    torch.manual_seed(1)
    again = sampler.run(toy(0), torch.tensor([[1, 2]]), SHIFTED, seed=5)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, sampler.run(toy(0), torch.tensor([[1, 2]]), SHIFTED, seed=6).ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [None, 1])
def test_the_mask_token_is_never_committed(toy: Callable[..., Model], temperature: float, top_k: int | None) -> None:
    def stubborn(ids: Tensor) -> Tensor:
        logits = toy(1)(ids)
        logits[..., 10] = 30.0
        return logits

    sampler = DreamSampler(gen_length=8, temperature=temperature, top_k=top_k, top_p=0.9)
    result = sampler.run(stubborn, torch.tensor([[1]]), SHIFTED, seed=0)
    runner_up = toy(1)(torch.tensor([[1, *[10] * 8]]))
    assert not bool((result.ids == 10).any())
    first = result.committed_at.argmin()
    assert int(result.generated[0, first]) == int(runner_up[0, first, :10].argmax())


def test_filters_keep_at_least_the_most_probable() -> None:
    logits = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64).log()
    assert keep_top_p(logits, 0.5).isfinite().tolist() == [True, False, False]
    assert keep_top_p(logits, None) is logits
    assert keep_top_k(logits, 2).isfinite().tolist() == [True, True, False]
    assert keep_top_k(torch.zeros(3), 1).isfinite().tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alg": "topk-margin"}, "alg: 'topk-margin' is unknown. Did you mean 'topk_margin'?"),
        ({"top_p": 1.5}, "top_p: 1.5 is no probability. Use 0 < top_p <= 1"),
        ({"top_k": 0}, "top_k: 0 is less than 1. Use 1 or more"),
        ({"eps": 0.0}, "eps: 0 ends no time grid. Use 0 < eps < 1, say 1e-3"),
        ({"alg_temp": -1.0}, "alg_temp: -1.0 is not at least 0. Use 0 or more"),
        ({"steps": 0}, "steps: 0 is less than 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(FeasibilityError) as caught:
        DreamSampler(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_prompts_and_logits_that_cannot_be(toy: Callable[..., Model]) -> None:
    sampler = DreamSampler(gen_length=4, steps=2)
    with pytest.raises(FeasibilityError, match=r"prompt_ids: row 0 has the mask token 10 at position 0"):
        sampler.run(toy(0), torch.tensor([[10, 1]]), SHIFTED, seed=0)
    with pytest.raises(FeasibilityError, match=r"61 with 4 to generate are 65 tokens.*Use gen_length=3 or less"):
        sampler.run(toy(0), torch.ones(1, 61, dtype=torch.long), SHIFTED, seed=0)
    with pytest.raises(ModelError, match=r"step 0: the logits of 4 of 4 positions are not finite"):
        sampler.run(lambda ids: torch.full((*ids.shape, 11), torch.nan), torch.tensor([[1]]), SHIFTED, seed=0)
