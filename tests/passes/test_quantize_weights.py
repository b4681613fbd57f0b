"""quantize_weights: codes are the method's, sites are the blocks' linears, the rest stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from zoo import captured

from dlqc.backend import load_backend
from dlqc.blocks import find_blocks
from dlqc.check import check
from dlqc.contract import Context, Declined
from dlqc.errors import CalibrationError, ContractError, FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.planes import PlanesFormat
from dlqc.graph import LINEAR, RMS_NORM, fingerprint, is_call, linears
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_CODED, LINEAR_Q, QUANTIZE_ACT
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.daq import Daq
from dlqc.rounding.gptaq import Gptaq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.signround import SignRound
from dlqc.schemes import Override

CaseMaker = Callable[..., Any]
CALIBRATE = Calibrate(sequences=6, length=16)


def dequantized(k: Any, name: str, fmt: IntFormat) -> torch.Tensor:
    parts = [k.ctx.weights.value(f"{name}.{role}") for role in ("codes", "scales")]
    zeros = None if fmt.symmetric else k.ctx.weights.value(f"{name}.zeros")
    return QuantizedWeight(*parts, zeros, fmt).dequantize()


def quantize(k: Any, *passes: Any) -> Any:
    """Run the passes; gives the report of the last."""
    return PassManager(passes).run(k.graph, k.ctx)[-1][1]


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada grouped bias", "dream", "layer norm"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_is_the_format_applied_to_every_weight(case: CaseMaker, name: str, symmetric: bool) -> None:
    k = case(name)
    state = k.model.state_dict()
    fmt = IntFormat(4, 32, symmetric)
    inside = [s.name for b in k.ctx.blocks for s in linears(b.nodes(k.graph), k.ctx.weights)]
    everything = [n for n, m in k.model.named_modules() if isinstance(m, nn.Linear)]
    report = quantize(k, QuantizeWeights(4, 32, symmetric, Rtn()))
    assert report.sites == len(inside)
    assert sorted(report.details) == sorted(inside)
    for site in inside:
        expected = fmt.quantize(state[f"{site}.weight"])
        assert torch.equal(k.ctx.weights.value(f"{site}.codes"), expected.codes)
        assert torch.equal(k.ctx.weights.value(f"{site}.scales"), expected.scales)
        assert (f"{site}.zeros" in k.ctx.weights) == (not symmetric)
        assert f"{site}.weight" not in k.ctx.weights
        n, features = state[f"{site}.weight"].shape
        exact = state[f"{site}.weight"].double()
        noise = (exact - expected.dequantize()).square().sum()
        assert report.details[site] == {
            "bits_per_weight": fmt.bits_per_weight(n, features),
            "weight_sqnr_db": pytest.approx(10 * math.log10(exact.square().sum() / noise)),
        }
    left = [s.name for s in linears(k.graph.nodes, k.ctx.weights)]
    assert left == [n for n in everything if n not in inside]
    assert len(left) == 1  # the head


@pytest.mark.parametrize("name", ["llada", "dream", "layer norm", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_graph_computes_with_the_dequantized_weights(case: CaseMaker, name: str, dtype: torch.dtype) -> None:
    """Equal to the captured graph with dequantized weights in place of the originals."""
    k, plain = case(name), case(name)
    fmt = IntFormat(3, 32, False)
    report = quantize(k, QuantizeWeights(3, 32, False, Rtn()))
    for site in report.details:
        plain.ctx.weights.put(f"{site}.weight", dequantized(k, site, fmt))
    found, expected = k.forward(k.ids(), dtype), plain.forward(k.ids(), dtype)
    # The same products in the same order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype is torch.float64 else 1e-4)
    assert not torch.allclose(expected, case(name).forward(k.ids(), dtype), atol=1e-2)


def test_folds_come_in_before_rounding(case: CaseMaker) -> None:
    k = case("llada")
    quantize(k, FoldNormScale(), QuantizeWeights(4, 32, method=Rtn()))
    state, name = k.model.state_dict(), "model.transformer.blocks.1.up_proj"
    exact = state[f"{name}.weight"].double() * state["model.transformer.blocks.1.ff_norm.weight"].double()
    assert torch.equal(k.ctx.weights.value(f"{name}.codes"), IntFormat(4, 32, False).quantize(exact).codes)


def test_gptq_is_better_than_rtn_in_its_own_loss(case: CaseMaker) -> None:
    k = case("llada")
    report = quantize(k, CALIBRATE, QuantizeWeights(3, 32))
    assert len(report.details) == 14
    for name, numbers in report.details.items():
        assert numbers["loss"] < numbers["loss_rtn"], name
        assert 0 < numbers["sqnr_db"] < 60
    # The same loss, written out for a linear of the first block, whose inputs no rounding has changed.
    name = "model.transformer.blocks.0.v_proj"
    clean = case("llada")
    site = next(s for s in linears(clean.graph.nodes, clean.ctx.weights) if s.name == name)
    run = Executor(clean.graph, clean.ctx.weights, [placeholder(clean.graph)], [site.x])
    x = run(k.ctx.states.ids)[0].reshape(-1, 64).double()
    weight, fmt = clean.model.state_dict()[f"{name}.weight"].double(), IntFormat(3, 32, False)
    loss = (x @ (weight - dequantized(k, name, fmt).double()).T).square().sum()
    rtn = (x @ (weight - fmt.quantize(weight).dequantize().double()).T).square().sum()
    assert report.details[name]["loss"] == pytest.approx(float(loss), rel=1e-3)
    assert loss < 0.8 * rtn


def test_gptq_is_better_than_rtn_at_the_logits(case: CaseMaker) -> None:
    clean = case("llada")
    expected = clean.forward(clean.ctx.rows.ids).softmax(-1)
    errors = []
    for method in (Gptq(), Rtn()):
        k = case("llada")
        quantize(k, Calibrate(sequences=64, length=16), QuantizeWeights(3, 32, method=method))
        errors.append(float((k.forward(k.ctx.rows.ids).softmax(-1) - expected).abs().mean()))
    assert errors[0] < errors[1]


# Schemes by site


def test_overrides_give_sites_their_own_format_and_method(case: CaseMaker) -> None:
    k = case("llada")
    p = QuantizeWeights(
        4,
        32,
        method=Gptq(),
        overrides=(
            Override(bits=2, sites=("*.blocks.0.*",)),
            Override(symmetric=True, group_size=0, method=Rtn(), sites=("*.ff_out",)),
            Override(format=PlanesFormat(2, 32), method=Daq(), sites=("*.1.up_proj",)),
        ),
    )
    plan = PassManager((CALIBRATE, p)).plan(k.graph, k.ctx)
    expected = {
        "0.q_proj": IntFormat(2, 32, False),
        "0.ff_out": IntFormat(4, None, True),
        "1.q_proj": IntFormat(4, 32, False),
        "1.ff_out": IntFormat(4, None, True),
        "1.up_proj": PlanesFormat(2, 32),
    }
    short = {name.removeprefix("model.transformer.blocks."): spec.weight for name, spec in plan.sites.items()}
    assert {name: short[name] for name in expected} == expected
    report = quantize(k, CALIBRATE, p)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights", "float-activations"}, after="quantize_weights")
    found = {}
    for node in k.graph.nodes:
        if is_call(node, LINEAR_Q):
            fmt = IntFormat(node.args[5], node.args[6] or None, node.args[3] is None)
            found[str(node.args[1].target).removesuffix(".codes").removeprefix("model.transformer.blocks.")] = fmt
    assert found == {name: fmt for name, fmt in short.items() if isinstance(fmt, IntFormat)}
    assert sum(is_call(node, LINEAR_CODED) for node in k.graph.nodes) == 1
    by_rtn = {
        name for name, numbers in report.details.items() if "loss_rtn" not in numbers and "objective" not in numbers
    }
    assert {n for n in by_rtn if n.endswith("ff_out")} == {f"model.transformer.blocks.{i}.ff_out" for i in range(2)}
    name = "model.transformer.blocks.0.ff_out"
    exact = IntFormat(4, None, True).quantize(k.model.state_dict()[f"{name}.weight"])
    assert torch.equal(k.ctx.weights.value(f"{name}.codes"), exact.codes)


def test_statistics_and_facts_are_those_of_all_schemes() -> None:
    rtn = QuantizeWeights(method=Rtn())
    some = QuantizeWeights(method=Rtn(), overrides=(Override(method=Gptq(), sites=("*.a",)),))
    assert (rtn.statistics(), some.statistics()) == (frozenset(), {"hessian", "count"})
    assert "states" in some.needed_facts()
    coded = QuantizeWeights(method=Rtn(), format=Nf4Format())
    ints = QuantizeWeights(method=Rtn(), format=Nf4Format(), overrides=(Override(bits=4, sites=("*.a",)),))
    assert ("packed" in coded.given_facts(), "packed" in ints.given_facts()) == (True, False)


def test_an_override_that_names_nothing_or_does_not_fit_is_a_problem_before_any_work(case: CaseMaker) -> None:
    k = case("llada")
    p = QuantizeWeights(4, 32, method=Rtn(), overrides=(Override(bits=2, sites=("*.q_porj",)),))
    with pytest.raises(FeasibilityError, match=r"override pattern '\*\.q_porj' matches no linear; "):
        quantize(k, p)
    p = QuantizeWeights(4, 32, method=Rtn(), overrides=(Override(group_size=64, sites=("*",)),))
    with pytest.raises(
        FeasibilityError, match=r"0\.ff_out: 96 input features do not divide by group 64 \(use 32, or exclude"
    ):
        quantize(k, p)
    with pytest.raises(
        RecipeError, match=r"^override\.method: gptq does not round to nf4 g64 double\. Use method=rtn$"
    ):
        QuantizeWeights(overrides=(Override(format=Nf4Format(), sites=("*",)),))


def test_learned_rounding_takes_a_format_for_each_site(case: CaseMaker) -> None:
    k = case("llada")
    method = SignRound(steps=2, looks=1)
    p = QuantizeWeights(4, 32, method=method, overrides=(Override(bits=2, sites=("*.ff_out",)),))
    quantize(k, CALIBRATE, p)
    bits = {
        str(n.args[1].target).rpartition(".")[0].rpartition(".")[2]: n.args[5]
        for n in k.graph.nodes
        if is_call(n, LINEAR_Q)
    }
    assert bits == {"ff_out": 2} | dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj"), 4)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights", "float-activations"}, after="quantize_weights")
    message = r"^override\.method: signround rounds the linears of a block together, so all of them must have it\. Leave it out"
    for base, other in ((method, Gptq()), (Gptq(), method)):
        with pytest.raises(RecipeError, match=message):
            QuantizeWeights(method=base, overrides=(Override(method=other, sites=("*",)),))


# Declines


@pytest.mark.parametrize("acts", [False, True])
def test_declines_routers(acts: bool) -> None:
    """By what their output flows into; the experts beside them, which read the same value, are quantized."""
    graph, weights, spec = captured("llada-moe")
    ctx = Context(weights, spec, load_backend("reference"), blocks=find_blocks(graph))
    passes: tuple[Any, ...] = (QuantizeWeights(4, 8, method=Rtn()), *((QuantizeActivations(),) if acts else ()))
    plan = PassManager(passes).plan(graph, ctx)
    report = PassManager(passes).run(graph, ctx)[0][1]
    routers = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    reason = "a router: its output picks experts"
    assert {site: why for site, why in plan.kept.items() if site != "lm_head"} == dict.fromkeys(routers, reason)
    assert report.declined == [Declined(site, reason) for site in routers]
    assert report.sites == len(plan.sites) == 2 * (4 + 6 * 3)
    assert [s.name for s in linears(graph.nodes, weights)] == [*routers, "lm_head"]
    for site in (s for s in linears(graph.nodes, weights) if s.name in routers):
        # The norm's own value, not one that was rounded for the experts.
        assert is_call(site.x, RMS_NORM)
        assert sum(is_call(user, LINEAR_Q, QUANTIZE_ACT) for user in site.x.users) == (1 if acts else 12)
    check(graph, weights, spec, ctx.facts, after="the passes")


def test_a_shared_router_is_declined_once() -> None:
    """A weight with one use as a router is no weight to round, whatever its other uses are."""
    graph, weights, spec = captured("llada-moe")
    names = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]
    first, second = (next(n for n in graph.nodes if n.op == "get_attr" and n.target == name) for name in names)
    second.target = first.target
    weights.drop(names[1])
    ctx = Context(weights, spec, load_backend("reference"))
    report = QuantizeWeights(4, 8, method=Rtn(), skip=("*_proj", "lm_head")).apply(graph, ctx)
    assert [d for d in report.declined if "router" in d.reason] == [
        Declined("model.layers.0.mlp.gate", "a router: its output picks experts")
    ]


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (("*.q_proj",), 2),
        (("*.blocks.1.*",), 7),
        (("*.q_proj", "*.k_proj", "model.transformer.blocks.0.ff_out"), 5),
    ],
)
def test_declines_what_skip_names(case: CaseMaker, skip: tuple[str, ...], kept: int) -> None:
    k = case("llada")
    p = QuantizeWeights(4, 32, method=Rtn(), skip=skip)
    plan = PassManager((p,)).plan(k.graph, k.ctx)
    report = quantize(k, p)
    assert report.sites == 14 - kept == len(plan.sites)
    assert len(report.declined) == kept
    assert {d.reason for d in report.declined} <= {"named by skip="}
    for declined in report.declined:
        assert plan.kept[declined.site] == "named by skip="
        assert torch.equal(
            k.ctx.weights.value(f"{declined.site}.weight"), k.model.state_dict()[f"{declined.site}.weight"]
        )
    if "*.q_proj" in skip:
        assert Declined("model.transformer.blocks.0.q_proj", "named by skip=") in report.declined


def test_outside_the_blocks_nothing_is_a_site(case: CaseMaker) -> None:
    k = case("llada tied")
    p = QuantizeWeights(4, 32, method=Rtn())
    plan = PassManager((p,)).plan(k.graph, k.ctx)
    assert plan.kept == {"model.transformer.wte": "outside the repeated blocks"}
    assert quantize(k, p).sites == 14
    assert "model.transformer.wte.weight" in k.ctx.weights


def test_everything_skipped_leaves_the_graph_identical(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    k.ctx.block = k.ctx.blocks[0]
    report = k.apply(QuantizeWeights(4, 32, method=Rtn(), skip=("*",)))
    assert (report.sites, len(report.declined)) == (0, 7)
    assert fingerprint(k.graph, k.ctx.weights) == mark


# Shared weights


@pytest.mark.parametrize("method", [Rtn(), Gptq()])
def test_a_shared_weight_is_rounded_once(case: CaseMaker, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("shared")
    rounded: list[torch.Tensor] = []
    original = type(method).round

    def spy(self: Any, weight: torch.Tensor, *args: Any) -> Any:
        rounded.append(weight)
        return original(self, weight, *args)

    monkeypatch.setattr(type(method), "round", spy)
    report = quantize(k, CALIBRATE, QuantizeWeights(4, 32, method=method))
    assert len(rounded) == 2
    assert report.sites == 2
    calls = [n for n in k.graph.nodes if is_call(n, LINEAR_Q)]
    assert len(calls) == 6
    assert len({str(n.args[1].target) for n in calls}) == 2
    assert sum(is_call(n, LINEAR) for n in k.graph.nodes) == 1


# Options, errors, law


def test_groups_that_do_not_divide_are_listed_with_what_would(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    message = (
        r"^model\.transformer\.blocks\.0\.ff_out: 96 input features do not divide by group 64 "
        r"\(use 32, or exclude it with skip=\); model\.transformer\.blocks\.1\.ff_out: .*Nothing was changed or written$"
    )
    with pytest.raises(FeasibilityError, match=message):
        quantize(k, QuantizeWeights(4, 64, method=Rtn()))
    assert fingerprint(k.graph, k.ctx.weights) == mark
    assert quantize(k, QuantizeWeights(4, 64, method=Rtn(), skip=("*.ff_out",))).sites == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: 5 is not a width of an integer weight\. Use 2, 3, 4 or 8$"),
        ({"group_size": 0}, r"^group_size: a group of 0 input features is impossible"),
    ],
)
def test_impossible_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeWeights(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sequential": "true"},
            r"^sequential: 'true' is no sequence of statistics\. Use 'block', 'layer' or 'none'$",
        ),
        (
            {"sequential": "layer", "method": Rtn()},
            r"^sequential: rtn takes no statistics, so sequential='layer' has no say\. Leave it out, or use method=gptq$",
        ),
        (
            {"sequential": "none", "method": Gptaq()},
            r"^sequential: gptaq corrects inputs that rounding has changed, and sequential='none' shows it none\. Use 'bl",
        ),
    ],
)
def test_sequences_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeWeights(**options)


def test_layer_by_layer_needs_something_to_collect_with(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    message = r"^sequential: sequential='layer' takes statistics anew, and there is nothing to take them with\. Run the"
    with pytest.raises(ContractError, match=message):
        k.apply(QuantizeWeights(4, 32, sequential="layer"))
    assert fingerprint(k.graph, k.ctx.weights) == mark


# Notes on the statistics


def test_too_few_calibration_rows_are_noted_once(case: CaseMaker) -> None:
    """5 rows of 16 tokens: enough for 64 input features, too few for 96."""
    few = (
        "fewer calibration rows than input features at 1 of 7 linears of a block (at worst 80 for 96): "
        "the Hessian is singular but for its damping; use more sequences"
    )
    for sequences, expected in ((5, [few]), (6, [])):
        for sequential in ("block", "layer"):
            k = case("llada")
            p = QuantizeWeights(4, 32, sequential=sequential)  # type: ignore[arg-type]
            assert quantize(k, Calibrate(sequences=sequences, length=16), p).notes == expected
    k = case("llada")
    assert quantize(k, QuantizeWeights(4, 32, method=Rtn())).notes == []


def test_dead_input_features_are_noted_once(case: CaseMaker) -> None:
    k = case("layer norm")
    for layer in range(2):  # gelu(-40) is zero
        bias = k.ctx.weights.value(f"layers.{layer}.up.bias").clone()
        bias[:3] = -40.0
        k.ctx.weights.put(f"layers.{layer}.up.bias", bias)
    report = quantize(k, CALIBRATE, QuantizeWeights(4, 32))
    assert report.notes == [
        "input features that are zero in all calibration rows at 1 of 2 linears of a block (at most 3 of 64): "
        "their weights are rounded to nearest"
    ]


def test_gptq_asks_for_states_and_rtn_does_not() -> None:
    assert QuantizeWeights().needed_facts() - QuantizeWeights(method=Rtn()).needed_facts() == {"states"}
    assert QuantizeWeights().statistics() == {"hessian", "count"}
    assert QuantizeWeights(method=Gptaq()).statistics() == {"hessian", "drift", "count"}
    assert QuantizeWeights(method=Rtn()).statistics() == frozenset()


def test_an_error_names_the_layer(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.block = k.ctx.blocks[1]
    with pytest.raises(CalibrationError, match="gptq needs the statistic 'hessian'") as caught:
        k.apply(QuantizeWeights(4, 32))
    assert caught.value.__notes__ == ["while rounding model.transformer.blocks.1.q_proj"]


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_law_holds_and_more_bits_are_closer(case: CaseMaker, bits: int, group: int | None) -> None:
    k = case("dream")
    quantize(k, QuantizeWeights(bits, group, False, Rtn()))
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights", "float-activations"}, after="quantize_weights")
    state = k.model.state_dict()
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = state[f"{name}.weight"]
        # Half a step of the widest group, and the rounding of the scale to bfloat16.
        bound = float(weight.max() - weight.min()) / (2**bits - 1) * (0.5 + 2**bits * 2.0**-8)
        error = (dequantized(k, name, IntFormat(bits, group, False)) - weight).abs().max()
        assert float(error) <= bound
        assert float(error) > bound / 100


def test_running_it_twice_is_refused_by_its_facts(case: CaseMaker) -> None:
    k = case("llada")
    p = QuantizeWeights(4, 32, method=Rtn())
    with pytest.raises(
        ContractError, match=r"needs 'float-weights', which does not hold here\. Move 'quantize_weights'"
    ):
        PassManager((p, p)).run(k.graph, k.ctx)
    assert not any(is_call(n, LINEAR_Q) for n in k.graph.nodes)


def test_a_skip_pattern_that_names_nothing_is_a_problem_before_any_work(case: CaseMaker) -> None:
    k = case("llada")
    passes = (QuantizeWeights(4, 32, method=Rtn(), skip=("*.q_porj",)),)
    with pytest.raises(FeasibilityError, match=r"skip pattern '\*\.q_porj' matches no linear; "):
        PassManager(passes).run(k.graph, k.ctx)
