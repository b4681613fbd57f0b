"""Round the weights of the blocks' linears to integers, or to another format of few bits.

Before:  y = linear(x, W, b)
After:   y = linear_q(x, codes, scales, zeros, b),   W ≈ (codes - zeros)·scales
         y = linear_coded(x, parts, b),              W ≈ what the parts stand for in `format`, stored packed at once
         y = low_rank(linear_q(x, …), x, A, B),      with `low_rank`: W ≈ (codes - zeros)·scales + A·B, likewise for linear_coded

How codes are chosen is the `method`'s business (`dlqc.rounding`): round-to-nearest, GPTQ, … Not every method rounds to every
format: nf4, fp8, microscaling, lattice and offset take rtn, planes rtn and daq, lattice ldlq, codebook kmeans, offset hqq,
nested rtn and nested_gptq. It
gets the weight with all folds evaluated in float64 and the statistics of the layer's inputs on the denoising states, as they
arrive through the blocks that are quantized already. `signround` looks at the output of the block instead (`dlqc.reconstruct`).
Lossy; the report gives each site's output signal-to-noise ratio.

All linears get the same format and method but those that `overrides` names, and those that a pass before this one assigned a
scheme of their own (`assign_bits`). A site that both name is refused.

Declines:
    - a linear that `skip` names
    - a router: its output goes into a topk, where a small error is another expert (`dlqc.routers`)
    - outlier columns that `split_outliers` gave a linear of their own
    - a head that is tied to an embedding: `quantize_embedding` rounds the table for both
    - (other linears outside the repeated blocks, and embeddings, are no sites: they stay, and the report says so)

With `head`, linears between the last block and the logits become integers, too: 8 bits per output channel, fewer bits in the
groups and with the zero points of the blocks' integers (g128 with zero points beside another format), by the same method, or to
nearest where that takes no integers. Their statistics are of the states behind the last rounded block.

A pruned weight (`sparsify`) stays zero where it is zero; a format without a zero is refused.

A weight that several calls share is rounded once, on the sum of their statistics, and all calls are rewritten.

What the statistics are of is `sequential`:

    block    the block as the pass finds it, behind blocks that are quantized already
    layer    true-sequential: linears that read the same value are rounded together, in the order of the dataflow, and the
             statistics of the next are taken behind them; those of one group are held at a time
    none     the model before any rounding: no error is seen downstream
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from dlqc.backend import LinearSpec
from dlqc.blocks import tail
from dlqc.contract import Context, Pass, PassReport, Plan, Reads, Sequential, Statistics, matches
from dlqc.errors import ContractError, RecipeError, nearest
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.coded import CodedFormat, encode, fault
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.nested import NestedFormat
from dlqc.formats.offset import OffsetFormat
from dlqc.formats.planes import PlanesFormat
from dlqc.formats.sparse import SparseFormat
from dlqc.graph import Linear, arg, args_of, call_before, linears, read, replace, sweep
from dlqc.kept import reason_to_keep, to_round
from dlqc.ops import LINEAR_CODED, LINEAR_Q
from dlqc.reconstruct import round_block
from dlqc.rounding.contract import BlockRounding, Rounded
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.hessian import sqnr_db
from dlqc.rounding.low_rank import LowRank, add_low_rank
from dlqc.rounding.rtn import Rtn
from dlqc.schemes import Method, Override, Scheme, at_odds, head_format, operands, overridden
from dlqc.stats import OWN, PAIRED, Moments

#: Formats without an exact zero: a pruned weight would come back.
NO_ZERO = (PlanesFormat, CodebookFormat, LatticeFormat, OffsetFormat, NestedFormat)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize every linear of every block.

    Options:
        bits: width of the codes. group_size: input features per scale, None for one scale per output channel.
        symmetric: fixed zero point in the middle, or one zero point per group.
        method: the rounding method.
        skip: glob patterns of module names to leave alone.
        format: a format other than integers; then the first three have no say, and `pack` is not needed.
        head: bits of the linears between the last block and the logits; None leaves them alone.
        sequential: what statistics are taken of, "block", "layer" or "none"; see the module's text.
        low_rank: a correction of low rank for what rounding leaves (`dlqc.rounding.low_rank`); None for none.
        overrides: variants for some linears, such as override(sites=('*.ff_out',), bits=4); the last that names one counts.
    """

    name: ClassVar[str] = "quantize_weights"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "original"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float-weights"})
    scope: ClassVar = "block"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    method: Method = field(default_factory=Gptq)
    skip: tuple[str, ...] = ()
    format: CodedFormat | None = None
    head: int | None = None
    sequential: Sequential = "block"
    low_rank: LowRank | None = None
    overrides: tuple[Override, ...] = ()

    @property
    def target(self) -> IntFormat | CodedFormat:
        """The format of the blocks' linears that nothing else names."""
        return self.format or IntFormat(self.bits, self.group_size, self.symmetric)

    @property
    def scheme(self) -> Scheme:
        """That format and the method."""
        return Scheme(self.target, self.method)

    @property
    def head_scheme(self) -> Scheme:
        """What the linears behind the last block get."""
        fmt = head_format(self.head, self.target) or self.target
        unfit = self.method.refusal(fmt) is not None or isinstance(self.method, BlockRounding)
        return Scheme(fmt, Rtn() if unfit else self.method)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that this pass may round by, without those that are assigned."""
        own = (self.scheme, self.head_scheme) if self.head is not None else (self.scheme,)
        return (*own, *(override.of(self.scheme) for override in self.overrides))

    def __post_init__(self) -> None:
        self.scheme.checked()
        schemes = self.schemes  # a wrong width or method is refused here, with the option's name
        together = [s.method.name for s in schemes if isinstance(s.method, BlockRounding)]
        if together and any(override.of(self.scheme).method != self.method for override in self.overrides):
            what = f"{together[0]} rounds the linears of a block together, so all of them must have it"
            raise RecipeError(what, where="override.method", remedy="Leave it out, or use method=gptq")
        for option in ("bits", "group_size", "symmetric") if self.format is not None else ():
            if getattr(self, option) != getattr(type(self), option):
                what = f"{option}={getattr(self, option)} is for integers, weights become {self.target.label}"
                raise RecipeError(what, where=option, remedy="Set it in format=, or leave format out")
        self._check_sequential()

    def _check_sequential(self) -> None:
        if self.sequential not in typing.get_args(Sequential):
            what = f"{self.sequential!r} is no sequence of statistics"
            raise RecipeError(what, where="sequential", remedy="Use 'block', 'layer' or 'none'")
        if self.sequential != "block" and isinstance(self.method, BlockRounding):
            what = f"{self.method.name} rounds the linears of a block together, so sequential={self.sequential!r} has no say"
            raise RecipeError(what, where="sequential", remedy="Leave it out, or use method=gptq")
        if self.sequential != "block" and not self.statistics():
            what = f"{self.method.name} takes no statistics, so sequential={self.sequential!r} has no say"
            raise RecipeError(what, where="sequential", remedy="Leave it out, or use method=gptq")
        paired = [scheme.method.name for scheme in self.schemes if scheme.method.statistics & PAIRED]
        if self.sequential == "none" and paired:
            what = f"{paired[0]} corrects inputs that rounding has changed, and sequential='none' shows it none"
            raise RecipeError(what, where="sequential", remedy="Use 'block' or 'layer', or method=gptq")

    def needed_facts(self) -> frozenset[str]:
        return self.needs | ({"states"} if self.statistics() or self.reads() != "nothing" else set())

    def given_facts(self) -> frozenset[str]:
        coded = all(not isinstance(scheme.format, IntFormat) for scheme in self.schemes)
        return self.gives | ({"packed"} if coded else set())

    def statistics(self) -> frozenset[str]:
        # With a second moment, how many rows it was summed over, for the note on too few.
        wanted = frozenset[str]().union(*(scheme.method.statistics for scheme in self.schemes))
        wanted |= self.low_rank.statistics if self.low_rank is not None else frozenset()
        return wanted | ({"count"} if "hessian" in wanted else set())

    def reaches_tail(self) -> bool:
        return self.head is not None

    def sequence(self) -> Sequential:
        return self.sequential

    def reads(self) -> Reads:
        return self.method.reads() if isinstance(self.method, BlockRounding) else "nothing"

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        names = [site.name for site in linears(graph.nodes, ctx.weights)]
        patterns = [("skip", p) for p in self.skip] + [("override", p) for o in self.overrides for p in o.sites]
        for option, pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                hint = nearest(pattern, names[:8])
                plan.problems.append(f"{option} pattern {pattern!r} matches no linear; {hint}, …")
        inside = {node for block in ctx.blocks for node in block.nodes(graph)}
        last = tail(graph, ctx.blocks) if self.head is not None else None
        behind = set(last.nodes(graph)) if last is not None else set()
        for site in linears(graph.nodes, ctx.weights):
            if site.name in plan.sites:  # a tied head: quantize_embedding has planned it
                continue
            if site.node not in inside | behind:
                plan.kept[site.name] = "outside the repeated blocks"
            elif matches(site.name, self.skip):
                plan.kept[site.name] = "named by skip="
            elif (reason := reason_to_keep(site)) is not None:
                plan.kept[site.name] = reason
            else:
                named = self.scheme_of(site.name, behind=site.node in behind)
                self._plan_site(site, plan, plan.assigned.get(site.name) or (named,))
        if plan.assigned and not plan.problems:
            mine = {site.name for site in linears(inside, ctx.weights)} & plan.sites.keys()
            plan.problems += [f"quantize_weights: {odd}" for odd in at_odds(plan, self.schemes, mine, self.head)]
        if self.required and not plan.sites and not plan.problems:
            plan.problems.append(
                "quantize_weights: the repeated blocks hold no linear on a constant weight that is not skipped"
            )

    def _plan_site(self, site: Linear, plan: Plan, schemes: Sequence[Scheme]) -> None:
        """Fill the plan of a site, given its scheme or those that it may come to have."""
        for target in dict.fromkeys(scheme.format for scheme in schemes):
            reason = target.check(site.in_features)
            if reason is not None:
                grouped = isinstance(target, IntFormat)
                groups = ", ".join(map(str, IntFormat.suggest_groups(site.in_features))) if grouped else ""
                remedy = f"use {groups}, or exclude it with skip=" if groups else "use group_size=None, or skip="
                remedy = remedy if grouped else "set it in format=, or exclude it with skip="
                plan.problems.append(f"{site.name}: {reason} ({remedy})")
                return
            if site.name in plan.pruned and isinstance(target, NO_ZERO):
                plan.problems.append(
                    f"{site.name}: pruned weights are zero, and {target.label} has no zero (use another format)"
                )
        if self.low_rank is not None:
            shape = (site.out_features, site.in_features)
            reason = self.low_rank.format.check(*shape)
            if reason is not None:
                plan.problems.append(f"{site.name}: {reason} (use a lower rank in low_rank=, or exclude it with skip=)")
                return
            plan.beside[site.name] = self.low_rank.format.bits(*shape)
        if site.name in plan.pruned and isinstance(self.method, BlockRounding):
            what = f"pruned weights are zero, and {self.method.name} does not leave them so"
            plan.problems.append(f"{site.name}: {what} (use method=gptq or rtn)")
        target = schemes[-1].format
        if isinstance(target, SparseFormat):
            if site.name not in plan.pruned:
                plan.problems.append(f"{site.name}: {target.label} stores what pruning left (put sparsify before)")
            target = dataclasses.replace(target, density=plan.pruned.get(site.name))
        plan.sites[site.name] = LinearSpec(site.in_features, site.out_features, target, None, site.bias is not None)

    def scheme_of(self, name: str, *, behind: bool) -> Scheme:
        """The scheme of a linear of the blocks, or of one behind them, by name."""
        base = self.head_scheme if behind else self.scheme
        return overridden(name, base, self.overrides)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report, moments = PassReport(), Moments()
        behind = ctx.block is not None and ctx.block not in ctx.blocks
        groups = self._groups(graph, ctx, report)
        firsts = [sites[0] for group in groups for sites in group]
        schemes = {s.weight: ctx.assignment.get(s.name) or self.scheme_of(s.name, behind=behind) for s in firsts}
        formats = {weight: scheme.format for weight, scheme in schemes.items()}
        together = round_block(graph, ctx, groups, self.head_scheme.method if behind else self.method, formats, report)
        for group in groups:
            stats = self._statistics([sites[0].weight for sites in group], ctx)
            shared = stats.get(group[0][0].weight, {})
            moments.add(shared, len(group))
            prepared: dict[Method, Mapping[str, Any]] = {}
            for sites in group:
                weight, (fmt, method) = sites[0].weight, schemes[sites[0].weight].parts
                if method not in prepared:
                    prepared = {method: self._noted(sites, method.prepare, shared)}
                own = {name: s for name, s in stats.get(weight, {}).items() if name in OWN}
                exact, known = operands(ctx.weights, weight, method, {**prepared[method], **own})
                rounded = together.get(weight) or self._noted(sites, method.round, exact, fmt, known)
                self._check_zeros(sites[0], rounded, ctx)
                rewrite = self._rewrite if isinstance(rounded.weight, QuantizedWeight) else self._rewrite_coded
                cost = rewrite(graph, ctx, rounded.weight, sites) | rounded.metrics
                error = exact - rounded.weight.dequantize()
                if self.low_rank is not None:
                    fit = self._noted(sites, self.low_rank.fit, exact, error, shared.get("hessian"))
                    add_low_rank(graph, ctx.weights, ctx.nodes(graph), sites[0].name, self.low_rank.format, fit.parts)
                    cost |= fit.metrics | {"bits_per_weight": cost["bits_per_weight"] + fit.bits_per_weight}
                    error = fit.rest
                report.details[sites[0].name] = cost | weight_noise(exact, error)
                report.sites += 1
        report.notes += moments.notes()
        sweep(graph, ctx.weights)
        return report

    def _groups(self, graph: fx.Graph, ctx: Context, report: PassReport) -> list[list[list[Linear]]]:
        """The weights to round, each with its calls, in the order of the dataflow; those that read the same come together.

        In the graph values come before their readers, so whatever a group's inputs depend on is in the groups before.
        (Of a weight that is called again further down, the first call counts.)
        """
        by_weight, declined = to_round(ctx.nodes(graph), ctx.weights, self.skip)
        report.declined += declined
        groups: dict[tuple[fx.Node, ...], list[list[Linear]]] = {}
        for sites in by_weight.values():
            groups.setdefault(tuple(site.x for site in sites), []).append(sites)
        return list(groups.values())

    def _statistics(self, weights: list[str], ctx: Context) -> Statistics:
        """Statistics of the one value that weights read, by the first of them, and what is each weight's own."""
        if self.sequential != "layer":
            return ctx.stats
        if ctx.collect is None:
            what = "sequential='layer' takes statistics anew, and there is nothing to take them with"
            raise ContractError(what, where="sequential", remedy="Run the pass by a PassManager, with blocks")
        return ctx.collect(weights if self.statistics() & OWN else weights[:1])

    def _check_zeros(self, site: Linear, rounded: Rounded, ctx: Context) -> None:
        kept = ctx.weights[site.weight].kept()
        if kept is not None and bool(rounded.weight.dequantize()[~kept].any()):
            remedy = "This is a fault of the rounding method, report it"
            raise ContractError("pruned weights are no longer zero", where=site.name, remedy=remedy)

    def _noted(self, sites: list[Linear], work: Callable[..., Any], *args: Any) -> Any:
        """Call a method; an error says at which linear it happened."""
        try:
            return work(*args)
        except Exception as error:
            error.add_note(f"while rounding {sites[0].name}")
            raise

    def _rewrite(self, graph: fx.Graph, ctx: Context, weight: Any, sites: list[Linear]) -> dict[str, float]:
        names = {role: f"{sites[0].name}.{role}" for role in ("codes", "scales", "zeros")}
        ctx.weights.put(names["codes"], weight.codes)
        ctx.weights.put(names["scales"], weight.scales)
        if weight.zeros is not None:
            ctx.weights.put(names["zeros"], weight.zeros)
        for site in sites:
            x = args_of(site.node)[0]  # not site.x: that may be a linear that has been replaced since
            codes, scales = (read(graph, ctx.weights, names[role], site.node) for role in ("codes", "scales"))
            zeros = None if weight.zeros is None else read(graph, ctx.weights, names["zeros"], site.node)
            bias = None if site.bias is None else arg(site.node, 2, "bias")
            args = (x, codes, scales, zeros, bias, weight.format.bits, weight.format.group_size or 0)
            replace(site.node, call_before(graph, site.node, LINEAR_Q, args))
        return {"bits_per_weight": weight.format.bits_per_weight(sites[0].out_features, sites[0].in_features)}

    def _rewrite_coded(self, graph: fx.Graph, ctx: Context, weight: Any, sites: list[Linear]) -> dict[str, float]:
        first, spec = sites[0], encode(weight.format)
        stored = sorted(weight.pack().items())
        wrong = fault(spec, [part for _, part in stored], first.out_features, first.in_features)
        if wrong is not None:
            raise ContractError(wrong, where=first.name, remedy="This is a fault of the rounding method, report it")
        for role, part in stored:
            ctx.weights.put(f"{first.name}.{role}", part)
        for site in sites:
            parts = [read(graph, ctx.weights, f"{first.name}.{role}", site.node) for role, _ in stored]
            bias = None if site.bias is None else arg(site.node, 2, "bias")
            args = (args_of(site.node)[0], parts, bias, spec, first.out_features)
            replace(site.node, call_before(graph, site.node, LINEAR_CODED, args))
        bits = 8 * sum(part.nbytes for _, part in stored)
        return {"bits_per_weight": bits / (first.out_features * first.in_features)}


def weight_noise(exact: torch.Tensor, error: torch.Tensor) -> dict[str, float]:
    """Signal to noise of the weight itself, 10·log10(‖W‖² / ‖W - Ŵ‖²), which every method has."""
    return {"weight_sqnr_db": sqnr_db(float(exact.square().sum()), float(error.square().sum()))}
