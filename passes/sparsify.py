"""Set weights of the blocks' linears to zero, and move the others to make up for them.

Before:  linear(x, W, b)
After:   linear(x, Ŵ, b),   Ŵ = W ∘ M or, by SparseGPT, the best weights found on the mask M

M keeps the share 1 - `ratio` of the weights, or at most n of every m neighbours in a row (`pattern`, such as "2:4"). Methods
(`dlqc.pruning`): magnitude, Wanda, SparseGPT; the last two by the statistics of the inputs on the denoising states, as they
arrive through the blocks that are pruned and rounded already. Lossy; the report has each site's sparsity and, by SparseGPT, its
output signal-to-noise ratio.

Sinks. In a masked denoiser the tokens that attention collects in come and go with the canvas; what they do to the statistics
says little of the states to come. `calibrate(weight=sink_aware)` counts them less (arXiv 2602.17664), for every method.

Sparse and quantized. Put quantize_weights behind. The mask goes along, and pruned weights stay zero: integers, nf4, fp8 and
microscaling have an exact zero; planes, codebooks and lattices have none and are refused. GPTQ (and GPTAQ) get the mask and, from
magnitude and Wanda, the weight as it was before: they make up for pruning and rounding. What SparseGPT moved is made up for
already, and all methods round that.

What it saves. As a dense matrix nothing: zeros are stored like other numbers. `quantize_weights(format=sparse(bits=4))` stores a
bit a weight and the kept weights, `sparse(bits=16)` without quantizing them. No kernel here multiplies faster for it.

Declines:
    - a linear that `skip` names
    - routers, outlier columns and tied heads (`dlqc.kept`)
    - (outside the repeated blocks nothing is a site)

Run it behind the transforms: one that mixes columns or rows would fill the zeros, and is refused. Run twice, the masks intersect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Pass, PassReport, Plan, matches
from dlqc.errors import nearest
from dlqc.graph import linears
from dlqc.kept import to_round
from dlqc.pruning import Method, Pattern, SparseGpt
from dlqc.weights import Pruned


@dataclass(frozen=True)
class Sparsify(Pass):
    """Prune every linear of every block.

    Options:
        ratio: share of the weights that go.
        pattern: "n:m" keeps at most n of every m neighbours in a row, in place of `ratio`; None sets no pattern.
        method: the pruning method.
        skip: glob patterns of module names to leave alone.
    """

    name: ClassVar[str] = "sparsify"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    scope: ClassVar = "block"

    ratio: float = 0.5
    pattern: str | None = None
    method: Method = field(default_factory=SparseGpt)
    skip: tuple[str, ...] = ()

    @property
    def wanted(self) -> Pattern:
        return Pattern.read(self.ratio, self.pattern)

    def __post_init__(self) -> None:
        self.wanted  # noqa: B018  a wrong ratio or pattern is refused here

    def needed_facts(self) -> frozenset[str]:
        return self.needs | ({"states"} if self.method.statistics else set())

    def statistics(self) -> frozenset[str]:
        return self.method.statistics

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        names = [site.name for site in linears(graph.nodes, ctx.weights)]
        for pattern in (p for p in self.skip if not any(matches(name, [p]) for name in names)):
            plan.problems.append(f"skip pattern {pattern!r} matches no linear; {nearest(pattern, names[:8])}, …")
        for block in ctx.blocks:
            for sites in to_round(block.nodes(graph), ctx.weights, self.skip)[0].values():
                reason = self.wanted.check(sites[0].in_features)
                if reason is not None:
                    plan.problems.append(f"{sites[0].name}: {reason} (use pattern=None, or exclude it with skip=)")
                plan.pruned[sites[0].name] = 1 - self.wanted.ratio

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        by_weight, report.declined = to_round(ctx.nodes(graph), ctx.weights, self.skip)
        shared: list[Any] = []
        prepared: Mapping[str, Any] = {}
        for weight, sites in by_weight.items():
            stats = ctx.stats.get(weight, {})
            # Linears that read the same value come one after the other and share their statistics, tensor for tensor.
            if not prepared or shared != list(map(id, stats.values())):
                shared, prepared = list(map(id, stats.values())), self.method.prepare(stats)
            exact = ctx.weights.value(weight, torch.float64)
            try:
                found = self.method.prune(exact, self.wanted, prepared)
            except Exception as error:
                error.add_note(f"while pruning {sites[0].name}")
                raise
            moved = None if found.moved is None else found.moved.to(ctx.weights[weight].storage_dtype)
            ctx.weights.fold(weight, Pruned.of(found.kept, moved))
            zero = 1 - float(found.kept.double().mean())
            report.details[sites[0].name] = {"sparsity": zero} | found.metrics
            report.sites += 1
        if report.sites:
            report.notes.append(
                f"weights are sparse ({self.wanted.label}) and stored dense, which saves nothing, unless they are quantized "
                "with format=sparse"
            )
        return report
