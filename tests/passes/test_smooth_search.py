"""smooth with a searched strength, and through attention: the error is restated, the choice is the best of the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import PassReport, Plan
from dlqc.errors import FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.graph import linears, structure
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.recipe import as_recipe
from dlqc.rounding.rtn import Rtn
from dlqc.scaling import Edge
from dlqc.stats import Collector

CaseMaker = Callable[..., Any]
DREAM = "model.layers.{}."
LLADA = "model.transformer.blocks.{}."
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FORWARD = ("mlp.gate_proj", "mlp.up_proj")
EDGES = [ATTENTION, ("self_attn.o_proj",), FORWARD, ("mlp.down_proj",)]


def applied(k: Any, p: Any) -> PassReport:
    """Apply the pass to every block with its statistics."""
    total = PassReport()
    for block in k.ctx.blocks:
        k.ctx.block = block
        collector = Collector(p.statistics(), list(linears(block.nodes(k.graph), k.ctx.weights)))
        run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [block.output(k.graph)])
        run(k.ctx.states.ids, taps=collector.taps(k.ctx.states.weights))
        k.ctx.stats = collector.result()
        total.merge(p.apply(k.graph, k.ctx))
    k.ctx.block = None
    check(k.graph, k.ctx.weights, k.ctx.spec, {"float-weights"}, after=p.name)
    return total


def inputs(k: Any, name: str) -> torch.Tensor:
    """What a linear reads on the calibration states, [rows, K]; fewer rows than a sample takes, so all are in it."""
    site = next(s for s in linears(k.graph.nodes, k.ctx.weights) if s.name == name)
    value = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [site.x])(k.ctx.states.ids)[0]
    return value.reshape(-1, value.shape[-1]).double()


def shared(x: torch.Tensor) -> torch.Tensor:
    """The largest of two query heads that share a KV head of 16 channels, for each of them: [64] → [64]."""
    return x.reshape(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16).reshape(64)


def restated(k: Any, readers: list[str], alpha: float | None, weight_bits: int, act_bits: int | None) -> float:
    """Σ ‖Q(X/s)·Q(W·s)ᵀ - X·Wᵀ‖² in float64; s = 1 for alpha None."""
    weights = [k.ctx.weights.value(f"{r}.weight", torch.float64) for r in readers]
    x = inputs(k, readers[0])
    active, column = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    if readers[0].endswith("o_proj"):
        active, column = shared(active), shared(column)
    s = torch.ones(x.shape[1]).double() if alpha is None else active**alpha / column ** (1 - alpha)
    total = 0.0
    for w in weights:
        top = 2 ** (weight_bits - 1)
        scale = (2 * (w * s).abs().amax(1, keepdim=True) / (2 * top - 1)).bfloat16().double()
        wq = (w * s / scale).round().clamp(-top, top - 1) * scale
        xq = x / s
        if act_bits is not None:
            step = xq.abs().amax(1, keepdim=True) / (2 ** (act_bits - 1) - 1)
            xq = (xq / step).round() * step
        total += float((xq @ wq.T - x @ w.T).square().sum())
    return total


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 4), (4, None)])
def test_the_error_is_restated_and_the_strength_is_the_best(
    case: CaseMaker, weight_bits: int, act_bits: int | None
) -> None:
    k, fresh = case("dream"), case("dream")
    report = applied(k, Smooth("search", "all", points=6, weight_bits=weight_bits, act_bits=act_bits))
    assert len(report.details) == 8
    for i in range(2):
        for edge in EDGES:
            readers = [DREAM.format(i) + r for r in edge]
            found = report.details[readers[0]]
            plain = restated(fresh, readers, None, weight_bits, act_bits)
            errors = [restated(fresh, readers, j / 5, weight_bits, act_bits) for j in range(6)]
            assert found["error_before"] == pytest.approx(plain, rel=0.02)
            assert found["error_after"] == pytest.approx(min(plain, *errors), rel=0.02)
            assert found["error_after"] <= found["error_before"]
            if "alpha" in found:
                assert errors[round(found["alpha"] * 5)] <= min(errors) * 1.02


def test_a_wrong_order_of_heads_would_show(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: s laid out head after head in place of group after group."""
    monkeypatch.setattr(Edge, "wide", lambda self, s, repeat: s.repeat(repeat))
    k, fresh = case("dream"), case("dream")
    report = applied(k, Smooth("search", "all", points=6, weight_bits=4, act_bits=4))
    wrong = []
    for i in range(2):
        o = f"{DREAM.format(i)}self_attn.o_proj"
        best = min(restated(fresh, [o], alpha, 4, 4) for alpha in (None, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
        wrong.append(abs(report.details[o]["error_after"] / best - 1) > 0.02)
    assert any(wrong)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_values_take_the_formula_by_kv_head(case: CaseMaker, alpha: float) -> None:
    k, fresh = case("llada grouped bias"), case("llada grouped bias")
    state = {n: t.double() for n, t in fresh.model.state_dict().items()}
    v, o = f"{LLADA.format(0)}v_proj", f"{LLADA.format(0)}attn_out"
    active = inputs(fresh, o).abs().amax(0)
    report = applied(k, Smooth(alpha, "value"))
    assert report.sites == 6
    s = shared(active) ** alpha / shared(state[f"{o}.weight"].abs().amax(0)) ** (1 - alpha)
    value = k.ctx.weights.value
    torch.testing.assert_close(value(f"{o}.weight", torch.float64), state[f"{o}.weight"] * s, rtol=1e-5, atol=0)
    narrow = torch.cat((s[:16], s[32:48]))
    torch.testing.assert_close(value(f"{v}.bias", torch.float64), state[f"{v}.bias"] / narrow, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada tied", "llada grouped bias", "dream", "layer norm"])
def test_the_function_stays(case: CaseMaker, name: str) -> None:
    k = case(name)
    ids, nodes = k.ids(), structure(k.graph)
    exact, single = k.forward(ids, torch.float64), k.forward(ids, torch.float32)
    report = applied(k, Smooth("search", "all", points=5, weight_bits=4, act_bits=4))
    assert report.sites > 0
    assert report.sites == sum("alpha" in d for d in report.details.values())
    assert deviation(k.forward(ids, torch.float64), exact) < 1e-9
    if "bf16" not in name:
        assert deviation(k.forward(ids, torch.float32), single) < 1e-4
    assert structure(k.graph) == nodes


def test_planted_outliers_are_smoothed(case: CaseMaker) -> None:
    """Two channels 64 times as large take the whole range of every token, until their range moves into the weights."""
    k = case("llada")
    gain, readers = f"{LLADA.format(0)}attn_norm.weight", [f"{LLADA.format(0)}{n}_proj" for n in "qkv"]
    g = k.ctx.weights.value(gain).clone()
    g[[5, 17]] *= 64
    k.ctx.weights.put(gain, g)
    for reader in readers:
        w = k.ctx.weights.value(f"{reader}.weight").clone()
        w[:, [5, 17]] /= 64
        k.ctx.weights.put(f"{reader}.weight", w)
    report = applied(k, Smooth("search"))
    found = report.details[readers[0]]
    assert found["error_after"] < found["error_before"] / 100
    assert 0 < found["alpha"] < 1


def test_an_edge_that_no_strength_improves_is_left_alone(case: CaseMaker) -> None:
    k = case("llada")
    for n in "qkv":
        name = f"{LLADA.format(0)}{n}_proj.weight"
        signs = torch.where(k.ctx.weights.value(name) > 0, 127.5, -127.5)  # ± the largest code and a half: a scale of 1
        k.ctx.weights.put(name, signs.clamp(-127, 127))
    report = applied(k, Smooth("search", points=2, act_bits=None))
    declined = {d.site: d.reason for d in report.declined}
    left = [name for name, d in report.details.items() if "alpha" not in d]
    assert left
    assert declined == {f"input of {name}": "none of 2 strengths lowers the error" for name in left}
    for name in left:
        assert k.ctx.weights[f"{name}.weight"].folds == ()


def test_through_the_manager_down_to_integers(case: CaseMaker) -> None:
    k = case("dream")
    passes = (
        Calibrate(sequences=4, length=16),
        Smooth("search", "all", points=5),
        QuantizeWeights(8, None, True, Rtn()),
        QuantizeActivations(),
    )
    reports = PassManager(passes).run(k.graph, k.ctx)
    smooth = reports[1][1]
    assert smooth.sites > 0
    assert smooth.certificate is not None
    assert 0 < smooth.certificate < 1e-9
    assert reports[2][1].sites == 14


def test_a_fixed_strength_takes_no_sample() -> None:
    assert Smooth().statistics() == {"absmax"}
    assert Smooth("search").statistics() == {"absmax", "sample"}


def test_sites_of_values_alone_count_in_the_plan(case: CaseMaker) -> None:
    k = case("llada")
    plan = Plan()
    Smooth(sites="all").plan(k.graph, k.ctx, plan)
    assert plan.problems == []
    for node in [n for n in k.graph.nodes if "rms_norm" in n.name]:
        node.replace_all_uses_with(node.args[0])
    k.graph.eliminate_dead_code()
    with pytest.raises(FeasibilityError, match=r"^smooth: no linear reads a norm in this model\."):
        PassManager((Calibrate(), Smooth())).check_feasibility(k.graph, k.ctx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"alpha": "find"},
            r"""^smooth\.alpha: 'find' is no migration strength\. Give a number in \[0, 1\], or "search"$""",
        ),
        ({"sites": "head"}, r"^smooth\.sites: unknown sites 'head'\. Use norm, product, value, all$"),
        ({"points": 1}, r"^smooth\.points: a grid of 1 has no two ends\. 21 are steps of 0\.05$"),
        ({"weight_bits": 5}, r"^bits: 5 is not a width of an integer weight\."),
        ({"act_bits": 16}, r"^bits: 16 is not a width of an integer activation\."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Smooth(**options)


def test_it_is_written_on_one_line() -> None:
    line = "smooth(alpha='search', sites='all', act_bits=None)"
    recipe = as_recipe(line)
    assert recipe.passes == (Smooth("search", "all", act_bits=None),)
    assert str(recipe) == line
