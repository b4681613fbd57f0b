"""Integer codes under a real zero point: w ≈ code · scale + offset, a scale and an offset for each group.

Shapes: W is [N, K]; a group is `group_size` neighbours along K, G = K / group_size groups a row (G = 1 for one per channel).
Codes are unsigned, in [0, T] with T = 2^bits - 1. Next to `dlqc.formats.integer`, whose zero points are codes themselves:

    offset = -zero · scale,   zero any real number:   a grid can be moved by a part of a step, and a group of positive weights
                                                      alone need not reach down to zero. Zero is then no value of the grid.

    offset = min w,   scale = (max w - min w) / T,   code = clamp(round((w - offset) / scale), 0, T)

Both are rounded to `scale_dtype` first and codes are computed with the rounded ones. A group of zeros, and one of a single
value that `scale_dtype` holds, are stored exactly.

It is what HQQ rounds to (`dlqc.rounding.hqq`), and the arithmetic of GGUF's Q4_1. Kernels for integers multiply by
code - zero in whole numbers, so this is a format of its own: dequantized at each call, and not for compressed-tensors, which
stores zero points as integers. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import ContractError, FeasibilityError
from dlqc.formats.contract import Part
from dlqc.formats.integer import SCALE_DTYPES, IntFormat, _not_finite, _row_chunks
from dlqc.formats.packing import pack, packed_shape, unpack


@dataclass(frozen=True)
class OffsetFormat:
    """Integer codes with a real zero point.

    Attributes:
        bits: width of a code, 2, 3, 4 or 8.
        group_size: input features that share a scale and an offset; None means one of each per output channel.
        scale_dtype: "bfloat16", "float16" or "float32", of scales and offsets.
    """

    name: ClassVar[str] = "offset"

    bits: int
    group_size: int | None = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        IntFormat(
            self.bits, self.group_size, scale_dtype=self.scale_dtype
        )  # refuses what is wrong, with the option's name

    @property
    def top(self) -> int:
        """The largest code, T = 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """`scale_dtype` as torch has it."""
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> OffsetFormat(4).label, OffsetFormat(2, None).label
        ('int4 g128 real zero', 'int2 channel real zero')
        """
        return f"{IntFormat(self.bits, self.group_size).label} real zero"

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause.

        >>> OffsetFormat(4, group_size=96).check(11008)
        '11008 input features do not divide by group 96'
        """
        return IntFormat(self.bits, self.group_size).check(in_features)

    def groups(self, in_features: int) -> int:
        """G, the number of groups in a row; a FeasibilityError if the group does not divide."""
        return IntFormat(self.bits, self.group_size).groups(in_features)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K: codes, scales and offsets (not the padding of packed rows to words).

        >>> OffsetFormat(4).bits_per_weight(4096, 4096), OffsetFormat(4, 64).bits_per_weight(4096, 4096)
        (4.25, 4.5)
        """
        return self.bits + self.groups(in_features) * 16 * self.dtype.itemsize / in_features

    def parameters(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and offsets [N, G] in `scale_dtype` that cover the range of each group of finite `weight` [N, K]."""
        least, most = torch.aminmax(self.grouped(weight), dim=-1)
        if not bool(torch.isfinite(least + most).all()):
            raise _not_finite(weight)
        # The smallest scale: not zero in `scale_dtype`, and normal in float32 so that w / scale stays finite.
        floor = 2.0**-24 if self.scale_dtype == "float16" else 2.0**-126
        step = ((most - least) / self.top).clamp(min=floor)
        scales = self.stored(torch.where(least == most, 1.0, step))
        return scales, self.stored(least)

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [N, K] as float32 [N, G, K/G]."""
        return weight.to(torch.float32).reshape(weight.shape[0], self.groups(weight.shape[1]), -1)

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        """Float32 scales or offsets in `scale_dtype`."""
        rounded = values.to(self.dtype)
        if not bool(torch.isfinite(rounded).all()):
            what = f"a scale or offset of {values.abs().max().item():.3g} does not fit {self.scale_dtype}"
            raise FeasibilityError(what, where="scale_dtype", remedy="Use 'bfloat16' or 'float32'")
        return rounded

    def encode(self, weight: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Round `weight` [N, K] to the nearest codes, uint8 [N, K]. Weights outside the range take its end."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in _row_chunks(*weight.shape):
            scale, offset = (part[rows].float().unsqueeze(-1) for part in (scales, offsets))
            level = (self.grouped(weight[rows]) - offset) / scale
            if not bool(torch.isfinite(level.sum())):
                raise _not_finite(weight)
            codes[rows] = level.round_().clamp_(0, self.top).reshape(-1, weight.shape[1]).to(torch.uint8)
        return codes

    def quantize(self, weight: torch.Tensor) -> OffsetWeight:
        """Round `weight` [N, K] to nearest with parameters chosen by `parameters`."""
        scales, offsets = self.parameters(weight)
        return OffsetWeight(self.encode(weight, scales, offsets), scales, offsets, self)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        shape = (out_features, self.groups(in_features))
        codes = (packed_shape(out_features, in_features, self.bits), torch.uint8)
        return {"codes": codes, "scales": (shape, self.dtype), "offsets": (shape, self.dtype)}

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> OffsetWeight:
        """The weight that `OffsetWeight.pack` was called on, K = `in_features`."""
        return OffsetWeight(unpack(parts["codes"], self.bits, in_features), parts["scales"], parts["offsets"], self)


@dataclass(frozen=True, eq=False)
class OffsetWeight:
    """A weight [N, K] of integer codes with real zero points, not packed.

    Attributes:
        codes: uint8 [N, K], in [0, 2^bits).
        scales, offsets: [N, G] in `format.scale_dtype`.
        format: the number format.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    format: OffsetFormat

    def __post_init__(self) -> None:
        shape = (self.codes.shape[0], self.format.groups(self.codes.shape[1]))
        if self.codes.dtype != torch.uint8:
            raise ContractError(f"codes are {self.codes.dtype}, not torch.uint8", where="codes")
        for name, part in (("scales", self.scales), ("offsets", self.offsets)):
            if part.shape != shape or part.dtype != self.format.dtype:
                found = f"{tuple(part.shape)} {part.dtype}"
                raise ContractError(f"{name} are {found}, not {shape} {self.format.dtype}", where=name)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that the codes stand for: code · scale + offset."""
        values = self.codes.float().reshape(*self.scales.shape, -1)
        scales, offsets = (part.float().unsqueeze(-1) for part in (self.scales, self.offsets))
        return values.mul_(scales).add_(offsets).reshape(self.codes.shape)

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "codes" as in `dlqc.formats.packing`, "scales", "offsets"."""
        return {"codes": pack(self.codes, self.format.bits), "scales": self.scales, "offsets": self.offsets}
