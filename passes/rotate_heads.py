"""R2: rotate the values of each attention head (QuaRot, arXiv 2404.00456, section 4, stage 1c; SpinQuant's R2).

Before:  linear(attention(·, linear(x, W_v, b_v)), W_o)
After:   linear(attention(·, linear(x, RᵀW_v, b_v·R)), W_o·R),            R = I_heads ⊗ H/√head

attention mixes rows, not channels: softmax(…)·(v·R) = (softmax(…)·v)·R for an R that stays within the heads. With
grouped queries the rotation of a KV head is undone for each of its query heads. across=True goes on to mix the
heads, H_heads ⊗ I, which has to happen at run time before W_o: with both, the input of W_o sees a full Hadamard matrix.

Differences from the official code: the bias of the values is rotated, too, and grouped queries are right.

Declines an attention whose values do not close (`dlqc.regions`): values that are read elsewhere, or that are also the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc import hadamard
from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.graph import args_of
from dlqc.regions import Refused, Region, attentions, fold, keep_online, readers, value_heads
from dlqc.transform import Hadamard, Identity, Kronecker, per_head


@dataclass(frozen=True)
class RotateHeads(Pass):
    """Rotate the values within each head, and optionally across heads.

    Options:
        across: also mix the heads by a Hadamard matrix at run time (one op before the output projection).
    """

    name: ClassVar[str] = "rotate_heads"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    across: bool = False

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        inside = set(ctx.nodes(graph))
        for attention in attentions(ctx.nodes(graph)):
            region = value_heads(graph, ctx.weights, attention, "orthogonal")
            if isinstance(region, Refused):
                report.declined.append(Declined(f"values of %{attention.name}", str(region)))
                continue
            outside = next((value for value in region.carries if value not in inside), None)
            if outside is not None:
                reason = f"the rotation would reach %{outside.name}, outside of the block"
                report.declined.append(Declined(f"values of %{attention.name}", reason))
                continue
            size = region.width // region.heads
            rotation = Hadamard(size, hadamard.largest_block(size))
            fold(ctx.weights, region, per_head(rotation, region.heads))
            report.sites += 1
            if self.across:
                self.mix(attention, region, graph, ctx, report)
        return report

    def mix(self, attention: fx.Node, region: Region, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        """Put H_heads ⊗ I before the linear that reads all heads side by side."""
        heads = int(args_of(attention)[0].meta["val"].shape[1])
        across = Kronecker(Hadamard(heads, hadamard.largest_block(heads)), Identity(region.width // region.heads))
        for value in {node for a in region.sinks for node in a.by.all_input_nodes if node in region.carries}:
            found = readers(graph, ctx.weights, value, "orthogonal")
            if isinstance(found, Refused):
                report.declined.append(Declined(f"%{value.name}", str(found)))
                continue
            keep_online(graph, ctx.weights, found, across)
            report.metrics["online"] = report.metrics.get("online", 0) + 1
