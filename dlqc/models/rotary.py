"""Bidirectional attention with rotary positions and grouped keys, as LLaDA and Dream share it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotary_attention(
    q_BLd: torch.Tensor,
    k_BLd: torch.Tensor,
    v_BLd: torch.Tensor,
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of every position to every other, [B, L, H·head_dim].

    Args:
        q_BLd, k_BLd, v_BLd: projections [B, L, heads·head_dim]; k and v may have fewer heads.
        cos, sin: rotary tables [L, head_dim]. mask: broadcasts to [B, heads, L, L], true where a key may be seen.
    """
    batch, length, d = q_BLd.shape
    q, k, v = (t.view(batch, length, t.shape[-1] // head_dim, head_dim).transpose(1, 2) for t in (q_BLd, k_BLd, v_BLd))
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    grouped = k_BLd.shape[-1] != d
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(batch, length, d)


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [L, head_dim] in float32, rotate-half order."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] / theta**exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, H, L, D] in float32 or wider, as `rope_full_precision` asks; the result has x's dtype."""
    half = x.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    rotated = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos + rotated * sin).to(x.dtype)
