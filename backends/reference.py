"""The reference backend: every quantized linear by its definition. Slow; what the other backends are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from dlqc.backend import AnyKernel, Backend
from dlqc.kernels.reference.coded import Coded
from dlqc.kernels.reference.linear import ReferenceLinear


@dataclass(frozen=True)
class ReferenceBackend:
    """Plain PyTorch, on any device."""

    name: str = "reference"
    kernels: tuple[AnyKernel, ...] = (ReferenceLinear(), Coded())
    merges: bool = False

    def available(self) -> str | None:
        return None


BACKEND: Backend = ReferenceBackend()
