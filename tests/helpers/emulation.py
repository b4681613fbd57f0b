"""The CUDA kernels on a CPU: the same sources, built by the C++ compiler with emulate.h in the place of a GPU."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import replace
from pathlib import Path

from dlqc import native
from dlqc.kernels.cuda import build

HELPERS = Path(__file__).parent
#: Products and sums are contracted only where the source says so, as on a GPU.
EMULATED = replace(
    native.CXX,
    suffix=".cu",
    flags=("-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{HELPERS}"),
    tuned=((),),
)


def library(name: str, sources: Path = build.SOURCES) -> ctypes.CDLL:
    """`<name>.cu`, emulated."""
    version = hashlib.sha256((HELPERS / "emulate.h").read_bytes()).hexdigest()[:16]
    options = (f"-DEMULATED_AS_OF=0x{version}",)
    found = native.library(name, sources, options, EMULATED)
    assert found is not None, native.available(name, sources, options, EMULATED)
    return found
