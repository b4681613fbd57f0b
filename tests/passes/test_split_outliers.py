"""split_outliers: the split is exact, the columns are those the states say, and 8 bits then mean the published equation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import captured
from zoo import model as zoo_model

import dlqc
from dlqc.backend import load_backend
from dlqc.blocks import find_blocks
from dlqc.calibration import States
from dlqc.check import check
from dlqc.contract import Context, Declined
from dlqc.errors import ContractError, ExportError, FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.export import export
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.graph import LINEAR, args_of, fingerprint, is_call, linears
from dlqc.kept import OUTLIERS, TIED
from dlqc.manager import PassManager
from dlqc.models.outlier_twin import outlier_twin
from dlqc.ops import LINEAR_Q, QUANTIZE_ACT
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.split_outliers import SplitOutliers
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]
#: On random models of unit size about this much makes some columns outliers, and not all.
LOW = SplitOutliers(threshold=2.5, share=1.0)
INT8 = QuantizeWeights(8, None, True, Rtn())


def run(k: Any, *passes: Any) -> Any:
    """Run the passes; gives the report of the first."""
    return PassManager(passes).run(k.graph, k.ctx)[0][1]


def inputs(k: Any) -> dict[str, torch.Tensor]:
    """What each linear of the blocks reads on the calibration states, in float64, by name."""
    sites = [s for b in k.ctx.blocks for s in linears(b.nodes(k.graph), k.ctx.weights)]
    found = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [s.x for s in sites], dtype=torch.float64)
    return {s.name: x for s, x in zip(sites, found(k.ctx.states.ids), strict=True)}


@pytest.mark.parametrize(
    "name", ["llada", "llada bf16", "llada grouped bias", "dream", "layer norm", "post norm", "shared"]
)
def test_the_function_stays(case: CaseMaker, name: str) -> None:
    k, before = case(name), case(name)
    report = run(k, LOW)
    assert report.sites == len(report.details) > 0
    # A bfloat16 model rounds its products to bfloat16, and now makes two where there was one.
    exact = name != "llada bf16"
    bound = 1e-12 if exact else 0.05
    found, expected = (m.forward(m.ids(), torch.float64 if exact else None) for m in (k, before))
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())
    assert report.certificate is not None
    assert report.certificate < (1e-12 if exact else 1.0)
    check(k.graph, k.ctx.weights, k.ctx.spec, k.ctx.facts, after="split_outliers")


@pytest.mark.parametrize("share", [1.0, 0.05, 0.001])
def test_the_columns_are_the_largest_of_those_above_the_threshold(case: CaseMaker, share: float) -> None:
    k = case("dream")
    peaks = {name: x.abs().amax(dim=(0, 1)) for name, x in inputs(case("dream")).items()}
    report = run(k, SplitOutliers(2.5, share))
    for name, peak in peaks.items():
        most = max(1, int(share * len(peak)))
        expected = [j for j in peak.argsort(descending=True).tolist()[:most] if peak[j] > 2.5]
        if not expected:
            assert name not in report.details
            continue
        weight = k.model.state_dict()[f"{name}.weight"]
        assert torch.equal(k.ctx.weights.value(f"{name}.outliers.weight"), weight[:, sorted(expected)])
        assert report.details[name]["columns"] == len(expected)
        left = k.ctx.weights.value(f"{name}.weight")
        assert not bool(left[:, expected].any())
        kept = [j for j in range(len(peak)) if j not in expected]
        assert torch.equal(left[:, kept], weight[:, kept])
        assert report.details[name]["largest_left"] == pytest.approx(float(peak[kept].max()), rel=1e-5)
    assert report.sites > 0


def test_rows_of_weight_zero_do_not_make_outliers(case: CaseMaker) -> None:
    k = case("llada")
    states = k.ctx.states
    none = states.weights.clone()
    none[1:] = 0
    k.ctx.states = States(states.ids, states.clean, states.t, none, states.source)
    peaks = {name: x[0].abs().amax(dim=0) for name, x in inputs(case("llada")).items()}
    report = run(k, LOW)
    for name in ("model.transformer.blocks.0.q_proj", "model.transformer.blocks.0.up_proj"):
        assert report.details[name]["columns"] == int((peaks[name] > 2.5).sum())


def test_readers_of_one_value_share_the_two_inputs(case: CaseMaker) -> None:
    k = case("llada")
    run(k, LOW)
    of_block = [s for s in linears(k.ctx.blocks[0].nodes(k.graph), k.ctx.weights) if s.name.split(".")[-1] != "weight"]
    by_name = {s.name.removeprefix("model.transformer.blocks.0."): s for s in of_block}
    assert by_name["q_proj"].x is by_name["k_proj"].x is by_name["v_proj"].x
    assert by_name["q_proj.outliers"].x is by_name["v_proj.outliers"].x
    assert by_name["up_proj"].x is not by_name["q_proj"].x


# Against the paper


@pytest.mark.parametrize("name", ["llada", "llada grouped bias", "dream"])
def test_quantized_it_is_the_published_decomposition(case: CaseMaker, name: str) -> None:
    """Equation 8 in float64, on the columns themselves: what is zeroed here is not there at all."""
    k = case(name)
    report = run(k, LOW, INT8, QuantizeActivations())
    sums = [
        n
        for n in k.graph.nodes
        if [is_call(a, op) for a, op in zip(n.args, (LINEAR_Q, LINEAR), strict=False)] == [True] * 2
    ]
    assert len(sums) == report.sites
    state = k.model.state_dict()
    ids = k.ids()
    for node in sums:
        main, side = node.args[0], node.args[1]
        site = str(args_of(side)[1].target).removesuffix(".outliers.weight")
        value = args_of(args_of(args_of(main)[0])[0])[0]  # quantize_act(x ∘ k)
        wanted = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [value, node], dtype=torch.float64)
        x, found = wanted(ids)
        columns = args_of(args_of(side)[0])[2]
        outliers = k.ctx.weights.value(str(columns.target)).tolist()
        rest = [j for j in range(x.shape[-1]) if j not in outliers]
        weight = state[f"{site}.weight"].double()
        codes, s_x, _ = ActFormat(8).quantize_dynamic(x[..., rest])
        rounded = IntFormat(8, None, True).quantize(weight[:, rest])
        s_w, integers = rounded.scales.double()[:, 0], rounded.codes.double() - 128
        expected = s_x.double() * s_w * (codes.double() @ integers.T) + x[..., outliers] @ weight[:, outliers].T
        if f"{site}.bias" in state:
            expected = expected + state[f"{site}.bias"].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        wrong = expected - x[..., outliers[:1]] @ weight[:, outliers[:1]].T
        assert not torch.allclose(found, wrong, atol=1e-4 * float(expected.abs().max()))


def test_on_the_outlier_twin_it_beats_plain_8_bits() -> None:
    """Three planted channels of 30 times the size in front of each linear; random rows to calibrate on, others to measure."""
    twin = outlier_twin(zoo_model("llada"), channels=3, factor=64.0)
    generator = torch.Generator().manual_seed(3)
    rows, ids = (torch.randint(0, 60, (n, 24), generator=generator) for n in (8, 4))
    with torch.no_grad():
        expected = twin(ids).logits
    errors = {}
    for recipe in ("w8a8-rtn", "w8a8-llmint8", "w4a4-rtn"):
        q = dlqc.compile(twin, recipe, calibration=rows, backend="cpu", progress=False)
        errors[recipe] = float((q(ids) - expected).norm() / expected.norm())
    assert errors["w8a8-llmint8"] < 0.2 * errors["w8a8-rtn"]
    assert errors["w8a8-rtn"] < errors["w4a4-rtn"]


def test_gptq_works_on_what_is_left(case: CaseMaker) -> None:
    """Columns that are always zero have a zero row in the Hessian."""
    k = case("llada")
    passes = (LOW, QuantizeWeights(4, 32, method=Gptq()))
    reports = PassManager(passes).run(k.graph, k.ctx)
    assert reports[1][1].sites == 14
    kept = {d.site for d in reports[1][1].declined}
    assert kept == {f"{name}.outliers" for name in reports[0][1].details}
    assert {d.reason for d in reports[1][1].declined} == {OUTLIERS}
    assert sum(is_call(n, LINEAR_Q) for n in k.graph.nodes) == 14
    assert sum(is_call(n, LINEAR) for n in k.graph.nodes) == 1 + len(kept)


# Declines


def test_declines_what_skip_names_and_what_is_split_already(case: CaseMaker) -> None:
    k = case("llada")
    report = run(k, SplitOutliers(2.5, skip=("*.q_proj",)))
    assert {d.reason for d in report.declined} == {"named by skip="}
    assert "model.transformer.blocks.0.q_proj" not in report.details
    assert "model.transformer.blocks.0.k_proj" in report.details
    again = run(k, SplitOutliers(2.5, required=False, skip=("*.q_proj",)))
    assert again.sites == 0
    assert {d.reason for d in again.declined} == {"it is split already", "named by skip=", OUTLIERS}


def test_declines_routers_and_inputs_that_are_all_outliers() -> None:
    graph, weights, spec = captured("llada-moe")
    ctx = Context(weights, spec, load_backend("reference"), blocks=find_blocks(graph))
    sites = list(linears(graph.nodes, weights))
    ctx.stats = {s.weight: {"absmax": torch.linspace(7, 8, s.in_features)} for s in sites}
    mark = fingerprint(graph, weights)
    report = SplitOutliers(share=1.0).apply(graph, ctx)
    assert report.sites == 0
    assert fingerprint(graph, weights) == mark
    reasons = {d.site: d.reason for d in report.declined}
    assert reasons["model.layers.0.mlp.gate"] == "a router: its output picks experts"
    assert reasons["model.layers.0.self_attn.q_proj"] == "all 32 columns exceed 6"


def test_declines_a_weight_that_something_else_reads(case: CaseMaker) -> None:
    k = case("llada tied")
    sites = list(linears(k.graph.nodes, k.ctx.weights))
    k.ctx.stats = {s.weight: {"absmax": torch.arange(s.in_features).float()} for s in sites}
    assert k.apply(SplitOutliers()).declined == [Declined("model.transformer.wte", TIED)]
    k = case("shared")
    k.ctx.stats = {
        s.weight: {"absmax": torch.arange(s.in_features).float()} for s in linears(k.graph.nodes, k.ctx.weights)
    }
    first, last = (next(n for n in order if is_call(n, LINEAR)) for order in (k.graph.nodes, reversed(k.graph.nodes)))
    last.replace_input_with(args_of(last)[1], args_of(first)[1])
    k.ctx.block = k.ctx.blocks[0]
    assert (
        Declined("layers.0.up", "something else than a linear of the block reads its weight")
        in k.apply(SplitOutliers()).declined
    )


def test_without_outliers_the_graph_is_identical(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    assert run(k, SplitOutliers(1e4, required=False)).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(ContractError, match=r"pass 'split_outliers' found nothing to rewrite"):
        run(case("llada"), SplitOutliers(1e4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"threshold": -1.0},
            r"^split_outliers\.threshold: -1\.0 is no magnitude\. Use 6\.0, or 0 to go by share= alone$",
        ),
        ({"share": 0.0}, r"^split_outliers\.share: 0\.0 is no share\. Use 0\.01 for one column in a hundred, or 1 for"),
        ({"share": 1.5}, r"^split_outliers\.share: 1\.5 is no share\."),
    ],
)
def test_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SplitOutliers(**options)


def test_a_skip_pattern_that_names_nothing(case: CaseMaker) -> None:
    with pytest.raises(FeasibilityError, match=r"skip pattern '\*\.q_porj' matches no linear; "):
        run(case("llada"), SplitOutliers(skip=("*.q_porj",)))


# The whole way


def test_saved_loaded_explained_and_refused_by_name(tmp_path: Path) -> None:
    twin = outlier_twin(zoo_model("dream"), channels=2, factor=64.0)
    rows = torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(2))
    q = dlqc.compile(twin, "w8a8-llmint8", calibration=rows, backend="cpu", progress=False)
    dlqc.artifact.save(q, tmp_path / "a", verify_reload=False)
    again = dlqc.load(tmp_path / "a", backend="cpu")
    assert torch.equal(again(rows), q(rows))
    dlqc.artifact.verify(tmp_path / "a", backend="cpu")
    storage = q.report.storage
    sparse = {name: reason for name, (_, reason) in storage.kept.items() if name.endswith(".outliers.weight")}
    assert sparse
    assert set(sparse.values()) == {OUTLIERS}
    assert f"not quantized, {OUTLIERS}: " in q.explain()
    assert sum(is_call(n, QUANTIZE_ACT) for n in q.graph.nodes) == 2 * 4
    with pytest.raises(ExportError, match=r"self_attn\.q_proj\.outliers is a linear of its own; .* Use save\(\)"):
        export(q, tmp_path / "out")
