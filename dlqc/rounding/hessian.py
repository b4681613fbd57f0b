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
    diagonal = hessian.diagonal().to(rows.dtype)
    share = torch.linalg.vector_norm(rows * diagonal.clamp_min(0).sqrt(), dim=1, dtype=torch.float64).square()
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
        upper: float64 [K, K], upper triangular, upperᵀ·upper = H[order][:, order] + λI.
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


def factorize(hessian: torch.Tensor, *, act_order: bool = True, damp: float = 0.01) -> Factor:
    """Order, damp and factorize H [K, K], of which only one triangle is read.

    With `act_order`, columns with a large diagonal element are rounded first; else they are rounded as they stand.

    Starts at λ = damp · mean(positive diagonal) and multiplies it by 10 until the factorization succeeds and its
    smallest squared pivot is above K·2⁻⁵²·max(diagonal). A column whose input was always zero is left with λ alone,
    which makes it independent of the others: it is rounded to nearest.
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
        upper = _cholesky(hessian, order, damp * mean)
        if upper is not None and bool(upper.diagonal().square().min() > len(diagonal) * 2.0**-52 * largest):
            return Factor(hessian, order, upper, damp * mean, damp, tries, act_order)
        damp = max(10 * damp, 1e-6)
    what = f"the Hessian is not positive, even damped by {MAX_DAMP:g} times its mean diagonal"
    raise CalibrationError(what, where="hessian", remedy="It must be Σ c·x·xᵀ with c ≥ 0: check the token weights")


def _cholesky(hessian: torch.Tensor, order: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """Upper triangular float64 U, UᵀU = H[order][:, order] + ridge·I, or None. One copy of H, factorized in place."""
    upper = torch.empty_like(hessian, dtype=torch.float64, memory_format=torch.contiguous_format)
    for start in range(0, len(order), COLUMNS):
        rows = slice(start, start + COLUMNS)
        upper[rows] = hessian[order[rows]][:, order]
    upper.diagonal().add_(ridge)
    # The lower factor of the transposed view is the upper one of the matrix; LAPACK wants that column-major view.
    lower = upper.mT
    info = torch.empty((), dtype=torch.int32, device=upper.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return upper if int(info) == 0 and bool(torch.isfinite(upper.diagonal()).all()) else None
