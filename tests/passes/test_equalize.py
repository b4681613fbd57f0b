"""equalize: both sides of an edge get the same range, by the paper's formula, and the function stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlqc.passes.equalize as module
from dlqc.backend import load_backend
from dlqc.capture import capture
from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import Context, Declined
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError, RecipeError
from dlqc.execute import forward
from dlqc.graph import structure
from dlqc.manager import PassManager
from dlqc.passes.equalize import Equalize, ranges
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn
from dlqc.scaling import Edge, scalable

CaseMaker = Callable[..., Any]
LLADA, DREAM = "model.transformer.blocks.{}.", "model.layers.{}."


class Chain(nn.Module):
    """Three linears in a row with relus between: the middle one belongs to two edges."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.spec = DiffusionSpec(60, 61, 64)
        self.embed, self.norm, self.head = nn.Embedding(61, d), nn.LayerNorm(d), nn.Linear(d, 61)
        self.first, self.second, self.third = nn.Linear(d, 24), nn.Linear(24, 40), nn.Linear(40, d)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.third(F.relu(self.second(F.relu(self.first(self.norm(x)))))))


def chain() -> tuple[nn.Module, Any, Context]:
    torch.manual_seed(3)
    model = Chain().eval()
    for tensor in model.parameters():
        tensor.data = torch.randn(tensor.shape) * torch.rand(tensor.shape[-1]).exp() / 4
    found = capture(model, model.spec)
    return model, found.graph, Context(found.weights, model.spec, load_backend("reference"))


def edges(graph: Any, ctx: Context, *kinds: Any) -> Iterator[Edge]:
    return (e for e in scalable(graph, ctx, kinds or ("product", "value", "other")) if isinstance(e, Edge))


def test_the_formula_on_both_sides(case: CaseMaker) -> None:
    """s = √(r₁/r₂) (eq. 11), the bias scaled, for the gated product and for values."""
    k = case("llada grouped bias")
    state = {n: t.double() for n, t in k.model.state_dict().items()}
    report = Equalize().apply(k.graph, k.ctx)
    assert (report.sites, report.declined) == (4, [])
    value = lambda n: k.ctx.weights.value(n, torch.float64)  # noqa: E731
    for i in range(2):
        up, down, v, o = (LLADA.format(i) + n for n in ("up_proj", "ff_out", "v_proj", "attn_out"))
        s = (state[f"{up}.weight"].abs().amax(1) / state[f"{down}.weight"].abs().amax(0)).sqrt()
        torch.testing.assert_close(value(f"{up}.weight"), state[f"{up}.weight"] / s[:, None], rtol=1e-9, atol=0)
        torch.testing.assert_close(value(f"{up}.bias"), state[f"{up}.bias"] / s, rtol=1e-9, atol=0)
        torch.testing.assert_close(value(f"{down}.weight"), state[f"{down}.weight"] * s, rtol=1e-9, atol=0)
        torch.testing.assert_close(value(f"{down}.bias"), state[f"{down}.bias"], rtol=0, atol=0)
        # KV head g serves query heads 2g and 2g + 1, of 16 channels each.
        columns = state[f"{o}.weight"].abs().amax(0).reshape(2, 2, 16).amax(1).reshape(32)
        s = (state[f"{v}.weight"].abs().amax(1) / columns).sqrt()
        wide = torch.cat([s[h // 2 * 16 : h // 2 * 16 + 16] for h in range(4)])
        torch.testing.assert_close(value(f"{v}.weight"), state[f"{v}.weight"] / s[:, None], rtol=1e-9, atol=0)
        torch.testing.assert_close(value(f"{v}.bias"), state[f"{v}.bias"] / s, rtol=1e-9, atol=0)
        torch.testing.assert_close(value(f"{o}.weight"), state[f"{o}.weight"] * wide, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada tied", "llada grouped bias", "dream"])
@pytest.mark.parametrize("norms", [False, True])
def test_the_function_stays_and_ranges_meet(case: CaseMaker, name: str, norms: bool) -> None:
    k = case(name)
    ids, nodes = k.ids(), structure(k.graph)
    exact, single = k.forward(ids, torch.float64), k.forward(ids, torch.float32)
    report = Equalize(norms=norms, rounds=200).apply(k.graph, k.ctx)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"float-weights"}, after="equalize")
    tied = name == "llada tied"  # its head is the embedding, and cannot take the gain of the last norm
    assert report.sites == (8 + (not tied) if norms else 4)
    assert deviation(k.forward(ids, torch.float64), exact) < 1e-9
    if "bf16" not in name:
        assert deviation(k.forward(ids, torch.float32), single) < 1e-4
    assert structure(k.graph) == nodes
    for edge in edges(k.graph, k.ctx, "product", "value", *(["norm"] if norms else [])):
        r1, r2 = ranges(edge, k.ctx.weights)
        torch.testing.assert_close(r1, r2, rtol=3e-3, atol=0)
    for details in report.details.values():
        assert details["imbalance_before"] > 1.5
        assert details["imbalance_after"] < 1.01
        if not norms:
            assert details["precision_after"] > details["precision_before"]


def test_details_are_restated(case: CaseMaker) -> None:
    k = case("llada")
    state = {n: t.double() for n, t in k.model.state_dict().items()}
    r1 = state[f"{LLADA.format(0)}up_proj.weight"].abs().amax(1)
    r2 = state[f"{LLADA.format(0)}ff_out.weight"].abs().amax(0)
    found = Equalize().apply(k.graph, k.ctx).details[f"{LLADA.format(0)}ff_out"]
    both = (r1 * r2).sqrt()
    assert found["imbalance_before"] == pytest.approx(float((r1 / r2).max() / (r1 / r2).min()))
    assert found["imbalance_after"] == pytest.approx(1)
    assert found["precision_before"] == pytest.approx(float((r1 / r1.max() * r2 / r2.max()).mean()))
    assert found["precision_after"] == pytest.approx(float(((both / both.max()) ** 2).mean()))


def test_a_chain_through_relu_settles() -> None:
    """The middle matrix is scaled by both edges, so that one round is not enough."""
    model, graph, ctx = chain()
    ids = torch.randint(0, 60, (2, 9))
    exact = forward(graph, ctx.weights, ids, dtype=torch.float64)
    once, clone = Equalize(rounds=1), ctx.weights.clone()
    once.apply(graph, replace(ctx, weights=clone))
    gaps = [float((r1 / r2).log().abs().max()) for e in edges(graph, replace(ctx, weights=clone))
            for r1, r2 in [ranges(e, clone)]]  # fmt: skip
    assert max(gaps) > 0.05
    report = Equalize(rounds=300, tolerance=1e-6).apply(graph, ctx)
    assert report.sites == 2
    assert deviation(forward(graph, ctx.weights, ids, dtype=torch.float64), exact) < 1e-9
    value = lambda n: ctx.weights.value(n, torch.float64).abs()  # noqa: E731
    for a, b in itertools.pairwise(("first.weight", "second.weight", "third.weight")):
        torch.testing.assert_close(value(a).amax(1), value(b).amax(0), rtol=1e-4, atol=0)
    assert bool((ctx.weights.value("head.weight") == model.state_dict()["head.weight"]).all())


def test_a_channel_without_range_keeps_its_scale(case: CaseMaker) -> None:
    k = case("llada")
    up, down = (f"{LLADA.format(0)}{n}.weight" for n in ("up_proj", "ff_out"))
    w = k.ctx.weights.value(up).clone()
    w[[2, 7]] = 0
    k.ctx.weights.put(up, w)
    Equalize().apply(k.graph, k.ctx)
    after, before = k.ctx.weights.value(down), k.model.state_dict()[down]
    assert torch.equal(after[:, [2, 7]], before[:, [2, 7]])
    assert not bool((after[:, [3]] == before[:, [3]]).any())


def test_a_second_time_finds_nothing(case: CaseMaker) -> None:
    k = case("dream")
    Equalize().apply(k.graph, k.ctx)
    report = Equalize().apply(k.graph, k.ctx)
    assert (report.sites, report.details) == (0, {})
    assert {d.reason for d in report.declined} == {"it is equalized already"}
    assert len(report.declined) == 4


def test_declines_what_does_not_close(case: CaseMaker) -> None:
    k = case("layer norm")
    report = Equalize(required=False).apply(k.graph, k.ctx)
    gelu = "stuck at %gelu{} (aten.gelu): a nonlinear function of each channel moves only permutations"
    assert report.declined[:2] == [
        Declined("input of layers.0.down", gelu.format("")),
        Declined("input of layers.1.down", gelu.format("_1")),
    ]
    assert report.sites == 0


def test_declines_an_edge_that_no_linear_makes(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")
    monkeypatch.setattr(module, "_ranged", lambda absorb: "up_proj" not in absorb.name)
    report = Equalize().apply(k.graph, k.ctx)
    assert report.declined == [Declined(f"input of {LLADA.format(i)}ff_out", "no linear makes it") for i in range(2)]


# The manager


def test_it_needs_no_data_and_is_certified(case: CaseMaker) -> None:
    k = case("dream")
    k.ctx.states, k.ctx.rows = None, None
    k.ctx.facts.discard("states")
    passes = (Equalize(), QuantizeWeights(group_size=32, method=Rtn()))
    equalized, quantized = (report for _, report in PassManager(passes).run(k.graph, k.ctx))
    assert (equalized.sites, quantized.sites) == (4, 14)
    assert equalized.certificate is not None
    assert 0 < equalized.certificate < 1e-9


def test_a_forgotten_bias_would_show(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the bias of the first linear is not scaled."""

    def forgetful(*args: Any) -> Iterator[Any]:
        for edge in scalable(*args):
            if isinstance(edge, Edge):
                for name in [n for n in edge.region.absorbs if n.endswith(".bias")]:
                    del edge.region.absorbs[name]
            yield edge

    monkeypatch.setattr(module, "scalable", forgetful)
    k = case("llada grouped bias")
    with pytest.raises(ContractError, match=r"pass 'equalize' claims to preserve the function, but it changed by"):
        PassManager((Equalize(),)).run(k.graph, k.ctx)


def test_order() -> None:
    passes = (QuantizeWeights(method=Rtn()), Equalize())
    with pytest.raises(ContractError, match=r"Move 'equalize' before 'quantize_weights', which ends it$"):
        PassManager(passes).check_order()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, r"^equalize\.rounds: 0 rounds do nothing\. 20 is plenty$"),
        ({"tolerance": 0}, r"^equalize\.tolerance: 0 is no tolerance of a factor\. Use a number between 0 and 1"),
        ({"tolerance": 1.5}, r"^equalize\.tolerance: 1\.5 is no tolerance of a factor\."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Equalize(**options)
