"""Where a graph's attentions are: their names, and whether a pass may quantize what they read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import fx

from dlqc.graph import HEAD_QUANTIZERS, LINEAR, QUANTIZED_LINEARS, args_of, is_call, site_name
from dlqc.heads import parts_of
from dlqc.observers import layout
from dlqc.regions import attentions
from dlqc.static import unique_names


def sites(nodes: list[fx.Node]) -> Iterator[tuple[str, fx.Node]]:
    """The attentions that read nothing quantized, each with a name of its own: where it is, and a number from the second on."""
    fresh = [
        node
        for node in attentions(nodes)
        if not any(is_call(value, *HEAD_QUANTIZERS) for value in parts_of(node).values())
    ]
    yield from unique_names((f"{_module(node)}.attention", node) for node in fresh)


def _module(node: fx.Node) -> str:
    """The module that holds the linears which make queries, keys and values, or else the name of the call."""
    names = [name.split(".") for name in map(_maker, parts_of(node).values()) if name is not None]
    shared = [same[0] for same in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*names, strict=False))]
    return ".".join(shared) if len(names) == 3 and shared else node.name


def _maker(value: object) -> str | None:
    """The module name of the linear that makes a value, found along the first argument of each call."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        if is_call(value, LINEAR, *QUANTIZED_LINEARS):
            return site_name(value)
        value = next(iter(args_of(value)), None)
    return None


def unfit(node: fx.Node) -> str | None:
    """Why an attention cannot be quantized, if so."""
    if any(layout(value) != "heads" for value in parts_of(node).values()):
        return "its queries, keys and values are not laid out [batch, heads, length, width]"
    return None
