"""SignRound: rounding learned by signed gradients on the output of the block (Cheng et al., arXiv 2309.05516; AutoRound).

    Ŵ = s·(clamp(round(W/s + V) + z, 0, T) - z),     s = (β·max W - α·min W) / T,     z = round(-α·min W / s)

with V [N, K] within ±½, which decides between the two neighbours of a weight, and α, β within 0 and 1 for each group. round
passes gradients as if it were the identity. All linears of a block are learned together on ‖block(x; Ŵ) - y*‖²
(`dlqc.reconstruct`), y* the output of full precision, by the signs of the gradients alone:

    V ← V - η·sign(∂loss/∂V),  likewise α and β,     η falling linearly from `lr` to zero

from V = 0, α = β = 1, which is rounding to nearest. With lr = 1/steps V can travel half a step of the grid, no more.

What is kept is the best of the points at which the loss on all states is looked at, the start among them: on the calibration
states the result is never worse than its start.

Differences from the official code:
    - there the best step is the one whose minibatch, eight random sequences, had the least loss: which minibatch it was counts
      for more than the step. Here minibatches are the parts that states come in, eight states, in random order.
    - V is held within ±½, as in the paper; in the code 1/steps holds it there
    - scales are rounded to the dtype that they are stored in while learning; there to float16, and stored so
    - symmetric grids are those of `IntFormat`, whose scale is positive
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dlqc.contract import Reads
from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import SCALE_DTYPES, IntFormat, QuantizedWeight
from dlqc.reconstruct import Objective
from dlqc.rounding.contract import BlockRounding, Rounded
from dlqc.straight_through import straight_through


@dataclass(frozen=True)
class SignRound(BlockRounding):
    """Learned rounding.

    Attributes:
        steps: of signed gradient descent, each on one part of the states.
        lr: of the first step; None is 1/steps.
        ranges: also learn α and β.
        act_bits: what the inputs of the linears are rounded to while learning; None leaves them alone.
        against: "exact": the output of full precision on the states of full precision, so that the block makes up for the
            blocks before it; "current": on the states that it will really read.
        looks: how many times the loss on all states is looked at.
        seed: of the order of parts; None takes the compilation's.

    Metrics: `changed`, the share of codes that are not those of rounding to nearest on the grid that was learned. Of the block:
    `block_loss_start` and `block_loss`, summed over blocks.
    """

    name: ClassVar[str] = "signround"

    steps: int = 200
    lr: float | None = None
    ranges: bool = True
    act_bits: int | None = None
    against: Literal["exact", "current"] = "exact"
    looks: int = 10
    seed: int | None = None

    def __post_init__(self) -> None:
        for option, usual in (("steps", 200), ("looks", 10)):
            if getattr(self, option) < 1:
                what = f"{getattr(self, option)} is less than 1"
                raise RecipeError(what, where=option, remedy=f"Use {usual}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            remedy = "Use a positive number, or None for 1/steps"
            raise RecipeError(f"{self.lr} is no learning rate", where="lr", remedy=remedy)
        if self.against not in ("exact", "current"):
            what = f"unknown states {self.against!r}"
            raise RecipeError(what, where="against", remedy="Use 'exact' or 'current'")
        self.act  # noqa: B018  a wrong width is refused here

    @property
    def act(self) -> ActFormat | None:
        return None if self.act_bits is None else ActFormat(self.act_bits)

    def reads(self) -> Reads:
        return "paired" if self.against == "exact" else "current"

    def round_block(
        self, weights: Mapping[str, Tensor], formats: Mapping[str, Any], objective: Objective, seed: int
    ) -> tuple[dict[str, Rounded], dict[str, float]]:
        learned = {name: Learned(weight, formats[name]) for name, weight in weights.items()}
        first = best = _total(objective, learned)
        kept = {name: one.result() for name, one in learned.items()}
        parameters = [p for one in learned.values() for p in one.parameters(self.ranges)]
        generator = torch.Generator().manual_seed(seed if self.seed is None else self.seed)
        lr, order = 1 / self.steps if self.lr is None else self.lr, torch.empty(0)
        looks = {-(-self.steps * (i + 1) // self.looks) for i in range(self.looks)}
        for step in range(self.steps):
            at = step % objective.parts
            order = torch.randperm(objective.parts, generator=generator) if at == 0 else order
            with torch.enable_grad():
                loss = objective.loss(int(order[at]), _values(learned))
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            self._descend(parameters, gradients, lr * (1 - step / self.steps), step)
            for one in learned.values():
                one.confine()
            if step + 1 in looks:
                now = _total(objective, learned)
                if now < best:
                    best, kept = now, {name: one.result() for name, one in learned.items()}
        rounded = {}
        for name, weight in kept.items():
            nearest = formats[name].encode(weights[name], weight.scales, weight.zeros)
            changed = float((nearest != weight.codes).float().mean())
            rounded[name] = Rounded(weight, {"changed": changed})
        return rounded, {"block_loss_start": first, "block_loss": best}

    @torch.no_grad()
    def _descend(self, parameters: list[Tensor], gradients: tuple[Tensor | None, ...], lr: float, step: int) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:  # a linear that the output does not depend on
                continue
            if not bool(torch.isfinite(gradient).all()):
                what = f"the gradient of step {step + 1} is not finite"
                raise CalibrationError(what, where="signround", remedy="Check the weights and the calibration text")
            parameter.sub_(gradient.sign(), alpha=lr)


class Learned:
    """The rounding of a weight [N, K] to integers as a function of V, α and β."""

    def __init__(self, weight: Tensor, fmt: IntFormat) -> None:
        scales, zeros = fmt.parameters(weight)
        self.fmt, self.shape = fmt, weight.shape
        self.part = weight.float().reshape(*scales.shape, -1)
        self.least, self.most = torch.aminmax(self.part, dim=-1)
        # Zeros, and groups of one value, are stored exactly: their grid stays.
        self.fixed = self.least == self.most
        self.start = scales.float(), torch.full_like(scales, fmt.midpoint).float() if zeros is None else zeros.float()
        self.v = torch.zeros_like(self.part).requires_grad_()
        self.alpha, self.beta = (torch.ones_like(self.least).requires_grad_() for _ in range(2))

    def parameters(self, ranges: bool) -> list[Tensor]:
        return [self.v, self.alpha, self.beta] if ranges else [self.v]

    @torch.no_grad()
    def confine(self) -> None:
        """Hold V within ±½, α and β within 0 and 1. A weight of zero, as pruning leaves it, stays zero."""
        self.v.clamp_(-0.5, 0.5).masked_fill_(self.part == 0, 0)
        self.alpha.clamp_(0, 1)
        self.beta.clamp_(0, 1)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points [N, G] as they are stored, differentiable."""
        low, high = self.least * self.alpha, self.most * self.beta
        if self.fmt.symmetric:
            span = 2 * torch.maximum(-low, high)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            span = high - low
        dtype = SCALE_DTYPES[self.fmt.scale_dtype]
        scale = straight_through(span / self.fmt.top, lambda s: s.to(dtype).float().clamp(min=self.fmt.smallest))
        scale = torch.where(self.fixed | (span == 0), self.start[0], scale)
        if self.fmt.symmetric:
            return scale, self.start[1]
        zero = straight_through(-low / scale, lambda z: z.round().clamp(0, self.fmt.top))
        return scale, torch.where(self.fixed, self.start[1], zero)

    def value(self) -> Tensor:
        """Ŵ [N, K], differentiable."""
        scale, zero = (part.unsqueeze(-1) for part in self.grid())
        return ((self._code(scale, zero) - zero) * scale).reshape(self.shape)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """Ŵ as it is stored."""
        scale, zero = self.grid()
        codes = self._code(scale.unsqueeze(-1), zero.unsqueeze(-1)).reshape(self.shape).to(torch.uint8)
        zeros = None if self.fmt.symmetric else zero.to(torch.uint8)
        return QuantizedWeight(codes, scale.to(SCALE_DTYPES[self.fmt.scale_dtype]), zeros, self.fmt)

    def _code(self, scale: Tensor, zero: Tensor) -> Tensor:
        return (straight_through(self.part / scale + self.v, torch.round) + zero).clamp(0, self.fmt.top)


@torch.no_grad()
def _total(objective: Objective, learned: Mapping[str, Learned]) -> float:
    return objective.total(_values(learned))


def _values(learned: Mapping[str, Learned]) -> dict[str, Tensor]:
    return {name: one.value() for name, one in learned.items()}
