"""Token and confidence of chosen rows in place of logits of all: what greedy samplers read, and all that is computed.

Before:  logits = head(h)                                        h [B, L, K] → [B, L, V]
After:   token, confidence = argmax, softmax of head(h[rows])    M rows → int64 [M], float64 [M]

Where a backend left an op for that at the head of a lowered graph (`graph.CHOOSER`), no logits are in memory, and the head is not
computed for rows that nobody asks for. It is the same function of the same weights as argmax and softmax of the logits; sums run
in another order, so logits that differ by their rounding alone may be told apart another way.

Shapes: B batch, L positions, K width, V vocabulary, M rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dlqc.graph import CHOOSER, args_of, aten

Proposals = tuple[Tensor, Tensor]
"""Tokens int64 [M] and confidences float64 [M]."""


def choosing(graph: fx.Graph, excluded: int) -> fx.Graph | None:
    """The graph with one input more, `rows` int64 [M] of the B·L, that gives `Proposals`; None where no op was left for it.

    Args:
        excluded: the token that is never proposed, though it counts in the softmax.
    """
    head = next(node for node in graph.nodes if node.op == "output").args[0]
    chooser = head.meta.get(CHOOSER) if isinstance(head, fx.Node) else None
    if chooser is None:
        return None
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node is not head and node.op != "output":
            copies[node] = made.node_copy(node, lambda source: copies[source])
    last = [node for node in made.nodes if node.op == "placeholder"][-1]
    with made.inserting_after(last):
        rows = made.placeholder("rows", default_value=None)  # what comes before may have a default, too
    x, *others = (copies.get(value, value) for value in args_of(head))
    flat = made.call_function(aten.flatten.using_ints, (x, 0, 1))
    picked = made.call_function(aten.index_select.default, (flat, 0, rows))
    made.output(made.call_function(chooser, (picked, *others, *[None] * (2 - len(others)), excluded)))
    return made


class Proposing:
    """A module in its variant that ends in proposals, where there is one; made when first asked for."""

    def __init__(self, module: fx.GraphModule, excluded: int) -> None:
        graph = choosing(module.graph, excluded)
        self._run = None if graph is None else fx.GraphModule(module, graph, class_name="Proposing")

    def __bool__(self) -> bool:
        return self._run is not None

    def __call__(self, rows: Tensor, *inputs: Any) -> Proposals:
        """Proposals for rows int64 [M] of the module's B·L, from its inputs."""
        assert self._run is not None
        with torch.no_grad():
            found: Proposals = self._run(*inputs, rows)
        return found
