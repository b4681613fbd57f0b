"""Round the weights of the blocks' linears to integers, or to another format of few bits.

Before:  y = linear(x, W, b)
After:   y = linear_q(x, codes, scales, zeros, b),   W ≈ (codes - zeros)·scales
         y = linear_coded(x, parts, b),              W ≈ what the parts stand for in `format`, stored packed at once

How codes are chosen is the `method`'s business (`dlqc.rounding`): round-to-nearest, GPTQ, … Not every method rounds to every
format: nf4, fp8, microscaling and lattice take rtn, planes rtn and daq, lattice ldlq, codebook kmeans, offset rtn and hqq. It
gets the weight with all folds evaluated in float64 and the statistics of the layer's inputs on the denoising states, as they
arrive through the blocks that are quantized already. Lossy; the report gives each site's output signal-to-noise ratio.

All linears get the same format and method but those that `overrides` names, and those that a pass before this one assigned a
scheme of their own (`assign_bits`). A site that both name is refused.

Declines:
    - a linear that `skip` names
    - a router: its output goes into a topk, where a small error is another expert (`dlqc.routers`)
    - (outside the repeated blocks nothing is a site: embeddings and head stay as they are, and the report says so)

A weight that several calls share is rounded once, on the sum of their statistics, and all calls are rewritten.

What the statistics are of is `sequential`:

    block    the block as the pass finds it, behind blocks that are quantized already
    layer    true-sequential: linears that read the same value are rounded together, in the order of the dataflow, and the
             statistics of the next are taken behind them; those of one group are held at a time
    none     the model before any rounding: no error is seen downstream
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from dlqc.backend import LinearSpec
from dlqc.contract import Context, Pass, PassReport, Plan, Reads, Sequential, matches
from dlqc.errors import ContractError, RecipeError, nearest
from dlqc.formats.coded import CodedFormat, encode, fault
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.graph import Linear, arg, args_of, call_before, linears, read, replace, sweep
from dlqc.ops import LINEAR_CODED, LINEAR_Q
from dlqc.reconstruct import round_block
from dlqc.rounding.contract import BlockRounding
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.hessian import sqnr_db
from dlqc.rounding.low_rank import LowRank, add_low_rank
from dlqc.routers import KEPT, is_router
from dlqc.schemes import Method, Override, Scheme, overridden, to_round
from dlqc.stats import PAIRED, Moments


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize every linear of every block.

    Options:
        bits: width of the codes. group_size: input features per scale, None for one scale per output channel.
        symmetric: fixed zero point in the middle, or one zero point per group.
        method: the rounding method.
        skip: glob patterns of module names to leave alone.
        format: a format other than integers; then the first three have no say, and `pack` is not needed.
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
    sequential: Sequential = "block"
    low_rank: LowRank | None = None
    overrides: tuple[Override, ...] = ()

    @property
    def target(self) -> IntFormat | CodedFormat:
        """The format of a linear that nothing else names."""
        return self.format or IntFormat(self.bits, self.group_size, self.symmetric)

    @property
    def scheme(self) -> Scheme:
        """That format and the method."""
        return Scheme(self.target, self.method)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """That one, and those of the overrides."""
        return (self.scheme, *(override.of(self.scheme) for override in self.overrides))

    def __post_init__(self) -> None:
        self.scheme.checked()
        methods = {scheme.method for scheme in self.schemes}  # a wrong width or method is refused here, by option
        together = [method.name for method in methods if isinstance(method, BlockRounding)]
        if together and len(methods) > 1:
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
        for site in linears(graph.nodes, ctx.weights):
            if site.node not in inside:
                plan.kept[site.name] = "outside the repeated blocks"
            elif matches(site.name, self.skip):
                plan.kept[site.name] = "named by skip="
            elif is_router(site.node):
                plan.kept[site.name] = KEPT
            else:
                self._plan_site(site, plan)
        self._plan_assigned(plan)
        if self.required and not plan.sites and not plan.problems:
            plan.problems.append(
                "quantize_weights: the repeated blocks hold no linear on a constant weight that is not skipped"
            )

    def _plan_site(self, site: Linear, plan: Plan) -> None:
        schemes = plan.assigned.get(site.name) or (overridden(site.name, self.scheme, self.overrides),)
        for target in dict.fromkeys(scheme.format for scheme in schemes):
            reason = target.check(site.in_features)
            if reason is not None:
                grouped = isinstance(target, IntFormat)
                groups = ", ".join(map(str, IntFormat.suggest_groups(site.in_features))) if grouped else ""
                remedy = f"use {groups}, or exclude it with skip=" if groups else "use group_size=None, or skip="
                remedy = remedy if grouped else "set it in format=, or exclude it with skip="
                plan.problems.append(f"{site.name}: {reason} ({remedy})")
                return
        if self.low_rank is not None:
            shape = (site.out_features, site.in_features)
            reason = self.low_rank.format.check(*shape)
            if reason is not None:
                plan.problems.append(f"{site.name}: {reason} (use a lower rank in low_rank=, or exclude it with skip=)")
                return
            plan.beside[site.name] = self.low_rank.format.bits(*shape)
        spec = LinearSpec(site.in_features, site.out_features, schemes[-1].format, None, site.bias is not None)
        plan.sites[site.name] = spec

    def _plan_assigned(self, plan: Plan) -> None:
        """A pass before this one that assigns schemes must speak of the same sites, and of what this one can do."""
        named = [name for name in plan.assigned if any(matches(name, o.sites) for o in self.overrides)]
        plan.problems += [
            f"{name}: overrides= names it, and it is assigned (name it in fixed= there)" for name in named
        ]
        if not plan.assigned or plan.problems:
            return
        for name in sorted(plan.assigned.keys() ^ plan.sites.keys()):
            what = "is assigned, and skipped here" if name in plan.assigned else "is rounded here, and not assigned"
            plan.problems.append(f"{name}: {what} (give both passes the same skip=)")
        schemes = {scheme for candidates in plan.assigned.values() for scheme in candidates}
        if self.format is not None and any(isinstance(scheme.format, IntFormat) for scheme in schemes):
            plan.problems.append("quantize_weights: integers are assigned (leave format= out)")
        for method in {s.method for s in schemes} - {self.method}:
            alone = not isinstance(method, BlockRounding) and not isinstance(self.method, BlockRounding)
            if not alone or method.statistics - self.statistics():
                what = "needs statistics" if alone else "does not go together with the one here"
                plan.problems.append(
                    f"quantize_weights: {method.name} is assigned and {what} (set method={method.name})"
                )

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report, moments = PassReport(), Moments()
        groups = self._groups(graph, ctx, report)
        schemes = {sites[0].weight: self._scheme(sites[0].name, ctx) for group in groups for sites in group}
        formats = {weight: scheme.format for weight, scheme in schemes.items()}
        together = round_block(graph, ctx, groups, self.method, formats, report)
        for group in groups:
            stats = self._statistics(group[0], ctx)
            moments.add(stats, len(group))
            prepared: dict[Method, Mapping[str, Any]] = {}
            for sites in group:
                exact = ctx.weights.value(sites[0].weight, torch.float64)
                fmt, method = schemes[sites[0].weight].format, schemes[sites[0].weight].method
                if method not in prepared:
                    prepared = {method: self._noted(sites, method.prepare, stats)}
                rounded = together.get(sites[0].weight) or self._noted(
                    sites, method.round, exact, fmt, prepared[method]
                )
                rewrite = self._rewrite if isinstance(rounded.weight, QuantizedWeight) else self._rewrite_coded
                cost = rewrite(graph, ctx, rounded.weight, sites) | rounded.metrics
                error = exact - rounded.weight.dequantize()
                if self.low_rank is not None:
                    fit = self._noted(sites, self.low_rank.fit, exact, error, stats.get("hessian"))
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
        by_weight, report.declined = to_round(ctx.nodes(graph), ctx.weights, self.skip)
        groups: dict[tuple[fx.Node, ...], list[list[Linear]]] = {}
        for sites in by_weight.values():
            groups.setdefault(tuple(site.x for site in sites), []).append(sites)
        return list(groups.values())

    def _scheme(self, name: str, ctx: Context) -> Scheme:
        return ctx.assignment.get(name) or overridden(name, self.scheme, self.overrides)

    def _statistics(self, sites: list[Linear], ctx: Context) -> Mapping[str, Any]:
        """Statistics of what the calls of a weight read."""
        weight = sites[0].weight
        if self.sequential != "layer":
            return ctx.stats.get(weight, {})
        if ctx.collect is None:
            what = "sequential='layer' takes statistics anew, and there is nothing to take them with"
            raise ContractError(what, where="sequential", remedy="Run the pass by a PassManager, with blocks")
        return ctx.collect([weight])[weight]

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
