"""Learned invertible transforms, T = diag(c)·(P₁ ⊗ P₂), as functions of numbers that are free to move.

    P_i = start_i·U_i·diag(s_i)·V_iᵀ,    U, V Cayley transforms of skew matrices,    c, s exponentials
    T⁻ᵀ = diag(1/c)·(P₁⁻ᵀ ⊗ P₂⁻ᵀ),      P_i⁻ᵀ = start_i·U_i·diag(1/s_i)·V_iᵀ      for orthogonal starts

All of them are invertible, and no inverse is computed while learning, as in FlatQuant's code (arXiv 2410.09426).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.cayley import cayley
from dlqc.errors import ContractError
from dlqc.scaling import Edge
from dlqc.transform import WORST_CONDITION, Diagonal, Kronecker, Transform, blocks, chain

_SMALLEST = 1e-5  # lower bound of both factors of the start of c, as in SmoothQuant


@dataclass(frozen=True)
class Found:
    """A learned transform diag(c)·(P₁ ⊗ P₂); c by channel of what makes the value, or None."""

    c: Tensor | None
    kronecker: Transform
    condition: float

    def online(self, apart: bool) -> Transform:
        """What has to happen at run time, if diag(c) is folded elsewhere (`apart`) or not."""
        return self.kronecker if apart or self.c is None else chain(Diagonal(self.c), self.kronecker)


class Affine:
    """diag(c)·(P₁ ⊗ P₂) and its contragredient, differentiable.

    Args:
        starts: what P₁ and P₂ are at first, orthogonal.
        scaled: the edge into whose maker diag(c) is going to fold, if any.
        repeat: channels of the value for each entry of c.
    """

    def __init__(self, starts: Sequence[Tensor], scaled: Edge | None = None, repeat: int = 1) -> None:
        self._scaled, self._repeat = scaled, repeat
        self._starts = [start.float() for start in starts]
        self._sizes = tuple(len(start) for start in starts)
        self._log_c = torch.zeros(math.prod(self._sizes) // repeat)
        self._skew = [torch.zeros(2, n, n, requires_grad=True) for n in self._sizes]
        self._log_s = [torch.zeros(n, requires_grad=True) for n in self._sizes]

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the factors, and log c where it is learned."""
        return [*self._log_s, *self._skew, *([self._log_c] if self._log_c.requires_grad else [])]

    @torch.no_grad()
    def smooth(self, x: Tensor, matrices: Sequence[Tensor], alpha: float) -> None:
        """Learn c, too, from SmoothQuant's 1/s: max|W_j|^(1-α) / max|x_j|^α, but 1 where x or all W_j are zero."""
        active, column = x.abs().amax(dim=0), torch.stack([w.abs().amax(dim=0) for w in matrices]).amax(dim=0)
        if self._scaled is not None:
            active, column = (self._scaled.narrow(peaks, self._repeat) for peaks in (active, column))
        log_c = column.clamp_min(_SMALLEST).log() * (1 - alpha) - active.clamp_min(_SMALLEST).log() * alpha
        used = (active > 0) & (column > 0)
        # A factor that all channels share changes nothing; without it c is around 1.
        self._log_c = torch.where(used, log_c - log_c[used].mean(), 0.0).requires_grad_()

    def factors(self, undo: bool = False) -> list[Tensor]:
        """P₁ and P₂, or their contragredients."""
        found = []
        for start, skew, log_s in zip(self._starts, self._skew, self._log_s, strict=True):
            u, v = cayley(torch.eye(len(log_s)), skew - skew.mT)
            found.append(start @ u @ torch.diag((-log_s if undo else log_s).exp()) @ v.mT)
        return found

    def __call__(self, x: Tensor, undo: bool = False) -> Tensor:
        """x·T, or x·T⁻ᵀ."""
        c = (-self._log_c if undo else self._log_c).exp()
        left, right = self.factors(undo)
        wide = c if self._scaled is None else self._scaled.wide(c, self._repeat)
        return (left.mT @ ((x * wide).reshape(-1, *self._sizes) @ right)).reshape(x.shape)

    @torch.no_grad()
    def found(self) -> Found:
        """What there is now, in float64.

        Raises:
            ContractError: it is singular, or too ill-conditioned to undo.
        """
        left, right = (blocks(p) for p in self.factors())
        c = self._log_c.double().exp()
        condition = float(c.max() / c.min() * torch.linalg.cond(left.m[0]) * torch.linalg.cond(right.m[0]))
        if not condition <= WORST_CONDITION:
            what = f"the transform has condition number {condition:.3g}, more than {WORST_CONDITION:.0e}"
            raise ContractError(what, where="transform", remedy="Regularize what learned it, or train for fewer steps")
        return Found(c if self._log_c.requires_grad else None, Kronecker(left, right), condition)
