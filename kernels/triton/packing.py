"""The layout of integer weights for Triton kernels: split by runs of 32 input features, one copy for every number of tokens.

A block is a run of K that one set of words holds; field i of word j stands for feature 32·i + j of its block:

    bits   block   low                         high
    4      128     int16 [.., 32], 4 fields
    2      256     int16 [.., 32], 8 fields
    3      256     the two low bits, as above  int8 [.., 32]: bit i is the third bit of field i
    8      128     uint8 [.., 128], in order

For 8-bit activations (`arrange_integers`) blocks are 128 wide, and hold codes less their middle:

    8      128     int8 [.., 128], in order
    4      128     int8 [.., 64]: feature j in the low nibble of byte j, feature 64 + j in the high one

So a field is a tile of a product as it is, with nothing to interleave, and every group that 32 divides is whole fields.
Words are stored tile after tile, [⌈N/64⌉, ⌈K/block⌉, 64, words]: what a program reads in one step is one run of memory. N is
padded to 128 and K to whole blocks, with zeros, so that weights are read without a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 32
ROWS = 64
PADDED = 128
CHUNK = 1 << 22
BLOCKS = {2: 256, 3: 256, 4: 128, 8: 128}


def padded(out_features: int) -> int:
    """N as it is stored."""
    return -(-out_features // PADDED) * PADDED


def arrange(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Words `low` and, for 3 bits, `high` of codes uint8 [N, K]."""
    n, k = codes.shape
    block = BLOCKS[bits]
    blocks = -(-k // block)
    shape = (padded(n) // ROWS, blocks, ROWS)
    wide = torch.uint8 if bits == 8 else torch.int16
    low = torch.zeros(*shape, block if bits == 8 else RUN, dtype=wide, device=codes.device)
    high = torch.zeros(*shape, RUN, dtype=torch.int8, device=codes.device) if bits == 3 else None
    step = max(1, CHUNK // (ROWS * blocks * block))
    for start in range(0, shape[0], step):
        part = codes[start * ROWS : (start + step) * ROWS]
        tiles = min(step, shape[0] - start)
        part = F.pad(part, (0, blocks * block - k, 0, tiles * ROWS - part.shape[0]))
        runs = part.reshape(tiles, ROWS, blocks, block // RUN, RUN).permute(3, 0, 2, 1, 4)
        if bits == 8:
            low[start : start + step] = part.reshape(tiles, ROWS, blocks, block).transpose(1, 2)
            continue
        narrow = 2 if bits == 3 else bits
        for i, field in enumerate(runs):
            low[start : start + step] |= (field & ((1 << narrow) - 1)).to(torch.int16) << (narrow * i)
            if high is not None:
                high[start : start + step] |= ((field >> 2) << i).view(torch.int8)
    return low, high


def restore(low: Tensor, high: Tensor | None, bits: int, out_features: int, in_features: int) -> Tensor:
    """Codes uint8 [N, K]: undo `arrange`."""
    if bits == 8:
        codes = low.transpose(1, 2)
    else:
        narrow = 2 if bits == 3 else bits
        fields = []
        for i in range(BLOCKS[bits] // RUN):
            field = (low >> (narrow * i)).to(torch.uint8) & ((1 << narrow) - 1)
            fields.append(field if high is None else field | (((high.view(torch.uint8) >> i) & 1) << 2))
        codes = torch.stack(fields, -2).transpose(1, 2)
    return codes.reshape(low.shape[0] * ROWS, -1)[:out_features, :in_features].contiguous()


def arrange_integers(codes: Tensor, bits: int) -> Tensor:
    """Words of codes uint8 [N, K] of 4 or 8 bits for 8-bit activations; past the end of K they are the middle, 0."""
    n, k = codes.shape
    blocks, tiles = -(-k // PADDED), padded(n) // ROWS
    width = PADDED * bits // 8
    words = torch.zeros(tiles, blocks, ROWS, width, dtype=torch.int8, device=codes.device)
    step = max(1, CHUNK // (ROWS * blocks * PADDED))
    for start in range(0, tiles, step):
        part = codes[start * ROWS : (start + step) * ROWS] ^ (1 << (bits - 1))  # less the middle, in two's complement
        part = F.pad(part, (0, blocks * PADDED - k, 0, (min(start + step, tiles) - start) * ROWS - part.shape[0]))
        runs = part.reshape(-1, ROWS, blocks, 8 // bits, width).transpose(1, 2)
        byte = runs[..., 0, :] if bits == 8 else runs[..., 0, :] & 15 | runs[..., 1, :] << 4
        words[start : start + step] = byte.view(torch.int8)
    return words


def restore_integers(words: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """Codes less their middle, int8 [N, K]: undo `arrange_integers`."""
    if bits == 4:
        words = torch.cat(((words << 4) >> 4, words >> 4), -1)
    return words.transpose(1, 2).reshape(words.shape[0] * ROWS, -1)[:out_features, :in_features].contiguous()


def columns(values: Tensor, fill: float = 0) -> Tensor:
    """Parameters [N, G] as [G, N padded]: what the rows of a tile need lies side by side."""
    n, groups = values.shape
    made = torch.full((groups, padded(n)), fill, dtype=values.dtype, device=values.device)
    made[:, :n] = values.T
    return made
