"""Sums of sign planes by 16-bit activations (DAQ): one product over all planes (device/weight_only.py with 1 bit).

    y = Σ_p r_p ∘ (B_p · (c_p ∘ x_p)) + b + r,    B_p in {-1, +1} [N, g], x_p = the features of the group that plane p is in

Column scales are put into the activations, x̃ = (c_0 ∘ x_0, c_1 ∘ x_1, …) [M, P·g], so that what is left is a weight of one bit
with a scale for each row and plane: 2r · (bit - ½). Groups may have different numbers of planes.

Shapes:  x [..., K]; low as of `packing.arrange` with 1 bit, of the planes side by side, [N, P·g]; rows 2r [P, N'], N' being N
         padded to 128; columns float32 [P, g]; groups int32 [P]; bias [N] or None; residual r [..., N] or None → [..., N].
Dtypes:  x̃ is rounded once, to the dtype of the product (as of `weight_only`); row scales and sums are float32.
Requires: groups that 32 divides.

Each plane costs a product as large as the weight's, so this saves memory; it saves time while that waits for the memory.
Elsewhere than on a GPU the op computes the definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.coded import encode, weight_of
from dlqc.formats.planes import PlanesFormat, PlanesWeight
from dlqc.kernels.reference.coded import Coded
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, rows
from dlqc.kernels.triton import packing, runtime
from dlqc.kernels.triton.device import rows as device
from dlqc.kernels.triton.rows import warps
from dlqc.kernels.triton.weight_only import Packed, product


@torch.library.custom_op("dlqc_triton::planes", mutates_args=())
def planes(
    x: Tensor,
    low: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32)).to(x.dtype)
    count, size = column_scales.shape
    packed = Packed(low, row_scales, None, count * size, out_features, 1, size)
    return product(x, spread(flat, column_scales, groups), packed, bias, residual)


@planes.register_fake
def _(
    x: Tensor,
    low: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
    residual: Tensor | None = None,
) -> Tensor:
    return blank(x, in_features, out_features)


PLANES = torch.ops.dlqc_triton.planes.default


def spread(x: Tensor, columns: Tensor, groups: Tensor) -> Tensor:
    """x̃ [M, P·g] of x [M, K]."""
    m, (count, size) = x.shape[0], columns.shape
    if not runtime.launchable(x):
        wide = x if x.dtype == torch.float64 else x.float()
        chosen = wide.reshape(m, -1, size).index_select(1, groups)
        return (chosen * columns.to(wide.dtype)).reshape(m, -1)
    x = x if x.stride(1) == 1 else x.contiguous()
    found = torch.empty(m, count * size, dtype=runtime.product_dtype(x), device=x.device)
    width = 1 << (size - 1).bit_length()
    with runtime.on(x):
        device.spread[m, count](x, columns, groups, found, x.stride(0), G=size, WIDTH=width, num_warps=warps(width))
    return found


@dataclass(frozen=True)
class Planes:
    """Sums of sign planes by activations in 16 bits."""

    name: str = "planes"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := Coded().supports(spec)) is not None:
            return reason
        if not isinstance(spec.weight, PlanesFormat):
            return f"{spec.weight.label} has no sign planes"
        size = spec.weight.group_size or spec.in_features
        if size % packing.RUN:
            return f"groups of {size} are not a multiple of {packing.RUN}"
        return runtime.unavailable()

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        return f"16-bit products of scaled activations, one a plane; float32 sums{act}"

    def lower_coded(self, spec: LinearSpec, parts: Mapping[str, Tensor], bias: Tensor | None) -> Lowered:
        assert isinstance(spec.weight, PlanesFormat)
        Coded().lower_coded(spec, parts, bias)  # refuses what does not fit
        n, k = spec.out_features, spec.in_features
        stored = weight_of(encode(spec.weight), [parts[role] for role in sorted(parts)], n, k)
        assert isinstance(stored, PlanesWeight)
        of_groups = stored.codes.reshape(n, len(stored.orders), -1)
        groups = [group for group, order in enumerate(stored.orders) for _ in range(order)]
        places = [bit for order in stored.orders for bit in range(order)]
        bits = torch.stack([of_groups[:, g] >> b & 1 for g, b in zip(groups, places, strict=True)], 1).flatten(1)
        size = of_groups.shape[2]
        tensors = {
            "low": packing.arrange(bits, 1, packing.run_of(1, bits.shape[1], size)),
            "row_scales": packing.columns(2 * stored.row_scales),
            "column_scales": stored.column_scales.to(torch.float32).contiguous(),
            "groups": torch.tensor(groups, dtype=torch.int32, device=bits.device),
            "bias": None if bias is None else bias.to(torch.float32).contiguous(),
        }
        return Lowered(PLANES, {**tensors}, (k, n, *act_scalars(spec.act)))
