"""rotate_qk turns queries and keys where their product does not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.errors import ContractError
from dlqc.graph import SDPA, args_of, is_call
from dlqc.manager import PassManager
from dlqc.ops import TRANSFORM
from dlqc.passes.rotate_qk import RotateQk
from dlqc.regions import transform_of
from dlqc.transform import Hadamard

CaseMaker = Callable[..., Any]


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada grouped bias", "dream"])
def test_the_function_stays(case: CaseMaker, name: str) -> None:
    k = case(name)
    before, single = k.forward(k.ids(), torch.float64), k.forward(k.ids())
    ((_, report),) = PassManager((RotateQk(),)).run(k.graph, k.ctx)
    assert (report.sites, report.metrics["online"]) == (2, 4)
    assert report.certificate < 1e-12
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    assert deviation(k.forward(k.ids()), single) < (1e-4 if "bf16" not in name else 3e-2)


def test_queries_and_keys_go_through_the_same_rotation(case: CaseMaker) -> None:
    k = case("dream")
    RotateQk().apply(k.graph, k.ctx)
    for attention in (node for node in k.graph.nodes if is_call(node, SDPA)):
        q, key, v = args_of(attention)[:3]
        assert is_call(q, TRANSFORM)
        assert is_call(key, TRANSFORM)
        assert not is_call(v, TRANSFORM)
        found = [transform_of(node, k.ctx.weights) for node in (q, key)]
        assert all(isinstance(t, Hadamard) and t.width == t.block == 16 for t in found)


def test_without_the_rotation_of_the_keys_it_shows(case: CaseMaker) -> None:
    k = case("llada")
    before = k.forward(k.ids(), torch.float64)
    RotateQk().apply(k.graph, k.ctx)
    attention = k.node("scaled_dot_product_attention")
    attention.update_arg(1, args_of(args_of(attention)[1])[0])
    assert deviation(k.forward(k.ids(), torch.float64), before) > 1e-3


def test_a_model_without_attention(case: CaseMaker) -> None:
    with pytest.raises(ContractError, match="found nothing to rewrite"):
        PassManager((RotateQk(),)).run((k := case("layer norm")).graph, k.ctx)
