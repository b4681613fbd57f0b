"""Logical ops against their formulas, and their fake implementations against the real ones."""

from __future__ import annotations

import pytest
import torch

from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.ops import EMBEDDING_PACKED, LINEAR_PACKED, LINEAR_Q, QUANTIZE_ACT, ROPE, TRANSFORM

FORMATS = [
    pytest.param(IntFormat(bits, group, symmetric, scale), id=f"{bits}-{group}-{symmetric}-{scale}")
    for bits, group, symmetric, scale in (
        (2, 8, False, "bfloat16"),
        (3, 24, True, "float32"),
        (4, None, False, "float16"),
        (8, None, True, "float32"),
    )
]
SHAPES = [(24,), (3, 24), (2, 5, 24), (0, 24), (2, 0, 24)]


def operands(fmt: IntFormat, *, bias: bool) -> tuple[torch.Tensor, ...]:
    weight = fmt.quantize(torch.randn(7, 24))
    return weight.codes, weight.scales, weight.zeros, torch.randn(7) if bias else None  # type: ignore[return-value]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_q_is_its_formula(fmt: IntFormat, shape: tuple[int, ...], bias: bool) -> None:
    codes, scales, zeros, b = operands(fmt, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    points = torch.full_like(scales, fmt.midpoint).double() if zeros is None else zeros.double()
    each = 24 // scales.shape[1]
    weight = (codes.double() - points.repeat_interleave(each, 1)) * scales.double().repeat_interleave(each, 1)
    expected = x @ weight.T + (0 if b is None else b.double())
    found = LINEAR_Q(x, codes, scales, zeros, b, fmt.bits, fmt.group_size or 0)
    # Codes times scales are rounded to float32 once.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert found.dtype is torch.float64


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_equals_unpacked_exactly(fmt: IntFormat, dtype: torch.dtype) -> None:
    codes, scales, zeros, b = operands(fmt, bias=True)
    x = torch.randn(2, 5, 24).to(dtype)
    plain = LINEAR_Q(x, codes, scales, zeros, b, fmt.bits, fmt.group_size or 0)
    points = None if zeros is None else pack(zeros, fmt.bits)
    stored = LINEAR_PACKED(x, pack(codes, fmt.bits), scales, points, b, fmt.bits, fmt.group_size or 0)
    assert torch.equal(plain, stored)
    assert plain.dtype is dtype
    flipped = pack(codes, fmt.bits) ^ 1
    assert not torch.equal(LINEAR_PACKED(x, flipped, scales, points, b, fmt.bits, fmt.group_size or 0), plain)


def test_half_precision_rounds_once() -> None:
    codes, scales, zeros, _ = operands(IntFormat(4, 8, False), bias=False)
    x = torch.randn(3, 24).to(torch.bfloat16)
    wide = LINEAR_Q(x.float(), codes, scales, zeros, None, 4, 8)
    assert torch.equal(LINEAR_Q(x, codes, scales, zeros, None, 4, 8), wide.to(torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, 0, True), (4, 8, True), (4, 0, False), (8, 8, False)])
def test_quantize_act_is_the_format(shape: tuple[int, ...], bits: int, group: int, symmetric: bool) -> None:
    x = torch.randn(shape)
    found = QUANTIZE_ACT(x, bits, group, symmetric)
    assert torch.equal(found, ActFormat(bits, group or None, symmetric).fake_quantize(x))
    assert found.shape == x.shape
    if x.numel():
        assert not torch.equal(found, x)


@pytest.mark.parametrize("dim", [2, 6])
def test_rope_rotates_pairs(dim: int) -> None:
    x = torch.randn(2, 3, 5, dim, dtype=torch.float64)
    angles = torch.randn(5, dim // 2, dtype=torch.float64).repeat(1, 2)
    found = ROPE(x, angles.cos(), angles.sin())
    half = dim // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles[:, :half])
    torch.testing.assert_close(found, torch.cat((z.real, z.imag), -1), rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_transform_multiplies_in_float32_at_least(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    m, v = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    x = torch.randn(shape).to(dtype)
    dense = torch.block_diag(*m, *m) @ torch.diag(v)
    found = TRANSFORM(x, [m.repeat(2, 1, 1), v], "blocks(0)*diag(1)")
    assert found.dtype is dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    near = 1e-12 if dtype is torch.float64 else 1e-5
    rounded = (x.to(wide) @ dense.to(wide)).to(dtype)
    torch.testing.assert_close(found, rounded, rtol=near if dtype is not torch.bfloat16 else 0.008, atol=10 * near)


def test_transform_of_another_width_is_refused() -> None:
    with pytest.raises((RuntimeError, ContractError)):
        TRANSFORM(torch.zeros(2, 24), [torch.ones(12)], "diag(0)")


def cases() -> list[tuple[object, tuple[object, ...]]]:
    fmt = IntFormat(4, 8, False)
    codes, scales, zeros, b = operands(fmt, bias=True)
    x = torch.randn(2, 3, 24)
    q = torch.randn(2, 3, 4, 8).transpose(1, 2)
    table = torch.randn(3, 8)
    return [
        (LINEAR_Q, (x, codes, scales, zeros, b, 4, 8)),
        (LINEAR_Q, (x.to(torch.bfloat16), codes, scales, None, None, 4, 8)),
        (LINEAR_PACKED, (x, pack(codes, 4), scales, pack(zeros, 4), b, 4, 8)),
        (
            EMBEDDING_PACKED,
            (torch.tensor([[0, 2], [1, 1]]), pack(codes, 4), scales, pack(zeros, 4), 4, 8, 24, torch.bfloat16),
        ),
        (QUANTIZE_ACT, (x, 8, 0, True)),
        (QUANTIZE_ACT, (x.transpose(0, 1), 4, 8, False)),
        (ROPE, (q, table, table)),
        (TRANSFORM, (x, [torch.randn(24)], "diag(0)")),
        (
            TRANSFORM,
            (
                x.transpose(0, 1).to(torch.bfloat16),
                [torch.randn(2, 2), torch.randperm(12)],
                "id(24)*kron(id(2),perm(1))",
            ),
        ),
        (TRANSFORM, (x[:0], [torch.randn(6, 4, 4)], "blocks(0)")),
        (TRANSFORM, (x, [], "had(24,8,1)")),
    ]


@pytest.mark.parametrize("index", range(11))
def test_fake_and_real_agree(index: int) -> None:
    op, args = cases()[index]
    outcome = torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    assert outcome == {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}


def test_ops_do_not_alias_or_change_their_input() -> None:
    x = torch.zeros(2, 24)
    out = QUANTIZE_ACT(x, 8, 0, True)
    out += 1
    assert torch.equal(x, torch.zeros(2, 24))
    out = TRANSFORM(x, [], "id(24)")
    out += 1
    assert torch.equal(x, torch.zeros(2, 24))
