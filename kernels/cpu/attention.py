"""Attention and rotary embedding in native code (csrc/attention.cpp), in the place of torch's and of `dlqc::rope`.

    attention   y = softmax(scale · q kᵀ + mask) v        the arguments of torch's scaled_dot_product_attention
    rope        y = x · cos + rotate_half(x) · sin         the arguments of `dlqc::rope`

torch's attention is made for long sequences: on a block of 32 tokens most of its time goes into its preparation. Sums run over
blocks of 384 keys with the largest score so far (Milakov and Gimelshein, arXiv 1805.02867); no matrix of queries by keys is
stored. Where torch gives NaN, for a query that sees no key, this gives zeros.

Shapes:  q [B, Hq, S, D], k, v [B, H, L, D], mask broadcasts to [B, Hq, S, L] → [B, Hq, S, D]; x [B, H, L, D], cos, sin broadcast.
Dtypes:  float32 and bfloat16, computed in float32; others by torch.
Layout:  the result lies [B, S, Hq, D] in memory, so that heads are put side by side without a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.native_op import native_op, register_fake

#: What the width of a head has to be a multiple of.
STRIP = 16


@native_op
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """See the module docstring."""
    y = F.scaled_dot_product_attention(
        *(query, key, value, attn_mask, dropout_p, is_causal), scale=scale, enable_gqa=enable_gqa
    )
    return _by_position(y)


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    b, h, s, _ = query.shape
    return query.new_empty(b, s, h, value.shape[-1]).transpose(1, 2)


@native_op
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See the module docstring."""
    half = x.shape[-1] // 2
    return _by_position(x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin)


def _fake_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _by_position(x * cos)


def _by_position(y: Tensor) -> Tensor:
    """[B, H, L, D], stored as [B, L, H, D] and nothing else's memory."""
    return (
        torch.empty_like(y.transpose(1, 2), memory_format=torch.contiguous_format)
        .copy_(y.transpose(1, 2))
        .transpose(1, 2)
    )


register_fake(attention, _fake_attention)
register_fake(rope, _fake_rope)


def unavailable() -> str | None:
    """None if the native code can be used, or why not, one clause."""
    reason = build.unavailable("attention")
    if reason is None:
        build.library("attention")
    return reason
