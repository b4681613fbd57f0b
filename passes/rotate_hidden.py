"""R1: rotate the residual stream, so that no channel stands out (QuaRot, arXiv 2404.00456, section 4, stage 1a).

Before:  x = embedding(E) + Σ linear(·, W_out, b),        readers linear(rms_norm(x), W_in)
After:   x·Q = embedding(E·Q) + Σ linear(·, QᵀW_out, b·Q),        linear(rms_norm(x·Q), W_in·Q)

rms_norm(x·Q) = rms_norm(x)·Q for an orthogonal Q when the gain is one (`fold_norm_scale`). Nothing is left to do at run
time. Q is a randomized Hadamard matrix, diag(±1)·H/√d, applied as a fast transform; where no Hadamard matrix of order d
can be built, a block Hadamard of the largest order that divides d. A head tied to the embedding stays tied: both become E·Q.

Differences from the official code: the region is found on the graph, so biases of writers, positional tables and
experts take part; routers keep their rotated weight in float32, since a rounded one would send tokens elsewhere.

Declines a stream that does not close (`dlqc.regions`): a norm that still has a gain (two norms one after the other, or a
post-norm whose output is the stream), a layer norm (`center_norms` first), a nonlinear function on the stream, a reader or
weight outside of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from dlqc import hadamard
from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.errors import RecipeError
from dlqc.regions import Refused, fold, residual_stream
from dlqc.transform import Diagonal, Hadamard, Transform, blocks, chain, per_head


@dataclass(frozen=True)
class RotateHidden(Pass):
    """Rotate the residual stream by one orthogonal matrix.

    Options:
        kind: "hadamard" is a randomized (block) Hadamard matrix; "orthogonal" a random dense one, for comparison.
        block: order of the Hadamard blocks, a divisor of the width; None takes the largest that can be built.
    """

    name: ClassVar[str] = "rotate_hidden"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "unit-gain"})
    preserves: ClassVar = "exact"

    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    block: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "orthogonal"):
            raise RecipeError(
                f"unknown kind {self.kind!r}", where="rotate_hidden.kind", remedy="Use 'hadamard' or 'orthogonal'"
            )
        if self.block is not None and (self.block < 1 or hadamard.order(self.block) is None):
            raise RecipeError(
                f"no Hadamard matrix of order {self.block} can be built",
                where="rotate_hidden.block",
                remedy="Use a power of two, or None",
            )

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        region = residual_stream(graph, ctx.weights)
        if isinstance(region, Refused):
            return PassReport(declined=[Declined("residual stream", str(region))])
        # A stream that attention reads without a projection may only turn within its heads.
        rotation = per_head(self.rotation(region.width // region.heads, ctx.seed), region.heads)
        fold(ctx.weights, region, rotation)
        report = PassReport(sites=1)
        report.metrics = {"writers": len(region.sources), "readers": len(region.sinks), "width": region.width}
        return report

    def rotation(self, d: int, seed: int) -> Transform:
        if self.kind == "orthogonal":
            return random_orthogonal(d, seed)
        return randomized_hadamard(d, seed, self.block)


def randomized_hadamard(d: int, seed: int, block: int | None = None) -> Transform:
    """diag(±1)·H/√block in blocks of the given order, or of the largest that divides d."""
    return chain(Diagonal(hadamard.signs(d, seed)), Hadamard(d, block or hadamard.largest_block(d)))


def random_orthogonal(d: int, seed: int) -> Transform:
    """A random orthogonal matrix, uniform (Haar): Q of a Gaussian matrix's QR with the signs of R's diagonal."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return blocks(q * r.diagonal().sign())
