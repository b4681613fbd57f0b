"""Weights in formats that are not integers, dequantized at each call: what both backends end with.

    y = x̂ · Ŵᵀ + b,    Ŵ what the stored tensors stand for (`dlqc.formats.coded`),    x̂ = x, or what the codes of x stand for

Shapes:  x [..., K], the parts of the format in sorted order of their roles, then bias [N] if there is one → [..., N].
Dtypes:  Ŵ is float32; the product is made in float32, or in float64 if x is float64; the result has the dtype of x.
Layout:  none: the tensors are kept as they are stored.
Requires nothing of shapes and devices. The working memory is all of Ŵ in float32 and its codes, one byte each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.errors import ContractError
from dlqc.formats.coded import encode, fault, weight_of
from dlqc.formats.integer import IntFormat
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, outcome, rows


@torch.library.custom_op("dlqc_reference::coded", mutates_args=())
def coded(
    x: Tensor,
    tensors: list[Tensor],
    spec: str,
    has_bias: bool,
    in_features: int,
    out_features: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, in_features, out_features)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = rows(x, in_features).to(wide)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32)).to(wide)
    parts = tensors[:-1] if has_bias else tensors
    weight = weight_of(spec, parts, out_features, in_features).dequantize()
    return outcome(flat @ weight.to(wide).T, tensors[-1] if has_bias else None, x)


@coded.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],
    spec: str,
    has_bias: bool,
    in_features: int,
    out_features: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    return blank(x, in_features, out_features)


@dataclass(frozen=True)
class Coded:
    """Any format but integers, by its definition."""

    name: str = "coded"

    def supports(self, spec: LinearSpec) -> str | None:
        if isinstance(spec.weight, IntFormat):
            return "codes are integers, which have kernels of their own"
        return spec.weight.check(spec.in_features) or (spec.act.check(spec.in_features) if spec.act else None)

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        return f"{spec.weight.label} is dequantized at each call, which saves memory, not time{act}"

    def lower_coded(self, spec: LinearSpec, parts: Mapping[str, Tensor], bias: Tensor | None) -> Lowered:
        assert not isinstance(spec.weight, IntFormat)
        text, tensors = encode(spec.weight), dict(sorted(parts.items()))
        wrong = fault(text, list(tensors.values()), spec.out_features, spec.in_features)
        if wrong is not None:
            raise ContractError(wrong, where="parts")
        if (bias is not None) != spec.has_bias or (bias is not None and bias.shape != (spec.out_features,)):
            found = "none" if bias is None else str(tuple(bias.shape))
            raise ContractError(f"has_bias={spec.has_bias}, and the bias is {found}", where="bias")
        scalars = (text, spec.has_bias, spec.in_features, spec.out_features, *act_scalars(spec.act))
        held = {**tensors, "bias": bias} if bias is not None else tensors
        return Lowered(torch.ops.dlqc_reference.coded.default, {**held}, scalars, listed=True)
