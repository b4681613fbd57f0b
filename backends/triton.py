"""The Triton backend: kernels for GPUs of NVIDIA and AMD, and nothing else.

In order of preference:

    integer         weights of 4 and 8 bits by 8-bit activations, exactly
    weight_only     weights of 2, 3, 4 and 8 bits, activations in 16 bits
    coded_weights   NF4, codebooks and FP8, activations in 16 bits
    planes          sums of sign planes, activations in 16 bits

Linears that read one input run as one call, and products take what is around them along (triton_fusion.py).

A site that none of them takes is refused with every kernel's reason; nothing is run by its definition in their place.
Artifacts are independent of the backend: compile on any machine, then `dlqc.load(folder, backend="triton")` on one with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dlqc.backend import AnyKernel, Backend
from dlqc.backends.triton_fusion import fuse
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.coded import CodedWeights
from dlqc.kernels.triton.integer import Integer
from dlqc.kernels.triton.planes import Planes
from dlqc.kernels.triton.weight_only import WeightOnly
from dlqc.weights import Weights


@dataclass(frozen=True)
class TritonBackend:
    """Triton kernels on a GPU."""

    name: str = "triton"
    kernels: tuple[AnyKernel, ...] = (Integer(), WeightOnly(), CodedWeights(), Planes())

    merges: bool = True

    def fuse(self, graph: fx.Graph, weights: Weights) -> dict[str, int]:
        """Norms, gates, Hadamard blocks and sums around products."""
        return fuse(graph, weights)

    def available(self) -> str | None:
        """None where Triton is installed and torch sees a GPU that it can use (or kernels are interpreted)."""
        return runtime.unavailable()


BACKEND: Backend = TritonBackend()
