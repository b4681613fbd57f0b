"""Quality of a model, and of a compiled one against it: masked NLL by mask ratio, fidelity, tasks, trajectories.

Noise is common to all models compared: the same rows, masks and items, so differences are paired and their intervals tight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dlqc.calibration import rows_from
from dlqc.diffusion.denoising import Sampler
from dlqc.diffusion.fidelity import FidelityTable, fidelity
from dlqc.diffusion.intervals import Interval, brief
from dlqc.diffusion.likelihood import NllTable, masked_nll, paired_difference
from dlqc.diffusion.masking import LogitsFn
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.diffusion.tasks import exact_match
from dlqc.diffusion.trajectory import TrajectoryTable, compare_trajectories
from dlqc.errors import FeasibilityError

_TRAJECTORY = {
    "first_difference": ("first step that commits differently", 1),
    "kendall": ("commit order, Kendall's tau", 3),
    "spearman": ("commit order, Spearman's rho", 3),
    "flips": ("tokens that end differently", 3),
    "divergence": ("trajectory divergence, mean over steps", 3),
    "nfe_ratio": ("NFE ratio", 3),
    "tokens_per_forward": ("tokens per forward", 2),
    "tokens_per_forward_difference": ("  paired difference", 3),
    "tokens_per_second": ("tokens per second", 1),
    "tokens_per_second_ratio": ("  ratio to the reference", 2),
}

RATIOS = (0.0625, 0.25, 0.5, 0.75, 0.9375)


def bundled_text(half: str) -> Path:
    """The project's own tales: "calib" to calibrate on, "eval" to measure on; they share no tale."""
    return Path(str(files("dlqc") / "data" / f"tales_{half}.txt"))


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        nll: cross-entropy in nats at masked positions, by mask ratio and row.
        tasks: exact match by task, empty where tasks were not asked for.
        difference: paired difference of the row means to the reference, None without one.
        fidelity: distance from the reference, None without one.
        trajectory: how its denoising goes apart from the reference's, None where it was not asked for.
    """

    nll: NllTable
    tasks: dict[str, Interval]
    difference: Interval | None = None
    fidelity: FidelityTable | None = None
    trajectory: TrajectoryTable | None = None

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "nll": _plain(self.nll.nelbo),
            "nll_by_ratio": {f"{r:g}": _plain(i) for r, i in zip(self.nll.ratios, self.nll.by_ratio, strict=True)},
            "tasks": {name: _plain(interval) for name, interval in self.tasks.items()},
        }
        if self.difference is not None and self.fidelity is not None:
            plain["difference"] = _plain(self.difference)
            plain["kl"] = _plain(self.fidelity.mean_kl)
            plain["agreement"] = _plain(self.fidelity.mean_agreement)
        if self.trajectory is not None:
            plain["trajectory"] = self.trajectory.to_plain()
        return plain


def _plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def evaluate(
    model: LogitsFn,
    rows: torch.Tensor,
    spec: DiffusionSpec,
    *,
    reference: LogitsFn | None = None,
    baseline: Evaluation | None = None,
    tokenizer: Any = None,
    task_items: int = 0,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    prompts: int = 0,
    sampler: Sampler | None = None,
) -> Evaluation:
    """Measure a model on token rows [R, L] and, where `task_items` > 0, on the generated tasks.

    Args:
        reference: the model to compare with; baseline: its own evaluation on the same rows, computed if not given.
        prompts: beginnings of rows to continue with both models, for trajectories; 0 for none.
        sampler: for them; None: `trajectory_sampler`.
    """
    if prompts and reference is None:
        raise FeasibilityError(
            "a trajectory is compared with another model's", where="trajectory", remedy="Name the model with --against"
        )
    nll = masked_nll(model, rows, spec, ratios=ratios, seed=seed)
    tasks = exact_match(model, tokenizer, spec, items=task_items, seed=seed) if task_items else {}
    if reference is None:
        return Evaluation(nll, tasks)
    other = baseline.nll if baseline is not None else masked_nll(reference, rows, spec, ratios=ratios, seed=seed)
    distance = fidelity(reference, model, rows, spec, ratios=ratios, seed=seed)
    apart = None
    if prompts:
        starts = rows[:prompts, : rows.shape[1] // 4]
        chosen = sampler or trajectory_sampler(starts.shape[1], spec)
        apart = compare_trajectories(reference, model, starts, spec, chosen, seed=seed)
    return Evaluation(nll, tasks, paired_difference(nll, other), distance, apart)


def trajectory_sampler(prompt: int, spec: DiffusionSpec) -> Sampler:
    """A sampler whose number of forwards depends on how sure the model is, which a quota would hide: 64 tokens at most."""
    return FastDLLMSampler(gen_length=min(64, spec.max_length - prompt), block_length=spec.max_length, cache="none")


def rows_to_measure(
    tokenizer: Any, spec: DiffusionSpec, text: str | Path | None = None, *, length: int = 128
) -> torch.Tensor:
    """Token rows of a text file, by default the bundled evaluation tales."""
    return rows_from(text or bundled_text("eval"), tokenizer=tokenizer, spec=spec, length=length).ids


def comparison_table(columns: dict[str, Evaluation]) -> Table:
    """Evaluations side by side, with intervals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measure")
    for name in columns:
        table.add_column(name, justify="right")
    first = next(iter(columns.values()))
    for k, ratio in enumerate(first.nll.ratios):
        row = [brief(e.nll.by_ratio[k], 3) for e in columns.values()]
        table.add_row(f"masked NLL, {ratio:.0%} masked", *row)
    table.add_row("masked NLL, mean", *[brief(e.nll.nelbo, 3) for e in columns.values()])
    if any(e.difference for e in columns.values()):
        table.add_row("  paired difference", *[brief(e.difference, 4) for e in columns.values()])
        kl = [e.fidelity.mean_kl if e.fidelity else None for e in columns.values()]
        table.add_row("KL from the reference", *[brief(i, 4) for i in kl])
        agreement = [e.fidelity.mean_agreement if e.fidelity else None for e in columns.values()]
        table.add_row("top-1 agreement", *[brief(i, 3) for i in agreement])
    if any(e.trajectory for e in columns.values()):
        measured = [e.trajectory.intervals() if e.trajectory else {} for e in columns.values()]
        for name, (label, digits) in _TRAJECTORY.items():
            table.add_row(label, *[brief(found.get(name), digits) for found in measured])
    for task in first.tasks:
        table.add_row(f"exact match, {task}", *[brief(e.tasks[task], 2) for e in columns.values()])
    return table
