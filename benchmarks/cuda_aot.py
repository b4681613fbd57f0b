"""Compile the CUDA kernels ahead of time for GPUs that are not here, and read what came out.

    python benchmarks/cuda_aot.py --out docs/results/cuda_aot.json       every kernel and target
    python benchmarks/cuda_aot.py --targets sm_90a --sources planes      a part (what the tests do)

For each kernel and target the file holds what ptxas says (registers, bytes of stack and spilled) and, of products, the
tensor-core instructions in the machine code and what stands in the loop: instructions and integer instructions for each weight
(of a plane) that a thread reads. It takes nvcc; the tools in Triton's wheel read machine code. This proves the shape of the
code; it proves neither its speed nor that it is right.

A gate fails the run: no spills and no stack, a tensor-core instruction in each product, and `LIMITS`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from triton_aot import INTEGER, loop, save, told, tool

from dlqc import native
from dlqc.kernels.cuda import build

TARGETS = ("sm_80", "sm_90a")
PRODUCT = r"\b[HI]MMA\b"
#: Weights that a thread reads in a turn of the loop: 128 output by 128 input features, 128 threads.
WEIGHTS = 128
KINDS = {"planes": {128: "g128", 64: "g64"}, "w4a8": {0: "channel", 1: "groups", 2: "groups zeros"}}
#: The most instructions and integer instructions for each weight of a plane, and for each 4-bit weight, by tokens of a tile. Bits
#: take 18 integer instructions for 32 weights, nibbles 3 for 8; the rest is copying ahead, and moving registers. What keeps up
#: with the memory of an H200 is 3.55 and 1.78 a 4-bit weight, 0.86 and 0.43 a weight of one of two planes.
LIMITS = {
    "planes g128": {8: (1.25, 0.85), 16: (1.6, 0.9), 32: (2.2, 1.0), 64: (3.4, 1.25)},
    "planes g64": {8: (1.35, 0.9), 16: (1.8, 0.95), 32: (2.6, 1.1), 64: (4.5, 1.55)},
    "w4a8 channel": {8: (0.95, 0.6), 16: (1.05, 0.6), 32: (1.25, 0.65), 64: (1.65, 0.7), 128: (2.35, 0.7)},
    "w4a8 groups": {8: (1.25, 0.75), 16: (1.5, 0.75), 32: (1.95, 0.8), 64: (2.85, 0.8)},
    "w4a8 groups zeros": {8: (1.4, 0.8), 16: (1.7, 0.8), 32: (2.3, 0.8), 64: (3.5, 0.8)},
}


def plain(symbol: str) -> tuple[str, list[int]]:
    """Name and numbers of a template from the compiler's symbol.

    >>> plain("_Z7productILi64ELi128EEv6Planes")
    ('product', [64, 128])
    """
    length, rest = re.match(r"_Z(\d+)(.*)", symbol).groups()  # type: ignore[union-attr]
    name, after = rest[: int(length)], rest[int(length) :]
    numbers = re.match(r"I((?:L[a-z]\d+E)+)E", after)
    return name, [int(n) for n in re.findall(r"L[a-z](\d+)E", numbers.group(1))] if numbers else []


def functions(lines: list[str]) -> dict[str, list[str]]:
    """Machine code by symbol."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if m := re.match(r"\.text\.(\w+):", line.strip()):
            name = m.group(1)
        elif line.lstrip().startswith(".section"):
            name = ""
        elif name:
            found.setdefault(name, []).append(line)
    return found


def compile_all(source: str, target: str) -> list[dict[str, Any]]:
    """A row for each kernel of `<source>.cu`."""
    command, _ = native._compiler(build.NVCC)
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        kept = [flag for flag in build.NVCC.flags if not flag.startswith(("-shared", "-Xcompiler"))]
        code = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}", "-Xptxas=-v", "-cubin"]
        done = subprocess.run(
            [*command, *kept, *code, "-o", cubin, str(build.SOURCES / f"{source}.cu")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{source}.cu does not compile for {target}: {done.stderr}")
        machine = functions(tool("nvdisasm", "-c", cubin).splitlines())
    pattern = (
        r"'(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    rows = []
    for symbol, stack, stores, loads, registers in re.findall(
        f"Compiling entry function {pattern}", done.stderr, re.DOTALL
    ):
        name, numbers = plain(symbol)
        row: dict[str, Any] = {
            "kernel": f"{source} {name}", "target": target, "registers": int(registers), "stack": int(stack),
            "spills": int(stores) + int(loads),
        }  # fmt: skip
        if name == "product":
            tokens, kind = numbers
            row["kernel"], row["tokens"] = f"{source} {KINDS[source][kind]}, {tokens} tokens", tokens
            lines = machine[symbol]
            made = [m.group(0) for line in lines if (m := re.search(PRODUCT, line))]
            body = loop(lines, PRODUCT)
            inside = sum(bool(re.search(PRODUCT, line)) for line in body)
            row["products"] = {one: made.count(one) for one in sorted(set(made))}
            row["per_weight"] = {
                "instructions": round(len(body) / WEIGHTS, 3),
                "integer": round(sum(bool(INTEGER.search(line)) for line in body) / WEIGHTS, 3),
                "products": round(inside / WEIGHTS, 3),
            }
            row["outside"] = len(made) - inside
        elif numbers:
            row["kernel"] += f" {numbers[0]}"
        row["faults"] = faults(row)
        rows.append(row)
    if sum("product" in plain(symbol)[0] for symbol in machine) != sum("tokens" in row for row in rows):
        raise SystemExit(f"{source}.cu: what ptxas tells and what the machine code holds are not the same kernels")
    return sorted(rows, key=lambda row: row["kernel"])


def faults(row: dict[str, Any]) -> list[str]:
    """What a gate says against a compiled kernel."""
    wrong = [f"{row[what]} bytes of {what}" for what in ("stack", "spills") if row[what]]
    if "tokens" not in row:
        return wrong
    if not row["products"]:
        wrong.append("no tensor-core instruction")
    if row["outside"]:
        wrong.append(f"{row['outside']} tensor-core instructions outside of the loop")
    limits = LIMITS[row["kernel"].split(",")[0]][row["tokens"]]
    for what, most in zip(("instructions", "integer"), limits, strict=True):
        count = row["per_weight"][what]
        if not 0 < count <= most:
            wrong.append(f"{count} {what} a weight, at most {most}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sources", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    if (reason := native.compiler(build.NVCC)) is not None:
        parser.error(f"{reason}. Install the CUDA toolkit")
    rows = []
    for target in options.targets:
        for source in options.sources:
            for row in compile_all(source, target):
                rows.append(row)
                print(told(row, 36), flush=True)
    failed = sum(bool(row["faults"]) for row in rows)
    if options.out:
        _, version = native._compiler(build.NVCC)
        about = {
            "command": " ".join(("python benchmarks/cuda_aot.py", *sys.argv[1:])),
            "sources": hashlib.sha256(
                b"".join(path.read_bytes() for path in sorted(build.SOURCES.iterdir()))
            ).hexdigest(),
            "nvcc": re.findall(r"V([\d.]+)", version)[0],
            "limits": LIMITS,
        }
        save(options.out, about, rows)
    print(f"{len(rows)} compiled, {failed} outside of the gates")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
