"""Scaled dot-product attention spelled out: what its probabilities are, and what rounding them does.

    P = softmax(q·kᵀ·scale + mask),   out = P·v          q [B, Hq, L, D], k and v [B, H, S, D], Hq a multiple of H

Query head h reads key head ⌊h·H/Hq⌋. A mask is boolean (true lets through) or added; a row that it closes entirely has P = 0, as
torch's own attention has it. Half-precision values are multiplied in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Probabilities that are held at a time while their column sums are taken.
_CHUNK = 1 << 24


def scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """q·kᵀ·scale + mask, [B, Hq, L, S], float32 or wider; minus infinity where the mask is closed."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    found = q.to(wide) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        found = found.masked_fill(~found.new_ones(found.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is None:
        return found
    return found.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else found + mask.to(wide)


def probabilities(found: Tensor) -> Tensor:
    """softmax of scores over the keys; 0 in rows that are closed."""
    return torch.where(found == -torch.inf, 0.0, torch.softmax(found, dim=-1))


def attend(p: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """P·v, [B, Hq, L, D], in `dtype`."""
    values = v.to(p.dtype).repeat_interleave(p.shape[1] // v.shape[1], dim=1)
    return (p @ values).to(dtype)


def rounded(found: Tensor, bits: int, by_row: bool) -> Tensor:
    """Probabilities of scores, rounded to codes 0 … 2^bits - 1 of the static scale 1/(2^bits - 1).

    by_row=False rounds P itself, which lies in [0, 1]. by_row=True rounds exp(score - largest of the row), which reaches 1 in
    every row, and divides by the row's sum afterwards, as fused attention does (SageAttention, arXiv 2410.02367).
    """
    top = (1 << bits) - 1
    if not by_row:
        return (probabilities(found) * top).round() / top
    peak = found.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(found.dtype).min)
    raised = (found - peak).exp()
    return (raised * top).round() / top / raised.sum(dim=-1, keepdim=True).clamp(min=1)


def column_mass(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None, c: Tensor) -> Tensor:
    """Σ over heads and queries of c·P, how much each token is looked at: float64 [B, S]. c [B, L] weighs the queries.

    Rows and key heads go one after another where that many probabilities do not fit into a chunk of 64 MB.
    """
    batch, heads, length = q.shape[:3]
    shared = heads // k.shape[1]
    total = torch.zeros(batch, k.shape[2], dtype=torch.float64)
    together = max(1, _CHUNK // max(length * k.shape[2] * shared, 1))
    for b in range(batch):
        for h in range(0, k.shape[1], together):
            part = mask
            if mask is not None and mask.dim() == 4:
                part = mask[b if mask.shape[0] > 1 else 0].unsqueeze(0)
                part = part[:, h * shared : (h + together) * shared] if part.shape[1] > 1 else part
            some = slice(h * shared, (h + together) * shared)
            p = probabilities(scores(q[b : b + 1, some], k[b : b + 1, h : h + together], part, causal, scale))
            total[b] += torch.einsum("hls,l->hs", p[0], c[b].to(p.dtype)).double().sum(0)
    return total
