"""Linears that are rounded, and those that no rounding touches, by what the graph says of them.

    a router            its output picks experts (`dlqc.routers`)
    a tied head         an embedding reads its weight, which `quantize_embedding` rounds for both
    outlier columns     its input is a few columns of another value, which `split_outliers` took out to spare them

They stay as they are, whatever the recipe asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from dlqc.contract import Declined, matches
from dlqc.graph import EMBEDDING, Linear, args_of, aten, constant_name, is_call, linears, uses
from dlqc.routers import KEPT, is_router
from dlqc.weights import Weights

#: What a report says of a head that is tied to an embedding.
TIED = "tied to an embedding: quantize_embedding rounds the table for both"
#: What a report says of the outlier columns of a linear.
OUTLIERS = "outlier columns: they keep their precision"


def reason_to_keep(site: Linear) -> str | None:
    """Why a linear stays as it is; None if it may be rounded."""
    if is_router(site.node):
        return KEPT
    if any(is_call(user, EMBEDDING) for user in uses(site.node.graph, site.weight)):
        return TIED
    return OUTLIERS if picks_columns(site.x) else None


def to_round(
    nodes: Iterable[fx.Node], weights: Weights, skip: Sequence[str] = ()
) -> tuple[dict[str, list[Linear]], list[Declined]]:
    """The linears among `nodes` that are rounded, by weight, and those left alone, with the reason."""
    found: dict[str, list[Linear]] = {}
    for site in linears(nodes, weights):
        found.setdefault(site.weight, []).append(site)
    declined = {}
    for weight, sites in found.items():
        reason = next(filter(None, map(reason_to_keep, sites)), None)
        reason = "named by skip=" if matches(sites[0].name, skip) else reason
        if reason is not None:
            declined[weight] = Declined(sites[0].name, reason)
    return {weight: sites for weight, sites in found.items() if weight not in declined}, list(declined.values())


def picks_columns(x: fx.Node) -> bool:
    """Whether a value is a constant choice of the channels of another."""
    if not is_call(x, aten.index_select.default):
        return False
    source, dim, index = args_of(x)
    rank = source.meta["val"].dim()
    return int(dim) % rank == rank - 1 and constant_name(index) is not None
