"""y = x · Ŵᵀ for 16-bit activations: Ŵ is made in registers, field by field, and is the left operand of (Ŵ·xᵀ)ᵀ.

Tokens are then the narrow side of the tensor core's tile: 16 tokens are enough for wgmma, and no weight passes through
shared memory a second time.
"""

from __future__ import annotations

from dlqc.kernels.triton.device.numbers import field, zero_points
from dlqc.kernels.triton.language import jit, tl


@jit
def product(
    x, low, high, scales, zeros, table, n, m, split, M, x_stride,
    NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, CODE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr, PRE: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Ŵ·xᵀ for output features n [BN] and tokens m [BM], float32; with SPLITS > 1 over one share of K.

    CODE says what codes stand for: 0 themselves, 1 entries of one table of 2^BITS, 2 entries of tables [G, NP, 2^BITS] without
    scales, 3 numbers in e4m3. PRE scales weights before the product, in CT; else scales meet the float32 sums of their group.
    """
    BK: tl.constexpr = 128 if BITS == 4 or BITS == 8 else 256
    WORDS: tl.constexpr = 128 if BITS == 8 else 32
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    PER: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = K % BK == 0 and BLOCKS % SPLITS == 0
    WHOLE: tl.constexpr = GROUP % BK == 0 or GROUP == K
    # Sums of all of K have one scale, or there are no scales at all.
    ONCE: tl.constexpr = GROUP == K or CODE == 2
    j = tl.arange(0, 32)
    row = (n // 64) * (BLOCKS * 64 * WORDS) + (n % 64) * WORDS
    token = x + m[None, :].to(tl.int64) * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(PER):
        block = split * PER + step
        # Past the end of K, where splits are uneven, the last block is read again and meets zeros of x.
        at = block if EVEN else tl.minimum(block, BLOCKS - 1)
        here = row[:, None] + at * (64 * WORDS) + j[None, :]
        if BITS == 8:
            word = low
        else:
            word = tl.load(low + here)
        third = tl.load(high + here) if BITS == 3 else word
        if WHOLE:
            group = (0 if GROUP == K else at * BK // GROUP) * NP + n
            zero = zero_points(zeros, group, BITS, CT, ZEROS)
            if CODE != 2:
                scale = tl.load(scales + group).to(tl.float32)[:, None]
            part = tl.zeros((BN, BM), tl.float32)
        for i in tl.static_range(BK // 32):
            k = block * BK + 32 * i + j
            kept = (m[None, :] < M) if EVEN else (m[None, :] < M) & (k[:, None] < K)
            tokens = tl.load(token + k[:, None], mask=kept, other=0.0).to(CT)
            if not WHOLE:
                group = tl.minimum((at * BK + 32 * i) // GROUP, (K + GROUP - 1) // GROUP - 1) * NP + n
                zero = zero_points(zeros, group, BITS, CT, ZEROS)
                if CODE != 2:
                    scale = tl.load(scales + group).to(tl.float32)[:, None]
            entry = (group[:, None] << BITS) if CODE == 2 else 0
            weight = field(word, third, here, zero, table, entry, i, BITS, CT, ASM, CODE)
            if PRE and CODE != 2:
                acc = tl.dot(weight * scale.to(CT), tokens, acc, input_precision="ieee")
            elif ONCE:
                acc = tl.dot(weight, tokens, acc, input_precision="ieee")
            elif WHOLE:
                part = tl.dot(weight, tokens, part, input_precision="ieee")
            else:
                acc += scale * tl.dot(weight, tokens, input_precision="ieee")
        if WHOLE and not ONCE and not PRE:
            acc += scale * part
    if GROUP == K and CODE != 2 and not PRE:
        acc *= tl.load(scales + n).to(tl.float32)[:, None]
    return acc


@jit
def weight_only(
    x, low, high, scales, zeros, table, bias, residual, y, M, x_stride, y_stride,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    CODE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
    PRE: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N], or with SPLITS > 1 of its part over a share of K, float32 in y [SPLITS, M, N]."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = product(
        x, low, high, scales, zeros, table, n, m, split, M, x_stride,
        NP, K, BITS, GROUP, ZEROS, CODE, BN, BM, SPLITS, PRE, ASM, CT,
    )  # fmt: skip
    if SPLITS == 1:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    else:
        y += split.to(tl.int64) * M * y_stride
    to = y + m[:, None].to(tl.int64) * y_stride + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    value = tl.trans(acc)
    if ADD and SPLITS == 1:
        value += tl.load(residual + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(to, value.to(y.dtype.element_ty), mask=inside)


@jit
def add_splits(
    parts, bias, residual, y, M, y_stride,
    N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, N] = the sum of parts [SPLITS, M, N], always in the same order, plus bias and residual."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * M + m) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual + m * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * y_stride + n, total.to(y.dtype.element_ty), mask=n < N)


@jit
def dense(
    low, high, scales, zeros, table, weight,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    CODE: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Ŵ [N, K] in the dtype of `weight`, one block of K of BN rows: for products that a library makes better."""
    BK: tl.constexpr = 128 if BITS == 4 or BITS == 8 else 256
    WORDS: tl.constexpr = 128 if BITS == 8 else 32
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    j = tl.arange(0, 32)
    row = (n // 64) * (BLOCKS * 64 * WORDS) + (n % 64) * WORDS
    here = row[:, None] + block * (64 * WORDS) + j[None, :]
    if BITS == 8:
        word = low
    else:
        word = tl.load(low + here)
    third = tl.load(high + here) if BITS == 3 else word
    for i in tl.static_range(BK // 32):
        k = block * BK + 32 * i + j
        group = (0 if GROUP == K else tl.minimum((block * BK + 32 * i) // GROUP, (K + GROUP - 1) // GROUP - 1)) * NP + n
        zero = zero_points(zeros, group, BITS, CT, ZEROS)
        entry = (group[:, None] << BITS) if CODE == 2 else 0
        value = field(word, third, here, zero, table, entry, i, BITS, CT, ASM, CODE).to(tl.float32)
        if CODE != 2:
            value *= tl.load(scales + group).to(tl.float32)[:, None]
        to = weight + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(to, value.to(weight.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))
