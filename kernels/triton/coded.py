"""Weights in formats that are not integers by 16-bit activations: NF4, codebooks, FP8 (device/weight_only.py).

    y = x̂ · Ŵᵀ + b + r,    Ŵ by format:   nf4        level[code] · scale of the block
                                      codebook   table of the row and group [code]
                                      fp8        code as E4M3 · scale of the tensor, channel or block

Shapes, dtypes, layout and order: as of `weight_only`; tables are float32 and their entries are rounded to the dtype of the
product. Entries are read through the first-level cache, one load a weight, so these formats save memory rather than time. E4M3 is
decoded from its bits and needs no FP8 instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.codebook import CodebookFormat, CodebookWeight
from dlqc.formats.coded import encode, weight_of
from dlqc.formats.fp8 import BLOCK, Fp8Format, Fp8Weight
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format, Nf4Weight, levels
from dlqc.kernels.reference.coded import Coded
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, rows
from dlqc.kernels.triton import packing, runtime
from dlqc.kernels.triton.weight_only import FLOAT8, PER_GROUP, SHARED, Packed, product


@torch.library.custom_op("dlqc_triton::coded", mutates_args=())
def coded(
    x: Tensor,
    low: Tensor,
    scales: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    code: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """See the module docstring. `group` is 0 for one scale or table per channel; `code` as in `Packed`."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32)).to(x.dtype)
    packed = Packed(low, scales, None, in_features, out_features, bits, group or in_features, code, table)
    return product(x, flat, packed, bias, residual)


@coded.register_fake
def _(
    x: Tensor,
    low: Tensor,
    scales: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    code: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
    residual: Tensor | None = None,
) -> Tensor:
    return blank(x, in_features, out_features)


CODED = torch.ops.dlqc_triton.coded.default


@dataclass(frozen=True)
class CodedWeights:
    """NF4, codebooks and FP8 by activations in 16 bits."""

    name: str = "coded_weights"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := Coded().supports(spec)) is not None:
            return reason
        fmt, k = spec.weight, spec.in_features
        if not isinstance(fmt, Nf4Format | CodebookFormat | Fp8Format):
            return f"it has no code for {fmt.label}"
        if isinstance(fmt, CodebookFormat) and fmt.sparse:
            return f"{fmt.label} has a sparse part"
        size = _group(fmt) or k
        if size != k and size % packing.RUN:
            return f"groups of {size} are not a multiple of {packing.RUN}"
        return runtime.unavailable()

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        return f"16-bit products, float32 sums; float32 activations are rounded to bfloat16 on a GPU{act}"

    def lower_coded(self, spec: LinearSpec, parts: Mapping[str, Tensor], bias: Tensor | None) -> Lowered:
        assert not isinstance(spec.weight, IntFormat)
        Coded().lower_coded(spec, parts, bias)  # refuses what does not fit
        n, k = spec.out_features, spec.in_features
        stored = weight_of(encode(spec.weight), [parts[role] for role in sorted(parts)], n, k)
        scales: Tensor | None = None
        table: Tensor | None = None
        if isinstance(stored, Nf4Weight):
            codes, bits, code = stored.codes, 4, SHARED
            scales, table = packing.columns(stored.block_scales()), levels().to(codes.device)
        elif isinstance(stored, CodebookWeight):
            codes, bits, code = stored.codes, stored.format.bits, PER_GROUP
            entries = [packing.columns(entry.to(torch.float32)) for entry in stored.tables.unbind(-1)]
            table = torch.stack(entries, -1).contiguous()
        else:
            assert isinstance(stored, Fp8Weight)
            codes, bits, code = stored.codes.view(torch.uint8), 8, FLOAT8
            scale = (
                stored.scales
                if stored.format.unit == "channel"
                else stored.scales.repeat_interleave(BLOCK if stored.format.unit == "block" else n, 0)
            )
            scales = packing.columns(scale[:n])
        held = None if bias is None else bias.to(torch.float32).contiguous()
        tensors = {
            "low": packing.arrange(codes, bits, packing.run_of(bits, k, _group(spec.weight) or k)),
            "scales": scales,
            "table": table,
            "bias": held,
        }
        group = 0 if _group(spec.weight) in (None, k) else _group(spec.weight) or 0
        scalars = (k, n, bits, group, code, *act_scalars(spec.act))
        return Lowered(CODED, tensors, scalars)


def _group(fmt: object) -> int | None:
    """Input features that share parameters; None for all of a row."""
    if isinstance(fmt, Nf4Format):
        return fmt.block
    if isinstance(fmt, Fp8Format):
        return BLOCK if fmt.unit == "block" else None
    return fmt.group_size if isinstance(fmt, CodebookFormat) else None
