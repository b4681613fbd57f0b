"""y = x · Ŵᵀ for 16-bit activations: Ŵ is made in registers, field by field, and is the left operand of (Ŵ·xᵀ)ᵀ.

Tokens are then the narrow side of the tensor core's tile: 16 tokens are enough for wgmma, and no weight passes through
shared memory a second time. A code becomes a number without a conversion: 0x4300 | q are the bits of 128 + q in bfloat16,
0x6400 | q those of 1024 + q in float16, and taking off the zero point so shifted is exact. In assembly that is a multiply-add by
one, the only sum of pairs in bfloat16 that GPUs before Hopper have.
"""

from __future__ import annotations

from dlqc.kernels.triton.language import at_compile_time, jit, tl


@at_compile_time
def pair(shift, mask, magic, one, kind):
    """Two words in a register ($1) to two numbers less their zero points (-$2): three instructions."""
    word = f"shr.u32 t, $1, {shift}; " if shift else "mov.b32 t, $1; "
    bits = f"0x{mask << 16 | mask:08X}, 0x{magic << 16 | magic:08X}"
    unit = f".reg .b32 t, c; mov.b32 c, 0x{one << 16 | one:08X};"
    return f"{{ {unit} {word}lop3.b32 t, t, {bits}, 0xEA; fma.rn.{kind} $0, t, c, $2; }}"


@at_compile_time
def pair_of_planes(run, magic, one, kind):
    """Likewise for 3 bits: the two low ones in $1 from bit 2·run on, the third in bit `run` of each half of $2; zeros in $3."""
    third = f"shr.u32 u, $2, {run - 2}; " if run > 2 else f"shl.b32 u, $2, {2 - run}; "
    low = f"shr.u32 t, $1, {2 * run}; lop3.b32 t, t, 0x00030003, 0x{magic << 16 | magic:08X}, 0xEA;"
    unit = f".reg .b32 t, u, c; mov.b32 c, 0x{one << 16 | one:08X};"
    return f"{{ {unit} {low} {third}lop3.b32 t, u, 0x00040004, t, 0xEA; fma.rn.{kind} $0, t, c, $3; }}"


@at_compile_time
def four_bytes(kind):
    """Four bytes in a register ($2) to four numbers: 0x4B0000qq are the bits of 2²³ + q in float32; $3 to $6 are -(2²³ + zero)."""
    steps = [f"prmt.b32 t{i}, $2, 0x4B000000, 0x765{i}; add.f32 t{i}, t{i}, ${3 + i};" for i in range(4)]
    narrow = f"cvt.rn.{kind}.f32 $0, t1, t0; cvt.rn.{kind}.f32 $1, t3, t2;"
    return f"{{ .reg .f32 t0, t1, t2, t3; {' '.join(steps)} {narrow} }}"


@jit
def levels(word, zero, SHIFT: tl.constexpr, MASK: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Codes in bits SHIFT… of words, plus `zero` as `zero_points` made it, in CT."""
    if CT == tl.float32:
        return ((word >> SHIFT) & MASK).to(tl.float32) + zero
    MAGIC: tl.constexpr = 0x4300 if CT == tl.bfloat16 else 0x6400
    if not ASM:
        code = ((word >> SHIFT) & MASK) | MAGIC
        value = code.to(tl.int16).to(CT, bitcast=True) + zero.to(CT, bitcast=True)
    else:
        word, zero = tl.broadcast(word, zero)
        # The dtype has to be spelled out: a compile-time argument is taken for several.
        if CT == tl.bfloat16:
            value = tl.inline_asm_elementwise(
                pair(SHIFT, MASK, 0x4300, 0x3F80, "bf16x2"), "=r,r,r", [word, zero], tl.bfloat16, is_pure=True, pack=2
            )
        else:
            value = tl.inline_asm_elementwise(
                pair(SHIFT, MASK, 0x6400, 0x3C00, "f16x2"), "=r,r,r", [word, zero], tl.float16, is_pure=True, pack=2
            )
    return value


@jit
def levels_of_planes(low, high, zero, I: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Likewise for 3 bits: field I of the words `low` and bit I of the bytes `high`."""
    high = high.to(tl.int16)
    if not ASM:
        code = ((low >> (2 * I)) & 3) | (((high >> I) & 1) << 2)
        return levels(code.to(tl.int16), zero, 0, 7, CT, False)
    low, zero = tl.broadcast(low, zero)
    if CT == tl.bfloat16:
        value = tl.inline_asm_elementwise(
            pair_of_planes(I, 0x4300, 0x3F80, "bf16x2"), "=r,r,r,r", [low, high, zero], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        value = tl.inline_asm_elementwise(
            pair_of_planes(I, 0x6400, 0x3C00, "f16x2"), "=r,r,r,r", [low, high, zero], tl.float16, is_pure=True, pack=2
        )
    return value


@jit
def levels_of_bytes(word, zero, CT: tl.constexpr, ASM: tl.constexpr):
    """Likewise for 8 bits: bytes and `zero`, which is less by 2²³."""
    if not ASM:
        return (word.to(tl.float32) + (zero + 8388608.0)).to(CT)
    word, zero = tl.broadcast(word, zero)
    if CT == tl.bfloat16:
        value = tl.inline_asm_elementwise(
            four_bytes("bf16x2"), "=r,=r,r,f,f,f,f", [word, zero], tl.bfloat16, is_pure=True, pack=4
        )
    else:
        value = tl.inline_asm_elementwise(
            four_bytes("f16x2"), "=r,=r,r,f,f,f,f", [word, zero], tl.float16, is_pure=True, pack=4
        )
    return value


@jit
def zero_points(zeros, at, BITS: tl.constexpr, CT: tl.constexpr, ZEROS: tl.constexpr):
    """The zero points at `at` [BN] as a column, in the form that is added: negative, and shifted as the codes are."""
    if ZEROS:
        point = tl.load(zeros + at).to(tl.int16)
    else:
        point = tl.full(at.shape, 1 << (BITS - 1), tl.int16)
    if BITS == 8:
        point = -(point.to(tl.float32) + 8388608.0)
    elif CT == tl.float32:
        point = -point.to(tl.float32)
    elif CT == tl.bfloat16:
        point = (point | -0x3D00).to(tl.int16)  # 0xC300: the sign with 0x4300
    else:
        point = (point | -0x1C00).to(tl.int16)  # 0xE400
    return point[:, None]


@jit
def field(low, high, here, zero, I: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Run I of a block, [BN, 32], less its zero points. `low`, `high` are words; with 8 bits `low` is where they are."""
    if BITS == 8:
        value = levels_of_bytes(tl.load(low + here + 32 * I), zero, CT, ASM)
    elif BITS == 3:
        value = levels_of_planes(low, high, zero, I, CT, ASM)
    else:
        value = levels(low, zero, BITS * I, (1 << BITS) - 1, CT, ASM)
    return value


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
            weight = field(word, third, here, zero, i, BITS, CT, ASM)
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
        value = field(word, third, here, zero, i, BITS, CT, ASM)
        value = value.to(tl.float32) * tl.load(scales + group).to(tl.float32)[:, None]
        to = weight + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(to, value.to(weight.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))
