"""Formats that are not integers, fused work on rows, and the head that makes no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded import at_the_end

from dlqc.backend import LinearSpec
from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.codebook import CodebookFormat, CodebookWeight
from dlqc.formats.contract import WeightFormat
from dlqc.formats.fp8 import Fp8Format
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.planes import PlanesFormat
from dlqc.hadamard import hadamard
from dlqc.kernels.triton import head, rows, weight_only
from dlqc.kernels.triton.coded import CodedWeights
from dlqc.kernels.triton.dispatch import Config
from dlqc.kernels.triton.planes import Planes

FORMATS: tuple[tuple[WeightFormat, int], ...] = (
    *((Nf4Format(), 192), (Nf4Format(32, None), 96), (Nf4Format(256), 256)),
    *((CodebookFormat(2), 200), (CodebookFormat(3, 96), 192), (CodebookFormat(4, 128, table_dtype="float32"), 256)),
    *((Fp8Format("tensor"), 200), (Fp8Format("channel"), 130), (Fp8Format("block"), 200)),
)


def stored(fmt: WeightFormat, n: int, k: int) -> Any:
    if isinstance(fmt, CodebookFormat):
        tables = torch.randn(n, fmt.groups(k), fmt.entries).sort(-1).values.to(fmt.dtype)
        codes = torch.randint(0, fmt.entries, (n, k), dtype=torch.uint8)
        return CodebookWeight(codes, tables, None, None, None, fmt)
    return fmt.quantize(torch.randn(n, k) * torch.logspace(-4, 1, n).unsqueeze(1))


@pytest.mark.parametrize(("fmt", "k"), FORMATS, ids=lambda value: getattr(value, "label", value))
def test_formats(fmt: WeightFormat, k: int) -> None:
    n = 140
    weight, bias = stored(fmt, n, k), torch.randn(n)
    spec = LinearSpec(k, n, fmt, None, True)
    assert CodedWeights().supports(spec) is None
    lowered = CodedWeights().lower_coded(spec, weight.pack(), bias)
    low, scales, table, held = (
        None if part is None else at_the_end(part.contiguous()) for part in lowered.tensors.values()
    )
    _, _, bits, group, code, *_ = lowered.scalars
    packed = weight_only.Packed(low, scales, None, k, n, bits, group or k, code, table)
    x = torch.randn(3, k)
    y = torch.full((3, n), torch.nan)
    weight_only.launch(x, packed, held, y, Config(128, 16, 2))
    dense = weight.dequantize().double()
    truth = x.double() @ dense.T + bias.double()
    bound = (k + 8) * 2.0**-24 * (x.double().abs() @ dense.abs().T + bias.double().abs())
    assert ((y.double() - truth).abs() <= bound).all()
    assert not ((y.double() - (truth + x[:, :1].double() * dense[:, :1].T)).abs() <= bound).all()
    made = weight_only.multiply_dense(x, packed, held, Config(128, dense=True))
    assert ((made.double() - truth).abs() <= bound).all()
    through = lowered.op(x.double(), *lowered.tensors.values(), *lowered.scalars)
    assert ((through - truth).abs() <= bound).all()


@pytest.mark.parametrize("orders", [(2,), (2, 1, 3)])
def test_planes(orders: tuple[int, ...]) -> None:
    """Groups of different numbers of planes; x̃ is float32 here, and rounded once."""
    n, k = 70, 64 * len(orders)
    fmt = PlanesFormat(2, 64)
    weight, bias, residual = fmt.quantize(torch.randn(n, k), orders=orders, sweeps=1), torch.randn(n), torch.randn(3, n)
    spec = LinearSpec(k, n, fmt, None, True)
    assert Planes().supports(spec) is None
    lowered = Planes().lower_coded(spec, weight.pack(), bias)
    x, dense = torch.randn(3, k), weight.dequantize().double()
    truth = x.double() @ dense.T + bias.double() + residual.double()
    # Planes may cancel: the bound goes by their absolute values.
    planes = weight.row_scales.double().abs() @ weight.column_scales.double().abs().amax(1, keepdim=True)
    bound = (k * 3 + 8) * 2.0**-23 * (planes.T * x.double().abs().sum(1, keepdim=True) + truth.abs() + 1)
    for given, added in ((x, residual), (x.double(), residual.double())):
        y = lowered.op(given, *lowered.tensors.values(), *lowered.scalars, added)
        assert ((y.double() - truth).abs() <= bound).all()
    wrong = dict(lowered.tensors, low=lowered.tensors["low"] ^ 4)
    assert not ((lowered.op(x, *wrong.values(), *lowered.scalars, residual).double() - truth).abs() <= bound).all()


def codes_fit(q: torch.Tensor, scale: torch.Tensor, value: torch.Tensor, rounding: float) -> None:
    """Codes of `value` (float64): within half a step, and what float32 may move it by."""
    step = value.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(scale.double(), torch.where(step == 0, 1.0, step), rtol=rounding, atol=0)
    assert ((q.double() * step - value).abs() <= step * 0.5 + rounding * value.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("k", [128, 300])
def test_norm_quantize(added: bool, k: int) -> None:
    x, gain = torch.randn(2, 3, k), torch.rand(k) + 0.5
    residual = torch.randn(2, 3, k) if added else None
    q, scale, h = rows.norm_quantize(x, residual, gain, 1e-5, 8)
    total = x + residual if residual is not None else x
    if added:
        assert torch.equal(h, total)
    wide = total.double()
    codes_fit(q, scale, wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double(), 1e-6)
    q, _, _ = rows.norm_quantize(torch.zeros(1, k), None, gain, 1e-5, 8)
    assert not q.any()


@pytest.mark.parametrize(("block", "k"), [(1, 300), (32, 96), (128, 384)])
def test_silu_quantize(block: int, k: int) -> None:
    gate, up = torch.randn(2, k) * 3, torch.randn(2, k)
    q, scale = rows.silu_quantize(gate, up, block, 8)
    value = torch.nn.functional.silu(gate.double()) * up.double()
    matrix = hadamard(block) / block**0.5
    value = (value.reshape(2, -1, block) @ matrix).reshape(2, k)
    codes_fit(q, scale, value, 2e-6)


@pytest.mark.parametrize(("block", "k"), [(2, 6), (128, 384), (512, 512)])
def test_block_hadamard(block: int, k: int) -> None:
    x = torch.randn(2, 2, k)
    matrix = hadamard(block) / block**0.5
    truth = (x.double().reshape(2, 2, -1, block) @ matrix).reshape(x.shape)
    torch.testing.assert_close(rows.block_hadamard(x, block).double(), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.block_hadamard(x.double(), block), truth, rtol=0, atol=1e-12)
    with pytest.raises(
        ContractError, match=f"block: blocks of 3 do not turn {k} features. Use a power of two up to 4096"
    ):
        rows.block_hadamard(x, 3)


@pytest.mark.parametrize(("bits", "vocabulary"), [(4, 300), (8, 70)])
def test_head(judge: Any, bits: int, vocabulary: int) -> None:
    """Sums of 128 are the same for equal rows of W, so ties are exact; the last token is the end of a ragged tile."""
    problem = judge.make(LinearSpec(128, vocabulary, IntFormat(bits, 128, False), None, True), 1)
    problem.bias[vocabulary - 1] = problem.bias[3] = 90.0
    problem.codes[vocabulary - 1], problem.scales[vocabulary - 1] = problem.codes[3], problem.scales[3]
    problem.zeros[vocabulary - 1] = problem.zeros[3]
    lowered = weight_only.WeightOnly().lower(problem.spec, *problem.canonical)
    x = problem.input((2, 9), torch.float32, 1) / 8
    token, confidence = head.head_argmax(x, *lowered.tensors.values(), *lowered.scalars[:4])
    packed = weight_only.Packed(*list(lowered.tensors.values())[:3], *lowered.scalars[:3], 128)
    logits = x.double() @ packed.dequantize().double().T + problem.bias.double()
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(confidence.double(), logits.softmax(-1).amax(-1), rtol=1e-4, atol=0)
    assert (token == 3).any()
    wide, sure = head.head_argmax(x.double(), *lowered.tensors.values(), *lowered.scalars[:4])
    assert torch.equal(wide, token)
    torch.testing.assert_close(confidence, sure, rtol=1e-4, atol=0)
    none, _ = head.head_argmax(x[:0], *lowered.tensors.values(), *lowered.scalars[:4])
    assert none.shape == (0, 9)


def test_codes_of_rows_are_those_of_the_reference() -> None:
    """Without arithmetic before them (silu · up with a gate so large that silu is the gate) codes agree to the last one."""
    up = torch.randn(4, 200)
    q, scale = rows.silu_quantize(torch.full((4, 200), 64.0), up, 1, 8)
    codes, expected, _ = ActFormat(8).quantize_dynamic(64.0 * up)
    assert torch.equal(q, codes)
    assert torch.equal(scale, expected)
