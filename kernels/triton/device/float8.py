"""Products of weights and activations in e4m3; scales of rows on both sides in the epilogue.

Tensor cores add e4m3 products with fewer than 32 bits, so sums of 128 features go to float32 sums of their own.
"""

from __future__ import annotations

from dlqc.kernels.triton.device.dependent import arrive
from dlqc.kernels.triton.language import jit, tl


@jit
def float8(
    q, weight, scales, token_scales, bias, y, M, y_stride,
    N: tl.constexpr, KP: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N] of q e4m3 [M, KP] and weight e4m3 [N padded, KP], or with SPLITS > 1 of its part [SPLITS, M, N]."""
    BLOCKS: tl.constexpr = KP // 128
    PER: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, 128)
    row = weight + n[:, None].to(tl.int64) * KP + j[None, :]
    # A token past the last is the last once more; it is not stored.
    token = q + tl.minimum(m, M - 1)[None, :].to(tl.int64) * KP + j[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    arrive(DEPENDENT)
    for step in range(PER):
        block = split * PER + step
        at = tl.minimum(block, BLOCKS - 1) * 128
        part = tl.dot(tl.load(row + at), tl.load(token + at))
        if BLOCKS % SPLITS == 0:
            acc += part
        else:
            acc += tl.where(block < BLOCKS, part, 0.0)
    inside = (m[:, None] < M) & (n[None, :] < N)
    value = tl.trans(acc) * tl.load(scales + n)[None, :] * tl.load(token_scales + m, mask=m < M, other=0.0)[:, None]
    if BIAS and SPLITS == 1:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    to = y + (split.to(tl.int64) * M + m[:, None]) * y_stride + n[None, :]
    tl.store(to, value.to(y.dtype.element_ty), mask=inside)
