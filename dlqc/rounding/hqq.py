"""HQQ: half-quadratic quantization, without data (Badri and Shaji 2023, mobiusml.github.io/hqq_blog).

A group's zero point z is moved so that few weights err much rather than all a little: the sum of |w - ŵ|^p, p < 1. With the
error split off as an auxiliary e, whose distance from w - ŵ costs β/2·(e - (w - ŵ))², both are solved for in turn:

    q = clamp(round(w/s + z), 0, T),      ŵ = s·(q - z)
    e ← shrink(w - ŵ),                    shrink(x) = sign(x)·max(0, |x| - |x|^(p-1)/β)
    z ← mean over the group of  q - (w - e)/s,      β ← κ·β

Scales stay those of the range. The z of the start and of every iteration are candidates, and each group keeps the one with the
least Σ|w - ŵ| as it is stored, so no group gets worse than nearest rounding on that measure.

z is real. Among whole numbers the alternation does not leave its start: it moves z by a fraction of a step, which rounds
away. So `Hqq` rounds to `OffsetFormat`, and not to integers with integer zero points.

Units. β compares with the size of an error: below |x| = β^(-1/(2-p)), 0.17 for β = 10, the shrinkage is zero. Weights
hardly ever err that much, so that in the published form (unit="weight") e is 0 and what is left is the mean of the errors,
least squares. unit="step" measures errors in steps of the group's scale, where they are at most ½ and the shrinkage acts;
the result is then the same for any multiple of the weight.

Differences from the package (hqq 0.2.8): it stops for all groups at once, at the first iteration in which the mean error over
the matrix does not fall, and keeps the z of that iteration; it leaves β as it was, κ = 1; and it rounds scales and offsets to
16 bits only when all is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dlqc.errors import RecipeError
from dlqc.formats.contract import WeightFormat
from dlqc.formats.integer import IntFormat, _row_chunks
from dlqc.formats.offset import OffsetFormat, OffsetWeight
from dlqc.rounding.contract import Rounded, Rounding

# Beyond this the shrinkage changes nothing in float32, and β must stay finite.
_LARGEST_BETA = 1e30


@dataclass(frozen=True)
class Hqq(Rounding):
    """Half-quadratic quantization.

    Attributes:
        p: exponent of the error that is minimised, below 1; 1 shrinks by a constant.
        beta, kappa: β at the start, and what it grows by in each iteration.
        iterations: of the alternation; 0 rounds to nearest.
        unit: what an error is measured in, see the module docstring; "weight" is as published.

    Metrics: `error`, Σ|w - ŵ| over Σ|w|, and `error_rtn`, the same before the first iteration.
    """

    name: ClassVar[str] = "hqq"
    takes: ClassVar[tuple[type[Any], ...]] = (OffsetFormat,)

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    unit: Literal["step", "weight"] = "step"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise RecipeError(f"an exponent of {self.p} is not within 0 and 1", where="p", remedy="Use 0.7")
        if not 0 < self.beta < float("inf"):
            raise RecipeError(f"a weight of {self.beta} is no positive number", where="beta", remedy="Use 10")
        if not 1 <= self.kappa < float("inf"):
            raise RecipeError(f"β cannot grow by a factor of {self.kappa}", where="kappa", remedy="Use 1.01")
        if self.iterations < 0:
            what = f"{self.iterations} iterations are impossible"
            raise RecipeError(what, where="iterations", remedy="Use 20, or 0 for nearest rounding")
        if self.unit not in ("step", "weight"):
            raise RecipeError(f"unknown unit {self.unit!r}", where="unit", remedy="Use 'step' or 'weight'")

    def refusal(self, fmt: IntFormat | WeightFormat) -> str | None:
        if isinstance(fmt, IntFormat):
            return f"hqq moves zero points by parts of a step, and those of {fmt.label} are whole numbers"
        return super().refusal(fmt)

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        assert isinstance(fmt, OffsetFormat)
        scales, offsets = fmt.parameters(weight)
        before = after = total = 0.0
        for rows in _row_chunks(*weight.shape):
            part, scale = fmt.grouped(weight[rows]), scales[rows].float()
            best, least, start = self.search(part, scale, offsets[rows].float(), fmt)
            offsets[rows] = best.to(offsets.dtype)
            before += float((start * scale).sum(dtype=torch.float64))
            after += float((least * scale).sum(dtype=torch.float64))
            total += float(part.abs().sum(dtype=torch.float64))
        found = OffsetWeight(fmt.encode(weight, scales, offsets), scales, offsets, fmt)
        unit = total if total > 0 else 1.0
        return Rounded(found, {"error": after / unit, "error_rtn": before / unit})

    def search(
        self, part: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, fmt: OffsetFormat
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best offset of each group [rows, G] of `part` [rows, G, g], its Σ|w - ŵ| in steps, and that of the start."""
        unit = part / scale.unsqueeze(-1)
        zero, beta = -offset / scale, self.beta
        best, start = offset, _distance(unit, zero, fmt.top)
        least = start
        for _ in range(self.iterations):
            zero = self.step(unit, zero, scale, beta, fmt.top)
            beta = min(beta * self.kappa, _LARGEST_BETA)
            stored = (-zero * scale).to(fmt.dtype).float()
            distance = _distance(unit, -stored / scale, fmt.top)
            best = torch.where(distance < least, stored, best)
            least = torch.minimum(distance, least)
        return best, least, start

    def step(self, unit: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, beta: float, top: int) -> torch.Tensor:
        """One iteration: zero points [...] from those before, of weights `unit` [..., g] in steps of `scale` [...]."""
        code = (unit + zero.unsqueeze(-1)).round_().clamp_(0, top)
        error = unit + zero.unsqueeze(-1) - code
        size = error.abs() if self.unit == "step" else error.abs() * scale.unsqueeze(-1)
        # |x|^(p-1) of an error of zero is infinite: it shrinks to zero.
        kept = (size - size.pow(self.p - 1) / beta).clamp_(min=0)
        kept = kept if self.unit == "step" else kept / scale.unsqueeze(-1)
        shrunk = torch.copysign(kept, error)
        return (code - unit + shrunk).mean(dim=-1)


def _distance(unit: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Σ|w - ŵ| of each group in steps of its scale."""
    aim = unit + zero.unsqueeze(-1)
    return (aim - aim.round().clamp_(0, top)).abs_().sum(dim=-1)
