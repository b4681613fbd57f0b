"""LLaDA's sampler: semi-autoregressive blocks, low-confidence or random remasking, Gumbel noise, guidance.

    x = prompt + [MASK] * G
    for each block, left to right:
        for each step of the block:
            logits    = model(x)                                  the whole x, later blocks still masked
            proposal  = argmax(logits + temperature * gumbel)     float64
            certainty = softmax(logits)[proposal]                 or uniform noise ("random")
            commit the quota[step] most certain masked positions of the block

LLaDA, arXiv 2502.09992: Algorithm 5 (low confidence), Algorithm 4 (random); the authors' `generate.py` defines quotas,
noise and guidance. Low-precision Gumbel noise hurts quality (arXiv 2409.02908), hence float64.

Two choices where the published code leaves things open. Ties: equal logits go to the lowest token id, equal certainty
to the lowest position (stable sort). The mask token is never proposed: the published loop would leave such a position
masked for ever. Both leave every other result untouched.

Shapes: B batch, P prompt, G generated positions, L = P + G, S positions of the current block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.diffusion.masking import LogitsFn, check_clean, check_finite, check_ids, generator, logits_of
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, nearest

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class Step:
    """What one forward saw and what was committed after it; handed to `on_step`.

    Attributes:
        index: number of the step, from 0; steps without a forward are left out of the calls, not of the count.
        total: steps of the whole run.
        block: number of the block, from 0.
        prompt_length: P (0 for `fill`).
        canvas: int64 [B, L], the ids that the model saw.
        masked: bool [B, L], where `canvas` is [MASK].
        confidence: float64 [B, L], what the step ranked positions by; -inf where it could not commit.
        committed: bool [B, L], the positions that the step fixed.
    """

    index: int
    total: int
    block: int
    prompt_length: int
    canvas: Tensor
    masked: Tensor
    confidence: Tensor
    committed: Tensor


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Trajectory:
    """The result of a run.

    Attributes:
        ids: int64 [B, L], prompt and answer.
        prompt_length: P (0 for `fill`).
        nfe: network evaluations per sequence; a guided step counts two, a step that commits nothing runs none.
        committed_at: int64 [B, L - P], the step that fixed each position; -1 for a position that was given.
        tokens_per_forward: committed tokens per network evaluation, mean over the batch.
    """

    ids: Tensor
    prompt_length: int
    nfe: int
    committed_at: Tensor
    tokens_per_forward: float

    @property
    def generated(self) -> Tensor:
        """int64 [B, G]: the ids after the prompt."""
        return self.ids[:, self.prompt_length :]


@dataclass(frozen=True)
class LLaDASampler:
    """Options of LLaDA's sampler.

    Attributes:
        steps: forwards in all, shared equally by the blocks; None: one per generated token.
        gen_length: tokens to generate.
        block_length: tokens of a block; None: one block ("pure diffusion").
        temperature: scale of the Gumbel noise on the logits; 0 takes the argmax.
        cfg_scale: w of classifier-free guidance, un + (w + 1) * (cond - un); 0 switches it off.
        remasking: "low_confidence" or "random".
    """

    steps: int | None = None
    gen_length: int = 128
    block_length: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"

    def __post_init__(self) -> None:
        check_positive(self, "gen_length", "steps", "block_length")
        check_not_negative(self, "temperature", "cfg_scale")
        check_known("remasking", self.remasking, REMASKING)
        length, block = self.gen_length, self.block_length or self.gen_length
        if length % block:
            raise FeasibilityError(
                f"{length} tokens do not divide into blocks of {block}",
                where="gen_length",
                remedy=f"Use gen_length={_nearest_multiple(length, block)}, or block_length={_divisor(length, block)}",
            )
        blocks = length // block
        if self.steps and self.steps % blocks:
            raise FeasibilityError(
                f"{self.steps} steps do not divide among {blocks} blocks",
                where="steps",
                remedy=f"Use steps={_nearest_multiple(self.steps, blocks)}",
            )

    @torch.no_grad()
    def run(
        self, model: LogitsFn, prompt_ids: Tensor, spec: DiffusionSpec, *, seed: int, on_step: OnStep | None = None
    ) -> Trajectory:
        """Continue each prompt by `gen_length` tokens.

        Args:
            model: ids [B, L] -> logits [B, L, V].
            prompt_ids: int64 [B, P] on the model's device, all of one length; P may be 0.
            spec: the model's facts.
            seed: of Gumbel noise and random remasking; noise is drawn on the device of the logits.
            on_step: called after every forward.
        """
        canvas = open_canvas(prompt_ids, self.gen_length, spec)
        prompt = prompt_ids.shape[1]
        block = self.block_length or self.gen_length
        spans = [slice(start, start + block) for start in range(prompt, canvas.shape[1], block)]
        return self._denoise(model, canvas, spans, prompt, self.steps or self.gen_length, spec, seed, on_step)

    @torch.no_grad()
    def fill(
        self, model: LogitsFn, canvas: Tensor, spec: DiffusionSpec, *, seed: int, on_step: OnStep | None = None
    ) -> Trajectory:
        """Fill the masks of `canvas` int64 [B, L], wherever they are, as one block of `steps` steps.

        Rows may hold different numbers of masks: each has its own quotas. `gen_length` and `block_length` play no part;
        `steps` must be given.
        """
        check_ids(canvas, spec, where="canvas")
        if self.steps is None:
            raise FeasibilityError("filling needs a number of steps", where="steps", remedy="Give steps=, say 4")
        return self._denoise(model, canvas.long(), [slice(0, canvas.shape[1])], 0, self.steps, spec, seed, on_step)

    def _denoise(
        self,
        model: LogitsFn,
        canvas: Tensor,
        spans: list[slice],
        prompt: int,
        steps: int,
        spec: DiffusionSpec,
        seed: int,
        on_step: OnStep | None,
    ) -> Trajectory:
        rng = generator(seed, "llada", device=canvas.device)
        given = canvas != spec.mask_id
        committed_at = torch.full_like(canvas, -1)
        per_block, nfe = steps // len(spans), 0
        for number, span in enumerate(spans):
            quotas = quota(canvas[:, span].eq(spec.mask_id).sum(1), per_block)
            for local in quotas.any(0).nonzero().flatten().tolist():
                step = number * per_block + local
                masked = canvas == spec.mask_id
                logits = guided_logits(model, canvas, given, spec, self.cfg_scale)
                check_finite(logits[:, span], step)
                proposal, certainty = self._propose(logits[:, span].double(), spec, rng)
                ranking = torch.full(canvas.shape, -torch.inf, dtype=torch.float64, device=canvas.device)
                ranking[:, span] = certainty.masked_fill(~masked[:, span], -torch.inf)
                chosen = most_certain(ranking, quotas[:, local]) & masked
                seen = canvas
                canvas = canvas.clone()
                canvas[:, span] = torch.where(chosen[:, span], proposal, canvas[:, span])
                committed_at[chosen] = step
                nfe += 2 if self.cfg_scale else 1
                if on_step is not None:
                    on_step(Step(step, steps, number, prompt, seen, masked, ranking, chosen))
        return trajectory(canvas, prompt, nfe, committed_at)

    def _propose(self, logits: Tensor, spec: DiffusionSpec, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token and certainty of each position: logits [B, S, V] -> ids [B, S], float64 [B, S]."""
        proposal = draw(logits, self.temperature, spec.mask_id, rng)
        if self.remasking == "random":
            return proposal, torch.rand(proposal.shape, generator=rng, dtype=torch.float64, device=logits.device)
        return proposal, logits.softmax(-1).gather(-1, proposal[..., None])[..., 0]


def draw(logits: Tensor, temperature: float, mask_id: int, rng: torch.Generator) -> Tensor:
    """Sample softmax(logits / temperature) by the Gumbel-max trick; argmax at temperature 0; never the mask token.

    Args:
        logits: float64 [..., V]; -inf excludes a token.
        temperature: scale of the noise. argmax(logits + T * g) = argmax(exp(logits) / (-log u)^T), LLaDA's form.
        mask_id: the token that is not proposed.
        rng: generator on the device of the logits.
    """
    allowed = logits.clone()
    allowed[..., mask_id] = -torch.inf
    if temperature:
        allowed += temperature * gumbel(allowed, rng)
    return allowed.argmax(-1)


def gumbel(like: Tensor, rng: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float64, in the shape and on the device of `like`; finite."""
    uniform = torch.rand(like.shape, generator=rng, dtype=torch.float64, device=like.device)
    return -(-uniform.clamp_(min=torch.finfo(torch.float64).tiny).log()).log()


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


def guided_logits(model: LogitsFn, canvas: Tensor, given: Tensor, spec: DiffusionSpec, scale: float) -> Tensor:
    """Logits [B, L, V], guided by what was given: un + (scale + 1) * (cond - un), `given` masked in `un`.

    LLaDA, arXiv 2502.09992, appendix A.2 (unsupervised classifier-free guidance). Both halves run as one batch of 2B.
    """
    if not scale:
        return logits_of(model, canvas, spec)
    blind = canvas.masked_fill(given, spec.mask_id)
    conditional, unconditional = logits_of(model, torch.cat([canvas, blind]), spec).chunk(2)
    return unconditional + (scale + 1) * (conditional - unconditional)


def trajectory(canvas: Tensor, prompt: int, nfe: int, committed_at: Tensor) -> Trajectory:
    """Close a run: counts from the committed steps int64 [B, L]."""
    committed = (committed_at >= 0).sum().item() / canvas.shape[0]
    return Trajectory(canvas, prompt, nfe, committed_at[:, prompt:], committed / nfe if nfe else 0.0)


def open_canvas(prompt_ids: Tensor, gen_length: int, spec: DiffusionSpec) -> Tensor:
    """int64 [B, P + G]: the prompt and G masks, after refusing prompts that cannot be continued."""
    check_clean(prompt_ids, spec, where="prompt_ids", more=gen_length)
    masks = torch.full((prompt_ids.shape[0], gen_length), spec.mask_id, device=prompt_ids.device)
    return torch.cat([prompt_ids.long(), masks], dim=1)


def check_positive(options: object, *names: str) -> None:
    """Refuse options below 1; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise FeasibilityError(f"{value} is less than 1", where=name, remedy="Use 1 or more")


def check_not_negative(options: object, *names: str) -> None:
    """Refuse options below 0."""
    for name in names:
        if not getattr(options, name) >= 0:
            raise FeasibilityError(f"{getattr(options, name)} is not at least 0", where=name, remedy="Use 0 or more")


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown word, naming the nearest."""
    if value not in known:
        raise FeasibilityError(f"{value!r} is unknown", where=name, remedy=nearest(value, known))


def _nearest_multiple(value: int, unit: int) -> int:
    """The multiple of `unit` closest to `value`, at least one; the larger of two equally close.

    >>> _nearest_multiple(100, 32), _nearest_multiple(3, 32)
    (96, 32)
    """
    return max(unit, (2 * value + unit) // (2 * unit) * unit)


def _divisor(value: int, near: int) -> int:
    """The divisor of `value` closest to `near`; the smaller of two equally close."""
    return min((d for d in range(1, value + 1) if value % d == 0), key=lambda d: (abs(d - near), d))
