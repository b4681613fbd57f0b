"""Triton without a GPU: kernels interpreted in a process of their own, compiled ahead of time, and their ops on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlqc.kernels.triton.device import numbers as device

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="triton is not installed")


def child(*command: str, **environment: str) -> str:
    """What a fresh process says; it must not fail."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=settings | environment, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_interpreted() -> None:
    said = child("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted", TRITON_INTERPRET="1")
    assert " passed" in said
    assert "skipped" not in said


def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    """A few kernels within the gates of `benchmarks/triton_aot.py`, which compiles all of them."""
    said = child("benchmarks/triton_aot.py", "--sample", "--targets", "sm_80", "sm_90", TRITON_CACHE_DIR=str(tmp_path))
    assert said.splitlines()[-1].endswith("compiled, 0 outside of the gates")


# The assembly of the kernels, word by word. Packed 16-bit operands are tensors of bits [.., 2].


def halves(word: torch.Tensor) -> torch.Tensor:
    return torch.stack((word & 0xFFFF, word >> 16 & 0xFFFF), -1).to(torch.int32).to(torch.int16)


def joined(pairs: torch.Tensor) -> torch.Tensor:
    low, high = (pairs.view(torch.int16).to(torch.int64) & 0xFFFF).unbind(-1)
    return low | high << 16


def floats(word: torch.Tensor) -> torch.Tensor:
    return word.to(torch.int32).view(torch.float32)


def bits_of(value: torch.Tensor) -> torch.Tensor:
    return value.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def execute(text: str, operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the few instructions that the kernels use do to 32-bit registers (int64 tensors of their bits)."""
    registers = dict(operands)
    kinds = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}

    def read(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for step in filter(None, (part.strip(" {}") for part in text.split(";"))):
        name, rest = step.split(" ", 1)
        if name == ".reg":
            continue
        to, *names = (part.strip() for part in rest.split(","))
        values = [read(part) for part in names]
        if name == "mov.b32":
            made = values[0]
        elif name == "shr.u32":
            made = values[0] >> values[1]
        elif name == "shl.b32":
            made = values[0] << values[1] & 0xFFFFFFFF
        elif name == "lop3.b32":
            table = int(names[3], 0)
            a, b, c = values[:3]
            made = sum(
                ((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1))) & 1) << i for i in range(32)
            )
        elif name == "prmt.b32":
            bytes_ = [values[i // 4] >> 8 * (i % 4) & 0xFF for i in range(8)]
            made = sum(bytes_[int(names[2], 0) >> 4 * i & 7] << 8 * i for i in range(4))
        elif name == "add.f32":
            made = bits_of(floats(values[0]) + floats(values[1]))
        elif name.startswith("fma.rn."):
            kind = kinds[name.rsplit(".", 1)[1]]
            a, b, c = (halves(v).view(kind).double() for v in values)
            made = joined((a * b + c).to(kind))
        elif name.startswith("cvt.rn."):
            kind = kinds[name.split(".")[2]]
            made = joined(torch.stack((floats(values[1]), floats(values[0])), -1).to(kind))
        else:
            raise AssertionError(f"unknown instruction {step!r}")
        registers[to] = made
    return registers


KINDS = {"bf16x2": (0x4300, 0x3F80, torch.bfloat16), "f16x2": (0x6400, 0x3C00, torch.float16)}


def shifted(zero: int, kind: str) -> torch.Tensor:
    """-(128 + zero) or -(1024 + zero), twice in a register."""
    dtype = KINDS[kind][2]
    value = torch.tensor([-(zero + (128 if kind == "bf16x2" else 1024))] * 2).to(dtype)
    return joined(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_assembly_of_fields(bits: int, kind: str) -> None:
    """All words in one half of the register and their complements in the other, each field, the outermost zero points."""
    low = torch.arange(1 << 16)
    word = low | (low ^ 0xFFFF) << 16
    magic, one, dtype = KINDS[kind]
    for shift in range(0, 16, bits):
        for zero in (0, (1 << bits) - 1):
            text = device.pair(shift, (1 << bits) - 1, magic, one, kind)
            found = halves(execute(text, {"$1": word, "$2": shifted(zero, kind)})["$0"]).view(dtype).double()
            expected = torch.stack((low, low ^ 0xFFFF), -1) >> shift & ((1 << bits) - 1)
            assert torch.equal(found, expected.double() - zero)


@pytest.mark.parametrize("kind", KINDS)
def test_assembly_of_planes(kind: str) -> None:
    low = torch.arange(1 << 16)
    high = low * 40503 & 0xFF
    word, third = low | (low ^ 0xFFFF) << 16, high | (high ^ 0xFF) << 16
    magic, one, dtype = KINDS[kind]
    for run in range(8):
        text = device.pair_of_planes(run, magic, one, kind)
        found = halves(execute(text, {"$1": word, "$2": third, "$3": shifted(5, kind)})["$0"]).view(dtype).double()
        codes = [w >> 2 * run & 3 | (h >> run & 1) << 2 for w, h in ((low, high), (low ^ 0xFFFF, high ^ 0xFF))]
        assert torch.equal(found, torch.stack(codes, -1).double() - 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", [0, 128, 255])
def test_assembly_of_bytes(zero: int, kind: str) -> None:
    quarter = torch.arange(256)
    parts = [quarter, quarter.flip(0), quarter ^ 0x55, quarter * 7 & 0xFF]
    word = sum(part << 8 * i for i, part in enumerate(parts))
    point = bits_of(torch.tensor(-(2.0**23 + zero)))
    made = execute(device.four_bytes(kind), {"$2": word, **{f"${i}": point for i in range(3, 7)}})
    found = torch.cat([halves(made[name]).view(KINDS[kind][2]) for name in ("$0", "$1")], -1).double()
    assert torch.equal(found, torch.stack(parts, -1).double() - zero)
