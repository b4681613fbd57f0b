"""Ops with fixed scales, and of heads, against their formulas, row by row; every op against its fake implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlqc import ops
from dlqc.formats.activation import ActFormat

IDS = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(0))
BUCKET = torch.tensor([[0], [2], [1]]).expand(3, 5).contiguous()
SCALE = torch.rand(3, 2) + 0.1
POINTS = torch.randint(-5, 5, (3, 2), dtype=torch.int8)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ops.MASK_BUCKET, (IDS, 3, [0.25, 0.5])),
        (ops.QUANTIZE_ACT_STATIC, (torch.randn(3, 5, 8), SCALE[:1], None, None, 8)),
        (ops.QUANTIZE_ACT_STATIC, (torch.randn(3, 5, 8), SCALE, POINTS, BUCKET, 4)),
        (ops.QUANTIZE_ACT_STATIC, (torch.randn(8, 15).T, SCALE, None, BUCKET.reshape(-1), 4)),
        (ops.QUANTIZE_HEADS, (torch.randn(3, 2, 5, 8), 4, True, True)),
        (ops.QUANTIZE_HEADS, (torch.randn(3, 5, 2, 8).transpose(1, 2), 8, False, False)),
        (ops.QUANTIZE_HEADS_STATIC, (torch.randn(3, 2, 5, 8), SCALE[:, :, None], POINTS[:, :, None], BUCKET, 4)),
        (ops.QUANTIZE_HEADS_STATIC, (torch.randn(3, 5, 2, 8).transpose(1, 2), torch.rand(1, 1, 8), None, None, 8)),
        (ops.ATTENTION, (*torch.randn(3, 2, 4, 5, 8), None, True, None, 8, False)),
        (
            ops.ATTENTION,
            (torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 2, 5, 8), torch.ones(5, 5) > 0, False, 0.3, 0, True),
        ),
    ],
)
def test_new_ops_are_sound(op: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_mask_bucket_counts_exactly() -> None:
    """Every count at every length up to 60, against fractions; edges belong to the bucket below them."""
    for length in range(1, 61):
        ids = (torch.arange(length) < torch.arange(length + 1)[:, None]).long() * 7
        for n in (1, 2, 3, 4, 7, 10):
            found = ops.mask_bucket(ids, 7, [k / n for k in range(1, n)])
            assert found.shape == ids.shape
            assert bool((found == found[:, :1]).all())
            expected = [max(0, -(-count * n // length) - 1) for count in range(length + 1)]
            assert found[:, 0].tolist() == expected, (length, n)
    assert ops.mask_bucket(torch.tensor([[1, 7, 7, 7, 7, 7, 7, 7, 7, 7]]), 7, [0.1, 0.9])[0, 0] == 1


def test_each_row_takes_its_own_set() -> None:
    x, scale = torch.randn(3, 5, 8), torch.rand(3, 2) + 0.05
    points = torch.tensor([[-3, 2], [0, 1], [7, -8]], dtype=torch.int8)
    for zero in (None, points):
        found = ops.quantize_act_static(x, scale, zero, BUCKET, 4)
        for b, s in enumerate(BUCKET[:, 0].tolist()):
            for g in range(2):
                part, z = x[b, :, 4 * g : 4 * g + 4], 0 if zero is None else int(zero[s, g])
                codes = (part / scale[s, g]).round() + z
                torch.testing.assert_close(found[b, :, 4 * g : 4 * g + 4], (codes.clamp(-8, 7) - z) * scale[s, g])
        alone = torch.cat([ops.quantize_act_static(x[b : b + 1], scale, zero, BUCKET[b : b + 1], 4) for b in range(3)])
        assert torch.equal(found, alone)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 8)])
def test_fixed_scales_of_heads(shape: tuple[int, int]) -> None:
    x, scale = torch.randn(3, 2, 5, 8), torch.rand(3, *shape) + 0.05
    found = ops.quantize_heads_static(x, scale, None, BUCKET, 4)
    for b, s in enumerate(BUCKET[:, 0].tolist()):
        for h in range(2):
            step = scale[s, h % shape[0]]  # [1] or [8]
            torch.testing.assert_close(found[b, h], (x[b, h] / step).round().clamp(-8, 7) * step)
    assert ops.quantize_heads_static(x[:0], scale, None, BUCKET[:0], 4).shape == (0, 2, 5, 8)
    assert ops.quantize_heads_static(x[:, :, :0], scale, None, BUCKET[:, :0], 4).shape == (3, 2, 0, 8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_scales_of_heads(symmetric: bool) -> None:
    """Per token and head each row of D numbers has its own scale; per token one for all heads."""
    x, fmt = torch.randn(3, 2, 5, 8), ActFormat(4, None, symmetric)
    assert torch.equal(ops.quantize_heads(x, 4, symmetric, False), fmt.fake_quantize(x))
    across = ops.quantize_heads(x, 4, symmetric, True)
    for b in range(3):
        for i in range(5):
            expected = fmt.fake_quantize(x[b, :, i].reshape(-1)).reshape(2, 8)
            assert torch.equal(across[b, :, i], expected)
    assert not torch.equal(across, ops.quantize_heads(x, 4, symmetric, False))
