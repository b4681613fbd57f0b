"""What pruning left: one bit a weight that says whether it is stored, and the stored ones, in row-major order.

    mask     one bit per weight                                    [N, 4·⌈K/32⌉] bytes, layout "rows"
    values   the kept weights: codes of `bits`, one dense run      [1, 4·⌈S·bits/32⌉] bytes, S = kept weights of the matrix
             or bfloat16 numbers, with bits=16                     [S]
    scales, zeros   as of integers, by group of all K columns      [N, G], and zeros packed (not with bits=16)

Stored as a dense matrix, zeros cost what other numbers cost: pruning alone saves nothing. Here a weight costs 1 + density·bits
and its share of scales: at half the weights and 4 bits in groups of 128 3.16 with zero points, against 4.16 dense; at 16 bits 9.

n:m patterns need no layout of their own: for 2:4, two positions of 2 bits per group of four are one bit a weight, too; for 4:8,
three bits a position are more than the mask. A kernel for hardware that multiplies 2:4 matrices gets the positions from it.

A kept weight may be rounded to zero; it is stored nevertheless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dlqc.errors import ContractError, RecipeError
from dlqc.formats.contract import Part
from dlqc.formats.integer import SCALE_DTYPES, IntFormat, QuantizedWeight, _not_finite
from dlqc.formats.packing import pack, packed_shape, unpack

PLAIN = 16


@dataclass(frozen=True)
class SparseFormat:
    """A mask and the kept weights.

    Attributes:
        bits: of a kept weight: 2, 3, 4 or 8 for integers, 16 for bfloat16.
        group_size, symmetric: of integers, as in `IntFormat`; a group counts pruned columns, too. No say with bits=16.
        density: share of the weights that are kept. A weight knows its own; None in a recipe, where pruning decides.
    """

    name: ClassVar[str] = "sparse"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    density: float | None = None

    def __post_init__(self) -> None:
        if self.bits != PLAIN:
            self.integers  # noqa: B018  a wrong width or group is refused here
        elif (self.group_size, self.symmetric) not in ((128, False), (None, True)):
            what = "bfloat16 numbers have neither groups nor zero points"
            raise RecipeError(what, where="bits", remedy="Write sparse(bits=16)")
        else:
            object.__setattr__(self, "group_size", None)  # one format, one text
            object.__setattr__(self, "symmetric", True)
        if self.density is not None and not 0 <= self.density <= 1:
            what = f"a density of {self.density} is not within 0 and 1"
            raise RecipeError(what, where="density", remedy="Leave it out: pruning decides")

    @property
    def integers(self) -> IntFormat:
        """The format of kept weights that are integers, of the width of the whole matrix."""
        return IntFormat(self.bits, self.group_size, self.symmetric)

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> SparseFormat().label, SparseFormat(16, None, True, 0.5).label
        ('sparse int4 g128 asymmetric', 'sparse bfloat16 50%')
        """
        plain = "bfloat16" if self.bits == PLAIN else self.integers.label
        return f"sparse {plain}" + ("" if self.density is None else f" {100 * self.density:g}%")

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause."""
        return None if self.bits == PLAIN else self.integers.check(in_features)

    def kept(self, out_features: int, in_features: int) -> int:
        """S, the weights of a [N, K] matrix that are stored.

        >>> SparseFormat(density=0.5).kept(4096, 11008)
        22544384
        """
        return round((1.0 if self.density is None else self.density) * out_features * in_features)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K, but for the padding of runs to words.

        >>> SparseFormat(density=0.5).bits_per_weight(4096, 4096)
        3.15625
        """
        total = out_features * in_features + self.kept(out_features, in_features) * self.bits
        if self.bits != PLAIN:
            per_group = 8 * SCALE_DTYPES[self.integers.scale_dtype].itemsize + (0 if self.symmetric else self.bits)
            total += out_features * self.integers.groups(in_features) * per_group
        return total / (out_features * in_features)

    def quantize(self, weight: torch.Tensor) -> SparseWeight:
        """Round the weights that are not zero to nearest; they are what is kept."""
        kept = weight != 0
        if self.bits != PLAIN:
            return self.store(self.integers.quantize(weight), kept)
        if not bool(torch.isfinite(weight.to(torch.bfloat16)).all()):
            raise _not_finite(weight)
        return self.store(weight.to(torch.bfloat16), kept)

    def store(self, rounded: QuantizedWeight | torch.Tensor, kept: torch.Tensor) -> SparseWeight:
        """The kept ones of a rounded weight [N, K]."""
        exact = replace(self, density=int(kept.sum()) / max(kept.numel(), 1))
        if isinstance(rounded, torch.Tensor):
            return SparseWeight(kept, rounded[kept], None, None, exact)
        return SparseWeight(kept, rounded.codes[kept], rounded.scales, rounded.zeros, exact)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        count = self.kept(out_features, in_features)
        parts: dict[str, Part] = {"mask": (packed_shape(out_features, in_features, 1), torch.uint8)}
        if self.bits == PLAIN:
            return {**parts, "values": ((count,), torch.bfloat16)}
        groups = self.integers.groups(in_features)
        parts |= {"values": (packed_shape(1, count, self.bits), torch.uint8)}
        parts |= {"scales": ((out_features, groups), SCALE_DTYPES[self.integers.scale_dtype])}
        return (
            parts
            if self.symmetric
            else {**parts, "zeros": (packed_shape(out_features, groups, self.bits), torch.uint8)}
        )

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> SparseWeight:
        """The weight that `SparseWeight.pack` was called on, K = `in_features`."""
        kept = unpack(parts["mask"], 1, in_features).bool()
        if self.bits == PLAIN:
            return SparseWeight(kept, parts["values"], None, None, self)
        values = unpack(parts["values"], self.bits, self.kept(*kept.shape))[0]
        scales, packed = parts["scales"], parts.get("zeros")
        zeros = None if packed is None else unpack(packed, self.bits, scales.shape[1])
        return SparseWeight(kept, values, scales, zeros, self)


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A pruned weight [N, K].

    Attributes:
        kept: bool [N, K].
        values: of the kept weights in row-major order: codes uint8 [S], or bfloat16 [S].
        scales, zeros: of the codes, as in `QuantizedWeight`.
        format: with the density of this weight.
    """

    kept: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    format: SparseFormat

    def __post_init__(self) -> None:
        found = int(self.kept.sum())
        if self.values.shape != (found,) or self.format.kept(*self.kept.shape) != found:
            what = f"the mask keeps {found} weights, {self.format.kept(*self.kept.shape)} are said to be, {len(self.values)} came"
            raise ContractError(what, where="values", remedy="Use the tensors that pack() of the weight gave")

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that is stood for."""
        if self.scales is None:
            return torch.zeros(self.kept.shape, dtype=torch.float32).masked_scatter(self.kept, self.values.float())
        # The rest stands at the zero point, so that it is exactly zero.
        points = (
            None if self.zeros is None else self.zeros.repeat_interleave(self.kept.shape[1] // self.scales.shape[1], 1)
        )
        middle = torch.full(self.kept.shape, self.format.integers.midpoint, dtype=torch.uint8)
        codes = (middle if points is None else points).masked_scatter(self.kept, self.values)
        return QuantizedWeight(codes, self.scales, self.zeros, self.format.integers).dequantize()

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "mask", "values", and of integers "scales" and "zeros"."""
        parts = {"mask": pack(self.kept.to(torch.uint8), 1)}
        if self.scales is None:
            return {**parts, "values": self.values}
        parts |= {"values": pack(self.values.unsqueeze(0), self.format.bits), "scales": self.scales}
        return parts if self.zeros is None else {**parts, "zeros": pack(self.zeros, self.format.bits)}
