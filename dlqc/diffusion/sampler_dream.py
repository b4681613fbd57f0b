"""Dream's sampler: one canvas, a linear time grid, four rules for what to reveal.

    t = linspace(1, eps, steps + 1)
    x = prompt + [MASK] * G
    for each step i:
        p = softmax(filter(model(x) / temperature))           top_p, then top_k
        token ~ p                                             argmax at temperature 0
        origin: reveal each masked position with probability 1 - t[i+1] / t[i]
        else:   reveal the floor(masks * (1 - t[i+1] / t[i])) masked positions of the highest certainty
        the last step reveals all that is left

| alg | certainty |
|---|---|
| `maskgit_plus` | p[token] |
| `topk_margin` | the largest p less the second largest |
| `entropy` | sum p log p |

With alg_temp > 0 positions are drawn without replacement from softmax(certainty / alg_temp) instead.

Dream 7B, arXiv 2508.15487, and the `diffusion_generate` of its authors. The grid and the count are computed in float32,
as published: floor() of a product near an integer depends on it. Ties and the mask token: as in `denoising`. A step
that reveals nothing runs no forward; with steps equal to the generated length the first step is one of them.

Shapes: B batch, P prompt, G generated positions, L = P + G, V vocabulary.
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
    draw,
    gumbel,
    most_certain,
    spread,
)
from dlqc.diffusion.masking import LogitsFn
from dlqc.diffusion.network import Network
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True)
class DreamSampler(Sampler):
    """Options of Dream's sampler.

    Attributes:
        steps: steps of the time grid; None: one per generated token.
        gen_length: tokens to generate.
        alg: "origin", "maskgit_plus", "topk_margin" or "entropy".
        alg_temp: randomness of the choice of positions; 0 takes the most certain.
        temperature: of the token distribution; 0 takes the argmax.
        top_p: keep the smallest set of tokens whose probability reaches top_p; None or 1: all.
        top_k: keep the k most probable tokens (and those equal to the k-th); None: all.
        eps: end of the time grid.
    """

    name: ClassVar[str] = "dream"
    steps: int | None = None
    gen_length: int = 128
    alg: str = "entropy"
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(self, "gen_length", "steps", "top_k")
        check_not_negative(self, "temperature", "alg_temp")
        check_known("alg", self.alg, ALGORITHMS)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise FeasibilityError(f"{self.top_p:g} is no probability", where="top_p", remedy="Use 0 < top_p <= 1")
        if not 0 < self.eps < 1:
            raise FeasibilityError(f"{self.eps:g} ends no time grid", where="eps", remedy="Use 0 < eps < 1, say 1e-3")

    @torch.no_grad()
    def _denoise(self, model: LogitsFn, batch: Batch, spec: DiffusionSpec) -> Steps:
        canvas, net, books = batch.canvas, Network(model, spec, batch.canvas, batch.visible), Ledger(batch.canvas)
        noise = Noise(batch.seeds, self.name, canvas.device)
        prompt, steps, length = batch.prompt, self.steps or self.gen_length, self.gen_length
        grid = torch.linspace(1, self.eps, steps + 1)
        for step in range(steps):
            masked = canvas == spec.mask_id
            share = torch.ones(()) if step == steps - 1 else 1 - grid[step + 1] / grid[step]
            # All rows hold equally many masks, except under "origin", where each position has its own coin.
            count = int(masked[0].sum().cpu() * share)
            chosen = torch.zeros_like(masked)
            if self.alg == "origin":
                chosen = masked & (spread(noise.uniform("coin", 0, step, length), canvas, prompt, 2.0) < float(share))
            if not (bool(chosen.any()) if self.alg == "origin" else count):
                continue
            logits = net.full(canvas)[:, prompt:]
            net.check(logits, step, canvas)
            tokens, certainty = self._propose(logits.double(), spec, noise, step)
            ranking = spread(certainty.masked_fill(~masked[:, prompt:], -torch.inf), canvas, prompt, -torch.inf)
            if self.alg != "origin":
                shaken = ranking
                if self.alg_temp:
                    jitter = gumbel(noise.uniform("position", 0, step, length))
                    shaken = ranking + self.alg_temp * spread(jitter, canvas, prompt, 0.0)
                chosen = most_certain(shaken, torch.full_like(canvas[:, 0], count)) & masked
            seen, canvas = canvas, torch.where(chosen, spread(tokens, canvas, prompt, 0), canvas)
            books.enter(step, masked, chosen)
            yield Step(step, steps, 0, prompt, seen, masked, ranking, chosen, canvas)
        return books.close(canvas, prompt, net)

    def _propose(self, logits: Tensor, spec: DiffusionSpec, noise: Noise, step: int) -> tuple[Tensor, Tensor]:
        """Token and certainty of each position: logits float64 [B, G, V] -> ids [B, G], float64 [B, G]."""
        tokens, p = draw_filtered(logits, self.temperature, self.top_p, self.top_k, spec.mask_id, noise, 0, step)
        if self.alg == "topk_margin":
            first, second = p.topk(2, dim=-1).values.unbind(-1)
            return tokens, first - second
        if self.alg == "entropy":
            return tokens, (p * (p + 1e-10).log()).sum(-1)
        return tokens, p.gather(-1, tokens[..., None])[..., 0]


def draw_filtered(
    logits: Tensor,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    mask_id: int,
    noise: Noise,
    block: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Tokens drawn after temperature and filters: logits float64 [B, S, V] -> ids [B, S], probabilities [B, S, V]."""
    scaled = logits / temperature if temperature else logits
    kept = keep_top_k(keep_top_p(scaled, top_p), top_k)
    words = kept.index_fill(-1, torch.tensor(mask_id, device=kept.device), -torch.inf)
    shape = kept.shape[1:]
    tokens = draw(kept, float(temperature > 0), mask_id, lambda: noise.uniform("token", block, step, *shape))
    # Where the filters left the mask token alone, the most probable other token stands in.
    stand_in = words.isneginf().all(-1)
    if bool(stand_in.any()):
        scaled = scaled.index_fill(-1, torch.tensor(mask_id, device=kept.device), -torch.inf)
        tokens = torch.where(stand_in, scaled.argmax(-1), tokens)
    return tokens, kept.softmax(-1)


def keep_top_p(logits: Tensor, top_p: float | None) -> Tensor:
    """Logits [..., V] with -inf outside the smallest set of most probable tokens whose probability exceeds top_p.

    >>> keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.7).exp().round(decimals=1).tolist()
    [0.5, 0.30000001192092896, 0.0]
    """
    if top_p is None or top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(-1)
    surplus = torch.zeros_like(p, dtype=torch.bool)
    surplus[..., 1:] = p.cumsum(-1)[..., :-1] > top_p
    return logits.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), -torch.inf)


def keep_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """Logits [..., V] with -inf below the k-th largest."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
