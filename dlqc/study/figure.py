"""The figure of a study: loss by cell and category with intervals, a panel for each model, the classes as bands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dlqc.figures import need_matplotlib, new_figure, save_all
from dlqc.study.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BANDS = ((-1e6, 1.0, "#e8f4e8"), (1.0, 4.0, "#fdf3dc"), (4.0, 1e6, "#fbe5e2"))
#: Losses are linear below this many percent and logarithmic beyond.
_LINEAR = 4.0
_TICKS = (-100, -30, -10, -4, -1, 0, 1, 4, 10, 30, 100)


def save_study(summary: Summary, folder: str | Path) -> list[Path]:
    """Draw `study.png` into a folder, as `dlqc.figures.save_figures` does."""
    need_matplotlib()
    return save_all({"study": study_figure(summary)}, Path(folder))


def study_figure(summary: Summary) -> Figure:
    """Loss in percent of the reference's score, with 95 % intervals."""
    models = [name for name in summary.study.models if any(row.place[0] == name for row in summary.rows)]
    categories = list(dict.fromkeys(task.category for task in summary.study.tasks.values()))
    cells = list(dict.fromkeys(row.place[1:] for row in summary.rows))
    figure = new_figure(max(6.0, 0.75 * len(cells) + 2.0), 3.1 * max(1, len(models)) + 0.7)
    axes = figure.subplots(max(1, len(models)), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for ax, model in zip(axes, models, strict=False):
        for low, high, color in _BANDS:
            ax.axhspan(low, high, color=color, zorder=0)
        ax.axhline(0, color="0.4", lw=0.8)
        for number, category in enumerate(categories):
            shift = (number - (len(categories) - 1) / 2) * 0.2
            known = [
                (cells.index(row.place[1:]) + shift, row.by_category[category])
                for row in summary.rows
                if row.place[0] == model and category in row.by_category
            ]
            spread = [[v.mean - v.low for _, v in known], [v.high - v.mean for _, v in known]]
            places, means = [x for x, _ in known], [v.mean for _, v in known]
            ax.errorbar(places, means, yerr=spread, fmt="o", color=f"C{number}", ms=4, capsize=2, label=category)
        ax.set_title(f"{model} ({summary.study.models[model].type})", fontsize=10)
        ax.set_ylabel("loss, % of the score")
    extremes = [v for row in summary.rows for value in row.by_category.values() for v in (value.low, value.high)]
    axes[0].set_yscale("symlog", linthresh=_LINEAR)
    if extremes:
        axes[0].set_ylim(min(-2.0, 1.3 * min(extremes)), max(6.0, 1.3 * max(extremes)))
    axes[0].set_yticks([t for t in _TICKS if not extremes or min(extremes) <= t <= max(extremes)])
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].minorticks_off()
    axes[-1].set_xticks(range(len(cells)), [f"{bits}\n{method}" for bits, method in cells], fontsize=8)
    axes[0].legend(fontsize=8, frameon=False, ncols=len(categories))
    figure.suptitle(f"{summary.study.name}: loss by cell, 95 % intervals; bands at 1 % and 4 %", fontsize=11)
    return figure
