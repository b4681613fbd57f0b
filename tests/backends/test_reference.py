"""The reference backend is the meaning of a quantized graph: it equals the logical ops of `dlqc.ops`."""

from __future__ import annotations

import pytest
import torch

from dlqc.backend import LinearSpec
from dlqc.backends.reference import BACKEND
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.ops import LINEAR_PACKED, QUANTIZE_ACT


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act", [None, ActFormat(8), ActFormat(4, 16, symmetric=False)])
def test_equals_the_logical_ops(bits: int, group: int | None, symmetric: bool, act: ActFormat | None) -> None:
    """The same canonical tensors, zero points packed as well, go through both."""
    g = torch.Generator().manual_seed(bits)
    spec = LinearSpec(64, 10, IntFormat(bits, group, symmetric), act, True)
    weight = spec.weight.quantize(torch.randn(10, 64, generator=g))
    zeros = None if weight.zeros is None else pack(weight.zeros, bits)
    tensors = (pack(weight.codes, bits), weight.scales, zeros, torch.randn(10, generator=g))
    x = torch.randn(2, 5, 64, generator=g, dtype=torch.float64)
    lowered = BACKEND.kernels[0].lower(spec, *tensors)
    y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    quantized = x if act is None else QUANTIZE_ACT(x, act.bits, act.group_size or 0, act.symmetric)
    expected = LINEAR_PACKED(quantized, *tensors, bits, group or 0)
    # Both are float64, but what the codes of x stand for is rounded to float32 in the logical op.
    size = x.abs() @ weight.dequantize().abs().double().T
    step = 0 if act is None else 2 * 2.0**-24
    assert bool(((y - expected).abs() <= (step + 80 * 2.0**-53) * (size + tensors[3].abs())).all())
