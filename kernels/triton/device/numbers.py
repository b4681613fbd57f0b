"""From packed codes to numbers, in registers.

A code becomes a number without a conversion: 0x4300 | q are the bits of 128 + q in bfloat16, 0x6400 | q those of 1024 + q in
float16, and taking off the zero point so shifted is exact. In assembly that is a multiply-add by one, the only sum of pairs in
bfloat16 that GPUs before Hopper have. Each function has a plain twin, for the interpreter and for other GPUs.
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
    """Four bytes in a register ($2) to four numbers: 0x4B0000qq are the bits of 2²³ + q in float32; zeros in $3 to $6."""
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
def levels_of_planes(low, high, zero, RUN: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Likewise for 3 bits: field RUN of the words `low` and bit RUN of the bytes `high`."""
    high = high.to(tl.int16)
    if not ASM:
        code = ((low >> (2 * RUN)) & 3) | (((high >> RUN) & 1) << 2)
        return levels(code.to(tl.int16), zero, 0, 7, CT, False)
    low, zero = tl.broadcast(low, zero)
    if CT == tl.bfloat16:
        value = tl.inline_asm_elementwise(
            pair_of_planes(RUN, 0x4300, 0x3F80, "bf16x2"),
            "=r,r,r,r",
            [low, high, zero],
            tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        value = tl.inline_asm_elementwise(
            pair_of_planes(RUN, 0x6400, 0x3C00, "f16x2"),
            "=r,r,r,r",
            [low, high, zero],
            tl.float16,
            is_pure=True,
            pack=2,
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
def float8(word, CT: tl.constexpr):
    """Bytes of e4m3 as numbers: their bits moved to where CT has exponent and mantissa, times the difference of the biases."""
    if CT == tl.float16:
        wide = word.to(tl.int16)
        value = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    elif CT == tl.bfloat16:
        wide = word.to(tl.int16)
        value = (((wide & 0x80) << 8) | ((wide & 0x7F) << 4)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        value = (value * 1.329227995784916e36).to(tl.bfloat16)
    else:
        wide = word.to(tl.int32)
        value = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return value


@jit
def field(
    low, high, here, zero, table, entry, RUN: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Run RUN of a block, [BN, 32]: codes less their zero points, or what they stand for (CODE as of `product`).

    `low`, `high` are words; with 8 bits `low` is where they are. `entry` [BN, 1] is where a row's table begins.
    """
    if BITS == 8:
        word = tl.load(low + here + 32 * RUN)
        if CODE == 3:
            value = float8(word, CT)
        else:
            value = levels_of_bytes(word, zero, CT, ASM)
    elif CODE > 0:
        if BITS == 3:
            code = ((low >> (2 * RUN)) & 3) | (((high.to(tl.int16) >> RUN) & 1) << 2)
        else:
            code = (low >> (BITS * RUN)) & ((1 << BITS) - 1)
        value = tl.load(table + (entry + code)).to(CT)
    elif BITS == 3:
        value = levels_of_planes(low, high, zero, RUN, CT, ASM)
    else:
        value = levels(low, zero, BITS * RUN, (1 << BITS) - 1, CT, ASM)
    return value
