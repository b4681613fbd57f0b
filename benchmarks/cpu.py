"""Low-bit linears on this CPU against every peer that is installed, in one process.

    python benchmarks/cpu.py --out docs/results/cpu.json            (all shapes; --quick: one shape, fewer rounds)

What is in the file: the machine's limits measured in the same run (the peak of the integer instruction on one and on all
threads, the rate of reading memory), and for each shape K->N, number of tokens M and implementation the median and the best time,
GOP/s (2·M·N·K / time), GB/s (stored bytes of the weight / time) and the largest error relative to the largest result. An
implementation is compared with float64 first, on its own weights, and left out if it is wrong.

Two states. Virtual machines may run two threads at the speed of one for seconds at a time. The peak loop on all threads over that
on one tells which state it is: near the number of threads is fast. It is asked before every round; rounds in the slow state
are repeated, up to --patience seconds in all, and then marked.

Implementations take turns, round after round. Between calls 96 MB are read, so that weights come from memory as in a model.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cpu_peers import PEERS, Entry
from machine import facts

from dlqc import native
from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.int4pack import Int4Pack
from dlqc.kernels.cpu.int8_mm import Int8MM
from dlqc.kernels.cpu.int8pack import Int8Pack
from dlqc.kernels.cpu.linear8 import Linear8
from dlqc.kernels.cpu.linear16 import Linear16

SHAPES = ((4096, 4096), (4096, 12288), (12288, 4096))
TOKENS = (1, 8, 32, 128, 512)
CHECKED = 32  # rows that are compared with float64

# Twelve sums, registers only: a compiler adds moves to intrinsics, so this is assembly.
PEAK = """
#include <cstdint>
#include <thread>
#include <vector>
#define ONE(i) "vpdpbusd %%zmm12, %%zmm12, %%zmm" #i "\\n"
#define TWELVE ONE(0) ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11)
static void turns(int64_t n) {
    asm volatile("vpxord %%zmm12, %%zmm12, %%zmm12\\n1:\\n" TWELVE TWELVE "dec %0\\njnz 1b\\n" : "+r"(n) : : "zmm0", "zmm1",
                 "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "cc");
}
extern "C" void peak(int64_t n, int threads) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(turns, n);
    turns(n);
    for (auto& other : others) other.join();
}
"""


class Machine:
    """What the machine can do, and whether it does it now."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.folder = tempfile.TemporaryDirectory()
        (Path(self.folder.name) / "peak.cpp").write_text(PEAK)
        known = build.unavailable("linear8") is None and build.isa("linear8") == "avx512vnni"
        self.loop = native.library("peak", Path(self.folder.name)) if known else None
        self.slow = 0.0

    def rate(self, threads: int, repeats: int = 3) -> float:
        """GOP/s of the peak loop; 0 where there is none for this processor."""
        if self.loop is None:
            return 0.0
        turns, best = 200_000, math.inf
        for _ in range(repeats):
            start = time.perf_counter()
            self.loop.peak(ctypes.c_int64(turns), ctypes.c_int(threads))
            best = min(best, time.perf_counter() - start)
        return threads * turns * 24 * 128 / best / 1e9

    def ratio(self) -> float:
        """Speed on all threads over that on one."""
        one = self.rate(1)
        return self.rate(self.threads) / one if one else float(self.threads)

    def wait(self, patience: float) -> bool:
        """Until the machine is in the fast state; False if it did not get there."""
        while self.ratio() < 0.9 * self.threads:
            if self.slow > patience:
                return False
            time.sleep(0.5)
            self.slow += 0.5
        return True

    def reading(self) -> float:
        """GB/s of reading 256 MB of memory with all threads."""
        data, best = torch.ones(64 << 20), math.inf
        for _ in range(5):
            start = time.perf_counter()
            data.sum()
            best = min(best, time.perf_counter() - start)
        return data.numel() * 4 / best / 1e9

    def limits(self) -> dict[str, Any]:
        return {
            **facts(),
            "peak GOP/s, one thread": round(self.rate(1)),
            "peak GOP/s, all threads": round(self.rate(self.threads)),
            "reading GB/s": round(self.reading(), 1),
            "path": build.isa("linear8") if build.unavailable("linear8") is None else build.unavailable("linear8"),
        }


def ours(k: int, n: int, w: torch.Tensor) -> list[Entry]:
    """The kernels of the CPU backend, with the weight quantized as each of them takes it."""
    found = []
    token, grouped = ActFormat(8), ActFormat(8, 128)
    plain, channel = torch.float32, IntFormat(8, None)
    for bits in (2, 3, 4, 8):
        for act, said in ((token, ""), (grouped, " act g128")):
            found.append((f"dlqc W{bits}A8 g128{said}", f"W{bits}A8", Linear8(), IntFormat(bits, 128), act, plain))
    found.append(("dlqc W4A16 g128", "W4A16", Linear16(), IntFormat(4, 128), None, plain))
    found.append(("dlqc W4A8 channel", "W4A8 channel", Linear8(), IntFormat(4, None), token, plain))
    found.append(("dlqc W8A8 channel", "W8A8 channel", Linear8(), channel, token, plain))
    half = torch.bfloat16  # tokens and results, as zentorch takes them
    found.append(("dlqc W4A8 g128 bf16", "W4A8", Linear8(), IntFormat(4, 128), token, half))
    found.append(("dlqc W4A16 g128 bf16", "W4A16", Linear16(), IntFormat(4, 128), None, half))
    found.append(("dlqc W8A8 channel bf16", "W8A8 channel", Linear8(), channel, token, half))
    found.append(("torch _int_mm", "W8A8 channel", Int8MM(), channel, token, plain))
    found.append(("torch int8pack", "W8A16", Int8Pack(), channel, None, torch.bfloat16))
    found.append(("torch int4pack", "W4A16", Int4Pack(), IntFormat(4, 128), None, torch.bfloat16))
    entries = []
    for name, mode, kernel, fmt, act, dtype in found:
        spec = LinearSpec(k, n, fmt, act, False)
        reason = kernel.supports(spec)
        if reason is not None:
            print(f"  {name}: {reason}", file=sys.stderr)
            continue
        stored = fmt.quantize(w)
        lowered = kernel.lower(spec, pack(stored.codes, fmt.bits), stored.scales, None, None)
        arguments = (*lowered.tensors.values(), *lowered.scalars)

        def call(x: torch.Tensor, op: Any = lowered.op, arguments: Any = arguments) -> torch.Tensor:
            return op(x, *arguments)  # type: ignore[no-any-return]

        size = fmt.bits_per_weight(n, k) * n * k / 8
        entries.append(Entry(name, mode, call, stored.dequantize().double(), size, dtype))
    return entries


def tokens(m: int, k: int) -> torch.Tensor:
    return torch.randn(max(TOKENS), k, generator=torch.Generator().manual_seed(k))[:m].clone()


def gather(k: int, n: int) -> list[Entry]:
    """All implementations of a shape, with what they should give in place of their float64 weights."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(k + n)) / math.sqrt(k)
    entries: list[Entry] = []
    for name, peers in {"dlqc": ours, **PEERS}.items():
        try:
            for entry in peers(k, n, w):
                assert entry.weight is not None
                entry.expected = tokens(CHECKED, k).to(entry.dtype).double() @ entry.weight.T
                entry.weight = None
                entries.append(entry)
        except Exception as error:  # a peer that is not there, or not in a version that this file knows
            print(
                f"  {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr
            )
    return entries


def error_of(entry: Entry, x: torch.Tensor) -> float:
    """max |y - ŷ| / max |ŷ| over the first rows; ŷ in float64 from the entry's own weight and unrounded tokens."""
    assert entry.expected is not None
    expected = entry.expected[: x.shape[0]]
    y = entry.call(x)[: expected.shape[0]].double()
    return float((y - expected).abs().max() / expected.abs().max())


def measure(
    entries: list[Entry], k: int, n: int, m: int, machine: Machine, args: argparse.Namespace
) -> list[dict[str, Any]]:
    x = tokens(m, k)
    given = {dtype: x.to(dtype) for dtype in {entry.dtype for entry in entries}}
    errors = {entry.name: error_of(entry, given[entry.dtype]) for entry in entries}
    sound = [entry for entry in entries if errors[entry.name] < 3e-2]
    times: dict[str, list[float]] = {entry.name: [] for entry in sound}
    other = torch.ones(24 << 20)
    fast = 0
    for _ in range(args.rounds):
        fast += machine.wait(args.patience)
        for entry in sound:
            other.sum()
            if m <= 8:
                entry.call(given[entry.dtype])  # threads awake, and then the weight read anew
                other.sum()
            start = time.perf_counter()
            entry.call(given[entry.dtype])
            times[entry.name].append(time.perf_counter() - start)
    rows = []
    for entry in entries:
        row: dict[str, Any] = {"shape": f"{k}->{n}", "M": m, "name": entry.name, "mode": entry.mode}
        row["max relative error"] = float(f"{errors[entry.name]:.2g}")
        if entry.name in times:
            middle, best = statistics.median(times[entry.name]), min(times[entry.name])
            work = 2 * m * n * k / 1e9
            row |= {"ms": round(1e3 * middle, 3), "best ms": round(1e3 * best, 3), "GOP/s": round(work / middle)}
            row |= {"best GOP/s": round(work / best), "GB/s": round(entry.bytes / middle / 1e9, 1)}
            row |= {"rounds": args.rounds, "rounds in the fast state": fast}
        rows.append(row)
    return rows


#: What is compared: ours, and the modes of the peers that store the same number of bits in the same way.
CONTESTS = {
    "W2": ("dlqc W2A8 g128", ("W2A8", "W2A16")),
    "W3": ("dlqc W3A8 g128", ("W3A8", "W3A16")),
    "W4": ("dlqc W4A8 g128", ("W4A8", "W4A16")),
    "W4, activations in groups": ("dlqc W4A8 g128 act g128", ("W4A8", "W4A16")),
    "W4 per channel": ("dlqc W4A8 channel", ("W4A8 channel",)),
    "W8 per channel": ("dlqc W8A8 channel", ("W8A8 channel", "W8A8 tensor", "W8A8", "W8A16")),
    "W8 per channel, bfloat16 tokens": ("dlqc W8A8 channel bf16", ("W8A8 channel", "W8A8 tensor", "W8A8", "W8A16")),
    "W4, bfloat16 tokens": ("dlqc W4A8 g128 bf16", ("W4A8", "W4A16")),
    "W4A16": ("dlqc W4A16 g128", ("W4A16",)),
    "W4A16, bfloat16 tokens": ("dlqc W4A16 g128 bf16", ("W4A16",)),
}


#: The machine's limits that shares are of; the better one of before and after.
LIMITS = ("peak GOP/s, all threads", "reading GB/s")


def contests(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours beside the best peer of each contest, shape and number of tokens."""
    rows: list[dict[str, Any]] = []
    peak, reading = (max(found[when][name] for when in ("machine", "machine after")) for name in LIMITS)
    cells = [cell for cell in found["cells"] if "ms" in cell]
    for what, (name, modes) in CONTESTS.items():
        for mine in (cell for cell in cells if cell["name"] == name):
            there = [c for c in cells if (c["shape"], c["M"]) == (mine["shape"], mine["M"]) and c["mode"] in modes]
            peers = sorted((c for c in there if not c["name"].startswith("dlqc")), key=lambda c: float(c["ms"]))
            row = {"contest": what, "shape": mine["shape"], "M": mine["M"], "ms": mine["ms"], "GOP/s": mine["GOP/s"]}
            row["of peak"] = round(mine["GOP/s"] / peak, 2)
            row["of reading"] = round(mine["GB/s"] / reading, 2)
            row["error"] = mine["max relative error"]
            if peers:
                row |= {
                    "best peer": peers[0]["name"],
                    "its ms": peers[0]["ms"],
                    "its error": peers[0]["max relative error"],
                }
                row["times as fast"] = round(peers[0]["ms"] / mine["ms"], 2)
            rows.append(row)
    return rows


def page(found: dict[str, Any]) -> str:
    """The contests as Markdown."""
    machine = found["machine"]
    peak, reading = (max(found[when][name] for when in ("machine", "machine after")) for name in LIMITS)
    lines = [
        "# Low-bit linears on the CPU",
        "",
        f"Made by `python benchmarks/cpu.py --out docs/results/cpu.json` with {machine['threads']} threads of an "
        f"{machine['processor']} ({machine['path']}), torch {machine['torch']}. Limits of the machine in this run: "
        f"{peak} GOP/s of the integer instruction ({machine['peak GOP/s, one thread']} on one thread), reading {reading} GB/s. "
        "Medians; peers take turns "
        "in one process and were right against float64 first; `of peak` and `of reading` are shares of these limits.",
    ]
    for what in CONTESTS:
        rows = [row for row in found["contests"] if row["contest"] == what]
        lines += ["", f"## {what}: {CONTESTS[what][0]}", ""]
        lines += [
            "| shape | M | ms | GOP/s | of peak | of reading | error | best peer | its ms | its error | times as fast |"
        ]
        lines += ["|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|"]
        for row in rows:
            peer = " | ".join(str(row.get(name, "")) for name in ("best peer", "its ms", "its error", "times as fast"))
            lines.append(
                f"| {row['shape']} | {row['M']} | {row['ms']} | {row['GOP/s']} | {row['of peak']:.0%} | {row['of reading']:.0%} "
                f"| {row['error']} | {peer} |"
            )
    return "\n".join(lines) + "\n"


def figure(found: dict[str, Any], path: Path) -> None:
    """Times as fast as the best peer, by contest, shape and number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = ("W2", "W3", "W4", "W8 per channel")
    shapes = sorted({row["shape"] for row in found["contests"]})
    drawing, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.2), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for what in shown:
            rows = [
                r for r in found["contests"] if r["contest"] == what and r["shape"] == shape and "times as fast" in r
            ]
            axis.plot([str(row["M"]) for row in rows], [row["times as fast"] for row in rows], marker="o", label=what)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=shape, xlabel="tokens M", ylim=(0, None))
    axes[0][0].set_ylabel("times as fast as the best peer")
    axes[0][-1].legend()
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for the fast state, in all")
    parser.add_argument("--quick", action="store_true", help="a small shape and few tokens, to see that it runs")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    machine = Machine(torch.get_num_threads())
    machine.wait(args.patience)
    found: dict[str, Any] = {"machine": machine.limits(), "cells": []}
    print(json.dumps(found["machine"], indent=1))
    for k, n in ((1024, 1536),) if args.quick else SHAPES:
        entries = gather(k, n)
        for m in (1, 8, 32) if args.quick else TOKENS:
            rows = measure(entries, k, n, m, machine, args)
            found["cells"] += rows
            print(f"\n{k}->{n}, M = {m}")
            for row in sorted(rows, key=lambda row: (row["mode"], row.get("ms", math.inf))):
                print(
                    f"  {row['mode']:13} {row['name']:28} {row.get('ms', 'wrong'):>9} ms {row.get('GOP/s', ''):>6} GOP/s "
                    f"{row.get('GB/s', ''):>6} GB/s   error {row['max relative error']}"
                )
    machine.wait(args.patience)
    found["machine after"] = machine.limits()
    found["contests"] = contests(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page(found))
        figure(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
