"""Logits of a model, and the masks that make a denoising state out of clean text.

Shapes: B batch or R rows, L positions, V vocabulary. A mask is bool, True where the token is replaced by [MASK].

Randomness comes from CPU generators seeded with `derived_seed(seed, *what)`. A mask is so a function of the seed and of
what it is for, and of nothing else: every model that is compared sees the same ones (common random numbers), on every
device, at every batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError

LogitsFn = Callable[[Tensor], Tensor]
"""A model, as this package sees it: ids int64 [B, L] -> logits [B, L, V]."""


def logits_of(
    model: Callable[..., Any], ids: Tensor, spec: DiffusionSpec, *, mask_ratio: Tensor | None = None
) -> Tensor:
    """Logits whose row i predicts position i.

    Args:
        model: a callable that returns the logits, or an object that has them as `.logits`.
        ids: int64 [B, L].
        spec: where `spec.shift`, row i - 1 of the model becomes row i and row 0 stands in for position 0 (Dream).
        mask_ratio: float64 [B], told to a model that goes by it (`model.counts_masks`); see `mask_ratio_of`.

    Returns:
        logits [B, L, V] in the model's own dtype.
    """
    told = mask_ratio is not None and getattr(model, "counts_masks", False)
    out = model(ids, mask_ratio=mask_ratio) if told else model(ids)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model returned {type(out).__name__}, which is no tensor and has no .logits",
            remedy="Wrap it in a callable that maps ids [B, L] to logits [B, L, V]",
        )
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or logits.shape[2] < spec.vocab_size:
        raise ModelError(
            f"the model returned logits {list(logits.shape)} for ids {list(ids.shape)}; "
            f"expected [{ids.shape[0]}, {ids.shape[1]}, {spec.vocab_size}]",
            remedy="Keep every position (no slicing to the last one), and check spec.vocab_size",
        )
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if spec.shift else logits


def mask_ratio_of(masked: Tensor, fillable: Tensor) -> Tensor:
    """Mask ratio of each row, float64 [B]: masked tokens over those that are to be filled, both bool [B, L]; 0 where none is.

    What a model with several widths or sets of scales goes by: neither prompt nor padding counts.
    """
    return (masked & fillable).sum(1).double() / fillable.sum(1).clamp(min=1)


def device_of(model: object) -> torch.device | None:
    """Where a model wants its ids: the device of its parameters, or its `.device`; None where neither tells."""
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    named = getattr(model, "device", None)
    return torch.device(named) if isinstance(named, str | torch.device) else None


def check_finite(logits: Tensor, step: int, blame: Callable[[], str | None] | None = None) -> None:
    """Refuse NaN and infinity in logits [B, S, V]; names the step, and the layer where `blame` finds one."""
    if not bool(torch.isfinite(logits).all()):
        bad = (~torch.isfinite(logits)).any(-1)
        row, column = bad.nonzero()[0].tolist()
        layer = blame() if blame is not None else None
        raise ModelError(
            f"step {step}: the logits of {int(bad.sum())} of {bad.numel()} positions are not finite, "
            f"first in row {row} at position {column} of the block"
            + (f"; the first values that are not come out of {layer}" if layer else ""),
            remedy="Check the model on this input in float32; a scale of a quantized layer may have overflowed",
        )


def derived_seed(seed: int, *what: object) -> int:
    """A seed of 63 bits for one purpose, the same on every platform.

    >>> derived_seed(0, "mask", 0.5) == derived_seed(0, "mask", 0.5)
    True
    >>> derived_seed(0, "mask", 0.5) == derived_seed(0, "mask", 0.25)
    False
    """
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *what: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator for one purpose, seeded with `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, *what))


def stratified_t(count: int, rng: torch.Generator, *, low: float = 1e-3, high: float = 1.0) -> Tensor:
    """Mask probabilities float64 [count] in [low, high): one in each of `count` equal strata, in random order.

    Each is uniform on the range by itself, so the loss stays unbiased; together they cover it (LLaDA, arXiv 2502.09992,
    eq. 3, draws them independently).
    """
    if count < 1:
        raise FeasibilityError(f"{count} mask probabilities were asked for", where="count", remedy="Ask for 1 or more")
    if not 0 <= low < high <= 1:
        raise FeasibilityError(f"the range {low:g} to {high:g} is not inside 0 to 1", remedy="Use 0 <= low < high <= 1")
    strata = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng, dtype=torch.float64)) / count
    return low + (high - low) * strata


def bernoulli_mask(maskable: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
    """Each maskable token independently with the probability of its row (LLaDA, arXiv 2502.09992, Algorithm 1).

    Args:
        maskable: bool [B, L].
        t: probability per row [B].
        rng: CPU generator.

    Returns:
        bool [B, L] on the device of `maskable`. A row may come out without any mask.
    """
    _check_maskable(maskable)
    if t.shape != maskable.shape[:1]:
        raise FeasibilityError(
            f"{list(t.shape)} mask probabilities for {maskable.shape[0]} rows", where="t", remedy="Give one per row"
        )
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise FeasibilityError("a mask probability lies outside 0 to 1", where="t", remedy="Give probabilities")
    chance = torch.rand(maskable.shape, generator=rng, dtype=torch.float64)
    return maskable & (chance < t.to("cpu", torch.float64)[:, None]).to(maskable.device)


def fixed_count_mask(maskable: Tensor, counts: Tensor, rng: torch.Generator) -> Tensor:
    """Exactly counts[r] tokens of each row, drawn without replacement (LLaDA, arXiv 2502.09992, eq. 6).

    Args:
        maskable: bool [R, L].
        counts: int64 [R], each between 0 and the number of maskable tokens of its row.
        rng: CPU generator.

    Returns:
        bool [R, L] on the device of `maskable`.
    """
    _check_maskable(maskable)
    region, wanted = maskable.cpu(), counts.cpu()
    if wanted.shape != region.shape[:1]:
        raise FeasibilityError(
            f"{list(wanted.shape)} counts for {region.shape[0]} rows", where="counts", remedy="Give one per row"
        )
    bad = ((wanted < 0) | (wanted > region.sum(1))).nonzero().flatten().tolist()
    if bad:
        raise FeasibilityError(
            f"row {bad[0]} has {int(region[bad[0]].sum())} maskable tokens, {int(wanted[bad[0]])} were to be masked",
            where="counts",
            remedy="Ask for a count between 0 and the number of maskable tokens",
        )
    score = torch.rand(region.shape, generator=rng, dtype=torch.float64).masked_fill_(~region, 2.0)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (rank < wanted[:, None]).to(maskable.device)


def ratio_mask(maskable: Tensor, ratio: float, seed: int, *what: object) -> Tensor:
    """The mask of one mask ratio: round(ratio * n) of the n maskable tokens of each row, at least one.

    The draw depends on the seed, the ratio, `what` and the shape only: common random numbers.
    """
    if not 0 < ratio <= 1:
        raise FeasibilityError(f"a mask ratio of {ratio:g} masks nothing", where="ratio", remedy="Use 0 < ratio <= 1")
    _check_maskable(maskable)
    available = maskable.sum(1)
    if bool((available == 0).any()):
        row = int((available == 0).nonzero()[0])
        raise FeasibilityError(f"row {row} has no maskable token", where="maskable", remedy="Leave the row out")
    counts = (ratio * available.double() + 0.5).floor().long().clamp(min=1)
    return fixed_count_mask(maskable, counts, generator(seed, "ratio", float(ratio), *what))


def apply_mask(ids: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """ids [B, L] with [MASK] where `masked` is True."""
    return ids.masked_fill(masked, mask_id)


def check_ids(ids: Tensor, spec: DiffusionSpec, *, where: str, more: int = 0) -> None:
    """Refuse ids [B, L] that are no ids of this model, or that with `more` tokens exceed its length; masks pass."""
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise FeasibilityError(
            f"a {ids.dtype} tensor of shape {list(ids.shape)}", where=where, remedy="Give int64 ids of shape [B, L]"
        )
    if ids.shape[0] == 0:
        raise FeasibilityError("the batch is empty", where=where, remedy="Give at least one row")
    length, room = ids.shape[1] + more, spec.max_length - ids.shape[1]
    if length > spec.max_length:
        raise FeasibilityError(
            (f"{ids.shape[1]} with {more} to generate are {length} tokens" if more else f"rows of {length} tokens")
            + f", the model was made for {spec.max_length}",
            where=where,
            remedy=f"Use gen_length={room} or less"
            if more and room > 0
            else f"Cut the {'prompt below' if more else 'rows to'} {spec.max_length} tokens",
        )
    if ids.numel() and bool(((ids < 0) | (ids >= spec.vocab_size)).any()):
        raise FeasibilityError(
            f"ids from {int(ids.min())} to {int(ids.max())}, the vocabulary has {spec.vocab_size}",
            where=where,
            remedy="Use the tokenizer of this model",
        )


def check_clean(ids: Tensor, spec: DiffusionSpec, *, where: str, more: int = 0) -> None:
    """`check_ids`, and no mask token among them."""
    check_ids(ids, spec, where=where, more=more)
    if bool((ids == spec.mask_id).any()):
        row, column = (ids == spec.mask_id).nonzero()[0].tolist()
        raise FeasibilityError(
            f"row {row} has the mask token {spec.mask_id} at position {column}",
            where=where,
            remedy="Give text without masks; LLaDASampler.fill fills the masks of a text",
        )


def _check_maskable(maskable: Tensor) -> None:
    if maskable.ndim != 2 or maskable.dtype != torch.bool:
        raise FeasibilityError(
            f"a {maskable.dtype} tensor of shape {list(maskable.shape)}",
            where="maskable",
            remedy="Give a bool tensor [B, L]",
        )
