"""Outliers of tiny-llada and of its outlier twin, before and after the transforms: numbers and figures.

    python benchmarks/outliers.py --text tales_test.txt --calibration books_calib.txt --out docs/results/outliers.json

Writes a summary as JSON and Markdown, and the figures as PNG into a folder of the same name.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import dlqc
from dlqc.calibration import rows_from
from dlqc.figures import save_figures
from dlqc.models.describe import spec_of
from dlqc.models.outlier_twin import outlier_twin
from dlqc.outlier_study import OutlierStudy, study
from dlqc.outliers import OutlierReport

RECIPE = "calibrate, smooth(sites='all'), fold_norm_scale, rotate_hidden, rotate_heads(across=True), rotate_down"


def table(report: OutlierReport) -> dict[str, dict[str, float]]:
    """By kind of site and kind of rows: median crest, and normal and massive outliers a site."""
    found: dict[str, dict[str, float]] = {}
    for kind in report.kinds:
        for rows in ("masked", "visible"):
            cells = report.select(kind=kind, rows=rows)
            if cells:
                found[f"{kind}, {rows}"] = {
                    "crest": statistics.median(c.crest_median for c in cells),
                    "normal": statistics.mean(len(c.normal) for c in cells),
                    "massive": statistics.mean(c.massive.entries for c in cells),
                    "absmax": max(c.absmax for c in cells),
                }
    return found


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Outliers before and after the transforms", "", f"Made by `{results['command']}`.", ""]
    lines += [
        "Crest: the largest entry of a token over its root mean square, median over tokens, layers and mask ratios. Normal:",
        "channels that are large for nearly all tokens, mean a site. Thresholds are in `dlqc.outliers`.",
        "",
    ]
    for model, stages in results["models"].items():
        names = list(stages)
        lines += [f"## {model}", "", "Each cell is crest / normal outlier channels.", ""]
        lines += ["| site | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
        for site in stages[names[0]]:
            cells = [f"{stages[n][site]['crest']:.1f} / {stages[n][site]['normal']:.1f}" for n in names]
            lines.append(f"| {site} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(
    text: Annotated[Path, typer.Option(help="text to measure on")],
    calibration: Annotated[Path, typer.Option(help="text to calibrate smoothing on")],
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("docs/results/outliers.json"),
    rows: Annotated[int, typer.Option(help="rows to measure")] = 16,
) -> None:
    """Measure both models and write the results."""
    model = dlqc.load_model("tiny-llada").float()
    spec, tokenizer = spec_of(model), dlqc.load_tokenizer(model)
    measured = rows_from(text, tokenizer=tokenizer, spec=spec).ids
    measured = measured[torch.randperm(measured.shape[0], generator=torch.Generator().manual_seed(0))[:rows]]
    calibrated = rows_from(calibration, tokenizer=tokenizer, spec=spec).ids
    results: dict[str, Any] = {
        "command": f"python benchmarks/outliers.py --text {text.name} --calibration {calibration.name} --rows {rows}",
        "recipe": RECIPE,
        "models": {},
    }
    for name, subject in {"tiny-llada": model, "outlier twin": outlier_twin(model)}.items():
        found: OutlierStudy = study(
            subject, measured, recipe=RECIPE, calibration=calibrated, surfaces=1, progress=print
        )
        results["models"][name] = {stage.stage: table(stage) for stage in found.stages}
        save_figures(found, out.with_suffix("") / name.replace(" ", "-"))
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
