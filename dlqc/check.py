"""The graph law, written once and run after every pass.

A legal dlqc graph is well formed, typed, and tells the truth about itself:

    L1  fx's own lint passes: nodes are defined before use, names are unique
    L2  there is one placeholder (int64 ids [B, L]) and one output (floating logits [B, L, V])
    L3  every `get_attr` names a constant, every constant is read, and the shapes agree
    L4  every call is an aten op, a dlqc op, a kernel's op, or arithmetic on sizes
    L5  every value has a fake `val`, and propagating shapes again gives the same rank, static sizes and dtype
    L6  a matrix is read by one module only, unless it is a declared tie or an embedding that is the head, too
    L7  each quantized linear and embedding has codes, scales and zero points (or the parts of its format), rightly shaped; so
        have quantizers with fixed scales, and every quantizer is read by what it quantizes for, as are keys and values that a
        cache stores in few bits; a correction of low rank stands
        behind a linear that reads the same value, with factors of the right shape and dtype
    L8  where the model declares full attention, no attention is causal (masks are classified by computing them)
    L9  the facts that passes claim hold

`check` raises a ContractError that names the law's number, the node, and what is wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError
from dlqc.execute import mask_class
from dlqc.formats.coded import decode, fault
from dlqc.formats.low_rank import low_rank_fault
from dlqc.formats.nested import NestedFormat
from dlqc.formats.packing import packed_shape
from dlqc.graph import (
    ACT_QUANTIZERS,
    ATTENTIONS,
    CODED_LINEARS,
    EMBEDDINGS,
    HEAD_QUANTIZERS,
    LAYER_NORM,
    NORMS,
    QUANTIZED_LINEARS,
    SDPA,
    arg,
    args_of,
    constant_name,
    is_call,
    is_shared,
    uses,
    width,
)
from dlqc.kv_cache import check_stored
from dlqc.ops import (
    ATTENTION,
    CACHED,
    EMBEDDING_PACKED,
    LINEAR_CODED,
    LINEAR_NESTED,
    LINEAR_PACKED,
    LINEAR_Q,
    LOW_RANK,
    MASK_BUCKET,
    QUANTIZE_ACT_ADAPTIVE,
    QUANTIZE_ACT_STATIC,
    QUANTIZE_HEADS_STATIC,
)
from dlqc.propagate import propagated
from dlqc.regions import Refused, grow
from dlqc.weights import Weights

NAMESPACES = ("aten", "dlqc", "dlqc_reference", "dlqc_cpu", "dlqc_triton", "dlqc_cuda")
SIZE_ARITHMETIC = (
    operator.getitem,
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.neg,
    operator.mod,
)


def check(
    graph: fx.Graph, weights: Weights, spec: DiffusionSpec, facts: set[str], *, after: str, propagate: bool = True
) -> None:
    """Raise a ContractError if the graph breaks the law.

    Args:
        after: who is to blame, for the message ("capture", or a pass name).
        propagate: whether to run L5, the costly one.
    """
    laws: list[Iterator[str]] = [
        _lint(graph),
        _interface(graph, spec),
        _constants(graph, weights),
        _targets(graph),
        _propagation(graph, weights) if propagate else iter(()),
        _owners(graph, weights),
        _quantized(graph, weights),
        _masks(graph, weights, spec),
        _facts(graph, weights, facts),
    ]
    for number, law in enumerate(laws, start=1):
        for violation in law:
            raise ContractError(
                f"law L{number} is broken after {after}: {violation}",
                remedy=f"This is a fault of {after}, not of your model; see dlqc/check.py for the law",
            )


def _lint(graph: fx.Graph) -> Iterator[str]:
    try:
        graph.lint()
    except RuntimeError as error:
        yield str(error).splitlines()[0]


def _interface(graph: fx.Graph, spec: DiffusionSpec) -> Iterator[str]:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = [node for node in graph.nodes if node.op == "output"]
    if len(inputs) != 1 or len(outputs) != 1:
        yield f"{len(inputs)} placeholders and {len(outputs)} outputs, must be one of each"
        return
    ids, logits = inputs[0].meta.get("val"), outputs[0].args[0]
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
        yield f"%{inputs[0].name} is not int64 [batch, length]"
    value = logits.meta.get("val") if isinstance(logits, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
        yield "the output is not floating-point logits [batch, length, vocabulary]"
    elif int(value.shape[-1]) != spec.vocab_size:
        yield f"the logits have {int(value.shape[-1])} columns, the model declares {spec.vocab_size}"


def _constants(graph: fx.Graph, weights: Weights) -> Iterator[str]:
    seen = set()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        seen.add(name)
        if name not in weights:
            yield f"%{node.name} reads {name!r}, which is no constant of the model"
            continue
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and tuple(val.shape) != tuple(weights[name].shape):
            yield f"%{node.name} says {list(val.shape)}, constant {name!r} has {list(weights[name].shape)}"
    for name in weights:
        if name not in seen:
            yield f"constant {name!r} is read by nobody"


def _targets(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op in ("call_method", "call_module"):
            yield f"%{node.name} is a {node.op}"
        elif node.op == "call_function" and not allowed(node.target):
            yield f"%{node.name} calls {node.target}, which is outside the allowed ops"


def allowed(target: Any) -> bool:
    """Whether a call target may stand in a graph, and so in an artifact."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in NAMESPACES
    return target in SIZE_ARITHMETIC or target is torch.sym_max or target is torch.sym_min


def _propagation(graph: fx.Graph, weights: Weights) -> Iterator[str]:
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        said = node.meta.get("val")
        if said is None:
            yield f"%{node.name} has no value"
            return
        if node.op != "call_function":
            values[node] = said
            continue
        mode = getattr(said, "fake_mode", None)
        try:
            found = said if mode is None else propagated(node, values, mode)
        except (RuntimeError, TypeError, ValueError) as error:
            yield f"%{node.name} cannot be computed from its arguments: {str(error).splitlines()[0]}"
            return
        values[node] = found
        if isinstance(said, torch.Tensor) and not _agree(said, found):
            yield (
                f"%{node.name} says {_type(said)}, propagation gives {_type(found)}"
                if isinstance(found, torch.Tensor)
                else f"%{node.name} says {_type(said)}, propagation gives no tensor"
            )
            return


def _agree(said: torch.Tensor, found: Any) -> bool:
    if not isinstance(found, torch.Tensor) or said.dtype != found.dtype or said.dim() != found.dim():
        return False
    static = [(a, b) for a, b in zip(said.shape, found.shape, strict=True) if isinstance(a, int) and isinstance(b, int)]
    return all(a == b for a, b in static)


def _type(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _owners(graph: fx.Graph, weights: Weights) -> Iterator[str]:
    for name, constant in weights.items():
        if len(constant.shape) < 2 or constant.aliases:
            continue
        readers = uses(graph, name)
        if any(is_call(reader, *EMBEDDINGS) for reader in readers):
            continue
        roots = {_stack(reader) for reader in readers}
        if len(roots) > 1:
            names = ", ".join(f"%{reader.name}" for reader in readers[:4])
            yield f"constant {name!r} is read by {names}, and is not a declared tie"


def _stack(node: fx.Node) -> str:
    """The module that a call was written in: one module called many times owns its weight once."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else node.name


def _quantized(graph: fx.Graph, weights: Weights) -> Iterator[str]:
    for node in graph.nodes:
        if is_call(node, LINEAR_Q, LINEAR_PACKED):
            yield from _quantized_linear(node, weights)
        elif is_call(node, *CODED_LINEARS):
            yield from _coded_linear(node, weights)
            yield from _widths(node) if is_call(node, LINEAR_NESTED) else ()
        elif is_call(node, LOW_RANK):
            yield from _low_rank(node, weights)
        elif is_call(node, EMBEDDING_PACKED):
            _, codes, scales, zeros, bits, group, k, _ = args_of(node)
            yield from _stored(node, (codes, scales, zeros), int(bits), int(group), int(k), weights, packed=True)
        elif is_call(node, *ACT_QUANTIZERS):
            if not node.users or not all(is_call(user, *QUANTIZED_LINEARS) or _is_kernel(user) for user in node.users):
                yield f"%{node.name} quantizes activations that no quantized linear reads"
            if is_call(node, QUANTIZE_ACT_ADAPTIVE):
                yield from _act_widths(node)
        elif is_call(node, *HEAD_QUANTIZERS) and not (node.users and all(is_call(u, *ATTENTIONS) for u in node.users)):
            yield f"%{node.name} quantizes what no attention reads"
        elif is_call(node, CACHED):
            yield from _stored_in_cache(node)
        if is_call(node, QUANTIZE_ACT_STATIC, QUANTIZE_HEADS_STATIC):
            yield from _fixed(node, weights)


def _stored_in_cache(node: fx.Node) -> Iterator[str]:
    """A mark on keys or values: read by one attention, in its place, with a format that holds them."""
    x, offset, spec = args_of(node)
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], SDPA):
        yield f"%{node.name} stores what no attention reads"
        return
    wrong = check_stored(spec, int(x.meta["val"].shape[-1]), args_of(users[0]).index(node))
    if wrong is not None:
        yield f"%{node.name}: {wrong}"
    if offset is not None and (offset.meta["val"].dim() != 4):
        yield f"%{node.name}: the offset is {list(offset.meta['val'].shape)}, must be [1, H, L, D]"


def _fixed(node: fx.Node, weights: Weights) -> Iterator[str]:
    """The fixed scales of a quantizer: [sets, groups of channels], or for heads [sets, heads or 1, channels or 1]."""
    x, scale, zero, bucket, _ = args_of(node)
    names = [constant_name(part) for part in (scale, zero) if part is not None]
    if not all(name is not None and name in weights for name in names):
        yield f"%{node.name}: a scale or zero point is no constant"
        return
    shape = tuple(weights[str(names[0])].shape)
    of_heads = is_call(node, QUANTIZE_HEADS_STATIC)
    sizes = x.meta["val"].shape
    if of_heads:
        fits = len(shape) == 3 and shape[1] in (1, sizes[1]) and shape[2] in (1, sizes[3])
    else:
        fits = len(shape) == 2 and shape[1] > 0 and width(x) % shape[1] == 0
    if not fits or shape[0] < 1:
        yield f"%{node.name}: scales {list(shape)} do not fit {list(sizes)}"
    if bucket is None and shape[0] > 1:
        yield f"%{node.name} has {shape[0]} sets of scales, and nothing chooses among them"
    for name, dtype in zip(names, (torch.float32, torch.int8), strict=False):
        constant = weights[str(name)]
        if constant.leaf.dtype is not dtype or tuple(constant.shape) != shape:
            yield f"%{node.name}: {name!r} is {constant.leaf.dtype}{list(constant.shape)}, must be {dtype}{list(shape)}"
    if torch.float32 is weights[str(names[0])].leaf.dtype and not weights[str(names[0])].leaf.is_meta:
        value = weights.value(str(names[0]))
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            yield f"%{node.name}: a scale of {names[0]!r} is not positive and finite"


def _quantized_linear(node: fx.Node, weights: Weights) -> Iterator[str]:
    x, codes, scales, zeros, bias, bits, group = args_of(node)
    packed = is_call(node, LINEAR_PACKED)
    violations = list(_stored(node, (codes, scales, zeros), int(bits), int(group), width(x), weights, packed=packed))
    yield from violations
    if not violations:
        yield from _bias(node, bias, int(weights[str(constant_name(codes))].shape[-2]), weights)


def _stored(
    node: fx.Node, tensors: tuple[Any, ...], bits: int, group: int, k: int, weights: Weights, *, packed: bool
) -> Iterator[str]:
    """Codes, scales and zero points of a matrix with k columns."""
    parts = {role: part for role, part in zip(("codes", "scales", "zeros"), tensors, strict=True) if part is not None}
    names = {role: constant_name(part) for role, part in parts.items()}
    for role, name in names.items():
        if name is None or name not in weights:
            yield f"%{node.name}: {role} is no constant"
            return
    n = int(weights[str(names["codes"])].shape[-2])
    groups = 1 if not group else k // group
    if group and k % group:
        yield f"%{node.name}: {k} input features do not divide by group {group}"
    expected = {
        "codes": packed_shape(n, k, bits) if packed else (n, k),
        "scales": (n, groups),
        "zeros": packed_shape(n, groups, bits) if packed else (n, groups),
    }
    for role, name in names.items():
        constant = weights[str(name)]
        if tuple(constant.shape) != expected[role]:
            yield f"%{node.name}: {role} {name!r} is {list(constant.shape)}, must be {list(expected[role])}"
        wanted = (torch.bfloat16, torch.float16, torch.float32) if role == "scales" else (torch.uint8,)
        if constant.leaf.dtype not in wanted:
            yield f"%{node.name}: {role} {name!r} is {constant.leaf.dtype}, must be {wanted[0]}"


def _coded_linear(node: fx.Node, weights: Weights) -> Iterator[str]:
    x, parts, bias, spec, n = args_of(node)[:5]
    names = [constant_name(part) for part in parts]
    if not all(name is not None and name in weights for name in names):
        yield f"%{node.name}: a part is no constant"
        return
    wrong = fault(spec, [weights[str(name)].leaf for name in names], n, width(x))
    if wrong is not None:
        yield f"%{node.name}: {wrong}"
    if any(weights[str(name)].folds for name in names):
        yield f"%{node.name}: a part is not as it was rounded, something is folded into it"
    yield from _bias(node, bias, n, weights)


def _widths(node: fx.Node) -> Iterator[str]:
    """The widths that a nested weight is read in, one for each bucket."""
    spec, (bucket, widths) = args_of(node)[3], args_of(node)[5:7]
    fmt = decode(spec)
    if not isinstance(fmt, NestedFormat) or not widths or not set(widths) <= set(fmt.widths):
        yield f"%{node.name} is read in {list(widths)} bits, and stored as {fmt.label}"
    yield from _one_for_each_bucket(node, bucket, widths)


def _act_widths(node: fx.Node) -> Iterator[str]:
    """The widths that activations are rounded to, one for each bucket."""
    _, bucket, widths, _, _ = args_of(node)
    if not widths or not all(2 <= bits <= 8 for bits in widths):
        yield f"%{node.name} rounds activations to {list(widths)} bits, which are no widths of integers"
    yield from _one_for_each_bucket(node, bucket, widths)


def _one_for_each_bucket(node: fx.Node, bucket: fx.Node | None, widths: Sequence[int]) -> Iterator[str]:
    source = bucket
    while isinstance(source, fx.Node) and not is_call(source, MASK_BUCKET):
        source = next(iter(args_of(source)), None)
    buckets = 1 if source is None else len(args_of(source)[2]) + 1
    if (bucket is None) != (source is None) or buckets != len(widths):
        yield f"%{node.name} has {len(widths)} widths for {buckets} buckets of mask ratio"
    elif bucket is not None and bucket.meta["val"].dim() != node.meta["val"].dim() - 1:
        yield f"%{node.name}: %{bucket.name} does not say the bucket of each of its rows"


def _low_rank(node: fx.Node, weights: Weights) -> Iterator[str]:
    y, x, parts, spec = args_of(node)
    names = [constant_name(part) for part in parts]
    if not all(name is not None and name in weights for name in names):
        yield f"%{node.name}: a part is no constant"
        return
    wrong = low_rank_fault(spec, [weights[str(name)].leaf for name in names], width(y), width(x))
    if wrong is not None:
        yield f"%{node.name}: {wrong}"
    if not (is_call(y, *QUANTIZED_LINEARS) or _is_kernel(y)):
        yield f"%{node.name} corrects %{y.name}, which is no quantized linear"
    elif x not in (args_of(y)[0], args_of(args_of(y)[0])[0] if is_call(args_of(y)[0], *ACT_QUANTIZERS) else None):
        yield f"%{node.name} reads %{x.name}, which %{y.name} does not read"


def _bias(node: fx.Node, bias: object, n: int, weights: Weights) -> Iterator[str]:
    name = constant_name(bias)
    if bias is not None and (name is None or tuple(weights[name].shape) != (n,)):
        yield f"%{node.name}: bias is not a constant of shape [{n}]"


def _masks(graph: fx.Graph, weights: Weights, spec: DiffusionSpec) -> Iterator[str]:
    if spec.attention != "full":
        return
    seen: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if not is_call(node, *ATTENTIONS):
            continue
        mask = arg(node, 3, "attn_mask")
        if isinstance(mask, fx.Node) and mask not in seen:
            seen[mask] = mask_class(graph, weights, mask)
        flag = args_of(node)[4] if is_call(node, ATTENTION) else arg(node, 5, "is_causal", False)
        causal = flag or (isinstance(mask, fx.Node) and seen[mask] == "causal")
        if causal:
            yield f"%{node.name} is causal, the model declares full attention"


def _facts(graph: fx.Graph, weights: Weights, facts: set[str]) -> Iterator[str]:
    for fact in sorted(facts & FACT_CHECKS.keys()):
        for violation in FACT_CHECKS[fact](graph, weights):
            yield f"fact {fact!r} does not hold: {violation}"


def _no_call(*targets: Any) -> Callable[[fx.Graph, Weights], Iterator[str]]:
    def law(graph: fx.Graph, weights: Weights) -> Iterator[str]:
        for node in graph.nodes:
            if is_call(node, *targets):
                yield f"%{node.name} is {node.target}"

    return law


def _unit_gain(graph: fx.Graph, weights: Weights) -> Iterator[str]:
    for node in graph.nodes:
        gain = constant_name(arg(node, 2, "weight")) if is_call(node, *NORMS) else None
        if gain is None or len(uses(graph, gain)) > 1:
            continue
        region = grow(graph, weights, node, "diagonal", upward=False)
        if isinstance(region, Refused) or any(is_call(absorb.by, *NORMS) for absorb in region.absorbs.values()):
            continue
        value = weights.value(gain, torch.float64)
        bias = arg(node, 3, "bias") if is_call(node, LAYER_NORM) else None
        name = constant_name(bias)
        if bias is not None and (name is None or bool((value == 0).any()) or is_shared(graph, name)):
            continue
        if not bool((value == 1).all()):
            yield f"the gain {gain!r} of %{node.name} is not one, though linears alone read it"


def _some_quantized(graph: fx.Graph, weights: Weights) -> Iterator[str]:
    if not any(is_call(node, *QUANTIZED_LINEARS) or _is_kernel(node) for node in graph.nodes):
        yield "no linear is quantized"


def _activations_quantized(graph: fx.Graph, weights: Weights) -> Iterator[str]:
    for node in graph.nodes:
        if is_call(node, *QUANTIZED_LINEARS) and not is_call(args_of(node)[0], *ACT_QUANTIZERS):
            yield f"%{node.name} reads activations that are not quantized"


def _is_kernel(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "dlqc")


FACT_CHECKS: dict[str, Callable[[fx.Graph, Weights], Iterator[str]]] = {
    "float-weights": _no_call(LINEAR_Q, *CODED_LINEARS),
    "float-activations": _no_call(*ACT_QUANTIZERS),
    "float-attention": _no_call(*HEAD_QUANTIZERS, ATTENTION, CACHED),
    "unit-gain": _unit_gain,
    "quantized-weights": _some_quantized,
    "quantized-activations": _activations_quantized,
    "packed": _no_call(LINEAR_Q),
    "lowered": _no_call(LINEAR_PACKED, LINEAR_CODED),
}
