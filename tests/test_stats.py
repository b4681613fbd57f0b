"""Statistics of linear inputs, against the same sums written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dlqc.capture import capture
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, ContractError
from dlqc.execute import Executor, logits_node, placeholder
from dlqc.graph import linears
from dlqc.stats import STATISTICS, Collector

CaseMaker = Callable[..., Any]


def collect(case: Any, wanted: set[str], ids: torch.Tensor, c: torch.Tensor, batch: int) -> tuple[Any, Any]:
    """The collector's statistics, and the inputs of every linear by weight name as float64 arrays [rows, K]."""
    sites = list(linears(case.graph.nodes, case.ctx.weights))
    collector = Collector(wanted, sites)
    run = Executor(case.graph, case.ctx.weights, [placeholder(case.graph)], [logits_node(case.graph)])
    for i in range(0, len(ids), batch):
        run(ids[i : i + batch], taps=collector.taps(c[i : i + batch]))
    seen: dict[str, list[np.ndarray]] = {}
    for site in sites:
        value = Executor(case.graph, case.ctx.weights, [placeholder(case.graph)], [site.x])(ids)[0]
        seen.setdefault(site.weight, []).append(value.reshape(-1, value.shape[-1]).double().numpy())
    return collector.result(), seen


@pytest.mark.parametrize("name", ["llada grouped bias", "shared"])
@pytest.mark.parametrize("batch", [2, 5])
def test_equal_the_sums_written_out(case: CaseMaker, name: str, batch: int) -> None:
    k = case(name)
    ids = k.ids(rows=5, length=9)
    c = torch.rand(ids.shape)
    c[:, :3] = 0
    found, inputs = collect(k, set(STATISTICS), ids, c, batch)
    assert found.keys() == inputs.keys()
    for weight, parts in inputs.items():
        x = np.concatenate(parts)
        w = np.tile(c.reshape(-1).double().numpy(), len(parts))
        near = {"rtol": 2e-5, "atol": 2e-5}
        np.testing.assert_allclose(found[weight]["hessian"], (x * w[:, None]).T @ x, **near)
        np.testing.assert_allclose(found[weight]["absmax"], np.abs(x[w > 0]).max(0), **near)
        np.testing.assert_allclose(found[weight]["meanabs"], (w[:, None] * np.abs(x)).sum(0) / w.sum(), **near)
        assert found[weight]["count"] == len(x)
        assert found[weight]["hessian"].dtype is torch.float64


def test_the_shared_layer_saw_three_times_the_rows(case: CaseMaker) -> None:
    k = case("shared")
    ids = k.ids(rows=2, length=5)
    found, _ = collect(k, {"count"}, ids, torch.ones(ids.shape), 2)
    assert {name: int(s["count"]) for name, s in found.items()} == {
        "layers.0.up.weight": 30,
        "layers.0.down.weight": 30,
        "head.weight": 10,
    }


def test_readers_of_one_value_share_its_statistics(case: CaseMaker) -> None:
    k = case("llada")
    found, _ = collect(k, {"hessian"}, k.ids(), torch.ones(3, 12), 3)
    prefix = "model.transformer.blocks.0"
    q, v = found[f"{prefix}.q_proj.weight"]["hessian"], found[f"{prefix}.v_proj.weight"]["hessian"]
    assert q is v
    assert found[f"{prefix}.attn_out.weight"]["hessian"] is not q


def test_asking_twice_gives_the_same(case: CaseMaker) -> None:
    k = case("shared")
    sites = list(linears(k.graph.nodes, k.ctx.weights))
    collector = Collector(STATISTICS, sites)
    run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [logits_node(k.graph)])
    run(k.ids(), taps=collector.taps(torch.rand(3, 12)))
    first, second = collector.result(), collector.result()
    for weight, sums in first.items():
        assert all(torch.equal(value, second[weight][name]) for name, value in sums.items())


def test_rows_of_weight_zero_do_not_count(case: CaseMaker) -> None:
    k = case("llada")
    ids = k.ids(rows=2)
    other = ids.clone()
    c = torch.ones(ids.shape)
    c[1] = 0
    other[1] = torch.flip(other[1], (0,)) % 7
    wanted = {"hessian", "absmax", "meanabs"}
    a, _ = collect(k, wanted, ids, c, 2)
    b, _ = collect(k, wanted, other, c, 2)
    for weight, sums in a.items():
        for name, value in sums.items():
            torch.testing.assert_close(value, b[weight][name], rtol=1e-5, atol=1e-5)


def test_all_weights_zero_give_zeros(case: CaseMaker) -> None:
    k = case("layer norm")
    found, _ = collect(k, {"hessian", "absmax", "meanabs"}, k.ids(), torch.zeros(3, 12), 3)
    assert all(bool((value == 0).all()) for sums in found.values() for value in sums.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_name_the_layer(case: CaseMaker, bad: float) -> None:
    k = case("layer norm")
    broken = k.ctx.weights.value("layers.0.up.bias").clone()
    broken[3] = bad
    k.ctx.weights.put("layers.0.up.bias", broken)
    message = r"^layers\.0\.down: NaN or Inf in the input activations \(1 of 64 channels\)\. Check the weights before"
    with pytest.raises(CalibrationError, match=message):
        collect(k, {"absmax"}, k.ids(), torch.ones(3, 12), 3)


def test_an_unknown_statistic_is_named() -> None:
    with pytest.raises(ContractError, match=r"no statistic is called 'hesian'\. Did you mean 'hessian'\?"):
        Collector({"hesian"}, [])


class SequenceFirst(torch.nn.Module):
    """One layer on tokens, computed on [B, L, d] or on [L, B, d]."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.swap = swap
        self.embed = torch.nn.Embedding(32, 16)
        self.inner = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x.transpose(0, 1) if self.swap else x
        x = torch.relu(self.inner(x))
        return self.head(x.transpose(0, 1) if self.swap else x)


def test_token_weights_follow_the_tokens_in_sequence_first_models() -> None:
    ids, c = torch.randint(0, 31, (3, 7)), torch.rand(3, 7)
    hessians = []
    for swap in (False, True):
        captured = capture(SequenceFirst(swap).eval(), DiffusionSpec(mask_id=31, vocab_size=32, max_length=16))
        sites = list(linears(captured.graph.nodes, captured.weights))
        collector = Collector({"hessian"}, sites)
        ends = [placeholder(captured.graph)], [logits_node(captured.graph)]
        Executor(captured.graph, captured.weights, *ends)(ids, taps=collector.taps(c))
        hessians.append(collector.result()["inner.weight"]["hessian"])
    torch.testing.assert_close(hessians[0], hessians[1], rtol=1e-5, atol=1e-5)


def test_token_weights_on_other_rows_than_tokens_are_refused(case: CaseMaker) -> None:
    k = case("llada")
    sites = list(linears(k.graph.nodes, k.ctx.weights))
    collector = Collector({"hessian"}, sites)
    run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [logits_node(k.graph)])
    message = r"reads 10 rows where the states have 8 tokens, so token weights do not apply\. Use weight=uniform"
    with pytest.raises(CalibrationError, match=message):
        run(k.ids(rows=2, length=5), taps=collector.taps(torch.rand(2, 4)))
