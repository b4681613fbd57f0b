from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_attention import MASK, VOCAB, ToyDenoiser, naive_forward

from dlqc.cached import CachedModel
from dlqc.diffusion.network import cached_model
from dlqc.diffusion.sampler_block import STRATEGIES, BlockDiffusionSampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

SPEC = DiffusionSpec(mask_id=MASK, vocab_size=VOCAB, max_length=64, eos_id=9, attention="block-causal")
MODELS: dict[tuple[int, int], CachedModel] = {}


def graph(seed: int, block: int) -> CachedModel:
    if (seed, block) not in MODELS:
        MODELS[seed, block] = cached_model(ToyDenoiser(seed, block), SPEC)
    return MODELS[seed, block]


def published(
    toy: ToyDenoiser, prompt: list[int], length: int, steps: int, strategy: str, level: float, edit: float, most: int
) -> tuple[list[int], int, int]:
    """The published loop, one row: ids, forwards without those that store keys and values, edits."""
    size = toy.block or 1
    blocks = math.ceil((len(prompt) + length) / size)
    x = prompt + [MASK] * (blocks * size - len(prompt))
    nfe = edits = 0
    for number in range(len(prompt) // size, blocks):
        start, stop = number * size, (number + 1) * size
        given = [token != MASK for token in x[start:stop]]
        plan = [size // steps + (extra < size % steps) for extra in range(steps)]
        step = post = 0
        while True:
            masks = [i for i in range(start, stop) if x[i] == MASK]
            if not masks and strategy != "joint_threshold":
                break
            logits = naive_forward(toy, x, range(stop), {}, stop)
            nfe += 1
            p = {i: logits[i].softmax(0) for i in range(start, stop)}
            best = {i: max((t for t in range(VOCAB) if t != MASK), key=lambda t: float(logits[i][t])) for i in p}
            sure = {i: float(p[i][best[i]]) for i in p}
            ranked = sorted(masks, key=lambda i: (-sure[i], i))
            count = plan[min(step, steps - 1)]
            if strategy == "sequential":
                chosen = [i for i in range(min(masks), min(masks) + count) if i in masks]
            elif strategy == "low_confidence_static":
                chosen = ranked[:count]
            elif strategy == "low_confidence_dynamic":
                high = [i for i in masks if sure[i] > level]
                chosen = high if len(high) >= count else ranked[:count]
            elif strategy == "entropy_bounded":
                entropy = {i: -sum(float(q) * math.log(float(q)) for q in p[i] if q > 0) for i in masks}
                ordered = sorted(masks, key=lambda i: (entropy[i], i))
                total, chosen = 0.0, []
                for i in ordered:
                    total += entropy[i]
                    if total < level:
                        chosen.append(i)
                chosen = chosen or ordered[:1]
            else:
                if not masks:
                    post += 1
                    if post > most:
                        break
                chosen = [i for i in masks if sure[i] > level] or ranked[:1]
                overwritten = [
                    i
                    for i in range(start, stop)
                    if x[i] != MASK and not given[i - start] and best[i] != x[i] and sure[i] > edit
                ]
                edits += len(overwritten)
                chosen = chosen + overwritten
                if not chosen:
                    break
            for i in chosen:
                x[i] = best[i]
            step += 1
    return x[: len(prompt) + length], nfe, edits


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1),
    words=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    length=st.integers(1, 7),
    block=st.sampled_from([1, 3, 4]),
    steps=st.integers(1, 4),
    strategy=st.sampled_from(STRATEGIES),
    level=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    edit=st.sampled_from([0.0, 0.4]),
    most=st.integers(0, 3),
)
def test_equals_the_published_loop(
    seed: int,
    words: list[int],
    length: int,
    block: int,
    steps: int,
    strategy: str,
    level: float,
    edit: float,
    most: int,
) -> None:
    # Without a prompt all positions of this model are alike, and the order of ties would hang on rounding.
    steps = min(steps, block)
    sampler = BlockDiffusionSampler(
        gen_length=length,
        block_length=block,
        steps=steps,
        strategy=strategy,
        threshold=level,
        entropy_bound=2 * level,
        edit_threshold=edit,
        max_edit_steps=most,
    )
    bound = 2 * level if strategy == "entropy_bounded" else level
    x, nfe, edits = published(ToyDenoiser(seed, block), words, length, steps, strategy, bound, edit, most)
    ids = torch.tensor([words], dtype=torch.long).reshape(1, -1)
    cached = sampler.run(graph(seed, block), ids, SPEC)
    assert cached.ids[0].tolist() == x
    plain = BlockDiffusionSampler(**{**vars(sampler), "cache": False}).run(ToyDenoiser(seed, block), ids, SPEC)
    assert plain.ids[0].tolist() == x
    assert (plain.nfe, int(plain.edits)) == (nfe, edits)
    blocks = math.ceil((len(words) + length) / block) - len(words) // block
    stores = (len(words) >= block) + (0 if strategy == "joint_threshold" else blocks - 1)
    assert cached.nfe == nfe + stores
    assert int(cached.committed_at.min()) >= 0


def test_edits_happen_and_stop() -> None:
    """Else the test above would say nothing of them."""
    prompts = torch.randint(0, 10, (40, 2), generator=torch.Generator().manual_seed(0))
    options = {"gen_length": 12, "block_length": 4, "strategy": "joint_threshold", "threshold": 0.2}
    many = BlockDiffusionSampler(**options).run(graph(0, 4), prompts, SPEC)  # type: ignore[arg-type]
    none = BlockDiffusionSampler(edit_threshold=1.0, **options).run(graph(0, 4), prompts, SPEC)  # type: ignore[arg-type]
    assert int(many.edits.sum()) > 10
    assert int(none.edits.sum()) == 0
    commits = list(BlockDiffusionSampler(**options).stream(graph(0, 4), prompts, SPEC))  # type: ignore[arg-type]
    assert sum(c.edit for c in commits) == int(many.edits.sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_know_what_runs_beside_it(strategy: str, temperature: float) -> None:
    temperature = 0.0 if strategy == "joint_threshold" else temperature
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 10, (size,), generator=rng) for size in (5, 2, 5, 5, 8)]
    sampler = BlockDiffusionSampler(gen_length=7, strategy=strategy, temperature=temperature, threshold=0.4)
    together = sampler.run(graph(1, 4), prompts, SPEC, seed=3)
    for row, prompt in enumerate(prompts):
        alone = sampler.run(graph(1, 4), prompt[None], SPEC, seed=3 + row)
        assert torch.equal(together.generated[row], alone.generated[0])
        assert int(together.evaluations[row]) == alone.nfe == int(alone.evaluations)


def test_a_row_ends_with_the_block_of_its_end_token() -> None:
    prompts = torch.randint(0, 9, (30, 4), generator=torch.Generator().manual_seed(2))
    on = BlockDiffusionSampler(gen_length=16, stop_at_eos=True, temperature=2.0).run(graph(2, 4), prompts, SPEC)
    off = BlockDiffusionSampler(gen_length=16, temperature=2.0).run(graph(2, 4), prompts, SPEC)
    ended = 0
    for row in range(30):
        made, whole = on.generated[row].tolist(), off.generated[row].tolist()
        if 9 not in whole:
            assert made == whole
            continue
        end = (whole.index(9) // 4 + 1) * 4
        assert made == whole[:end] + [9] * (16 - end)
        ended += end < 16
        assert int(on.evaluations[row]) <= int(off.evaluations[row])
    assert ended > 3


def test_models_that_are_not_block_causal_are_refused() -> None:
    sampler = BlockDiffusionSampler(gen_length=4)
    with pytest.raises(FeasibilityError, match=r"block_length: the model is not block-causal with blocks of 4. Give"):
        sampler.run(graph(0, 3), torch.tensor([[1]]), SPEC)
    with pytest.raises(FeasibilityError, match=r"or use fast_dllm, which takes models with full attention"):
        sampler.run(ToyDenoiser(0), torch.tensor([[1]]), SPEC)
    full = DiffusionSpec(mask_id=MASK, vocab_size=VOCAB, max_length=64)
    with pytest.raises(FeasibilityError, match=r"the model is not block-causal"):
        BlockDiffusionSampler(gen_length=4, cache=False).run(ToyDenoiser(0), torch.tensor([[1]]), full)
    with pytest.raises(FeasibilityError, match=r"stop_at_eos: the model has no end-of-text token"):
        BlockDiffusionSampler(stop_at_eos=True, gen_length=4).run(ToyDenoiser(0), torch.tensor([[1]]), full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "low_confidence"}, "strategy: 'low_confidence' is unknown. Did you mean 'low_confidence_"),
        ({"steps": 5}, "steps: 5 steps for blocks of 4 tokens. Use steps=4 or fewer: they are the steps of one block"),
        ({"edit_threshold": 2.0}, "edit_threshold: 2 is no probability"),
        (
            {"strategy": "joint_threshold", "temperature": 1.0},
            "temperature: edits of drawn tokens need not come to an end. Use temperature=0 with joint_threshold",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(FeasibilityError) as caught:
        BlockDiffusionSampler(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)
