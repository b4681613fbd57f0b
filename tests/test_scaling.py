"""Edges that can be scaled: which they are, who shares an entry of s, and what keeps one out of reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.contract import Context, Declined
from dlqc.graph import linears
from dlqc.scaling import Edge, scalable

CaseMaker = Callable[..., Any]
ALL = ("norm", "product", "value", "other")


def found(k: Any) -> list[Edge]:
    edges = list(scalable(k.graph, k.ctx, ALL))
    assert all(isinstance(e, Edge) for e in edges)
    return [e for e in edges if isinstance(e, Edge)]


def test_the_edges_of_a_model_each_once(case: CaseMaker) -> None:
    k = case("dream")
    edges = found(k)
    assert [e.kind for e in edges] == ["norm", "value", "norm", "product"] * 2 + ["norm"]
    first = "model.layers.0.self_attn."
    assert edges[0].readers == {f"{first}{n}_proj.weight": 1 for n in "qkv"}
    assert edges[1].readers == {f"{first}o_proj.weight": 2}
    assert (edges[1].width, edges[1].region.heads) == (32, 2)
    sources = {a.name for a in edges[1].region.sources}
    assert sources == {f"{first}v_proj.weight", f"{first}v_proj.bias"}
    k.ctx.block = k.ctx.blocks[1]
    assert [e.name for e in found(k)] == [e.name for e in edges[4:8]]


def test_scaling_any_edge_keeps_the_function(case: CaseMaker) -> None:
    k = case("dream")
    ids = k.ids()
    before = k.forward(ids, torch.float64)
    for edge in found(k):
        edge.scale(k.ctx.weights, torch.rand(edge.width, dtype=torch.float64) * 4 + 0.25)
    assert deviation(k.forward(ids, torch.float64), before) < 1e-9


def test_entries_of_s_and_channels_of_readers(case: CaseMaker) -> None:
    """2 KV heads of 16 for 4 query heads: query heads 0 and 1 share the first 16 entries."""
    edge = found(case("dream"))[1]
    s = torch.arange(32.0)
    wide = edge.wide(s, 2)
    assert torch.equal(wide, torch.cat((s[:16], s[:16], s[16:], s[16:])))
    assert torch.equal(edge.narrow(wide, 2), s)
    x = torch.arange(64.0)
    assert torch.equal(edge.narrow(x, 2), torch.cat((x[16:32], x[48:])))
    assert torch.equal(edge.mean(x, 2), torch.cat((x[:16] + 8, x[32:48] + 8)))


def test_column_peaks_run_over_readers_and_heads(case: CaseMaker) -> None:
    k = case("dream")
    norm, value = found(k)[:2]
    weights = torch.cat([k.ctx.weights.value(n, torch.float64) for n in norm.readers])
    assert torch.equal(norm.column_peaks(k.ctx.weights), weights.abs().amax(0))
    o = k.ctx.weights.value(next(iter(value.readers)), torch.float64).abs().amax(0)
    expected = torch.stack([torch.maximum(o[h * 32 + j], o[h * 32 + 16 + j]) for h in range(2) for j in range(16)])
    assert torch.equal(value.column_peaks(k.ctx.weights), expected)


def test_a_value_made_elsewhere_is_declined(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")
    block = k.ctx.blocks[0].nodes(k.graph)
    norm = next(linears(block, k.ctx.weights)).x
    monkeypatch.setattr(Context, "nodes", lambda self, graph: [n for n in block if n is not norm])
    first = next(iter(scalable(k.graph, k.ctx, ("norm",))))
    reason = f"%{norm.name} carries the scale outside of the block"
    assert first == Declined("input of model.transformer.blocks.0.q_proj", reason)
