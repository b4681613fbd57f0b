"""Text from a prompt, in one call.

    generate(model, "Once upon a time", steps=32, gen_length=64)

Options go to the sampler: LLaDA's, or Dream's where the logits are shifted by one (`spec.shift`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dlqc.diffusion.denoising import OnStep, Step
from dlqc.diffusion.masking import LogitsFn, device_of
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError, RecipeError, nearest

Sampler = LLaDASampler | DreamSampler


@dataclass(frozen=True)
class Generation:
    """What `generate` made; prints as its text.

    Attributes:
        text: the answer up to the end-of-text token, special tokens left out; the ids where there is no tokenizer.
        ids: all generated ids, G of them, those after the end included.
        prompt_ids: the prompt as the model saw it.
        nfe: network evaluations; a guided step counts two.
        tokens_per_forward: generated tokens per network evaluation.
        seconds: wall time of the sampler.
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    nfe: int
    tokens_per_forward: float
    seconds: float

    def __str__(self) -> str:
        return self.text


def generate(
    model: LogitsFn,
    prompt: str | Sequence[int] | Tensor,
    *,
    sampler: Sampler | None = None,
    tokenizer: Any = None,
    spec: DiffusionSpec | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Generation:
    """Continue one prompt.

    Args:
        model: ids [B, L] -> logits [B, L, V]; a module, a compiled model or any callable.
        prompt: text, or ids [P] (a tensor [1, P] will do). Text is encoded as it stands: apply a chat template before.
        sampler: None: `DreamSampler` where spec.shift, else `LLaDASampler`.
        tokenizer: a Hugging Face tokenizer; None: `model.tokenizer`, else the one saved beside the model.
        spec: the model's facts; None: `model.spec`, else read from the model's config.
        seed: of all noise.
        progress: show a bar on the terminal.
        **options: fields of the sampler (steps, gen_length, temperature, …), over those of `sampler`.
    """
    chosen = spec if spec is not None else _spec(model)
    words = tokenizer if tokenizer is not None else _tokenizer(model, needed=isinstance(prompt, str))
    configured = _configure(sampler or (DreamSampler() if chosen.shift else LLaDASampler()), options)
    if prompt is None or (isinstance(prompt, list | tuple) and any(isinstance(part, str) for part in prompt)):
        raise FeasibilityError(
            "a list of texts is not one prompt", where="prompt", remedy="Call generate once for each text"
        )
    ids = words.encode(prompt) if isinstance(prompt, str) else prompt
    batch = torch.as_tensor(ids, device=device_of(model))
    if batch.numel() == 0:
        batch = batch.long().reshape(1, 0)
    batch = batch[None] if batch.ndim == 1 else batch
    if batch.ndim != 2 or batch.shape[0] != 1:
        raise FeasibilityError(
            f"a tensor of shape {list(batch.shape)} is not one prompt",
            where="prompt",
            remedy="Give one prompt of shape [P]; for a batch call the sampler's .run",
        )
    with _bar(progress) as on_step:
        start = time.perf_counter()
        result = configured.run(model, batch, chosen, seed=seed, on_step=on_step)
        seconds = time.perf_counter() - start
    made = result.generated[0].tolist()
    shown = made[: made.index(chosen.eos_id)] if chosen.eos_id in made else made
    return Generation(
        text=" ".join(map(str, shown)) if words is None else str(words.decode(shown, skip_special_tokens=True)),
        ids=tuple(made),
        prompt_ids=tuple(batch[0].tolist()),
        nfe=result.nfe,
        tokens_per_forward=result.tokens_per_forward,
        seconds=seconds,
    )


def _configure(sampler: Sampler, options: dict[str, Any]) -> Sampler:
    known = [field.name for field in dataclasses.fields(sampler)]
    for name in options:
        if name not in known:
            raise RecipeError(f"{type(sampler).__name__} has no such option", where=name, remedy=nearest(name, known))
    return dataclasses.replace(sampler, **options)


def _spec(model: Any) -> DiffusionSpec:
    held = getattr(model, "spec", None)
    if isinstance(held, DiffusionSpec):
        return held
    from dlqc.models.describe import spec_of

    return spec_of(model)


def _tokenizer(model: Any, *, needed: bool) -> Any:
    held = getattr(model, "tokenizer", None)
    if held is not None:
        return held
    from dlqc.models.load import load_tokenizer

    found = load_tokenizer(model)
    if found is None and needed:
        raise ModelError(
            "the model brings no tokenizer",
            where="tokenizer",
            remedy="Give tokenizer=, or a prompt of token ids",
        )
    return found


@contextlib.contextmanager
def _bar(show: bool) -> Iterator[OnStep | None]:
    if not show:
        yield None
        return
    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("denoising")
        yield lambda step: _advance(bar, task, step)


def _advance(bar: Progress, task: Any, step: Step) -> None:
    bar.update(task, total=step.total, completed=step.index + 1)
