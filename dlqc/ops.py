"""Logical ops: the meaning of a quantized graph, independent of any kernel.

Each is one node in the graph, with a fake implementation for shapes and a definition in plain PyTorch. Backends
replace them by their own packed ops at lowering; results are judged against these definitions.

    rope(x, cos, sin)                        = x·cos + rotate_half(x)·sin
    transform(x, parts; spec)                = x·T, T spelled by `spec` (see dlqc/transform.py)
    quantize_act(x; bits, group, sym)        = dequantized nearest code of x, per token or per group of channels
    linear_q(x, codes, scales, zeros, bias)  = x · ((codes - zeros)·scales)ᵀ + bias
    linear_packed(...)                       = linear_q on codes stored as a dense bit stream
    linear_coded(x, parts, bias; spec, n)    = x · Wᵀ + b, W what `parts` stand for in the format that `spec` spells
    low_rank(y, x, parts; spec)              = y + (x · Bᵀ) · Aᵀ, y the output of a quantized linear that reads x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.coded import weight_of
from dlqc.formats.contract import StoredWeight
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.low_rank import low_rank_fault, low_rank_format
from dlqc.formats.packing import unpack
from dlqc.transform import decode


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


def _rope_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    cos, sin = ctx.saved_tensors
    turned, half = g * sin, g.shape[-1] // 2
    return g * cos + torch.cat((turned[..., half:], -turned[..., :half]), dim=-1), None, None


rope.register_autograd(_rope_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))


@torch.library.custom_op("dlqc::transform", mutates_args=())
def transform(x: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    """x [..., d] → x·T in float32 (float64 stays), same dtype. parts: the tensors that `spec` names by number."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return decode(spec, parts)(wide).to(x.dtype).clone(memory_format=torch.contiguous_format)


@transform.register_fake
def _(x: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    width = decode(spec, parts).width
    if x.shape[-1] != width:
        raise ContractError(
            f"{spec!r} has width {width}, its input {x.shape[-1]}", where="transform", remedy="Transform all channels"
        )
    return x.new_empty(x.shape)


def _keep_transform(ctx: Any, inputs: tuple[Tensor, list[Tensor], str], output: Tensor) -> None:
    _, parts, ctx.spec = inputs
    ctx.save_for_backward(*parts)


def _transform_backward(ctx: Any, g: Tensor) -> tuple[Tensor, list[None], None]:
    """g·Tᵀ. The parts are constants and get no gradient."""
    wide, parts = g if g.dtype in (torch.float32, torch.float64) else g.float(), ctx.saved_tensors
    return decode(ctx.spec, parts).transpose()(wide).to(g.dtype), [None] * len(parts), None


transform.register_autograd(_transform_backward, setup_context=_keep_transform)


@torch.library.custom_op("dlqc::quantize_act", mutates_args=())
def quantize_act(x: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Dynamic quantization of activations, dequantized: same shape and dtype as x. group_size 0 = per token."""
    return ActFormat(bits, group_size or None, symmetric).fake_quantize(x).clone()


@quantize_act.register_fake
def _(x: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


def _format(bits: int, group_size: int, scales: Tensor, zeros: Tensor | None) -> IntFormat:
    return IntFormat(bits, group_size or None, zeros is None, str(scales.dtype).removeprefix("torch."))


def _linear(x: Tensor, weight: QuantizedWeight | StoredWeight, bias: Tensor | None) -> Tensor:
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


@torch.library.custom_op("dlqc::linear_coded", mutates_args=())
def linear_coded(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str, out_features: int) -> Tensor:
    """x [..., K] → [..., N], N = `out_features`; parts: the tensors of the format, in sorted order of their roles."""
    return _linear(x, weight_of(spec, parts, out_features, x.shape[-1]), bias)


@linear_coded.register_fake
def _(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("dlqc::low_rank", mutates_args=())
def low_rank(y: Tensor, x: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    """y [..., N], x [..., K] → [..., N]; parts: the stored factors, in sorted order of their roles (dlqc/formats/low_rank.py)."""
    fmt = low_rank_format(spec)
    parts = [part.float() if part.dtype == torch.float64 else part for part in parts]  # as in `weight_of`
    wrong = low_rank_fault(spec, parts, y.shape[-1], x.shape[-1])
    if wrong is not None:
        raise ContractError(wrong, where="low_rank", remedy="Use the tensors that were stored")
    roles = sorted(fmt.parts_of(y.shape[-1], x.shape[-1]))
    left, right = fmt.factors(dict(zip(roles, parts, strict=True)))
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return (y.to(wide.dtype) + (wide @ right.to(wide.dtype).T) @ left.to(wide.dtype)).to(y.dtype)


@low_rank.register_fake
def _(y: Tensor, x: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    return torch.empty_like(y)


ROPE = torch.ops.dlqc.rope.default
TRANSFORM = torch.ops.dlqc.transform.default
QUANTIZE_ACT = torch.ops.dlqc.quantize_act.default
LINEAR_Q = torch.ops.dlqc.linear_q.default
LINEAR_PACKED = torch.ops.dlqc.linear_packed.default
LINEAR_CODED = torch.ops.dlqc.linear_coded.default
LOW_RANK = torch.ops.dlqc.low_rank.default
