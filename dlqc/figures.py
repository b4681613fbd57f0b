"""Figures of an outlier study and of a frontier, as PNG files. Needs matplotlib: `pip install 'dlqc[plots]'`.

layers-<measure>.png   layer by mask ratio, a panel for each kind of site, masked and visible rows apart; stage by stage
stages-crest.png       crest by kind of site, before and after each pass, with the range over layers and mask ratios
surface-<n>.png        |x| of one row of tokens, token by channel, for the worst sites; stage by stage, on one scale
pareto.png             bits per weight against cost: all assignments that no other one beats, and what was measured of some
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dlqc.errors import ArtifactError, FeasibilityError
from dlqc.outliers import ROWS, Cell, OutlierReport, Surface

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlqc.outlier_study import OutlierStudy
    from dlqc.pareto import Pareto, Point

_DPI = 130
#: More layers than this, and the numbers are not written into the cells.
_LABELLED_LAYERS = 12
#: Columns of a surface; wider ones show the largest of neighbouring channels.
_SURFACE_COLUMNS = 512

#: Name of a measure: (title, value of a cell, format of its label).
MEASURES: dict[str, tuple[str, Callable[[Cell], float], str]] = {
    "crest": ("median crest of a token (max / RMS)", lambda c: c.crest_median, "{:.1f}"),
    "normal": ("normal outlier channels", lambda c: float(len(c.normal)), "{:.0f}"),
    "spikes": ("tokens with a spike over {spike:g}·RMS, %", lambda c: 100 * c.spikes.tokens / c.tokens, "{:.2g}"),
    "massive": ("tokens with a massive outlier, %", lambda c: 100 * c.massive.tokens / c.tokens, "{:.2g}"),
}


def need_matplotlib() -> None:
    """Refuse before any work where figures were asked for and cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise FeasibilityError(
            "matplotlib is not installed", where="figures", remedy="Install it with: pip install 'dlqc[plots]'"
        )


def save_figures(study: OutlierStudy, folder: str | Path) -> list[Path]:
    """Draw all figures into a folder, which is made where it is missing; files of the same names are replaced.

    Raises:
        FeasibilityError: matplotlib is missing.
        ArtifactError: the folder cannot be written.
    """
    need_matplotlib()
    figures = {"stages-crest": crest_by_stage(study.stages)}
    for name, (_, value, _) in MEASURES.items():
        if any(value(cell) for stage in study.stages for cell in stage.cells):
            figures[f"layers-{name}"] = layers_by_ratio(study.stages, name)
    sites = dict.fromkeys(s.site for s in study.surfaces)
    for number, site in enumerate(sites, 1):
        figures[f"surface-{number}"] = surfaces_of([s for s in study.surfaces if s.site == site])
    return save_all(figures, Path(folder))


def save_pareto(found: Pareto, folder: str | Path) -> list[Path]:
    """Draw a frontier into a folder, as `save_figures` does."""
    need_matplotlib()
    return save_all({"pareto": frontier_figure(found)}, Path(folder))


def save_all(figures: dict[str, Figure], target: Path) -> list[Path]:
    paths = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, figure in sorted(figures.items()):
            path = target / f"{name}.png"
            figure.savefig(path, dpi=_DPI)
            paths.append(path)
    except OSError as error:
        raise ArtifactError(
            f"the figures cannot be written ({error.strerror or error})",
            where=str(target),
            remedy="Name a folder that you may write to",
        ) from error
    return paths


def layers_by_ratio(stages: Sequence[OutlierReport], measure: str) -> Figure:
    """Layer by mask ratio: a column of panels for each kind of site in the layers, two rows of panels a stage."""
    from matplotlib.colors import PowerNorm

    title, value, form = MEASURES[measure]
    kinds = [k for k in stages[0].kinds if any(s.kind == k and s.layer is not None for s in stages[0].sites)]
    kinds = kinds or list(stages[0].kinds)
    layers = sorted({s.layer for s in stages[0].sites if s.layer is not None}) or [0]
    height = max(1.3, min(0.28 * len(layers) + 0.5, 4.0))
    count = len(stages) * len(ROWS)
    figure = new_figure(2.5 * len(kinds) + 2.2, height * count + 0.55 * count + 0.9)
    axes = figure.subplots(count, len(kinds), squeeze=False, sharex=True, sharey=True)
    grids = {
        (i, k): _grid(stages[i // 2], kind, layers, ROWS[i % 2], value)
        for i in range(count)
        for k, kind in enumerate(kinds)
    }
    known = torch.cat([g[~g.isnan()] for g in grids.values()])
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
    # Counts differ by orders of magnitude between sites; on a straight scale the small ones would all look alike.
    norm = PowerNorm(1.0 if measure == "crest" else 0.4, vmin=low, vmax=max(high, low + 1e-9))
    image = None
    for (i, k), grid in grids.items():
        ax = axes[i][k]
        image = ax.imshow(grid.numpy(), aspect="auto", cmap="viridis", norm=norm)
        ax.set_facecolor("0.92")
        ax.set_xticks(range(len(stages[0].ratios)), [f"{r:.3g}" for r in stages[0].ratios])
        step = max(1, len(layers) // 8)
        ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        if i == 0:
            ax.set_title(textwrap.fill(kinds[k], 24), fontsize=9)
        if i == count - 1:
            ax.set_xlabel("mask ratio")
        if k == 0:
            ax.set_ylabel(f"{ROWS[i % 2]} rows\nlayer")
        if k == len(kinds) - 1 and len(stages) > 1:
            ax.annotate(
                textwrap.fill(stages[i // 2].stage, 22),
                (1.04, 0.5),
                xycoords="axes fraction",
                rotation=270,
                va="center",
                fontsize=8,
            )
        if len(layers) <= _LABELLED_LAYERS:
            _write_numbers(ax, grid, form, norm)
    assert image is not None
    label = title.format(spike=stages[0].thresholds.spike)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02 if len(stages) == 1 else 0.05, label=label)
    figure.suptitle(f"{label[0].upper()}{label[1:]}, by layer and mask ratio", fontsize=11)
    return figure


def crest_by_stage(stages: Sequence[OutlierReport]) -> Figure:
    """Crest by kind of site, one mark a stage: median over layers and mask ratios, with the range over them."""
    kinds = stages[0].kinds
    figure = new_figure(max(7.0, 1.7 * len(kinds) + 2.5), 4.6)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, rows in zip(axes, ROWS, strict=True):
        for i, stage in enumerate(stages):
            found = {kind: s for (kind, which), s in stage.summary().items() if which == rows}
            at = [k + (i - (len(stages) - 1) / 2) * 0.7 / max(len(stages), 2) for k in range(len(kinds))]
            shown = [(x, found[kind]) for x, kind in zip(at, kinds, strict=True) if kind in found]
            middle = [s.crest_median for _, s in shown]
            spread = [
                [s.crest_median - s.crest_low for _, s in shown],
                [s.crest_high - s.crest_median for _, s in shown],
            ]
            ax.errorbar(
                [x for x, _ in shown], middle, yerr=spread, fmt="o", capsize=3, label=stage.stage, color=f"C{i}"
            )
        ax.set_title(f"{rows} rows", fontsize=10)
        ax.set_xticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=8, rotation=25, ha="right")
        ax.set_xlim(-0.6, len(kinds) - 0.4)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("median crest of a token (max / RMS)")
    axes[0].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    if not handles:
        handles, labels = axes[1].get_legend_handles_labels()
    wrapped = [textwrap.fill(label, 40) for label in labels]
    figure.legend(handles, wrapped, loc="outside lower center", ncols=min(len(labels), 3), fontsize=8, frameon=False)
    figure.suptitle("Crest by site: median, and range over layers and mask ratios", fontsize=11)
    return figure


def surfaces_of(panels: Sequence[Surface]) -> Figure:
    """|x| of one row of tokens at one site, token by channel: a panel for each stage on one logarithmic scale.

    The bar to the left of each panel is dark where the token is [MASK].
    """
    from matplotlib.colors import LogNorm

    values = [_pooled(panel.values) for panel in panels]
    high = max(float(v.max()) for v in values)
    high = high if high > 0 else 1.0
    norm = LogNorm(vmin=high / 1e4, vmax=high)
    figure = new_figure(4.6 * len(panels) + 1.6, 5.2)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    image = None
    for ax, panel, value in zip(axes, panels, values, strict=True):
        tokens, channels = panel.values.shape
        image = ax.imshow(
            value.clamp(min=high / 1e4).numpy(),
            aspect="auto",
            cmap="inferno",
            norm=norm,
            extent=(-0.5, channels - 0.5, tokens - 0.5, -0.5),
            interpolation="nearest",
        )
        bar = ax.inset_axes((-0.035, 0.0, 0.025, 1.0))
        bar.imshow(panel.masked[:, None].numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        bar.set_xticks([])
        bar.set_yticks([])
        ax.tick_params(axis="y", pad=14)
        ax.set_title(textwrap.fill(panel.stage, 36), fontsize=9)
        ax.set_xlabel("channel")
    axes[0].set_ylabel("token (bar: dark = [MASK])", labelpad=4)
    assert image is not None
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, label="|x|, in the unit of the activations")
    first = panels[0]
    figure.suptitle(f"Input of {first.site}, mask ratio {first.ratio:g}", fontsize=11)
    return figure


#: Metrics of a frontier that are in the unit of the measured divergence, so that both go on one axis.
_IN_NATS = ("kl", "fisher")


def frontier_figure(found: Pareto) -> Figure:
    """Bits per quantized weight against what an assignment costs, predicted and measured; the uniform ones by name."""
    alone = found.metric in _IN_NATS or not found.measured
    figure = new_figure(8.0 if alone else 12.0, 5.0)
    axes = figure.subplots(1, 1 if alone else 2, squeeze=False)[0]
    predicted, measured = axes[0], axes[-1]
    positive = [p for p in found.points if p.predicted > 0]
    label = f"predicted, all {len(found.points)} assignments that no other one beats"
    predicted.plot(
        [p.bits for p in positive],
        [p.predicted for p in positive],
        color="C0",
        lw=1.2,
        drawstyle="steps-post",
        label=label,
    )
    uniform = list(found.uniform.values())
    if found.measured:
        _with_intervals(measured, found.measured, "o", "C1", "mixed, measured")
        _with_intervals(measured, uniform, "s", "C3", "one scheme for all, measured")
    if not alone or not found.measured:
        shown = [p for p in uniform if p.predicted > 0]
        marks = ([p.bits for p in shown], [p.predicted for p in shown])
        predicted.plot(*marks, "s", color="C3", mfc="none", label="one scheme for all, predicted")
    for name, point in found.uniform.items():
        height = point.kl.mean if point.kl is not None else point.predicted
        place = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8}
        if height > 0:
            measured.annotate(name.split(" ")[0], (point.bits, height), **place)
    units = "nats per masked token" if found.metric in _IN_NATS else "sum over units"
    predicted.set_ylabel(f"predicted {found.metric}, {units}" if not alone or not found.measured else f"KL, {units}")
    if not alone:
        measured.set_ylabel("measured KL, nats per masked token")
    for ax in dict.fromkeys(axes):
        ax.set_yscale("log")
        ax.set_xlabel("stored bits per quantized weight, scales and zero points counted")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{found.model}: bits against quality (sensitivities by {found.metric})", fontsize=11)
    return figure


def _with_intervals(ax: Any, points: Sequence[Point], mark: str, color: str, label: str) -> None:
    known = [(p.bits, p.kl) for p in points if p.kl is not None and p.kl.low > 0]
    spread = [[kl.mean - kl.low for _, kl in known], [kl.high - kl.mean for _, kl in known]]
    where = ([bits for bits, _ in known], [kl.mean for _, kl in known])
    ax.errorbar(*where, yerr=spread, fmt=mark, color=color, capsize=2, ms=5, label=f"{label} (95 % intervals)")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(
    report: OutlierReport, kind: str, layers: Sequence[int], rows: Any, value: Callable[[Cell], float]
) -> torch.Tensor:
    """Values [layers, ratios]; NaN where there are no such rows, the largest where a layer has several such sites."""
    where = {s.name: s.layer or 0 for s in report.sites if s.kind == kind}
    grid = torch.full((len(layers), len(report.ratios)), float("nan"))
    for cell in report.select(kind=kind, rows=rows):
        place = (layers.index(where[cell.site]), report.ratios.index(cell.ratio))
        grid[place] = max(value(cell), -float("inf") if grid[place].isnan() else float(grid[place]))
    return grid


def _write_numbers(ax: Any, grid: torch.Tensor, form: str, norm: Callable[[float], float]) -> None:
    for (i, j), number in zip(torch.cartesian_prod(*map(torch.arange, grid.shape)), grid.flatten(), strict=True):
        if not bool(number.isnan()):
            color = "black" if norm(float(number)) > 0.55 else "white"
            ax.text(int(j), int(i), form.format(float(number)), ha="center", va="center", fontsize=7, color=color)


def _pooled(values: torch.Tensor) -> torch.Tensor:
    """|x| [L, d] with at most `_SURFACE_COLUMNS` columns, each the largest of its channels, so that none is lost."""
    if values.shape[1] <= _SURFACE_COLUMNS:
        return values
    return torch.nn.functional.adaptive_max_pool1d(values[None], _SURFACE_COLUMNS)[0]


def _short(kind: str) -> str:
    """A kind in lines that fit under an axis."""
    return textwrap.fill(kind, 16, break_long_words=False)
