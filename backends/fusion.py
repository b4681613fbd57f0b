"""Joining the linears of a lowered graph with what is around them, whatever the backend: it says which ops can do it.

Before:  y = linear(rms_norm(h, gain), …) + r            After:  y = joint(h, gain, …, r)
         y = linear((silu(g) · u)·H, …)                          y = joint(g, u, …)

A norm, gate, factor or Hadamard transform goes along if nobody else reads it, a sum if it is all that happens to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dlqc import hadamard
from dlqc.graph import (
    LAYER_NORM,
    RMS_NORM,
    arg,
    args_of,
    aten,
    call_before,
    constant_name,
    is_call,
    read,
    sweep,
    width,
)
from dlqc.graph import replace as put_in_place
from dlqc.ops import TRANSFORM
from dlqc.transform import Hadamard, decode
from dlqc.weights import Weights

#: An op and its arguments.
Call = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Found:
    """What surrounds a linear.

    Attributes:
        kind: "as_is", "rms_norm", "layer_norm" or "silu_times": how the input of the linear is made of x.
        x: its source. other: the factor of silu(x). gain, shift: float32, of a norm, or gain of x as it is. eps: of a norm.
        block: order of the Hadamard matrices behind that; 1 for none. core: float32, of orders that are no powers of two.
        residual: what is added to the result.
        rest: the arguments of the linear behind its input.
    """

    x: fx.Node
    rest: tuple[Any, ...]
    kind: str = "as_is"
    other: fx.Node | None = None
    gain: fx.Node | None = None
    shift: fx.Node | None = None
    eps: float = 0.0
    block: int = 1
    core: fx.Node | None = None
    residual: fx.Node | None = None

    @property
    def before(self) -> tuple[Any, ...]:
        """other, gain, shift, eps: as every op takes them."""
        return (self.other, self.gain, self.shift, self.eps)


@dataclass(frozen=True)
class Joint:
    """What a backend can do together with a linear.

    Attributes:
        linear: the op. call: the call that does all of it.
        inputs: whether norms and gates may go along. factors: whether a constant factor of each feature may.
        rotates: whether Hadamard matrices of an order may.
    """

    linear: Callable[..., Any]
    call: Callable[[Found], Call]
    inputs: bool = True
    factors: bool = False
    rotates: Callable[[int], bool] = lambda block: False


def fuse(graph: fx.Graph, weights: Weights, joint: Joint) -> dict[str, int]:
    """Join every call of a linear with its only norm, gate or transform, and its only sum; how many of each kind."""
    counts: dict[str, int] = {}
    for node in [n for n in graph.nodes if is_call(n, joint.linear)]:
        x, *rest = args_of(node)
        found = Found(x, tuple(rest), residual=sum_behind(node))
        new_at = node if found.residual is None else next(iter(node.users))
        if joint.inputs:
            found = _before(found, joint, graph, weights, new_at)
        kind = "factor" if found.kind == "as_is" and found.gain is not None else found.kind
        names = (kind, "hadamard" if found.block > 1 else "as_is", "residual" if found.residual else "as_is")
        joined = [name for name in names if name != "as_is"]
        if not joined:
            continue
        put_in_place(new_at, call_before(graph, new_at, *joint.call(found)))
        for name in joined:
            counts[name] = counts.get(name, 0) + 1
    sweep(graph, weights)
    return counts


def _before(found: Found, joint: Joint, graph: fx.Graph, weights: Weights, at: fx.Node) -> Found:
    """With what the linear's input is made by, where nobody else reads it and a row is all it needs."""
    if not _own(found.x):
        return found
    if is_call(found.x, TRANSFORM):
        turn = decode(args_of(found.x)[2], ()) if not args_of(found.x)[1] else None
        if not isinstance(turn, Hadamard) or not joint.rotates(turn.block):
            return found
        core = _core(turn, found, graph, weights, at)
        found = replace(found, x=args_of(found.x)[0], block=turn.block, core=core)
    x = found.x
    if not _own(x):
        return found
    if is_call(x, RMS_NORM, LAYER_NORM):
        parts = list(_constants(x))
        known = all(p is None or constant_name(p) is not None for p in parts)
        if known and list(args_of(x)[1]) == [width(x)] and _same(args_of(x)[0], x):
            kind = "rms_norm" if is_call(x, RMS_NORM) else "layer_norm"
            gain, shift, eps = norm(x, graph, weights, at)
            return replace(found, kind=kind, x=args_of(x)[0], gain=gain, shift=shift, eps=eps)
    if is_call(x, aten.mul.Tensor):
        left, right = args_of(x)
        name = constant_name(right)
        if name is not None and joint.factors and list(weights[name].shape) == [width(x)] and _same(left, x):
            return replace(found, x=left, gain=_float32(name, graph, weights, at))
        gates = [side for side in (left, right) if is_call(side, aten.silu.default) and _own(side)]
        alike = all(isinstance(side, fx.Node) and _same(side, x) for side in (left, right))
        if gates and alike and left is not right:
            gate = gates[0]
            return replace(found, kind="silu_times", x=args_of(gate)[0], other=right if gate is left else left)
    return found


def _core(turn: Hadamard, found: Found, graph: fx.Graph, weights: Weights, at: fx.Node) -> fx.Node | None:
    """The core of the Hadamard matrix (`dlqc.hadamard`) if it has one: a constant of the linear that reads the product."""
    core = hadamard.side(turn.block, turn.transposed).core
    if core is None:
        return None
    name = f"{constant_name(found.rest[0])}_hadamard"
    weights.put(name, core.to(torch.float32).contiguous())
    return read(graph, weights, name, at)


def _own(x: object) -> bool:
    """Whether one call alone reads a value."""
    return isinstance(x, fx.Node) and len(x.users) == 1


def norm(node: fx.Node, graph: fx.Graph, weights: Weights, at: fx.Node) -> tuple[fx.Node | None, fx.Node | None, float]:
    """Gain and shift of a norm in float32, read in front of a node, and its eps."""
    names = [constant_name(part) for part in _constants(node)]
    gain, shift = (None if name is None else _float32(name, graph, weights, at) for name in names)
    rms = is_call(node, RMS_NORM)
    # torch computes norms of 16-bit numbers in float32, and takes the eps of that.
    wide = torch.promote_types(node.meta["val"].dtype, torch.float32)
    default = float(torch.finfo(wide).eps) if rms else 1e-5
    eps = arg(node, 3 if rms else 4, "eps")
    return gain, shift, default if eps is None else float(eps)


def _float32(name: str, graph: fx.Graph, weights: Weights, at: fx.Node) -> fx.Node:
    """A constant in float32, read in front of a node."""
    wide = f"{name}_float32"
    if wide not in weights:
        weights.put(wide, weights.value(name).to(torch.float32).contiguous())
    return read(graph, weights, wide, at)


def _constants(norm: fx.Node) -> Iterator[object]:
    yield arg(norm, 2, "weight")
    yield arg(norm, 3, "bias") if is_call(norm, LAYER_NORM) else None


def sum_behind(node: fx.Node) -> fx.Node | None:
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
