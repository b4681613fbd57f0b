"""Cayley SGD: descent over matrices with orthonormal columns (Li, Fuxin and Todorovic 2020, arXiv 2002.01113, algorithm 1).

X is [n, p] with XᵀX = I, G the gradient of the loss at X, M the momentum. One step:

    M ← β·M - G
    Ŵ = M·Xᵀ - ½·X·(Xᵀ·M·Xᵀ),   W = Ŵ - Ŵᵀ                    skew; W·X is the part of M along the manifold
    M ← W·X                                                    what lies across it is forgotten
    α = min(lr, 1/‖W‖₁)
    X ← (I - α/2·W)⁻¹·(I + α/2·W)·X                            the Cayley transform of a skew matrix is orthogonal

The last line is solved exactly, or by a few rounds of Y ← X + α/2·W·(X + Y) from Y = X + α·W·X, whose error shrinks by half
or more each round, because α/2·‖W‖ ≤ ½. Leading dimensions are a batch of independent matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dlqc import hadamard
from dlqc.errors import ContractError
from dlqc.transform import Diagonal, Hadamard, chain

_SMALLEST = 1e-30


class CayleySGD:
    """Updates matrices in place.

    Args:
        matrices: [..., n, p] with orthonormal columns; float64 keeps them so to the last digits.
        momentum: β.
        rounds: rounds of the fixed point; None solves exactly.
    """

    def __init__(self, matrices: Sequence[torch.Tensor], *, momentum: float = 0.0, rounds: int | None = None) -> None:
        for x in matrices:
            error = orthogonality_error(x)
            if not error <= 1e-3:
                raise ContractError(
                    f"a matrix {list(x.shape)} has columns that are off orthonormal by {error:.3g}",
                    where="matrices",
                    remedy="Start from nearest_orthogonal(matrix)",
                )
        self._matrices = list(matrices)
        self._momentum = momentum
        self._rounds = rounds
        self._directions = [torch.zeros_like(x, requires_grad=False) for x in matrices]

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], lr: float) -> None:
        """One step of each matrix against its gradient; lr is the largest α."""
        for x, g, m in zip(self._matrices, gradients, self._directions, strict=True):
            w = skew(x, self._momentum * m - g.to(x.dtype))
            m.copy_(w @ x)
            size = w.abs().sum(dim=-2).amax(dim=-1)
            alpha = torch.clamp(1.0 / size.clamp_min(_SMALLEST), max=lr)[..., None, None]
            x.copy_(cayley(x, alpha * w, self._rounds))


def skew(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """W [..., n, n] with Wᵀ = -W, such that W·X is m without what leads off the manifold: m - X·sym(Xᵀ·m)."""
    hat = m @ x.mT - 0.5 * x @ (x.mT @ m @ x.mT)
    return hat - hat.mT


def cayley(x: torch.Tensor, w: torch.Tensor, rounds: int | None = None) -> torch.Tensor:
    """(I - W/2)⁻¹·(I + W/2)·X for a skew W, exactly or by a fixed point."""
    if rounds is None:
        eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        turned: torch.Tensor = torch.linalg.solve(eye - 0.5 * w, x + 0.5 * w @ x)
        return turned
    y = x + w @ x
    for _ in range(rounds):
        y = x + 0.5 * w @ (x + y)
    return y


def nearest_orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The matrix with orthonormal columns that is nearest to x [..., n, p]: its polar factor, float64.

    Raises:
        ContractError: x is not finite, or has no nearest one because it is singular.
    """
    x = x.detach().to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        count = int((~torch.isfinite(x)).sum())
        raise ContractError(
            f"{count} of {x.numel()} entries of a matrix are not finite",
            where="rotation",
            remedy="Lower the learning rate",
        )
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    condition = float((s[..., 0] / s[..., -1]).max())
    if not condition <= 1e6:
        raise ContractError(
            f"a matrix with condition number {condition:.3g} has no nearest orthogonal one",
            where="rotation",
            remedy="Lower the learning rate",
        )
    nearest: torch.Tensor = u @ vt
    return nearest


def orthogonality_error(x: torch.Tensor) -> float:
    """max |XᵀX - I|; NaN where X is not finite."""
    x = x.detach().to(torch.float64)
    eye = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    return float((x.mT @ x - eye).abs().max())


def random_hadamard(n: int, seed: int) -> torch.Tensor:
    """diag(±1)·H/√n, float64 [n, n]; in blocks of the largest order that divides n where there is no H of order n."""
    return chain(Diagonal(hadamard.signs(n, seed)), Hadamard(n, hadamard.largest_block(n))).matrix()


def random_orthogonal(n: int, seed: int) -> torch.Tensor:
    """A uniform (Haar) random orthogonal matrix, float64 [n, n]."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    turned: torch.Tensor = q * r.diagonal().sign()
    return turned
