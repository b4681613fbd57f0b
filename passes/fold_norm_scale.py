"""Move the gain of a norm into the linears that read it.

Before:  y = linear(rms_norm(x; g), W)
After:   y = linear(rms_norm(x; 1), W·diag(g))

rms_norm(x; g) = rms_norm(x; 1)·diag(g), and linear(x·D, W) = linear(x, W·D). For a layer norm the bias moves with the
gain: layer_norm(x; g, b) = layer_norm(x; 1, b/g)·diag(g), which needs g ≠ 0. Exact in real arithmetic.

Declines:
    - a reader that is not a linear on a constant weight (a post-norm residual stream): it would lose the gain
    - a weight that somebody else reads, or that is tied: the other reader would gain it
    - a gain, or a bias, that several norms read: the others would lose it
    - a gain with a zero in a layer norm with bias: b/g does not exist

Running it twice is the same as once: a gain of one is not a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.graph import LAYER_NORM, NORMS, arg, constant_name, is_call
from dlqc.motion import Diagonal, can_move_down, insert, is_shared, move_down
from dlqc.weights import Ones, ScaleColumns, Weights


@dataclass(frozen=True)
class FoldNormScale(Pass):
    """Norm gains become one; the linears after them carry the gain."""

    name: ClassVar[str] = "fold_norm_scale"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    preserves: ClassVar = "exact"

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for node in ctx.nodes(graph):
            found = match(node, graph, ctx.weights)
            if isinstance(found, Declined):
                report.declined.append(found)
            elif found is not None:
                rewrite(node, found, graph, ctx.weights)
                report.sites += 1
        return report


def match(node: fx.Node, graph: fx.Graph, weights: Weights) -> str | Declined | None:
    """The name of the gain to move, or why not, or None if the node is no norm with a gain other than one."""
    gain = constant_name(arg(node, 2, "weight")) if is_call(node, *NORMS) else None
    if gain is None:
        return None
    value = weights.value(gain, torch.float64)
    if bool((value == 1).all()):
        return None
    if is_shared(graph, gain):
        return Declined(gain, "the gain is shared by several norms")
    reason = can_move_down(graph, weights, node)
    if reason is not None:
        return Declined(gain, reason)
    bias = arg(node, 3, "bias") if is_call(node, LAYER_NORM) else None
    if bias is not None and constant_name(bias) is None:
        return Declined(gain, "the bias is no constant")
    if is_shared(graph, constant_name(bias)):
        return Declined(gain, "the bias is shared by several norms")
    if bias is not None and bool((value == 0).any()):
        return Declined(gain, "the gain has a zero, so the bias cannot be divided by it")
    return gain


def rewrite(node: fx.Node, gain: str, graph: fx.Graph, weights: Weights) -> None:
    """Take the gain out of the norm, put it on the edge, and let it move down."""
    g = weights.value(gain, torch.float64)
    weights.fold(gain, Ones())
    bias = constant_name(arg(node, 3, "bias")) if is_call(node, LAYER_NORM) else None
    if bias is not None:
        weights.fold(bias, ScaleColumns(1.0 / g))
    move_down(graph, weights, insert(graph, weights, node, Diagonal(g)))
