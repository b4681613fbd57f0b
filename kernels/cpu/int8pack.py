"""int8 weights by bfloat16 activations, over `torch.ops.aten._weight_int8pack_mm`.

    y = x · (c · s)ᵀ + b,    c = code - 128, s = scale of W, per output channel

Shapes:  x [..., K], weight int8 [N, K], scale bfloat16 [N], bias [N] or None → [..., N].
Dtypes:  x (and the values its codes stand for, where activations are quantized) is rounded to bfloat16; products are
         summed in float32 and the sum times the scale is rounded to bfloat16; bias in float32; then the dtype of x.
Layout:  row-major int8, as it is.
Requires: 8-bit symmetric weights, one scale per output channel; K a multiple of 16: with other K the op reads past the
          end of rows in bfloat16, and gives wrong results or crashes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.kernels.cpu import selfcheck
from dlqc.kernels.cpu.bfloat16 import narrow, remarks
from dlqc.kernels.reference.layout import act_scalars, blank, canonical, misfit, outcome

STEP = 16


@torch.library.custom_op("dlqc_cpu::int8pack", mutates_args=())
def int8pack(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act_bits: int, act_group: int, act_symmetric: bool
) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, weight.shape[1], weight.shape[0])
    flat = narrow(x, weight.shape[1], act_bits, act_group, act_symmetric)
    return outcome(torch.ops.aten._weight_int8pack_mm(flat, weight, scale), bias, x)


@int8pack.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act_bits: int, act_group: int, act_symmetric: bool
) -> Tensor:
    return blank(x, weight.shape[1], weight.shape[0])


@dataclass(frozen=True)
class Int8Pack:
    """8-bit per-channel weights, 16-bit activations."""

    name: str = "int8pack"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        weight, k = spec.integers, spec.in_features
        if weight.bits != 8:
            return f"weights have {weight.bits} bits, it needs 8"
        if not weight.symmetric:
            return "weights are asymmetric, it needs symmetric ones"
        if weight.group_size not in (None, k):
            return f"weights have a scale per group of {weight.group_size}, it needs one per output channel"
        if k % STEP:
            return f"{k} input features are not a multiple of {STEP}, and torch's op reads past their end"
        return selfcheck.int8pack()

    def note(self, spec: LinearSpec) -> str:
        return "; ".join(remarks(spec))

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        weight = canonical(spec, packed, scales, zeros, bias)
        centred = (weight.codes.to(torch.int16) - weight.format.midpoint).to(torch.int8)
        tensors = {"weight": centred, "scale": weight.scales[:, 0].to(torch.bfloat16), "bias": bias}
        return Lowered(torch.ops.dlqc_cpu.int8pack.default, tensors, act_scalars(spec.act))
