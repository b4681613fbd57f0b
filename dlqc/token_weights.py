"""Token weights: how much each token of a denoising state counts in every statistic.

    Uniform               c = 1
    Certainty             CGQ of DLLMQuant (arXiv 2508.14090, eq. 10): c = base + slope·confidence if masked, else `visible`
    Frontier              FAIR-Calib (arXiv 2606.06547): what is committed soon, and what the model is sure of, counts more

Shapes: S states, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dlqc.errors import CalibrationError, RecipeError
from dlqc.samplers import Canvases, Teacher


@dataclass(frozen=True)
class TokenWeight:
    """Base of the token weights: c [S, L], by position, not negative; `draw_states` makes the mean 1.

    A weight of masks and confidences defines `weigh`; one that asks the model more than that defines `draw` instead.
    """

    name: ClassVar[str]
    needs_confidence: ClassVar[bool] = False

    def weigh(self, masked: Tensor, confidence: Tensor | None) -> Tensor:
        """c [S, L] from which tokens are masked, bool [S, L], and how sure the model is of them, [S, L]."""
        raise TypeError(f"{type(self).__name__} does not define weigh()")

    def draw(self, canvases: Canvases, generator: torch.Generator, teacher: Teacher) -> Tensor:
        """c [S, L] of the canvases."""
        confidence = teacher.confidence(canvases.ids) if self.needs_confidence else None
        return self.weigh(canvases.ids == teacher.spec.mask_id, confidence)


@dataclass(frozen=True)
class Uniform(TokenWeight):
    """Every token counts the same."""

    name: ClassVar[str] = "uniform"

    def weigh(self, masked: Tensor, confidence: Tensor | None) -> Tensor:
        return torch.ones(masked.shape)


@dataclass(frozen=True)
class Certainty(TokenWeight):
    """Certainty-guided weights: masked tokens count base + slope·confidence, visible ones `visible`.

    DLLMQuant's constants are 0.7 for visible and 1 times the token's score for masked tokens.
    """

    name: ClassVar[str] = "certainty"
    needs_confidence: ClassVar[bool] = True
    visible: float = 0.7
    base: float = 0.0
    slope: float = 1.0

    def weigh(self, masked: Tensor, confidence: Tensor | None) -> Tensor:
        if confidence is None:
            raise CalibrationError("certainty weights need the model's confidences", where="weight")
        return torch.where(masked, self.base + self.slope * confidence, torch.tensor(self.visible))


@dataclass(frozen=True)
class Frontier(TokenWeight):
    """Frontier weights: each state is filled in random order, and tokens count by when they are committed.

        w_i = floor + Σ_k λ0(t_k)·1[i committed at step k] + λ1·(1/K) Σ_k c~_{k,i}·1[i masked at step k]
        λ0(t) = commit·(1 + boost·t)                      t_k: share of the row that is masked before step k
        c~_{k,i} = c_{k,i} / mean of c_k over the masked tokens of the row,    c the largest probability at i

    A state without masks is filled from the empty canvas; this is the paper's setting, weights for visible text
    (sampler=clean). From a masked state the rollout goes on from there: visible tokens get the floor, the next to be
    committed the most.

    Differences from FAIR-Calib, which has no public code: what is committed is the text underneath, not the model's
    draw, so that weights belong to the tokens they multiply; confidences are averaged over the steps instead of summed;
    every state is a probe of its own (the paper has 512), and the window of 256 tokens outside of which the floor holds
    is the whole row. The paper's constants are not known to us; the defaults are ours.

    Options:
        commit, boost: of λ0. confidence: λ1. floor: what every token counts. steps: K, forwards per state.
    """

    name: ClassVar[str] = "frontier"
    commit: float = 1.0
    boost: float = 1.0
    confidence: float = 1.0
    floor: float = 0.1
    steps: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RecipeError(f"{self.steps} steps commit nothing", where="frontier.steps", remedy="Use 8")

    def draw(self, canvases: Canvases, generator: torch.Generator, teacher: Teacher) -> Tensor:
        mask_id = teacher.spec.mask_id
        empty = (canvases.ids != mask_id).all(dim=1, keepdim=True)
        ids = canvases.ids.masked_fill(empty, mask_id)
        left = ids == mask_id
        # Masked positions first, in random order: rank [S, L] among the masked ones of the row.
        order = torch.rand(ids.shape, generator=generator).masked_fill(~left, 2.0)
        rank, masks = order.argsort(dim=1).argsort(dim=1), left.sum(dim=1, keepdim=True)
        weights = torch.full(ids.shape, self.floor)
        for step in range(self.steps):
            left = ids == mask_id
            now = left & (rank < masks * (step + 1) // self.steps)
            t = left.float().mean(dim=1, keepdim=True)
            weights += self.commit * (1 + self.boost * t) * now
            if self.confidence and bool(left.any()):
                sure = teacher.confidence(ids) * left
                mean = sure.sum(dim=1, keepdim=True) / left.sum(dim=1, keepdim=True).clamp(min=1)
                weights += self.confidence / self.steps * sure / mean.clamp(min=1e-12)
            ids = torch.where(now, canvases.clean, ids)
        return weights
