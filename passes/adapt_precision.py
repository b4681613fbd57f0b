"""Read nested weights in as many bits as the mask ratio of the step needs.

Before:  y = linear_coded(x, planes, b; nested)                       all planes, in every forward
After:   y = linear_nested(x, planes, b; nested, bucket, widths)      the upper planes of widths[bucket], with scales of their own

The bucket is that of the row's share of [MASK] (`dlqc::mask_bucket`), counted once in a graph, so full forwards and cached
steps of decoding, metrics, and a loaded artifact obey the same schedule, and a row does not know its batch. One weight is
stored.

Without `widths` the schedule is searched: the states are run at each width, KL(model as captured || this one) is taken at their
masked positions by bucket, and the schedule of least bits within `budget` is exact for these numbers (`dlqc.precision`). The
search takes all linears at one width together, and buckets by themselves: errors of earlier steps are not carried on to later
ones.

Lossy, by what is measured. No kernel reads planes yet: both backends compute the definition, which unpacks the planes of the
width and no more. Comes behind `quantize_weights(format=nested(...))` and what quantizes activations, in front of `lower`.

Declines nothing: weights in other formats are no sites. Running it twice finds no site.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from dlqc.contract import Context, Pass, PassReport
from dlqc.diffusion.fidelity import divergence
from dlqc.diffusion.masking import logits_of
from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.execute import forward
from dlqc.formats.coded import decode
from dlqc.formats.nested import NestedFormat
from dlqc.graph import args_of, call_before, is_call, replace, width
from dlqc.observers import layout
from dlqc.ops import LINEAR_CODED, LINEAR_NESTED
from dlqc.precision import PrecisionSchedule, cheapest, check_edges, shares
from dlqc.static import bucket_of

_BATCH = 8


@dataclass(frozen=True)
class AdaptPrecision(Pass):
    """Choose the planes that are read by mask ratio.

    Options:
        budget: the most KL from the model as captured, nats per masked position, on average over mask ratios.
        edges: mask ratios between the buckets.
        widths: bits of each bucket, the lowest mask ratio first; then nothing is searched. None searches.
    """

    name: ClassVar[str] = "adapt_precision"
    needs: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"adapted-precision"})

    budget: float = 0.01
    edges: tuple[float, ...] = (0.25, 0.5, 0.75)
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_edges(self.edges)
        if self.widths is not None:
            PrecisionSchedule(self.edges, self.widths)  # refused here where they do not fit
        if not self.budget > 0:
            what = f"a budget of {self.budget:g} nats leaves nothing to choose"
            raise RecipeError(what, where="adapt_precision.budget", remedy="Use for example 0.01")

    def needed_facts(self) -> frozenset[str]:
        return self.needs | ({"states"} if self.widths is None else set())

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        nodes = [n for n in graph.nodes if is_call(n, LINEAR_CODED) and isinstance(decode(args_of(n)[3]), NestedFormat)]
        formats = {fmt for n in nodes if isinstance(fmt := decode(args_of(n)[3]), NestedFormat)}
        if not nodes:
            return report
        if len({fmt.planes for fmt in formats}) > 1:
            what = f"weights are stored in planes {' and '.join(sorted(fmt.planes for fmt in formats))}"
            raise ContractError(what, where="adapt_precision", remedy="Give all linears the same planes")
        known = next(iter(formats)).widths
        for chosen in self.widths or ():
            next(iter(formats)).level(chosen)
        sites = [self._replace(graph, ctx, node, known[-1]) for node in nodes]
        if self.widths is not None:
            schedule = PrecisionSchedule(self.edges, self.widths)
        else:
            table, counts = self._measure(graph, ctx, sites, known)
            chosen_widths, cost = cheapest(table, known, self.budget, shares(self.edges))
            schedule = PrecisionSchedule(self.edges, chosen_widths)
            report.metrics["kl"] = cost
            for b, (low, high) in enumerate(itertools.pairwise((0.0, *self.edges, 1.0))):
                found = {f"kl at {w} bits": kl for w, kl in zip(known, table[b], strict=True)}
                key = f"mask ratio {low:g} to {high:g}"
                report.details[key] = {"bits": schedule.widths[b], "states": counts[b]} | found
        _read_in(sites, schedule.widths)
        read = [next(iter(formats)).bits_read(w, width(args_of(sites[0])[0])) for w in schedule.widths]
        report.sites = len(sites)
        report.metrics["average_bits"] = schedule.average()
        report.metrics["average_bits_read"] = sum(f * r for f, r in zip(shares(self.edges), read, strict=True))
        said = ", ".join(f"{w} up to {edge:g}" for w, edge in zip(schedule.widths, (*self.edges, 1.0), strict=True))
        report.notes.append(f"bits of weights by mask ratio: {said}; {schedule.average():.3g} on average over ratios")
        return report

    def _replace(self, graph: fx.Graph, ctx: Context, node: fx.Node, top: int) -> fx.Node:
        bucket = bucket_of(graph, ctx.spec.mask_id, self.edges, node, layout(args_of(node)[0]))
        widths = [top] * (len(self.edges) + 1)
        made = call_before(graph, node, LINEAR_NESTED, (*args_of(node), bucket, widths))
        replace(node, made)
        return made

    def _measure(
        self, graph: fx.Graph, ctx: Context, sites: list[fx.Node], known: tuple[int, ...]
    ) -> tuple[list[list[float]], list[int]]:
        """KL of each bucket at each width, nats per masked position, and how many states each bucket has."""
        if ctx.states is None or ctx.reference is None:
            what = "there are no states, or no model as captured, to measure on"
            raise ContractError(what, where="adapt_precision", remedy="Give widths=, or compile with dlqc.compile")
        masked = ctx.states.ids == ctx.spec.mask_id
        ids = ctx.states.ids[masked.any(1)]
        bucket = torch.ops.dlqc.mask_bucket(ids, ctx.spec.mask_id, list(self.edges))[:, 0]
        counts = torch.bincount(bucket, minlength=len(self.edges) + 1).tolist()
        if 0 in counts:
            low, high = list(itertools.pairwise((0.0, *self.edges, 1.0)))[counts.index(0)]
            raise CalibrationError(
                f"no state has a mask ratio from {low:g} to {high:g}",
                where="adapt_precision.edges",
                remedy="Use calibrate(sampler=forward_process), or other edges",
            )
        sums = torch.zeros(len(counts), len(known), dtype=torch.float64)
        for start in range(0, ids.shape[0], _BATCH):
            part = ids[start : start + _BATCH]
            expected = _logits(*ctx.reference, part, ctx)
            for level, w in enumerate(known):
                _read_in(sites, (w,) * len(counts))
                found = _logits(graph, ctx.weights, part, ctx)
                for row in range(part.shape[0]):
                    here = part[row] == ctx.spec.mask_id
                    kl = divergence(expected[row, here].double(), found[row, here].double()).mean()
                    sums[bucket[start + row], level] += kl
        means = sums / torch.tensor(counts).unsqueeze(1)
        if not bool(torch.isfinite(means).all()):
            raise CalibrationError(
                "the divergence is not finite", where="adapt_precision", remedy="Check the logits with widths=(8, …)"
            )
        return means.tolist(), counts


def _logits(graph: fx.Graph, weights: object, ids: Tensor, ctx: Context) -> Tensor:
    return logits_of(lambda rows: forward(graph, weights, rows), ids, ctx.spec)  # type: ignore[arg-type]


def _read_in(sites: list[fx.Node], widths: tuple[int, ...]) -> None:
    for node in sites:
        node.args = (*args_of(node)[:6], list(widths))
