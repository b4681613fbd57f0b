"""The layout of integer weights for Triton kernels: split by runs of input features, one copy for every number of tokens.

A block is a run of K that one set of words holds; field i stands for features run·i + j of its block, j being the place of its
word in a run. Runs are 32, or 64 where blocks and groups allow it (`run_of`), which halves the number of products; for 32:

    bits   block   words of a row
    4      128     int16 [32], 4 fields
    2      256     int16 [32], 8 fields
    1      512     int16 [32], 16 fields
    3      512     int16 [96]: fields 0 … 4 in the first 32 words, 5 … 9 in the next, 10 … 14 in the last, and field 15 in
                   the top bits of the three, lowest first
    8      128     uint8 [128], in order

For 8-bit activations (`arrange_integers`) blocks are 128 wide, and hold codes less their middle:

    8      128     int8 [.., 128], in order
    4      128     int8 [.., 64]: feature j in the low nibble of byte j, feature 64 + j in the high one

So a field is a tile of a product as it is, with nothing to interleave, and every group that a run divides is whole fields.
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
FIELDS = {1: 16, 2: 8, 3: 16, 4: 4}


def run_of(bits: int, in_features: int, group: int) -> int:
    """The run of a weight: 64 where groups are whole runs and K whole blocks, else 32; blocks of 1 and 3 bits are long as they
    are."""
    long = 2 * RUN
    whole = group >= in_features or group % long == 0
    return long if bits not in (1, 3) and whole and in_features % block_of(bits, long) == 0 else RUN


def block_of(bits: int, run: int) -> int:
    """Input features of a block."""
    return PADDED if bits == 8 else FIELDS[bits] * run


def padded(out_features: int) -> int:
    """N as it is stored."""
    return -(-out_features // PADDED) * PADDED


def _fields(bits: int) -> list[list[tuple[int, int, int]]]:
    """For each field of a block where its bits are: (word, lowest bit there, lowest bit of the code, …), a triple a piece."""
    if bits == 3:
        return [[(i // 5, 3 * (i % 5), 0)] for i in range(15)] + [[(word, 15, word) for word in range(3)]]
    return [[(0, bits * i, 0)] for i in range(FIELDS[bits])]


def arrange(codes: Tensor, bits: int, run: int = RUN) -> Tensor:
    """Words of codes uint8 [N, K]."""
    n, k = codes.shape
    block = block_of(bits, run)
    blocks = -(-k // block)
    shape = (padded(n) // ROWS, blocks, ROWS)
    width = block if bits == 8 else 3 * run if bits == 3 else run
    low = torch.zeros(*shape, width, dtype=torch.uint8 if bits == 8 else torch.int16, device=codes.device)
    step = max(1, CHUNK // (ROWS * blocks * block))
    for start in range(0, shape[0], step):
        part = codes[start * ROWS : (start + step) * ROWS]
        tiles = min(step, shape[0] - start)
        part = F.pad(part, (0, blocks * block - k, 0, tiles * ROWS - part.shape[0]))
        if bits == 8:
            low[start : start + step] = part.reshape(tiles, ROWS, blocks, block).transpose(1, 2)
            continue
        runs = part.reshape(tiles, ROWS, blocks, block // run, run).permute(3, 0, 2, 1, 4)
        for field, pieces in zip(runs, _fields(bits), strict=True):
            for word, at, lowest in pieces:
                piece = field if len(pieces) == 1 else field >> lowest & 1
                low[start : start + step, ..., word * run : (word + 1) * run] |= piece.to(torch.int16) << at
    return low


def run_in(low: Tensor, bits: int) -> int:
    """The run of words of fewer than 8 bits."""
    return low.shape[-1] // (3 if bits == 3 else 1)


def restore(low: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """Codes uint8 [N, K]: undo `arrange`."""
    if bits == 8:
        codes = low.transpose(1, 2)
    else:
        run, fields = run_in(low, bits), []
        for pieces in _fields(bits):
            mask = (1 << bits) - 1 if len(pieces) == 1 else 1
            found = [(low[..., w * run : (w + 1) * run] >> at & mask) << lowest for w, at, lowest in pieces]
            fields.append(sum(found[1:], found[0]).to(torch.uint8))
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


def outliers(indices: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of columns int32 [O] and the weight [N, O] on them as [O, N padded], O padded to 16 with columns of weight zero."""
    short = -len(indices) % 16
    return F.pad(indices.to(torch.int32), (0, short)), columns(F.pad(weight, (0, short)))


def columns(values: Tensor, fill: float = 0) -> Tensor:
    """Parameters [N, G] as [G, N padded]: what the rows of a tile need lies side by side."""
    n, groups = values.shape
    made = torch.full((groups, padded(n)), fill, dtype=values.dtype, device=values.device)
    made[:, :n] = values.T
    return made
