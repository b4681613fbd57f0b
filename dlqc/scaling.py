"""Edges that can be scaled by channel: what smoothing, activation-aware scaling and equalization share.

    norm      norm(x; g) … linears         the gain takes 1/s
    product   p ∘ q … linears              one of the factors takes 1/s, into the linear that makes it
    value     v … sdpa … linears           per KV head; all query heads of a group share its s
    other     relu, and whatever else a diagonal passes

On a closed edge x → x·diag(1/s) folds into what makes x, and W → W·diag(s) into every linear that reads it. With grouped
queries a reader has `repeat` channels for each entry of s: `narrow` brings numbers by channel of the reader down to s,
`wide` brings s up to the reader.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from dlqc.contract import Context, Declined
from dlqc.graph import LINEAR, NORMS, SDPA, args_of, aten, is_call, linears
from dlqc.regions import Refused, Region, edge, edges, fold, value_heads
from dlqc.transform import Diagonal
from dlqc.weights import Weights

EdgeKind = Literal["norm", "product", "value", "other"]

_LAYOUT = (
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.permute.default,
)


@dataclass(frozen=True)
class Edge:
    """A value that linears read, and its closed region for diagonals.

    Attributes:
        name: the first of its readers.
        readers: weights of the linears that undo the scale, with the number of channels each entry of s has there.
    """

    name: str
    kind: EdgeKind
    region: Region
    readers: dict[str, int]

    @property
    def width(self) -> int:
        return self.region.width

    def narrow(self, x: torch.Tensor, repeat: int) -> torch.Tensor:
        """The largest of the `repeat` channels that share an entry of s, [width·repeat] → [width]."""
        return x.reshape(self.region.heads, repeat, -1).amax(dim=1).reshape(-1) if repeat > 1 else x

    def mean(self, x: torch.Tensor, repeat: int) -> torch.Tensor:
        """The mean of the `repeat` channels that share an entry of s."""
        return x.reshape(self.region.heads, repeat, -1).mean(dim=1).reshape(-1) if repeat > 1 else x

    def wide(self, s: torch.Tensor, repeat: int) -> torch.Tensor:
        """s by channel of a reader, [width] → [width·repeat]."""
        return s.reshape(self.region.heads, 1, -1).expand(-1, repeat, -1).reshape(-1) if repeat > 1 else s

    def column_peaks(self, weights: Weights) -> torch.Tensor:
        """max |W_j| over all rows of all readers, float64 [width]."""
        found = [
            self.narrow(weights.value(name, torch.float64).abs().amax(dim=0), repeat)
            for name, repeat in self.readers.items()
        ]
        return torch.stack(found).amax(dim=0)

    def scale(self, weights: Weights, s: torch.Tensor) -> None:
        """Divide the channels of the value by s, and multiply the columns of its readers; s float64 [width]."""
        fold(weights, self.region, Diagonal(1.0 / s))


def kind_of(value: fx.Node) -> EdgeKind:
    if is_call(value, *NORMS):
        return "norm"
    if is_call(value, aten.mul.Tensor):
        return "product"
    return "other" if _attention(value) is None else "value"


def _attention(value: fx.Node) -> fx.Node | None:
    """The attention whose output this is, laid out anew."""
    while is_call(value, *_LAYOUT):
        value = args_of(value)[0]
    return value if is_call(value, SDPA) else None


def scalable(graph: fx.Graph, ctx: Context, wanted: Collection[EdgeKind]) -> Iterator[Edge | Declined]:
    """The edges of the wanted kinds that linears in scope read, each once; or why one cannot be scaled."""
    nodes = ctx.nodes(graph)
    inside, done = set(nodes), set[fx.Node]()
    for value in edges(nodes, ctx.weights):
        kind = kind_of(value)
        if kind not in wanted or value in done:
            continue
        name = next(linears(value.users, ctx.weights)).name
        attention = _attention(value)
        found = (
            edge(graph, ctx.weights, value, "diagonal")
            if attention is None
            else value_heads(graph, ctx.weights, attention, "diagonal")
        )
        reason = str(found) if isinstance(found, Refused) else _unfit(found, inside)
        if reason is not None or isinstance(found, Refused):
            yield Declined(f"input of {name}", str(reason))
            continue
        done |= set(found.carries)
        yield Edge(name, kind, found, {a.name: a.repeat for a in found.sinks})


def _unfit(region: Region, inside: Collection[fx.Node]) -> str | None:
    """What keeps a closed region from being scaled by numbers of this scope alone."""
    outside = [n for n in (*region.carries, *(a.by for a in region.absorbs.values())) if n not in inside]
    if outside:
        return f"%{outside[0].name} carries the scale outside of the block"
    if region.paired:
        return "a rotary embedding ties its channels in pairs"
    odd = [a.by for a in region.sinks if not (is_call(a.by, LINEAR) and a.undo)]
    return f"%{odd[0].name} would carry the scale on" if odd else None
