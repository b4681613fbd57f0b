"""A model on the Triton backend, interpreted: what is joined and what is not compute the same; sites are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from dlqc.backend import Backend, load_backend
from dlqc.backends.triton import TritonBackend
from dlqc.errors import FeasibilityError
from dlqc.graph import args_of, aten, is_call
from dlqc.kernels.triton.integer import INTEGER
from dlqc.kernels.triton.weight_only import WEIGHT_ONLY
from dlqc.manager import PassManager
from dlqc.ops import TRANSFORM
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.rotate_down import RotateDown
from dlqc.rounding.rtn import Rtn
from dlqc.weights import Weights


class Apart(TritonBackend):
    """The same kernels with nothing joined."""

    def fuse(self, graph: fx.Graph, weights: Weights) -> dict[str, int]:
        return {}


def lowered(case: Callable[..., Any], backend: Backend, *passes: Any) -> tuple[Any, dict[str, float], torch.Tensor]:
    """A case with a lowered graph, what was joined, and logits."""
    k = case("llada", backend)
    for p in (*passes, Pack()):
        k.apply(p)
    metrics = k.apply(Lower()).metrics
    joined = {key.removeprefix("fused_"): n for key, n in metrics.items() if key.startswith("fused_")}
    return k, joined, k.forward(k.ids(1, 7))


BLOCKS = 2


def test_a_model_with_everything_joined(case: Callable[..., Any]) -> None:
    """A block is four calls, with two norms, a gate with its Hadamard blocks and two sums in them; the last norm is in the
    head. Logits are those of the same kernels one by one."""
    passes = (RotateDown(block=32), QuantizeWeights(4, None, method=Rtn()), QuantizeActivations(8))
    k, joined, together = lowered(case, TritonBackend(), *passes)
    sums = 2 * BLOCKS
    assert joined == {"rms_norm": sums + 1, "silu_times": BLOCKS, "hadamard": BLOCKS, "residual": sums}
    assert not any(is_call(node, aten.silu.default, aten.add.Tensor, TRANSFORM) for node in k.graph.nodes)
    kinds = [args_of(node)[10:11] for node in k.graph.nodes if is_call(node, INTEGER)]
    assert kinds == [("rms_norm",), ("as_is",), ("rms_norm",), ("silu_times",)] * BLOCKS + [("rms_norm",)]
    _, joined, apart = lowered(case, Apart(), *passes)
    assert not joined
    assert float((together - apart).norm() / apart.norm()) < 1e-2


def test_16_bit_products_are_those_of_the_reference(case: Callable[..., Any]) -> None:
    passes = (QuantizeWeights(4, None, method=Rtn()), QuantizeActivations(8, 16))
    k, joined, found = lowered(case, TritonBackend(), *passes)
    assert joined == {"residual": 2 * BLOCKS}
    assert sum(is_call(node, WEIGHT_ONLY) for node in k.graph.nodes) == 4 * BLOCKS + 1
    _, _, expected = lowered(case, load_backend("reference"), *passes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sites_without_a_kernel_are_listed(case: Callable[..., Any]) -> None:
    k = case("llada", TritonBackend())
    passes = (QuantizeWeights(4, 16, method=Rtn()), Pack(), Lower())
    with pytest.raises(FeasibilityError) as caught:
        PassManager(passes).run(k.graph, k.ctx)
    said = str(caught.value)
    assert said.count("no kernel of backend 'triton' supports it") == 8
    assert (
        "integer: activations are not quantized; weight_only: weights have a scale per group of 16, it needs a multiple"
        in said
    )
    assert "(and 6 more)" in said
