"""Descent on lattice codes: monotone, at a local optimum, near the best of all 65,536 codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import RecipeError
from dlqc.formats.lattice import LatticeFormat, LatticeWeight, code_of, codebook
from dlqc.rounding.descent import WORTH, descend, roots
from dlqc.rounding.vector import Ldlq


def inputs(width: int, rows: int, seed: int) -> torch.Tensor:
    """H of correlated inputs whose channels have different sizes; singular where rows < width."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64) + 2 * torch.eye(width)
    x = torch.randn(rows, width, generator=rng, dtype=torch.float64) @ mix
    return x.T @ x / rows + 0.01 * torch.eye(width)


def loss(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, fmt: LatticeFormat, h: torch.Tensor
) -> torch.Tensor:
    error = weight.double() - LatticeWeight(codes, scales, fmt).dequantize().double()
    return ((error @ h) * error).sum(dim=1)


def test_the_moves_are_the_roots_of_e8() -> None:
    moves = roots().double()
    assert moves.unique(dim=0).shape == (240, 8)
    assert torch.equal(moves.square().sum(1), torch.full((240,), 2.0, dtype=torch.float64))
    products = (moves @ moves.T).unique()  # the root system of E8: inner products are whole, from -2 to 2
    assert products.tolist() == [-2, -1, 0, 1, 2]
    # They lead from a point of the codebook to points of the same lattice: nearly all of them are in it again.
    inner = codebook()[codebook().square().sum(1) < 3]
    landed = (inner[:50, None] + roots()).reshape(-1, 8)
    assert bool((code_of(landed) >= 0).all())


def test_code_of_is_the_inverse_of_the_codebook_and_knows_strangers() -> None:
    points = codebook()
    assert torch.equal(code_of(points).long(), torch.arange(1 << 16))
    outside = points.clone()
    outside[:, 0] += 6  # still on the lattice's cosets, far outside of the ball
    assert bool((code_of(outside) == -1).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([None, 8, 16]), st.integers(2, 40), st.integers(0, 10**6))
def test_no_row_gets_worse(rows: int, vectors: int, group: int | None, samples: int, seed: int) -> None:
    width = 8 * vectors
    fmt = LatticeFormat(group if group and width % group == 0 else None)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight[0, : width // 2] = 0
    h = inputs(width, samples, seed)
    start = fmt.quantize(weight)
    before = loss(weight, start.codes, start.scales, fmt, h)
    for sweeps in (1, 2, 3):
        codes, scales = descend(weight, start.codes, start.scales, fmt, h, sweeps)
        after = loss(weight, codes, scales, fmt, h)
        assert bool((after <= before * (1 + 1e-4) + 1e-12).all())
        before = after


def test_it_ends_where_no_neighbour_is_better() -> None:
    fmt = LatticeFormat(scale_dtype="float32")
    weight, h = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), inputs(32, 80, 1)
    start = fmt.quantize(weight)
    codes, scales = descend(weight, start.codes, start.scales, fmt, h, 30)
    ended = LatticeWeight(codes, scales, fmt).dequantize().double()
    gain = loss(weight, start.codes, start.scales, fmt, h).sum() / loss(weight, codes, scales, fmt, h).sum()
    assert gain > 1.5
    points = codebook()[codes.long()]
    for row in range(6):
        for vector in range(4):
            landed = points[row, vector] + roots()
            there = landed[code_of(landed) >= 0].double() * float(scales[row, 0])
            trial = ended[row].repeat(len(there), 1)
            trial[:, 8 * vector : 8 * vector + 8] = there
            error = weight[row].double() - trial
            least = ((error @ h) * error).sum(1).min()
            error = weight[row].double() - ended[row]
            own = (error @ h) @ error
            curvature = 2 * float(scales[row, 0]) ** 2 * float(torch.linalg.eigvalsh(h).max())
            assert least >= own - 2 * WORTH * curvature


def test_a_single_vector_is_near_the_best_of_all_codes() -> None:
    """Exhaustive: the codebook has 65,536 points. Where H is far from diagonal, nearest is far from best."""
    fmt = LatticeFormat(scale_dtype="float32")
    weight, h = torch.randn(24, 8, generator=torch.Generator().manual_seed(3)), inputs(8, 12, 3)
    start = fmt.quantize(weight)
    codes, scales = descend(weight, start.codes, start.scales, fmt, h, 10)
    reached = loss(weight, codes, scales, fmt, h)
    best = []
    for row, scale in zip(weight.double(), scales.double(), strict=True):
        error = row - codebook().double() * scale
        best.append(((error @ h) * error).sum(1).min())
    optimum = torch.stack(best)
    nearest = loss(weight, start.codes, start.scales, fmt, h)
    assert bool((reached >= optimum - 1e-6).all())
    assert reached.sum() < 1.6 * optimum.sum() < nearest.sum()


def test_ldlq_uses_it_and_reports_the_loss_of_what_it_returns() -> None:
    weight, h = torch.randn(20, 64, generator=torch.Generator().manual_seed(4)), inputs(64, 200, 4)
    fmt = LatticeFormat()
    alone, helped = (Ldlq(sweeps=sweeps).round(weight, fmt, {"hessian": h}) for sweeps in (0, 2))
    assert helped.metrics["loss"] < 0.9 * alone.metrics["loss"]
    exact = loss(weight, helped.weight.codes, helped.weight.scales, fmt, h).sum()
    assert helped.metrics["loss"] == pytest.approx(float(exact), rel=1e-4)


def test_rows_of_zeros_stay_zero() -> None:
    weight, h = torch.zeros(3, 16), inputs(16, 40, 5)
    weight[1] = torch.randn(16, generator=torch.Generator().manual_seed(5))
    found = Ldlq().round(weight, LatticeFormat(), {"hessian": h}).weight.dequantize()
    assert not found[[0, 2]].any()
    assert bool(found[1].any())


def test_a_negative_number_of_sweeps_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"-1 sweeps are impossible.*Use 0 for LDLQ alone"):
        Ldlq(sweeps=-1)
