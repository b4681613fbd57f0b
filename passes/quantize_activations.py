"""Quantize the inputs of the quantized linears, on the fly.

Before:  y = linear_q(x, …)
After:   y = linear_q(quantize_act(x), …)        (linear_coded likewise)

quantize_act gives the nearest value on an integer grid whose scale is taken from x itself at run time: one scale per
token, or one per token and group of channels. Linears that read the same x share one quantizer. Lossy.

Running it twice is the same as once: an input that is quantized already is not a site.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc.contract import Context, Pass, PassReport, Plan
from dlqc.formats.activation import ActFormat
from dlqc.graph import QUANTIZED_LINEARS, args_of, call_before, is_call
from dlqc.ops import QUANTIZE_ACT


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Dynamic activation quantization in front of every quantized linear.

    Options:
        bits: width. group_size: channels per scale, None for one scale per token. symmetric: no zero point.
    """

    name: ClassVar[str] = "quantize_activations"
    needs: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "float-activations"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized-activations"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float-activations"})
    scope: ClassVar = "block"

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True

    @property
    def format(self) -> ActFormat:
        return ActFormat(self.bits, self.group_size, self.symmetric)

    def __post_init__(self) -> None:
        self.format  # noqa: B018  a wrong width or group is refused here, with the option's name

    def reaches_tail(self) -> bool:
        return True

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        for name, spec in plan.sites.items():
            reason = self.format.check(spec.in_features)
            if reason is not None:
                plan.problems.append(f"{name}: activations: {reason}")
            plan.sites[name] = dataclasses.replace(spec, act=self.format)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        quantizers: dict[fx.Node, fx.Node] = {}
        for node in ctx.nodes(graph):
            if not is_call(node, *QUANTIZED_LINEARS) or is_call(args_of(node)[0], QUANTIZE_ACT):
                continue
            x = args_of(node)[0]
            if x not in quantizers:
                quantizers[x] = call_before(
                    graph, node, QUANTIZE_ACT, (x, self.bits, self.group_size or 0, self.symmetric)
                )
            node.replace_input_with(x, quantizers[x])
            report.sites += 1
        report.metrics["quantizers"] = len(quantizers)
        return report
