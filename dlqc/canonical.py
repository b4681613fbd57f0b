"""Canonicalization: other people's spellings become one normal form, so that passes need no names.

    x.float() ** 2 → mean → + eps → rsqrt → * x → * gain        →  aten.rms_norm(x, [d], gain, eps)
    x * cos + cat(-x₂, x₁) * sin                                 →  dlqc.rope(x, cos, sin)
    k[:, :, None].expand(…).reshape(…)  into attention           →  sdpa(…, enable_gqa=True) on k
    1 + w, w a constant vector                                   →  the constant w.plus_one
    addmm(b, x, W), W [K, N]                                     →  aten.linear(x, Wᵀ, b), the constant W.transposed
    casts to the dtype a value has, dropout, clone, asserts, …   →  nothing

Each rule is a function `(graph, weights) -> number of rewrites`; `RULES` is the order. The result computes the same
function up to floating-point association; `capture.verify` checks it against the eager model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dlqc.execute import mask_class
from dlqc.graph import (
    LINEAR,
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
    sweep,
)
from dlqc.ops import ROPE
from dlqc.weights import Constant, Plus, Rows, Weights

_NOTHING = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
)
_DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten._to_copy.default)
_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


def drop_asserts(graph: fx.Graph, weights: Weights) -> int:
    """Run-time checks that capture has already made."""
    found = [node for node in graph.nodes if is_call(node, *_ASSERTS) and not node.users]
    for node in found:
        graph.erase_node(node)
    return len(found)


def views_are_reshapes(graph: fx.Graph, weights: Weights) -> int:
    """A view demands strides that a `.contiguous()` before it may have made; a reshape asks for nothing."""
    found = [node for node in graph.nodes if is_call(node, aten.view.default)]
    for node in found:
        node.target = aten.reshape.default
    return len(found)


def drop_no_ops(graph: fx.Graph, weights: Weights) -> int:
    """Calls that return their first argument: dropout in evaluation, clones, casts to the same dtype, x + 0, x · 1."""
    count = 0
    for node in list(graph.nodes):
        if not node.all_input_nodes or not isinstance(args_of(node)[0] if args_of(node) else None, fx.Node):
            continue
        source: fx.Node = args_of(node)[0]
        same_type = _val(node) is not None and _val(source) is not None and _val(node).dtype is _val(source).dtype
        keeps = (
            is_call(node, *_NOTHING)
            or (is_call(node, *_DROPOUTS) and args_of(node)[2] is False)
            or (is_call(node, *_CASTS) and same_type)
            or (is_call(node, aten.add.Tensor) and _is_number(args_of(node)[1], 0) and same_type)
            or (is_call(node, aten.mul.Tensor) and _is_number(args_of(node)[1], 1) and same_type)
            or (
                is_call(node, aten.expand.default, aten.view.default, aten.reshape.default)
                and _same_shape(node, source)
            )
        )
        if keeps:
            replace(node, source)
            count += 1
    return count


def merge_reshapes(graph: fx.Graph, weights: Weights) -> int:
    """A reshape of a reshape is the last of them."""
    count = 0
    for node in graph.nodes:
        if is_call(node, aten.reshape.default) and is_call(args_of(node)[0], aten.reshape.default):
            node.update_arg(0, args_of(args_of(node)[0])[0])
            count += 1
    sweep(graph)
    return count


def _is_number(operand: object, number: float) -> bool:
    return isinstance(operand, int | float) and operand == number


def drop_empty_cats(graph: fx.Graph, weights: Weights) -> int:
    """`cat([empty, x])`, as a cache that holds nothing yet writes it, is x."""
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, aten.cat.default):
            continue
        parts = [p for p in args_of(node)[0] if not (_val(p) is not None and tuple(_val(p).shape) == (0,))]
        if len(parts) == 1 and len(args_of(node)[0]) > 1:
            replace(node, parts[0])
            count += 1
    return count


def raise_addmm(graph: fx.Graph, weights: Weights) -> int:
    """A product with a constant [K, N] and a constant bias, on rows flattened for it, becomes a linear on [N, K]."""
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, aten.addmm.default) or node.kwargs or len(node.users) != 1:
            continue
        bias, flat, weight = args_of(node)
        name, back = constant_name(weight), next(iter(node.users))
        if name is None or constant_name(bias) is None or _val(bias).dim() != 1 or weights[name].folds:
            continue
        if not is_call(flat, aten.reshape.default) or not is_call(back, aten.reshape.default):
            continue
        x = args_of(flat)[0]
        k, n = weights[name].shape
        if int(_val(x).shape[-1]) != k or not _same_sizes(_val(back).shape, (*_val(x).shape[:-1], n)):
            continue
        part = _derived(name, "transposed")
        if part not in weights:
            # A view of the checkpoint's tensor: nothing is computed or copied.
            weights.define(part, Constant(weights[name].leaf.t()))
        new = read(graph, weights, part, back)
        new.meta["val"] = new.meta["val"].to(_val(node).dtype)
        call = call_before(graph, back, LINEAR, (x, new, bias))
        call.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        replace(back, call)
        count += 1
    sweep(graph, weights)
    return count


def _derived(name: str, what: str) -> str:
    """Name of a constant made from another: `what` stands between module and tensor."""
    module, dot, tensor = name.rpartition(".")
    return f"{module}{dot}{what}.{tensor}"


PLUS_ONE = "plus_one"


def fold_plus_one(graph: fx.Graph, weights: Weights) -> int:
    """`1 + w` on a constant vector, as Gemma reads its gains, becomes a constant."""
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, aten.add.Tensor) or node.kwargs or not _is_number(args_of(node)[1], 1):
            continue
        source = args_of(node)[0]
        while is_call(source, *_CASTS) and _holds(_val(source).dtype, _val(args_of(source)[0]).dtype):
            source = args_of(source)[0]
        name = constant_name(source)
        if name is None or _val(source).dim() != 1 or not _val(source).is_floating_point():
            continue
        part = _derived(name, PLUS_ONE)
        if part not in weights:
            weights.define(part, Constant(weights[name].leaf, (*weights[name].folds, Plus(1.0))))
        new = read(graph, weights, part, node)
        new.meta["val"] = new.meta["val"].to(_val(node).dtype)
        replace(node, new)
        count += 1
    sweep(graph, weights)
    return count


def raise_rms_norm(graph: fx.Graph, weights: Weights) -> int:
    """The spelled-out RMS norm, with or without casts and gain, becomes `aten.rms_norm`."""
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, aten.rsqrt.default):
            continue
        found = _match_rms(node)
        if found is None:
            continue
        x, eps, scaled = found
        gain, last = _gain_of(scaled)
        new = call_before(graph, last, RMS_NORM, (x, [int(_val(x).shape[-1])], gain, eps))
        if _val(new).dtype is not _val(last).dtype:
            new = call_before(graph, last, aten.to.dtype, (new, _val(last).dtype))
        replace(last, new)
        sweep(graph)
        count += 1
    return count


def _match_rms(rsqrt: fx.Node) -> tuple[fx.Node, float, fx.Node] | None:
    add = args_of(rsqrt)[0]
    if not is_call(add, aten.add.Tensor) or not isinstance(args_of(add)[1], float) or add.kwargs:
        return None
    mean = args_of(add)[0]
    if not is_call(mean, aten.mean.dim) or list(args_of(mean)[1]) != [-1] or not arg(mean, 2, "keepdim", False):
        return None
    square = args_of(mean)[0]
    if is_call(square, aten.pow.Tensor_Scalar) and args_of(square)[1] == 2:
        x = args_of(square)[0]
    elif is_call(square, aten.mul.Tensor) and args_of(square)[0] is args_of(square)[1]:
        x = args_of(square)[0]
    else:
        return None
    users = [u for u in rsqrt.users if is_call(u, aten.mul.Tensor) and x in args_of(u)]
    return (x, args_of(add)[1], users[0]) if len(users) == 1 and len(rsqrt.users) == 1 else None


def _gain_of(scaled: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """Follow casts from the normalized value to a product with a constant vector."""
    last, node = scaled, scaled
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_call(user, *_CASTS) and _holds(_val(user).dtype, _val(node).dtype):
            node = user
            continue
        if is_call(user, aten.mul.Tensor):
            other = args_of(user)[1] if args_of(user)[0] is node else args_of(user)[0]
            if constant_name(other) is not None and tuple(_val(other).shape) == (int(_val(node).shape[-1]),):
                return other, user
        break
    return None, last


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(wide, narrow) is wide


def raise_rope(graph: fx.Graph, weights: Weights) -> int:
    """`x·cos + rotate_half(x)·sin` becomes one node."""
    count = 0
    for node in list(graph.nodes):
        found = _match_rope(node) if is_call(node, aten.add.Tensor) and not node.kwargs else None
        if found is None:
            continue
        replace(node, call_before(graph, node, ROPE, found))
        count += 1
    sweep(graph)
    return count


def _match_rope(add: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    for direct, rotated in ((args_of(add)[0], args_of(add)[1]), (args_of(add)[1], args_of(add)[0])):
        if not is_call(direct, aten.mul.Tensor) or not is_call(rotated, aten.mul.Tensor):
            continue
        for cat, sin in ((args_of(rotated)[0], args_of(rotated)[1]), (args_of(rotated)[1], args_of(rotated)[0])):
            x = _rotated_half(cat)
            if x is None or x not in args_of(direct) or not isinstance(sin, fx.Node):
                continue
            cos = args_of(direct)[1] if args_of(direct)[0] is x else args_of(direct)[0]
            if isinstance(cos, fx.Node):
                return x, cos, sin
    return None


def _rotated_half(cat: object) -> fx.Node | None:
    """The x of `cat([-x[..., d/2:], x[..., :d/2]], -1)`."""
    if not is_call(cat, aten.cat.default) or len(args_of(cat)[0]) != 2:
        return None
    neg, low = args_of(cat)[0]
    if not is_call(neg, aten.neg.default) or arg(cat, 1, "dim", 0) not in (-1, _val(cat).dim() - 1):
        return None
    high = args_of(neg)[0]
    if int(_val(cat).shape[-1]) % 2:
        return None
    if is_call(low, aten.slice.Tensor) and is_call(high, aten.slice.Tensor):
        x = args_of(low)[0]
        half = int(_val(x).shape[-1]) // 2
        fits = args_of(high)[0] is x and tuple(args_of(low)[2:4]) == (0, half) and args_of(high)[2] == half
        return x if fits and args_of(low)[1] in (-1, _val(x).dim() - 1) else None
    if is_call(low, operator.getitem) and is_call(high, operator.getitem) and args_of(low)[0] is args_of(high)[0]:
        parts = args_of(low)[0]
        if is_call(parts, aten.chunk.default, aten.split.Tensor) and (args_of(low)[1], args_of(high)[1]) == (0, 1):
            x = args_of(parts)[0]
            halves = args_of(parts)[1] == (2 if is_call(parts, aten.chunk.default) else int(_val(x).shape[-1]) // 2)
            return x if halves and arg(parts, 2, "dim", 0) in (-1, _val(x).dim() - 1) else None
    return None


def raise_gqa(graph: fx.Graph, weights: Weights) -> int:
    """Keys and values repeated per query group become `enable_gqa=True` on the unrepeated ones."""
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, SDPA):
            continue
        k, v = _unrepeated(args_of(node)[1]), _unrepeated(args_of(node)[2])
        if k is None or v is None:
            continue
        kwargs = {**node.kwargs, "enable_gqa": True}
        replace(node, call_before(graph, node, SDPA, (args_of(node)[0], k, v, *args_of(node)[3:]), kwargs))
        count += 1
    sweep(graph)
    return count


def _unrepeated(node: object) -> fx.Node | None:
    """The x [B, H, L, D] of `x[:, :, None].expand(B, H, n, L, D).reshape(B, H·n, L, D)`."""
    if not is_call(node, aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    expand = args_of(node)[0]
    if not is_call(expand, aten.expand.default):
        return None
    unsqueeze = args_of(expand)[0]
    while is_call(unsqueeze, aten.slice.Tensor) and _same_shape(unsqueeze, args_of(unsqueeze)[0]):
        unsqueeze = args_of(unsqueeze)[0]
    if not is_call(unsqueeze, aten.unsqueeze.default) or args_of(unsqueeze)[1] != 2:
        return None
    x = args_of(unsqueeze)[0]
    while is_call(x, aten.slice.Tensor) and _same_shape(x, args_of(x)[0]):
        x = args_of(x)[0]
    return x if _val(x).dim() == 4 else None


def drop_open_masks(graph: fx.Graph, weights: Weights) -> int:
    """An attention mask that lets everything through, at every length, is no mask."""
    count = 0
    for node in list(graph.nodes):
        mask = arg(node, 3, "attn_mask") if is_call(node, SDPA) else None
        if isinstance(mask, fx.Node) and mask_class(graph, weights, mask) == "full":
            args = (*args_of(node)[:3], None, *args_of(node)[4:]) if len(args_of(node)) > 3 else args_of(node)
            kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
            replace(node, call_before(graph, node, SDPA, args, kwargs))
            count += 1
    sweep(graph)
    return count


def split_fused(graph: fx.Graph, weights: Weights) -> int:
    """One linear cut into several along its outputs becomes several linears on row ranges of the weight."""
    count = 0
    for node in list(graph.nodes):
        parts = _parts_of(node)
        if parts is None:
            continue
        pieces, bounds = parts
        weight, bias = constant_name(args_of(node)[1]), constant_name(arg(node, 2, "bias"))
        if weight is None or (arg(node, 2, "bias") is not None and bias is None):
            continue
        for piece, (start, stop) in zip(pieces, bounds, strict=True):
            operands: list[Any] = [args_of(node)[0]]
            for name in (weight, bias):
                if name is None:
                    operands.append(None)
                    continue
                part = _derived(name, f"rows_{start}_{stop}")
                old = weights[name]
                weights.define(part, Constant(old.leaf, (*old.folds, Rows(start, stop))))
                new = read(graph, weights, part, piece)
                new.meta["val"] = new.meta["val"].to(_val(node).dtype)
                operands.append(new)
            call = call_before(graph, piece, LINEAR, tuple(operands if operands[2] is not None else operands[:2]))
            call.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            replace(piece, call)
        count += 1
    sweep(graph, weights)
    return count


def _parts_of(linear: fx.Node) -> tuple[list[fx.Node], list[tuple[int, int]]] | None:
    """The getitem nodes that cut a linear's output along its last dimension, and their bounds."""
    if not is_call(linear, LINEAR) or len(linear.users) != 1:
        return None
    cut = next(iter(linear.users))
    dim = arg(cut, 2, "dim", 0)
    if not is_call(cut, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        return None
    if dim not in (-1, _val(linear).dim() - 1):
        return None
    n = int(_val(linear).shape[-1])
    if is_call(cut, aten.split_with_sizes.default):
        sizes = [int(s) for s in args_of(cut)[1]]
    else:
        each = int(args_of(cut)[1]) if is_call(cut, aten.split.Tensor) else -(-n // int(args_of(cut)[1]))
        sizes = [min(each, n - i) for i in range(0, n, each)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [u for u in cut.users if is_call(u, operator.getitem)]
    if len(pieces) != len(cut.users):
        return None
    return pieces, [(starts[args_of(p)[1]], starts[args_of(p)[1]] + sizes[args_of(p)[1]]) for p in pieces]


def _val(node: fx.Node) -> Any:
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    a, b = _val(node), _val(source)
    return a is not None and b is not None and _same_sizes(a.shape, b.shape)


def _same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(str(i) == str(j) for i, j in zip(a, b, strict=True))


Rule = Callable[[fx.Graph, Weights], int]
RULES: tuple[Rule, ...] = (
    drop_asserts,
    views_are_reshapes,
    drop_no_ops,
    drop_empty_cats,
    raise_addmm,
    split_fused,
    fold_plus_one,
    raise_rms_norm,
    raise_rope,
    raise_gqa,
    drop_open_masks,
    # Late, since the rules above know patterns that end in a reshape.
    merge_reshapes,
    drop_no_ops,
)


def canonicalize(graph: fx.Graph, weights: Weights) -> dict[str, int]:
    """Bring a freshly captured graph to the normal form; gives the number of rewrites by rule."""
    counts: dict[str, int] = {}
    for rule in RULES:
        counts[rule.__name__] = counts.get(rule.__name__, 0) + rule(graph, weights)
    sweep(graph, weights)
    return counts
