"""Time and memory of rotating the weights of one LLaDA-8B-sized block, against one pass over the same weights.

Each of the seven bfloat16 matrices is evaluated as its constant expression, in tiles of float64, with the folds that QuaRot moves
into it: a randomized Hadamard matrix of order 4096 on the side of the residual stream (R1), a Hadamard matrix a head on
the values (R2), one of order 12288 = 12·1024 before the down projection (R4). The pass they are compared with reads every weight,
converts it to float64, multiplies it by a number and stores it as bfloat16, in the same tiles: what the cheapest possible
transform costs. A plain copy is timed, too. All are timed alternately, medians are reported.

    python benchmarks/rotate_block.py --out docs/results/rotate_block.json
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import dlqc
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
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in SHAPES} for kind in ("copy", "pass", "rotate")
    }
    extra = {}
    for _ in range(repeats):
        for name, leaf in leaves.items():
            for kind, run in (("copy", leaf.clone), ("pass", scaled[name].stored), ("rotate", rotated[name].stored)):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                started = time.perf_counter()
                run()
                times[kind][name].append(time.perf_counter() - started)
                if kind == "rotate":
                    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
                    extra[name] = max(extra.get(name, 0), grown)
    median = {kind: {name: statistics.median(t) for name, t in by.items()} for kind, by in times.items()}
    total = {kind: sum(by.values()) for kind, by in median.items()}
    results: dict[str, Any] = {
        "command": command,
        "dlqc": dlqc.__version__,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "weights": sum(leaf.numel() for leaf in leaves.values()),
        "seconds": total,
        "rotate / pass": total["rotate"] / total["pass"],
        "rotate / copy": total["rotate"] / total["copy"],
        "by matrix": {name: {kind: median[kind][name] for kind in median} for name in SHAPES},
        "new peak memory, bytes": extra,
        "largest matrix, bytes": max(leaf.nbytes for leaf in leaves.values()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: results[k] for k in ("seconds", "rotate / pass", "rotate / copy")}, indent=1))


if __name__ == "__main__":
    typer.run(main)
