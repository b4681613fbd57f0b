"""A study summed up: losses with intervals, degradation classes, the four findings; as data and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dlqc.diffusion.intervals import Interval, brief, mean_interval, wilson
from dlqc.study.cell import REFERENCE, Cell
from dlqc.study.findings import Finding, check_findings
from dlqc.study.losses import Losses, Place, losses_of
from dlqc.study.spec import Study

#: Classes of a loss in percent of the reference's score.
UNDER, BETWEEN, OVER = "under 1 %", "1 to 4 %", "over 4 %"


def degradation(loss: float) -> str:
    """The class of a loss in percent, as QDLM draws the lines.

    >>> [degradation(loss) for loss in (-3.0, 0.99, 1.0, 4.0, 4.1)]
    ['under 1 %', 'under 1 %', '1 to 4 %', '1 to 4 %', 'over 4 %']
    """
    return UNDER if loss < 1 else BETWEEN if loss <= 4 else OVER


@dataclass(frozen=True)
class Measured:
    """A cell and what came of it."""

    cell: Cell
    result: dict[str, Any]

    @property
    def place(self) -> Place:
        return self.cell.model, self.cell.bits, self.cell.method


@dataclass(frozen=True)
class Row:
    """A cell in the table: losses in percent of the reference's score, KL in nats per masked token."""

    place: Place
    bits_per_weight: float
    by_category: dict[str, Interval]
    loss: Interval | None
    kl: Interval | None
    seconds: float

    @property
    def degradation(self) -> str:
        return "" if self.loss is None else degradation(self.loss.mean)

    @property
    def sure(self) -> bool:
        """Whether the whole interval lies in one class."""
        return self.loss is not None and degradation(self.loss.low) == degradation(self.loss.high)

    def to_plain(self) -> dict[str, Any]:
        model, bits, method = self.place
        return {
            "model": model,
            "bits": bits,
            "method": method,
            "bits_per_quantized_weight": self.bits_per_weight,
            "loss_percent": _plain(self.loss),
            "by_category": {name: _plain(value) for name, value in self.by_category.items()},
            "class": self.degradation,
            "interval_within_class": self.sure,
            "kl": _plain(self.kl),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Summary:
    """What a study found.

    Attributes:
        scores: of the reference by (model, task); text: exp(-NLL) from the mean NLL.
        refused: why cells were refused, by place.
    """

    study: Study
    losses: Losses
    scores: dict[tuple[str, str], Interval]
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    refused: dict[Place, str]

    def to_plain(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "study": self.study.model_dump(mode="json", exclude={"models", "calibration", "text"}),
            "models": {name: {"type": m.type, "family": m.family} for name, m in self.study.models.items()},
            "reference_scores": [
                {"model": model, "task": task, "score": _plain(value)} for (model, task), value in self.scores.items()
            ],
            "cells": [row.to_plain() for row in self.rows],
            "findings": [finding.to_plain() for finding in self.findings],
            "refused": [{"cell": " ".join(place), "why": why} for place, why in self.refused.items()],
            "nothing_to_lose": [{"model": model, "task": task} for model, task in self.losses.blind],
        }

    def render(self) -> str:
        """Markdown."""
        return "\n".join([f"# Study: {self.study.name}", "", *self._scores(), "", *self._table(), "", *self._found()])

    def _scores(self) -> list[str]:
        tasks = list(self.study.tasks)
        lines = [
            f"Scores of the models as they are: text by exp(-NLL), others by the share of right answers. Seed {self.study.seed}.",
            "",
            f"| model | {' | '.join(f'{t} ({self.study.tasks[t].category})' for t in tasks)} |",
            f"|---|{'--:|' * len(tasks)}",
        ]
        for model, entry in self.study.models.items():
            cells = [brief(self.scores.get((model, task)), 3) for task in tasks]
            lines.append(f"| {model} ({entry.type}) | {' | '.join(cells)} |")
        return lines

    def _table(self) -> list[str]:
        categories = list(dict.fromkeys(task.category for task in self.study.tasks.values()))
        lines = [
            "Loss in percent of those scores, with 95 % intervals, paired item by item; a loss below zero is a gain. The class "
            "is that of the mean over tasks, with \\* where the interval reaches into another. KL from the model as it is, in "
            "nats per masked token.",
            "",
            f"| model | bits | method | {' | '.join(categories)} | all tasks | class | KL | bits a weight |",
            f"|---|---|---|{'--:|' * (len(categories) + 1)}---|--:|--:|",
        ]
        for row in self.rows:
            losses = [brief(row.by_category.get(name), 1) for name in categories]
            mark = "" if row.sure else " \\*"
            numbers = f"{brief(row.kl, 4)} | {row.bits_per_weight:.2f}"
            lines.append(
                f"| {' | '.join(row.place)} | {' | '.join(losses)} | {brief(row.loss, 1)} | {row.degradation}{mark} | {numbers} |"
            )
        for place, why in self.refused.items():
            lines += ["", f"Refused: {' '.join(place)}: {why}"]
        for model, task in self.losses.blind:
            lines += ["", f"Left out: {task} of {model}, which scores 0 as it is."]
        return lines

    def _found(self) -> list[str]:
        lines = [
            "## QDLM's findings on this grid",
            "",
            "A claim holds, or is reversed, where its 95 % interval lies on one side. Percent of the reference's score; KL says "
            "the same contrast in nats per masked token, which sees what few items cannot.",
        ]
        for number, finding in enumerate(self.findings, 1):
            lines += ["", f"### {number}. {finding.title}: {finding.verdict}", ""]
            lines += ["| claim | percent | verdict | KL | by KL | cells |", "|---|--:|---|--:|---|--:|"]
            for claim in finding.claims:
                by_kl = claim.verdict_by_kl if claim.kl is not None else ""
                numbers = f"{brief(claim.value, 2)} | {claim.verdict} | {brief(claim.kl, 4)} | {by_kl} | {claim.cells}"
                lines.append(f"| {claim.text} | {numbers} |")
        return [*lines, ""]


def summarize(study: Study, measured: Sequence[Measured]) -> Summary:
    """Sum up cells; those that were refused are listed and left out."""
    losses = losses_of({m.place: m.result for m in measured})
    rows: list[Row] = []
    scores: dict[tuple[str, str], Interval] = {}
    refused: dict[Place, str] = {}
    for one in measured:
        if "refused" in one.result:
            refused[one.place] = str(one.result["refused"])
        elif (one.cell.bits, one.cell.method) == REFERENCE:
            scores |= {(one.cell.model, task): _score(found) for task, found in one.result["tasks"].items()}
        elif one.place in losses.percent:
            rows.append(_row(one, losses))
    return Summary(study, losses, scores, tuple(rows), check_findings(losses, study.models), refused)


def _row(one: Measured, losses: Losses) -> Row:
    names = dict.fromkeys(losses.categories.values())
    by_category = {name: losses.of([one.place], category=name) for name in names}
    known = {name: value for name, value in by_category.items() if value is not None}
    seconds = sum(one.result["seconds"].values())
    numbers = (losses.of([one.place]), losses.kl_of([one.place]), round(seconds, 2))
    return Row(one.place, one.result["bits_per_weight"], known, *numbers)


def _score(found: dict[str, Any]) -> Interval:
    """Of text exp(-NLL), whose ends come from those of the NLL."""
    values = torch.tensor(found["values"], dtype=torch.float64)
    if found["kind"] != "nll":
        return wilson(int(values.sum()), values.numel())
    nll = mean_interval(values)
    low, mean, high = torch.tensor([-nll.high, -nll.mean, -nll.low], dtype=torch.float64).exp().tolist()
    return replace(nll, mean=mean, low=low, high=high)


def _plain(value: Interval | None) -> dict[str, float] | None:
    return None if value is None else {"mean": value.mean, "low": value.low, "high": value.high}
