"""Step-adaptive precision on tiny-llada: average bits and quality of schedules against every fixed width of one nested weight.

    python benchmarks/step_adaptive.py --out docs/results/step_adaptive.json                              # minutes on one core
    python benchmarks/step_adaptive.py --out smoke.json --rows 8 --items 4 --prompts 2 --budgets 0.01     # a look

Arms: one nested weight (rounded by GPTQ within nested codes) read in one width at all steps; in the schedules that
`adapt_precision` finds for several budgets; and in the schedule of one of them backwards (as many bits, at the wrong steps).
Beside them, the same with the nested weight rounded to nearest in its fixed widths, and weights stored for one width alone, by
GPTQ and to nearest.

Measured on text that calibration has not seen: KL from full precision at masked positions, at mask ratios spread evenly; KL and
bits along the arm's own denoising runs; exact match on generated questions. A schedule that does not look at the mask ratio and
has the same bits on average has a KL on the line between fixed widths: `kl_line`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import dlqc
from dlqc.compiled import Compiled
from dlqc.diffusion.denoising import Step
from dlqc.diffusion.fidelity import FidelityTable, divergence, fidelity
from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.tasks import exact_match
from dlqc.evaluate import bundled_text, rows_to_measure
from dlqc.precision import PrecisionSchedule, cheapest, shares

PLANES, WIDTHS = "2+1+1+4", (2, 3, 4, 8)
EDGES = tuple(k / 8 for k in range(1, 8))
RATIOS = tuple((k + 0.5) / 8 for k in range(8))
STATES = "calibrate(sampler=forward_process, sequences={states})"
NESTED = "quantize_weights(format=nested(planes='{planes}'), method={method})"
ALONE = "quantize_weights(bits={bits}, method=rtn(clip='mse')), pack, lower"


def once(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model, with what it said on earlier ids kept."""
    kept: dict[bytes, Tensor] = {}

    def ask(ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in kept:
            with torch.no_grad():
                found = model(ids)
                kept[key] = found if isinstance(found, Tensor) else found.logits  # type: ignore[attr-defined]
        return kept[key]

    return ask


def bits_of(schedule: PrecisionSchedule, ids: Tensor, mask_id: int) -> list[float]:
    """Bits that each row of a canvas is read with."""
    return [schedule.width(float(share)) for share in (ids == mask_id).double().mean(1)]


def along_a_run(
    model: Compiled, reference: Callable[[Tensor], Tensor], prompts: Tensor, schedule: PrecisionSchedule, length: int
) -> dict[str, Any]:
    """KL at the masked positions of every second canvas of the arm's own runs, and the bits of all steps."""
    canvases: list[Tensor] = []

    def keep(step: Step) -> None:
        canvases.append(step.canvas)

    sampler = LLaDASampler(steps=length // 4, gen_length=length, block_length=length)
    sampler.run(model, prompts, model.spec, seed=0, on_step=keep)
    total = torch.zeros(len(prompts), dtype=torch.float64)
    for ids in canvases[::2]:
        with torch.no_grad():
            a, b = reference(ids), model(ids)
        for row in range(len(ids)):
            here = ids[row] == model.spec.mask_id
            total[row] += divergence(a[row, here].double(), b[row, here].double()).mean() / len(canvases[::2])
    bits = [b for ids in canvases for b in bits_of(schedule, ids, model.spec.mask_id)]
    return {"bits": sum(bits) / len(bits), "kl": plain(mean_interval(total))}


def on_tasks(model: Compiled, schedule: PrecisionSchedule, items: int) -> dict[str, Any]:
    """Exact match, and the bits of all forwards that it took."""
    bits: list[float] = []

    def ask(ids: Tensor) -> Tensor:
        bits.extend(bits_of(schedule, ids, model.spec.mask_id))
        return model(ids)

    score = exact_match(ask, model.tokenizer, model.spec, items=items)
    mean = sum(i.mean for i in score.values()) / len(score)
    return {"accuracy": mean, "by_task": {k: plain(i) for k, i in score.items()}, "bits": sum(bits) / len(bits)}


def plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def words(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def on_the_line(fixed: dict[int, float], bits: float) -> float:
    """KL of mixing the two neighbouring fixed widths without a look at the mask ratio."""
    below = max(w for w in fixed if w <= bits)
    above = min((w for w in fixed if w > below), default=below)
    share = 0.0 if above == below else (bits - below) / (above - below)
    return (1 - share) * fixed[below] + share * fixed[above]


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Step-adaptive precision",
        "",
        f"Made by `{result['command']}`; all numbers are in `step_adaptive.json` beside this file.",
        "",
        f"tiny-llada, the linears of the blocks stored once in nested codes of {PLANES} bits, groups of 128. Bits are those",
        "of codes; scales and offsets of the width that is read add 0.25. Brackets are 95 % intervals over rows or runs.",
        "`line`: the KL of mixing fixed widths to the same bits without a look at the mask ratio. Full precision has "
        f"{result['full_precision']['accuracy']:.3f} of the answers right.",
        "",
        "| arm | bits by mask ratio, low to high | bits | KL at even mask ratios | line "
        "| bits in runs | KL in runs | bits on tasks | right |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        run, line = row["run"], row.get("kl_line")
        cells = [row["arm"], " ".join(map(str, row["widths"])), f"{row['bits']:.3g}", words(row["kl"])]
        cells += ["" if line is None else f"{line:.4f}", f"{run['bits']:.3g}", words(run["kl"])]
        cells += [f"{row['tasks']['bits']:.3g}", f"{row['tasks']['accuracy']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "KL of each fixed width by mask ratio:",
        "",
        "| bits | " + " | ".join(f"{r:g}" for r in RATIOS) + " |",
    ]
    lines += ["|--:|" + "--:|" * len(RATIOS)]
    for row in result["rows"]:
        if row["arm"].startswith("nested GPTQ"):
            lines.append(f"| {row['bits']:g} | " + " | ".join(f"{kl:.4f}" for kl in row["kl_by_ratio"]) + " |")
    lines += [
        "",
        f"The schedule backwards minus itself, KL paired by row: {words(result['backwards_minus_forwards'])} nats.",
        "",
    ]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; a page goes beside it")],
    rows: Annotated[int, typer.Option(min=2, help="rows of 128 tokens to measure on")] = 16,
    items: Annotated[int, typer.Option(min=1, help="questions per task")] = 50,
    prompts: Annotated[int, typer.Option(min=2, help="tales to continue")] = 4,
    states: Annotated[int, typer.Option(min=16, help="calibration states of the search")] = 128,
    budgets: Annotated[str, typer.Option(help="KL budgets, nats per masked position")] = "0.003,0.005,0.007,0.009",
) -> None:
    """Measure and write the results."""
    started = time.perf_counter()
    source = dlqc.load_model("tiny-llada")
    text = bundled_text("calib")

    def compiled(recipe: str) -> Compiled:
        return dlqc.compile(source, recipe, calibration=text, progress=False)

    drawn = STATES.format(states=states)
    arms: list[tuple[str, Compiled, PrecisionSchedule]] = []
    found_by: list[PrecisionSchedule] = []
    for method, label in (("nested_gptq", "nested GPTQ"), ("rtn", "nested nearest")):
        recipe = (
            f"{drawn}, {NESTED.format(planes=PLANES, method=method)}, adapt_precision(edges={EDGES}, widths={(2,) * 8})"
        )
        model = compiled(recipe)
        arms += [(f"{label}, {width} bits", model.with_schedule(fixed(width)), fixed(width)) for width in WIDTHS]
        if method == "nested_gptq":
            table = searched(compiled(recipe.replace(f"widths={(2,) * 8}", "budget=1000")))
            for budget in map(float, budgets.split(",")):
                widths, _ = cheapest(table, WIDTHS, budget, shares(EDGES))
                found_by.append(PrecisionSchedule(EDGES, widths))
                arms.append((f"adaptive, budget {budget:g}", model.with_schedule(found_by[-1]), found_by[-1]))
            uneven = [s for s in found_by if s.widths != s.widths[::-1]]
            turned = min(uneven, key=lambda s: abs(s.average() - 2.5), default=None)
            if turned is not None:
                back = PrecisionSchedule(EDGES, turned.widths[::-1])
                arms.append(("backwards", model.with_schedule(back), back))
    arms += [(f"GPTQ alone, {w} bits", compiled(f"w{w}a16-gptq"), fixed(w)) for w in (2, 3, 4)]
    arms += [(f"nearest alone, {w} bits", compiled(ALONE.format(bits=w)), fixed(w)) for w in (2, 3, 4)]

    spec = arms[0][1].spec
    reference = once(source)
    measured = rows_to_measure(arms[0][1].tokenizer, spec)[:rows]
    starts = rows_to_measure(arms[0][1].tokenizer, spec, length=16)[:prompts]
    tables: dict[str, FidelityTable] = {}
    found: list[dict[str, Any]] = []
    lines: dict[int, float] = {}
    for name, model, schedule in arms:
        table = tables[name] = fidelity(reference, model, measured, spec, ratios=RATIOS)
        row = {
            "arm": name,
            "recipe": str(model.recipe),
            "widths": schedule.widths,
            "bits": schedule.average(),
            "kl": plain(table.mean_kl),
            "agreement": plain(table.mean_agreement),
            "kl_by_ratio": [i.mean for i in table.kl_by_ratio],
            "run": along_a_run(model, source_logits(source), starts, schedule, 112),
            "tasks": on_tasks(model, schedule, items),
        }
        if name.startswith("nested GPTQ"):
            lines[int(schedule.widths[0])] = table.mean_kl.mean
        elif name.startswith(("adaptive", "backwards")):
            row["kl_line"] = on_the_line(lines, schedule.average())
        found.append(row)
        typer.echo(
            f"{name:28s} {row['bits']:5.2f} bits  KL {table.mean_kl.mean:.4f}  right {row['tasks']['accuracy']:.3f}"
        )
    full = exact_match(source_logits(source), arms[0][1].tokenizer, spec, items=items)
    gap = torch.zeros(rows, dtype=torch.float64)
    if turned is not None:
        forwards = next(name for name, _, s in arms if name.startswith("adaptive") and s == turned)
        gap = tables["backwards"].kl.mean(1) - tables[forwards].kl.mean(1)
    result = {
        "command": f"python benchmarks/step_adaptive.py --out docs/results/{out.name} --rows {rows} --items {items} "
        f"--prompts {prompts} --states {states} --budgets {budgets}",
        "seconds": time.perf_counter() - started,
        "dlqc": dlqc.__version__,
        "torch": torch.__version__,
        "edges": EDGES,
        "ratios": RATIOS,
        "full_precision": {"accuracy": sum(i.mean for i in full.values()) / len(full)},
        "backwards_minus_forwards": plain(mean_interval(gap)),
        "rows": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(result), encoding="utf-8")


def searched(model: Compiled) -> list[list[float]]:
    """The KL that `adapt_precision` measured on calibration states, by bucket and width."""
    step = next(step for step in model.report.steps if step.name == "adapt_precision")
    return [
        [row[f"kl at {w} bits"] for w in WIDTHS] for key, row in step.details.items() if key.startswith("mask ratio")
    ]


def fixed(width: int) -> PrecisionSchedule:
    return PrecisionSchedule(EDGES, (width,) * len(RATIOS))


def source_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """The logits of the model as it came."""

    def ask(ids: Tensor) -> Tensor:
        with torch.no_grad():
            found = model(ids)
        return found if isinstance(found, Tensor) else found.logits  # type: ignore[no-any-return]

    return ask


if __name__ == "__main__":
    typer.run(main)
