"""The native kernels of this folder: which instruction set, which library, which threads.

Sources in `csrc/` are built by `dlqc.native` when a kernel is first asked about, for this processor, in a few seconds, and
found in the cache from then on. They compile to one of three paths, and say which:

    avx512vnni   vpdpbusd, 64 bytes at a time
    avx2         vpmaddubsw on operands that cannot saturate it
    portable     what the compiler makes of plain loops

DLQC_CPU_ISA names one of them, to test it or to keep away from it; DLQC_NATIVE=0 turns native code off.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlqc import native
from dlqc.errors import ContractError
from dlqc.kernels.cpu import native_op

SOURCES = Path(__file__).parent / "csrc"
ISAS = ("portable", "avx2", "avx512vnni")
PANEL = 48  # columns that lie together, as csrc/weights.h says
BLOCK = 32  # input features likewise
#: By the library that has their kernels.
OPS = {
    "linear8": ("linear8", "fused8", "rms_norm"),
    "attention": ("attention", "rope"),
    "head": ("head_argmax",),
    "cache": ("quantize_cache", "dequantize_cache"),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1}

COMMON = ("-ffp-contract=fast", "-Wno-psabi")
_FORCED = {"avx512vnni": "-march=x86-64-v4 -mavx512vnni", "avx2": "-march=x86-64-v3", "portable": "-march=x86-64 -O1"}


class Weight(ctypes.Structure):
    """`Weight` of csrc/weights.h. `tensors`: what has to live as long."""

    tensors: tuple[Tensor | None, ...] = ()

    _fields_ = (
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
    )


def options() -> tuple[str, ...]:
    """What the compiler is told besides -march=native."""
    forced = os.environ.get("DLQC_CPU_ISA", "")
    if forced not in _FORCED or platform.machine() not in ("x86_64", "AMD64"):
        return (*COMMON, "-DDLQC_PORTABLE") if forced == "portable" else COMMON
    return (*COMMON, *_FORCED[forced].split(), *(["-DDLQC_PORTABLE"] if forced == "portable" else []))


@cache
def begin(chosen: tuple[str, ...]) -> None:
    """Build what most models need at once, in the background, with these options: one after the other takes twice as long."""
    for name in ("linear8", "attention", "linear16", "head"):
        thread = threading.Thread(target=native.library, args=(name, SOURCES, chosen), name=f"dlqc builds {name}")
        try:
            thread.start()
        except RuntimeError:  # no more threads: each is built when it is asked for
            return


def unavailable(name: str) -> str | None:
    """None if the library built from `csrc/<name>.cpp` can be used, or why not, one clause."""
    forced = os.environ.get("DLQC_CPU_ISA", "")
    if forced and forced not in ISAS:
        return f"DLQC_CPU_ISA={forced} is none of {', '.join(ISAS)}"
    capability = torch.backends.cpu.get_cpu_capability()
    lacking = {"avx512vnni": "AVX512" not in capability, "avx2": not capability.startswith("AVX")}
    if lacking.get(forced, False):
        return f"this processor has no {forced}"
    reason = native.available(name, SOURCES, options())
    return None if reason is None else f"native code is {reason}" if reason.startswith("turned") else reason


def library(name: str) -> ctypes.CDLL:
    """The library; only where `unavailable` has no objection."""
    found = native.library(name, SOURCES, options())
    if found is None:
        raise RuntimeError(f"the native library {name} went away: {unavailable(name)}")
    native_op.connect(found, *OPS.get(name, ()))
    return found


def isa(name: str) -> str:
    """The path that the library was compiled to."""
    return ISAS[int(library(name).dlqc_isa())]


def threads() -> tuple[int, int | None]:
    """How many threads to use, as many as torch would, and whose."""
    return torch.get_num_threads(), native_op.team()


def address(part: Tensor | None) -> int | None:
    """Where the numbers of a contiguous tensor begin."""
    return None if part is None else part.data_ptr()


def described(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, k: int, n: int, bits: int, group: int
) -> Weight:
    """Integers of N output by K input features as the library reads them; `group` is 0 for one scale per channel.

    Scales and biases that are in another type than they were lowered in, as in a module that was moved, are converted.

    Raises:
        ContractError: tensors are not in the layout of csrc/weights.h.
    """
    panels, groups = -(-n // PANEL), -(-k // group) if group else 1
    scales = scales if scales.dtype == torch.bfloat16 else scales.to(torch.float32)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    tensors = (codes.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous(), bias)
    counts = (panels * -(-k // BLOCK) * 3 * bits * 64, panels * groups * PANEL, panels * groups * PANEL, n)
    names = ("codes", "scales", "zeros", "bias")
    for name, part, count in zip(names, tensors, counts, strict=True):
        narrow = name in ("codes", "zeros") and part is not None and part.dtype != torch.uint8
        if part is not None and (narrow or part.numel() != count or part.device.type != "cpu"):
            wanted = f"not {count} of {'uint8' if name in ('codes', 'zeros') else 'a floating dtype'} on the CPU"
            raise ContractError(f"{part.numel()} of {part.dtype} on {part.device}, {wanted}", where=name)
    weight = Weight(n, k, group or k, *map(address, tensors), bits, int(scales.dtype == torch.bfloat16))
    weight.tensors = tensors
    return weight


@cache
def declared(found: ctypes.CDLL, name: str, *types: type[Any]) -> ctypes._NamedFuncPointer:
    """A function of a library that returns 0 if all went well."""
    call: ctypes._NamedFuncPointer = getattr(found, name)
    call.argtypes, call.restype = types, ctypes.c_int
    return call


def arrange(codes: Tensor, bits: int, name: str = "linear8") -> Tensor:
    """Codes uint8 [N, K] in the layout of csrc/weights.h, uint8 [panels, 3·blocks·bits·64]; `name` of the library."""
    count, width = codes.shape
    found = library(name)
    panels, blocks = -(-count // PANEL), -(-width // BLOCK)
    out = torch.zeros(panels, blocks * 3 * bits * 64, dtype=torch.uint8, device="cpu")
    _in_large_pages(out)
    held = codes.to("cpu", torch.uint8).contiguous()
    found.dlqc_arrange(
        *(ctypes.c_void_p(held.data_ptr()), ctypes.c_int64(count), ctypes.c_int64(width), ctypes.c_int(bits)),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def _in_large_pages(tensor: Tensor) -> None:
    """Ask for pages of 2 MB, where the system has them on request: a product of few tokens walks through all of a weight."""
    size, page = tensor.numel() * tensor.element_size(), 1 << 21
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + size - start) // page * page
    if length > 0 and platform.system() == "Linux":
        advice = 14  # MADV_HUGEPAGE; refused without harm
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


def in_panels(values: Tensor) -> Tensor:
    """Parameters [N, G] as [panels, G, 48], padded with zeros."""
    count, groups = values.shape
    padded = torch.zeros(-(-count // PANEL) * PANEL, groups, dtype=values.dtype, device=values.device)
    padded[:count] = values
    return padded.reshape(-1, PANEL, groups).transpose(1, 2).contiguous()


def dense(flat: Tensor) -> Tensor:
    """[M, K] in float32 or bfloat16, rows contiguous."""
    typed = flat if flat.dtype in TYPES else flat.to(torch.float32)
    return typed if typed.shape[1] == 1 or typed.stride(1) == 1 else typed.contiguous()
