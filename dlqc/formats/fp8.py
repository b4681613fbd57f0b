"""8-bit floating-point weights and activations, E4M3: w ≈ code · scale (Micikevicius et al., arXiv 2209.05433).

A code is a `torch.float8_e4m3fn`: 4 bits of exponent (bias 7), 3 of mantissa, no infinity, largest value 448, smallest
normal 2^-6, spacing 2^-9 below it. Codes are rounded to nearest, ties to even, and clamped to ±448.

    scale = max|w| / 448 over the tensor, the output channel or a block of 128 × 128; float32

(blocks at the right and lower edges may be smaller). As the largest weight becomes 448,

    |w - ŵ| ≤ max(2^-4·|w|, 2^-10·scale),

up to the rounding of float32: half a unit in the last place of a 4-bit significand, or half the spacing of subnormals.
Zeros are exact; a unit of zeros has scale 1. `quantize_tokens` does the same to activations, one scale per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dlqc.errors import ContractError, RecipeError, nearest
from dlqc.formats.contract import Part
from dlqc.formats.integer import _not_finite, _row_chunks
from dlqc.formats.packing import pack, packed_shape, unpack

Unit = Literal["tensor", "channel", "block"]

UNITS = ("tensor", "channel", "block")
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128


@dataclass(frozen=True)
class Fp8Format:
    """E4M3 weights.

    Attributes:
        unit: what shares a scale: "tensor", "channel" (a row of W) or "block" (128 × 128).
    """

    name: ClassVar[str] = "fp8"

    unit: Unit = "channel"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            remedy = nearest(self.unit, UNITS)
            raise RecipeError(f"scales cannot be shared by {self.unit!r}", where="unit", remedy=remedy)

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> Fp8Format().label, Fp8Format("block").label
        ('fp8 channel', 'fp8 block')
        """
        return f"fp8 {self.unit}"

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause."""
        return None if in_features > 0 else f"{in_features} input features cannot be stored"

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales of a [N, K] weight.

        >>> [Fp8Format(unit).scale_shape(300, 256) for unit in ("tensor", "channel", "block")]
        [(1, 1), (300, 1), (3, 2)]
        """
        if self.unit == "tensor":
            return 1, 1
        if self.unit == "channel":
            return out_features, 1
        return -(-out_features // BLOCK), -(-in_features // BLOCK)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K: codes and float32 scales.

        >>> Fp8Format().bits_per_weight(4096, 4096), Fp8Format("block").bits_per_weight(4096, 4096)
        (8.0078125, 8.001953125)
        """
        rows, columns = self.scale_shape(out_features, in_features)
        return 8 + 32 * rows * columns / (out_features * in_features)

    def quantize(self, weight: torch.Tensor) -> Fp8Weight:
        """Round `weight` [N, K] of any floating dtype to nearest."""
        count, width = weight.shape
        largest = torch.empty(count, self.scale_shape(count, width)[1], dtype=torch.float32, device=weight.device)
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32)
            if self.unit == "block":
                part = torch.nn.functional.pad(part, (0, -width % BLOCK)).reshape(len(part), -1, BLOCK)
            else:
                part = part.unsqueeze(1)
            largest[rows] = torch.linalg.vector_norm(part, torch.inf, dim=-1)
        if not bool(torch.isfinite(largest).all()):
            raise _not_finite(weight)
        if self.unit == "tensor":
            largest = largest.amax(dim=0, keepdim=True)
        elif self.unit == "block":
            largest = torch.nn.functional.pad(largest, (0, 0, 0, -count % BLOCK)).reshape(-1, BLOCK, largest.shape[1])
            largest = largest.amax(dim=1)
        scales = _scale(largest)
        codes = torch.empty(count, width, dtype=DTYPE, device=weight.device)
        for rows in _row_chunks(count, width):
            codes[rows] = _cast(weight[rows].to(torch.float32) / _spread(scales, self.unit, count, width, rows))
        return Fp8Weight(codes, scales, self)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        codes = (packed_shape(out_features, in_features, 8), torch.uint8)
        return {"codes": codes, "scales": (self.scale_shape(out_features, in_features), torch.float32)}

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> Fp8Weight:
        """The weight that `Fp8Weight.pack` was called on, K = `in_features`."""
        return Fp8Weight(unpack(parts["codes"], 8, in_features).view(DTYPE), parts["scales"], self)


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """An E4M3 weight [N, K].

    Attributes:
        codes: float8_e4m3fn [N, K].
        scales: float32, `format.scale_shape(N, K)`.
        format: the number format.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: Fp8Format

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != DTYPE:
            what = f"codes are {tuple(self.codes.shape)} {self.codes.dtype}, not [N, K] {DTYPE}"
            raise ContractError(what, where="codes")
        shape = self.format.scale_shape(*self.codes.shape)
        if self.scales.shape != shape or self.scales.dtype != torch.float32:
            found = f"{tuple(self.scales.shape)} {self.scales.dtype}"
            raise ContractError(f"scales are {found}, not {shape} torch.float32", where="scales")

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that the codes stand for: code · scale."""
        count, width = self.codes.shape
        weight = torch.empty(count, width, dtype=torch.float32, device=self.codes.device)
        for rows in _row_chunks(count, width):
            weight[rows] = self.codes[rows].float() * _spread(self.scales, self.format.unit, count, width, rows)
        return weight

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "codes" uint8 [N, K rounded up to 4], the bit patterns of the codes; "scales"."""
        return {"codes": pack(self.codes.view(torch.uint8), 8), "scales": self.scales}


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations `x` [..., K] of any floating dtype on the fly, one scale per token.

    As in `dlqc.formats.activation` nothing is checked here: a token with an infinity or a NaN has undefined codes.

    Returns:
        codes float8_e4m3fn [..., K]; scale float32 [..., 1], never zero; x ≈ code · scale.
    """
    exact = x.float()
    scale = _scale(torch.linalg.vector_norm(exact, torch.inf, dim=-1, keepdim=True))
    return _cast(exact / scale), scale


def _scale(largest: torch.Tensor) -> torch.Tensor:
    """1 in place of 0, and no scale below float32's smallest normal, so that w / scale stays finite."""
    return torch.where(largest == 0, 1.0, (largest / LARGEST).clamp(min=2.0**-126))


def _cast(values: torch.Tensor) -> torch.Tensor:
    """To E4M3, saturating: the plain conversion makes NaN of what rounds above 448."""
    return values.clamp(-LARGEST, LARGEST).to(DTYPE)


def _spread(scales: torch.Tensor, unit: Unit, count: int, width: int, rows: slice) -> torch.Tensor:
    """Scales that broadcast against the rows `rows` of a [N, K] weight."""
    if unit == "tensor":
        return scales
    if unit == "channel":
        return scales[rows]
    index = torch.arange(count, device=scales.device)[rows] // BLOCK
    return scales[index].repeat_interleave(BLOCK, dim=1)[:, :width]
