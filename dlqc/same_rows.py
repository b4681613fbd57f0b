"""Whether a graph that was made for a window of positions gives what the graph of all positions gives there, node by node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dlqc.errors import FeasibilityError
from dlqc.execute import placeholder

#: Deviation (root mean square, relative) up to which a node of the step counts as that of the full forward. Rounding differs
#: with the number of rows; where activations are quantized, a different rounding moves whole codes.
_SAME, _SAME_QUANTIZED = 1e-3, 5e-2


class Values(fx.Interpreter):
    """Runs a module and keeps the value of every tensor, by the name of its node in the full graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.values[n.meta.get("full", n.name)] = value
        return value


def check_same(
    graph: fx.Graph, nodes: set[fx.Node], full: dict[str, Tensor], step: dict[str, Tensor], window: slice, remedy: str
) -> None:
    """Refuse the first of the nodes of the full graph whose value in the step is not that of its rows `window`.

    Args:
        full, step: values by the name of the node; what only one of them has is passed over.

    Raises:
        FeasibilityError: with the node.
    """
    quantized = any("act" in str(node.target) or "int8" in str(node.target) for node in graph.nodes)
    for node in graph.nodes:
        if node not in nodes or node.name not in full or node.name not in step:
            continue
        expected, found, dim = full[node.name], step[node.name], _position_dim(node)
        if dim < 0 or not expected.is_floating_point():
            continue
        expected = expected.narrow(dim, window.start, window.stop - window.start).double()
        scale = expected.square().mean().sqrt().clamp_min(1e-30)
        if not bool(torch.isfinite(scale)):
            return  # the model itself fails; samplers say where
        deviation = float((found.double() - expected).square().mean().sqrt() / scale)
        if not deviation <= (_SAME_QUANTIZED if quantized else _SAME):
            raise FeasibilityError(
                f"{node.target} gives other values for a window than for all positions (by {deviation:.2g})",
                where=node.name,
                remedy=remedy,
            )


def _position_dim(node: fx.Node) -> int:
    """The dimension whose size is the length, or -1 (where batch and length are one dimension)."""
    length = placeholder(node.graph).meta["val"].shape[1]
    sizes = node.meta["val"].shape
    return next((i for i, s in enumerate(sizes) if isinstance(s, torch.SymInt) and s.node.expr == length.node.expr), -1)
