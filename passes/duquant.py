"""DuQuant: rotate, permute and rotate again in blocks, so that outliers spread over all channels (Lin et al. 2024,
arXiv 2406.01721, section 3.2).

Before:  linear(x, W)
After:   linear(x·T, W·T),            T = R¹·P·R², orthogonal, so T⁻ᵀ = T

R¹ and R² are block diagonal. Each is found greedily on a sample of the linear's inputs X: take the channel c with the largest
|X|, bring it to the front and spread it, X ← X·E_c·F. E_c swaps channels 0 and c; F is a fixed random orthogonal matrix whose
first row is 1/√b throughout. Of all products of 0, 1, …, `steps` such factors the one with the smallest peak,
max X - min X, is kept. P deals the channels, sorted by max|X|, over the blocks and back again (zigzag), so that all blocks
get as many large ones; R² then evens them out within each block. A width that fits into one block gets R¹ alone.

T stays in the graph as one op in front of all linears that read the value, two multiplications by b × b matrices and a gather
for each token; the weights undo it. Run `smooth` before it, as the paper does.

Differences from the official code:
    - it swaps by the number of the *row* of X (one token's block) in which the extreme lies, modulo b, not of the channel
      (`exchange_id = r` in `rotation`): there a step spreads some channel, here the extreme one, as the paper says
    - it multiplies F by a random rotation from the right, after which the first row is no longer even; here all rows but the
      first are random
    - it fits on tokens averaged over the calibration texts, which for masked states would average over different
      tokens; here on tokens of the states themselves. It shares one R among all blocks (`shared=True`)
    - clipping (0.9 of the activations' range, 0.8 of the weights') is no part of this pass

Declines a value whose readers cannot undo T (a weight that somebody else reads or that is no constant), whose width has no
divisor up to `block`, that is transformed at run time already, or that is zero on all states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport, matches
from dlqc.errors import RecipeError
from dlqc.graph import Linear, is_call, linears, width
from dlqc.ops import TRANSFORM
from dlqc.regions import Refused, edges, keep_online, readers
from dlqc.transform import Permutation, Transform, blocks, chain, per_head


@dataclass(frozen=True)
class Duquant(Pass):
    """Greedy block rotations and a zigzag permutation at run time, fitted to the states.

    Options:
        block: channels in a block; the largest divisor of the width up to this is taken.
        steps: greedy steps of each rotation.
        shared: one rotation for all blocks of a value, not one for each; takes 1/blocks of the memory.
        rows: tokens of the sample that rotations are fitted to, those with the largest values.
        sites: glob patterns of module names; a value is transformed if one of its readers fits.
    """

    name: ClassVar[str] = "duquant"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    block: int = 128
    steps: int = 256
    shared: bool = False
    rows: int = 64
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        for name, least, usual in (("block", 2, 128), ("steps", 1, 256), ("rows", 1, 64)):
            value = getattr(self, name)
            if value < least:
                raise RecipeError(f"{value} is less than {least}", where=f"duquant.{name}", remedy=f"Use {usual}")
        if not self.sites:
            raise RecipeError("no pattern", where="duquant.sites", remedy="Use ('*',) for all inputs of linears")

    def statistics(self) -> frozenset[str]:
        return frozenset({"sample"})

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for value in edges(ctx.nodes(graph), ctx.weights):
            sites = list(linears(value.users, ctx.weights))
            if not any(matches(site.name, self.sites) for site in sites):
                continue
            found = readers(graph, ctx.weights, value, "orthogonal")
            reason = self.unfit(value, sites[0], ctx) or (str(found) if isinstance(found, Refused) else None)
            if reason is not None or isinstance(found, Refused):
                report.declined.append(Declined(f"input of {sites[0].name}", str(reason)))
                continue
            x = ctx.stats[sites[0].weight]["sample"]
            t = self.fit(x, ctx.seed)
            keep_online(graph, ctx.weights, found, t)
            report.sites += 1
            report.details[sites[0].name] = {
                "width": width(value),
                "block": largest_divisor(width(value), self.block),
                "peak before": float(x.abs().max()),
                "peak after": float(t(x.double()).abs().max()),
            }
        if report.sites:
            report.metrics["online"] = report.sites
        return report

    def unfit(self, value: fx.Node, site: Linear, ctx: Context) -> str | None:
        """Why a value cannot be transformed, if so."""
        if is_call(value, TRANSFORM):
            return "it is transformed at run time already"
        if largest_divisor(width(value), self.block) == 1:
            return f"{width(value)} features do not divide into blocks of 2 to {self.block}"
        return None if bool(ctx.stats[site.weight]["sample"].any()) else "it is zero on all states"

    def fit(self, x: torch.Tensor, seed: int) -> Transform:
        """T for a sample x [S, d]."""
        d, b = x.shape[1], largest_divisor(x.shape[1], self.block)
        x = x[x.abs().amax(dim=1).topk(min(self.rows, x.shape[0])).indices].float()
        generator = torch.Generator().manual_seed(seed)
        first = self.rotation(x, b, generator)
        if b == d:
            return first
        x = first(x)
        deal = Permutation(zigzag(x.abs().amax(dim=0), d // b))
        return chain(first, deal, self.rotation(deal(x), b, generator))

    def rotation(self, x: torch.Tensor, b: int, generator: torch.Generator) -> Transform:
        cut = x.reshape((-1, 1, b) if self.shared else (x.shape[0], -1, b))
        found = blocks(greedy_rotation(cut, spreading(b, generator), self.steps))
        return per_head(found, x.shape[1] // b) if self.shared else found


def greedy_rotation(x: torch.Tensor, f: torch.Tensor, steps: int) -> torch.Tensor:
    """The best prefix of E_c·F·E_c'·F·… for x [S, n, b], for each of the n blocks by itself; float64 [n, b, b]."""
    n, b = x.shape[1:]
    x = x.transpose(0, 1).contiguous()  # [n, S, b]
    product = torch.eye(b, dtype=torch.float64).repeat(n, 1, 1)
    best, least = product, x.amax((1, 2)) - x.amin((1, 2))
    for _ in range(steps):
        c = x.abs().amax(dim=1).argmax(dim=1)
        swap = torch.arange(b).repeat(n, 1)
        swap[torch.arange(n), c] = 0
        swap[:, 0] = c
        x = x.gather(2, swap[:, None].expand_as(x)) @ f.to(x.dtype)
        product = product.gather(2, swap[:, None].expand_as(product)) @ f
        peak = x.amax((1, 2)) - x.amin((1, 2))
        best = torch.where((peak < least)[:, None, None], product, best)
        least = torch.minimum(peak, least)
    return best


def spreading(b: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix, float64 [b, b], whose first row is 1/√b."""
    columns = torch.randn(b, b, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1.0
    q, r = torch.linalg.qr(columns)
    f: torch.Tensor = (q * r.diagonal().sign()).T.contiguous()
    return f


def zigzag(peaks: torch.Tensor, n: int) -> torch.Tensor:
    """The order in which channels, sorted by their peaks [d], are dealt to n blocks: 0 … n-1, n-1 … 0, 0 … n-1, …"""
    hands = peaks.argsort(descending=True, stable=True).reshape(-1, n).clone()
    hands[1::2] = hands[1::2].flip(1)
    return hands.T.reshape(-1)


def largest_divisor(d: int, most: int) -> int:
    """The largest divisor of d up to `most`."""
    return next(b for b in range(min(d, most), 0, -1) if d % b == 0)
