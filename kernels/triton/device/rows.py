"""Work on whole rows of activations: one program a row (or a row's block), everything in float32 in between.

Codes are those of `ActFormat.quantize_dynamic` to the last one: true division, ties to even, scale 1 for a row of zeros.
"""

from __future__ import annotations

from dlqc.kernels.triton.device.dependent import arrive
from dlqc.kernels.triton.language import at_compile_time, jit, tl


@at_compile_time
def log2(value):
    return value.bit_length() - 1


@jit
def to_codes(value, TOP: tl.constexpr):
    """Codes int8 in ±TOP of a row (1-D), and its scale."""
    most = tl.max(tl.abs(value), 0)
    scale = tl.div_rn(most, TOP * 1.0)
    scale = tl.where(scale == 0.0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
    # Adding and subtracting 1.5·2²³ rounds to whole numbers, ties to even.
    code = (tl.div_rn(value, tl.zeros_like(value) + scale) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(code, -TOP * 1.0), TOP * 1.0).to(tl.int8), scale


@jit
def to_float8(value):
    """Codes of a row (1-D) in e4m3 as the bits of them, uint8, and its scale: by integers, as casts differ between devices."""
    most = tl.max(tl.abs(value), 0)
    scale = tl.div_rn(most, 448.0)
    scale = tl.where(most == 0.0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
    size = tl.minimum(tl.div_rn(tl.abs(value), tl.zeros_like(value) + scale), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Three bits of mantissa are left, ties to even; the exponent's bias goes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal) | tl.where(value < 0.0, 128, 0)
    return code.to(tl.uint8), scale


@jit
def keep_codes(
    code, scale, q, scales, sums, row, M, KP: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr
):
    """Store a row of codes, its scale, and its sums over groups; the row ends with zeros up to KP."""
    k = tl.arange(0, WIDTH)
    tl.store(q + row.to(tl.int64) * KP + k, code, mask=k < KP)
    tl.store(scales + row, scale)
    if SUMS == 1:
        tl.store(sums + row, tl.sum(code.to(tl.int32), 0))
    elif SUMS > 1:
        total = tl.sum(tl.reshape(code.to(tl.int32), (WIDTH // GROUP, GROUP)), 1)
        group = tl.arange(0, WIDTH // GROUP)
        tl.store(sums + group * M + row, total, mask=group < SUMS)


@jit
def butterflies(value, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Each run of BLOCK of a row [WIDTH] times the Hadamard matrix of Sylvester's order, not scaled."""
    STAGES: tl.constexpr = log2(BLOCK)
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(value, (WIDTH // (2 << stage), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
        value = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (WIDTH,))
    return value


@jit
def quantize_rows(
    x, other, gain, shift, total, q, scales, sums, M, x_stride, other_stride, epsilon, factor,
    KIND: tl.constexpr, ADD: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, FLOAT8: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Codes int8 [M, KP] and scales [M] of what KIND makes of x [M, K]; with SUMS > 0 their sums, int32 [SUMS, M], by group of K.

    KIND: 0 x itself, 1 gain · x / rms(x), 2 gain · (x - mean) / deviation + shift, 3 silu(x) · other. Where ADD, `other` is added
    to x first and the sum kept in `total`. BLOCK > 1: times a block-diagonal Hadamard matrix, and `factor`. FLOAT8: codes are the
    bits of numbers in e4m3.
    """
    row = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    arrive(DEPENDENT)
    value = tl.load(x + row.to(tl.int64) * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    if KIND == 3:
        value = value / (1.0 + tl.exp(-value))
        value *= tl.load(other + row.to(tl.int64) * other_stride + k, mask=k < K, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(other + row.to(tl.int64) * other_stride + k, mask=k < K, other=0.0).to(tl.float32)
        # What goes on is the rounded sum, and the norm is of what goes on.
        kept = value.to(total.dtype.element_ty)
        tl.store(total + row.to(tl.int64) * K + k, kept, mask=k < K)
        value = kept.to(tl.float32)
    if KIND == 2:
        value = tl.where(k < K, value - tl.sum(value, 0) / K, 0.0)
    if KIND == 1 or KIND == 2:
        mean = tl.sum(value * value, 0) / K
        value = value * tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
    if GAIN:
        value *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
    if BLOCK > 1:
        value = butterflies(value, BLOCK, WIDTH) * factor
    if FLOAT8:
        code, scale = to_float8(value)
    else:
        code, scale = to_codes(value, TOP)
    keep_codes(code, scale, q, scales, sums, row, M, KP, GROUP, SUMS, WIDTH)


@jit
def spread(x, columns, groups, y, x_stride, G: tl.constexpr, WIDTH: tl.constexpr):
    """y [M, P·G], plane p being columns[p] times the features of group groups[p] of x [M, K]; a program a plane of a row."""
    row, plane = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, WIDTH)
    value = tl.load(x + row * x_stride + tl.load(groups + plane) * G + k, mask=k < G, other=0.0).to(tl.float32)
    value *= tl.load(columns + plane * G + k, mask=k < G, other=0.0)
    to = y + row * tl.num_programs(1) * G + plane * G + k
    tl.store(to, value.to(y.dtype.element_ty), mask=k < G)


@jit
def hadamard(x, y, x_stride, y_stride, factor, K: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """y [M, K] = x times the block-diagonal Hadamard matrix, times `factor`; a program takes WIDTH features of a row."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    value = butterflies(value, BLOCK, WIDTH) * factor
    tl.store(y + row * y_stride + k, value.to(y.dtype.element_ty), mask=k < K)
