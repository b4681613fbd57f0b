"""Linears that read the same input, run as one call: query, key and value; gate and up.

Before:  y_i = linear_packed(x, W_i, s_i, z_i, b_i)                     i = 1 … n, the same x
After:   y   = linear_packed(x, [W_1; …; W_n], [s_1; …], [z_1; …], [b_1; …])
         y_i = y[..., from_i:to_i]

Each row of a weight has its own codes, scales and zero points, so the numbers are those of the n calls wherever a kernel
computes an output feature by itself. x is quantized once and read once.

This is for kernels alone: artifacts and exports hold the graph before it, with the names of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import fx

from dlqc.graph import args_of, aten, call_before, constant_name, is_call, read, replace, site_name
from dlqc.ops import LINEAR_PACKED
from dlqc.weights import Weights


def siblings(graph: fx.Graph, weights: Weights) -> list[list[fx.Node]]:
    """Packed linears that may run as one, each list in the order of the graph, two or more.

    A weight that is read with other partners in another call is left alone: it would have to be stored twice.
    """
    found: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if is_call(node, LINEAR_PACKED):
            x, _, scales, zeros, bias, bits, group = args_of(node)
            dtypes = [p and weights[str(constant_name(p))].storage_dtype for p in (scales, bias)]
            found[x, bits, group, zeros is None, bias is None, *dtypes].append(node)
    partners: dict[str, set[tuple[Hashable, ...]]] = defaultdict(set)
    for nodes in found.values():
        for node in nodes:
            partners[site_name(node)].add(_names(nodes))
    return [
        nodes
        for nodes in found.values()
        if len(nodes) > 1 and len({*map(site_name, nodes)}) == len(nodes)
        if all(len(partners[site_name(node)]) == 1 for node in nodes)
    ]


def merge(graph: fx.Graph, weights: Weights, wanted: Callable[[Sequence[fx.Node]], bool]) -> dict[str, list[str]]:
    """Merge all siblings that are wanted; the members' names by the name of what they became."""
    made: dict[str, list[str]] = {}
    for nodes in siblings(graph, weights):
        if wanted(nodes):
            name = _merged_name(nodes)
            made[name] = [site_name(node) for node in nodes]
            _merge(nodes, name, graph, weights)
    return made


def _merge(nodes: Sequence[fx.Node], name: str, graph: fx.Graph, weights: Weights) -> None:
    first = nodes[0]
    parts: list[fx.Node | None] = []
    for index, suffix in ((1, "weight_packed"), (2, "weight_scales"), (3, "weight_zeros_packed"), (4, "bias")):
        sources = [constant_name(args_of(node)[index]) for node in nodes]
        if sources[0] is None:
            parts.append(None)
            continue
        key = f"{name}.{suffix}"
        if key not in weights:  # a later call of the same shared weights
            weights.put(key, torch.cat([weights.value(str(source)) for source in sources]))
        parts.append(read(graph, weights, key, first))
    packed, *rest = parts
    joint = call_before(graph, first, LINEAR_PACKED, (args_of(first)[0], packed, *rest, *args_of(first)[5:]))
    start, last = 0, joint.meta["val"].dim() - 1
    for node in nodes:
        stop = start + int(node.meta["val"].shape[-1])
        replace(node, call_before(graph, node, aten.slice.Tensor, (joint, last, start, stop)))
        start = stop


def _names(nodes: Sequence[fx.Node]) -> tuple[Hashable, ...]:
    return tuple((site_name(node), constant_name(args_of(node)[4])) for node in nodes)


def _merged_name(nodes: Sequence[fx.Node]) -> str:
    first = site_name(nodes[0])
    parent, dot, _ = first.rpartition(".")
    return f"{parent}{dot}{'_and_'.join(site_name(node).rpartition('.')[2] for node in nodes)}"
