"""Certificates: a pass that claims to preserve the function is made to prove it, in float64, on probes.

The graph (or, in block scope, the block) is evaluated before and after the pass. Graph probes are token ids at mask ratios 0,
¼, ½, ¾ and 1; block probes are hidden values: Gaussian, Gaussian with a few channels a thousand times larger, and rows that
are all alike. The certificate is the worst relative deviation; more than `BOUND` is an error.
"""

from __future__ import annotations

import torch
from torch import fx

from dlqc.contract import Context, Pass, PassReport
from dlqc.errors import ContractError
from dlqc.execute import Executor, logits_node, placeholder
from dlqc.graph import width
from dlqc.observers import laid_out, layout

BOUND = 1e-9
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LENGTH = 16


def certified(p: Pass, graph: fx.Graph, ctx: Context) -> PassReport:
    """Apply a pass; if it claims to preserve the function, measure that and store it in the report."""
    if p.preserves != "exact":
        return p.apply(graph, ctx)
    probes = _probes(graph, ctx)
    before = _evaluate(graph, ctx, probes)
    report = p.apply(graph, ctx)
    after = _evaluate(graph, ctx, probes)
    worst = max(deviation(a, b) for a, b in zip(after, before, strict=True))  # each probe by itself
    report.certificate = worst
    if not worst <= BOUND:
        where = "the whole graph" if ctx.block is None else f"block {ctx.block.index}"
        raise ContractError(
            f"pass {p.name!r} claims to preserve the function, but it changed by {worst:.3g} relative in float64",
            where=where,
            remedy=f"This is a fault of {p.name!r}; leave it out of the recipe",
        )
    return report


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|; infinite where either is not finite."""
    if not bool(torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return float("inf")
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def _probes(graph: fx.Graph, ctx: Context) -> tuple[torch.Tensor, ...]:
    """The probes as one batch, [5, L] ids; in block scope [3, L] ids and [3, L, d] hidden values, as the block has them."""
    generator = torch.Generator().manual_seed(ctx.seed)
    length = min(_LENGTH, ctx.spec.max_length)
    ids = torch.randint(0, ctx.spec.vocab_size, (1, length), generator=generator)
    if ctx.block is None:
        hidden = torch.rand(1, length, generator=generator)
        return (torch.cat([torch.where(hidden < ratio, ctx.spec.mask_id, ids) for ratio in RATIOS]),)
    d = width(ctx.block.input(graph))
    plain = torch.randn(1, length, d, generator=generator, dtype=torch.float64)
    spiky = plain.clone()
    spiky[..., torch.randperm(d, generator=generator)[: min(3, d)]] *= 1000.0
    hidden = torch.cat((plain, spiky, plain[:, :1].expand(1, length, d)))
    return ids.expand(3, length), laid_out(hidden, layout(ctx.block.input(graph)))


def _evaluate(graph: fx.Graph, ctx: Context, probes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if ctx.block is None:
        inputs, output = [placeholder(graph)], logits_node(graph)
    else:
        inputs, output = [placeholder(graph), ctx.block.input(graph)], ctx.block.output(graph)
    return Executor(graph, ctx.weights, inputs, [output], dtype=torch.float64)(*probes)[0]
