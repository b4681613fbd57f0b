"""4-bit weights by bfloat16 activations, over `torch.ops.aten._weight_int4pack_mm_for_cpu`.

    y = x · Ŵᵀ + b,    Ŵ = (c - 8) · s + t,    c = code + 8 - 2^(bits-1),    t = (2^(bits-1) - zero) · s

so that symmetric weights have t = 0, and 2- and 3-bit codes sit in the middle of a 4-bit slot.

Shapes:  x [..., K], weight uint8 [N, K/2], affine bfloat16 [K/g, N, 2] holding (s, t), bias [N] or None → [..., N].
Dtypes:  x (and the values its codes stand for, where activations are quantized), s and t are rounded to bfloat16; Ŵ and
         the sums are float32; the sum is rounded to bfloat16; bias in float32; then the dtype of x.
Layout:  torch's own order of 4-bit slots. It depends on the instruction set of the machine that lowered the weight, so
         it is made anew on each machine and never stored.
Requires: at most 4 bits; N a multiple of 16; weight groups that 32 divides (g is the largest of 256, 128, 64 and 32
          that divides them, with scales repeated; one scale per channel is a group of K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.kernels.cpu import selfcheck
from dlqc.kernels.cpu.bfloat16 import narrow, remarks
from dlqc.kernels.reference.layout import act_scalars, blank, canonical, misfit, outcome

GROUPS = (256, 128, 64, 32)
STEP = 16
TILES = 2  # an argument of the CUDA layout; the CPU op only checks that it is 1, 2, 4 … and ignores it


@torch.library.custom_op("dlqc_cpu::int4pack", mutates_args=())
def int4pack(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    bias: Tensor | None,
    group: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, 2 * weight.shape[1], weight.shape[0])
    flat = narrow(x, 2 * weight.shape[1], act_bits, act_group, act_symmetric)
    return outcome(torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight, group, affine), bias, x)


@int4pack.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    bias: Tensor | None,
    group: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    return blank(x, 2 * weight.shape[1], weight.shape[0])


@dataclass(frozen=True)
class Int4Pack:
    """Weights of 2 to 4 bits in 4-bit slots, 16-bit activations."""

    name: str = "int4pack"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        if spec.integers.bits > 4:
            return f"weights have {spec.integers.bits} bits, it holds at most 4"
        width = spec.integers.group_size or spec.in_features
        if width % GROUPS[-1]:
            said = f"groups of {width}" if spec.integers.group_size else f"{width} input features in one group"
            return f"{said} do not divide by {GROUPS[-1]}"
        if spec.out_features % STEP:
            return f"{spec.out_features} output features are not a multiple of {STEP}"
        return selfcheck.int4pack()

    def note(self, spec: LinearSpec) -> str:
        said = remarks(spec)
        if spec.integers.bits < 4:
            said.append(f"{spec.integers.bits}-bit codes are held in 4 bits")
        if not spec.integers.symmetric:
            said.append("zero points times scales are rounded to bfloat16")
        return "; ".join(said)

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        weight = canonical(spec, packed, scales, zeros, bias)
        middle = weight.format.midpoint
        slots = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32) + (8 - middle), TILES)
        width = spec.in_features // weight.scales.shape[1]
        group = next(size for size in GROUPS if width % size == 0)
        scale = weight.scales.to(torch.float32)
        offset = torch.zeros_like(scale) if weight.zeros is None else (middle - weight.zeros.to(torch.float32)) * scale
        affine = torch.stack((scale.T, offset.T), -1).repeat_interleave(width // group, 0).to(torch.bfloat16)
        tensors = {"weight": slots, "affine": affine.contiguous(), "bias": bias}
        return Lowered(torch.ops.dlqc_cpu.int4pack.default, tensors, (group, *act_scalars(spec.act)))
