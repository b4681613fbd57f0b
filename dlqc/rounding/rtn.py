"""Round to nearest: each weight goes to the nearest code of its group, whatever the others do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlqc.errors import RecipeError
from dlqc.formats.integer import Clip, IntFormat
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.hessian import output_energy, sqnr_db


@dataclass(frozen=True)
class Rtn(Rounding):
    """Round to nearest.

    Attributes:
        clip: "minmax" covers each group's whole range; "mse" shrinks it to the smallest squared error.

    `stats` never changes the result. If it has a "hessian" [K, K], the metrics have `sqnr_db` and `loss`, tr(E H Eᵀ).
    """

    name: ClassVar[str] = "rtn"

    clip: Clip = "minmax"

    def __post_init__(self) -> None:
        if self.clip not in ("minmax", "mse"):
            raise RecipeError(f"unknown clip {self.clip!r}", where="clip", remedy="Use 'minmax' or 'mse'")

    def round(self, weight: torch.Tensor, fmt: IntFormat, stats: Mapping[str, Any]) -> Rounded:
        rounded = fmt.quantize(weight, clip=self.clip)
        hessian = stats.get("hessian")
        if hessian is None:
            return Rounded(rounded)
        exact = weight.float()
        noise = output_energy(exact - rounded.dequantize(), hessian).sum().item()
        signal = output_energy(exact, hessian).sum().item()
        return Rounded(rounded, {"sqnr_db": sqnr_db(signal, noise), "loss": noise})
