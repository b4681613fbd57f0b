"""Logical ops: the meaning of a quantized graph, independent of any kernel.

Each is one node in the graph, with a fake implementation for shapes and a definition in plain PyTorch. Backends
replace them by their own packed ops at lowering; results are judged against these definitions.

    rope(x, cos, sin)                        = x·cos + rotate_half(x)·sin
    transform(x, parts; spec)                = x·T, T spelled by `spec` (see dlqc/transform.py)
    quantize_act(x; bits, group, sym)        = dequantized nearest code of x, per token or per group of channels
    quantize_act_static(x, scale, zero, set) = the same with fixed scales, of the set that each token's row is in
    quantize_act_adaptive(x, set; widths, …) = quantize_act in the width of each token's set
    mask_bucket(ids, ratio; mask id, edges)  = which set: the part of the way on which a row is, by its share of [MASK]
    quantize_heads(x; bits, sym, across)     = quantize_act of queries, keys or values, per token and head or per token
    quantize_heads_static(x, scale, zero, …) = the same with fixed scales
    cached(x, offset; spec)                  = x; says how a cache stores keys or values (see dlqc/kv_cache.py)
    attention(q, k, v, mask; …, bits)        = scaled dot-product attention whose probabilities are rounded to `bits`
    linear_q(x, codes, scales, zeros, bias)  = x · ((codes - zeros)·scales)ᵀ + bias
    linear_packed(...)                       = linear_q on codes stored as a dense bit stream
    linear_coded(x, parts, bias; spec, n)    = x · Wᵀ + b, W what `parts` stand for in the format that `spec` spells
    linear_nested(…; spec, n, set, widths)   = linear_coded in the width of each token's set, by nested codes
    low_rank(y, x, parts; spec)              = y + (x · Bᵀ) · Aᵀ, y the output of a quantized linear that reads x
    embedding_packed(ids, packed, …)         = the rows `ids` of (codes - zeros)·scales, stored as in linear_packed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlqc.attention import attend, probabilities, rounded, scores
from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.coded import decode as decode_format
from dlqc.formats.coded import weight_of
from dlqc.formats.contract import StoredWeight
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.low_rank import low_rank_fault, low_rank_format
from dlqc.formats.nested import NestedFormat
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


@torch.library.custom_op("dlqc::mask_bucket", mutates_args=())
def mask_bucket(ids: Tensor, mask_id: int, edges: list[float], ratio: Tensor | None = None) -> Tensor:
    """ids int64 [B, L] → int64 [B, L]: for every token of a row, how many of the `edges` lie below its mask ratio.

    So a ratio r is in bucket b if edges[b-1] < r ≤ edges[b]. Ratios are `ratio` float64 [B], or, where nobody says, the shares of
    [MASK] among the ids. What lies within 1e-9 of an edge k/n is on it: ratios are quotients of counts.
    """
    found = (ids == mask_id).double().mean(dim=1) if ratio is None else ratio.double()
    ends = torch.tensor(edges, dtype=torch.float64, device=ids.device) + 1e-9
    return (found[:, None] > ends).sum(dim=1, keepdim=True).expand(ids.shape).contiguous()


@mask_bucket.register_fake
def _(ids: Tensor, mask_id: int, edges: list[float], ratio: Tensor | None = None) -> Tensor:
    return torch.empty(ids.shape, dtype=torch.int64, device=ids.device)


@torch.library.custom_op("dlqc::quantize_act_adaptive", mutates_args=())
def quantize_act_adaptive(
    x: Tensor, bucket: Tensor | None, widths: list[int], group_size: int, symmetric: bool
) -> Tensor:
    """As `quantize_act` in widths[bucket] bits: same shape and dtype as x [..., K].

    bucket int64, of the leading sizes of x (None: all rows take the first width).
    """
    used = [0] if bucket is None or not bucket.numel() else torch.unique(bucket).tolist()
    made = {w: ActFormat(w, group_size or None, symmetric).fake_quantize(x) for w in {widths[i] for i in used}}
    if len(made) == 1 or bucket is None:
        return made[widths[used[0]]].clone()
    by_row = torch.tensor(widths, device=bucket.device)[bucket].unsqueeze(-1)
    found = x.clone(memory_format=torch.contiguous_format)
    for width, values in made.items():
        found = torch.where(by_row == width, values, found)
    return found


@quantize_act_adaptive.register_fake
def _(x: Tensor, bucket: Tensor | None, widths: list[int], group_size: int, symmetric: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dlqc::quantize_act_static", mutates_args=())
def quantize_act_static(x: Tensor, scale: Tensor, zero: Tensor | None, bucket: Tensor | None, bits: int) -> Tensor:
    """Static quantization of activations, dequantized: same shape and dtype as x [..., K].

    scale float32 [S, G] and zero int8 [S, G] (None: symmetric) for S sets and G groups of K/G channels; bucket int64, of the
    leading sizes of x, says which set each row of x takes (None: the first).
    """
    fmt = ActFormat(bits, x.shape[-1] // scale.shape[1], zero is None, scale.shape[0])
    chosen = (scale[0] if bucket is None else scale[bucket]).unsqueeze(-1)
    points = None if zero is None else (zero[0] if bucket is None else zero[bucket]).unsqueeze(-1)
    return fmt.fake_quantize_at(fmt.grouped(x), chosen, points).flatten(-2).contiguous()


@quantize_act_static.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor | None, bucket: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dlqc::quantize_heads", mutates_args=())
def quantize_heads(x: Tensor, bits: int, symmetric: bool, across: bool) -> Tensor:
    """Dynamic quantization of x [B, H, L, D], dequantized: a scale for each token and head, or (across) for each token."""
    fmt = ActFormat(bits, None, symmetric)
    if not across:
        return fmt.fake_quantize(x).contiguous()
    tokens = x.transpose(1, 2)
    return fmt.fake_quantize(tokens.flatten(2)).reshape(tokens.shape).transpose(1, 2).contiguous()


@quantize_heads.register_fake
def _(x: Tensor, bits: int, symmetric: bool, across: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dlqc::quantize_heads_static", mutates_args=())
def quantize_heads_static(x: Tensor, scale: Tensor, zero: Tensor | None, bucket: Tensor | None, bits: int) -> Tensor:
    """Static quantization of x [B, H, L, D], dequantized. scale, zero [S, H or 1, D or 1]; bucket int64 [B, L], by row."""
    rows = None if bucket is None or not x.numel() else bucket[:, 0]
    chosen = (scale[:1] if rows is None else scale[rows]).unsqueeze(2)
    points = None if zero is None else (zero[:1] if rows is None else zero[rows]).unsqueeze(2)
    return ActFormat(bits, None, zero is None, scale.shape[0]).fake_quantize_at(x, chosen, points).contiguous()


@quantize_heads_static.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor | None, bucket: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dlqc::cached", mutates_args=())
def cached(x: Tensor, offset: Tensor | None, spec: str) -> Tensor:
    """x [B, H, L, D] as it is: a mark on keys or values, stored as `spec` says and without `offset` [1, H, L, D]."""
    return x.clone()


@cached.register_fake
def _(x: Tensor, offset: Tensor | None, spec: str) -> Tensor:
    return torch.empty_like(x)


cached.register_autograd(lambda ctx, g: (g, None, None))


@torch.library.custom_op("dlqc::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, bits: int, by_row: bool
) -> Tensor:
    """Attention with probabilities rounded to `bits` (0: as they are), see `dlqc.attention`: q [B, Hq, L, D] → [B, Hq, L, D]."""
    found = scores(q, k, mask, causal, scale)
    return attend(rounded(found, bits, by_row) if bits else probabilities(found), v, q.dtype).contiguous()


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, bits: int, by_row: bool
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


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


@torch.library.custom_op("dlqc::linear_nested", mutates_args=())
def linear_nested(
    x: Tensor,
    parts: list[Tensor],
    bias: Tensor | None,
    spec: str,
    out_features: int,
    bucket: Tensor | None,
    widths: list[int],
) -> Tensor:
    """As `linear_coded` in a nested format, read in widths[bucket] bits: x [..., K] → [..., N].

    bucket int64, of the leading sizes of x (None: all rows take the first width). Planes below a width are not looked at.
    """
    fmt = decode_format(spec)
    if not isinstance(fmt, NestedFormat):
        raise ContractError(f"{spec!r} has no nested codes", where="linear_nested", remedy="Use nested(planes=...)")
    roles = sorted(fmt.parts_of(out_features, x.shape[-1]))
    stored = dict(zip(roles, (part.float() if part.dtype == torch.float64 else part for part in parts), strict=True))
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()

    def product(rows: Tensor, width: int) -> Tensor:
        weight = fmt.weight_at(stored, x.shape[-1], width).to(rows.dtype)
        return torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))

    used = [0] if bucket is None or not bucket.numel() else torch.unique(bucket).tolist()
    chosen = {widths[i] for i in used}
    if len(chosen) == 1 or bucket is None:
        return product(wide, widths[used[0]]).to(x.dtype)
    found = wide.new_empty((*x.shape[:-1], out_features))
    by_row = torch.tensor(widths, device=bucket.device)[bucket]
    for width in chosen:
        found[by_row == width] = product(wide[by_row == width], width)
    return found.to(x.dtype)


@linear_nested.register_fake
def _(
    x: Tensor,
    parts: list[Tensor],
    bias: Tensor | None,
    spec: str,
    out_features: int,
    bucket: Tensor | None,
    widths: list[int],
) -> Tensor:
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


@torch.library.custom_op("dlqc::embedding_packed", mutates_args=())
def embedding_packed(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """ids [...], a table [V, K] in the tensors of `linear_packed`, K = `width` → [..., K] in `dtype`.

    Only the rows that are looked up are unpacked and dequantized.
    """
    rows = ids.reshape(-1)
    if not len(rows):
        return scales.new_empty((*ids.shape, width), dtype=dtype)
    codes, own = unpack(packed[rows], bits, width), scales[rows]
    points = None if zeros is None else unpack(zeros[rows], bits, scales.shape[1])
    found = QuantizedWeight(codes, own, points, _format(bits, group_size, scales, zeros)).dequantize()
    return found.to(dtype).reshape(*ids.shape, width)


@embedding_packed.register_fake
def _(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return scales.new_empty((*ids.shape, width), dtype=dtype)


ROPE = torch.ops.dlqc.rope.default
TRANSFORM = torch.ops.dlqc.transform.default
QUANTIZE_ACT = torch.ops.dlqc.quantize_act.default
QUANTIZE_ACT_STATIC = torch.ops.dlqc.quantize_act_static.default
QUANTIZE_ACT_ADAPTIVE = torch.ops.dlqc.quantize_act_adaptive.default
MASK_BUCKET = torch.ops.dlqc.mask_bucket.default
QUANTIZE_HEADS = torch.ops.dlqc.quantize_heads.default
QUANTIZE_HEADS_STATIC = torch.ops.dlqc.quantize_heads_static.default
CACHED = torch.ops.dlqc.cached.default
ATTENTION = torch.ops.dlqc.attention.default
LINEAR_Q = torch.ops.dlqc.linear_q.default
LINEAR_PACKED = torch.ops.dlqc.linear_packed.default
LINEAR_CODED = torch.ops.dlqc.linear_coded.default
LINEAR_NESTED = torch.ops.dlqc.linear_nested.default
LOW_RANK = torch.ops.dlqc.low_rank.default
EMBEDDING_PACKED = torch.ops.dlqc.embedding_packed.default
