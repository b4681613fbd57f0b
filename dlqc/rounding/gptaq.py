"""GPTAQ: GPTQ against the output of the full-precision model (asymmetric calibration; Li et al., arXiv 2504.02692).

By the time a layer is rounded, rounding before it has turned its inputs from x₀ into x. GPTQ keeps W·x; what the model
should compute is W·x₀. With H = Σ c·x·xᵀ + λI and the drift D = Σ c·(x₀ - x)·xᵀ [K, K], the errors E = W - Ŵ have

    Σ c·‖Ŵx - Wx₀‖² + λ·‖E‖² = tr(E H Eᵀ) + 2·tr(W D Eᵀ) + const
                             = tr((W*-Ŵ) H (W*-Ŵ)ᵀ) + const,      W* = W + W·D·H⁻¹,

so this is GPTQ of W*, the weight that without rounding would undo the drift as far as its inputs allow. λ draws to W.

The paper's algorithm (section 4) is greedy in this term, too: having rounded column j, it moves the columns after j
against the drift of input j alone. Left out is how columns rounded early can make up for drifts of later inputs: in P =
(D·Uᵀ ⊙ M)·U, H⁻¹ = UᵀU, the mask M keeps what lies above the diagonal; with no mask, P would be D·H⁻¹. And it corrects
for the drift with the weight as changed so far. Here the correction is the whole one, of W as it was, known before the first
column is rounded; on the same grid its objective is less (`tests/rounding/test_gptaq.py` compares both).

D is a difference of two large sums, estimated on the calibration rows; `alpha` scales the correction W* - W. The paper's
equations have alpha = 1, its code and the tools that took it over 0.25.

What rounding did inside the same block is drift, too: `quantize_weights(sequential="layer")` shows it to the layers behind, as
the authors' code does; with "block" only what the blocks before did is corrected.

Cost beyond GPTQ: 2·K³ flops for D·H⁻¹ of linears that read the same input, 2·N·K² a linear, a second stream of states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlqc.errors import CalibrationError, RecipeError
from dlqc.rounding.contract import Rounded
from dlqc.rounding.gptq import MEASURED, Gptq, gptq, on_kept, sample_rows
from dlqc.rounding.hessian import COLUMNS, Factor, divide, energy, factorize, sqnr_db


@dataclass(frozen=True)
class Gptaq(Gptq):
    """GPTAQ: the options of GPTQ, and

    Attributes:
        alpha: share of the correction for drifted inputs that is made; 0 is GPTQ.
    """

    name: ClassVar[str] = "gptaq"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian", "drift"})

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            what = f"a correction of {self.alpha} times the drift is not within 0 and 1"
            raise RecipeError(what, where="alpha", remedy="Use 1, or 0.25 as the authors' code does")

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Factorize the Hessian and divide the drift by it once for all linears that read the same input."""
        hessian, drift = stats.get("hessian"), stats.get("drift")
        if hessian is None or not isinstance(drift, torch.Tensor):
            return stats
        factor = hessian
        if not isinstance(factor, Factor):
            factor = factorize(factor, act_order=self.act_order, damp=self.damp, dtype=torch.float32)
        return {**stats, "hessian": factor, "drift": Correction(drift_over_hessian(drift, factor))}

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        """Round W*.

        Metrics are GPTQ's, of W*; but `sqnr_db` is of W on the inputs as they are, as for all methods, and
        `correction_db` tells how small the correction is, 10·log10(tr(W H Wᵀ) / tr((W*-W) H (W*-W)ᵀ)).
        """
        if not isinstance(stats.get("drift"), Correction):
            for name in ("hessian", "drift"):
                if stats.get(name) is None:
                    what = f"gptaq needs the statistic {name!r}"
                    raise CalibrationError(what, remedy="Collect it, or use rounding 'gptq'")
            stats = self.prepare(stats)
        factor, found = stats["hessian"], stats["drift"]
        exact = weight.float()
        correction = self.alpha * (exact @ found.matrix)
        rounded = on_kept(fmt, stats, lambda grid, kept: gptq(exact + correction, factor, grid, self, kept=kept))
        rows = sample_rows(exact, MEASURED)
        noise = energy(exact - rounded.weight.dequantize(), factor.hessian, rows)
        signal, moved = (energy(part, factor.hessian, rows) for part in (exact, correction))
        metrics = {"sqnr_db": sqnr_db(signal, noise), "correction_db": sqnr_db(signal, moved)}
        return Rounded(rounded.weight, rounded.metrics | metrics)


@dataclass(frozen=True, eq=False)
class Correction:
    """D·H⁻¹ [K, K], float32."""

    matrix: torch.Tensor


def drift_over_hessian(drift: torch.Tensor, factor: Factor) -> torch.Tensor:
    """D·H⁻¹ of the damped H, float32 [K, K]; rows are solved for COLUMNS at a time."""
    width = len(factor.order)
    if drift.shape != (width, width):
        what = f"the drift is {' by '.join(map(str, drift.shape))}, the Hessian of {width} input features"
        raise CalibrationError(what, where="drift", remedy="Use the statistics of this layer")
    if not bool(torch.isfinite(drift.sum(dtype=torch.float64))):
        remedy = "The layer's input overflowed: calibrate in bfloat16 or float32"
        raise CalibrationError("the drift is not finite", where="drift", remedy=remedy)
    solved = torch.empty(width, width, dtype=torch.float32, device=drift.device)
    for start in range(0, width, COLUMNS):
        solved[start : start + COLUMNS] = divide(drift[start : start + COLUMNS], factor)
    return solved
