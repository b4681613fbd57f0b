"""Time GPTQ on the linears of one LLaDA-8B block, against what the machine's BLAS could do at best.

    python benchmarks/gptq_block.py --out gptq_block.json              # full size: minutes, 4 GB
    python benchmarks/gptq_block.py --out gptq_block.json --scale 4    # a quarter of every width: seconds

Weights are Gaussian; inputs are correlated, with a few large channels, 2,048 tokens (so the Hessian of the widest layer
is singular before damping). q, k and v share a factorized Hessian, and so do gate and up, as a pipeline would do it.

Phases: `factor` (order, damp, factorize H), `scales` (choice of scales, for trials too), `trial` (rounding 256 rows
with each choice of scales), `round` (the weight itself), `measure` (output energies for the metrics), `other`.

Limit: N·K² flops a linear for the feedback at the machine's sgemm rate plus K³/3 a Hessian at its dgemm rate, both
measured in this run, before and after, the better of the two taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dlqc.formats.integer import IntFormat
from dlqc.rounding import gptq as implementation
from dlqc.rounding.gptq import Gptq, gptq
from dlqc.rounding.hessian import factorize

# Input of a group of linears -> its width in units of (model, feed-forward), and the linears that read it.
BLOCK = {
    "attention input": ("model", {"q_proj": "model", "k_proj": "model", "v_proj": "model"}),
    "attention output": ("model", {"attn_out": "model"}),
    "feed-forward input": ("model", {"ff_proj": "feed", "up_proj": "feed"}),
    "feed-forward inner": ("feed", {"ff_out": "model"}),
}
TOKENS = 2048


class Phases:
    """Exclusive time of named functions: what a nested phase takes is not counted in the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]

    def timed(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[name(*args, **kwargs)] += spent - self.inner.pop()
                self.inner[-1] += spent

        return wrapper


def blas_rate(dtype: torch.dtype, size: int = 3072) -> float:
    """Best of three products of square matrices, flop/s."""
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def second_moment(width: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(TOKENS, width, generator=generator)
    x = x + 2 * torch.randn(TOKENS, 32, generator=generator) @ torch.randn(32, width, generator=generator) / 32**0.5
    x[:, ::97] *= 10
    return (x.T @ x).double()


def cpu_name() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=int, default=1, help="divide the widths 4096 and 12288 by this")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--clip", default="trial", choices=("minmax", "mse", "trial"))
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the fastest time of each linear is kept")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    widths = {"model": 4096 // options.scale, "feed": 12288 // options.scale}
    fmt, method = IntFormat(options.bits, options.group), Gptq(clip=options.clip)
    rates = {name: blas_rate(dtype) for name, dtype in (("sgemm", torch.float32), ("dgemm", torch.float64))}

    phases = Phases()
    IntFormat.parameters = phases.timed(IntFormat.parameters, lambda *_, **__: "scales")  # type: ignore[method-assign]
    implementation._round = phases.timed(
        implementation._round, lambda _, grid, __: "trial" if len(grid.choices) > 1 else "round"
    )
    implementation.output_energy = phases.timed(implementation.output_energy, lambda *_: "measure")
    factor_of = phases.timed(factorize, lambda *_: "factor")
    round_one = phases.timed(gptq, lambda *_: "other")

    linears: dict[str, dict[str, float]] = {}
    for where, (inner, readers) in BLOCK.items():
        hessian = second_moment(widths[inner], generator)
        phases.seconds.clear()
        factor = factor_of(hessian)
        shared = phases.seconds["factor"]
        for name, outer in readers.items():
            weight = torch.randn(widths[outer], widths[inner], generator=generator) * 0.02
            for _ in range(options.repeat):
                phases.seconds.clear()
                found = round_one(weight, factor, fmt, method)
                spent = {phase: round(seconds, 3) for phase, seconds in phases.seconds.items()}
                spent["factor"] = round(shared / len(readers), 3)
                row = {
                    "out": len(weight),
                    "in": widths[inner],
                    "seconds": sum(spent.values()),
                    **spent,
                    **found.metrics,
                }
                if name not in linears or row["seconds"] < linears[name]["seconds"]:
                    linears[name] = row
            print(f"{name:10} {where:20} " + " ".join(f"{key} {value:.3g}" for key, value in linears[name].items()))
        del factor, hessian

    rates = {
        name: max(rates[name], blas_rate(dtype)) for name, dtype in (("sgemm", torch.float32), ("dgemm", torch.float64))
    }
    feedback = sum(row["out"] * row["in"] ** 2 for row in linears.values())
    factors = sum(widths[inner] ** 3 / 3 for inner, _ in BLOCK.values())
    limit = feedback / rates["sgemm"] + factors / rates["dgemm"]
    total = sum(row["seconds"] for row in linears.values())
    names = ("factor", "scales", "trial", "round", "measure", "other")
    share = {name: round(sum(row.get(name, 0.0) for row in linears.values()) / total, 3) for name in names}
    result = {
        "command": " ".join(["python", "benchmarks/gptq_block.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "format": fmt.label,
        "gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "seconds": round(total, 2),
        "limit_seconds": round(limit, 2),
        "over_limit": round(total / limit, 2),
        "share": share,
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "linears": linears,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"total {total:.1f} s, limit {limit:.1f} s, {result['gflops']}, {share}, {result['peak_rss_gib']} GiB")


if __name__ == "__main__":
    main()
