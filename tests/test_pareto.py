"""The frontier of a recipe, and what is measured of it, against compiling the same assignments."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlqc
from dlqc.diffusion.fidelity import fidelity
from dlqc.errors import FeasibilityError
from dlqc.figures import frontier_figure
from dlqc.formats.integer import IntFormat
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.pareto import Pareto, Study, pareto
from dlqc.passes.assign_bits import AssignBits
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn
from dlqc.schemes import Scheme, overrides_of

ASSIGN = AssignBits("4bpw", bits=(2, 4), group_size=32, method=Rtn(), rows=3, metric="fisher")
PASSES = (
    Calibrate(sequences=6),
    FoldNormScale(),
    ASSIGN,
    QuantizeWeights(group_size=32, method=Rtn()),
    Pack(),
    Lower(),
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 96, "vocab_size": 61}
    made = LLaDAModelLM(LLaDAConfig(max_sequence_length=32, mask_token_id=60, **sizes)).eval()
    for tensor in made.parameters():
        noise = torch.randn(tensor.shape)
        tensor.data = noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1 + 0.3 * noise
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(model: nn.Module, rows: Tensor) -> Pareto:
    return pareto(model, PASSES, calibration=rows, measure=3)


def test_the_whole_frontier_is_there(found: Pareto, model: nn.Module, rows: Tensor) -> None:
    bits, costs = [p.bits for p in found.points], [p.predicted for p in found.points]
    assert bits == sorted(set(bits))
    assert costs == sorted(set(costs), reverse=True)
    assert found.slack == 0
    assert len(found.units) == 8
    # Every budget finds the pass's own choice on it.
    for budget in ("3.3bpw", "4bpw"):
        passes = tuple(dataclasses.replace(p, budget=budget) if isinstance(p, AssignBits) else p for p in PASSES)
        compiled = dlqc.compile(model, passes, calibration=rows, backend="reference", progress=False)
        metrics = compiled.report.steps[2].metrics
        best = [p for p in found.points if p.bits <= float(budget[:-3])][-1]
        assert metrics["bits_per_quantized_weight"] == pytest.approx(best.bits)
        assert metrics["predicted_fisher"] == pytest.approx(best.predicted)
        assert metrics["file_bytes"] == pytest.approx(best.megabytes * 1e6)


def test_measured_points_are_compiled_ones(found: Pareto, model: nn.Module, rows: Tensor) -> None:
    """The same assignment, spelled out as overrides and compiled by itself, is as far from the model."""
    assert len(found.measured) == 3
    assert (found.points[0].kl, found.points[-1].kl) == (found.measured[0].kl, found.measured[-1].kl)
    assert all(point.kl is not None for point in found.uniform.values())
    point = found.measured[1]
    schemes = [Scheme(IntFormat(b, 32, False), Rtn()) for b in (2, 4)]
    assignment = {name: schemes[c] for names, c in zip(found.units, point.choice, strict=True) for name in names}
    passes: list[Any] = [p for p in PASSES if not isinstance(p, AssignBits)]
    passes[2] = QuantizeWeights(group_size=32, method=Rtn(), overrides=overrides_of(assignment))
    compiled = dlqc.compile(model, passes, calibration=rows, backend="reference", progress=False)
    assert compiled.report.storage.bits_per_quantized_weight == pytest.approx(point.bits)
    expected = fidelity(lambda ids: model(ids).logits, compiled, rows, compiled.spec).mean_kl
    assert point.kl is not None
    assert point.kl.mean == pytest.approx(expected.mean, rel=1e-3)
    assert point.kl.low == pytest.approx(expected.low, rel=1e-2)


def test_uniform_assignments_are_the_ends(found: Pareto) -> None:
    assert {label: point.choice for label, point in found.uniform.items()} == {
        "int2 g32 asymmetric by rtn": (0,) * 8,
        "int4 g32 asymmetric by rtn": (1,) * 8,
    }
    assert found.uniform["int4 g32 asymmetric by rtn"].bits == found.points[-1].bits


def test_text_and_data(found: Pareto) -> None:
    text = found.render()
    assert f"{len(found.points)} assignments of 8 units that no other one beats (exact)" in text
    assert text.count("all int") == 2
    assert "predicted fisher" in text
    plain = json.loads(json.dumps(found.to_plain()))
    assert [p["bits"] for p in plain["points"]] == [p.bits for p in found.points]
    assert plain["points"][0]["kl"].keys() == {"mean", "low", "high", "count"}


def test_the_figure_shows_the_numbers(found: Pareto) -> None:
    (ax,) = frontier_figure(found).axes
    assert ax.get_yscale() == "log"
    line = ax.lines[0]
    assert list(line.get_xdata()) == [p.bits for p in found.points]
    assert list(line.get_ydata()) == [p.predicted for p in found.points]
    marks = [list(container.lines[0].get_ydata()) for container in ax.containers]
    assert marks[0] == [p.kl.mean for p in found.measured if p.kl is not None]
    assert [t.get_text() for t in ax.texts] == ["int2", "int4"]
    other = dataclasses.replace(found, metric="mse")
    assert [a.get_ylabel() for a in frontier_figure(other).axes] == [
        "predicted mse, sum over units",
        "measured KL, nats per masked token",
    ]
    bare = dataclasses.replace(found, points=found.points[1:2], uniform={})
    assert len(frontier_figure(bare).axes) == 1


def test_the_recipe_must_assign(model: nn.Module) -> None:
    message = r"^recipe: recipe 'w4a16-rtn' has 0 passes 'assign_bits', must have one\. Use w3\.2a16-mixed-gptq, or add"
    with pytest.raises(FeasibilityError, match=message):
        pareto(model, "w4a16-rtn")
    with pytest.raises(FeasibilityError, match=r"96 input features do not divide by group 128"):
        Study(model, "w3.2a16-mixed-gptq", calibration=torch.zeros(4, 16, dtype=torch.int64))
