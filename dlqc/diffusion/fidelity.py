"""How closely a candidate follows its reference at masked positions, by mask ratio.

    KL(reference || candidate) = sum over tokens of p_ref (log p_ref - log p_cand)      nats per masked position
    top-1 agreement            = share of masked positions where both propose the same token

Both models see the same states, drawn as in `likelihood.masked_nll`. What a sampler commits comes from these rows of
the logits alone; rows of visible tokens are never looked at.

Shapes: R rows, L positions, K mask ratios, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.diffusion.likelihood import RATIOS, measured_region
from dlqc.diffusion.masking import LogitsFn, apply_mask, device_of, logits_of, mask_ratio_of, ratio_mask
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError


@dataclass(frozen=True)
class FidelityTable:
    """Distance of a candidate from its reference, per row and mask ratio.

    Attributes:
        ratios: K mask ratios.
        kl: float64 [R, K], nats per masked position.
        agreement: float64 [R, K], share of masked positions with the same most probable token.
    """

    ratios: tuple[float, ...]
    kl: Tensor
    agreement: Tensor

    @property
    def kl_by_ratio(self) -> tuple[Interval, ...]:
        """K intervals over rows."""
        return tuple(mean_interval(column) for column in self.kl.T)

    @property
    def agreement_by_ratio(self) -> tuple[Interval, ...]:
        """K intervals over rows."""
        return tuple(mean_interval(column) for column in self.agreement.T)

    @property
    def mean_kl(self) -> Interval:
        """Mean over the ratios, interval over rows."""
        return mean_interval(self.kl.mean(1))

    @property
    def mean_agreement(self) -> Interval:
        """Mean over the ratios, interval over rows."""
        return mean_interval(self.agreement.mean(1))


@torch.no_grad()
def fidelity(
    reference: LogitsFn,
    candidate: LogitsFn,
    rows: Tensor,
    spec: DiffusionSpec,
    *,
    maskable: Tensor | None = None,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 8,
) -> FidelityTable:
    """Compare two models on the same masked states.

    Args:
        reference: ids [B, L] -> logits [B, L, V]; the truth.
        candidate: the same interface; it may live on another device.
        rows: clean int64 [R, L].
        spec: facts of both models.
        maskable: bool [R, L]; None: all tokens.
        ratios: mask ratios in (0, 1].
        repeats: masks drawn per row and ratio.
        seed: of the masks.
        batch_size: rows per forward; changes time and memory, not the result.
    """
    region = measured_region(rows, maskable, spec, ratios=len(ratios), repeats=repeats, batch_size=batch_size)
    kl = torch.zeros(rows.shape[0], len(ratios), dtype=torch.float64)
    agreement = torch.zeros_like(kl)
    for level, ratio in enumerate(ratios):
        for repeat in range(repeats):
            masked = ratio_mask(region, ratio, seed, repeat)
            for start in range(0, rows.shape[0], batch_size):
                part = slice(start, start + batch_size)
                state = apply_mask(rows[part].long(), masked[part], spec.mask_id)
                told = mask_ratio_of(masked[part], region[part])
                pairs = zip(
                    _at_masks("reference", reference, state, told, spec, start, ratio),
                    _at_masks("candidate", candidate, state, told, spec, start, ratio),
                    strict=True,
                )
                for row, (p, q) in enumerate(pairs, start):
                    if p.shape != q.shape:
                        raise FeasibilityError(
                            f"the reference has {p.shape[1]} logits a position, the candidate {q.shape[1]}",
                            where="candidate",
                            remedy="Compare two forms of the same model",
                        )
                    kl[row, level] += divergence(p, q.to(p.device)).mean().item() / repeats
                    same = p.argmax(-1) == q.argmax(-1).to(p.device)
                    agreement[row, level] += same.double().mean().item() / repeats
    return FidelityTable(tuple(map(float, ratios)), kl, agreement)


def divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) of logits [..., V] -> nats [...]; exactly 0 for equal logits."""
    log_p, log_q = reference.log_softmax(-1), candidate.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _at_masks(
    name: str, model: LogitsFn, state: Tensor, told: Tensor, spec: DiffusionSpec, start: int, ratio: float
) -> Iterator[Tensor]:
    """Logits of each row at its masks, float64 [masked, V]; a row at a time, for float64 logits are large."""
    state = state.to(device_of(model))
    logits = logits_of(model, state, spec, mask_ratio=told.to(state.device))
    for row, ids in enumerate(state):
        found = logits[row][ids == spec.mask_id].double()
        if not bool(found.isfinite().all()):
            raise ModelError(
                f"the logits of row {start + row} at mask ratio {ratio:g} are not finite",
                where=name,
                remedy="Check it on this row in float32; a scale of a quantized layer may have overflowed",
            )
        yield found
