"""Keys and values of a cache to packed codes and back (device/cache.py); formats and formulas are those of `dlqc.kv_cache`.

    quantize_cache     codes, steps, centers of keys or values
    dequantize_cache   what they stand for

Shapes:  numbers [B, H, S, D]; a row is a channel of a head (keys: [B·H·D, S]) or a token of a head (values: [B·H·S, D]);
         codes uint8 [R, 4·⌈N·bits/32⌉], N the row's length in whole groups; steps float16 [R, G]; centers float16 [R, 1 or G].
Dtypes:  float32 in between; codes, steps and centers are those of `Bins.of` to the last bit.
Requires: 2, 3, 4 or 8 bits; groups of tokens that 32 divides, or one group; values rows of whole 32-bit words.

Nothing checks here that scales fit float16: where they do not, steps are infinite (`Bins.of` refuses). Elsewhere than on a GPU
the ops compute the definition. The runtime of `dlqc.cached` calls `Bins` itself; the ops are for those who write a decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.device import cache as device
from dlqc.kv_cache import WIDTHS, Bins

#: Rows that one program takes.
ROWS = 16


@torch.library.custom_op("dlqc_triton::quantize_cache", mutates_args=())
def quantize_cache(
    numbers: Tensor, bits: int, group: int, keys: bool, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """codes, steps, centers; see the module docstring.

    Args:
        group: tokens of a group of a key; values have one group a row.
        symmetric: keys have the mean of the channel for a center, else each group its middle.
    """
    r, n, groups = _sizes(numbers.shape, bits, group, keys)
    size = n // groups
    wide = numbers if numbers.dtype == torch.float64 else numbers.float()
    rows = wide.transpose(2, 3).flatten(0, 2) if keys else wide.flatten(0, 2)
    shared = keys and symmetric
    centers = rows.mean(dim=1, keepdim=True).to(torch.float16) if shared else None
    if not runtime.launchable(numbers):
        lacking = n - rows.shape[1]
        rows = torch.cat([rows, rows[:, -1:].expand(-1, lacking)], dim=1) if lacking else rows
        found = Bins.of(rows, groups, bits, centers)
        return found.codes, found.steps, found.centers.clone() if shared else found.centers
    words = -(-n * bits // 32)
    codes = torch.zeros(r, words, dtype=torch.int32, device=numbers.device)
    steps = torch.empty(r, groups, dtype=torch.float16, device=numbers.device)
    made = centers if centers is not None else torch.empty_like(steps)
    x = numbers.contiguous()
    with runtime.on(x):
        device.quantize_bins[-(-r // ROWS), groups](
            *(x, made, codes, steps, r, *_strides(x.shape, keys), words),
            **{"BITS": bits, "GROUP": size, "GROUPS": groups, "GIVEN": shared, "ROWS": ROWS, "WIDTH": _width(size)},
            enable_fp_fusion=False,  # the last bit counts
        )
    return codes.view(torch.uint8), steps, made


@quantize_cache.register_fake
def _(numbers: Tensor, bits: int, group: int, keys: bool, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    r, n, groups = _sizes(numbers.shape, bits, group, keys)
    codes = numbers.new_empty(r, 4 * -(-n * bits // 32), dtype=torch.uint8)
    half = torch.float16
    return (
        codes,
        numbers.new_empty(r, groups, dtype=half),
        numbers.new_empty(r, 1 if keys and symmetric else groups, dtype=half),
    )


@torch.library.custom_op("dlqc_triton::dequantize_cache", mutates_args=())
def dequantize_cache(
    codes: Tensor,
    steps: Tensor,
    centers: Tensor,
    shape: list[int],
    bits: int,
    group: int,
    keys: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Numbers of `shape` [B, H, S, D]; the other arguments are those of `quantize_cache`."""
    r, n, groups = _sizes(shape, bits, group, keys)
    if not (steps.is_cuda or runtime.interpreting()) or runtime.unavailable() is not None or dtype == torch.float64:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = Bins(codes, n, bits, steps, centers).numbers(wide)
        batch, heads, length, width = shape
        if keys:
            rows = rows.reshape(batch, heads, width, -1)[..., :length].transpose(2, 3)
        return rows.reshape(shape).to(dtype).contiguous()
    blank = torch.empty(shape, dtype=dtype, device=codes.device)
    y = blank.to(runtime.interpretable(blank))
    words = codes.shape[1] // 4
    with runtime.on(y):
        device.numbers_of_bins[-(-r // ROWS), groups](
            *(codes.view(torch.int32), steps, centers, y, r, *_strides(shape, keys), words),
            **{"BITS": bits, "GROUP": n // groups, "GROUPS": groups, "SHARED": centers.shape[1] == 1 and groups > 1},
            **{"ROWS": ROWS, "WIDTH": _width(n // groups)},
        )
    return y.to(dtype)


@dequantize_cache.register_fake
def _(
    codes: Tensor,
    steps: Tensor,
    centers: Tensor,
    shape: list[int],
    bits: int,
    group: int,
    keys: bool,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _sizes(shape: list[int] | torch.Size, bits: int, group: int, keys: bool) -> tuple[int, int, int]:
    """Rows, the length of a row in whole groups, and groups."""
    batch, heads, length, width = shape
    if bits not in WIDTHS or (keys and (group < 1 or (group % 32 and group < length))):
        what = f"{bits} bits in groups of {group} tokens are not stored"
        raise ContractError(
            what, where="cache", remedy=f"Use {', '.join(map(str, WIDTHS))} bits and groups that 32 divides"
        )
    if not keys:
        return batch * heads * length, width, 1
    size = min(group, length)
    groups = -(-length // size)
    return batch * heads * width, groups * size, groups


def _strides(shape: list[int] | torch.Size, keys: bool) -> tuple[int, int, int, int, int]:
    """INNER, outer, row_stride, stride and LAST of the kernels, for numbers without gaps."""
    _, _, length, width = shape
    return (width, length * width, 1, width, length - 1) if keys else (length, length * width, width, 1, width - 1)


def _width(size: int) -> int:
    return max(32, 1 << (size - 1).bit_length())
