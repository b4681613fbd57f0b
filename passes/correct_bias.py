"""Give the outputs of quantized linears the right mean.

Before:  y = linear_q(x, …, b)
After:   y = linear_q(x, …, b + m),      m = E[y*] - E[y]        (linear_coded and linear_packed likewise)

E is the mean over the calibration states with their token weights; y is what the linear gives as it stands, with rounded weights,
a correction of low rank and rounded activations where it has them; y* what it should give:

    against="layer"    y* = W·x + b of the x that it reads.  With x as it is, m = (W - Ŵ)·E[x]
                       (Nagel et al. 2019, arXiv 1906.04721, section 4, who take E[x] from batch norms)
    against="stream"   y* = W·x₀ + b of the x₀ that it would read in the model before any weight was rounded: m also makes up for
                       what the linears before have shifted (inter-layer; iterative bias correction of Finkelstein et al. 2019,
                       arXiv 1906.03193)

Linears are corrected in the order of the dataflow, each behind those corrected before it. E‖y* - y‖² falls by ‖m‖², and the
variance of the error stays: on the calibration states no linear gets worse, each seen for itself. Nothing is added at run time
but the bias, which a linear without one gets in float32.

Run it after quantize_weights, and after quantize_activations if there is one, with nothing but block-scoped passes between: the
weights before rounding are kept for one block at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from dlqc.blocks import Block
from dlqc.contract import BlockInput, Context, Pass, PassReport, Plan, Reads
from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.execute import Executor, bucket_values, mask_buckets, placeholder
from dlqc.graph import (
    ADDED_BIAS,
    QUANTIZED_LINEARS,
    activation_quantizer,
    args_of,
    by_call,
    constant_name,
    corrected,
    is_call,
    linears,
    read,
    site_name,
    sweep,
    uses,
)
from dlqc.ops import LINEAR_CODED
from dlqc.stats import weights_of_rows
from dlqc.weights import Weights

Call = tuple[str, int]  # a module, and which of its calls


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Shift the biases of quantized linears to the means of full precision.

    Options:
        against: "layer" or "stream", see above.
    """

    name: ClassVar[str] = "correct_bias"
    needs: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "original", "states"})
    scope: ClassVar = "block"

    against: Literal["layer", "stream"] = "layer"

    def __post_init__(self) -> None:
        if self.against not in ("layer", "stream"):
            what = f"there are no means of a {self.against!r}"
            raise RecipeError(what, where="against", remedy="Use 'layer' or 'stream'")

    def reads(self) -> Reads:
        return "paired" if self.against == "stream" else "original"

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        calls = Counter(s.name for block in ctx.blocks for s in linears(block.nodes(graph), ctx.weights))
        for name in calls.keys() & plan.sites.keys():
            spec = plan.sites[name]
            if not spec.has_bias:
                plan.beside[name] = plan.beside.get(name, 0) + 32 * spec.out_features * calls[name]
            plan.sites[name] = replace(spec, has_bias=True)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        if ctx.block is None or ctx.original is None:
            what = "the block as it was before its weights were rounded is not at hand"
            raise ContractError(what, where=self.name, remedy="Run it behind quantize_weights, by a PassManager")
        report = PassReport()
        before, constants = ctx.original
        wanted = by_call((s.name, s) for s in linears(ctx.block.nodes(before), constants))
        quantized = [n for n in ctx.nodes(graph) if is_call(n, *QUANTIZED_LINEARS)]
        found = by_call((site_name(n), n) for n in quantized)
        groups: dict[fx.Node, list[Call]] = {}
        for call, node in found.items():
            groups.setdefault(args_of(node)[0], []).append(call)
        full = {}
        if self.against == "stream":
            ends = list(dict.fromkeys(wanted[call].x for call in found))
            full = means(ctx.block, before, constants, ends, [(p, p.exact) for p in ctx.inputs])
        for calls in groups.values():
            nodes = [found[call] for call in calls]
            x = source(nodes[0])
            now = means(ctx.block, graph, ctx.weights, [x, *map(corrected, nodes)], [(p, p.hidden) for p in ctx.inputs])
            for call, node in zip(calls, nodes, strict=True):
                site = wanted[call]
                mean = now[x] if self.against == "layer" else full[site.x]
                target = constants.value(site.weight, torch.float64) @ mean
                if site.bias is not None:
                    target += constants.value(site.bias, torch.float64)
                shift = target - now[corrected(node)]
                self.shift(graph, ctx.weights, node, shift)
                report.sites += 1
                size, other = (float(v.square().mean().sqrt()) for v in (shift, target))
                report.details[f"{call[0]} call {call[1] + 1}" if call[1] else call[0]] = {"shift": size, "mean": other}
        sweep(graph, ctx.weights)
        return report

    def shift(self, graph: fx.Graph, weights: Weights, node: fx.Node, shift: Tensor) -> None:
        """Add to the bias of a call. One that other calls read, too, stays theirs."""
        place = 2 if is_call(node, LINEAR_CODED) else 4
        old = constant_name(args_of(node)[place])
        value = shift if old is None else shift + weights.value(old, torch.float64)
        name = old
        if old is None or len(uses(graph, old)) > 1:
            name = f"{site_name(node)}.{ADDED_BIAS}"
            name = next(n for n in (name, *(f"{name}.{i}" for i in range(1, len(graph.nodes)))) if n not in weights)
        assert name is not None
        weights.put(name, value.float())
        args = list(args_of(node))
        args[place] = read(graph, weights, name, node)
        node.args = tuple(args)


def source(node: fx.Node) -> fx.Node:
    """What a quantized linear reads, before it is rounded."""
    quantizer = activation_quantizer(node)
    found: fx.Node = args_of(node if quantizer is None else quantizer)[0]
    return found


def means(
    block: Block,
    graph: fx.Graph,
    weights: Weights,
    values: Sequence[fx.Node],
    states: Sequence[tuple[BlockInput, Tensor]],
) -> dict[fx.Node, Tensor]:
    """Σ c·v / Σ c over the rows v of values of a block, float64 [width], from states at its input."""
    buckets = mask_buckets(graph)
    run = Executor(graph, weights, [placeholder(graph), block.input(graph), *buckets], list(values), keep_weights=True)
    sums = {node: torch.zeros(node.meta["val"].shape[-1], dtype=torch.float64) for node in values}
    total = dict.fromkeys(values, 0.0)
    for part, hidden in states:
        sets = bucket_values(buckets, part.ids, part.mask_ratio)
        for node, value in zip(values, run(part.ids, hidden, *sets), strict=True):
            rows = value.reshape(-1, value.shape[-1]).double()
            c = weights_of_rows(node, part.weights, len(rows), f"%{node.name}").double()
            sums[node] += c @ rows
            total[node] += float(c.sum())
    found = {node: sums[node] / max(total[node], 1e-30) for node in values}
    for node, mean in found.items():
        if not bool(torch.isfinite(mean).all()):
            remedy = "Check the weights before this layer and the calibration text"
            raise CalibrationError(
                "its mean over the calibration states is not finite", where=f"%{node.name}", remedy=remedy
            )
    return found
