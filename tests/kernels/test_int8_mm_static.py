"""int8_mm_static: exact integer sums with fixed activation scales, against float64 and the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.backend import LinearSpec, choose_kernel, remark
from dlqc.backends.cpu import BACKEND
from dlqc.backends.reference import BACKEND as REFERENCE
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.kernels.cpu import selfcheck
from dlqc.kernels.cpu.int8_mm_static import Int8MMStatic

pytestmark = pytest.mark.skipif(selfcheck.int_mm(128) is not None, reason="torch._int_mm is not exact on this CPU")

KERNEL = Int8MMStatic()


def scales(spec: LinearSpec, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert spec.act is not None
    g = torch.Generator().manual_seed(seed)
    scale = 0.02 + torch.rand(spec.act.sets, 1, generator=g) / 10
    points = torch.randint(spec.act.low, spec.act.high + 1, scale.shape, generator=g).to(torch.int8)
    return scale, None if spec.act.symmetric else points


def lowered(problem: Any, spec: LinearSpec, scale: torch.Tensor, zero: torch.Tensor | None) -> Any:
    return KERNEL.lower_static(spec, *problem.canonical, scale, zero)


@st.composite
def specs(draw: st.DrawFn) -> LinearSpec:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    weight = IntFormat(bits, None, draw(st.booleans()) or bits == 8)
    act = ActFormat(draw(st.sampled_from([2, 4, 8])), None, draw(st.booleans()), draw(st.integers(1, 4)))
    return LinearSpec(draw(st.integers(2, 90)), draw(st.integers(1, 40)), weight, act, draw(st.booleans()))


@settings(max_examples=25, deadline=None)
@given(specs(), st.integers(0, 10**9), st.sampled_from([(5,), (2, 3), (1, 1), (0, 4)]), st.booleans())
def test_values(judge: Any, spec: LinearSpec, seed: int, lead: tuple[int, ...], one_set: bool) -> None:
    """Codes are exact, so is the sum; what is left is one rounding of the scales' products and of the bias."""
    assert KERNEL.supports(spec) is None
    assert spec.act is not None
    problem = judge.make(spec, seed)
    scale, zero = scales(spec, seed)
    x = 3 * problem.input(lead, torch.float32, seed)
    bucket = None if one_set else torch.randint(0, spec.act.sets, lead)
    made = lowered(problem, spec, scale, zero)
    y = made.op(x, bucket, *made.tensors.values(), *made.scalars)
    rows = torch.zeros(lead, dtype=torch.int64) if bucket is None else bucket
    step = scale[rows].double()
    point = 0 if zero is None else zero[rows].double()
    codes = ((x / scale[rows]).round().double() + point).clamp(spec.act.low, spec.act.high)
    weight, _ = problem._weight(judge.rounding(KERNEL, torch.float32))
    truth = ((codes - point) * step) @ weight.T
    size = ((codes - point).abs() * step) @ weight.abs().T
    if problem.bias is not None:
        truth, size = truth + problem.bias, size + problem.bias.abs()
    assert y.shape == truth.shape
    assert bool(((y - truth).abs() <= 2.0**-21 * size + 1e-30).all())


def test_a_planted_error_breaks_the_bound(judge: Any) -> None:
    spec = LinearSpec(64, 8, IntFormat(8, None), ActFormat(8, None, False, 2), False)
    problem, (scale, zero) = judge.make(spec, 0), scales(spec, 0)
    x, bucket = problem.input((6,), torch.float32, 0), torch.tensor([0, 1, 0, 1, 1, 0])
    made = lowered(problem, spec, scale, zero)
    right = made.op(x, bucket, *made.tensors.values(), *made.scalars)
    slips = (
        {"sums": made.tensors["sums"] + 1},
        {"act_scale": scale.flip(0)[:, 0]},
        {"act_zero": made.tensors["act_zero"] + 99},
    )
    for slip in slips:
        wrong = made.op(x, bucket, *(made.tensors | slip).values(), *made.scalars)
        assert float((wrong - right).abs().max()) > 1e-3 * float(right.abs().max())
    swapped = made.op(x, 1 - bucket, *made.tensors.values(), *made.scalars)
    assert float((swapped - right).abs().max()) > 1e-3 * float(right.abs().max())


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(judge: Any, symmetric: bool) -> None:
    spec = LinearSpec(64, 48, IntFormat(8, None), ActFormat(8, None, symmetric, 2), True)
    made = lowered(judge.make(spec, 0), spec, *scales(spec, 0))
    for x, bucket in ((torch.randn(3, 64), None), (torch.randn(2, 3, 64), torch.tensor([[0, 1, 0], [1, 1, 1]]))):
        torch.library.opcheck(made.op, (x, bucket, *made.tensors.values(), *made.scalars))


STATIC = ActFormat(8, None, True, 1)


@pytest.mark.parametrize(
    ("weight", "act", "reason"),
    [
        (IntFormat(8, None), None, "activations have no fixed scales"),
        (IntFormat(8, None), ActFormat(8), "activations have no fixed scales"),
        (
            IntFormat(8, None),
            ActFormat(8, 32, True, 1),
            "activations have a scale per group of 32, it needs one for the tensor",
        ),
        (IntFormat(8, 32), STATIC, "weights have a scale per group of 32, it needs one per output channel"),
        (
            IntFormat(8, None, False),
            STATIC,
            "8-bit codes minus their zero point do not fit in int8, it needs symmetric 8-bit",
        ),
        (IntFormat(8, 48), STATIC, "64 input features do not divide by group 48"),
    ],
)
def test_refusals(weight: IntFormat, act: ActFormat | None, reason: str) -> None:
    assert str(KERNEL.supports(LinearSpec(64, 48, weight, act, False))).startswith(reason)
    assert KERNEL.supports(LinearSpec(1, 4, IntFormat(8, None), STATIC, False)) == (
        "torch._int_mm does not compute products over 1 input feature"
    )
    assert KERNEL.supports(LinearSpec(1 << 16, 4, IntFormat(8, None), STATIC, False)) == (
        "sums over 65536 input features can overflow int32"
    )


def test_kernels_that_take_no_fixed_scales_get_rounded_values() -> None:
    """They are asked about the site without its quantizer, and the choice says what happens in front of them."""
    spec = LinearSpec(64, 48, IntFormat(4, 32), ActFormat(8, 32, False, 4), False)
    for backend, expected in ((BACKEND, ("linear16", "int4pack")), (REFERENCE, ("reference",))):
        kernel, refusals = choose_kernel(backend, spec)
        assert kernel is not None
        assert kernel.name in expected  # native code, or torch's where there is no compiler
        said = "activations are rounded to int8 static g32 asymmetric by 4 mask ratios by an op of their own, then multiplied"
        assert said in remark(kernel, spec)
        if backend is BACKEND:
            behind = "it takes no fixed scales (behind them: activations are not quantized)"
            assert refusals["int8_mm"] == behind
            assert refusals["int8_mm_static"] == "activations have a scale per group of 32, it needs one for the tensor"
    kernel, refusals = choose_kernel(BACKEND, LinearSpec(64, 48, IntFormat(8, None), None, False))
    assert "int8_mm_static" not in refusals, "it is for sites with fixed scales alone"
