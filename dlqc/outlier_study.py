"""What the transforms of a recipe do to outliers: the model as captured, then after each pass that keeps its function.

    study(model, recipe="w8a8-smoothquant")   →   one `OutlierReport` as captured, one after smooth

Passes run one at a time, so that each is seen by itself, and up to the last exact one before numbers get rounded. Where
a recipe smooths and quantizes block by block, its transforms see the quantized blocks before them; here they see exact ones.
"""

from __future__ import annotations

import io
import itertools
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from dlqc.backend import load_backend
from dlqc.compile import Text, prepare
from dlqc.contract import Context, Pass
from dlqc.diffusion.masking import device_of
from dlqc.errors import FeasibilityError
from dlqc.manager import PassManager
from dlqc.outliers import RATIOS, OutlierReport, Summary, Surface, Thresholds, checked_ratios, outliers, surface
from dlqc.recipe import Recipe, _line, as_recipe

#: Facts that a pass ends or gives when it replaces numbers by codes or the graph by kernels.
_EXACT_UNTIL = frozenset({"float-weights", "float-activations"})
_INEXACT_FROM = frozenset({"quantized-weights", "quantized-activations", "packed", "lowered"})
#: The mask ratio at which surfaces are taken, or the nearest that was measured and masks some tokens but not all.
_SURFACE_RATIO = 0.5
#: Columns of text at most; names of stages can be long.
_WIDEST = 400


@dataclass(frozen=True)
class OutlierStudy:
    """Outliers before and after each transform.

    Attributes:
        model: its name. source: where the token rows come from.
        stages: the first as captured, then one for each exact pass.
        surfaces: token by channel, for the worst sites of the first stage, stage by stage within a site.
    """

    model: str
    source: str
    stages: tuple[OutlierReport, ...]
    surfaces: tuple[Surface, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """Plain data without the surfaces."""
        return {"model": self.model, "source": self.source, "stages": [stage.to_plain() for stage in self.stages]}

    def render(self) -> str:
        """Tables and sentences, as `dlqc report --outliers` prints them. Tables are as wide as they need to be."""
        plain = {"markup": False, "emoji": False, "highlight": False}
        console = Console(file=io.StringIO(), width=_WIDEST, force_terminal=False, **plain)  # type: ignore[arg-type]
        first = self.stages[0]
        limits = first.thresholds
        rows, length = first.states
        ratios = ", ".join(f"{ratio:g}" for ratio in first.ratios)
        console.print(f"{self.model}: {rows} rows of {length} tokens from {self.source}, mask ratios {ratios}")
        for stage in self.stages:
            console.print(f"\n{stage.stage}, over layers and mask ratios:")
            console.print(_summary_table(stage))
        console.print(
            "\nby mask ratio: median crest (median over layers) / normal outlier channels (mean over layers):"
        )
        console.print(_ratio_table(self.stages))
        for name in first.skipped:
            console.print(f"not measured: {name} reads other rows than the tokens")
        legend = (
            f"crest: max over RMS of a token. normal ch.: channels over {limits.normal:g} times the median channel, in maximum "
            f"and in median. massive: tokens with |x| > {limits.massive_absolute:g} and > {limits.massive_relative:g} times the "
            f"median. spike: tokens with |x| > {limits.spike:g} times the RMS of the site. top ch.: share of tokens whose "
            "largest entry lies in the one most frequent channel."
        )
        console.print("\n" + textwrap.fill(legend, 118))
        output = console.file
        assert isinstance(output, io.StringIO)
        return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def study(
    model: nn.Module,
    rows: Tensor,
    *,
    recipe: str | Path | Recipe | Pass | Sequence[Pass] | None = None,
    calibration: Text | None = None,
    ratios: Sequence[float] = RATIOS,
    thresholds: Thresholds | None = None,
    surfaces: int = 0,
    source: str = "token ids",
    mask_id: int | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> OutlierStudy:
    """Measure a model, and with a recipe also after each of its exact passes. The model is not changed.

    Args:
        model, recipe, calibration, mask_id, backend, seed: as for `compile`; without a recipe no pass runs.
        rows: clean token ids int64 [R, L] to measure on; all run in one batch, so memory holds R·L rows of the widest layer.
        ratios, thresholds: as for `outliers`.
        surfaces: for how many sites, the worst first, to keep |X| of one row of tokens.
        source: where the rows come from, for the report.
        progress: called with the name of each step.

    Raises:
        FeasibilityError: the recipe has no exact pass before it quantizes, or what `outliers` refuses.
    """
    checked_ratios(ratios)
    wanted = Recipe("none", ()) if recipe is None else _transforms(as_recipe(recipe))
    captured, _, ctx = prepare(
        model,
        load_backend(backend, device_of(model)),
        calibration=calibration,
        mask_id=mask_id,
        seed=seed,
        recipe=wanted,
    )
    look = _Look(captured.graph, ctx, rows, tuple(ratios), thresholds, surfaces)
    progress("as captured")
    look("as captured")
    for p in wanted.passes:
        progress(p.name)
        PassManager((p,)).run(captured.graph, ctx)
        if p.preserves == "exact":
            look(f"after {_line(p)}")
    name = getattr(model, "dlqc_source", type(model).__name__).rstrip("/").split("/")[-1]
    by_site = sorted(look.surfaces, key=lambda s: look.worst.index(s.site))
    return OutlierStudy(name, source, tuple(look.stages), tuple(by_site))


def _transforms(recipe: Recipe) -> Recipe:
    """The passes up to the last exact one before the first that rounds."""
    floating = list(
        itertools.takewhile(lambda p: not (p.invalidates & _EXACT_UNTIL or p.gives & _INEXACT_FROM), recipe.passes)
    )
    while floating and floating[-1].preserves != "exact":
        floating.pop()
    if not floating:
        raise FeasibilityError(
            f"recipe {recipe.name!r} transforms nothing before it quantizes, so there is no before and after",
            where="recipe",
            remedy="Leave the recipe out, or use one that has fold_norm_scale or smooth",
        )
    return replace(recipe, passes=tuple(floating))


class _Look:
    """Measures the graph as it is now, and keeps what it saw."""

    def __init__(
        self,
        graph: fx.Graph,
        ctx: Context,
        rows: Tensor,
        ratios: tuple[float, ...],
        thresholds: Thresholds | None,
        surfaces: int,
    ) -> None:
        self._graph, self._ctx, self._rows = graph, ctx, rows
        self._ratios, self._thresholds, self._count = ratios, thresholds, surfaces
        self.stages: list[OutlierReport] = []
        self.surfaces: list[Surface] = []
        self.worst: list[str] = []

    def __call__(self, stage: str) -> None:
        place = (self._graph, self._ctx.weights)
        common: dict[str, Any] = {"seed": self._ctx.seed, "stage": stage}
        report = outliers(
            *place, self._rows, self._ctx.spec, ratios=self._ratios, thresholds=self._thresholds, **common
        )
        self.stages.append(report)
        ratio = _surface_ratio(report.ratios)
        self.worst = self.worst or worst_sites(report, self._count)
        for site in self.worst:
            self.surfaces.append(surface(*place, self._rows[0], self._ctx.spec, site, ratio=ratio, **common))


def _surface_ratio(ratios: Sequence[float]) -> float:
    return min(ratios, key=lambda ratio: (ratio in (0.0, 1.0), abs(ratio - _SURFACE_RATIO)))


def worst_sites(report: OutlierReport, count: int) -> list[str]:
    """Names of the `count` sites with the largest median crest, one of each kind before a second of any."""
    crest = {site.name: max(c.crest_median for c in report.select(site=site.name)) for site in report.sites}
    ranked = sorted(report.sites, key=lambda site: -crest[site.name])
    seen: dict[str, int] = {}
    rounds = []
    for site in ranked:
        seen[site.kind] = seen.get(site.kind, 0) + 1
        rounds.append((seen[site.kind], -crest[site.name], site.name))
    return [name for _, _, name in sorted(rounds)[:count]]


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _summary_table(report: OutlierReport) -> Table:
    measures = (
        "max |x|",
        "crest,\nmedian (range)",
        "crest,\nmax",
        "kurtosis,\nmax",
        "normal ch.,\nmean / max",
        "massive\ntokens",
        "spike\ntokens",
        "top ch.,\nmax",
    )
    table = _table(("site", "rows"), measures)
    before = ""
    for (kind, rows), s in report.summary().items():
        table.add_row("" if kind == before else kind, rows, *_cells(s))
        before = kind
    return table


def _cells(s: Summary) -> list[str]:
    return [
        f"{s.absmax:.4g}",
        f"{s.crest_median:.1f} ({s.crest_low:.1f}-{s.crest_high:.1f})",
        f"{s.crest_max:.1f}",
        f"{s.kurtosis_max:.3g}",
        f"{s.normal_mean:.1f} / {s.normal_max}",
        f"{s.massive_share:.2%}",
        f"{s.spike_share:.2%}",
        f"{s.top_share:.0%}",
    ]


def _ratio_table(stages: Sequence[OutlierReport]) -> Table:
    """Crest and normal outlier channels by stage and mask ratio."""
    first = stages[0]
    table = _table(("site", "rows", "stage"), [f"{ratio:.4g}" for ratio in first.ratios])
    before: tuple[str, str] = ("", "")
    for kind, rows in first.summary():
        for stage in stages:
            values = []
            for ratio in first.ratios:
                cells = stage.select(kind=kind, rows=rows, ratio=ratio)
                crest = [c.crest_median for c in cells]
                normal = [len(c.normal) for c in cells]
                values.append(f"{statistics.median(crest):.1f} / {statistics.fmean(normal):.3g}" if cells else "")
            label = ("" if before[0] == kind else kind, "" if before == (kind, rows) else rows)
            table.add_row(*label, stage.stage, *values)
            before = (kind, rows)
    return table
