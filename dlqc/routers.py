"""Routers: linears whose output picks what is computed, rather than being computed with.

The scores of a mixture of experts go through a softmax or sigmoid into a topk. A small error of such a score is either
nothing or another expert, so no error bound of a linear applies to it: routers stay in their own precision.
"""

from __future__ import annotations

import operator

from torch import fx

from dlqc.graph import aten, is_call

#: What a report says of a router that was left alone.
KEPT = "a router: its output picks experts"

_PICKS = (aten.topk.default, aten.argmax.default, aten.sort.default, aten.sort.stable, aten.argsort.default)
#: What lies between a router's scores and the choice: one score in, one score out, or another arrangement of them.
_KEEPS_SCORES = (
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.neg.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.clamp.default,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.to.dtype,
    aten._to_copy.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    operator.getitem,
)


def is_router(node: fx.Node) -> bool:
    """Whether the value of a linear reaches a topk (argmax, sort) with nothing but elementwise arithmetic between."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if is_call(user, *_PICKS):
                return True
            if is_call(user, *_KEEPS_SCORES) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
