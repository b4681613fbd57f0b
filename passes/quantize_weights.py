"""Round the weights of the blocks' linears to integers, or to another format of few bits.

Before:  y = linear(x, W, b)
After:   y = linear_q(x, codes, scales, zeros, b),   W ≈ (codes - zeros)·scales
         y = linear_coded(x, parts, b),              W ≈ what the parts stand for in `format`, stored packed at once

How codes are chosen is the `method`'s business (`dlqc.rounding`): round-to-nearest, GPTQ, … Not every method rounds to every
format: nf4, fp8, microscaling and lattice take rtn, planes rtn and daq, lattice ldlq, codebook kmeans. It gets the weight
with all folds evaluated in float64 and the statistics of the layer's inputs on the denoising states, as they arrive through the
blocks that are quantized already. Lossy; the report gives each site's output signal-to-noise ratio.

Declines:
    - a linear that `skip` names
    - a router: its output goes into a topk, where a small error is another expert (`dlqc.routers`)
    - outlier columns that `split_outliers` gave a linear of their own
    - (outside the repeated blocks nothing is a site: embeddings and head stay as they are, and the report says so)

A weight that several calls share is rounded once, on the sum of their statistics, and all calls are rewritten.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from dlqc.backend import LinearSpec
from dlqc.contract import Context, Declined, Pass, PassReport, Plan, matches
from dlqc.errors import ContractError, RecipeError, nearest
from dlqc.formats.coded import CodedFormat, encode, fault
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.graph import Linear, arg, call_before, linears, read, replace, sweep
from dlqc.kept import reason_to_keep
from dlqc.ops import LINEAR_CODED, LINEAR_Q
from dlqc.rounding.contract import Rounded
from dlqc.rounding.daq import Daq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.hessian import sqnr_db
from dlqc.rounding.kmeans import Kmeans
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.vector import Ldlq

Method = Rtn | Gptq | Daq | Kmeans | Ldlq


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize every linear of every block.

    Options:
        bits: width of the codes. group_size: input features per scale, None for one scale per output channel.
        symmetric: fixed zero point in the middle, or one zero point per group.
        method: the rounding method.
        skip: glob patterns of module names to leave alone.
        format: a format other than integers; then the first three have no say, and `pack` is not needed.
    """

    name: ClassVar[str] = "quantize_weights"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float-weights"})
    scope: ClassVar = "block"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    method: Method = field(default_factory=Gptq)
    skip: tuple[str, ...] = ()
    format: CodedFormat | None = None

    @property
    def target(self) -> IntFormat | CodedFormat:
        """The format that weights are rounded to."""
        return self.format or IntFormat(self.bits, self.group_size, self.symmetric)

    def __post_init__(self) -> None:
        reason = self.method.refusal(self.target)  # a wrong width or group is refused here, with the option's name
        if reason is not None:
            fitting = [m.name for m in typing.get_args(Method) if isinstance(self.target, m.takes)]
            raise RecipeError(reason, where="method", remedy=f"Use method={' or '.join(fitting)}")
        for option in ("bits", "group_size", "symmetric") if self.format is not None else ():
            if getattr(self, option) != getattr(type(self), option):
                what = f"{option}={getattr(self, option)} is for integers, weights become {self.target.label}"
                raise RecipeError(what, where=option, remedy="Set it in format=, or leave format out")

    def needed_facts(self) -> frozenset[str]:
        return self.needs | ({"states"} if self.method.statistics else set())

    def given_facts(self) -> frozenset[str]:
        return self.gives | ({"packed"} if self.format is not None else set())

    def statistics(self) -> frozenset[str]:
        return self.method.statistics

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        names = [site.name for site in linears(graph.nodes, ctx.weights)]
        for pattern in (p for p in self.skip if not any(matches(name, [p]) for name in names)):
            plan.problems.append(f"skip pattern {pattern!r} matches no linear; {nearest(pattern, names[:8])}, …")
        inside = {node for block in ctx.blocks for node in block.nodes(graph)}
        for site in linears(graph.nodes, ctx.weights):
            if site.node not in inside:
                plan.kept[site.name] = "outside the repeated blocks"
            elif matches(site.name, self.skip):
                plan.kept[site.name] = "named by skip="
            elif (reason := reason_to_keep(site)) is not None:
                plan.kept[site.name] = reason
            else:
                self._plan_site(site, plan)

        if self.required and not plan.sites and not plan.problems:
            plan.problems.append(
                "quantize_weights: the repeated blocks hold no linear on a constant weight that is not skipped"
            )

    def _plan_site(self, site: Linear, plan: Plan) -> None:
        reason = self.target.check(site.in_features)
        if reason is not None:
            grouped = isinstance(self.target, IntFormat)
            groups = ", ".join(map(str, IntFormat.suggest_groups(site.in_features))) if grouped else ""
            remedy = f"use {groups}, or exclude it with skip=" if groups else "use group_size=None, or skip="
            remedy = remedy if grouped else "set it in format=, or exclude it with skip="
            plan.problems.append(f"{site.name}: {reason} ({remedy})")
            return
        has_bias = site.bias is not None
        plan.sites[site.name] = LinearSpec(site.in_features, site.out_features, self.target, None, has_bias)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        by_weight: dict[str, list[Linear]] = {}
        for site in linears(ctx.nodes(graph), ctx.weights):
            by_weight.setdefault(site.weight, []).append(site)
        shared: list[torch.Tensor] = []
        prepared: Mapping[str, Any] = {}
        for weight, sites in by_weight.items():
            if matches(sites[0].name, self.skip):
                report.declined.append(Declined(sites[0].name, "named by skip="))
                continue
            kept = next(filter(None, map(reason_to_keep, sites)), None)
            if kept is not None:
                report.declined.append(Declined(sites[0].name, kept))
                continue
            stats = ctx.stats.get(weight, {})
            # Linears that read the same value come one after the other and share their statistics, tensor for tensor.
            if not prepared or [id(t) for t in shared] != [id(t) for t in stats.values()]:
                shared, prepared = list(stats.values()), self._noted(sites, self.method.prepare, stats)
            exact = ctx.weights.value(weight, torch.float64)
            rounded = self._noted(sites, self.method.round, exact, self.target, prepared)
            rewrite = self._rewrite if isinstance(rounded.weight, QuantizedWeight) else self._rewrite_coded
            cost = rewrite(graph, ctx, rounded.weight, sites) | rounded.metrics
            report.details[sites[0].name] = cost | weight_noise(exact, rounded)
            report.sites += 1
        sweep(graph, ctx.weights)
        return report

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
            codes, scales = (read(graph, ctx.weights, names[role], site.node) for role in ("codes", "scales"))
            zeros = None if weight.zeros is None else read(graph, ctx.weights, names["zeros"], site.node)
            bias = None if site.bias is None else arg(site.node, 2, "bias")
            args = (site.x, codes, scales, zeros, bias, self.bits, self.group_size or 0)
            replace(site.node, call_before(graph, site.node, LINEAR_Q, args))
        return {"bits_per_weight": self.target.bits_per_weight(sites[0].out_features, sites[0].in_features)}

    def _rewrite_coded(self, graph: fx.Graph, ctx: Context, weight: Any, sites: list[Linear]) -> dict[str, float]:
        first, spec = sites[0], encode(weight.format)
        stored = sorted(weight.pack().items())
        wrong = fault(spec, [part for _, part in stored], first.out_features, first.in_features)
        if wrong is not None:
            raise ContractError(wrong, where=first.name, remedy=f"This is a fault of {self.method.name!r}, report it")
        for role, part in stored:
            ctx.weights.put(f"{first.name}.{role}", part)
        for site in sites:
            parts = [read(graph, ctx.weights, f"{first.name}.{role}", site.node) for role, _ in stored]
            bias = None if site.bias is None else arg(site.node, 2, "bias")
            args = (site.x, parts, bias, spec, first.out_features)
            replace(site.node, call_before(graph, site.node, LINEAR_CODED, args))
        bits = 8 * sum(part.nbytes for _, part in stored)
        return {"bits_per_weight": bits / (first.out_features * first.in_features)}


def weight_noise(exact: torch.Tensor, rounded: Rounded) -> dict[str, float]:
    """Signal to noise of the weight itself, 10·log10(‖W‖² / ‖W - Ŵ‖²), which every method has."""
    signal = float(exact.square().sum())
    noise = float((exact - rounded.weight.dequantize()).square().sum())
    return {"weight_sqnr_db": sqnr_db(signal, noise)}
