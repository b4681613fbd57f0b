"""What the Triton backend joins in a lowered graph.

    integer                     norms, gates and Hadamard blocks, which the kernel that quantizes rows does; the sum behind it
    weight_only, coded_weights  the sum behind them

The ops are the same with and without: what goes along is in their last arguments.
"""

from __future__ import annotations

from torch import fx

from dlqc.backends import fusion
from dlqc.backends.fusion import Call, Found, Joint
from dlqc.kernels.triton.coded import CODED
from dlqc.kernels.triton.integer import INTEGER
from dlqc.kernels.triton.rows import WIDEST
from dlqc.kernels.triton.weight_only import WEIGHT_ONLY
from dlqc.weights import Weights


def integer(found: Found) -> Call:
    return INTEGER, (found.x, *found.rest, found.kind, *found.before, found.block, found.residual)


def weight_only(found: Found) -> Call:
    return WEIGHT_ONLY, (found.x, *found.rest, found.residual)


def coded(found: Found) -> Call:
    return CODED, (found.x, *found.rest, found.residual)


JOINTS = (
    Joint(INTEGER, integer, widest=WIDEST),
    Joint(WEIGHT_ONLY, weight_only, inputs=False),
    Joint(CODED, coded, inputs=False),
)


def fuse(graph: fx.Graph, weights: Weights) -> dict[str, int]:
    """Join the products of a graph with what is around them; how many of each kind."""
    counts: dict[str, int] = {}
    for joint in JOINTS:
        for name, count in fusion.fuse(graph, weights, joint).items():
            counts[name] = counts.get(name, 0) + count
    return counts
