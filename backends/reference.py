"""The reference backend: every quantized linear by its definition. Slow; what the other backends are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dlqc.backend import AnyKernel, Backend
from dlqc.kernels.reference.coded import Coded
from dlqc.kernels.reference.linear import ReferenceLinear
from dlqc.weights import Weights


@dataclass(frozen=True)
class ReferenceBackend:
    """Plain PyTorch, on any device."""

    name: str = "reference"
    kernels: tuple[AnyKernel, ...] = (ReferenceLinear(), Coded())
    merges: bool = False

    def fuse(self, graph: fx.Graph, weights: Weights) -> dict[str, int]:
        """Nothing: each op is its own definition here."""
        return {}

    def available(self) -> str | None:
        return None


BACKEND: Backend = ReferenceBackend()
