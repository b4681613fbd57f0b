"""The CPU backend: what torch itself has for low-bit linears, and a fallback that takes everything.

In order of preference:

    int8_mm         integer activations and per-channel weights, multiplied as integers, exactly
    int8_mm_static  the same for activations with fixed scales, and for them alone
    int8pack        8-bit per-channel weights, bfloat16 product
    int4pack        2- to 4-bit weights, bfloat16 product
    dequant         whatever is left of integers
    coded           formats that are not integers, by their definition

No two of the middle ones compete (they differ in bits); the first goes before them because its sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlqc.backend import AnyKernel, Backend
from dlqc.kernels.cpu.dequant import Dequant
from dlqc.kernels.cpu.int4pack import Int4Pack
from dlqc.kernels.cpu.int8_mm import Int8MM
from dlqc.kernels.cpu.int8_mm_static import Int8MMStatic
from dlqc.kernels.cpu.int8pack import Int8Pack
from dlqc.kernels.reference.coded import Coded


@dataclass(frozen=True)
class CpuBackend:
    """The ops of torch, on the CPU."""

    name: str = "cpu"
    kernels: tuple[AnyKernel, ...] = (Int8MM(), Int8MMStatic(), Int8Pack(), Int4Pack(), Dequant(), Coded())

    def available(self) -> str | None:
        """Always: torch has a CPU, and each kernel checks for itself what it needs of this one."""
        return None


BACKEND: Backend = CpuBackend()
