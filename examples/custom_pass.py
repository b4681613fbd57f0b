"""A pass of your own in about thirty lines.

Run it:      python examples/custom_pass.py
In a recipe: examples.custom_pass.SpellSilu, quantize_weights(method=rtn), pack, lower
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

import dlqc
from dlqc.graph import aten, call_before, is_call, replace


@dataclass(frozen=True)
class SpellSilu(dlqc.Pass):
    """Before: silu(x).  After: x·sigmoid(x).  Exact, so the compiler measures a certificate in float64."""

    name: ClassVar[str] = "spell_silu"
    preserves: ClassVar = "exact"

    def apply(self, graph: fx.Graph, ctx: dlqc.Context) -> dlqc.PassReport:
        report = dlqc.PassReport()
        for node in ctx.nodes(graph):
            if not is_call(node, aten.silu.default):
                continue
            x = node.args[0]
            gate = call_before(graph, node, aten.sigmoid.default, (x,))
            replace(node, call_before(graph, node, aten.mul.Tensor, (x, gate)))
            report.sites += 1
        return report


if __name__ == "__main__":
    model = dlqc.load_model("tiny-llada")
    print(dlqc.compile(model, passes=(SpellSilu(),), progress=False).explain())
