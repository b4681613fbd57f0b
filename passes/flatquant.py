"""FlatQuant: learn an invertible transform in front of linears that flattens activations and weights (Sun et al. 2024,
arXiv 2410.09426, section 3).

Before:  linear(x, W)
After:   linear(x·T, W·T⁻ᵀ),            T = diag(c)·(P₁ ⊗ P₂),   P_i = U_i·diag(s_i)·V_iᵀ,   T⁻ᵀ = diag(1/c)·(P₁⁻ᵀ ⊗ P₂⁻ᵀ)

For every value that linears read, one T. U and V are Cayley transforms of skew matrices, c and s exponentials, so that T is
invertible and P_i⁻ᵀ = U_i·diag(1/s_i)·V_iᵀ all along. They are learned by Adam, on each edge by itself, to minimise

    Σ_readers ‖Q(x·T)·Q(W·T⁻ᵀ)ᵀ - x·Wᵀ‖²

over a sample of up to 512 rows of x, with weights rounded per row and activations per token, both symmetric. Rows are drawn in
proportion to the token weights of the states. P₁ ⊗ P₂ has the sizes nearest to √d by √d and stays in the graph as one op,
two small multiplications a token. diag(c) folds into what makes x (the gain of a norm, the projection that is a factor of a
product, the values of an attention) where `dlqc.regions` closes; elsewhere it stays in the op.

One row in eight is held out. What is kept is what has the smallest error there: the learned T, its start, or no T at all.

Differences from the official code:
    - the error is that of the linears that read an edge, which needs no more than the sample; there that of the block's output
    - x is what the quantized blocks before it produce; there the original model's
    - clip ratios are not learned: an activation's is no part of what `quantize_activations` can express, and a weight's would
      make this pass inexact; `awq_clip`, or quantize_weights(clip="mse"), searches those afterwards
    - at the input of the output projection there P₁ mixes heads and P₂, within heads, is folded into the values; here both stay
    - keys and values are not transformed for a cache
    - P starts as a Hadamard matrix, there as a random orthogonal one (start="orthogonal"); there AdamW, with weight decay

Declines a value whose readers cannot undo T (a weight that somebody else reads or that is no constant), that is transformed at
run time already, that is zero on the sample, that only routers read, or that no transform improves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from dlqc import hadamard
from dlqc.affine import Affine, Found
from dlqc.cayley import random_hadamard, random_orthogonal
from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.errors import ContractError, RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.graph import Linear, is_call, linears, width
from dlqc.ops import TRANSFORM
from dlqc.regions import Refused, Region, edges, keep_online, readers
from dlqc.routers import is_router
from dlqc.scaling import Edge, EdgeKind, scalable
from dlqc.straight_through import quantized_activations, quantized_weight

_KINDS: tuple[EdgeKind, ...] = ("norm", "product", "value", "other")
_HELD_OUT = 8  # one row in so many


@dataclass(frozen=True)
class Flatquant(Pass):
    """Learned Kronecker transforms at run time, with learned scales folded where they can be.

    Options:
        steps: of Adam on all rows of the sample. lr: of the first, falling to zero as a cosine.
        weight_bits, act_bits: what is rounded to while learning; act_bits=None leaves activations alone.
        start: of P₁ and P₂.
        alpha: c starts as SmoothQuant's scales of this strength; 0.3 as in the official code. None learns no c.
    """

    name: ClassVar[str] = "flatquant"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    steps: int = 200
    lr: float = 5e-3
    weight_bits: int = 4
    act_bits: int | None = 4
    start: Literal["hadamard", "orthogonal", "identity"] = "hadamard"
    alpha: float | None = 0.3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RecipeError(f"{self.steps} is less than 1", where="flatquant.steps", remedy="Use 200")
        if not 0 < self.lr < float("inf"):
            what = f"{self.lr} is no learning rate"
            raise RecipeError(what, where="flatquant.lr", remedy="Use a positive number, such as 0.005")
        if self.start not in _STARTS:
            what = f"unknown start {self.start!r}"
            raise RecipeError(what, where="flatquant.start", remedy=f"Use {', '.join(_STARTS)}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            what = f"{self.alpha} is outside [0, 1]"
            raise RecipeError(what, where="flatquant.alpha", remedy="0.3 is the usual value, or None for no scales")
        self.formats  # noqa: B018  a wrong width is refused here

    @property
    def formats(self) -> tuple[ActFormat | None, IntFormat]:
        return None if self.act_bits is None else ActFormat(self.act_bits), IntFormat(self.weight_bits, None)

    def statistics(self) -> frozenset[str]:
        return frozenset({"sample"})

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        closed = [e for e in scalable(graph, ctx, _KINDS) if isinstance(e, Edge)]
        for value in edges(ctx.nodes(graph), ctx.weights):
            sites = list(linears(value.users, ctx.weights))
            found = readers(graph, ctx.weights, value)
            reason = unfit(value, sites, ctx) or (str(found) if isinstance(found, Refused) else None)
            t = None
            if reason is None and isinstance(found, Region):
                own = {site.weight for site in sites}
                scaled = next((e for e in closed if value in e.region.carries and own == e.readers.keys()), None)
                t = self.learn(width(value), sites, scaled, ctx, report)
                if t is not None:
                    if scaled is not None and t.c is not None:
                        scaled.scale(ctx.weights, 1.0 / t.c)
                    keep_online(graph, ctx.weights, found, t.online(apart=scaled is not None))
                    report.sites += 1
            if t is None:
                reason = reason or "no transform lowers the error on held-out rows"
                report.declined.append(Declined(f"input of {sites[0].name}", reason))
        if report.sites:
            report.metrics["online"] = report.sites
        return report

    def learn(
        self, d: int, sites: Sequence[Linear], scaled: Edge | None, ctx: Context, report: PassReport
    ) -> Found | None:
        """The best transform of a value; None if it is better left alone."""
        name, x = sites[0].name, ctx.stats[sites[0].weight]["sample"].float()
        learned = {s.weight for s in sites if not is_router(s.node)}
        matrices = [ctx.weights.value(weight, torch.float64).float() for weight in sorted(learned)]
        picked = torch.arange(len(x)) % _HELD_OUT == 0
        fit, judge = (x[~picked], x[picked]) if len(x) >= 2 * _HELD_OUT else (x, x)
        sizes = (nearest_factor(d), d // nearest_factor(d))
        starts = [_STARTS[self.start](n, ctx.seed + i) for i, n in enumerate(sizes)]
        affine = Affine(starts, scaled, 1 if scaled is None else scaled.readers[sites[0].weight])
        if self.alpha is not None:
            affine.smooth(x, matrices, self.alpha)
        try:
            start, before = affine.found(), self.error_of(judge, matrices, affine)
            self.descend(affine, fit, matrices)
            end, after = affine.found(), self.error_of(judge, matrices, affine)
        except ContractError as error:
            what = f"the transform of its input cannot be undone: {error.what}"
            raise ContractError(what, where=name, remedy="Lower lr= or steps=, or run smooth first") from error
        plain = self.error_of(judge, matrices, None)
        report.details[name] = {"error_plain": plain, "error_start": before, "error_learned": after}
        report.details[name]["condition"] = end.condition
        if not after < before:
            report.notes.append(f"{name}: learning did not lower the error on held-out rows, so its start counts")
        if not min(before, after) < plain:
            return None
        return end if after < before else start

    def descend(self, affine: Affine, x: Tensor, matrices: Sequence[Tensor]) -> None:
        """Adam on the error relative to that of the start; stops where a number stops being finite."""
        parameters = affine.parameters
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        with torch.no_grad():
            unit = self.error(x, matrices, affine).clamp_min(1e-30)
        for i in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * i / self.steps)) / 2
            optimizer.zero_grad()
            (self.error(x, matrices, affine) / unit).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if not all(bool(torch.isfinite(p).all()) for p in parameters):
                return

    def error(self, x: Tensor, matrices: Sequence[Tensor], affine: Affine | None) -> Tensor:
        """Σ_readers ‖Q(x·T)·Q(W·T⁻ᵀ)ᵀ - x·Wᵀ‖²; T = 1 without a affine."""
        act, fmt = self.formats
        turned = quantized_activations(x if affine is None else affine(x), act)
        total = torch.zeros(())
        for w in matrices:
            rounded = quantized_weight(w if affine is None else affine(w, undo=True), fmt)
            total = total + (turned @ rounded.T - x @ w.T).square().sum()
        return total

    @torch.no_grad()
    def error_of(self, x: Tensor, matrices: Sequence[Tensor], affine: Affine | None) -> float:
        return float(self.error(x, matrices, affine))


def unfit(value: fx.Node, sites: Sequence[Linear], ctx: Context) -> str | None:
    """Why a value cannot be transformed, if so."""
    if is_call(value, TRANSFORM):
        return "it is transformed at run time already"
    if all(is_router(site.node) for site in sites):
        return "only routers read it"
    return None if bool(ctx.stats[sites[0].weight]["sample"].any()) else "it is zero on the sample"


def nearest_factor(d: int) -> int:
    """The largest divisor of d up to √d.

    >>> nearest_factor(4096), nearest_factor(12288), nearest_factor(18944)
    (64, 96, 128)
    """
    return next(n for n in range(math.isqrt(d), 0, -1) if d % n == 0)


def _hadamard(n: int, seed: int) -> Tensor:
    """A factor is too small to leave a part of it as it is: random where no Hadamard matrix has its order."""
    return random_hadamard(n, seed) if hadamard.order(n) else random_orthogonal(n, seed)


def _identity(n: int, seed: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


_STARTS = {"hadamard": _hadamard, "orthogonal": random_orthogonal, "identity": _identity}
