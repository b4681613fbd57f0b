"""Reading and editing the graph: the only code that knows how nodes look, and the only code that edits them.

A dlqc graph is a `torch.fx.Graph` with one placeholder, the token ids [B, L]; `get_attr` nodes whose target is a name in
`Weights`; `call_function` nodes on aten ops and on the logical ops of `dlqc.ops`; and one output, the logits [B, L, V].
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any, TypeGuard, TypeVar

import torch
from torch import fx

from dlqc.formats.activation import ActFormat
from dlqc.ops import (
    ATTENTION,
    EMBEDDING_PACKED,
    LINEAR_CODED,
    LINEAR_NESTED,
    LINEAR_PACKED,
    LINEAR_Q,
    LOW_RANK,
    QUANTIZE_ACT,
    QUANTIZE_ACT_ADAPTIVE,
    QUANTIZE_ACT_STATIC,
    QUANTIZE_HEADS,
    QUANTIZE_HEADS_STATIC,
)
from dlqc.weights import Weights

aten = torch.ops.aten
T = TypeVar("T")

LINEAR = aten.linear.default
RMS_NORM = aten.rms_norm.default
LAYER_NORM = aten.layer_norm.default
SDPA = aten.scaled_dot_product_attention.default
EMBEDDING = aten.embedding.default
NORMS = (RMS_NORM, LAYER_NORM)
EMBEDDINGS = (EMBEDDING, EMBEDDING_PACKED)
#: Linears whose first five arguments are those of `linear_coded`.
CODED_LINEARS = (LINEAR_CODED, LINEAR_NESTED)
QUANTIZED_LINEARS = (LINEAR_Q, LINEAR_PACKED, *CODED_LINEARS)
#: Quantizers of the inputs of linears, and of queries, keys and values.
ACT_QUANTIZERS = (QUANTIZE_ACT, QUANTIZE_ACT_STATIC, QUANTIZE_ACT_ADAPTIVE)
HEAD_QUANTIZERS = (QUANTIZE_HEADS, QUANTIZE_HEADS_STATIC)
ATTENTIONS = (SDPA, ATTENTION)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments. fx types them as a union of all that a graph may hold; what they are depends on the op."""
    return node.args


#: Ops of backends that take the arguments of another op and mean the same: `is_call` sees through them.
_STAND_INS: dict[object, object] = {}


def stands_for(op: object, original: object) -> None:
    """Make known that an op of a backend has the arguments and the meaning of another one."""
    _STAND_INS[op] = original


#: Where a backend leaves, in the `meta` of the head's linear, the op that gives token and confidence of its rows without their
#: logits: op(x [M, K], *the linear's constants, excluded token) → int64 [M], float64 [M]. See `dlqc.proposal`.
CHOOSER = "chooser"
#: Likewise at a mark of `quantize_kv`, the `dlqc.kv_cache.Coder` that a cache made from it works with.
CODER = "coder"


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether a node (or anything else) is a call of one of the targets, or of what stands for it."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target in targets or _STAND_INS.get(node.target) in targets


def arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or keyword, as aten schemas allow both."""
    return args_of(node)[index] if len(args_of(node)) > index else node.kwargs.get(name, default)


def constant_name(node: object) -> str | None:
    """The name in `Weights` that a node reads, or None if it is no constant."""
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def width(node: fx.Node) -> int:
    """Size of the last dimension, which every dlqc graph knows."""
    return int(node.meta["val"].shape[-1])


@dataclass(frozen=True)
class Linear:
    """A linear on a constant weight: node = x · Wᵀ + b."""

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """Checkpoint name of the module, as the user knows it."""
        return module_name(self.weight)


#: Last part of the name of a bias that a pass gave to a linear without one.
ADDED_BIAS = "corrected_bias"


def module_name(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix(".codes").removesuffix(".packed")


def site_name(node: fx.Node) -> str:
    """The module name of a quantized linear, from that of its first stored tensor."""
    if is_call(node, *CODED_LINEARS):
        return str(constant_name(args_of(node)[1][0])).rpartition(".")[0]
    return module_name(str(constant_name(args_of(node)[1])).removesuffix("_packed"))


def as_linear(node: fx.Node, weights: Weights) -> Linear | None:
    """The node read as a linear on a constant weight, or None."""
    if not is_call(node, LINEAR):
        return None
    weight, bias = constant_name(args_of(node)[1]), constant_name(arg(node, 2, "bias"))
    x = args_of(node)[0]
    if weight is None or not isinstance(x, fx.Node) or (arg(node, 2, "bias") is not None and bias is None):
        return None
    if len(weights[weight].shape) != 2:
        return None
    n, k = weights[weight].shape
    return Linear(node, x, weight, bias, int(k), int(n))


def linears(nodes: Iterable[fx.Node], weights: Weights) -> Iterator[Linear]:
    for node in nodes:
        site = as_linear(node, weights)
        if site is not None:
            yield site


def by_call(named: Iterable[tuple[str, T]]) -> dict[tuple[str, int], T]:
    """What belongs to calls, given in their order with the name of what is called, by name and number of the call."""
    found: dict[tuple[str, int], T] = {}
    calls: Counter[str] = Counter()
    for name, item in named:
        found[name, calls[name]] = item
        calls[name] += 1
    return found


def uses(graph: fx.Graph, name: str) -> list[fx.Node]:
    """All calls that read the constant `name`."""
    return [
        user
        for node in graph.nodes
        if node.op == "get_attr" and node.target == name
        for user in node.users
        if user.op != "get_attr"
    ]


def is_shared(graph: fx.Graph, name: str | None) -> bool:
    """Whether several calls read a constant."""
    return name is not None and len(uses(graph, name)) > 1


def tied(graph: fx.Graph, weights: Weights, nodes: Iterable[fx.Node]) -> list[Linear]:
    """The linears among `nodes` whose weight an embedding reads, too."""
    return [s for s in linears(nodes, weights) if any(is_call(user, EMBEDDING) for user in uses(graph, s.weight))]


def untie(graph: fx.Graph, weights: Weights, site: Linear) -> str:
    """Give a linear its own copy of a weight that an embedding reads, too; gives a note for the report.

    Each of the two keeps the name that its module has in the checkpoint, where the tie was declared.
    """
    shared = weights[site.weight]
    names = [site.weight, *(alias for alias in shared.aliases if alias != site.weight)]
    module = list((site.node.meta.get("nn_module_stack") or {"": ("",)}).values())[-1][0]
    own = next((name for name in names if module and name.rpartition(".")[0].endswith(str(module))), None)
    own = own or next((name for name in names[1:]), f"{site.name}.untied.weight")
    other = next((name for name in names if name != own), f"{site.name}.tied.weight")
    users = uses(graph, site.weight)
    readers = {own: [site.node], other: [user for user in users if user is not site.node]}
    constants = {user: next(a for a in user.all_input_nodes if a.target == site.weight) for user in users}
    for name, members in readers.items():
        weights.define(name, replace_fields(shared, aliases=()))
        for user in members:
            copy = read(graph, weights, name, user)
            copy.meta["val"] = copy.meta["val"].to(constants[user].meta["val"].dtype)
            user.replace_input_with(constants[user], copy)
    for old in dict.fromkeys(constants.values()):
        graph.erase_node(old)
    if site.weight not in readers:
        weights.drop(site.weight)
    return f"{own} was tied to {other} and has its own copy now: {shared.leaf.nbytes / 1e6:.1f} MB more"


def read(graph: fx.Graph, weights: Weights, name: str, before: fx.Node) -> fx.Node:
    """Insert a `get_attr` of the constant `name` before a node, with its shape and dtype."""
    with graph.inserting_before(before):
        node = graph.create_node("get_attr", name, name=name.replace(".", "_"))
    constant = weights[name]
    mode = fake_mode(graph)
    if mode is not None:
        with mode:
            node.meta["val"] = torch.empty(tuple(constant.shape), dtype=constant.leaf.dtype)
    return node


def fake_mode(graph: fx.Graph) -> Any:
    """The fake tensor mode in which the graph's shapes live."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def call_before(
    graph: fx.Graph,
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert a call before a node and give it its fake value."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs or {})
    infer(node)
    return node


def infer(node: fx.Node) -> None:
    """Compute the node's fake value from its arguments' fake values."""
    values: tuple[Any, ...]
    keywords: dict[str, Any]
    values, keywords = fx.map_arg((args_of(node), node.kwargs), lambda n: n.meta["val"])
    mode = next((v.fake_mode for v in _flat((values, keywords)) if hasattr(v, "fake_mode")), None)
    if mode is None:
        node.meta["val"] = node.target(*values, **keywords)  # type: ignore[operator]
        return
    with mode:
        node.meta["val"] = node.target(*values, **keywords)  # type: ignore[operator]


def _flat(tree: Any) -> Iterator[Any]:
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    yield from leaves


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`, and erase `old`."""
    _hand_on(old, new)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def follow(node: fx.Node, new: fx.Node) -> None:
    """Let every user of `node` but `new`, which is made from it, read `new`."""
    for user in [user for user in node.users if user is not new]:
        user.replace_input_with(node, new)
    _hand_on(node, new)
    node.meta.pop("block_boundary", None)


def _hand_on(old: fx.Node, new: fx.Node) -> None:
    for key in ("nn_module_stack", "block_boundary"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])


def sweep(graph: fx.Graph, weights: Weights | None = None) -> None:
    """Erase what nobody reads: dead calls, and (given `weights`) constants without a reader."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    if weights is None:
        return
    read_names = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in [n for n in weights if n not in read_names]:
        weights.drop(name)


def structure(graph: fx.Graph) -> str:
    """The graph as text, one node a line, with shapes: for dumps, diffs and hashes."""
    return "\n".join(_line(node) for node in graph.nodes)


def _line(node: fx.Node) -> str:
    val = node.meta.get("val")
    shape = f"{str(val.dtype).removeprefix('torch.')}{list(val.shape)}" if isinstance(val, torch.Tensor) else ""
    target = node.target if isinstance(node.target, str) else _target_name(node.target)
    args = ", ".join([*(repr(a) for a in args_of(node)), *(f"{k}={v!r}" for k, v in node.kwargs.items())])
    return f"%{node.name} = {node.op} {target}({args}) : {shape}".rstrip(" :")


def _target_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"{target.__module__}.{target.__name__}"


def fingerprint(graph: fx.Graph, weights: Weights) -> str:
    """Structural hash of graph and constants: equal before and after a pass that claims to have changed nothing."""
    return hashlib.sha256((structure(graph) + weights.fingerprint()).encode()).hexdigest()


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes keep their names and metadata."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
    return new


def corrected(node: fx.Node) -> fx.Node:
    """The value of a quantized linear with its correction of low rank, where it has one."""
    return next((user for user in node.users if is_call(user, LOW_RANK) and args_of(user)[0] is node), node)


def activation_quantizer(node: fx.Node) -> fx.Node | None:
    """The quantizer that feeds a quantized linear, if any."""
    x = args_of(node)[0]
    return x if is_call(x, *ACT_QUANTIZERS) else None


def act_format(node: fx.Node) -> ActFormat | None:
    """How the input of a quantized linear is quantized; None if it is not."""
    quantizer = activation_quantizer(node)
    if quantizer is None:
        return None
    if is_call(quantizer, QUANTIZE_ACT):
        _, bits, group, symmetric = args_of(quantizer)
        return ActFormat(bits, group or None, bool(symmetric))
    if is_call(quantizer, QUANTIZE_ACT_ADAPTIVE):
        _, _, widths, group, symmetric = args_of(quantizer)
        return ActFormat(max(widths), group or None, bool(symmetric), widths=tuple(sorted(set(widths))))
    _, scale, zero, _, bits = args_of(quantizer)
    sets, groups = scale.meta["val"].shape
    group = None if groups == 1 else width(quantizer) // int(groups)
    return ActFormat(bits, group, zero is None, int(sets))
