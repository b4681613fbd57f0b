"""Low-bit linears on this GPU against every peer that is installed, in one process and under ten minutes.

    python benchmarks/gpu.py --out docs/results/gpu.json            everything; a figure is written beside the JSON
    python benchmarks/gpu.py --plan                                 what would be run, with predicted floors; needs no GPU
    TRITON_INTERPRET=1 python benchmarks/gpu.py --rehearse          every implementation on tiny shapes on the CPU, without times
    python benchmarks/gpu.py --tune                                 try tiles and splits, rewrite the device's table in configs/
    python benchmarks/gpu.py --predict                              rewrite the H200's table as the rule has it; needs no GPU

What is in the file: the ceilings measured in the same run (copy, 16-bit, FP8 and int8 products of 8192³, an empty kernel in a
graph); for each shape K->N, number of tokens M and implementation the median time, its ratio to the library's bfloat16, the
fraction of the floor max(bytes / copy, operations / product) that it reaches, and its error; blocks and steps of an
LLaDA-8B-shaped model.

How it is measured: an implementation is compared with float64 before any time is taken, and left out if it is wrong; weights are
rotated through more than the second-level cache within one captured graph, which is replayed; the median of the replays counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_tables
import torch
import torch.nn.functional as F
from gpu_entries import Entry, cuda, library, ours, packed_weight, run
from torch import Tensor

from dlqc.kernels.triton import dispatch, packing, runtime, weight_only
from dlqc.kernels.triton.device import weight_only as device

SHAPES = {
    "attention": (4096, 4096),
    "up or qkv": (4096, 12288),
    "down": (12288, 4096),
    "gate-up": (4096, 24576),
    "head": (4096, 126464),
}
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: What a data sheet says of an H200, less what a copy and a large product lose: only for `--plan`.
PREDICTED = {"copy": 4.3e12, "bf16": 788e12, "int8": 1576e12, "fp8": 1576e12}
ROTATED = 256 << 20


def floor(m: int, k: int, n: int, entry: Entry, ceilings: dict[str, float]) -> float:
    """Seconds that the weight, x and y take at the rate of a copy, or the operations at that of a large product."""
    size = k * n * entry.weight_bits / 8 + m * k * entry.act_bits / 8 + 2 * m * n
    rate = ceilings["int8" if entry.act_bits == 8 else "bf16"]
    if entry.name.startswith("fp8") or "e4m3" in entry.name:
        rate = ceilings["fp8"]
    return max(size / ceilings["copy"], 2 * m * k * n / rate)


class Clock:
    """Times on a GPU: a graph of calls, replayed."""

    def __init__(self, repeats: int, rehearse: bool) -> None:
        self.repeats, self.rehearse = repeats, rehearse

    def seconds(self, calls: list[Callable[[], Any]]) -> float:
        """Median seconds of a call, all of them captured in one graph."""
        if self.rehearse:
            for call in calls:
                call()
            return math.nan
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, and fills the allocator
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(self.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times)


def ceilings(clock: Clock, device_: str) -> dict[str, float]:
    """Bytes and operations a second, and seconds of an empty kernel, on this GPU now."""
    if clock.rehearse:
        return dict(PREDICTED)
    found = {}
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device_)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() / clock.seconds([partial(target.copy_, source)])
    d, work = 8192, 2 * 8192**3
    a, b = (torch.randn(d, d, device=device_).bfloat16() for _ in range(2))
    found["bf16"] = work / clock.seconds([lambda: a @ b] * 4)
    i, j = (torch.randint(-127, 128, (d, d), dtype=torch.int8, device=device_) for _ in range(2))
    found["int8"] = work / clock.seconds([lambda: torch._int_mm(i, j.T)] * 4)
    found["fp8"] = found["int8"]
    if torch.cuda.get_device_capability() >= (8, 9):
        p, q = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one, ones = torch.ones((), device=device_), torch.ones(d, 1, device=device_)
        run_ = lambda s, t: torch._scaled_mm(p, q.T, s, t, out_dtype=torch.bfloat16)  # noqa: E731
        found["fp8"] = work / clock.seconds([lambda: run_(one, one)] * 4)
        found["fp8 rows"] = work / clock.seconds([lambda: run_(ones, ones.T)] * 4)
        found["int8"] = max(
            found["int8"], found["fp8"]
        )  # the tensor cores' rate is one; torch's int8 may be an old kernel
    empty = torch.zeros(1, 32, device=device_)
    count: dict[str, Any] = {"N": 32, "SPLITS": 1, "BIAS": False, "ADD": False, "BLOCK": 32}
    for name, early in (("empty kernel", False), ("empty kernel, dependent", True)):
        told = count | runtime.dependent(early and runtime.device_of(empty).warpgroups)
        call = partial(device.add_splits[1, 1], empty, empty, empty, empty, 1, 32, **told)
        found[name] = clock.seconds([call] * 200)
    return found


def error_of(entry: Entry, call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """‖y - x·Ŵᵀ‖ / ‖x·Ŵᵀ‖ on the first output features."""
    assert entry.truth is not None
    y = call(x)[:, : entry.truth.shape[0]].double()
    truth = x.double() @ entry.truth.T
    return float((y - truth).norm() / truth.norm())


def assembly_agrees(device_: str) -> bool:
    """Assembly against its plain twin, bit for bit, on all words of every width in both dtypes."""
    if device_ == "cpu" or torch.version.hip is not None:
        return True
    for bits in (2, 3, 4, 8):
        k = packing.block_of(bits, packing.RUN) * (8 if bits == 8 else 16)
        low = packing.arrange(torch.randint(0, 1 << bits, (128, k), dtype=torch.uint8, device=device_), bits)
        words = torch.arange(low.numel(), device=device_) % (256 if bits == 8 else 65536)
        low = words.to(low.dtype if bits == 8 else torch.int32).to(low.dtype).reshape(low.shape)
        zeros = torch.randint(0, 1 << bits, (1, 128), dtype=torch.uint8, device=device_)
        ones = torch.ones(1, 128, dtype=torch.bfloat16, device=device_)
        packed = weight_only.Packed(low, ones, zeros, k, 128, bits, k)
        for dtype in (torch.bfloat16, torch.float16):
            found = []
            for asm in (True, False):
                weight = torch.empty(128, k, dtype=dtype, device=device_)
                constants = packed.constants(dtype) | {"ASM": asm}
                device.dense[2, low.shape[1]](*packed.pointers, weight, **constants, BN=64)
                found.append(weight)
            if not torch.equal(*found):
                return False
    return True


def same_bits(entry: Entry, k: int, device_: str) -> bool:
    """20 runs and other batches of the same bucket, row by row."""
    call = entry.copies(1)[0]
    x = torch.randn(16, k, device=device_).to(torch.float32 if device_ == "cpu" else torch.bfloat16)
    first = call(x)
    again = all(torch.equal(call(x), first) for _ in range(2 if device_ == "cpu" else 20))
    order = torch.randperm(16, device=device_)
    return again and torch.equal(call(x[order]), first[order]) and torch.equal(call(x[2:9]), first[2:9])


def measure(options: argparse.Namespace, clock: Clock, device_: str) -> dict[str, Any]:
    """Everything, as the JSON holds it."""
    shapes = {"tiny": (256, 128)} if options.rehearse else {s: SHAPES[s] for s in options.shapes}
    tokens = (16, 33) if options.rehearse else options.tokens
    dtype = torch.float32 if device_ == "cpu" else torch.bfloat16
    limits = ceilings(clock, device_)
    print("ceilings:", {key: f"{value:.4g}" for key, value in limits.items()}, flush=True)
    if not assembly_agrees(device_):
        raise SystemExit("assembly and its plain twin disagree on this GPU: no time is worth taking")
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for label, (k, n) in shapes.items():
        base: dict[int, float] = {}
        for entry in (*library(k, n, device_), *ours(k, n, device_), *cuda(k, n, device_)):
            count = max(1, -(-ROTATED // int(k * n * entry.weight_bits / 8)))
            count = 1 if options.rehearse else min(count, 64)
            calls = entry.copies(count)
            own = entry.name.startswith("W")
            bits = same_bits(entry, k, device_) if own else None
            for m in tokens:
                x = torch.randn(m, k, device=device_).to(dtype)
                try:
                    error = error_of(entry, calls[0], x)
                except RuntimeError as refused:
                    if own:
                        raise
                    wrong.append(f"{entry.name} at {label}, {m} tokens: {refused}"[:200])
                    continue
                if not error <= entry.tolerance or bits is False:
                    wrong.append(f"{entry.name} at {label}, {m} tokens: error {error:.2g}, same bits {bits}")
                    continue
                seconds = clock.seconds([lambda call=call, x=x: call(x) for call in calls])
                base.setdefault(m, seconds)
                rows.append({
                    "shape": label, "k": k, "n": n, "tokens": m, "name": entry.name, "seconds": seconds, "error": error,
                    "over_bf16": seconds / base[m], "of_floor": floor(m, k, n, entry, limits) / seconds,
                })  # fmt: skip
                print(f"{label:12} {m:5} {entry.name:28} {seconds * 1e6:9.2f} us  {seconds / base[m]:5.2f} x bf16  "
                      f"{rows[-1]['of_floor']:5.2f} of floor  error {error:.1e}", flush=True)  # fmt: skip
            del calls
    blocks = [] if options.no_model else model(clock, device_, options.rehearse)
    name = "cpu (rehearsal)" if device_ == "cpu" else torch.cuda.get_device_name()
    return {"command": "python benchmarks/gpu.py", "device": name,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": _triton()},
            "ceilings": limits, "rows": rows, "wrong": wrong, "model": blocks}  # fmt: skip


class Block:
    """A block of LLaDA-8B's shape: norm, qkv, attention, output, norm, gate-up, down; linears of one kind."""

    def __init__(self, kind: str, d: int, wide: int, heads: int, device_: str) -> None:
        self.heads = heads
        self.linears = {
            name: _linear(kind, k, n, device_)
            for name, k, n in (("qkv", d, 3 * d), ("out", d, d), ("gate-up", d, 2 * wide), ("down", wide, d))
        }

    def __call__(self, x: Tensor) -> Tensor:
        m, d = x.shape
        q, k, v = self.linears["qkv"](F.rms_norm(x, (d,))).view(m, 3, self.heads, -1).unbind(1)
        mixed = F.scaled_dot_product_attention(*(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)))
        x = x + self.linears["out"](mixed.squeeze(0).transpose(0, 1).reshape(m, d))
        gate, up = self.linears["gate-up"](F.rms_norm(x, (d,))).chunk(2, -1)
        return x + self.linears["down"](F.silu(gate) * up)


KINDS = {"bf16": (16, 16), "W4A16": (4, 16), "W4A8": (4, 8), "W8A8": (8, 8)}


def _linear(kind: str, k: int, n: int, device_: str) -> Callable[[Tensor], Tensor]:
    bits, act = KINDS[kind]
    if kind == "bf16":
        w = torch.randn(n, k, device=device_).div_(k**0.5).to(torch.float32 if device_ == "cpu" else torch.bfloat16)
        return lambda x: F.linear(x, w)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=device_)
    shape = dispatch.Shape("w16", bits, k, n, 128) if act == 16 else dispatch.Shape("w8", bits, k, n, k)
    scales = torch.full((n, k // shape.group), k**-0.5 / (1 << bits), dtype=torch.bfloat16, device=device_)
    packed = packed_weight(shape, codes, scales)
    return lambda x: run(packed, x.contiguous())


def model(clock: Clock, device_: str, rehearse: bool) -> list[dict[str, Any]]:
    """Milliseconds of one block, and of a denoising step of 32 blocks and the head in one graph."""
    d, wide, heads, vocabulary, layers = (128, 256, 4, 256, 2) if rehearse else (4096, 12288, 32, 126464, 32)
    rows = []
    for kind in KINDS:
        blocks = [Block(kind, d, wide, heads, device_) for _ in range(layers)]
        head = _linear("bf16" if kind == "bf16" else "W8A8", d, vocabulary, device_)
        for m in (16,) if rehearse else (32, 256, 1024, 4096):
            x = torch.randn(m, d, device=device_).to(torch.float32 if device_ == "cpu" else torch.bfloat16)
            one = clock.seconds([lambda b=b, x=x: b(x) for b in blocks])

            def step(x: Tensor = x, blocks: list[Block] = blocks, head: Any = head) -> Tensor:
                for block in blocks:
                    x = block(x)
                return head(x[: min(len(x), 256)])  # masked rows only

            rows.append({"kind": kind, "tokens": m, "block_ms": one * 1e3, "step_ms": clock.seconds([step]) * 1e3})
            print(
                f"block {kind:6} {m:5} tokens {rows[-1]['block_ms']:8.3f} ms, step {rows[-1]['step_ms']:8.3f} ms",
                flush=True,
            )
        del blocks, head
    return rows


def plan(options: argparse.Namespace) -> None:
    """Print what would be run and the predicted floors."""
    print("PREDICTED by the roofline with", PREDICTED, "- nothing was measured; µs, times over bf16 in brackets")
    kinds = [Entry("bf16", 16, 16, lambda _: [], None)]
    kinds += [Entry(name, bits, act, lambda _: [], None) for name, bits, act in (
        ("W4A16 g128", 4.125, 16), ("W3A16 g128", 3.125, 16), ("W2A16 g128", 2.125, 16), ("W8A16", 8, 16), ("W8A8", 8, 8),
        ("W4A8", 4, 8), ("2 planes g128", 2.25, 16),
    )]  # fmt: skip
    for label in options.shapes:
        k, n = SHAPES[label]
        print(
            f"\n{label}: K={k}, N={n}\n{'M':>5} "
            + "".join(f"{e.name:>18}" for e in kinds)
            + f"   {'launch of W4A16':20} launch of W8A8"
        )
        for m in options.tokens:
            times = [floor(m, k, n, e, PREDICTED) for e in kinds]
            w4a16, w8a8 = (dispatch.Shape(*of, k, n, group) for *of, group in (("w16", 4, 128), ("w8", 8, k)))
            cells = "".join(f"{t * 1e6:9.2f} ({times[0] / t:4.2f}x)" + " " for t in times)
            print(f"{m:5} {cells}  {launch(dispatch.choose(w4a16, m)):20} {launch(dispatch.choose(w8a8, m))}")


def launch(config: dispatch.Config) -> str:
    """Tokens by output features of a tile, splits of K, and how a program begins and ends."""
    if config.dense:
        return "dense"
    how = ", stays" if config.persistent else ", early" if config.dependent else ""
    return f"{config.bm}x{config.bn}, {config.splits}{how}"


def _triton() -> str:
    import triton

    return str(triton.__version__)


def figure(found: dict[str, Any], path: Path) -> None:
    """Speed over bf16 against tokens, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(row["shape"] for row in found["rows"]))
    _, axes = plt.subplots(1, len(labels), figsize=(4 * len(labels), 4), squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        for name in dict.fromkeys(row["name"] for row in found["rows"]):
            points = [
                (r["tokens"], 1 / r["over_bf16"]) for r in found["rows"] if (r["shape"], r["name"]) == (label, name)
            ]
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set(xscale="log", xlabel="tokens", ylabel="speed over bf16", title=label)
    axes[0][0].legend(fontsize=6)
    plt.tight_layout()
    plt.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument(
        "--plan", action="store_true", help="print what would be run and the predicted floors; needs no GPU"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU in the interpreter, without times"
    )
    parser.add_argument("--tune", action="store_true", help="rewrite the table of this device")
    parser.add_argument(
        "--predict", action="store_true", help="rewrite the table of the H200 as the rule has it; needs no GPU"
    )
    parser.add_argument("--no-model", action="store_true", help="leave out blocks and steps")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.plan:
        plan(options)
        return 0
    if options.predict:
        gpu_tables.predict()
        return 0
    if options.rehearse and not runtime.interpreting():
        parser.error("a rehearsal is interpreted. Set TRITON_INTERPRET=1")
    if not options.rehearse and (
        os.environ.get("TRITON_INTERPRET") == "1" or (reason := runtime.unavailable()) is not None
    ):
        reason = "kernels are interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else reason
        parser.error(
            f"nothing can be measured here: {reason}. Run it on a machine with a GPU, or use --plan or --rehearse"
        )
    clock, device_ = Clock(options.repeats, options.rehearse), "cpu" if options.rehearse else "cuda"
    started = time.perf_counter()
    torch.manual_seed(0)
    if options.tune:
        gpu_tables.tune(clock, device_, list(dict.fromkeys(SHAPES[label] for label in options.shapes)), ROTATED)
        return 0
    found = measure(options, clock, device_)
    found["minutes"] = round((time.perf_counter() - started) / 60, 2)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        figure(found, options.out.with_suffix(".svg"))
    for line in found["wrong"]:
        print("left out:", line)
    return 1 if any(line.startswith("W") for line in found["wrong"]) else 0


if __name__ == "__main__":
    sys.exit(main())
