"""A matrix of low rank beside a quantized weight: y + (x·Bᵀ)·Aᵀ, the difference of weights being A·B, A [N, r], B [r, K].

Both factors are stored with the rank first, Aᵀ [r, N] and B [r, K], in 16 bits, or in 8: integers (`dlqc.formats.integer`) with
one scale for each of the r rows, so that a direction's own size decides how finely it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import ContractError, RecipeError
from dlqc.formats.coded import misfit, parse
from dlqc.formats.contract import Part
from dlqc.formats.integer import SCALE_DTYPES, IntFormat, QuantizedWeight

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.uint8}
_INT8 = IntFormat(8, None)


@dataclass(frozen=True)
class LowRankFormat:
    """How the factors are stored.

    Attributes:
        rank: r.
        dtype: "bfloat16", "float16" or "int8".
    """

    name: ClassVar[str] = "low_rank"

    rank: int
    dtype: str = "int8"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"a rank of {self.rank} is none", where="rank", remedy="Use 16, or leave low_rank out")
        if self.dtype not in DTYPES:
            remedy = f"Use {', '.join(DTYPES)}"
            raise RecipeError(f"factors cannot be stored as {self.dtype!r}", where="dtype", remedy=remedy)

    def check(self, out_features: int, in_features: int) -> str | None:
        """None if a [N, K] matrix can have the rank, else the reason it cannot, one clause.

        >>> LowRankFormat(65).check(64, 256)
        'a [64, 256] matrix has no rank of 65'
        """
        if self.rank <= min(out_features, in_features):
            return None
        return f"a [{out_features}, {in_features}] matrix has no rank of {self.rank}"

    def bits(self, out_features: int, in_features: int) -> int:
        """Stored bits.

        >>> LowRankFormat(16).bits(4096, 4096) / 4096**2, LowRankFormat(16, "bfloat16").bits(4096, 4096) / 4096**2
        (0.062530517578125, 0.125)
        """
        parts = self.parts_of(out_features, in_features).values()
        return sum(8 * shape[0] * shape[1] * dtype.itemsize for shape, dtype in parts)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor, by role."""
        dtype, scale = DTYPES[self.dtype], SCALE_DTYPES[_INT8.scale_dtype]
        parts: dict[str, Part] = {}
        for role, width in (("left", out_features), ("right", in_features)):
            parts[role] = ((self.rank, width), dtype)
            if self.dtype == "int8":
                parts[f"{role}_scales"] = ((self.rank, 1), scale)
        return parts

    def store(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of Aᵀ [r, N] and B [r, K], by role."""
        parts: dict[str, torch.Tensor] = {}
        for role, factor in (("left", left), ("right", right)):
            if self.dtype == "int8":
                rounded = _INT8.quantize(factor)
                parts |= {role: rounded.codes, f"{role}_scales": rounded.scales}
            else:
                parts[role] = factor.to(DTYPES[self.dtype]).contiguous()
        return parts

    def factors(self, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Aᵀ [r, N] and B [r, K] that the stored tensors stand for, float32."""
        if self.dtype != "int8":
            return parts["left"].float(), parts["right"].float()
        left, right = (QuantizedWeight(parts[r], parts[f"{r}_scales"], None, _INT8) for r in ("left", "right"))
        return left.dequantize(), right.dequantize()


def low_rank_format(spec: str) -> LowRankFormat:
    """The format that `dlqc.formats.coded.spell` spelled; a ContractError if it is none.

    >>> low_rank_format("low_rank(rank=16,dtype=int8)")
    LowRankFormat(rank=16, dtype='int8')
    """
    fmt: LowRankFormat = parse(spec, {LowRankFormat.name: LowRankFormat})
    return fmt


def low_rank_fault(spec: str, parts: Sequence[torch.Tensor], out_features: int, in_features: int) -> str | None:
    """None if `parts`, in sorted order of roles, are the factors of a [N, K] matrix, else what is wrong, one clause."""
    try:
        fmt = low_rank_format(spec)
    except ContractError as error:
        return error.what
    reason = fmt.check(out_features, in_features)
    return reason or misfit(spec, fmt.parts_of(out_features, in_features), parts)
