"""Move the gain of a norm into the linears that read it.

Before:  y = linear(rms_norm(x; g), W)
After:   y = linear(rms_norm(x; 1), W·diag(g))

rms_norm(x; g) = rms_norm(x; 1)·diag(g), and linear(x·D, W) = linear(x, W·D). For a layer norm the bias moves with the
gain: layer_norm(x; g, b) = layer_norm(x; 1, b/g)·diag(g), which needs g ≠ 0. Exact in real arithmetic.

A final norm whose reader is a head tied to the embedding cannot give its gain to one of the two: with untie=True the head
gets its own copy first, which makes the model larger by one head.

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
from dlqc.graph import LAYER_NORM, NORMS, arg, constant_name, is_call, is_shared, tied, untie
from dlqc.regions import Refused, Region, grow, push
from dlqc.transform import Diagonal
from dlqc.weights import OnColumns, Ones, Weights


@dataclass(frozen=True)
class FoldNormScale(Pass):
    """Norm gains become one; the linears after them carry the gain.

    Options:
        untie: give a head that is tied to the embedding its own weight where it has to take a gain.
    """

    name: ClassVar[str] = "fold_norm_scale"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    preserves: ClassVar = "exact"

    untie: bool = False

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for node in ctx.nodes(graph):
            found = match(node, graph, ctx.weights)
            if self.untie and isinstance(found, Declined):
                report.notes += [untie(graph, ctx.weights, s) for s in tied(graph, ctx.weights, node.users)]
                found = match(node, graph, ctx.weights)
            if isinstance(found, Declined):
                report.declined.append(found)
            elif found is not None:
                rewrite(node, found, ctx.weights)
                report.sites += 1
        return report


def match(node: fx.Node, graph: fx.Graph, weights: Weights) -> Region | Declined | None:
    """The readers that take the gain, or why not, or None if the node is no norm with a gain other than one."""
    gain = constant_name(arg(node, 2, "weight")) if is_call(node, *NORMS) else None
    if gain is None:
        return None
    value = weights.value(gain, torch.float64)
    if bool((value == 1).all()):
        return None
    if is_shared(graph, gain):
        return Declined(gain, "the gain is shared by several norms")
    readers = grow(graph, weights, node, "diagonal", upward=False)
    if isinstance(readers, Refused):
        hint = "; set untie=True" if tied(graph, weights, node.users) else ""
        return Declined(gain, f"{readers}{hint}")
    if any(is_call(absorb.by, *NORMS) for absorb in readers.absorbs.values()):
        return Declined(gain, "it would only move into the gain of another norm")
    bias = arg(node, 3, "bias") if is_call(node, LAYER_NORM) else None
    if bias is not None and constant_name(bias) is None:
        return Declined(gain, "the bias is no constant")
    if is_shared(graph, constant_name(bias)):
        return Declined(gain, "the bias is shared by several norms")
    added = bias is not None or any(not absorb.undo for absorb in readers.absorbs.values())
    if added and bool((value == 0).any()):
        return Declined(gain, "the gain has a zero, so the bias cannot be divided by it")
    return readers


def rewrite(node: fx.Node, readers: Region, weights: Weights) -> None:
    """Take the gain out of the norm and push it into the readers."""
    gain = str(constant_name(arg(node, 2, "weight")))
    g = weights.value(gain, torch.float64)
    weights.fold(gain, Ones())
    bias = constant_name(arg(node, 3, "bias")) if is_call(node, LAYER_NORM) else None
    if bias is not None:
        weights.fold(bias, OnColumns(Diagonal(1.0 / g)))
    push(weights, readers, Diagonal(g))
