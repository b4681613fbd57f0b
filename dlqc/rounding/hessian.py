"""The second moment of a layer's input, H = Σ c·x·xᵀ [K, K]: output energy under it, and its ordered, damped factor.

The output error of a rounded weight on the inputs that H was summed over is Σ c·‖(W - Ŵ)x‖² = tr(E H Eᵀ), E = W - Ŵ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dlqc.errors import CalibrationError

# Columns of H taken at a time: a block of it is converted to the dtype of the weight, or copied.
COLUMNS = 1024

# Columns of a panel of the factor, whose diagonal block is inverted; rows of H that are gathered at a time, which stay
# in the second-level cache.
PANEL = 128
ROWS = 32

SQNR_CAP_DB = 300.0
MAX_DAMP = 10.0


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
        size = stop - start
        product = torch.addmm(rows[:, start:stop] @ block[:, :size], rows[:, stop:], block[:, size:].mT, alpha=2)
        total += product.mul_(rows[:, start:stop]).sum(dim=1, dtype=torch.float64)
    return total


def energy(rows: torch.Tensor, hessian: torch.Tensor, sample: torch.Tensor) -> float:
    """tr(X H Xᵀ) of all rows X [n, K], estimated on the rows with the indices `sample`; exact if these are all.

    The sum over the sample is scaled by the ratio of Σ_k x_k²·H_kk over all rows to that over the sample (a ratio
    estimate): n·K operations in place of n·K².
    """
    found = output_energy(rows[sample], hessian).sum().item()
    if len(sample) == len(rows):
        return found
    diagonal = (hessian.diagonal() / hessian.diagonal().max()).to(rows.dtype)
    share = torch.cat([part.square() @ diagonal for part in torch.split(rows, ROWS)]).double()
    part = share[sample].sum().item()
    return found * share.sum().item() / part if part > 0 else 0.0


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal / noise), held within ±300 so that it can be written as JSON; 300 for no noise."""
    if noise <= 0:
        return SQNR_CAP_DB
    if signal <= 0:
        return -SQNR_CAP_DB
    return min(max(10 * math.log10(signal / noise), -SQNR_CAP_DB), SQNR_CAP_DB)


@dataclass(frozen=True, eq=False)
class Factor:
    """A damped Hessian, ordered and factorized. Linears that read the same input (q, k, v; gate, up) can share it.

    Attributes:
        hessian: the undamped H [K, K] it was made from (not a copy).
        order: [K], the columns of W in reversed order of rounding.
        upper: [K, K], upper triangular, upperᵀ·upper = H[order][:, order] + λI.
        ridge: λ.
        damp: λ over the mean of H's positive diagonal elements.
        tries: factorizations it took to find a damping that works.
        act_order: whether columns are rounded in order of falling diagonal.
    """

    hessian: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor
    ridge: float
    damp: float
    tries: int
    act_order: bool

    @property
    def pivots(self) -> torch.Tensor:
        """Diagonal of `upper`, float64 [K]."""
        return self.upper.diagonal().double()


def factorize(
    hessian: torch.Tensor, *, act_order: bool = True, damp: float = 0.01, dtype: torch.dtype = torch.float64
) -> Factor:
    """Order, damp and factorize H [K, K], symmetric.

    With `act_order`, columns with a large diagonal element are rounded first; else they are rounded as they stand.

    Starts at λ = damp · mean(positive diagonal) and multiplies it by 10 until the factorization succeeds and its
    smallest squared pivot is above K·2⁻⁵²·max(diagonal). A column whose input was always zero is left with λ alone,
    which makes it independent of the others: it is rounded to nearest.

    With dtype=float32 the factor is kept in float32 and what is off the diagonal of its panels is multiplied in it: half
    the memory and half the time. The error of an element is then about √K·2⁻²⁴ of the diagonal elements that it joins;
    where a squared pivot is not far above that, the factor is made in float64 after all.

    Raises:
        CalibrationError: H is not finite, zero, or not positive even if damped.
    """
    diagonal = hessian.diagonal().double()
    if not bool(torch.isfinite(hessian.sum(dtype=torch.float64))):
        remedy = "The layer's input overflowed: calibrate in bfloat16 or float32"
        raise CalibrationError("the Hessian is not finite", where="hessian", remedy=remedy)
    live = diagonal[diagonal != 0]
    if live.numel() == 0:
        remedy = "Check that calibration reaches this layer and that its token weights are not all zero"
        raise CalibrationError("the Hessian is zero", where="hessian", remedy=remedy)
    mean, largest = live.mean().item(), live.max().item()
    forward = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    order = torch.arange(len(diagonal), device=diagonal.device).flip(0) if forward is None else forward.flip(0)
    tries = 0
    while bool(live.min() > 0) and damp <= MAX_DAMP:
        tries += 1
        ridge = damp * mean
        least = {
            torch.float32: 8 * len(order) ** 0.5 * 2.0**-24 * (diagonal[order] + ridge),
            torch.float64: torch.full_like(diagonal, len(order) * 2.0**-52 * largest),
        }
        for kept in dict.fromkeys((dtype, torch.float64)):
            upper = _cholesky(hessian, order, ridge, kept)
            if upper is not None and bool((upper.diagonal().double().square() > least[kept]).all()):
                return Factor(hessian, order, upper, ridge, damp, tries, act_order)
        damp = max(10 * damp, 1e-6)
    what = f"the Hessian is not positive, even damped by {MAX_DAMP:g} times its mean diagonal"
    raise CalibrationError(what, where="hessian", remedy="It must be Σ c·x·xᵀ with c ≥ 0: check the token weights")


def _cholesky(hessian: torch.Tensor, order: torch.Tensor, ridge: float, dtype: torch.dtype) -> torch.Tensor | None:
    """Upper triangular U, UᵀU = H[order][:, order] + ridge·I, or None.

    Panel after panel from the top (left-looking): what the rows above contribute to a panel is one product with a long
    inner dimension, in `dtype`; the rest is float64. Memory: U and one panel.
    """
    width = len(order)
    upper = torch.zeros(width, width, dtype=dtype, device=hessian.device)
    for start in range(0, width, PANEL):
        stop = min(width, start + PANEL)
        panel = _gather(hessian, order[start:stop], order[start:])
        panel.diagonal().add_(ridge)
        if start:
            panel -= upper[:start, start:stop].mT @ upper[:start, start:]
        size = stop - start
        corner, info = torch.linalg.cholesky_ex(panel[:, :size], upper=True)
        if int(info) != 0 or not bool(torch.isfinite(corner).all()):
            return None
        upper[start:stop, start:stop] = corner
        upper[start:stop, stop:] = _inverse(corner).mT @ panel[:, size:]
    return upper


def _gather(hessian: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """H[rows][:, columns] in float64; whole rows are copied, and then read in the order of the columns."""
    parts = [hessian.index_select(0, part).gather(1, columns.expand(len(part), -1)) for part in torch.split(rows, ROWS)]
    return torch.cat(parts).double()


def _inverse(corner: torch.Tensor) -> torch.Tensor:
    """Of an upper triangular matrix. Products with it run many times faster than substitution."""
    unit = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
    found: torch.Tensor = torch.linalg.solve_triangular(corner, unit, upper=True)
    return found


def divide(rows: torch.Tensor, factor: Factor) -> torch.Tensor:
    """X·(H + λI)⁻¹ for rows X [n, K], in the dtype of the factor."""
    upper = factor.upper
    found = rows.index_select(1, factor.order).to(upper.dtype)
    panels = [(start, min(len(upper), start + PANEL)) for start in range(0, len(upper), PANEL)]
    corners = [_inverse(upper[start:stop, start:stop].double()).to(upper.dtype) for start, stop in panels]
    for (start, stop), corner in zip(panels, corners, strict=True):
        ahead = found[:, start:stop] - found[:, :start] @ upper[:start, start:stop]
        found[:, start:stop] = ahead @ corner
    for (start, stop), corner in reversed(list(zip(panels, corners, strict=True))):
        ahead = found[:, start:stop] - found[:, stop:] @ upper[start:stop, stop:].mT
        found[:, start:stop] = ahead @ corner.mT
    return torch.empty_like(found).index_copy_(1, factor.order, found)
