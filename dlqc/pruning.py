"""Pruning: which weights of a matrix W [N, K] stay, and what they become.

    magnitude     score |W|, the smallest of the whole matrix go
    wanda         score |W_nk|·‖x_k‖₂, the smallest of each row go                   (Sun et al., arXiv 2306.11695, equation 1)
    sparsegpt     score w²·R_kk², w as corrected so far; the smallest of each block of 128 columns go, and the others are
                  moved to make up for them                                        (Frantar and Alistarh, arXiv 2301.00774)

With an n:m pattern the n largest scores of every m neighbours in a row stay, whatever the method.

SparseGPT is GPTQ with "round to nearest" replaced by "set to zero where the mask says so" (`dlqc.rounding.gptq` has the algebra:
H = R·Rᵀ, t_k = w_k + Σ_{j<k} (w_j - ŵ_j)·R_jk / R_kk, and here ŵ_k = t_k or 0). Its paper writes the score as w²/[U_kk]²,
H⁻¹ = UᵀU; U_kk = 1/R_kk. The mask of a block of columns is chosen on entering it, from the weights w that are best there given
all errors so far, with those of the block still free: near·(w - W) = t' - W for the t' that lacks the errors inside the block.
n:m patterns are chosen m columns at a time likewise.

Beyond the paper: its sweep moves only the columns after a pruned one. `refine` goes on on the mask that it found, to the weights
that are best there, Ŵ_S with (Ŵ H)_S = (W H)_S for the kept places S of each row, by conjugate gradients for all rows at once
(preconditioned with the diagonal). Each step costs one product with H and none raises the loss.

Ties of scores are broken by position. Scores and feedback in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlqc.errors import CalibrationError, RecipeError
from dlqc.rounding.hessian import MAX_DAMP, Factor, energy, factorize, sqnr_db

_PATTERN = re.compile(r"(\d{1,3}):(\d{1,3})")


@dataclass(frozen=True)
class Pattern:
    """How many weights go, and where.

    Attributes:
        ratio: share of the weights that go.
        kept, of: at most `kept` of every `of` neighbours in a row stay; of=0 sets no pattern.
    """

    ratio: float
    kept: int = 0
    of: int = 0

    @classmethod
    def read(cls, ratio: float, text: str | None) -> Pattern:
        """From the options of a pass: a ratio, or a pattern such as "2:4"."""
        if text is None:
            if not 0 < ratio < 1:
                raise RecipeError(f"a ratio of {ratio} is not between 0 and 1", where="ratio", remedy="Use 0.5")
            return cls(ratio)
        found = _PATTERN.fullmatch(text)
        kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < kept < of:
            what = f"{text!r} is no pattern of so many weights that stay among so many"
            raise RecipeError(what, where="pattern", remedy="Use '2:4', '4:8', or None and ratio=")
        return cls(1 - kept / of, kept, of)

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> Pattern.read(0.5, "2:4").label, Pattern.read(0.6, None).label
        ('2:4', '60%')
        """
        return f"{self.kept}:{self.of}" if self.of else f"{100 * self.ratio:g}%"

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be pruned so, else the reason it cannot, one clause."""
        if self.of == 0 or (in_features > 0 and in_features % self.of == 0):
            return None
        return f"{in_features} input features do not divide into groups of {self.of}"

    def of_groups(self, scores: Tensor) -> Tensor:
        """The mask, bool [N, K], of the largest scores [N, K] in each group of a row."""
        grouped = scores.reshape(len(scores), -1, self.of)
        order = grouped.argsort(dim=-1, descending=True, stable=True)
        return (
            torch.zeros_like(grouped, dtype=torch.bool)
            .scatter_(-1, order[..., : self.kept], True)
            .reshape(scores.shape)
        )

    def of_rows(self, scores: Tensor) -> Tensor:
        """The mask, bool [N, K]: in each row the ⌊ratio·K⌋ smallest scores go, or all but n of m."""
        if self.of:
            return self.of_groups(scores)
        order = scores.argsort(dim=1, stable=True)
        return torch.ones_like(scores, dtype=torch.bool).scatter_(
            1, order[:, : int(self.ratio * scores.shape[1])], False
        )

    def of_all(self, scores: Tensor) -> Tensor:
        """The mask, bool of the shape of `scores`: the ⌊ratio·N·K⌋ smallest of all go, or all but n of m."""
        if self.of:
            return self.of_groups(scores)
        return self.of_rows(scores.reshape(1, -1)).reshape(scores.shape)


@dataclass(frozen=True, eq=False)
class PrunedWeight:
    """What a method made of a weight.

    Attributes:
        kept: bool [N, K].
        moved: float32 [N, K], zero where pruned; None if the kept weights are as they were.
        metrics: numbers for the report.
    """

    kept: Tensor
    moved: Tensor | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Pruning:
    """Base of the pruning methods: a frozen dataclass whose fields are the options.

    Class attributes: name, its spelling in recipes; statistics, what it needs of the inputs (`dlqc.stats`).
    """

    name: ClassVar[str]
    statistics: ClassVar[frozenset[str]] = frozenset()

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do the work on the statistics that linears with the same input can share."""
        return stats

    def prune(self, weight: Tensor, pattern: Pattern, stats: Mapping[str, Any]) -> PrunedWeight:
        """Prune `weight` [N, K]. Pure: no argument is changed."""
        raise TypeError(f"{type(self).__name__} does not define prune()")


@dataclass(frozen=True)
class Magnitude(Pruning):
    """The weights with the smallest magnitude go."""

    name: ClassVar[str] = "magnitude"

    def prune(self, weight: Tensor, pattern: Pattern, stats: Mapping[str, Any]) -> PrunedWeight:
        return PrunedWeight(pattern.of_all(weight.float().abs()), None, {})


@dataclass(frozen=True)
class Wanda(Pruning):
    """The weights with the smallest magnitude times the norm of their input feature go, row by row."""

    name: ClassVar[str] = "wanda"
    statistics: ClassVar[frozenset[str]] = frozenset({"energy"})

    def prune(self, weight: Tensor, pattern: Pattern, stats: Mapping[str, Any]) -> PrunedWeight:
        energies = _given(stats, "energy", self.name)
        if energies.shape != weight.shape[1:]:
            what = f"the energies are of {len(energies)} input features, the weight of {weight.shape[1]}"
            raise CalibrationError(what, where="energy", remedy="Use the statistics of this layer")
        return PrunedWeight(pattern.of_rows(weight.float().abs() * energies.sqrt().float()), None, {})


@dataclass(frozen=True)
class SparseGpt(Pruning):
    """Weights go by what they cost the output, and the others are moved to make up for them.

    Options:
        block: columns whose mask is chosen together, where there is no n:m pattern.
        damp: the first λ tried, as a fraction of the mean diagonal of H.
        refine: steps towards the best weights on the mask, beyond the paper; 0 is the paper's.

    Metrics: `sqnr_db` of the output and `loss`, tr(E H Eᵀ), both estimated on up to 128 rows.
    """

    name: ClassVar[str] = "sparsegpt"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    block: int = 128
    damp: float = 0.01
    refine: int = 8

    def __post_init__(self) -> None:
        if self.refine < 0:
            raise RecipeError(f"{self.refine} steps are impossible", where="refine", remedy="Use 8, or 0")
        if self.block < 1:
            raise RecipeError(f"a block of {self.block} columns is impossible", where="block", remedy="Use 128")
        if not 0 <= self.damp <= MAX_DAMP:
            what = f"damping of {self.damp} times the mean diagonal is not within 0 and {MAX_DAMP:g}"
            raise RecipeError(what, where="damp", remedy="Use 0.01")

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Factorize the Hessian, columns as they stand."""
        hessian = stats.get("hessian")
        if not isinstance(hessian, Tensor):
            return stats
        return {**stats, "hessian": factorize(hessian, act_order=False, damp=self.damp, dtype=torch.float32)}

    def prune(self, weight: Tensor, pattern: Pattern, stats: Mapping[str, Any]) -> PrunedWeight:
        factor = _given(stats, "hessian", self.name)
        if not isinstance(factor, Factor):
            factor = factorize(factor, act_order=False, damp=self.damp, dtype=torch.float32)
        if len(factor.order) != weight.shape[1]:
            what = f"the Hessian is of {len(factor.order)} input features, the weight of {weight.shape[1]}"
            raise CalibrationError(what, where="hessian", remedy="Use the statistics of this layer")
        exact = weight.float()
        kept, moved = sparsegpt(exact, factor, pattern, self.block)
        moved = refine(exact, moved, kept, factor, self.refine)
        rows = torch.linspace(0, len(exact) - 1, min(len(exact), 128)).round().long()
        signal, noise = (energy(part, factor.hessian, rows) for part in (exact, exact - moved))
        return PrunedWeight(kept, moved, {"sqnr_db": sqnr_db(signal, noise), "loss": noise})


Method = Magnitude | Wanda | SparseGpt


def _given(stats: Mapping[str, Any], name: str, method: str) -> Any:
    if stats.get(name) is None:
        remedy = "Collect it, or use method=magnitude"
        raise CalibrationError(f"{method} needs the statistic {name!r}", remedy=remedy)
    return stats[name]


def sparsegpt(weight: Tensor, factor: Factor, pattern: Pattern, block: int = 128) -> tuple[Tensor, Tensor]:
    """The mask, bool [N, K], and the kept weights as moved, float32 [N, K], zero elsewhere.

    Args:
        factor: of H, with act_order=False: its rows and columns stand in reversed order of the columns of W.
        block: columns whose mask is chosen together.
    """
    order, width = factor.order, len(factor.order)
    # Rows are columns of W, the last first; they are pruned from the bottom up.
    work = weight.float().T.contiguous().index_select(0, order)
    moved, kept = torch.empty_like(work), torch.empty_like(work, dtype=torch.bool)
    # Where the mask of m columns is chosen at a time, blocks are only those of the products.
    together = pattern.of or block
    block = max(block // together, 1) * together
    for stop in range(width, 0, -block):
        start = max(0, stop - block)
        pivots = factor.pivots[start:stop].float().unsqueeze(1)
        feedback = factor.upper[start:stop, start:].float() / pivots
        size = stop - start
        target = torch.addmm(work[start:stop], feedback[:, size:], work[stop:])
        for last in range(size, 0, -together):
            part = slice(max(0, last - together), last)
            rows = slice(start + part.start, start + last)
            aim, near = target[part], feedback[part, part]
            if last < size:
                aim.addmm_(feedback[part, last:size], work[start + last : stop])
            free = work[rows] + torch.linalg.solve_triangular(near, aim - work[rows], upper=True, unitriangular=True)
            scores = (free * pivots[part]).abs()
            kept[rows] = pattern.of_groups(scores.T.contiguous()).T if pattern.of else pattern.of_all(scores)
            _prune_columns(aim, work[rows], moved[rows], near, kept[rows])
    back = torch.argsort(order)
    return kept[back].T.contiguous(), moved[back].T.contiguous()


def refine(weight: Tensor, moved: Tensor, kept: Tensor, factor: Factor, steps: int) -> Tensor:
    """The kept weights after some steps of conjugate gradients, float32 [N, K].

    The objective is tr((W-Ŵ)(H + λI)(W-Ŵ)ᵀ), with the λ of `factor`.
    """
    metric, mask = factor.hessian.to(torch.float32, copy=True), kept.float()
    metric.diagonal().add_(factor.ridge)
    found = moved.clone()
    inverse = metric.diagonal().clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    residual = (weight - found) @ metric * mask
    direction = residual * inverse
    energy = (residual * direction).sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = direction @ metric * mask
        bend = (direction * image).sum(dim=1, keepdim=True)
        # A row that is done has neither energy nor bend left.
        step = torch.where(bend > 0, energy / torch.where(bend > 0, bend, 1.0), 0.0)
        found += step * direction
        residual -= step * image
        scaled = residual * inverse
        after = (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled + torch.where(energy > 0, after / torch.where(energy > 0, energy, 1.0), 0.0) * direction
        energy = after
    return found


def _prune_columns(target: Tensor, work: Tensor, moved: Tensor, near: Tensor, kept: Tensor) -> None:
    """From the last row to the first: t where it is kept, else 0. `work` turns from w to w - ŵ, `moved` becomes ŵ."""
    for row in range(len(target) - 1, -1, -1):
        aim = target[row].addmv_(work[row + 1 :].T, near[row, row + 1 :])
        torch.mul(aim, kept[row], out=moved[row])
        work[row] -= moved[row]
