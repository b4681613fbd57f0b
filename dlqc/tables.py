"""What a graph computes from one number alone, apart from the rest: rotary tables, position ids, masks.

Before:  y = f(x, n)            tables for n positions are made at every call
After:   y = g(x, n, *t(n))     t(n) is kept for the last few n

A denoising run asks for the same length hundreds of times.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

#: How many values of the number are kept.
KEPT = 8


class Tables:
    """A graph split in two: what depends on one of its inputs and constants only, and the rest.

    Attributes:
        rest: the graph without the tables, which are inputs of it after all others.

    Args:
        root: whose buffers and parameters the graph reads.
        graph: the whole; it is left as it is.
        given: name of the input, a number.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, given: str) -> None:
        tables = _tables(graph, given)
        ends = [node for node in tables if any(user not in tables for user in node.users)]
        self.rest, made = fx.Graph(), fx.Graph()
        first: dict[fx.Node, fx.Node] = {}
        number = made.placeholder(given)
        for node in graph.nodes:
            if node in tables or (node.op == "get_attr" and any(user in tables for user in node.users)):
                first[node] = made.node_copy(node, lambda source: number if source.name == given else first[source])
        made.output(tuple(first[node] for node in ends))
        second: dict[fx.Node, fx.Node] = {}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            second[node] = self.rest.node_copy(node)
        for node in ends:
            second[node] = self.rest.placeholder(f"table_{node.name}")
        for node in graph.nodes:
            if node not in second and node not in tables:
                second[node] = self.rest.node_copy(node, lambda source: second[source])
        _drop_unread_constants(self.rest)
        self._run = fx.GraphModule(root, made, class_name="Tables")
        self._constants = list(self._run.buffers()) + list(self._run.parameters())
        self._held: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def __call__(self, value: int) -> tuple[Any, ...]:
        """The tables for a value of the input, in the order of the graph."""
        # Constants that were written to since give other tables.
        key = (value, *(0 if part.is_inference() else part._version for part in self._constants))
        held = self._held
        found = held.pop(key, None)
        if found is None:
            found = self._run(value)
            for old in list(held)[: max(0, len(held) - KEPT + 1)]:
                held.pop(old, None)  # another thread may have been here
        held[key] = found  # the last one asked for is the last to go
        return found


def _tables(graph: fx.Graph, given: str) -> set[fx.Node]:
    """Calls that read the number, constants and each other; of what reads constants alone, only what holds no weight."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes
        numbers = [
            source for source in sources if source in found or (source.op == "placeholder" and source.name == given)
        ]
        weights = [source for source in sources if source.op == "get_attr"]
        if len(numbers) + len(weights) == len(sources) and (numbers or not weights):
            found.add(node)
    return found


def _drop_unread_constants(graph: fx.Graph) -> None:
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
