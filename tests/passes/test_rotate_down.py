"""rotate_down keeps one online op before a linear and undoes it in the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc import hadamard
from dlqc.certificate import deviation
from dlqc.errors import RecipeError
from dlqc.graph import is_call, linears
from dlqc.manager import PassManager
from dlqc.ops import TRANSFORM
from dlqc.passes import rotate_down
from dlqc.passes.rotate_down import RotateDown
from dlqc.recipe import parse_line

CaseMaker = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "sites", "count"),
    [
        ("llada", "nonlinear", 2),
        ("llada bf16", "nonlinear", 2),
        ("dream", "nonlinear", 2),
        ("dream", "norm", 4),
        ("dream", "all", 8),
        ("layer norm", "nonlinear", 2),
        ("layer norm", "norm", 2),
        ("post norm", "norm", 1),
        ("post norm", "all", 4),
    ],
)
def test_the_function_stays(case: CaseMaker, name: str, sites: str, count: int) -> None:
    k = case(name)
    before, single = k.forward(k.ids(), torch.float64), k.forward(k.ids())
    ((_, report),) = PassManager((RotateDown(sites=sites),)).run(k.graph, k.ctx)  # type: ignore[arg-type]
    assert (report.sites, report.declined) == (count, [])
    assert report.certificate < 1e-12
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    assert deviation(k.forward(k.ids()), single) < (1e-4 if "bf16" not in name else 3e-2)
    assert sum(is_call(node, TRANSFORM) for node in k.graph.nodes) == count  # one op an edge, whoever reads it


def test_the_weight_undoes_the_rotation(case: CaseMaker) -> None:
    k = case("llada")
    name = next(n for n in k.ctx.weights if n.endswith("blocks.1.ff_out.weight"))
    before = k.ctx.weights.value(name, torch.float64)
    report = RotateDown().apply(k.graph, k.ctx)
    h = hadamard.hadamard(96) / 96**0.5
    assert torch.allclose(k.ctx.weights.value(name, torch.float64), before @ h, atol=1e-14)
    assert report.details[name.removesuffix(".weight")] == {"width": 96, "block": 96}


def test_quantization_finds_its_sites_behind_the_rotation(case: CaseMaker) -> None:
    k = case("llada", backend="reference")
    line = "rotate_down(sites='all'), quantize_weights(bits=8, group_size=None), quantize_activations, pack, lower"
    reports = PassManager(parse_line(line)).run(k.graph, k.ctx)
    assert {report.sites for _, report in reports[1:]} == {14}
    assert not list(linears(k.graph.nodes, k.ctx.weights))[:-1]  # all but the head
    k.forward(k.ids())


def test_a_second_run_leaves_transformed_inputs_alone(case: CaseMaker) -> None:
    k = case("llada")
    RotateDown(sites="all").apply(k.graph, k.ctx)
    assert RotateDown(sites="all").apply(k.graph, k.ctx).sites == 0


def test_declines_a_shared_weight(case: CaseMaker) -> None:
    k = case("shared")
    report = RotateDown().apply(k.graph, k.ctx)
    assert report.sites == 0
    assert report.declined[0].site == "input of layers.0.down"
    assert "it reads 'layers.0.down.weight', too, and would see it changed" in report.declined[0].reason


def test_declines_a_block_that_does_not_divide(case: CaseMaker) -> None:
    k = case("llada")
    report = RotateDown(block=64).apply(k.graph, k.ctx)
    assert [d.reason for d in report.declined] == ["96 features do not divide into Hadamard blocks of 64"] * 2


def test_a_block_that_does_not_exist() -> None:
    with pytest.raises(RecipeError) as caught:
        RotateDown(block=6)
    with pytest.raises(RecipeError, match=r"^rotate_down\.sites: unknown sites 'some'\. Use nonlinear, norm or all$"):
        RotateDown(sites="some")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "rotate_down.block: no Hadamard matrix of order 6 can be built. Use a power of two, or None"
    )


def test_a_planted_error_shows(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("dream")
    before = k.forward(k.ids(), torch.float64)
    monkeypatch.setattr(rotate_down, "keep_online", lambda graph, weights, region, t: None)
    RotateDown().apply(k.graph, k.ctx)
    assert deviation(k.forward(k.ids(), torch.float64), before) == 0  # neither half
    from dlqc.regions import fold

    monkeypatch.setattr(rotate_down, "keep_online", lambda graph, weights, region, t: fold(weights, region, t))
    RotateDown().apply(k.graph, k.ctx)
    assert deviation(k.forward(k.ids(), torch.float64), before) > 1e-3  # half of it
