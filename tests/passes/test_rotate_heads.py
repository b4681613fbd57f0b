"""rotate_heads turns values within each KV head, and undoes it for every query head of the group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.errors import ContractError
from dlqc.graph import is_call
from dlqc.manager import PassManager
from dlqc.ops import TRANSFORM
from dlqc.passes import rotate_heads
from dlqc.passes.rotate_heads import RotateHeads
from dlqc.recipe import parse_line
from dlqc.transform import Identity

CaseMaker = Callable[..., Any]


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada grouped bias", "dream"])
@pytest.mark.parametrize("across", [False, True])
def test_the_function_stays(case: CaseMaker, name: str, across: bool) -> None:
    k = case(name)
    before, single = k.forward(k.ids(), torch.float64), k.forward(k.ids())
    ((_, report),) = PassManager((RotateHeads(across=across),)).run(k.graph, k.ctx)
    assert (report.sites, report.declined) == (2, [])
    assert report.certificate < 1e-12
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    assert deviation(k.forward(k.ids()), single) < (1e-4 if "bf16" not in name else 3e-2)
    assert sum(is_call(node, TRANSFORM) for node in k.graph.nodes) == (2 if across else 0)
    assert report.metrics.get("online", 0) == (2 if across else 0)


def test_the_bias_of_the_values_is_turned_too(case: CaseMaker) -> None:
    k = case("dream")
    name = next(n for n in k.ctx.weights if n.endswith("layers.0.self_attn.v_proj.bias"))
    before = k.ctx.weights.value(name, torch.float64)
    RotateHeads().apply(k.graph, k.ctx)
    after = k.ctx.weights.value(name, torch.float64)
    assert not torch.allclose(before, after)
    assert torch.allclose(before.reshape(2, 16).norm(dim=1), after.reshape(2, 16).norm(dim=1))  # within each head


def test_with_across_the_output_projection_sees_a_full_hadamard_matrix(case: CaseMaker) -> None:
    k = case("llada")
    name = next(n for n in k.ctx.weights if n.endswith("blocks.0.attn_out.weight"))
    before = k.ctx.weights.value(name, torch.float64)
    RotateHeads(across=True).apply(k.graph, k.ctx)
    m = torch.linalg.lstsq(before, k.ctx.weights.value(name, torch.float64)).solution
    assert torch.allclose(m.abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64), atol=1e-9)


def test_values_read_elsewhere_are_declined(case: CaseMaker) -> None:
    from dlqc.graph import aten, call_before

    k = case("llada")
    attention = k.node("scaled_dot_product_attention")
    v = attention.args[2]
    extra = call_before(k.graph, attention, aten.softmax.int, (v, -1))
    q = attention.args[0]
    attention.update_arg(0, call_before(k.graph, attention, aten.add.Tensor, (q, extra)))
    report = RotateHeads().apply(k.graph, k.ctx)
    assert report.sites == 1
    assert report.declined[0].reason == (
        f"stuck at %{extra.name} (aten.softmax.int): no rule moves a transform of kind 'orthogonal' through it"
    )


def test_a_model_without_attention(case: CaseMaker) -> None:
    with pytest.raises(ContractError, match="found nothing to rewrite"):
        PassManager(parse_line("rotate_heads")).run((k := case("layer norm")).graph, k.ctx)


def test_a_planted_error_shows(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("dream")
    before = k.forward(k.ids(), torch.float64)
    monkeypatch.setattr(
        rotate_heads, "keep_online", lambda graph, weights, region, t: rotate_heads.fold(weights, region, t)
    )
    RotateHeads(across=True).apply(k.graph, k.ctx)
    assert deviation(k.forward(k.ids(), torch.float64), before) > 1e-3
    assert Identity(3).groups
