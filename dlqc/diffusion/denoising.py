"""What all samplers share: prompts to canvas, batches, noise, and what a run gives.

    run      denoise a batch, a `Trajectory` at the end; `on_step` sees every forward
    stream   the same, as an iterator of `Commit`: each token when it is fixed

**Batches.** Prompts of one length run together. Prompts of several lengths are padded on the left, where the model is a captured
graph whose attention knows relative positions only (padding is then hidden from every row); other models, and samplers whose
blocks lie on a fixed grid, run each length by itself. Which way is taken changes the rounding of a result and nothing else.

**Noise.** Row r of a batch draws from `seed + r` (or from `seed[r]`), keyed by block and step. So a row of a batch gets what it
would get alone with its own seed, whatever runs beside it.

**Ties.** Equal logits go to the lowest token id, equal certainty to the lowest position. The mask token is never proposed: the
published loops would leave such a position masked for ever.

Shapes: B batch, P prompt, G generated positions, L = P + G, S positions of a block, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlqc.diffusion.masking import LogitsFn, check_clean, device_of, generator
from dlqc.diffusion.network import Network, cached_model
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, nearest

Prompts = Tensor | Sequence[Tensor | Sequence[int]]
Seed = int | Sequence[int]


@dataclass(frozen=True)
class Commit:
    """One token that a step fixed.

    Attributes:
        step: number of the step. row: row of the batch. position: place after the prompt, from 0.
        token: its id. confidence: what the step ranked it by.
        edit: whether it replaces a token that was fixed before.
    """

    step: int
    row: int
    position: int
    token: int
    confidence: float
    edit: bool


@dataclass(frozen=True)
class Step:
    """What one forward saw and what was committed after it; handed to `on_step`.

    Attributes:
        index: number of the step, from 0; steps without a forward are left out of the calls, not of the count.
        total: steps of the whole run, at most.
        block: number of the block, from 0.
        prompt_length: P (0 for `fill`).
        canvas: int64 [B, L], the ids that the model saw.
        masked: bool [B, L], where `canvas` is [MASK].
        confidence: float64 [B, L], what the step ranked positions by; -inf where it could not commit.
        committed: bool [B, L], the positions that the step fixed or edited.
        after: int64 [B, L], the canvas with them.
    """

    index: int
    total: int
    block: int
    prompt_length: int
    canvas: Tensor
    masked: Tensor
    confidence: Tensor
    committed: Tensor
    after: Tensor

    def commits(self) -> Iterator[Commit]:
        """The tokens that the step fixed, by row and position."""
        for row, at in self.committed.nonzero().tolist():
            sure, edit = float(self.confidence[row, at]), not bool(self.masked[row, at])
            yield Commit(self.index, row, at - self.prompt_length, int(self.after[row, at]), sure, edit)


OnStep = Callable[[Step], None]
Steps = Generator[Step, None, "Trajectory"]


@dataclass(frozen=True)
class Trajectory:
    """The result of a run.

    Attributes:
        ids: int64 [B, L], prompt (padded on the left where prompts differ in length) and answer.
        prompt_length: P (0 for `fill`).
        nfe: network evaluations of the batch; a guided step counts two, a step that commits nothing runs none.
        committed_at: int64 [B, L - P], the step that first fixed each position; -1 for a position that was given.
        tokens_per_forward: committed tokens per network evaluation, mean over the batch.
        evaluations: int64 [B], network evaluations up to the last that each row needed.
        computed: positions that went through the network, per row: nfe times L without a cache.
        edits: int64 [B], tokens that were replaced after they were fixed.
        cache_bytes: the most that the cache of the batch took, as it is stored between forwards; 0 without one.
    """

    ids: Tensor
    prompt_length: int
    nfe: int
    committed_at: Tensor
    tokens_per_forward: float
    evaluations: Tensor
    computed: int
    edits: Tensor
    cache_bytes: int = 0

    @property
    def generated(self) -> Tensor:
        """int64 [B, G]: the ids after the prompt."""
        return self.ids[:, self.prompt_length :]


@dataclass(frozen=True)
class Batch:
    """Canvases of one length, ready to be denoised.

    Attributes:
        canvas: int64 [B, L]: padding, prompt, masks.
        prompt: P, the same for all rows.
        seeds: of each row.
        visible: bool [B, L], False at padding; None where there is none.
    """

    canvas: Tensor
    prompt: int
    seeds: tuple[int, ...]
    visible: Tensor | None = None


class Sampler(ABC):
    """Base of the samplers: frozen dataclasses whose fields are the options.

    A sampler says how a batch is denoised (`_denoise`); prompts, batches and streaming are the same for all.
    """

    name: ClassVar[str]
    gen_length: int

    @abstractmethod
    def _denoise(self, model: LogitsFn, batch: Batch, spec: DiffusionSpec) -> Steps:
        """Denoise a batch: yields every forward, returns the trajectory."""

    def _room(self, prompt: int) -> int:
        """Positions that the canvas has after a prompt of `prompt` tokens."""
        return self.gen_length

    def _aligned(self) -> bool:
        """Whether blocks lie on a grid that begins with the prompt, so that padding would move them."""
        return False

    def run(
        self,
        model: LogitsFn,
        prompt_ids: Prompts,
        spec: DiffusionSpec,
        *,
        seed: Seed = 0,
        on_step: OnStep | None = None,
    ) -> Trajectory:
        """Continue each prompt by `gen_length` tokens.

        Args:
            model: ids [B, L] -> logits [B, L, V]; a cache and padding need one that `dlqc.compile` made, or a module.
            prompt_ids: int64 [B, P], or a list of prompts [P] of any lengths; P may be 0.
            spec: the model's facts.
            seed: of all noise; of row r: seed + r, or seed[r]. Noise is drawn on the device of the ids.
            on_step: called after every forward.

        Raises:
            FeasibilityError: the prompts cannot be continued, or the model cannot be run as the options ask.
            ModelError: logits are not finite.
        """
        found = []
        for rows, batch in self._batches(model, prompt_ids, spec, seed):
            steps = self._denoise(model, batch, spec)
            found.append((rows, drive(steps, on_step)))
        return found[0][1] if len(found) == 1 else _join(found, spec)

    def stream(self, model: LogitsFn, prompt_ids: Prompts, spec: DiffusionSpec, *, seed: Seed = 0) -> Iterator[Commit]:
        """The tokens as they are fixed; arguments as of `run`. Prompts are refused at the call; nothing is computed ahead."""
        return self._commits(model, self._batches(model, prompt_ids, spec, seed), spec)

    def _commits(
        self, model: LogitsFn, batches: list[tuple[list[int], Batch]], spec: DiffusionSpec
    ) -> Iterator[Commit]:
        for rows, batch in batches:
            for step in self._denoise(model, batch, spec):
                for c in step.commits():
                    yield Commit(c.step, rows[c.row], c.position, c.token, c.confidence, c.edit)

    def _batches(
        self, model: LogitsFn, prompts: Prompts, spec: DiffusionSpec, seed: Seed
    ) -> list[tuple[list[int], Batch]]:
        """Batches of one length, with the numbers of their rows."""
        if isinstance(prompts, Tensor) and prompts.ndim == 2:
            check_clean(prompts, spec, where="prompt_ids", more=self._room(prompts.shape[1]))
            rows = list(prompts.long())
        elif isinstance(prompts, Tensor):
            check_clean(prompts, spec, where="prompt_ids")  # refuses: no batch
            rows = []
        else:
            rows = [torch.as_tensor(row, device=device_of(model)).reshape(-1).long() for row in prompts]
            _refuse_empty(len(rows))
            for number, row in enumerate(rows):
                check_clean(row[None], spec, where=f"prompt_ids[{number}]", more=self._room(row.numel()))
        seeds = _seeds(seed, len(rows))
        lengths = sorted({row.numel() for row in rows})
        if len(lengths) > 1 and not self._aligned() and _takes_padding(model, spec):
            return [(list(range(len(rows))), _padded(rows, seeds, self._room(lengths[-1]), spec))]
        groups = [[i for i, row in enumerate(rows) if row.numel() == length] for length in lengths]
        made = []
        for group, length in zip(groups, lengths, strict=True):
            text = torch.stack([rows[i] for i in group])
            masks = torch.full((len(group), self._room(length)), spec.mask_id, device=text.device)
            made.append((group, Batch(torch.cat([text, masks], dim=1), length, tuple(seeds[i] for i in group))))
        return made


def _refuse_empty(rows: int) -> None:
    if rows == 0:
        raise FeasibilityError("the batch is empty", where="prompt_ids", remedy="Give at least one row")


def _seeds(seed: Seed, rows: int) -> tuple[int, ...]:
    given: Any = [seed + row for row in range(rows)] if isinstance(seed, int) else seed
    if not isinstance(given, list | tuple) or not all(isinstance(one, int) for one in given):
        remedy = "Give a whole number, or a list of one for each row"
        raise FeasibilityError(f"{seed!r} seeds no noise", where="seed", remedy=remedy)
    if len(given) != rows:
        raise FeasibilityError(f"{len(given)} seeds for {rows} rows", where="seed", remedy="Give one seed for each row")
    return tuple(given)


def _takes_padding(model: LogitsFn, spec: DiffusionSpec) -> bool:
    """Whether rows may be padded: only a graph can be told which keys to leave out."""
    from dlqc.cached import CachedModel
    from dlqc.compiled import Compiled

    if not isinstance(model, CachedModel | Compiled):
        return False
    try:
        return cached_model(model, spec).pads is None
    except FeasibilityError:
        return False


def _padded(rows: list[Tensor], seeds: tuple[int, ...], room: int, spec: DiffusionSpec) -> Batch:
    longest = max(row.numel() for row in rows)
    canvas = torch.full((len(rows), longest + room), spec.mask_id, device=rows[0].device)
    visible = torch.ones_like(canvas, dtype=torch.bool)
    for number, row in enumerate(rows):
        gap = longest - row.numel()
        canvas[number, :gap] = _filler(spec)
        canvas[number, gap:longest] = row
        visible[number, :gap] = False
    return Batch(canvas, longest, seeds, visible)


def _filler(spec: DiffusionSpec) -> int:
    """The token that stands in padding; never the mask."""
    known = [token for token in (spec.pad_id, spec.eos_id) if token is not None and token != spec.mask_id]
    return known[0] if known else int(spec.mask_id == 0)


def _join(found: list[tuple[list[int], Trajectory]], spec: DiffusionSpec) -> Trajectory:
    """One trajectory from those of groups, rows in their own order, prompts padded on the left."""
    longest = max(t.prompt_length for _, t in found)
    answers = max(t.generated.shape[1] for _, t in found)
    rows = sum(len(numbers) for numbers, _ in found)
    first = found[0][1].ids
    ids = first.new_full((rows, longest + answers), _filler(spec))
    committed_at = first.new_full((rows, answers), -1)
    evaluations, edits = first.new_zeros(rows), first.new_zeros(rows)
    for numbers, t in found:
        at, width = torch.tensor(numbers, device=first.device), t.ids.shape[1]
        begin = longest - t.prompt_length
        ids[at, begin : begin + width] = t.ids
        committed_at[at, : t.committed_at.shape[1]] = t.committed_at
        evaluations[at], edits[at] = t.evaluations, t.edits
    nfe = sum(t.nfe for _, t in found)
    computed = sum(t.computed * len(numbers) for numbers, t in found) // rows
    weighted = sum(t.tokens_per_forward * len(numbers) for numbers, t in found) / rows
    held = max(t.cache_bytes for _, t in found)
    return Trajectory(ids, longest, nfe, committed_at, weighted, evaluations, computed, edits, held)


def drive(steps: Steps, on_step: OnStep | None) -> Trajectory:
    """Run to the end, telling `on_step`."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            result: Trajectory = end.value
            return result
        if on_step is not None:
            on_step(step)


class Noise:
    """Uniform random numbers of a run, one stream for each row, block, step and purpose."""

    def __init__(self, seeds: tuple[int, ...], name: str, device: torch.device) -> None:
        self._seeds, self._name, self._device = seeds, name, device

    def uniform(self, purpose: str, block: int, step: int, *shape: int) -> Tensor:
        """float64 [B, *shape] in [0, 1)."""
        rows = [generator(seed, self._name, purpose, block, step, device=self._device) for seed in self._seeds]
        drawn = [torch.rand(shape, generator=rng, dtype=torch.float64, device=self._device) for rng in rows]
        return torch.stack(drawn)


def draw(logits: Tensor, temperature: float, mask_id: int, uniform: Callable[[], Tensor]) -> Tensor:
    """Sample softmax(logits / temperature) by the Gumbel-max trick; argmax at temperature 0; never the mask token.

    argmax(logits + T * g) = argmax(exp(logits) / (-log u)^T), LLaDA's form. Low-precision Gumbel noise hurts quality
    (arXiv 2409.02908), hence float64.

    Args:
        logits: float64 [..., V]; -inf excludes a token.
        temperature: scale of the noise.
        mask_id: the token that is not proposed.
        uniform: gives random numbers in the shape of the logits; asked only where there is noise.
    """
    allowed = logits.clone()
    allowed[..., mask_id] = -torch.inf
    if temperature:
        allowed += temperature * gumbel(uniform())
    return allowed.argmax(-1)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers; finite."""
    return -(-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()


def quota(masks: Tensor, steps: int) -> Tensor:
    """Tokens to commit per step: masks int64 [B] -> int64 [B, steps], equal parts, the remainder on the first steps.

    >>> quota(torch.tensor([7, 2]), 3).tolist()
    [[3, 2, 2], [1, 1, 0]]
    """
    step = torch.arange(steps, device=masks.device)
    return masks[:, None] // steps + (step < masks[:, None] % steps).long()


def most_certain(ranking: Tensor, count: Tensor) -> Tensor:
    """True at the count[b] largest values of each row; equal values: the lowest position first.

    >>> most_certain(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), torch.tensor([2])).tolist()
    [[False, True, True, False]]
    """
    order = ranking.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(ranking.shape[1], device=ranking.device).expand_as(order)
    return torch.zeros_like(order).scatter_(1, order, rank) < count[:, None]


class Ledger:
    """The books of a run: which step fixed what, and which forward was the last that a row needed."""

    def __init__(self, canvas: Tensor) -> None:
        self.committed_at = torch.full_like(canvas, -1)
        self._evaluations = canvas.new_zeros(canvas.shape[0])
        self._edits = canvas.new_zeros(canvas.shape[0])

    def enter(self, step: int, masked: Tensor, chosen: Tensor, times: int = 1) -> None:
        """A forward that committed `chosen` bool [B, L] for the rows that had something to do."""
        self.committed_at[chosen & masked] = step
        self._edits += (chosen & ~masked).sum(1)
        self.charge(chosen.any(1), times)

    def charge(self, rows: Tensor, times: int = 1) -> None:
        """Forwards that the rows bool [B] needed."""
        self._evaluations += times * rows.long()

    def close(self, canvas: Tensor, prompt: int, net: Network) -> Trajectory:
        committed = (self.committed_at[:, : canvas.shape[1]] >= 0).sum().item() / canvas.shape[0]
        rate = committed / net.nfe if net.nfe else 0.0
        at = self.committed_at[:, prompt : canvas.shape[1]]
        counts = (net.computed, self._edits, net.cache_bytes)
        return Trajectory(canvas, prompt, net.nfe, at, rate, self._evaluations, *counts)


def check_positive(options: object, *names: str) -> None:
    """Refuse options that are no whole numbers from 1 on; None passes where the option may be None."""
    for name in names:
        value = getattr(options, name)
        if value is None and "None" in str(type(options).__annotations__[name]):
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise FeasibilityError(f"{value!r} is no whole number", where=name, remedy="Use 1 or more")
        if value < 1:
            raise FeasibilityError(f"{value} is less than 1", where=name, remedy="Use 1 or more")


def check_not_negative(options: object, *names: str) -> None:
    """Refuse options that are no finite numbers from 0 on."""
    for name in names:
        value = getattr(options, name)
        if not isinstance(value, int | float) or math.isinf(value):
            raise FeasibilityError(f"{value!r} is no finite number", where=name, remedy="Use 0 or more")
        if not value >= 0:
            raise FeasibilityError(f"{value} is not at least 0", where=name, remedy="Use 0 or more")


def check_share(options: object, *names: str) -> None:
    """Refuse options that are no probability; None passes."""
    for name in names:
        value = getattr(options, name)
        number = isinstance(value, int | float)
        if value is not None and not (number and 0 <= value <= 1):
            said = f"{value:g}" if number else repr(value)
            raise FeasibilityError(f"{said} is no probability", where=name, remedy=f"Use 0 <= {name} <= 1")


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown word, naming the nearest."""
    if value not in known:
        raise FeasibilityError(f"{value!r} is unknown", where=name, remedy=nearest(value, known))


def check_blocks(gen_length: int, block_length: int, steps: int | None) -> None:
    """Refuse blocks that do not divide the length, and steps that do not divide among the blocks, naming the nearest."""
    if gen_length % block_length:
        near, divisor = _nearest_multiple(gen_length, block_length), _divisor(gen_length, block_length)
        raise FeasibilityError(
            f"{gen_length} tokens do not divide into blocks of {block_length}",
            where="gen_length",
            remedy=f"Use gen_length={near}, or block_length={divisor}",
        )
    blocks = gen_length // block_length
    if steps and steps % blocks:
        raise FeasibilityError(
            f"{steps} steps do not divide among {blocks} blocks",
            where="steps",
            remedy=f"Use steps={_nearest_multiple(steps, blocks)}",
        )


def _nearest_multiple(value: int, unit: int) -> int:
    """The multiple of `unit` closest to `value`, at least one; the larger of two equally close.

    >>> _nearest_multiple(100, 32), _nearest_multiple(3, 32)
    (96, 32)
    """
    return max(unit, (2 * value + unit) // (2 * unit) * unit)


def _divisor(value: int, near: int) -> int:
    """The divisor of `value` closest to `near`; the smaller of two equally close."""
    return min((d for d in range(1, value + 1) if value % d == 0), key=lambda d: (abs(d - near), d))


def spread(values: Tensor, like: Tensor, start: int, fill: Any) -> Tensor:
    """values [B, S] at positions start .. of a tensor [B, L] that is `fill` elsewhere."""
    whole = torch.full(like.shape, fill, dtype=values.dtype, device=values.device)
    whole[:, start : start + values.shape[1]] = values
    return whole
