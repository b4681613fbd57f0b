"""Nested integer codes: one stored weight that is read in several widths.

A code of B bits is stored in planes, the upper bits first: planes "2+1+1" are a plane of 2 bits, and two of one bit. The upper
planes alone are a code of fewer bits, c_w = c >> (B - w), so that the weight is read in w = 2, 3 or 4 bits, and what is not
read is not touched. Each width has scales and offsets of its own:

    W ≈ c_w·s_w + o_w                  s_w, o_w float16 for each row and group of input features

    codes_i     plane i, [N, 4·⌈K·bits/32⌉] bytes, layout "rows"
    scales_i, offsets_i     of width i, [N, G] each

A code is the bin of equal width that a weight lies in: c = ⌊(w - lo)/(hi - lo)·2^B⌋, so that the bins of one width are halves
of those of the width below, which rounding to nearest would not give. s_w and o_w are the line through the weights over their
codes of least squares, never worse than the middles of the bins. The range lo … hi is that of the group shrunk by r, r the part
that has the least squared error, each width's relative to r = 1, on average over the widths.

Any-Precision LLM (arXiv 2402.10517) nests the codes of a table, and Matryoshka quantization (arXiv 2502.06786) those of integers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.formats.contract import Part
from dlqc.formats.integer import IntFormat, _not_finite, _row_chunks
from dlqc.formats.packing import pack, packed_shape, unpack

#: Parts of a group's range that are tried.
RANGES = tuple(1 - step / 20 for step in range(13))
_PLANES = re.compile(r"[1-8](\+[1-8])*")


@dataclass(frozen=True)
class NestedFormat:
    """Nested codes.

    Attributes:
        planes: bits of each plane, the upper first; the narrowest width has 2 bits or more, all together at most 8.
        group_size: input features that share a scale and offset; None means one for each output channel.
    """

    name: ClassVar[str] = "nested"

    planes: str = "2+1+1+4"
    group_size: int | None = 128

    def __post_init__(self) -> None:
        if not _PLANES.fullmatch(self.planes) or self.bits > 8 or self.widths[0] < 2:
            what = f"{self.planes!r} are no planes of 2 to 8 bits in all"
            raise RecipeError(what, where="planes", remedy="Write the bits of each, the upper first: '2+1+1+4'")
        IntFormat(4, self.group_size)  # a wrong group is refused here

    @property
    def counts(self) -> tuple[int, ...]:
        """Bits of each plane."""
        return tuple(map(int, self.planes.split("+")))

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that the weight can be read in, rising.

        >>> NestedFormat("4+2+1+1").widths
        (4, 6, 7, 8)
        """
        return tuple(itertools.accumulate(self.counts))

    @property
    def bits(self) -> int:
        """B, all planes together."""
        return self.widths[-1]

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> NestedFormat().label
        'nested int 2/3/4/8 g128'
        """
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"nested int {'/'.join(map(str, self.widths))} {group}"

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause."""
        return IntFormat(4, self.group_size).check(in_features)

    def groups(self, in_features: int) -> int:
        """G, the number of groups in a row; a FeasibilityError if the group does not divide."""
        return IntFormat(4, self.group_size).groups(in_features)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K, scales and offsets of all widths counted.

        >>> NestedFormat().bits_per_weight(4096, 4096)
        9.0
        """
        return self.bits + len(self.widths) * self.groups(in_features) * 32 / in_features

    def bits_read(self, width: int, in_features: int) -> float:
        """Bits per weight that are read at a width: its planes, and its own scales and offsets.

        >>> NestedFormat().bits_read(2, 4096)
        2.25
        """
        return width + self.groups(in_features) * 32 / in_features

    def quantize(self, weight: torch.Tensor) -> NestedWeight:
        """Round finite `weight` [N, K]; see the module docstring."""
        groups = self.groups(weight.shape[1])
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        shape = (len(self.widths), weight.shape[0], groups)
        scales = torch.empty(shape, dtype=torch.float16, device=weight.device)
        offsets = torch.empty_like(scales)
        for rows in _row_chunks(*weight.shape):
            part = weight[rows].to(torch.float32).reshape(-1, groups, weight.shape[1] // groups)
            least, most = torch.aminmax(part, dim=-1, keepdim=True)
            if not bool(torch.isfinite(least + most).all()):
                raise _not_finite(weight)
            best: torch.Tensor | None = None
            full: list[torch.Tensor] = []
            for ratio in RANGES:
                found = _bins(part, least * ratio, most * ratio, self.bits)
                fits = [
                    _line(part, found >> (self.bits - width), least * ratio, most * ratio, width)
                    for width in self.widths
                ]
                full = full or [error.clamp(min=1e-30) for *_, error in fits]
                error = sum(((e / f) for (*_, e), f in zip(fits, full, strict=True)), torch.zeros(()))
                better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
                best = error if best is None else torch.where(better, error, best)
                kept = codes[rows].reshape(part.shape)
                codes[rows] = torch.where(better.unsqueeze(-1), found.to(torch.uint8), kept).flatten(1)
                for i, (scale, offset, _) in enumerate(fits):
                    scales[i, rows] = torch.where(better, scale, scales[i, rows])
                    offsets[i, rows] = torch.where(better, offset, offsets[i, rows])
        if not bool((torch.isfinite(scales) & torch.isfinite(offsets)).all()):
            what = f"weights reach {weight.abs().max().item():.3g}: their scales do not fit float16"
            raise FeasibilityError(what, where="nested", remedy="Use integers, whose scales are bfloat16")
        return NestedWeight(codes, scales, offsets, self)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        shape, parts = (out_features, self.groups(in_features)), dict[str, Part]()
        for i, bits in enumerate(self.counts):
            parts[f"codes_{i}"] = (packed_shape(out_features, in_features, bits), torch.uint8)
            parts[f"scales_{i}"] = parts[f"offsets_{i}"] = (shape, torch.float16)
        return parts

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> NestedWeight:
        """The weight that `NestedWeight.pack` was called on, K = `in_features`."""
        planes = range(len(self.counts))
        codes = self.codes_at(parts, in_features, self.bits)
        scales, offsets = (torch.stack([parts[f"{role}_{i}"] for i in planes]) for role in ("scales", "offsets"))
        return NestedWeight(codes, scales, offsets, self)

    def codes_at(self, parts: Mapping[str, torch.Tensor], in_features: int, width: int) -> torch.Tensor:
        """Codes uint8 [N, K] of a width; the planes below are not looked at."""
        last = self.level(width)
        codes = unpack(parts["codes_0"], self.counts[0], in_features)
        for i, bits in enumerate(self.counts[1 : last + 1], 1):
            codes = (codes << bits) | unpack(parts[f"codes_{i}"], bits, in_features)
        return codes

    def weight_at(self, parts: Mapping[str, torch.Tensor], in_features: int, width: int) -> torch.Tensor:
        """The float32 weight [N, K] that is stood for when it is read in `width` bits."""
        i = self.level(width)
        return _values(self.codes_at(parts, in_features, width), parts[f"scales_{i}"], parts[f"offsets_{i}"])

    def level(self, width: int) -> int:
        """Number of a width, from 0 for the narrowest."""
        if width not in self.widths:
            known = ", ".join(map(str, self.widths))
            raise ContractError(f"{self.label} is not read in {width} bits", where="width", remedy=f"Use {known}")
        return self.widths.index(width)


@dataclass(frozen=True, eq=False)
class NestedWeight:
    """A weight [N, K] of nested codes, not packed.

    Attributes:
        codes: uint8 [N, K] of all planes.
        scales, offsets: float16 [widths, N, G].
        format: the number format.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    format: NestedFormat

    def at(self, width: int) -> torch.Tensor:
        """The float32 weight [N, K] in `width` bits."""
        i = self.format.level(width)
        return _values(self.codes >> (self.format.bits - width), self.scales[i], self.offsets[i])

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] in all bits."""
        return self.at(self.format.bits)

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "codes_i" for each plane, "scales_i" and "offsets_i" for each width."""
        parts: dict[str, torch.Tensor] = {}
        for i, (bits, width) in enumerate(zip(self.format.counts, self.format.widths, strict=True)):
            plane = (self.codes >> (self.format.bits - width)) & ((1 << bits) - 1)
            parts |= {f"codes_{i}": pack(plane, bits), f"scales_{i}": self.scales[i], f"offsets_{i}": self.offsets[i]}
        return {role: tensor.contiguous() for role, tensor in parts.items()}


def _values(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    grouped = codes.float().reshape(*scales.shape, -1)
    return grouped.mul_(scales.float().unsqueeze(-1)).add_(offsets.float().unsqueeze(-1)).reshape(codes.shape)


def _bins(part: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Which of 2^bits equal parts of [low, high] each number lies in, int32; outside the nearest."""
    size = (high - low).clamp(min=2.0**-126)
    return ((part - low) / size * (1 << bits)).floor_().clamp_(0, (1 << bits) - 1).int()


def _line(
    part: torch.Tensor, codes: torch.Tensor, low: torch.Tensor, high: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and offset, float16 [N, G], of the best line through numbers over their codes, and its squared error.

    The middles of the bins are the other candidate: where float16 spoils the line, or all codes are one.
    """
    c = codes.float()
    mean_c, mean_w = c.mean(-1, keepdim=True), part.mean(-1, keepdim=True)
    spread = (c - mean_c).square().sum(-1, keepdim=True)
    slope = torch.where(spread > 0, ((c - mean_c) * (part - mean_w)).sum(-1, keepdim=True) / spread, 0.0).half()
    step = ((high - low) / (1 << width)).half()
    found = []
    for scale, offset in ((slope, mean_w - slope.float() * mean_c), (step, low + step.float() / 2)):
        point = offset.half()
        error = (part - c * scale.float() - point.float()).square().sum(-1)
        found.append((scale.squeeze(-1), point.squeeze(-1), error))
    (s0, o0, e0), (s1, o1, e1) = found
    first = e0 <= e1
    return torch.where(first, s0, s1), torch.where(first, o0, o1), torch.where(first, e0, e1)
