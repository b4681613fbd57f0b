"""Keys and values of a cache to packed codes and back in native code (csrc/cache.cpp); formats and formulas are those of
`dlqc.kv_cache`.

    quantize_cache     codes, steps, centers of keys or values
    dequantize_cache   what they stand for, in float32

Shapes:  numbers [B, H, S, D]; a row is a channel of a head (keys: [B·H·D, S]) or a token of a head (values: [B·H·S, D]);
         codes uint8 [R, 4·⌈N·bits/32⌉], N the row's length in whole groups; steps float16 [R, G]; centers float16 [R, 1 or G].
Dtypes:  numbers in float32 or bfloat16, float32 in between; codes, steps, centers and what they stand for are those of
         `kv_cache.quantize` and `kv_cache.dequantize` to the last bit. Means of channels are given: the order of such
         a sum is torch's.
Requires: 2, 3, 4 or 8 bits; groups of tokens that 32 divides, or one group. All else takes the definition.

Nothing checks here that scales fit float16: where they do not, or numbers are no numbers, scales are not finite. `CODER`, which
the CPU backend leaves at the marks of a lowered graph for the runtime of `dlqc.cached`, refuses them as the definition does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.native_op import native_op, register_fake
from dlqc.kv_cache import WIDTHS, WORD, Coder, dequantize, quantize


@native_op
def quantize_cache(
    numbers: Tensor, centers: Tensor | None, bits: int, group: int, keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """codes, steps, centers; see the module docstring.

    Args:
        centers: float16 [B·H·D, 1], of keys that have one for each channel; None: each group has its middle.
        group: tokens of a group of a key; values have one group a row.

    Raises:
        ContractError: widths or groups that no cache has.
    """
    _rows(numbers.shape, bits, group, keys)
    given = None if centers is None else centers.clone()  # what an op gives is its own
    return quantize(numbers, given, bits, group, keys)


def _fake_quantize(
    numbers: Tensor, centers: Tensor | None, bits: int, group: int, keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    r, n, groups = _rows(numbers.shape, bits, group, keys)
    codes = numbers.new_empty(r, 4 * -(-n * bits // 32), dtype=torch.uint8)
    steps = numbers.new_empty(r, groups, dtype=torch.float16)
    return codes, steps, torch.empty_like(steps if centers is None else centers)


@native_op
def dequantize_cache(
    codes: Tensor,
    steps: Tensor,
    centers: Tensor,
    heads: int,
    length: int,
    width: int,
    bits: int,
    group: int,
    keys: bool,
) -> Tensor:
    """Numbers float32 [B, `heads`, `length`, `width`]; the other arguments are those of `quantize_cache`, and what it gives."""
    _rows((1, heads, length, width), bits, group, keys)
    return dequantize(codes, steps, centers, heads, length, width, bits, group, keys)


def _fake_dequantize(
    codes: Tensor,
    steps: Tensor,
    centers: Tensor,
    heads: int,
    length: int,
    width: int,
    bits: int,
    group: int,
    keys: bool,
) -> Tensor:
    batch = steps.shape[0] // (heads * (width if keys else length))
    return codes.new_empty(batch, heads, length, width, dtype=torch.float32)


def _rows(shape: tuple[int, ...], bits: int, group: int, keys: bool) -> tuple[int, int, int]:
    """Rows, the length of a row in whole groups, and groups."""
    batch, heads, length, width = shape
    size = min(group, length) if keys else width
    if bits not in WIDTHS or size < 1 or (keys and size % WORD and size < length):
        remedy = f"Use {', '.join(map(str, WIDTHS))} bits and groups that {WORD} divides"
        raise ContractError(f"{bits} bits in groups of {group} tokens are not stored", where="cache", remedy=remedy)
    rows, numbers = (width, length) if keys else (length, width)
    groups = -(-numbers // size)
    return batch * heads * rows, groups * size, groups


register_fake(quantize_cache, _fake_quantize)
register_fake(dequantize_cache, _fake_dequantize)


def _quantize(
    numbers: Tensor, centers: Tensor | None, bits: int, group: int, keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    codes, steps, middles = quantize_cache(numbers, centers, bits, group, keys)
    if not bool((torch.isfinite(steps) & torch.isfinite(middles)).all()):
        return quantize(numbers, centers, bits, group, keys)  # refuses them
    return codes, steps, middles


CODER = Coder(_quantize, dequantize_cache)


def unavailable() -> str | None:
    """None if the native code can be used, or why not, one clause."""
    reason = build.unavailable("cache")
    if reason is None:
        build.library("cache")
    return reason
