"""The pass manager: checks the order, checks feasibility, runs the passes, checks the law after each.

Graph-scoped passes run once. Consecutive block-scoped passes run as a nested pipeline over the blocks of the model:

    for each block:  for each pass:  collect the statistics it asks for, apply it
                     check the law, run the states through the rewritten block, free its weights

so that each block is calibrated on what the quantized blocks before it really produce, and memory holds one block and
the states. Where a pass asks for it, a second stream of states goes through the blocks as they were before their weights
were rounded. Instruments see every step: `before`, `after`, `on_error`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from dlqc.blocks import Block, find_blocks, tail
from dlqc.certificate import certified
from dlqc.check import check
from dlqc.contract import FACTS_OF_CAPTURE, FACTS_OF_CONTEXT, Context, Pass, PassReport, Plan
from dlqc.errors import ContractError, FeasibilityError
from dlqc.graph import fingerprint
from dlqc.states import StateFlow, needs_exact, needs_original, needs_states

Progress = Callable[[str, int, int], None]


class Instrument:
    """Watches passes. Subclass what you need; see `dlqc.instruments`."""

    def before(self, p: Pass, graph: fx.Graph, ctx: Context) -> None: ...

    def after_block(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None: ...

    def after(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None: ...

    def on_error(self, p: Pass, graph: fx.Graph, ctx: Context, error: Exception) -> None: ...


@dataclass
class PassManager:
    """Runs a tuple of passes on a captured graph.

    Attributes:
        passes: in order; never sorted.
        instruments: called around every pass (for block-scoped passes, around the nested pipeline's share of the pass).
        batch: states that run through a block at a time.
        progress: called with (label, done, total) during long work.
    """

    passes: Sequence[Pass]
    instruments: Sequence[Instrument] = ()
    batch: int = 8
    progress: Progress | None = None
    reports: list[tuple[Pass, PassReport]] = field(default_factory=list)

    def check_order(self, holding: Iterable[str] = FACTS_OF_CAPTURE) -> None:
        """Refuse a pipeline in which a pass needs a fact that does not hold, and say what to do."""
        facts: set[str] = set(holding)
        broken_by: dict[str, str] = {}
        before: Pass | None = None
        for p in self.passes:
            if "lowered" in facts:
                raise ContractError(
                    f"pass {p.name!r} comes after the graph is lowered, and an artifact holds the graph before that",
                    where="passes",
                    remedy=f"Move {p.name!r} before 'lower'",
                )
            for fact in sorted(p.needed_facts() - facts):
                raise ContractError(
                    f"pass {p.name!r} needs {fact!r}, which does not hold here",
                    where="passes",
                    remedy=self._remedy(p, fact, broken_by),
                )
            if "fisher" in p.statistics() and before is not None and before.scope == p.scope == "block":
                raise ContractError(
                    f"pass {p.name!r} wants gradients of the weights, which are taken before the first block, and "
                    f"{before.name!r} changes the blocks one by one in between",
                    where="passes",
                    remedy=f"Leave {before.name!r} out, use a transform of the whole graph, or sensitivity='hessian'",
                )
            before = p
            ended = p.invalidates | ({"original"} if p.scope == "graph" else set())
            broken_by |= dict.fromkeys((ended & facts) - p.given_facts(), p.name)
            facts = (facts - ended) | p.given_facts()

    def _remedy(self, p: Pass, fact: str, broken_by: dict[str, str]) -> str:
        if fact in broken_by:
            return f"Move {p.name!r} before {broken_by[fact]!r}, which ends it"
        later = [q.name for q in self.passes if fact in q.given_facts()]
        if later:
            return f"Move {later[0]!r}, which gives it, before {p.name!r}"
        return f"No pass in this pipeline gives {fact!r}"

    def plan(self, graph: fx.Graph, ctx: Context) -> Plan:
        """What the passes will do, without touching a weight."""
        ctx.blocks = ctx.blocks or find_blocks(graph)
        plan = Plan()
        for p in self.passes:
            p.plan(graph, ctx, plan)
        if plan.assigned and plan.beside and not plan.problems:
            what = f"{sum(plan.beside.values()) / 8e6:.3f} MB are stored beside the weights (low_rank, correct_bias)"
            plan.problems.append(f"assign_bits: {what}, which its budget does not count")
        return plan

    def check_feasibility(self, graph: fx.Graph, ctx: Context) -> Plan:
        """Refuse before any work, naming every offender at once."""
        plan = self.plan(graph, ctx)
        if plan.problems:
            shown = plan.problems[:8]
            more = f" (and {len(plan.problems) - 8} more)" if len(plan.problems) > 8 else ""
            raise FeasibilityError("; ".join(shown) + more, remedy="Nothing was changed or written")
        return plan

    def run(self, graph: fx.Graph, ctx: Context) -> list[tuple[Pass, PassReport]]:
        """Run all passes; gives their reports in order."""
        self.check_order(ctx.facts)
        self.check_feasibility(graph, ctx)
        for scope, group in itertools.groupby(self.passes, key=lambda p: p.scope):
            members = list(group)
            if scope == "block":
                self._run_blocks(members, graph, ctx)
            else:
                for p in members:
                    self._run_one(p, graph, ctx)
        return self.reports

    def _run_one(self, p: Pass, graph: fx.Graph, ctx: Context) -> None:
        for instrument in self.instruments:
            instrument.before(p, graph, ctx)
        try:
            report = self._apply(p, graph, ctx)
            ctx.facts = (ctx.facts - p.invalidates) | p.given_facts()
            self._settle(p, graph, ctx, report)
        except Exception as error:
            self._failed(p, graph, ctx, error)
            raise
        for instrument in self.instruments:
            instrument.after(p, graph, ctx, report)
        self.reports.append((p, report))

    def _apply(self, p: Pass, graph: fx.Graph, ctx: Context) -> PassReport:
        """Apply a pass and hold it to what it says: a certificate if it claims to be exact, no change if it reports none."""
        before = fingerprint(graph, ctx.weights)
        report = certified(p, graph, ctx)
        if not isinstance(report, PassReport):
            raise ContractError(
                f"apply() of pass {p.name!r} returned {type(report).__name__}", remedy="Return a dlqc.PassReport"
            )
        changed = fingerprint(graph, ctx.weights) != before
        if report.sites and not changed and p.given_facts() - FACTS_OF_CONTEXT:
            raise ContractError(
                f"pass {p.name!r} reports {report.sites} sites, but nothing changed",
                remedy=f"This is a fault of {p.name!r}: count only what it rewrites",
            )
        if report.sites == 0 and changed:
            raise ContractError(
                f"pass {p.name!r} reports that it changed nothing, but the graph or its constants changed",
                remedy=f"This is a fault of {p.name!r}: count every site that it rewrites",
            )
        return report

    def _settle(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        """The law, and the rule that a pass which was asked to rewrite something did."""
        check(graph, ctx.weights, ctx.spec, ctx.facts, after=f"pass {p.name!r}")
        reasons = "; ".join(f"{d.site}: {d.reason}" for d in report.declined[:4]) or "no site looks like it"
        if report.declined and p.strict:
            raise ContractError(
                f"pass {p.name!r} left {len(report.declined)} of {report.sites + len(report.declined)} sites alone ({reasons})",
                where="passes",
                remedy="Exclude them, or set strict=False",
            )
        if report.sites == 0 and p.required:
            raise ContractError(
                f"pass {p.name!r} found nothing to rewrite ({reasons})",
                where="passes",
                remedy="Remove it from the recipe, or set required=False",
            )

    def _failed(self, p: Pass, graph: fx.Graph, ctx: Context, error: Exception) -> None:
        done = ", ".join(q.name for q, _ in self.reports)
        error.add_note(f"in pass {p.name!r}, {f'after {done}' if done else 'before any other has finished'}")
        for instrument in self.instruments:
            instrument.on_error(p, graph, ctx, error)

    def _run_blocks(self, passes: Sequence[Pass], graph: fx.Graph, ctx: Context) -> None:
        if not ctx.blocks:
            raise FeasibilityError(
                "no embedding leads to the logits through one chain of values, so there are no blocks",
                where="blocks",
                remedy="Use graph-scoped passes only",
            )
        totals = [PassReport() for _ in passes]
        for p in passes:
            for instrument in self.instruments:
                instrument.before(p, graph, ctx)
        # Between blocks some blocks are rewritten and some are not: only facts that no member ends hold throughout.
        lasting = ctx.facts - frozenset().union(*(p.invalidates for p in passes))
        try:
            gradients = any("fisher" in p.statistics() for p in passes)
            kept = {"paired": needs_exact(passes), "original": needs_original(passes), "gradients": gradients}
            flow = StateFlow(graph, ctx, self.batch, **kept) if needs_states(passes) else None
            stretches = [*ctx.blocks, *self._tail(passes, graph, ctx)]
            for block in stretches:
                ctx.block = block
                for p, total in zip(passes, totals, strict=True):
                    if block not in ctx.blocks and not p.reaches_tail():
                        continue
                    self._tick(f"{p.name} block {block.index + 1}", block.index, len(ctx.blocks))
                    started = time.perf_counter()
                    try:
                        if flow:
                            flow.serve(p, block)
                        report = self._apply(p, graph, ctx)
                        check(graph, ctx.weights, ctx.spec, lasting, after=f"pass {p.name!r}", propagate=False)
                    except Exception as error:
                        error.add_note(f"in block {block.index} of {len(ctx.blocks)}")
                        self._failed(p, graph, ctx, error)
                        raise
                    total.merge(report)
                    for instrument in self.instruments:
                        instrument.after_block(p, graph, ctx, report)
                    ctx.stats, ctx.collect, ctx.inputs, ctx.original, ctx.observed = {}, None, (), None, {}
                    # The share of the pass in the nested pipeline, its statistics included.
                    total.metrics["seconds"] = total.metrics.get("seconds", 0.0) + time.perf_counter() - started
                if flow and block is not stretches[-1]:
                    flow.advance(block)
            self._tick("blocks", len(ctx.blocks), len(ctx.blocks))
        finally:
            ctx.block = None
        for p in passes:
            ctx.facts = (ctx.facts - p.invalidates) | p.given_facts()
        for p, total in zip(passes, totals, strict=True):
            try:
                self._settle(p, graph, ctx, total)
            except Exception as error:
                self._failed(p, graph, ctx, error)
                raise
            for instrument in self.instruments:
                instrument.after(p, graph, ctx, total)
            self.reports.append((p, total))

    def _tail(self, passes: Sequence[Pass], graph: fx.Graph, ctx: Context) -> list[Block]:
        """What comes after the last block, where a pass works on it."""
        found = tail(graph, ctx.blocks) if any(p.reaches_tail() for p in passes) else None
        return [] if found is None else [found]

    def _tick(self, label: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(label, done, total)
