"""Packed weights, dequantized at each call: the fallback for what no other CPU kernel takes.

    y = x · Ŵᵀ + b,    Ŵ = (codes - zero) · scale, a slice of output features at a time

Shapes:  x [..., K], packed uint8 [N, 4·⌈K·bits/32⌉], scales [N, G], zeros uint8 [N, G] or None, bias [N] or None
         → [..., N].
Dtypes:  the product is made in bfloat16 if x is bfloat16 (Ŵ, the values that the codes of x stand for, and the sums are
         rounded to it), in float64 if x is float64, else in float32. Bias in float32 or wider; then the dtype of x.
Layout:  the canonical bytes ("rows" of `dlqc.formats.packing`), kept as they are; zero points one byte each.
Requires nothing of the shapes. The working memory is one slice of Ŵ (CHUNK elements), whatever the size of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.packing import unpack
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, canonical, misfit, outcome, rows

CHUNK = 1 << 20


@torch.library.custom_op("dlqc_cpu::dequant", mutates_args=())
def dequant(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    """See the module docstring. `bits` also gives the zero point 2^(bits-1) where `zeros` is None."""
    if not x.numel():
        return blank(x, in_features, packed.shape[0])
    dtype = x.dtype if x.dtype in (torch.bfloat16, torch.float64) else torch.float32
    flat = rows(x, in_features)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32))
    flat = flat.to(dtype)
    count, groups = scales.shape
    y = flat.new_empty(flat.shape[0], count)
    step = max(1, CHUNK // in_features)
    for start in range(0, count, step):
        part = slice(start, start + step)
        zero = 1 << (bits - 1) if zeros is None else zeros[part].to(torch.float32).unsqueeze(-1)
        codes = unpack(packed[part], bits, in_features).to(torch.float32)
        centred = codes.reshape(codes.shape[0], groups, in_features // groups) - zero
        weight = centred.mul_(scales[part].to(torch.float32).unsqueeze(-1)).reshape(codes.shape)
        y[:, part] = flat @ weight.to(dtype).T
    return outcome(y, bias, x)


@dequant.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    return blank(x, in_features, packed.shape[0])


@dataclass(frozen=True)
class Dequant:
    """Anything, from packed bytes."""

    name: str = "dequant"

    def supports(self, spec: LinearSpec) -> str | None:
        return misfit(spec)

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        return f"dequantized at each call, which saves memory, not time{act}"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        weight = canonical(spec, packed, scales, zeros, bias)
        tensors = {"packed": packed, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
        scalars = (spec.in_features, spec.integers.bits, *act_scalars(spec.act))
        return Lowered(torch.ops.dlqc_cpu.dequant.default, tensors, scalars)
