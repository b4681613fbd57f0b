"""Samplers by name, as text: `llada(steps=32)`, `fast_dllm(cache='prefix', threshold=0.8)`."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlqc.diffusion.denoising import Sampler
from dlqc.diffusion.sampler_block import BlockDiffusionSampler
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import RecipeError, nearest

SAMPLERS: dict[str, type[Sampler]] = {
    cls.name: cls for cls in (LLaDASampler, DreamSampler, FastDLLMSampler, BlockDiffusionSampler)
}


def as_sampler(source: str | Sampler | None, spec: DiffusionSpec, options: dict[str, Any] | None = None) -> Sampler:
    """A sampler from text or as it is, with `options` over its own; None: Dream's where logits are shifted, else LLaDA's.

    Raises:
        RecipeError: the name or an option is unknown, with the nearest that is known.
        FeasibilityError: the options do not go together.
    """
    from dlqc.recipe import from_call

    made: Any = source
    if source is None:
        made = DreamSampler() if spec.shift else LLaDASampler()
    elif isinstance(source, str):
        made = from_call(source, SAMPLERS, where="sampler")
    if not isinstance(made, Sampler):
        raise RecipeError(f"{source!r} is no sampler", where="sampler", remedy=f"Known: {', '.join(SAMPLERS)}")
    known = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]
    for name in options or {}:
        if name not in known:
            raise RecipeError(f"{type(made).__name__} has no such option", where=name, remedy=nearest(name, known))
    return dataclasses.replace(made, **(options or {}))  # type: ignore[type-var]


def sampler_text(sampler: Sampler) -> str:
    """The sampler as text that `as_sampler` reads, options at their defaults left out."""
    from dlqc.recipe import _line

    return _line(sampler)
