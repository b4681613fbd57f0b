"""Store embedding tables in few bits; a lookup unpacks and dequantizes the rows that it looks up, and no others.

Before:  embedding(E, ids)                                   and, where the head is tied,  linear(x, E, b)
After:   embedding_packed(ids, codes, scales, zeros)         linear_packed(x, codes, scales, zeros, b)

E ≈ (codes - zeros)·scales, rounded to nearest, a scale for each row or for each group of a row, from the values with all folds
evaluated in float64. A head that is tied to the table reads the same stored codes: there is one table, and it stays one. A head
of its own is a linear like others: `quantize_weights(head=…)`. Lossy; the report gives each table's signal-to-noise ratio.

Run it behind the transforms, which cannot pass an embedding any more, and before the passes that work block by block, whose
states then come from the rounded table. With `quantize_activations`, a tied head reads quantized activations, too.

Declines:
    - a table that `skip` names
    - a table that something reads besides embeddings and linears
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dlqc.backend import LinearSpec
from dlqc.contract import Context, Declined, Pass, PassReport, Plan, matches
from dlqc.errors import RecipeError, nearest
from dlqc.formats.integer import Clip, IntFormat, QuantizedWeight
from dlqc.formats.packing import pack
from dlqc.graph import (
    EMBEDDING,
    arg,
    args_of,
    as_linear,
    call_before,
    constant_name,
    is_call,
    module_name,
    read,
    replace,
    sweep,
    uses,
)
from dlqc.ops import EMBEDDING_PACKED, LINEAR_PACKED
from dlqc.rounding.hessian import sqnr_db
from dlqc.weights import Weights


@dataclass(frozen=True)
class Table:
    """An embedding table [rows, width] and the calls that read it."""

    weight: str
    rows: int
    width: int
    lookups: tuple[fx.Node, ...]
    heads: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        return module_name(self.weight)


@dataclass(frozen=True)
class QuantizeEmbedding(Pass):
    """Quantize the tables of embeddings, and the heads that are tied to them.

    Options:
        bits: width of the codes. group_size: features of a row per scale, None for one scale per row.
        symmetric: fixed zero point in the middle, or one zero point per group.
        clip: "minmax" covers each group's whole range, "mse" shrinks it to the smallest squared error.
        skip: glob patterns of module names to leave alone.
    """

    name: ClassVar[str] = "quantize_embedding"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized-embeddings"})

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    clip: Clip = "mse"
    skip: tuple[str, ...] = ()

    @property
    def format(self) -> IntFormat:
        return IntFormat(self.bits, self.group_size, self.symmetric)

    def __post_init__(self) -> None:
        self.format  # noqa: B018  a wrong width or group is refused here, with the option's name
        if self.clip not in ("minmax", "mse"):
            raise RecipeError(f"unknown clip {self.clip!r}", where="clip", remedy="Use 'minmax' or 'mse'")

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        found = list(tables(graph, ctx.weights))
        names = [table.name for table in found if isinstance(table, Table)]
        for pattern in (p for p in self.skip if not any(matches(name, [p]) for name in names)):
            plan.problems.append(f"skip pattern {pattern!r} matches no embedding; {nearest(pattern, names[:8])}")
        for table in found:
            if isinstance(table, Declined) or matches(table.name, self.skip):
                continue
            reason = self.format.check(table.width)
            if reason is not None:
                plan.problems.append(f"{table.name}: {reason} (use group_size=None, or exclude it with skip=)")
            elif table.heads:
                has_bias = any(arg(head, 2, "bias") is not None for head in table.heads)
                plan.sites[table.name] = LinearSpec(table.width, table.rows, self.format, None, has_bias)
            else:
                plan.tables[table.name] = (self.format, table.rows, table.width)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for table in list(tables(graph, ctx.weights)):
            if isinstance(table, Declined):
                report.declined.append(table)
            elif matches(table.name, self.skip):
                report.declined.append(Declined(table.name, "named by skip="))
            else:
                report.details[table.name] = self.rewrite(table, graph, ctx)
                report.sites += 1
                if table.heads:
                    report.notes.append(f"{table.name} is the head, too, and both read one stored table")
        sweep(graph, ctx.weights)
        return report

    def rewrite(self, table: Table, graph: fx.Graph, ctx: Context) -> dict[str, float]:
        exact = ctx.weights.value(table.weight, torch.float64)
        rounded = self.format.quantize(exact, clip=self.clip)
        stored = self.store(table, rounded, ctx.weights)
        for node in table.lookups:
            parts = [None if name is None else read(graph, ctx.weights, name, node) for name in stored]
            args = (arg(node, 1, "indices"), *parts, self.bits, self.group_size or 0, table.width)
            replace(node, call_before(graph, node, EMBEDDING_PACKED, (*args, node.meta["val"].dtype)))
        for node in table.heads:
            parts = [None if name is None else read(graph, ctx.weights, name, node) for name in stored]
            args = (args_of(node)[0], *parts, arg(node, 2, "bias"), self.bits, self.group_size or 0)
            replace(node, call_before(graph, node, LINEAR_PACKED, args))
        noise = float((exact - rounded.dequantize()).square().sum())
        bits = self.format.bits_per_weight(table.rows, table.width)
        return {"bits_per_weight": bits, "weight_sqnr_db": sqnr_db(float(exact.square().sum()), noise)}

    def store(self, table: Table, rounded: QuantizedWeight, weights: Weights) -> tuple[str, str, str | None]:
        """Define codes, scales and zero points as constants; gives their names."""
        names = tuple(f"{table.name}.{role}" for role in ("codes_packed", "scales", "zeros_packed"))
        weights.put(names[0], pack(rounded.codes, self.bits))
        weights.put(names[1], rounded.scales)
        if rounded.zeros is None:
            return names[0], names[1], None
        weights.put(names[2], pack(rounded.zeros, self.bits))
        return names[0], names[1], names[2]


def tables(graph: fx.Graph, weights: Weights) -> Iterator[Table | Declined]:
    """The constant tables that embeddings look up, each once; or why one cannot be stored in few bits."""
    seen = set[str]()
    for node in graph.nodes:
        name = constant_name(args_of(node)[0]) if is_call(node, EMBEDDING) else None
        if name is None or name in seen:
            continue
        seen.add(name)
        users = list(dict.fromkeys(uses(graph, name)))
        lookups = [u for u in users if is_call(u, EMBEDDING) and constant_name(args_of(u)[0]) == name]
        heads = [u for u in users if (site := as_linear(u, weights)) is not None and site.weight == name]
        other = next((u for u in users if u not in lookups and u not in heads), None)
        if other is not None:
            yield Declined(module_name(name), f"%{other.name} reads it, too, and is neither an embedding nor a linear")
            continue
        rows, width = weights[name].shape
        yield Table(name, int(rows), int(width), tuple(lookups), tuple(heads))
