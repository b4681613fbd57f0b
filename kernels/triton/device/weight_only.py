"""y = x · Ŵᵀ for 16-bit activations: Ŵ is made in registers, field by field, and is the left operand of (Ŵ·xᵀ)ᵀ.

Tokens are then the narrow side of the tensor core's tile: 16 tokens are enough for wgmma, and no weight passes through
shared memory a second time. A code becomes a number without a conversion: 0x4300 | q are the bits of 128 + q in bfloat16,
0x6400 | q those of 1024 + q in float16, and a subtraction of the zero point so shifted is exact.
"""

from __future__ import annotations

from dlqc.kernels.triton.language import at_compile_time, jit, tl


@at_compile_time
def assembly(shift, mask, magic, kind):
    """Two codes of a register of two words to two numbers less their zero point, in three instructions or (shift 0) two."""
    shift, mask, magic, kind = (getattr(value, "value", value) for value in (shift, mask, magic, kind))
    pair = f"0x{mask << 16 | mask:08X}, 0x{magic << 16 | magic:08X}"
    word = "t" if shift else "$1"
    moved = f"shr.u32 t, $1, {shift}; " if shift else ""
    return f"{{ .reg .b32 t; {moved}lop3.b32 t, {word}, {pair}, 0xEA; sub.{kind} $0, t, $2; }}"


@jit
def levels(word, zero, SHIFT: tl.constexpr, MASK: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Codes in bits SHIFT… of words, less `zero` as `zero_points` made it, in CT."""
    if CT == tl.float32:
        return ((word >> SHIFT) & MASK).to(tl.float32) - zero
    MAGIC: tl.constexpr = 0x4300 if CT == tl.bfloat16 else 0x6400
    if ASM:
        KIND: tl.constexpr = "rn.bf16x2" if CT == tl.bfloat16 else "rn.f16x2"
        word, zero = tl.broadcast(word, zero)
        return tl.inline_asm_elementwise(
            assembly(SHIFT, MASK, MAGIC, KIND), "=r,r,r", [word, zero], dtype=CT, is_pure=True, pack=2
        )
    code = ((word >> SHIFT) & MASK) | MAGIC
    return code.to(tl.int16).to(CT, bitcast=True) - zero.to(CT, bitcast=True)


@jit
def zero_points(zeros, at, BITS: tl.constexpr, CT: tl.constexpr, ZEROS: tl.constexpr):
    """The zero points at `at` [BN] as a column, in the form that `levels` subtracts: a number, or its shifted bits."""
    if ZEROS:
        point = tl.load(zeros + at).to(tl.int16)
    else:
        point = tl.full(at.shape, 1 << (BITS - 1), tl.int16)
    if BITS == 8:
        point = (point - 128).to(tl.float32)
    elif CT == tl.float32:
        point = point.to(tl.float32)
    elif CT == tl.bfloat16:
        point = (point | 0x4300).to(tl.int16)
    else:
        point = (point | 0x6400).to(tl.int16)
    return point[:, None]


@jit
def field(low, high, here, zero, I: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr):
    """Run I of a block, [BN, 32], less its zero points. `low`, `high` are words; with 8 bits `low` is where they are."""
    if BITS == 8:
        code = tl.load(low + here + 32 * I).to(CT)
        return (code - zero.to(CT)) if ZEROS else code
    if BITS == 3:
        code = ((low >> (2 * I)) & 3) | ((((high.to(tl.int16) >> I) & 1) << 2))
        return levels(code.to(tl.int16), zero, 0, 7, CT, ASM)
    return levels(low, zero, BITS * I, (1 << BITS) - 1, CT, ASM)


@jit
def weight_only(
    x, low, high, scales, zeros, bias, y, M, x_stride, y_stride,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
    PRE: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One tile of y, or with SPLITS > 1 of its part over a share of K, float32 in y [SPLITS, M, N].

    PRE scales weights before the product, in CT; else scales meet the float32 sums of their group.
    """
    BK: tl.constexpr = 128 if BITS == 4 or BITS == 8 else 256
    RUNS: tl.constexpr = BK // 32
    WORDS: tl.constexpr = 128 if BITS == 8 else 32
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    PER: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = K % BK == 0 and BLOCKS % SPLITS == 0
    WHOLE: tl.constexpr = GROUP % BK == 0 or GROUP == K
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
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
            group = (at * BK // GROUP) * NP + n
            zero = zero_points(zeros, group, BITS, CT, ZEROS)
            scale = tl.load(scales + group).to(tl.float32)[:, None]
            part = tl.zeros((BN, BM), tl.float32)
        for i in tl.static_range(RUNS):
            k = block * BK + 32 * i + j
            kept = (m[None, :] < M) if EVEN else (m[None, :] < M) & (k[:, None] < K)
            tokens = tl.load(token + k[:, None], mask=kept, other=0.0).to(CT)
            if not WHOLE:
                group = tl.minimum((at * BK + 32 * i) // GROUP, K // GROUP - 1) * NP + n
                zero = zero_points(zeros, group, BITS, CT, ZEROS)
                scale = tl.load(scales + group).to(tl.float32)[:, None]
            weight = field(word, third, here, zero, i, BITS, CT, ZEROS, ASM)
            if PRE:
                acc = tl.dot(weight * scale.to(CT), tokens, acc, input_precision="ieee")
            elif GROUP == K:
                acc = tl.dot(weight, tokens, acc, input_precision="ieee")
            elif WHOLE:
                part = tl.dot(weight, tokens, part, input_precision="ieee")
            else:
                acc += scale * tl.dot(weight, tokens, input_precision="ieee")
        if WHOLE and GROUP != K and not PRE:
            acc += scale * part
    if GROUP == K and not PRE:
        acc *= tl.load(scales + n).to(tl.float32)[:, None]
    if SPLITS == 1:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    else:
        y += split.to(tl.int64) * M * y_stride
    to = y + m[:, None].to(tl.int64) * y_stride + n[None, :]
    tl.store(to, tl.trans(acc).to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@jit
def add_splits(
    parts, bias, y, M, y_stride, N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """y [M, N] = the sum of parts [SPLITS, M, N], always in the same order, plus the bias."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * M + m) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * y_stride + n, total.to(y.dtype.element_ty), mask=n < N)


@jit
def dense(
    low, high, scales, zeros, weight,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, CT: tl.constexpr,
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
        group = (0 if GROUP == K else tl.minimum((block * BK + 32 * i) // GROUP, K // GROUP - 1)) * NP + n
        zero = zero_points(zeros, group, BITS, CT, ZEROS)
        value = field(word, third, here, zero, i, BITS, CT, ZEROS, ASM)
        value = value.to(tl.float32) * tl.load(scales + group).to(tl.float32)[:, None]
        to = weight + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(to, value.to(weight.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))
