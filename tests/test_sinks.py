"""Attention mass against a library's own attention maps, and sink-aware weights against their formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import MASK, captured
from zoo import model as zoo_model

from dlqc.calibration import Certainty, ForwardProcess, SinkAware, TokenRows, Uniform, draw_states
from dlqc.errors import CalibrationError, RecipeError
from dlqc.execute import forward
from dlqc.passes.calibrate import Calibrate
from dlqc.samplers import Canvases, Teacher
from dlqc.sinks import attention_mass

CaseMaker = Callable[..., Any]


def ids(rows: int = 3, length: int = 11) -> torch.Tensor:
    found = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(2))
    found[:, ::3] = MASK
    return found


def test_mass_is_what_the_library_s_attentions_give() -> None:
    """BERT shows its attention maps: their column sums over layers, heads and queries."""
    graph, weights, _ = captured("bert")
    model = zoo_model("bert")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids(), output_attentions=True).attentions
    model.set_attn_implementation(before)
    mass = torch.stack([a.double().sum(dim=(1, 2)) for a in maps]).sum(dim=0)
    found = attention_mass(graph, weights, ids())
    torch.testing.assert_close(found, mass / mass.mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert float(found.std()) > 0.01


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_mass_of_grouped_heads_and_rotary_embeddings(name: str) -> None:
    """Spelled out from the queries and keys that the graph hands to its attentions."""
    from dlqc.execute import Executor, placeholder
    from dlqc.graph import args_of
    from dlqc.regions import attentions

    graph, weights, _ = captured(name)
    calls = attentions(list(graph.nodes))
    values = Executor(graph, weights, [placeholder(graph)], [a for c in calls for a in args_of(c)[:2]])(ids())
    total = torch.zeros(3, 11, dtype=torch.float64)
    for q, k in zip(values[::2], values[1::2], strict=True):
        for b in range(3):
            for h in range(q.shape[1]):
                scores = q[b, h].double() @ k[b, h * k.shape[1] // q.shape[1]].double().T / math.sqrt(q.shape[-1])
                total[b] += scores.softmax(dim=-1).sum(dim=0)
    found = attention_mass(graph, weights, ids())
    torch.testing.assert_close(found, total / total.mean(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_model_without_attention_has_no_sinks(case: CaseMaker) -> None:
    k = case("layer norm")
    with pytest.raises(CalibrationError, match=r"^sink_aware: no attention of the model has the tokens for its keys"):
        attention_mass(k.graph, k.ctx.weights, k.ids())


# The weights


def factors(mass: torch.Tensor, weight: SinkAware) -> torch.Tensor:
    """The formula, number by number."""
    count, length = mass.shape
    sink = torch.zeros(count, length, dtype=torch.float64)
    for s in range(count):
        mean = sum(mass[s].tolist()) / length
        spread = math.sqrt(sum((m - mean) ** 2 for m in mass[s].tolist()) / length)
        for j in range(length):
            z = (float(mass[s, j]) - mean) / spread if spread else 0.0
            sink[s, j] = 1 / (1 + math.exp(-weight.sharpness * (z - weight.deviations)))
    out = torch.ones_like(sink)
    for j in range(length):
        steady = float(sink[:, j].mean()) if weight.steady else 0.0
        for s in range(count):
            out[s, j] = 1 - sink[s, j] * (1 - steady)
    return out


@pytest.mark.parametrize("weight", [SinkAware(), SinkAware(deviations=1.0, sharpness=2.0), SinkAware(steady=False)])
def test_the_formula(weight: SinkAware) -> None:
    mass = torch.rand(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass[:, 0], mass[1, 7], mass[4] = 9.0, 12.0, 1.0  # a steady sink, one that comes and goes, a state without any
    found = weight.factors(mass)
    torch.testing.assert_close(found.double(), factors(mass, weight), rtol=1e-5, atol=1e-6)
    assert bool((found >= 0).all())
    assert bool((found <= 1).all())


def test_a_steady_sink_counts_and_one_that_comes_and_goes_does_not() -> None:
    mass = torch.rand(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass[:, 0], mass[3, 17] = 20.0, 20.0
    found = SinkAware(deviations=1.5).factors(mass)
    assert float(found[:, 0].min()) > 0.9
    assert float(found[3, 17]) < 0.1
    assert float(found[4, 17]) > 0.95
    dropped = SinkAware(deviations=1.5, steady=False).factors(mass)
    assert float(dropped[:, 0].max()) < 0.1


@pytest.mark.parametrize("shift", [False, True])
def test_it_multiplies_another_weight_and_belongs_to_the_row_itself(case: CaseMaker, shift: bool) -> None:
    k = case("dream" if shift else "llada")
    spec = k.ctx.spec
    assert spec.shift == shift
    rows = TokenRows(torch.randint(0, 60, (8, 12), generator=torch.Generator().manual_seed(1)), "random")
    mass = torch.rand(8, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mass[2, 6] = 30.0
    given: dict[str, Any] = {"seed": 0, "logits": lambda ids: forward(k.graph, k.ctx.weights, ids)}
    for base in (Uniform(), Certainty()):
        plain = draw_states(rows, ForwardProcess(), base, spec, **given)
        found = draw_states(rows, ForwardProcess(), SinkAware(base), spec, mass=lambda ids: mass, **given)
        assert torch.equal(found.ids, plain.ids)
        expected = plain.weights * SinkAware().factors(mass)
        inner = slice(0, 11)  # the last row of a shifted model predicts nothing: it takes the weight of the one before
        ratio = (found.weights / expected)[:, inner]
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=1e-5)
        assert float(found.weights[2, 6]) < 0.3 * float(plain.weights[2, 6])


def test_calibrate_gives_it_the_model_s_attention(case: CaseMaker) -> None:
    k = case("llada")
    p = Calibrate(weight=SinkAware(deviations=1.0), sequences=6, length=16)
    report = p.apply(k.graph, k.ctx)
    assert "weight sink_aware" in report.notes[0]
    expected = SinkAware(deviations=1.0).factors(attention_mass(k.graph, k.ctx.weights, k.ctx.states.ids))
    torch.testing.assert_close(k.ctx.states.weights, (expected / expected.mean()).float(), rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(
        RecipeError, match=r"^sink_aware\.sharpness: a sigmoid of sharpness 0\.0 tells no sinks\. Use 5$"
    ):
        SinkAware(sharpness=0.0)
    graph, weights, spec = captured("llada")
    teacher = Teacher(lambda ids: forward(graph, weights, ids), spec)
    canvases = Canvases(ids(), ids(), torch.ones(3))
    with pytest.raises(CalibrationError, match=r"^weight: sink-aware weights need the attention of the model"):
        SinkAware().draw(canvases, torch.Generator(), teacher)
