"""Token weights: how much each token of a denoising state counts in every statistic.

    Uniform               c = 1
    Certainty             CGQ of DLLMQuant (arXiv 2508.14090, eq. 10): c = base + slope·confidence if masked, else `visible`
    SinkAware             arXiv 2602.17664: tokens that attention collects in now and then count less
    Frontier              FAIR-Calib (arXiv 2606.06547): what is committed soon, and what the model is sure of, counts more

Shapes: S states, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dlqc.errors import CalibrationError, RecipeError
from dlqc.samplers import Canvases, Teacher, shift_rows


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


@dataclass(frozen=True)
class SinkAware(TokenWeight):
    """Sink-aware weights: tokens that draw much attention in their state, but not in most, count less (arXiv 2602.17664).

        m_sj   how much attention token j of state s gets from all heads and layers, mean 1 over j (`dlqc.sinks`)
        φ_sj = sigmoid(sharpness·((m_sj - mean_j m_sj) / std_j m_sj - deviations)),    1 at a sink, 0 elsewhere
        p_j  = mean_s φ_sj                       how steady position j is a sink over the states, which stand at all times
        c_sj = base_sj·(1 - φ_sj·(1 - p_j))      a sink that is always there counts in full, one that comes and goes not at all

    The sinks of autoregressive models sit at fixed positions, and tools protect them; a masked denoiser's move with the canvas,
    and weights that only serve them are not worth keeping. A token's row counts by whether itself is a sink, also where logits
    are shifted.

    Differences from the authors' code: there all sinks are left out, steady or not (steady=False), φ is of the sum of attention
    in its own unit and not in standard deviations, and rows are scaled by 1 - φ, so that second moments are by its square.

    Options:
        base: the weights that are reduced. deviations: above the mean, where φ is one half. sharpness: of the sigmoid.
        steady: spare the sinks that most states have.
    """

    name: ClassVar[str] = "sink_aware"
    base: Uniform | Certainty | Frontier = field(default_factory=Uniform)
    deviations: float = 2.0
    sharpness: float = 5.0
    steady: bool = True

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            what = f"a sigmoid of sharpness {self.sharpness} tells no sinks"
            raise RecipeError(what, where="sink_aware.sharpness", remedy="Use 5")

    def draw(self, canvases: Canvases, generator: torch.Generator, teacher: Teacher) -> Tensor:
        if teacher.mass is None:
            raise CalibrationError("sink-aware weights need the attention of the model", where="weight")
        ids, step = canvases.ids, teacher.batch
        parts = [teacher.mass(ids[i : i + step]) for i in range(0, len(ids), step)]
        factor = self.factors(torch.cat(parts))
        # Weights are by token, and belong to the row that predicts it; here they are about the row itself.
        factor = shift_rows(factor) if teacher.spec.shift else factor
        return self.base.draw(canvases, generator, teacher) * factor

    def factors(self, mass: Tensor) -> Tensor:
        """1 - φ·(1 - p) [S, L] from m [S, L]."""
        centred = mass - mass.mean(dim=1, keepdim=True)
        spread = mass.std(dim=1, keepdim=True, unbiased=False)
        far = centred / torch.where(spread > 0, spread, 1.0)
        sink = torch.sigmoid(self.sharpness * (far - self.deviations))
        transient = 1 - sink.mean(dim=0) if self.steady else torch.ones_like(sink[0])
        return (1 - sink * transient).float()
