"""The quantized linear in plain PyTorch, the judge of all other kernels.

    y = x̂ · Ŵᵀ + b,    Ŵ = (codes - zero) · scale,    x̂ = x, or what the codes of x stand for

Shapes:  x [..., K], codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None, bias [N] or None → [..., N].
Dtypes:  everything is computed in float32, or in float64 if x is float64; the result has the dtype of x. The codes of
         x are those of `ActFormat.quantize_dynamic`, which works in float32; they are multiplied by their scale in the
         wide dtype, so that in float64 no rounding follows the two quantizers.
Layout:  none: codes are unpacked, one byte each.
Requires nothing: every width, group, zero point, shape, stride and device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, canonical, misfit, outcome, rows


@torch.library.custom_op("dlqc_reference::linear", mutates_args=())
def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    """The definition; see the module docstring. `bits` gives the zero point 2^(bits-1) where `zeros` is None."""
    if not x.numel():
        return blank(x, codes.shape[1], codes.shape[0])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = rows(x, codes.shape[1]).to(wide)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = _scaled(*act.quantize_dynamic(flat), wide)
    points = zeros if zeros is not None else torch.full_like(scales, 1 << (bits - 1))
    return outcome(flat @ _scaled(codes, scales, points, wide).T, bias, x)


@linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    return blank(x, codes.shape[1], codes.shape[0])


def _scaled(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(codes - zeros) · scales for codes [R, K] and parameters [R, G], a group being K/G neighbours."""
    count, groups = scales.shape
    values = codes.to(dtype).reshape(count, groups, codes.shape[1] // groups)
    if zeros is not None:
        values = values - zeros.to(dtype).unsqueeze(-1)
    return (values * scales.to(dtype).unsqueeze(-1)).reshape(codes.shape)


@dataclass(frozen=True)
class ReferenceLinear:
    """Runs every quantized linear that the formats can say, slowly."""

    name: str = "reference"

    def supports(self, spec: LinearSpec) -> str | None:
        return misfit(spec)

    def note(self, spec: LinearSpec) -> str:
        return f"the definition in plain PyTorch; {spec.integers.bits}-bit codes are held in 8 bits"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        weight = canonical(spec, packed, scales, zeros, bias)
        tensors = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
        return Lowered(torch.ops.dlqc_reference.linear.default, tensors, (spec.integers.bits, *act_scalars(spec.act)))
