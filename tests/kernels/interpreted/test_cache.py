"""Keys and values to codes and back: the bits of `Stored`, which is the definition."""

from __future__ import annotations

import pytest
import torch

from dlqc.errors import ContractError
from dlqc.kernels.triton import cache
from dlqc.kv_cache import Bins, KeyFormat, Stored, ValueFormat

KEYS = [
    (bits, 32, length, symmetric)
    for bits, length, symmetric in ((2, 70, True), (3, 33, False), (4, 64, True), (8, 9, False))
]


def numbers(length: int, width: int) -> torch.Tensor:
    """One channel and one token are constant, one channel lies far from zero."""
    x = torch.randn(2, 2, length, width)
    x[..., 3] += 30.0
    x[0, 0, :, 1], x[1, 1, 2] = 0.25, 0.0
    return x


@pytest.mark.parametrize(("bits", "group", "length", "symmetric"), [*KEYS, (3, 64, 130, True)])
def test_keys(bits: int, group: int, length: int, symmetric: bool) -> None:
    x = numbers(length, 10)
    stored = Stored(KeyFormat(bits, bits, group, symmetric), (2, 2, length, 10), x.dtype, x.device)
    check(x, stored, bits, group, True, symmetric)


@pytest.mark.parametrize(("bits", "width"), [(2, 16), (3, 32), (3, 96), (4, 24), (8, 20)])
def test_values(bits: int, width: int) -> None:
    x = numbers(7, width)
    check(x, Stored(ValueFormat(bits, bits), (2, 2, 7, width), x.dtype, x.device), bits, 0, False, False)


def check(x: torch.Tensor, stored: Stored, bits: int, group: int, keys: bool, symmetric: bool) -> None:
    stored.first_masked = x.shape[2]
    stored.write(0, x)
    held = stored.segments[0].held
    assert isinstance(held, Bins)
    found = cache.quantize_cache(x, bits, group, keys, symmetric)
    for made, expected in zip(found, (held.codes, held.steps, held.centers), strict=True):
        assert torch.equal(made, expected)
    y = cache.dequantize_cache(*found, list(x.shape), bits, group, keys, torch.float32)
    torch.testing.assert_close(y, stored.read(x.shape[2]), rtol=0, atol=0)
    # The definition, which other devices take, is the same function.
    wide = cache.quantize_cache(x.double(), bits, group, keys, symmetric)
    assert [t.shape for t in wide] == [t.shape for t in found]
    back = cache.dequantize_cache(*found, list(x.shape), bits, group, keys, torch.float64)
    torch.testing.assert_close(back, y.double(), rtol=1e-6, atol=1e-6)


def test_what_is_not_stored_is_refused() -> None:
    x = torch.zeros(1, 1, 64, 32)
    for bits, group in ((5, 32), (4, 48)):
        with pytest.raises(
            ContractError, match=f"cache: {bits} bits in groups of {group} tokens are not stored. Use 2, 3, 4, 8"
        ):
            cache.quantize_cache(x, bits, group, True, True)
    torch.library.opcheck(cache.quantize_cache, (x, 3, 32, True, False), test_utils=("test_schema", "test_faketensor"))
