"""Quantize the inputs of the quantized linears.

Before:  y = linear_q(x, …)
After:   y = linear_q(quantize_act(x), …)                                 scales from x at run time   (linear_coded likewise)
         y = linear_q(quantize_act_static(x, scale, zero, bucket), …)     fixed scales, with ranges=

The nearest value on an integer grid. Dynamic: the scale is taken from x itself, one per token, or one per token and group of
channels. Static: the scale comes from a range that an estimator found on the denoising states (`dlqc.ranges`), one for the
tensor, or one for each group of channels, and numbers beyond it are clamped. Linears that read the same x share one quantizer.
Lossy.

A denoiser's activations change with the share of [MASK] on the canvas. With `buckets`, each part of the way has ranges of its
own, taken from the states of that part; a row finds its set at run time from the share of [MASK] among its ids, in the graph. A
bucket without states borrows from its neighbour, and the report says so: choose a sampler that reaches all mask ratios
(`forward_process`, `rollout`; `masked_simulation` leaves a visible prefix).

A fixed scale for each channel is refused (group_size=1): channels are what a linear sums over, and their scales would not come
out of the integer sum. It is had by folding: `smooth(alpha=1.0)` gives all channels one range, exactly, then one scale does.

Running it twice is the same as once: an input that is quantized already is not a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc.contract import Context, Pass, PassReport, Plan
from dlqc.errors import RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.graph import (
    ACT_QUANTIZERS,
    QUANTIZED_LINEARS,
    args_of,
    call_before,
    is_call,
    linears,
    read,
    site_name,
    width,
)
from dlqc.observers import MaskRatios, Observer, RangeObserver, layout
from dlqc.ops import QUANTIZE_ACT, QUANTIZE_ACT_STATIC
from dlqc.ranges import Ranges, fixed_scales, inner_edges
from dlqc.static import bucket_of, summary, unique_names


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Activation quantization in front of every quantized linear.

    Options:
        bits: width. group_size: channels per scale, None for one scale per token (dynamic) or one for the tensor (static).
        symmetric: no zero point.
        ranges: the estimator of fixed ranges; None takes scales from x at run time.
        buckets: of mask ratio, each with fixed ranges of its own: how many, of equal width, or the ratios between them.
    """

    name: ClassVar[str] = "quantize_activations"
    needs: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "float-activations"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized-activations"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float-activations"})
    scope: ClassVar = "block"

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    ranges: Ranges | None = None
    buckets: int | tuple[float, ...] = 1

    @property
    def format(self) -> ActFormat:
        sets = 0 if self.ranges is None else len(self.edges) + 1
        return ActFormat(self.bits, self.group_size, self.symmetric, sets)

    @property
    def edges(self) -> tuple[float, ...]:
        return inner_edges(self.buckets, "quantize_activations.buckets")

    def __post_init__(self) -> None:
        self.format  # noqa: B018  a wrong width or group is refused here, with the option's name
        if self.ranges is None and self.edges:
            raise RecipeError(
                "scales that are taken from x at run time know no buckets",
                where="quantize_activations.buckets",
                remedy="Name an estimator, such as ranges=percentile, or leave buckets out",
            )
        if self.ranges is not None and self.group_size == 1:
            raise RecipeError(
                "a fixed scale for each channel does not come out of a linear's sum over channels",
                where="quantize_activations.group_size",
                remedy="Fold the scales into the weights with smooth(alpha=1.0), and use group_size=None",
            )

    def needed_facts(self) -> frozenset[str]:
        return self.needs | (set() if self.ranges is None else {"states"})

    def reaches_tail(self) -> bool:
        return True

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        rows = {site.name: layout(site.x) for site in linears(graph.nodes, ctx.weights)}
        for name, spec in plan.sites.items():
            reason = self.format.check(spec.in_features)
            if reason is None and self.edges and rows.get(name, "tokens") not in ("tokens", "length first", "flat"):
                reason = "rows are other than the tokens, and have no mask ratio (use buckets=1)"
            if reason is not None:
                plan.problems.append(f"{name}: activations: {reason}")
            plan.sites[name] = dataclasses.replace(spec, act=self.format)

    def observers(self, graph: fx.Graph, ctx: Context) -> dict[str, Observer]:
        if self.ranges is None:
            return {}
        ratios, found = MaskRatios(ctx.spec.mask_id, self.edges), dict[str, Observer]()
        for name, readers in values(ctx.nodes(graph)):
            x = args_of(readers[0])[0]
            seen = self.ranges.seen(ratios.sets, width(x) // (self.group_size or width(x)), self.format)
            found[name] = RangeObserver(x, f"input of {name}", seen, ratios)
        return found

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        found = list(values(ctx.nodes(graph)))
        for name, readers in found:
            x = args_of(readers[0])[0]
            if self.ranges is None:
                args = (x, self.bits, self.group_size or 0, self.symmetric)
                quantizer = call_before(graph, readers[0], QUANTIZE_ACT, args)
            else:
                quantizer = self._fixed(x, readers[0], name, graph, ctx, report)
            for node in readers:
                node.replace_input_with(x, quantizer)
            report.sites += len(readers)
        report.metrics["quantizers"] = len(found)
        if self.ranges is not None and report.sites:
            report.notes.append(f"inputs of linears are {self.format.label}, ranges by {self.ranges.name}")
        return report

    def _fixed(
        self, x: fx.Node, reader: fx.Node, name: str, graph: fx.Graph, ctx: Context, report: PassReport
    ) -> fx.Node:
        """A quantizer with fixed scales in front of a reader."""
        observer = ctx.observed[name]
        assert self.ranges is not None
        assert isinstance(observer, RangeObserver)
        low, high = self.ranges.estimate(observer.seen, self.format)
        fixed = fixed_scales(observer.seen, low, high, self.format, f"input of {name}")
        report.note(*fixed.notes)
        report.details[name] = summary(fixed, observer.seen)
        parts: list[fx.Node | None] = []
        for role, tensor in (("input_scale", fixed.scale), ("input_zero_point", fixed.zero)):
            if tensor is not None:
                ctx.weights.put(f"{name}.{role}", tensor)
            parts.append(None if tensor is None else read(graph, ctx.weights, f"{name}.{role}", reader))
        bucket = bucket_of(graph, ctx.spec.mask_id, self.edges, reader, layout(x))
        return call_before(graph, reader, QUANTIZE_ACT_STATIC, (x, *parts, bucket, self.bits))


def values(nodes: list[fx.Node]) -> Iterator[tuple[str, list[fx.Node]]]:
    """The quantized linears by the unquantized value that they read, with a name for it: that of the first of them.

    A module that is called several times reads several values: from the second on they have a number.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if is_call(node, *QUANTIZED_LINEARS) and not is_call(args_of(node)[0], *ACT_QUANTIZERS):
            readers.setdefault(args_of(node)[0], []).append(node)
    yield from unique_names((site_name(first), [first, *others]) for first, *others in readers.values())
