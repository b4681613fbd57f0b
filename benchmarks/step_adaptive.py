"""Step-adaptive precision on tiny-llada: average bits and quality of schedules against every fixed width of one nested weight.

    python benchmarks/step_adaptive.py --out docs/results/step_adaptive.json                              # minutes on one core
    python benchmarks/step_adaptive.py --out smoke.json --rows 8 --items 4 --prompts 2 --budgets 0.1      # a look

Arms: the nested weight read in one width at all steps; in the schedules that `adapt_precision` finds for several budgets; in the
schedule of one of them backwards (as many bits, at the wrong steps); and weights stored for one width alone, rounded to nearest and
by GPTQ. All but GPTQ look at no data when they round.

Measured on text that calibration has not seen: KL from full precision at masked positions, at mask ratios spread evenly; KL and bits along
the arm's own denoising runs; exact match on generated questions. A schedule that does not look at the mask ratio and has the same
bits on average has a KL on the line between fixed widths: `kl_line`.
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
from dlqc.precision import PrecisionSchedule

PLANES, WIDTHS = "2+1+1+4", (2, 3, 4, 8)
EDGES = tuple(k / 8 for k in range(1, 8))
RATIOS = tuple((k + 0.5) / 8 for k in range(8))
STATES = "calibrate(sampler=forward_process, sequences={states})"
NESTED = f"quantize_weights(format=nested(planes='{PLANES}'), method=rtn)"
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
        f"tiny-llada, the linears of the blocks stored once in nested codes of {PLANES} bits, groups of 128. Bits are those of codes; scales",
        "and offsets of the width that is read add 0.25. Brackets are 95 % intervals over rows or runs. `line`: the KL of mixing fixed widths to",
        "the same bits without a look at the mask ratio. Full precision has "
        f"{result['full_precision']['accuracy']:.3f} of the answers right.",
        "",
        "| arm | bits by mask ratio, low to high | bits | KL at even mask ratios | line | bits in runs | KL in runs | bits on tasks | right |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        kl, run, line = row["kl"], row["run"]["kl"], row.get("kl_line")
        lines.append(
            f"| {row['arm']} | {' '.join(map(str, row['widths']))} | {row['bits']:.3g} | {kl['mean']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}] "
            f"| {'' if line is None else f'{line:.4f}'} | {row['run']['bits']:.3g} | {run['mean']:.4f} [{run['low']:.4f}, {run['high']:.4f}] "
            f"| {row['tasks']['bits']:.3g} | {row['tasks']['accuracy']:.3f} |"
        )
    lines += ["", "KL of each fixed width by mask ratio:", "", "| bits | " + " | ".join(f"{r:g}" for r in RATIOS) + " |"]
    lines += ["|--:|" + "--:|" * len(RATIOS)]
    for row in result["rows"]:
        if row["arm"].startswith("nested, "):
            lines.append(f"| {row['bits']:g} | " + " | ".join(f"{kl:.4f}" for kl in row["kl_by_ratio"]) + " |")
    gap = result["backwards_minus_forwards"]
    lines += [
        "",
        f"The schedule backwards minus itself, KL paired by row: {gap['mean']:.4f} [{gap['low']:.4f}, {gap['high']:.4f}] nats.",
        "",
    ]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; a page goes beside it")],
    rows: Annotated[int, typer.Option(min=2, help="rows of 128 tokens to measure on")] = 32,
    items: Annotated[int, typer.Option(min=1, help="questions per task")] = 100,
    prompts: Annotated[int, typer.Option(min=2, help="tales to continue")] = 8,
    states: Annotated[int, typer.Option(min=16, help="calibration states of the search")] = 128,
    budgets: Annotated[str, typer.Option(help="KL budgets, nats per masked position")] = "0.03,0.06,0.1,0.15",
) -> None:
    """Measure and write the results."""
    started = time.perf_counter()
    source = dlqc.load_model("tiny-llada")
    text = bundled_text("calib")

    def compiled(recipe: str) -> Compiled:
        return dlqc.compile(source, recipe, calibration=text, progress=False)

    arms: list[tuple[str, Compiled, PrecisionSchedule]] = []
    for width in WIDTHS:
        widths = (width,) * len(RATIOS)
        arms.append((f"nested, {width} bits", compiled(f"{NESTED}, adapt_precision(edges={EDGES}, widths={widths})"), fixed(width)))
    turned: PrecisionSchedule | None = None
    for budget in budgets.split(","):
        model = compiled(f"{STATES.format(states=states)}, {NESTED}, adapt_precision(edges={EDGES}, budget={budget})")
        assert model.schedule is not None
        arms.append((f"adaptive, budget {budget}", model, model.schedule))
        if len(set(model.schedule.widths)) > 1:
            turned = model.schedule
    if turned is not None:
        back = PrecisionSchedule(EDGES, turned.widths[::-1])
        arms.append(("the last one backwards", compiled(f"{NESTED}, adapt_precision(edges={EDGES}, widths={back.widths})"), back))
    for width in (2, 3, 4):
        arms.append((f"alone, nearest, {width} bits", compiled(ALONE.format(bits=width)), fixed(width)))
    for width in (2, 3):
        arms.append((f"alone, GPTQ, {width} bits", compiled(f"w{width}a16-gptq"), fixed(width)))

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
        if name.startswith("nested, "):
            lines[int(schedule.widths[0])] = table.mean_kl.mean
        elif not name.startswith("alone"):
            row["kl_line"] = on_the_line(lines, schedule.average())
        found.append(row)
        typer.echo(f"{name:28s} {row['bits']:5.2f} bits  KL {table.mean_kl.mean:.4f}  right {row['tasks']['accuracy']:.3f}")
    full = exact_match(source_logits(source), arms[0][1].tokenizer, spec, items=items)
    forwards = [name for name, _, s in arms if name.startswith("adaptive") and len(set(s.widths)) > 1]
    gap = (
        tables["the last one backwards"].kl.mean(1) - tables[forwards[-1]].kl.mean(1)
        if turned is not None
        else torch.zeros(rows, dtype=torch.float64)
    )
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
