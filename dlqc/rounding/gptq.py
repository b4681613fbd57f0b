"""GPTQ: round column after column, each against the errors already made (Frantar et al., arXiv 2210.17323).

The objective tr((W-Ŵ) H (W-Ŵ)ᵀ), H = Σ c·x·xᵀ + λI, is ‖(W-Ŵ) R‖² for the upper triangular R with H = R·Rᵀ. Column k of
(W-Ŵ)R holds only errors of columns up to k,

    R_kk·(t_k - ŵ_k),   t_k = w_k + Σ_{j<k} (w_j - ŵ_j)·R_jk / R_kk,

so the greedy choice in column order is ŵ_k = nearest(t_k). These are GPTQ's codes: its running update
W[:,k:] -= e_k·U[k,k:], with H⁻¹ = UᵀU, keeps w_k equal to t_k. (Equivalence: QuIP, arXiv 2307.13304, theorem 6.)
Here t_k is computed when it is needed, from R directly. That saves the inverse and the second factorization
(K³/3 flops in place of 4/3·K³), it is better conditioned, and the error term comes as one product with a long inner
dimension (left-looking) in place of many rank-128 updates of the whole weight. The loss needs no product at all:

    tr(E H Eᵀ) = Σ_k R_kk²·‖t_k - ŵ_k‖² - λ·‖E‖².

R is the Cholesky factor of H with rows and columns reversed. The code keeps the reversed order: index 0 is the column
that is rounded *last*, `upper` [K, K] has upperᵀ·upper = reversed H, and columns are rounded from the bottom up.
Weights are kept transposed, so that a column is contiguous.

Factorization in float64; the feedback in float32 (`dtype`). Peak memory: H, one float64 copy of it, two float32 copies
and one uint8 copy of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import CalibrationError, FeasibilityError, RecipeError
from dlqc.formats.integer import SCALE_DTYPES, Clip, IntFormat, QuantizedWeight
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.rtn import output_energy, sqnr_db

# Rows of a block that are rounded before their errors reach the others by a product of matrices: the rows that one
# step reads (16 · N float32) stay in the second-level cache.
INNER = 16

# Rows, evenly spaced, on which round-to-nearest is measured for comparison.
COMPARED = 256

# Rows of the Hessian copied at a time.
COPIED = 512

# Below this share of the damped loss, the undamped one is not taken as a difference but computed.
CANCELLED = 1e-3

MAX_DAMP = 10.0


@dataclass(frozen=True)
class Gptq(Rounding):
    """GPTQ; the options are those of `gptq`."""

    name: ClassVar[str] = "gptq"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    act_order: bool = True
    static_groups: bool = True
    clip: Clip = "mse"
    damp: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if self.clip not in ("minmax", "mse"):
            raise RecipeError(f"unknown clip {self.clip!r}", where="clip", remedy="Use 'minmax' or 'mse'")
        if not 0 <= self.damp <= MAX_DAMP:
            what = f"damping of {self.damp} times the mean diagonal is not within 0 and {MAX_DAMP:g}"
            raise RecipeError(what, where="damp", remedy="Use 0.01")
        if self.block < 1:
            raise RecipeError(f"a block of {self.block} columns is impossible", where="block", remedy="Use 128")
        if self.act_order and not self.static_groups:
            what = "act_order with static_groups=False scatters a group's columns, and engines do not store g_idx"
            raise FeasibilityError(what, where="static_groups", remedy="Use static_groups=True, or act_order=False")

    def round(self, weight: torch.Tensor, fmt: IntFormat, stats: Mapping[str, torch.Tensor]) -> Rounded:
        hessian = stats.get("hessian")
        if hessian is None:
            raise CalibrationError("gptq needs the statistic 'hessian'", remedy="Collect it, or use rounding 'rtn'")
        return gptq(weight, hessian, fmt, self)


DEFAULTS = Gptq()


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
    """

    hessian: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor
    ridge: float
    damp: float
    tries: int


def factorize(hessian: torch.Tensor, options: Gptq = DEFAULTS) -> Factor:
    """Order, damp and factorize H [K, K], of which only one triangle is read.

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
    forward = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else None
    order = torch.arange(len(diagonal), device=diagonal.device).flip(0) if forward is None else forward.flip(0)
    damp, tries = options.damp, 0
    while bool(live.min() > 0) and damp <= MAX_DAMP:
        tries += 1
        upper = _cholesky(hessian, order, damp * mean)
        if upper is not None and bool(upper.diagonal().square().min() > len(diagonal) * 2.0**-52 * largest):
            return Factor(hessian, order, upper, damp * mean, damp, tries)
        damp = max(10 * damp, 1e-6)
    what = f"the Hessian is not positive, even damped by {MAX_DAMP:g} times its mean diagonal"
    raise CalibrationError(what, where="hessian", remedy="It must be Σ c·x·xᵀ with c ≥ 0: check the token weights")


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor | Factor,
    fmt: IntFormat,
    options: Gptq = DEFAULTS,
    *,
    dtype: torch.dtype = torch.float32,
) -> Rounded:
    """Round `weight` [N, K] to `fmt` against the output error on inputs with second moment `hessian` [K, K].

    Args:
        hessian: H, or its `Factor` (then `act_order` and `damp` are those it was made with).
        dtype: arithmetic of the feedback, float32 or float64.

    Metrics: `sqnr_db`; `loss`, tr(E H Eᵀ) without λ; `loss_rtn`, the same for rounding to nearest with scales chosen
    as here from the original weight (from up to 256 evenly spaced rows, as the ratio to this method's loss on them);
    `damp` and `damp_tries`.
    """
    factor = hessian if isinstance(hessian, Factor) else factorize(hessian, options)
    count, width = weight.shape
    if factor.order.shape[0] != width:
        what = f"the Hessian is of {factor.order.shape[0]} input features, the weight of {width}"
        raise CalibrationError(what, where="hessian", remedy="Use the statistics of this layer")
    forward = torch.argsort(factor.order)
    importance = factor.upper.diagonal().square()[forward]
    exact = weight.to(dtype)
    work = exact.T.index_select(0, factor.order)
    if options.static_groups or fmt.group_size is None:
        scales, zeros = fmt.parameters(weight, clip=options.clip, importance=importance)
        codes, loss = _solve(work, factor, fmt, _Static(fmt, scales, zeros, factor.order), options.block)
    else:
        entering = _Entering(fmt, options.clip, importance, count)
        codes, loss = _solve(work, factor, fmt, entering, fmt.group_size)
        scales, zeros = entering.scales, entering.zeros
    rounded = QuantizedWeight(codes.index_select(0, forward).T.contiguous(), scales, zeros, fmt)

    sample = torch.linspace(0, count - 1, min(count, COMPARED), device=weight.device).long()
    own = output_energy(work[:, sample].index_select(0, forward).T, factor.hessian).sum().item()
    nearest = _nearest(exact[sample], fmt, options.clip, importance)
    other = output_energy(exact[sample] - nearest, factor.hessian).sum().item()
    noise = loss - factor.ridge * torch.linalg.vector_norm(work, dtype=torch.float64).item() ** 2
    if count <= COMPARED:
        noise = own
    elif noise < CANCELLED * loss:
        noise = output_energy(work.index_select(0, forward).T, factor.hessian).sum().item()
    signal = output_energy(exact, factor.hessian).sum().item()
    metrics = {
        "sqnr_db": sqnr_db(signal, noise),
        "loss": noise,
        "loss_rtn": other * (noise / own if own > 0 else count / len(sample)),
        "damp": factor.damp,
        "damp_tries": float(factor.tries),
    }
    return Rounded(rounded, metrics)


class _Static:
    """Scales and zero points [block, N] of the columns of a block, fixed beforehand for all groups."""

    def __init__(self, fmt: IntFormat, scales: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor) -> None:
        self.group = order // (fmt.group_size or len(order))
        self.scales = scales.T.contiguous()
        self.zeros = None if zeros is None else zeros.T.contiguous()

    def __call__(
        self, block: slice, target: torch.Tensor, original: torch.Tensor, near: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        group = self.group[block]
        return self.scales[group].to(target.dtype), None if self.zeros is None else self.zeros[group].to(target.dtype)


class _Entering:
    """The same for the block that is one whole group, chosen from the weight as corrected for all earlier errors.

    The correction X [g, N] of the group's columns must cancel the errors' contribution to (W-Ŵ)R there: near·X = t - w.
    """

    def __init__(self, fmt: IntFormat, clip: Clip, importance: torch.Tensor, count: int) -> None:
        groups = fmt.groups(len(importance))
        self.fmt, self.clip, self.importance = fmt, clip, importance
        self.scales = torch.empty(count, groups, dtype=SCALE_DTYPES[fmt.scale_dtype], device=importance.device)
        self.zeros = None if fmt.symmetric else torch.empty_like(self.scales, dtype=torch.uint8)

    def __call__(
        self, block: slice, target: torch.Tensor, original: torch.Tensor, near: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        correction = torch.linalg.solve_triangular(near, target - original, upper=True, unitriangular=True)
        group = (len(self.importance) - block.stop) // len(target)
        importance = self.importance[group * len(target) : (group + 1) * len(target)]
        corrected = (original + correction).flip(0).T
        scales, zeros = self.fmt.parameters(corrected, clip=self.clip, importance=importance)
        self.scales[:, group : group + 1] = scales
        if self.zeros is None or zeros is None:
            return scales.T.to(target.dtype).expand_as(target), None
        self.zeros[:, group : group + 1] = zeros
        return scales.T.to(target.dtype).expand_as(target), zeros.T.to(target.dtype).expand_as(target)


def _solve(
    work: torch.Tensor, factor: Factor, fmt: IntFormat, grid: _Static | _Entering, block: int
) -> tuple[torch.Tensor, float]:
    """Round all columns of `work` [K, N], which holds Wᵀ in reversed order and is turned into the errors W - Ŵ.

    Returns codes uint8 [K, N] and Σ_k R_kk²·‖t_k - ŵ_k‖².
    """
    width = work.shape[0]
    codes = torch.empty_like(work, dtype=torch.uint8)
    loss = torch.zeros((), dtype=torch.float64, device=work.device)
    for stop in range(width, 0, -block):
        rows = slice(max(0, stop - block), stop)
        size = stop - rows.start
        pivots = factor.upper.diagonal()[rows]
        feedback = (factor.upper[rows, rows.start :] / pivots.unsqueeze(1)).to(work.dtype)
        near = feedback[:, :size]
        target = torch.addmm(work[rows], feedback[:, size:], work[stop:])
        scale, zero = grid(rows, target, work[rows], near)
        levels = _round_block(target, work[rows], near, scale, zero, fmt)
        codes[rows] = (levels + (fmt.midpoint if zero is None else zero)).to(torch.uint8)
        residual = target.addcmul_(levels, scale, value=-1).square_().sum(dim=1, dtype=torch.float64)
        loss += pivots.square() @ residual
    return codes, loss.item()


def _round_block(
    target: torch.Tensor,
    work: torch.Tensor,
    near: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    fmt: IntFormat,
) -> torch.Tensor:
    """Round a block from its last row to its first; returns code - zero, [block, N] in floating point.

    On entry `target` lacks the feedback of errors inside the block; on return it is t. `work` turns from w to w - ŵ.
    """
    levels = torch.empty_like(target)
    low = [-fmt.midpoint] * len(target) if zero is None else list((-zero).unbind(0))
    high = [fmt.top - fmt.midpoint] * len(target) if zero is None else list((fmt.top - zero).unbind(0))
    for stop in range(len(target), 0, -INNER):
        start = max(0, stop - INNER)
        target[start:stop].addmm_(near[start:stop, stop:], work[stop:])
        for row in range(stop - 1, start - 1, -1):
            aim = target[row].addmv_(work[row + 1 : stop].T, near[row, row + 1 : stop])
            level = torch.div(aim, scale[row], out=levels[row]).round_().clamp_(low[row], high[row])
            work[row].addcmul_(level, scale[row], value=-1)
    return levels


def _nearest(weight: torch.Tensor, fmt: IntFormat, clip: Clip, importance: torch.Tensor) -> torch.Tensor:
    scales, zeros = fmt.parameters(weight, clip=clip, importance=importance)
    return QuantizedWeight(fmt.encode(weight, scales, zeros), scales, zeros, fmt).dequantize()


def _cholesky(hessian: torch.Tensor, order: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """Upper triangular float64 U with UᵀU = H[order][:, order] + ridge·I, or None; one copy of H, factorized in place."""
    upper = torch.empty_like(hessian, dtype=torch.float64, memory_format=torch.contiguous_format)
    for start in range(0, len(order), COPIED):
        rows = slice(start, start + COPIED)
        upper[rows] = hessian[order[rows]][:, order]
    upper.diagonal().add_(ridge)
    # The lower factor of the transposed view is the upper one of the matrix; LAPACK wants that column-major view.
    lower = upper.mT
    info = torch.empty((), dtype=torch.int32, device=upper.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return upper if int(info) == 0 and bool(torch.isfinite(upper.diagonal()).all()) else None
