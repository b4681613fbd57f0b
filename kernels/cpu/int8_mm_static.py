"""Integer matrix product with fixed activation scales: as `int8_mm`, without a look at x before it is rounded.

    y = (q · cᵀ - z·Σ_k c) · s_x · s_w + b,    q = clamp(round(x / s_x) + z, -2^(b-1), 2^(b-1) - 1),  c = code - zero of W

s_x and z come from the set that `bucket` names for each row of x, the first where it is None. The row sums Σ_k c are made at
lowering.

Shapes:  x [..., K], bucket int64 of the leading sizes of x or None, weight int8 [N, K], scale float32 [N], sums int32 [N] or None
         (symmetric), act_scale float32 [S], act_zero int32 [S] or None, bias [N] or None → [..., N].
Dtypes:  the sum over K is int32 and exact, the zero points' share as well; scales and bias are applied in float32; the result has
         the dtype of x.
Layout:  row-major int8, multiplied as its transpose. Codes below 8 bits take a whole byte.
Requires: one weight scale per output channel; one activation scale for the tensor; code - zero in [-128, 127]; K small enough for
          int32, and not 1 (torch then returns memory that it never wrote); a CPU whose int8 products do not saturate
          (`selfcheck.int_mm`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.activation import ActFormat
from dlqc.kernels.cpu.int8_mm import centred, unfit
from dlqc.kernels.reference.layout import blank, canonical, misfit, outcome, rows


@torch.library.custom_op("dlqc_cpu::int8_mm_static", mutates_args=())
def int8_mm_static(
    x: Tensor,
    bucket: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    act_scale: Tensor,
    act_zero: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, weight.shape[1], weight.shape[0])
    chosen = [None if part is None else _of_rows(part, bucket) for part in (act_scale, act_zero)]
    token_scale, zero = chosen
    assert token_scale is not None
    fmt = ActFormat(act_bits, None, act_zero is None, act_scale.shape[0])
    codes = fmt.codes(rows(x, weight.shape[1]), token_scale, zero).to(torch.int8)
    product = torch._int_mm(codes, weight.T)
    if zero is not None and sums is not None:
        product -= zero * sums
    return outcome(product.to(torch.float32).mul_(token_scale).mul_(scale), bias, x)


def _of_rows(part: Tensor, bucket: Tensor | None) -> Tensor:
    """[M, 1] by row of x, or [1, 1] for all."""
    return (part[:1] if bucket is None else part[bucket.reshape(-1)]).unsqueeze(1)


@int8_mm_static.register_fake
def _(
    x: Tensor,
    bucket: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    act_scale: Tensor,
    act_zero: Tensor | None,
    bias: Tensor | None,
    act_bits: int,
) -> Tensor:
    return blank(x, weight.shape[1], weight.shape[0])


@dataclass(frozen=True)
class Int8MMStatic:
    """Per-channel integer weights by integer activations with fixed scales, in integers."""

    name: str = "int8_mm_static"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        if spec.act is None or not spec.act.static:
            return "activations have no fixed scales"
        if spec.act.group_size not in (None, spec.in_features):
            return f"activations have a scale per group of {spec.act.group_size}, it needs one for the tensor"
        return unfit(spec, 1 << spec.act.bits)

    def note(self, spec: LinearSpec) -> str:
        held = "" if spec.integers.bits == 8 else f"; {spec.integers.bits}-bit codes are held in 8 bits"
        return f"exact int32 sums, fixed activation scales{held}"

    def lower_static(
        self,
        spec: LinearSpec,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        act_scale: Tensor,
        act_zero: Tensor | None,
    ) -> Lowered:
        weight = centred(canonical(spec, packed, scales, zeros, bias))
        tensors = {
            "weight": weight,
            "scale": scales[:, 0].to(torch.float32),
            "sums": None if act_zero is None else weight.sum(dim=1, dtype=torch.int32),
            "act_scale": act_scale[:, 0],
            "act_zero": None if act_zero is None else act_zero[:, 0].to(torch.int32),
            "bias": bias,
        }
        assert spec.act is not None
        return Lowered(torch.ops.dlqc_cpu.int8_mm_static.default, tensors, (spec.act.bits,))
