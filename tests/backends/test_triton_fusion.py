"""What the Triton backend joins in graphs; on CPU tensors its ops compute their definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import fx

from dlqc.backends.triton import TritonBackend
from dlqc.graph import args_of, aten, copy_graph, is_call
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.integer import INTEGER
from dlqc.manager import PassManager
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.split_outliers import SplitOutliers
from dlqc.rounding.rtn import Rtn
from dlqc.weights import Weights


class Apart(TritonBackend):
    """The same kernels with nothing joined."""

    def fuse(self, graph: fx.Graph, weights: Weights) -> dict[str, int]:
        return {}


def test_a_model_with_outlier_columns(case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The product on the columns, the factor that takes them out and the sum of the residual stream are in one call, where a call
    is one linear: output and down of each block."""
    monkeypatch.setattr(runtime, "unavailable", lambda: None)
    logits = []
    split, rounded = SplitOutliers(threshold=0.0, share=0.05), QuantizeWeights(8, None, method=Rtn())
    packed = case("llada", TritonBackend())
    PassManager((split, rounded, QuantizeActivations(8), Pack())).run(packed.graph, packed.ctx)
    for backend in (TritonBackend(), Apart()):
        ctx = replace(packed.ctx, weights=packed.ctx.weights.clone(), backend=backend)
        k = replace(packed, graph=copy_graph(packed.graph), ctx=ctx)
        metrics, sums = k.apply(Lower()).metrics, sum(is_call(node, aten.add.Tensor) for node in k.graph.nodes)
        if not isinstance(backend, Apart):
            assert (metrics["fused_outliers"], metrics["fused_residual"]) == (4, 4)
            joined = [args_of(node) for node in k.graph.nodes if is_call(node, INTEGER)]
            assert [len(a) for a in joined].count(20) == 4
            assert all(a[0] is a[17] and a[12] is not None and a[16] is not None for a in joined if len(a) == 20)
            assert sums == 5 * 2  # of query, key, value, gate and up, whose linears are two calls
        logits.append(k.forward(k.ids(2, 10)))
    together, apart = logits
    assert float((together - apart).norm() / apart.norm()) < 1e-2
