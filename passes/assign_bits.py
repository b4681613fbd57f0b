"""Choose for every linear how many bits it gets, so that all together stay within a budget and the model changes least.

Before:  linears of one scheme for all, or none yet
After:   a scheme for each linear in `Context.assignment`, which `quantize_weights` follows; the graph is not touched

    least Σ_u cost_u(c_u)   over one candidate c_u a unit, with   Σ_u bits_u(c_u) ≤ budget

A unit is the linears that read one value (queries, keys and values; gate and up), which engines merge and which so must be alike;
they are found on the dataflow. cost_u(c) is what quantizing that unit alone does to the model at masked positions
(`dlqc.sensitivity`: KL, confidence, logits; or an estimate from the Hessian, with or without the Fisher information of the
output, for models that are too large to run once a candidate). The sum is minimal among all assignments (`dlqc.knapsack`), to
be read as a prediction: it leaves out that errors of different units meet.

bits count all that is stored: codes, scales, zero points, padding. A budget in bpw is over the linears that are quantized; a
budget in bytes is for the weight files of the artifact, embeddings and head included. One that is out of reach, to either
side, is refused before any work, with the nearest that is not. (Fixed ranges of activations, a few numbers a linear, come later
and are not counted.)

`prior` p weighs the costs of the first block with 1 - p and of the last with 1 + p, in a straight line between: in diffusion
language models it is the early layers that are redundant (Layer Collapse, arXiv 2605.06366), where autoregressive practice
protects them. The measured costs know this already; the prior is for short calibration and for estimates.

Declines what quantize_weights declines: routers, and what `skip` names, which must be the same there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from dlqc.assignment import Choices, choices, in_words
from dlqc.budget import Budget
from dlqc.contract import Context, Pass, PassReport, Plan, matches
from dlqc.errors import FeasibilityError, RecipeError, nearest
from dlqc.formats.integer import IntFormat
from dlqc.formats.sparse import SparseFormat
from dlqc.graph import linears
from dlqc.knapsack import frontier, hull
from dlqc.rounding.contract import BlockRounding
from dlqc.rounding.gptq import Gptq
from dlqc.schemes import Method, Override, Scheme, Variant, head_format
from dlqc.sensitivity import RATIOS, Metric, sensitivities


@dataclass(frozen=True)
class AssignBits(Pass):
    """Assign bit widths by sensitivity.

    Options:
        budget: '3.2bpw', '4.5GB' or '800MiB' (`dlqc.budget`), an upper limit.
        bits: widths of integer candidates. group_size, symmetric, method: theirs, as in quantize_weights.
        probe: the rounding that stands in for theirs while costs are taken; None takes their own. A method that rounds the
            linears of a block together has no cost of one linear and needs it.
        variants: further candidates, such as variant(format=nf4, method=rtn).
        metric: kl, confidence or mse, measured by running the model; hessian or fisher, estimated.
        fused: linears that read one value get the same scheme.
        prior: 0 for none, up to 1: by how much more the last block's costs count, and the first block's less.
        fixed: linears whose scheme is settled; they count in the budget.
        skip: glob patterns of linears to leave alone. head: bits behind the last block. Both as in quantize_weights.
        rows: calibration rows to measure on. ratios: mask ratios, each row once at each.
    """

    name: ClassVar[str] = "assign_bits"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    gives: ClassVar[frozenset[str]] = frozenset({"assignment"})

    budget: str
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int | None = 128
    symmetric: bool = False
    method: Method = field(default_factory=Gptq)
    variants: tuple[Variant, ...] = ()
    probe: Method | None = None
    metric: Metric = "kl"
    fused: bool = True
    prior: float = 0.0
    fixed: tuple[Override, ...] = ()
    skip: tuple[str, ...] = ()
    head: int | None = None
    rows: int = 8
    ratios: tuple[float, ...] = RATIOS

    @property
    def candidates(self) -> tuple[Scheme, ...]:
        """The schemes to choose from."""
        made = [Scheme(IntFormat(b, self.group_size, self.symmetric), self.method).checked() for b in self.bits]
        base = made[0] if made else Scheme(IntFormat(4, self.group_size, self.symmetric), self.method)
        return tuple(dict.fromkeys([*made, *(variant.of(base) for variant in self.variants)]))

    def __post_init__(self) -> None:
        Budget.read(self.budget)
        if not self.candidates:  # a wrong width, group or method is refused here, with the option's name
            raise RecipeError("there is nothing to choose from", where="assign_bits.bits", remedy="Use (2, 3, 4, 8)")
        schemes = [*self.candidates, *(override.of(self.candidates[0]) for override in self.fixed)]
        head_format(self.head, schemes[0].format)
        if any(isinstance(scheme.format, SparseFormat) for scheme in schemes):
            what = "what a sparse weight takes is known when it is pruned, and budgets are reckoned beforehand"
            raise RecipeError(what, where="assign_bits.variants", remedy="Choose among other formats")
        for scheme in map(self._probing, schemes):
            if isinstance(scheme.method, BlockRounding):
                what = f"{scheme.method.name} rounds the linears of a block together, and has no cost of one alone"
                raise RecipeError(what, where="assign_bits.probe", remedy="Use probe=gptq, or another method")
        if not 0 <= self.prior <= 1:
            what = f"{self.prior} is outside [0, 1]"
            raise RecipeError(what, where="assign_bits.prior", remedy="Use 0 for none, or 0.5")
        if self.rows < 1:
            raise RecipeError(f"{self.rows} rows hold nothing", where="assign_bits.rows", remedy="Use 8")
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            what = f"{self.ratios} are no mask ratios"
            raise RecipeError(what, where="assign_bits.ratios", remedy="Use numbers above 0 and up to 1, such as 0.5")

    def _probing(self, scheme: Scheme) -> Scheme:
        """What is tried in the place of a candidate."""
        return scheme if self.probe is None else Scheme(scheme.format, self.probe).checked("assign_bits.probe")

    def needed_facts(self) -> frozenset[str]:
        # Gradients do not pass what rounds queries, keys and values.
        return self.needs | ({"float-attention"} if self.metric == "fisher" else set())

    def choices(self, graph: fx.Graph, ctx: Context, plan: Plan | None = None) -> Choices:
        """What may be chosen, from shapes alone; beforehand, with what passes before this one plan."""
        tables: dict[str, tuple[IntFormat, int, int]] = {}
        if plan is not None:
            tied = {n: s for n, s in plan.sites.items() if isinstance(s.weight, IntFormat)}
            tables = {n: (s.integers, s.out_features, s.in_features) for n, s in tied.items()} | plan.tables
        kept: dict[str, Any] = {"fused": self.fused, "skip": self.skip, "fixed": self.fixed, "head": self.head}
        return choices(graph, ctx, self.candidates, tables=tables, **kept)

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        names = [site.name for site in linears(graph.nodes, ctx.weights)]
        patterns = [("skip", p) for p in self.skip] + [("fixed", p) for o in self.fixed for p in o.sites]
        for option, pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                hint = nearest(pattern, names[:8])
                plan.problems.append(f"assign_bits: {option} pattern {pattern!r} matches no linear; {hint}, …")
        found = self.choices(graph, ctx, plan)
        plan.problems += [f"assign_bits: {problem}" for problem in found.problems]
        if not found.units:
            plan.problems.append("assign_bits: the repeated blocks hold no linear that is not skipped")
        if plan.problems:
            return
        budget = Budget.read(self.budget)
        reason = found.out_of_reach(budget)
        if reason is not None:
            plan.problems.append(f"assign_bits: budget={self.budget!r}: {reason}")
            return
        for unit, schemes in zip(found.units, found.schemes, strict=True):
            plan.assigned |= dict.fromkeys(unit.names, schemes)
        plan.assigned_head = self.head
        plan.limit_bits = min(budget.limit(found.weights, found.rest), found.largest)
        least, most = (budget.spelled(b, found.weights, found.rest) for b in (found.smallest, found.largest))
        labels = ", ".join(dict.fromkeys(s.label for schemes in found.schemes for s in schemes))
        plan.notes.append(
            f"assigned while compiling: {len(plan.assigned)} linears in {len(found.units)} units among {labels}, "
            f"within {self.budget} ({least} to {most} can be reached)"
        )

    def costs(self, graph: fx.Graph, ctx: Context, found: Choices) -> list[list[dict[str, float]]]:
        """All metrics of all candidates, weighed by the prior."""
        tried = [tuple(map(self._probing, schemes)) for schemes in found.schemes]
        table = sensitivities(graph, ctx, found.units, tried, self.metric, rows=self.rows, ratios=self.ratios)
        last = max(1, len(ctx.blocks) - 1)
        weighed = [1 + self.prior * (2 * unit.block / last - 1) for unit in found.units]
        return [
            [{name: w * value for name, value in costs.items()} for costs in row]
            for w, row in zip(weighed, table, strict=True)
        ]

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        found, budget = self.choices(graph, ctx), Budget.read(self.budget)
        reason = found.out_of_reach(budget)
        if reason is not None:  # passes in between have made constants larger than the plan could know
            raise FeasibilityError(f"budget {self.budget!r}: {reason}", where="assign_bits", remedy="Change the budget")
        table = self.costs(graph, ctx, found)
        costs = [[float(cost[self.metric]) for cost in row] for row in table]
        limit = budget.limit(found.weights, found.rest)
        best = frontier(found.items(costs))
        index = best.at(limit)
        choice = best.choice(index)
        ctx.assignment = found.assignment(choice)
        report = PassReport(sites=len(ctx.assignment), declined=list(found.left))
        report.choices = {name: scheme.label for name, scheme in ctx.assignment.items()}
        for unit, schemes, row, c in zip(found.units, found.schemes, table, choice, strict=True):
            numbers = {
                f"{name} at {s.format.label}": v
                for s, cost in zip(schemes, row, strict=True)
                for name, v in cost.items()
            }
            report.details[unit.names[0]] = {"chosen": float(c)} | numbers
        size = found.size(choice)
        report.metrics = {
            "bits_per_quantized_weight": size / found.weights,
            "file_bytes": (size + found.rest) / 8,
            f"predicted_{self.metric}": best.costs[index],
            "least_possible": hull(found.items(costs)).lower_bound(limit),
        }
        spelled = budget.spelled(size, found.weights, found.rest)
        report.notes.append(
            f"{spelled} of {self.budget} used: {size / found.weights:.3f} bits per quantized weight, weight files of "
            f"{(size + found.rest) / 8e6:.2f} MB; {in_words(ctx.assignment)}; predicted {self.metric} {best.costs[index]:.3g}"
        )
        if best.slack:
            behind = best.costs[index] - report.metrics["least_possible"]
            report.notes.append(
                f"the frontier was thinned: an assignment of the same size may cost up to {behind:.3g} less"
            )
        return report
