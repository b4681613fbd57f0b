"""Products of int8 weights and activations for many tokens: whole tiles copied by descriptors (TMA), programs that stay.

Many tokens wait for the tensor cores, which want both operands in shared memory and nothing else to do. One program a
multiprocessor takes tile after tile, so that the copies for the next tile are under way while the last one is scaled and stored.
Sums are exact and what follows them is done in one order, so the result has the bits of `integer.integer`.
"""

from __future__ import annotations

from dlqc.kernels.triton.device.integer import channel_scales, finished
from dlqc.kernels.triton.language import jit, tl


@jit
def place_of(tile, down, ACROSS: tl.constexpr, STRIPE: tl.constexpr):
    """Row and column of a tile among `down` rows and ACROSS columns: tiles that run together share rows of both operands.

    Stripes of STRIPE rows are taken one after the other, each column by column.
    """
    stripe = tile // (STRIPE * ACROSS)
    height = tl.minimum(down - stripe * STRIPE, STRIPE)
    within = tile % (STRIPE * ACROSS)
    return stripe * STRIPE + within % height, within // height


@jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@jit
def persistent(
    tokens, words, scales, zeros, sums, token_scales, bias, residual, y, M, y_stride,
    N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STRIPE: tl.constexpr,
):  # fmt: skip
    """y [M, N] of codes and int8 weights with a scale a channel, by as many programs as there are.

    tokens: descriptor of codes int8 [M, KP], tiles of [BM, 128]. words: descriptor of `packing.arrange_integers` as int8
    [NP / 64, KP / 128 · 64, 128], tiles of [BN / 64, 64, 128]. What lies past the end of either comes as zeros.
    """
    BLOCKS: tl.constexpr = KP // 128
    ACROSS: tl.constexpr = (NP + BN - 1) // BN
    down = tl.cdiv(M, BM)
    for tile in tl.range(tl.program_id(0), down * ACROSS, tl.num_programs(0), flatten=True):
        row, column = place_of(tile, down, ACROSS, STRIPE)
        whole = tl.zeros((BM, BN), tl.int32)
        for block in range(BLOCKS):
            token = tokens.load([row * BM, block * 128])
            weight = tl.reshape(words.load([column * (BN // 64), block * 64, 0]), (BN, 128))
            whole = tl.dot(token, weight.T, whole, out_dtype=tl.int32)
        # In quarters: what is read to finish a whole tile does not fit beside its sums.
        m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN // 4)
        left, right = halves(whole, BM, BN)
        for side in tl.static_range(2):
            first, second = halves(left if side == 0 else right, BM, BN // 2)
            for part in tl.static_range(2):
                at = n + (2 * side + part) * (BN // 4)
                value = channel_scales(first if part == 0 else second, scales, zeros, sums, m, at, M, N, 8, ZEROS)
                value = finished(value, value, token_scales, bias, residual, m, at, M, N, BIAS, ADD, 0)
                to = y + m[:, None].to(tl.int64) * y_stride + at[None, :]
                tl.store(to, value.to(y.dtype.element_ty), mask=(m[:, None] < M) & (at[None, :] < N))
