"""The training example end to end, on a minute model: train, resume, load."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dlqc.diffusion.generate import generate
from dlqc.diffusion.masking import logits_of
from dlqc.errors import ArtifactError, FeasibilityError
from dlqc.models.describe import spec_of
from dlqc.models.load import load_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_llada.py"
SMALL: dict[str, Any] = {"d_model": 16, "layers": 2, "heads": 2, "ffn": 24, "vocab": 300, "length": 96}
SHORT: dict[str, Any] = {"batch": 4, "task_items": 4, "device": "cpu", "save_every": 2}

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_llada", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    stories = [f"Once upon a time there were {n} foxes in the wood, and {n + 1} owls.\nThe end." for n in range(40)]
    (folder / "one.txt").write_text("\n<|doc|>\n".join(stories[:20]))
    (folder / "two.txt").write_text("\n<|doc|>\n".join(stories[20:]))
    return folder


@pytest.fixture(scope="module")
def trained(example: ModuleType, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "model"
    example.main(texts, out, steps=5, **SMALL, **SHORT)
    return out


def test_the_folder_loads_and_is_the_trained_model(trained: Path) -> None:
    model = load_model(str(trained))
    spec = spec_of(model)
    config = json.loads((trained / "config.json").read_text())
    weights = load_file(trained / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (config["model_type"], config["n_layers"], config["max_sequence_length"]) == ("llada", 2, 192)
    assert (spec.mask_id, spec.vocab_size, spec.max_length) == (config["vocab_size"] - 1, config["vocab_size"], 192)
    logits = logits_of(model, torch.full((1, 4), spec.mask_id), spec)
    assert bool(logits.isfinite().all())
    head = weights["model.transformer.ff_out.weight"]
    assert torch.equal(model.get_parameter("model.transformer.ff_out.weight").bfloat16().cpu(), head)
    assert len(generate(model, "Once", tokenizer=AutoTokenizer.from_pretrained(trained), gen_length=8).ids) == 8


def test_the_tokenizer_splits_digits_and_ends_with_the_specials(trained: Path, example: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert [tokenizer.decode([t]) for t in tokenizer.encode("190=")] == ["1", "9", "0", "="]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer) - 8, len(tokenizer)))) == example.SPECIALS
    assert tokenizer.decode(tokenizer.encode("Zwölf foxes,\n12 owls")) == "Zwölf foxes,\n12 owls"


def test_a_resumed_run_equals_a_whole_one(example: ModuleType, texts: Path, trained: Path, tmp_path: Path) -> None:
    class Interruption(Exception):
        pass

    steps = 0

    def interrupted(*args: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Interruption
        return draw(*args)

    draw, example.draw_rows = example.draw_rows, interrupted
    with pytest.raises(Interruption):
        example.main(texts, tmp_path, steps=5, **SMALL, **SHORT)
    example.draw_rows = draw
    with safe_open(tmp_path / example.CHECKPOINT, framework="pt") as file:
        assert json.loads(file.metadata()["clock"])["step"] == 2
    assert not (tmp_path / "model.safetensors").exists()
    example.main(texts, tmp_path, steps=5, **SMALL, **SHORT)
    whole, resumed = load_file(trained / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list(tmp_path.glob("*.partial"))


def test_training_moves_the_loss(example: ModuleType, texts: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    entropy = torch.nn.functional.cross_entropy

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = entropy(*args, **kwargs)
        seen.append(loss.mean().item())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", record)
        example.main(texts, tmp_path, steps=80, lr=1e-2, tasks=0.0, **SMALL, **SHORT)
    assert sum(seen[-10:]) / 10 < seen[0] - 1.0


def test_refusals(example: ModuleType, texts: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FeasibilityError, match=r"the folder has no text. Give a folder of .txt files"):
        example.main(tmp_path, tmp_path / "out", steps=1, **SMALL, **SHORT)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(FeasibilityError, match=r"the text has \d+ tokens. Give at least 96"):
        example.main(tmp_path, tmp_path / "out", steps=1, **SMALL, **SHORT)
    with pytest.raises(ArtifactError, match=r'the checkpoint is of .*"d_model": 16.* Use its sizes, or another folder'):
        example.main(texts, trained, steps=5, **{**SMALL, "d_model": 32}, **SHORT)


def test_the_learning_rate_warms_up_stays_and_decays(example: ModuleType) -> None:
    rates = [example.learning_rate(1.0, p) for p in (0.0, 0.01, 0.02, 0.5, 0.75, 0.875, 1.0)]
    assert rates == pytest.approx([0.05, 0.5, 1.0, 1.0, 1.0, 0.51, 0.02])
