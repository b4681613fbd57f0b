from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import zoo

import dlqc
from dlqc.diffusion.denoising import Sampler
from dlqc.diffusion.registry import SAMPLERS, as_sampler, sampler_text
from dlqc.diffusion.sampler_block import BlockDiffusionSampler
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError, RecipeError

SPEC = DiffusionSpec(mask_id=60, vocab_size=61, max_length=64)


def callable_model(ids: torch.Tensor) -> torch.Tensor:
    return torch.eye(61)[ids * 7 % 60]


@pytest.mark.parametrize(
    "sampler",
    [
        LLaDASampler(gen_length=16, block_length=4, cfg_scale=0.5),
        DreamSampler(alg="topk_margin", top_p=0.9),
        FastDLLMSampler(cache="prefix", threshold=None, factor=1.5),
        BlockDiffusionSampler(strategy="joint_threshold", cache=False),
        *(cls() for cls in SAMPLERS.values()),
    ],
)
def test_samplers_round_trip_as_text(sampler: Sampler) -> None:
    assert as_sampler(sampler_text(sampler), SPEC) == sampler
    assert as_sampler(sampler, SPEC) is not None
    for field in dataclasses.fields(sampler):  # type: ignore[arg-type]
        assert f"        {field.name}" in (type(sampler).__doc__ or "") or f", {field.name}:" in (
            type(sampler).__doc__ or ""
        )


def test_defaults_follow_the_model() -> None:
    assert isinstance(as_sampler(None, SPEC), LLaDASampler)
    assert isinstance(as_sampler(None, dataclasses.replace(SPEC, shift=True)), DreamSampler)
    assert as_sampler("llada(steps=4)", SPEC, {"gen_length": 4}) == LLaDASampler(steps=4, gen_length=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast_dlm", "sampler: unknown sampler 'fast_dlm'. Did you mean 'fast_dllm'?"),
        ("fast_dllm(treshold=0.5)", "fast_dllm: unknown option 'treshold'. Did you mean 'threshold'?"),
        ("fast_dllm(threshold='high')", "fast_dllm.threshold: 'high' does not fit"),
        ("llada(steps=", "sampler: cannot read 'llada(steps='. Write it like: llada(option=value)"),
        ("llada(4)", "passes: options need names in 'llada(4)'"),
        (3, "sampler: 3 is no sampler. Known: llada, dream, fast_dllm, block_diffusion"),
    ],
)
def test_what_is_no_sampler(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        as_sampler(text, SPEC)
    assert message in str(caught.value)


def test_one_prompt_alone_and_among_others() -> None:
    model = zoo.model("dream")
    prompts: list[list[int]] = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    options = {"gen_length": 8, "temperature": 0.7, "alg": "entropy"}
    together = dlqc.generate_batch(model, prompts, seed=[3, 1, 2], **options)
    for made, prompt, seed in zip(together, prompts, [3, 1, 2], strict=True):
        alone = dlqc.generate(model, prompt, seed=seed, **options)  # type: ignore[arg-type]
        assert (made.ids, made.nfe, made.prompt_ids) == (alone.ids, alone.nfe, tuple(prompt))
    commits = list(dlqc.stream(model, prompts[1], seed=1, **options))  # type: ignore[arg-type]
    assert {c.position: c.token for c in commits} == dict(enumerate(together[1].ids))
    heard: list[int] = []
    dlqc.generate(model, prompts[1], seed=1, on_commit=lambda c: heard.append(c.token), **options)  # type: ignore[arg-type]
    assert heard == [c.token for c in commits]


def test_prompts_are_refused_before_the_first_token() -> None:
    model = zoo.model("dream")
    with pytest.raises(FeasibilityError, match=r"prompt_ids\[0\]: row 0 has the mask token 60 at position 0"):
        dlqc.stream(model, [60], gen_length=4)
    with pytest.raises(FeasibilityError, match=r"prompts: one text is no batch. Give a list of texts"):
        dlqc.generate_batch(model, "abc")
    with pytest.raises(FeasibilityError, match=r"prompt: a list of texts is not one prompt. Use dlqc.generate_batch"):
        dlqc.generate(model, ["a", "b"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            [[1, 2], [3]],
            {},
            "prompt: a list is not one prompt (expected sequence of length 2 at dim 1 (got 1)). Give a text,",
        ),
        ({"a": 1}, {}, "prompt: a dict is not one prompt"),
        (None, {}, "prompt: a NoneType is not one prompt"),
        ([2**70], {}, "prompt: a list is not one prompt"),
        ([True], {}, "prompt: torch.bool numbers are no ids. Give whole numbers"),
        ([1], {"gen_length": 4.5}, "gen_length: 4.5 is no whole number. Use 1 or more"),
        ([1], {"gen_length": None}, "gen_length: None is no whole number. Use 1 or more"),
        ([1], {"steps": "2"}, "steps: '2' is no whole number. Use 1 or more"),
        ([1], {"temperature": "hot"}, "temperature: 'hot' is no finite number. Use 0 or more"),
        ([1], {"temperature": math.inf}, "temperature: inf is no finite number. Use 0 or more"),
        ([1], {"sampler": "fast_dllm", "threshold": "1"}, "threshold: '1' is no probability. Use 0 <= threshold <= 1"),
        ([1], {"seed": None}, "seed: None seeds no noise. Give a whole number, or a list of one for each row"),
        ([1], {"seed": 1.5}, "seed: 1.5 seeds no noise"),
    ],
)
def test_what_no_run_can_be_made_of(prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FeasibilityError) as error:
        dlqc.generate(callable_model, prompt, spec=SPEC, **{"gen_length": 4, **options})
    assert str(error.value).startswith(message)


def test_models_that_say_nothing_of_themselves() -> None:
    """With `spec` a plain function will do; without, it is refused, and so is what is no model."""
    assert len(dlqc.generate(callable_model, [1, 2], spec=SPEC, gen_length=4).ids) == 4
    for model, kind in ((callable_model, "function"), ("tiny-llada", "str"), (None, "NoneType")):
        with pytest.raises(ModelError, match=f"model: a {kind} does not say what its mask token is. Give spec="):
            dlqc.generate(model, [1], gen_length=4)  # type: ignore[arg-type]
    with pytest.raises(FeasibilityError, match="a function has no graph whose keys and values could be cached"):
        dlqc.generate(callable_model, [1], sampler="fast_dllm", spec=SPEC, gen_length=4)
    with pytest.raises(FeasibilityError, match="prompts: a NoneType is no batch. Give a list of texts"):
        dlqc.generate_batch(callable_model, None, spec=SPEC)  # type: ignore[arg-type]


def test_dream_with_a_cache_refreshed_at_every_step_is_without() -> None:
    """Logits shifted by one: the window takes the row before it along."""
    model = dlqc.compile(zoo.model("dream"), (), progress=False)
    options = {"gen_length": 12, "block_length": 4, "threshold": 0.05}
    plain = dlqc.generate(model, [3, 4, 5], sampler="fast_dllm(cache='none')", **options)  # type: ignore[arg-type]
    for cache in ("prefix", "dual"):
        fresh = dlqc.generate(model, [3, 4, 5], sampler=f"fast_dllm(cache='{cache}', refresh=1)", **options)  # type: ignore[arg-type]
        assert (fresh.ids, fresh.nfe) == (plain.ids, plain.nfe)


def test_tiny_llada_decodes_with_every_cache() -> None:
    """On the real model a dual cache of one token a step finds the answers that decoding without a cache finds."""
    model = dlqc.load_model("tiny-llada")
    prompt = "back 40271=17204<|endoftext|>back 58213=31285<|endoftext|>back 90417="
    found = {
        cache: dlqc.generate(
            model, prompt, sampler=f"fast_dllm(cache='{cache}', threshold=0.9)", gen_length=5, block_length=5
        )
        for cache in ("none", "prefix", "dual")
    }
    assert found["none"].text == "71409"
    assert (
        found["prefix"].ids == found["dual"].ids == found["none"].ids
    )  # one block that ends the row: nothing is stale but the prompt
    assert found["none"].nfe <= 5
