"""W8A8 in e4m3: codes of the format to the last one, products against float64, ragged shapes."""

from __future__ import annotations

import pytest
import torch

from dlqc.formats.fp8 import DTYPE, Fp8Format, quantize_tokens
from dlqc.kernels.triton import float8 as host
from dlqc.kernels.triton import rows
from dlqc.kernels.triton.dispatch import Config


def test_codes_are_those_of_the_format() -> None:
    """Every number between two codes that is a tie, its neighbours, subnormals, zeros, a row of zeros, tiny and huge rows."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(DTYPE).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([ties, ties * (1 + 2**-22), ties * (1 - 2**-22), codes, -codes, -ties])
    x = torch.stack([near, near.flip(0), torch.zeros_like(near), near * 2.0**-120, near * 2.0**110])
    x[:2, 5] = 448.0
    found = rows.quantize(x, 8, stored=768, float8=True)
    expected, scale = quantize_tokens(x)
    assert torch.equal(found.scales, scale[:, 0])
    assert torch.equal(found.q[:, : x.shape[1]].view(DTYPE).float(), expected.float())
    assert not found.q[:, x.shape[1] :].any()


@pytest.mark.parametrize(("m", "n", "k", "splits"), [(5, 70, 200, 1), (17, 60, 384, 2)])
def test_products(m: int, n: int, k: int, splits: int) -> None:
    stored, bias = Fp8Format().quantize(torch.randn(n, k)), torch.randn(n)
    weight, scales = host.arrange(stored)
    x = torch.randn(m, k)
    codes, scale = quantize_tokens(x)
    dense = stored.dequantize().double()
    truth = (codes.double() * scale.double()) @ dense.T + bias.double()
    bound = (k + 8) * 2.0**-24 * ((codes.double() * scale.double()).abs() @ dense.abs().T + bias.double().abs())
    found = rows.quantize(x, 8, stored=weight.shape[1], float8=True)
    y = torch.full((m, n), torch.nan)
    host.launch(found.q.view(DTYPE), found.scales, weight, scales, bias, y, Config(128, 16, splits))
    assert ((y.double() - truth).abs() <= bound).all()
    for given in (x, x.double()):
        assert ((host.float8(given, weight, scales, bias, k, n).double() - truth).abs() <= bound).all()
    weight.view(torch.uint8)[n - 1, k - 1] ^= 64
    assert not ((host.float8(x, weight, scales, bias, k, n).double() - truth).abs() <= bound).all()
    torch.library.opcheck(host.float8, (x, weight, scales, bias, k, n), test_utils=("test_faketensor",))
