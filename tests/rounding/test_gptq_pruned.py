"""GPTQ of a pruned weight: zeros stay, and what is kept makes up for pruning and rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError
from dlqc.formats.integer import IntFormat
from dlqc.formats.sparse import SparseFormat
from dlqc.pruning import Pattern, SparseGpt, Wanda
from dlqc.rounding.gptaq import Gptaq
from dlqc.rounding.gptq import Gptq, gptq
from dlqc.rounding.rtn import Rtn

PLAIN = Gptq(act_order=False, clip="minmax")


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the Hessian of correlated inputs, and half of the weights as a mask."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns, dtype=torch.float64)
    mix += torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    hessian = x.T @ x
    return weight, hessian, Wanda().prune(weight, Pattern.read(0.5, "2:4"), {"energy": hessian.diagonal()}).kept


def loss(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error.double() @ hessian) * error.double()).sum())


def best(weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The weights with the least damped loss on a mask, row by row in float64."""
    found, damped = torch.zeros_like(weight), hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    for n, own in enumerate(mask.nonzero()[:, 0] for mask in kept):
        found[n, own] = torch.linalg.solve(damped[own][:, own], (weight[n] @ damped)[own])
    return found


def restated(
    weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor, fmt: IntFormat, static: bool
) -> torch.Tensor:
    """The running update of GPTQ and SparseGPT, in float64: what is not kept is rounded to zero."""
    k = weight.shape[1]
    w = weight.clone()
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64))
    u = torch.linalg.cholesky(inverse, upper=True)
    group = fmt.group_size or k
    out = torch.zeros_like(w)
    for j in range(k):
        if j % group == 0:
            source = weight if static else w
            scales, zeros = fmt.parameters(
                (source * kept)[:, j : j + group].float() if group < k else (source * kept).float()
            )
            if group < k:
                scales, zeros = scales[:, :1], None if zeros is None else zeros[:, :1]
        scale, zero = scales[:, 0].double(), fmt.midpoint if zeros is None else zeros[:, 0].double()
        code = ((w[:, j] / scale).round() + zero).clamp(0, fmt.top)
        out[:, j] = (code - zero) * scale * kept[:, j]
        w[:, j:] -= ((w[:, j] - out[:, j]) / u[j, j]).unsqueeze(1) * u[j, j:]
    return out


@pytest.mark.parametrize("fmt", [IntFormat(4, None), IntFormat(3, 16, False), IntFormat(8, 8, False)], ids=str)
@pytest.mark.parametrize("static", [True, False])
def test_it_is_the_running_update_with_a_mask(fmt: IntFormat, static: bool) -> None:
    weight, hessian, kept = problem(7, 48)
    weight = best(weight, hessian, kept)  # nothing is left to refine
    one = IntFormat(fmt.bits, fmt.group_size, fmt.symmetric)
    found = gptq(weight, hessian, one, Gptq(act_order=False, static_groups=static, clip="minmax", block=16), kept=kept)
    whole = IntFormat(fmt.bits, None if fmt.group_size is None else fmt.group_size, fmt.symmetric)
    expected = restated(weight, hessian, kept, whole, static)
    assert torch.equal(found.weight.dequantize().double(), expected)
    assert not bool(expected[~kept].any())
    assert found.metrics["loss"] == pytest.approx(loss(weight - expected, hessian), rel=1e-3)


@pytest.mark.parametrize("options", [Gptq(), PLAIN, Gptq(clip="mse")])
def test_a_mask_that_keeps_all_changes_nothing(options: Gptq) -> None:
    weight, hessian, kept = problem(9, 32)
    fmt = IntFormat(3, 16, False)
    found = gptq(weight, hessian, fmt, options, kept=torch.ones_like(kept))
    expected = gptq(weight, hessian, fmt, options)
    # The masked columns run in torch, the others may run in native code, which adds up in another order.
    assert float((found.weight.codes != expected.weight.codes).float().mean()) < 0.02
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-2)


def test_scales_are_those_of_the_kept_weights() -> None:
    """Pruned weights of a huge size would take all of the range."""
    weight, hessian, kept = problem(9, 32)
    weight[~kept] *= 1000
    found = gptq(weight, hessian, IntFormat(4, 16, False), PLAIN, kept=kept)
    expected = IntFormat(4, 16, False).parameters(best(weight, hessian, kept).float())[0]
    torch.testing.assert_close(found.weight.scales.float(), expected.float(), rtol=0.05, atol=0.0)


def test_what_is_reported_is_the_loss_against_the_weight_as_given() -> None:
    weight, hessian, kept = problem(300, 48)  # more rows than are sampled
    found = gptq(weight, hessian, IntFormat(4, 16, False), kept=kept)
    own = loss(weight - found.weight.dequantize(), hessian)
    assert found.metrics["loss"] == pytest.approx(own, rel=0.05)
    assert found.metrics["loss"] < found.metrics["loss_rtn"]


@pytest.mark.parametrize("pattern", [Pattern.read(0.5, None), Pattern.read(0.5, "2:4")], ids=["50%", "2:4"])
def test_what_it_gains_against_the_weight_as_it_was(pattern: Pattern) -> None:
    """The weight as it was, against the pruned one as it is; and better moved weights stay better when rounded."""
    weight, hessian, _ = problem(64, 96)
    fmt = IntFormat(3, 32, False)
    wanda = Wanda().prune(weight, pattern, {"energy": hessian.diagonal()}).kept
    found = Gptq().round(weight, fmt, {"hessian": hessian, "kept": wanda})
    one, two = found.weight.dequantize(), gptq(weight * wanda, hessian, fmt, kept=wanda).weight.dequantize()
    assert loss(weight - one, hessian) < loss(weight - two, hessian)
    assert found.metrics["loss"] < found.metrics["loss_rtn"]
    losses = []
    for steps in (8, 0):
        pruned = SparseGpt(refine=steps).prune(weight, pattern, {"hessian": hessian})
        assert pruned.moved is not None
        rounded = gptq(pruned.moved, hessian, fmt, kept=pruned.kept).weight.dequantize()
        nearest = Rtn().round(pruned.moved, fmt, {}).weight.dequantize()
        losses += [loss(weight - rounded, hessian), loss(weight - nearest, hessian)]
        assert not bool(rounded[~pruned.kept].any())
        assert not bool(nearest[~pruned.kept].any())
    assert losses[0] < losses[1]
    assert losses[0] < losses[2] < losses[3]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.sampled_from([2, 4, 8]), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_zeros_stay_zero(rows: int, groups: int, bits: int, symmetric: bool, static: bool, seed: int) -> None:
    """Any mask, rows that are pruned away, constant rows, inputs that are always zero."""
    generator = torch.Generator().manual_seed(seed)
    weight, hessian, _ = problem(rows, 8 * groups, seed)
    kept = torch.rand(rows, 8 * groups, generator=generator) < 0.5
    kept[0] = False
    weight[-1] = -0.75
    hessian[:, 0] = hessian[0] = 0
    options = Gptq(act_order=static, static_groups=static)
    for fmt in (IntFormat(bits, 8, symmetric), SparseFormat(bits, 8, symmetric)):
        found = options.round(weight, fmt, {"hessian": hessian, "kept": kept}).weight.dequantize()
        assert bool(torch.isfinite(found).all())
        assert not bool(found[~kept].any())


def test_a_sparse_format_holds_what_integers_hold() -> None:
    weight, hessian, kept = problem(8, 32)
    stats = {"hessian": hessian, "kept": kept}
    dense, sparse = (Gptq().round(weight, fmt, stats) for fmt in (IntFormat(4, 16, False), SparseFormat(4, 16)))
    assert torch.equal(dense.weight.dequantize(), sparse.weight.dequantize())
    assert dense.metrics == sparse.metrics
    drift = {**stats, "drift": torch.zeros_like(hessian)}
    assert torch.equal(Gptaq().round(weight, SparseFormat(4, 16), drift).weight.dequantize(), dense.weight.dequantize())
    assert torch.equal(
        Rtn().round(weight * kept, SparseFormat(4, 16), {}).weight.dequantize(),
        IntFormat(4, 16, False).quantize(weight * kept).dequantize(),
    )


def test_a_sparse_format_needs_a_mask() -> None:
    weight, hessian, _ = problem(2, 16)
    message = r"^format: sparse int4 g16 asymmetric stores what pruning left, and this weight is not pruned\. Put sparsify before"
    with pytest.raises(ContractError, match=message):
        Gptq().round(weight, SparseFormat(4, 16), {"hessian": hessian})
