"""Logical ops: the meaning of a quantized graph, independent of any kernel.

Each is one node in the graph, with a fake implementation for shapes and a definition in plain PyTorch. Backends
replace them by their own packed ops at lowering; results are judged against these definitions.

    rope(x, cos, sin)                        = x·cos + rotate_half(x)·sin
    quantize_act(x; bits, group, sym)        = dequantized nearest code of x, per token or per group of channels
    linear_q(x, codes, scales, zeros, bias)  = x · ((codes - zeros)·scales)ᵀ + bias
    linear_packed(...)                       = linear_q on codes stored as a dense bit stream
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.packing import unpack


@torch.library.custom_op("dlqc::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half form. x [B, H, L, D]; cos, sin broadcast against it."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The result is dense whatever the strides of x, as the definition's addition makes it on broadcasting.
    return torch.empty_like(x * cos)


@torch.library.custom_op("dlqc::quantize_act", mutates_args=())
def quantize_act(x: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Dynamic quantization of activations, dequantized: same shape and dtype as x. group_size 0 = per token."""
    return ActFormat(bits, group_size or None, symmetric).fake_quantize(x).clone()


@quantize_act.register_fake
def _(x: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


def _format(bits: int, group_size: int, scales: Tensor, zeros: Tensor | None) -> IntFormat:
    return IntFormat(bits, group_size or None, zeros is None, str(scales.dtype).removeprefix("torch."))


def _linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    # Half-precision activations are multiplied in float32: the definition should add no rounding of its own.
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    out = torch.nn.functional.linear(wide, weight.dequantize().to(wide.dtype))
    return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)


@torch.library.custom_op("dlqc::linear_q", mutates_args=())
def linear_q(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """x [..., K], codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None (symmetric) → [..., N]."""
    return _linear(x, QuantizedWeight(codes, scales, zeros, _format(bits, group_size, scales, zeros)), bias)


@linear_q.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("dlqc::linear_packed", mutates_args=())
def linear_packed(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """As `linear_q`, with codes packed in layout "rows" (uint8) and zeros packed the same way along G."""
    codes = unpack(packed, bits, x.shape[-1])
    points = None if zeros is None else unpack(zeros, bits, scales.shape[1])
    return _linear(x, QuantizedWeight(codes, scales, points, _format(bits, group_size, scales, zeros)), bias)


@linear_packed.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


ROPE = torch.ops.dlqc.rope.default
QUANTIZE_ACT = torch.ops.dlqc.quantize_act.default
LINEAR_Q = torch.ops.dlqc.linear_q.default
LINEAR_PACKED = torch.ops.dlqc.linear_packed.default
