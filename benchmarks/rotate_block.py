"""Time and memory of rotating the weights of one LLaDA-8B-sized block, against one pass over the same weights.

Each of the seven bfloat16 matrices is evaluated as its constant expression, with the folds that QuaRot moves into it: a
randomized Hadamard matrix of order 4096 on the side of the residual stream (R1), a Hadamard matrix a head on the values (R2),
one of order 12288 = 12·1024 before the down projection (R4). The pass it is compared with reads every weight, multiplies it
by a number and stores it as bfloat16: what the cheapest possible transform costs, once in native code and once by
torch in tiles ("torch pass"). A plain copy is timed, too. All are timed alternately, medians are reported.

Memory is the growth of the process's peak while one matrix is evaluated, in a fresh process a matrix, less the result.

    python benchmarks/rotate_block.py --out docs/results/rotate_block.json
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer

import dlqc
from dlqc import native
from dlqc.passes.rotate_hidden import randomized_hadamard
from dlqc.transform import Diagonal, Hadamard, Transform, per_head
from dlqc.weights import Constant, Fold, OnColumns, OnRows

D, F, HEADS = 4096, 12288, 32
SHAPES = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "gate": (F, D), "up": (F, D), "down": (D, F)}


def folds() -> dict[str, tuple[Fold, ...]]:
    """What QuaRot moves into each matrix."""
    r1 = randomized_hadamard(D, 0)
    r2: Transform = per_head(Hadamard(D // HEADS, D // HEADS), HEADS)
    r4 = Hadamard(F, F)
    readers = {name: (OnColumns(r1),) for name in ("q", "k", "gate", "up")}
    return {
        **readers,
        "v": (OnColumns(r1), OnRows(r2)),
        "o": (OnColumns(r2), OnRows(r1)),
        "down": (OnColumns(r4), OnRows(r1)),
    }


def peak() -> int:
    """Bytes of memory that this process has held at most. getrusage would count what its parent held before exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def growth(name: str) -> int:
    """Bytes beyond the result that evaluating one matrix needs. For a fresh process, whose peak is what it holds now."""
    Constant(torch.ones(128, D, dtype=torch.bfloat16), (OnColumns(randomized_hadamard(D, 0)),)).stored()
    constant = Constant(torch.ones(SHAPES[name], dtype=torch.bfloat16), folds()[name])
    before = peak()
    result = constant.stored()
    return peak() - before - result.nbytes


def by_torch(constant: Constant) -> torch.Tensor:
    os.environ["DLQC_NATIVE"] = "0"
    try:
        return constant.stored()
    finally:
        del os.environ["DLQC_NATIVE"]


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("docs/results/rotate_block.json"),
    repeats: int = 5,
) -> None:
    command = "python benchmarks/rotate_block.py" + "".join(f" {a}" for a in sys.argv[1:])
    generator = torch.Generator().manual_seed(0)
    leaves = {name: torch.randn(s, generator=generator).to(torch.bfloat16) for name, s in SHAPES.items()}
    moved = folds()
    rotated = {name: Constant(leaf, moved[name]) for name, leaf in leaves.items()}
    double = {name: Diagonal(torch.full((leaf.shape[1],), 2.0, dtype=torch.float64)) for name, leaf in leaves.items()}
    scaled = {name: Constant(leaf, (OnColumns(double[name]),)) for name, leaf in leaves.items()}
    kinds = ("copy", "pass", "torch pass", "rotate")
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in SHAPES} for kind in kinds}
    for _ in range(repeats):
        for name, leaf in leaves.items():
            torch_pass = functools.partial(by_torch, scaled[name])
            runs = (leaf.clone, scaled[name].stored, torch_pass, rotated[name].stored)
            for kind, run in zip(kinds, runs, strict=True):
                started = time.perf_counter()
                run()
                times[kind][name].append(time.perf_counter() - started)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        extra = {name: pool.apply(growth, (name,)) for name in SHAPES}
    median = {kind: {name: statistics.median(t) for name, t in by.items()} for kind, by in times.items()}
    total = {kind: sum(by.values()) for kind, by in median.items()}
    results: dict[str, Any] = {
        "command": command,
        "dlqc": dlqc.__version__,
        "native code": native.available() or "in use",
        "machine": machine.facts(),
        "weights": sum(leaf.numel() for leaf in leaves.values()),
        "seconds": total,
        "rotate / pass": total["rotate"] / total["pass"],
        "rotate / torch pass": total["rotate"] / total["torch pass"],
        "rotate / copy": total["rotate"] / total["copy"],
        "by matrix": {name: {kind: median[kind][name] for kind in median} for name in SHAPES},
        "extra peak memory, bytes": extra,
        "extra peak memory / matrix": {name: extra[name] / leaf.nbytes for name, leaf in leaves.items()},
        "largest matrix, bytes": max(leaf.nbytes for leaf in leaves.values()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {k: results[k] for k in ("seconds", "rotate / pass", "rotate / torch pass", "rotate / copy")}, indent=1
        )
    )


if __name__ == "__main__":
    typer.run(main)
