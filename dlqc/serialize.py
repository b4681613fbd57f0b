"""The graph as JSON, and back.

A node is `{"name", "op", "target", "args", "kwargs"}`. Targets are spelled `aten.linear.default` or `operator.mul`;
only pure ops of torch and dlqc may stand there (`is_pure`), so that a graph from a file can compute but not act.
Arguments are plain JSON, with tagged objects for what JSON has no word for:

    {"node": "linear_3"}   {"dtype": "float32"}   {"device": "cpu"}   {"layout": "strided"}   {"float": "-inf"}

Shapes are not stored but propagated again: what `get_attr` nodes say (`shape`, `dtype`) and what the ops compute must
agree. Names are checked before fx sees them, because fx spells them out in the code that it generates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dlqc import ops
from dlqc.check import SIZE_ARITHMETIC
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ArtifactError
from dlqc.graph import infer

assert ops  # decoding needs the logical ops registered

_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn")
_DTYPES = (*_FLOATS, "int64", "int32", "int16", "int8", "uint16", "uint8", "bool")
_SIZE_OPS: dict[str, Any] = {f"operator.{f.__name__}": f for f in SIZE_ARITHMETIC}
_SIZE_OPS |= {"torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min}
_NAMESPACES = ("aten", "dlqc")
_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
_NODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONSTANT = re.compile(r"[^\s\"'\\(){}]+")
_REMEDY = "The file was changed; save the model again"

# Types of arguments and results that a pure op may have, and its arguments that are words.
_PURE = ("Tensor", "int", "float", "number", "bool", "Device", "SymInt", "ScalarType", "Layout", "MemoryFormat")
_WORDS = ("approximate", "equation", "indexing", "interpolation", "mode", "reduce", "rounding_mode", "side", "spec")


def encode_graph(graph: fx.Graph) -> dict[str, Any]:
    """A graph as plain JSON data."""
    return {"nodes": [_encode_node(node) for node in graph.nodes]}


def _encode_node(node: fx.Node) -> dict[str, Any]:
    item: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "get_attr":
        val = node.meta["val"]
        return item | {
            "target": str(node.target),
            "shape": [int(s) for s in val.shape],
            "dtype": _dtype_name(val.dtype),
        }
    if node.op == "placeholder":
        return item
    if node.op == "call_function":
        item["target"] = _target_name(node.target)
    item |= {"args": _encode(node.args), "kwargs": _encode(node.kwargs)}
    if "block_boundary" in node.meta:
        item["block_boundary"] = node.meta["block_boundary"]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack:
        item["module"] = str(stack[-1][0])
    return item


def _target_name(target: Any) -> str:
    known = next((name for name, op in _SIZE_OPS.items() if op is target), None)
    if known is not None:
        return known
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _NAMESPACES or not is_pure(target):
        raise ArtifactError(
            f"a call of {target} cannot be stored", where="graph", remedy="Compile without the pass that made it"
        )
    return str(target)


def is_pure(op: torch._ops.OpOverload) -> bool:
    """Whether an op is a function of tensors and numbers: it changes no argument and takes no file name.

    torch's own namespace is wider than that: it has in-place ops, `aten.from_file` and `aten.save`.
    """
    schema = op._schema
    results = all(_base(r.type) in _PURE for r in schema.returns)
    arguments = all(_base(a.type) in _PURE or (_base(a.type) == "str" and a.name in _WORDS) for a in schema.arguments)
    return bool(schema.returns) and not schema.is_mutable and results and arguments


def _base(kind: Any) -> str:
    """The type inside lists and options."""
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return str(kind)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, torch.dtype):
        return {"dtype": _dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArtifactError(
        f"an argument of type {type(value).__name__} cannot be stored",
        where="graph",
        remedy="Compile without the pass that made it",
    )


def decode_graph(data: Any, spec: DiffusionSpec) -> fx.Graph:
    """A graph from JSON data, shapes propagated with batch and length symbolic.

    Raises:
        ArtifactError: a name, op, argument or order that no saved graph has. Data of another shape than `encode_graph`
            gives raises what Python raises on it (KeyError, TypeError, …).
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph, env = fx.Graph(), dict[str, fx.Node]()
    for item in data["nodes"]:
        name, op = str(item["name"]), item["op"]
        if not _NODE.fullmatch(name) or name in env:
            raise _wrong(f"{name!r} is no name for a node, or is there twice")
        if op == "output":
            graph.output(_decode(item["args"], env)[0])
            continue
        node = _decode_node(graph, item, env, mode, spec)
        if "block_boundary" in item:
            node.meta["block_boundary"] = int(item["block_boundary"])
        if "module" in item:
            module = str(item["module"])
            node.meta["nn_module_stack"] = {module: (module, None)}
        env[name] = node
    return graph


def _decode_node(
    graph: fx.Graph, item: Mapping[str, Any], env: dict[str, fx.Node], mode: FakeTensorMode, spec: DiffusionSpec
) -> fx.Node:
    name, op = str(item["name"]), item["op"]
    if op == "placeholder":
        node = graph.placeholder(name)
        node.meta["val"] = _ids(mode, spec)
    elif op == "get_attr":
        target, shape = str(item["target"]), tuple(int(s) for s in item["shape"])
        if not _CONSTANT.fullmatch(target) or any(s < 0 for s in shape):
            raise _wrong(f"{target!r} {list(shape)} is no constant")
        node = graph.create_node("get_attr", target, name=name)
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=_dtype(item["dtype"]))
    elif op == "call_function":
        args = tuple(_decode(item["args"], env))
        kwargs = {str(k): _decode(v, env) for k, v in item["kwargs"].items()}
        node = graph.create_node("call_function", _target(item["target"]), args, kwargs, name=name)
        _infer(node, mode)
    else:
        raise _wrong(f"node {name!r} is a {op!r}, which no graph may hold")
    return node


def _wrong(what: str) -> ArtifactError:
    return ArtifactError(what, where="graph.json", remedy=_REMEDY)


def _ids(mode: FakeTensorMode, spec: DiffusionSpec) -> torch.Tensor:
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    real = torch.zeros(2, min(16, spec.max_length), dtype=torch.int64)
    return mode.from_tensor(real, symbolic_context=dynamic)


def _infer(node: fx.Node, mode: FakeTensorMode) -> None:
    try:
        with mode:  # also where no argument is fake: nothing is computed for real while a file is read
            infer(node)
    except Exception as error:  # torch raises anything on arguments that do not fit
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _wrong(f"node {node.name!r} cannot be computed: {first}") from error


def _target(name: Any) -> Any:
    """The op of a name; only names of the allow-list are looked up."""
    if isinstance(name, str) and name in _SIZE_OPS:
        return _SIZE_OPS[name]
    parts = str(name).split(".")
    if len(parts) == 3 and parts[0] in _NAMESPACES and all(_NODE.fullmatch(p) for p in parts):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None)
        if isinstance(overload, torch._ops.OpOverload) and is_pure(overload):
            return overload
    raise _wrong(f"{name!r} is no op that a graph may call")


def _dtype(name: Any) -> torch.dtype:
    if name not in _DTYPES:
        raise _wrong(f"unknown dtype {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def _decode(value: Any, env: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, env) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items() if len(value) == 1 else (("", None),)
    if tag == "node":
        if content not in env:
            raise _wrong(f"node {content!r} is used before it is defined")
        return env[content]
    if tag == "dtype":
        return _dtype(content)
    if tag == "device" and isinstance(content, str) and re.fullmatch(r"[a-z]+(:\d+)?", content):
        return torch.device(content)
    if tag == "layout" and content == "strided":
        return torch.strided
    if tag == "memory_format" and content in _FORMATS:
        return getattr(torch, content)
    if tag == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    raise _wrong(f"{value!r} is no argument")
