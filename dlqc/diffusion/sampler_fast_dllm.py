"""Fast-dLLM's sampler: semi-autoregressive blocks with a cache of keys and values, several tokens a step.

    x = prompt + [MASK] * G
    for each block [s, e), left to right:
        logits = model(x), all K and V kept                       the refresh, also the block's first step
        commit
        until the block has no mask:
            prefix cache:  logits = step(x[s:],  K and V of x[:s])            later blocks computed anew
            dual cache:    logits = step(x[s:e], K and V of x[:s], x[e:])     the block alone
            commit

K and V outside of the window are those of the last refresh: stale where tokens in the block have changed since.

| rule | commits of the masked positions of the block, most certain first |
|---|---|
| `threshold` | those with certainty >= threshold, at least one |
| `factor` | the largest n with (n + 1)(1 - c_n) <= factor, c_n the n-th largest certainty; at least one |
| neither | quotas of `steps`, as LLaDA's sampler |

Fast-dLLM, arXiv 2505.22618: Algorithms 1 and 2, section 3.3 for the factor; the authors' code says >= and <=. (It commits one
token more than the rule where only the last masked position fails the factor; that is not followed.) Ties and the mask token: as
in `denoising`. Where logits are shifted, the row before the window is computed with it, since it predicts the first position.

Shapes: as in `denoising`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dlqc.diffusion.denoising import (
    Batch,
    Ledger,
    Noise,
    Sampler,
    Step,
    Steps,
    check_blocks,
    check_known,
    check_not_negative,
    check_positive,
    check_share,
    most_certain,
    quota,
    spread,
)
from dlqc.diffusion.masking import LogitsFn
from dlqc.diffusion.network import Network
from dlqc.diffusion.sampler_llada import REMASKING, is_greedy, propose
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

Cache = Literal["none", "prefix", "dual"]
CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True)
class FastDLLMSampler(Sampler):
    """Options of Fast-dLLM's sampler.

    Attributes:
        gen_length: tokens to generate.
        block_length: tokens of a block, or all where there are fewer.
        cache: "none" (every step is a full forward), "prefix" or "dual".
        threshold: certainty from which a token is committed; None: see `factor` and `steps`.
        factor: takes the place of `threshold`; larger commits more.
        steps: forwards in all, shared equally by the blocks, where neither threshold nor factor is set; None: one a token.
        refresh: also compute everything anew after so many steps in a block; 1 is decoding without a cache. None: never.
        temperature: scale of the Gumbel noise on the logits; 0 takes the argmax.
        remasking: "low_confidence" or "random".
    """

    name: ClassVar[str] = "fast_dllm"
    gen_length: int = 128
    block_length: int = 32
    cache: Cache = "dual"
    threshold: float | None = 0.9
    factor: float | None = None
    steps: int | None = None
    refresh: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"

    def __post_init__(self) -> None:
        check_positive(self, "gen_length", "block_length", "steps", "refresh")
        check_not_negative(self, "temperature")
        check_known("cache", self.cache, CACHES)
        check_known("remasking", self.remasking, REMASKING)
        check_share(self, "threshold")
        if self.factor is not None:
            check_not_negative(self, "factor")
        if self.steps is not None and not self._by_quota():
            raise FeasibilityError(
                "a threshold or factor decides how many steps there are",
                where="steps",
                remedy="Leave steps out, or set threshold=None",
            )
        check_blocks(self.gen_length, self._block(), self.steps)

    def _block(self) -> int:
        return min(self.block_length, self.gen_length)

    def _by_quota(self) -> bool:
        return self.threshold is None and self.factor is None

    @torch.no_grad()
    def _denoise(self, model: LogitsFn, batch: Batch, spec: DiffusionSpec) -> Steps:
        canvas, books = batch.canvas, Ledger(batch.canvas)
        net = Network(model, spec, batch.canvas, batch.visible, cache=self.cache != "none")
        noise = Noise(batch.seeds, self.name, canvas.device)
        length, block = canvas.shape[1], self._block()
        per_block = (self.steps or self.gen_length) * block // self.gen_length if self._by_quota() else block
        total = per_block * (self.gen_length // block)
        for number, start in enumerate(range(batch.prompt, length, block)):
            stop = start + block
            quotas = quota(canvas[:, start:stop].eq(spec.mask_id).sum(1), per_block)
            for local in range(per_block):
                masked = canvas == spec.mask_id
                here = masked[:, start:stop]
                if not bool(here.any()):
                    break
                if self._by_quota() and not bool(quotas[:, local].any()):
                    continue
                window = self._window(length, start, stop, local)
                greedy = is_greedy(self.temperature, self.remasking)
                found = net.propose(canvas, here, start, stop, window=window) if greedy else None
                if found is None:
                    logits = net.full(canvas) if window is None else net.window(canvas, *window)
                    first = 0 if window is None else window[0]
                    logits = logits[:, start - first : stop - first]
                    net.check(logits, number * per_block + local, canvas)
                    found = propose(
                        logits.double(), self.temperature, self.remasking, spec.mask_id, noise, number, local
                    )
                tokens, certainty = found
                certainty = certainty.masked_fill(~here, -torch.inf)
                chosen = spread(self._choose(certainty, quotas[:, local]) & here, canvas, start, False)
                ranking = spread(certainty, canvas, start, -torch.inf)
                seen, canvas = canvas, torch.where(chosen, spread(tokens, canvas, start, 0), canvas)
                index = number * per_block + local
                books.enter(index, masked, chosen)
                yield Step(index, total, number, batch.prompt, seen, masked, ranking, chosen, canvas)
        return books.close(canvas, batch.prompt, net)

    def _window(self, length: int, start: int, stop: int, local: int) -> tuple[int, int] | None:
        """The positions that a step computes, all others coming from the cache: at a refresh all; None without a cache."""
        if self.cache == "none":
            return None
        if local == 0 or (self.refresh is not None and local % self.refresh == 0):
            return 0, length
        return start, length if self.cache == "prefix" else stop

    def _choose(self, certainty: Tensor, quotas: Tensor) -> Tensor:
        """Positions to commit: certainty float64 [B, S], -inf where there is no mask -> bool [B, S]."""
        if self.factor is None and self.threshold is None:
            return most_certain(certainty, quotas)
        if self.factor is None:
            wanted = (certainty >= (self.threshold or 0.0)).sum(1)
        else:
            # Certainty falls and the bound rises with n, so those that pass come first.
            ordered = certainty.sort(dim=1, descending=True).values
            n = torch.arange(1, certainty.shape[1] + 1, device=certainty.device)
            wanted = (ordered >= 1 - self.factor / (n + 1)).sum(1)
        return most_certain(certainty, wanted.clamp(min=1))
