"""What products take along, against float64: norms, gates, Hadamard blocks, sums, columns with outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.hadamard import hadamard
from dlqc.kernels.triton import integer as host
from dlqc.kernels.triton import packing, rows, weight_only


def definition(kind: str, x: torch.Tensor, other: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> Any:
    return {
        "as_is": lambda: x,
        "rms_norm": lambda: F.rms_norm(x, gain.shape, gain, 1e-5),
        "layer_norm": lambda: F.layer_norm(x, gain.shape, gain, shift, 1e-5),
        "silu_times": lambda: F.silu(x) * other,
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "block", "added", "group", "splits", "k"),
    [
        ("as_is", 1, True, None, 2, 256),
        ("rms_norm", 1, False, None, 1, 200),
        ("rms_norm", 1, True, 128, 1, 256),
        ("layer_norm", 1, True, 128, 2, 256),
        ("silu_times", 32, True, None, 1, 96),
        ("silu_times", 1, False, 128, 1, 128),
    ],
)
def test_products_with_what_is_around_them(
    kind: str, block: int, added: bool, group: int | None, splits: int, k: int
) -> None:
    """Codes may differ by one where a number lies near a tie: the bound is half a step of each token, times Σ|W|."""
    m, n = 5, 70
    stored = IntFormat(4, group, False, "float32").quantize(torch.randn(n, k))
    dense, bias = stored.dequantize().double(), torch.randn(n)
    spec = LinearSpec(k, n, stored.format, ActFormat(8), True)
    lowered = host.Integer().lower(spec, pack(stored.codes, 4), stored.scales, pack(stored.zeros, 4), bias)
    x, other = (
        torch.randn(m, 2 * k)[:, :k],
        torch.randn(m, 2 * k)[:, k:],
    )  # rows that lie apart, as slices of gate and up
    x[1] = 0.0
    gain, shift, residual = torch.randn(k), torch.randn(k), torch.randn(m, n) if added else None
    given = (
        other if kind == "silu_times" else None,
        gain if kind.endswith("norm") else None,
        shift if kind == "layer_norm" else None,
        1e-5,
    )
    exact = definition(kind, x.double(), other.double(), gain.double(), shift.double())
    exact = (exact.reshape(m, -1, block) @ (hadamard(block) / block**0.5)).reshape(m, k)
    truth = exact @ dense.T + bias.double() + (0 if residual is None else residual.double())
    step = exact.abs().amax(1, keepdim=True) / 127
    bound = 0.5001 * step * dense.abs().sum(1) + 1e-5 * (exact.abs() @ dense.abs().T) + 2.0**-18 * (truth.abs() + 1)
    y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars, kind, *given, block, residual)
    assert ((y.double() - truth).abs() <= bound).all()
    packed = host.Packed(*list(lowered.tensors.values())[:3], k, n, 4, group or k)  # type: ignore[arg-type]
    codes = host.quantize(x, 8, packed, rows.Before(kind, *given, block))
    y = torch.full((m, n), torch.nan)
    host.launch(codes, packed, bias, y, host.Config(128, 16, splits), residual)
    assert ((y.double() - truth).abs() <= bound).all()
    wide = lowered.op(x.double(), *lowered.tensors.values(), *lowered.scalars, kind, *given, block, residual)
    assert ((wide - truth).abs() <= bound).all()


@pytest.mark.parametrize("splits", [1, 2])
def test_a_sum_behind_16_bit_products(judge: Any, splits: int) -> None:
    problem = judge.make(LinearSpec(512, 70, IntFormat(4, 128), None, True), 1)
    low, scales, zeros, bias = weight_only.WeightOnly().lower(problem.spec, *problem.canonical).tensors.values()
    packed = weight_only.Packed(low, scales, zeros, 512, 70, 4, 128)  # type: ignore[arg-type]
    x, residual = problem.input((5,), torch.float32, 1), torch.randn(5, 70)
    plain, y = torch.empty(5, 70), torch.full((5, 70), torch.nan)
    config = weight_only.Config(128, 16, splits)
    weight_only.launch(x, packed, bias, plain, config)
    weight_only.launch(x, packed, bias, y, config, residual)
    torch.testing.assert_close(y, plain + residual, rtol=1e-6, atol=1e-6)
    dense = weight_only.product(x, x, packed, bias, residual)
    torch.testing.assert_close(dense, plain + residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("group", [None, 128])
def test_columns_with_outliers(group: int | None, splits: int) -> None:
    """Codes of whole numbers are exact, and so is the product on the columns, of which one is the first and one the last."""
    m, n, k = 5, 70, 256
    stored = IntFormat(8, group, True, "float32").quantize(torch.randn(n, k))
    lowered = host.Integer().lower(
        LinearSpec(k, n, stored.format, ActFormat(8), False), pack(stored.codes, 8), stored.scales, None, None
    )
    columns, apart = packing.outliers(torch.tensor([0, 17, k - 1]), torch.randint(-9, 10, (n, 3)).float())
    x = torch.randint(-127, 128, (m, k)).float()
    x[:, 3] = 127.0
    kept = torch.ones(k).index_fill(0, torch.tensor([0, 17, k - 1]), 0.0)
    whole = x.clone()
    whole[:, [0, 17, k - 1]] *= 1000.0
    truth = (x * kept).double() @ stored.dequantize().double().T + whole[:, [0, 17, k - 1]].double() @ apart[
        :3, :n
    ].double()
    rest = ("as_is", None, kept, None, 0.0, 1, None, whole, columns, apart)
    wide = (rest[0], None, kept.double(), *rest[3:7], whole.double(), *rest[8:])
    for given, extra in ((whole, rest), (whole.double(), wide)):
        y = lowered.op(given, *lowered.tensors.values(), *lowered.scalars, *extra)
        torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-3)
    packed = host.Packed(*list(lowered.tensors.values())[:3], k, n, 8, group or k)  # type: ignore[arg-type]
    codes = host.quantize(whole, 8, packed, rows.Before(gain=kept))
    y = torch.full((m, n), torch.nan)
    host.launch(codes, packed, None, y, host.Config(128, 16, splits), None, host.Apart(whole, columns, apart))
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-3)
