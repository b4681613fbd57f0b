"""Motion rules: what has to happen around one node when a value that it reads or makes becomes x·T.

    linear       out  y·T = x·(Tᵀ·W)ᵀ + b·T                         the weight absorbs it
                 in   x·Wᵀ = (x·T)·(W·T⁻ᵀ)ᵀ                         the weight undoes it
    embedding    out  rows of E·T
    add, sub          a·T + b·T = (a + b)·T                          all operands carry it; a constant one absorbs it
    rms_norm          norm(x·T) = norm(x)·T                          T orthogonal, gain one; a permutation takes the gain along
                 out  norm(x; g)·D = norm(x; g·D)                    D diagonal
    layer_norm   out  the same for gain and bias; nothing but `Center` moves through its input
    p ∘ q             (p ∘ q)·D = p ∘ (q·D),  (p ∘ q)·P = p·P ∘ q·P  a factor that is the same for all channels is free
    silu, gelu, …     f(x·P) = f(x)·P                                P a permutation
    sdpa         v    softmax(…)·(v·T) = out·T                       per KV head; T is repeated for its query heads
                 q,k  (q·T)·(k·T⁻ᵀ)ᵀ = q·kᵀ                          per KV head
    rope              rope(x·D) = rope(x)·D                          D diagonal, equal on both halves of each head
    reshape, transpose, cat, index, … of other axes: the transform stays on its axes

A rule is a function of a `Site` (a node and the value next to it that carries T). It answers with `Ties` (which other values
carry T then, which constants absorb it, what T must fulfil), with `Choice` (one of several `Ties`), or with the reason why
T cannot pass. `dlqc.regions` follows the rules until every thread ends in a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from dlqc.graph import (
    EMBEDDING,
    LAYER_NORM,
    LINEAR,
    RMS_NORM,
    SDPA,
    arg,
    args_of,
    as_linear,
    aten,
    constant_name,
    is_call,
)
from dlqc.ops import ROPE
from dlqc.transform import Group
from dlqc.weights import Weights

#: Nonlinear functions of each channel.
ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default)

#: What a region may carry: a group of transforms, or the projection that a layer norm begins with.
Kind = Group | Literal["center"]


@dataclass(frozen=True)
class Carry:
    """A value that carries T along `dims` (outermost first, not negative).

    `repeat`: each head of T stands so many times in a row (grouped queries). `dual`: the value carries T⁻ᵀ instead.
    """

    node: fx.Node
    dims: tuple[int, ...]
    repeat: int = 1
    dual: bool = False

    def at(self, node: fx.Node, dims: tuple[int, ...] | None = None) -> Carry:
        """The same transform on another value."""
        return Carry(node, self.dims if dims is None else dims, self.repeat, self.dual)


@dataclass(frozen=True)
class Absorb:
    """A constant that takes the transform: along its rows (a writer's weight) or columns, forward or undone."""

    name: str
    by: fx.Node
    rows: bool = False
    undo: bool = False
    repeat: int = 1


@dataclass(frozen=True)
class Ties:
    """The answer of a rule: these values carry T as well, these constants absorb it, and T must fulfil this.

    Attributes:
        heads: T is block diagonal over so many equal heads.
        paired: T is a diagonal with equal halves in each head.
        positive: T is a diagonal without negative entries.
    """

    carries: tuple[Carry, ...] = ()
    absorbs: tuple[Absorb, ...] = ()
    heads: int = 1
    paired: bool = False
    positive: bool = False


@dataclass(frozen=True)
class Choice:
    """Any one of these will do; the first that works is taken."""

    options: tuple[Ties, ...]


@dataclass(frozen=True)
class Site:
    """A node, and the value next to it that carries T: the node itself (`made`) or one of its arguments."""

    node: fx.Node
    carry: Carry
    kind: Kind
    graph: fx.Graph
    weights: Weights

    @property
    def made(self) -> bool:
        return self.carry.node is self.node

    @property
    def undone(self) -> bool:
        """Whether what reads the value has to apply T itself (the value carries the dual)."""
        return self.carry.dual

    def absorb(self, name: str, *, rows: bool = False, undo: bool = False) -> Absorb:
        return Absorb(name, self.node, rows, undo is not self.carry.dual, self.carry.repeat)


Rule = Callable[[Site], Ties | Choice | str]


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a value, integers or symbols; () where it is no tensor."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def rule_for(node: fx.Node) -> Rule | None:
    return RULES.get(node.target) if node.op == "call_function" else None


def _last(s: Site) -> bool:
    return s.carry.dims == (len(shape(s.carry.node)) - 1,)


def _linear(s: Site) -> Ties | str:
    site = as_linear(s.node, s.weights)
    if site is None:
        return "its weight is no constant"
    if not _last(s):
        return "it reads the channels along another axis"
    if not s.made:
        if s.kind == "center":
            return "it reads the mean that would be taken away"
        return Ties(absorbs=(s.absorb(site.weight, undo=True),))
    bias = () if site.bias is None else (s.absorb(site.bias),)
    return Ties(absorbs=(s.absorb(site.weight, rows=True), *bias))


def _embedding(s: Site) -> Ties | str:
    table = constant_name(args_of(s.node)[0])
    if table is None or not _last(s):
        return "its table is no constant"
    return Ties(absorbs=(s.absorb(table),))


def _operands(s: Site) -> tuple[list[fx.Node], list[fx.Node], list[str]] | str:
    """(full, free, constants): operands with all channels, with one value for all of them, and constant vectors."""
    full, free, constants = [], [], []
    sizes = shape(s.node)
    dims = s.carry.dims if s.made else _aligned(s.carry.dims, shape(s.carry.node), sizes)
    for operand in dict.fromkeys(s.node.all_input_nodes):
        own = shape(operand)
        offset = len(sizes) - len(own)
        wide = [1 if d < offset else own[d - offset] for d in dims]
        one = all(size == 1 and isinstance(size, int) for size in wide)
        if not own or (one and math.prod(int(sizes[d]) for d in dims) > 1):
            free.append(operand)
        elif min(dims) < offset or [str(size) for size in wide] != [str(sizes[d]) for d in dims]:
            return f"%{operand.name} is broadcast in it"
        elif (name := constant_name(operand)) is not None:
            if dims != (len(sizes) - 1,):
                return f"constant {name!r} is laid out by heads"
            if not s.weights[name].leaf.is_floating_point():
                return f"constant {name!r} holds no real numbers"
            constants.append(name)
        else:
            full.append(operand)
    return full, free, constants


def _aligned(dims: tuple[int, ...], own: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(d + len(out) - len(own) for d in dims)


def _carries(s: Site, operands: list[fx.Node]) -> tuple[Carry, ...]:
    """The transform on the result of an elementwise node and on these operands."""
    sizes = shape(s.node)
    dims = s.carry.dims if s.made else _aligned(s.carry.dims, shape(s.carry.node), sizes)
    at = [s.carry.at(o, tuple(d - len(sizes) + len(shape(o)) for d in dims)) for o in operands]
    return (s.carry.at(s.node, dims), *at)


def _sum(s: Site) -> Ties | str:
    found = _operands(s)
    if isinstance(found, str):
        return found
    full, free, constants = found
    if (free or _numbers(s.node)) and s.kind != "permutation":
        return "it adds the same number to every channel"
    return Ties(_carries(s, full), tuple(s.absorb(name) for name in constants))


def _numbers(node: fx.Node) -> bool:
    """Whether an operand is a plain number other than zero."""
    return any(isinstance(a, int | float) and a != 0 for a in args_of(node)[:2])


def _product(s: Site) -> Ties | Choice | str:
    if len(args_of(s.node)) > 1 and args_of(s.node)[0] is args_of(s.node)[1]:
        return (
            "a square takes every factor twice" if s.kind != "permutation" else Ties(_carries(s, [args_of(s.node)[0]]))
        )
    found = _operands(s)
    if isinstance(found, str):
        return found
    full, _, constants = found
    if len(full) + len(constants) <= 1 and not constants:
        return Ties(_carries(s, full))
    if len(constants) > len(set(constants)) and s.kind != "permutation":
        return "it reads one constant twice"
    if s.kind == "permutation":
        return Ties(_carries(s, full), tuple(s.absorb(name) for name in constants))
    if s.kind != "diagonal":
        return "a product of channels moves only diagonals and permutations"
    if not s.made:
        return Ties(_carries(s, [s.carry.node]))
    through = [Ties(_carries(s, [factor])) for factor in reversed(full)]
    return Choice((*(Ties(absorbs=(s.absorb(name),)) for name in constants), *through))


def _quotient(s: Site) -> Ties | str:
    found = _operands(s)
    if isinstance(found, str):
        return found
    full, _, constants = found
    if constants or full != [args_of(s.node)[0]] or args_of(s.node)[1] in full:
        return "a quotient of channels moves nothing"
    return Ties(_carries(s, full))


def _unary(s: Site) -> Ties | str:
    """f(x) = c·x, or a cast: everything passes."""
    if not s.node.meta["val"].is_floating_point():
        return "it rounds to integers"
    return Ties(_carries(s, [args_of(s.node)[0]]))


def _pointwise(s: Site) -> Ties | str:
    if s.kind == "permutation":
        return _unary(s)
    if s.kind == "diagonal" and is_call(s.node, aten.relu.default):
        return Ties(_carries(s, [args_of(s.node)[0]]), positive=True)
    return "a nonlinear function of each channel moves only permutations"


def _norm(s: Site) -> Ties | str:
    normalized = len(args_of(s.node)[1])
    gain, rank = constant_name(arg(s.node, 2, "weight")), len(shape(s.node))
    if arg(s.node, 2, "weight") is not None and gain is None:
        return "its gain is no constant"
    bias_node = arg(s.node, 3, "bias") if is_call(s.node, LAYER_NORM) else None
    bias = constant_name(bias_node)
    if bias_node is not None and bias is None:
        return "its bias is no constant"
    vectors = tuple(s.absorb(name) for name in (gain, bias) if name is not None)
    if normalized != 1 or s.carry.dims[-1] != rank - 1:
        return "it normalizes another axis"
    rows = math.prod(int(shape(s.carry.node)[d]) for d in s.carry.dims[:-1])  # normalized by themselves
    if s.kind == "diagonal":
        if not s.made:
            return "it divides by the size of all channels together"
        if gain is None:
            return "it has no gain to fold into"
        return "its gain is the same for all heads" if rows > 1 else Ties(absorbs=vectors)
    through = s.carry.at(s.node if not s.made else args_of(s.node)[0])
    if s.kind == "center":
        return (
            "its gain does not keep the mean at zero" if s.made else (Ties() if is_call(s.node, LAYER_NORM) else _MEAN)
        )
    if s.kind == "permutation" and rows == 1:
        return Ties((through,), vectors)
    if is_call(s.node, LAYER_NORM):
        return "a layer norm takes the mean away; run center_norms first"
    if gain is not None and not bool((s.weights.value(gain, torch.float64) == 1).all()):
        return f"its gain {gain!r} is not one; run fold_norm_scale first"
    if s.kind != "orthogonal" and s.kind != "permutation":
        return "it keeps lengths, which only orthogonal transforms do"
    return Ties((through,), heads=rows // s.carry.repeat)


_MEAN = "it reads the mean that would be taken away"


def _attention(s: Site) -> Ties | str:
    q, k, v = args_of(s.node)[:3]
    if len({q, k, v}) < 3:
        return "queries, keys and values are not three values"
    if s.kind == "center":
        return _MEAN
    if not s.made and s.carry.node not in (q, k, v):
        return "it reads it as its mask"
    other = k if s.carry.node in (q, k) else v  # keys and values may have different numbers of heads
    groups = int(shape(q)[1]) // int(shape(other)[1])
    if s.carry.dims != (1, 3) or len(shape(q)) != 4:
        return "it mixes the axis that carries the transform"
    kv = s.carry.repeat if not (s.made or s.carry.node is q) else max(s.carry.repeat // groups, 1)
    heads = int(shape(other)[1]) // kv
    if s.carry.node in (q, k):
        dual = s.carry.dual if s.carry.node is q else not s.carry.dual
        return Ties((Carry(q, (1, 3), kv * groups, dual), Carry(k, (1, 3), kv, not dual)), heads=heads)
    dual = s.carry.dual
    return Ties((Carry(v, (1, 3), kv, dual), Carry(s.node, (1, 3), kv * groups, dual)), heads=heads)


def _matmul(s: Site) -> Ties | str:
    """scores · values: the right operand's channels are the result's."""
    left, right, rank = *args_of(s.node)[:2], len(shape(s.node))
    if left in (s.carry.node, right) or len(shape(right)) != rank or constant_name(right) is not None:
        return "it sums over the axis that carries the transform"
    if s.carry.dims[-1] != rank - 1 or rank - 2 in s.carry.dims:
        return "it sums over the axis that carries the transform"
    if any(str(shape(right)[d]) != str(shape(s.node)[d]) for d in s.carry.dims):
        return f"%{right.name} is broadcast in it"
    heads = math.prod(int(shape(s.node)[d]) for d in s.carry.dims[:-1])
    return Ties((s.carry.at(s.node), s.carry.at(right)), heads=max(heads // s.carry.repeat, 1))


def _rope(s: Site) -> Ties | str:
    x = args_of(s.node)[0]
    if s.carry.node not in (s.node, x) or s.carry.dims[-1] != len(shape(x)) - 1:
        return "it is no rotary embedding of this value"
    if s.kind != "diagonal":
        return "it turns pairs of channels; rotate after it"
    heads = math.prod(int(shape(x)[d]) for d in s.carry.dims[:-1])
    return Ties((s.carry.at(s.node), s.carry.at(x)), heads=heads // s.carry.repeat, paired=True)


def _reshape(s: Site) -> Ties | str:
    x = args_of(s.node)[0]
    other = x if s.made else s.node
    dims = _trailing(shape(s.carry.node), s.carry.dims, shape(other))
    return "it cuts the channels apart" if dims is None else Ties((s.carry.at(other, dims),))


def _trailing(own: tuple[Any, ...], dims: tuple[int, ...], other: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Where the last axes `dims` of `own` lie in a reshape of it: the last axes of `other` with as many elements."""
    if dims != tuple(range(len(own) - len(dims), len(own))):
        return None
    size, found = math.prod(int(own[d]) for d in dims), 1
    for d in reversed(range(len(other))):
        if not isinstance(other[d], int):
            return None
        found *= other[d]
        if found == size:
            return tuple(range(d, len(other)))
    return None


def _permute(s: Site) -> Ties | str:
    x, rank = args_of(s.node)[0], len(shape(s.node))
    if is_call(s.node, aten.permute.default):
        order = [int(d) % rank for d in args_of(s.node)[1]]
    else:
        a, b = (0, 1) if is_call(s.node, aten.t.default) else (int(d) % rank for d in args_of(s.node)[1:3])
        order = list(range(rank))
        order[a], order[b] = b, a
    if s.made:  # output axis i is input axis order[i]
        return Ties((s.carry.at(x, tuple(order[d] for d in s.carry.dims)),))
    return Ties((s.carry.at(s.node, tuple(order.index(d) for d in s.carry.dims)),))


def _other_axis(s: Site) -> Ties | str:
    """Cuts, gathers, joins and sums along axes that do not carry the transform, of values of one rank."""
    sources = args_of(s.node)[0]
    sources = list(sources) if isinstance(sources, list | tuple) else [sources]
    if not s.made and s.carry.node not in sources:
        return "it is read as something other than values"
    values = [s.node, *(n for n in sources if isinstance(n, fx.Node))]
    if any(len(shape(v)) != len(shape(s.node)) for v in values):
        return "it changes the number of axes"
    if any(str(shape(v)[d]) != str(shape(s.carry.node)[d]) for v in values for d in s.carry.dims):
        return "it cuts the channels apart"
    touched = _touched(s.node, len(shape(s.node)))
    if touched is None or touched & set(s.carry.dims):
        return "it works along the axis that carries the transform"
    constants = [name for v in values if (name := constant_name(v)) is not None]
    if constants and s.carry.dims != (len(shape(s.node)) - 1,):
        return f"constant {constants[0]!r} is laid out by heads"
    carries = tuple(s.carry.at(v) for v in values if constant_name(v) is None)
    return Ties(carries, tuple(s.absorb(name) for name in constants))


def _touched(node: fx.Node, rank: int) -> set[int] | None:
    """The axes along which such a node works."""
    if is_call(node, aten.expand.default):
        source = shape(args_of(node)[0])
        return {d for d in range(rank) if str(source[d]) != str(shape(node)[d])}
    if is_call(node, aten.index.Tensor):
        picked = args_of(node)[1]
        return None if any(i is None for i in picked) else set(range(len(picked)))
    if is_call(node, aten.sum.dim_IntList, aten.mean.dim):
        dims = arg(node, 1, "dim")
        return {int(d) % rank for d in dims} if arg(node, 2, "keepdim", False) and dims else None
    return {int(arg(node, 1, "dim", 0)) % rank}


def _free(s: Site) -> Ties | str:
    return Ties()  # reads the shape, not the values


RULES: dict[Any, Rule] = {
    LINEAR: _linear,
    EMBEDDING: _embedding,
    RMS_NORM: _norm,
    LAYER_NORM: _norm,
    SDPA: _attention,
    ROPE: _rope,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.sym_size.int: _free,
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _quotient),
    **dict.fromkeys((aten.neg.default, aten.to.dtype, aten._to_copy.default), _unary),
    **dict.fromkeys(ACTIVATIONS, _pointwise),
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten.unflatten.int, aten.flatten.using_ints), _reshape),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default), _permute),
    **dict.fromkeys(
        (
            aten.cat.default,
            aten.slice.Tensor,
            aten.index_select.default,
            aten.index.Tensor,
            aten.expand.default,
            aten.sum.dim_IntList,
            aten.mean.dim,
        ),
        _other_axis,
    ),
}
