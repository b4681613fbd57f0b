"""Blocks of a model, found on the dataflow graph.

A value that every path from the embedding to the logits passes through is a separator (a dominator of the output in the
graph of floating-point values). Between two separators lies a segment; the longest run of segments that repeats, with its
shortest period, is the stack of blocks. Blocks that share a weight are one block: a shared weight can be rounded only once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from dlqc.execute import logits_node, needed
from dlqc.graph import EMBEDDINGS, LINEAR, is_call

_TAG = "block_boundary"


@dataclass(frozen=True)
class Block:
    """One block: everything computed from the value at boundary `start` to the value at boundary `stop`.

    Boundaries are tags that survive rewriting (`dlqc.graph.replace` hands them on).
    """

    index: int
    start: int
    stop: int

    def input(self, graph: fx.Graph) -> fx.Node:
        return _tagged(graph, self.start)

    def output(self, graph: fx.Graph) -> fx.Node:
        return _tagged(graph, self.stop)

    def nodes(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes between input and output that depend on the input, in graph order."""
        source = self.input(graph)
        inside: set[fx.Node] = {source}
        found = []
        for node in needed(graph, [source], [self.output(graph)]):
            if any(a in inside for a in node.all_input_nodes):
                inside.add(node)
                found.append(node)
        return found


def tail(graph: fx.Graph, blocks: Sequence[Block]) -> Block | None:
    """What lies between the last block and the logits, as one more block; None if there is nothing."""
    if not blocks:
        return None
    start, end = blocks[-1].stop, logits_node(graph)
    return Block(start, start, start + 1) if end.meta.setdefault(_TAG, start + 1) == start + 1 else None


def _tagged(graph: fx.Graph, boundary: int) -> fx.Node:
    found: fx.Node = next(node for node in graph.nodes if node.meta.get(_TAG) == boundary)
    return found


def find_blocks(graph: fx.Graph) -> list[Block]:
    """Find the stack of blocks and tag its boundaries. A graph without a stack is one block, head excluded."""
    separators = _separators(graph)
    if len(separators) < 2:
        return []
    first, period, repeats = _longest_repeat([_signature(graph, a, b) for a, b in itertools.pairwise(separators)])
    if repeats < 2:
        cuts = _single(separators)
        if not cuts:
            return []
    else:
        cuts = [separators[first + i * period] for i in range(repeats + 1)]
    cuts = _merge_shared(graph, cuts)
    for index, node in enumerate(cuts):
        node.meta[_TAG] = index
    return [Block(i, i, i + 1) for i in range(len(cuts) - 1)]


def _separators(graph: fx.Graph) -> list[fx.Node]:
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in graph.nodes:
        if not _is_float(node) or node.op == "get_attr":
            continue
        for source in node.all_input_nodes:
            if source.op == "call_function" and _is_float(source):
                flow.add_edge(source, node)
    start = next((node for node in graph.nodes if is_call(node, *EMBEDDINGS)), None)
    end = logits_node(graph)
    if start is None or start not in flow or end not in flow:
        return []
    dominators = nx.immediate_dominators(flow, start)
    chain, node = [end], end
    while node is not start:
        if node not in dominators or dominators[node] is None:
            return []
        node = dominators[node]
        chain.append(node)
    return chain[::-1]


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point()


def _signature(graph: fx.Graph, a: fx.Node, b: fx.Node) -> tuple[str, ...]:
    inside, names = {a}, []
    for node in needed(graph, [a], [b]):
        if any(source in inside for source in node.all_input_nodes):
            inside.add(node)
            names.append(f"{node.target}{[str(s) for s in node.meta['val'].shape] if _is_float(node) else ''}")
    return tuple(names)


def _longest_repeat(items: list[tuple[str, ...]]) -> tuple[int, int, int]:
    """(first, period, repeats) of the run that covers the most nodes; the shortest period among equals."""
    best, best_score = (0, 1, 1), 0
    for period in range(1, len(items) // 2 + 1):
        first = 0
        while first + 2 * period <= len(items):
            repeats = 1
            window = items[first : first + period]
            while items[first + repeats * period : first + (repeats + 1) * period] == window:
                repeats += 1
            score = repeats * sum(len(item) for item in window)
            if repeats > 1 and score > best_score:
                best, best_score = (first, period, repeats), score
            first += 1
    return best


def _single(separators: list[fx.Node]) -> list[fx.Node]:
    """One block: from the embedding to the value that the last linear on the chain reads. None where that is all."""
    last = next((i for i in range(len(separators) - 1, 0, -1) if is_call(separators[i], LINEAR)), len(separators))
    return [separators[0], separators[last - 1]] if last > 1 else []


def _merge_shared(graph: fx.Graph, cuts: list[fx.Node]) -> list[fx.Node]:
    """Drop the boundaries between blocks that read a weight matrix in common."""
    owners: list[set[str]] = []
    for a, b in itertools.pairwise(cuts):
        owners.append(
            {str(n.target) for n in needed(graph, [a], [b]) if n.op == "get_attr" and n.meta["val"].dim() > 1}
        )
    counts = Counter(name for names in owners for name in names)
    shared = {name for name, count in counts.items() if count > 1}
    keep = [cuts[0]]
    for i in range(1, len(cuts) - 1):
        before = set().union(*owners[:i]) & shared
        after = set().union(*owners[i:]) & shared
        if not before & after:
            keep.append(cuts[i])
    return [*keep, cuts[-1]]
