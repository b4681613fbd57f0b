"""What quantization costs, item by item, in percent of the reference's score, and contrasts of cells on the same items.

    row of text     100·(1 - exp(NLL_ref - NLL))        the probability that a token loses, geometric mean of the row
    other items     100·(s_ref - s) / mean(s_ref)        s 1 where right, 0 where wrong

All cells saw the same items and masks, so cells are averaged and subtracted item by item before an interval is taken; tasks are
independent samples, each with the same weight (`dlqc.diffusion.intervals.stratified_interval`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlqc.diffusion.intervals import Interval, stratified_interval
from dlqc.study.cell import REFERENCE

Place = tuple[str, str, str]
"""Model, bits, method."""

ByTask = dict[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """Losses of all cells that were measured.

    Attributes:
        percent: by place and task, float64 [items], percent of the reference's score.
        kl: by place and text task, float64 [rows], nats per masked token.
        categories: of each task.
        blind: (model, task) where the reference scores nothing, so that nothing can be lost.
    """

    percent: Mapping[Place, ByTask]
    kl: Mapping[Place, ByTask]
    categories: Mapping[str, str]
    blind: tuple[tuple[str, str], ...] = ()

    def of(self, places: Sequence[Place], *, category: str | None = None) -> Interval | None:
        """Mean loss of some cells over all tasks, or those of one category; None where there are none."""
        return self._interval([(1.0, places)], self.percent, category)

    def kl_of(self, places: Sequence[Place]) -> Interval | None:
        """Mean KL of some cells from their references, nats per masked token."""
        return self._interval([(1.0, places)], self.kl, None)

    def contrast(self, more: Sequence[Place], less: Sequence[Place], *, kl: bool = False) -> Interval | None:
        """Mean loss (or KL) of `more` minus that of `less`, paired by item."""
        return self._interval([(1.0, more), (-1.0, less)], self.kl if kl else self.percent, None)

    def between(self, places: Sequence[Place], more: Sequence[str], less: Sequence[str]) -> Interval | None:
        """Mean loss of some cells on the tasks of the categories `more` minus that on those of `less`."""
        averages = _average(self.percent, places)
        groups = [[x for task, x in averages.items() if self.categories[task] in names] for names in (more, less)]
        if not all(groups):
            return None
        signed = zip((1.0, -1.0), groups, strict=True)
        return stratified_interval([(sign / len(group), x) for sign, group in signed for x in group])

    def _interval(
        self, parts: Sequence[tuple[float, Sequence[Place]]], data: Mapping[Place, ByTask], category: str | None
    ) -> Interval | None:
        averages = [(sign, _average(data, places)) for sign, places in parts]
        tasks = [t for t in self.categories if all(t in a for _, a in averages)]
        tasks = [t for t in tasks if category is None or self.categories[t] == category]
        if not tasks:
            return None
        strata = []
        for task in tasks:
            signed = torch.stack([sign * average[task] for sign, average in averages])
            strata.append((1 / len(tasks), signed.sum(0)))
        return stratified_interval(strata)


def losses_of(results: Mapping[Place, Mapping[str, Any]]) -> Losses:
    """Losses of the results of cells by place, those of the references among them; refused cells are left out."""
    percent: dict[Place, ByTask] = {}
    kl: dict[Place, ByTask] = {}
    categories: dict[str, str] = {}
    blind: dict[tuple[str, str], None] = {}
    for (model, bits, method), result in results.items():
        reference = results.get((model, *REFERENCE), {}).get("tasks")
        if reference is None or "tasks" not in result or (bits, method) == REFERENCE:
            continue
        place = (model, bits, method)
        percent[place], kl[place] = {}, {}
        for task, found in result["tasks"].items():
            categories[task] = found["category"]
            mine, full = (torch.tensor(r[task]["values"], dtype=torch.float64) for r in (result["tasks"], reference))
            if found["kind"] == "nll":
                percent[place][task] = 100 * (1 - (full - mine).exp())
                kl[place][task] = torch.tensor(found["kl"], dtype=torch.float64)
            elif full.mean() > 0:
                percent[place][task] = 100 * (full - mine) / full.mean()
            else:
                blind[model, task] = None
    return Losses(percent, kl, categories, tuple(blind))


def _average(data: Mapping[Place, ByTask], places: Sequence[Place]) -> ByTask:
    """Mean over cells, item by item, for the tasks that all of them have."""
    if not places:
        return {}
    shared = [task for task in data[places[0]] if all(task in data[place] for place in places)]
    return {task: torch.stack([data[place][task] for place in places]).mean(0) for task in shared}
