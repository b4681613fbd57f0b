"""NormalFloat weights at 4 bits with double quantization (QLoRA, Dettmers et al., arXiv 2305.14314).

Levels. Sixteen values in [-1, 1] for weights that are Gaussian inside a block: with Φ⁻¹ the normal quantile function,
p = 1 - (1/32 + 1/30)/2 and linspace including both ends,

    eight of at most 0:  -Φ⁻¹(linspace(p, ½, 8)),    nine of at least 0:  Φ⁻¹(linspace(p, ½, 9)),

0 once, and all divided by Φ⁻¹(p), so that -1, 0 and 1 are exact. p halves the probability beyond the outermost level
between 32 and 30 parts.

Blocks of `block` neighbours along K have the scale a = max|w|, code = nearest level to w/a, ŵ = level·a.

Double quantization of the A = N·K/block scales, taken row after row: their mean m (float32) is subtracted, and each
`scale_block` of them in turn have the scale b = max|a - m| (float32) and 8-bit codes for (a - m)/b: the dynamic tree
(Dettmers, arXiv 1511.04561; "dynamic" in bitsandbytes), 0, 1 and ±10^(e-6)·f for e = 0 … 6, f the midpoints of 2^e equal
parts of [0.1, 1]. Weights are coded with the scales as they are stored, a step that bitsandbytes leaves out; levels,
tables and the meaning of what is stored are the same, packed order is not: element 0 is in the low bits here.

    bits per weight = 4 + 8/block + 32/(block·scale_block) + 32/(N·K) = 4.127 for 64 and 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch

from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.formats.contract import Part
from dlqc.formats.integer import _not_finite, _row_chunks
from dlqc.formats.packing import pack, packed_shape, unpack


@dataclass(frozen=True)
class Nf4Format:
    """4-bit NormalFloat.

    Attributes:
        block: input features that share a scale.
        scale_block: scales that share a scale of their own; None stores scales in float32.
    """

    name: ClassVar[str] = "nf4"

    block: int = 64
    scale_block: int | None = 256

    def __post_init__(self) -> None:
        if self.block < 1:
            what = f"a block of {self.block} input features is impossible"
            raise RecipeError(what, where="block", remedy="Use 64")
        if self.scale_block is not None and self.scale_block < 1:
            what = f"a block of {self.scale_block} scales is impossible"
            raise RecipeError(what, where="scale_block", remedy="Use 256, or None for float32 scales")

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> Nf4Format().label, Nf4Format(128, None).label
        ('nf4 g64 double', 'nf4 g128')
        """
        return f"nf4 g{self.block}" + ("" if self.scale_block is None else " double")

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause.

        >>> Nf4Format().check(100)
        '100 input features do not divide by block 64'
        """
        if in_features > 0 and in_features % self.block == 0:
            return None
        return f"{in_features} input features do not divide by block {self.block}"

    def blocks(self, in_features: int) -> int:
        """Blocks in a row; a FeasibilityError if the block does not divide."""
        reason = self.check(in_features)
        if reason is not None:
            raise FeasibilityError(reason, where="block", remedy="Use a divisor, or exclude it with skip=")
        return in_features // self.block

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K: codes, scales, their scales and mean.

        >>> round(Nf4Format().bits_per_weight(4096, 4096), 3), Nf4Format(64, None).bits_per_weight(4096, 4096)
        (4.127, 4.5)
        """
        scales = out_features * self.blocks(in_features)
        total = 4 * out_features * in_features
        if self.scale_block is None:
            total += 32 * scales
        else:
            total += 8 * scales + 32 * -(-scales // self.scale_block) + 32
        return total / (out_features * in_features)

    def quantize(self, weight: torch.Tensor) -> Nf4Weight:
        """Round `weight` [N, K] of any floating dtype to the nearest levels."""
        count, width = weight.shape
        scales = torch.empty(count, self.blocks(width), dtype=torch.float32, device=weight.device)
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32).reshape(-1, scales.shape[1], self.block)
            scales[rows] = torch.linalg.vector_norm(part, torch.inf, dim=-1)
        if not bool(torch.isfinite(scales).all()):
            raise _not_finite(weight)
        found = self._store(scales)
        stored = found.block_scales()
        middle = [(low + high) / 2 for low, high in pairwise(_LEVELS)]
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32).reshape(-1, scales.shape[1], self.block)
            # The scale of a block far smaller than all others may be stored as 0 or below: the nearest level to w/a is
            # right for a negative a too.
            unit = part / torch.where(stored[rows] == 0, 1.0, stored[rows]).unsqueeze(-1)
            codes = (unit > middle[0]).to(torch.uint8)
            for bound in middle[1:]:
                codes += unit > bound
            found.codes[rows] = codes.reshape(-1, width)
        return found

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        shape = (out_features, self.blocks(in_features))
        codes = (packed_shape(out_features, in_features, 4), torch.uint8)
        if self.scale_block is None:
            return {"codes": codes, "scales": (shape, torch.float32)}
        runs = -(-shape[0] * shape[1] // self.scale_block)
        double: dict[str, Part] = {"scale_scales": ((runs,), torch.float32), "scale_mean": ((1,), torch.float32)}
        return {"codes": codes, "scales": (shape, torch.uint8), **double}

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> Nf4Weight:
        """The weight that `Nf4Weight.pack` was called on, K = `in_features`."""
        codes = unpack(parts["codes"], 4, in_features)
        return Nf4Weight(codes, parts["scales"], parts.get("scale_scales"), parts.get("scale_mean"), self)

    def _store(self, scales: torch.Tensor) -> Nf4Weight:
        """Scales [N, A/N] as they are stored, with codes that are not filled in yet."""
        codes = torch.empty(len(scales), scales.shape[1] * self.block, dtype=torch.uint8, device=scales.device)
        if self.scale_block is None:
            return Nf4Weight(codes, scales, None, None, self)
        mean = scales.mean(dtype=torch.float64).float()
        flat = (scales - mean).flatten()
        runs = -(-flat.numel() // self.scale_block)
        padded = torch.nn.functional.pad(flat, (0, runs * self.scale_block - flat.numel())).reshape(runs, -1)
        largest = torch.linalg.vector_norm(padded, torch.inf, dim=1)
        unit = padded / torch.where(largest == 0, 1.0, largest).unsqueeze(1)
        table = dynamic_tree().to(scales.device)
        middle = (table[1:] + table[:-1]) / 2
        chosen = torch.bucketize(unit, middle).to(torch.uint8).flatten()[: flat.numel()]
        return Nf4Weight(codes, chosen.reshape(scales.shape), largest, mean.reshape(1), self)


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A NormalFloat weight [N, K], not packed.

    Attributes:
        codes: uint8 [N, K], numbers of levels, 0 to 15.
        scales: float32 [N, K/block], or their codes, uint8, in `dynamic_tree`.
        scale_scales: float32 [ceil(N·K/block/scale_block)], or None if scales are float32.
        scale_mean: float32 [1], or None if scales are float32.
        format: the number format.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scale_scales: torch.Tensor | None
    scale_mean: torch.Tensor | None
    format: Nf4Format

    def __post_init__(self) -> None:
        count, width = self.codes.shape
        shape = (count, self.format.blocks(width))
        double = self.format.scale_block
        dtype = torch.float32 if double is None else torch.uint8
        if self.codes.dtype != torch.uint8:
            raise ContractError(f"codes are {self.codes.dtype}, not torch.uint8", where="codes")
        if self.scales.shape != shape or self.scales.dtype != dtype:
            found = f"{tuple(self.scales.shape)} {self.scales.dtype}"
            raise ContractError(f"scales are {found}, not {shape} {dtype}", where="scales")
        expected = () if double is None else ((-(-shape[0] * shape[1] // double),), (1,))
        found_shapes = tuple(tuple(x.shape) for x in (self.scale_scales, self.scale_mean) if x is not None)
        if found_shapes != expected:
            what = f"scales of scales and their mean are {found_shapes or 'missing'}, not {expected or 'wanted'}"
            raise ContractError(what, where="scale_scales")

    def block_scales(self) -> torch.Tensor:
        """The scales of the blocks, float32 [N, K/block]."""
        if self.scale_scales is None or self.scale_mean is None or self.format.scale_block is None:
            return self.scales
        values = dynamic_tree().to(self.scales.device)[self.scales.flatten().long()]
        own = self.scale_scales.repeat_interleave(self.format.scale_block)[: values.numel()]
        return torch.addcmul(self.scale_mean, values, own).reshape(self.scales.shape)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that the codes stand for: level · scale."""
        table = levels().to(self.codes.device)
        scales = self.block_scales()
        weight = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        for rows in _row_chunks(*self.codes.shape):
            values = table.index_select(0, self.codes[rows].flatten().int())
            weight[rows] = (
                values.reshape(-1, self.format.block).mul_(scales[rows].reshape(-1, 1)).reshape_as(weight[rows])
            )
        return weight

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "codes" as in `dlqc.formats.packing`, "scales", and "scale_scales", "scale_mean" if double."""
        parts = {"codes": pack(self.codes, 4), "scales": self.scales}
        if self.scale_scales is not None and self.scale_mean is not None:
            parts |= {"scale_scales": self.scale_scales, "scale_mean": self.scale_mean}
        return parts


def _normal_levels() -> list[float]:
    outermost = 1 - (1 / 32 + 1 / 30) / 2

    def quantiles(count: int) -> torch.Tensor:
        found: torch.Tensor = torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float64))
        return found

    return (torch.cat([-quantiles(8), quantiles(9)[:-1].flip(0)]) / quantiles(2)[0]).tolist()


_LEVELS = tuple(_normal_levels())


def levels() -> torch.Tensor:
    """The sixteen levels, float32 [16], rising."""
    return torch.tensor(_LEVELS)


@cache
def dynamic_tree() -> torch.Tensor:
    """The 256 values of the 8-bit code of scales, float32 [256], rising. Shared: do not write to it."""
    positive = []
    for exponent in range(7):
        parts = 1 << exponent
        positive += [10.0 ** (exponent - 6) * (0.1 + 0.9 * (i + 0.5) / parts) for i in range(parts)]
    return torch.tensor(sorted([0.0, 1.0, *positive, *(-value for value in positive)]))
