"""`linear8` together with what comes before and after it: one op in place of two or three.

    rms_norm(h, gain, eps)            → linear8      kind "rms_norm"
    layer_norm(h, gain, shift, eps)   → linear8      kind "layer_norm"
    silu(h) · other                   → linear8      kind "silu_times"
    linear8(…) + residual                            any kind, also "as_is"

A row is prepared in the cache of the core that quantizes it and never goes to memory; the residual is added to the sums before
they are written. The arithmetic in between is float32, so in bfloat16 two roundings fall away.

Shapes: h, other [..., K], gain, shift float32 [K], residual [..., N] → [..., N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.linear8 import Before, product
from dlqc.kernels.cpu.native_op import native_op, register_fake
from dlqc.kernels.reference.layout import blank

KINDS = {"as_is": 0, "rms_norm": 1, "layer_norm": 2, "silu_times": 3}


@native_op
def fused8(
    kind: int,
    x: Tensor,
    other: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    residual: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int,
    act_group: int,
) -> Tensor:
    """See the module docstring; `kind` is one of KINDS, arguments from `codes` on are those of `linear8`.

    Raises:
        ContractError: another kind, or tensors that do not belong together.
    """
    if kind not in KINDS.values() or (kind == KINDS["silu_times"]) != (other is not None):
        raise ContractError(f"{kind} {'without' if other is None else 'with'} a factor", where="kind")
    if not x.numel():
        return blank(x, in_features, out_features)
    weight = build.described(codes, scales, zeros, bias, in_features, out_features, bits, group)
    wide = [None if part is None else part.to(torch.float32).contiguous() for part in (gain, shift)]
    for name, part in zip(("gain", "shift"), wide, strict=True):
        if part is not None and part.shape != (in_features,):
            raise ContractError(f"{list(part.shape)}, not [{in_features}]", where=name)
    before = Before(kind, eps, *map(build.address, wide), None, 0)
    return product(x, weight, act_bits, act_group, before, other, residual)


def _fake(
    kind: int,
    x: Tensor,
    other: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    residual: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int,
    act_group: int,
) -> Tensor:
    return blank(x, in_features, out_features)


register_fake(fused8, _fake)
FUSED8 = fused8


@native_op
def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """The norm alone, x / √(mean x² + eps) · gain in float32: x [..., K], gain float32 [K] or None → [..., K], contiguous."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if gain is None else normed * gain).to(x.dtype).contiguous()


register_fake(rms_norm, lambda x, gain, eps: x.new_empty(x.shape))
