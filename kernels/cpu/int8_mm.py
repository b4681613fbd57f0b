"""Integer matrix product: int8 activations by int8 weights with exact int32 sums, over `torch._int_mm`.

    y = (q · cᵀ) · s_x · s_w + b,    q, s_x = int8 codes and scales of x, quantized on the fly
                                     c, s_w = code - zero and scale of W

Shapes:  x [..., K], weight int8 [N, K], scale float32 [N], bias [N] or None → [..., N]; M = 0 and ragged K, N included.
Dtypes:  the sum over K is int32 and exact; scales and bias are applied in float32; the result has the dtype of x.
Layout:  row-major int8, multiplied as its transpose. Codes below 8 bits take a whole byte.
Requires: one weight scale per output channel; one symmetric activation scale per token; code - zero in [-128, 127];
          K small enough for int32, and not 1 (torch then returns memory that it never wrote); a CPU whose int8
          products do not saturate (`selfcheck.int_mm`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import QuantizedWeight
from dlqc.kernels.cpu import selfcheck
from dlqc.kernels.reference.layout import blank, canonical, misfit, outcome, rows


@torch.library.custom_op("dlqc_cpu::int8_mm", mutates_args=())
def int8_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act_bits: int) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, weight.shape[1], weight.shape[0])
    codes, token_scale, _ = ActFormat(act_bits).quantize_dynamic(rows(x, weight.shape[1]))
    y = torch._int_mm(codes, weight.T).to(torch.float32)
    return outcome(y.mul_(token_scale).mul_(scale), bias, x)


@int8_mm.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act_bits: int) -> Tensor:
    return blank(x, weight.shape[1], weight.shape[0])


@dataclass(frozen=True)
class Int8MM:
    """Per-channel integer weights by per-token integer activations, in integers."""

    name: str = "int8_mm"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        act = spec.act
        if act is None:
            return "activations are not quantized"
        if act.group_size not in (None, spec.in_features):
            return f"activations have a scale per group of {act.group_size}, it needs one per token"
        if not act.symmetric:
            return "activations are asymmetric, it needs symmetric ones"
        return unfit(spec, (1 << (act.bits - 1)) - 1)

    def note(self, spec: LinearSpec) -> str:
        held = "" if spec.integers.bits == 8 else f"; {spec.integers.bits}-bit codes are held in 8 bits"
        return f"exact int32 sums{held}"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        weight = canonical(spec, packed, scales, zeros, bias)
        assert spec.act is not None
        tensors = {"weight": centred(weight), "scale": weight.scales[:, 0].to(torch.float32), "bias": bias}
        return Lowered(torch.ops.dlqc_cpu.int8_mm.default, tensors, (spec.act.bits,))


def unfit(spec: LinearSpec, largest: int) -> str | None:
    """Why `torch._int_mm` cannot multiply a weight with activation codes of at most `largest`, zero point included, if so."""
    weight, k = spec.integers, spec.in_features
    if weight.group_size not in (None, k):
        return f"weights have a scale per group of {weight.group_size}, it needs one per output channel"
    if weight.bits == 8 and not weight.symmetric:
        return "8-bit codes minus their zero point do not fit in int8, it needs symmetric 8-bit weights"
    if k == 1:
        return "torch._int_mm does not compute products over 1 input feature"
    reach = weight.midpoint if weight.symmetric else weight.top
    if k * reach * largest >= 1 << 31:
        return f"sums over {k} input features can overflow int32"
    return selfcheck.int_mm(reach)


def centred(weight: QuantizedWeight) -> Tensor:
    """code - zero, int8 [N, K]."""
    zero = weight.format.midpoint if weight.zeros is None else weight.zeros.to(torch.int16)
    return (weight.codes.to(torch.int16) - zero).to(torch.int8)
