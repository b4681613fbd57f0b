from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_attention import MASK, VOCAB, ToyDenoiser, naive_forward

from dlqc.cached import CachedModel
from dlqc.diffusion.denoising import Step
from dlqc.diffusion.network import cached_model
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

SPEC = DiffusionSpec(mask_id=MASK, vocab_size=VOCAB, max_length=64, eos_id=9)
MODELS: dict[int, CachedModel] = {}


def graph(seed: int) -> CachedModel:
    """Captures are slow, so there are a few models and many prompts."""
    if seed not in MODELS:
        MODELS[seed] = cached_model(ToyDenoiser(seed), SPEC)
    return MODELS[seed]


def published(
    toy: ToyDenoiser,
    prompt: list[int],
    length: int,
    block: int,
    cache: str,
    threshold: float | None,
    factor: float | None,
    per_block: int,
) -> tuple[list[int], int, list[int]]:
    """The published loops, one row, position by position; stale keys and values are what an earlier forward left in `store`."""
    x, size, nfe = prompt + [MASK] * length, len(prompt), 0
    at = [-1] * length
    for number in range(length // block):
        start, stop = size + number * block, size + (number + 1) * block
        plan = [block // per_block + (extra < block % per_block) for extra in range(per_block)]
        store: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        local = 0
        while any(x[i] == MASK for i in range(start, stop)):
            if local == 0 or cache == "none":
                window = range(len(x))
            else:
                window = range(start, len(x)) if cache == "prefix" else range(start, stop)
            logits = naive_forward(toy, x, window, store, len(x))
            nfe += 1
            scored = []
            for i in range(start, stop):
                if x[i] == MASK:
                    p = logits[i].softmax(0)
                    best = max((t for t in range(VOCAB) if t != MASK), key=lambda t: (float(logits[i][t]), -t))
                    scored.append((-float(p[best]), i, best))
            scored.sort()
            if factor is not None:
                count = 1
                for n in range(1, len(scored) + 1):
                    if (n + 1) * (1 + scored[n - 1][0]) <= factor + 1e-12:
                        count = n
            elif threshold is not None:
                count = max(1, sum(-c >= threshold for c, _, _ in scored))
            else:
                count = plan[local]
            for _, i, token in scored[:count]:
                x[i] = token
                at[i - size] = number * (block if threshold or factor else per_block) + local
            local += 1
    return x, nfe, at


@settings(max_examples=16, deadline=None)
@given(
    seed=st.integers(0, 2),
    words=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    blocks=st.integers(1, 3),
    block=st.integers(1, 4),
    cache=st.sampled_from(["none", "prefix", "dual"]),
    rule=st.sampled_from(["threshold", "factor", "quota"]),
    level=st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0]),
    per_block=st.integers(1, 4),
)
def test_equals_the_published_loops(
    seed: int, words: list[int], blocks: int, block: int, cache: str, rule: str, level: float, per_block: int
) -> None:
    # Without a prompt all positions of this model are alike, and the order of ties would hang on rounding.
    per_block = min(per_block, block)
    threshold, factor = (level if rule == "threshold" else None), (2 * level if rule == "factor" else None)
    sampler = FastDLLMSampler(
        gen_length=blocks * block,
        block_length=block,
        cache=cache,  # type: ignore[arg-type]
        threshold=threshold,
        factor=factor,
        steps=blocks * per_block if rule == "quota" else None,
    )
    ids = torch.tensor([words], dtype=torch.long).reshape(1, -1)
    result = sampler.run(graph(seed), ids, SPEC)
    x, nfe, at = published(ToyDenoiser(seed), words, blocks * block, block, cache, threshold, factor, per_block)
    assert result.ids[0].tolist() == x
    assert (result.nfe, result.evaluations.tolist()) == (nfe, [nfe])
    assert result.committed_at[0].tolist() == at
    assert result.tokens_per_forward == pytest.approx(blocks * block / nfe)


def test_stale_keys_change_what_is_generated() -> None:
    """Else the test above would not see whether they are stale."""
    prompts = torch.randint(0, 10, (40, 4), generator=torch.Generator().manual_seed(0))
    found = [
        FastDLLMSampler(gen_length=12, block_length=6, cache=cache, threshold=0.6).run(graph(0), prompts, SPEC).ids  # type: ignore[arg-type]
        for cache in ("none", "prefix", "dual")
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_refresh_at_every_step_is_decoding_without_a_cache(cache: str) -> None:
    prompts = torch.randint(0, 10, (12, 3), generator=torch.Generator().manual_seed(1))
    options = {"gen_length": 12, "block_length": 4, "threshold": 0.5}
    plain = FastDLLMSampler(cache="none", **options).run(graph(1), prompts, SPEC)  # type: ignore[arg-type]
    fresh = FastDLLMSampler(cache=cache, refresh=1, **options).run(graph(1), prompts, SPEC)  # type: ignore[arg-type]
    assert torch.equal(plain.ids, fresh.ids)
    assert torch.equal(plain.committed_at, fresh.committed_at)
    assert (fresh.nfe, fresh.computed) == (plain.nfe, plain.computed)


def test_quotas_without_a_cache_are_lladas_sampler() -> None:
    prompts = torch.randint(0, 10, (8, 3), generator=torch.Generator().manual_seed(2))
    mine = FastDLLMSampler(gen_length=12, block_length=4, cache="none", threshold=None, steps=6)
    theirs = LLaDASampler(gen_length=12, block_length=4, steps=6)
    toy = ToyDenoiser(2)
    assert torch.equal(mine.run(toy, prompts, SPEC).committed_at, theirs.run(toy, prompts, SPEC).committed_at)
    assert torch.equal(mine.run(toy, prompts, SPEC).ids, theirs.run(toy, prompts, SPEC).ids)


def test_the_work_is_counted() -> None:
    prompt = torch.randint(0, 10, (1, 5), generator=torch.Generator().manual_seed(3))
    work = {}
    for cache in ("none", "prefix", "dual"):
        sampler = FastDLLMSampler(gen_length=8, block_length=4, cache=cache, threshold=None)  # type: ignore[arg-type]
        result = sampler.run(graph(0), prompt, SPEC)
        assert result.nfe == 8
        work[cache] = result.computed
    assert work == {"none": 8 * 13, "prefix": 2 * 13 + 3 * 8 + 3 * 4, "dual": 2 * 13 + 6 * 4}


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_know_what_runs_beside_it(cache: str, temperature: float) -> None:
    """Prompts of several lengths, padded on the left, and alone: same seed, same tokens, steps and counts."""
    rng = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 10, (size,), generator=rng) for size in (1, 3, 7, 3, 5)]
    sampler = FastDLLMSampler(gen_length=8, block_length=4, cache=cache, threshold=0.6, temperature=temperature)  # type: ignore[arg-type]
    together = sampler.run(graph(0), prompts, SPEC, seed=20)
    assert together.prompt_length == 7
    for row, prompt in enumerate(prompts):
        alone = sampler.run(graph(0), prompt[None], SPEC, seed=20 + row)
        assert torch.equal(together.generated[row], alone.generated[0])
        assert torch.equal(together.committed_at[row], alone.committed_at[0])
        assert int(together.evaluations[row]) == alone.nfe
    again = sampler.run(graph(0), prompts[::-1], SPEC, seed=[24, 23, 22, 21, 20])
    assert torch.equal(again.generated.flip(0), together.generated)


def test_models_that_cannot_be_padded_run_each_length_by_itself() -> None:
    toy, rng = ToyDenoiser(0), torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 10, (size,), generator=rng) for size in (4, 2, 4)]
    sampler = LLaDASampler(gen_length=6, steps=3)
    batches: list[tuple[int, ...]] = []

    def plain(ids: Tensor) -> Tensor:
        batches.append(tuple(ids.shape))
        logits: Tensor = toy(ids)
        return logits

    together = sampler.run(plain, prompts, SPEC)
    assert batches == [(1, 8)] * 3 + [(2, 10)] * 3
    assert (together.nfe, together.evaluations.tolist()) == (6, [3, 3, 3])
    padded = sampler.run(graph(0), prompts, SPEC)
    for row, prompt in enumerate(prompts):
        alone = sampler.run(plain, prompt[None], SPEC)
        assert torch.equal(together.generated[row], alone.generated[0])
        assert torch.equal(padded.generated[row], alone.generated[0])
        assert torch.equal(together.ids[row, 4 - prompt.numel() :], alone.ids[0])


def test_tokens_are_streamed_as_they_are_fixed() -> None:
    prompt = torch.tensor([[1, 2, 3]])
    sampler = FastDLLMSampler(gen_length=8, block_length=4, threshold=0.4)
    steps: list[Step] = []
    result = sampler.run(graph(0), prompt, SPEC, on_step=steps.append)
    stream = sampler.stream(graph(0), prompt, SPEC)
    first = next(stream)
    commits = [first, *stream]
    assert [c for step in steps for c in step.commits()] == commits
    assert sorted(c.position for c in commits) == list(range(8))
    for c in commits:
        assert int(result.generated[0, c.position]) == c.token
        assert int(result.committed_at[0, c.position]) == c.step
        assert not c.edit
    assert torch.equal(steps[-1].after, result.ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "suffix"}, "cache: 'suffix' is unknown. Known: dual, none, prefix"),
        ({"threshold": 1.5}, "threshold: 1.5 is no probability. Use 0 <= threshold <= 1"),
        ({"factor": -1.0}, "factor: -1.0 is not at least 0"),
        ({"steps": 64}, "steps: a threshold or factor decides how many steps there are. Leave steps out, or set thr"),
        ({"gen_length": 100}, "gen_length: 100 tokens do not divide into blocks of 32. Use gen_length=96, or block_le"),
        ({"refresh": 0}, "refresh: 0 is less than 1"),
        ({"threshold": None, "steps": 30}, "steps: 30 steps do not divide among 4 blocks. Use steps=32"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(FeasibilityError) as caught:
        FastDLLMSampler(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_function_has_no_cache_and_prompts_are_checked() -> None:
    toy = ToyDenoiser(0)
    with pytest.raises(FeasibilityError, match=r"model: a function has no graph whose keys and values could be cached"):
        FastDLLMSampler(gen_length=4).run(lambda ids: toy(ids), torch.tensor([[1]]), SPEC)
    sampler = FastDLLMSampler(gen_length=8, cache="none")
    with pytest.raises(FeasibilityError, match=r"prompt_ids\[1\]: row 0 has the mask token 10 at position 1"):
        sampler.run(toy, [[1], [2, 10]], SPEC)
    with pytest.raises(FeasibilityError, match=r"prompt_ids: the batch is empty. Give at least one row"):
        sampler.run(toy, [], SPEC)
    with pytest.raises(FeasibilityError, match=r"prompt_ids\[0\]: 60 with 8 to generate are 68 tokens"):
        sampler.stream(toy, [[1] * 60], SPEC)
    with pytest.raises(FeasibilityError, match=r"seed: 1 seeds for 2 rows. Give one seed for each row"):
        sampler.run(toy, [[1], [2]], SPEC, seed=[0])
