"""Weights in formats that are not integers, in native code (csrc/linear16.cpp): made float32 a slice at a time.

    y = x · Ŵᵀ + b,    Ŵ by format:   nf4        level[code] · scale of the block
                                      codebook   table of the row and group [code]
                                      planes     Σ_p ±row scale · column scale, + where bit p of the code is set

Shapes:  x [..., K]; codes uint8 [panels, 192·⌈K/32⌉·bits] (csrc/weights.h); then what the format has:
         nf4        scales float32 [panels, G, 48], table float32 [16]
         codebook   table float32 [panels, G, 2^bits, 48]
         planes     rows float32 [panels, P, 48], columns float32 [P, g], first int32 [G + 1], the first plane of each group
         and bias float32 [N] if there is one → [..., N].
Dtypes:  everything is float32, whatever x is; then the dtype of x. Activations that the site quantizes are replaced by the
         values that their codes stand for.
Requires: groups that 32 divides, or one group a row; no sparse part; a C++ compiler (or a library in the cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.codebook import CodebookFormat, CodebookWeight
from dlqc.formats.coded import encode, weight_of
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format, Nf4Weight, levels
from dlqc.formats.planes import PlanesFormat, PlanesWeight
from dlqc.kernels.cpu import build, selfcheck
from dlqc.kernels.cpu.linear16 import product
from dlqc.kernels.reference.coded import Coded
from dlqc.kernels.reference.layout import act_scalars, blank

KINDS = {"nf4": 1, "codebook": 2, "planes": 3}


@torch.library.custom_op("dlqc_cpu::coded16", mutates_args=())
def coded16(
    x: Tensor,
    tensors: list[Tensor],
    kind: str,
    has_bias: bool,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    """See the module docstring. `group` is 0 for one group a row."""
    if not x.numel():
        return blank(x, in_features, out_features)
    held = [part.to(torch.float32) if part.is_floating_point() else part for part in tensors]  # a module may be moved
    where = [part.data_ptr() for part in held]
    scales: int | None = None
    table: int | None = None
    own: tuple[int, ...] = ()
    if kind == "nf4":
        scales, table = where[1], where[2]
    elif kind == "codebook":
        table = where[1]
    else:
        own = (where[1], where[2], where[3])
    weight = build.Weight(
        *(out_features, in_features, group or in_features, where[0], scales, None, where[-1] if has_bias else None),
        *(bits, 0, KINDS[kind], table, *own),
    )
    return product(x, weight, act_bits, act_group, act_symmetric)


@coded16.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],
    kind: str,
    has_bias: bool,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    return blank(x, in_features, out_features)


@dataclass(frozen=True)
class Coded16:
    """Normal floats, codebooks and sign planes, in native code."""

    name: str = "coded16"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := Coded().supports(spec)) is not None:
            return reason
        fmt, k = spec.weight, spec.in_features
        if not isinstance(fmt, Nf4Format | CodebookFormat | PlanesFormat):
            return f"it has no code for {fmt.label}"
        if isinstance(fmt, CodebookFormat) and fmt.sparse:
            return f"{fmt.label} has a sparse part"
        size = _group(fmt) or k
        if size != k and size % build.BLOCK:
            return f"groups of {size} are not a multiple of {build.BLOCK}"
        return build.unavailable("linear16") or selfcheck.native("linear16", build.options())

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        return f"native code, {build.isa('linear16')}; float32 product{act}"

    def lower_coded(self, spec: LinearSpec, parts: Mapping[str, Tensor], bias: Tensor | None) -> Lowered:
        assert not isinstance(spec.weight, IntFormat)
        Coded().lower_coded(spec, parts, bias)  # refuses what does not fit
        n, k = spec.out_features, spec.in_features
        stored = weight_of(encode(spec.weight), [parts[role] for role in sorted(parts)], n, k)
        if isinstance(stored, Nf4Weight):
            kind, bits = "nf4", 4
            held = {"scales": build.in_panels(stored.block_scales()), "table": levels().float()}
        elif isinstance(stored, CodebookWeight):
            kind, bits = "codebook", stored.format.bits
            entries = [build.in_panels(stored.tables[..., e].float()) for e in range(1 << bits)]
            held = {"table": torch.stack(entries, 2)}
        else:
            assert isinstance(stored, PlanesWeight)
            kind, bits = "planes", 3 if max(stored.orders) > 2 else 2
            first = torch.tensor([0, *stored.orders], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            held = {
                "rows": build.in_panels(stored.row_scales.float()),
                "columns": stored.column_scales.float().contiguous(),
                "first": first,
            }
        tensors: dict[str, Tensor | None] = {"codes": build.arrange(stored.codes, bits, "linear16"), **held}
        if bias is not None:
            tensors["bias"] = bias.to(torch.float32).contiguous()
        group = 0 if _group(spec.weight) in (None, k) else _group(spec.weight) or 0
        scalars = (kind, spec.has_bias, k, n, bits, group, *act_scalars(spec.act))
        return Lowered(torch.ops.dlqc_cpu.coded16.default, tensors, scalars, listed=True)


def _group(fmt: object) -> int | None:
    """Input features that share parameters; None for all of a row."""
    if isinstance(fmt, Nf4Format):
        return fmt.block
    return fmt.group_size if isinstance(fmt, CodebookFormat | PlanesFormat) else None
