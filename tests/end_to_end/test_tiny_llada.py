"""The whole path on the bundled model: what a user does first, with bounds that can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dlqc
from dlqc.diffusion.likelihood import masked_nll, paired_difference
from dlqc.evaluate import bundled_text, evaluate, rows_to_measure
from dlqc.models.describe import spec_of


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return dlqc.load_model("tiny-llada")


@pytest.fixture(scope="module")
def rows(model: torch.nn.Module) -> torch.Tensor:
    return rows_to_measure(dlqc.load_tokenizer(model), spec_of(model))[:12]


def compiled(model: torch.nn.Module, recipe: str) -> dlqc.Compiled:
    return dlqc.compile(model, recipe, calibration=bundled_text("calib"), progress=False)


def test_the_halves_of_the_bundled_text_share_nothing() -> None:
    halves = [bundled_text(half).read_text(encoding="utf-8") for half in ("calib", "eval")]
    assert sum(len(text) for text in halves) >= 80_000
    lines = [{line for line in text.splitlines() if len(line) > 20} for text in halves]
    assert not lines[0] & lines[1]


def test_w4a16_gptq_keeps_the_model(model: torch.nn.Module, rows: torch.Tensor, tmp_path: Path) -> None:
    q = compiled(model, "w4a16-gptq")
    original = dlqc.compile(model, (), progress=False)
    found = evaluate(q, rows, q.spec, reference=original)
    assert found.difference is not None
    assert found.fidelity is not None
    assert abs(found.difference.mean) < 0.005
    assert found.fidelity.mean_kl.mean < 0.002
    # A unigram model is at 6.26 nats: the model itself must be far below, or nothing was measured.
    assert found.nll.nelbo.mean < 5.2
    assert q.report.storage.quantized == 3407872
    q.save(tmp_path / "a")
    again = dlqc.load(tmp_path / "a")
    ids = torch.where(torch.rand(rows.shape) < 0.5, q.spec.mask_id, rows)[:4]
    assert torch.equal(again(ids), q(ids))


def test_two_bits_show_what_methods_are_worth(model: torch.nn.Module, rows: torch.Tensor) -> None:
    spec = spec_of(model)
    tables = {
        name: masked_nll(compiled(model, name), rows, spec, ratios=(0.25, 0.75)) for name in ("w2a16-rtn", "w2a16-gptq")
    }
    gain = paired_difference(tables["w2a16-rtn"], tables["w2a16-gptq"])
    assert gain.low > 0.05


def test_same_seed_same_artifact(model: torch.nn.Module) -> None:
    recipe = "calibrate(sequences=8, length=64), quantize_weights(bits=3, group_size=64, method=gptq), pack, lower"
    first, second = (compiled(model, recipe) for _ in range(2))
    assert list(first.weights) == list(second.weights)
    assert all(torch.equal(first.weights.value(name), second.weights.value(name)) for name in first.weights)


def test_without_text_the_model_calibrates_itself_and_says_so(model: torch.nn.Module) -> None:
    recipe = "calibrate(sequences=8, length=32), quantize_weights(bits=4), pack, lower"
    q = dlqc.compile(model, recipe, progress=False)
    assert "the model's own rollouts" in q.explain()
    assert "data-free" in q.report.calibration


@pytest.fixture(scope="module")
def smoothed(model: torch.nn.Module) -> tuple[dlqc.Compiled, dict[str, tuple[int, torch.Tensor]]]:
    """A compiled model, and the parameters of its source as they were before."""
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    return compiled(model, "w8a8-smoothquant"), before


def test_generation_with_the_compiled_model(smoothed: tuple[dlqc.Compiled, object]) -> None:
    q, _ = smoothed
    made = dlqc.generate(q, "Once upon a time", gen_length=16, steps=8)
    assert (made.nfe, made.tokens_per_forward) == (8, 2.0)
    assert made.text.strip()
    assert dlqc.generate(q, "Once upon a time", gen_length=16, steps=8).ids == made.ids


def test_the_users_model_is_unharmed(
    model: torch.nn.Module, smoothed: tuple[dlqc.Compiled, dict[str, tuple[int, torch.Tensor]]]
) -> None:
    for name, p in model.named_parameters():
        assert id(p) == smoothed[1][name][0]
        assert torch.equal(p, smoothed[1][name][1])


def test_compiled_module_survives_torch_export(model: torch.nn.Module) -> None:
    q = dlqc.compile(model, "w8a8-rtn", progress=False)
    ids = torch.randint(0, 2000, (2, 16))
    exported = torch.export.export(q, (ids,))
    assert torch.equal(exported.module()(ids), q(ids))
