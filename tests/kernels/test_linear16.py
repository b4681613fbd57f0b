"""Integer weights by tokens in bfloat16: one rounding of the result and no other, whatever instructions multiply."""

from __future__ import annotations

import math

import pytest
import torch
from guarded import at_the_end
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.linear16 import linear16

pytestmark = pytest.mark.skipif(
    build.unavailable("linear16") is not None, reason=f"no native code: {build.unavailable('linear16')}"
)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def site(n: int, k: int, bits: int, group: int, zeros: bool, half: bool, seed: int) -> tuple[Tensors, torch.Tensor]:
    """The tensors of an op, and the weight that they stand for, float64 [N, K]."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=g)
    groups = -(-k // group) if group else 1
    scales = 0.001 + 0.02 * torch.rand(n, groups, generator=g)
    scales = scales.bfloat16() if half else scales
    points = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8, generator=g)
    wide = [
        part.double().repeat_interleave(group or k, 1)[:, :k]
        for part in (points if zeros else torch.full_like(points, 1 << (bits - 1)), scales)
    ]
    held = build.arrange(codes, bits, "linear16"), build.in_panels(scales), build.in_panels(points) if zeros else None
    return held, (codes.double() - wide[0]) * wide[1]


@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([1, 2, 7, 8, 9, 20, 260]),
    n=st.sampled_from([1, 16, 47, 48, 97]),
    shape=st.sampled_from(
        [(1, 0), (33, 0), (70, 0), (384, 64), (320, 32), (640, 320), (576, 192), (512, 128), (300, 0)]
    ),
    bits=st.sampled_from([2, 3, 4, 8]),
    zeros=st.booleans(),
    half=st.booleans(),
    biased=st.booleans(),
    layout=st.sampled_from(["plain", "rows apart", "features apart"]),
    seed=st.integers(0, 99),
)
def test_one_rounding(
    m: int, n: int, shape: tuple[int, int], bits: int, zeros: bool, half: bool, biased: bool, layout: str, seed: int
) -> None:
    k, group = shape
    tensors, weight = site(n, k, bits, group, zeros, half, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k + 3, generator=g).bfloat16()[:, :k]
    x = x.contiguous() if layout == "plain" else x.T.contiguous().T if layout == "features apart" else x
    bias = torch.randn(n, generator=g) if biased else None
    y = linear16(x, *tensors, bias, k, n, bits, group)
    assert y.dtype is torch.bfloat16
    expected, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    # Half a unit of bfloat16, and what float32 sums of up to 640 terms lose.
    assert bool(((y.double() - expected).abs() <= expected.abs() * 2.0**-8 + size * 2.0**-21).all())


def test_no_worse_than_torch() -> None:
    """`_weight_int4pack_mm_for_cpu` on the weight that it stores: codes, scales and offsets in bfloat16."""
    g = torch.Generator().manual_seed(0)
    m, n, k, group = 32, 96, 1024, 128
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    scales = (0.001 + 0.02 * torch.rand(n, k // group, generator=g)).bfloat16()
    weight = (codes.double() - 8) * scales.double().repeat_interleave(group, 1)
    x = torch.randn(m, k, generator=g).bfloat16()
    tensors = build.arrange(codes, 4, "linear16"), build.in_panels(scales), None
    ours = linear16(x, *tensors, None, k, n, 4, group).double()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    both = torch.stack((scales.T.contiguous(), torch.zeros_like(scales.T)), -1)
    theirs = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, both).double()
    expected = x.double() @ weight.T
    assert float((theirs - expected).norm()) < 0.02 * float(expected.norm())  # they compute the same
    assert float((ours - expected).norm()) <= float((theirs - expected).norm())
    assert float((ours - expected).abs().max()) <= float((theirs - expected).abs().max())
    # And no other rounding than that of the result:
    assert float((ours - expected).norm()) <= 1.001 * float((expected.bfloat16().double() - expected).norm())


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tokens_that_may_be_rounded(bits: int, zeros: bool) -> None:
    """x in float32 is rounded to bfloat16, and nothing else is but float32 sums."""
    tensors, weight = site(97, 384, bits, 64, zeros, True, 3)
    bias = torch.randn(97, generator=torch.Generator().manual_seed(1))
    for m in (1, 8, 19):
        x = torch.randn(2, m, 384, generator=torch.Generator().manual_seed(m))
        y = linear16(x, *tensors, bias, 384, 97, bits, 64, bfloat16=True)
        assert y.dtype is torch.float32
        rounded = x.bfloat16().double()
        expected, size = rounded @ weight.T + bias.double(), rounded.abs() @ weight.abs().T + bias.double().abs()
        assert bool(((y.double() - expected).abs() <= size * 2.0**-20).all())
        exact = linear16(x, *tensors, bias, 384, 97, bits, 64)
        assert not torch.equal(y, exact)
        half = linear16(x.bfloat16(), *tensors, bias, 384, 97, bits, 64, bfloat16=True)
        torch.testing.assert_close(half, y.bfloat16(), rtol=0, atol=0)


def test_a_token_does_not_know_its_batch() -> None:
    tensors, _ = site(60, 320, 4, 32, True, True, 0)
    x = torch.randn(21, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = linear16(x, *tensors, None, 320, 60, 4, 32)
    for rows in ([0], [20], list(range(5, 13)), [3, 9, 17]):
        assert torch.equal(linear16(x[rows], *tensors, None, 320, 60, 4, 32), whole[rows])
    x[4, 7], x[11] = math.nan, math.inf
    broken = linear16(x, *tensors, None, 320, 60, 4, 32)
    others = [row for row in range(21) if row not in (4, 11)]
    assert torch.equal(broken[others], whole[others])
    assert bool(broken[4].isnan().all())
    assert not bool(broken[11].isfinite().any())


def test_tokens_too_small_for_the_instruction() -> None:
    """Subnormal ones may count as 0, and nothing else may."""
    tensors, weight = site(48, 64, 4, 0, False, False, 0)
    for exponent, least in ((-127, 0.0), (-110, 1.0)):
        x = torch.full((1, 64), 2.0**exponent, dtype=torch.bfloat16)
        found = linear16(x, *tensors, None, 64, 48, 4, 0).double() * 2.0**-exponent
        expected = weight.sum(1)
        right = (found[0] - expected).abs() <= expected.abs() * 2.0**-7 + 1e-2
        assert bool((right | (found[0] == 0)).all())
        assert float(right.double().mean()) >= least


def test_nothing_is_read_or_written_outside() -> None:
    for k, group, zeros in ((33, 0, True), (96, 32, True), (7, 0, False)):
        tensors, weight = site(50, k, 3, group, zeros, False, 1)
        held = [None if part is None else at_the_end(part) for part in tensors]
        x = at_the_end(torch.randn(9, k).bfloat16())
        y = linear16(x, *held, None, k, 50, 3, group)
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=2.0**-8, atol=1e-5)
