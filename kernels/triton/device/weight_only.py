"""y = x · Ŵᵀ for 16-bit activations: Ŵ is made in registers, field by field, and is the left operand of (Ŵ·xᵀ)ᵀ.

Tokens are then the narrow side of the tensor core's tile: 16 tokens are enough for wgmma, and no weight passes through
shared memory a second time.
"""

from __future__ import annotations

import math

from dlqc.kernels.triton.device.dependent import arrive, fetch_share
from dlqc.kernels.triton.device.numbers import field, zero_points
from dlqc.kernels.triton.language import at_compile_time, jit, tl


@at_compile_time
def block_of(bits, run):
    """Input features of a block."""
    return 128 if bits == 8 else run * {1: 16, 2: 8, 3: 16, 4: 4}[bits]


@at_compile_time
def words_of(bits, run):
    """Words of a row of a block."""
    return 128 if bits == 8 else run * (3 if bits == 3 else 1)


@at_compile_time
def shared_by(group, block, width):
    """The longest stretches of a block that have one scale, where groups are shorter than all of a row."""
    return block if group >= width else math.gcd(group, block)


@jit
def product(
    x, low, scales, zeros, table, n, m, split, M, x_stride,
    NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, CODE: tl.constexpr,
    RUN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr, PRE: tl.constexpr, ASM: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """Ŵ·xᵀ for output features n [BN] and tokens m [BM], float32; with SPLITS > 1 over one share of K.

    CODE says what codes stand for: 0 themselves, 1 entries of one table of 2^BITS, 2 entries of tables [G, NP, 2^BITS] without
    scales, 3 numbers in e4m3. PRE scales weights before the product, in CT; else scales meet the float32 sums of their group.
    """
    BK: tl.constexpr = block_of(BITS, RUN)
    WORDS: tl.constexpr = words_of(BITS, RUN)
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    PER: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = K % BK == 0 and BLOCKS % SPLITS == 0
    SPAN: tl.constexpr = shared_by(GROUP, BK, K)
    # Sums of all of K have one scale, or there are no scales at all.
    ONCE: tl.constexpr = GROUP == K or CODE == 2
    j = tl.arange(0, RUN)
    row = low + ((n // 64) * (BLOCKS * 64 * WORDS) + (n % 64) * WORDS)[:, None] + j[None, :]
    token = x + m[None, :].to(tl.int64) * x_stride + j[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(PER):
        block = split * PER + step
        # Past the end of K, where splits are uneven, the last block is read again and meets zeros of x.
        at = block if EVEN else tl.minimum(block, BLOCKS - 1)
        here = row + at * (64 * WORDS)
        source = token + block * BK
        if BITS != 8:
            first = tl.load(here)
        else:
            first = row
        second = tl.load(here + RUN) if BITS == 3 else first
        third = tl.load(here + 2 * RUN) if BITS == 3 else first
        for i in tl.static_range(BK // RUN):
            if RUN * i % SPAN == 0:
                if EVEN or GROUP == K:
                    group = (0 if GROUP == K else (at * BK + RUN * i) // GROUP) * NP + n
                else:
                    group = tl.minimum((at * BK + RUN * i) // GROUP, (K + GROUP - 1) // GROUP - 1) * NP + n
                zero = zero_points(zeros, group, BITS, ZEROS)
                entry = (group[:, None] << BITS) if CODE == 2 else 0
                if not ONCE:
                    scale = tl.load(scales + group).to(tl.float32)[:, None]
                    if not PRE:
                        part = tl.zeros((BN, BM), tl.float32)
            kept = (m[None, :] < M) if EVEN else (m[None, :] < M) & (block * BK + RUN * i + j[:, None] < K)
            tokens = tl.load(source + RUN * i, mask=kept, other=0.0).to(CT)
            weight = field(first, second, third, here, zero, table, entry, i, BITS, RUN, CT, ASM, CODE)
            if ONCE:
                acc = tl.dot(weight, tokens, acc, input_precision="ieee")
            elif PRE:
                acc = tl.dot(weight * scale.to(CT), tokens, acc, input_precision="ieee")
            else:
                part = tl.dot(weight, tokens, part, input_precision="ieee")
                if RUN * (i + 1) % SPAN == 0:
                    acc += scale * part
    if GROUP == K and CODE != 2:
        acc *= tl.load(scales + n).to(tl.float32)[:, None]
    return acc


@jit
def weight_only(
    x, low, scales, zeros, table, bias, residual, y, M, x_stride, y_stride,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    CODE: tl.constexpr, RUN: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    SPLITS: tl.constexpr, PRE: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N], or with SPLITS > 1 of its part over a share of K, float32 in y [SPLITS, M, N]."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    BLOCKS: tl.constexpr = (K + block_of(BITS, RUN) - 1) // block_of(BITS, RUN)
    PER: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    fetch_share(low, split, PER, BLOCKS, 64 * words_of(BITS, RUN), BN, SPLITS, DEPENDENT)
    arrive(DEPENDENT)
    acc = product(
        x, low, scales, zeros, table, n, m, split, M, x_stride,
        NP, K, BITS, GROUP, ZEROS, CODE, RUN, BN, BM, SPLITS, PRE, ASM, CT,
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
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [M, N] = the sum of parts [SPLITS, M, N], always in the same order, plus bias and residual."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    arrive(DEPENDENT)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * M + m) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual + m * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * y_stride + n, total.to(y.dtype.element_ty), mask=n < N)


@jit
def dense(
    low, scales, zeros, table, weight,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    CODE: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Ŵ [N, K] in the dtype of `weight`, one block of K of BN rows: for products that a library makes better."""
    BK: tl.constexpr = block_of(BITS, RUN)
    WORDS: tl.constexpr = words_of(BITS, RUN)
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    j = tl.arange(0, RUN)
    here = low + ((n // 64) * (BLOCKS * 64 * WORDS) + (n % 64) * WORDS + block * (64 * WORDS))[:, None] + j[None, :]
    if BITS != 8:
        first = tl.load(here)
    else:
        first = here
    second = tl.load(here + RUN) if BITS == 3 else first
    third = tl.load(here + 2 * RUN) if BITS == 3 else first
    for i in tl.static_range(BK // RUN):
        k = block * BK + RUN * i + j
        group = (
            0 if GROUP == K else tl.minimum((block * BK + RUN * i) // GROUP, (K + GROUP - 1) // GROUP - 1)
        ) * NP + n
        zero = zero_points(zeros, group, BITS, ZEROS)
        entry = (group[:, None] << BITS) if CODE == 2 else 0
        value = field(first, second, third, here, zero, table, entry, i, BITS, RUN, CT, ASM, CODE).to(tl.float32)
        if CODE != 2:
            value *= tl.load(scales + group).to(tl.float32)[:, None]
        to = weight + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(to, value.to(weight.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))
