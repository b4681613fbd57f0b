"""Step-adaptive precision on tiny-llada: average bits and quality of schedules against every fixed width.

    python benchmarks/step_adaptive.py --out docs/results/step_adaptive.json                              # minutes on one core
    python benchmarks/step_adaptive.py --out smoke.json --rows 8 --items 4 --prompts 2 --budgets 0.01     # a look

Arms: one nested weight (rounded by GPTQ within nested codes) read in one width at all steps; in the schedules that
`adapt_precision` finds for several budgets; and in the schedule of one of them backwards (as many bits, at the wrong steps).
Beside them, the same with the nested weight rounded to nearest in its fixed widths, and weights stored for one width alone, by
GPTQ and to nearest. Then activations likewise, weights being read in all planes; then both together, chosen by one budget.

Measured on text that calibration has not seen: KL from full precision at masked positions, at mask ratios spread evenly; KL and
bits along the arm's own denoising runs; exact match on generated questions. A schedule that does not look at the mask ratio and
has the same bits on average has a KL on the line between fixed widths: `kl_line`. The mask ratio is that of the tokens that are
to be filled, so prompts and worked examples do not count.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

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
from dlqc.formats.nested import NestedFormat
from dlqc.precision import PrecisionSchedule, WidthPair, cheapest, shares

PLANES, WIDTHS, ACTS = "2+1+1+4", (2, 3, 4, 8), (4, 5, 6, 8)
EDGES = tuple(k / 8 for k in range(1, 8))
RATIOS = tuple((k + 0.5) / 8 for k in range(8))
STATES = "calibrate(sampler=forward_process, sequences={states})"
NESTED = "quantize_weights(format=nested(planes='{planes}'), method={method})"


def remember() -> None:
    """Unpack a weight once for each width: all arms read the same ones, many hundred times."""
    unpacked, kept = NestedFormat.weight_at, dict[tuple[int, int], tuple[Tensor, Tensor]]()

    def weight_at(self: NestedFormat, parts: Mapping[str, Tensor], in_features: int, width: int) -> Tensor:
        key = parts["codes_0"].data_ptr(), width
        if key not in kept:  # what is kept beside it holds the address
            kept[key] = parts["codes_0"], unpacked(self, parts, in_features, width)
        return kept[key][1]

    NestedFormat.weight_at = weight_at  # type: ignore[method-assign]


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


class Told:
    """A model that keeps the mask ratios which it is told."""

    counts_masks: ClassVar[bool] = True

    def __init__(self, model: Compiled) -> None:
        self.model = model
        self.ratios: list[float] = []

    def __call__(self, ids: Tensor, mask_ratio: Tensor) -> Tensor:
        self.ratios += mask_ratio.tolist()
        return self.model(ids, mask_ratio)


def bits_at(schedule: PrecisionSchedule, ratios: list[float]) -> dict[str, float]:
    """Mean bits of weights and activations in forwards at these mask ratios; what is not quantized has 16."""
    return {
        "bits": schedule.average(ratios) if schedule.widths else 16.0,
        "act_bits": schedule.act_average(ratios) if schedule.act_widths else 16.0,
    }


def along_a_run(
    model: Compiled, reference: Callable[[Tensor], Tensor], prompts: Tensor, schedule: PrecisionSchedule, length: int
) -> dict[str, Any]:
    """KL at the masked positions of every second canvas of the arm's own runs, and the bits of all steps."""
    steps: list[Step] = []
    sampler = LLaDASampler(steps=length // 4, gen_length=length, block_length=length)
    told = Told(model)
    sampler.run(told, prompts, model.spec, seed=0, on_step=steps.append)
    total = torch.zeros(len(prompts), dtype=torch.float64)
    for step in steps[::2]:
        with torch.no_grad():
            a = reference(step.canvas)
            b = model(step.canvas, step.masked[:, step.prompt_length :].double().mean(1))
        for row, here in enumerate(step.masked):
            total[row] += divergence(a[row, here].double(), b[row, here].double()).mean() / len(steps[::2])
    return bits_at(schedule, told.ratios) | {"kl": plain(mean_interval(total))}


def on_tasks(model: Compiled, schedule: PrecisionSchedule, items: int) -> dict[str, Any]:
    """Exact match, and the bits of all forwards that it took."""
    told = Told(model)
    score = exact_match(told, model.tokenizer, model.spec, items=items)
    mean = sum(i.mean for i in score.values()) / len(score)
    return bits_at(schedule, told.ratios) | {"accuracy": mean, "by_task": {k: plain(i) for k, i in score.items()}}


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
        "of codes; scales and offsets of the width that is read add 0.25; 16 is not quantized. Activations have a scale for each",
        "token. Brackets are 95 % intervals over rows or runs. `line`: the KL of mixing fixed widths to the same bits without",
        f"a look at the mask ratio. Full precision has {result['full_precision']['accuracy']:.3f} of the answers right.",
    ]
    for title in dict.fromkeys(row["part"] for row in result["rows"]):
        lines += ["", f"## {title}", "", HEAD, "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        for row in (row for row in result["rows"] if row["part"] == title):
            run, tasks, line = row["run"], row["tasks"], row.get("kl_line")
            cells = [row["arm"], *(by_ratio(row[of]) for of in ("widths", "act_widths"))]
            cells += [f"{row['bits']:.3g}", f"{row['act_bits']:.3g}", words(row["kl"])]
            cells += ["" if line is None else f"{line:.4f}", both(run), words(run["kl"]), both(tasks)]
            lines.append(f"| {' | '.join([*cells, format(tasks['accuracy'], '.3f')])} |")
    lines += [
        "",
        "## KL of each fixed width by mask ratio",
        "",
        "| arm | " + " | ".join(f"{r:g}" for r in RATIOS) + " |",
        "|---|" + "--:|" * len(RATIOS),
    ]
    for row in result["rows"]:
        if row["arm"].startswith("all steps"):
            lines.append(f"| {row['part']}, {row['arm']} | {' | '.join(f'{kl:.4f}' for kl in row['kl_by_ratio'])} |")
    lines += ["", "A schedule backwards minus itself, KL paired by row:", ""]
    lines += [f"- {part}: {words(gap)} nats." for part, gap in result["backwards_minus_forwards"].items()]
    return "\n".join([*lines, ""])


HEAD = (
    "| arm | weights by mask ratio, low to high | activations | bits of weights | of activations | KL at even mask ratios | line "
    "| bits in runs | KL in runs | bits on tasks | right |"
)


def by_ratio(widths: list[int]) -> str:
    """Widths of the buckets; one number where they are alike."""
    return " ".join(map(str, widths if len(set(widths)) > 1 else widths[:1])) or "16"


def both(found: dict[str, float]) -> str:
    return f"{found['bits']:.3g} / {found['act_bits']:.3g}"


@dataclass(frozen=True)
class Arm:
    """A model, the schedule that it computes by, and the part of the page that it belongs to."""

    part: str
    name: str
    model: Compiled
    schedule: PrecisionSchedule


def scheduled(
    part: str, model: Compiled, fixed: list[WidthPair], budgets: list[float], choices: list[WidthPair]
) -> list[Arm]:
    """Fixed pairs of widths, the schedules found for each budget among the choices, and one of those backwards."""
    table = searched(model)
    found = [Arm(part, f"all steps {pair}", model, of([pair] * len(RATIOS))) for pair in fixed]
    sizes = [[pair.operations for pair in choices]] * len(RATIOS)
    adaptive = []
    for budget in budgets:
        picked, _ = cheapest([[row[pair] for pair in choices] for row in table], sizes, budget, shares(EDGES))
        adaptive.append([choices[i] for i in picked])
        found.append(Arm(part, f"adaptive, budget {budget:g}", model, of(adaptive[-1])))
    uneven = [pairs for pairs in adaptive if pairs != pairs[::-1]]
    if uneven:
        turned = uneven[len(uneven) // 2]
        found.append(Arm(part, "backwards", model, of(turned[::-1])))
    return [dataclasses.replace(arm, model=model.with_schedule(arm.schedule)) for arm in found]


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; a page goes beside it")],
    rows: Annotated[int, typer.Option(min=2, help="rows of 128 tokens to measure on")] = 12,
    items: Annotated[int, typer.Option(min=1, help="questions per task")] = 25,
    prompts: Annotated[int, typer.Option(min=2, help="tales to continue")] = 3,
    states: Annotated[int, typer.Option(min=16, help="calibration states of the search")] = 64,
    budgets: Annotated[str, typer.Option(help="KL budgets of weights")] = "0.003,0.005,0.007",
    act_budgets: Annotated[str, typer.Option(help="of activations, and of both")] = "0.002,0.006",
) -> None:
    """Measure and write the results."""
    started = time.perf_counter()
    remember()
    source = dlqc.load_model("tiny-llada")
    text = bundled_text("calib")

    def compiled(recipe: str) -> Compiled:
        return dlqc.compile(source, recipe, calibration=text, progress=False)

    nested = f"{STATES.format(states=states)}, {NESTED.format(planes=PLANES, method='nested_gptq')}"
    weights = compiled(f"{nested}, adapt_precision(edges={EDGES}, budget=1000)")
    acts = f"quantize_activations(bits=8), adapt_precision(edges={EDGES}, budget=1000, act_bits={ACTS})"
    whole = compiled(f"{nested}, {acts}")
    cheap, dear = ([float(budget) for budget in given.split(",")] for given in (budgets, act_budgets))
    alone, every = [WidthPair(w, 0) for w in WIDTHS], [WidthPair(w, a) for w in WIDTHS for a in ACTS]
    rounded = [WidthPair(WIDTHS[-1], a) for a in ACTS]
    matched = [WidthPair(2, 4), WidthPair(3, 5), WidthPair(4, 6), WidthPair(8, 8)]
    arms = [
        *scheduled("Weights", weights, alone, cheap, alone),
        *(Arm("Weights", f"GPTQ alone, {w} bits", compiled(f"w{w}a16-gptq"), of([WidthPair(w, 0)])) for w in (2, 3)),
        *scheduled("Activations", whole, rounded, dear, rounded),
        *scheduled("Both", whole, matched, dear, every),
    ]
    spec = weights.spec
    reference = once(source)
    measured = rows_to_measure(weights.tokenizer, spec)[:rows]
    starts = rows_to_measure(weights.tokenizer, spec, length=16)[:prompts]
    tables: dict[tuple[str, str], FidelityTable] = {}
    found: list[dict[str, Any]] = []
    lines: dict[str, dict[int, float]] = {"Weights": {}, "Activations": {}}
    for arm in arms:
        table = tables[arm.part, arm.name] = fidelity(reference, arm.model, measured, spec, ratios=RATIOS)
        schedule = arm.schedule
        row = {
            "part": arm.part,
            "arm": arm.name,
            "recipe": str(arm.model.recipe),
            "widths": schedule.widths,
            "act_widths": schedule.act_widths,
            **bits_at(schedule, list(RATIOS)),
            "kl": plain(table.mean_kl),
            "agreement": plain(table.mean_agreement),
            "kl_by_ratio": [i.mean for i in table.kl_by_ratio],
            "run": along_a_run(arm.model, source_logits(source), starts, schedule, 112),
            "tasks": on_tasks(arm.model, schedule, items),
        }
        if arm.part in lines:
            bits = row["act_bits" if arm.part == "Activations" else "bits"]
            if arm.name.startswith("all steps"):
                lines[arm.part][int(bits)] = table.mean_kl.mean
            elif not arm.name.startswith("GPTQ"):
                row["kl_line"] = on_the_line(lines[arm.part], bits)
        found.append(row)
        typer.echo(
            f"{arm.part:12s} {arm.name:28s} {row['bits']:5.2f} {row['act_bits']:5.2f} bits  KL {table.mean_kl.mean:.4f}  "
            f"right {row['tasks']['accuracy']:.3f}"
        )
    full = exact_match(source_logits(source), weights.tokenizer, spec, items=items)
    gaps = {}
    for arm in (arm for arm in arms if arm.name == "backwards"):
        forwards = _backwards(arm.schedule)
        ahead = next(a.name for a in arms if a.part == arm.part and a.schedule == forwards)
        gaps[arm.part] = plain(
            mean_interval(tables[arm.part, "backwards"].kl.mean(1) - tables[arm.part, ahead].kl.mean(1))
        )
    result = {
        "command": f"python benchmarks/step_adaptive.py --out docs/results/{out.name} --rows {rows} --items {items} "
        f"--prompts {prompts} --states {states} --budgets {budgets} --act-budgets {act_budgets}",
        "seconds": time.perf_counter() - started,
        "dlqc": dlqc.__version__,
        "torch": torch.__version__,
        "edges": EDGES,
        "ratios": RATIOS,
        "full_precision": {"accuracy": sum(i.mean for i in full.values()) / len(full)},
        "backwards_minus_forwards": gaps,
        "rows": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(result), encoding="utf-8")


def searched(model: Compiled) -> list[dict[WidthPair, float]]:
    """The KL that `adapt_precision` measured on calibration states, by bucket and pair of widths."""
    step = next(step for step in model.report.steps if step.name == "adapt_precision")
    known = [WidthPair(w, a) for w in WIDTHS for a in (0, *ACTS)]
    measured = [row for key, row in step.details.items() if key.startswith("mask ratio")]
    return [{pair: row[f"kl at {pair}"] for pair in known if f"kl at {pair}" in row} for row in measured]


def of(pairs: list[WidthPair]) -> PrecisionSchedule:
    """The schedule of a pair for each bucket, or of one for all."""
    pairs = pairs * (1 if len(pairs) > 1 else len(RATIOS))
    acts = tuple(pair.activations for pair in pairs if pair.activations)
    return PrecisionSchedule(EDGES, tuple(pair.weights for pair in pairs), acts)


def _backwards(schedule: PrecisionSchedule) -> PrecisionSchedule:
    return PrecisionSchedule(schedule.edges, schedule.widths[::-1], schedule.act_widths[::-1])


def source_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """The logits of the model as it came."""

    def ask(ids: Tensor) -> Tensor:
        with torch.no_grad():
            found = model(ids)
        return found if isinstance(found, Tensor) else found.logits  # type: ignore[no-any-return]

    return ask


if __name__ == "__main__":
    typer.run(main)
