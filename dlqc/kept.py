"""Linears that no rounding touches, by what the graph says of them.

a router            its output picks experts (`dlqc.routers`)
outlier columns     its input is a few columns of another value, which `split_outliers` took out to spare them
"""

from __future__ import annotations

from torch import fx

from dlqc.graph import Linear, args_of, aten, constant_name, is_call
from dlqc.routers import KEPT, is_router

#: What a report says of the outlier columns of a linear.
OUTLIERS = "outlier columns: they keep their precision"


def reason_to_keep(site: Linear) -> str | None:
    """Why a linear stays as it is, whatever the recipe asks for; None if it may be rounded."""
    if is_router(site.node):
        return KEPT
    return OUTLIERS if picks_columns(site.x) else None


def picks_columns(x: fx.Node) -> bool:
    """Whether a value is a constant choice of the channels of another."""
    if not is_call(x, aten.index_select.default):
        return False
    source, dim, index = args_of(x)
    rank = source.meta["val"].dim()
    return int(dim) % rank == rank - 1 and constant_name(index) is not None
