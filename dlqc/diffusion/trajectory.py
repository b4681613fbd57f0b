"""How far the denoising of one model goes apart from that of another: the same prompts, sampler and noise for both.

    first difference   the step at which the two commit differently for the first time: other positions or another token
    rank correlation   of the steps at which positions were committed: Kendall's tau-b and Spearman's rho, ties included
    flip rate          share of positions that end in another token
    divergence         by step: share of the positions that either has fixed by then and both do not hold alike
    NFE ratio          network evaluations of the candidate over those of the reference
    tokens per forward, tokens per second

Every number is one per prompt, so intervals are over prompts, and those of differences and ratios are paired. Ratios are averaged
as logarithms: the mean is geometric.

Shapes: N prompts, G generated positions, T steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlqc.diffusion.denoising import Prompts, Sampler, Step
from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.diffusion.masking import LogitsFn
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError


@dataclass(frozen=True)
class Run:
    """What one model generated from each prompt.

    Attributes:
        tokens: int64 [N, G]. step: int64 [N, G], when each was fixed; -1: given.
        nfe: int64 [N]. committed: int64 [N], tokens that were fixed. seconds: float64 [N].
        states: for each step that ran, its number and the canvases after it, int64 [N, G].
    """

    tokens: Tensor
    step: Tensor
    nfe: Tensor
    committed: Tensor
    seconds: Tensor
    states: tuple[tuple[int, Tensor], ...]


@dataclass(frozen=True)
class TrajectoryTable:
    """The comparison, one value per prompt.

    Attributes:
        first_difference: float64 [N], number of the first step that commits differently; `horizon` where none does.
        horizon: steps of the longer run.
        kendall, spearman: float64 [N].
        flips: float64 [N].
        divergence: float64 [N, T], at the steps of `marks`.
        marks: T numbers of steps.
        nfe_ratio: float64 [N].
        tokens_per_forward, tokens_per_second: float64 [N, 2], reference and candidate.
        identical: prompts with the same tokens at the same steps.
    """

    first_difference: Tensor
    horizon: int
    kendall: Tensor
    spearman: Tensor
    flips: Tensor
    divergence: Tensor
    marks: tuple[int, ...]
    nfe_ratio: Tensor
    tokens_per_forward: Tensor
    tokens_per_second: Tensor
    identical: int

    def intervals(self) -> dict[str, Interval]:
        """Every measure with its interval over prompts."""
        forward, second = self.tokens_per_forward, self.tokens_per_second
        return {
            "first_difference": mean_interval(self.first_difference),
            "kendall": mean_interval(self.kendall),
            "spearman": mean_interval(self.spearman),
            "flips": mean_interval(self.flips),
            "divergence": mean_interval(self.divergence.mean(1)),
            "nfe_ratio": ratio_interval(self.nfe_ratio),
            "tokens_per_forward": mean_interval(forward[:, 1]),
            "tokens_per_forward_difference": mean_interval(forward[:, 1] - forward[:, 0]),
            "tokens_per_second": mean_interval(second[:, 1]),
            "tokens_per_second_ratio": ratio_interval(second[:, 1] / second[:, 0]),
        }

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            name: {"mean": i.mean, "low": i.low, "high": i.high} for name, i in self.intervals().items()
        }
        by_step = {f"{mark}": float(value) for mark, value in zip(self.marks, self.divergence.mean(0), strict=True)}
        return plain | {
            "prompts": self.flips.numel(),
            "identical": self.identical,
            "horizon": self.horizon,
            "divergence_by_step": by_step,
        }


def ratio_interval(ratios: Tensor) -> Interval:
    """Geometric mean of positive ratios [N] with its interval.

    >>> str(ratio_interval(torch.tensor([0.5, 2.0, 1.0])).mean)
    '1.0'
    """
    logs = mean_interval(ratios.double().log())
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.count)


def compare_trajectories(
    reference: LogitsFn,
    candidate: LogitsFn,
    prompts: Prompts,
    spec: DiffusionSpec,
    sampler: Sampler,
    *,
    seed: int = 0,
    batch_size: int = 1,
) -> TrajectoryTable:
    """Denoise every prompt with both models and compare.

    Args:
        reference, candidate: ids [B, L] -> logits [B, L, V]; both see the prompts in turn, so that a busy machine slows both.
        prompts: int64 [N, P], or a list of prompts [P]; two at least.
        sampler: the same for both, with the same noise.
        seed: of the noise; prompt n gets seed + n.
        batch_size: prompts denoised together; more than one makes seconds per prompt those of its batch, shared equally.
    """
    rows = [torch.as_tensor(row).reshape(-1).long() for row in prompts]
    if len(rows) < 2:
        raise FeasibilityError(
            f"{len(rows)} prompt gives no interval", where="prompts", remedy="Give two at least, better twenty"
        )
    parts: dict[str, list[Run]] = {"reference": [], "candidate": []}
    for start in range(0, len(rows), batch_size):
        group = rows[start : start + batch_size]
        for name, model in (("reference", reference), ("candidate", candidate)):
            parts[name].append(record(model, group, spec, sampler, seed=seed + start))
    return tabulate(_stack(parts["reference"]), _stack(parts["candidate"]))


def record(model: LogitsFn, prompts: list[Tensor], spec: DiffusionSpec, sampler: Sampler, *, seed: int) -> Run:
    """Denoise prompts and keep every state. Prompts of several lengths need a model that can be padded (see `denoising`)."""
    states: dict[int, Tensor] = {}

    def keep(step: Step) -> None:
        states[step.index] = step.after[:, step.prompt_length :]

    started = time.perf_counter()
    result = sampler.run(model, prompts, spec, seed=seed, on_step=keep)
    seconds = time.perf_counter() - started
    made, rows = result.generated, len(prompts)
    if any(state.shape[0] != rows for state in states.values()):
        raise FeasibilityError(
            "prompts of several lengths ran apart", where="batch_size", remedy="Use batch_size=1, or one length"
        )
    committed = (result.committed_at >= 0).sum(1)
    history = tuple((index, states[index][:, : made.shape[1]]) for index in sorted(states))
    share = torch.full((rows,), seconds / rows, dtype=torch.float64)
    return Run(made, result.committed_at, result.evaluations, committed, share, history)


def tabulate(reference: Run, candidate: Run) -> TrajectoryTable:
    """Compare two runs of the same prompts."""
    marks = sorted({index for run in (reference, candidate) for index, _ in run.states})
    horizon = max(marks, default=-1) + 1
    a, b = _at(reference, marks), _at(candidate, marks)
    apart = (a != b).double()
    # What a run has fixed is what it no longer holds as at the start: a token that neither has changed is open in both.
    opened = torch.stack([_fixed(reference, marks), _fixed(candidate, marks)]).any(0)
    divergence = (apart * opened).sum(-1) / opened.sum(-1).clamp(min=1)
    differs = _unlike(reference, candidate, a, b, marks)
    taus, rhos = zip(*(_ranks(x, y) for x, y in zip(reference.step, candidate.step, strict=True)), strict=True)
    same = (reference.tokens == candidate.tokens).all(1) & (reference.step == candidate.step).all(1)
    runs = (reference, candidate)
    return TrajectoryTable(
        first_difference=torch.tensor([float(f) if f >= 0 else float(horizon) for f in differs], dtype=torch.float64),
        horizon=horizon,
        kendall=torch.tensor(taus, dtype=torch.float64),
        spearman=torch.tensor(rhos, dtype=torch.float64),
        flips=(reference.tokens != candidate.tokens).double().mean(1),
        divergence=divergence.T,
        marks=tuple(marks),
        nfe_ratio=candidate.nfe.double() / reference.nfe.double(),
        tokens_per_forward=torch.stack([run.committed.double() / run.nfe.double() for run in runs], dim=1),
        tokens_per_second=torch.stack([run.committed.double() / run.seconds for run in runs], dim=1),
        identical=int(same.sum()),
    )


def kendall(x: Tensor, y: Tensor) -> float:
    """Kendall's tau-b of two rankings [G]: ties count for neither side; 1 where neither ranks anything.

    >>> kendall(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 3, 2]))
    0.6666666666666666
    """
    a = torch.sign(x[:, None].double() - x)
    b = torch.sign(y[:, None].double() - y)
    norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / norm if norm else 1.0 if bool((a == b).all()) else 0.0


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rho: Pearson's correlation of ranks, equal values sharing their mean rank."""
    a, b = _mean_ranks(x), _mean_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else 1.0 if bool((a == b).all()) else 0.0


def _ranks(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Both correlations over the positions that both have fixed."""
    both = (x >= 0) & (y >= 0)
    return kendall(x[both], y[both]), spearman(x[both], y[both])


def _mean_ranks(x: Tensor) -> Tensor:
    below = (x[None] < x[:, None]).sum(1).double()
    equal = (x[None] == x[:, None]).sum(1).double()
    return below + (equal - 1) / 2


def _at(run: Run, marks: list[int]) -> Tensor:
    """The canvases after the steps `marks`, [T, N, G]; a run that skipped a step stands still."""
    held = dict(run.states)
    now = torch.full_like(run.tokens, -1)
    found = []
    for mark in marks:
        now = held.get(mark, now)
        # Masks are what is not fixed yet; -1 keeps them apart from tokens whatever the model's mask is.
        found.append(torch.where((run.step >= 0) & (run.step <= mark), now, -1))
    return torch.stack(found) if found else run.tokens.new_zeros((0, *run.tokens.shape))


def _fixed(run: Run, marks: list[int]) -> Tensor:
    return torch.stack([(run.step >= 0) & (run.step <= mark) for mark in marks])


def _unlike(reference: Run, candidate: Run, a: Tensor, b: Tensor, marks: list[int]) -> list[int]:
    """The first step after which a row's canvases differ, -1 where none."""
    unlike = (a != b).any(-1)
    first = unlike.long().argmax(0)
    return [marks[int(f)] if bool(unlike[int(f), row]) else -1 for row, f in enumerate(first)]


def _stack(runs: list[Run]) -> Run:
    """Runs of several batches as one."""
    marks = sorted({index for run in runs for index, _ in run.states})
    states = tuple((mark, torch.cat([_held(run, mark) for run in runs])) for mark in marks)
    parts = {
        name: torch.cat([getattr(run, name) for run in runs])
        for name in ("tokens", "step", "nfe", "committed", "seconds")
    }
    return Run(**parts, states=states)


def _held(run: Run, mark: int) -> Tensor:
    """The canvas after a step, or after the last one before it."""
    earlier = [state for index, state in run.states if index <= mark]
    return earlier[-1] if earlier else torch.full_like(run.tokens, -1)
