"""The laws about quantizers with fixed scales, and about quantizers of what attentions read, refuse planted violations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from dlqc.check import check
from dlqc.contract import FACTS_OF_CAPTURE
from dlqc.errors import ContractError
from dlqc.graph import SDPA, aten, call_before, is_call
from dlqc.heads import Static
from dlqc.manager import PassManager
from dlqc.ops import ATTENTION, QUANTIZE_ACT_STATIC, QUANTIZE_HEADS, QUANTIZE_HEADS_STATIC
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_attention import QuantizeAttention
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.ranges import MinMax
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]


def first(graph: fx.Graph, target: object) -> fx.Node:
    return next(node for node in graph.nodes if is_call(node, target))


def refused(k: Any, message: str, facts: frozenset[str] | set[str] = FACTS_OF_CAPTURE) -> None:
    with pytest.raises(ContractError, match=message):
        check(k.graph, k.ctx.weights, k.ctx.spec, set(facts), after="pass 'planted'")


def fixed(case: CaseMaker) -> Any:
    """A graph with fixed scales at the inputs of linears and at values, for two mask ratios."""
    k = case("llada")
    passes = (
        QuantizeAttention(None, None, 8, 8, v=Static(buckets=2)),
        QuantizeWeights(8, None, True, Rtn()),
        QuantizeActivations(ranges=MinMax(), buckets=2),
    )
    PassManager(passes).run(k.graph, k.ctx)
    return k


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [
        (QUANTIZE_ACT_STATIC, torch.ones(2, 5), r"scales \[2, 5\] do not fit"),
        (QUANTIZE_HEADS_STATIC, torch.ones(2, 3, 1), r"scales \[2, 3, 1\] do not fit"),
        (QUANTIZE_HEADS_STATIC, torch.ones(2, 4), r"scales \[2, 4\] do not fit"),
        (
            QUANTIZE_ACT_STATIC,
            torch.ones(2, 1, dtype=torch.float16),
            r"is torch\.float16\[2, 1\], must be torch\.float32",
        ),
        (QUANTIZE_ACT_STATIC, torch.tensor([[1.0], [0.0]]), r"a scale of \S+ is not positive and finite"),
        (QUANTIZE_HEADS_STATIC, torch.full((2, 4, 1), torch.inf), r"a scale of \S+ is not positive and finite"),
    ],
)
def test_l7_fixed_scales(case: CaseMaker, target: Any, value: torch.Tensor, words: str) -> None:
    k = fixed(case)
    name = str(first(k.graph, target).args[1].target)
    k.ctx.weights.put(name, value)
    for node in k.graph.nodes:
        if node.target == name:
            node.meta["val"] = node.meta["val"].new_empty(value.shape, dtype=value.dtype)
    refused(k, rf"law L7 .*{words}")


def test_l7_several_sets_and_nothing_that_chooses(case: CaseMaker) -> None:
    k = fixed(case)
    node = first(k.graph, QUANTIZE_ACT_STATIC)
    node.args = (*node.args[:3], None, node.args[4])
    refused(k, r"law L7 .* has 2 sets of scales, and nothing chooses among them")


def test_l7_quantizers_that_nobody_asked_for(case: CaseMaker) -> None:
    k = case("llada")
    up = next(n for n in k.graph.nodes if "up_proj" in str(n.args))
    new = call_before(k.graph, up, QUANTIZE_HEADS, (first(k.graph, SDPA), 8, True, False))
    call_before(k.graph, up, aten.neg.default, (new,))
    refused(k, r"law L7 .*: %quantize_heads_default quantizes what no attention reads")


def test_l8_a_causal_attention_with_rounded_probabilities(case: CaseMaker) -> None:
    k = fixed(case)
    node = first(k.graph, ATTENTION)
    node.args = (*node.args[:4], True, *node.args[5:])
    refused(k, r"law L8 .*: %attention_default is causal, the model declares full attention")


def test_l9_float_attention(case: CaseMaker) -> None:
    message = r"law L9 .*: fact 'float-attention' does not hold: %quantize_heads_static_default is dlqc\.quantize_heads"
    refused(fixed(case), message, {"float-attention"})
