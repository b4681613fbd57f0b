"""From packed codes to numbers, in registers.

A code becomes a number without a conversion: 0x4300 | q << p are the bits of 128 + 2ᵖ·q in bfloat16, 0x6400 | q << p those of
1024 + 2ᵖ·q in float16. Multiplied by 2⁻ᵖ and less the zero point so shifted that is exact, and it is one multiply-add for two
codes, the only arithmetic on pairs in bfloat16 that GPUs before Hopper have. Seven bits of a bfloat16 are mantissa, so fields at
several places p share one shift: with 2 bits three of them, with 3 bits two, with 1 bit six.

Each function has a plain twin, for the interpreter and for other GPUs.
"""

from __future__ import annotations

from dlqc.kernels.triton.language import at_compile_time, jit, tl


@at_compile_time
def place(run, bits):
    """Where field `run` is put in a mantissa. With 1 bit the lowest place stays free: the zero point is a half."""
    if bits == 1:
        return (run - 1) % 6 + 1
    return 3 if (run, bits) == (15, 3) else run % 5 % (7 // bits) * bits if bits == 3 else run % (7 // bits) * bits


@at_compile_time
def down(run, bits):
    """The shift that brings field `run` of its word to its place."""
    return (run % 5 if bits == 3 else run) * bits - place(run, bits)


@at_compile_time
def magic(kind, run, bits):
    """The bits of 128 or 1024, and of 2⁻ᵖ, for field `run`: a 16-bit number each."""
    p = place(run, bits)
    return (0x4300, 0x3F80 - (p << 7)) if kind == "bf16x2" else (0x6400, 0x3C00 - (p << 10))


@at_compile_time
def shifted(name, count):
    """An operand of lop3 that is a register shifted down by `count`, and what makes it in register t."""
    if count == 0:
        return "", name
    return f"{'shr.u32' if count > 0 else 'shl.b32'} t, {name}, {abs(count)}; ", "t"


@at_compile_time
def pair(run, bits, kind):
    """Field `run` of two words in a register ($1) to two numbers less their zero points (-$2)."""
    base, unit = magic(kind, run, bits)
    mask = ((1 << bits) - 1) << place(run, bits)
    make, word = shifted("$1", down(run, bits))
    both = f"lop3.b32 t, {word}, 0x{mask << 16 | mask:08X}, 0x{base << 16 | base:08X}, 0xEA;"
    return f"{{ .reg .b32 t, c; mov.b32 c, 0x{unit << 16 | unit:08X}; {make}{both} fma.rn.{kind} $0, t, c, $2; }}"


@at_compile_time
def pair_of_tops(kind):
    """Likewise for the last field of 3 bits, which is the top bits of the words in $1, $2 and $3; zeros in $4."""
    base, unit = magic(kind, 15, 3)
    steps = ["shr.u32 t, $1, 12;", f"lop3.b32 t, t, 0x00080008, 0x{base << 16 | base:08X}, 0xEA;"]
    for word, count, bit in (("$2", 11, 0x10), ("$3", 10, 0x20)):
        steps += [f"shr.u32 u, {word}, {count};", f"lop3.b32 t, u, 0x{bit << 16 | bit:08X}, t, 0xEA;"]
    return (
        f"{{ .reg .b32 t, u, c; mov.b32 c, 0x{unit << 16 | unit:08X}; {' '.join(steps)} fma.rn.{kind} $0, t, c, $4; }}"
    )


@at_compile_time
def four_bytes(kind):
    """Four bytes in a register ($2) to four numbers: 0x4B0000qq are the bits of 2²³ + q in float32; zeros in $3 to $6."""
    steps = [f"prmt.b32 t{i}, $2, 0x4B000000, 0x765{i}; add.f32 t{i}, t{i}, ${3 + i};" for i in range(4)]
    narrow = f"cvt.rn.{kind}.f32 $0, t1, t0; cvt.rn.{kind}.f32 $1, t3, t2;"
    return f"{{ .reg .f32 t0, t1, t2, t3; {' '.join(steps)} {narrow} }}"


@jit
def code_of(first, second, third, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Field FIELD as an integer."""
    if BITS == 3 and FIELD == 15:
        return ((first >> 15) & 1) | (((second >> 15) & 1) << 1) | (((third >> 15) & 1) << 2)
    word = word_of(first, second, third, FIELD, BITS)
    return (word >> ((FIELD % 5 if BITS == 3 else FIELD) * BITS)) & ((1 << BITS) - 1)


@jit
def word_of(first, second, third, FIELD: tl.constexpr, BITS: tl.constexpr):
    """The word that field FIELD is in."""
    if BITS != 3 or FIELD < 5:
        return first
    elif FIELD < 10:
        return second
    else:
        return third


@jit
def levels(first, second, third, zero, FIELD: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Field FIELD of words less its zero point, in CT; `zero` is what `zero_points` made."""
    if CT == tl.float32 or (BITS == 1 and not ASM):
        HALF: tl.constexpr = 0.5 if BITS == 1 else 1.0
        return (code_of(first, second, third, FIELD, BITS).to(tl.float32) + zero.to(tl.float32) * HALF).to(CT)
    if not ASM:
        code = code_of(first, second, third, FIELD, BITS) | (0x4300 if CT == tl.bfloat16 else 0x6400)
        return code.to(tl.int16).to(CT, bitcast=True) + placed(zero, 0, BITS, CT).to(CT, bitcast=True)
    point = placed(zero, place(FIELD, BITS), BITS, CT)
    word, point = tl.broadcast(word_of(first, second, third, FIELD, BITS), point)
    # The dtype has to be spelled out: a compile-time argument is taken for several.
    if BITS == 3 and FIELD == 15:
        if CT == tl.bfloat16:
            value = tl.inline_asm_elementwise(
                pair_of_tops("bf16x2"), "=r,r,r,r,r", [first, second, third, point], tl.bfloat16, is_pure=True, pack=2
            )
        else:
            value = tl.inline_asm_elementwise(
                pair_of_tops("f16x2"), "=r,r,r,r,r", [first, second, third, point], tl.float16, is_pure=True, pack=2
            )
    elif CT == tl.bfloat16:
        value = tl.inline_asm_elementwise(
            pair(FIELD, BITS, "bf16x2"), "=r,r,r", [word, point], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        value = tl.inline_asm_elementwise(
            pair(FIELD, BITS, "f16x2"), "=r,r,r", [word, point], tl.float16, is_pure=True, pack=2
        )
    return value


@jit
def placed(zero, PLACE: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr):
    """The bits of -(128 / 2ᵖ + point) in bfloat16, or of -(1024 / 2ᵖ + point) in float16; `zero` is -point, or twice that."""
    point = (-zero).to(tl.int16) << (PLACE - 1 if BITS == 1 else PLACE)
    if CT == tl.bfloat16:
        return (point | (-0x3D00 - (PLACE << 7))).to(tl.int16)  # 0xC300: the sign with 0x4300
    else:
        return (point | (-0x1C00 - (PLACE << 10))).to(tl.int16)  # 0xE400


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
def zero_points(zeros, at, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """The negative zero points at `at` [BN] as a column: int16, with 1 bit twice as large; with 8 bits float32, less 2²³."""
    if ZEROS:
        point = -tl.load(zeros + at).to(tl.int16)
    else:
        point = tl.full(at.shape, -(1 << (BITS - 1)), tl.int16)
    if BITS == 8:
        return (point.to(tl.float32) - 8388608.0)[:, None]
    else:
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
    first, second, third, bytes_, zero, table, entry,
    FIELD: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Field FIELD of a block, [BN, RUN]: codes less their zero points, or what they stand for (CODE as of `product`).

    `first` to `third` are words, with 8 bits in their place stand addresses in `bytes_`. `entry` [BN, 1] is where a row's table
    begins.
    """
    if BITS == 8:
        word = tl.load(bytes_ + RUN * FIELD)
        if CODE == 3:
            value = float8(word, CT)
        else:
            value = levels_of_bytes(word, zero, CT, ASM)
    elif CODE > 0:
        value = tl.load(table + (entry + code_of(first, second, third, FIELD, BITS))).to(CT)
    else:
        value = levels(first, second, third, zero, FIELD, BITS, CT, ASM)
    return value
