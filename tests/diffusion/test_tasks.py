from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.diffusion.tasks import END, PAD, TASKS, Item, exact_match, held_out, make_items, pack
from dlqc.errors import FeasibilityError, ModelError
from dlqc.models.describe import spec_of
from dlqc.models.load import load_model, load_tokenizer

SPEC = DiffusionSpec(mask_id=130, vocab_size=131, max_length=256, eos_id=129)


class Characters:
    """A tokenizer with one token per character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        parts = re.split(f"({re.escape(PAD)}|{re.escape(END)})", text)
        special = {PAD: [128], END: [129]}
        return [token for part in parts for token in special.get(part, [ord(c) for c in part])]


def solve(item: Item) -> str:
    """The answer, worked out anew from the text of the prompt."""
    numbers = [int(n) for n in re.findall(r"\d+", item.prompt)]
    match item.task:
        case "add":
            return str(numbers[0] + numbers[1])
        case "sub":
            return str(numbers[0] - numbers[1])
        case "sort":
            return "".join(sorted(item.prompt.removeprefix("sort ").removesuffix("=")))
        case "rev":
            return "".join(reversed(item.prompt.removeprefix("back ").removesuffix("=")))
        case "find":
            pairs = dict(pair.split(":") for pair in item.prompt.split()[:-1])
            return pairs[item.prompt[-2]]
    story = re.fullmatch(
        r"(\w+) has (\d+) (\w+)\. (\w+) gives (\w+) (\d+)( more)?\. How many (\w+) does (\w+) have\? ", item.prompt
    )
    assert story is not None
    who, has, thing, giver, taker, number, more, asked, whose = story.groups()
    assert (who, thing) == (whose, asked)
    assert (taker == who) == (more is not None)
    assert giver != taker
    assert who in (giver, taker)
    return str(int(has) + int(number) if taker == who else int(has) - int(number))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_fit_their_slots(task: str) -> None:
    items = make_items(300, seed=1, tasks=(task,))
    assert len(items) == 300
    for item in items:
        assert item.answer == solve(item)
        assert item.answer.isdigit()
        assert len(item.answer) <= TASKS[task].width
    assert len({item.answer for item in items}) > 8


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        ("add", r"\d{1,2}\+\d{1,2}="),
        ("sub", r"\d{1,2}-\d{1,2}="),
        ("sort", r"sort \d{6}="),
        ("rev", r"back \d{5}="),
        ("find", r"([a-z]:\d ){4}[a-z]\?"),
    ],
)
def test_prompts_have_their_form(task: str, shape: str) -> None:
    assert all(re.fullmatch(shape, item.prompt) for item in make_items(200, seed=0, tasks=(task,)))


def test_splits_are_disjoint_and_seeds_decide() -> None:
    train = {item.prompt for item in make_items(500, seed=0, split="train")}
    held = {item.prompt for item in make_items(500, seed=0, split="eval")}
    assert not train & held
    assert all(map(held_out, held))
    assert not any(map(held_out, train))
    assert make_items(20, seed=3) == make_items(20, seed=3)
    assert make_items(20, seed=3) != make_items(20, seed=4)
    assert Counter(item.task for item in make_items(20, seed=3)) == dict.fromkeys(TASKS, 20)


def test_packing_keeps_items_whole() -> None:
    items = make_items(40, seed=0)
    packed = pack(items, Characters(), length=96)
    assert packed.ids.shape == packed.slots.shape == packed.owner.shape
    assert packed.ids.shape[1] == 96
    for index, item in enumerate(items):
        where = (packed.owner == index).nonzero()
        assert len(set(where[:, 0].tolist())) == 1
        columns = where[:, 1].tolist()
        assert columns == list(range(columns[0], columns[0] + len(columns)))
        row = int(where[0, 0])
        width = TASKS[item.task].width
        text = [*map(ord, item.prompt + item.answer), *[128] * (width - len(item.answer)), 129]
        assert packed.ids[row, columns].tolist() == text
        assert packed.slots[row, columns].tolist() == [False] * len(item.prompt) + [True] * width + [False]
    rest = packed.owner == -1
    assert bool((packed.ids[rest] == 129).all())
    assert not bool(packed.slots[rest].any())


def test_exact_match_counts_items() -> None:
    """An oracle knows the rows; spoiled answers lower the score by their items alone."""
    tokenizer = Characters()
    truth = {name: pack(make_items(30, seed=5, tasks=(name,)), tokenizer, length=64) for name in ("add", "rev")}

    def oracle(spoil: dict[str, set[int]]):  # type: ignore[no-untyped-def]
        def model(ids: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, 131)
            for b, row in enumerate(ids):
                for name, packed in truth.items():
                    clean = ((packed.ids == row) | packed.slots).all(1).nonzero().flatten().tolist()
                    if clean:
                        wanted = packed.ids[clean[0]].clone()
                        for item in spoil.get(name, ()):
                            spoiled = (packed.owner[clean[0]] == item) & packed.slots[clean[0]]
                            wanted[spoiled.nonzero().flatten()[:1]] = ord("x")
                        logits[b, torch.arange(len(row)), wanted] = 9.0
            return logits

        return model

    scores = exact_match(oracle({}), tokenizer, SPEC, items=30, seed=5, tasks=("add", "rev"), length=64)
    assert {name: score.mean for name, score in scores.items()} == {"add": 1.0, "rev": 1.0}
    spoil = {"add": {3, 4, 9}, "rev": {0}}
    scores = exact_match(
        oracle(spoil), tokenizer, SPEC, items=30, seed=5, tasks=("add", "rev"), length=64, batch_size=2
    )
    assert {name: score.mean for name, score in scores.items()} == {"add": 27 / 30, "rev": 29 / 30}
    assert scores["add"].count == 30
    assert scores["add"].low < 0.9 < scores["add"].high


def test_refusals() -> None:
    item = Item("add", "1+1=", "2")
    with pytest.raises(FeasibilityError, match=r"per_task: 0 items a task. Ask for 1 or more"):
        make_items(0, seed=0)
    with pytest.raises(FeasibilityError, match=r"tasks: 'sorting' is unknown. Did you mean 'sort'\?"):
        make_items(1, seed=0, tasks=("sorting",))
    with pytest.raises(FeasibilityError, match=r"split: 'evil' is unknown. Did you mean 'eval'\?"):
        make_items(1, seed=0, split="evil")  # type: ignore[arg-type]
    with pytest.raises(FeasibilityError, match=r"items: there are no items"):
        pack([], Characters())
    with pytest.raises(
        FeasibilityError, match=r"length: an item of task add takes 8 tokens, a row has 5. Use rows of 8"
    ):
        pack([item], Characters(), length=5)
    with pytest.raises(ModelError, match=r"add: the answer '12345' takes 5 tokens, its task has 3 slots"):
        pack([Item("add", "1+1=", "12345")], Characters())

    class Plain:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in text]

    with pytest.raises(ModelError, match=r"tokenizer: the tokenizer has no token '<\|endoftext\|>'"):
        pack([item], Plain())


def test_the_bundled_model_reverses_and_sorts() -> None:
    model = load_model("tiny-llada")
    scores = exact_match(model, load_tokenizer(model), spec_of(model), items=32, tasks=("rev", "sort", "add"))
    assert scores["rev"].mean > 0.9
    assert scores["sort"].mean > 0.75
    assert 0.05 < scores["add"].mean < 0.6
