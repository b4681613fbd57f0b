"""What the CPU backend joins in a lowered graph: calls of linear8 with what is around them.

Before:  y = linear8(rms_norm(h, gain), …) + r         After:  y = fused8("rms_norm", h, gain, …, r)
         y = linear8(silu(g) · u, …)                           y = fused8("silu_times", g, u, …)

A norm or a gate goes along if nobody else reads it, a sum if it is all that happens to the result. Attention and rotary
embedding become native ops of the same arguments and meaning, so that what reads the lowered graph (`dlqc.cached`) sees them as
what they were.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from dlqc.graph import (
    LAYER_NORM,
    RMS_NORM,
    SDPA,
    arg,
    args_of,
    aten,
    call_before,
    constant_name,
    is_call,
    read,
    replace,
    stands_for,
    sweep,
)
from dlqc.kernels.cpu import attention, build
from dlqc.kernels.cpu.fused8 import FUSED8, KINDS, rms_norm
from dlqc.kernels.cpu.linear8 import linear8
from dlqc.ops import ROPE
from dlqc.weights import Weights

LINEAR8 = linear8


stands_for(attention.attention, SDPA)
stands_for(attention.rope, ROPE)


def fuse(graph: fx.Graph, weights: Weights) -> dict[str, int]:
    """Join every linear8 of a graph with its only norm or gate, and its only sum; how many of each kind.

    What becomes a native op of its own is counted as "native_...".
    """
    counts = _attentions(graph)
    for node in [n for n in graph.nodes if is_call(n, LINEAR8)]:
        kind, sources = _before(node, weights)
        residual = _after(node)
        if kind == "as_is" and residual is None:
            continue
        x, *tensors = args_of(node)
        new_at, added = node, None
        if residual is not None:
            new_at, added = next(iter(node.users)), residual
            counts["residual"] = counts.get("residual", 0) + 1
        inputs = _inputs(kind, x, sources, graph, weights, new_at)
        replace(new_at, call_before(graph, new_at, FUSED8, (KINDS[kind], *inputs, added, *tensors)))
        if kind != "as_is":
            counts[kind] = counts.get(kind, 0) + 1
    sweep(graph, weights)
    _norms(graph, weights, counts)
    sweep(graph, weights)
    return counts


def _norms(graph: fx.Graph, weights: Weights, counts: dict[str, int]) -> None:
    """RMS norms that no linear took along become native ops."""
    if build.unavailable("linear8") is not None:
        return
    build.library("linear8")
    for node in [n for n in graph.nodes if is_call(n, RMS_NORM)]:
        value, gain = node.meta.get("val"), arg(node, 2, "weight")
        plain = len(args_of(node)[1]) == 1 and (gain is None or constant_name(gain) is not None)
        if plain and isinstance(value, Tensor) and value.dtype in build.TYPES:
            x, _, gain, _, eps = _inputs("rms_norm", node, node, graph, weights, node)
            replace(node, call_before(graph, node, rms_norm, (x, gain, eps)))
            counts["native_norm"] = counts.get("native_norm", 0) + 1


def _attentions(graph: fx.Graph) -> dict[str, int]:
    """Give every attention whose heads have a fitting width, and every rotary embedding, to the native ops."""
    counts: dict[str, int] = {}
    if attention.unavailable() is not None:
        return counts
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype not in build.TYPES:
            continue
        if node.target is SDPA and value.shape[-1] % attention.STRIP == 0 and not arg(node, 4, "dropout_p", 0.0):
            node.target = attention.attention
            counts["native_attention"] = counts.get("native_attention", 0) + 1
        elif node.target is ROPE:
            node.target = attention.rope
            counts["native_rope"] = counts.get("native_rope", 0) + 1
    return counts


def _before(node: fx.Node, weights: Weights) -> tuple[str, fx.Node | None]:
    """What the linear's input is made by, if nobody else reads it and the row is all it needs."""
    x = args_of(node)[0]
    if not isinstance(x, fx.Node) or len(x.users) != 1:
        return "as_is", None
    if is_call(x, RMS_NORM, LAYER_NORM):
        shape, parts = args_of(x)[1], list(_constants(x))
        if list(shape) == [args_of(node)[5]] and all(p is None or constant_name(p) is not None for p in parts):
            return ("rms_norm" if is_call(x, RMS_NORM) else "layer_norm"), x
    if is_call(x, aten.mul.Tensor):
        left, right = args_of(x)
        gates = [side for side in (left, right) if is_call(side, aten.silu.default) and len(side.users) == 1]
        alike = all(isinstance(side, fx.Node) and _same(side, x) for side in (left, right))
        if gates and alike and left is not right:
            return "silu_times", x
    return "as_is", None


def _constants(norm: fx.Node) -> Iterator[object]:
    yield arg(norm, 2, "weight")
    yield arg(norm, 3, "bias") if is_call(norm, LAYER_NORM) else None


def _after(node: fx.Node) -> fx.Node | None:
    """What is added to the linear's result, if that is all that happens to it."""
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], aten.add.Tensor) or users[0].kwargs:
        return None
    left, right = args_of(users[0])
    other = right if left is node else left
    return other if isinstance(other, fx.Node) and other is not node and _same(other, node) else None


def _same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values agree in shape and dtype."""
    a, b = one.meta.get("val"), other.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _inputs(
    kind: str, x: fx.Node, source: fx.Node | None, graph: fx.Graph, weights: Weights, before: fx.Node
) -> tuple[fx.Node | float | None, ...]:
    """x, other, gain, shift, eps of the op."""
    if source is None:
        return x, None, None, None, 0.0
    if kind == "silu_times":
        left, right = args_of(source)
        gate = left if is_call(left, aten.silu.default) and len(left.users) == 1 else right
        return args_of(gate)[0], right if gate is left else left, None, None, 0.0
    parts: list[fx.Node | None] = []
    for part in _constants(source):
        name = constant_name(part)
        if name is None:
            parts.append(None)
            continue
        held = f"{name}_float32"
        if held not in weights:
            weights.put(held, weights.value(name).to(torch.float32).contiguous())
        parts.append(read(graph, weights, held, before))
    default = 1e-5 if kind == "layer_norm" else float(torch.finfo(x.meta["val"].dtype).eps)
    place = 3 if kind == "rms_norm" else 4
    eps = arg(source, place, "eps")
    return args_of(source)[0], None, *parts, default if eps is None else float(eps)
