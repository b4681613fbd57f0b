"""Round to nearest, and the measure of what any rounding cost.

Each weight goes to the nearest code of its group. The layer's output error for inputs x with H = Σ c·x·xᵀ is

    Σ c·‖(W - Ŵ) x‖² = tr(E H Eᵀ),   E = W - Ŵ,

and 10·log10(tr(W H Wᵀ) / tr(E H Eᵀ)) is the output signal-to-noise ratio in dB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import RecipeError
from dlqc.formats.integer import Clip, IntFormat
from dlqc.rounding.contract import Rounded, Rounding

# Columns of H taken at a time: a block of it is converted to float32, and the product has this many columns.
COLUMNS = 1024

SQNR_CAP_DB = 300.0


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

    def round(self, weight: torch.Tensor, fmt: IntFormat, stats: Mapping[str, torch.Tensor]) -> Rounded:
        rounded = fmt.quantize(weight, clip=self.clip)
        hessian = stats.get("hessian")
        if hessian is None:
            return Rounded(rounded)
        exact = weight.float()
        noise = output_energy(exact - rounded.dequantize(), hessian).sum().item()
        signal = output_energy(exact, hessian).sum().item()
        return Rounded(rounded, {"sqnr_db": sqnr_db(signal, noise), "loss": noise})


def output_energy(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """xᵀ H x for each row x of `rows` [n, K], float64 [n]; H [K, K] symmetric.

    Products run in the dtype of `rows` (float32: relative error about 1e-6 of ‖x‖²·‖H‖), sums over columns in float64.
    The blocks right of the diagonal count twice in place of those left of it, which halves the work to n·K² flops.
    """
    width = hessian.shape[0]
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, width, COLUMNS):
        stop = min(width, start + COLUMNS)
        block = hessian[start:stop, start:].to(rows.dtype)
        block[:, stop - start :] *= 2
        total += (rows[:, start:] @ block.mT).mul_(rows[:, start:stop]).sum(dim=1, dtype=torch.float64)
    return total


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal / noise), held within ±300 so that it can be written as JSON; 300 for no noise."""
    if noise <= 0:
        return SQNR_CAP_DB
    if signal <= 0:
        return -SQNR_CAP_DB
    return min(max(10 * math.log10(signal / noise), -SQNR_CAP_DB), SQNR_CAP_DB)
