"""Products of 8-bit activations in integers: int8 or 4-bit weights, exact int32 sums, all scales in the epilogue.

As in weight_only.py, the weight is the left operand. A nibble is used where it lies: in the upper half of a byte it is 16 times
its value as int8, so half of a block takes one `and`, the other a shift and an `and`, for four weights each; the factor 16 is
taken off with the scale.
"""

from __future__ import annotations

import math

from dlqc.kernels.triton.device.dependent import arrive, fetch_share
from dlqc.kernels.triton.language import at_compile_time, jit, tl


@jit
def upper(word, ASM: tl.constexpr):
    """16 times the upper nibbles, int8."""
    if ASM:
        return tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [word], tl.int8, is_pure=True, pack=4)
    else:
        return (word & -16).to(tl.int8)


@jit
def lower(word, ASM: tl.constexpr):
    """16 times the lower nibbles, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r",
            [word],
            tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (word << 4).to(tl.int8)


@at_compile_time
def turn_of(blocks, tokens, bits):
    """Blocks of one turn of the loop. Few tokens make short products, so several share what a turn costs beside them."""
    most = 1 if tokens >= 64 else 4 if tokens <= 16 and bits == 4 else 2
    return math.gcd(blocks, min(most, max(1, blocks // 4)))


@jit
def integer(
    q, low, scales, zeros, sums, token_scales, bias, residual, x, columns, outliers, y, M, x_stride, y_stride,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, OUT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLITS: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of y of codes q int8 [M, KP], or with SPLITS > 1 of its part [SPLITS, M, N].

    A part is the int32 sum itself where a channel has one scale, else float32 and without the scales of tokens. KP is K in whole
    blocks; codes past K are zero. `sums` int32 [G, M] are those of the codes of a token over each group of the weight.
    With OUT > 0 x[:, columns] · outliers [OUT, NP], in CT and float32, is added; with splits that is one more part, the last.
    """
    BLOCKS: tl.constexpr = KP // 128
    PER: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = BLOCKS % SPLITS == 0
    CHANNEL: tl.constexpr = GROUP == K
    WORDS: tl.constexpr = 64 if BITS == 4 else 128
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, WORDS)
    fetch_share(low, split, PER, BLOCKS, 64 * WORDS, BN, SPLITS, DEPENDENT)
    arrive(DEPENDENT)
    row = low + ((n // 64) * (BLOCKS * 64 * WORDS) + (n % 64) * WORDS)[:, None] + j[None, :]
    token = q + m[None, :].to(tl.int64) * KP + j[:, None]
    whole = tl.zeros((BN, BM), tl.int32)
    acc = tl.zeros((BN, BM), tl.float32)
    TURN: tl.constexpr = turn_of(PER, BM, BITS)
    for turn in range(PER // TURN):
        for step in tl.static_range(TURN):
            block = split * PER + turn * TURN + step
            # Where shares are uneven, what lies past the last block is read as zeros.
            limit = M if EVEN else tl.where(block < BLOCKS, M, 0)
            kept = m[None, :] < limit
            at = block if EVEN else tl.minimum(block, BLOCKS - 1)
            word = tl.load(row + at * (64 * WORDS))
            if CHANNEL:
                part = whole
            else:
                part = tl.zeros((BN, BM), tl.int32)
            first = tl.load(token + at * 128, mask=kept, other=0)
            if BITS == 4:
                second = tl.load(token + at * 128 + 64, mask=kept, other=0)
                part = tl.dot(lower(word, ASM), first, part, out_dtype=tl.int32)
                part = tl.dot(upper(word, ASM), second, part, out_dtype=tl.int32)
            else:
                part = tl.dot(word, first, part, out_dtype=tl.int32)
            if CHANNEL:
                whole = part
            else:
                group = at * 128 // GROUP
                scale = tl.load(scales + group * NP + n).to(tl.float32)
                acc += (scale * (0.0625 if BITS == 4 else 1.0))[:, None] * part.to(tl.float32)
                if ZEROS:
                    point = tl.load(zeros + group * NP + n).to(tl.float32) - (8 if BITS == 4 else 128)
                    total = tl.load(sums + at * M + m, mask=m < limit, other=0).to(tl.float32)
                    acc -= (scale * point)[:, None] * total[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    to = y + m[:, None].to(tl.int64) * y_stride + n[None, :]
    if OUT > 0:
        if SPLITS == 1:
            apart = of_columns(x, columns, outliers, n, m, M, x_stride, NP, OUT, BN, BM, CT)
        elif split == 0:
            apart = of_columns(x, columns, outliers, n, m, M, x_stride, NP, OUT, BN, BM, CT)
            last = to + tl.full((1, 1), SPLITS, tl.int64) * M * y_stride
            tl.store(last, tl.trans(apart).to(y.dtype.element_ty, bitcast=True), mask=inside)
    if SPLITS > 1:
        to += split.to(tl.int64) * M * y_stride
        tl.store(to, tl.trans(whole if CHANNEL else acc), mask=inside)
    else:
        value = tl.trans(acc)
        if CHANNEL:
            value = channel_scales(tl.trans(whole), scales, zeros, sums, m, n, M, N, BITS, ZEROS)
        more = tl.trans(apart) if OUT > 0 else value
        value = finished(value, more, token_scales, bias, residual, m, n, M, N, BIAS, ADD, OUT)
        tl.store(to, value.to(y.dtype.element_ty), mask=inside)


@jit
def of_columns(
    x, columns, outliers, n, m, M, x_stride,
    NP: tl.constexpr, OUT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """(x[:, columns] · outliers)ᵀ, float32 [BN, BM]; OUT is a multiple of 16."""
    WIDE: tl.constexpr = 32 if OUT % 32 == 0 else 16
    i = tl.arange(0, WIDE)
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, OUT, WIDE):
        column = tl.load(columns + start + i)
        at = x + m[None, :].to(tl.int64) * x_stride + column[:, None]
        tokens = tl.load(at, mask=m[None, :] < M, other=0.0).to(CT)
        weight = tl.load(outliers + (start + i)[None, :] * NP + n[:, None]).to(CT)
        acc = tl.dot(weight, tokens, acc, input_precision="ieee")
    return acc


@jit
def channel_scales(whole, scales, zeros, sums, m, n, M, N: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """Sums int32 [m, n] of a weight with a scale for each n, in float32; zero points are still integers."""
    if BITS == 4:
        whole = whole >> 4  # exact: all terms are multiples of 16
    if ZEROS:
        point = tl.load(zeros + n, mask=n < N, other=0).to(tl.int32) - (8 if BITS == 4 else 128)
        whole -= point[None, :] * tl.load(sums + m, mask=m < M, other=0)[:, None]
    return whole.to(tl.float32) * tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@jit
def finished(
    value, more, token_scales, bias, residual, m, n, M,
    N: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """What is stored of scaled sums [m, n]: scales of tokens, `more` where OUT > 0, bias, residual, always in this order."""
    value *= tl.load(token_scales + m, mask=m < M, other=0.0)[:, None]
    if OUT > 0:
        value += more
    if BIAS:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ADD:
        at = residual + m[:, None].to(tl.int64) * N + n[None, :]
        value += tl.load(at, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0).to(tl.float32)
    return value


@jit
def add_shares(
    parts, scales, zeros, sums, token_scales, bias, residual, y, M, y_stride,
    N: tl.constexpr, BITS: tl.constexpr, CHANNEL: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    OUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [M, N] of the parts [SPLITS, M, N] that `integer` left, always in the same order; here come scales, bias and residual."""
    m = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n[None, :] < N
    total = tl.zeros((1, BLOCK), parts.dtype.element_ty)
    arrive(DEPENDENT)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * M + m.to(tl.int64))[:, None] * N + n[None, :], mask=inside, other=0)
    if CHANNEL:
        value = channel_scales(total, scales, zeros, sums, m, n, M, N, BITS, ZEROS)
    else:
        value = total
    more = value
    if OUT > 0:
        apart = tl.load(parts + (SPLITS * M + m.to(tl.int64))[:, None] * N + n[None, :], mask=inside, other=0)
        more = apart.to(tl.float32, bitcast=True)
    value = finished(value, more, token_scales, bias, residual, m, n, M, N, BIAS, ADD, OUT)
    tl.store(y + m.to(tl.int64)[:, None] * y_stride + n[None, :], value.to(y.dtype.element_ty), mask=inside)
