"""4-bit floating-point weights in small blocks: MXFP4 (OCP Microscaling Formats v1.0) and NVFP4.

An element is E2M1, one of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}: code = sign·8 + position in that list. Elements are rounded to
nearest, ties to the even mantissa (0.25 → 0, 0.75 → 1, 1.25 → 1, 1.75 → 2, 2.5 → 2, 3.5 → 4, 5 → 4), and what is larger than
6 becomes 6. Negative numbers that round to zero keep their sign.

mxfp4   blocks of 32; a scale is a power of two, 2^(s - 127), stored as E8M0, s in a byte. With m = max|w| of the block,

            rounding "floor":  s - 127 = floor(log₂ m) - 2            (OCP v1.0, section 6.3)
            rounding "even":   the same, one more if m ≥ 1.75·2^floor(log₂ m)

        "floor" clamps elements between 6 and 8 scales to 6; "even" (compressed-tensors) widens the block where its largest
        element would round to 8. s is within 0 and 252; a block of zeros has s = 0. 4.25 bits a weight.

nvfp4   blocks of 16; a scale is E4M3, s, under one float32 factor g of the tensor: w ≈ element · s / g with

            g = 448·6 / max|W|,   s = E4M3(g·m / 6), at least 2^-9.

        g as compressed-tensors has it ("global scale"); 1/g is the tensor scale of others. compressed-tensors stores
        1/8 in place of an s that rounds to zero, here it is the smallest there is. 4.5 bits a weight, and 32 for g.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dlqc.errors import ContractError, FeasibilityError, RecipeError, nearest
from dlqc.formats.contract import Part
from dlqc.formats.integer import _not_finite, _row_chunks
from dlqc.formats.packing import pack, packed_shape, unpack

Kind = Literal["mxfp4", "nvfp4"]
Rounding = Literal["floor", "even"]

BLOCKS = {"mxfp4": 32, "nvfp4": 16}
ROUNDINGS = ("floor", "even")
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# 6 · 2^(252 - 127) is the largest float32 that is 6 times a power of two: what is larger is clamped to it.
TOP_EXPONENT = 252
E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9


@dataclass(frozen=True)
class MicroscalingFormat:
    """MXFP4 or NVFP4.

    Attributes:
        kind: "mxfp4" or "nvfp4".
        rounding: how the exponents of mxfp4 are chosen, "floor" or "even"; nvfp4 ignores it.
    """

    name: ClassVar[str] = "microscaling"

    kind: Kind = "mxfp4"
    rounding: Rounding = "floor"

    def __post_init__(self) -> None:
        if self.kind not in BLOCKS:
            raise RecipeError(f"unknown kind {self.kind!r}", where="kind", remedy=nearest(self.kind, BLOCKS))
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"unknown rounding {self.rounding!r}", where="rounding", remedy="Use 'floor' or 'even'")

    @property
    def block(self) -> int:
        """Input features that share a scale."""
        return BLOCKS[self.kind]

    @property
    def scale_dtype(self) -> torch.dtype:
        """uint8 for the exponents of mxfp4, float8_e4m3fn for nvfp4."""
        return torch.uint8 if self.kind == "mxfp4" else torch.float8_e4m3fn

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> MicroscalingFormat().label, MicroscalingFormat("nvfp4").label, MicroscalingFormat(rounding="even").label
        ('mxfp4', 'nvfp4', 'mxfp4 even')
        """
        return self.kind + (" even" if self.kind == "mxfp4" and self.rounding == "even" else "")

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause.

        >>> MicroscalingFormat().check(48), MicroscalingFormat("nvfp4").check(48)
        ('48 input features do not divide by 32, the block of mxfp4', None)
        """
        if in_features > 0 and in_features % self.block == 0:
            return None
        return f"{in_features} input features do not divide by {self.block}, the block of {self.kind}"

    def blocks(self, in_features: int) -> int:
        """Blocks in a row; a FeasibilityError if the block does not divide."""
        reason = self.check(in_features)
        if reason is not None:
            raise FeasibilityError(reason, where="kind", remedy="Use another format, or exclude it with skip=")
        return in_features // self.block

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K.

        >>> MicroscalingFormat().bits_per_weight(64, 64), MicroscalingFormat("nvfp4").bits_per_weight(64, 64)
        (4.25, 4.5078125)
        """
        self.blocks(in_features)
        factor = 32 / (out_features * in_features) if self.kind == "nvfp4" else 0
        return 4 + 8 / self.block + factor

    def quantize(self, weight: torch.Tensor) -> MicroscalingWeight:
        """Round `weight` [N, K] of any floating dtype to nearest."""
        count, width = weight.shape
        blocks = self.blocks(width)
        largest = torch.empty(count, blocks, dtype=torch.float32, device=weight.device)
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32).reshape(-1, blocks, self.block)
            largest[rows] = torch.linalg.vector_norm(part, torch.inf, dim=-1)
        if not bool(torch.isfinite(largest).all()):
            raise _not_finite(weight)
        factor = None if self.kind == "mxfp4" else _factor(largest)
        scales = self._exponents(largest) if factor is None else _local_scales(largest, factor)
        codes = torch.empty(count, width, dtype=torch.uint8, device=weight.device)
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32).reshape(-1, blocks, self.block)
            if factor is None:
                # Exact: powers of two, 2^127 at most. The smallest scale, 2^-127, is subnormal: no quotient by it.
                unit = part * torch.exp2(127.0 - scales[rows].float()).unsqueeze(-1)
            else:
                unit = part / (scales[rows].float() / factor).unsqueeze(-1)
            codes[rows] = encode(unit).reshape(-1, width)
        return MicroscalingWeight(codes, scales, factor, self)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        codes = (packed_shape(out_features, in_features, 4), torch.uint8)
        parts = {"codes": codes, "scales": ((out_features, self.blocks(in_features)), self.scale_dtype)}
        return parts if self.kind == "mxfp4" else {**parts, "factor": ((1,), torch.float32)}

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> MicroscalingWeight:
        """The weight that `MicroscalingWeight.pack` was called on, K = `in_features`."""
        return MicroscalingWeight(unpack(parts["codes"], 4, in_features), parts["scales"], parts.get("factor"), self)

    def _exponents(self, largest: torch.Tensor) -> torch.Tensor:
        """E8M0 scales, uint8."""
        mantissa, exponent = torch.frexp(largest)  # largest = mantissa · 2^exponent, mantissa in [0.5, 1)
        stored = exponent - 1 - 2 + 127
        if self.rounding == "even":
            stored = stored + (mantissa >= 0.875)
        return torch.where(largest == 0, 0, stored).clamp(0, TOP_EXPONENT).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class MicroscalingWeight:
    """An MXFP4 or NVFP4 weight [N, K], not packed.

    Attributes:
        codes: uint8 [N, K], E2M1 bit patterns, 0 to 15.
        scales: [N, K/block], uint8 exponents (mxfp4) or float8_e4m3fn (nvfp4).
        factor: g, float32 [1], for nvfp4; else None.
        format: the number format.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    factor: torch.Tensor | None
    format: MicroscalingFormat

    def __post_init__(self) -> None:
        count, width = self.codes.shape
        shape = (count, self.format.blocks(width))
        if self.codes.dtype != torch.uint8:
            raise ContractError(f"codes are {self.codes.dtype}, not torch.uint8", where="codes")
        if self.scales.shape != shape or self.scales.dtype != self.format.scale_dtype:
            found = f"{tuple(self.scales.shape)} {self.scales.dtype}"
            raise ContractError(f"scales are {found}, not {shape} {self.format.scale_dtype}", where="scales")
        if (self.factor is None) != (self.format.kind == "mxfp4"):
            verb = "has no" if self.format.kind == "mxfp4" else "needs a"
            raise ContractError(f"a weight in {self.format.label} {verb} factor", where="factor")
        if self.factor is not None and (self.factor.shape != (1,) or self.factor.dtype != torch.float32):
            found = f"{tuple(self.factor.shape)} {self.factor.dtype}"
            raise ContractError(f"the factor is {found}, not (1,) torch.float32", where="factor")

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that the codes stand for."""
        count, width = self.codes.shape
        table = values().to(self.codes.device)
        if self.factor is None:
            scales = torch.exp2(self.scales.float() - 127)
        else:
            scales = self.scales.float() / self.factor
        weight = torch.empty(count, width, dtype=torch.float32, device=self.codes.device)
        for rows in _row_chunks(count, width):
            part = table.index_select(0, self.codes[rows].flatten().int()).reshape(-1, self.format.block)
            weight[rows] = part.mul_(scales[rows].reshape(-1, 1)).reshape(-1, width)
        return weight

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "codes" as in `dlqc.formats.packing`, "scales", and "factor" for nvfp4."""
        parts = {"codes": pack(self.codes, 4), "scales": self.scales}
        return parts if self.factor is None else parts | {"factor": self.factor}


def values() -> torch.Tensor:
    """The values of the sixteen E2M1 codes, float32 [16]."""
    positive = torch.tensor(MAGNITUDES)
    return torch.cat([positive, -positive])


def encode(unit: torch.Tensor) -> torch.Tensor:
    """E2M1 codes, uint8, of finite or infinite float32 numbers: nearest, ties to even, saturating.

    Below 2 codes count halves, up to 4 they count ones from 2 on, above that twos: round(x / step) + offset.
    """
    size = unit.abs()
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.clamp_(max=7).to(torch.uint8) + (torch.signbit(unit).to(torch.uint8) << 3)


def _factor(largest: torch.Tensor) -> torch.Tensor:
    """g, float32 [1]: 1 for a weight of zeros, and finite for one of denormals."""
    top = largest.amax().reshape(1)
    return torch.where(top == 0, 1.0, (E4M3_LARGEST * MAGNITUDES[-1] / top).clamp(max=2.0**126))


def _local_scales(largest: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    wanted = factor * (largest / MAGNITUDES[-1])
    return wanted.clamp(E4M3_SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
