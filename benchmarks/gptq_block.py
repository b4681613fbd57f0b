"""Time GPTQ on the linears of one LLaDA-8B block, against what the machine's BLAS could do at best, and against other packages.

    python benchmarks/gptq_block.py --out gptq_block.json              # full size: minutes, 6 GB
    python benchmarks/gptq_block.py --out gptq_block.json --scale 4    # a quarter of every width: seconds
    python benchmarks/gptq_block.py --out gptq_block.json --peers llmcompressor,gptqmodel --repeat 2

Weights are Gaussian; inputs are correlated, with a few large channels, 2,048 tokens (so the Hessian of the widest layer
is singular before damping). q, k and v share a factorized Hessian, and so do gate and up, as a pipeline would do it.
Peers (`gptq_peers.py`) take the same weights and the same Hessians, input after input in turn with dlqc; the fastest of
`--repeat` turns counts for each. `loss` is tr(E H Eᵀ) of what each returns, over all linears.

Phases: `factor` (order, damp, factorize H), `scales` (choice of scales, for trials too), `trial` (rounding sample rows
with each choice of scales), `round` (the weight itself), `measure` (output energies for the metrics), `other`.

Limit: N·K² flops a linear for the feedback and K³/3 a Hessian, both in float32, at the machine's sgemm rate, measured in
this run before and after, the better one taken. (A factor that had to be made in float64 counts at the dgemm rate.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import torch
from gptq_peers import PEERS, version

from dlqc import native
from dlqc.formats.integer import IntFormat
from dlqc.rounding import gptq as implementation
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.hessian import output_energy

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


def peak_memory(reset: bool = False) -> int:
    """The process's high-water mark in bytes since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def cost(weights: list[torch.Tensor], found: list[torch.Tensor], hessian: torch.Tensor) -> float:
    return sum(float(output_energy(w - v, hessian).sum()) for w, v in zip(weights, found, strict=True))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=int, default=1, help="divide the widths 4096 and 12288 by this")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--clip", default="trial", choices=("minmax", "mse", "trial"))
    parser.add_argument("--repeat", type=int, default=1, help="turns; the fastest of each is kept")
    parser.add_argument("--peers", default="", help="names of `gptq_peers.PEERS`, separated by commas")
    return parser.parse_args()


class Ours:
    """dlqc on the linears that read one input, phases timed."""

    def __init__(self, fmt: IntFormat, method: Gptq) -> None:
        self.fmt, self.method = fmt, method
        self.phases = phases = Phases()
        IntFormat.parameters = phases.timed(IntFormat.parameters, lambda *_, **__: "scales")  # type: ignore[method-assign]
        implementation._round = phases.timed(
            implementation._round, lambda _, grid, *__: "trial" if len(grid.choices) > 1 else "round"
        )
        for name in ("output_energy", "energy"):
            setattr(implementation, name, phases.timed(getattr(implementation, name), lambda *_: "measure"))
        self._factor = phases.timed(method.prepare, lambda *_: "factor")
        self._round = phases.timed(method.round, lambda *_: "other")

    def run(self, weights: dict[str, torch.Tensor], hessian: torch.Tensor) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Rows of the table by linear, and the weights as rounded."""
        self.phases.seconds.clear()
        stats = self._factor({"hessian": hessian})
        shared = self.phases.seconds["factor"] / len(weights)
        rows, found = {}, []
        for name, weight in weights.items():
            self.phases.seconds.clear()
            result = self._round(weight, self.fmt, stats)
            spent = {phase: round(seconds, 3) for phase, seconds in self.phases.seconds.items()}
            spent["factor"] = round(shared, 3)
            total = {"seconds": round(sum(spent.values()), 3)}
            rows[name] = {"out": len(weight), "in": weight.shape[1], **total, **spent, **result.metrics}
            rows[name]["factor_bits"] = 8 * stats["hessian"].upper.element_size()
            found.append(result.weight)
        return rows, found


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    widths = {"model": 4096 // options.scale, "feed": 12288 // options.scale}
    fmt, method = IntFormat(options.bits, options.group), Gptq(clip=options.clip)
    peers = {name: PEERS[name] for name in options.peers.split(",") if name}
    rates = {name: blas_rate(dtype) for name, dtype in (("sgemm", torch.float32), ("dgemm", torch.float64))}
    ours, linears = Ours(fmt, method), {}
    results = {name: {"seconds": 0.0, "loss": 0.0, "peak_gib": 0.0} for name in ("dlqc", *peers)}
    for where, (inner, readers) in BLOCK.items():
        hessian = second_moment(widths[inner], generator)
        weights = {
            name: torch.randn(widths[outer], widths[inner], generator=generator) * 0.02
            for name, outer in readers.items()
        }
        best = dict.fromkeys(results, float("inf"))
        for _ in range(options.repeat):
            before = peak_memory(reset=True)
            rows, found = ours.run(weights, hessian)
            results["dlqc"]["peak_gib"] = max(results["dlqc"]["peak_gib"], (peak_memory() - before) / 2**30)
            if sum(row["seconds"] for row in rows.values()) < best["dlqc"]:
                best["dlqc"] = sum(row["seconds"] for row in rows.values())
                linears |= rows
            losses = {"dlqc": cost(list(weights.values()), [w.dequantize() for w in found], hessian)}
            del found
            for name, peer in peers.items():
                run = peer(list(weights.values()), hessian, options.bits, options.group)
                before = peak_memory(reset=True)
                start = time.perf_counter()
                theirs = run()
                best[name] = min(best[name], time.perf_counter() - start)
                results[name]["peak_gib"] = max(results[name]["peak_gib"], (peak_memory() - before) / 2**30)
                losses[name] = cost(list(weights.values()), theirs, hessian)
                del run, theirs
        for name, result in results.items():
            result["seconds"] += best[name]
            result["loss"] += losses[name]
        for name in readers:
            print(f"{name:10} {where:20} " + " ".join(f"{key} {value:.3g}" for key, value in linears[name].items()))
        print(f"{'':10} {where:20} " + " ".join(f"{name} {seconds:.2f} s" for name, seconds in best.items()))

    rates = {
        name: max(rates[name], blas_rate(dtype)) for name, dtype in (("sgemm", torch.float32), ("dgemm", torch.float64))
    }
    limit = sum(row["out"] * row["in"] ** 2 for row in linears.values()) / rates["sgemm"]
    for inner, readers in BLOCK.values():
        single = linears[next(iter(readers))]["factor_bits"] == 32
        limit += widths[inner] ** 3 / 3 / rates["sgemm" if single else "dgemm"]
    total = results["dlqc"]["seconds"]
    names = ("factor", "scales", "trial", "round", "measure", "other")
    share = {name: round(sum(row.get(name, 0.0) for row in linears.values()) / total, 3) for name in names}
    result = {
        "command": " ".join(["python", "benchmarks/gptq_block.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "load_average": os.getloadavg(),
        "versions": {p: version(p) for p in peers},
        "native code": native.available("rounding") or "in use",
        "format": fmt.label,
        "weights": sum(row["out"] * row["in"] for row in linears.values()),
        "gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "seconds": round(total, 2),
        "limit_seconds": round(limit, 2),
        "over_limit": round(total / limit, 2),
        "share": share,
        "packages": {name: {key: round(value, 2) for key, value in found.items()} for name, found in results.items()},
        "times_ours": {name: round(results[name]["seconds"] / total, 2) for name in peers},
        "linears": linears,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"total {total:.1f} s, limit {limit:.1f} s, {result['gflops']}, {share}, {result['packages']}")


if __name__ == "__main__":
    main()
