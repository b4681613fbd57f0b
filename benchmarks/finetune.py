"""What fine-tuning recovers on tiny-llada: {2-bit, W4A4} × {codes and scales, scales, a correction of low rank}, two losses.

    python benchmarks/finetune.py --out docs/results/finetune.json

Learned on the bundled calibration tales, measured on the bundled evaluation tales, which share none: masked NLL, and KL from the
model before quantization, with 95 % t intervals over rows; differences are paired. Reference backend, float32, one thread.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer

import dlqc
from dlqc.compiled import Compiled
from dlqc.diffusion.fidelity import fidelity
from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.diffusion.likelihood import masked_nll
from dlqc.evaluate import RATIOS, bundled_text, rows_to_measure
from dlqc.finetune import Finetune, finetune

ARMS: dict[str, tuple[tuple[str, float], ...]] = {
    "w2a16-rtn": (("codes", 0.5), ("codes", 0.0), ("scales", 0.5), ("lora", 0.5)),
    "w2a16-gptq": (("codes", 0.5), ("codes", 1.0)),
    "w4a4-rtn": (("codes", 0.5), ("scales", 0.5), ("lora", 0.5)),
}


def plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    steps: int = 60,
    rows: Annotated[int, typer.Option(help="rows of 128 tokens to measure on")] = 32,
) -> None:
    """Compile, fine-tune, measure, write."""
    torch.set_num_threads(1)
    full = dlqc.compile("tiny-llada", (), backend="reference", progress=False)
    ids = rows_to_measure(full.tokenizer, full.spec)[:rows]

    def measured(model: Compiled) -> dict[str, torch.Tensor]:
        nll = masked_nll(model, ids, full.spec, ratios=RATIOS).rows
        return {"nll": nll, "kl": fidelity(full, model, ids, full.spec, ratios=RATIOS).kl.mean(1)}

    base, found = measured(full), []
    for recipe, ways in ARMS.items():
        calibration = bundled_text("calib")
        start = dlqc.compile("tiny-llada", recipe, calibration=calibration, backend="reference", progress=False)
        before = measured(start)
        entry: dict[str, Any] = {
            "recipe": recipe,
            "bits_per_quantized_weight": start.report.storage.bits_per_quantized_weight,
            "kl": plain(mean_interval(before["kl"])),
            "nll_lost": plain(mean_interval(before["nll"] - base["nll"])),
            "finetuned": [],
        }
        for learn, distill in ways:
            how = Finetune(learn=learn, steps=steps, distill=distill)  # type: ignore[arg-type]
            began, cpu = time.perf_counter(), time.process_time()
            tuned = finetune(start, calibration, how, teacher=full)
            seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
            after = measured(tuned)
            entry["finetuned"].append(
                {
                    "learn": learn,
                    "distill": distill,
                    **{name: round(value, 1) for name, value in seconds.items()},
                    "bits_per_quantized_weight": tuned.report.storage.bits_per_quantized_weight,
                    "kl": plain(mean_interval(after["kl"])),
                    "kl_recovered": plain(mean_interval(before["kl"] - after["kl"])),
                    "nll_lost": plain(mean_interval(after["nll"] - base["nll"])),
                    "nll_recovered": plain(mean_interval(before["nll"] - after["nll"])),
                }
            )
            typer.echo(f"{recipe} {learn} {distill}: {json.dumps(entry['finetuned'][-1])}", err=True)
        found.append(entry)
    command = f"python benchmarks/finetune.py {' '.join(sys.argv[1:])}"
    settings = {"model": "tiny-llada", "nll": plain(mean_interval(base["nll"])), "rows": len(ids), "steps": steps}
    out.write_text(
        json.dumps({"command": command, "machine": machine.facts(), **settings, "arms": found}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    typer.run(main)
