"""Bits against quality: all assignments of widths that no other one beats, predicted, and some of them measured.

    pareto(model, "w3.2a16-mixed-gptq", measure=8)    →    the frontier of the recipe's `assign_bits`, for every budget at once

The cost of an assignment is predicted as the sum of what its units cost alone (`dlqc.sensitivity`). What is measured is the KL
divergence of the quantized model from the original one at masked positions, on rows of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dlqc.assignment import Choices
from dlqc.backend import load_backend
from dlqc.compile import Text, prepare
from dlqc.contract import Pass
from dlqc.diffusion.fidelity import FidelityTable, fidelity
from dlqc.diffusion.intervals import Interval
from dlqc.errors import FeasibilityError
from dlqc.execute import forward
from dlqc.graph import copy_graph
from dlqc.knapsack import frontier
from dlqc.manager import PassManager
from dlqc.recipe import Recipe, as_recipe
from dlqc.schemes import Scheme
from dlqc.trial import tried

#: Points that `render` prints at most.
_SHOWN = 16


@dataclass(frozen=True)
class Point:
    """One assignment.

    Attributes:
        bits: stored bits per quantized weight, everything of them counted.
        megabytes: of the weight files, everything counted, 10⁶ bytes.
        predicted: its cost in the metric of the study.
        choice: for each unit, the index of its scheme.
        kl: measured divergence from the original, nats per masked token; None where it was not measured.
    """

    bits: float
    megabytes: float
    predicted: float
    choice: tuple[int, ...]
    kl: Interval | None = None


@dataclass(frozen=True)
class Pareto:
    """A frontier.

    Attributes:
        model: its name. recipe: the passes. metric: what was predicted.
        units: the linears that get one scheme, by name. schemes: the candidates of each unit, by label.
        points: from the fewest bits to the lowest cost.
        uniform: the assignments that give all units the same scheme, by label.
        slack: bits by which the frontier may be off (`dlqc.knapsack`), 0 where it is exact.
    """

    model: str
    recipe: str
    metric: str
    units: tuple[tuple[str, ...], ...]
    schemes: tuple[tuple[str, ...], ...]
    points: tuple[Point, ...]
    uniform: dict[str, Point]
    slack: int

    def to_plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def measured(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.kl is not None)

    def render(self) -> str:
        """A table of some points, measured ones and uniform ones among them."""
        console = Console(
            file=io.StringIO(), width=118, force_terminal=False, markup=False, emoji=False, highlight=False
        )
        exact = "exact" if self.slack == 0 else f"off by {self.slack / 8e6:.3f} MB at most"
        console.print(f"{self.model} → {self.recipe}")
        console.print(f"{len(self.points)} assignments of {len(self.units)} units that no other one beats ({exact})")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("assignment", "bits per weight", "MB", f"predicted {self.metric}", "measured KL, nats"):
            table.add_column(name, justify="left" if name == "assignment" else "right")
        shown = dict.fromkeys([*_evenly(self.points, _SHOWN), *self.measured])
        rows = [("mixed", p) for p in shown] + [(f"all {label}", p) for label, p in self.uniform.items()]
        for name, point in sorted(rows, key=lambda row: row[1].bits):
            numbers = (f"{point.bits:.3f}", f"{point.megabytes:.3f}", f"{point.predicted:.3g}", _brief(point.kl))
            table.add_row(name, *numbers)
        console.print(table)
        output = console.file
        assert isinstance(output, io.StringIO)
        return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


class Study:
    """A model that is ready to be rounded in any assignment: captured, transformed, calibrated, its sensitivities known.

    Attributes:
        assign: the recipe's `assign_bits`. choices: what may be chosen.
        costs: of each unit's candidates, in the metric of `assign`. metrics: the same in all metrics that came along.
        original: the model as captured.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Path | Recipe | Pass | Sequence[Pass],
        *,
        calibration: Text | None = None,
        mask_id: int | None = None,
        seed: int = 0,
    ) -> None:
        self.name = getattr(model, "dlqc_source", type(model).__name__).rstrip("/").split("/")[-1]
        self.recipe = as_recipe(recipe)
        places = [i for i, p in enumerate(self.recipe.passes) if p.name == "assign_bits"]
        if len(places) != 1:
            what = f"recipe {self.recipe.name!r} has {len(places)} passes 'assign_bits', must have one"
            raise FeasibilityError(what, where="recipe", remedy="Use w3.2a16-mixed-gptq, or add assign_bits(budget=…)")
        before, self._after = self.recipe.passes[: places[0]], self.recipe.passes[places[0] + 1 :]
        self.assign = cast(Any, self.recipe.passes[places[0]])
        PassManager(self.recipe.passes).check_order()
        captured, _, ctx = prepare(
            model,
            load_backend("reference"),
            calibration=calibration,
            mask_id=mask_id,
            seed=seed,
            recipe=Recipe(self.recipe.name, before),
        )
        original = (copy_graph(captured.graph), captured.weights.clone())
        self.original: Callable[[Tensor], Tensor] = functools.partial(forward, *original)
        self.graph, self.ctx = captured.graph, ctx
        PassManager(before).run(self.graph, ctx)
        self.choices: Choices = self.assign.choices(self.graph, ctx)
        if self.choices.problems:
            raise FeasibilityError("; ".join(self.choices.problems), remedy="Nothing was changed or written")
        self.metric: str = self.assign.metric
        self.metrics: list[list[dict[str, float]]] = self.assign.costs(self.graph, ctx, self.choices)
        self.costs = [[cost[self.metric] for cost in row] for row in self.metrics]

    def point(self, choice: Sequence[int], kl: Interval | None = None) -> Point:
        """An assignment and what is known of it."""
        size = self.choices.size(choice)
        predicted = sum(row[c] for row, c in zip(self.costs, choice, strict=True))
        megabytes = (size + self.choices.rest) / 8e6
        return Point(size / self.choices.weights, megabytes, predicted, tuple(choice), kl)

    def uniform(self) -> dict[Scheme, tuple[int, ...]]:
        """The choices that give all units the same scheme."""
        common = [s for s in self.choices.schemes[0] if all(s in schemes for schemes in self.choices.schemes)]
        return {s: tuple(schemes.index(s) for schemes in self.choices.schemes) for s in common}

    def fidelity(self, choice: Sequence[int], rows: Tensor, **options: Any) -> FidelityTable:
        """Round the model so, by the rest of the recipe's passes, and compare it with the original on clean token rows [R, L].

        `options` are those of `dlqc.diffusion.fidelity.fidelity`.
        """
        changes = {"facts": self.ctx.facts | {"assignment"}, "assignment": self.choices.assignment(choice)}
        rounded = functools.partial(forward, *tried(self.graph, self.ctx, self._after, **changes))
        return fidelity(self.original, rounded, rows, self.ctx.spec, **options)

    def pareto(self, *, measure: int = 0, rows: Tensor | None = None) -> Pareto:
        """The frontier.

        Args:
            measure: how many points, evenly spread, to round and to compare with the original; with any, the uniform ones too.
            rows: clean token ids int64 [R, L] to compare on; the calibration rows where absent.
        """
        best = frontier(self.choices.items(self.costs))
        points = [self.point(best.choice(i)) for i in range(len(best.sizes))]
        uniform = {scheme.label: self.point(choice) for scheme, choice in self.uniform().items()}
        if measure:
            given = self.ctx.rows.ids if rows is None and self.ctx.rows is not None else rows
            assert given is not None
            chosen = {id(point) for point in _evenly(points, measure)}
            points = [self._measured(point, given) if id(point) in chosen else point for point in points]
            uniform = {label: self._measured(point, given) for label, point in uniform.items()}
        return Pareto(
            model=self.name,
            recipe=f"{self.recipe.name}: {self.recipe}",
            metric=self.metric,
            units=tuple(unit.names for unit in self.choices.units),
            schemes=tuple(tuple(s.label for s in schemes) for schemes in self.choices.schemes),
            points=tuple(points),
            uniform=uniform,
            slack=best.slack,
        )

    def _measured(self, point: Point, rows: Tensor) -> Point:
        return dataclasses.replace(point, kl=self.fidelity(point.choice, rows).mean_kl)


def pareto(
    model: nn.Module,
    recipe: str | Path | Recipe | Pass | Sequence[Pass] = "w3.2a16-mixed-gptq",
    *,
    calibration: Text | None = None,
    measure: int = 0,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    seed: int = 0,
) -> Pareto:
    """The frontier of a recipe's `assign_bits`, of which the budget has no say. The model is not changed.

    Args:
        model, recipe, calibration, mask_id, seed: as for `compile`.
        measure, rows: as for `Study.pareto`.

    Raises:
        FeasibilityError: the recipe has no `assign_bits`, or nothing to choose.
    """
    study = Study(model, recipe, calibration=calibration, mask_id=mask_id, seed=seed)
    return study.pareto(measure=measure, rows=rows)


def _brief(kl: Interval | None) -> str:
    return "" if kl is None else f"{kl.mean:.3g} [{kl.low:.3g}, {kl.high:.3g}]"


def _evenly(points: Sequence[Point], count: int) -> list[Point]:
    """About `count` points, evenly spread over the bits, both ends among them."""
    low, high = points[0].bits, points[-1].bits
    steps = [low + (high - low) * i / max(1, count - 1) for i in range(count)]
    nearest = [min(points, key=lambda p: abs(p.bits - step)) for step in steps]
    return list({id(p): p for p in nearest}.values())
