"""What passes that fix scales share: names, the nodes that tell a row's mask-ratio bucket, the numbers for the report."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import fx

from dlqc.execute import placeholder
from dlqc.graph import args_of, aten, call_before, is_call
from dlqc.observers import Layout
from dlqc.ops import MASK_BUCKET
from dlqc.ranges import Fixed, Seen


def bucket_of(
    graph: fx.Graph, mask_id: int, edges: tuple[float, ...], before: fx.Node, layout: Layout = "tokens"
) -> fx.Node | None:
    """The bucket of every token's row, int64, laid out as the tokens of a value are; None where there is one bucket only.

    The share of [MASK] is counted once in a graph, right behind the ids, whoever asks.
    """
    if not edges:
        return None
    ids = placeholder(graph)
    args = (ids, mask_id, list(edges))
    found = next(
        (u for u in ids.users if is_call(u, MASK_BUCKET) and [*args_of(u)[:2], list(args_of(u)[2])] == [*args]), None
    )
    by_token = found or call_before(graph, ids.next, MASK_BUCKET, args)
    if layout == "length first":
        return call_before(graph, before, aten.transpose.int, (by_token, 0, 1))
    if layout == "flat":
        return call_before(graph, before, aten.reshape.default, (by_token, [-1]))
    return by_token


T = TypeVar("T")


def unique_names(items: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The same items; a name that was there before gets a number.

    >>> [name for name, _ in unique_names([("a", 0), ("b", 1), ("a", 2)])]
    ['a', 'b', 'a.1']
    """
    taken: set[str] = set()
    for base, item in items:
        name = next(n for n in itertools.chain([base], (f"{base}.{i}" for i in itertools.count(1))) if n not in taken)
        taken.add(name)
        yield name, item


def summary(fixed: Fixed, seen: Seen) -> dict[str, float]:
    """The widest range of each set, how much of what was seen it holds, and how many tokens it comes from."""
    found: dict[str, float] = {}
    for s in range(fixed.low.shape[0]):
        suffix = f" {s}" if fixed.low.shape[0] > 1 else ""
        reach = float((seen.high[s] - seen.low[s]).max())
        found[f"low{suffix}"], found[f"high{suffix}"] = float(fixed.low[s].min()), float(fixed.high[s].max())
        found[f"kept{suffix}"] = float((fixed.high[s] - fixed.low[s]).max()) / reach if reach > 0 else 1.0
        found[f"tokens{suffix}"] = int(seen.tokens[s])
    return found
