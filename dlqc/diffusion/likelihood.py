"""Likelihood of a masked diffusion model, with common random numbers, and intervals of paired differences.

    NELBO / n = E_l [ mean over l masked tokens of -log p(token | the rest) ],   l uniform on 1..n

LLaDA, arXiv 2502.09992, eq. 6 and Algorithm 3: l tokens drawn without replacement, which has less variance than masking
each token with probability t. The masks depend on the seed and the rows alone, so two models measured with one seed saw
the same states, and their difference is taken row by row.

Shapes: R rows, L positions, K mask ratios or levels, V vocabulary. Units: nats per masked token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.diffusion.masking import (
    LogitsFn,
    apply_mask,
    check_clean,
    device_of,
    fixed_count_mask,
    generator,
    logits_of,
    mask_ratio_of,
    ratio_mask,
)
from dlqc.diffusion.network import guided_logits
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError

RATIOS = tuple((2 * level + 1) / 16 for level in range(8))
"""Centres of eight equal levels of the mask ratio: 6.25 % to 93.75 %."""


@dataclass(frozen=True)
class NllTable:
    """Cross-entropy at masked positions, per row and mask ratio.

    Attributes:
        ratios: K mask ratios, or centres of the levels.
        values: float64 [R, K], nats per masked token, mean over the repeats.
        masks: digest of the rows and of what was masked; equal digests make two tables comparable row by row.
    """

    ratios: tuple[float, ...]
    values: Tensor
    masks: str

    @property
    def rows(self) -> Tensor:
        """float64 [R]: mean over the ratios. Over equal levels that is the NELBO per token of the row."""
        return self.values.mean(1)

    @property
    def nelbo(self) -> Interval:
        """Bound on the negative log-likelihood per token: unbiased from `nelbo`, midpoint rule from `masked_nll`."""
        return mean_interval(self.rows)

    @property
    def by_ratio(self) -> tuple[Interval, ...]:
        """K intervals, one per mask ratio."""
        return tuple(mean_interval(column) for column in self.values.T)


def masked_nll(
    model: LogitsFn,
    rows: Tensor,
    spec: DiffusionSpec,
    *,
    maskable: Tensor | None = None,
    ratios: Sequence[float] = RATIOS,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 8,
) -> NllTable:
    """Cross-entropy at masked positions for each mask ratio.

    Args:
        model: ids [B, L] -> logits [B, L, V].
        rows: clean int64 [R, L].
        spec: the model's facts.
        maskable: bool [R, L], which tokens may be masked; None: all.
        ratios: mask ratios in (0, 1]; round(ratio * n) tokens of each row are masked, at least one.
        repeats: masks drawn per row and ratio.
        seed: of the masks.
        batch_size: rows per forward; changes time and memory, not the result.
    """
    region = measured_region(rows, maskable, spec, ratios=len(ratios), repeats=repeats, batch_size=batch_size)

    def draw(level: int, repeat: int) -> Tensor:
        return ratio_mask(region, ratios[level], seed, repeat)

    return _table(model, rows, region, spec, tuple(map(float, ratios)), repeats, batch_size, draw)


def nelbo(
    model: LogitsFn,
    rows: Tensor,
    spec: DiffusionSpec,
    *,
    maskable: Tensor | None = None,
    levels: int = 8,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 8,
) -> NllTable:
    """Unbiased bound per token: the number of masked tokens is uniform on 1..n, one draw in each of `levels` strata.

    Args and result as for `masked_nll`; `values[:, k]` belongs to the k-th stratum.
    """
    region = measured_region(rows, maskable, spec, ratios=levels, repeats=repeats, batch_size=batch_size)
    available = region.sum(1).cpu()

    def draw(level: int, repeat: int) -> Tensor:
        rng = generator(seed, "level", level, levels, repeat)
        u = (level + torch.rand(available.shape, generator=rng, dtype=torch.float64)) / levels
        return fixed_count_mask(region, (u * available).floor().long() + 1, rng)

    centres = tuple((2 * level + 1) / (2 * levels) for level in range(levels))
    return _table(model, rows, region, spec, centres, repeats, batch_size, draw)


@torch.no_grad()
def log_likelihood(
    model: LogitsFn,
    prompt: Tensor | Sequence[int],
    answer: Tensor | Sequence[int],
    spec: DiffusionSpec,
    *,
    mc_num: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> float:
    """Lower bound on log p(answer | prompt) in nats, by Monte Carlo over masks of the answer.

    LLaDA, arXiv 2502.09992, Algorithm 3, with the counts of the authors' evaluation code: from k ~ U{1..T}, the j-th of
    N samples masks ((k + j T / N - 1) mod T) + 1 of the T answer tokens. There N is the batch, here all `mc_num`, so
    that the result does not depend on the batch size. Exact for an answer of one token, at any `mc_num`.

    Args:
        model: ids [B, L] -> logits [B, L, V].
        prompt: clean ids [P]; never masked.
        answer: clean ids [T].
        spec: the model's facts.
        mc_num: number of masks.
        seed: of the masks.
        batch_size: masks per forward.
        cfg_scale: guidance, as in the sampler.
    """
    given, wanted = (torch.as_tensor(ids, device=device_of(model)).long().flatten() for ids in (prompt, answer))
    if wanted.numel() == 0:
        raise FeasibilityError("the answer is empty", where="answer", remedy="Give at least one token")
    if mc_num < 1 or batch_size < 1:
        raise FeasibilityError(
            f"mc_num {mc_num} and batch_size {batch_size}", where="mc_num", remedy="Use 1 or more of each"
        )
    row = torch.cat([given, wanted])[None]
    check_clean(row, spec, where="prompt + answer")
    rng, size = generator(seed, "likelihood", row.shape[1], wanted.numel()), wanted.numel()
    first = int(torch.randint(1, size + 1, (), generator=rng))
    grid = torch.linspace(first, first + (mc_num - 1) * size / mc_num, mc_num, dtype=torch.float64)
    counts = (grid.round().long() - 1) % size + 1
    masked = torch.zeros(mc_num, row.shape[1], dtype=torch.bool)
    masked[:, given.numel() :] = fixed_count_mask(torch.ones(mc_num, size, dtype=torch.bool), counts, rng)
    context = (torch.arange(row.shape[1]) < given.numel()).to(row.device)
    total = 0.0
    for start in range(0, mc_num, batch_size):
        hidden, count = masked[start : start + batch_size].to(row.device), counts[start : start + batch_size]
        ids = row.expand(hidden.shape[0], -1)
        canvas, told = apply_mask(ids, hidden, spec.mask_id), mask_ratio_of(hidden, ~context.expand_as(ids))
        logits = guided_logits(model, canvas, context.expand_as(ids), spec, cfg_scale, mask_ratio=told)
        sums = torch.stack([ce.sum() for ce in _cross_entropy(logits, ids, hidden)]).cpu()
        total -= float((sums * size / count).sum())
    return total / mc_num


def paired_difference(a: NllTable | Tensor, b: NllTable | Tensor) -> Interval:
    """Mean of a - b over rows with its 95 % t interval.

    Args:
        a: a table, or per-row values float [R].
        b: the same for the other model. Two tables must come from the same rows and masks.
    """
    if isinstance(a, NllTable) and isinstance(b, NllTable) and a.masks != b.masks:
        raise FeasibilityError(
            "the two tables were measured on different rows or masks",
            where="paired_difference",
            remedy="Measure both with the same rows, ratios, repeats and seed",
        )
    x, y = (value.rows if isinstance(value, NllTable) else value.double().cpu() for value in (a, b))
    if x.shape != y.shape or x.ndim != 1:
        raise FeasibilityError(
            f"values of shape {list(x.shape)} and {list(y.shape)} do not pair",
            where="paired_difference",
            remedy="Give one value per row, the same rows on both sides",
        )
    return mean_interval(x - y)


def _table(
    model: LogitsFn,
    rows: Tensor,
    region: Tensor,
    spec: DiffusionSpec,
    ratios: tuple[float, ...],
    repeats: int,
    batch_size: int,
    draw: Callable[[int, int], Tensor],
) -> NllTable:
    values = torch.zeros(rows.shape[0], len(ratios), dtype=torch.float64)
    device = device_of(model)
    digest = hashlib.sha256(rows.cpu().long().numpy().tobytes())
    for level in range(len(ratios)):
        for repeat in range(repeats):
            masked = draw(level, repeat)
            digest.update(masked.cpu().numpy().tobytes())
            for start in range(0, rows.shape[0], batch_size):
                part = slice(start, start + batch_size)
                ids, hidden = rows[part].long().to(device), masked[part].to(device)
                told = mask_ratio_of(hidden, region[part].to(device))
                with torch.no_grad():
                    logits = logits_of(model, apply_mask(ids, hidden, spec.mask_id), spec, mask_ratio=told)
                    means = torch.stack([ce.mean() for ce in _cross_entropy(logits, ids, hidden)])
                values[part, level] += means.cpu() / repeats
    if not bool(torch.isfinite(values).all()):
        row, level = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ModelError(
            f"the loss of row {row} at mask ratio {ratios[level]:g} is not finite",
            remedy="Check the model on this row in float32; a scale of a quantized layer may have overflowed",
        )
    return NllTable(ratios, values, digest.hexdigest())


def _cross_entropy(logits: Tensor, ids: Tensor, masked: Tensor) -> Iterator[Tensor]:
    """-log p of the masked tokens of each row, float64 [masked]; a row at a time, for float64 logits are large."""
    for row in range(ids.shape[0]):
        log_p = logits[row][masked[row]].double().log_softmax(-1)
        yield -log_p.gather(1, ids[row][masked[row]][:, None])[:, 0]


def measured_region(rows: Tensor, maskable: Tensor | None, spec: DiffusionSpec, **at_least_one: int) -> Tensor:
    """The maskable region bool [R, L], after the checks that every measurement shares."""
    check_clean(rows, spec, where="rows")
    for name, value in at_least_one.items():
        if value < 1:
            raise FeasibilityError(f"{value} is less than 1", where=name, remedy="Use 1 or more")
    if maskable is None:
        return torch.ones_like(rows, dtype=torch.bool)
    if maskable.shape != rows.shape or maskable.dtype != torch.bool:
        raise FeasibilityError(
            f"a {maskable.dtype} tensor of shape {list(maskable.shape)} for rows {list(rows.shape)}",
            where="maskable",
            remedy="Give a bool tensor in the shape of the rows",
        )
    if bool((maskable.sum(1) == 0).any()):
        row = int((maskable.sum(1) == 0).nonzero()[0])
        raise FeasibilityError(f"row {row} has no maskable token", where="maskable", remedy="Leave the row out")
    return maskable
