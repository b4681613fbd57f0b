"""Intervals without SciPy: Student t over rows, Wilson over right and wrong answers.

Rows are the independent observations of a language model's scores; the tokens of a row are not. The t quantile is exact
(Abramowitz and Stegun 26.7.3 and 26.7.4), so an interval needs no resampling and has no noise of its own.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dlqc.errors import FeasibilityError


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95 % interval.

    Attributes:
        mean: in the unit of what was averaged.
        low: lower end.
        high: upper end.
        count: independent observations.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def brief(interval: Interval | None, digits: int) -> str:
    """An interval for a table; nothing where there is none."""
    if interval is None:
        return ""
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def mean_interval(values: Tensor) -> Interval:
    """Mean of independent values [R] with its two-sided 95 % t interval."""
    count = values.numel()
    if count < 2:
        raise FeasibilityError(
            f"{count} row gives no interval", where="rows", remedy="Measure at least two rows, better twenty"
        )
    data = values.double().cpu()
    half = t_quantile(count - 1) * float(data.std()) / math.sqrt(count)
    mean = float(data.mean())
    return Interval(mean, mean - half, mean + half, count)


def stratified_interval(strata: Sequence[tuple[float, Tensor]]) -> Interval:
    """Σ w·mean(x) over independent samples (w, x [n]), with its two-sided 95 % interval; x in one unit.

    Welch (1947) and Satterthwaite (1946): the variance is Σ w²·s²/n, its degrees of freedom
    (Σ w²·s²/n)² / Σ ((w²·s²/n)² / (n - 1)), rounded down. One sample of weight 1 gives `mean_interval`.

    Returns:
        the sum as `mean`; `count` is the size of all samples together.
    """
    if not strata or min(x.numel() for _, x in strata) < 2:
        raise FeasibilityError(
            "a sample of fewer than two values gives no interval", where="strata", remedy="Measure two rows or more"
        )
    parts = [(w * float(x.double().mean()), w * w * float(x.double().var()) / x.numel(), x.numel()) for w, x in strata]
    mean, variance = sum(m for m, _, _ in parts), sum(v for _, v, _ in parts)
    spread = sum(v * v / (n - 1) for _, v, n in parts)
    freedom = int(variance * variance / spread * (1 + 1e-12)) if spread > 0 else sum(n - 1 for _, _, n in parts)
    half = t_quantile(max(1, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, sum(n for _, _, n in parts))


@functools.cache
def t_quantile(freedom: int) -> float:
    """The t with P(|T| < t) = 0.95 for Student's T with whole degrees of freedom.

    >>> [round(t_quantile(n), 3) for n in (1, 2, 10, 23, 100000)]
    [12.706, 4.303, 2.228, 2.069, 1.96]
    """
    if freedom > 500:
        z = statistics.NormalDist().inv_cdf(0.975)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_mass(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def wilson(right: int, total: int) -> Interval:
    """A share with its two-sided 95 % score interval (Wilson 1927), which stays sensible at 0 and 1.

    >>> str(wilson(8, 10))
    '0.8000 [0.4902, 0.9433]'
    """
    if not 0 <= right <= total or total == 0:
        raise FeasibilityError(f"{right} right of {total}", where="total", remedy="Score at least one item")
    z = statistics.NormalDist().inv_cdf(0.975)
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), total)


def _central_mass(t: float, freedom: int) -> float:
    """P(|T| < t): finite trigonometric series in theta = atan(t / sqrt(freedom))."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    series = term if freedom > 1 else 0.0
    for k in range(2 if odd else 1, freedom - 2, 2):
        term *= cosine * cosine * k / (k + 1)
        series += term
    return (theta + sine * series) * 2 / math.pi if odd else sine * series
