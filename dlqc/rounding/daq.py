"""DAQ, the data-aware quantizer of Quant-dLLM (arXiv 2510.03274): weights as sums of sign planes, group after group.

The paper's method, `PAPER`. For each group of columns g of W [N, K_in], in order:

    Z_ij = (W_ij / D_j)², D = diag(H⁻¹)                        saliency; H = Σ c·x·xᵀ + λI
    L_ij = lambda² where Z_ij is more than 3 standard deviations from the group's mean, else 1       (DOR)
    Q_g  = planes of small Σ L·(W_g - Q_g)²: greedy start, then sweeps over scales and signs        (RSR, formats.planes)

No code was published with the paper, and its text has no compensation of errors. A public reproduction found that it
needs one between groups, so it is here, as the block form of optimal brain surgery: with H⁻¹ = UᵀU, U upper triangular,

    W_rest -= (W_g - Q_g)·U_gg⁻¹·U_g,rest       compensation="exact"

is the least-squares answer of the columns to come. The reproduction divides by diag(U_gg) in place of U_gg, which ignores
that columns of a group are correlated ("diagonal").

Beyond the paper, at equal bits. Rounding T = W_g as compensated so far costs, once the columns to come have answered,

    tr((T - Q) M (T - Q)ᵀ),   M = U_gg⁻¹·U_gg⁻ᵀ,

and RSR knows nothing of M. On correlated inputs that matters more than all else. So, in this metric and after RSR:

    act_order   groups, and columns within a group, come in order of falling diagonal of H. Nothing moves in storage.
    feedback    signs column after column on T as corrected for the errors already made in the group (GPTQ's rule with
                these levels), for each row if that is better than its signs were; between rounds the scales are refit.
    refine      rounds of exact least squares for all column scales of the group at once, for the row scales of each
                row, and of coordinate descent on the codes. A fit that does not help once stored is not taken.
    polish      when all groups are done, rounds of the same over the groups in the metric H itself, the others held.

Each of these steps lowers its objective or leaves it. Scales are rounded to what is stored before codes are chosen.

Factorization in float64, the rest in float32 (`dtype`) on transposed weights [K_in, N]. Peak memory: H, three float64
copies of it while it is factorized (U in float32 and the diagonal blocks stay), three float32 copies of the weight, its planes
in float32, and about ten copies of one group.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.formats.planes import (
    PlanesFormat,
    PlanesWeight,
    Tile,
    assemble,
    finite_peak,
    fit,
    nearest_signs,
    power_of_two,
)
from dlqc.rounding.abmp import allocate, scores
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.hessian import COLUMNS, MAX_DAMP, factorize, output_energy, sqnr_db

# Standard deviations from the mean that make a saliency an outlier (DOR).
OUTLIER = 3.0

# Columns of a group that are rounded before their errors reach the others by a product of matrices.
INNER = 16

# Added to the normal equations of the scales, times their mean diagonal: the step stays one of descent.
RIDGE = 1e-6


@dataclass(frozen=True)
class RoundedPlanes(Rounded):
    """A weight rounded to planes and what that cost.

    Attributes:
        weight: codes, scales and orders.
        metrics: `sqnr_db` and `loss` = tr(E H Eᵀ), without λ and with the scales as stored; `damp`, `damp_tries`.
    """

    weight: PlanesWeight
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Daq(Rounding):
    """DAQ. The last four options go beyond the paper; `PAPER` has them off.

    Attributes:
        sweeps: RSR sweeps over the planes of a group.
        rsr: whether scales are refined at all; otherwise they are those of the greedy start.
        dor: whether weights of outlying saliency count more.
        lambda_: how much more, as a factor on the error (its square on the squared error).
        joint: signs by comparing all 2^K patterns; otherwise plane by plane. With two planes both find the same.
        compensation: "exact", "diagonal" or "none": how the columns to come answer a group's errors.
        damp: the first λ tried, as a fraction of the mean diagonal.
        share: part of the groups of each weight that gets a plane more, and as many one less (ABMP; the paper's 0.05).
        act_order: whether groups and their columns are taken by falling diagonal of H, or as they stand.
        feedback: rounds of signs by error feedback within a group.
        refine: rounds of refitting a group in its own metric.
        polish: rounds of refitting all groups in the metric H, at the end.
    """

    name: ClassVar[str] = "daq"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})
    takes: ClassVar[tuple[type[Any], ...]] = (PlanesFormat,)

    sweeps: int = 10
    rsr: bool = True
    dor: bool = True
    lambda_: float = 2.0
    joint: bool = True
    compensation: Literal["exact", "diagonal", "none"] = "exact"
    damp: float = 0.01
    share: float = 0.0
    act_order: bool = True
    feedback: int = 3
    refine: int = 2
    polish: int = 2

    def __post_init__(self) -> None:
        if self.compensation not in ("exact", "diagonal", "none"):
            what = f"unknown compensation {self.compensation!r}"
            raise RecipeError(what, where="compensation", remedy="Use 'exact', 'diagonal' or 'none'")
        if not 0 <= self.damp <= MAX_DAMP:
            what = f"damping of {self.damp} times the mean diagonal is not within 0 and {MAX_DAMP:g}"
            raise RecipeError(what, where="damp", remedy="Use 0.01")
        if not 1 <= self.lambda_ < float("inf"):
            what = f"outliers cannot count {self.lambda_} times as much as the rest"
            raise RecipeError(what, where="lambda_", remedy="Use 2, or dor=False to count all alike")
        if not 0 <= self.share <= 0.5:
            what = f"a share of {self.share} of the groups cannot go up and another go down"
            raise RecipeError(what, where="share", remedy="Use 0.05, or 0 for the same order everywhere")
        for name in ("sweeps", "feedback", "refine", "polish"):
            if getattr(self, name) < 0:
                what = f"{getattr(self, name)} rounds are impossible"
                raise RecipeError(what, where=name, remedy=f"Use {getattr(type(self), name)}, or 0 for none")

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Let linears that read the same input share the factorization; the first `round` does it, for its group size."""
        hessian = stats.get("hessian")
        if not isinstance(hessian, torch.Tensor):
            return stats
        return {**stats, "hessian": Shared(hessian, self.damp, self.act_order)}

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> RoundedPlanes:
        """Round `weight` [N, K_in]. Where `stats` has "orders", these are the planes of each group (`rounding.abmp`)."""
        hessian = stats.get("hessian")
        if hessian is None:
            raise CalibrationError(
                "daq needs the statistic 'hessian'", remedy="Collect it, or use PlanesFormat.quantize, which needs none"
            )
        return daq(weight, hessian, fmt, self, orders=stats.get("orders"))


DEFAULTS = Daq()
PAPER = Daq(act_order=False, feedback=0, refine=0, polish=0)


@dataclass(frozen=True, eq=False)
class Metric:
    """A damped Hessian, ordered and factorized for groups of one size. All but `hessian` and `ridge` are over `unit`.

    Attributes:
        hessian: the undamped H [K_in, K_in] it was made from (not a copy).
        order: [K_in], the columns in order of rounding; groups stay together.
        groups: [G], the groups in order of rounding.
        blocks: U_gg⁻¹ of each group, float64 [G, g, g].
        inverse: U, float32 [K_in, K_in], upper triangular, UᵀU = (H[order][:, order] + λI)⁻¹.
        spread: D = diag((H + λI)⁻¹), float64 [K_in], in the order of W.
        ridge: λ. damp: λ over the mean of H's positive diagonal elements. tries: factorizations it took.
        unit: a power of two near the mean of H's diagonal.
    """

    hessian: torch.Tensor
    order: torch.Tensor
    groups: torch.Tensor
    blocks: torch.Tensor
    inverse: torch.Tensor
    spread: torch.Tensor
    ridge: float
    damp: float
    tries: int
    unit: float

    def columns(self, place: slice, dtype: torch.dtype) -> torch.Tensor:
        """Columns `place` of (H + λI)[order][:, order], over `unit`."""
        found = self.hessian[:, self.order[place]][self.order]
        found[place].diagonal().add_(self.ridge)
        return (found / self.unit).to(dtype)

    def energies(self, weight: torch.Tensor) -> torch.Tensor:
        """The loss of each group of `weight` [N, K_in] if it were dropped and the later ones answered, float64 [G].

        ‖W_g·U_gg⁻¹‖², in the order of W: what `dlqc.rounding.abmp.spend` takes.
        """
        size = self.blocks.shape[-1]
        found = torch.empty(len(self.groups), dtype=torch.float64, device=weight.device)
        for position, group in enumerate(self.groups.tolist()):
            part = weight[:, self.order[position * size : (position + 1) * size]].float()
            found[group] = (part @ self.blocks[position].float()).square().sum(dtype=torch.float64)
        return found * self.unit


def condition(hessian: torch.Tensor, size: int, *, damp: float = 0.01, act_order: bool = True) -> Metric:
    """Order, damp, factorize and invert H [K_in, K_in] for groups of `size` columns; errors as of `factorize`."""
    diagonal = hessian.diagonal().double().reshape(-1, size)
    groups, inside = torch.arange(len(diagonal)), torch.arange(size).expand_as(diagonal)
    if act_order:
        groups = torch.argsort(diagonal.sum(dim=1), descending=True, stable=True)
        inside = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    order = (groups.unsqueeze(1) * size + inside[groups]).flatten()
    factor = factorize(hessian[order][:, order] if act_order else hessian, act_order=False, damp=damp)
    unit = power_of_two(float(diagonal.mean()))
    # The factor is that of the reversed matrix: turned round it is R with H = R·Rᵀ, whose inverse is U.
    root = factor.upper.mT.flip(0, 1).div_(unit**0.5)
    blocks = torch.stack([root[at : at + size, at : at + size] for at in range(0, len(order), size)])
    inverse = _inverse(root)
    spread = torch.empty_like(inverse[0])
    spread[order] = inverse.square().sum(dim=0)
    return Metric(
        hessian, order, groups, blocks, inverse.float(), spread, factor.ridge, factor.damp, factor.tries, unit
    )


def _inverse(root: torch.Tensor) -> torch.Tensor:
    """R⁻¹ of an upper triangular R, block of columns after block: K³/3 flops."""
    inverse = torch.zeros_like(root)
    for start in range(0, len(root), COLUMNS):
        stop = min(len(root), start + COLUMNS)
        unit = torch.eye(stop - start, dtype=root.dtype, device=root.device)
        near = torch.linalg.solve_triangular(root[start:stop, start:stop], unit, upper=True)
        inverse[start:stop, start:stop] = near
        above = root[:start, start:stop] @ near
        inverse[:start, start:stop] = torch.linalg.solve_triangular(root[:start, :start], above, upper=True).neg_()
    return inverse


class Shared:
    """A Hessian whose `Metric` is made when the first weight asks for it, and kept for the others."""

    def __init__(self, hessian: torch.Tensor, damp: float, act_order: bool) -> None:
        self.hessian = hessian
        self.metric = functools.cache(functools.partial(condition, hessian, damp=damp, act_order=act_order))


def daq(
    weight: torch.Tensor,
    hessian: torch.Tensor | Metric | Shared,
    fmt: PlanesFormat,
    options: Daq = DEFAULTS,
    *,
    orders: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> RoundedPlanes:
    """Round `weight` [N, K_in] to `fmt` against the output error on inputs with second moment `hessian` [K_in, K_in].

    Args:
        hessian: H; or its `Metric` (then `damp` and `act_order` are those it was made with), or a `Shared` one.
        orders: planes of each group, from `dlqc.rounding.abmp`; None means `fmt.order` everywhere, or `options.share`.
        dtype: arithmetic, float32 or float64.
    """
    width = weight.shape[1]
    metric = _metric(hessian, width, width // fmt.groups(width), options)
    if orders is None and options.share:
        orders = allocate(scores(weight, metric.spread, fmt.groups(width)), options.share, fmt.order)
    found = fmt.orders(width, orders)
    unit = power_of_two(finite_peak(weight))
    exact = (weight.to(dtype) / unit).T[metric.order]
    spread = metric.spread[metric.order].to(dtype)
    work, tiles = exact.clone(), []
    for position, group in enumerate(metric.groups.tolist()):
        size = len(metric.blocks[position])
        place = slice(position * size, (position + 1) * size)
        target, block = work[place], metric.blocks[position].to(dtype)
        tile = round_group(target, spread[place], block, found[group], fmt, options)
        tiles.append(tile)
        if options.compensation != "none":
            error = target - tile.value()
            if options.compensation == "exact":
                error = block.mT @ error
            else:
                error = error * block.diagonal().unsqueeze(1)
            work[place.stop :].addmm_(metric.inverse[place, place.stop :].to(dtype).mT, error, alpha=-1)
    del work
    if options.polish:
        _polish(tiles, exact, metric, fmt, options.polish)
    result = assemble(_stored(tiles, metric), fmt, unit)
    noise = output_energy(weight.float() - result.dequantize(), metric.hessian).sum().item()
    signal = output_energy(weight.float(), metric.hessian).sum().item()
    metrics = {"sqnr_db": sqnr_db(signal, noise), "loss": noise}
    return RoundedPlanes(result, metrics | {"damp": metric.damp, "damp_tries": float(metric.tries)})


def _metric(hessian: torch.Tensor | Metric | Shared, width: int, size: int, options: Daq) -> Metric:
    features = (hessian.hessian if isinstance(hessian, Metric | Shared) else hessian).shape[0]
    if features != width:
        what = f"the Hessian is of {features} input features, the weight of {width}"
        raise CalibrationError(what, where="hessian", remedy="Use the statistics of this layer")
    if isinstance(hessian, Shared):
        return hessian.metric(size)
    if not isinstance(hessian, Metric):
        return condition(hessian, size, damp=options.damp, act_order=options.act_order)
    if hessian.blocks.shape[-1] != size:
        what = f"the metric was made for groups of {hessian.blocks.shape[-1]} columns, the format has {size}"
        raise ContractError(what, where="hessian", remedy="Pass the same group size to condition() and daq()")
    return hessian


def round_group(
    target: torch.Tensor, spread: torch.Tensor, block: torch.Tensor, order: int, fmt: PlanesFormat, options: Daq
) -> Tile:
    """Planes for one group as compensated so far.

    Args:
        target: T, transposed [g, N]. spread: D of its columns [g]. block: U_gg⁻¹ [g, g].
    """
    importance = emphasis(target, spread, options.lambda_) if options.dor else None
    tile = fit(target, order, importance=importance, sweeps=options.sweeps if options.rsr else 0, joint=options.joint)
    tile.store(fmt.dtype)
    if options.joint:
        tile.choose(target)
    metric = block @ block.mT
    for turn in range(options.feedback):
        if turn:
            gradient = fit_columns(tile, metric @ (target - tile.value()), metric, fmt.dtype)
            fit_rows(tile, gradient, metric, fmt.dtype)
        feedback(tile, target, block)
    gradient = metric @ (target - tile.value())
    for _ in range(options.refine):
        gradient = refine(tile, gradient, metric, fmt.dtype)
    return tile


def emphasis(target: torch.Tensor, spread: torch.Tensor, lambda_: float) -> torch.Tensor:
    """DOR: λ² where the saliency (T/D)² lies more than OUTLIER standard deviations from its mean, else 1; [g, N]."""
    # Only ratios of D matter; the largest becomes 1/D = 1, so that nothing overflows.
    saliency = (target * (spread.min() / spread).unsqueeze(1)).square_()
    deviation, mean = torch.std_mean(saliency, correction=0)
    return torch.where((saliency - mean).abs() > OUTLIER * deviation, lambda_**2, 1.0).to(target.dtype)


def feedback(tile: Tile, target: torch.Tensor, block: torch.Tensor) -> None:
    """Choose the signs of `tile` column after column, each on the target as the errors before it moved it.

    With R = U_gg⁻¹ [g, g] as `block`, the loss is ‖(T - Q)R‖² and column j of (T - Q)R is R_jj·(t_j - q_j), where
    t_j = T_j + Σ_{i<j} (T_i - Q_i)·R_ij/R_jj. Rows whose loss would rise keep their signs.
    """
    rates = block / block.diagonal()
    before = (block.mT @ (target - tile.value())).square().sum(dim=0)
    errors, signs = torch.empty_like(target), torch.empty_like(tile.signs)
    after = torch.zeros_like(before)
    for start in range(0, len(target), INNER):
        stop = min(len(target), start + INNER)
        aims = torch.addmm(target[start:stop], rates[:start, start:stop].mT, errors[:start])
        levels = tile.columns[:, start:stop].unsqueeze(2) * tile.rows.unsqueeze(1)
        for j in range(start, stop):
            aim = aims[j - start].addmv_(errors[start:j].mT, rates[start:j, j])
            signs[:, j] = nearest_signs(aim, levels[:, j - start])
            value = (signs[:, j] * levels[:, j - start]).sum(dim=0)
            errors[j] = target[j] - value
            after += ((aim - value) * block[j, j]).square()
    tile.signs = torch.where(after < before, signs, tile.signs)


def refine(tile: Tile, gradient: torch.Tensor, metric: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One round of column scales, row scales and codes in the metric M, in place; none raises tr((T - Q) M (T - Q)ᵀ).

    Args:
        gradient: M·(T - Q), [g, N]; overwritten, and returned as it is after the round.
        metric: M, [g, g], positive definite.
        dtype: what scales are rounded to.
    """
    gradient = fit_columns(tile, gradient, metric, dtype)
    gradient = fit_rows(tile, gradient, metric, dtype)
    return descend(tile, gradient, metric)


def fit_columns(tile: Tile, gradient: torch.Tensor, metric: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Least squares for the column scales of all planes at once; arguments and result as of `refine`.

    With V_k = B_k·diag(r_k), Q = Σ_k diag(c_k)·V_k, so the normal matrix is M_jl·(V_k V_mᵀ)_jl at (k, j), (m, l).
    """
    order, size, count = tile.signs.shape
    parts = tile.signs * tile.rows.unsqueeze(1)
    flat = parts.reshape(order * size, count)
    normal = (flat @ flat.mT).double() * metric.double().repeat(order, order)
    slope = (parts * gradient).sum(dim=2).double().flatten()
    delta = _step(normal, slope).reshape(order, size)
    new = (tile.columns + delta).to(dtype).to(gradient.dtype)
    moved = (new - tile.columns).double().flatten()
    if not bool(moved @ normal @ moved < 2 * moved @ slope):
        return gradient
    change = torch.einsum("kj,kjn->jn", new - tile.columns, parts)
    tile.columns = new
    return gradient.addmm_(metric, change, alpha=-1)


def fit_rows(tile: Tile, gradient: torch.Tensor, metric: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Least squares for the row scales, K unknowns a row; arguments and result as of `refine`."""
    parts = tile.signs * tile.columns.unsqueeze(2)
    normal = torch.stack([(parts * (metric @ part)).sum(dim=1) for part in parts]).permute(2, 0, 1).double()
    slope = (parts * gradient).sum(dim=1).mT.double()
    new = (tile.rows + _step(normal, slope).mT).to(dtype).to(gradient.dtype)
    moved = (new - tile.rows).mT.double()
    worth = torch.einsum("nk,nkl,nl->n", moved, normal, moved) < 2 * (moved * slope).sum(dim=1)
    new = torch.where(worth, new, tile.rows)
    change = torch.einsum("kn,kjn->jn", new - tile.rows, parts)
    tile.rows = new
    return gradient.addmm_(metric, change, alpha=-1)


def _step(normal: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Solve (A + εI)·x = b, [..., n]; a system of zeros gives zero."""
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    ridge = torch.where(ridge > 0, ridge, 1.0)
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    found: torch.Tensor = torch.linalg.solve(normal + ridge[..., None, None] * eye, slope)
    return found


def descend(tile: Tile, gradient: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Coordinate descent: each column once, to the codes that are best with all others held; as `refine`.

    With the others held the loss of element j is M_jj·(q - t)², t = q_old + gradient_j/M_jj.
    """
    for start in range(0, len(gradient), INNER):
        stop = min(len(gradient), start + INNER)
        near, part = metric[start:stop, start:stop], gradient[start:stop].clone()
        levels = tile.columns[:, start:stop].unsqueeze(2) * tile.rows.unsqueeze(1)
        values = (tile.signs[:, start:stop] * levels).sum(dim=0)
        moves = torch.empty_like(part)
        for j in range(stop - start):
            aim = torch.add(values[j], part[j], alpha=1 / float(near[j, j]))
            signs = nearest_signs(aim, levels[:, j])
            tile.signs[:, start + j] = signs
            moves[j] = (signs * levels[:, j]).sum(dim=0) - values[j]
            part[j + 1 :].addr_(near[j + 1 :, j], moves[j], alpha=-1)
        gradient.addmm_(metric[:, start:stop], moves, alpha=-1)
    return gradient


def _polish(tiles: list[Tile], exact: torch.Tensor, metric: Metric, fmt: PlanesFormat, rounds: int) -> None:
    """Refine group after group in the metric H + λI, with the errors of all others as they are."""
    size = exact.shape[0] // len(tiles)
    errors = exact - torch.cat([tile.value() for tile in tiles])
    for _ in range(rounds):
        for position, tile in enumerate(tiles):
            place = slice(position * size, (position + 1) * size)
            columns = metric.columns(place, exact.dtype)
            refine(tile, columns.mT @ errors, columns[place], fmt.dtype)
            errors[place] = exact[place] - tile.value()


def _stored(tiles: list[Tile], metric: Metric) -> list[Tile]:
    """The tiles in the order of the weight, and their columns too."""
    found = []
    for group, position in enumerate(torch.argsort(metric.groups).tolist()):
        tile, size = tiles[position], metric.blocks.shape[-1]
        back = torch.argsort(metric.order[position * size : (position + 1) * size] - group * size)
        found.append(Tile(tile.signs[:, back], tile.rows, tile.columns[:, back]))
    return found
