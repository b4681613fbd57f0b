"""What it costs to round a few linears and nothing else, measured where a denoiser decides: at masked positions.

    kl           KL(model || model with only these rounded), nats per masked token
    confidence   mean squared change of the largest probability, which is what samplers commit by
    mse          mean squared change of the logits

run the model again, from the block of the linears on, on clean text that is masked at each of several ratios. All units and all
candidates see the same states (common random numbers), so their differences have no noise of the draw. Changes are squared
because errors that are independent add in squares, and whoever chooses from these numbers adds them up.

    hessian      Σ_n (E H Eᵀ)_nn / T             mean squared error of the linears' own outputs
    fisher       ½·Σ_n F_n·(E H Eᵀ)_nn / T,      F_n = 1/M·Σ_t E[(∂ log p(ŷ)/∂y_tn)²], M masked tokens

need no run of the model for a candidate: E [N, K] is the error of a weight, H/T the second moment of its input, which rounding
collects anyway. `fisher` is `kl` to second order: tokens ŷ are drawn from the model's own predictions, one backward pass a state
gives the gradients at the outputs y of all linears, and correlations between tokens and between outputs are left out (K-FAC,
Martens and Grosse 2015, arXiv 1503.05671, with a diagonal output factor).

Memory: the states' hidden values at the input of one block, at most `_LOGITS` logits at masked positions (the rest of the
positions is left out), and the weights of the blocks that follow where they fit into `_KEPT` bytes, else one at a time. For
fisher, the hidden values of one batch at the inputs of all blocks, and one block's weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor, fx

from dlqc.blocks import Block
from dlqc.contract import Context, Declined
from dlqc.diffusion.fidelity import divergence
from dlqc.diffusion.masking import apply_mask, generator, logits_of, ratio_mask
from dlqc.errors import CalibrationError, ModelError
from dlqc.execute import Executor, compute_dtype, logits_node, placeholder
from dlqc.graph import Linear, linears
from dlqc.kept import to_round
from dlqc.rounding.hessian import output_energy
from dlqc.schemes import Scheme, operands
from dlqc.states import StateFlow
from dlqc.stats import PAIRED
from dlqc.weights import Weights

Metric = Literal["kl", "confidence", "mse", "hessian", "fisher"]
MEASURED: tuple[Metric, ...] = ("kl", "confidence", "mse")
ESTIMATED: tuple[Metric, ...] = ("hessian", "fisher")
RATIOS = (0.25, 0.5, 0.75)

#: No weight is exchanged.
EXACT: Mapping[str, Tensor] = {}

_LOGITS = 1 << 26
_KEPT = 1 << 30
_BATCH = 8


@dataclass(frozen=True)
class Unit:
    """Linears that get one scheme.

    Attributes:
        block: index of their block.
        sites: one linear for each weight, in graph order.
    """

    block: int
    sites: tuple[Linear, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    @property
    def weights(self) -> int:
        """How many weights they have in all."""
        return sum(site.in_features * site.out_features for site in self.sites)


def units_of(
    graph: fx.Graph, ctx: Context, *, fused: bool = True, skip: Sequence[str] = ()
) -> tuple[list[Unit], list[Declined]]:
    """The linears of the blocks that are rounded, block by block, and those left alone.

    Args:
        fused: linears that read the same value are one unit: queries, keys and values; gate and up, of all experts. Engines merge
            their weights into one, which has one format. (The second linears of experts read values of their own.)
        skip: glob patterns of linears to leave alone.
    """
    found, left = [], []
    for block in ctx.blocks:
        by_weight, declined = to_round(block.nodes(graph), ctx.weights, skip)
        left += declined
        alike: nx.Graph[object] = nx.Graph()
        for weight, sites in by_weight.items():
            alike.add_node(weight)
            if fused:
                alike.add_edges_from((weight, site.x) for site in sites)
        for members in nx.connected_components(alike):
            found.append(Unit(block.index, tuple(s[0] for w, s in by_weight.items() if w in members)))
    return found, left


@dataclass(frozen=True, eq=False)
class Probes:
    """Masked states to measure on.

    Attributes:
        ids: int64 [S, L], with masks in place.
        measured: bool [S, L], the masked positions that are looked at.
        share: float32 [S], what each of them counts, such that every state counts the same and all together 1.
    """

    ids: Tensor
    measured: Tensor
    share: Tensor

    def batches(self, vocabulary: int) -> Iterator[slice]:
        """Slices of states whose logits are few enough."""
        size = max(1, min(_BATCH, _LOGITS // (vocabulary * self.ids.shape[1])))
        return (slice(i, i + size) for i in range(0, len(self.ids), size))


def probes(ctx: Context, *, rows: int, ratios: Sequence[float]) -> Probes:
    """`rows` calibration rows, evenly spread, masked at each of `ratios`."""
    clean = torch.empty(0, 1) if ctx.rows is None else ctx.rows.ids
    clean = clean[(clean != ctx.spec.mask_id).all(dim=1)]
    if len(clean) == 0:
        what = "no token row is free of masks, so there is nothing to mask and to measure on"
        raise CalibrationError(what, where="calibration", remedy="Give clean text with calibration=")
    clean = clean[torch.arange(min(rows, len(clean))) * len(clean) // min(rows, len(clean))]
    everything = torch.ones_like(clean, dtype=torch.bool)
    masked = torch.cat([ratio_mask(everything, ratio, ctx.seed, "sensitivity") for ratio in ratios])
    ids = apply_mask(clean.repeat(len(ratios), 1), masked, ctx.spec.mask_id)
    most = max(1, _LOGITS // (ctx.spec.vocab_size * len(ids)))
    order = torch.rand(ids.shape, generator=generator(ctx.seed, "sensitivity", "positions")).masked_fill(~masked, 2.0)
    measured = masked & (order.argsort(dim=1).argsort(dim=1) < most)
    return Probes(ids, measured, 1 / (len(ids) * measured.sum(dim=1).float()))


def sensitivities(
    graph: fx.Graph,
    ctx: Context,
    units: Sequence[Unit],
    candidates: Sequence[Sequence[Scheme]],
    metric: Metric = "kl",
    *,
    rows: int = 8,
    ratios: Sequence[float] = RATIOS,
) -> list[list[dict[str, float]]]:
    """The cost of giving each unit, alone, each of its candidates.

    Args:
        units: in the order of their blocks.
        candidates: for each unit, the schemes to try. Their methods see the statistics of the unquantized model.
        metric: what is wanted. The three that run the model come together; where a method collects a Hessian, so does "hessian".
        rows: calibration rows to measure on, each at every ratio.
        ratios: mask ratios in (0, 1].

    Returns:
        For each unit and candidate the metrics by name.

    Raises:
        CalibrationError: no clean rows, or what a method refuses.
        ModelError: the rounded model gives logits that are not finite.
    """
    states = probes(ctx, rows=rows, ratios=ratios)
    wanted = frozenset[str]().union(*(scheme.method.statistics for schemes in candidates for scheme in schemes))
    wanted |= {"hessian", "count"} if metric in ESTIMATED or "hessian" in wanted else set()
    fisher = output_fisher(graph, ctx, units, states) if metric == "fisher" else None
    runner = _Runner(graph, ctx, states) if metric in MEASURED else None
    # Nothing is rounded here, so both streams of states are the same: methods that compare them find no drift.
    paired = bool(wanted & PAIRED)
    kept = {"paired": paired, "original": paired, "gradients": "fisher" in wanted}
    flow = StateFlow(graph, ctx, _BATCH, **kept) if wanted else None
    found: list[list[dict[str, float]]] = []
    for block in ctx.blocks:
        members = [pair for pair in zip(units, candidates, strict=True) if pair[0].block == block.index]
        stats = flow.collect(block, wanted) if flow and members else {}
        rounder = _Rounder(ctx.weights, stats)
        if runner is not None:
            runner.enter(block, [site.weight for unit, _ in members for site in unit.sites])
        for unit, schemes in members:
            found.append([])
            for scheme in schemes:
                rounded = {site.weight: rounder(site, scheme) for site in unit.sites}
                costs = runner.costs(rounded) if runner is not None else {}
                if "hessian" in wanted:
                    costs |= _estimates(unit, ctx.weights, rounded, stats, fisher)
                found[-1].append(costs)
        if flow and block is not ctx.blocks[-1]:
            flow.advance(block)
    return found


class _Rounder:
    """Rounds the weights of a block; linears that read the same value share what a method prepares."""

    def __init__(self, weights: Weights, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._weights, self._stats = weights, stats
        self._key: list[Any] = []
        self._prepared: Mapping[str, Any] = {}

    def __call__(self, site: Linear, scheme: Scheme) -> Tensor:
        """The weight [N, K] that the scheme stores, float32."""
        stats = self._stats.get(site.weight, {})
        key = [scheme.method, *map(id, stats.values())]
        if key != self._key:
            self._key, self._prepared = key, scheme.method.prepare(stats)
        exact, known = operands(self._weights, site.weight, scheme.method, self._prepared)
        found: Tensor = scheme.method.round(exact, scheme.format, known).weight.dequantize()
        return found


class _Runner:
    """Runs the probes from the input of a block to the logits, with some weights of the block replaced."""

    def __init__(self, graph: fx.Graph, ctx: Context, states: Probes) -> None:
        self._graph, self._ctx, self._states = graph, ctx, states
        self._batches = list(states.batches(ctx.spec.vocab_size))
        total = sum(c.shape.numel() * torch.float32.itemsize for c in ctx.weights.values())
        self._keep = total <= _KEPT
        self._at = placeholder(graph)
        self._hidden = [states.ids[part] for part in self._batches]
        whole = Executor(graph, ctx.weights, [self._at], [logits_node(graph)])
        self._reference = [self._logits(whole, part, []) for part in self._batches]

    def enter(self, block: Block, weights: Sequence[str]) -> None:
        """Move the probes to the input of a block, of which `weights` are going to be replaced."""
        ids, target = placeholder(self._graph), block.input(self._graph)
        step = Executor(self._graph, self._ctx.weights, [ids, self._at], [target], keep_weights=True)
        self._hidden = [step(self._states.ids[p], h)[0] for p, h in zip(self._batches, self._hidden, strict=True)]
        self._at = target
        names = {str(n.target): n for n in self._graph.nodes if n.op == "get_attr" and str(n.target) in weights}
        self._dtypes = {name: compute_dtype(node, None) for name, node in names.items()}
        logits = logits_node(self._graph)
        self._run = Executor(self._graph, self._ctx.weights, [ids, target], [logits], keep_weights=self._keep)

    def costs(self, rounded: Mapping[str, Tensor]) -> dict[str, float]:
        """The measured metrics with these weights in place of the block's own."""
        constants = {name: weight.to(self._dtypes[name]) for name, weight in rounded.items()}
        total = torch.zeros(len(MEASURED), dtype=torch.float64)
        for part, hidden, reference in zip(self._batches, self._hidden, self._reference, strict=True):
            found = self._logits(self._run, part, [hidden], constants)
            share = (self._states.share[part, None] * self._states.measured[part])[self._states.measured[part]]
            confidence = found.softmax(-1).amax(-1) - reference.softmax(-1).amax(-1)
            changes = (divergence(reference, found), confidence.square(), (found - reference).square().mean(-1))
            total += torch.stack([(share * change).sum(dtype=torch.float64) for change in changes])
        if not bool(total.isfinite().all()):
            what = "with only these linears rounded, the logits are not finite"
            raise ModelError(what, where=next(iter(rounded)), remedy="Leave them out with skip=, or use more bits")
        return dict(zip(MEASURED, total.tolist(), strict=True))

    @torch.no_grad()
    def _logits(
        self, run: Executor, part: slice, more: Sequence[Tensor], constants: Mapping[str, Tensor] = EXACT
    ) -> Tensor:
        """Logits [T, V] at the measured positions of some states, float32."""
        ids, spec = self._states.ids[part], self._ctx.spec
        return logits_of(functools.partial(_call, run, constants, *more), ids, spec)[
            self._states.measured[part]
        ].float()


def _call(run: Executor, constants: Mapping[str, Tensor], *given: Tensor) -> Tensor:
    """What `run` gives for token ids, the last of `given`, and the values that come after them in its inputs."""
    *more, ids = given
    return run.differentiable(ids, *more, constants=constants)[0]


def _estimates(
    unit: Unit,
    weights: Weights,
    rounded: Mapping[str, Tensor],
    stats: Mapping[str, Mapping[str, Tensor]],
    fisher: Mapping[str, Tensor] | None,
) -> dict[str, float]:
    """The metrics that need no run of the model."""
    found: dict[str, float] = dict.fromkeys(ESTIMATED if fisher is not None else ("hessian",), 0.0)
    for site in unit.sites:
        error = weights.value(site.weight, torch.float64).sub_(rounded[site.weight]).float()
        energy = output_energy(error, stats[site.weight]["hessian"]) / stats[site.weight]["count"]
        found["hessian"] += float(energy.sum())
        if fisher is not None:
            found["fisher"] += 0.5 * float(fisher[site.weight] @ energy)
    return found


def output_fisher(graph: fx.Graph, ctx: Context, units: Sequence[Unit], states: Probes) -> dict[str, Tensor]:
    """F [N] of each weight (see the module docstring), float64: one backward pass, block by block, on each state."""
    ids, logits = placeholder(graph), logits_node(graph)
    weights = {site.weight for unit in units for site in unit.sites}
    outputs = {b.index: [s for s in linears(b.nodes(graph), ctx.weights) if s.weight in weights] for b in ctx.blocks}
    found = {s.weight: torch.zeros(s.out_features, dtype=torch.float64) for o in outputs.values() for s in o}
    random = generator(ctx.seed, "sensitivity", "fisher")
    cuts = [b.input(graph) for b in ctx.blocks] + [ctx.blocks[-1].output(graph)]
    for part in states.batches(ctx.spec.vocab_size):
        canvas, values = states.ids[part], [states.ids[part]]
        for at, target in itertools.pairwise([ids, *cuts]):
            values.append(Executor(graph, ctx.weights, [ids, at], [target])(canvas, values[-1])[0])
        values = [value.requires_grad_() for value in values[1:]]
        head = Executor(graph, ctx.weights, [ids, cuts[-1]], [logits])
        measured = states.measured[part]
        read = functools.partial(_call, head, EXACT, values[-1])
        log_p = logits_of(read, canvas, ctx.spec)[measured].float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=random)
        share = (states.share[part, None] * measured)[measured].sqrt()
        (gradient,) = torch.autograd.grad((log_p.gather(1, drawn)[:, 0] * share).sum(), values[-1])
        for block in reversed(ctx.blocks):
            members, source = outputs[block.index], values[block.index]
            targets = [cuts[block.index + 1], *(site.node for site in members)]
            run = Executor(graph, ctx.weights, [ids, cuts[block.index]], targets)
            top, *ys = run.differentiable(canvas, source, constants=EXACT)
            gradient, *gs = torch.autograd.grad(top, [source, *ys], gradient)
            for site, g in zip(members, gs, strict=True):
                found[site.weight] += g.square().reshape(-1, site.out_features).sum(dim=0, dtype=torch.float64)
    return found
