"""The zoo: every class captures into the same few ops, and computes what its model computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn
from zoo import MASK, VOCAB, ZOO, captured, model

from dlqc.blocks import find_blocks
from dlqc.capture import logits_of_output
from dlqc.check import check
from dlqc.contract import FACTS_OF_CAPTURE
from dlqc.execute import forward
from dlqc.graph import EMBEDDING, LAYER_NORM, LINEAR, NORMS, RMS_NORM, SDPA, arg, aten, constant_name, is_call, linears
from dlqc.ops import ROPE
from dlqc.routers import is_router

#: Share of the largest logit; two layers of float32 give a few 1e-7.
BOUND = 1e-5


def ids(ratio: float, batch: int = 3, length: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(100 * ratio))
    rows = torch.randint(0, VOCAB - 1, (batch, length), generator=generator)
    return torch.where(torch.rand(rows.shape, generator=generator) < ratio, MASK, rows)


def eager(m: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits_of_output(m(rows))


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ZOO)
def test_graph_equals_eager_at_every_mask_ratio(name: str, dtype: torch.dtype) -> None:
    graph, weights, spec = captured(name)
    check(graph, weights, spec, set(FACTS_OF_CAPTURE), after="capture")
    m = model(name) if dtype is torch.float32 else copy.deepcopy(model(name)).double()
    for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
        expected = eager(m, ids(ratio))
        assert deviation(forward(graph, weights, ids(ratio), dtype=dtype), expected) < BOUND


@pytest.mark.parametrize("name", ZOO)
def test_no_gain_and_no_bias_of_a_norm_is_idle(name: str) -> None:
    """Each is far from its neutral value, and setting it there changes the logits by much more than the bound."""
    graph, weights, _ = captured(name)
    before = forward(graph, weights, ids(0.5))
    for node in graph.nodes:
        if not is_call(node, *NORMS):
            continue
        roles = {"weight": 1.0} | ({"bias": 0.0} if is_call(node, LAYER_NORM) else {})
        for index, (role, neutral) in enumerate(roles.items(), start=2):
            constant = constant_name(arg(node, index, role))
            assert constant is not None, f"{node.name} has no constant {role}"
            other = weights.clone()
            other.put(constant, torch.full(weights[constant].shape, neutral))
            assert deviation(forward(graph, other, ids(0.5)), before) > 100 * BOUND, constant


@pytest.mark.parametrize("name", ZOO)
def test_no_bias_of_a_linear_is_zero(name: str) -> None:
    graph, weights, _ = captured(name)
    biases = [site.bias for site in linears(graph.nodes, weights) if site.bias is not None]
    assert all(float(weights.value(bias).abs().mean()) > 0.1 for bias in biases)
    assert bool(biases) == (name in {"llada-biased", "dream", "llama", "qwen2", "bert", "gpt2"})


#: Ops of the normal form: RMS norms, layer norms, linears, rotations, attentions, embeddings; then blocks.
NORMAL: dict[str, tuple[int, ...]] = {
    "llada": (7, 0, 22, 6, 3, 1, 3),
    "llada-biased": (5, 0, 15, 4, 2, 1, 2),
    "dream": (5, 0, 15, 4, 2, 1, 2),
    "llada-moe": (9, 0, 2 * (4 + 1 + 6 * 3) + 1, 4, 2, 1, 2),
    "llama": (5, 0, 15, 4, 2, 1, 2),
    "qwen2": (5, 0, 15, 4, 2, 1, 2),
    "qwen3": (9, 0, 15, 4, 2, 1, 2),
    "gemma": (5, 0, 15, 4, 2, 1, 2),
    "bert": (0, 6, 14, 0, 2, 3, 2),
    "gpt2": (0, 5, 13, 0, 2, 2, 2),
}
#: What else may stand on the way from an embedding to the logits.
GLUE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.reshape.default,
    aten.transpose.int,
    aten.silu.default,
    aten.gelu.default,
}
#: The routing of experts, and a GELU that its model spells out.
ALSO: dict[str, set[Any]] = {
    "llada-moe": {aten.softmax.int, aten.topk.default, aten.zeros_like.default, aten.scatter.src, aten.split.Tensor},
    "gpt2": {aten.pow.Tensor_Scalar, aten.tanh.default},
}


@pytest.mark.parametrize("name", ZOO)
def test_normal_form(name: str) -> None:
    graph, weights, _ = captured(name)
    ops = (RMS_NORM, LAYER_NORM, LINEAR, ROPE, SDPA, EMBEDDING)
    counts = tuple(sum(is_call(node, op) for node in graph.nodes) for op in ops)
    assert (*counts, len(find_blocks(graph))) == NORMAL[name]
    assert sum(1 for _ in linears(graph.nodes, weights)) == counts[2], "a linear on something that is no constant"


@pytest.mark.parametrize("name", ZOO)
def test_only_known_ops_lie_between_embedding_and_logits(name: str) -> None:
    graph, _, _ = captured(name)
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if is_call(node, EMBEDDING) or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    known = {RMS_NORM, LAYER_NORM, LINEAR, ROPE, SDPA, EMBEDDING} | GLUE | ALSO.get(name, set())
    calls = {node.target for node in reached if node.op == "call_function"}
    assert {str(target) for target in calls - known} <= (
        {"<built-in function getitem>"} if name == "llada-moe" else set()
    )


@pytest.mark.parametrize("name", ZOO)
def test_attention_is_full_and_reads_every_row(name: str) -> None:
    graph, weights, _ = captured(name)
    for node in graph.nodes:
        if is_call(node, SDPA):
            assert arg(node, 3, "attn_mask") is None
            assert not arg(node, 5, "is_causal", False)
    rows = ids(0.0, batch=1)
    before = forward(graph, weights, rows)
    for position in (0, 16):
        other = rows.clone()
        other[0, position] = (rows[0, position] + 7) % MASK
        assert (forward(graph, weights, other) - before).abs().amax(-1).min() > 1e-4


def test_gemma_s_gains_are_constants_under_a_name_of_their_own() -> None:
    graph, weights, _ = captured("gemma")
    state = model("gemma").state_dict()
    gains = [constant_name(arg(node, 2, "weight")) for node in graph.nodes if is_call(node, RMS_NORM)]
    assert gains[0] == "decoder.model.layers.0.input_layernorm.plus_one.weight"
    for gain in gains:
        stored = state[str(gain).replace(".plus_one", "")]
        assert torch.equal(weights.value(str(gain)), stored + 1)
        assert torch.equal(weights.value(str(gain), torch.float64), stored.double() + 1)
    assert not any(name in state and "norm" in name for name in weights)


def test_norms_of_the_heads_know_the_width_of_a_head() -> None:
    for name, width in (("qwen3", 16), ("llada-moe", 8)):
        graph, _, _ = captured(name)
        norms = [node for node in graph.nodes if is_call(node, RMS_NORM) and node.args[1] == [width]]
        assert len(norms) == 4
        assert all(norm.meta["val"].dim() == 4 for norm in norms)


def test_gpt2_s_weights_are_views_of_its_checkpoint() -> None:
    graph, weights, _ = captured("gpt2")
    state = model("gpt2").state_dict()
    sites = {site.name: site for site in linears(graph.nodes, weights)}
    down = sites["decoder.transformer.h.0.mlp.c_proj.transposed"]
    assert torch.equal(weights.value(down.weight), state["decoder.transformer.h.0.mlp.c_proj.weight"].T)
    assert weights[down.weight].leaf.data_ptr() == state["decoder.transformer.h.0.mlp.c_proj.weight"].data_ptr()
    key = sites["decoder.transformer.h.1.attn.c_attn.transposed.rows_48_96"]
    assert torch.equal(weights.value(key.weight), state["decoder.transformer.h.1.attn.c_attn.weight"][:, 48:96].T)


def test_the_only_routers_are_the_mixtures() -> None:
    routers = {
        name: [s.name for s in linears(graph.nodes, weights) if is_router(s.node)]
        for name in ZOO
        for graph, weights, _ in [captured(name)]
    }
    assert routers.pop("llada-moe") == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert not any(routers.values())


def test_a_capture_is_a_fresh_copy() -> None:
    graph, weights, _ = captured("llada")
    for node in reversed(list(graph.nodes)):
        graph.erase_node(node)
    weights.drop("model.transformer.ln_f.weight")
    again, constants, spec = captured("llada")
    assert "model.transformer.ln_f.weight" in constants
    assert (spec.mask_id, spec.vocab_size) == (MASK, VOCAB)
    assert deviation(forward(again, constants, ids(0.5)), eager(model("llada"), ids(0.5))) < BOUND


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_the_zoo_is_always_the_same(name: str) -> None:
    one, two = ZOO[name]().state_dict(), ZOO[name]().state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {tensor.dtype for tensor in one.values() if tensor.is_floating_point()} == {torch.float32}
