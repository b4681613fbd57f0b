"""`linear8` together with what comes before and after it: one op in place of two or three.

    rms_norm(h, gain, eps)            → linear8      kind "rms_norm"
    layer_norm(h, gain, shift, eps)   → linear8      kind "layer_norm"
    silu(h) · other                   → linear8      kind "silu_times"
    any of these · (I ⊗ H/√n)         → linear8      any kind, also "as_is"
    linear8(…) + residual                            any kind, also "as_is"

A row is prepared in the cache of the core that quantizes it and never goes to memory; the residual is added to the sums before
they are written. The arithmetic in between is float32, so in bfloat16 two roundings fall away.

The rotation is by Hadamard matrices of order n = k·2ᵖ on n neighbours each, H = H_k ⊗ H_2ᵖ as of `dlqc.hadamard`: `block` is n (0
for none), `core` is H_k, transposed if H is to be, or None for k = 1.

Shapes: h, other [..., K], gain, shift float32 [K], residual [..., N], core float32 [k, k] → [..., N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.linear8 import Before, Rotation, product
from dlqc.kernels.cpu.native_op import native_op, register_fake
from dlqc.kernels.reference.layout import blank

KINDS = {"as_is": 0, "rms_norm": 1, "layer_norm": 2, "silu_times": 3}


#: What the power of two in an order has to be at least, if there is a core: a vector.
LANES = 16


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
    block: int = 0,
    core: Tensor | None = None,
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
    wide = [None if part is None else part.to(torch.float32).contiguous() for part in (gain, shift, core)]
    for name, part in zip(("gain", "shift"), wide, strict=False):
        if part is not None and part.shape != (in_features,):
            raise ContractError(f"{list(part.shape)}, not [{in_features}]", where=name)
    rotation = Rotation(block, _order(wide[2]), build.address(wide[2]))
    before = Before(kind, eps, *map(build.address, wide[:2]), None, 0, rotation)
    return product(x, weight, act_bits, act_group, before, other, residual)


def _order(core: Tensor | None) -> int:
    """k of a core that the library can read, 0 of another one."""
    if core is None:
        return 1
    plain = core.dtype == torch.float32 and core.dim() == 2 and core.shape[0] == core.shape[1] and core.is_contiguous()
    return len(core) if plain else 0


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
    block: int = 0,
    core: Tensor | None = None,
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
