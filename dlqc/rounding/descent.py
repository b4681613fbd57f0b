"""Descent on E8P codes and scales, in the metric of the layer: what LDLQ leaves is improved with everything else held.

LDLQ chooses each vector once, by its Euclidean distance, and knows nothing of what is rounded after it. Here the layer's
own objective L = tr(E H Eᵀ), E = W - Ŵ, is lowered move by move. With G = E H, replacing ŵ_B by ŵ_B + s·d (B the eight
columns of a vector, s its scale) changes the row's loss by

    s²·(d·H_BB·d - 2·d·g_B / s),

so all moves of a vector cost one product with a table. Tried are the 240 shortest vectors of the lattice E8, its
nearest neighbours (Conway and Sloane, Sphere Packings, chapter 4, section 8.1: 112 vectors ±1 ±1 0⁶ and 128 of
eight halves with an even number of minus signs), and the step to the point nearest to where the vector would stand if it
were free, w_B + (rest)·H_BB⁻¹. The best that ends in the codebook is made if it lowers the loss.

Then scales: for a group with points p (in units of the scale), s → s + p·g / (p·H·p) is the least loss for these codes; it is
taken as stored, and only where that lowers the loss. Neither step raises L. Memory: G and E, float32 [N, K].
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch

from dlqc.formats.lattice import DIM, LatticeFormat, code_of, codebook, nearest

# Columns whose moves reach the other columns of G by one product.
OUTER = 64

# The best moves of a vector that are looked up in the codebook: at its rim the best ones may lead out of it.
TRIED = 4

# A move has to lower the loss by this share of its own curvature: less is roundoff of G.
WORTH = 1e-4


@cache
def roots() -> torch.Tensor:
    """The 240 shortest vectors of E8, float32 [240, 8]. Shared: do not write to it."""
    found = []
    for pair in combinations(range(DIM), 2):
        for signs in product((1.0, -1.0), repeat=2):
            found.append([signs[pair.index(i)] if i in pair else 0.0 for i in range(DIM)])
    halves = [[0.5 * sign for sign in signs] for signs in product((1, -1), repeat=DIM) if signs.count(-1) % 2 == 0]
    return torch.tensor(found + halves)


def descend(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    fmt: LatticeFormat,
    hessian: torch.Tensor,
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of lower or equal tr(E H Eᵀ), for each row of W.

    Args:
        weight: W [N, K]. codes: uint16 [N, K/8]. scales: [N, G] as stored.
        fmt: the format. hessian: H [K, K]; damped or not, it is the metric.
        sweeps: passes over all vectors, each followed by one over the scales.
    """
    exact, metric = weight.float(), hessian.to(torch.float32)
    # In units of the largest element, so that products of small statistics do not vanish.
    metric = metric / metric.diagonal().max().clamp_min(torch.finfo(torch.float32).tiny)
    table = codebook().to(exact.device)
    index = codes.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    points = table[index.flatten()].reshape(exact.shape)
    own = scales.float()
    width = exact.shape[1]
    for _ in range(sweeps):
        error = exact - points * own.repeat_interleave(width // own.shape[1], dim=1)
        slope = error @ metric
        moved = 0
        for start in range(0, width, OUTER):
            moved += _move_vectors(slice(start, min(start + OUTER, width)), points, own, slope, metric, width)
        kept = own
        own = _fit_scales(points, own, slope, metric, fmt)
        if not moved and torch.equal(kept, own):
            break
    chosen = code_of(points.reshape(-1, DIM)).reshape(codes.shape)
    return chosen.to(torch.uint16), fmt.stored(own)


def _move_vectors(
    columns: slice, points: torch.Tensor, own: torch.Tensor, slope: torch.Tensor, metric: torch.Tensor, width: int
) -> int:
    """Move the vectors of some neighbouring columns; `points` and `slope` [N, K] follow. Returns how many moved."""
    moves, moved = roots().to(points.device), 0
    step = torch.zeros(len(points), columns.stop - columns.start, device=points.device)
    near = metric[columns, columns]
    own_blocks = [near[at : at + DIM, at : at + DIM] for at in range(0, near.shape[0], DIM)]
    curvature = [((moves @ block) * moves).sum(1) for block in own_blocks]
    for at in range(0, columns.stop - columns.start, DIM):
        block = slice(at, at + DIM)
        here = slice(columns.start + at, columns.start + at + DIM)
        own_metric = own_blocks[at // DIM]
        scale = own[:, here.start * own.shape[1] // width].unsqueeze(1)
        # d·g/s with what has moved in these columns already.
        force = (slope[:, here] - step @ near[:, block]) / torch.where(scale == 0, 1.0, scale)
        old = points[:, here]
        free = torch.linalg.solve(own_metric + 1e-6 * own_metric.diagonal().max() * torch.eye(DIM), force.T)
        jump = codebook()[nearest(old.T + free).long()] - old
        bend = torch.cat(
            [curvature[at // DIM].expand(len(old), -1), ((jump @ own_metric) * jump).sum(1, keepdim=True)], 1
        )
        change = bend - 2 * torch.cat([force @ moves.T, (force * jump).sum(1, keepdim=True)], dim=1)
        best, which = change.topk(TRIED, dim=1, largest=False)
        done = scale.squeeze(1) == 0
        for place in range(TRIED):
            pick = which[:, place]
            move = torch.where((pick == len(moves)).unsqueeze(1), jump, moves[pick.clamp_max(len(moves) - 1)])
            useful = ~done & (best[:, place] < -WORTH * bend.gather(1, pick.unsqueeze(1)).squeeze(1))
            taken = useful & (code_of(old + move) >= 0)
            step[:, block] += torch.where(taken.unsqueeze(1), move, 0.0)
            done |= taken
        points[:, here] += step[:, block]
        step[:, block] *= scale
        moved += int(step[:, block].any(dim=1).sum())
    slope -= step @ metric[columns]
    return moved


def _fit_scales(
    points: torch.Tensor, own: torch.Tensor, slope: torch.Tensor, metric: torch.Tensor, fmt: LatticeFormat
) -> torch.Tensor:
    """The best scale of each group in turn, as it will be stored, where it lowers the loss; `slope` follows."""
    width, groups = points.shape[1], own.shape[1]
    own = own.clone()
    for group in range(groups):
        columns = slice(group * width // groups, (group + 1) * width // groups)
        p, old = points[:, columns], own[:, group]
        pull, bend = (p * slope[:, columns]).sum(1), ((p @ metric[columns, columns]) * p).sum(1)
        best = old + pull / bend.clamp_min(torch.finfo(torch.float32).tiny)
        stored = fmt.stored(torch.where((best > 0) & (old > 0), best, old)).float()
        step = stored - old
        lower = step * (step * bend - 2 * pull) < 0
        step = torch.where(lower, step, 0.0)
        own[:, group] = torch.where(lower, stored, old)
        slope -= (p * step.unsqueeze(1)) @ metric[columns]
    return own
