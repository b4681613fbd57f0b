"""The harness's questions: likelihoods against a naive restatement in float64, settings, refusals; lm_eval itself where it is."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dlqc
from dlqc.cli import main
from dlqc.diffusion.masking import generator
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import DlqcError, FeasibilityError, ModelError
from dlqc.integrations.harness import QDLM, Harness, protocol_of

MASK, VOCAB = 28, 30
SPEC = DiffusionSpec(MASK, VOCAB, 24, eos_id=29)


class Letters:
    """a to z and the space, a token each."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [26 if letter == " " else ord(letter) - 97 for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(" " if i == 26 else chr(97 + i) for i in ids if i < 27)


def toy(ids: torch.Tensor) -> torch.Tensor:
    """Logits that depend on the position and on all that is visible."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = torch.arange(ids.shape[1], dtype=torch.float64)
    context = table[ids].mean(1, keepdim=True)
    logits: torch.Tensor = table[ids] + context + (places[:, None] * torch.arange(VOCAB) / 7).sin()
    return logits


def harness(**options: Any) -> Harness:
    return Harness(toy, **({"spec": SPEC, "tokenizer": Letters()} | options))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("context", "answer", "task"), [("ab c", " defgh", None), ("a", "xyz", "piqa"), ("", "qrst", None)]
)
def test_likelihood(shift: bool, context: str, answer: str, task: str | None) -> None:
    spec = dataclasses.replace(SPEC, shift=shift)
    found, greedy = harness(spec=spec, mc_num=12, seed=3, batch_size=5).score(context, answer, task)
    words = Letters()
    prompt, wanted = words.encode(context), words.encode(answer)
    rng = generator(3, "likelihood", len(prompt) + len(wanted), len(wanted))
    size = len(wanted)
    first = int(torch.randint(1, size + 1, (), generator=rng))
    counts = [(round(first + j * size / 12) - 1) % size + 1 for j in range(12)]
    scores = torch.rand(12, size, generator=rng, dtype=torch.float64)
    total = 0.0
    for j, count in enumerate(counts):
        hidden = sorted(range(size), key=lambda i, j=j: float(scores[j, i]))[:count]
        state = torch.tensor([prompt + [MASK if i in hidden else t for i, t in enumerate(wanted)]])
        logits = toy(state)[0]
        for i in hidden:
            place = len(prompt) + i
            row = max(0, place - 1) if shift else place
            p = logits[row].softmax(-1)
            total += size / count * float(p[wanted[i]].log())
    assert found == pytest.approx(total / 12, rel=1e-12)
    assert greedy is False


def test_one_token_is_exact_and_takes_one_forward() -> None:
    asked: list[torch.Tensor] = []

    def counted(ids: torch.Tensor) -> torch.Tensor:
        asked.append(ids)
        return toy(ids)

    found, _ = Harness(counted, spec=SPEC, tokenizer=Letters()).score("abc", "d")
    state = torch.tensor([[0, 1, 2, MASK]])
    assert found == pytest.approx(float(toy(state)[0, 3].log_softmax(-1)[3]), rel=1e-12)
    assert [tuple(a.shape) for a in asked] == [(1, 4)]


def test_the_seed_decides_and_the_batch_does_not() -> None:
    scores = {
        (seed, batch): harness(mc_num=9, seed=seed, batch_size=batch).score("ab", "cdefg")[0]
        for seed in (0, 1)
        for batch in (1, 4, 9)
    }
    for seed in (0, 1):
        assert scores[seed, 1] == pytest.approx(scores[seed, 4], rel=1e-12)
        assert scores[seed, 1] == pytest.approx(scores[seed, 9], rel=1e-12)
    assert scores[0, 1] != pytest.approx(scores[1, 1], rel=1e-3)


def test_greedy_answers_are_told() -> None:
    asked = harness(check_greedy=True, mc_num=2)
    canvas = torch.tensor([[0, 1, MASK, MASK]])
    own = LLaDASampler(steps=2).fill(toy, canvas, SPEC, seed=0).ids[0, 2:].tolist()
    texts = {Letters().decode([t]) for t in own}
    assert all(len(t) == 1 for t in texts), "the toy writes letters here"
    assert asked.score("ab", Letters().decode(own))[1]
    assert not asked.score("ab", "zz")[1]


def test_spaces_between_go_to_the_continuation() -> None:
    assert harness().split("ab  ", "c") == ([0, 1], [26, 26, 2])
    assert harness().split("", "c") == ([], [2])
    assert harness().score("ab", "") == (0.0, True)


def test_rolling_windows_cover_every_token_once() -> None:
    text = "thequickbrownfoxjumpsoverthelazydogandruns"
    asked: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:

        def spied(model: Any, prompt: list[int], answer: list[int], spec: Any, **options: Any) -> float:
            asked.append((len(prompt), len(answer)))
            return -float(len(answer))

        patch.setattr("dlqc.integrations.harness.log_likelihood", spied)
        assert harness().rolling(text) == -len(text)
    assert asked == [(0, 24), (12, 12), (12, 6)]
    assert harness(mc_num=4).rolling("abcde") == pytest.approx(harness(mc_num=4).score("", "abcde")[0])


def test_settings_of_qdlm() -> None:
    named = {
        "gsm8k": (4, 256, 32),
        "minerva_math_algebra": (0, 256, 64),
        "humaneval": (0, 512, 32),
        "mbpp": (3, 512, 32),
    }
    plain = Harness(toy, spec=SPEC, tokenizer=Letters())
    for task, (shots, length, block) in named.items():
        protocol = protocol_of(task)
        assert protocol is not None
        assert protocol.shots == shots
        assert plain.sampler_for(task, 7) == LLaDASampler(gen_length=length, steps=length, block_length=block)
    mmlu = protocol_of("mmlu_anatomy")
    assert mmlu is not None
    assert (mmlu.shots, mmlu.mc_num) == (5, 1)
    assert {QDLM[name].mc_num for name in ("piqa", "winogrande", "arc_", "hellaswag")} == {128}
    assert plain.sampler_for("drop", 48) == LLaDASampler(gen_length=48, steps=48, block_length=48)
    assert plain.sampler_for() == LLaDASampler(gen_length=128, steps=128, block_length=32)
    dream = harness(spec=dataclasses.replace(SPEC, shift=True))
    expected = DreamSampler(gen_length=128, steps=128, temperature=0.08, top_p=0.9, alg="entropy")
    assert dream.sampler_for("gsm8k", 7) == expected
    assert dream.sampler_for("drop", 16) == dataclasses.replace(expected, gen_length=16, steps=16)
    assert harness(sampler="llada(gen_length=8)").sampler_for("gsm8k").gen_length == 8


def test_completions_end_where_asked() -> None:
    asked = harness(sampler="llada(gen_length=6, steps=6)")
    whole = asked.complete("ab")
    made = LLaDASampler(gen_length=6, steps=6).run(toy, torch.tensor([[0, 1]]), SPEC, seed=0).generated[0].tolist()
    ids = made[: made.index(29)] if 29 in made else made
    assert whole == Letters().decode(ids)
    other = next(letter for letter in whole if letter != whole[0])
    kept = asked.complete("ab", ["never!", other])
    assert kept
    assert kept == whole[: whole.index(other)]
    assert asked.truncated == 0
    asked.complete("a" * 30)
    assert asked.truncated == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokenizer": None}, ModelError, "tokenizer: the model brings no tokenizer. Give tokenizer="),
        ({"mc_num": 0}, FeasibilityError, "mc_num: 0 masks an answer. Use 1 or more, as 128"),
        (
            {"spec": dataclasses.replace(SPEC, attention="block-causal")},
            FeasibilityError,
            "model: the model denoises block by block, and its likelihood is not that of one canvas. Use a model with",
        ),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], error: type[DlqcError], message: str) -> None:
    with pytest.raises(error) as found:
        harness(**options)
    assert str(found.value).startswith(message)


def test_answers_that_are_too_long() -> None:
    with pytest.raises(FeasibilityError) as error:
        harness().score("ab", "c" * 25)
    assert str(error.value) == (
        "max_length: a continuation of 25 tokens, the model was made for 24. Leave the task out, or give sampler= with a "
        "smaller gen_length"
    )


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dlqc.integrations import lm_eval as ours

    ours._lm_class.cache_clear()
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    message = r"lm_eval: lm_eval is not installed\. Install it with: pip install 'dlqc\[lm-eval\]'"
    with pytest.raises(FeasibilityError, match=message):
        ours.evaluate(toy, ["piqa"])
    with pytest.raises(FeasibilityError, match=message):
        from dlqc.integrations.lm_eval import DiffusionLM  # noqa: F401
    monkeypatch.setattr(sys, "argv", ["dlqc", "lm-eval", "no-such-model", "--tasks", "piqa"])
    with pytest.raises(SystemExit):
        main()
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        ours.Other  # noqa: B018


CHOICE = """
task: dlqc_next
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
BACK = """
task: dlqc_back
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|eot_id|>"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
"""


def test_the_harness_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of task, offline, from the bundled questions: what the harness says is what the model says."""
    pytest.importorskip("lm_eval")
    import json

    from dlqc.diffusion.tasks import make_items

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    items = make_items(6, seed=0, tasks=("rev",))
    lines = [
        {"prompt": i.prompt, "choices": [i.answer, i.answer[1:] + i.answer[0]], "right": 0, "answer": i.answer}
        for i in items
    ]
    data = tmp_path / "items.json"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "next.yaml").write_text(CHOICE % data)
    (tmp_path / "back.yaml").write_text(BACK % data)
    model = dlqc.load_model("tiny-llada")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.tasks import TaskManager

        from dlqc.integrations.lm_eval import evaluate

        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = evaluate(model, ["dlqc_next", "dlqc_back"], task_manager=manager, mc_num=4)
    asked = Harness(model, mc_num=4)
    right = [asked.score(d["prompt"], d["choices"][0])[0] > asked.score(d["prompt"], d["choices"][1])[0] for d in lines]
    written = [asked.complete(d["prompt"], max_tokens=5) == d["answer"] for d in lines]
    assert found["dlqc_next"]["acc,none"] == pytest.approx(sum(right) / 6)
    assert found["dlqc_back"]["exact_match,none"] == pytest.approx(sum(written) / 6)
    assert sum(right) >= 5, "the model does reverse digits"
    assert "lm_eval" in sys.modules
