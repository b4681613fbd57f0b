"""fold_norm_scale: gains move into the linears, exactly, or stay with a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import Declined
from dlqc.graph import fingerprint, structure
from dlqc.passes import fold_norm_scale
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.transform import Diagonal

CaseMaker = Callable[..., Any]
BLOCK = "model.transformer.blocks.{}"


def folded(k: Any) -> Any:
    """Apply the pass and check law, fact and function."""
    ids = k.ids()
    before = k.forward(ids, torch.float64)
    report = k.apply(FoldNormScale())
    check(k.graph, k.ctx.weights, k.ctx.spec, {"unit-gain"}, after="fold_norm_scale")
    assert deviation(k.forward(ids, torch.float64), before) < 1e-12
    return report


@pytest.mark.parametrize(
    ("name", "sites", "declined"),
    [
        ("llada", 5, 0),
        ("llada bf16", 5, 0),
        ("llada tied", 4, 1),
        ("llada grouped bias", 5, 0),
        ("dream", 5, 0),
        ("layer norm", 2, 0),
        ("post norm", 1, 1),
        ("shared", 0, 3),
    ],
)
def test_rewrites_every_gain_that_can_move(case: CaseMaker, name: str, sites: int, declined: int) -> None:
    k = case(name)
    nodes = structure(k.graph)
    report = folded(k)
    assert (report.sites, len(report.declined)) == (sites, declined)
    assert structure(k.graph) == nodes  # only constants change
    ones = [n for n, c in k.ctx.weights.items() if "norm" in n or "ln_f" in n if n.endswith("weight")]
    assert sum(bool((k.ctx.weights.value(n) == 1).all()) for n in ones) == sites


def test_the_weights_are_those_of_the_formula(case: CaseMaker) -> None:
    k = case("llada")
    state = k.model.state_dict()
    k.apply(FoldNormScale())
    gain = state[f"{BLOCK.format(1)}.ff_norm.weight"].double()
    for name in ("ff_proj", "up_proj"):
        key = f"{BLOCK.format(1)}.{name}.weight"
        assert torch.equal(k.ctx.weights.value(key, torch.float64), state[key].double() * gain)
    untouched = f"{BLOCK.format(1)}.ff_out.weight"
    assert torch.equal(k.ctx.weights.value(untouched), state[untouched])


def test_the_bias_of_a_layer_norm_is_divided(case: CaseMaker) -> None:
    k = case("layer norm")
    state = k.model.state_dict()
    k.apply(FoldNormScale())
    expected = state["layers.0.norm.bias"].double() / state["layers.0.norm.weight"].double()
    torch.testing.assert_close(k.ctx.weights.value("layers.0.norm.bias", torch.float64), expected, rtol=1e-15, atol=0)


def test_a_gain_with_a_zero_folds_in_an_rms_norm(case: CaseMaker) -> None:
    k = case("llada")
    gain = torch.randn(64)
    gain[[0, 7]] = 0
    k.ctx.weights.put(f"{BLOCK.format(0)}.attn_norm.weight", gain)
    assert folded(k).sites == 5
    folded_weight = k.ctx.weights.value(f"{BLOCK.format(0)}.q_proj.weight")
    assert bool((folded_weight[:, [0, 7]] == 0).all())


# Declines, by line of the docstring


def test_declines_a_reader_that_is_no_linear(case: CaseMaker) -> None:
    report = folded(case("post norm"))
    assert report.declined == [
        Declined(
            "layers.0.norm.weight",
            "stuck at %layer_norm_1 (aten.layer_norm): it divides by the size of all channels together",
        )
    ]


def test_declines_a_weight_that_the_embedding_reads(case: CaseMaker) -> None:
    report = folded(case("llada tied"))
    name = "model.transformer.wte.weight"
    reason = f"stuck at %embedding (aten.embedding): it reads {name!r}, too, and would see it changed; set untie=True"
    assert report.declined == [Declined("model.transformer.ln_f.weight", reason)]


def test_declines_a_declared_tie(case: CaseMaker) -> None:
    k = case("layer norm")
    old = k.ctx.weights["layers.1.up.weight"]
    k.ctx.weights.define("layers.1.up.weight", dataclasses.replace(old, aliases=("layers.1.up.weight", "other.weight")))
    report = folded(k)
    assert report.declined == [
        Declined(
            "layers.1.norm.weight",
            "stuck at %layer_norm_1 (aten.layer_norm): 'layers.1.up.weight' is tied to 'other.weight'",
        )
    ]
    assert report.sites == 1


def test_declines_a_shared_gain(case: CaseMaker) -> None:
    k = case("shared")
    mark = fingerprint(k.graph, k.ctx.weights)
    report = folded(k)
    assert report.declined == [Declined("layers.0.norm.weight", "the gain is shared by several norms")] * 3
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_declines_a_shared_bias(case: CaseMaker) -> None:
    k = case("layer norm")
    first, second = k.node("layer_norm"), k.node("layer_norm_1")
    second.update_arg(3, first.args[3])
    k.graph.eliminate_dead_code()
    k.ctx.weights.drop("layers.1.norm.bias")
    report = folded(k)
    assert report.declined == [
        Declined(f"layers.{i}.norm.weight", "the bias is shared by several norms") for i in range(2)
    ]
    assert report.sites == 0


def test_declines_a_zero_in_the_gain_of_a_layer_norm_with_bias(case: CaseMaker) -> None:
    k = case("layer norm")
    gain = torch.randn(32)
    gain[5] = 0
    k.ctx.weights.put("layers.0.norm.weight", gain)
    report = folded(k)
    reason = "the gain has a zero, so the bias cannot be divided by it"
    assert report.declined == [Declined("layers.0.norm.weight", reason)]
    assert report.sites == 1


# Nothing to do, twice, planted error


def test_leaves_unit_gains_identical(case: CaseMaker) -> None:
    k = case("dream")
    for name in [n for n in k.ctx.weights if "norm" in n]:
        k.ctx.weights.put(name, torch.ones(64))
    mark = fingerprint(k.graph, k.ctx.weights)
    report = k.apply(FoldNormScale())
    assert (report.sites, report.declined) == (0, [])
    assert fingerprint(k.graph, k.ctx.weights) == mark


@pytest.mark.parametrize("name", ["llada", "layer norm", "post norm"])
def test_twice_is_once(case: CaseMaker, name: str) -> None:
    k = case(name)
    first = k.apply(FoldNormScale())
    mark = fingerprint(k.graph, k.ctx.weights)
    second = k.apply(FoldNormScale())
    assert fingerprint(k.graph, k.ctx.weights) == mark
    assert second.sites == 0
    assert second.declined == first.declined


def test_a_planted_error_is_seen(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_norm_scale, "Ones", lambda: fold_norm_scale.OnColumns(Diagonal(torch.ones(1))))
    k = case("llada")
    before = k.forward(k.ids(), torch.float64)
    k.apply(FoldNormScale())
    assert deviation(k.forward(k.ids(), torch.float64), before) > 1e-2
