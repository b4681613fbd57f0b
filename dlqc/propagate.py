"""Shapes and dtypes of a graph, computed again from its inputs.

Passes change a few nodes, and the law is read after every one; so a call whose target and arguments are those of the last
time has the value of the last time. That is exact: besides them a fake call depends on its mode and the default dtype, and those
are compared, too. A call that was computed again and has the type that it had before keeps its old value, so what stands behind
it is not computed again either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dlqc.graph import args_of

#: Where a node keeps its last call.
_LAST = "propagated"


@dataclass(frozen=True)
class _Call:
    target: Any
    around: tuple[Any, torch.dtype]
    given: Any
    value: Any


def propagated(node: fx.Node, values: dict[fx.Node, Any], mode: Any) -> Any:
    """The fake value of a call.

    Args:
        values: those of the nodes that it reads.
        mode: the fake tensor mode they live in.

    Raises:
        RuntimeError, TypeError, ValueError: as the op raises them.
    """
    given = fx.map_arg((args_of(node), node.kwargs), lambda n: values[n])
    around = mode, torch.get_default_dtype()
    last = node.meta.get(_LAST)
    if last is not None and last.around != around:
        last = None
    if last is not None and last.target is node.target and _same(given, last.given):
        return last.value
    args, kwargs = given
    with mode:
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    if last is not None and _type_of(found) == _type_of(last.value):
        found = last.value
    node.meta[_LAST] = _Call(node.target, around, given, found)
    return found


def _same(a: Any, b: Any) -> bool:
    """The same tensors and sizes (as objects), in the same places, beside equal numbers."""
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, slice):
        return isinstance(b, slice) and _same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if a is b:
        return True
    return type(a) is type(b) and isinstance(a, (bool, int, float, str, torch.dtype, torch.device)) and a == b


def _type_of(value: Any) -> Any:
    """All that a fake call can see of a tensor or a size; of anything else which object it is."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_type_of, value))
    if isinstance(value, torch.Tensor):
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        return value.dtype, value.device, value.layout, tuple(map(_type_of, numbers))
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return value if isinstance(value, int) else id(value)
