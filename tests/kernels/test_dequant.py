"""dequant: keeps the packed bytes, works in slices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.kernels.cpu import dequant
from dlqc.kernels.cpu.dequant import Dequant

KERNEL = Dequant()
SPEC = LinearSpec(35, 41, IntFormat(3, 7, symmetric=False), None, True)


def test_keeps_the_packed_bytes(judge: Any) -> None:
    problem = judge.make(SPEC, 0)
    packed, scales, zeros, bias = problem.canonical
    lowered = KERNEL.lower(SPEC, packed, scales, zeros, bias)
    assert lowered.tensors["packed"] is packed
    assert lowered.tensors["scales"] is scales


@pytest.mark.parametrize("chunk", [1, 35, 36, 350, 35 * 41])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_do_not_change_the_result(
    judge: Any, monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype
) -> None:
    problem = judge.make(SPEC, 0)
    x = problem.input((9,), dtype, 0)
    monkeypatch.setattr(dequant, "CHUNK", chunk)
    assert problem.excess(x, problem.run(KERNEL, x), judge.rounding(KERNEL, dtype)) <= 1


def test_notes() -> None:
    said = "dequantized at each call, which saves memory, not time"
    assert KERNEL.note(SPEC) == said
    with_act = replace(SPEC, act=ActFormat(8, 7))
    assert KERNEL.note(with_act) == f"{said}; activations are rounded to int8 g7, then multiplied as floats"
