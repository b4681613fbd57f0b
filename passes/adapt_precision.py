"""Read nested weights, and round activations, in as many bits as the mask ratio of the step needs.

Before:  y = linear_coded(x, planes, b; nested)                       all planes, in every forward
         y = linear(quantize_act(x; bits), …)                         one width, in every forward
After:   y = linear_nested(x, planes, b; nested, bucket, widths)      the upper planes of widths[bucket], with scales of their own
         y = linear(quantize_act_adaptive(x; bucket, act_widths), …)  codes of act_widths[bucket] bits, scales from x

The bucket is that of the row's mask ratio (`dlqc::mask_bucket`), taken once in a graph, so full forwards and cached steps of
decoding, metrics, and a loaded artifact obey the same schedule, and a row does not know its batch. One weight is stored. The mask
ratio is the share of [MASK] among the tokens that a sampler is to fill, see `dlqc.precision`.

Without `widths` the schedule is searched, and with `act_bits` that of activations likewise: the states are run at each pair of
widths, KL(model as captured || this one) is taken at their masked positions by bucket, and the schedule of least bit operations
within `budget` is exact for these numbers (`dlqc.precision`). Weights and activations are searched together: what one leaves of
the budget the other may use. The search takes all linears at one width together, and buckets by themselves: errors of earlier
steps are not carried on to later ones.

Lossy, by what is measured. No kernel reads planes or rounds to several widths yet: both backends compute the definitions, which
unpack the planes of the width and no more, and multiply rounded activations as floats. Comes behind what quantizes weights and
activations, in front of `pack` and `lower`. What attentions read keeps its width.

Declines quantizers whose rows are other than the tokens: they have no mask ratio. Weights in other formats and activations with
fixed scales are no sites. Running it twice finds no site.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from dlqc.contract import Context, Declined, Pass, PassReport, Plan
from dlqc.diffusion.fidelity import divergence
from dlqc.diffusion.masking import logits_of
from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.execute import forward
from dlqc.formats.activation import ActFormat
from dlqc.formats.coded import decode
from dlqc.formats.nested import NestedFormat
from dlqc.graph import args_of, call_before, is_call, replace, width
from dlqc.observers import layout
from dlqc.ops import LINEAR_CODED, LINEAR_NESTED, QUANTIZE_ACT, QUANTIZE_ACT_ADAPTIVE, QUANTIZE_ACT_STATIC
from dlqc.precision import PrecisionSchedule, WidthPair, cheapest, check_edges, shares, write
from dlqc.static import bucket_of
from dlqc.weights import Weights

_BATCH = 8
#: Rows that have a mask ratio.
_BY_TOKEN = ("tokens", "length first", "flat")


@dataclass(frozen=True)
class AdaptPrecision(Pass):
    """Choose the planes that are read, and the bits that activations are rounded to, by mask ratio.

    Options:
        budget: the most KL from the model as captured, nats per masked position, on average over mask ratios.
        edges: mask ratios between the buckets.
        widths: bits of the weights in each bucket, the lowest mask ratio first; () leaves them as they are, None searches.
        act_bits: bits of activations that the search may choose; () searches none.
        act_widths: bits of activations in each bucket; () leaves them as they are, unless `act_bits` searches.
    """

    name: ClassVar[str] = "adapt_precision"
    needs: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"adapted-precision"})

    budget: float = 0.01
    edges: tuple[float, ...] = (0.25, 0.5, 0.75)
    widths: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] = ()
    act_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_edges(self.edges)
        if self.widths or self.act_widths or not self.searches:
            PrecisionSchedule(self.edges, self.widths or (), self.act_widths)  # refused here where they do not fit
        for bits in (*self.act_bits, *self.act_widths):
            ActFormat(bits)
        if self.act_bits and self.act_widths:
            what = "act_widths says what act_bits lets the search choose"
            raise RecipeError(what, where="adapt_precision.act_bits", remedy="Give one of the two")
        if not self.budget > 0:
            what = f"a budget of {self.budget:g} nats leaves nothing to choose"
            raise RecipeError(what, where="adapt_precision.budget", remedy="Use for example 0.01")

    @property
    def searches(self) -> bool:
        return self.widths is None or bool(self.act_bits)

    @property
    def act_choices(self) -> tuple[int, ...]:
        """Bits that activations may come to have, rising; () where they stay."""
        return tuple(sorted({*self.act_bits, *self.act_widths}))

    def needed_facts(self) -> frozenset[str]:
        facts = {"states"} if self.searches else set()
        return self.needs | facts | ({"quantized-activations"} if self.act_choices else set())

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        for name, spec in plan.sites.items():
            if self.act_choices and spec.act is not None and not spec.act.static:
                act = dataclasses.replace(spec.act, bits=self.act_choices[-1], widths=self.act_choices)
                plan.sites[name] = dataclasses.replace(spec, act=act)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        nodes, planes = _nested(graph)
        known = planes.widths if planes is not None else ()
        if self.widths and self.act_choices and not nodes:
            what, remedy = "no weight has planes to read", "Give widths=(), or quantize_weights(format=nested(...))"
            raise ContractError(what, where="adapt_precision.widths", remedy=remedy)
        for bits in self.widths or ():
            if planes is not None:
                planes.level(bits)
        weights = [] if self.widths == () else [self._read(graph, ctx, node, known[-1]) for node in nodes]
        acts = list(self._rounded(graph, ctx, report)) if self.act_choices else []
        report.sites = len(weights) + len(acts)
        if not report.sites:
            return report
        options = self._options(known if weights else (), bool(acts))
        chosen = [own[0] for own in options]
        if any(len(own) > 1 for own in options):
            table, counts = self._measure(graph, ctx, (weights, acts), options)
            sizes = [[pair.operations for pair in own] for own in options]
            found, report.metrics["kl"] = cheapest(table, sizes, self.budget, shares(self.edges))
            chosen = [own[i] for own, i in zip(options, found, strict=True)]
            for b, (low, high) in enumerate(itertools.pairwise((0.0, *self.edges, 1.0))):
                kl = {f"kl at {pair}": nats for pair, nats in zip(options[b], table[b], strict=True)}
                report.details[f"mask ratio {low:g} to {high:g}"] = {**chosen[b].numbers(), "states": counts[b]} | kl
        _set((weights, acts), chosen)
        schedule = PrecisionSchedule.of(graph)
        assert schedule is not None
        if schedule.widths and planes is not None:
            read = [planes.bits_read(w, width(args_of(weights[0])[0])) for w in schedule.widths]
            report.metrics["average_bits"] = schedule.average()
            report.metrics["average_bits_read"] = sum(f * r for f, r in zip(shares(self.edges), read, strict=True))
            report.note(_said("weights", self.edges, schedule.widths, schedule.average()))
        if schedule.act_widths:
            report.metrics["average_activation_bits"] = schedule.act_average()
            report.note(_said("activations", self.edges, schedule.act_widths, schedule.act_average()))
        return report

    def _read(self, graph: fx.Graph, ctx: Context, node: fx.Node, top: int) -> fx.Node:
        """The linear with planes to choose, all of them for now."""
        bucket = bucket_of(graph, ctx.spec.mask_id, self.edges, node, layout(args_of(node)[0]))
        made = call_before(graph, node, LINEAR_NESTED, (*args_of(node), bucket, [top] * (len(self.edges) + 1)))
        replace(node, made)
        return made

    def _rounded(self, graph: fx.Graph, ctx: Context, report: PassReport) -> Iterator[fx.Node]:
        """The quantizers of activations with widths to choose, the widest for now."""
        for node in [n for n in graph.nodes if is_call(n, QUANTIZE_ACT, QUANTIZE_ACT_STATIC)]:
            rows = layout(args_of(node)[0])
            fixed = is_call(node, QUANTIZE_ACT_STATIC)
            if fixed or (self.edges and rows not in _BY_TOKEN):
                why = "its scales are fixed, for one width" if fixed else "its rows are other than the tokens"
                report.declined.append(Declined(f"%{node.name}", why))
                continue
            x, _, group, symmetric = args_of(node)
            bucket = bucket_of(graph, ctx.spec.mask_id, self.edges, node, rows)
            widths = [self.act_choices[-1]] * (len(self.edges) + 1)
            made = call_before(graph, node, QUANTIZE_ACT_ADAPTIVE, (x, bucket, widths, group, symmetric))
            replace(node, made)
            yield made

    def _options(self, known: tuple[int, ...], acts: bool) -> list[list[WidthPair]]:
        """What each bucket may choose: bits of weights and of activations; 0 where there is nothing to choose between."""
        found = []
        for b in range(len(self.edges) + 1):
            weights = (self.widths[b],) if self.widths and known else known or (0,)
            rounded = (self.act_widths[b],) if self.act_widths else self.act_choices
            found.append([WidthPair(w, a) for w in weights for a in (rounded if acts else (0,))])
        return found

    def _measure(
        self, graph: fx.Graph, ctx: Context, sites: _Sites, options: list[list[WidthPair]]
    ) -> tuple[list[list[float]], list[int]]:
        """KL of each bucket with each of its options, nats per masked position, and how many states each bucket has."""
        if ctx.states is None or ctx.reference is None:
            what = "there are no states, or no model as captured, to measure on"
            raise ContractError(what, where="adapt_precision", remedy="Give widths=, or compile with dlqc.compile")
        masks = ctx.states.ids == ctx.spec.mask_id
        there = masks.any(1)
        ids, ratio = ctx.states.ids[there], ctx.states.mask_ratio(ctx.spec.mask_id)[there]
        bucket = torch.ops.dlqc.mask_bucket(ids, ctx.spec.mask_id, list(self.edges), ratio)[:, 0]
        counts = torch.bincount(bucket, minlength=len(options)).tolist()
        if 0 in counts:
            low, high = list(itertools.pairwise((0.0, *self.edges, 1.0)))[counts.index(0)]
            raise CalibrationError(
                f"no state has a mask ratio from {low:g} to {high:g}",
                where="adapt_precision.edges",
                remedy="Use calibrate(sampler=forward_process), or other edges",
            )
        every = list(dict.fromkeys(pair for own in options for pair in own))
        sums = torch.zeros(len(counts), len(every), dtype=torch.float64)
        for start in range(0, ids.shape[0], _BATCH):
            part = slice(start, start + _BATCH)
            expected = _logits(*ctx.reference, ids[part], ratio[part], ctx)
            for level, pair in enumerate(every):
                _set(sites, [pair] * len(counts))
                found = _logits(graph, ctx.weights, ids[part], ratio[part], ctx)
                for row, own in enumerate(ids[part]):
                    here = own == ctx.spec.mask_id
                    kl = divergence(expected[row, here].double(), found[row, here].double()).mean()
                    sums[bucket[start + row], level] += kl
        means = sums / torch.tensor(counts).unsqueeze(1)
        if not bool(torch.isfinite(means).all()):
            raise CalibrationError(
                "the divergence is not finite", where="adapt_precision", remedy="Check the logits with widths=(8, …)"
            )
        return [[float(means[b, every.index(pair)]) for pair in own] for b, own in enumerate(options)], counts


_Sites = tuple[list[fx.Node], list[fx.Node]]


def _nested(graph: fx.Graph) -> tuple[list[fx.Node], NestedFormat | None]:
    """The linears on nested weights, and the format of all of them."""
    found = [(n, fmt) for n in graph.nodes if is_call(n, LINEAR_CODED) and isinstance(fmt := _format(n), NestedFormat)]
    planes = sorted({fmt.planes for _, fmt in found})
    if len(planes) > 1:
        what = f"weights are stored in planes {' and '.join(planes)}"
        raise ContractError(what, where="adapt_precision", remedy="Give all linears the same planes")
    return [node for node, _ in found], found[0][1] if found else None


def _format(node: fx.Node) -> object:
    return decode(args_of(node)[3])


def _logits(graph: fx.Graph, weights: Weights, ids: Tensor, ratio: Tensor, ctx: Context) -> Tensor:
    return logits_of(lambda rows: forward(graph, weights, rows, mask_ratio=ratio), ids, ctx.spec)


def _set(sites: _Sites, pairs: Sequence[WidthPair]) -> None:
    """Let all sites take one pair for each bucket."""
    for node in sites[0]:
        write(node, [pair.weights for pair in pairs])
    for node in sites[1]:
        write(node, [pair.activations for pair in pairs])


def _said(what: str, edges: Sequence[float], widths: Sequence[int], average: float) -> str:
    said = ", ".join(f"{w} up to {edge:g}" for w, edge in zip(widths, (*edges, 1.0), strict=True))
    return f"bits of {what} by mask ratio: {said}; {average:.3g} on average over ratios"
