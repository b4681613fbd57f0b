"""Whole denoising steps on this CPU: blocks of LLaDA-8B's shape, and tiny-llada, against torch in one process.

    python benchmarks/cpu_blocks.py --out docs/results/cpu_blocks.json        (--layers 2; ten minutes, 12 GB)

Two steps of each model: the full forward of a canvas (256 positions), and the block step of 32 positions that reads keys and
values of 256 others from the cache. Weights are random in the large blocks (d 4096, 32 heads, SwiGLU 12288, a vocabulary of 64),
for speed does not depend on what they say.

    dlqc ...                   the model compiled with the recipe, on the CPU backend
    torch float32              the same graph, not quantized
    torch bfloat16 prepacked   written by hand as one would for speed: query, key and value in one product, gate and up in one,
                               weights laid out for oneDNN, torch's norm and attention, all in bfloat16

Each is first compared with the float32 graph (relative error of the logits). Implementations take turns, round after round, and
before each round the machine has to be in its fast state (see cpu.py). `python_share` bounds the part of a step that no op
accounts for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu import Machine
from torch import Tensor

import dlqc
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM

CANVAS, BLOCK = 256, 32


class Bfloat16:
    """A LLaDA model in bfloat16 with weights laid out for oneDNN: full forward, and block step on a cache of keys and values."""

    def __init__(self, model: LLaDAModelLM, length: int) -> None:
        core, c = model.model.transformer, model.config
        self.heads, self.width, self.eps = c.n_heads, c.d_model // c.n_heads, c.rms_norm_eps
        self.embedding, self.norm = core.wte.weight.bfloat16(), core.ln_f.weight.bfloat16()
        self.head = self._laid_out(core.ff_out.weight)
        self.layers = [
            (
                layer.attn_norm.weight.bfloat16(),
                self._laid_out(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])),
                self._laid_out(layer.attn_out.weight),
                layer.ff_norm.weight.bfloat16(),
                self._laid_out(torch.cat([layer.ff_proj.weight, layer.up_proj.weight])),
                self._laid_out(layer.ff_out.weight),
            )
            for layer in core.blocks
        ]
        angles = torch.outer(
            torch.arange(length), c.rope_theta ** -(torch.arange(0, self.width, 2) / self.width)
        ).repeat(1, 2)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.cache = [torch.zeros(2, 1, self.heads, length, self.width, dtype=torch.bfloat16) for _ in self.layers]

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), None)  # type: ignore[no-any-return]

    @staticmethod
    def _linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]

    def _turned(self, x: Tensor, start: int) -> Tensor:
        stop, half = start + x.shape[2], self.width // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.cos[start:stop] + rotated * self.sin[start:stop]

    def __call__(self, ids: Tensor, start: int = 0) -> Tensor:
        """Logits [1, S, V] of the window; keys and values of all other positions from the cache."""
        h = F.embedding(ids, self.embedding)
        for (norm, qkv, out, ff_norm, gate_up, down), cache in zip(self.layers, self.cache, strict=True):
            x = self._linear(F.rms_norm(h, norm.shape, norm, self.eps), qkv)
            q, k, v = x.view(1, -1, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
            stop = start + ids.shape[1]
            cache[0][:, :, start:stop], cache[1][:, :, start:stop] = self._turned(k, start), v
            y = F.scaled_dot_product_attention(self._turned(q, start), *cache)
            h = h + self._linear(y.transpose(1, 2).reshape(h.shape), out)
            gate, up = self._linear(F.rms_norm(h, ff_norm.shape, ff_norm, self.eps), gate_up).chunk(2, -1)
            h = h + self._linear(F.silu(gate) * up, down)
        return self._linear(F.rms_norm(h, self.norm.shape, self.norm, self.eps), self.head)


#: What a fresh process does first: find a kernel for each kind of linear, and attention.
FIRST_USE = """
import time, torch, dlqc
import torch._dynamo  # every model that is captured or loaded needs it
started = time.perf_counter()
from dlqc.backend import LinearSpec, choose_kernel, load_backend
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.kernels.cpu import attention
for act in (ActFormat(8), None):
    choose_kernel(load_backend("cpu"), LinearSpec(256, 256, IntFormat(4, 128), act, False))
attention.unavailable()
print(time.perf_counter() - started)
"""


def first_use() -> dict[str, float]:
    """Seconds until the kernels can be called: compiled and checked, found in the cache, and without native code."""

    def run(**environment: str) -> float:
        told = subprocess.run(
            [sys.executable, "-c", FIRST_USE], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        return round(float(told.stdout.split()[-1]), 2)

    with tempfile.TemporaryDirectory() as folder:
        return {
            "compiled": run(DLQC_CACHE=folder),
            "cached": statistics.median(run(DLQC_CACHE=folder) for _ in range(3)),
            "without native code": statistics.median(run(DLQC_NATIVE="0") for _ in range(3)),
        }


Step = Callable[[], Tensor]


def steps_of(model: LLaDAModelLM, recipes: dict[str, str]) -> dict[str, dict[str, Step]]:
    """By step and implementation, what to call; caches are filled."""
    length = CANVAS + BLOCK
    ids = torch.randint(0, 60, (1, length), generator=torch.Generator().manual_seed(0))
    window = ids[:, CANVAS:]
    found: dict[str, dict[str, Step]] = {"full": {}, "block": {}}

    def both(name: str, compiled: Any) -> None:
        cached = compiled.cached
        cache = cached.new_cache(1, length)
        cached.step(ids, 0, cache)
        found["full"][name] = lambda: cached(ids[:, :CANVAS])
        found["block"][name] = lambda: cached.step(window, CANVAS, cache)

    both("torch float32", dlqc.compile(model, [], backend="cpu", progress=False))
    # Full forwards write their own cache, so that the block's stays as it is.
    whole, part = Bfloat16(model, CANVAS), Bfloat16(model, length)
    part(ids)
    found["full"]["torch bfloat16 prepacked"] = lambda: whole(ids[:, :CANVAS])
    found["block"]["torch bfloat16 prepacked"] = lambda: part(window, CANVAS)
    for name, recipe in recipes.items():
        both(f"dlqc {name}", dlqc.compile(model, recipe, backend="cpu", progress=False))
    return found


def python_share(step: Step) -> tuple[float, float]:
    """The part of a step's time that no op accounts for: at least, and at most.

    The profiler takes time itself. Were all of that spent outside of ops, the first number would be right; were all of it
    spent within them, the second.
    """
    from torch.profiler import ProfilerActivity, profile

    def middle(count: int) -> float:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    plain = middle(60)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        profiled = middle(20)
    spent = sum(event.self_cpu_time_total for event in found.key_averages()) / 20 / 1e6
    return max(0.0, 1 - spent / plain), min(1.0, (profiled - spent) / plain)


def measure(
    name: str, steps: dict[str, dict[str, Step]], machine: Machine, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    for kind, calls in steps.items():
        exact = calls["torch float32"]().double()
        errors = {who: float((call().double() - exact).norm() / exact.norm()) for who, call in calls.items()}
        times: dict[str, list[float]] = {who: [] for who in calls}
        fast = 0
        for _ in range(args.rounds):
            fast += machine.wait(args.patience)
            for who, call in calls.items():
                call()
                started = time.perf_counter()
                call()
                times[who].append(time.perf_counter() - started)
        base = statistics.median(times["torch bfloat16 prepacked"])
        for who, call in calls.items():
            middle = statistics.median(times[who])
            row = {"model": name, "step": kind, "name": who, "ms": round(1e3 * middle, 3)}
            row |= {"best ms": round(1e3 * min(times[who]), 3), "times as fast as bfloat16": round(base / middle, 2)}
            row |= {
                "relative error": float(f"{errors[who]:.2g}"),
                "rounds": args.rounds,
                "rounds in the fast state": fast,
            }
            if name == "tiny-llada" and who.startswith("dlqc"):
                row["python_share"] = [round(part, 3) for part in python_share(call)]
            rows.append(row)
            print(json.dumps(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=2, help="of LLaDA-8B's shape")
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for the fast state, in all")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    machine = Machine(torch.get_num_threads())
    found: dict[str, Any] = {"machine": machine.limits(), "first use, seconds": first_use(), "rows": []}
    print(json.dumps({name: found[name] for name in ("machine", "first use, seconds")}, indent=1))
    found["rows"] += measure(
        "tiny-llada",
        steps_of(dlqc.load_model("tiny-llada"), {name: name for name in ("w8a8-rtn", "w4a8-rtn")}),
        machine,
        args,
    )
    if args.layers:
        config = LLaDAConfig(
            d_model=4096,
            n_layers=args.layers,
            n_heads=32,
            mlp_hidden_size=12288,
            vocab_size=64,
            max_sequence_length=512,
            mask_token_id=63,
        )
        torch.manual_seed(0)
        model = LLaDAModelLM(config).eval()
        name = f"{args.layers} blocks of LLaDA-8B's shape"
        recipes = {name: name for name in ("w8a8-rtn", "w4a8-rtn", "w4a16-rtn")}
        rounded = "quantize_weights(bits=4, method=rtn), pack, lower(bfloat16=True)"
        recipes["w4a16-rtn, tokens in bfloat16"] = rounded
        found["rows"] += measure(name, steps_of(model, recipes), machine, args)
    found["machine after"] = machine.limits()
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
