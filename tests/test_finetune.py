"""Fine-tuning: the loss against a naive restatement, it falls, the result is a compiled model like any other."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_llada import small_llada

import dlqc
from dlqc.artifact import save
from dlqc.cli import main
from dlqc.compiled import Compiled
from dlqc.diffusion.masking import generator
from dlqc.errors import CalibrationError, FeasibilityError, RecipeError
from dlqc.evaluate import bundled_text, rows_to_measure
from dlqc.finetune import Finetune, _Loss, finetune


@pytest.fixture(scope="module")
def words() -> Any:
    return dlqc.load_tokenizer(dlqc.load_model("tiny-llada", meta=True))


@pytest.fixture(scope="module")
def text(words: Any, full: Compiled) -> torch.Tensor:
    return rows_to_measure(words, full.spec, bundled_text("calib"), length=32)[:40]


@pytest.fixture(scope="module")
def full() -> Compiled:
    return dlqc.compile(small_llada(2048), (), backend="reference", progress=False)


@pytest.fixture(scope="module")
def w2(words: Any) -> Compiled:
    recipe = "quantize_weights(bits=2, group_size=16, method=rtn), pack, lower"
    made = dlqc.compile(small_llada(2048), recipe, backend="reference", progress=False)
    made.tokenizer = words
    return made


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss(full: Compiled, w2: Compiled, text: torch.Tensor, share: float) -> None:
    rows, length = text[:4], text.shape[1]
    found = float(_Loss(w2, w2, full, share)(rows, generator(5, "x")))
    rng = generator(5, "x")
    strata = torch.randperm(4, generator=rng)
    u = torch.rand(4, generator=rng, dtype=torch.float64)
    scores = torch.rand(rows.shape, generator=rng, dtype=torch.float64)
    total = 0.0
    for row in range(4):
        count = min(length, int((int(strata[row]) + float(u[row])) / 4 * length) + 1)
        hidden = sorted(range(length), key=lambda i: float(scores[row, i]))[:count]
        state = rows[row : row + 1].clone()
        state[0, hidden] = w2.spec.mask_id
        p, q = (m(state)[0].double().softmax(-1) for m in (full, w2))
        for i in hidden:
            ce = -math.log(q[i, rows[row, i]])
            kl = float((p[i] * (p[i].log() - q[i].log())).sum())
            total += ((1 - share) * ce + share * kl) / count / 4
    assert found == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("learn", "left"), [("codes", 0.8), ("scales", 0.95), ("lora", 0.85)])
def test_the_loss_falls(w2: Compiled, full: Compiled, text: torch.Tensor, learn: Any, left: float) -> None:
    looks: list[tuple[int, float]] = []
    how = Finetune(learn=learn, steps=40, batch=8, looks=2, distill=1.0, rank=8)
    made = finetune(w2, text, how, teacher=full, tell=lambda *look: looks.append(look))
    assert [step for step, _ in looks] == [0, 20, 40]
    assert looks[-1][1] < left * looks[0][1]
    step = next(s for s in made.report.steps if s.name == "finetune")
    assert (step.metrics["loss_start"], step.metrics["loss"]) == (looks[0][1], min(loss for _, loss in looks))
    assert [s.name for s in made.report.steps][-2:] == ["finetune", "lower"]
    assert "fine-tuned: the loss on the rows set aside went from" in made.explain()
    extra = made.report.storage.bits - w2.report.storage.bits
    ranks = 2 * sum(16 * 8 * (n + k) for n, k in [(16, 16)] * 4 + [(32, 16)] * 2 + [(16, 32)])
    assert extra == made.report.storage.bits_quantized - w2.report.storage.bits_quantized == (learn == "lora") * ranks


def test_it_never_gets_worse_on_what_was_set_aside(w2: Compiled, text: torch.Tensor) -> None:
    """A model that is its own teacher can only lose."""
    made = finetune(w2, text[:9], Finetune(steps=2, batch=2, lr=0.5, learn="codes", distill=1.0), teacher=w2)
    step = next(s for s in made.report.steps if s.name == "finetune")
    assert step.metrics["loss"] == step.metrics["loss_start"]
    assert step.notes[0].startswith("fine-tuning found nothing better than the start on the rows set aside")
    assert torch.equal(made(text[:1]), w2(text[:1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: 0 is less than 1. Use 1 or more"),
        ({"batch": 0}, "batch: 0 is less than 1. Use 1 or more"),
        ({"lr": -1.0}, "lr: -1 is no learning rate. Use a positive number"),
        ({"distill": 2.0}, "distill: 2 is no share. Use 0 to 1"),
        ({"distill": 0.5}, "distill: distill=0.5 learns from a teacher, and there is none. Give teacher="),
        ({"rank": 0}, "rank: a rank of 0 is none"),
    ],
)
def test_options_that_cannot_be(w2: Compiled, text: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises((FeasibilityError, RecipeError)) as error:
        finetune(w2, text, Finetune(**options))
    assert message in str(error.value)


def test_what_cannot_be_tuned(w2: Compiled, text: torch.Tensor) -> None:
    with pytest.raises(
        FeasibilityError, match=r"model: a Linear is not compiled\. Give what dlqc\.compile or dlqc\.load"
    ):
        finetune(torch.nn.Linear(1, 1), text)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"text: 1 row of text leaves nothing to learn from"):
        finetune(w2, text[:1])


def test_the_command(
    w2: Compiled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(w2, tmp_path / "w2", verify_reload=False)
    (tmp_path / "text.txt").write_text(bundled_text("calib").read_text("utf-8")[:9000], "utf-8")
    arguments = ["finetune", str(tmp_path / "w2"), "-o", str(tmp_path / "tuned"), "--text", str(tmp_path / "text.txt")]
    arguments += ["--learn", "lora", "--steps", "1", "--rank", "4", "--backend", "reference", "--json"]
    monkeypatch.setattr(sys, "argv", ["dlqc", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert [s["name"] for s in told["steps"]][-2:] == ["finetune", "lower"]
    assert told["reload_deviation"] == 0
    assert "step 1: loss" in printed.err
    tuned = dlqc.load(tmp_path / "tuned", backend="reference")
    assert tuned.recipe == w2.recipe
    assert tuned.report.steps[-2].name == "finetune"
    assert sum(".low_rank." in name for name in tuned.weights) == 2 * 14
