"""Compile the Triton kernels ahead of time for GPUs that are not here, and read what came out.

    python benchmarks/triton_aot.py --out docs/results/triton_aot.json           every kernel, shipped configuration and target
    python benchmarks/triton_aot.py --sample --targets sm_90                      one of each kind (what the tests do)
    python benchmarks/triton_aot.py --only "w8a8 channel" --out docs/results/triton_aot.json      these rows of the file anew

For each kernel, configuration and target the file holds: registers, bytes of stack and spilled words, shared memory, the
tensor-core instructions in the machine code, for products with packed weights the instructions, integer instructions and waits in
the loop for each weight, where programs stay the copies by descriptor (TMA) in the PTX, and where a kernel begins before the one
ahead has ended whether it waits, and what it reads before. Machine code is read with the tools in
Triton's wheel. This proves the shape of the code; it proves neither its speed nor that it is right. It must run without
TRITON_INTERPRET.

A gate fails the run: no spills and no stack, a tensor-core instruction in each product, copies by descriptor where there should
be some, a wait for the kernel ahead before anything is read, and the limits of `LIMITS` on sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from gpu_tables import LLADA, shapes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlqc.kernels.triton import head
from dlqc.kernels.triton import integer as integer_host
from dlqc.kernels.triton import weight_only as weight_only_host
from dlqc.kernels.triton.cache import ROWS
from dlqc.kernels.triton.device import cache, float8, integer, persistent, rows, weight_only
from dlqc.kernels.triton.device import head as head_device
from dlqc.kernels.triton.dispatch import BUCKETS, Config, Shape, choose
from dlqc.kernels.triton.language import tl
from dlqc.kernels.triton.packing import block_of, padded, run_of
from dlqc.kernels.triton.runtime import H200, Device

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    **{f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (80, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: What stands for a target: one common device, its units and the shared memory that a program can have.
DEVICES = {
    "sm_80": Device("A100", 108, 166912, False), "sm_89": Device("L40S", 142, 101376, False), "sm_90": H200,
    "sm_100": Device("B200", 148, 232448), "gfx942": Device("MI300X", 304, 65536, False),
}  # fmt: skip
#: Tensor-core instructions, by target. Hopper's are wgmma, which is what the layout of the products is for.
PRODUCT = {
    "sm_80": r"\b[HI]MMA\b",
    "sm_89": r"\b[HIQ]MMA\b",
    "sm_90": r"\b[HIQ]GMMA\b",
    "sm_100": r"\bUTC[A-Z]*MMA\b|\b[HIQ]MMA\b",
    "gfx942": r"\bv_mfma_\w+",
}
INTEGER = re.compile(r"\b(LOP3|SHF|SHL|SHR|PRMT|IADD3|IADD|IMAD|LEA|BFE|SGXT|I2F\w*|I2I\w*|VABSDIFF)\b")
#: What keeps up with the memory of an H200, for each weight: instructions and integer instructions, 29.6 and 14.8 · 10¹² a second
#: over 4.3 · 10¹² bytes a second. With 8, 4, 3, 2 and 1 bits 6.9, 3.55, 2.7, 1.8 and 0.97 instructions, half as many of integers.
#: These are the most that the loop may take on sm_90 with up to 64 tokens a tile, sign planes with 32: above what the memory
#: allows at 3 bits and fewer, where numbers are made two at a time (a shift for several, a mask, a multiply-add) and each product
#: has to be set up.
LIMITS = {
    "w1a16 g128": (2.7, 0.9), "w2a16 g128": (3.0, 0.97), "w3a16 g128": (3.4, 1.2),
    "w4a16 channel": (3.55, 1.2), "w4a16 g128": (3.55, 1.2), "w8a16 channel": (6.9, 3.4), "w8a8 channel": (1.6, 0.9),
    "w4a8 channel": (1.4, 0.7), "w4a8 g128": (2.5, 1.2),
}  # fmt: skip


#: What codes of a format that is not integers stand for, by bits: NF4, codebooks of groups, FP8.
CODES = {4: weight_only_host.SHARED, 3: weight_only_host.PER_GROUP, 8: weight_only_host.FLOAT8}


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel, its arguments by name, and how it is launched.

    Attributes:
        name: of the kernel, and of what sets it apart.
        weights: codes that one program reads in one turn of its loop (0: not counted). turns: of the loop.
        product: whether the tensor cores must appear.
        sample: whether it stands for its kind in the tests.
    """

    name: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    weights: int = 0
    turns: int = 1
    product: bool = True
    sample: bool = False


def weight_only_job(
    shape: Shape, config: Config, *, zeros: bool = False, asm: bool = True, kind: str = "bf16", code: int = 0
) -> Job:
    """The product of 16-bit activations, as `kernels/triton/weight_only.py` launches it."""
    word = "*u8" if shape.bits == 8 else "*i16"
    parts = config.splits > 1
    run = run_of(shape.bits, shape.k, shape.group)
    block = block_of(shape.bits, run)
    pointers = {
        "x": f"*{kind}", "low": word, "scales": "*bf16",
        "zeros": "*u8" if zeros else word, "table": "*fp32" if code in (1, 2) else word, "bias": word,
        "residual": f"*{kind}", "y": "*fp32" if parts else f"*{kind}", "M": "i32", "x_stride": "i32", "y_stride": "i32",
    }  # fmt: skip
    constants = {
        "N": shape.n, "NP": padded(shape.n), "K": shape.k, "BITS": shape.bits, "GROUP": shape.group, "ZEROS": zeros,
        "CODE": code, "RUN": run, "BIAS": False, "ADD": False, "BN": config.bn, "BM": config.bm, "SPLITS": config.splits,
        "PRE": config.pre, "ASM": asm, "CT": {"bf16": tl.bfloat16, "fp16": tl.float16}[kind], "DEPENDENT": config.dependent,
    }  # fmt: skip
    group = "channel" if shape.group >= shape.k else f"g{shape.group}"
    apart = f"{('', ' nf4', ' codebook', ' fp8')[code]}{' zeros' if zeros else ''}{'' if asm else ' plain'}"
    name = f"w{shape.bits}a16 {group}{apart} {shape.k}x{shape.n}"
    tile = f"{config.bm}x{config.bn} splits {config.splits}"
    job = Job(f"{name}, {tile}", weight_only.weight_only, pointers, constants, config.warps, config.stages)
    blocks = -(-shape.k // block)
    return replace(job, weights=config.bn * block, turns=-(-blocks // config.splits))


def integer_job(shape: Shape, config: Config, *, zeros: bool = False, out: int = 0, add: bool = False) -> Job:
    """The product of 8-bit activations, as `kernels/triton/integer.py` launches it."""
    if config.persistent:
        return persistent_job(shape, config, add)
    channel, parts = shape.group >= shape.k, config.splits > 1
    pointers = {
        "q": "*i8", "low": "*i8", "scales": "*bf16", "zeros": "*u8" if zeros else "*i8", "sums": "*i32",
        "token_scales": "*fp32", "bias": "*i8", "residual": "*bf16", "x": "*bf16", "columns": "*i32", "outliers": "*bf16",
        "y": ("*i32" if channel else "*fp32") if parts else "*bf16", "M": "i32", "x_stride": "i32", "y_stride": "i32",
    }  # fmt: skip
    constants = {
        "N": shape.n, "NP": padded(shape.n), "K": shape.k, "KP": -(-shape.k // 128) * 128, "BITS": shape.bits,
        "GROUP": shape.group, "ZEROS": zeros, "BIAS": False, "ADD": add, "BN": config.bn, "BM": config.bm,
        "OUT": out, "SPLITS": config.splits, "ASM": True, "CT": tl.bfloat16, "DEPENDENT": config.dependent,
    }  # fmt: skip
    name = (
        f"w{shape.bits}a8 {'channel' if channel else f'g{shape.group}'}{' zeros' if zeros else ''} {shape.k}x{shape.n}"
    )
    name = f"{name} outliers {out}" if out else f"{name} with a sum" if add else name
    job = Job(f"{name}, {config.bm}x{config.bn} splits {config.splits}", integer.integer, pointers, constants)
    blocks = -(-shape.k // 128 // config.splits)
    turn = integer.turn_of(blocks, config.bm, shape.bits)
    weights = config.bn * 128 * turn
    return replace(job, warps=config.warps, stages=config.stages, weights=weights, turns=blocks // turn)


def persistent_job(shape: Shape, config: Config, add: bool = False) -> Job:
    """The product of many tokens, whose tiles are copied by descriptors, as `launch_persistent` launches it."""
    pointers = {
        "tokens": f"tensordesc<i8[{config.bm}, 128]>", "words": f"tensordesc<i8[{config.bn // 64}, 64, 128]>",
        "scales": "*bf16", "zeros": "*i8", "sums": "*i32", "token_scales": "*fp32", "bias": "*i8", "residual": "*bf16",
        "y": "*bf16", "M": "i32", "y_stride": "i32",
    }  # fmt: skip
    constants = {
        "N": shape.n, "NP": padded(shape.n), "KP": -(-shape.k // 128) * 128, "ZEROS": False, "BIAS": False, "ADD": add,
        "BN": config.bn, "BM": config.bm, "STRIPE": integer_host.STRIPE,
    }  # fmt: skip
    name = f"w8a8 channel {shape.k}x{shape.n}{' with a sum' if add else ''}, {config.bm}x{config.bn} persistent"
    sample = (shape.k, shape.n) == LLADA[0] and add
    return Job(name, persistent.persistent, pointers, constants, config.warps, config.stages, sample=sample)


def row_job(
    name: str, width: int, kind: int = 0, add: bool = False, block: int = 1, sums: int = 0, float8: bool = False,
    dependent: bool = False,
) -> Job:  # fmt: skip
    """Codes of rows, as `kernels/triton/rows.py` launches it."""
    norm = kind == 1
    pointers = {
        "x": "*bf16", "other": "*bf16", "gain": "*fp32" if norm else "*bf16", "shift": "*bf16", "total": "*bf16",
        "q": "*u8" if float8 else "*i8", "scales": "*fp32", "sums": "*i32", "M": "i32", "x_stride": "i32", "other_stride": "i32",
        "epsilon": "fp32", "factor": "fp32",
    }  # fmt: skip
    constants = {
        "KIND": kind, "ADD": add, "GAIN": norm, "SHIFT": False, "BLOCK": block, "FLOAT8": float8, "K": width, "KP": width,
        "TOP": 127, "GROUP": width // max(1, sums), "SUMS": sums, "WIDTH": 1 << (width - 1).bit_length(), "DEPENDENT": dependent,
    }  # fmt: skip
    return Job(f"rows {name} {width}", rows.quantize_rows, pointers, constants, warps=8, product=False)


def share_jobs(dependent: bool) -> list[Job]:
    """Sums of the shares of K of products of 16-bit and 8-bit activations, as both launch them."""
    same = {"N": 4096, "SPLITS": 8, "BIAS": False, "ADD": False, "BLOCK": 512, "DEPENDENT": dependent}
    ends = {"y": "*bf16", "M": "i32", "y_stride": "i32"}
    apart = {"BITS": 4, "CHANNEL": True, "ZEROS": False, "OUT": 0}
    wide = {"parts": "*fp32", "bias": "*i16", "residual": "*bf16", **ends}
    held = {
        "scales": "*bf16",
        "zeros": "*i8",
        "sums": "*i32",
        "token_scales": "*fp32",
        "bias": "*i8",
        "residual": "*bf16",
    }
    return [
        Job("shares of 16-bit activations", weight_only.add_splits, wide, same, product=False),
        Job(
            "shares of 8-bit activations",
            integer.add_shares,
            {"parts": "*i32", **held, **ends},
            same | apart,
            product=False,
        ),
    ]


def row_jobs(dependent: bool) -> list[Job]:
    """What is done to rows; no products. `dependent`: also as it is launched for few tokens on Hopper and later."""
    turn = {"x": "*bf16", "y": "*bf16", "x_stride": "i32", "y_stride": "i32", "factor": "fp32"}
    sizes = {"K": 12288, "WIDTH": 4096}
    return [
        row_job("quantize", 4096),
        row_job("quantize with sums", 12288, sums=96),
        row_job("quantize to e4m3", 4096, float8=True),
        row_job("norm and quantize", 4096, kind=1),
        row_job("add, norm and quantize", 4096, kind=1, add=True),
        *((row_job("norm and quantize, dependent", 4096, kind=1, dependent=True),) if dependent else ()),
        row_job("silu and quantize", 12288, kind=3),
        row_job("silu, hadamard 128 and quantize", 12288, kind=3, block=128),
        *(
            Job(f"rows hadamard {block}", rows.hadamard, turn, {**sizes, "BLOCK": block}, warps=8, product=False)
            for block in (128, 4096)
        ),
        *(cache_job(bits, keys) for bits, keys in ((2, True), (4, True), (3, False), (8, False))),
    ]


def cache_job(bits: int, keys: bool) -> Job:
    """Codes of keys in groups of 64 tokens, or of values of 128 channels, as `kernels/triton/cache.py` launches it."""
    numbers = ("R", "INNER", "outer", "row_stride", "stride", "LAST", "WORDS")
    pointers = {"x": "*bf16", "centers": "*fp16", "codes": "*i32", "steps": "*fp16", **dict.fromkeys(numbers, "i32")}
    size = 64 if keys else 128
    constants = {"BITS": bits, "GROUP": size, "GROUPS": 16 if keys else 1, "GIVEN": keys, "ROWS": ROWS, "WIDTH": size}
    name = f"cache {bits} bits of {'keys' if keys else 'values'}"
    return Job(name, cache.quantize_bins, pointers, constants, product=False)


def float8_job(shape: Shape, config: Config) -> Job:
    """The product in e4m3, as `kernels/triton/float8.py` launches it."""
    pointers = {
        "q": "*fp8e4nv", "weight": "*fp8e4nv", "scales": "*fp32", "token_scales": "*fp32", "bias": "*fp32",
        "y": "*fp32" if config.splits > 1 else "*bf16", "M": "i32", "y_stride": "i32",
    }  # fmt: skip
    constants = {
        "N": shape.n, "KP": shape.k, "BIAS": False, "BN": config.bn, "BM": config.bm, "SPLITS": config.splits,
        "DEPENDENT": config.dependent,
    }  # fmt: skip
    name = f"w8a8 e4m3 {shape.k}x{shape.n}, {config.bm}x{config.bn} splits {config.splits}"
    return Job(name, float8.float8, pointers, constants, config.warps, config.stages)


def head_job(bits: int, tokens: int, stages: int) -> Job:
    """Head and argmax of LLaDA's vocabulary, as `kernels/triton/head.py` launches it."""
    shape, pre = Shape("w16", bits, 4096, 126464, 128), tokens >= 64
    job = weight_only_job(shape, Config(bn=128, bm=tokens, pre=pre, stages=stages))
    drop, unused = ("residual", "y", "y_stride"), ("SPLITS", "ADD")
    constants = {k: v for k, v in job.constants.items() if k not in unused}
    pointers = {k: v for k, v in job.pointers.items() if k not in drop}
    pointers |= {"tops": "*fp32", "tokens": "*i32", "totals": "*fp32"}
    name = f"head w{bits}a16 g128 4096x126464, {tokens}x128"
    return replace(job, name=name, function=head_device.confident, pointers=pointers, constants=constants)


def shipped(target: str) -> list[Job]:
    """Every kernel with every configuration that `choose` has for the device, each once."""
    device = DEVICES[target]
    sizes = BUCKETS if target == "sm_90" else (16, 64, 128, 1024, 4096)
    jobs: dict[str, Job] = {}

    def add(job: Job) -> None:
        jobs.setdefault(job.name, job)

    for bits in (2, 3, 4, 8):
        shape = Shape("w16", bits, 12288, 4096, 128)
        add(replace(weight_only_job(shape, choose(shape, 32, device)), sample=bits in (3, 4)))
    channel = Shape("w8", 4, 12288, 4096, 12288)
    add(replace(integer_job(channel, choose(channel, 32, device)), sample=True))
    # Tables are one device's; other targets compile what they choose for the first shape.
    for k, n in LLADA if target == "sm_90" else LLADA[:1]:
        for shape in shapes(k, n):
            for size in sizes:
                config = choose(shape, size, device)
                if shape.kernel == "w8":
                    add(integer_job(shape, config))
                elif shape.kernel == "e4m3" and target not in ("sm_80", "gfx942"):  # which have no e4m3
                    add(float8_job(shape, config))
                elif shape.kernel in ("w16", "coded") and not config.dense:
                    add(weight_only_job(shape, config, code=CODES[shape.bits] if shape.kernel == "coded" else 0))
    grouped = Shape("w8", 4, 12288, 4096, 128)
    add(integer_job(grouped, choose(grouped, 32, device), zeros=True))
    split = Shape("w8", 8, 4096, 4096, 4096)
    for size in (32, 256):
        add(integer_job(split, integer_host.config_of(split, size, device, apart=True), out=32))
    for size in (512, 4096):
        add(integer_job(split, integer_host.config_of(split, size, device, added=True), add=True))
    shape = Shape("w16", 4, 4096, 4096, 128)
    for extra in ({"zeros": True}, {"asm": False}, {"kind": "fp16"}):
        job = weight_only_job(shape, choose(shape, 32, device), **extra)
        add(replace(job, name=f"{job.name} {next(iter(extra))}"))
    for bits in (4, 8):
        for tokens in (32, 64):
            add(head_job(bits, tokens, head.stages(bits, tokens, device)))
    for job in (*row_jobs(device.warpgroups), *share_jobs(device.warpgroups)):
        add(job)
    return list(jobs.values())


def build(job: Job, target: str) -> Any:
    """The compiled kernel, arguments specialized as the launcher specializes them."""
    names = [p.name for p in job.function.params]
    constant = {p.name for p in job.function.params if p.is_constexpr}
    signature = {n: "constexpr" if n in constant else job.pointers[n] for n in names}
    values = {(names.index(n),): job.constants[n] for n in names if n in constant}
    if target == "gfx942" and "ASM" in constant:
        values[(names.index("ASM"),)] = False
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith("stride")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=job.function, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    if job.constants.get("DEPENDENT"):
        options["launch_pdl"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=TARGETS[target], options=options)


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def loop(sass: list[str], product: str) -> list[str]:
    """The largest stretch of machine code that a branch jumps back over and that holds a product."""
    labels = {m.group(1): i for i, line in enumerate(sass) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    best: list[str] = []
    for i, line in enumerate(sass):
        m = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", line)
        if m and labels.get(m.group(1), i) < i:
            body = [text for text in sass[labels[m.group(1)] : i + 1] if "/*" in text and ";" in text]
            if len(body) > len(best) and any(re.search(product, text) for text in body):
                best = body
    return best


def examine(job: Job, target: str) -> dict[str, Any]:
    """Compile, and read registers, stack, spills, products, and the loop."""
    kernel = build(job, target)
    found: dict[str, Any] = {"kernel": job.name, "target": target, "warps": job.warps, "stages": job.stages}
    found["shared"] = kernel.metadata.shared
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        found["registers"] = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        found["stack"] = max(map(int, re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)))
        found["spills"] = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)))
        lines = text.splitlines()
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(kernel.asm["cubin"])
            used = re.findall(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", str(path)))
            lines = tool("nvdisasm", "-c", str(path)).splitlines()
        found["registers"], found["stack"] = map(int, used[-1])
        found["spills"] = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines)
    if job.function is persistent.persistent:
        found["descriptor_copies"] = kernel.asm["ptx"].count("cp.async.bulk.tensor")
    if job.constants.get("DEPENDENT"):
        ahead, wait, _ = kernel.asm["ptx"].partition("griddepcontrol.wait")
        found["waits_for_kernel"] = bool(wait)
        found["read_ahead"] = len(re.findall(r"\bld\.global|\bcp\.async", ahead))
    products = [m.group(0) for line in lines if (m := re.search(PRODUCT[target], line))]
    found["products"] = {name: products.count(name) for name in sorted(set(products))}
    if job.weights and target.startswith("sm_"):
        # A loop of a few turns may have been unrolled: then all of the code belongs to all of its weights.
        body = loop(lines, PRODUCT[target])
        turns = 1 if body else job.turns
        body = body or [line for line in lines if "/*" in line and ";" in line]
        count, weights = len(body), turns * job.weights / (32 * job.warps)
        found["per_weight"] = {
            "instructions": round(count / weights, 3),
            "integer": round(sum(bool(INTEGER.search(line)) for line in body) / weights, 3),
            "waits": sum("DEPBAR" in line or "BAR.SYNC" in line for line in body) // turns,
            "unrolled": turns > 1,
        }
    return found


def faults(job: Job, found: dict[str, Any]) -> list[str]:
    """What a gate says against a compiled kernel."""
    wrong = [f"{found[what]} {what}" for what in ("stack", "spills") if found[what]]
    if found["shared"] > DEVICES[found["target"]].shared:
        wrong.append(f"{found['shared']} bytes of shared memory")
    if job.product and not found["products"]:
        wrong.append("no tensor-core instruction")
    if not found.get("descriptor_copies", 1):
        wrong.append("no copy by descriptor")
    if not found.get("waits_for_kernel", True) or found.get("read_ahead"):
        wrong.append("begins before the kernel ahead has ended, and reads")
    limit = LIMITS.get(" ".join(job.name.split()[:2]))
    count = found.get("per_weight")
    # Where all turns are unrolled, what stands before and behind the loop would be counted with it.
    own = job.constants
    exempt = not count or count["unrolled"] or own["ZEROS"] or own.get("CODE") or not own["ASM"]
    # Many tokens wait for the tensor cores and not for the weight; two planes do from 28 on.
    exempt = exempt or own["BM"] > (32 if own["BITS"] == 1 else 64)
    if limit and found["target"] == "sm_90" and not exempt:
        for what, most in zip(("instructions", "integer"), limit, strict=True):
            if count[what] > most or not count[what]:
                wrong.append(f"{count[what]} {what} a weight, at most {most}")
    return wrong


def told(row: dict[str, Any], wide: int) -> str:
    """A row as it is printed."""
    each = row.get("per_weight", {})
    return (
        f"{row['kernel']:{wide}} {row['target']:7} {row['registers']:4} regs {row['stack']:4} stack "
        f"{each.get('instructions', 0):6} instr {each.get('integer', 0):6} int {row.get('products', {})} "
        f"{'; '.join(row['faults'])}"
    )


def save(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The file, a line a row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def write(path: Path, rows: list[dict[str, Any]], only: str, some: bool) -> None:
    """The file. Rows of targets that were not compiled now stay, and those of kernels that were not meant (`only`, `some`)."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    targets, made = {row["target"] for row in rows}, set(map(_key, rows))
    kept = [
        row
        for row in old["rows"]
        if row["target"] not in targets or not row["kernel"].startswith(only) or (some and _key(row) not in made)
    ]
    command = " ".join(("python benchmarks/triton_aot.py", *sys.argv[1:]))
    head = {
        "command": old["command"] if (only or some) and "command" in old else command,
        "triton": triton.__version__,
        "limits": LIMITS,
    }
    known = list(TARGETS)
    save(path, head, sorted(kept + rows, key=lambda row: known.index(row["target"])))


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["kernel"], row["target"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--only", default="", help="kernels whose name begins with this")
    parser.add_argument("--sample", action="store_true", help="one kernel of each kind (what the tests do)")
    parser.add_argument("--brief", action="store_true", help="the first shape and tiles of 32 tokens alone")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("kernels are interpreted under TRITON_INTERPRET=1 and cannot be compiled. Unset it")
    rows, failed = [], 0
    for target in options.targets:
        jobs = [job for job in shipped(target) if job.name.startswith(options.only)]
        if options.sample:
            jobs = [job for job in jobs if job.sample]
        if options.brief:
            jobs = [job for job in jobs if job.constants.get("BM", 32) == 32]
            jobs = [job for job in jobs if not job.weights or job.constants["K"] == LLADA[0][0]]
        if not jobs:
            parser.error(f"no kernel begins with {options.only!r}. Known: {', '.join(j.name for j in shipped(target))}")
        for job in jobs:
            found = examine(job, target)
            found["faults"] = faults(job, found)
            failed += bool(found["faults"])
            rows.append(found)
            print(told(found, 52), flush=True)
        if options.out:
            write(options.out, rows, options.only, options.sample or options.brief)
    print(f"{len(rows)} compiled, {failed} outside of the gates")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
