"""What the CPU backend joins in a lowered graph: calls of linear8 with the norm or gate before them and the sum behind them."""

from __future__ import annotations

from torch import fx

from dlqc.backends import fusion
from dlqc.backends.fusion import Call, Found, Joint
from dlqc.kernels.cpu.fused8 import FUSED8
from dlqc.kernels.cpu.linear8 import linear8
from dlqc.weights import Weights


def fused8(found: Found) -> Call:
    return FUSED8, (found.kind, found.x, *found.before, found.residual, *found.rest)


LINEAR8 = Joint(linear8._opoverload, fused8)


def fuse(graph: fx.Graph, weights: Weights) -> dict[str, int]:
    """Join every linear8 of a graph with its only norm or gate, and its only sum; how many of each kind."""
    return fusion.fuse(graph, weights, LINEAR8)
