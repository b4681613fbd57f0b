"""Codes to bytes and back, for any width from 1 to 8 bits and any number of columns.

Two layouts of codes uint8 [N, K], both little-endian (element 0 in the lowest bits of byte 0):

"rows"    uint8 [N, 4·ceil(K·bits/32)]. A row is one dense bit stream: bit i of element k is bit (k·bits + i) of the
          row. It is padded with zero bits to whole 4-byte words, so no element is padded but rows start on words. The
          bytes viewed as int32 are the words of compressed-tensors' pack-quantized format.
"planes"  uint8 [bits, N, ceil(K/8)]. Plane i holds bit i of every element, eight neighbours a byte.

Eight codes are handled as one 64-bit word. Squeezing it from 8 bits an element to `bits` takes three steps, each
moving the upper half of a lane next to the lower half:

    hgfedcba  (8 lanes of 8)  →  4 lanes of 16  →  2 lanes of 32  →  one run of 8·bits bits

and spreading is the same backwards. The word is viewed as bytes, which presumes a little-endian machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from dlqc.errors import ContractError, RecipeError, nearest

Layout = Literal["rows", "planes"]

LAYOUTS = ("rows", "planes")
LANES = (8, 16, 32)
ONES = 0x0101010101010101

# Codes in flight: working memory is about eight times this many bytes, whatever the size of the weight.
CHUNK = 1 << 20


def packed_shape(out_features: int, in_features: int, bits: int, layout: Layout = "rows") -> tuple[int, ...]:
    """Shape of the uint8 tensor that `pack` returns for codes [N, K].

    >>> packed_shape(2, 9, 3), packed_shape(2, 9, 3, "planes")
    ((2, 4), (3, 2, 2))
    """
    _check(bits, layout)
    if layout == "rows":
        return out_features, -(-in_features * bits // 32) * 4
    return bits, out_features, -(-in_features // 8)


def pack(codes: torch.Tensor, bits: int, layout: Layout = "rows") -> torch.Tensor:
    """Pack codes, uint8 [N, K] with values below 2^bits, into bytes; see the module docstring for the layouts."""
    _check(bits, layout)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ContractError(f"codes are {tuple(codes.shape)} {codes.dtype}, not [N, K] torch.uint8", where="codes")
    if codes.numel() and int(codes.max()) >> bits:
        raise ContractError(f"code {int(codes.max())} does not fit in {bits} bits", where="codes")
    count, width = codes.shape
    packed = torch.zeros(packed_shape(count, width, bits, layout), dtype=torch.uint8, device=codes.device)
    for rows in _row_chunks(count, width) if width else ():
        words = _resize(codes[rows], -(-width // 8) * 8).view(torch.int64)
        if layout == "rows":
            stream = _squeeze(words, bits).unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1)
            packed[rows] = _resize(stream, packed.shape[1])
            continue
        for plane in range(bits):
            packed[plane, rows] = _squeeze((words >> plane) & ONES, 1).to(torch.uint8)
    return packed


def unpack(packed: torch.Tensor, bits: int, in_features: int, layout: Layout = "rows") -> torch.Tensor:
    """Codes uint8 [N, K] from what `pack` returned, K = `in_features`."""
    _check(bits, layout)
    count = packed.shape[-2] if packed.dim() > 1 else 0
    shape = packed_shape(count, in_features, bits, layout)
    if packed.shape != shape or packed.dtype != torch.uint8:
        what = f"packed codes are {tuple(packed.shape)} {packed.dtype}, not {shape} torch.uint8"
        raise ContractError(what, where="packed", remedy=f"Check bits={bits}, in_features={in_features}, {layout!r}")
    eights = -(-in_features // 8)
    codes = torch.empty(count, in_features, dtype=torch.uint8, device=packed.device)
    for rows in _row_chunks(count, in_features) if in_features else ():
        if layout == "rows":
            stream = _resize(packed[rows], eights * bits).reshape(-1, eights, bits)
            words = _spread(_resize(stream, 8).view(torch.int64).squeeze(-1), bits)
        else:
            words = torch.zeros(packed[0, rows].shape, dtype=torch.int64, device=packed.device)
            for plane in range(bits):
                words |= _spread(packed[plane, rows].to(torch.int64), 1) << plane
        codes[rows] = words.view(torch.uint8)[:, :in_features]
    return codes


def _check(bits: int, layout: str) -> None:
    if layout not in LAYOUTS:
        raise RecipeError(f"unknown layout {layout!r}", where="layout", remedy=nearest(layout, LAYOUTS))
    if not 1 <= bits <= 8:
        raise RecipeError(f"codes of {bits} bits cannot be packed", where="bits", remedy="Use 1 to 8")


def _row_chunks(count: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // width)
    return (slice(start, start + step) for start in range(0, count, step))


def _resize(values: torch.Tensor, width: int) -> torch.Tensor:
    """A fresh, aligned copy with the last dimension cut or padded with zeros to `width`."""
    kept = min(width, values.shape[-1])
    copy = torch.zeros(*values.shape[:-1], width, dtype=values.dtype, device=values.device)
    copy[..., :kept] = values[..., :kept]
    return copy


def _mask(lane: int, used: int) -> int:
    """The low `used` bits of every second lane of `lane` bits in a 64-bit word."""
    return sum(((1 << used) - 1) << start for start in range(0, 64, 2 * lane))


def _squeeze(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Move eight codes, one a byte of each int64, into its lowest 8·bits bits."""
    if bits == 8:
        return words
    for step, lane in enumerate(LANES):
        used = bits << step
        low = _mask(lane, used)
        words = (words & low) | ((words >> (lane - used)) & (low << used))
    return words


def _spread(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `_squeeze`."""
    if bits == 8:
        return words
    for step, lane in reversed(list(enumerate(LANES))):
        used = bits << step
        low = _mask(lane, used)
        words = (words & low) | ((words & (low << used)) << (lane - used))
    return words
