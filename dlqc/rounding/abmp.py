"""ABMP, which groups get more planes and which fewer at the same mean (Quant-dLLM, arXiv 2510.03274).

A group's score is the sum of its saliencies, s_g = Σ (W_ij / D_j)², D = diag((H + λI)⁻¹). The groups with the highest
scores, a share p of all, get one plane more than the mean and as many with the lowest get one less:

    k = ⌊p·G⌋,   top k: mean + 1,   bottom k: mean - 1

so the sum of the orders is exactly mean·G. Groups of one weight, or of weights with the same number of rows, cost the
same, which is why ranking over a model (`allocate_model`) ranks each such class apart.

`spend` is the other way to the same end: it takes estimates of the error that a group would make without any plane, and buys
planes where they remove most. The k-th plane of a Gaussian leaves GAUSSIAN[k] of its energy, which falls ever more slowly, so
buying greedily is optimal for that estimate. Any mean can be met, not only whole ones.

All functions are pure, and ties go to the group that comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from dlqc.errors import ContractError, RecipeError
from dlqc.formats.planes import MAX_ORDER

# Least mean squared error of a Gaussian on 2^K levels, K = 0 … 3 (Lloyd-Max), over its variance.
GAUSSIAN = (1.0, 0.3634, 0.1175, 0.03454)


def scores(weight: torch.Tensor, spread: torch.Tensor, groups: int) -> torch.Tensor:
    """s_g of the G groups of `weight` [N, K_in], float64 [G]; `spread` is D [K_in] (`dlqc.rounding.daq.Metric`)."""
    if spread.shape != (weight.shape[1],) or weight.shape[1] % groups:
        what = f"{groups} groups and a spread of {tuple(spread.shape)} do not fit {weight.shape[1]} input features"
        raise ContractError(what, where="spread", remedy="Take both from the format and the metric of this weight")
    columns = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64) / spread.double()
    found: torch.Tensor = columns.square().reshape(groups, -1).sum(dim=1)
    return found


def allocate(scores: torch.Tensor, share: float = 0.05, mean: int = 2) -> tuple[int, ...]:
    """Orders of the groups of one weight by the paper's rule.

    >>> allocate(torch.tensor([5.0, 1.0, 3.0, 9.0]), share=0.25)
    (2, 1, 2, 3)
    """
    if not 0 <= share <= 0.5:
        what = f"a share of {share} of the groups cannot go up and another go down"
        raise RecipeError(what, where="share", remedy="Use 0.05, or 0.1; at most 0.5")
    moved = int(share * len(scores) + 1e-9)
    if moved and not 1 < mean < MAX_ORDER:
        what = f"groups of {mean} planes cannot both gain and lose one"
        raise RecipeError(what, where="mean", remedy=f"Use 2 planes, or share=0: orders are 1 to {MAX_ORDER}")
    ranked = torch.argsort(_finite(scores), descending=True, stable=True).tolist()
    orders = [mean] * len(ranked)
    for group in ranked[:moved]:
        orders[group] += 1
    for group in ranked[len(ranked) - moved :]:
        orders[group] -= 1
    return tuple(orders)


def allocate_model(
    scores: Mapping[str, torch.Tensor], rows: Mapping[str, int], share: float = 0.05, mean: int = 2
) -> dict[str, tuple[int, ...]]:
    """Orders of the groups of many weights, ranked together where a group costs the same.

    Args:
        scores: by weight name, [G].
        rows: N of each weight. All must have groups of one size.
    """
    found: dict[str, tuple[int, ...]] = {}
    for count in dict.fromkeys(rows[name] for name in scores):
        members = [name for name in scores if rows[name] == count]
        orders = allocate(torch.cat([scores[name].double() for name in members]), share, mean)
        for name in members:
            size = len(scores[name])
            found[name], orders = orders[:size], orders[size:]
    return {name: found[name] for name in scores}


def spend(energies: torch.Tensor, mean: float = 2.0) -> tuple[int, ...]:
    """Orders with a sum of ⌊mean·G⌋ that leave the least Σ energy·GAUSSIAN[order].

    Args:
        energies: the loss of each group when nothing of it is stored, [G], for example `Metric.energies`.

    >>> spend(torch.tensor([1.0, 1.0, 100.0]), mean=5 / 3)
    (1, 1, 3)
    """
    if not 1 <= mean <= MAX_ORDER:
        what = f"a mean of {mean} planes is not within 1 and {MAX_ORDER}"
        raise RecipeError(what, where="mean", remedy="Use 2")
    gains = torch.tensor([a - b for a, b in pairwise(GAUSSIAN[1:])], dtype=torch.float64)
    offers = (_finite(energies).double().unsqueeze(1) * gains).flatten()
    extra = int(mean * len(energies) + 1e-9) - len(energies)
    # Gains fall with the order, so the best offers hold a group's second plane wherever they hold its third.
    taken = torch.argsort(offers, descending=True, stable=True)[:extra] // len(gains)
    return tuple((1 + torch.bincount(taken, minlength=len(energies))).tolist())


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        what = f"{int((~torch.isfinite(values)).sum())} of {len(values)} group scores are not finite"
        raise ContractError(what, where="scores", remedy="Check the weight and its Hessian")
    return values
