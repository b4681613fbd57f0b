"""Fine-tune a quantized model with the masked-diffusion loss: quantization-aware training, from the codes on.

    loss = mean over rows, mean over l masked tokens of  (1 - d)·(-log p(token)) + d·KL(teacher ‖ model),   l uniform on 1..L

LLaDA's loss (Nie et al., arXiv 2502.09992, eq. 6), with the model before quantization as a teacher where there is one; d is the
share of the teacher. What is learned is in `dlqc.trainable`. l is drawn in as many strata as a step has rows. Adam (Kingma and
Ba, arXiv 1412.6980), the rate warming up over the first twentieth and falling linearly to zero.

Rows are set aside, and the loss on them is looked at now and then with the same masks: the best look is what is kept, the start
among them, so the result is never worse than its start on those rows. All of it is float32 on the device of the weights; memory
is sixteen bytes for a weight whose code is learned, and the states of one batch.

What comes out is a compiled model like any other. Its recipe is still that of the start: `report` tells of the fine-tuning.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlqc.backend import load_backend
from dlqc.calibration import rows_from
from dlqc.check import check
from dlqc.compiled import Compiled
from dlqc.contract import FACTS_OF_CAPTURE, Context
from dlqc.diffusion.masking import LogitsFn, apply_mask, check_clean, fixed_count_mask, generator, logits_of
from dlqc.errors import CalibrationError, FeasibilityError
from dlqc.formats.low_rank import LowRankFormat
from dlqc.graph import copy_graph
from dlqc.instruments import peak_memory
from dlqc.recipe import pass_class
from dlqc.report import Report, Step
from dlqc.trainable import Learn, Trainable

#: Learning rates that need no search: in steps of the grid and relative (codes), relative (scales), of the factors (lora).
RATES = {"codes": 0.02, "scales": 2e-3, "lora": 2e-3}

Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune.

    Attributes:
        learn: "codes": codes and scales, of integer formats; "scales": scales alone; "lora": a correction of low rank, of any
            format, what is quantized staying as it is.
        steps: of Adam.
        batch: rows a step.
        lr: learning rate; None: that of `RATES`.
        distill: d, the share of the teacher in the loss; None: 0.5 with a teacher, 0 without.
        rank, dtype: of corrections, and what their factors are stored in.
        looks: how many times the loss on the rows set aside is looked at.
        seed: of rows, masks and new corrections.
    """

    learn: Learn = "codes"
    steps: int = 100
    batch: int = 8
    lr: float | None = None
    distill: float | None = None
    rank: int = 16
    dtype: str = "bfloat16"
    looks: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("steps", "batch", "looks"):
            if getattr(self, option) < 1:
                raise FeasibilityError(f"{getattr(self, option)} is less than 1", where=option, remedy="Use 1 or more")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise FeasibilityError(f"{self.lr:g} is no learning rate", where="lr", remedy="Use a positive number")
        if self.distill is not None and not 0 <= self.distill <= 1:
            raise FeasibilityError(f"{self.distill:g} is no share", where="distill", remedy="Use 0 to 1")
        LowRankFormat(self.rank, self.dtype)  # a wrong rank or dtype is refused here


def finetune(
    model: Compiled,
    text: str | Path | Sequence[str] | Tensor,
    options: Finetune | None = None,
    *,
    teacher: LogitsFn | None = None,
    tell: Tell | None = None,
) -> Compiled:
    """Recover what quantization cost.

    Args:
        model: what `compile` or `load` gave; it is not changed.
        text: a text file, texts, or token ids [R, L]; an eighth of the rows, one at least, is set aside.
        options: how; None: `Finetune()`.
        teacher: the model before quantization, ids [B, L] → logits [B, L, V]; None learns from the text alone.
        tell: called with the step and the loss on the rows set aside, at each look.

    Returns:
        a new compiled model for the same backend, with a step "finetune" in its report.

    Raises:
        FeasibilityError: nothing is quantized, the formats have no such thing to learn, or a part has no gradient.
        CalibrationError: too little text, or the loss is no longer finite.
    """
    how, started = options or Finetune(), time.perf_counter()
    given: object = model
    if not isinstance(given, Compiled):
        what = f"a {type(given).__name__} is not compiled"
        raise FeasibilityError(what, where="model", remedy="Give what dlqc.compile or dlqc.load returned")
    if how.distill and teacher is None:
        what = f"distill={how.distill:g} learns from a teacher, and there is none"
        raise FeasibilityError(what, where="distill", remedy="Give teacher=, the model before quantization")
    rows = rows_from(text, tokenizer=model.tokenizer, spec=model.spec).ids
    check_clean(rows, model.spec, where="text")
    aside = max(1, rows.shape[0] // 8)
    if rows.shape[0] < 2:
        what = f"{rows.shape[0]} row of text leaves nothing to learn from"
        raise CalibrationError(what, where="text", remedy="Give two rows at least, better a hundred")
    student = Trainable(model.graph, model.weights, how.learn, rank=how.rank, dtype=how.dtype, seed=how.seed)
    loss = _Loss(student, model, teacher, (0.5 if how.distill is None else how.distill) if teacher else 0.0)
    first, last = _train(student, loss, rows[:-aside], rows[-aside:], how, tell)
    return _compiled(model, student, how, {"loss_start": first, "loss": last}, time.perf_counter() - started)


class _Loss:
    """The loss on rows [B, L] with masks that a generator draws."""

    def __init__(self, student: LogitsFn, model: Compiled, teacher: LogitsFn | None, share: float) -> None:
        self._student, self._teacher, self._share, self._spec = student, teacher, share, model.spec

    def __call__(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        count, length = rows.shape
        u = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng, dtype=torch.float64)) / count
        hidden = (u * length).floor().long().clamp(max=length - 1) + 1
        masked = fixed_count_mask(torch.ones_like(rows, dtype=torch.bool), hidden, rng)
        state = apply_mask(rows, masked, self._spec.mask_id)
        log_p = logits_of(self._student, state, self._spec)[masked].float().log_softmax(-1)
        each = -(1 - self._share) * log_p.gather(1, rows[masked][:, None])[:, 0]
        if self._teacher is not None and self._share:
            with torch.no_grad():
                wanted = logits_of(self._teacher, state, self._spec)[masked].float().log_softmax(-1)
            each = each + self._share * (wanted.exp() * (wanted - log_p)).sum(-1)
        return (each / hidden.repeat_interleave(hidden) / count).sum()


def _train(
    student: Trainable, loss: _Loss, rows: Tensor, aside: Tensor, how: Finetune, tell: Tell | None
) -> tuple[float, float]:
    """Learn; leaves the best look in `student`. Gives the loss on the rows set aside at the start and at the best look."""
    parameters = student.parameters()
    lr = RATES[how.learn] if how.lr is None else how.lr
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.95))
    looks = {-(-how.steps * (i + 1) // how.looks) for i in range(how.looks)}

    def look(step: int) -> float:
        with torch.no_grad():
            cuts = [aside[i : i + how.batch] for i in range(0, len(aside), how.batch)]
            parts = [loss(part, generator(how.seed, "aside", i)) * len(part) for i, part in enumerate(cuts)]
            found = float(sum(parts)) / len(aside)
        if not math.isfinite(found):
            what = f"the loss is {found} at step {step}"
            raise CalibrationError(what, where="finetune", remedy="Use a lower lr, or check the model in float32")
        if tell is not None:
            tell(step, found)
        return found

    first = best = look(0)
    kept = [p.detach().clone() for p in parameters]
    for step in range(how.steps):
        rng = generator(how.seed, "finetune", step)
        chosen = rows[torch.randint(0, len(rows), (how.batch,), generator=rng)]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, how.steps / 20)) * (1 - step / how.steps)
        with torch.enable_grad():
            value = loss(chosen, rng)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step + 1 in looks and (now := look(step + 1)) < best:
            best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return first, best


def _compiled(
    start: Compiled, student: Trainable, how: Finetune, metrics: dict[str, float], seconds: float
) -> Compiled:
    """What was learned, in its formats, lowered for the backend of the start."""
    graph, weights, bits = student.result()
    check(graph, weights, start.spec, set(), after="finetune")
    target = load_backend(start.report.backend)
    lowered, constants = copy_graph(graph), weights.clone()
    context = Context(constants, start.spec, target, facts=set(FACTS_OF_CAPTURE))
    lower = next((p for p in start.recipe.passes if p.name == "lower"), pass_class("lower")())
    found = lower.apply(lowered, context)
    report = _report(start.report.lowered_anew(target.name, found), student, how, metrics, bits, seconds)
    made: dict[str, Any] = {"tokenizer": start.tokenizer, "config": start.config}
    return Compiled(graph, weights, (lowered, constants), spec=start.spec, recipe=start.recipe, report=report, **made)


def _report(
    old: Report, student: Trainable, how: Finetune, metrics: dict[str, float], bits: int, seconds: float
) -> Report:
    details = {name: {"changed": site.changed()} for name, site in student.integers.items() if how.learn == "codes"}
    notes = [
        f"fine-tuned: the loss on the rows set aside went from {metrics['loss_start']:.4f} to {metrics['loss']:.4f}"
    ]
    if metrics["loss"] >= metrics["loss_start"]:
        notes = ["fine-tuning found nothing better than the start on the rows set aside: a lower lr may, or more text"]
    line = ", ".join(f"{f.name}={getattr(how, f.name)!r}" for f in dataclasses.fields(how))
    sites = len(student.factors if how.learn == "lora" else student.integers)
    measured = (seconds, peak_memory(), None)
    step = Step("finetune", f"finetune({line})", sites, [], *measured, metrics, details, {}, notes)
    place = next((i for i, s in enumerate(old.steps) if s.name == "lower"), len(old.steps))
    storage = dataclasses.replace(
        old.storage, bits=old.storage.bits + bits, bits_quantized=old.storage.bits_quantized + bits
    )
    said = [*old.notes, *(["KL and agreement are not measured again after fine-tuning: use dlqc eval --against"])]
    steps = [*old.steps[:place], step, *old.steps[place:]]
    return dataclasses.replace(old, steps=steps, storage=storage, fidelity={}, notes=said)
