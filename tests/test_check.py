"""Every law of the graph refuses a planted violation and says what is wrong."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from dlqc.check import FACT_CHECKS, allowed, check
from dlqc.contract import FACTS_OF_CAPTURE
from dlqc.errors import ContractError
from dlqc.formats.nf4 import Nf4Format
from dlqc.graph import LINEAR, SDPA, aten, call_before, is_call, linears, read
from dlqc.ops import LINEAR_CODED, LINEAR_PACKED, LINEAR_Q, QUANTIZE_ACT
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]


def first(graph: fx.Graph, target: object) -> fx.Node:
    return next(node for node in graph.nodes if is_call(node, target))


def judge(k: Any, facts: set[str] = frozenset(FACTS_OF_CAPTURE)) -> None:  # type: ignore[assignment]
    check(k.graph, k.ctx.weights, k.ctx.spec, set(facts), after="pass 'planted'")


def refused(k: Any, message: str, facts: set[str] = frozenset(FACTS_OF_CAPTURE)) -> None:  # type: ignore[assignment]
    with pytest.raises(ContractError, match=message) as caught:
        judge(k, facts)
    assert "after pass 'planted': " in str(caught.value)
    assert "This is a fault of pass 'planted', not of your model" in str(caught.value)


def quantized(case: CaseMaker, *, symmetric: bool = False, packed: bool = False, act: bool = False) -> Any:
    k = case("dream")
    k.apply(QuantizeWeights(4, 32, symmetric, method=Rtn()))
    if act:
        k.apply(QuantizeActivations())
    if packed:
        k.apply(Pack())
    k.ctx.facts -= {"float-weights"}
    judge(k, {"normal-form", "quantized-weights"})
    return k


def test_every_captured_model_is_legal(every_case: Any) -> None:
    judge(every_case)
    assert {"normal-form", "float-weights", "float-activations", "float-attention"} == FACTS_OF_CAPTURE


# L1


def test_l1_a_node_used_before_its_definition(case: CaseMaker) -> None:
    k = case("llada")
    early, late = list(linears(k.graph.nodes, k.ctx.weights))[:2]
    early.node.append(k.graph.output_node().prev)
    late.node.replace_input_with(late.x, k.graph.output_node().prev)
    refused(k, r"law L1 is broken .*used before it has been defined|law L1 is broken .*topological")


def test_l1_a_node_that_was_erased_elsewhere(case: CaseMaker) -> None:
    k = case("llada")
    stranger = fx.Graph().placeholder("stranger")
    first(k.graph, LINEAR).update_arg(0, stranger)
    refused(k, r"law L1 is broken .*stranger")


# L2


def test_l2_two_placeholders(case: CaseMaker) -> None:
    k = case("llada")
    with k.graph.inserting_after(k.node("input_ids")):
        k.graph.placeholder("positions").meta["val"] = k.node("input_ids").meta["val"]
    refused(k, r"law L2 .*: 2 placeholders and 1 outputs, must be one of each")


def test_l2_ids_of_another_type(case: CaseMaker) -> None:
    k = case("llada")
    ids = k.node("input_ids")
    ids.meta["val"] = ids.meta["val"].to(torch.int32)
    refused(k, r"law L2 .*: %input_ids is not int64 \[batch, length\]")


def test_l2_logits_of_the_wrong_width(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.spec = dataclasses.replace(k.ctx.spec, vocab_size=62)
    refused(k, r"law L2 .*: the logits have 61 columns, the model declares 62")


@pytest.mark.parametrize("what", ["none", "ids", "tuple"])
def test_l2_an_output_that_is_no_logits(case: CaseMaker, what: str) -> None:
    k = case("llada")
    out = k.graph.output_node()
    out.args = ({"none": None, "ids": k.node("input_ids"), "tuple": (out.args[0],)}[what],)
    refused(k, r"law L2 .*: the output is not floating-point logits \[batch, length, vocabulary\]")


# L3


def test_l3_an_unknown_constant(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.weights.drop("model.transformer.ln_f.weight")
    refused(k, r"law L3 .*: %\w+ reads 'model\.transformer\.ln_f\.weight', which is no constant of the model")


def test_l3_a_constant_that_nobody_reads(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.weights.put("left.over", torch.zeros(3))
    refused(k, r"law L3 .*: constant 'left\.over' is read by nobody")


def test_l3_a_shape_that_is_not_the_constants(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.weights.put("model.transformer.ln_f.weight", torch.ones(65))
    refused(k, r"law L3 .*: %\w+ says \[64\], constant 'model\.transformer\.ln_f\.weight' has \[65\]")


# L4


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (os.system, "system"),
        (math.sin, "sin"),
        (torch.nn.functional.linear, "linear"),
        (aten.relu, "relu"),
        (eval, "eval"),
    ],
)
def test_l4_a_function_outside_the_allowed_ops(case: CaseMaker, target: Any, name: str) -> None:
    k = case("llada")
    with k.graph.inserting_before(k.graph.output_node()):
        node = k.graph.call_function(target, (k.graph.output_node().args[0],))
    node.meta["val"] = k.graph.output_node().args[0].meta["val"]
    refused(k, rf"law L4 .*: %\w+ calls .*{name}.*, which is outside the allowed ops")
    assert not allowed(target)


@pytest.mark.parametrize("op", ["call_method", "call_module"])
def test_l4_methods_and_modules(case: CaseMaker, op: str) -> None:
    k = case("llada")
    with k.graph.inserting_before(k.graph.output_node()):
        node = k.graph.create_node(op, "relu", (k.graph.output_node().args[0],))
    refused(k, rf"law L4 .*: %{node.name} is a {op}")


# L5


def test_l5_a_value_of_the_wrong_dtype(case: CaseMaker) -> None:
    k = case("llada")
    node = first(k.graph, LINEAR)
    node.meta["val"] = node.meta["val"].to(torch.float16)
    refused(k, r"law L5 .*: %linear says float16\[.*, 64\], propagation gives float32\[.*, 64\]")


def test_l5_a_value_of_the_wrong_shape(case: CaseMaker) -> None:
    k = case("llada")
    node = first(k.graph, LINEAR)
    node.meta["val"] = node.meta["val"][..., :63]
    refused(k, r"law L5 .*: %linear says float32\[.*, 63\], propagation gives float32\[.*, 64\]")


def test_l5_a_node_without_a_value(case: CaseMaker) -> None:
    k = case("llada")
    del first(k.graph, LINEAR).meta["val"]
    refused(k, r"law L5 .*: %linear has no value")


def test_l5_arguments_that_do_not_fit(case: CaseMaker) -> None:
    k = case("llada")
    node = next(s.node for s in linears(k.graph.nodes, k.ctx.weights) if s.in_features == 96)
    node.update_arg(0, k.node("rms_norm"))
    refused(k, rf"law L5 .*: %{node.name} cannot be computed from its arguments: .*")


def test_l5_can_be_left_out(case: CaseMaker) -> None:
    k = case("llada")
    del k.node("silu").meta["val"]
    check(k.graph, k.ctx.weights, k.ctx.spec, set(), after="x", propagate=False)
    refused(k, "law L5")


# L6


def test_l6_a_matrix_read_by_two_modules(case: CaseMaker) -> None:
    k = case("llada")
    q, other = list(linears(k.graph.nodes, k.ctx.weights))[:2]
    other.node.update_arg(1, q.node.args[1])
    k.graph.eliminate_dead_code()
    k.ctx.weights.drop(other.weight)
    refused(k, rf"law L6 .*: constant '{q.weight}' is read by %linear, %linear_1, and is not a declared tie")
    old = k.ctx.weights[q.weight]
    k.ctx.weights.define(q.weight, dataclasses.replace(old, aliases=(q.weight, other.weight)))
    judge(k)


# L7


def swap(k: Any, role: int, tensor: torch.Tensor) -> None:
    """Give the first quantized linear another constant."""
    node = next(n for n in k.graph.nodes if is_call(n, LINEAR_Q, LINEAR_PACKED))
    old = node.args[role]
    k.ctx.weights.put("planted", tensor)
    node.update_arg(role, read(k.graph, k.ctx.weights, "planted", node))
    if not old.users:
        k.graph.erase_node(old)
        k.ctx.weights.drop(str(old.target))


@pytest.mark.parametrize(
    ("packed", "role", "tensor", "message"),
    [
        (False, 1, torch.zeros(64, 60, dtype=torch.uint8), r"codes 'planted' is \[64, 60\], must be \[64, 64\]"),
        (False, 1, torch.zeros(64, 64, dtype=torch.int8), r"codes 'planted' is torch\.int8, must be torch\.uint8"),
        (False, 2, torch.ones(64, 3, dtype=torch.bfloat16), r"scales 'planted' is \[64, 3\], must be \[64, 2\]"),
        (
            False,
            2,
            torch.ones(64, 2, dtype=torch.float64),
            r"scales 'planted' is torch\.float64, must be torch\.bfloat16",
        ),
        (False, 3, torch.zeros(2, 64, dtype=torch.uint8), r"zeros 'planted' is \[2, 64\], must be \[64, 2\]"),
        (False, 3, torch.zeros(64, 2), r"zeros 'planted' is torch\.float32, must be torch\.uint8"),
        (False, 4, torch.zeros(63), r"bias is not a constant of shape \[64\]"),
        (True, 1, torch.zeros(64, 64, dtype=torch.uint8), r"codes 'planted' is \[64, 64\], must be \[64, 32\]"),
        (True, 2, torch.ones(64, 1, dtype=torch.bfloat16), r"scales 'planted' is \[64, 1\], must be \[64, 2\]"),
        (True, 3, torch.zeros(64, 2, dtype=torch.uint8), r"zeros 'planted' is \[64, 2\], must be \[64, 4\]"),
    ],
)
def test_l7_parts_of_the_wrong_shape_or_type(
    case: CaseMaker, packed: bool, role: int, tensor: torch.Tensor, message: str
) -> None:
    k = quantized(case, packed=packed)
    swap(k, role, tensor)
    with pytest.raises(ContractError, match=rf"law L7 .*: %linear_\w+: {message}"):
        check(k.graph, k.ctx.weights, k.ctx.spec, set(), after="x", propagate=False)


def test_l7_a_group_that_does_not_divide(case: CaseMaker) -> None:
    k = quantized(case)
    first(k.graph, LINEAR_Q).update_arg(6, 48)
    refused(k, r"law L7 .*: 64 input features do not divide by group 48", set())


def test_l7_codes_that_are_computed(case: CaseMaker) -> None:
    k = quantized(case, symmetric=True)
    node = first(k.graph, LINEAR_Q)
    node.update_arg(1, call_before(k.graph, node, aten.clone.default, (node.args[1],)))
    refused(k, r"law L7 .*: %linear_q_default: codes is no constant", set())


def test_l7_a_bias_that_is_computed(case: CaseMaker) -> None:
    k = quantized(case)
    node = first(k.graph, LINEAR_Q)
    node.update_arg(4, call_before(k.graph, node, aten.clone.default, (node.args[4],)))
    refused(k, r"law L7 .*: bias is not a constant of shape \[64\]", set())


def test_l7_an_activation_quantizer_without_a_reader(case: CaseMaker) -> None:
    k = case("llada")
    silu = k.node("silu")
    after = call_before(k.graph, silu.next, QUANTIZE_ACT, (silu, 8, 0, True))
    silu.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    refused(k, r"law L7 .*: %quantize_act_default quantizes activations that no quantized linear reads", set())


def test_l7_zero_readers_are_none_either(case: CaseMaker) -> None:
    k = case("llada")
    silu = k.node("silu")
    call_before(k.graph, silu.next, QUANTIZE_ACT, (silu, 8, 0, True))
    refused(k, r"law L7 .*: %quantize_act_default quantizes activations that no quantized linear reads", set())


CODED = QuantizeWeights(format=Nf4Format(32), method=Rtn())


@pytest.mark.parametrize(
    ("role", "tensor", "message"),
    [
        (0, torch.zeros(64, 64, dtype=torch.uint8), r"codes is uint8\[64, 64\], must be uint8\[64, 32\]"),
        (0, torch.zeros(64, 32, dtype=torch.int8), r"codes is int8\[64, 32\], must be uint8\[64, 32\]"),
        (1, torch.zeros(2), r"scale_mean is float32\[2\], must be float32\[1\]"),
        (3, torch.zeros(64, 2), r"scales is float32\[64, 2\], must be uint8\[64, 2\]"),
    ],
)
def test_l7_parts_of_a_coded_linear(case: CaseMaker, role: int, tensor: torch.Tensor, message: str) -> None:
    k = case("llada")
    k.apply(CODED)
    judge(k, set())
    node = first(k.graph, LINEAR_CODED)
    k.ctx.weights.put("planted", tensor)
    parts = list(node.args[1])
    old, parts[role] = parts[role], read(k.graph, k.ctx.weights, "planted", node)
    node.update_arg(1, parts)
    k.graph.erase_node(old)
    k.ctx.weights.drop(str(old.target))
    refused(k, rf"law L7 .*: %linear_coded\w*: {message}", set())


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (3, "nf4(block=64)", r"'nf4\(block=64\)' spells no weight format"),
        (3, "nf4(block=48,scale_block=256)", "64 input features do not divide by block 48"),
        (3, "fp8(unit=channel)", r"fp8 channel has the parts codes, scales, 4 came"),
        (2, None, None),
    ],
)
def test_l7_the_spec_of_a_coded_linear(case: CaseMaker, index: int, value: object, message: str | None) -> None:
    k = case("llada")
    k.apply(CODED)
    first(k.graph, LINEAR_CODED).update_arg(index, value)
    if message is None:
        judge(k, set())
    else:
        refused(k, rf"law L7 .*: %linear_coded\w*: {message}", set())


def test_l7_a_part_that_is_computed(case: CaseMaker) -> None:
    k = case("llada")
    k.apply(CODED)
    node = first(k.graph, LINEAR_CODED)
    parts = list(node.args[1])
    parts[0] = call_before(k.graph, node, aten.clone.default, (parts[0],))
    node.update_arg(1, parts)
    refused(k, r"law L7 .*: %linear_coded\w*: a part is no constant", set())


def test_facts_see_coded_linears(case: CaseMaker) -> None:
    k = case("llada")
    k.apply(CODED)
    for fact in ("float-weights", "lowered"):
        refused(k, rf"fact '{fact}' does not hold: %linear_coded\w* is dlqc\.linear_coded\.default", {fact})
    refused(k, r"fact 'quantized-activations' does not hold: %linear_coded", {"quantized-activations"})


# L8


def test_l8_a_causal_flag(case: CaseMaker) -> None:
    k = case("llada")
    sdpa = first(k.graph, SDPA)
    sdpa.args = (*sdpa.args[:3], None, 0.0, True)
    refused(k, r"law L8 .*: %scaled_dot_product_attention is causal, the model declares full attention")
    k.ctx.spec = dataclasses.replace(k.ctx.spec, attention="prefix")
    judge(k)


@pytest.mark.parametrize("additive", [True, False])
def test_l8_a_causal_mask(case: CaseMaker, additive: bool) -> None:
    k = case("llada")
    sdpa, ids = first(k.graph, SDPA), k.node("input_ids")
    row = call_before(k.graph, sdpa, aten.sym_size.int, (ids, 1))
    square = call_before(k.graph, sdpa, aten.new_ones.default, (ids, [row, row]), {"dtype": torch.float32})
    if additive:
        high = call_before(k.graph, sdpa, aten.triu.default, (square, 1))
        mask = call_before(k.graph, sdpa, aten.mul.Tensor, (high, -1e9))
    else:
        low = call_before(k.graph, sdpa, aten.tril.default, (square,))
        mask = call_before(k.graph, sdpa, aten.to.dtype, (low, torch.bool))
    sdpa.update_kwarg("attn_mask", mask)
    refused(k, r"law L8 .*: %scaled_dot_product_attention is causal, the model declares full attention")


# L9


def test_l9_float_weights_and_activations(case: CaseMaker) -> None:
    k = quantized(case, act=True)
    refused(k, r"law L9 .*: fact 'float-weights' does not hold: %linear_q_default is dlqc\.linear_q", {"float-weights"})
    message = r"law L9 .*: fact 'float-activations' does not hold: %quantize_act_default is dlqc\.quantize_act"
    refused(k, message, {"float-activations"})


def test_l9_quantized_weights(case: CaseMaker) -> None:
    message = r"law L9 .*: fact 'quantized-weights' does not hold: no linear is quantized"
    refused(case("llada"), message, {"quantized-weights"})


def test_l9_quantized_activations(case: CaseMaker) -> None:
    message = r"fact 'quantized-activations' does not hold: %linear_q\w* reads activations that are not quantized"
    refused(quantized(case), message, {"quantized-activations"})


def test_l9_packed_and_lowered(case: CaseMaker) -> None:
    refused(quantized(case), r"law L9 .*: fact 'packed' does not hold: %linear_q_default", {"packed"})
    k = quantized(case, packed=True)
    judge(k, {"packed"})
    refused(k, r"law L9 .*: fact 'lowered' does not hold: %linear_packed_default", {"lowered"})


@pytest.mark.parametrize("name", ["llada", "layer norm"])
def test_l9_unit_gain(case: CaseMaker, name: str) -> None:
    k = case(name)
    message = (
        r"law L9 .*: fact 'unit-gain' does not hold: the gain '\S+' of %\w+ is not one, though linears alone read it"
    )
    refused(k, message, {"unit-gain"})
    k.apply(FoldNormScale())
    judge(k, {"unit-gain"})


def test_l9_unit_gain_asks_nothing_of_a_layer_norm_with_a_zero(case: CaseMaker) -> None:
    k = case("layer norm")
    k.apply(FoldNormScale())
    judge(k, {"unit-gain"})
    k.ctx.weights.put("layers.0.norm.weight", torch.arange(32.0))
    judge(k, {"unit-gain"})
    k.ctx.weights.put("layers.0.norm.weight", torch.arange(32.0) + 1)
    refused(k, "fact 'unit-gain' does not hold: the gain 'layers.0.norm.weight'", {"unit-gain"})


@pytest.mark.parametrize("name", ["post norm", "shared"])
def test_l9_unit_gain_asks_nothing_of_norms_that_cannot_give_theirs(case: CaseMaker, name: str) -> None:
    k = case(name)
    k.apply(FoldNormScale())
    judge(k, {"unit-gain"})
    assert any(bool((c.leaf != 1).any()) for n, c in k.ctx.weights.items() if n.endswith("norm.weight"))


def test_every_checked_fact_has_a_test_here() -> None:
    assert set(FACT_CHECKS) == {
        "float-weights",
        "float-activations",
        "float-attention",  # in test_check_activations.py
        "unit-gain",
        "quantized-weights",
        "quantized-activations",
        "packed",
        "lowered",
    }


def test_facts_without_a_check_are_taken_at_their_word(case: CaseMaker) -> None:
    judge(case("llada"), {"states", "normal-form"})
