"""Whether a Triton kernel can run here, and on what.

A kernel runs on a GPU, or, for tests, on CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported. What is
never trusted in the interpreter is bfloat16: its arithmetic and its rounding are wrong there without an error
(`interpretable` says what is done instead).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dlqc.kernels.triton.language import DEPENDENT_LAUNCH, MISSING, tl

#: The oldest NVIDIA GPU with bfloat16 tensor cores and cp.async.
OLDEST = (8, 0)


@dataclass(frozen=True)
class Device:
    """What configurations depend on.

    Attributes:
        name: as torch says it. units: multiprocessors. shared: bytes of shared memory that a program can have.
        warpgroups: whether it is Hopper or later: four warps make one product, so that a large tile needs no more of them, whole
            tiles are copied by descriptors (TMA), and a kernel may begin before the one ahead of it has ended.
    """

    name: str
    units: int
    shared: int
    warpgroups: bool = True


#: The device of the shipped table, whose rule is also what is chosen without a GPU.
H200 = Device("NVIDIA H200", 132, 232448)


def interpreting() -> bool:
    """Whether kernels are interpreted on CPU tensors."""
    return not MISSING and os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """None if a kernel can be launched here, else the reason it cannot, one clause."""
    if MISSING:
        return "triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"the GPU has compute capability {found}, it needs {'.'.join(map(str, OLDEST))}"
    return None


def launchable(x: torch.Tensor) -> bool:
    """Whether the kernel itself runs on this tensor, or the definition does in its place."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return unavailable() is None and (x.is_cuda or interpreting())


def device_of(x: torch.Tensor) -> Device:
    """The device that holds x; that of the shipped tables while interpreting."""
    if not x.is_cuda:
        return H200
    return _device(x.device.index)


@cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", None) or found.shared_memory_per_block
    return Device(found.name, found.multi_processor_count, shared, torch.version.hip is None and found.major >= 9)


def on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Make the device of x the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of both operands of tensor cores: that of x, bfloat16 for float32; interpreted, float32 for bfloat16."""
    if interpreting():
        return torch.float16 if x.dtype == torch.float16 else torch.float32
    return torch.bfloat16 if x.dtype == torch.float32 else x.dtype


def in_triton(dtype: torch.dtype) -> Any:
    """A dtype of products in Triton's language."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def interpretable(x: torch.Tensor) -> torch.dtype:
    """The dtype that a kernel may store a result for x in."""
    return torch.float32 if interpreting() and x.dtype == torch.bfloat16 else x.dtype


def dependent(wanted: bool) -> dict[str, bool]:
    """What a launch is told besides: whether it begins before the kernel ahead has ended, a word for kernel and launcher each."""
    if wanted and DEPENDENT_LAUNCH and not interpreting():
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}
