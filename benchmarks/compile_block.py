"""Compile one LLaDA-8B-sized block with GPTQ: seconds and peak memory, and the share of every pass.

    python benchmarks/compile_block.py --out docs/results/compile_block.json            # full size: two minutes, 6 GB
    python benchmarks/compile_block.py --out quarter.json --scale 4                     # a quarter of every width: seconds

The model is one block with random bfloat16 weights (d 4096, 32 heads, SwiGLU 12288, 218 M weights), a small vocabulary, and
random tokens in masked states; speed does not depend on what the weights say. `states` is the number of calibration
tokens. The machine's float32 and float64 matrix rates are measured in the same run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import machine
import torch
import typer

import dlqc
from dlqc.instruments import peak_memory
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.recipe import as_recipe


def gflops(dtype: torch.dtype, size: int = 1536, repeats: int = 5) -> float:
    """Best rate of a square matrix product, in GFLOP/s."""
    a = torch.randn(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e9


def main(
    out: Annotated[Path, typer.Option(help="JSON to write")],
    recipe: Annotated[str, typer.Option(help="what to compile to")] = "w4a16-gptq",
    scale: Annotated[int, typer.Option(help="divide every width by this")] = 1,
    sequences: Annotated[int, typer.Option(help="calibration states of 128 tokens")] = 32,
) -> None:
    """Compile the block and write where the time went."""
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=4096 // scale,
        n_layers=1,
        n_heads=32 // scale,
        mlp_hidden_size=12288 // scale,
        vocab_size=2048,
        max_sequence_length=512,
        mask_token_id=2047,
    )
    model = LLaDAModelLM(config).to(torch.bfloat16).eval()
    rates = {"float32": gflops(torch.float32), "float64": gflops(torch.float64)}
    before = peak_memory()
    rows = torch.randint(0, 2047, (sequences, 128))
    passes = as_recipe(recipe).passes
    passes = tuple(p if p.name != "calibrate" else type(p)(sampler=p.sampler, sequences=sequences) for p in passes)  # type: ignore[attr-defined,call-arg]
    started = time.perf_counter()
    compiled = dlqc.compile(model, passes, calibration=rows, progress=False)
    seconds = time.perf_counter() - started
    after = [gflops(torch.float32), gflops(torch.float64)]
    steps = {step.name: step.seconds for step in compiled.report.steps}
    result = {
        "command": "python benchmarks/compile_block.py "
        f"--out {out.name} --recipe {recipe} --scale {scale} --sequences {sequences}",
        "machine": machine.facts()
        | {"gflops": {"float32": max(rates["float32"], after[0]), "float64": max(rates["float64"], after[1])}},
        "weights": compiled.report.storage.quantized,
        "calibration_tokens": sequences * 128,
        "seconds": seconds,
        "seconds_by_pass": steps | {"capture, checks, fidelity and module": seconds - sum(steps.values())},
        "share_by_pass": {name: s / seconds for name, s in steps.items()},
        "peak_mb": peak_memory(),
        "peak_mb_before": before,
        "bits_per_quantized_weight": compiled.report.storage.bits_per_quantized_weight,
        "fidelity": compiled.report.fidelity,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result["seconds_by_pass"], indent=1))
    typer.echo(f"{seconds:.1f} s, peak {result['peak_mb']:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
