"""What the Triton backend joins in a lowered graph.

    integer                             norms, gates and Hadamard blocks, by the kernel that quantizes rows; the sum behind it
    weight_only, coded_weights, planes  the sum behind them

The ops are the same with and without: what goes along is in their last arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from dlqc.backends import fusion
from dlqc.backends.fusion import Call, Found, Joint
from dlqc.kernels.triton.coded import CODED
from dlqc.kernels.triton.integer import INTEGER
from dlqc.kernels.triton.planes import PLANES
from dlqc.kernels.triton.rows import WIDEST
from dlqc.kernels.triton.weight_only import WEIGHT_ONLY
from dlqc.weights import Weights


def integer(found: Found) -> Call:
    return INTEGER, (found.x, *found.rest, found.kind, *found.before, found.block, found.residual)


def with_sum(linear: Callable[..., Any]) -> Joint:
    return Joint(linear, lambda found: (linear, (found.x, *found.rest, found.residual)), inputs=False)


JOINTS = (
    Joint(INTEGER, integer, widest=WIDEST),
    *map(with_sum, (WEIGHT_ONLY, CODED, PLANES)),
)


def fuse(graph: fx.Graph, weights: Weights) -> dict[str, int]:
    """Join the products of a graph with what is around them; how many of each kind."""
    counts: dict[str, int] = {}
    for joint in JOINTS:
        for name, count in fusion.fuse(graph, weights, joint).items():
            counts[name] = counts.get(name, 0) + count
    return counts
