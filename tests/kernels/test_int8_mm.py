"""int8_mm: exact integers, and when it declines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.cpu import selfcheck
from dlqc.kernels.cpu.int8_mm import Int8MM

KERNEL = Int8MM()
SOUND = pytest.mark.skipif(selfcheck.int_mm(128) is not None, reason="int8 products saturate on this CPU")
SPEC = LinearSpec(64, 48, IntFormat(8, None, scale_dtype="float32"), ActFormat(8), False)


@SOUND
@pytest.mark.parametrize("tokens", [1, 2, 63, 65])
@pytest.mark.parametrize("k", [2, 7, 64, 1000])
def test_extreme_codes_are_summed_exactly(tokens: int, k: int) -> None:
    """All products ±127·127 or ±127·128: where instructions without 32-bit sums saturate."""
    codes = torch.tensor([255, 1, 0, 128], dtype=torch.uint8).repeat_interleave(5).unsqueeze(1).repeat(1, k)
    codes[-3:, ::2] = 255
    spec = replace(SPEC, in_features=k, out_features=20)
    lowered = KERNEL.lower(spec, pack(codes, 8), torch.ones(20, 1), None, None)
    x = torch.full((tokens, k), 127.0, dtype=torch.float64)
    x[1::2] *= -1
    y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    assert torch.equal(y, x @ (codes.double() - 128).T)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_narrow_weights_with_zero_points(bits: int) -> None:
    """code - zero reaches ±(2^bits - 1) and fits a byte."""
    top = 2**bits - 1
    codes = torch.tensor([0, top, 0, top], dtype=torch.uint8).unsqueeze(1).repeat(1, 9)
    zeros = torch.tensor([[0], [0], [top], [top]], dtype=torch.uint8)
    spec = LinearSpec(9, 4, IntFormat(bits, None, symmetric=False, scale_dtype="float32"), ActFormat(8), False)
    lowered = KERNEL.lower(spec, pack(codes, bits), torch.ones(4, 1), pack(zeros, bits), None)
    y = lowered.op(torch.full((2, 9), 127.0), *lowered.tensors.values(), *lowered.scalars)
    assert y.tolist() == [[0, 9 * 127 * top, -9 * 127 * top, 0]] * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"act": None}, "activations are not quantized"),
        ({"act": ActFormat(8, 32)}, "activations have a scale per group of 32, it needs one per token"),
        ({"act": ActFormat(8, symmetric=False)}, "activations are asymmetric, it needs symmetric ones"),
        ({"weight": IntFormat(8, 32)}, "weights have a scale per group of 32, it needs one per output channel"),
        (
            {"weight": IntFormat(8, None, symmetric=False)},
            "8-bit codes minus their zero point do not fit in int8, it needs symmetric 8-bit weights",
        ),
        ({"in_features": 1}, "torch._int_mm does not compute products over 1 input feature"),
        ({"in_features": 132_105}, "sums over 132105 input features can overflow int32"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    assert KERNEL.supports(replace(SPEC, **change)) == reason  # type: ignore[arg-type]


@SOUND
def test_limits_are_where_the_refusals_say() -> None:
    assert KERNEL.supports(replace(SPEC, in_features=132_104)) is None
    assert 132_104 * 127 * 128 < 2**31 <= 132_105 * 127 * 128
    assert KERNEL.supports(replace(SPEC, weight=IntFormat(8, 64), act=ActFormat(8, 64))) is None  # one group a row


def test_notes() -> None:
    assert KERNEL.note(SPEC) == "exact int32 sums"
    assert KERNEL.note(replace(SPEC, weight=IntFormat(4, None))) == "exact int32 sums; 4-bit codes are held in 8 bits"
