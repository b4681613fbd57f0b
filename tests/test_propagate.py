"""Propagation: what is kept from the last time is kept for the same call alone, and what did not change is not computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dlqc.check import check
from dlqc.contract import FACTS_OF_CAPTURE
from dlqc.errors import ContractError
from dlqc.graph import LINEAR, aten, call_before, is_call
from dlqc.propagate import propagated

CaseMaker = Callable[[str], Any]


def first(graph: fx.Graph, target: object) -> fx.Node:
    return next(node for node in graph.nodes if is_call(node, target))


def judge(k: Any) -> None:
    check(k.graph, k.ctx.weights, k.ctx.spec, set(FACTS_OF_CAPTURE), after="pass 'planted'")


def test_a_change_after_a_check_is_seen(case: CaseMaker) -> None:
    """What is kept from the last propagation is kept for the same call of the same values only."""
    k = case("llada")
    judge(k)
    kept = {node: node.meta["propagated"].value for node in k.graph.nodes if "propagated" in node.meta}
    judge(k)
    assert all(node.meta["propagated"].value is value for node, value in kept.items())
    linear = first(k.graph, LINEAR)
    after = call_before(k.graph, linear.next, aten.to.dtype, (linear, torch.float64))
    linear.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    with pytest.raises(
        ContractError, match=r"law L5 .*: %\w+ (says float32\[.*, propagation gives float64\[|cannot be)"
    ):
        judge(k)


def test_values_of_another_mode_or_dtype_are_not_kept(case: CaseMaker) -> None:
    k = case("llada")
    judge(k)
    node = first(k.graph, LINEAR)
    said, kept = node.meta["val"], node.meta["propagated"]
    values = dict(zip(node.all_input_nodes, (n.meta["val"] for n in node.all_input_nodes), strict=True))
    again = propagated(node, values, said.fake_mode)
    torch.set_default_dtype(torch.float64)
    try:
        propagated(node, values, said.fake_mode)
    finally:
        torch.set_default_dtype(torch.float32)
    assert node.meta["propagated"].around == (said.fake_mode, torch.float64)
    other = FakeTensorMode()
    with other:
        values = {
            n: torch.empty(2, 5, *v.shape[2:]) if v.dim() == 3 else torch.empty(*v.shape) for n, v in values.items()
        }
    found = propagated(node, values, other)
    assert found.fake_mode is other
    assert kept.value is not found is not again


def test_a_change_without_effect_stops_there(case: CaseMaker) -> None:
    k = case("llada")
    judge(k)
    linear = first(k.graph, LINEAR)
    kept = {node: node.meta["propagated"] for node in k.graph.nodes if "propagated" in node.meta}
    after = call_before(k.graph, linear.next, aten.clone.default, (linear,))
    linear.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    judge(k)
    again = [node for node, last in kept.items() if node.meta["propagated"] is not last]
    assert set(again) == set(after.users), "only the readers of the new value are computed again"
    assert all(node.meta["propagated"].value is kept[node].value for node in again)
