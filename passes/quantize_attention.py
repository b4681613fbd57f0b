"""Quantize what attentions read: queries, keys, values, and the probabilities between.

Before:  sdpa(q, k, v, mask)
After:   sdpa(Q(q), Q(k), Q(v), mask)                   each by choice
         attention(Q(q), Q(k), Q(v), mask; bits)        with probabilities=, which the one op of torch does not show

Queries and keys are taken as the attention reads them, after rotary embeddings and whatever else. Scales are dynamic or fixed
(`dlqc.heads`); values can have those of IA-AQ, which weigh tokens by how much they are looked at.

Probabilities are softmax(q·kᵀ·scale + mask) spelled out, rounded to unsigned codes of the static scale 1/(2^b - 1): their range
is known. Rounded as they are, what is below half a step is lost: an even attention over more than 2(2^b - 1) tokens is all zeros.
`by_row=True` rounds exp(score - largest of the row) instead, before the row is divided by its sum, as fused kernels do. Grouped
queries and masks are as they were; the definition without rounding is what torch computes, up to float rounding.

Lossy. May come before or after `quantize_weights`: before it, weights are rounded for values that are quantized already, which is
the order of DLLMQuant. No kernel runs these quantizers yet: both backends compute them by their definition.

Declines an attention whose queries, keys and values are not laid out [batch, heads, length, width]. Running it twice is the
same as once: an attention that reads quantized values is not a site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from dlqc.attention_sites import sites, unfit
from dlqc.contract import Context, Declined, Pass, PassReport, Plan
from dlqc.errors import RecipeError
from dlqc.graph import (
    arg,
    args_of,
    call_before,
    replace,
)
from dlqc.heads import Dynamic, IaAq, Static, parts_of, shape_of, static_format
from dlqc.observers import AttendedObserver, Observer, RangeObserver
from dlqc.ops import ATTENTION, QUANTIZE_HEADS, QUANTIZE_HEADS_STATIC
from dlqc.ranges import fixed_scales
from dlqc.regions import attentions
from dlqc.static import bucket_of, scale_nodes, summary


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Quantize queries, keys, values and probabilities of every attention.

    Options:
        queries, keys, values: widths, None leaves them as they are.
        probabilities: width of the unsigned codes of the softmax's result, None leaves it as it is.
        qk: scales of queries and keys. v: scales of values.
        by_row: round probabilities before they are divided by the sum of their row.
    """

    name: ClassVar[str] = "quantize_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-attention"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized-attention"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float-attention"})
    scope: ClassVar = "block"

    queries: int | None = None
    keys: int | None = 8
    values: int | None = 8
    probabilities: int | None = None
    qk: Dynamic | Static = field(default_factory=Dynamic)
    v: Dynamic | Static | IaAq = field(default_factory=Dynamic)
    by_row: bool = False

    def __post_init__(self) -> None:
        if not any(bits is not None for bits in (*self.widths.values(), self.probabilities)):
            remedy = "Give a width for queries, keys, values or probabilities"
            raise RecipeError("nothing is quantized", where="quantize_attention", remedy=remedy)
        for part, bits in (*self.widths.items(), ("probabilities", self.probabilities)):
            if bits is not None and not 2 <= bits <= 8:
                remedy = "Use 2 to 8, or none to leave them as they are"
                raise RecipeError(f"{bits} is not a width", where=f"quantize_attention.{part}", remedy=remedy)
        if isinstance(self.qk, Static) and self.qk.per == "channel":
            raise RecipeError(
                "fixed scales of queries and keys by channel do not come out of the sum over channels in q·kᵀ",
                where="quantize_attention.qk",
                remedy="Use per=head",
            )

    @property
    def widths(self) -> dict[str, int | None]:
        return {"queries": self.queries, "keys": self.keys, "values": self.values}

    def scheme(self, part: str) -> Dynamic | Static | IaAq:
        return self.v if part == "values" else self.qk

    def needed_facts(self) -> frozenset[str]:
        schemes = (self.scheme(part) for part, bits in self.widths.items() if bits is not None)
        return self.needs | ({"states"} if any(not isinstance(s, Dynamic) for s in schemes) else set())

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        inside = {node for block in ctx.blocks for node in block.nodes(graph)}
        if self.required and not any(node in inside for node in attentions(list(graph.nodes))):
            plan.problems.append("quantize_attention: the repeated blocks hold no scaled dot-product attention")

    def observers(self, graph: fx.Graph, ctx: Context) -> dict[str, Observer]:
        found: dict[str, Observer] = {}
        for name, node in sites(ctx.nodes(graph)):
            for part, value in self._chosen(node) if unfit(node) is None else ():
                scheme, bits = self.scheme(part), self.widths[part]
                if not isinstance(scheme, Dynamic) and bits is not None:
                    observed = scheme.observer(node, value, f"{name}.{part}", bits, ctx.spec.mask_id)
                    found[f"{name}.{part}"] = observed
        return found

    def _chosen(self, node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
        yield from ((part, value) for part, value in parts_of(node).items() if self.widths[part] is not None)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for name, node in list(sites(ctx.nodes(graph))):
            reason = unfit(node)
            if reason is not None:
                report.declined.append(Declined(name, reason))
                continue
            made = parts_of(node)
            for part, value in self._chosen(node):
                made[part] = self._quantizer(part, value, node, name, graph, ctx, report)
            node.args = (*made.values(), *args_of(node)[3:])
            if self.probabilities is not None:
                mask, causal = arg(node, 3, "attn_mask"), bool(arg(node, 5, "is_causal", False))
                rest = (mask, causal, node.kwargs.get("scale"), self.probabilities, self.by_row)
                replace(node, call_before(graph, node, ATTENTION, (*made.values(), *rest)))
            report.sites += 1
        if report.sites:
            report.notes.append(f"attentions read {self.label}")
        return report

    def _quantizer(
        self, part: str, value: fx.Node, node: fx.Node, name: str, graph: fx.Graph, ctx: Context, report: PassReport
    ) -> fx.Node:
        """A quantizer of one of the values that an attention reads, in front of it."""
        scheme, bits, where = self.scheme(part), self.widths[part], f"{name}.{part}"
        assert bits is not None
        if isinstance(scheme, Dynamic):
            return call_before(graph, node, QUANTIZE_HEADS, (value, bits, scheme.symmetric, scheme.per == "token"))
        observer = ctx.observed[where]
        assert isinstance(observer, RangeObserver | AttendedObserver)
        fixed = fixed_scales(observer.seen, *scheme.estimate(observer.seen, bits), static_format(scheme, bits), where)
        report.note(*fixed.notes)
        report.details[where] = summary(fixed, observer.seen)
        parts = scale_nodes(graph, ctx.weights, fixed, f"{where}.", node, shape_of(scheme, value))
        bucket = bucket_of(graph, ctx.spec.mask_id, scheme.edges, node)
        return call_before(graph, node, QUANTIZE_HEADS_STATIC, (value, *parts, bucket, bits))

    @property
    def label(self) -> str:
        """The scheme in words."""
        said = [f"{part} in {bits} bits {self.scheme(part).label}" for part, bits in self.widths.items() if bits]
        if self.probabilities is not None:
            top = (1 << self.probabilities) - 1
            where = "exp(score - largest of the row)" if self.by_row else "probabilities"
            said.append(f"{where} in {self.probabilities} unsigned bits, scale 1/{top}")
        return "; ".join(said)
