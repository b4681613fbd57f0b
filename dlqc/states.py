"""The calibration states on their way through the blocks.

Two streams of hidden values stand at the input of the current block:

    current   behind the blocks as they are now: what the block will really read
    exact     behind the blocks as they were before their weights were rounded; kept only where a pass asks for it

Both are in the same basis: transforms that fold into weights come before rounding, so the block that the exact stream goes
through has them, too. It is a copy of the graph and of the expressions of the weights, whose tensors are the checkpoint's;
it is made when the first pass is about to end 'float-weights' and dropped when the stream has gone through it. What passes
before that change on purpose (a clipped weight) is part of it: it is the model that rounding gets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from dlqc.blocks import Block
from dlqc.contract import BlockInput, Context, Pass, Reads, Statistics
from dlqc.errors import ContractError
from dlqc.execute import Executor, bucket_values, mask_buckets, placeholder
from dlqc.fisher import fisher
from dlqc.graph import Linear, by_call, copy_graph, linears
from dlqc.observers import Batch, Observer
from dlqc.stats import OWN, PAIRED, Collector
from dlqc.weights import Weights


def needs_states(passes: Iterable[Pass]) -> bool:
    """Whether a pass asks for states, or for statistics from them."""
    return any(p.statistics() or p.reads() != "nothing" or "states" in p.needed_facts() for p in passes)


def needs_exact(passes: Iterable[Pass]) -> bool:
    """Whether a pass asks for states of the model before weights were rounded, or for statistics from them."""
    return any(
        p.reads() == "paired" or p.statistics() & PAIRED or (p.statistics() and p.sequence() == "none") for p in passes
    )


def needs_original(passes: Iterable[Pass]) -> bool:
    """Whether a pass asks for blocks as they were before their weights were rounded."""
    return needs_exact(passes) or any(p.reads() == "original" for p in passes)


class StateFlow:
    """Hidden values of the calibration states at the input of the current block, and statistics from them.

    Args:
        batch: states that run at a time.
        paired: keep the exact stream.
        original: keep each block as it was until the states have gone through it; the exact stream needs that.
        gradients: measure the Fisher information of all blocks' weights now, as they are before the first pass.
    """

    def __init__(
        self,
        graph: fx.Graph,
        ctx: Context,
        batch: int,
        *,
        paired: bool = False,
        original: bool = False,
        gradients: bool = False,
    ) -> None:
        if ctx.states is None:
            raise ContractError("block passes ask for statistics, but there are no states", remedy="Add 'calibrate'")
        self._graph, self._ctx, self._states = graph, ctx, ctx.states
        self._ratios = ctx.states.mask_ratio(ctx.spec.mask_id)
        self._slices = list(ctx.states.batches(batch))
        first = ctx.blocks[0].input(graph)
        start = Executor(graph, ctx.weights, [placeholder(graph)], [first], keep_weights=True)
        self._hidden = [start(self._states.ids[s])[0] for s in self._slices]
        self._exact = list(self._hidden) if paired else None
        self._keeps = paired or original
        self._original: tuple[fx.Graph, Weights] | None = None
        self._fisher = fisher(graph, ctx, batch=batch) if gradients else {}

    def serve(self, p: Pass, block: Block) -> None:
        """Give the context what a pass asks for, and keep the block for the exact stream if the pass is going to round it."""
        if self._keeps and self._original is None and "float-weights" in p.invalidates:
            self._original = copy_graph(self._graph), self._ctx.weights.clone()
        wanted = p.statistics()
        self._ctx.stats, self._ctx.collect = {}, None
        if wanted and p.sequence() == "layer":
            self._ctx.collect = partial(self.collect, block, wanted)
        elif wanted:
            self._ctx.stats = self.collect(block, wanted, exact=p.sequence() == "none")
        self._ctx.inputs = (
            [self._part(i, p.reads()) for i in range(len(self._slices))] if p.reads() != "nothing" else ()
        )
        self._ctx.original = self._original if p.reads() in ("original", "paired") else None
        self._ctx.observed = p.observers(self._graph, self._ctx)
        if self._ctx.observed:
            self.observe(block, self._ctx.observed.values())

    def _part(self, i: int, reads: Reads) -> BlockInput:
        s, exact = self._slices[i], self._stream(reads == "paired")[i]
        return BlockInput(self._states.ids[s], self._states.weights[s], self._hidden[i], exact, self._ratio(s))

    def collect(
        self, block: Block, wanted: frozenset[str], weights: Sequence[str] | None = None, *, exact: bool = False
    ) -> Statistics:
        """Run the block as it is now and gather statistics at its linears.

        Args:
            weights: names of the linears' weights; None for all. Only what their inputs need is computed.
            exact: take the block and the states before weights were rounded.
        """
        graph, constants = self._source(exact)
        sites = _sites(block, graph, constants, weights)
        ends = [block.output(graph)] if weights is None else [site.x for site in sites]
        run = _Runner(block, graph, constants, ends)
        pair = self._pair(block, sites) if wanted & PAIRED else None
        collector = Collector(wanted - OWN, sites)
        for i, s in enumerate(self._slices):
            ids, ratio = self._states.ids[s], self._ratio(s)
            before = dict(zip(pair[0], pair[1](ids, self._stream(True)[i], ratio), strict=True)) if pair else {}
            taps: Any = collector.taps(self._states.weights[s], ids == self._ctx.spec.mask_id, before)
            run(ids, self._stream(exact)[i], ratio, taps=taps)
        found = collector.result()
        if "fisher" in wanted:
            found = {weight: {**stats, "fisher": self._fisher[weight]} for weight, stats in found.items()}
        return found

    def observe(self, block: Block, observers: Collection[Observer]) -> None:
        """Run the block as it is now and show each observer the values that it wants."""
        wanted = list(dict.fromkeys(node for observer in observers for node in observer.nodes))
        run = _Runner(block, self._graph, self._ctx.weights, wanted)
        for i, s in enumerate(self._slices):
            batch = Batch(self._states.ids[s], self._states.weights[s], self._ratio(s))
            values = dict(zip(wanted, run(batch.ids, self._hidden[i], self._ratio(s)), strict=True))
            for observer in observers:
                observer.add([values[node] for node in observer.nodes], batch)

    def advance(self, block: Block) -> None:
        """Move the states through the rewritten block, and the exact ones through the block as it was."""
        for exact in (False, True) if self._exact is not None else (False,):
            graph, constants = self._source(exact)
            run, hidden = _Runner(block, graph, constants, [block.output(graph)]), self._stream(exact)
            for i, s in enumerate(self._slices):
                hidden[i] = run(self._states.ids[s], hidden[i], self._ratio(s))[0]
        self._original = None

    def _ratio(self, part: slice) -> torch.Tensor:
        return self._ratios[part]

    def _stream(self, exact: bool) -> list[torch.Tensor]:
        return self._exact if exact and self._exact is not None else self._hidden

    def _source(self, exact: bool) -> tuple[fx.Graph, Weights]:
        """Graph and constants that a stream goes through."""
        now = (self._graph, self._ctx.weights)
        return (self._original or now) if exact else now

    def _pair(self, block: Block, sites: Sequence[Linear]) -> tuple[list[fx.Node], _Runner]:
        """The values that the sites read, and what computes the same values of the exact stream."""
        graph, constants = self._source(True)
        same = by_call((s.weight, s) for s in _sites(block, graph, constants, None))
        ends: dict[fx.Node, fx.Node] = {}
        for key, site in by_call((s.weight, s) for s in sites).items():
            if key not in same:
                raise ContractError(
                    "is not in the block as it was before weights were rounded, so its inputs cannot be compared",
                    where=site.name,
                    remedy="Exclude it with skip=, or move the pass that adds it behind",
                )
            ends[site.x] = same[key].x
        return list(ends), _Runner(block, graph, constants, list(ends.values()))


def _sites(block: Block, graph: fx.Graph, constants: Weights, weights: Sequence[str] | None) -> list[Linear]:
    found = linears(block.nodes(graph), constants)
    return [site for site in found if weights is None or site.weight in weights]


class _Runner:
    """Computes values of a block from token ids, hidden values, and the mask ratios of the rows."""

    def __init__(self, block: Block, graph: fx.Graph, constants: Weights, ends: Sequence[fx.Node]) -> None:
        self._buckets = mask_buckets(graph)
        inputs = [placeholder(graph), block.input(graph), *self._buckets]
        self._run = Executor(graph, constants, inputs, ends, keep_weights=True)

    def __call__(
        self, ids: torch.Tensor, hidden: torch.Tensor, mask_ratio: torch.Tensor, *, taps: Any = None
    ) -> list[torch.Tensor]:
        return self._run(ids, hidden, *bucket_values(self._buckets, ids, mask_ratio), taps=taps)
