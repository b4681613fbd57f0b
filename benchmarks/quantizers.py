"""Every quantizer × {W4, W3, W2, W4A4, W8A8} × {tiny-llada, its outlier twin, rxnmapper's ALBERT}.

Every model sees the same rows and the same masks, so differences are paired; intervals are 95 % t intervals over rows.
Arithmetic is float32 on the reference backend; the linears of the blocks are quantized, or what the arm's name says. Methods have
the settings of their papers unless the arm's name says otherwise; recipes are listed in full. tiny-llada and its twin are
calibrated on the training split of other texts, ALBERT on other reactions. Compile times are from a loaded machine: read them as
orders of magnitude.

    python benchmarks/quantizers.py --text tales_test.txt --calibration books_calib.txt --reactions rxn_smiles.txt --jobs 2

A cell (model, scheme, arm) is kept under `--cells` when it is done, so a stopped run goes on where it was. Writes
docs/results/quantizers.json and, beside it, the tables as Markdown.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from quality import Subject, plain, rxnmapper, scores, summary, tiny_llada
from quantizer_arms import ARMS, CLAIMS, MODELS

import dlqc
from dlqc.diffusion.intervals import mean_interval
from dlqc.diffusion.masking import apply_mask, ratio_mask
from dlqc.diffusion.tasks import exact_match
from dlqc.errors import DlqcError
from dlqc.models.outlier_twin import outlier_twin

TASK_ITEMS = 50
#: The mask ratio at which ALBERT was trained, near enough: where its recovered tokens are counted.
HOME_RATIO = 0.15


class Memo:
    """A model that is asked for the same canvases again and again: NLL, KL and agreement mask alike."""

    def __init__(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.model = model
        self.kept: dict[bytes, torch.Tensor] = {}

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = self.model(ids)
        return self.kept[key]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Files and sizes that every worker needs."""

    text: Path
    calibration: Path
    reactions: Path
    rows: int
    count: int


@functools.lru_cache(maxsize=1)
def subject(name: str, inputs: Inputs) -> tuple[Subject, Memo, dict[str, torch.Tensor]]:
    """A model with its rows, its own logits and its own scores; one at a time is held."""
    if name == MODELS[2]:
        made = rxnmapper(inputs.reactions, inputs.count)
    else:
        made = tiny_llada(inputs.text, inputs.calibration, inputs.rows)
    if name == MODELS[1]:
        made = dataclasses.replace(made, name=name, model=outlier_twin(made.model.float()))
    original = Memo(dlqc.compile(made.model, passes=(), backend="reference", progress=False, mask_id=made.spec.mask_id))
    return made, original, scores(made, original, None)


def right_answers(made: Subject, model: Any) -> dict[str, dict[str, float]]:
    """Task accuracy: exact match on the generated tasks; for reactions the share of masked tokens that are recovered."""
    if not made.name.startswith("rxn"):
        tokenizer = dlqc.load_tokenizer(made.model)
        found = exact_match(model, tokenizer, made.spec, items=TASK_ITEMS)
        return {task: plain(interval) for task, interval in found.items()}
    shares = []
    for rows in made.groups:
        maskable = torch.ones_like(rows, dtype=torch.bool)
        maskable[:, 0] = maskable[:, -1] = False
        masked = ratio_mask(maskable, HOME_RATIO, 0)
        right = model(apply_mask(rows, masked, made.spec.mask_id)).argmax(-1) == rows
        shares.append((right & masked).sum(1).double() / masked.sum(1))
    return {f"recovered at {HOME_RATIO:.0%}": plain(mean_interval(torch.cat(shares)))}


def cell(name: str, scheme: str, arm: str, recipe: str, inputs: Inputs, kept: Path) -> str:
    """Measure one arm on one model and keep it; gives a line to print."""
    torch.set_num_threads(1)
    if kept.exists():
        return f"{name} {scheme} {arm}: kept"
    made, original, base = subject(name, inputs)
    started = time.perf_counter()
    options: dict[str, Any] = {"backend": "reference", "progress": False, "mask_id": made.spec.mask_id}
    entry: dict[str, Any] = {"model": name, "scheme": scheme, "arm": arm, "recipe": recipe}
    try:
        compiled = dlqc.compile(made.model, recipe, calibration=made.calibration, **options)
    except DlqcError as error:
        entry["refused"] = str(error).split("\n")[0][:400]
        said = f"refused: {error}"
    else:
        entry["seconds"] = time.perf_counter() - started
        found = scores(made, Memo(compiled), original)
        storage = compiled.report.storage
        entry |= {
            "bits": storage.bits_per_quantized_weight,
            "tasks": right_answers(made, compiled),
            "rows": {"nll": found["nll"].mean(1).tolist(), "kl": found["kl"].tolist()},
        } | summary(found, base["nll"])
        said = f"KL {mean_interval(found['kl'])}, {entry['bits']:.3f} bits, {entry['seconds']:.0f} s"
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(entry), encoding="utf-8")
    part.rename(kept)
    return f"{name} {scheme} {arm}: {said}"


def baseline(name: str, inputs: Inputs) -> dict[str, Any]:
    made, original, base = subject(name, inputs)
    return {"rows": base["nll"].shape[0], "tasks": right_answers(made, original.model)} | summary(base, base["nll"])


def claims(cells: dict[tuple[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Each published ordering against what was measured, by paired KL and NLL."""
    judged = []
    for model in MODELS:
        for scheme, worse, better, source in CLAIMS:
            pair = [cells.get((model, scheme, arm), {}) for arm in (worse, better)]
            if not all("rows" in entry for entry in pair):
                continue
            entry: dict[str, Any] = {
                "model": model,
                "scheme": scheme,
                "worse": worse,
                "better": better,
                "source": source,
            }
            for measure in ("kl", "nll"):
                one, other = (torch.tensor(found["rows"][measure], dtype=torch.float64) for found in pair)
                difference = mean_interval(other - one)
                entry[measure] = plain(difference)
                entry[f"{measure} verdict"] = (
                    "holds" if difference.high < 0 else "reversed" if difference.low > 0 else "no difference seen"
                )
            entry["bits"] = [found["bits"] for found in pair]
            judged.append(entry)
    return judged


def markdown(results: dict[str, Any]) -> str:
    """The tables; what they say is in README.md beside them."""
    lines = ["# Quantizers", "", f"Made by `{results['command']}`;"]
    lines += ["all numbers are in `quantizers.json` beside this file; what they say is in `README.md`.", ""]
    lines += [
        "NLL and KL are in nats a masked token; differences are to full precision and paired; brackets are 95 %",
        "",
    ]
    lines[-2] += (
        " intervals. `tasks` is the mean share of right answers. Bits are true bits a quantized weight, with scales,"
    )
    lines[-2] += " zero points, indices and factors. Seconds are of a loaded machine."
    for model, found in results["models"].items():
        fp = found["fp32"]
        ratios = list(fp["nll_by_ratio"])
        head = f"Full precision: NLL {_interval(fp['nll'])}, tasks {_tasks(fp)}; {fp['rows']} rows."
        lines += [f"## {model}", "", head, ""]
        for scheme, arms in found["schemes"].items():
            lines += [
                f"| {scheme} | bits | NLL difference | at {float(ratios[0]):.0%} masked | at {float(ratios[-1]):.0%} "
                "| KL | top-1 | tasks | s |",
                "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            ]
            for arm, e in sorted(arms.items(), key=lambda pair: pair[1].get("kl", {"mean": 1e9})["mean"]):
                if "refused" in e:
                    lines.append(f"| {arm} | | refused: {e['refused'][:150].replace('|', '/')} | | | | | | |")
                    continue
                by_ratio = e["difference_by_ratio"]
                cells = (f"{e['bits']:.3f}", _interval(e["difference"]), f"{by_ratio[ratios[0]]['mean']:.4f}",
                         f"{by_ratio[ratios[-1]]['mean']:.4f}", _interval(e["kl"]), f"{e['agreement']['mean']:.3f}",
                         _tasks(e), f"{e['seconds']:.0f}")  # fmt: skip
                lines.append(f"| {arm} | {' | '.join(cells)} |")
            lines.append("")
    lines += [
        "## Published orderings",
        "",
        "Second minus first, paired; negative: the second is better, as published.",
        "",
    ]
    lines += [
        "| model | bits | first → second | KL | verdict | NLL | verdict | source |",
        "|---|---|---|--:|---|--:|---|---|",
    ]
    for c in results["claims"]:
        kl, nll = _interval(c["kl"]), _interval(c["nll"])
        which = f"{c['worse']} → {c['better']}"
        lines.append(
            f"| {c['model']} | {c['scheme']} | {which} | {kl} | {c['kl verdict']} | {nll} | {c['nll verdict']} | {c['source']} |"
        )
    lines += ["", "## Recipes", "", "| bits | arm | recipe |", "|---|---|---|"]
    lines += [f"| {s} | {arm} | `{recipe}` |" for s, arms in ARMS.items() for arm, recipe in arms.items()]
    return "\n".join([*lines, ""])


def _interval(i: dict[str, float]) -> str:
    return f"{i['mean']:.4f} [{i['low']:.4f}, {i['high']:.4f}]"


def _tasks(entry: dict[str, Any]) -> str:
    shares = [task["mean"] for task in entry["tasks"].values()]
    return f"{sum(shares) / len(shares):.3f}"


def main(
    text: Annotated[Path, typer.Option(help="text to measure tiny-llada on")],
    calibration: Annotated[Path, typer.Option(help="text to calibrate tiny-llada on")],
    reactions: Annotated[Path, typer.Option(help="unmapped reaction SMILES, one a line")],
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("docs/results/quantizers.json"),
    cells: Annotated[Path, typer.Option(help="folder of finished cells")] = Path("build/quantizers"),
    rows: Annotated[int, typer.Option(help="rows of tiny-llada")] = 32,
    count: Annotated[int, typer.Option(help="reactions to measure; the rest calibrates")] = 80,
    jobs: Annotated[int, typer.Option(help="processes")] = 2,
    only: Annotated[str, typer.Option(help="measure arms whose 'model scheme arm' this pattern is found in")] = "",
) -> None:
    """Measure what is not kept yet, then write the results."""
    started = time.perf_counter()
    inputs = Inputs(text, calibration, reactions, rows, count)
    todo = []
    for model in MODELS:
        for scheme, arms in ARMS.items():
            for arm, recipe in arms.items():
                key = hashlib.sha256(repr((model, scheme, arm, recipe, rows, count)).encode()).hexdigest()[:16]
                if re.search(only, f"{model} {scheme} {arm}"):
                    todo.append((model, scheme, arm, recipe, inputs, cells / f"{key}.json"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(cell, *item) for item in todo]):
            typer.echo(done.result())
    found = {item[:3]: json.loads(item[-1].read_text(encoding="utf-8")) for item in todo}
    results: dict[str, Any] = {
        "command": f"python benchmarks/quantizers.py --text {text.name} --calibration {calibration.name} "
        f"--reactions {reactions.name} --rows {rows} --count {count}",
        "files": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (text, calibration, reactions)},
        "machine": machine.facts(),
        "dlqc": dlqc.__version__,
        "claims": claims(found),
        "models": {m: {"fp32": baseline(m, inputs), "schemes": {s: {} for s in ARMS}} for m in MODELS},
        "seconds": time.perf_counter() - started,
    }
    for (model, scheme, arm), entry in found.items():
        dropped = ("rows", "model", "scheme", "arm")
        results["models"][model]["schemes"][scheme][arm] = {k: v for k, v in entry.items() if k not in dropped}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
