"""quantize_activations: one quantizer for each value, in front of quantized linears only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.check import check
from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.graph import fingerprint, is_call
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_Q, QUANTIZE_ACT
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]


def quantized(case: CaseMaker, name: str = "llada", **options: Any) -> Any:
    k = case(name)
    k.apply(QuantizeWeights(8, None, True, Rtn(), **options))
    return k


@pytest.mark.parametrize(
    ("name", "sites", "quantizers"), [("llada", 15, 9), ("dream", 15, 9), ("layer norm", 5, 5), ("shared", 7, 7)]
)
def test_readers_of_one_value_share_a_quantizer(case: CaseMaker, name: str, sites: int, quantizers: int) -> None:
    k = quantized(case, name)
    report = k.apply(QuantizeActivations())
    assert report.sites == sites
    assert report.metrics == {"quantizers": quantizers}
    nodes = [n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT)]
    assert len(nodes) == quantizers
    assert len({n.args[0] for n in nodes}) == quantizers
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights"}, after="quantize_activations")


def test_q_k_and_v_read_the_same_codes(case: CaseMaker) -> None:
    k = quantized(case)
    k.apply(QuantizeActivations())
    first = next(n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT))
    assert len(first.users) == 3
    assert {str(n.args[1].target).split(".")[-2] for n in first.users} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, True), (4, 32, True), (4, None, False), (2, 32, False)]
)
def test_the_value_that_a_linear_reads_is_the_formats(
    case: CaseMaker, bits: int, group: int | None, symmetric: bool
) -> None:
    k = quantized(case)
    k.apply(QuantizeActivations(bits, group, symmetric))
    node = next(n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT))
    run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [node.args[0], node])
    x, found = run(k.ids())
    assert torch.equal(found, ActFormat(bits, group, symmetric).fake_quantize(x))
    grouped = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    span = grouped.abs().amax(-1) * 2 if symmetric else grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
    step = span / (2**bits - 2 if symmetric else 2**bits - 1)
    error = (found - x).reshape(grouped.shape).abs().amax(-1)
    assert bool((error <= step * 0.5001).all())
    assert bool((error > 0).any())


def test_more_bits_are_closer(case: CaseMaker) -> None:
    expected = quantized(case)
    ids, errors = expected.ids(), []
    for bits in (3, 4, 6, 8):
        k = quantized(case)
        k.apply(QuantizeActivations(bits))
        errors.append(float((k.forward(ids) - expected.forward(ids)).norm() / expected.forward(ids).norm()))
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < 0.05 < errors[0]


def test_linears_that_are_not_quantized_keep_their_inputs(case: CaseMaker) -> None:
    k = quantized(case, skip=("*.q_proj", "*.ff_out", "model.transformer.ff_out"))
    report = k.apply(QuantizeActivations())
    assert report.sites == 10
    for node in (n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT)):
        assert all(is_call(user, LINEAR_Q) for user in node.users)


def test_leaves_a_float_graph_identical(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    report = k.apply(QuantizeActivations())
    assert (report.sites, report.metrics) == (0, {"quantizers": 0})
    assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(ContractError, match=r"'quantize_activations' needs 'quantized-weights', which does not hold"):
        PassManager((QuantizeActivations(),)).run(k.graph, k.ctx)


def test_twice_is_once(case: CaseMaker) -> None:
    k = quantized(case)
    k.apply(QuantizeActivations())
    mark = fingerprint(k.graph, k.ctx.weights)
    assert k.apply(QuantizeActivations()).sites == 0
    assert k.apply(QuantizeActivations(4)).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_groups_that_do_not_divide_are_listed(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    message = (
        r"^model\.transformer\.blocks\.0\.ff_out: activations: 96 input features do not divide by group 64; "
        r"model\.transformer\.blocks\.1\.ff_out: activations: 96 input features .* Nothing was changed or written$"
    )
    with pytest.raises(FeasibilityError, match=message):
        PassManager((QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(8, 64))).run(k.graph, k.ctx)
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_the_plan_has_the_format(case: CaseMaker) -> None:
    k = case("llada")
    plan = PassManager((QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(4, 32, False))).plan(k.graph, k.ctx)
    assert {spec.act for spec in plan.sites.values()} == {ActFormat(4, 32, False)}


def test_impossible_options() -> None:
    with pytest.raises(RecipeError, match=r"^bits: 9 is not a width of an integer activation\. Use 2 to 8"):
        QuantizeActivations(9)
    with pytest.raises(RecipeError, match=r"^group_size: a group of 0 features is impossible"):
        QuantizeActivations(group_size=0)


def test_no_tokens_at_all(case: CaseMaker) -> None:
    for symmetric in (True, False):
        k = quantized(case)
        k.apply(QuantizeActivations(8, None, symmetric))
        assert k.forward(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 61)
