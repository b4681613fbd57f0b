"""Trying passes out: on copies, without lowering, as often as one likes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from dlqc.contract import Context, Pass
from dlqc.graph import copy_graph
from dlqc.manager import PassManager
from dlqc.weights import Weights


def tried(graph: fx.Graph, ctx: Context, passes: Sequence[Pass], **changes: Any) -> tuple[fx.Graph, Weights]:
    """What `passes` make of a graph; the graph and `ctx` stay as they are.

    A pass that lowers is left out: packed linears then compute by reference, as the reference backend's kernels would.

    Args:
        changes: fields of the context that are to differ.
    """
    copied = copy_graph(graph)
    mine: Context = dataclasses.replace(ctx, **({"weights": ctx.weights.clone(), "facts": set(ctx.facts)} | changes))
    PassManager([p for p in passes if "lowered" not in p.gives]).run(copied, mine)
    return copied, mine.weights
