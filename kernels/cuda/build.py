"""The CUDA kernels of this folder: when they can be used here, and their libraries.

Sources in `csrc/` are built by `dlqc.native` when a kernel is first asked about on a machine with a GPU, for that GPU, in
about ten seconds, and found in the cache from then on. They need the CUDA toolkit's compiler (nvcc on the path, in
$CUDA_HOME or /usr/local/cuda, or named by $NVCC) and a C++ compiler behind it; nothing of torch. DLQC_NATIVE=0 turns them off.

Device code uses a GPU through the names of `csrc/gpu.h` alone, so that tests can run the same sources on a CPU.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dlqc import native
from dlqc.kernels.triton.runtime import OLDEST

SOURCES = Path(__file__).parent / "csrc"
#: As Type in csrc/tiles.h.
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

#: Products and sums are contracted only where the source says so, which keeps codes those of `ActFormat`.
NVCC = native.Toolchain(
    what="CUDA compiler",
    suffix=".cu",
    names=("nvcc", "$CUDA_HOME/bin/nvcc", "/usr/local/cuda/bin/nvcc"),
    variable="NVCC",
    flags=("-std=c++17", "-O3", "-fmad=false", "-shared", "-Xcompiler=-fPIC"),
    patience_s=600,
)


class Target(ctypes.Structure):
    """`Target` of csrc/tiles.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "parts", "tokens", "bias")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("type", "m", "n", "columns", "splits")),
        ("unit", ctypes.c_float),
    )


def lacking() -> str | None:
    """None if this machine has all that the kernels need, or what it lacks and what to do, one clause. Nothing is built."""
    if not torch.cuda.is_available():
        return "torch sees no GPU (it takes a CUDA build of torch and an NVIDIA driver)"
    if torch.version.hip is not None:
        return "the GPU is none of NVIDIA's: backend='triton' takes it"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return f"the GPU has compute capability {_dotted(found)}, it needs {_dotted(OLDEST)} or newer"
    reason = native.compiler(NVCC)
    return None if reason is None else f"{reason}: install the CUDA toolkit, or use backend='triton'"


def unavailable(name: str) -> str | None:
    """None if the library built from `csrc/<name>.cu` can be used here, or why not, one clause."""
    if (reason := lacking()) is not None:
        return reason
    reason = native.available(name, SOURCES, options(), NVCC)
    return None if reason is None else f"native code is {reason}" if reason.startswith("turned") else reason


def options() -> tuple[str, ...]:
    """What the compiler is told of the GPU."""
    major, minor = torch.cuda.get_device_capability()
    return (f"-arch=sm_{major}{minor}",)


def launchable(x: Tensor) -> bool:
    """Whether the kernel itself runs on this tensor, or the definition does in its place: on a CPU, and in float64."""
    return x.is_cuda and x.dtype in TYPES


def library(name: str) -> ctypes.CDLL:
    """The library for the current GPU; a RuntimeError where `unavailable` has an objection."""
    found = native.library(name, SOURCES, options(), NVCC)
    if found is None:
        raise RuntimeError(f"the CUDA library {name} is not there: {unavailable(name)}")
    return found


def stream(x: Tensor) -> int | None:
    """The current stream of the device of x."""
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else None


def check(found: ctypes.CDLL, error: int) -> None:
    """A RuntimeError if a launch was refused."""
    if error:
        found.dlqc_said.restype = ctypes.c_char_p
        raise RuntimeError(f"a CUDA kernel was not launched: {found.dlqc_said(error).decode()}")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
