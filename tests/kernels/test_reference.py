"""The reference kernel: the judge itself, on numbers that can be done by hand."""

from __future__ import annotations

import torch

from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.reference.layout import act_format, act_scalars
from dlqc.kernels.reference.linear import ReferenceLinear


def test_by_hand() -> None:
    spec = LinearSpec(4, 2, IntFormat(4, 2, symmetric=False, scale_dtype="float32"), None, True)
    codes = torch.tensor([[0, 1, 2, 3], [15, 14, 8, 0]], dtype=torch.uint8)
    scales = torch.tensor([[1.0, 0.5], [2.0, 4.0]])
    zeros = torch.tensor([[0, 2], [14, 8]], dtype=torch.uint8)
    lowered = ReferenceLinear().lower(spec, pack(codes, 4), scales, pack(zeros, 4), torch.tensor([10.0, 20.0]))
    # Rows of W: 0 1 0 0.5 and 2 0 0 -32.
    y = lowered.op(torch.tensor([1.0, 2.0, 3.0, 4.0]), *lowered.tensors.values(), *lowered.scalars)
    assert y.tolist() == [2 + 2 + 10, 2 - 128 + 20]


def test_activation_by_hand() -> None:
    spec = LinearSpec(3, 1, IntFormat(2, None, scale_dtype="float32"), ActFormat(2), False)
    lowered = ReferenceLinear().lower(
        spec, pack(torch.tensor([[3, 0, 2]], dtype=torch.uint8), 2), torch.ones(1, 1), None, None
    )
    # W is 1 -2 0. Two-bit codes of x are -1, 0 and 1 with scale 8: 8, 3 and -5 become 1, 0 and -1.
    x = torch.tensor([[8.0, 3.0, -5.0], [3.0, 8.0, 0.0], [0.0, 0.0, 0.0]])
    y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    assert y.tolist() == [[8.0], [-16.0], [0.0]]


def test_float64_adds_no_rounding_of_its_own() -> None:
    spec = LinearSpec(2, 1, IntFormat(8, None, scale_dtype="float32"), None, True)
    codes, tiny = torch.tensor([[129, 127]], dtype=torch.uint8), 2.0**-40
    lowered = ReferenceLinear().lower(spec, pack(codes, 8), torch.ones(1, 1), None, torch.zeros(1))
    x = torch.tensor([1.0 + tiny, 1.0], dtype=torch.float64)
    assert lowered.op(x, *lowered.tensors.values(), *lowered.scalars).item() == tiny


def test_activation_format_as_scalars() -> None:
    for act in (None, ActFormat(8), ActFormat(4, 32, False)):
        assert act_format(*act_scalars(act)) == act


def test_note() -> None:
    spec = LinearSpec(2, 1, IntFormat(3, None), None, True)
    assert ReferenceLinear().note(spec) == "the definition in plain PyTorch; 3-bit codes are held in 8 bits"
