"""Store codes as dense bit streams.

Before:  linear_q(x, codes uint8 [N, K], scales, zeros uint8 [N, G], b)
After:   linear_packed(x, packed uint8 [N, ⌈K·bits/32⌉·4], scales, zeros packed the same way, b)

A weight in another format is stored packed by `quantize_weights` at once (linear_coded), and is no site.

Layout "rows" of `dlqc.formats.packing`: each row is a little-endian bit stream along the input features, padded to whole
32-bit words. Exact: unpacking gives the codes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc.contract import Context, Pass, PassReport
from dlqc.formats.packing import pack
from dlqc.graph import args_of, call_before, constant_name, is_call, read, replace, sweep
from dlqc.ops import LINEAR_PACKED, LINEAR_Q


@dataclass(frozen=True)
class Pack(Pass):
    """Pack the codes and zero points of every quantized linear."""

    name: ClassVar[str] = "pack"
    needs: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"packed"})
    preserves: ClassVar = "exact"
    scope: ClassVar = "block"

    def reaches_tail(self) -> bool:
        return True

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        before = after = 0
        for node in ctx.nodes(graph):
            if not is_call(node, LINEAR_Q):
                continue
            x, codes, scales, zeros, bias, bits, group = args_of(node)
            parts: list[fx.Node | None] = []
            for part in (codes, zeros):
                name = constant_name(part)
                if name is None:
                    parts.append(None)
                    continue
                packed = f"{name}_packed"
                if packed not in ctx.weights:
                    ctx.weights.put(packed, pack(ctx.weights.value(name), bits))
                    before += ctx.weights[name].leaf.numel()
                    after += ctx.weights[packed].leaf.numel()
                parts.append(read(graph, ctx.weights, packed, node))
            args = (x, parts[0], scales, parts[1], bias, bits, group)
            replace(node, call_before(graph, node, LINEAR_PACKED, args))
            report.sites += 1
        sweep(graph, ctx.weights)
        report.metrics |= {"bytes_unpacked": before, "bytes_packed": after}
        return report
