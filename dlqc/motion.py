"""Motion rules: a transform inserted on an edge travels through the graph until it meets a constant and folds.

    x → y            an edge
    x → T⁻¹ → T → y  the same function; the lower half moves down, the upper half up

    down   linear(x·D, W)        =  linear(x, W·D)                     D diagonal
    up     linear(x, W, b)·D     =  linear(x, D·W, D·b)
           rms_norm(x; g)·D      =  rms_norm(x; g·D)
           layer_norm(x; g, b)·D =  layer_norm(x; g·D, b·D)
           (p ∘ q)·D             =  p ∘ (q·D)                          then on through q, or through p

Every rule is exact. A half that cannot move is left where it is and the caller is told why; `can_move_down` and
`can_move_up` ask before anything is changed. In between, the halves are ordinary nodes, so the graph can be run.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import fx

from dlqc.graph import (
    LAYER_NORM,
    LINEAR,
    NORMS,
    Linear,
    arg,
    args_of,
    as_linear,
    aten,
    call_before,
    constant_name,
    is_call,
    read,
    uses,
    width,
)
from dlqc.weights import ScaleColumns, ScaleRows, Weights

_MUL = aten.mul.Tensor


@dataclass(frozen=True, eq=False)
class Diagonal:
    """x → x·diag(v), v float64 [d], finite and nonzero."""

    v: torch.Tensor

    def inverse(self) -> Diagonal:
        return Diagonal(1.0 / self.v)


def insert(graph: fx.Graph, weights: Weights, after: fx.Node, transform: Diagonal) -> fx.Node:
    """Put `x → x·diag(v)` between a node and all its users; gives the new node."""
    users = list(after.users)
    name = next(n for i in itertools.count() if (n := f"transform.{after.name}.{i}") not in weights)
    weights.put(name, transform.v)
    constant = read(graph, weights, name, after.next)
    # The vector takes part in the graph's arithmetic, whatever that is; float64 would promote it.
    constant.meta["val"] = constant.meta["val"].to(after.meta["val"].dtype)
    node = call_before(graph, constant.next, _MUL, (after, constant))
    for user in users:
        user.replace_input_with(after, node)
    return node


def insert_pair(graph: fx.Graph, weights: Weights, after: fx.Node, transform: Diagonal) -> tuple[fx.Node, fx.Node]:
    """Put T⁻¹ and then T between a node and its users; gives (the T⁻¹ node, the T node)."""
    upper = insert(graph, weights, after, transform.inverse())
    return upper, insert(graph, weights, upper, transform)


def _transform(node: fx.Node, weights: Weights) -> torch.Tensor:
    return weights.value(str(constant_name(args_of(node)[1])), torch.float64)


def can_move_down(graph: fx.Graph, weights: Weights, value: fx.Node) -> str | None:
    """None if a diagonal right after `value` can fold into all its readers, else the reason."""
    if not value.users:
        return "nobody reads it"
    for user in value.users:
        site = as_linear(user, weights)
        if site is None or site.x is not value:
            return f"it is also read by %{user.name} ({_short(user)}), which is no linear on a constant weight"
        reason = not_alone(graph, weights, site, set(value.users))
        if reason is not None:
            return reason
    return None


def not_alone(graph: fx.Graph, weights: Weights, site: Linear, members: set[fx.Node]) -> str | None:
    """Why the weight of a linear may not change: somebody outside `members` reads it, or it is tied."""
    if weights[site.weight].aliases:
        return f"weight {site.weight!r} is tied to {weights[site.weight].aliases[-1]!r}"
    others = [user for user in uses(graph, site.weight) if user not in members]
    return f"weight {site.weight!r} is also read by %{others[0].name}" if others else None


def move_down(graph: fx.Graph, weights: Weights, node: fx.Node) -> None:
    """linear(x·D, W) → linear(x, W·D) in every reader of the transform node, which disappears."""
    v = _transform(node, weights)
    names = {str(constant_name(args_of(user)[1])) for user in node.users}
    for name in names:
        weights.fold(name, ScaleColumns(v))
    _erase(graph, weights, node)


def can_move_up(graph: fx.Graph, weights: Weights, producer: fx.Node, reader: fx.Node | None = None) -> str | None:
    """None if a diagonal right after `producer` can fold into constants above it, else the reason.

    `reader` is the only user that `producer` may have (the transform itself, where it is inserted already).
    """
    if reader is not None and set(producer.users) != {reader}:
        return f"%{producer.name} has other readers"
    if is_call(producer, *NORMS):
        gain, bias = constant_name(arg(producer, 2, "weight")), arg(producer, 3, "bias")
        if gain is None:
            return f"%{producer.name} has no gain to fold into"
        if is_call(producer, LAYER_NORM) and bias is not None and constant_name(bias) is None:
            return f"the bias of %{producer.name} is no constant"
        if is_call(producer, LAYER_NORM) and is_shared(graph, constant_name(bias)):
            return f"bias {constant_name(bias)!r} is shared"
        return f"gain {gain!r} is shared" if is_shared(graph, gain) else None
    if is_call(producer, LINEAR):
        site = as_linear(producer, weights)
        if site is None:
            return "its weight is no constant"
        reason = not_alone(graph, weights, site, {producer})
        return f"bias {site.bias!r} is shared" if reason is None and is_shared(graph, site.bias) else reason
    if is_call(producer, _MUL) and all(isinstance(a, fx.Node) for a in args_of(producer)):
        if args_of(producer)[0] is args_of(producer)[1]:
            return f"%{producer.name} is a square, in which a diagonal would count twice"
        reasons = [_can_move_up_factor(graph, weights, factor, producer) for factor in reversed(args_of(producer))]
        return None if None in reasons else reasons[0]
    return f"a diagonal does not move through %{producer.name} ({_short(producer)})"


def _can_move_up_factor(graph: fx.Graph, weights: Weights, factor: fx.Node, product: fx.Node) -> str | None:
    val = factor.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dim() == 0 or width(factor) != width(product):
        return f"%{factor.name} is broadcast in %{product.name}"
    return can_move_up(graph, weights, factor, product)


def is_shared(graph: fx.Graph, name: str | None) -> bool:
    """Whether several calls read a constant."""
    return name is not None and len(uses(graph, name)) > 1


def move_up(graph: fx.Graph, weights: Weights, node: fx.Node) -> None:
    """Fold a transform node into the constants above it; `can_move_up` must have said yes."""
    v = _transform(node, weights)
    producer = args_of(node)[0]
    while is_call(producer, _MUL):
        factors = reversed(args_of(producer))
        producer = next(f for f in factors if _can_move_up_factor(graph, weights, f, producer) is None)
    assert isinstance(producer, fx.Node)
    if is_call(producer, LINEAR):
        site = as_linear(producer, weights)
        assert site is not None
        weights.fold(site.weight, ScaleRows(v))
        if site.bias is not None:
            weights.fold(site.bias, ScaleColumns(v))
    else:
        weights.fold(str(constant_name(arg(producer, 2, "weight"))), ScaleColumns(v))
        bias = constant_name(arg(producer, 3, "bias")) if is_call(producer, LAYER_NORM) else None
        if bias is not None:
            weights.fold(bias, ScaleColumns(v))
    _erase(graph, weights, node)


def _erase(graph: fx.Graph, weights: Weights, node: fx.Node) -> None:
    constant = args_of(node)[1]
    assert isinstance(constant, fx.Node)
    node.replace_all_uses_with(args_of(node)[0])
    graph.erase_node(node)
    graph.erase_node(constant)
    weights.drop(str(constant.target))


def _short(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default").removesuffix(".Tensor")
