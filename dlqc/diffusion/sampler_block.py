"""Block diffusion's sampler: blocks one after the other, each seeing itself and what came before.

    the whole blocks of the prompt: K and V stored by one forward (prefill)
    for each further block of `block_length` positions, the first of which may begin with the rest of the prompt:
        until the block has no mask:
            logits = step(block, K and V of the earlier blocks)
            commit by the strategy
        one forward more, to store K and V of the finished block

| strategy | commits of the masked positions of the block |
|---|---|
| `sequential` | the quota[step] first |
| `low_confidence_static` | the quota[step] most certain |
| `low_confidence_dynamic` | all with certainty > threshold, or the quota[step] most certain where those are fewer |
| `entropy_bounded` | the k of lowest entropy, k the most whose entropies together stay below `entropy_bound`, at least one |
| `joint_threshold` | all with certainty > threshold, at least one; and edits, see below |

`joint_threshold` may take back what it fixed: a token of the block (not of the prompt) that differs from the proposal is
overwritten where the proposal's certainty is > edit_threshold. The block ends when a step changes nothing, or when
`max_edit_steps` steps have run on a block without masks. Its last forward has seen the final tokens, so none more is needed.

SDAR (arXiv 2510.06303) and the authors' `generate.py`: quotas of block_length tokens over `steps`, certainty of the drawn token
after temperature and filters. LLaDA2.1's joint threshold as SGLang serves it. Different from there, and without effect on what is
generated: positions that are no mask are never committed by a quota, a block is always denoised to its end, and no K and V are
stored after the last block. The model has to be block-causal with the same blocks, counted from the first position.

Shapes: as in `denoising`; S = block_length.
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
    Sampler,
    Step,
    Steps,
    check_known,
    check_not_negative,
    check_positive,
    check_share,
    most_certain,
    quota,
    spread,
)
from dlqc.diffusion.masking import LogitsFn
from dlqc.diffusion.network import Network, cached_model
from dlqc.diffusion.sampler_dream import draw_filtered
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

STRATEGIES = (
    "sequential",
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy_bounded",
    "joint_threshold",
)


@dataclass(frozen=True)
class BlockDiffusionSampler(Sampler):
    """Options of block diffusion's sampler.

    Attributes:
        gen_length: tokens to generate; the last block is denoised whole and cut.
        block_length: tokens of a block, as the model was trained.
        steps: denoising steps that the quotas of a block are for; None: one a token.
        strategy: what a step commits, see the module.
        threshold: certainty above which a token is committed (`low_confidence_dynamic`, `joint_threshold`).
        entropy_bound: sum of entropies in nats (`entropy_bounded`).
        edit_threshold: certainty above which a token is overwritten (`joint_threshold`).
        max_edit_steps: steps on a block without masks, at most (`joint_threshold`).
        temperature: of the token distribution; 0 takes the argmax.
        top_p, top_k: as Dream's sampler.
        cache: store K and V of finished blocks; if not, all earlier blocks are computed anew at each step.
        stop_at_eos: end a row after the block that holds the end-of-text token; what is left becomes that token.
    """

    name: ClassVar[str] = "block_diffusion"
    gen_length: int = 128
    block_length: int = 4
    steps: int | None = None
    strategy: str = "low_confidence_dynamic"
    threshold: float = 0.85
    entropy_bound: float = 0.1
    edit_threshold: float = 0.0
    max_edit_steps: int = 16
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cache: bool = True
    stop_at_eos: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "gen_length", "block_length", "steps", "top_k")
        check_not_negative(self, "temperature", "entropy_bound", "max_edit_steps")
        check_known("strategy", self.strategy, STRATEGIES)
        check_share(self, "threshold", "edit_threshold", "top_p")
        if self.steps is not None and self.steps > self.block_length:
            raise FeasibilityError(
                f"{self.steps} steps for blocks of {self.block_length} tokens",
                where="steps",
                remedy=f"Use steps={self.block_length} or fewer: they are the steps of one block",
            )
        if self.strategy == "joint_threshold" and self.temperature:
            raise FeasibilityError(
                "edits of drawn tokens need not come to an end",
                where="temperature",
                remedy="Use temperature=0 with joint_threshold",
            )

    def _room(self, prompt: int) -> int:
        return -(-(prompt + self.gen_length) // self.block_length) * self.block_length - prompt

    def _aligned(self) -> bool:
        return True

    @torch.no_grad()
    def _denoise(self, model: LogitsFn, batch: Batch, spec: DiffusionSpec) -> Steps:
        self._refuse(model, batch.canvas.shape[1], spec)
        canvas, books, size = batch.canvas, Ledger(batch.canvas), self.block_length
        net, noise = (
            Network(model, spec, batch.canvas, batch.visible, cache=self.cache),
            Noise(batch.seeds, self.name, canvas.device),
        )
        prompt, length = batch.prompt, batch.canvas.shape[1]
        joint, first = self.strategy == "joint_threshold", prompt // size * size
        going = torch.ones_like(canvas[:, 0], dtype=torch.bool)
        if self.cache and first:
            net.store(canvas, 0, first, total=first)
            books.charge(going)
        most = size + self.max_edit_steps + 1 if joint else size
        total = most * ((length - first) // size)
        for number, start in enumerate(range(first, length, size)):
            stop = start + size
            given = canvas[:, start:stop] != spec.mask_id
            open_rows, edits = going.clone(), torch.zeros_like(canvas[:, 0])
            for local in range(most):
                if not joint:
                    open_rows = going & (canvas[:, start:stop] == spec.mask_id).any(1)
                if not bool(open_rows.any()):
                    break
                index, masked = number * most + local, canvas == spec.mask_id
                here, p, window = masked[:, start:stop], None, (start, stop) if self.cache else None
                wanted = torch.ones_like(here) if joint else here
                greedy = self._greedy()
                found = net.propose(canvas, wanted, start, stop, window=window, total=stop) if greedy else None
                if found is None:
                    if self.cache:
                        logits = net.window(canvas, start, stop, total=stop)
                    else:
                        logits = net.full(canvas, stop=stop)[:, start:stop]
                    net.check(logits, index, canvas)
                    tokens, p = draw_filtered(
                        logits.double(), self.temperature, self.top_p, self.top_k, spec.mask_id, noise, number, local
                    )
                    found = tokens, p.gather(-1, tokens[..., None])[..., 0]
                tokens, certainty = found
                picked = self._choose(certainty, p, here, local) & open_rows[:, None]
                if joint:
                    edits += (~here.any(1) & open_rows).long()
                    over = ~here & ~given & (tokens != canvas[:, start:stop]) & (certainty > self.edit_threshold)
                    picked = (picked | (over & open_rows[:, None])) & (edits <= self.max_edit_steps)[:, None]
                books.charge(open_rows & ~picked.any(1))
                open_rows = open_rows & picked.any(1)
                chosen = spread(picked, canvas, start, False)
                ranking = spread(certainty.masked_fill(~(here | picked), -torch.inf), canvas, start, -torch.inf)
                seen, canvas = canvas, torch.where(chosen, spread(tokens, canvas, start, 0), canvas)
                books.enter(index, masked, chosen)
                yield Step(index, total, number, prompt, seen, masked, ranking, chosen, canvas)
            canvas, going = self._end(canvas, prompt, stop, going, spec)
            if not bool(going.any()):
                break
            if self.cache and not joint and stop < length:
                net.store(canvas, start, stop, total=stop)
                books.charge(going)
        return books.close(canvas[:, : prompt + self.gen_length], prompt, net)

    def _greedy(self) -> bool:
        """Whether all that a step reads of its logits is the argmax and its probability (`Network.propose`)."""
        unfiltered = (self.top_p is None or self.top_p >= 1) and self.top_k is None
        return not self.temperature and unfiltered and self.strategy != "entropy_bounded"

    def _choose(self, certainty: Tensor, p: Tensor | None, masked: Tensor, local: int) -> Tensor:
        """Masked positions to commit: certainty float64 [B, S], p [B, S, V] (for an entropy alone) -> bool [B, S]."""
        steps = self.steps or self.block_length
        planned = int(quota(torch.tensor([self.block_length]), steps)[0, min(local, steps - 1)])
        count = masked.sum(1).clamp(max=planned)
        ranking = certainty.masked_fill(~masked, -torch.inf)
        sure = ranking > self.threshold
        if self.strategy == "sequential":
            ranking = -torch.arange(masked.shape[1], device=masked.device).double().expand_as(certainty)
            return most_certain(ranking.masked_fill(~masked, -torch.inf), count)
        if self.strategy == "low_confidence_static":
            return most_certain(ranking, count)
        if self.strategy == "low_confidence_dynamic":
            # At least what is planned; SDAR counts the plan, of which a partly given block may have fewer masks.
            return torch.where((sure.sum(1) >= planned)[:, None], sure, most_certain(ranking, count))
        if self.strategy == "joint_threshold":
            return most_certain(ranking, sure.sum(1).clamp(min=1)) & masked
        assert p is not None
        entropy = torch.special.entr(p).sum(-1).masked_fill(~masked, torch.inf)
        within = (entropy.sort(dim=1, stable=True).values.cumsum(1) < self.entropy_bound).sum(1).clamp(min=1)
        return most_certain(-entropy, within) & masked

    def _end(self, canvas: Tensor, prompt: int, stop: int, going: Tensor, spec: DiffusionSpec) -> tuple[Tensor, Tensor]:
        """Rows that have come to their end are filled up, the others go on."""
        if not self.stop_at_eos:
            return canvas, going
        assert spec.eos_id is not None
        over = going & canvas[:, prompt:stop].eq(spec.eos_id).any(1)
        canvas = canvas.clone()
        canvas[over, stop:] = spec.eos_id
        return canvas, going & ~over

    def _refuse(self, model: LogitsFn, length: int, spec: DiffusionSpec) -> None:
        if self.stop_at_eos and spec.eos_id is None:
            raise FeasibilityError(
                "the model has no end-of-text token", where="stop_at_eos", remedy="Leave stop_at_eos out"
            )
        if self.cache:
            block = torch.arange(length) // self.block_length
            causal = torch.equal(cached_model(model, spec).mask(length), block[:, None] >= block)
        else:
            causal = spec.attention == "block-causal"
        if not causal:
            raise FeasibilityError(
                f"the model is not block-causal with blocks of {self.block_length}",
                where="block_length",
                remedy="Give the model's own block_length, or use fast_dllm, which takes models with full attention",
            )
