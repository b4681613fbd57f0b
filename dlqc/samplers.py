"""State samplers: text becomes denoising states.

A denoiser never sees clean text at run time: it sees a canvas of which a part is [MASK]. Any sampler goes with any token
weight (`dlqc.token_weights`) and any method.

    Clean                 nothing masked: what tools for autoregressive models do
    ForwardProcess        t ~ U(0, 1), each token masked with probability t (LLaDA, eq. 1); optionally the response only
    MaskedSimulation      MCS of Quant-dLLM (arXiv 2510.03274, section 3.1): a visible prefix of ⌊γL⌋ tokens, then each token
                          masked with probability t on a grid of timesteps t = 1/T … 1
    BlockStates           blocks before the current one clean, the current one masked with probability t, later ones all
                          [MASK] (semi-autoregressive) or absent
    Rollout               TMAS of DLLMQuant: snapshots of real denoising, see `dlqc.rollout`

Every sampler can count its states by their time: `emphasis`, see `emphasize`.

Shapes: R rows, L positions, S states, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dlqc.diffusion.masking import apply_mask
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import RecipeError

Emphasis = Literal["uniform", "early", "late"]


@dataclass(frozen=True)
class Teacher:
    """The model before quantization, for samplers and weights that look at it.

    Attributes:
        logits: ids int64 [B, L] -> logits [B, L, V], rows as the model gives them.
        spec: the model's facts.
        batch: rows per forward; changes time and memory, not the result.
        mass: ids int64 [B, L] -> how much attention each token gets, [B, L], mean 1 (`dlqc.sinks`); None where nobody asks.
    """

    logits: Callable[[Tensor], Tensor]
    spec: DiffusionSpec
    batch: int = 8
    mass: Callable[[Tensor], Tensor] | None = None

    def confidence(self, ids: Tensor) -> Tensor:
        """Largest probability for each position: ids int64 [S, L] -> float32 [S, L]; shifted rows are put in place."""
        parts = [self.logits(ids[i : i + self.batch]) for i in range(0, ids.shape[0], self.batch)]
        found = torch.cat([torch.softmax(part.float(), dim=-1).amax(dim=-1) for part in parts])
        return shift_rows(found) if self.spec.shift else found


def shift_rows(values: Tensor) -> Tensor:
    """Move what row i - 1 says about token i to position i; row 0 stands in for position 0. values [B, L, ...]."""
    return torch.cat((values[:, :1], values[:, :-1]), dim=1)


@dataclass(frozen=True)
class Canvases:
    """What a sampler draws.

    Attributes:
        ids: int64 [S, L], the canvas with masks in place.
        clean: int64 [S, L], the text underneath.
        t: float32 [S], time of each state: 1 where denoising begins, 0 where it ends.
        prompt: tokens at the start of each row that are never masked.
    """

    ids: Tensor
    clean: Tensor
    t: Tensor
    prompt: int = 0


@dataclass(frozen=True)
class StateSampler:
    """Base of the state samplers.

    A sampler that masks text defines `sample`. One that makes canvases itself, with the model's help, defines `draw`
    instead. Both give one state for each row.

    Options:
        emphasis: how much a state counts by its time, see `emphasize`.
    """

    name: ClassVar[str]

    emphasis: Emphasis = field(default="uniform", kw_only=True)

    def sample(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows int64 [R, L] -> masked bool [R, L], t float32 [R]."""
        raise TypeError(f"{type(self).__name__} does not define sample()")

    def given(self) -> float:
        """Share of each row, from its start, that is never masked."""
        return 0.0

    def draw(self, rows: Tensor, generator: torch.Generator, teacher: Teacher) -> Canvases:
        """One canvas for each of the rows int64 [R, L]."""
        masked, t = self.sample(rows, generator)
        prompt = prompt_length(self.given(), rows.shape[1])
        return Canvases(apply_mask(rows, masked, teacher.spec.mask_id), rows, t, prompt)


def emphasize(t: Tensor, emphasis: Emphasis) -> Tensor:
    """Weights of states by their time, mean 1.

        uniform   1
        early     (1/2 + t) / mean(1/2 + t)        the empty canvas counts three times the full one
        late      (3/2 - t) / mean(3/2 - t)        the other way round

    For t ~ U(0, 1) both means are 1. No state is left out: the weights stay between 1/3 and 3.

    Args:
        t: [S] in [0, 1].

    >>> emphasize(torch.tensor([0.0, 0.5, 1.0]), "early").tolist()
    [0.5, 1.0, 1.5]
    """
    if emphasis == "uniform":
        return torch.ones_like(t)
    weights = 0.5 + t if emphasis == "early" else 1.5 - t
    return weights / weights.mean()


@dataclass(frozen=True)
class Clean(StateSampler):
    """No token is masked."""

    name: ClassVar[str] = "clean"

    def sample(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(rows, dtype=torch.bool), torch.zeros(rows.shape[0])


@dataclass(frozen=True)
class ForwardProcess(StateSampler):
    """LLaDA's forward process: t ~ U(0, 1), stratified over the rows; each token of the response masked with probability t.

    Options:
        prompt: share of each row, from its start, that is prompt and never masked.
    """

    name: ClassVar[str] = "forward_process"
    prompt: float = 0.0

    def __post_init__(self) -> None:
        check_share(self.prompt, "forward_process.prompt")

    def given(self) -> float:
        return self.prompt

    def sample(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, length = rows.shape
        t = _stratified(count, generator)
        masked = torch.rand(count, length, generator=generator) < t[:, None]
        masked[:, : prompt_length(self.prompt, length)] = False
        return masked, t


@dataclass(frozen=True)
class MaskedSimulation(StateSampler):
    """Masked calibration simulation (MCS): visible prefix ⌊γL⌋, timestep grid t = 1/T … T/T, linear schedule.

    The paper sums over all T timesteps of every row; one timestep a row, dealt evenly over the rows, estimates the same sum
    without bias at 1/T of the cost.

    Options:
        prefix: γ, share of the row that is always visible. timesteps: T.
    """

    name: ClassVar[str] = "masked_simulation"
    prefix: float = 0.25
    timesteps: int = 20

    def __post_init__(self) -> None:
        check_share(self.prefix, "masked_simulation.prefix")
        if self.timesteps < 1:
            raise RecipeError(
                f"{self.timesteps} timesteps are none", where="masked_simulation.timesteps", remedy="Use 20"
            )

    def given(self) -> float:
        return self.prefix

    def sample(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, length = rows.shape
        order = torch.randperm(count, generator=generator).double()
        # One offset for all rows: every timestep gets its share of them, up to one row, and none is favoured.
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        level = ((order + offset) * self.timesteps / count).floor().clamp(max=self.timesteps - 1)
        t = ((level + 1) / self.timesteps).float()
        masked = torch.rand(count, length, generator=generator) < t[:, None]
        masked[:, : prompt_length(self.prefix, length)] = False
        return masked, t


@dataclass(frozen=True)
class BlockStates(StateSampler):
    """States of block-wise denoising: clean | partly masked | all [MASK].

    The tokens after the prompt are cut into blocks. One block of each row is the current one, every block of equally many
    rows; its tokens are masked with probability t ~ U(0, 1), stratified over the rows, at least one of them. What is
    before it is clean, what is after it is [MASK]: what a semi-autoregressive sampler shows (LLaDA, arXiv 2502.09992,
    Algorithm 5). With `later="absent"` nothing follows the current block, as in block diffusion (arXiv 2503.09573): rows
    are of one length, so the current block is then the last `block_length` tokens of its row.

    The t of a state is that of its block.

    Options:
        block_length: tokens of a block; the last block of a row may be shorter.
        prompt: share of each row, from its start, that is prompt and never masked.
        later: what follows the current block, "masked" or "absent".
    """

    name: ClassVar[str] = "block_states"
    block_length: int = 32
    prompt: float = 0.25
    later: Literal["masked", "absent"] = "masked"

    def __post_init__(self) -> None:
        check_share(self.prompt, "block_states.prompt")
        if self.block_length < 1:
            raise RecipeError(
                f"blocks of {self.block_length} tokens hold nothing", where="block_states.block_length", remedy="Use 32"
            )

    def given(self) -> float:
        return self.prompt

    def sample(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, length = rows.shape
        prompt = prompt_length(self.prompt, length)
        t = _stratified(count, generator)
        if self.later == "absent":
            start = torch.full((count,), max(prompt, length - self.block_length))
        else:
            blocks = math.ceil((length - prompt) / self.block_length)
            start = prompt + torch.randperm(count, generator=generator) % blocks * self.block_length
        position = torch.arange(length)
        current = (position >= start[:, None]) & (position < start[:, None] + self.block_length)
        coin = torch.rand(count, length, generator=generator).masked_fill(~current, 2.0)
        masked = coin < t[:, None]
        masked[torch.arange(count), coin.argmin(dim=1)] = True
        return masked | (position >= start[:, None] + self.block_length), t


def prompt_length(share: float, length: int) -> int:
    """⌊share · length⌋ in whole tokens, free of rounding at whole numbers.

    >>> prompt_length(0.29, 100)
    29
    """
    return math.floor(share * length + 1e-9)


def check_share(share: float, where: str) -> None:
    if not 0.0 <= share < 1.0:
        raise RecipeError(f"{share} is outside [0, 1)", where=where, remedy="Give the share of the row, such as 0.25")


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    """Times float32 [count], one in each of `count` equal parts of [0, 1), in random order."""
    order = torch.randperm(count, generator=generator)
    return (order + torch.rand(count, generator=generator)) / count
