"""Keys and values as codes of equal bins and back; one program a block of rows and one group of each.

Element (row, i) of the numbers lies at (row // INNER) · outer + (row % INNER) · row_stride + i · stride, so that keys are rows of
a channel and values rows of a token without being moved. Codes are a dense stream of bits: 32 of them are BITS words.
"""

from __future__ import annotations

from dlqc.kernels.triton.language import jit, tl


@jit
def quantize_bins(
    x, centers, codes, steps, R, INNER, outer, row_stride, stride, LAST, WORDS,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Words int32 [R, WORDS] and steps float16 [R, GROUPS] around centers, [R] where GIVEN, else made here, [R, GROUPS].

    LAST is the last element of a row; a group that is not full repeats it, which changes no range.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    inside, kept = rows < R, i < GROUP
    at = (rows // INNER).to(tl.int64) * outer + (rows % INNER).to(tl.int64) * row_stride
    element = tl.minimum(group * GROUP + i, LAST)
    value = tl.load(x + at[:, None] + element[None, :] * stride, mask=inside[:, None] & kept[None, :], other=0.0).to(
        tl.float32
    )
    if GIVEN:
        center = tl.load(centers + rows, mask=inside, other=0.0)
    else:
        least = tl.min(tl.where(kept[None, :], value, float("inf")), 1)
        most = tl.max(tl.where(kept[None, :], value, -float("inf")), 1)
        center = (least + (most - least) * 0.5).to(tl.float16)
        tl.store(centers + rows * GROUPS + group, center, mask=inside)
    around = tl.where(kept[None, :], value - center.to(tl.float32)[:, None], 0.0)
    half = tl.max(tl.abs(around), 1)
    # Rounded up, with room for the smallest float16: a step must reach the end of its group.
    HALVES: tl.constexpr = 2.0 / (1 << BITS)
    step = tl.where(half == 0.0, 0.0, half * HALVES * 1.0009765625 + 5.960464477539063e-08).to(tl.float16)
    tl.store(steps + rows * GROUPS + group, step, mask=inside)
    wide = step.to(tl.float32)[:, None] + tl.zeros_like(around)
    level = tl.floor(tl.div_rn(around, tl.where(wide > 0.0, wide, 1.0)))
    level = tl.where(wide > 0.0, level, 0.0) + (1 << (BITS - 1)) * 1.0
    code = tl.minimum(tl.maximum(level, 0.0), ((1 << BITS) - 1) * 1.0).to(tl.int64)
    RUNS: tl.constexpr = WIDTH // 32
    code = tl.reshape(tl.where(kept[None, :], code, 0), (ROWS, RUNS, 32))
    place = tl.arange(0, 32) * BITS
    run = tl.arange(0, RUNS)
    word = (group * GROUP * BITS) // 32 + run * BITS
    for w in tl.static_range(BITS):
        left, right = place - 32 * w, 32 * w - place
        here = (left > -BITS) & (left < 32)
        shifted = tl.where(
            (left >= 0)[None, None, :],
            code << tl.maximum(left, 0)[None, None, :],
            code >> tl.maximum(right, 0)[None, None, :],
        )
        bits = tl.sum(tl.where(here[None, None, :], shifted, 0), 2) & 0xFFFFFFFF
        # What does not fit int32 as it is becomes negative.
        bits = tl.where(bits > 2147483647, bits - 4294967296, bits).to(tl.int32)
        to = codes + rows.to(tl.int64)[:, None] * WORDS + (word + w)[None, :]
        own = (run * 32 * BITS + 32 * w < GROUP * BITS) & (word + w < WORDS)
        tl.store(to, bits, mask=inside[:, None] & own[None, :])


@jit
def numbers_of_bins(
    codes, steps, centers, y, R, INNER, outer, row_stride, stride, LAST, WORDS,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What codes stand for: (code + ½ - 2^(BITS-1)) · step + center, a center for each row where SHARED."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    element = group * GROUP + i
    inside = (rows < R)[:, None] & ((i < GROUP) & (element <= LAST))[None, :]
    place = element * BITS
    at = codes + rows.to(tl.int64)[:, None] * WORDS + (place // 32)[None, :]
    shift = (place % 32)[None, :]
    low = tl.load(at, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    if BITS == 3:
        high = tl.load(at + 1, mask=inside & (shift + BITS > 32), other=0).to(tl.int64) & 0xFFFFFFFF
        low = low | (high << 32)
    code = ((low >> shift) & ((1 << BITS) - 1)).to(tl.float32)
    step = tl.load(steps + rows * GROUPS + group, mask=rows < R, other=0.0).to(tl.float32)
    own = rows if SHARED else rows * GROUPS + group
    center = tl.load(centers + own, mask=rows < R, other=0.0).to(tl.float32)
    HALF: tl.constexpr = 0.5 - (1 << (BITS - 1))
    value = (code + HALF) * step[:, None] + center[:, None]
    to = (rows // INNER).to(tl.int64) * outer + (rows % INNER).to(tl.int64) * row_stride
    tl.store(y + to[:, None] + element[None, :] * stride, value.to(y.dtype.element_ty), mask=inside)
