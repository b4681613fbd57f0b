"""Reading and editing the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dlqc.capture import capture
from dlqc.check import check
from dlqc.contract import FACTS_OF_CAPTURE
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.graph import (
    LINEAR,
    RMS_NORM,
    activation_quantizer,
    arg,
    as_linear,
    aten,
    call_before,
    constant_name,
    copy_graph,
    fake_mode,
    fingerprint,
    infer,
    is_call,
    linears,
    module_name,
    read,
    replace,
    structure,
    sweep,
    uses,
    width,
)
from dlqc.ops import QUANTIZE_ACT

CaseMaker = Callable[..., Any]


def test_linears_have_the_names_of_their_modules(case: CaseMaker) -> None:
    k = case("dream")
    sites = list(linears(k.graph.nodes, k.ctx.weights))
    modules = {name: m for name, m in k.model.named_modules() if isinstance(m, nn.Linear)}
    assert [site.name for site in sites] == list(modules)
    for site in sites:
        module = modules[site.name]
        assert (site.in_features, site.out_features) == (module.in_features, module.out_features)
        assert (site.bias is None) == (module.bias is None)
        assert width(site.node) == module.out_features
        assert width(site.x) == module.in_features


@pytest.mark.parametrize(
    ("name", "expected"), [("a.b.weight", "a.b"), ("a.b.codes", "a.b"), ("a.b.packed", "a.b"), ("a.W", "a.W")]
)
def test_module_name(name: str, expected: str) -> None:
    assert module_name(name) == expected


class Odd(nn.Module):
    """Linears that are none: the weight or the bias is computed, or the weight is a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.real = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.real(self.embed(ids))
        x = nn.functional.linear(x, self.real.weight * 2)
        x = nn.functional.linear(x, self.embed.weight[:4], self.vector * 2)
        gate = nn.functional.linear(x, self.vector)
        return nn.functional.linear(x * gate[..., None], self.embed.weight)


def test_only_a_matrix_constant_makes_a_linear() -> None:
    found = capture(Odd().eval(), DiffusionSpec(6, 7, 16))
    assert sum(is_call(node, LINEAR) for node in found.graph.nodes) == 5
    assert [site.name for site in linears(found.graph.nodes, found.weights)] == ["real", "embed"]


def test_arguments_by_position_keyword_and_default(case: CaseMaker) -> None:
    k = case("llada grouped bias")
    sdpa = k.node("scaled_dot_product")
    assert arg(sdpa, 2, "value") is sdpa.args[2]
    assert arg(sdpa, 9, "enable_gqa") is True
    assert arg(sdpa, 5, "is_causal", False) is False
    assert constant_name(sdpa) is None
    assert constant_name(None) is None


def test_uses_are_all_calls_that_read_a_constant(case: CaseMaker) -> None:
    k = case("shared")
    assert [n.name for n in uses(k.graph, "layers.0.up.weight")] == ["linear", "linear_2", "linear_4"]
    assert uses(k.graph, "nothing") == []


def test_an_inserted_call_has_its_shape_and_leaves_a_legal_graph(case: CaseMaker) -> None:
    k = case("llada")
    norm = next(n for n in k.graph.nodes if is_call(n, RMS_NORM))
    site = next(linears(norm.users, k.ctx.weights))
    k.ctx.weights.put("extra", torch.ones(64))
    constant = read(k.graph, k.ctx.weights, "extra", site.node)
    assert constant.meta["val"].fake_mode is fake_mode(k.graph)
    product = call_before(k.graph, site.node, aten.mul.Tensor, (norm, constant))
    assert str(product.meta["val"].shape) == str(norm.meta["val"].shape)
    site.node.replace_input_with(norm, product)
    check(k.graph, k.ctx.weights, k.ctx.spec, set(FACTS_OF_CAPTURE), after="the test")


def test_infer_without_tensors() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(operator.add, (2, 3))
    infer(node)
    assert node.meta["val"] == 5


def test_replace_hands_on_the_boundary_and_the_module(case: CaseMaker) -> None:
    k = case("llada")
    old = k.ctx.blocks[0].output(k.graph)
    new = call_before(k.graph, old, old.target, old.args)
    replace(old, new)
    assert k.ctx.blocks[0].output(k.graph) is new
    assert k.ctx.blocks[1].input(k.graph) is new
    assert new.meta["nn_module_stack"] == old.meta["nn_module_stack"]
    assert old not in list(k.graph.nodes)


def test_sweep_takes_dead_calls_and_their_constants_only(case: CaseMaker) -> None:
    k = case("llada")
    before = structure(k.graph)
    sweep(k.graph, k.ctx.weights)
    assert structure(k.graph) == before
    k.ctx.weights.put("extra", torch.ones(64))
    at = k.node("linear")
    call_before(k.graph, at, aten.neg.default, (read(k.graph, k.ctx.weights, "extra", at),))
    assert structure(k.graph) != before
    sweep(k.graph)
    assert structure(k.graph) == before
    assert "extra" in k.ctx.weights
    sweep(k.graph, k.ctx.weights)
    assert "extra" not in k.ctx.weights


def test_a_copy_is_alike_and_independent(case: CaseMaker) -> None:
    k = case("llada")
    other = copy_graph(k.graph)
    assert structure(other) == structure(k.graph)
    assert all(a is not b for a, b in zip(other.nodes, k.graph.nodes, strict=True))
    first = next(n for n in other.nodes if is_call(n, RMS_NORM))
    first.meta["mark"] = True
    first.replace_all_uses_with(first.args[0])
    assert structure(other) != structure(k.graph)
    assert all("mark" not in n.meta for n in k.graph.nodes)


def test_the_fingerprint_sees_structure_shapes_and_constants(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    assert fingerprint(copy_graph(k.graph), k.ctx.weights.clone()) == mark
    other = copy_graph(k.graph)
    next(n for n in other.nodes if is_call(n, RMS_NORM)).update_arg(3, 1e-3)
    assert fingerprint(other, k.ctx.weights) != mark
    weights = k.ctx.weights.clone()
    weights.put("model.transformer.ln_f.weight", torch.ones(64))
    assert fingerprint(k.graph, weights) != mark


def test_the_structure_reads_like_a_listing(case: CaseMaker) -> None:
    lines = structure(case("layer norm").graph).splitlines()
    assert "%linear = call_function aten.linear.default(layer_norm, " in "\n".join(lines)
    assert lines[-1] == "%output = output output(linear_4)"
    assert any(line.endswith(": float32[61, 32]") for line in lines)


def test_activation_quantizer(case: CaseMaker) -> None:
    k = case("layer norm")
    site = next(linears(k.graph.nodes, k.ctx.weights))
    assert activation_quantizer(site.node) is None
    quantized = call_before(k.graph, site.node, QUANTIZE_ACT, (site.x, 8, 0, True))
    site.node.replace_input_with(site.x, quantized)
    assert activation_quantizer(site.node) is quantized
    assert as_linear(quantized, k.ctx.weights) is None
