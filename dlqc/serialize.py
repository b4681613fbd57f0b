"""The graph as JSON, and back.

A node is `{"name", "op", "target", "args", "kwargs"}`. Targets are spelled `aten.linear.default` or `operator.mul` and must
be in the allow-list of `dlqc.check`; arguments are plain JSON, with tagged objects for what JSON has no word for:

    {"node": "linear_3"}   {"dtype": "float32"}   {"device": "cpu"}   {"layout": "strided"}   {"inf": "-"}

Shapes are not stored but propagated again: what `get_attr` nodes say (`shape`, `dtype`) and what the ops compute must agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dlqc import ops
from dlqc.check import NAMESPACES, SIZE_ARITHMETIC
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ArtifactError
from dlqc.graph import infer

assert ops  # decoding needs the logical ops registered

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_SIZE_OPS = {f"operator.{f.__name__}": f for f in SIZE_ARITHMETIC}


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
    for key in ("block_boundary",):
        if key in node.meta:
            item[key] = node.meta[key]
    return item


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"operator.{target.__name__}"


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
        f"an argument of type {type(value).__name__} cannot be stored", where="graph", remedy="Report this"
    )


def decode_graph(data: Any, spec: DiffusionSpec) -> fx.Graph:
    """A graph from JSON data, shapes propagated with batch and length symbolic. Raises ArtifactError on anything odd."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph, env = fx.Graph(), dict[str, fx.Node]()
    for item in data["nodes"]:
        name, op = str(item["name"]), item["op"]
        if op == "placeholder":
            node = graph.placeholder(name)
            node.meta["val"] = _ids(mode, spec)
        elif op == "get_attr":
            node = graph.create_node("get_attr", str(item["target"]), name=name)
            with mode:
                node.meta["val"] = torch.empty(tuple(int(s) for s in item["shape"]), dtype=_dtype(item["dtype"]))
        elif op == "call_function":
            args, kwargs = tuple(_decode(item["args"], env)), _decode(item["kwargs"], env)
            node = graph.create_node("call_function", _target(item["target"]), args, kwargs, name=name)
            _infer(node)
        elif op == "output":
            graph.output(_decode(item["args"], env)[0])
            continue
        else:
            raise ArtifactError(f"node {name!r} is a {op!r}, which no graph may hold", where="graph.json")
        if "block_boundary" in item:
            node.meta["block_boundary"] = int(item["block_boundary"])
        env[name] = node
    return graph


def _ids(mode: FakeTensorMode, spec: DiffusionSpec) -> torch.Tensor:
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    real = torch.zeros(2, min(16, spec.max_length), dtype=torch.int64)
    return mode.from_tensor(real, symbolic_context=dynamic)


def _infer(node: fx.Node) -> None:
    try:
        infer(node)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"node {node.name!r} cannot be computed: {first}", where="graph.json") from error


def _target(name: Any) -> Any:
    """The op of a name; only names of the allow-list are looked up."""
    if name in _SIZE_OPS:
        return _SIZE_OPS[name]
    parts = str(name).split(".")
    if len(parts) == 3 and parts[0] in NAMESPACES and all(p.isidentifier() for p in parts):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise ArtifactError(f"{name!r} is no op that a graph may call", where="graph.json", remedy="The file was changed")


def _dtype(name: Any) -> torch.dtype:
    if name not in _DTYPES:
        raise ArtifactError(f"unknown dtype {name!r}", where="graph.json", remedy="The file was changed")
    found: torch.dtype = getattr(torch, name)
    return found


def _decode(value: Any, env: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, env) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag == "node":
            if content not in env:
                raise ArtifactError(f"node {content!r} is used before it is defined", where="graph.json")
            return env[content]
        if tag == "dtype" and isinstance(content, str):
            return _dtype(content)
        if tag == "device":
            return torch.device(content)
        if tag == "layout":
            return torch.strided
        if tag == "memory_format":
            return {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}[content]
        if tag == "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
    return {k: _decode(v, env) for k, v in value.items()}
