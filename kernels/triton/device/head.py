"""Head, argmax and confidence without logits in memory: each program keeps three numbers of its tile of the vocabulary."""

from __future__ import annotations

from dlqc.kernels.triton.device.weight_only import product
from dlqc.kernels.triton.language import jit, tl


@jit
def confident(
    x, low, scales, zeros, table, bias, tops, tokens, totals, M, x_stride,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    CODE: tl.constexpr, RUN: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, PRE: tl.constexpr,
    ASM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Of the logits of BN tokens: the largest, whose it is (the first of equals), and Σ exp(logit - largest); [tiles, M] each."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    logits = product(
        x, low, scales, zeros, table, n, m, 0, M, x_stride,
        NP, K, BITS, GROUP, ZEROS, CODE, RUN, BN, BM, 1, PRE, ASM, CT,
    )  # fmt: skip
    if BIAS:
        logits += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    logits = tl.where(n[:, None] < N, logits, -float("inf"))
    top = tl.max(logits, 0)
    token = tl.min(tl.where(logits == top[None, :], n[:, None], N), 0)
    # A tile may lie past the end of the vocabulary: it counts nothing.
    total = tl.sum(tl.where(n[:, None] < N, tl.exp(logits - top[None, :]), 0.0), 0)
    to = tl.program_id(0).to(tl.int64) * M + m
    tl.store(tops + to, top, mask=m < M)
    tl.store(tokens + to, token, mask=m < M)
    tl.store(totals + to, total, mask=m < M)


@jit
def most_confident(tops, tokens, totals, token, confidence, M, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """The token of the largest logit, int64 [M], and its probability, float32 [M], of what `confident` left of each tile."""
    m = tl.program_id(0)
    tile = tl.arange(0, WIDTH)
    at = tile.to(tl.int64) * M + m
    top = tl.load(tops + at, mask=tile < TILES, other=-float("inf"))
    most = tl.max(top, 0)
    found = tl.load(tokens + at, mask=tile < TILES, other=0)
    first = tl.min(tl.where((top == most) & (tile < TILES), found, 2147483647), 0)
    total = tl.sum(tl.load(totals + at, mask=tile < TILES, other=0.0) * tl.exp(top - most), 0)
    tl.store(token + m, first.to(tl.int64))
    tl.store(confidence + m, 1.0 / total)
