"""The contract of a number format for weights, and of a weight that is stored in it.

Integers (`dlqc.formats.integer`) have ops and kernels of their own, since hardware multiplies them. Every other format meets
this contract, and the compiler needs no more of it: what can be stored, which tensors that takes, and what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch

Part = tuple[tuple[int, ...], torch.dtype]


class StoredWeight(Protocol):
    """A weight [N, K] in some format."""

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that is stood for."""

    def pack(self) -> dict[str, torch.Tensor]:
        """All tensors that are stored, by role; `WeightFormat.unpack` undoes it."""


class WeightFormat(Protocol):
    """A frozen dataclass whose fields are the options; equal formats store alike."""

    name: ClassVar[str]

    @property
    def label(self) -> str:
        """A short name for reports."""

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause."""

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K: all tensors of `parts_of`, without the padding of packed rows."""

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each tensor that `StoredWeight.pack` gives for a [N, K] weight, by role."""

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> StoredWeight:
        """The weight that `StoredWeight.pack` was called on, K = `in_features`."""
