"""Blocked error feedback: round `d` columns at once, each block against the errors already made (LDLQ of QuIP#).

The objective tr((W-Ŵ) H (W-Ŵ)ᵀ), H = Σ c·x·xᵀ + λI, is ‖U·E‖² for E = (W-Ŵ)ᵀ [K, N] and the upper triangular U with
UᵀU = H, rows and columns in reversed order of rounding (`dlqc.rounding.hessian`). Cut into blocks of d columns, block
B of U·E holds only errors of B and of the blocks rounded before it, which stand below it:

    (U·E)_B = U_BB·(t_B - ŵ_B),   t_B = w_B + U_BB⁻¹·Σ_{C below B} U_BC·(w_C - ŵ_C).

LDLQ takes the codebook's nearest point to t_B, block after block. For d = 1 this is GPTQ, and the greedy choice; for
d > 1 it is QuIP#'s (arXiv 2402.04396, section 4.2), which looks at ‖t_B - ŵ_B‖ in place of ‖U_BB·(t_B - ŵ_B)‖: the
same when H is diagonal inside the blocks, as incoherence processing nearly makes it. The loss needs no product:

    tr(E H Eᵀ) = Σ_B ‖U_BB·(t_B - ŵ_B)‖² - λ·‖E‖².

`feedback` knows nothing of formats: it hands t_B to a function that returns ŵ_B. `Ldlq` uses it for the E8P lattice,
`dlqc.rounding.kmeans` with d = 1 for codebooks.

Scales. As in GPTQ, what is rounded is t, which spreads wider than w: `trial` compares TRIALS, factors on the scales
that fit w, on up to 256 evenly spaced rows. Afterwards `dlqc.rounding.descent` lowers the same loss by moves of single vectors
and by better scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.formats.lattice import CHUNK, DIM, LatticeFormat, LatticeWeight, codebook, divisors, nearest
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.descent import descend
from dlqc.rounding.hessian import MAX_DAMP, Factor, factorize, output_energy, sqnr_db

# Factors on the scales of round-to-nearest that are compared.
TRIALS = (1.0, 1.1, 1.2, 0.9)

# Rows, evenly spaced, on which the trials are made and rounding to nearest is measured.
SAMPLE = 256

# Columns between two products with all earlier errors.
OUTER = 64

# Takes the index of a block (column // d) and t_B [d, N]; returns ŵ_B [d, N]. It may keep what it chose.
Nearest = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class BlockFactor:
    """A factor whose order moves blocks of `block` columns as one.

    Attributes:
        factor: of H with rows and columns permuted; its `order` refers to that, do not use it.
        order: [K], columns of W in reversed order of rounding, blocks whole and ascending inside.
        block: d.
        hessian: the undamped H [K, K] in the order of W (not a copy).
    """

    factor: Factor
    order: torch.Tensor
    block: int
    hessian: torch.Tensor


def factorize_blocks(hessian: torch.Tensor, block: int, *, act_order: bool = True, damp: float = 0.01) -> BlockFactor:
    """Order the blocks of H [K, K], K = m·block, and factorize it, damped as in `factorize`.

    With `act_order`, blocks with a large sum of diagonal elements are rounded first; else as they stand.
    """
    width = hessian.shape[0]
    if block == 1:
        factor = factorize(hessian, act_order=act_order, damp=damp)
        return BlockFactor(factor, factor.order, 1, hessian)
    weight = hessian.diagonal().double().reshape(-1, block).sum(dim=1)
    ascending = torch.argsort(weight, stable=True) if act_order else torch.arange(len(weight)).flip(0)
    inside = torch.arange(block, device=hessian.device)
    order = (ascending.to(hessian.device).unsqueeze(1) * block + inside).reshape(width)
    # `factorize` reverses the order that it is given.
    forward = order.flip(0)
    factor = factorize(hessian[forward][:, forward], act_order=False, damp=damp)
    return BlockFactor(factor, order, block, hessian)


def feedback(weight: torch.Tensor, found: BlockFactor, choose: Nearest) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `weight` [N, K] block after block with `choose`.

    Returns:
        the errors W - Ŵ [N, K] in the dtype of `weight`; the losses of the rows with damping, float64 [N].
    """
    order, upper, size = found.order, found.factor.upper, found.block
    width = len(order)
    work = weight.T.index_select(0, order)
    losses = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    largest = upper.diagonal().max()
    outer = max(size, OUTER // size * size)
    blocks = (order[::size] // size).tolist()
    for stop in range(width, 0, -outer):
        start = max(0, stop - outer)
        own = torch.stack([upper[at : at + size, at : at + size] for at in range(start, stop, size)])
        above = upper[start:stop, start:].reshape(len(own), size, width - start)
        back = torch.linalg.solve_triangular(own, above, upper=True).reshape(stop - start, width - start)
        back = back.to(work.dtype)
        share = (own / largest).to(work.dtype)
        target = torch.addmm(work[start:stop], back[:, stop - start :], work[stop:])
        for at in range(stop - start - size, -1, -size):
            rows, done = slice(at, at + size), slice(at + size, stop - start)
            aim = target[rows]
            if at + size < stop - start:
                aim = aim.addmm_(back[rows, done], work[start:stop][done])
            chosen = choose(blocks[(start + at) // size], aim)
            work[start:stop][rows] -= chosen
            losses += (share[at // size] @ (aim - chosen)).square().sum(dim=0)
    return work[torch.argsort(order)].T.contiguous(), losses * largest.square()


@dataclass(frozen=True)
class Ldlq(Rounding):
    """LDLQ with E8P vectors.

    Attributes:
        act_order: round vectors by falling sum of their diagonal elements of H. Codes stay in place.
        trial: compare TRIALS; otherwise the scales that fit the weight are used as they are.
        damp: the first λ tried, as a fraction of the mean diagonal.
        sweeps: passes of `dlqc.rounding.descent` over codes and scales afterwards, which QuIP# has not; 0 for LDLQ alone.

    Metrics: `sqnr_db`; `loss`, tr(E H Eᵀ) without λ; `loss_rtn`, the same for the nearest points with scales that fit
    w (from up to 256 rows, as the ratio to this method's loss on them); `damp`, `damp_tries`; `stretch`, the factor on
    the scales.
    """

    name: ClassVar[str] = "ldlq"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})
    takes: ClassVar[tuple[type[Any], ...]] = (LatticeFormat,)

    act_order: bool = True
    trial: bool = True
    damp: float = 0.01
    sweeps: int = 2

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise RecipeError(f"{self.sweeps} sweeps are impossible", where="sweeps", remedy="Use 0 for LDLQ alone")
        if not 0 <= self.damp <= MAX_DAMP:
            what = f"damping of {self.damp} times the mean diagonal is not within 0 and {MAX_DAMP:g}"
            raise RecipeError(what, where="damp", remedy="Use 0.01")

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Factorize the Hessian once for all linears that read the same input."""
        hessian = stats.get("hessian")
        # A width that does not divide is refused by the format, with a better message.
        if not isinstance(hessian, torch.Tensor) or hessian.shape[0] % DIM:
            return stats
        return {**stats, "hessian": factorize_blocks(hessian, DIM, act_order=self.act_order, damp=self.damp)}

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        if not isinstance(fmt, LatticeFormat):
            what = f"ldlq rounds to e8p vectors, not to {getattr(fmt, 'label', fmt)!r}"
            raise RecipeError(what, where="fmt", remedy="Use LatticeFormat, or another rounding")
        groups = fmt.groups(weight.shape[1])
        found = stats.get("hessian")
        if found is None:
            raise CalibrationError("ldlq needs the statistic 'hessian'", remedy="Collect it, or use rounding 'rtn'")
        if not isinstance(found, BlockFactor):
            found = factorize_blocks(found, DIM, act_order=self.act_order, damp=self.damp)
        check_factor(found, weight.shape[1], DIM)
        exact = weight.float()
        scales = fmt.parameters(exact)
        count = len(exact)
        rows = torch.linspace(0, count - 1, min(count, SAMPLE), device=weight.device).round().long()
        sample, own = exact[rows], scales[rows].float()
        stretch = 1.0
        if self.trial:
            stretched = torch.cat([fmt.stored(own * factor) for factor in TRIALS])
            losses = _ldlq(sample.repeat(len(TRIALS), 1), found, stretched, groups)[2]
            stretch = TRIALS[int(losses.reshape(len(TRIALS), -1).sum(dim=1).argmin())]
        chosen = scales if stretch == 1 else fmt.stored(scales.float() * stretch)
        codes, errors, losses = _ldlq(exact, found, chosen, groups)
        if self.sweeps:
            codes, chosen = descend(exact, codes, chosen, fmt, damped(found), self.sweeps)
            errors = exact - LatticeWeight(codes, chosen, fmt).dequantize()
            losses = output_energy(errors, found.hessian) + found.factor.ridge * errors.double().square().sum(dim=1)
        plain = fmt.encode(sample, scales[rows])
        other = sample - LatticeWeight(plain, scales[rows], fmt).dequantize()
        metrics = report(exact, errors, losses, other, rows, found)
        return Rounded(LatticeWeight(codes, chosen, fmt), {**metrics, "stretch": stretch})


def damped(found: BlockFactor) -> torch.Tensor:
    """H + λI [K, K] in float32, in the order of W: the metric that the feedback rounds in."""
    metric = found.hessian.to(torch.float32, copy=True)
    metric.diagonal().add_(found.factor.ridge)
    return metric


def report(
    exact: torch.Tensor,
    errors: torch.Tensor,
    losses: torch.Tensor,
    other: torch.Tensor,
    rows: torch.Tensor,
    found: BlockFactor,
) -> dict[str, float]:
    """Metrics of a weight rounded with feedback.

    Args:
        exact, errors: W and W - Ŵ [N, K].
        losses: what `feedback` returned, [N].
        other: errors of rounding to nearest on the rows `rows` of W, [n, K].
    """
    own = output_energy(errors[rows], found.hessian).sum().item()
    total = losses.sum().item()
    noise = total - found.factor.ridge * torch.linalg.vector_norm(errors, dtype=torch.float64).item() ** 2
    # A small difference of large numbers is computed in full instead.
    if len(rows) == len(exact):
        noise = own
    elif noise < 1e-3 * total:
        noise = output_energy(errors, found.hessian).sum().item()
    signal = output_energy(exact, found.hessian).sum().item()
    nearest_loss = output_energy(other, found.hessian).sum().item()
    return {
        "sqnr_db": sqnr_db(signal, noise),
        "loss": noise,
        "loss_rtn": nearest_loss * (noise / own if own > 0 else len(exact) / len(rows)),
        "damp": found.factor.damp,
        "damp_tries": float(found.factor.tries),
    }


def check_factor(found: BlockFactor, width: int, block: int) -> None:
    """Refuse statistics of another layer, or made for blocks of another size."""
    if len(found.order) != width:
        what = f"the Hessian is of {len(found.order)} input features, the weight of {width}"
        raise CalibrationError(what, where="hessian", remedy="Use the statistics of this layer")
    if found.block != block:
        what = f"the factor was made for blocks of {found.block} columns, not of {block}"
        raise ContractError(what, where="hessian", remedy="Call prepare() of the rounding that rounds")


def _ldlq(
    exact: torch.Tensor, found: BlockFactor, scales: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint16 [N, K/8], errors [N, K], damped losses [N]."""
    count, width = exact.shape
    codes = torch.empty(width // DIM, count, dtype=torch.int32, device=exact.device)
    table, divisor = scales.float().T.contiguous(), divisors(scales).T.contiguous()
    points = codebook().to(exact.device).T.contiguous()

    def choose(block: int, aim: torch.Tensor) -> torch.Tensor:
        group = block * DIM * groups // width
        vectors = aim / divisor[group]
        for start in range(0, count, CHUNK):
            codes[block, start : start + CHUNK] = nearest(vectors[:, start : start + CHUNK])
        return points.index_select(1, codes[block]) * table[group]

    errors, losses = feedback(exact, found, choose)
    return codes.T.contiguous().to(torch.uint16), errors, losses
