"""smooth: s is the formula's, the function stays, and edges that cannot take it are left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.blocks import find_blocks
from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import PassReport
from dlqc.errors import FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.graph import aten, call_before, fingerprint, linears, structure
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.smooth import Smooth
from dlqc.stats import Collector

CaseMaker = Callable[..., Any]
BLOCK = "model.transformer.blocks.{}"


def smoothed(k: Any, p: Smooth) -> PassReport:
    """Apply the pass to every block with its statistics; the function must stay."""
    ids, total = k.ids(), PassReport()
    before = k.forward(ids, torch.float64)
    for block in k.ctx.blocks:
        k.ctx.block = block
        collector = Collector(p.statistics(), list(linears(block.nodes(k.graph), k.ctx.weights)))
        run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [block.output(k.graph)])
        run(k.ctx.states.ids, taps=collector.taps(k.ctx.states.weights))
        k.ctx.stats = collector.result()
        total.merge(p.apply(k.graph, k.ctx))
    k.ctx.block = None
    check(k.graph, k.ctx.weights, k.ctx.spec, {"float-weights"}, after="smooth")
    assert deviation(k.forward(ids, torch.float64), before) < 1e-12
    return total


def inputs(k: Any, weight: str) -> torch.Tensor:
    """What the linear reads on the calibration states, [rows, K]."""
    site = next(s for s in linears(k.graph.nodes, k.ctx.weights) if s.weight == weight)
    value = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [site.x])(k.ctx.states.ids)[0]
    return value.reshape(-1, value.shape[-1]).double()


GROUPS = {
    "llada": {"attn_norm": ("q_proj", "k_proj", "v_proj"), "ff_norm": ("ff_proj", "up_proj")},
    "llada grouped bias": {"attn_norm": ("q_proj", "k_proj", "v_proj"), "ff_norm": ("ff_proj", "up_proj")},
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_s_is_the_formula(case: CaseMaker, name: str, alpha: float) -> None:
    k = case(name)
    state = {n: t.double() for n, t in k.model.state_dict().items()}
    peaks = {
        (i, norm): inputs(k, f"{BLOCK.format(i)}.{readers[0]}.weight").abs().amax(0)
        for i in range(2)
        for norm, readers in GROUPS[name].items()
    }
    report = smoothed(k, Smooth(alpha))
    assert report.sites == 4
    assert report.declined == []
    for (i, norm), active in peaks.items():
        names = [f"{BLOCK.format(i)}.{reader}.weight" for reader in GROUPS[name][norm]]
        weight = torch.cat([state[n] for n in names]).abs().amax(0)
        s = active**alpha / weight ** (1 - alpha)
        for n in names:
            torch.testing.assert_close(k.ctx.weights.value(n, torch.float64), state[n] * s, rtol=1e-5, atol=0)
        gain = f"{BLOCK.format(i)}.{norm}.weight"
        torch.testing.assert_close(k.ctx.weights.value(gain, torch.float64), state[gain] / s, rtol=1e-5, atol=0)


def test_alpha_splits_the_range(case: CaseMaker) -> None:
    weight = f"{BLOCK.format(0)}.q_proj.weight"
    group = [f"{BLOCK.format(0)}.{n}.weight" for n in GROUPS["llada"]["attn_norm"]]
    k = case("llada")
    smoothed(k, Smooth(1.0))
    torch.testing.assert_close(inputs(k, weight).abs().amax(0), torch.ones(64).double(), rtol=1e-5, atol=0)
    k = case("llada")
    smoothed(k, Smooth(0.0))
    peak = torch.cat([k.ctx.weights.value(n, torch.float64) for n in group]).abs().amax(0)
    torch.testing.assert_close(peak, torch.ones(64).double(), rtol=1e-5, atol=0)
    k = case("llada")
    smoothed(k, Smooth(0.5))
    peak = torch.cat([k.ctx.weights.value(n, torch.float64) for n in group]).abs().amax(0)
    torch.testing.assert_close(inputs(k, weight).abs().amax(0), peak, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "sites", "more"),
    [("llada", 4, 2), ("llada bf16", 4, 2), ("llada tied", 4, 2), ("llada grouped bias", 4, 2), ("dream", 4, 2)],
)
def test_products_too(case: CaseMaker, name: str, sites: int, more: int) -> None:
    k = case(name)
    nodes = structure(k.graph)
    assert smoothed(k, Smooth()).sites == sites
    assert structure(k.graph) == nodes
    k = case(name)
    report = smoothed(k, Smooth(sites="product"))
    assert (report.sites, report.declined) == (sites + more, [])
    assert structure(k.graph) == nodes


def test_the_product_moves_into_the_projection_that_is_linear(case: CaseMaker) -> None:
    k = case("llada grouped bias")
    state = {n: t.double() for n, t in k.model.state_dict().items()}
    out, up, gate = (f"{BLOCK.format(0)}.{n}" for n in ("ff_out", "up_proj", "ff_proj"))
    active = inputs(k, f"{out}.weight").abs().amax(0)
    smoothed(k, Smooth(0.5, sites="product"))
    s = active.sqrt() / state[f"{out}.weight"].abs().amax(0).sqrt()
    value = k.ctx.weights.value
    torch.testing.assert_close(value(f"{out}.weight", torch.float64), state[f"{out}.weight"] * s, rtol=1e-5, atol=0)
    torch.testing.assert_close(value(f"{up}.bias", torch.float64), state[f"{up}.bias"] / s, rtol=1e-5, atol=0)
    assert torch.equal(value(f"{gate}.bias"), k.model.state_dict()[f"{gate}.bias"])


def test_layer_norms_take_it_in_gain_and_bias(case: CaseMaker) -> None:
    k = case("layer norm")
    assert smoothed(k, Smooth()).sites == 2
    assert len(k.ctx.weights["layers.0.norm.bias"].folds) == 1


def test_rows_of_weight_zero_do_not_count(case: CaseMaker) -> None:
    k, other = case("llada"), case("llada")
    other.ctx.states.weights[:, 5:] = 0
    smoothed(k, Smooth())
    smoothed(other, Smooth())
    weight = f"{BLOCK.format(0)}.q_proj.weight"
    assert not torch.equal(k.ctx.weights.value(weight), other.ctx.weights.value(weight))


def test_a_channel_that_is_never_active_keeps_its_scale(case: CaseMaker) -> None:
    k = case("llada")
    gain = torch.ones(64)
    gain[[3, 4]] = 0
    name = f"{BLOCK.format(0)}.attn_norm.weight"
    k.ctx.weights.put(name, gain)
    assert smoothed(k, Smooth()).sites == 4
    weight = f"{BLOCK.format(0)}.q_proj.weight"
    after, before = k.ctx.weights.value(weight), k.model.state_dict()[weight]
    assert torch.equal(after[:, [3, 4]], before[:, [3, 4]])
    assert not torch.equal(after[:, [5]], before[:, [5]])
    assert bool((k.ctx.weights.value(name)[[3, 4]] == 0).all())


def test_a_weight_column_of_zeros_stays_finite(case: CaseMaker) -> None:
    k = case("llada")
    for reader in GROUPS["llada"]["attn_norm"]:
        weight = k.model.state_dict()[f"{BLOCK.format(0)}.{reader}.weight"].clone()
        weight[:, 9] = 0
        k.ctx.weights.put(f"{BLOCK.format(0)}.{reader}.weight", weight)
    assert smoothed(k, Smooth()).sites == 4
    assert bool(torch.isfinite(k.ctx.weights.value(f"{BLOCK.format(0)}.attn_norm.weight")).all())


# Declines, by line of the docstring


def test_declines_a_reader_that_is_no_linear(case: CaseMaker) -> None:
    k = case("llada")
    norm = k.node("rms_norm")
    extra = call_before(k.graph, k.node("silu"), aten.abs.default, (norm,))
    silu = k.node("silu")
    # The norm without its signs takes part in the result, times zero.
    zero = call_before(k.graph, silu, aten.mul.Tensor, (extra, 0.0))
    block_end = k.ctx.blocks[0].output(k.graph)
    block_end.update_arg(0, call_before(k.graph, block_end, aten.add.Tensor, (block_end.args[0], zero)))
    report = smoothed(k, Smooth())
    assert report.sites == 3
    assert [(d.site, d.reason) for d in report.declined] == [
        (
            f"input of {BLOCK.format(0)}.q_proj",
            f"stuck at %{extra.name} (aten.abs): no rule moves a transform of kind 'diagonal' through it",
        )
    ]


def test_declines_a_weight_that_somebody_else_reads(case: CaseMaker) -> None:
    report = smoothed(case("shared"), Smooth())
    assert report.sites == 0
    assert {(d.site, d.reason) for d in report.declined} == {
        (
            "input of layers.0.up",
            f"stuck at %layer_norm{i} (aten.layer_norm): it reads 'layers.0.norm.weight', too, and would see it changed",
        )
        for i in ("", "_1")
    }


def test_declines_a_producer_without_a_gain(case: CaseMaker) -> None:
    k = case("llada")
    k.node("rms_norm").update_arg(2, None)
    k.graph.eliminate_dead_code()
    k.ctx.weights.drop(f"{BLOCK.format(0)}.attn_norm.weight")
    report = smoothed(k, Smooth())
    assert [(d.site, d.reason) for d in report.declined] == [
        (f"input of {BLOCK.format(0)}.q_proj", "stuck at %rms_norm (aten.rms_norm): it has no gain to fold into")
    ]


def test_declines_a_product_whose_factors_have_other_readers(case: CaseMaker) -> None:
    k = case("llada")
    sites = {s.name: s for s in linears(k.graph.nodes, k.ctx.weights)}
    up, out = sites[f"{BLOCK.format(0)}.up_proj"].node, sites[f"{BLOCK.format(0)}.ff_out"].node
    total = call_before(k.graph, out, aten.sum.dim_IntList, (up, [-1], True))
    block_end = k.ctx.blocks[0].output(k.graph)
    block_end.update_arg(0, call_before(k.graph, block_end, aten.add.Tensor, (block_end.args[0], total)))
    report = smoothed(k, Smooth(sites="product"))
    assert [(d.site, d.reason) for d in report.declined] == [
        (
            f"input of {BLOCK.format(0)}.ff_out",
            f"stuck at %{total.name} (aten.sum.dim_IntList): it cuts the channels apart",
        )
    ]


def test_edges_of_another_kind_are_no_sites(case: CaseMaker) -> None:
    """attn_out reads attention, ff_out a product: neither is asked for, and neither is declined."""
    k = case("llada")
    report = smoothed(k, Smooth())
    assert report.declined == []
    for name in ("attn_out", "ff_out"):
        assert k.ctx.weights[f"{BLOCK.format(0)}.{name}.weight"].folds == ()


# Nothing to do, twice, options, the manager


def test_leaves_a_graph_without_norms_in_front_of_linears_identical(case: CaseMaker) -> None:
    k = case("post norm")
    mark = fingerprint(k.graph, k.ctx.weights)
    for node in list(k.graph.nodes):
        if node.name.startswith("layer_norm"):
            node.replace_all_uses_with(node.args[0])
    k.graph.eliminate_dead_code()
    for name in [n for n in k.ctx.weights if "norm" in n]:
        k.ctx.weights.drop(name)
    assert fingerprint(k.graph, k.ctx.weights) != mark
    k.ctx.blocks = find_blocks(k.graph)
    mark = fingerprint(k.graph, k.ctx.weights)
    report = smoothed(k, Smooth())
    assert (report.sites, report.declined) == (0, [])
    assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(FeasibilityError, match=r"^smooth: no linear reads a norm in this model\. Nothing was changed"):
        PassManager((Calibrate(sequences=2, length=16), Smooth())).run(k.graph, k.ctx)


def test_a_second_time_finds_nothing_left_to_move(case: CaseMaker) -> None:
    k = case("llada")
    smoothed(k, Smooth(0.7))
    weight = f"{BLOCK.format(1)}.up_proj.weight"
    once = k.ctx.weights.value(weight, torch.float64)
    smoothed(k, Smooth(0.7))
    torch.testing.assert_close(k.ctx.weights.value(weight, torch.float64), once, rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(RecipeError, match=rf"^smooth\.alpha: {alpha} is outside \[0, 1\]\. 0\.5 is the usual value$"):
        Smooth(alpha)


def test_the_manager_certifies_it(case: CaseMaker) -> None:
    k = case("llada grouped bias")
    passes = (Calibrate(sequences=4, length=16), Smooth(sites="product"))
    report = PassManager(passes).run(k.graph, k.ctx)[1][1]
    assert report.sites == 6
    assert 0 < report.certificate < 1e-12
    assert "unit-gain" not in k.ctx.facts
