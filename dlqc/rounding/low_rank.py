"""A correction of low rank for what rounding leaves: W ≈ Ŵ + A·B, A [N, r], B [r, K].

    minimise  tr((E - A·B) H (E - A·B)ᵀ),   E = W - Ŵ

weighting   H
"hessian"   Σ c·x·xᵀ: the error of the layer's output, minimised exactly (QERA, Zhang et al., arXiv 2410.06040)
"diagonal"  its diagonal, as if the features of x were uncorrelated (QERA-approx; L²QER of Zhang et al., arXiv 2402.02446, with
            mean |x| in place of the root of the mean x²)
"none"      1: the plain SVD (ZeroQuant-V2's LoRC, Yao et al., arXiv 2303.08302; LQER)

With H = L·Lᵀ this is the problem of Eckart and Young for E·L: A·B·L = U_r·Σ_r·V_rᵀ, its best part of rank r. That is
U_r·U_rᵀ·E·L, so

    A = U_r,   B = U_rᵀ·E,   U_r the r leading eigenvectors of E H Eᵀ [N, N],

which needs neither L nor an inverse and holds for a singular H. Where N > K, E = Q·R with orthonormal Q [N, K], and U_r = Q·Z_r,
Z_r those of R H Rᵀ [K, K]. Float64; 2·N·K·(N + K) flops and an eigendecomposition of order min(N, K).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.coded import spell
from dlqc.formats.low_rank import LowRankFormat
from dlqc.graph import QUANTIZED_LINEARS, args_of, call_before, follow, is_call, read, site_name
from dlqc.ops import LOW_RANK
from dlqc.rounding.hessian import output_energy, sqnr_db
from dlqc.weights import Weights

Weighting = Literal["hessian", "diagonal", "none"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A correction.

    Attributes:
        parts: the tensors that are stored, by role.
        rest: what they leave of the error, float64 [N, K].
        bits_per_weight: what they take.
        metrics: numbers for the report.
    """

    parts: dict[str, torch.Tensor]
    rest: torch.Tensor
    bits_per_weight: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class LowRank:
    """What is added to each quantized linear.

    Attributes:
        rank: r.
        weighting: whose error is minimised, see the module docstring.
        dtype: what the factors are stored in, "bfloat16", "float16" or "int8".
    """

    name: ClassVar[str] = "low_rank"

    rank: int = 16
    weighting: Weighting = "hessian"
    dtype: str = "int8"

    def __post_init__(self) -> None:
        self.format  # noqa: B018  a wrong rank or dtype is refused here
        if self.weighting not in ("hessian", "diagonal", "none"):
            what = f"unknown weighting {self.weighting!r}"
            raise RecipeError(what, where="weighting", remedy="Use 'hessian', 'diagonal' or 'none'")

    @property
    def format(self) -> LowRankFormat:
        return LowRankFormat(self.rank, self.dtype)

    @property
    def statistics(self) -> frozenset[str]:
        """Statistics of the layer input that `fit` needs."""
        return frozenset() if self.weighting == "none" else frozenset({"hessian"})

    def fit(self, exact: torch.Tensor, error: torch.Tensor, hessian: torch.Tensor | None) -> Fit:
        """The correction of a weight [N, K] for the error E [N, K] of its rounding, both float64.

        Metrics: `low_rank_gain_db`, 10·log10 of the error that is minimised before over after, with the factors as stored; with
        a "hessian" also `sqnr_db` and `loss`, tr(E H Eᵀ), of what is left.
        """
        moment = self._moment(hessian)
        parts = self.format.store(*leading(error, moment, self.rank))
        left, right = (factor.double() for factor in self.format.factors(parts))
        rest = error - left.T @ right
        metrics = {"low_rank_gain_db": sqnr_db(_energy(error, moment), _energy(rest, moment))}
        if hessian is not None:
            loss = output_energy(rest, hessian).sum().item()
            metrics |= {"loss": loss, "sqnr_db": sqnr_db(output_energy(exact, hessian).sum().item(), loss)}
        return Fit(parts, rest, self.format.bits(*error.shape) / error.numel(), metrics)

    def _moment(self, hessian: torch.Tensor | None) -> torch.Tensor | None:
        """H [K, K], its diagonal [K], or None for 1."""
        if self.weighting == "none":
            return None
        if hessian is None:
            remedy = "Collect it, or use weighting='none'"
            raise CalibrationError("low_rank needs the statistic 'hessian'", where="low_rank", remedy=remedy)
        if not bool(torch.isfinite(hessian.sum(dtype=torch.float64))):
            remedy = "The layer's input overflowed: calibrate in bfloat16 or float32"
            raise CalibrationError("the Hessian is not finite", where="low_rank", remedy=remedy)
        return hessian.double() if self.weighting == "hessian" else hessian.diagonal().double()


def leading(error: torch.Tensor, moment: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Aᵀ [r, N] and B [r, K] of least tr((E - AB) H (E - AB)ᵀ) for E [N, K], float64; H [K, K], a diagonal [K], or None for 1."""
    count, width = error.shape
    basis, core = torch.linalg.qr(error) if count > width else (None, error)
    weighted = core if moment is None else core * moment if moment.dim() == 1 else core @ moment
    gram = weighted @ core.T
    vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, -rank:].flip(1)
    left = vectors if basis is None else basis @ vectors
    return left.T, vectors.T @ core


def add_low_rank(
    graph: fx.Graph,
    weights: Weights,
    nodes: Iterable[fx.Node],
    module: str,
    fmt: LowRankFormat,
    parts: Mapping[str, torch.Tensor],
) -> None:
    """Put a correction behind every call among `nodes` of the quantized linear `module`."""
    for role, part in parts.items():
        weights.put(f"{module}.low_rank.{role}", part)
    for node in nodes:
        if not is_call(node, *QUANTIZED_LINEARS) or site_name(node) != module:
            continue
        before = node.next
        factors = [read(graph, weights, f"{module}.low_rank.{role}", before) for role in sorted(parts)]
        follow(node, call_before(graph, before, LOW_RANK, (node, args_of(node)[0], factors, spell(fmt))))


def _energy(error: torch.Tensor, moment: torch.Tensor | None) -> float:
    """tr(E H Eᵀ)."""
    weighted = error if moment is None else error * moment if moment.dim() == 1 else error @ moment
    return float((weighted * error).sum())
