"""LLaDA's sampler: semi-autoregressive blocks, low-confidence or random remasking, Gumbel noise, guidance.

    x = prompt + [MASK] * G
    for each block, left to right:
        for each step of the block:
            logits    = model(x)                                  the whole x, later blocks still masked
            proposal  = argmax(logits + temperature * gumbel)     float64
            certainty = softmax(logits)[proposal]                 or uniform noise ("random")
            commit the quota[step] most certain masked positions of the block

LLaDA, arXiv 2502.09992: Algorithm 5 (low confidence), Algorithm 4 (random); the authors' `generate.py` defines quotas,
noise and guidance.

Two choices where the published code leaves things open, ties and the mask token, are in `dlqc.diffusion.denoising`; both leave
every other result untouched.

Shapes: B batch, P prompt, G generated positions, L = P + G, S positions of the current block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dlqc.diffusion.denoising import (
    Batch,
    Ledger,
    Noise,
    OnStep,
    Sampler,
    Step,
    Steps,
    Trajectory,
    check_blocks,
    check_known,
    check_not_negative,
    check_positive,
    draw,
    drive,
    most_certain,
    quota,
    spread,
)
from dlqc.diffusion.masking import LogitsFn, check_ids
from dlqc.diffusion.network import Network
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class LLaDASampler(Sampler):
    """Options of LLaDA's sampler.

    Attributes:
        steps: forwards in all, shared equally by the blocks; None: one per generated token.
        gen_length: tokens to generate.
        block_length: tokens of a block; None: one block ("pure diffusion").
        temperature: scale of the Gumbel noise on the logits; 0 takes the argmax.
        cfg_scale: w of classifier-free guidance, un + (w + 1) * (cond - un); 0 switches it off.
        remasking: "low_confidence" or "random".
    """

    name: ClassVar[str] = "llada"
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
        check_blocks(self.gen_length, self.block_length or self.gen_length, self.steps)

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
        batch = Batch(canvas.long(), 0, tuple(seed + row for row in range(canvas.shape[0])))
        return drive(self._blocks(model, batch, [slice(0, canvas.shape[1])], self.steps, spec), on_step)

    def _denoise(self, model: LogitsFn, batch: Batch, spec: DiffusionSpec) -> Steps:
        block = self.block_length or self.gen_length
        spans = [slice(start, start + block) for start in range(batch.prompt, batch.canvas.shape[1], block)]
        return self._blocks(model, batch, spans, self.steps or self.gen_length, spec)

    @torch.no_grad()
    def _blocks(self, model: LogitsFn, batch: Batch, spans: list[slice], steps: int, spec: DiffusionSpec) -> Steps:
        canvas, net, books = batch.canvas, Network(model, spec, batch.canvas, batch.visible), Ledger(batch.canvas)
        noise = Noise(batch.seeds, self.name, canvas.device)
        given, per_block = canvas != spec.mask_id, steps // len(spans)
        for number, span in enumerate(spans):
            quotas = quota(canvas[:, span].eq(spec.mask_id).sum(1), per_block)
            for local in quotas.any(0).nonzero().flatten().tolist():
                step = number * per_block + local
                masked = canvas == spec.mask_id
                greedy = is_greedy(self.temperature, self.remasking) and not self.cfg_scale
                found = net.propose(canvas, masked[:, span], span.start, span.stop) if greedy else None
                if found is None:
                    logits = net.full(canvas, given=given, scale=self.cfg_scale)[:, span]
                    net.check(logits, step, canvas)
                    found = propose(
                        logits.double(), self.temperature, self.remasking, spec.mask_id, noise, number, local
                    )
                tokens, certainty = found
                certainty = certainty.masked_fill(~masked[:, span], -torch.inf)
                ranking = spread(certainty, canvas, span.start, -torch.inf)
                chosen = most_certain(ranking, quotas[:, local]) & masked
                seen, canvas = canvas, torch.where(chosen, spread(tokens, canvas, span.start, 0), canvas)
                books.enter(step, masked, chosen, 2 if self.cfg_scale else 1)
                yield Step(step, steps, number, batch.prompt, seen, masked, ranking, chosen, canvas)
        return books.close(canvas, batch.prompt, net)


def is_greedy(temperature: float, remasking: str) -> bool:
    """Whether all that a step reads of its logits is the argmax and its probability (`Network.propose`)."""
    return not temperature and remasking == "low_confidence"


def propose(
    logits: Tensor, temperature: float, remasking: str, mask_id: int, noise: Noise, block: int, step: int
) -> tuple[Tensor, Tensor]:
    """Token and certainty of each position: logits float64 [B, S, V] -> ids [B, S], float64 [B, S]."""
    shape = logits.shape[1:]
    tokens = draw(logits, temperature, mask_id, lambda: noise.uniform("token", block, step, *shape))
    if remasking == "random":
        return tokens, noise.uniform("position", block, step, shape[0])
    return tokens, logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
