"""The CUDA backend: kernels in CUDA C++, built by the machine's own toolkit, then those of Triton, for GPUs of NVIDIA.

In order of preference:

    w4a8            4-bit weights by 8-bit activations, exactly
    sign_planes     sums of sign planes, activations in 16 bits
    integer, weight_only, coded_weights, planes   as of the Triton backend, for what these two do not take

A site that none of them takes is refused with every kernel's reason; nothing is run by its definition in their place.
Artifacts are independent of the backend: compile on any machine, then `dlqc.load(folder, backend="cuda")` on one with a GPU and
the CUDA toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from dlqc.backend import AnyKernel, Backend
from dlqc.backends.triton import BACKEND as TRITON
from dlqc.kernels.cuda import build
from dlqc.kernels.cuda.planes import SignPlanes
from dlqc.kernels.cuda.w4a8 import W4A8
from dlqc.weights import Weights


@dataclass(frozen=True)
class CudaBackend:
    """CUDA kernels on a GPU of NVIDIA, with Triton's behind them."""

    name: str = "cuda"
    kernels: tuple[AnyKernel, ...] = (W4A8(), SignPlanes(), *TRITON.kernels)

    merges: bool = True

    def fuse(self, graph: fx.Graph, weights: Weights) -> Mapping[str, int]:
        """Around products of Triton's kernels, as their own backend does it; those in CUDA C++ take nothing along."""
        return TRITON.fuse(graph, weights)

    def available(self) -> str | None:
        """None where torch sees a GPU of NVIDIA that is new enough and the CUDA toolkit's compiler is there."""
        return build.lacking()


BACKEND: Backend = CudaBackend()
