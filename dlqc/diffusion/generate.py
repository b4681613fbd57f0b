"""Text from a prompt, in one call.

    generate(model, "Once upon a time", steps=32, gen_length=64)
    generate(model, "Once upon a time", sampler="fast_dllm(cache='prefix')", gen_length=64)
    generate_batch(model, ["Once upon a time", "A fox"], gen_length=64)
    for commit in stream(model, "Once upon a time", gen_length=64): ...

The sampler is an object, text as in a recipe, or left out: Dream's where logits are shifted by one (`spec.shift`), else LLaDA's.
Options go to the sampler.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dlqc.diffusion.denoising import Commit, OnStep, Sampler, Step, Trajectory
from dlqc.diffusion.masking import LogitsFn, device_of
from dlqc.diffusion.registry import as_sampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError

Prompt = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class Generation:
    """What `generate` made; prints as its text.

    Attributes:
        text: the answer up to the end-of-text token, special tokens left out; the ids where there is no tokenizer.
        ids: all generated ids, G of them, those after the end included.
        prompt_ids: the prompt as the model saw it.
        nfe: network evaluations that the prompt needed; a guided step counts two.
        tokens_per_forward: generated tokens per network evaluation.
        seconds: wall time of the sampler, of the whole batch.
        cache_bytes: the most that the cache of the whole batch took, as it is stored between forwards; 0 without one.
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    nfe: int
    tokens_per_forward: float
    seconds: float
    cache_bytes: int = 0

    def __str__(self) -> str:
        return self.text


def generate(
    model: LogitsFn,
    prompt: Prompt,
    *,
    sampler: str | Sampler | None = None,
    tokenizer: Any = None,
    spec: DiffusionSpec | None = None,
    seed: int = 0,
    progress: bool = False,
    on_commit: Callable[[Commit], None] | None = None,
    **options: Any,
) -> Generation:
    """Continue one prompt.

    Args:
        model: ids [B, L] -> logits [B, L, V]; a module, a compiled model or any callable. A cache needs one of the first two.
        prompt: text, or ids [P] (a tensor [1, P] will do). Text is encoded as it stands: apply a chat template before.
        sampler: an object, or text such as "fast_dllm(threshold=0.8)"; None: `DreamSampler` where spec.shift, else
            `LLaDASampler`.
        tokenizer: a Hugging Face tokenizer; None: `model.tokenizer`, else the one saved beside the model.
        spec: the model's facts; None: `model.spec`, else read from the model's config.
        seed: of all noise.
        progress: show a bar on the terminal.
        on_commit: called with each token when it is fixed.
        **options: fields of the sampler (steps, gen_length, temperature, …), over those of `sampler`.
    """
    job = _job(model, [prompt], sampler, tokenizer, spec, options)
    return _run(job, seed, progress, on_commit)[0]


def generate_batch(
    model: LogitsFn,
    prompts: Sequence[Prompt],
    *,
    sampler: str | Sampler | None = None,
    tokenizer: Any = None,
    spec: DiffusionSpec | None = None,
    seed: int | Sequence[int] = 0,
    progress: bool = False,
    on_commit: Callable[[Commit], None] | None = None,
    **options: Any,
) -> list[Generation]:
    """Continue several prompts of any lengths together; arguments as of `generate`.

    Prompt r gets the noise of `seed + r`, or of `seed[r]`: what `generate` gives it with that seed, up to rounding.
    """
    given: object = prompts
    if isinstance(given, str) or not isinstance(given, Sequence | Tensor):
        what = "one text" if isinstance(given, str) else f"a {type(given).__name__}"
        raise FeasibilityError(
            f"{what} is no batch", where="prompts", remedy="Give a list of texts, or use dlqc.generate"
        )
    job = _job(model, list(prompts), sampler, tokenizer, spec, options)
    return _run(job, seed, progress, on_commit)


def stream(
    model: LogitsFn,
    prompt: Prompt,
    *,
    sampler: str | Sampler | None = None,
    tokenizer: Any = None,
    spec: DiffusionSpec | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterator[Commit]:
    """The tokens of one prompt as they are fixed, in the order of the steps; arguments as of `generate`.

    Prompts and options that cannot be are refused at the call, before the first token is asked for.
    """
    job = _job(model, [prompt], sampler, tokenizer, spec, options)
    return job.sampler.stream(model, job.ids, job.spec, seed=seed)


@dataclass(frozen=True)
class _Job:
    """What is to be generated, read and checked."""

    model: LogitsFn
    sampler: Sampler
    spec: DiffusionSpec
    tokenizer: Any
    ids: list[Tensor]


def _job(
    model: LogitsFn,
    prompts: list[Prompt],
    sampler: str | Sampler | None,
    tokenizer: Any,
    spec: DiffusionSpec | None,
    options: dict[str, Any],
) -> _Job:
    chosen = spec if spec is not None else _spec(model)
    texts = any(isinstance(prompt, str) for prompt in prompts)
    words = tokenizer if tokenizer is not None else _tokenizer(model, needed=texts)
    configured = as_sampler(sampler, chosen, options)
    return _Job(model, configured, chosen, words, [_encode(prompt, words, model) for prompt in prompts])


def _encode(prompt: Prompt, words: Any, model: LogitsFn) -> Tensor:
    """Ids int64 [P]."""
    if isinstance(prompt, list | tuple) and any(isinstance(part, str) for part in prompt):
        raise FeasibilityError("a list of texts is not one prompt", where="prompt", remedy="Use dlqc.generate_batch")
    try:
        ids = torch.as_tensor(words.encode(prompt) if isinstance(prompt, str) else prompt, device=device_of(model))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = f"a {type(prompt).__name__} is not one prompt ({str(error).splitlines()[0]})"
        raise FeasibilityError(what, where="prompt", remedy="Give a text, or token ids of one length") from error
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[0] != 1):
        raise FeasibilityError(
            f"a tensor of shape {list(ids.shape)} is not one prompt",
            where="prompt",
            remedy="Give one prompt of shape [P], or use dlqc.generate_batch",
        )
    if ids.numel() and (ids.is_floating_point() or ids.dtype is torch.bool):
        raise FeasibilityError(f"{ids.dtype} numbers are no ids", where="prompt", remedy="Give whole numbers")
    return ids.reshape(-1).long()


def _run(
    job: _Job, seed: int | Sequence[int], progress: bool, on_commit: Callable[[Commit], None] | None
) -> list[Generation]:
    with _bar(progress) as show:

        def on_step(step: Step) -> None:
            if show is not None:
                show(step)
            for commit in step.commits() if on_commit is not None else ():
                on_commit(commit)  # type: ignore[misc]

        start = time.perf_counter()
        result = job.sampler.run(job.model, job.ids, job.spec, seed=seed, on_step=on_step)
        seconds = time.perf_counter() - start
    return [_generation(job, result, row, seconds) for row in range(len(job.ids))]


def _generation(job: _Job, result: Trajectory, row: int, seconds: float) -> Generation:
    made = result.generated[row].tolist()
    shown = made[: made.index(job.spec.eos_id)] if job.spec.eos_id in made else made
    words, nfe = job.tokenizer, int(result.evaluations[row])
    return Generation(
        text=" ".join(map(str, shown)) if words is None else str(words.decode(shown, skip_special_tokens=True)),
        ids=tuple(made),
        prompt_ids=tuple(job.ids[row].tolist()),
        nfe=nfe,
        tokens_per_forward=int((result.committed_at[row] >= 0).sum()) / nfe if nfe else 0.0,
        seconds=seconds,
        cache_bytes=result.cache_bytes,
    )


def _spec(model: Any) -> DiffusionSpec:
    held = getattr(model, "spec", None)
    if isinstance(held, DiffusionSpec):
        return held
    from dlqc.models.describe import spec_of

    if not isinstance(model, nn.Module):
        what = f"a {type(model).__name__} does not say what its mask token is"
        raise ModelError(what, where="model", remedy="Give spec=, or a module; dlqc.load_model opens a name or folder")
    return spec_of(model)


def _tokenizer(model: Any, *, needed: bool) -> Any:
    held = getattr(model, "tokenizer", None)
    if held is not None:
        return held
    from dlqc.models.load import load_tokenizer

    found = load_tokenizer(model) if isinstance(model, nn.Module) else None
    if found is None and needed:
        raise ModelError(
            "the model brings no tokenizer",
            where="tokenizer",
            remedy="Give tokenizer=, or a prompt of token ids",
        )
    return found


@contextlib.contextmanager
def _bar(show: bool) -> Iterator[OnStep | None]:
    """A bar over the positions to fill; several lengths of prompts fill it one after the other."""
    if not show:
        yield None
        return
    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("denoising")

        def advance(step: Step) -> None:
            left = int((step.masked & ~step.committed).sum())
            places = step.after[:, step.prompt_length :].numel()
            bar.update(task, total=places, completed=places - left)

        yield advance
