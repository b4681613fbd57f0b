"""cayley: steps stay on the manifold, go along it, and find the closed form of a problem that has one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlqc import cayley as module
from dlqc.cayley import (
    CayleySGD,
    cayley,
    nearest_orthogonal,
    orthogonality_error,
    random_hadamard,
    random_orthogonal,
    skew,
)
from dlqc.errors import ContractError


def orthonormal(n: int, p: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(n, p, generator=generator, dtype=torch.float64))[0]
    return q


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tangent_by_least_squares(x: Tensor, m: Tensor) -> Tensor:
    """The nearest Z to m with XᵀZ + ZᵀX = 0, from the equations alone: the null space of the constraint, projected on."""
    n, p = x.shape
    units = torch.eye(n * p, dtype=torch.float64).reshape(n * p, n, p)
    constraint = torch.stack([(x.mT @ u + u.mT @ x).flatten() for u in units], dim=1)
    _, s, vt = torch.linalg.svd(constraint)
    null = vt[int((s > 1e-9).sum()) :]
    nearest: Tensor = (null.T @ (null @ m.flatten())).reshape(n, p)
    return nearest


@pytest.mark.parametrize(("n", "p"), [(5, 5), (6, 3), (4, 1)])
def test_the_direction_is_the_part_along_the_manifold(n: int, p: int) -> None:
    x, m = orthonormal(n, p), normal(n, p)
    w = skew(x, m)
    assert torch.equal(w, -w.mT)
    assert torch.allclose(w @ x, tangent_by_least_squares(x, m), atol=1e-12)


@pytest.mark.parametrize(("n", "p"), [(5, 5), (6, 3)])
def test_the_curve_starts_in_that_direction(n: int, p: int) -> None:
    """The curve t → cayley(x, t·W) leaves x along W·X: central differences, whose error is of order t²."""
    x, m, t = orthonormal(n, p), normal(n, p), 1e-5
    w = skew(x, m)
    slope = (cayley(x, t * w) - cayley(x, -t * w)) / (2 * t)
    assert torch.allclose(slope, w @ x, atol=1e-8)


def test_the_step_is_the_formula() -> None:
    x = orthonormal(5, 5)
    w = skew(x, normal(5, 5))
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(cayley(x, w), torch.linalg.inv(eye - w / 2) @ (eye + w / 2) @ x, atol=1e-13)
    assert torch.allclose(cayley(x, w).mT @ cayley(x, w), eye, atol=1e-13)


def test_rounds_come_near_the_exact_step() -> None:
    """α/2·‖W‖ ≤ 1/2 halves the error each round, or better."""
    x = orthonormal(8, 8)
    w = skew(x, normal(8, 8))
    w = w / w.abs().sum(dim=0).max()
    errors = [float((cayley(x, w, rounds) - cayley(x, w)).abs().max()) for rounds in (1, 3, 5, 30)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < errors[0] / 16
    assert errors[3] < 1e-10


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(12, 12), (9, 4), (3, 6, 6)])
def test_thousand_steps_stay_on_the_manifold(momentum: float, shape: tuple[int, ...]) -> None:
    x = nearest_orthogonal(normal(*shape))
    before = x.clone()
    optimizer = CayleySGD([x], momentum=momentum)
    generator = torch.Generator().manual_seed(2)
    for _ in range(1000):
        optimizer.step([torch.randn(shape, generator=generator, dtype=torch.float64)], 1.5)
    assert orthogonality_error(x) < 1e-10
    assert float((x - before).abs().max()) > 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("rounds", [None, 5])
def test_descends_to_the_answer_of_procrustes(momentum: float, rounds: int | None) -> None:
    """min ‖A·X - B‖ over orthogonal X has the solution U·Vᵀ, A Bᵀ's singular vectors (Schönemann 1966)."""
    a = normal(30, 6, seed=3)
    b = a @ orthonormal(6, 6, seed=4) + 0.1 * normal(30, 6, seed=5)
    u, _, vt = torch.linalg.svd(a.T @ b)
    answer = u @ vt
    x = answer @ cayley(torch.eye(6, dtype=torch.float64), 0.3 * (normal(6, 6) - normal(6, 6).T))
    start, optimizer = float((a @ x - b).norm()), CayleySGD([x], momentum=momentum, rounds=rounds)
    losses = []
    for i in range(400):
        losses.append(float((a @ x - b).norm()))
        optimizer.step([2 * a.T @ (a @ x - b)], 0.01 * (1 - i / 400))
        if rounds is not None:
            x.copy_(nearest_orthogonal(x))
    assert losses[-1] < start / 2
    assert torch.allclose(x, answer, atol=1e-6)
    assert losses[-1] == pytest.approx(float((a @ answer - b).norm()), abs=1e-9)


def test_a_step_goes_downhill_and_is_no_longer_than_lr() -> None:
    target = orthonormal(7, 7, seed=8)
    x = orthonormal(7, 7, seed=9)
    before, old = float((x - target).square().sum()), x.clone()
    CayleySGD([x]).step([2 * (x - target)], 1e-3)
    assert 0 < before - float((x - target).square().sum()) < 0.1
    w = skew(old, -2 * (old - target))
    assert torch.allclose(x, cayley(old, 1e-3 * w), atol=1e-14)
    CayleySGD([x]).step([2000 * (x - target)], 1.5)  # now 1/‖W‖₁ is what holds it back
    assert orthogonality_error(x) < 1e-13


def test_a_gradient_across_the_manifold_moves_nothing() -> None:
    x = orthonormal(6, 6)
    before = x.clone()
    CayleySGD([x]).step([x @ (normal(6, 6) + normal(6, 6).T)], 1.0)  # x·S, S symmetric: normal to the manifold
    assert torch.allclose(x, before, atol=1e-14)
    CayleySGD([x]).step([torch.zeros(6, 6, dtype=torch.float64)], 1.0)
    assert torch.allclose(x, before, atol=1e-14)


def test_the_nearest_orthogonal_matrix() -> None:
    """Nearer than any of many others, and itself where there is nothing to correct."""
    m = orthonormal(5, 5) + 0.05 * normal(5, 5)
    near = nearest_orthogonal(m)
    assert orthogonality_error(near) < 1e-14
    others = [cayley(near, 0.05 * (normal(5, 5, seed=s) - normal(5, 5, seed=s).T)) for s in range(50)]
    assert all(float((near - m).norm()) < float((o - m).norm()) for o in others)
    assert torch.allclose(nearest_orthogonal(near), near, atol=1e-14)


@pytest.mark.parametrize("n", [1, 7, 12, 64, 92])
@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
def test_starts(n: int, make: Callable[[int, int], Tensor]) -> None:
    found = make(n, 3)
    assert orthogonality_error(found) < 1e-13
    assert torch.equal(found, make(n, 3))
    assert n == 1 or not torch.equal(found, make(n, 4))
    if make is random_hadamard and n in (12, 64):
        assert torch.allclose(found.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), atol=1e-14)


def test_errors() -> None:
    singular = torch.diag(torch.tensor([1.0, 1.0, 1e-9]))
    with pytest.raises(ContractError) as caught:
        nearest_orthogonal(singular)
    assert str(caught.value) == (
        "rotation: a matrix with condition number 1e+09 has no nearest orthogonal one. Lower the learning rate"
    )
    with pytest.raises(ContractError) as caught:
        nearest_orthogonal(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]]))
    assert str(caught.value) == "rotation: 2 of 4 entries of a matrix are not finite. Lower the learning rate"
    with pytest.raises(ContractError) as caught:
        CayleySGD([2 * torch.eye(3)])
    assert str(caught.value) == (
        "matrices: a matrix [3, 3] has columns that are off orthonormal by 3. Start from nearest_orthogonal(matrix)"
    )


def test_a_planted_error_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the antisymmetric part, steps leave the manifold."""
    monkeypatch.setattr(module, "skew", lambda x, m: m @ x.mT)
    x = orthonormal(6, 6)
    optimizer = CayleySGD([x])
    for _ in range(3):
        optimizer.step([normal(6, 6)], 1.0)
    assert orthogonality_error(x) > 1e-3
