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

Groups' scales. What is rounded is t, not w. Where inputs are strongly correlated and bits are few, t spreads much wider
than w: scales with the least error on w then clamp t, and the clamped errors feed on each other (at 2 bits this can
cost more than it saves by far, at 4 bits hardly). So clip="trial" rounds up to 128 evenly spaced rows with each choice
in TRIALS and keeps the one with the least loss; rows are independent, which makes the sample a fair one.

Pruned weights (`kept`). First the kept weights move to V, the best on their mask: REFINE steps of conjugate gradients from
W (`dlqc.pruning.refine`). Then V is rounded; where a weight is pruned to 0, whatever t says, and the error t - 0 goes on to the
columns after it like any other. Nothing is lost by taking V for W: (W - V)(H + λI) = 0 on the mask, so for every Ŵ on it the
objective of W is that of V plus a constant. SparseGPT (arXiv 2301.00774, section 3.5) sets to zero and rounds in one sweep from W
instead; there the scales, chosen from weights that have not moved yet, clamp those that have to take over from others.

The feedback is float32 (`dtype`), between blocks of columns a product of matrices, inside a block native code where there
is a compiler (`dlqc.intround`). So is the factor, if H is far enough from singular (`factorize`). Peak memory: H, one
float32 copy of it, three float32 copies and one uint8 copy of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dlqc import intround
from dlqc.errors import CalibrationError, ContractError, FeasibilityError, RecipeError
from dlqc.formats.integer import Clip, IntFormat, QuantizedWeight
from dlqc.formats.sparse import SparseFormat
from dlqc.pruning import refine
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.hessian import MAX_DAMP, Factor, energy, factorize, output_energy, sqnr_db

Choice = tuple[Clip, float]
Parameters = tuple[torch.Tensor, torch.Tensor | None]

# Ways to choose a group's scale that clip="trial" compares: IntFormat.parameters' clip and shrink.
TRIALS: tuple[Choice, ...] = (("mse", 1.0), ("minmax", 1.0), ("minmax", 0.9), ("minmax", 0.8))

# Rows, evenly spaced, on which the trials are made and rounding to nearest is measured; on which the signal is measured.
SAMPLE = 128
MEASURED = 256

# Rows of a block that are rounded before their errors reach the others by a product of matrices: the rows that one
# step reads (16 · N float32) stay in the second-level cache.
INNER = 16

# Steps towards the best weights on a mask: what they leave is well below what rounding costs.
REFINE = 8

# Below this share of the damped loss, the undamped one is not taken as a difference but computed.
CANCELLED = 1e-3


@dataclass(frozen=True)
class Gptq(Rounding):
    """GPTQ.

    Attributes:
        act_order: round columns by falling diagonal of H. Codes and groups stay in place: no g_idx.
        static_groups: fix the groups' scales from the original weight. Otherwise they are chosen on entering a group,
            from the weight as corrected so far.
        clip: how scales are chosen: "minmax" and "mse" as in `IntFormat.parameters`, where "mse" weighs column k by
            R_kk², its share of the loss; "trial" takes the best of TRIALS for the layer.
        damp: the first λ tried, as a fraction of the mean diagonal.
        block: columns between two products with all earlier errors. It changes the time, not the definition.
    """

    name: ClassVar[str] = "gptq"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})
    takes: ClassVar[tuple[type[Any], ...]] = (IntFormat, SparseFormat)
    compensates: ClassVar[bool] = True

    act_order: bool = True
    static_groups: bool = True
    clip: Literal["minmax", "mse", "trial"] = "trial"
    damp: float = 0.01
    block: int = 512

    def __post_init__(self) -> None:
        if self.clip not in ("minmax", "mse", "trial"):
            raise RecipeError(f"unknown clip {self.clip!r}", where="clip", remedy="Use 'minmax', 'mse' or 'trial'")
        if not 0 <= self.damp <= MAX_DAMP:
            what = f"damping of {self.damp} times the mean diagonal is not within 0 and {MAX_DAMP:g}"
            raise RecipeError(what, where="damp", remedy="Use 0.01")
        if self.block < 1:
            raise RecipeError(f"a block of {self.block} columns is impossible", where="block", remedy="Use 512")
        if self.act_order and not self.static_groups:
            what = "act_order with static_groups=False scatters a group's columns, and engines do not store g_idx"
            raise FeasibilityError(what, where="static_groups", remedy="Use static_groups=True, or act_order=False")

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Factorize the Hessian once for all linears that read the same input."""
        hessian = stats.get("hessian")
        if not isinstance(hessian, torch.Tensor):
            return stats
        factor = factorize(hessian, act_order=self.act_order, damp=self.damp, dtype=torch.float32)
        return {**stats, "hessian": factor}

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        hessian = stats.get("hessian")
        if hessian is None:
            raise CalibrationError("gptq needs the statistic 'hessian'", remedy="Collect it, or use rounding 'rtn'")
        return on_kept(fmt, stats, lambda grid, kept: gptq(weight, hessian, grid, self, kept=kept))


def on_kept(fmt: Any, stats: Mapping[str, Any], work: Callable[[IntFormat, torch.Tensor | None], Rounded]) -> Rounded:
    """Round to integers with the mask among the statistics, if there is one; a sparse format then stores what is kept."""
    kept = stats.get("kept")
    if not isinstance(fmt, SparseFormat):
        return work(fmt, kept)
    if kept is None:
        what = f"{fmt.label} stores what pruning left, and this weight is not pruned"
        raise ContractError(what, where="format", remedy="Put sparsify before, or use integers")
    rounded = work(fmt.integers, kept)
    assert isinstance(rounded.weight, QuantizedWeight)
    return Rounded(fmt.store(rounded.weight, kept), rounded.metrics)


DEFAULTS = Gptq()


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor | Factor,
    fmt: IntFormat,
    options: Gptq = DEFAULTS,
    *,
    kept: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rounded:
    """Round `weight` [N, K] to `fmt` against the output error on inputs with second moment `hessian` [K, K].

    Args:
        hessian: H, or its `Factor` (then `damp` is what that was made with). Linears that read the same input can
            share a factor.
        kept: bool [N, K], false where the weight becomes 0; None keeps all. Losses are then those against `weight` as given.
        dtype: arithmetic of the feedback, float32 or float64.

    Metrics: `sqnr_db`, whose signal is estimated on up to 256 evenly spaced rows; `loss`, tr(E H Eᵀ) without λ;
    `loss_rtn`, the same for rounding to nearest with scales chosen in the same way (from up to 128 rows, as the ratio to
    this method's loss on them); `damp` and `damp_tries`; `shrink`, the part of the weights' range that the scales cover,
    0 if that was searched by group.
    """
    factor = hessian
    if not isinstance(factor, Factor):
        factor = factorize(factor, act_order=options.act_order, damp=options.damp, dtype=dtype)
    count, width = weight.shape
    if factor.order.shape[0] != width:
        what = f"the Hessian is of {factor.order.shape[0]} input features, the weight of {width}"
        raise CalibrationError(what, where="hessian", remedy="Use the statistics of this layer")
    if factor.act_order != options.act_order:
        what = f"the factor was made with act_order={factor.act_order}, the options say {options.act_order}"
        raise ContractError(what, where="act_order", remedy="Pass the same options to factorize() and gptq()")
    exact = weight.to(dtype)
    if kept is not None:
        exact = refine(exact, exact * kept, kept, factor, REFINE)
    rows = sample_rows(weight)
    sample = exact[rows]
    if options.clip == "trial":
        # All trials at once, one below the other: rows do not depend on each other.
        masks = None if kept is None else kept[rows].repeat(len(TRIALS), 1)
        losses = _round(sample.repeat(len(TRIALS), 1), _Grid(fmt, TRIALS, factor), options, masks)[2][0]
        choice = TRIALS[int(losses.reshape(len(TRIALS), -1).sum(dim=1).argmin())]
    else:
        choice = (options.clip, 1.0)
    grid = _Grid(fmt, (choice,), factor)
    rounded, work, losses = _round(exact, grid, options, kept)
    loss, spread = losses.sum(dim=1).tolist()

    back = torch.argsort(factor.order)
    own = output_energy(work[:, rows][back].T, factor.hessian).sum().item()
    other = output_energy(sample - grid.nearest(sample), factor.hessian).sum().item()
    noise = loss - factor.ridge * spread
    if count <= SAMPLE:
        noise = own
    elif noise < CANCELLED * loss:
        noise = output_energy(work[back].T, factor.hessian).sum().item()
    if kept is not None:  # what pruning cost is there before rounding
        lost = output_energy(weight.to(dtype) - exact, factor.hessian).sum().item()
        noise, own, other = noise + lost, own + lost * len(rows) / count, other + lost * len(rows) / count
    metrics = {
        "sqnr_db": sqnr_db(energy(weight.to(dtype), factor.hessian, sample_rows(weight, MEASURED)), noise),
        "loss": noise,
        "loss_rtn": other * (noise / own if own > 0 else count / len(rows)),
        "damp": factor.damp,
        "damp_tries": float(factor.tries),
        "shrink": 0.0 if choice[0] == "mse" else choice[1],
    }
    return Rounded(rounded, metrics)


def sample_rows(weight: torch.Tensor, most: int = SAMPLE) -> torch.Tensor:
    """Indices of up to `most` rows of a weight [N, K], evenly spaced."""
    count = len(weight)
    return torch.linspace(0, count - 1, min(count, most), device=weight.device).round().long()


@dataclass(frozen=True, eq=False)
class _Grid:
    """How the scales and zero points of one layer are chosen: each of `choices` for an equal share of the rows."""

    fmt: IntFormat
    choices: tuple[Choice, ...]
    factor: Factor

    def parameters(self, weight: torch.Tensor, columns: slice = slice(None)) -> Parameters:
        """Scales [N, G] and zero points for `columns` of W."""
        importance = torch.empty_like(self.factor.pivots)
        importance[self.factor.order] = self.factor.pivots.square()
        parts = [
            self.fmt.parameters(part, clip=clip, shrink=shrink, importance=importance[columns])
            for part, (clip, shrink) in zip(weight.chunk(len(self.choices)), self.choices, strict=True)
        ]
        return _cat(parts, dim=0)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight rounded to nearest on this grid, float32."""
        scales, zeros = self.parameters(weight)
        return QuantizedWeight(self.fmt.encode(weight, scales, zeros), scales, zeros, self.fmt).dequantize()


def _round(
    exact: torch.Tensor, grid: _Grid, options: Gptq, kept: torch.Tensor | None = None
) -> tuple[QuantizedWeight, torch.Tensor, torch.Tensor]:
    """Round `exact` [N, K]: the result; the errors W - Ŵ [K, N], transposed and reversed; the damped losses and ‖E‖² [2, N]."""
    fmt, order, upper, pivots = grid.fmt, grid.factor.order, grid.factor.upper, grid.factor.pivots
    width = len(order)
    group = fmt.group_size or width
    static = options.static_groups or group == width
    # Scales that are chosen on entering a group need all errors before it; blocks are then whole groups.
    block = options.block if static else max(options.block // group, 1) * group
    step = block if static else group
    work = exact.T.contiguous().index_select(0, order)  # the transposition alone is the fast one
    codes = torch.empty_like(work, dtype=torch.uint8)
    losses = torch.zeros(2, len(exact), dtype=torch.float64, device=work.device)
    largest = pivots.max()
    held = None if kept is None else kept.T.index_select(0, order).to(work.dtype)
    chosen = [grid.parameters(exact)] if static else []
    table = _table(chosen[0], work.dtype) if static else None
    for stop in range(width, 0, -block):
        start = max(0, stop - block)
        feedback = upper[start:stop, start:].to(work.dtype) / pivots[start:stop].unsqueeze(1).to(work.dtype)
        share = (pivots[start:stop] / largest).square().to(work.dtype)
        size = stop - start
        target = torch.addmm(work[start:stop], feedback[:, size:], work[stop:])
        for last in range(size, 0, -step):
            part = slice(max(0, last - step), last)
            rows = slice(start + part.start, start + last)
            aim, near = target[part], feedback[part, part].contiguous()
            if last < size:
                aim.addmm_(feedback[part, last:size], work[start + last : stop])
            if table is None:
                # The correction X of the whole group cancels what the errors so far add to (W-Ŵ)R there: near·X = t - w.
                correction = torch.linalg.solve_triangular(near, aim - work[rows], upper=True, unitriangular=True)
                corrected = work[rows] + correction
                corrected = (corrected if held is None else corrected * held[rows]).flip(0).T
                chosen.append(grid.parameters(corrected, slice(width - rows.stop, width - rows.start)))
                own, index = _table(chosen[-1], work.dtype), torch.zeros_like(order[rows])
            else:
                own, index = table, order[rows] // group
            masks = None if held is None else held[rows]
            columns = _Columns(aim, work[rows], codes[rows], near, own, index, share[part], masks)
            columns.round(fmt, losses)
    codes = codes[torch.argsort(order)].T.contiguous()
    losses[0] *= largest.square()
    return QuantizedWeight(codes, *_cat(chosen, dim=1), fmt), work, losses


def _cat(parts: list[Parameters], dim: int) -> Parameters:
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts], dim), torch.cat(zeros, dim) if zeros else None


def _table(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """Scales and zero points as [G, N] in the dtype of the arithmetic."""
    scales, zeros = (None if part is None else part.T.to(dtype).contiguous() for part in parameters)
    assert scales is not None
    return scales, zeros


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns of W that are rounded one after the other, from the last row of these matrices to the first.

    Attributes:
        target: [B, N], t but for the feedback of errors inside the block; what it holds later is of no use.
        work: [B, N], turns from w to w - ŵ. codes: uint8 [B, N], written.
        near: [B, B], unit upper triangular: how errors of later rows enter earlier ones.
        table, group: scales and zero points [G, N], and the row of them that each column takes, [B].
        share: [B], weights of the squared residuals in the loss.
        kept: [B, N], 0 where the weight is pruned and 1 elsewhere; None if none is.
    """

    target: torch.Tensor
    work: torch.Tensor
    codes: torch.Tensor
    near: torch.Tensor
    table: Parameters
    group: torch.Tensor
    share: torch.Tensor
    kept: torch.Tensor | None = None

    def round(self, fmt: IntFormat, losses: torch.Tensor) -> None:
        """Round, and add Σ share·(t - ŵ)² and Σ (w - ŵ)² to `losses` [2, N]."""
        operands = (self.target, self.work, self.codes, self.near, *self.table, self.group)
        if self.kept is not None or not intround.round_block(*operands, fmt.midpoint, fmt.top, self.share, losses):
            self._round_plainly(fmt, losses)

    def _round_plainly(self, fmt: IntFormat, losses: torch.Tensor) -> None:
        target, work, near = self.target, self.work, self.near
        scale, zero = (None if part is None else part[self.group] for part in self.table)
        assert scale is not None
        offset = torch.full((), fmt.midpoint, dtype=scale.dtype, device=scale.device) if zero is None else zero
        low, high = (-offset).expand_as(scale), (fmt.top - offset).expand_as(scale)
        levels = torch.empty_like(target)
        for stop in range(len(target), 0, -INNER):
            start = max(0, stop - INNER)
            target[start:stop].addmm_(near[start:stop, stop:], work[stop:])
            for row in range(stop - 1, start - 1, -1):
                aim = target[row].addmv_(work[row + 1 : stop].T, near[row, row + 1 : stop])
                level = torch.div(aim, scale[row], out=levels[row]).round_()
                level.clamp_(low[row], high[row])
                if self.kept is not None:
                    level.mul_(self.kept[row])
                work[row].addcmul_(level, scale[row], value=-1)
        self.codes.copy_(levels + offset)
        losses[0] += self.share @ target.addcmul_(levels, scale, value=-1).square_()
        losses[1] += work.square().sum(dim=0)
