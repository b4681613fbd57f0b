"""Transforms against outliers: {plain, SmoothQuant, AWQ, QuaRot, SpinQuant, FlatQuant, DuQuant} × {W8A8, W4A4}.

Two models: tiny-llada, and its outlier twin, which computes the same function with three channels thirty times as large at four
places of every block (`dlqc.models.outlier_twin`). Weights per channel, activations per token, both symmetric, nearest
rounding unless the row says GPTQ. Every arm sees the same rows and masks; differences are paired, intervals are 95 % t
intervals over rows. Arithmetic is float32 on the reference backend.

    python benchmarks/transforms.py --text tales_test.txt --calibration books_calib.txt --out docs/results/transforms.json

Writes the JSON and, beside it, the table as Markdown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from quality import Subject, plain, scores, summary, tiny_llada

import dlqc
from dlqc.diffusion.intervals import mean_interval
from dlqc.errors import DlqcError
from dlqc.models.outlier_twin import outlier_twin

SCHEMES = {"W8A8": "w8a8", "W4A4": "w4a4"}
ARMS = {
    "plain": "rtn",
    "SmoothQuant": "smoothquant",
    "AWQ": "awq",
    "QuaRot": "quarot-rtn",
    "QuaRot, GPTQ": "quarot",
    "SpinQuant": "spinquant",
    "FlatQuant": "flatquant",
    "DuQuant": "duquant",
}
#: The order that QDLM reports for LLaDA, worst first.
PUBLISHED = ("plain", "SmoothQuant", "QuaRot", "DuQuant")


def measure(subject: Subject) -> dict[str, Any]:
    """All arms on one subject, with paired differences to full precision and along the published order."""
    options: dict[str, Any] = {"backend": "reference", "progress": False, "mask_id": subject.spec.mask_id}
    original = dlqc.compile(subject.model, passes=(), **options)
    base = scores(subject, original, None)
    result: dict[str, Any] = {"rows": base["nll"].shape[0], "fp32": summary(base, base["nll"]), "schemes": {}}
    for scheme, prefix in SCHEMES.items():
        arms: dict[str, Any] = {}
        rows: dict[str, torch.Tensor] = {}
        for name, method in ARMS.items():
            recipe = f"{prefix}-{method}"
            started = time.perf_counter()
            try:
                compiled = dlqc.compile(subject.model, recipe, calibration=subject.calibration, **options)
            except DlqcError as error:
                arms[name] = {"recipe": recipe, "refused": str(error).split(" (")[0]}
                typer.echo(f"{subject.name} {scheme} {name}: {error}")
                continue
            seconds = time.perf_counter() - started
            found = scores(subject, compiled, original)
            rows[name] = found["nll"].mean(1)
            online = sum(step.metrics.get("online", 0.0) for step in compiled.report.steps)
            arms[name] = {"recipe": recipe, "seconds": seconds, "online": online} | summary(found, base["nll"])
            typer.echo(f"{subject.name} {scheme} {name}: {mean_interval((found['nll'] - base['nll']).mean(1))}")
        order = {
            f"{b} minus {a}": plain(mean_interval(rows[b] - rows[a]))
            for a, b in itertools.pairwise(PUBLISHED)
            if a in rows and b in rows
        }
        result["schemes"][scheme] = {"arms": arms, "published order": order}
    return result


def _interval(i: dict[str, float], digits: int = 4) -> str:
    return f"{i['mean']:.{digits}f} [{i['low']:.{digits}f}, {i['high']:.{digits}f}]"


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    lines = ["# Transforms against outliers", "", f"Made by `{results['command']}`;", ""]
    lines[2] = f"Made by `{results['command']}`; all numbers are in `transforms.json` beside this file."
    for name, found in results["models"].items():
        lines += [f"## {name}", "", f"Full precision: masked NLL {_interval(found['fp32']['nll'])} nats."]
        lines += ["Differences are paired; brackets are 95 % intervals.", ""]
        for scheme, part in found["schemes"].items():
            lines += [
                f"| {scheme} | NLL difference | KL | top-1 agreement | ops kept at run time |",
                "|---|--:|--:|--:|--:|",
            ]
            for arm, e in part["arms"].items():
                if "refused" in e:
                    lines.append(f"| {arm} | refused: {e['refused']} | | | |")
                    continue
                cells = (_interval(e["difference"]), f"{e['kl']['mean']:.4f}", f"{e['agreement']['mean']:.3f}")
                lines.append(f"| {arm} | {' | '.join(cells)} | {e['online']:.0f} |")
            lines += ["", "Along the published order (negative: the second is better): " + "; ".join(
                f"{pair} {_interval(i)}" for pair, i in part["published order"].items()
            ) + ".", ""]  # fmt: skip
    return "\n".join(lines)


def main(
    text: Annotated[Path, typer.Option(help="text to measure on")],
    calibration: Annotated[Path, typer.Option(help="text to calibrate on")],
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("docs/results/transforms.json"),
    rows: Annotated[int, typer.Option(help="rows to measure")] = 128,
) -> None:
    """Measure everything and write the results."""
    started = time.perf_counter()
    subject = tiny_llada(text, calibration, rows)
    twin = dataclasses.replace(subject, name="tiny-llada, outlier twin", model=outlier_twin(subject.model.float()))
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (text, calibration)}
    results = {
        "command": f"python benchmarks/transforms.py --text {text.name} --calibration {calibration.name} --rows {rows}",
        "files": files,
        "machine": machine.facts(),
        "dlqc": dlqc.__version__,
        "models": {s.name: measure(s) for s in (subject, twin)},
        "seconds": time.perf_counter() - started,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
