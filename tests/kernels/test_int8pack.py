"""int8pack: exact where nothing is rounded, and when it declines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.cpu.int8pack import Int8Pack

KERNEL = Int8Pack()
SPEC = LinearSpec(64, 48, IntFormat(8, None), None, False)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 63])
@pytest.mark.parametrize("n", [1, 3, 16, 17, 48])
def test_picks_single_weights_exactly(tokens: int, n: int) -> None:
    """Unit inputs read single weights, which bfloat16 holds: every code, every column of the tile."""
    codes = torch.arange(n * 64).remainder(256).to(torch.uint8).reshape(n, 64)
    spec = replace(SPEC, out_features=n)
    lowered = KERNEL.lower(spec, pack(codes, 8), torch.full((n, 1), 0.5, dtype=torch.bfloat16), None, None)
    x = torch.eye(64)[:tokens]
    y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    assert torch.equal(y, (codes.float() - 128)[:, :tokens].T * 0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": IntFormat(4, None)}, "weights have 4 bits, it needs 8"),
        ({"weight": IntFormat(8, None, symmetric=False)}, "weights are asymmetric, it needs symmetric ones"),
        ({"weight": IntFormat(8, 32)}, "weights have a scale per group of 32, it needs one per output channel"),
        ({"in_features": 72}, "72 input features are not a multiple of 16, and torch's op reads past their end"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    assert KERNEL.supports(replace(SPEC, **change)) == reason  # type: ignore[arg-type]


def test_notes() -> None:
    assert KERNEL.note(SPEC) == "bfloat16 product"
    spec = replace(SPEC, weight=IntFormat(8, None, scale_dtype="float32"), act=ActFormat(8))
    said = "activations are rounded to int8 token, then to bfloat16; float32 scales are rounded to bfloat16"
    assert KERNEL.note(spec) == f"bfloat16 product; {said}"
