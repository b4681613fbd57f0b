"""Recommendations: down the ladder until the model bears it, with the reasons; the estimate near the measurement."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dlqc
from dlqc.diffusion.fidelity import fidelity
from dlqc.errors import CalibrationError, FeasibilityError
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.recipe import as_recipe
from dlqc.recommend import SCENARIOS, Scenario, Trial, recommend

recommending = importlib.import_module("dlqc.recommend")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 128, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 128, "vocab_size": 61}
    made = LLaDAModelLM(LLaDAConfig(max_sequence_length=32, mask_token_id=60, **sizes)).eval()
    for tensor in made.parameters():
        tensor.data = torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else tensor.data
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(0, 60, (12, 16), generator=torch.Generator().manual_seed(1))


def test_the_ladders() -> None:
    assert set(SCENARIOS) == {"general", "quality", "math-code", "extreme", "edge"}
    for scenario in SCENARIOS.values():
        assert scenario.tolerance > 0
        assert not scenario.advice.endswith(".")
        for name in scenario.ladder:
            assert as_recipe(name).passes[-1].name == "lower"
    first = {name: scenario.ladder[0] for name, scenario in SCENARIOS.items()}
    assert first["general"] == "w4a16-gptq"
    assert first["math-code"] == "w8a16-gptq"
    assert first["extreme"] == "w2a16-quant-dllm"
    assert first["edge"] == "w3.2a16-mixed-gptq"
    assert first["quality"] == "w8a8-dllmquant"


def test_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [
        f"| {name} | {', '.join(f'`{rung}`' for rung in s.ladder)} | {s.tolerance:g} |" for name, s in SCENARIOS.items()
    ]
    table = "\n".join(["| scenario | ladder | tolerance, nats |", "|---|---|--:|", *rows])
    assert table in page, f"put this into docs/recipes.md:\n{table}"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder whose rungs are quickly made; the first does not fit the model's width."""
    ladder = ("w2a16-g96-rtn", "w2a16-rtn", "w4a16-rtn", "w8a16-rtn")
    monkeypatch.setitem(SCENARIOS, "short", Scenario("for tests, short ladders", ladder, 0.5))


def test_down_the_ladder(model: nn.Module, rows: Tensor, short: None, tmp_path: Path) -> None:
    found = recommend(model, "short", calibration=rows, tolerance=0.1)
    assert [trial.recipe for trial in found.trials] == ["w2a16-g96-rtn", "w2a16-rtn", "w4a16-rtn"]
    assert found.trials[0].refused is not None
    assert "128 input features do not divide by group 96" in found.trials[0].refused
    kl = [trial.kl for trial in found.trials[1:]]
    assert kl[0] is not None
    assert kl[1] is not None
    assert kl[0] > 0.1 > kl[1]
    assert found.fits
    assert found.recipe == as_recipe("w4a16-rtn")
    assert found.trials[-1].bits == pytest.approx(4 + (16 + 32) / 128)  # a zero point fills a word
    assert found.reasons[0] == "For tests, short ladders"
    assert found.reasons[2].startswith("w2a16-g96-rtn: refused, ")
    assert "beyond 0.1; top-1 agreement" in found.reasons[3]
    assert "within 0.1; top-1 agreement" in found.reasons[4]
    # What is printed is a recipe file.
    (tmp_path / "r.yaml").write_text(found.render())
    assert as_recipe(tmp_path / "r.yaml") == as_recipe("w4a16-rtn")
    assert all(line.startswith("# ") for line in found.render().split("name: ")[0].splitlines())
    plain = json.loads(json.dumps(found.to_plain(), allow_nan=False))
    assert plain["line"] == str(found.recipe)
    assert plain["trials"][0]["kl"] is None
    # The divergence is that of the compiled model on the rows that did not calibrate.
    compiled = dlqc.compile(model, "w4a16-rtn", backend="reference", progress=False)
    held, ratios = rows[[0, 2, 4, 6, 8, 10]], (0.25, 0.5, 0.75)
    table = fidelity(lambda ids: model(ids).logits, compiled, held, compiled.spec, ratios=ratios)
    assert kl[1] == pytest.approx(table.mean_kl.mean, rel=1e-3)
    assert found.trials[-1].worst == pytest.approx(table.mean_kl.high, rel=1e-3)
    assert found.trials[-1].megabytes == pytest.approx(compiled.report.storage.bits / 8e6)


def test_nothing_is_within_the_tolerance(model: nn.Module, rows: Tensor, short: None) -> None:
    found = recommend(model, "short", calibration=rows, tolerance=1e-12)
    assert not found.fits
    assert len(found.trials) == 4
    assert found.recipe == as_recipe("w8a16-rtn")
    assert found.reasons[-1] == (
        "nothing on the ladder stays within 1e-12; this is its safest rung, or keep the model as it is"
    )


def test_the_estimate_is_near(model: nn.Module, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two of three blocks sampled."""
    monkeypatch.setattr(recommending, "_BLOCKS", 2)
    monkeypatch.setitem(SCENARIOS, "one", Scenario("one", ("w3.5a16-mixed-rtn",), 10.0))
    measured = recommend(model, "one", calibration=rows, probe="compile").trials[0]
    estimated = recommend(model, "one", calibration=rows, probe="sites").trials[0]
    assert measured.kl is not None
    assert estimated.kl is not None
    assert 0.4 < estimated.kl / measured.kl < 2.5
    assert estimated.bits == pytest.approx(measured.bits, abs=0.1)
    assert estimated.agreement is None
    assert "by estimate" in estimated.in_words(1.0)


def test_large_models_are_estimated(
    model: nn.Module, rows: Tensor, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommending, "MEASURED_BELOW", 1000)
    found = recommend(model, "short", calibration=rows)
    assert found.reasons[1].startswith("estimated from 4 blocks or fewer on 4 rows")
    assert found.trials[0].refused is not None  # what cannot be done is refused here, too


def test_the_user_s_model_and_its_own_rollouts(model: nn.Module, short: None) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = recommend(model, "short", tolerance=1e9)
    assert found.model == "LLaDAModelLM"
    assert "12 rows of the model's own rollouts (44 rows, data-free)" in found.reasons[1]
    assert found.recipe.name == "w2a16-rtn"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert dlqc.recommend is recommend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenario": "genral"}, r"^scenario: unknown 'genral'\. Did you mean 'general'\?$"),
        ({"probe": "guess"}, r"^probe: unknown 'guess'\. Use auto, compile or sites$"),
        ({"tolerance": 0.0}, r"^tolerance: a divergence of 0\.0 cannot be asked for\. Use 0\.05$"),
        ({"tolerance": float("nan")}, r"^tolerance: a divergence of nan cannot be asked for\."),
    ],
)
def test_impossible_requests(model: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(FeasibilityError, match=message):
        recommend(model, **options)  # type: ignore[arg-type]


def test_nothing_can_be_done(model: nn.Module, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "none", Scenario("none", ("w2a16-g96-rtn",), 1.0))
    with pytest.raises(
        FeasibilityError, match=r"^no recipe of the ladder can be done \(w2a16-g96-rtn: .*\)\. Write a recipe"
    ):
        recommend(model, "none", calibration=rows)


def test_too_few_rows(model: nn.Module, rows: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"^calibration: 3 rows of text are too few to calibrate on some and to"):
        recommend(model, calibration=rows[:3])


def test_words_of_a_trial() -> None:
    assert Trial("x", refused="no").in_words(1.0) == "x: refused, no"
    assert Trial("x", 0.5, 0.75, 0.875, 3.25, 1234.5).in_words(0.7) == (
        "x: KL 0.5, at most 0.75, beyond 0.7; top-1 agreement 87.5% (3.25 bits per quantized weight, 1,234.50 MB)"
    )
