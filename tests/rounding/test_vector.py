import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import CalibrationError, ContractError, FeasibilityError, RecipeError
from dlqc.formats.integer import IntFormat
from dlqc.formats.lattice import LatticeFormat
from dlqc.rounding.gptq import Gptq, gptq
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.vector import OUTER, Ldlq, factorize_blocks, feedback, report


def hessian(width: int, rows: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with channels of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    sizes = torch.exp(torch.randn(width, generator=generator, dtype=torch.float64) / 2)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width)) * sizes
    return x.T @ x


def energy(error: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return ((error.double() @ h) * error.double()).sum(dim=1)


def textbook(weight: torch.Tensor, h: torch.Tensor, order: list[int], block: int, choose: object) -> torch.Tensor:
    """OPTQ in blocks: round a block, then move the rest to where they minimise tr(E H Eᵀ) given the error made."""
    w, fixed = weight.clone(), weight.clone()
    left = list(range(weight.shape[1]))
    for number in order:
        columns = list(range(number * block, number * block + block))
        fixed[:, columns] = choose(number, w[:, columns].T).T
        error = w[:, columns] - fixed[:, columns]
        left = [c for c in left if c not in columns]
        if left:
            w[:, left] += error @ torch.linalg.solve(h[left][:, left], h[left][:, columns]).T
    return fixed


@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_feedback_is_the_best_move_of_all_later_columns(block: int, act_order: bool) -> None:
    width = OUTER + 16
    weight, h = torch.randn(6, width, dtype=torch.float64), hessian(width)
    found = factorize_blocks(h, block, act_order=act_order, damp=0.01)
    damped = h + found.factor.ridge * torch.eye(width, dtype=torch.float64)

    def choose(number: int, aim: torch.Tensor) -> torch.Tensor:
        return (aim / (0.5 + 0.01 * number)).round() * (0.5 + 0.01 * number)

    errors, losses = feedback(weight, found, choose)
    sums = h.diagonal().reshape(-1, block).sum(dim=1)
    order = sums.argsort(descending=True).tolist() if act_order else list(range(width // block))
    expected = textbook(weight, damped, order, block, choose)
    torch.testing.assert_close(weight - errors, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses, energy(errors, damped), rtol=1e-9, atol=0)


def test_blocks_of_one_column_are_gptq() -> None:
    weight, h = torch.randn(30, 96), hessian(96)
    fmt = IntFormat(3, 32, scale_dtype="float32")
    scales, _ = fmt.parameters(weight)
    expected = gptq(weight, h, fmt, Gptq(clip="minmax")).weight.dequantize()
    found = factorize_blocks(h, 1)

    def choose(column: int, aim: torch.Tensor) -> torch.Tensor:
        scale = scales[:, column // 32]
        return (aim / scale).round().clamp(-4, 3) * scale

    errors, _ = feedback(weight, found, choose)
    assert (((weight - errors) - expected).abs() > 1e-5).float().mean() < 0.01


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([None, 8, 16]), st.booleans(), st.booleans())
def test_the_metrics_are_those_of_the_result(
    rows: int, vectors: int, group: int | None, act_order: bool, trial: bool
) -> None:
    fmt = LatticeFormat(group)
    width = 8 * vectors
    if fmt.check(width) is not None:
        return
    weight, h = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)), hessian(width)
    rounded = Ldlq(act_order=act_order, trial=trial).round(weight, fmt, {"hessian": h})
    error = energy(weight - rounded.weight.dequantize(), h).sum().item()
    assert rounded.metrics["loss"] == pytest.approx(error, rel=1e-3)
    ratio = energy(weight, h).sum() / error
    assert rounded.metrics["sqnr_db"] == pytest.approx(10 * ratio.log10().item(), abs=1e-2)


def test_more_rows_than_the_sample() -> None:
    weight, h = torch.randn(700, 128), hessian(128)
    rounded = Ldlq().round(weight, LatticeFormat(), {"hessian": h})
    error = energy(weight - rounded.weight.dequantize(), h).sum().item()
    assert rounded.metrics["loss"] == pytest.approx(error, rel=1e-3)
    plain = LatticeFormat().quantize(weight, refits=0)
    other = energy(weight - plain.dequantize(), h).sum().item()
    assert rounded.metrics["loss_rtn"] == pytest.approx(other, rel=0.1)
    assert error < 0.75 * other


def test_a_loss_that_is_nearly_all_damping_is_computed_in_full() -> None:
    # Errors in inputs that are almost silent: the damped loss less λ·‖E‖² would be roundoff.
    h = torch.diag(torch.cat([torch.full((32,), 1e-9), torch.ones(32)]).double())
    weight, errors = torch.randn(700, 64), torch.cat([torch.randn(700, 32), torch.zeros(700, 32)], dim=1)
    found = factorize_blocks(h, 8)
    losses = energy(errors, h + found.factor.ridge * torch.eye(64, dtype=torch.float64)) * (1 + 1e-6)
    metrics = report(weight, errors, losses, errors[:256], torch.arange(256), found)
    assert metrics["loss"] == pytest.approx(energy(errors, h).sum().item(), rel=1e-5)


def test_with_a_diagonal_hessian_it_rounds_to_nearest() -> None:
    weight = torch.randn(20, 64)
    h = torch.diag(torch.rand(64, dtype=torch.float64) + 0.1)
    rounded = Ldlq(trial=False, sweeps=0).round(weight, LatticeFormat(), {"hessian": h})
    nearest = LatticeFormat().quantize(weight, refits=0)
    assert torch.equal(rounded.weight.codes.to(torch.int32), nearest.codes.to(torch.int32))


def test_the_trial_is_never_worse_on_the_rows_it_saw() -> None:
    weight, h = torch.randn(100, 128), hessian(128, rows=40)
    losses = [
        Ldlq(trial=trial, sweeps=0).round(weight, LatticeFormat(), {"hessian": h}).metrics["loss"]
        for trial in (True, False)
    ]
    assert losses[0] <= losses[1] * (1 + 1e-3)


def test_vectors_beat_two_bit_integers() -> None:
    weight, h = torch.randn(64, 256), hessian(256)
    ours = Ldlq().round(weight, LatticeFormat(), {"hessian": h})
    theirs = Gptq().round(weight, IntFormat(2, 128), {"hessian": h})
    assert ours.metrics["loss"] < 0.75 * theirs.metrics["loss"]


def test_prepare_is_shared_and_changes_nothing() -> None:
    weight, h = torch.randn(10, 64), hessian(64)
    before = h.clone()
    stats = Ldlq().prepare({"hessian": h})
    first = Ldlq().round(weight, LatticeFormat(), stats).weight.codes
    second = Ldlq().round(weight, LatticeFormat(), {"hessian": h}).weight.codes
    assert torch.equal(first.to(torch.int32), second.to(torch.int32))
    assert torch.equal(h, before)
    assert Ldlq().prepare({}) == {}


def test_zero_rows_and_columns_stay_zero() -> None:
    weight, h = torch.randn(5, 64), hessian(64)
    weight[2] = 0
    rounded = Ldlq().round(weight, LatticeFormat(16), {"hessian": h}).weight.dequantize()
    assert torch.equal(rounded[2], torch.zeros(64))
    zero = Ldlq().round(torch.zeros(3, 64), LatticeFormat(), {"hessian": h})
    assert zero.metrics["loss"] == 0
    assert zero.metrics["sqnr_db"] == 300


def test_errors() -> None:
    weight, h = torch.randn(4, 64), hessian(64)
    with pytest.raises(
        RecipeError, match=r"^damp: damping of -1 times the mean diagonal is not within 0 and 10\. Use 0"
    ):
        Ldlq(damp=-1)
    with pytest.raises(
        RecipeError, match=r"^fmt: ldlq rounds to e8p vectors, not to 'int4 g128'\. Use LatticeFormat, or"
    ):
        Ldlq().round(weight, IntFormat(4), {"hessian": h})
    with pytest.raises(
        CalibrationError, match=r"^ldlq needs the statistic 'hessian'\. Collect it, or use rounding 'rtn'$"
    ):
        Ldlq().round(weight, LatticeFormat(), {})
    with pytest.raises(
        CalibrationError, match=r"^hessian: the Hessian is of 32 input features, the weight of 64\. Use th"
    ):
        Ldlq().round(weight, LatticeFormat(), {"hessian": hessian(32)})
    with pytest.raises(
        ContractError, match=r"^hessian: the factor was made for blocks of 1 columns, not of 8\. Call pre"
    ):
        Ldlq().round(weight, LatticeFormat(), {"hessian": factorize_blocks(h, 1)})
    with pytest.raises(FeasibilityError, match=r"^group_size: 12 input features do not divide by 8"):
        Ldlq().round(torch.randn(4, 12), LatticeFormat(), Ldlq().prepare({"hessian": hessian(12)}))


def test_nearest_rounding_takes_the_lattice_as_the_format_quantizes() -> None:
    weight = torch.randn(4, 64)
    found = Rtn().round(weight, LatticeFormat(), {}).weight
    assert torch.equal(found.dequantize(), LatticeFormat().quantize(weight).dequantize())
