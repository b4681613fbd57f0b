"""Six generated tasks with exact answers: what a model of a few million parameters can be scored on.

| task | prompt | answer | slots |
|---|---|---|---|
| add | `37+45=` | `82` | 3 |
| sub | `81-46=` | `35` | 3 |
| sort | `sort 629014=` | `012469` | 6 |
| rev | `back 58213=` | `31285` | 5 |
| find | `k:3 a:7 q:1 z:8 q?` | `1` | 2 |
| story | `Tom has 12 nuts. Mia gives Tom 30 more. How many nuts does Tom have? ` | `42` | 3 |

An answer fills its slots, padded with `<|eot_id|>`, so that its length is not given away; an item ends with
`<|endoftext|>`; items are packed whole into rows. To score, all answer slots of a row are masked at once and filled in
4 steps of low-confidence remasking, greedily; an item counts when all its slots are right. A row holds one task: in a
mixed row the surest task is committed first, which hands the others more steps (tiny-llada adds .51 so, .33 alone).

An item belongs to the evaluation split when the CRC-32 of its prompt divides by 8, to the training split otherwise: the
two are disjoint whatever the seeds.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dlqc.diffusion.intervals import Interval, wilson
from dlqc.diffusion.masking import LogitsFn, derived_seed, device_of
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError, nearest

Split = Literal["train", "eval"]

NAMES = ("Tom", "Mia", "Ben", "Ann", "Tim", "Eva", "Sam", "Lucy", "Max", "Rose")
THINGS = ("nuts", "shells", "apples", "coins", "books", "eggs", "cards", "stones")
PAD, END = "<|eot_id|>", "<|endoftext|>"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        task: its name.
        prompt: text before the answer.
        answer: digits.
    """

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Packed:
    """Items as token rows.

    Attributes:
        ids: int64 [R, L]; what follows the last item of a row is `<|endoftext|>`.
        slots: bool [R, L], the answer slots.
        owner: int64 [R, L], index of the item a token belongs to; -1 after the last item.
    """

    ids: Tensor
    slots: Tensor
    owner: Tensor


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a}+{b}=", str(a + b)


def _sub(rng: random.Random) -> tuple[str, str]:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return f"{a}-{b}=", str(a - b)


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = _digits(rng, 6)
    return f"sort {digits}=", "".join(sorted(digits))


def _rev(rng: random.Random) -> tuple[str, str]:
    digits = _digits(rng, 5)
    return f"back {digits}=", digits[::-1]


def _find(rng: random.Random) -> tuple[str, str]:
    keys, values = rng.sample("abcdefghijklmnopqrstuvwxyz", 4), _digits(rng, 4)
    asked = rng.randrange(4)
    return " ".join(f"{k}:{v}" for k, v in zip(keys, values, strict=True)) + f" {keys[asked]}?", values[asked]


def _story(rng: random.Random) -> tuple[str, str]:
    (one, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    if rng.random() < 0.5:
        has, more = rng.randrange(100), rng.randrange(1, 100)
        deed, left = f"{other} gives {one} {more} more.", has + more
    else:
        more, has = sorted((rng.randrange(1, 100), rng.randrange(1, 100)))
        deed, left = f"{one} gives {other} {more}.", has - more
    return f"{one} has {has} {thing}. {deed} How many {thing} does {one} have? ", str(left)


def _digits(rng: random.Random, count: int) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(count))


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        width: answer slots, in tokens.
        make: prompt and answer from a random source.
    """

    width: int
    make: Callable[[random.Random], tuple[str, str]]


TASKS: dict[str, Task] = {
    "add": Task(3, _add),
    "sub": Task(3, _sub),
    "sort": Task(6, _sort),
    "rev": Task(5, _rev),
    "find": Task(2, _find),
    "story": Task(3, _story),
}


def make_items(
    per_task: int, *, seed: int, split: Split = "eval", tasks: Sequence[str] = tuple(TASKS)
) -> tuple[Item, ...]:
    """`per_task` items of each task, shuffled; prompts may repeat where a task has few (add: 10,000).

    Args:
        per_task: items of each task.
        seed: of the items and their order.
        split: "eval" or "train"; no prompt is in both.
        tasks: names.
    """
    if per_task < 1:
        raise FeasibilityError(f"{per_task} items a task", where="per_task", remedy="Ask for 1 or more")
    if split not in ("train", "eval"):
        raise FeasibilityError(f"{split!r} is unknown", where="split", remedy=nearest(split, ("train", "eval")))
    for name in tasks:
        if name not in TASKS:
            raise FeasibilityError(f"{name!r} is unknown", where="tasks", remedy=nearest(name, TASKS))
    items: list[Item] = []
    for name in tasks:
        rng = random.Random(derived_seed(seed, "items", name, split))
        wanted = len(items) + per_task
        while len(items) < wanted:
            prompt, answer = TASKS[name].make(rng)
            if held_out(prompt) == (split == "eval"):
                items.append(Item(name, prompt, answer))
    random.Random(derived_seed(seed, "order")).shuffle(items)
    return tuple(items)


def held_out(prompt: str) -> bool:
    """True for the prompts of the evaluation split, one in eight."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def pack(items: Sequence[Item], tokenizer: Any, *, length: int = 256) -> Packed:
    """Pack whole items into rows of `length` tokens, in order.

    Args:
        items: questions.
        tokenizer: a Hugging Face tokenizer that makes each digit a token and has `<|eot_id|>` and `<|endoftext|>`.
        length: L.
    """
    if not items:
        raise FeasibilityError("there are no items", where="items", remedy="Give at least one")
    end, pad = _token(tokenizer, END), _token(tokenizer, PAD)
    rows: list[list[tuple[int, bool, int]]] = [[]]
    for index, item in enumerate(items):
        width = TASKS[item.task].width
        answer = _encode(tokenizer, item.answer)
        if len(answer) > width:
            raise ModelError(
                f"the answer {item.answer!r} takes {len(answer)} tokens, its task has {width} slots",
                where=item.task,
                remedy="Use a tokenizer that makes each digit a token",
            )
        tokens = [(token, False, index) for token in _encode(tokenizer, item.prompt)]
        tokens += [(token, True, index) for token in answer + [pad] * (width - len(answer))] + [(end, False, index)]
        if len(tokens) > length:
            raise FeasibilityError(
                f"an item of task {item.task} takes {len(tokens)} tokens, a row has {length}",
                where="length",
                remedy=f"Use rows of {len(tokens)} tokens or more",
            )
        if len(rows[-1]) + len(tokens) > length:
            rows.append([])
        rows[-1] += tokens
    full = [row + [(end, False, -1)] * (length - len(row)) for row in rows]
    ids, slots, owner = torch.tensor(full).unbind(-1)
    return Packed(ids.contiguous(), slots.bool(), owner.contiguous())


def exact_match(
    model: LogitsFn,
    tokenizer: Any,
    spec: DiffusionSpec,
    *,
    items: int = 100,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    steps: int = 4,
    length: int = 256,
    batch_size: int = 16,
) -> dict[str, Interval]:
    """Share of items answered exactly, per task, with Wilson intervals.

    Args:
        model: ids [B, L] -> logits [B, L, V].
        tokenizer: as for `pack`.
        spec: the model's facts.
        items: items per task, of the evaluation split.
        seed: of the items; models that are compared should see the same.
        tasks: names.
        steps: denoising steps for all answer slots of a row.
        length: tokens of a packed row.
        batch_size: rows per forward.
    """
    same: dict[str, Any] = {"items": items, "seed": seed, "steps": steps, "length": length, "batch_size": batch_size}
    right = {name: int(answered(model, tokenizer, spec, name, **same).sum()) for name in tasks}
    return {name: wilson(count, items) for name, count in right.items()}


def answered(
    model: LogitsFn,
    tokenizer: Any,
    spec: DiffusionSpec,
    task: str,
    *,
    items: int = 100,
    seed: int = 0,
    steps: int = 4,
    length: int = 256,
    batch_size: int = 16,
) -> Tensor:
    """Which items of one task are answered exactly, bool [items]; arguments as of `exact_match`."""
    sampler = LLaDASampler(steps=steps)
    packed = pack(make_items(items, seed=seed, tasks=(task,)), tokenizer, length=length)
    right = torch.ones(items, dtype=torch.bool)
    for start in range(0, packed.ids.shape[0], batch_size):
        part = slice(start, start + batch_size)
        canvas = packed.ids[part].masked_fill(packed.slots[part], spec.mask_id)
        filled = sampler.fill(model, canvas.to(device_of(model)), spec, seed=seed).ids.cpu()
        right[packed.owner[part][filled != packed.ids[part]]] = False
    return right


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _token(tokenizer: Any, text: str) -> int:
    ids = _encode(tokenizer, text)
    if len(ids) != 1:
        raise ModelError(
            f"the tokenizer has no token {text!r}", where="tokenizer", remedy="Use the tokenizer of tiny-llada or LLaDA"
        )
    return ids[0]
