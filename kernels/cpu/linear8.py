"""Low-bit weights by 8-bit activations in native code, with exact integer sums (csrc/linear8.cpp).

    y = Σ_segments (Σ_k (code - zero) · q) · s_w · s_x + b,    q, s_x = codes and scales of x, quantized on the fly

A segment is a run of input features with one scale on both sides; the sum over it is int32 and exact.

Shapes:  x [..., K], codes uint8 [panels, 192·⌈K/32⌉·bits], scales [panels, G, 48], zeros uint8 [panels, G, 48] or None,
         bias float32 [N] or None → [..., N]; a panel is 48 output features.
Dtypes:  codes of x are those of `ActFormat.quantize_dynamic`; scales are bfloat16 or float32 and are applied in float32,
         as is the bias; then the dtype of x.
Layout:  codes keep their width (2, 3, 4 or 8 bits), spread over 64-byte vectors (csrc/weights.h); zero points one byte each.
Requires: symmetric activations; groups of weight and activation that 32 divides and of which one divides the other; a
          segment whose sum fits in int32; a C++ compiler (or a library in the cache), and `selfcheck.linear8`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.errors import ContractError
from dlqc.kernels.cpu import build, selfcheck
from dlqc.kernels.cpu.native_op import native_op, register_fake
from dlqc.kernels.reference.layout import blank, canonical, misfit, rows


@native_op
def linear8(
    x: Tensor,
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
    """See the module docstring. `group` is 0 for one scale per channel, `act_group` for one per token."""
    if not x.numel():
        return blank(x, in_features, out_features)
    weight = build.described(codes, scales, zeros, bias, in_features, out_features, bits, group)
    return product(x, weight, act_bits, act_group)


def _fake(
    x: Tensor,
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


register_fake(linear8, _fake)


class Rotation(ctypes.Structure):
    """`Rotation` of csrc/hadamard.h."""

    _fields_ = (("block", ctypes.c_int64), ("order", ctypes.c_int64), ("core", ctypes.c_void_p))


class Before(ctypes.Structure):
    """`Before` of csrc/prepare.h: what is done to x ahead of the quantizer."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("gain", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("other_stride", ctypes.c_int64),
        ("rotation", Rotation),
    )


def product(
    x: Tensor,
    weight: build.Weight,
    act_bits: int,
    act_group: int,
    before: Before | None = None,
    other: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Run the library on x [..., K], with `other` [..., K] for `before` and `added` [..., N]; gives [..., N].

    Raises:
        ContractError: `other` or `added` does not belong to the tokens of x.
    """
    flat = build.dense(rows(x, weight.k))
    for name, part, width in (("other", other, weight.k), ("residual", added, weight.n)):
        if part is not None and part.shape != (*x.shape[:-1], width):
            raise ContractError(f"{list(part.shape)}, not {[*x.shape[:-1], width]}", where=name)
    y = flat.new_empty(flat.shape[0], weight.n)
    held = []  # what the library reads has to live until it is done
    if before is not None and other is not None:
        held.append(build.dense(rows(other, weight.k).to(flat.dtype)))
        before.other, before.other_stride = held[-1].data_ptr(), held[-1].stride(0)
    if added is not None:
        held.append(build.dense(rows(added, weight.n).to(flat.dtype)))
    address, pitch = (None, 0) if added is None else (held[-1].data_ptr(), held[-1].stride(0))
    failed = _function()(
        *(ctypes.byref(weight), flat.data_ptr(), build.TYPES[flat.dtype], flat.shape[0], flat.stride(0)),
        *(y.data_ptr(), weight.n, act_bits, act_group, None if before is None else ctypes.byref(before)),
        *(address, pitch, *build.threads()),
    )
    if failed == 2:
        assert before is not None
        raise ContractError(
            f"no rotation of {weight.k} features by blocks of {before.rotation.block}",
            where="fused8",
            remedy="Use blocks of k·2^p that divide the width, with p of at least 4 where there is a core",
        )
    if failed:
        raise MemoryError(f"no memory to quantize {list(flat.shape)} activations")
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.n)


def _function() -> ctypes._NamedFuncPointer:
    pointer, integer, length = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    tokens, result, added = (pointer, integer, length, length), (pointer, length), (pointer, length)
    weight, before = ctypes.POINTER(build.Weight), ctypes.POINTER(Before)
    types = (weight, *tokens, *result, integer, length, before, *added, integer, pointer)
    return build.declared(build.library("linear8"), "dlqc_linear8", *types)


@dataclass(frozen=True)
class Linear8:
    """Integer weights by integer activations, in native code."""

    name: str = "linear8"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        weight, act, k = spec.integers, spec.act, spec.in_features
        if act is None:
            return "activations are not quantized"
        if not act.symmetric:
            return "activations are asymmetric, it needs symmetric ones"
        sizes = {"weights": weight.group_size or k, "activations": act.group_size or k}
        for what, size in sizes.items():
            if size != k and size % build.BLOCK:
                return f"{what} have a scale per group of {size}, it needs a multiple of {build.BLOCK}"
        segment, longer = sorted(sizes.values())
        if longer % segment:
            return f"groups of {segment} and {longer} do not nest"
        reach = weight.midpoint if weight.symmetric else weight.top
        if segment * reach * ((1 << (act.bits - 1)) - 1) >= 1 << 31:
            return f"sums over {segment} input features can overflow int32"
        return build.unavailable("linear8") or selfcheck.native(self.name, build.options())

    def note(self, spec: LinearSpec) -> str:
        return f"native code, {build.isa('linear8')}; exact int32 sums"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        assert spec.act is not None
        weight, k = canonical(spec, packed, scales, zeros, bias), spec.in_features
        held = weight.scales if weight.scales.dtype == torch.bfloat16 else weight.scales.to(torch.float32)
        tensors = {
            "codes": build.arrange(weight.codes, spec.integers.bits),
            "scales": build.in_panels(held),
            "zeros": None if weight.zeros is None else build.in_panels(weight.zeros),
            "bias": None if bias is None else bias.to(torch.float32).contiguous(),
        }
        sizes = (0 if size in (None, k) else size for size in (spec.integers.group_size, spec.act.group_size))
        group, act_group = sizes
        scalars = (k, spec.out_features, spec.integers.bits, group or 0, spec.act.bits, act_group or 0)
        return Lowered(linear8, tensors, scalars)
