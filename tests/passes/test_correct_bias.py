"""correct_bias: means become those of full precision, linear by linear, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import dlqc
from dlqc.artifact import save
from dlqc.calibration import Certainty
from dlqc.check import check
from dlqc.compile import plan
from dlqc.contract import PassReport
from dlqc.errors import CalibrationError, ContractError, ExportError, RecipeError
from dlqc.execute import Executor, bucket_values, mask_buckets, placeholder
from dlqc.export import export
from dlqc.formats.nf4 import Nf4Format
from dlqc.graph import (
    ADDED_BIAS,
    QUANTIZED_LINEARS,
    activation_quantizer,
    args_of,
    corrected,
    is_call,
    linears,
    site_name,
)
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.correct_bias import CorrectBias
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.planning import plan_report
from dlqc.ranges import Percentile
from dlqc.rounding.low_rank import LowRank
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]
CALIBRATE = Calibrate(sequences=8, length=16, weight=Certainty())
ROUGH = QuantizeWeights(2, 32, method=Rtn())


class Spied(CorrectBias):
    """Keeps the errors of each block before and after the correction."""

    def apply(self, graph: fx.Graph, ctx: Any) -> PassReport:
        before = errors(graph, ctx, self.against)
        report = super().apply(graph, ctx)
        SEEN.append((before, errors(graph, ctx, self.against)))
        return report


SEEN: list[tuple[list[Tensor], list[Tensor]]] = []


def errors(graph: fx.Graph, ctx: Any, against: str) -> list[Tensor]:
    """y* - y at every quantized call of the block, float64 rows [n, N + 1] whose last column is the token weight."""
    before, constants = ctx.original
    calls = [n for n in ctx.block.nodes(graph) if is_call(n, *QUANTIZED_LINEARS)]
    sites = list(linears(ctx.block.nodes(before), constants))
    assert [s.name for s in sites] == [site_name(n) for n in calls]
    read = [args_of(activation_quantizer(n) or n)[0] for n in calls]
    buckets = mask_buckets(graph)
    inputs = [placeholder(before), ctx.block.input(before)]
    place = [placeholder(graph), ctx.block.input(graph), *buckets]
    exact = Executor(before, constants, inputs, [s.x for s in sites])
    now = Executor(graph, ctx.weights, place, [*read, *map(corrected, calls)])
    found: list[list[Tensor]] = [[] for _ in calls]
    for part in ctx.inputs:
        sets = bucket_values(buckets, part.ids, part.mask_ratio)
        wanted, values = exact(part.ids, part.exact), now(part.ids, part.hidden, *sets)
        for i, site in enumerate(sites):
            x = wanted[i] if against == "stream" else values[i]
            y = x.double() @ constants.value(site.weight, torch.float64).T
            y = y if site.bias is None else y + constants.value(site.bias, torch.float64)
            error = (y - values[len(calls) + i].double()).flatten(0, -2)
            found[i].append(torch.cat((error, part.weights.reshape(-1, 1)), dim=1))
    return [torch.cat(rows) for rows in found]


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and mean square of the columns but the last."""
    c = rows[:, -1:] / rows[:, -1].sum()
    return (c * rows[:, :-1]).sum(0), (c * rows[:, :-1].square()).sum(0)


def zero_means(k: Any, *passes: Any) -> PassReport:
    """Run passes of which one is Spied, and hold it to its word; gives its report."""
    SEEN.clear()
    reports = PassManager((CALIBRATE, *passes)).run(k.graph, k.ctx)
    report = next(r for p, r in reports if isinstance(p, Spied))
    assert len(SEEN) == len(k.ctx.blocks)
    assert float(k.ctx.states.weights.std()) > 0.05
    assert report.sites == sum(len(before) for before, _ in SEEN) > 0
    for before, after in SEEN:
        for old, new in zip(before, after, strict=True):
            (mean, _), (old_mean, old_square) = moments(new), moments(old)
            assert float(mean.abs().max()) < 3e-6 * float(old_square.sqrt().max())
            assert float(old_mean.abs().max()) > 1e-3 * float(old_square.sqrt().max())
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights"}, after="correct_bias")
    return report


@pytest.mark.parametrize("against", ["layer", "stream"])
@pytest.mark.parametrize("name", ["llada", "dream", "shared", "post norm"])
def test_the_means_of_the_errors_are_zero(case: CaseMaker, name: str, against: Any) -> None:
    k = case(name)
    report = zero_means(k, ROUGH, Spied(against=against))
    assert all(numbers["shift"] > 0 for numbers in report.details.values())
    if name == "shared":  # three calls of each linear, with a bias of their own
        assert [site for site in report.details if "up" in site] == [
            "layers.0.up",
            *(f"layers.0.up call {i}" for i in (2, 3)),
        ]


@pytest.mark.parametrize(
    "passes",
    [
        (QuantizeWeights(3, None, True, method=Rtn()), QuantizeActivations(bits=3, symmetric=False), Spied()),
        (QuantizeWeights(2, 32, low_rank=LowRank(4)), Pack(), Spied(against="stream")),
        (
            QuantizeWeights(format=Nf4Format(32), method=Rtn(), low_rank=LowRank(2)),
            QuantizeActivations(bits=4),
            Spied(),
        ),
        (ROUGH, QuantizeActivations(bits=4, ranges=Percentile(), buckets=2), Spied()),
        (Smooth(), ROUGH, QuantizeActivations(bits=4), Pack(), Spied(against="stream")),
    ],
    ids=[
        "activations",
        "low rank, packed",
        "coded, low rank, activations",
        "fixed ranges",
        "smooth, activations, packed",
    ],
)
def test_whatever_the_linears_have_become(case: CaseMaker, passes: tuple[Any, ...]) -> None:
    zero_means(case("llada"), *passes)


def test_the_variance_stays_and_the_error_falls_by_the_mean(case: CaseMaker) -> None:
    k = case("llada")
    zero_means(k, ROUGH, Spied())
    for before, after in SEEN:
        for old, new in zip(before[:3], after[:3], strict=True):  # q, k, v: no correction changes their input
            (mean, square), (_, left) = moments(old), moments(new)
            torch.testing.assert_close(left, square - mean.square(), rtol=1e-4, atol=1e-7)


def test_the_correction_is_that_of_the_paper(case: CaseMaker) -> None:
    """b += (W - Ŵ)·E[x] for the linears that read the block's norm, E[x] written out with the token weights."""
    k = case("dream")
    PassManager((CALIBRATE, ROUGH, CorrectBias())).run(k.graph, k.ctx)
    clean = case("dream")
    name = "model.layers.0.self_attn.k_proj"
    site = next(s for s in linears(clean.graph.nodes, clean.ctx.weights) if s.name == name)
    states = k.ctx.states
    assert float(states.weights.std()) > 0.05
    x = Executor(clean.graph, clean.ctx.weights, [placeholder(clean.graph)], [site.x])(states.ids)[0].double()
    mean = (states.weights[..., None] * x).sum((0, 1)) / states.weights.sum()
    weight, bias = (clean.ctx.weights.value(n, torch.float64) for n in (site.weight, str(site.bias)))
    rounded = ROUGH.target.quantize(weight).dequantize().double()  # type: ignore[union-attr]
    expected = bias + (weight - rounded) @ mean
    torch.testing.assert_close(k.ctx.weights.value(f"{name}.bias").double(), expected, rtol=1e-5, atol=1e-6)
    assert k.ctx.weights.value(f"{name}.bias").dtype == torch.float32
    assert f"model.layers.0.mlp.up_proj.{ADDED_BIAS}" in k.ctx.weights
    assert f"{name}.{ADDED_BIAS}" not in k.ctx.weights


def test_the_stream_sees_what_the_layers_before_have_lost(case: CaseMaker) -> None:
    """At the last block the mean of the output comes closer to that of full precision than by correcting layers alone."""
    clean = case("llada")
    wanted = logits_mean(clean, clean.ctx.states.ids)
    distance = {}
    for against in (None, "layer", "stream"):
        k = case("llada")
        steps = () if against is None else (CorrectBias(against=against),)  # type: ignore[arg-type]
        PassManager((CALIBRATE, ROUGH, *steps)).run(k.graph, k.ctx)
        distance[against] = float((logits_mean(k, k.ctx.states.ids) - wanted).square().sum())
    assert distance["stream"] < distance["layer"] < distance[None]
    assert distance["stream"] < 0.5 * distance[None]


def logits_mean(k: Any, ids: Tensor) -> Tensor:
    return k.forward(ids).mean((0, 1))


# Order, plan, storage, export


def test_it_comes_behind_rounding_without_a_pass_on_the_graph_between(case: CaseMaker) -> None:
    k = case("llada")
    with pytest.raises(
        ContractError, match=r"^passes: pass 'correct_bias' needs 'original', which does not hold here\. Move"
    ):
        PassManager((CALIBRATE, CorrectBias(), ROUGH)).run(k.graph, k.ctx)
    message = r"^passes: pass 'correct_bias' needs 'original', .*Move 'correct_bias' before 'calibrate', which ends it$"
    with pytest.raises(ContractError, match=message):
        PassManager((ROUGH, CALIBRATE, CorrectBias())).run(k.graph, k.ctx)
    with pytest.raises(
        ContractError, match=r"needs 'states', which does not hold here\. No pass in this pipeline gives"
    ):
        PassManager((ROUGH, CorrectBias())).check_order()
    PassManager((FoldNormScale(), CALIBRATE, ROUGH, Pack(), CorrectBias())).check_order()
    k.ctx.block = k.ctx.blocks[0]
    with pytest.raises(
        ContractError, match=r"^correct_bias: the block as it was before its weights were rounded is not at"
    ):
        k.apply(CorrectBias())


def test_what_lies_behind_the_blocks_gets_no_bias(case: CaseMaker) -> None:
    k = case("llada")
    passes = (CALIBRATE, QuantizeWeights(4, 32, method=Rtn(), head=8), CorrectBias())
    sites = PassManager(passes).plan(k.graph, k.ctx).sites
    head = "model.transformer.ff_out"
    assert {name for name, spec in sites.items() if not spec.has_bias} == {head}
    report = PassManager(passes).run(k.graph, k.ctx)[-1][1]
    assert report.sites == len(sites) - 1
    assert report.details.keys() == sites.keys() - {head}


def test_another_target_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^against: there are no means of a 'model'\. Use 'layer' or 'stream'$"):
        CorrectBias(against="model")  # type: ignore[arg-type]


def test_a_mean_that_is_not_finite(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")

    def broken(self: Executor, *values: Tensor, **more: Any) -> list[Tensor]:
        return [v * float("nan") for v in original(self, *values, **more)]

    original = Executor.__call__
    monkeypatch.setattr("dlqc.passes.correct_bias.Executor.__call__", broken)
    with pytest.raises(
        CalibrationError, match=r"^%\w+: its mean over the calibration states is not finite\. Check the weig"
    ):
        PassManager((Calibrate(sequences=4, length=16), ROUGH, CorrectBias())).run(k.graph, k.ctx)


RECIPE = "calibrate(sequences=4), quantize_weights(bits=3, group_size=32, symmetric=True, method=rtn), {}pack, lower"


def test_from_the_recipe_to_the_artifact(case: CaseMaker, tmp_path: Path) -> None:
    k = case("llada")
    recipe = RECIPE.format("correct_bias(against='stream'), ")
    found, _, _ = plan(k.model, recipe, backend="cpu")
    assert all(spec.has_bias for spec in found.sites.values())
    model = dlqc.compile(k.model, recipe, calibration=k.ctx.rows.ids, backend="cpu", progress=False)
    save(model, tmp_path / "a", verify_reload=False)
    again = dlqc.load(tmp_path / "a", backend="cpu")
    assert torch.equal(again(k.ids()), model(k.ids()))
    reference = dlqc.load(tmp_path / "a", backend="reference")
    torch.testing.assert_close(model(k.ids()), reference(k.ids()), rtol=0.1, atol=0.05)
    plain = dlqc.compile(k.model, RECIPE.format(""), calibration=k.ctx.rows.ids, backend="cpu", progress=False)
    added = model.report.storage.bits_quantized - plain.report.storage.bits_quantized
    assert added == 2 * (4 * 64 + 2 * 96 + 64) * 32
    assert plan_report(k.model, recipe, backend="cpu").bits - plan_report(k.model, RECIPE.format("")).bits == added
    message = r"^compressed-tensors: model\.transformer\.blocks\.0\.q_proj has a bias that its class does not read; .*Use save"
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "b")


def test_a_bias_of_the_checkpoint_is_exported(case: CaseMaker, tmp_path: Path) -> None:
    k = case("llada grouped bias")
    model = dlqc.compile(
        k.model, RECIPE.format("correct_bias, "), calibration=k.ctx.rows.ids, backend="reference", progress=False
    )
    export(model, tmp_path / "b")
    assert not any(ADDED_BIAS in name for name in model.weights)
