"""Statistics of linear inputs, against the same sums written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dlqc import stats
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
        before = moved(case, ids[i : i + batch]) if "drift" in wanted else None
        run(ids[i : i + batch], taps=collector.taps(c[i : i + batch], exact=before))
    seen: dict[str, list[np.ndarray]] = {}
    for site in sites:
        value = Executor(case.graph, case.ctx.weights, [placeholder(case.graph)], [site.x])(ids)[0]
        seen.setdefault(site.weight, []).append(value.reshape(-1, value.shape[-1]).double().numpy())
    return collector.result(), seen


def moved(case: Any, ids: torch.Tensor) -> dict[Any, torch.Tensor]:
    """Other values for all inputs of linears, as another model would give."""
    nodes = list(dict.fromkeys(site.x for site in linears(case.graph.nodes, case.ctx.weights)))
    values = Executor(case.graph, case.ctx.weights, [placeholder(case.graph)], nodes)(ids)
    return {node: value + value.flip(-1) * 0.3 for node, value in zip(nodes, values, strict=True)}


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
        np.testing.assert_allclose(found[weight]["energy"], (w[:, None] * x**2).sum(0), **near)
        np.testing.assert_allclose(found[weight]["mean"], w @ x / w.sum(), **near)
        drift = (np.flip(x, -1) * 0.3 * w[:, None]).T @ x
        np.testing.assert_allclose(found[weight]["drift"], drift, **near)
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
    run(k.ids(), taps=collector.taps(torch.rand(3, 12), exact=moved(k, k.ids())))
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_before_rounding_name_the_layer(case: CaseMaker, bad: float) -> None:
    k = case("layer norm")
    collector = Collector({"drift"}, list(linears(k.graph.nodes, k.ctx.weights)))
    run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [logits_node(k.graph)])
    exact = moved(k, k.ids())
    next(iter(exact.values()))[0, 0, 5] = bad
    message = (
        r"^layers\.0\.up: NaN or Inf in the input activations of the model before rounding \(1 of 32 channels\)\. "
        r"Check the weights before this layer and the calibration text$"
    )
    with pytest.raises(CalibrationError, match=message):
        run(k.ids(), taps=collector.taps(torch.ones(3, 12), exact=exact))


def test_paired_statistics_need_the_pair(case: CaseMaker) -> None:
    k = case("layer norm")
    collector = Collector({"drift"}, list(linears(k.graph.nodes, k.ctx.weights)))
    run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [logits_node(k.graph)])
    message = (
        r"^statistics: the statistic 'drift' compares with the model before rounding, and what that reads here was not "
        r"given\. Collect it by a PassManager, over blocks$"
    )
    with pytest.raises(ContractError, match=message):
        run(k.ids(), taps=collector.taps(torch.ones(3, 12)))


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


# Samples


def sampled(
    case: Any, ids: torch.Tensor, c: torch.Tensor, masked: torch.Tensor | None, batch: int
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The samples, and all rows that each linear reads, by weight name."""
    sites = list(linears(case.graph.nodes, case.ctx.weights))
    collector = Collector({"sample", "masked"}, sites)
    nodes = [site.x for site in sites]
    run = Executor(case.graph, case.ctx.weights, [placeholder(case.graph)], nodes)
    rows: dict[str, list[torch.Tensor]] = {site.weight: [] for site in sites}
    for i in range(0, len(ids), batch):
        flags = None if masked is None else masked[i : i + batch]
        found = run(ids[i : i + batch], taps=collector.taps(c[i : i + batch], flags))
        for site, x in zip(sites, found, strict=True):
            rows[site.weight].append(x.reshape(-1, x.shape[-1]))
    return collector.result(), {name: torch.cat(parts) for name, parts in rows.items()}


def which(sample: torch.Tensor, rows: torch.Tensor) -> list[int]:
    """The position of each sampled row among all rows."""
    return [int(index) for row in sample for index in (rows == row).all(1).nonzero()[:1, 0]]


def distinct(case: Any, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids at random, and which are masked; attention makes every row of the second layer different."""
    return case.ids(rows=rows, length=length), case.ids(rows=rows, length=length) == case.ctx.spec.mask_id


DEEP = "model.transformer.blocks.1.{}.weight"


@pytest.mark.parametrize("batch", [2, 6])
def test_a_sample_holds_rows_of_positive_weight_with_their_flags(case: CaseMaker, batch: int) -> None:
    k = case("llada")
    ids, masked = distinct(k, 6, 16)
    c = torch.rand(ids.shape)
    c[:, ::3] = 0
    found, rows = sampled(k, ids, c, masked, batch)
    for name in ("q_proj", "up_proj", "ff_out"):
        weight = DEEP.format(name)
        sample, flags = found[weight]["sample"], found[weight]["masked"]
        index = which(sample, rows[weight])
        assert sorted(set(index)) == (c.reshape(-1) > 0).nonzero()[:, 0].tolist()  # fewer than 512: all of them, once
        assert len(index) == len(sample)
        assert torch.equal(flags, masked.reshape(-1)[index])
        assert flags.dtype is torch.bool


def test_a_sample_is_no_larger_than_it_says_and_the_same_for_all_readers(
    case: CaseMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "SAMPLE", 10)
    k = case("llada")
    ids, masked = distinct(k, 6, 16)
    c = torch.rand(ids.shape)
    found, rows = sampled(k, ids, c, masked, 2)
    again, _ = sampled(k, ids, c, masked, 2)
    picks = {name: which(found[DEEP.format(name)]["sample"], rows[DEEP.format(name)]) for name in ("q_proj", "ff_out")}
    assert len(set(picks["q_proj"])) == 10
    assert picks["q_proj"] == picks["ff_out"]
    for weight, values in found.items():
        assert all(torch.equal(value, again[weight][name]) for name, value in values.items())
    assert found[DEEP.format("q_proj")]["sample"] is found[DEEP.format("v_proj")]["sample"]


def test_heavy_rows_are_drawn_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """For two rows of weight 3 and 1 and a sample of one, the first is drawn three times in four."""
    monkeypatch.setattr(stats, "SAMPLE", 1)
    drawn = 0
    for batch in range(2000):
        collector = Collector({"sample"}, [])
        collector._batches = batch  # the seed
        sums: dict[str, torch.Tensor] = {}
        node = torch.fx.Graph().placeholder("x")
        node.meta["val"] = torch.zeros(1, 2)
        collector._draw(node, torch.tensor([[1.0], [0.0]]), torch.tensor([3.0, 1.0]), sums)
        drawn += int(sums["sample"][0, 0])
    assert abs(drawn / 2000 - 0.75) < 0.05  # five standard deviations


def test_without_flags_nothing_is_masked_and_without_weight_nothing_is_drawn(case: CaseMaker) -> None:
    k = case("layer norm")
    found, _ = sampled(k, k.ids(), torch.ones(3, 12), None, 3)
    assert all(not bool(sums["masked"].any()) and len(sums["sample"]) == 36 for sums in found.values())
    found, _ = sampled(k, k.ids(), torch.zeros(3, 12), None, 3)
    assert all(sums["sample"].shape[0] == sums["masked"].shape[0] == 0 for sums in found.values())


def test_flags_follow_the_tokens_in_sequence_first_models() -> None:
    ids, masked = torch.randint(0, 31, (3, 7)), torch.rand(3, 7) < 0.5
    flags = []
    for swap in (False, True):
        captured = capture(SequenceFirst(swap).eval(), DiffusionSpec(mask_id=31, vocab_size=32, max_length=16))
        sites = list(linears(captured.graph.nodes, captured.weights))
        collector = Collector({"sample", "masked"}, sites)
        ends = [placeholder(captured.graph)], [logits_node(captured.graph)]
        Executor(captured.graph, captured.weights, *ends)(ids, taps=collector.taps(torch.ones(3, 7), masked))
        flags.append(collector.result()["inner.weight"]["masked"])
    assert torch.equal(flags[1], flags[0].reshape(3, 7).T.reshape(-1))
