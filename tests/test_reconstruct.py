"""Blocks as functions of their weights: the loss written out, and learned rounding in the nested pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.calibration import Certainty, Clean, Rollout, States
from dlqc.check import check
from dlqc.contract import BlockInput
from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.nf4 import Nf4Format
from dlqc.graph import linears
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.reconstruct import Reconstruction
from dlqc.rounding.low_rank import LowRank
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.signround import SignRound
from dlqc.straight_through import quantized_activations

CaseMaker = Callable[..., Any]
QUICK = SignRound(steps=24, looks=4)


def at_block(k: Any, index: int, *, weights: torch.Tensor | None = None) -> list[Any]:
    """Put a block and its states into the context, with other states of full precision; gives its linears."""
    k.ctx.block = k.ctx.blocks[index]
    states: States = k.ctx.states
    source = k.ctx.block.input(k.graph)
    hidden = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [source])(states.ids)[0]
    c = states.weights if weights is None else weights
    noise = 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    parts = [slice(0, 4), slice(4, None)]
    k.ctx.inputs = [BlockInput(states.ids[p], c[p], hidden[p], (hidden + noise)[p]) for p in parts]
    return list(linears(k.ctx.block.nodes(k.graph), k.ctx.weights))


def output(k: Any, weights: dict[str, torch.Tensor], exact: bool = False, act: ActFormat | None = None) -> torch.Tensor:
    """The block's output by the user's own layer."""
    block = copy.deepcopy(k.model).layers[k.ctx.block.index]
    for name, weight in weights.items():
        block.get_submodule(name.split(".")[-2]).weight.data = weight
    if act is not None:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda m, args: (quantized_activations(args[0], act),))
    with torch.no_grad():
        return torch.cat([block(part.exact if exact else part.hidden) for part in k.ctx.inputs])


@pytest.mark.parametrize("act", [None, ActFormat(4)])
def test_the_loss_is_the_weighted_error_of_the_output(case: CaseMaker, act: ActFormat | None) -> None:
    k = case("layer norm")
    c = torch.rand(k.ctx.states.weights.shape, generator=torch.Generator().manual_seed(3))
    c[:, ::3] = 0
    sites = at_block(k, 1, weights=c)
    objective = Reconstruction(k.graph, k.ctx, sites, act)
    weights = {s.weight: IntFormat(3, 32).quantize(k.ctx.weights.value(s.weight)).dequantize() for s in sites}
    error = (output(k, weights, act=act) - output(k, {}, exact=True)).square().mean(-1)
    assert objective.parts == 2
    assert objective.total(weights) == pytest.approx(float((c * error).sum() / c.sum()), rel=1e-4)
    for i, part in enumerate((slice(0, 4), slice(4, None))):
        expected = float((c[part] * error[part]).sum() / c[part].sum())
        assert float(objective.loss(i, weights)) == pytest.approx(expected, rel=1e-4)


def test_gradients_are_those_of_differences(case: CaseMaker) -> None:
    k = case("dream")
    sites = at_block(k, 0)
    objective = Reconstruction(k.graph, k.ctx, sites)
    weights = {s.weight: k.ctx.weights.value(s.weight).float() * 1.1 for s in sites}
    for name in list(weights)[::3]:
        weight = weights[name].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective.loss(0, weights | {name: weight}), [weight])
        direction = gradient / gradient.norm()
        with torch.no_grad():
            up, down = (
                float(objective.loss(0, weights | {name: weights[name] + h * direction})) for h in (1e-2, -1e-2)
            )
        assert (up - down) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_full_precision_has_no_loss_on_its_own_states(case: CaseMaker) -> None:
    k = case("llada")
    sites = at_block(k, 0)
    k.ctx.inputs = [BlockInput(p.ids, p.weights, p.hidden, p.hidden) for p in k.ctx.inputs]
    assert Reconstruction(k.graph, k.ctx, sites).total({}) == 0


def test_states_that_cannot_be_used(case: CaseMaker) -> None:
    k = case("llada")
    with pytest.raises(
        ContractError, match=r"^method: a block is to be reconstructed, and there are no states to do it on"
    ):
        Reconstruction(k.graph, k.ctx, [])
    sites = at_block(k, 0)
    k.ctx.inputs[0].exact[0, 0, 0] = float("nan")
    with pytest.raises(
        CalibrationError, match=r"^block 0: the error of its output is nan\. Check the weights and the cal"
    ):
        Reconstruction(k.graph, k.ctx, sites).total({})


# SignRound in the pipeline


def stored(k: Any, name: str, fmt: IntFormat) -> torch.Tensor:
    parts = [k.ctx.weights.value(f"{name}.{role}") for role in ("codes", "scales")]
    zeros = None if fmt.symmetric else k.ctx.weights.value(f"{name}.zeros")
    return QuantizedWeight(*parts, zeros, fmt).dequantize()


@pytest.mark.parametrize("name", ["llada", "dream", "shared", "layer norm"])
def test_every_block_ends_below_nearest_rounding(case: CaseMaker, name: str) -> None:
    k, fmt = case(name), IntFormat(3, 32, False)
    p = QuantizeWeights(3, 32, method=SignRound(steps=24, looks=4, lr=0.02))
    assert "states" in p.needed_facts()
    assert p.statistics() == frozenset()
    report = PassManager((Calibrate(sequences=8, length=16), p)).run(k.graph, k.ctx)[-1][1]
    assert report.metrics["block_loss"] < 0.9 * report.metrics["block_loss_start"]
    assert all(0 < d["changed"] < 0.5 for d in report.details.values())
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights"}, after="quantize_weights")
    state = k.model.state_dict()
    for site in report.details:
        weight = state[f"{site}.weight"]
        step = k.ctx.weights.value(f"{site}.scales").float().repeat_interleave(32, dim=1)
        moved = (stored(k, site, fmt) - weight).abs() / step
        assert 0.5 < float(moved.max())  # some weights went to the neighbour further off


@pytest.mark.parametrize("sampler", [Clean(), Rollout(steps=4)])
def test_any_sampler_and_weight_will_do(case: CaseMaker, sampler: Any) -> None:
    k = case("llada")
    steps = (Calibrate(sampler=sampler, weight=Certainty(), sequences=8, length=16), Smooth())
    p = QuantizeWeights(3, 32, method=QUICK, low_rank=LowRank(2, "none"))
    reports = PassManager((*steps, p, QuantizeActivations())).run(k.graph, k.ctx)
    metrics = reports[2][1].metrics
    assert metrics["block_loss"] < metrics["block_loss_start"]


def test_what_it_is_learned_against_matters_behind_the_first_block(case: CaseMaker) -> None:
    found = []
    for against in ("exact", "current"):
        k = case("llada")
        p = QuantizeWeights(2, 32, method=SignRound(steps=24, looks=4, against=against))  # type: ignore[arg-type]
        PassManager((Calibrate(sequences=8, length=16), p)).run(k.graph, k.ctx)
        names = [f"model.transformer.blocks.{i}.up_proj" for i in (0, 1)]
        found.append([k.ctx.weights.value(f"{name}.codes") for name in names])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_activations_are_rounded_while_learning(case: CaseMaker) -> None:
    codes = []
    for act_bits in (None, 2):
        k = case("llada")
        p = QuantizeWeights(3, 32, method=SignRound(steps=8, looks=2, act_bits=act_bits))
        PassManager((Calibrate(sequences=8, length=16), p)).run(k.graph, k.ctx)
        codes.append(k.ctx.weights.value("model.transformer.blocks.0.up_proj.codes"))
    assert not torch.equal(*codes)


def test_tokens_without_weight_have_no_say(case: CaseMaker) -> None:
    found = []
    for garbage in (0.0, 50.0):
        k = case("layer norm")  # without attention, a token's output depends on it alone
        c = k.ctx.states.weights.clone()
        c[:, ::2] = 0
        at_block(k, 0, weights=c)
        k.ctx.inputs = [
            BlockInput(p.ids, p.weights, p.hidden, p.exact + garbage * (p.weights == 0)[..., None])
            for p in k.ctx.inputs
        ]
        k.apply(QuantizeWeights(3, 32, method=QUICK))
        found.append(k.ctx.weights.value("layers.0.up.codes"))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sequential": "layer"},
            r"^sequential: signround rounds the linears of a block together, so sequential='layer'",
        ),
        ({"format": Nf4Format()}, r"^method: signround does not round to nf4 g64 double\. Use method=rtn$"),
    ],
)
def test_options_that_do_not_go_with_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeWeights(method=SignRound(), **options)


def test_without_states_it_is_refused(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.facts.discard("states")
    with pytest.raises(ContractError, match=r"needs 'states', which does not hold here"):
        PassManager((QuantizeWeights(3, 32, method=SignRound()),)).run(k.graph, k.ctx)
    PassManager((QuantizeWeights(3, 32, method=Rtn()),)).run(k.graph, k.ctx)
