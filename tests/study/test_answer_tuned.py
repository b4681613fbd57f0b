"""The example that tunes tiny-llada on answers, for a step: what it writes is a model, and only answers taught it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dlqc.models.load import load_model, load_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "answer_tuned.py"


def test_answers_alone_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("answer_tuned", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    before = example.apply_mask

    def spied(ids: torch.Tensor, masked: torch.Tensor, mask_id: int) -> torch.Tensor:
        seen.append((ids, masked))
        state: torch.Tensor = before(ids, masked, mask_id)
        return state

    monkeypatch.setattr(example, "apply_mask", spied)
    example.main(tmp_path / "tuned", steps=1, batch=4, length=64, items=12)
    tuned, start = load_model(tmp_path / "tuned"), load_model("tiny-llada")
    words = load_tokenizer(tuned)
    ((ids, masked),) = seen
    assert bool(masked.any())
    texts = {words.decode([token]) for token in ids[masked].tolist()}
    assert texts <= {*"0123456789", "<|eot_id|>"}, "answers are digits and what fills their slots"
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, dict(start.named_parameters())[n])}
    assert any("q_proj" in name for name in changed)
    assert tuned.config.to_dict().keys() == start.config.to_dict().keys()
