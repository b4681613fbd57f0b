"""What the Triton backend joins in a lowered graph.

    integer                             norms, gates, factors and Hadamard blocks, by the kernel that quantizes rows; the sum
                                        behind it; the product on the columns that `split_outliers` set apart
    weight_only, coded_weights, planes  the sum behind them

The ops are the same with and without: what goes along is in their last arguments.

Before:  y = integer(x ∘ k, …) + linear(x[o], W_o) + r            After:  y = integer(x, …, k, r, x, o, W_o)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from dlqc.backends import fusion
from dlqc.backends.fusion import Call, Found, Joint
from dlqc.graph import LINEAR, arg, args_of, aten, call_before, constant_name, is_call, read, replace, sweep
from dlqc.kernels.triton import packing
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


def narrow(block: int) -> bool:
    """Whether the kernel that quantizes rows has Hadamard matrices of this order."""
    return block <= WIDEST and not block & (block - 1)


#: The place of the residual among the arguments of an integer product.
LAST = 16

JOINTS = (
    Joint(INTEGER, integer, factors=True, rotates=narrow),
    *map(with_sum, (WEIGHT_ONLY, CODED, PLANES)),
)


def fuse(graph: fx.Graph, weights: Weights) -> dict[str, int]:
    """Join the products of a graph with what is around them; how many of each kind."""
    counts: dict[str, int] = {}
    for joint in JOINTS:
        for name, count in fusion.fuse(graph, weights, joint).items():
            counts[name] = counts.get(name, 0) + count
    found, sums = join_outliers(graph, weights)
    # What was added to these products is inside of them now, and some take a second sum along.
    counts |= {"outliers": found, "residual": counts.get("residual", 0) - found + sums}
    return {name: count for name, count in counts.items() if count}


def join_outliers(graph: fx.Graph, weights: Weights) -> tuple[int, int]:
    """Products on outlier columns that are added to integer products become part of them; how many, and sums behind them."""
    count = sums = 0
    for node in [n for n in graph.nodes if is_call(n, INTEGER) and len(args_of(n)) == LAST + 1]:
        side = args_of(node)[LAST]
        taken = args_of(side)[0] if is_call(side, LINEAR) and arg(side, 2, "bias") is None else None
        weight = constant_name(args_of(side)[1]) if is_call(side, LINEAR) else None
        indices = constant_name(args_of(taken)[2]) if is_call(taken, aten.index_select.default) else None
        if taken is None or weight is None or indices is None or len(side.users) > 1:
            continue
        x, dim, _ = args_of(taken)
        if dim % x.meta["val"].dim() != x.meta["val"].dim() - 1:
            continue
        names = (f"{weight}_columns", f"{weight}_apart")
        if names[0] not in weights:
            dtype = side.meta["val"].dtype
            found = packing.outliers(weights.value(indices), weights.value(weight).to(dtype))
            for name, value in zip(names, found, strict=True):
                weights.put(name, value)
        added = fusion.sum_behind(node)
        at = node if added is None else next(iter(node.users))
        constants = [read(graph, weights, name, at) for name in names]
        replace(at, call_before(graph, at, INTEGER, (*args_of(node)[:LAST], added, x, *constants)))
        count += 1
        sums += added is not None
    sweep(graph, weights)
    return count, sums
