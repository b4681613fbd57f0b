"""awq_scale: the error it reports is the one rounding will make, its choice is the best of the grid, the function stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.calibration import MaskedSimulation
from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import PassReport
from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.graph import linears, structure
from dlqc.manager import PassManager
from dlqc.passes.awq_scale import AwqScale
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.recipe import as_recipe
from dlqc.rounding.rtn import Rtn
from dlqc.scaling import Edge
from dlqc.stats import Collector

CaseMaker = Callable[..., Any]
LLADA = "model.transformer.blocks.{}."
DREAM = "model.layers.{}."
EDGES = {
    "llada": [
        ("q_proj", "k_proj", "v_proj"),
        ("attn_out",),
        ("ff_proj", "up_proj"),
        ("ff_out",),
    ],
    "dream": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ],
}
EDGES["llada grouped bias"] = EDGES["llada"]
KV_HEADS = {"llada grouped bias": 2, "dream": 2}


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
    """What a linear reads on the calibration states, [rows, K]."""
    site = next(s for s in linears(k.graph.nodes, k.ctx.weights) if s.name == name)
    value = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [site.x])(k.ctx.states.ids)[0]
    return value.reshape(-1, value.shape[-1]).double()


def rounded(w: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """Round to nearest, spelled out in float64 on scales in bfloat16."""
    top, part = 2**bits - 1, w.reshape(w.shape[0], -1, group)
    lo, hi = part.amin(-1, keepdim=True).clamp(max=0), part.amax(-1, keepdim=True).clamp(min=0)
    span = 2 * torch.maximum(-lo, hi) if symmetric else hi - lo
    scale = (span / top).bfloat16().double()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-lo / scale).round()
    codes = ((part / scale).round() + zero).clamp(0, top)
    return ((codes - zero) * scale).reshape(w.shape)


def restated(k: Any, name: str, readers: tuple[str, ...], exponent: float, p: AwqScale) -> float:
    """Σ ‖√c·X·(Q(W·s)/s - W)ᵀ‖² over the readers of an edge, at an exponent, from the model and its inputs alone."""
    c = k.ctx.states.weights.reshape(-1, 1).double()
    total = 0.0
    for reader in readers:
        x = inputs(k, reader)
        m = (c * x.abs()).sum(0) / c.sum()
        if name in KV_HEADS and reader.endswith(("attn_out", "o_proj")):
            heads = KV_HEADS[name]
            m = m.reshape(heads, -1, 16).mean(1, keepdim=True).expand(heads, 4 // heads, 16).reshape(-1)
        s = m**exponent / (m.max() ** exponent * m.min() ** exponent) ** 0.5
        w = k.ctx.weights.value(f"{reader}.weight", torch.float64)
        noise = rounded(w * s, p.bits, p.group_size or w.shape[1], p.symmetric) / s - w
        total += float((c * (x @ noise.T) ** 2).sum())
    return total


def edges_of(name: str) -> list[tuple[str, ...]]:
    prefix = DREAM if name == "dream" else LLADA
    return [tuple(prefix.format(i) + r for r in readers) for i in range(2) for readers in EDGES[name]]


@pytest.mark.parametrize(("name", "symmetric"), [("llada", False), ("dream", False), ("llada grouped bias", True)])
def test_the_error_is_restated_and_the_exponent_is_the_best(case: CaseMaker, name: str, symmetric: bool) -> None:
    p = AwqScale(bits=3, group_size=32, symmetric=symmetric, points=6)
    k, fresh = case(name), case(name)
    report = applied(k, p)
    assert len(report.details) == 8
    for readers in edges_of(name):
        found = report.details[readers[0]]
        errors = [restated(fresh, name, readers, i / 6, p) for i in range(6)]
        assert found["error_before"] == pytest.approx(errors[0], rel=1e-3)
        assert found["error_after"] == pytest.approx(errors[round(found["exponent"] * 6)], rel=1e-3)
        assert found["error_after"] <= min(errors) * 1.001
        assert found["ratio"] == pytest.approx(found["error_after"] / found["error_before"])


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("sites", [("norm",), ("value", "product")])
def test_what_was_searched_is_what_rounding_will_find(case: CaseMaker, name: str, sites: tuple[Any, ...]) -> None:
    """Not for all sites at once: the rows of v take part in two edges, and the second scales the errors of the first."""
    k = case(name)
    p = AwqScale(bits=3, group_size=32, sites=sites)
    report = applied(k, p)
    assert len(report.details) == 4
    assert any(d["exponent"] > 0 for d in report.details.values())
    for readers in edges_of(name):
        if readers[0] in report.details:
            now = restated(k, name, readers, 0.0, p)  # on the scaled weights and the scaled inputs
            assert now == pytest.approx(report.details[readers[0]]["error_after"], rel=1e-3)


def test_a_wrong_order_of_heads_would_show(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: s laid out head after head in place of group after group."""
    monkeypatch.setattr(Edge, "wide", lambda self, s, repeat: s.repeat(repeat))
    p = AwqScale(bits=3, group_size=32, points=6)
    k, fresh = case("dream"), case("dream")
    report = applied(k, p)
    wrong = []
    for readers in edges_of("dream"):
        found = report.details[readers[0]]
        true = restated(fresh, "dream", readers, found["exponent"], p)
        wrong.append(abs(found["error_after"] / true - 1) > 1e-3)
    assert any(wrong)


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada tied", "llada grouped bias", "dream", "layer norm"])
def test_the_function_stays(case: CaseMaker, name: str) -> None:
    k = case(name)
    ids, nodes = k.ids(), structure(k.graph)
    exact, single = k.forward(ids, torch.float64), k.forward(ids, torch.float32)
    report = applied(k, AwqScale(bits=3, group_size=32))
    assert report.sites > 0
    assert deviation(k.forward(ids, torch.float64), exact) < 1e-9
    if "bf16" not in name:
        assert deviation(k.forward(ids, torch.float32), single) < 1e-4
    assert structure(k.graph) == nodes
    assert all(d["ratio"] <= 1 for d in report.details.values())
    assert sum(d["exponent"] > 0 for d in report.details.values()) == report.sites


def test_planted_outliers_are_scaled_away(case: CaseMaker) -> None:
    """A channel 64 times as large as the others, whose weights are as much smaller: rounding loses them, scaling finds them."""
    k = case("llada")
    gain, readers = f"{LLADA.format(0)}attn_norm.weight", [LLADA.format(0) + r for r in EDGES["llada"][0]]
    channels = torch.tensor([5, 17])
    g = k.ctx.weights.value(gain).clone()
    g[channels] *= 64
    k.ctx.weights.put(gain, g)
    for reader in readers:
        w = k.ctx.weights.value(f"{reader}.weight").clone()
        w[:, channels] /= 64
        k.ctx.weights.put(f"{reader}.weight", w)
    report = applied(k, AwqScale(group_size=32))
    assert report.details[readers[0]]["exponent"] > 0.4
    assert report.details[readers[0]]["ratio"] < 0.3
    peak = k.ctx.weights.value(f"{readers[0]}.weight").abs().amax(0)
    assert float(peak[channels].min()) > 0.2 * float(peak.median())


def test_relative_errors_are_restated(case: CaseMaker) -> None:
    """Each output's error over its energy: rows of v times 32 decide nothing then, and everything without."""
    plain, large = case("llada"), case("llada")
    name = f"{LLADA.format(0)}v_proj.weight"
    w = large.ctx.weights.value(name).clone()
    w[:3] *= 32
    large.ctx.weights.put(name, w)
    options: dict[str, Any] = {"bits": 3, "group_size": 32, "sites": ("norm",)}
    readers = [LLADA.format(0) + r for r in EDGES["llada"][0]]
    c, x = plain.ctx.states.weights.reshape(-1, 1).double(), inputs(plain, readers[0])
    expected = 0.0
    for reader in readers:
        exact = plain.ctx.weights.value(f"{reader}.weight", torch.float64)
        noise = rounded(exact, 3, 32, False) - exact
        expected += float(((c * (x @ noise.T) ** 2).sum(0) / (c * (x @ exact.T) ** 2).sum(0)).sum())
    found = [applied(k, AwqScale(**options, relative=True)).details[readers[0]] for k in (plain, large)]
    assert found[0]["error_before"] == pytest.approx(expected, rel=1e-3)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    absolute = [applied(k, AwqScale(**options)).details[readers[0]] for k in (case("llada"), large)]
    assert absolute[1]["error_before"] > 10 * absolute[0]["error_before"]


def test_rows_choose_and_all_rows_decide(case: CaseMaker) -> None:
    full, part = case("llada"), case("llada")
    p = AwqScale(bits=3, group_size=32)
    whole = applied(full, p)
    some = applied(part, AwqScale(bits=3, group_size=32, rows=16))
    for name, found in some.details.items():
        assert found["ratio"] <= 1
        assert found["error_before"] == pytest.approx(whole.details[name]["error_before"], rel=1e-4)
        assert found["error_after"] >= whole.details[name]["error_after"] * 0.999
    assert applied(case("llada"), AwqScale(bits=3, group_size=32, rows=4096)).details == whole.details


def test_a_channel_that_is_never_active_keeps_its_scale(case: CaseMaker) -> None:
    k = case("llada")
    gain = torch.ones(64)
    gain[[3, 4]] = 0
    name = f"{LLADA.format(0)}attn_norm.weight"
    k.ctx.weights.put(name, gain)
    report = applied(k, AwqScale(bits=3, group_size=32, sites=("norm",)))
    assert report.details[f"{LLADA.format(0)}q_proj"]["exponent"] >= 0
    weight = f"{LLADA.format(0)}q_proj.weight"
    after, before = k.ctx.weights.value(weight), k.model.state_dict()[weight]
    assert torch.equal(after[:, [3, 4]], before[:, [3, 4]])


def test_token_weights_count(case: CaseMaker) -> None:
    k, other = case("llada"), case("llada")
    other.ctx.states.weights[:, 3:] = 0
    a, b = applied(k, AwqScale(group_size=32)), applied(other, AwqScale(group_size=32))
    assert {n: d["error_before"] for n, d in a.details.items()} != {n: d["error_before"] for n, d in b.details.items()}


# Declines and edges of other kinds


def test_declines_what_does_not_close_or_divide(case: CaseMaker) -> None:
    report = applied(case("layer norm"), AwqScale(group_size=32))
    gelu = "stuck at %gelu{} (aten.gelu): a nonlinear function of each channel moves only permutations"
    assert [(d.site, d.reason) for d in report.declined] == [
        ("input of layers.0.down", gelu.format("")),
        ("input of layers.1.down", gelu.format("_1")),
    ]
    report = applied(case("llada"), AwqScale(group_size=64))
    down = [(d.site, d.reason) for d in report.declined if d.site.endswith("ff_out")]
    reason = "96 input features do not divide by group 64"
    assert down == [(f"input of {LLADA.format(i)}ff_out", reason) for i in range(2)]


def test_declines_the_norm_of_a_residual_stream(case: CaseMaker) -> None:
    report = applied(case("post norm"), AwqScale(group_size=32, sites=("norm",)))
    assert (report.sites, [d.site for d in report.declined]) == (0, ["input of layers.1.up"])
    reason = "stuck at %layer_norm_1 (aten.layer_norm): it divides by the size of all channels together"
    assert report.declined[0].reason == reason


def test_declines_an_edge_that_no_scale_improves(case: CaseMaker) -> None:
    k = case("llada")
    report = applied(k, AwqScale(bits=8, group_size=32, points=2, sites=("norm",)))
    untouched = [name for name, d in report.details.items() if d["exponent"] == 0]
    assert untouched
    assert [(d.site, d.reason) for d in report.declined] == [
        (f"input of {name}", "no scale lowers the error") for name in untouched
    ]
    assert all(k.ctx.weights[f"{name}.weight"].folds == () for name in untouched)


def test_sites_are_chosen(case: CaseMaker) -> None:
    names = {
        kind: set(applied(case("dream"), AwqScale(group_size=32, sites=(kind,), points=2)).details)
        for kind in ("norm", "value", "product", "other")
    }
    block = [DREAM.format(i) for i in range(2)]
    assert names["norm"] == {b + n for b in block for n in ("self_attn.q_proj", "mlp.gate_proj")}
    assert names["value"] == {b + "self_attn.o_proj" for b in block}
    assert names["product"] == {b + "mlp.down_proj" for b in block}
    assert names["other"] == set()


# The manager, the order, options


def test_composition(case: CaseMaker) -> None:
    k = case("dream")
    passes = (
        Calibrate(sequences=4, length=16),
        Smooth(sites="all"),
        AwqScale(bits=4, group_size=32),
        QuantizeWeights(bits=4, group_size=32, method=Rtn()),
    )
    _, smooth, awq, quantized = (report for _, report in PassManager(passes).run(k.graph, k.ctx))
    assert (smooth.sites, quantized.sites) == (8, 14)
    assert awq.sites > 0
    assert awq.certificate is not None
    assert 0 < awq.certificate < 1e-9
    assert {"quantized-weights"} <= k.ctx.facts
    assert "unit-gain" not in k.ctx.facts


def test_order(case: CaseMaker) -> None:
    quantize = QuantizeWeights(group_size=32, method=Rtn())
    with pytest.raises(
        ContractError,
        match=r"pass 'awq_scale' needs 'float-weights', which does not hold here\. "
        r"Move 'awq_scale' before 'quantize_weights', which ends it$",
    ):
        PassManager((Calibrate(), quantize, AwqScale())).check_order()
    with pytest.raises(
        ContractError, match=r"pass 'awq_scale' needs 'states', .*Move 'calibrate', which gives it, before"
    ):
        PassManager((AwqScale(), Calibrate(sampler=MaskedSimulation()))).check_order()


def test_a_group_that_divides_nothing_is_refused_before_work(case: CaseMaker) -> None:
    k = case("llada")
    with pytest.raises(
        FeasibilityError,
        match=r"^awq_scale: 64 input features do not divide by group 40; 96 input features do not divide by group 40",
    ):
        PassManager((Calibrate(), AwqScale(group_size=40))).run(k.graph, k.ctx)
    with pytest.raises(FeasibilityError, match=r"^awq_scale: no linear reads an edge of these kinds\."):
        PassManager((Calibrate(), AwqScale(sites=()))).run(k.graph, k.ctx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: 5 is not a width of an integer weight\. Use 2, 3, 4 or 8$"),
        ({"group_size": 0}, r"^group_size: a group of 0 input features is impossible\."),
        ({"points": 1}, r"^awq_scale\.points: a grid of 1 leaves nothing to choose\. 20 is the usual number$"),
        ({"rows": 0}, r"^awq_scale\.rows: 0 rows have no error\. Use 512, or None$"),
        (
            {"sites": ("norm", "head")},
            r"^awq_scale\.sites: no edge is of kind 'head'\. Use norm, product, value, other$",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AwqScale(**options)


def test_it_is_written_on_one_line() -> None:
    p = AwqScale(bits=3, group_size=None, sites=("norm", "value"))
    line = "awq_scale(bits=3, group_size=None, sites=('norm', 'value'))"
    recipe = as_recipe(line)
    assert recipe.passes == (p,)
    assert str(recipe) == line
