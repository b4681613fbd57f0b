"""Mixed precision on tiny-llada: does a measured assignment of widths beat one width for all, at equal true bits?

Linears of 2, 3, 4 and 8 bits, groups of 128 with zero points, GPTQ on masked states (`w<bits>a16-mixed-gptq`). Every assignment
is rounded and compared with the original on the same rows and masks: KL in nats per masked token, 95 % t intervals over rows,
differences paired. Against

    uniform, interpolated   the two uniform widths around a budget, their KL interpolated row by row at the same stored bits: in a
                            straight line, and in the logarithm (the stricter of the two, since KL falls exponentially)
    in order                the narrower width everywhere, then units widened one after the other as long as they fit: from the
                            first block on (what autoregressive practice protects), from the last on, or in a random order

and between the metrics that assignments are chosen by. Calibrated on the bundled tales_calib, measured on tales_eval.

    python benchmarks/mixed.py

Writes docs/results/mixed.json, mixed.md beside it, and the frontier as mixed/pareto.png.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer

import dlqc
from dlqc.budget import Budget
from dlqc.diffusion.fidelity import FidelityTable
from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.evaluate import bundled_text, rows_to_measure
from dlqc.figures import save_pareto
from dlqc.knapsack import frontier
from dlqc.models.describe import spec_of
from dlqc.pareto import Study
from dlqc.recipe import as_recipe

BUDGETS = ("2.5bpw", "3.2bpw", "4bpw")
METRICS = ("kl", "confidence", "mse", "hessian", "fisher")
RATIOS = (0.25, 0.5, 0.75)
SHUFFLES = 3

Choice = tuple[int, ...]


class Bench:
    """tiny-llada with its sensitivities in all metrics; each assignment is measured once."""

    def __init__(self, rows: int) -> None:
        model = dlqc.load_model("tiny-llada")
        self.study = Study(model, "w3.2a16-mixed-gptq", calibration=bundled_text("calib"))
        found = rows_to_measure(dlqc.load_tokenizer(model), spec_of(model))
        self.rows = found[torch.arange(rows) * len(found) // rows]
        estimate = dataclasses.replace(self.study.assign, metric="fisher")
        fisher = estimate.costs(self.study.graph, self.study.ctx, self.study.choices)
        self.costs = {
            name: [
                [(f if name == "fisher" else c)[name] for c, f in zip(a, b, strict=True)]
                for a, b in zip(self.study.metrics, fisher, strict=True)
            ]
            for name in METRICS
        }
        self._tables: dict[Choice, FidelityTable] = {}
        logits, known = self.study.original, dict[bytes, torch.Tensor]()

        def remembered(ids: torch.Tensor) -> torch.Tensor:
            key = ids.numpy().tobytes()
            if key not in known:
                known[key] = logits(ids)
            return known[key]

        self.study.original = remembered

    def table(self, choice: Choice) -> FidelityTable:
        """KL and agreement of an assignment."""
        if choice not in self._tables:
            self._tables[choice] = self.study.fidelity(choice, self.rows, ratios=RATIOS)
            point = self.study.point(choice, self._tables[choice].mean_kl)
            typer.echo(f"{point.bits:.3f} bits: KL {point.kl}")
        return self._tables[choice]

    def kl(self, choice: Choice) -> torch.Tensor:
        """By row, float64 [R]."""
        return self.table(choice).kl.mean(1)

    def limit(self, budget: str) -> int:
        return Budget.read(budget).limit(self.study.choices.weights, self.study.choices.rest)

    def best(self, costs: Sequence[Sequence[float]], budget: str) -> Choice:
        """The assignment of least cost within a budget."""
        found = frontier(self.study.choices.items(costs))
        return found.choice(found.at(self.limit(budget)))

    def in_order(self, order: Sequence[int], budget: str) -> Choice:
        """The widest uniform width that fits, then the next width unit by unit."""
        sizes, limit = self.study.choices.sizes, self.limit(budget)
        narrow = max(c for c in range(4) if sum(s[c] for s in sizes) <= limit)
        choice = [narrow] * len(sizes)
        for i in order:
            wider = [*choice]
            wider[i] += 1
            if self.study.choices.size(wider) <= limit:
                choice = wider
        return tuple(choice)

    def interpolated(self, choice: Choice) -> dict[str, torch.Tensor]:
        """KL by row between the uniform widths around an assignment, at its bits."""
        uniform = list(self.study.uniform().values())
        bits = [self.study.point(c).bits for c in uniform]
        here = self.study.point(choice).bits
        upper = next(i for i in range(1, len(bits)) if bits[i] >= here)
        share = (here - bits[upper - 1]) / (bits[upper] - bits[upper - 1])
        a, b = self.kl(uniform[upper - 1]), self.kl(uniform[upper])
        return {
            "straight": (1 - share) * a + share * b,
            "logarithm": torch.exp((1 - share) * a.log() + share * b.log()),
        }


def arms(bench: Bench, budget: str) -> dict[str, Choice]:
    """All assignments that are compared at a budget."""
    kl, units = bench.costs["kl"], bench.study.choices.units
    found = {f"mixed, by {metric}": bench.best(bench.costs[metric], budget) for metric in METRICS}
    last = units[-1].block
    late = [[(0.5 + unit.block / last) * c for c in row] for unit, row in zip(units, kl, strict=True)]
    found["mixed, by kl, prior 0.5"] = bench.best(late, budget)
    forward = list(range(len(units)))
    found["in order, first blocks wide"] = bench.in_order(forward, budget)
    found["in order, last blocks wide"] = bench.in_order(forward[::-1], budget)
    for seed in range(SHUFFLES):
        order = random.Random(seed).sample(forward, len(forward))
        found[f"in order, shuffled {seed + 1}"] = bench.in_order(order, budget)
    return found


def plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def measure(bench: Bench) -> dict[str, Any]:
    """All arms at all budgets."""
    result: dict[str, Any] = {"uniform": {}, "budgets": {}}
    for scheme, choice in bench.study.uniform().items():
        table = bench.table(choice)
        numbers = {"kl": plain(table.mean_kl), "agreement": plain(table.mean_agreement)}
        result["uniform"][scheme.format.label] = {"bits": bench.study.point(choice).bits} | numbers
    for budget in BUDGETS:
        found = arms(bench, budget)
        reference = bench.kl(found["mixed, by kl"])
        result["budgets"][budget] = {}
        for name, choice in found.items():
            table, point = bench.table(choice), bench.study.point(choice)
            against = bench.interpolated(choice)
            result["budgets"][budget][name] = {
                "bits": point.bits,
                "choice": "".join(str(bench.study.choices.schemes[i][c].format.bits) for i, c in enumerate(choice)),
                "kl": plain(table.mean_kl),
                "agreement": plain(table.mean_agreement),
                "predicted": {
                    m: sum(row[c] for row, c in zip(bench.costs[m], choice, strict=True)) for m in ("kl", "fisher")
                },
                "interpolated": {how: float(values.mean()) for how, values in against.items()},
                "difference": {how: plain(mean_interval(bench.kl(choice) - values)) for how, values in against.items()},
                "minus mixed by kl": plain(mean_interval(bench.kl(choice) - reference)),
            }
    blocks = {unit.block for unit in bench.study.choices.units}
    result["kl by block"] = {
        scheme.format.label: [
            sum(
                row[i]
                for unit, row in zip(bench.study.choices.units, bench.costs["kl"], strict=True)
                if unit.block == block
            )
            for block in sorted(blocks)
        ]
        for i, scheme in enumerate(bench.study.uniform())
    }
    return result


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Mixed precision at equal true bits",
        "",
        f"Made by `{results['command']}`; all numbers are in `mixed.json` beside this file, what they say is in `README.md`.",
        "",
        "![bits against quality](mixed/pareto.png)",
        "",
        f"tiny-llada, {results['rows']} rows, mask ratios 0.25, 0.5, 0.75. KL from the original, in 0.001 nats per masked token; "
        "brackets are 95 % intervals, differences are paired. Bits are stored bits per quantized weight.",
        "",
        "| one width for all | bits | KL | top-1 agreement |",
        "|---|--:|--:|--:|",
    ]
    for label, e in results["uniform"].items():
        lines.append(f"| {label} | {e['bits']:.3f} | {milli(e['kl'])} | {e['agreement']['mean']:.3f} |")
    for budget, found in results["budgets"].items():
        lines += [
            "",
            f"| {budget} | bits | KL | uniform, interpolated (straight / log) | difference to the latter | minus mixed by kl "
            "| agreement |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for name, e in found.items():
            between = f"{1e3 * e['interpolated']['straight']:.3f} / {1e3 * e['interpolated']['logarithm']:.3f}"
            other = "" if name == "mixed, by kl" else milli(e["minus mixed by kl"])
            cells = (f"{e['bits']:.3f}", milli(e["kl"]), between, milli(e["difference"]["logarithm"]), other)
            lines.append(f"| {name} | {' | '.join(cells)} | {e['agreement']['mean']:.3f} |")
    lines += [
        "",
        "KL of quantizing one unit alone, summed over the units of a block, in 0.001 nats, first block to last:",
        "",
    ]
    for label, values in results["kl by block"].items():
        lines.append(f"- {label}: {', '.join(f'{1e3 * v:.3f}' for v in values)}")
    return "\n".join([*lines, ""])


def milli(interval: dict[str, float]) -> str:
    return f"{1e3 * interval['mean']:.3f} [{1e3 * interval['low']:.3f}, {1e3 * interval['high']:.3f}]"


def main(
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("docs/results/mixed.json"),
    rows: Annotated[int, typer.Option(help="rows to measure on")] = 48,
    points: Annotated[int, typer.Option(help="points of the frontier to measure")] = 9,
) -> None:
    """Measure everything and write the results."""
    started = time.perf_counter()
    bench = Bench(rows)
    found = measure(bench)
    curve = bench.study.pareto(measure=points, rows=bench.rows)
    save_pareto(curve, out.with_suffix(""))
    data = curve.to_plain()
    for point in [*data["points"], *data["uniform"].values()]:
        point["choice"] = "".join(map(str, point["choice"]))
    results = {
        "command": f"python benchmarks/mixed.py --rows {rows} --points {points}",
        "machine": machine.facts(),
        "dlqc": dlqc.__version__,
        "recipe": str(as_recipe("w3.2a16-mixed-gptq")),
        "rows": rows,
        "seconds": time.perf_counter() - started,
        **found,
        "frontier": data,
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
