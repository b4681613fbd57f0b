"""R3: rotate queries and keys after the rotary embedding (QuaRot, arXiv 2404.00456, section 4, stage 1d).

Before:  attention(q, k, v)
After:   attention(q·R, k·R, v),            R = H/√head on every head, at run time

(q·R)·(k·R)ᵀ = q·kᵀ. The rotary embedding stands between the projections and this point, so nothing folds; what is
gained is that keys are free of outlier channels where a cache or the attention itself is quantized. Without such a quantizer
the pass only costs time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc import hadamard
from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.graph import args_of, width
from dlqc.regions import attentions, insert
from dlqc.transform import Hadamard


@dataclass(frozen=True)
class RotateQk(Pass):
    """Rotate queries and keys of every head at run time."""

    name: ClassVar[str] = "rotate_qk"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for attention in attentions(ctx.nodes(graph)):
            q, k = args_of(attention)[:2]
            block = hadamard.largest_block(width(q))
            if block == 1 or q is k:
                reason = "queries are keys" if q is k else f"no Hadamard matrix has an order that divides {width(q)}"
                report.declined.append(Declined(f"%{attention.name}", reason))
                continue
            for value in (q, k):
                insert(graph, ctx.weights, value, Hadamard(width(q), block), [attention])
            report.sites += 1
            report.metrics["online"] = report.metrics.get("online", 0) + 2
        return report
