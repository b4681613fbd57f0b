"""The CPU backend: native code where it can be built, else what torch itself has, and a fallback that takes everything.

In order of preference:

    linear8         native: integer activations, weights of 2, 3, 4 and 8 bits, exactly
    int8_mm         integer activations and per-channel weights: torch's own product of integers, exactly
    int8_mm_static  the same for activations with fixed scales, and for them alone
    linear16        native: activations in floating point
    int8pack        8-bit per-channel weights, bfloat16 product
    int4pack        2- to 4-bit weights, bfloat16 product
    dequant         whatever is left of integers
    coded16         native: normal floats, codebooks, sign planes
    coded           other formats that are not integers, by their definition

A head that is not quantized has an op for token and confidence without logits (head_argmax), quantized caches have native codes.

Linears that read one input run as one call, and calls of linear8 take norms, gates and residual sums around them along (fused8).

Of torch's ops no two in bfloat16 compete (they differ in bits); int8_mm goes before them because its sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dlqc.backend import AnyKernel, Backend
from dlqc.backends.cpu_fusion import fuse
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.coded16 import Coded16
from dlqc.kernels.cpu.dequant import Dequant
from dlqc.kernels.cpu.int4pack import Int4Pack
from dlqc.kernels.cpu.int8_mm import Int8MM
from dlqc.kernels.cpu.int8_mm_static import Int8MMStatic
from dlqc.kernels.cpu.int8pack import Int8Pack
from dlqc.kernels.cpu.linear8 import Linear8
from dlqc.kernels.cpu.linear16 import Linear16
from dlqc.kernels.reference.coded import Coded
from dlqc.weights import Weights


@dataclass(frozen=True)
class CpuBackend:
    """Native kernels and the ops of torch, on the CPU."""

    name: str = "cpu"
    kernels: tuple[AnyKernel, ...] = (
        Linear8(),
        Int8MM(),
        Int8MMStatic(),
        Linear16(),
        Int8Pack(),
        Int4Pack(),
        Dequant(),
        Coded16(),
        Coded(),
    )
    merges: bool = True

    def fuse(self, graph: fx.Graph, weights: Weights) -> dict[str, int]:
        """Norms, gates and sums around calls of linear8."""
        return fuse(graph, weights)

    def available(self) -> str | None:
        """Always: torch has a CPU, and each kernel checks for itself what it needs of this one."""
        build.begin(build.options())
        return None


BACKEND: Backend = CpuBackend()
