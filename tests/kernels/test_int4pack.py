"""int4pack: the order of codes, scales and offsets, and when it declines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.cpu.int4pack import Int4Pack

KERNEL = Int4Pack()
SPEC = LinearSpec(64, 48, IntFormat(4, 32), None, False)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n", [16, 48, 80, 208])
@pytest.mark.parametrize("group", [None, 32, 64, 96, 128, 384])
def test_picks_single_weights_exactly(bits: int, n: int, group: int | None) -> None:
    """Unit inputs read single weights, which bfloat16 holds here: every slot, group and zero point is in its place."""
    k = 384
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    scales = 2.0 ** torch.randint(-3, 4, (n, k // (group or k)), generator=g)
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8, generator=g)
    spec = LinearSpec(k, n, IntFormat(bits, group, symmetric=False), None, False)
    lowered = KERNEL.lower(spec, pack(codes, bits), scales.to(torch.bfloat16), pack(zeros, bits), None)
    y = lowered.op(torch.eye(k), *lowered.tensors.values(), *lowered.scalars)
    wide = [part.float().repeat_interleave(group or k, 1) for part in (zeros, scales)]
    assert torch.equal(y.T, (codes.float() - wide[0]) * wide[1])


def test_group_is_the_largest_that_torch_takes() -> None:
    for group, used in ((32, 32), (96, 32), (192, 64), (384, 128), (512, 256), (None, 256)):
        k = group or 512
        spec = LinearSpec(k, 16, IntFormat(4, group), None, False)
        packed = pack(torch.zeros(16, k, dtype=torch.uint8), 4)
        lowered = KERNEL.lower(spec, packed, torch.ones(16, 1, dtype=torch.bfloat16), None, None)
        assert lowered.scalars == (used, 0, 0, True)
        affine = lowered.tensors["affine"]
        assert affine is not None
        assert affine.shape == (k // used, 16, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": IntFormat(8, 32)}, "weights have 8 bits, it holds at most 4"),
        ({"weight": IntFormat(4, 16)}, "groups of 16 do not divide by 32"),
        (
            {"weight": IntFormat(4, None), "in_features": 72},
            "72 input features in one group do not divide by 32",
        ),
        ({"out_features": 40}, "40 output features are not a multiple of 16"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    assert KERNEL.supports(replace(SPEC, **change)) == reason  # type: ignore[arg-type]


def test_notes() -> None:
    assert KERNEL.note(SPEC) == "bfloat16 product"
    spec = replace(SPEC, weight=IntFormat(3, 32, symmetric=False, scale_dtype="float16"), act=ActFormat(4, 32))
    assert KERNEL.note(spec).split("; ") == [
        "bfloat16 product",
        "activations are rounded to int4 g32, then to bfloat16",
        "float16 scales are rounded to bfloat16",
        "3-bit codes are held in 4 bits",
        "zero points times scales are rounded to bfloat16",
    ]
