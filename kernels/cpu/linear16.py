"""Low-bit weights by activations that are not rounded, in native code (csrc/linear16.cpp).

    y = x · Ŵᵀ + b,    Ŵ = (codes - zero) · scale in float32, a slice of 48 output by 64 input features at a time

Shapes:  x [..., K], codes uint8 [panels, 192·⌈K/32⌉·bits], scales [panels, G, 48], zeros uint8 [panels, G, 48] or None,
         bias float32 [N] or None → [..., N]; a panel is 48 output features.
Dtypes:  everything is float32, whatever x is; then the dtype of x. Activations that the site quantizes are replaced by the
         values that their codes stand for. Where the processor multiplies bfloat16 (AVX512-BF16) and x is that, it meets the
         integers as they are: exact products, float32 sums, then the scales (csrc/halves16.h). No weight is rounded; tokens
         below 2^-126 count as 0 there. With
         `bfloat16` an x in float32 is rounded to that first (relative error 2^-9), and the result is not.
Layout:  that of `linear8` (csrc/weights.h).
Requires: groups of the weight that 32 divides; a C++ compiler (or a library in the cache), and `selfcheck.native`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.kernels.cpu import build, selfcheck
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, canonical, misfit, rows


@torch.library.custom_op("dlqc_cpu::linear16", mutates_args=())
def linear16(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int = 0,
    act_group: int = 0,
    act_symmetric: bool = True,
    bfloat16: bool = False,
) -> Tensor:
    """See the module docstring. `group` is 0 for one scale per channel, `act_bits` 0 for x as it is."""
    if not x.numel():
        return blank(x, in_features, out_features)
    weight = build.described(codes, scales, zeros, bias, in_features, out_features, bits, group)
    return product(x, weight, act_bits, act_group, act_symmetric, bfloat16)


@linear16.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int = 0,
    act_group: int = 0,
    act_symmetric: bool = True,
    bfloat16: bool = False,
) -> Tensor:
    return blank(x, in_features, out_features)


def product(
    x: Tensor, weight: build.Weight, act_bits: int, act_group: int, act_symmetric: bool, bfloat16: bool = False
) -> Tensor:
    """y [..., N] of x [..., K], in the dtype of x; of x rounded to bfloat16 if that is wanted."""
    flat = rows(x, weight.k)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32))
    flat = build.dense(flat)
    y = flat.new_empty(flat.shape[0], weight.n)
    flat = flat.to(torch.bfloat16) if bfloat16 else flat
    pointer, integer, length = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    types = (
        *(ctypes.POINTER(build.Weight), pointer, integer, length, length),
        *(pointer, integer, length, integer, pointer),
    )
    failed = build.declared(build.library("linear16"), "dlqc_linear16", *types)(
        *(ctypes.byref(weight), flat.data_ptr(), build.TYPES[flat.dtype], flat.shape[0], flat.stride(0)),
        *(y.data_ptr(), build.TYPES[y.dtype], weight.n, *build.threads()),
    )
    if failed:
        raise MemoryError(f"no memory to arrange {list(flat.shape)} activations")
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.n)


@dataclass(frozen=True)
class Linear16:
    """Integer weights by activations in floating point, in native code."""

    name: str = "linear16"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        size = spec.integers.group_size or spec.in_features
        if size != spec.in_features and size % build.BLOCK:
            return f"weights have a scale per group of {size}, it needs a multiple of {build.BLOCK}"
        return build.unavailable(self.name) or selfcheck.native(self.name, build.options())

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        halves = spec.bfloat16 and bool(build.library(self.name).dlqc_halves())
        tokens = ", tokens rounded to bfloat16" if spec.bfloat16 else ""
        return f"native code, {build.isa(self.name)}; {'bfloat16' if halves else 'float32'} product{tokens}{act}"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        weight, k = canonical(spec, packed, scales, zeros, bias), spec.in_features
        held = weight.scales if weight.scales.dtype == torch.bfloat16 else weight.scales.to(torch.float32)
        tensors = {
            "codes": build.arrange(weight.codes, spec.integers.bits, self.name),
            "scales": build.in_panels(held),
            "zeros": None if weight.zeros is None else build.in_panels(weight.zeros),
            "bias": None if bias is None else bias.to(torch.float32).contiguous(),
        }
        group = 0 if spec.integers.group_size in (None, k) else spec.integers.group_size or 0
        scalars = (k, spec.out_features, spec.integers.bits, group, *act_scalars(spec.act))
        return Lowered(torch.ops.dlqc_cpu.linear16.default, tensors, (*scalars, True) if spec.bfloat16 else scalars)
