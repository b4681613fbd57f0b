"""Which pass, and which layers, a drop in quality comes from.

    passes   the recipe is compiled up to each of its passes; the first whose KL to the original exceeds the tolerance is named.
             Fine-tuning that came afterwards is the last of them
    blocks   in the whole recipe, the linears of one block go back to full precision, block after block
    sites    the same, linear by linear, in the blocks that matter most

The full-precision weight of a linear is the one it had just before it was quantized: behind every rotation and scaling that
came first, so that it fits the graph around it. What a layer is worth is the share of the drop that goes with it:

    share = (KL - KL with the layer in full precision) / KL

Shares of single layers need not sum to one: errors add up, and cancel, on their way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import fx, nn

from dlqc.compile import Text, compile
from dlqc.compiled import Compiled
from dlqc.contract import Context, Pass, PassReport
from dlqc.diffusion.fidelity import FidelityTable, fidelity
from dlqc.diffusion.intervals import Interval, brief
from dlqc.diffusion.likelihood import NllTable, masked_nll, paired_difference
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError
from dlqc.execute import forward
from dlqc.graph import (
    LINEAR,
    QUANTIZED_LINEARS,
    activation_quantizer,
    args_of,
    call_before,
    copy_graph,
    corrected,
    is_call,
    linears,
    read,
    replace,
    site_name,
    sweep,
)
from dlqc.manager import Instrument
from dlqc.recipe import Recipe, _line, as_recipe
from dlqc.weights import Constant, Weights

RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class PassCost:
    """The recipe up to and with one pass.

    Attributes:
        step: the pass, as recipe text; or fine-tuning, as the report tells it.
        kl: nats per masked position, from the original. agreement: share of equal proposals.
        nll: paired difference of the masked NLL to the original.
        within: whether the KL is within the tolerance.
    """

    step: str
    kl: Interval
    agreement: Interval
    nll: Interval
    within: bool


@dataclass(frozen=True)
class LayerCost:
    """A block or a linear in full precision, all others as the recipe made them.

    Attributes:
        name: of the linear, or "block 3". linears: how many that are.
        kl: what is left. share: of the drop that is gone.
    """

    name: str
    linears: int
    kl: float
    share: float


@dataclass(frozen=True)
class Bisection:
    """What `bisect` found.

    Attributes:
        tolerance: of the KL.
        passes: in the order of the recipe. guilty: the first that is not within the tolerance, None where all are.
        kl: of the whole recipe (and fine-tuning) before lowering: what the shares are of.
        blocks, sites: the most important first.
    """

    tolerance: float
    passes: tuple[PassCost, ...]
    guilty: str | None
    kl: float
    blocks: tuple[LayerCost, ...]
    sites: tuple[LayerCost, ...]

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> Group:
        """Three tables and the verdict."""
        verdict = (
            f"every pass stays within {self.tolerance:g} nats"
            if self.guilty is None
            else f"the first pass beyond {self.tolerance:g} nats is {self.guilty}"
        )
        steps = _table("up to pass", "KL", "top-1 agreement", "NLL difference", "")
        for cost in self.passes:
            steps.add_row(
                cost.step,
                brief(cost.kl, 4),
                brief(cost.agreement, 3),
                brief(cost.nll, 4),
                "" if cost.within else "beyond",
            )
        parts: list[Any] = [steps, verdict]
        for title, costs in (("block", self.blocks), ("linear", self.sites)):
            if costs:
                table = _table(f"{title} in full precision", "linears", f"KL (of {self.kl:.4f})", "share of the drop")
                for layer in costs:
                    table.add_row(layer.name, f"{layer.linears}", f"{layer.kl:.4f}", f"{layer.share:+.1%}")
                parts += ["", table]
        return Group(*parts)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, min_width=20, overflow="fold")  # a narrow screen breaks intervals, and leaves out no name
    for name in others:
        table.add_column(name, justify="right")
    return table


def bisect(
    model: nn.Module,
    passes: str | Recipe | Sequence[Pass],
    rows: torch.Tensor,
    *,
    tolerance: float = 0.01,
    worst: int = 1,
    calibration: Text | None = None,
    backend: str = "auto",
    mask_id: int | None = None,
    seed: int = 0,
    ratios: Sequence[float] = RATIOS,
    tuned: Compiled | None = None,
) -> Bisection:
    """Find the pass and the layers behind a drop.

    Costs one compilation for each pass that changes the graph, and one measurement for each of them, for each block and for each
    linear of the `worst` blocks.

    Args:
        model: the original. passes: as for `compile`.
        rows: clean token rows [R, L] to measure on, two at least.
        tolerance: KL in nats per masked position that a recipe may cost.
        worst: blocks whose linears are looked at one by one; 0 for none.
        calibration, backend, mask_id, seed: as for `compile`.
        ratios: mask ratios.
        tuned: what `finetune` made of the recipe's result; one that was never fine-tuned adds nothing.
    """
    if not tolerance > 0 or worst < 0:
        raise FeasibilityError(
            f"tolerance {tolerance:g}, worst {worst}", where="tolerance", remedy="Use tolerance > 0 and worst >= 0"
        )
    recipe = as_recipe(passes)
    options: dict[str, Any] = {"backend": backend, "mask_id": mask_id, "seed": seed, "progress": False}
    original = compile(model, (), **options)
    spec = original.spec
    base = masked_nll(original, rows, spec, ratios=ratios, seed=seed)
    costs, compiled, keeper = [], original, _FullPrecision()

    def measure(step: str, candidate: Compiled) -> PassCost:
        apart = fidelity(original, candidate, rows, spec, ratios=ratios, seed=seed)
        nll = masked_nll(candidate, rows, spec, ratios=ratios, seed=seed)
        return _cost(step, apart, nll, base, tolerance)

    for count, step in enumerate(recipe.passes, start=1):
        if step.given_facts() == {"states"}:
            continue
        keeper = _FullPrecision()
        compiled = compile(model, recipe.passes[:count], calibration=calibration, instruments=(keeper,), **options)
        costs.append(measure(_line(step), compiled))
    tuning = [step.options for step in tuned.report.steps if step.name == "finetune"] if tuned is not None else []
    if tuned is not None and tuning:
        compiled = tuned
        costs.append(measure(", ".join(tuning), tuned))
    guilty = next((cost.step for cost in costs if not cost.within), None)
    layers = _Layers(original, compiled, keeper, rows, spec, tuple(ratios), seed)
    blocks = layers.by_block()
    inside = [b for b in blocks[:worst] if b.linears > 1]
    sites = layers.by_site([b.name for b in inside])
    return Bisection(tolerance, tuple(costs), guilty, layers.kl, tuple(blocks), tuple(sites))


def _cost(step: str, apart: FidelityTable, nll: NllTable, base: NllTable, tolerance: float) -> PassCost:
    kl = apart.mean_kl
    return PassCost(step, kl, apart.mean_agreement, paired_difference(nll, base), kl.mean <= tolerance)


class _FullPrecision(Instrument):
    """Keeps, of every linear, weight and bias as they were when it was last seen in full precision, and its block."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Constant, Constant | None]] = {}
        self.block: dict[str, int] = {}

    def before(self, p: Pass, graph: fx.Graph, ctx: Context) -> None:
        self._look(graph, ctx)

    def after_block(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        self._look(graph, ctx)

    def after(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        self._look(graph, ctx)

    def _look(self, graph: fx.Graph, ctx: Context) -> None:
        for site in linears(graph.nodes, ctx.weights):
            bias = None if site.bias is None else ctx.weights[site.bias]
            self.kept[site.name] = (ctx.weights[site.weight], bias)
        for block in ctx.blocks if not self.block else ():
            self.block |= {s.name: block.index for s in linears(block.nodes(graph), ctx.weights)}


class _Layers:
    """Measures what is left of the drop when some linears are in full precision."""

    def __init__(
        self,
        original: Compiled,
        compiled: Compiled,
        keeper: _FullPrecision,
        rows: torch.Tensor,
        spec: DiffusionSpec,
        ratios: tuple[float, ...],
        seed: int,
    ) -> None:
        self._original, self._compiled, self._keeper = original, compiled, keeper
        self._options: dict[str, Any] = {"rows": rows, "spec": spec, "ratios": ratios, "seed": seed}
        names = [site_name(n) for n in compiled.graph.nodes if is_call(n, *QUANTIZED_LINEARS)]
        self.names = [name for name in dict.fromkeys(names) if name in keeper.kept]
        self.kl = self._measure(())

    def by_block(self) -> list[LayerCost]:
        groups: dict[str, list[str]] = {}
        for name in self.names:
            index = self._keeper.block.get(name)
            groups.setdefault("outside of the blocks" if index is None else f"block {index}", []).append(name)
        return self._ranked(groups)

    def by_site(self, blocks: Iterable[str]) -> list[LayerCost]:
        chosen = set(blocks)
        inside = [name for name in self.names if f"block {self._keeper.block.get(name)}" in chosen]
        return self._ranked({name: [name] for name in inside})

    def _ranked(self, groups: dict[str, list[str]]) -> list[LayerCost]:
        costs = []
        for name, members in groups.items():
            left = self._measure(members)
            share = (self.kl - left) / self.kl if self.kl else 0.0
            costs.append(LayerCost(name, len(members), left, share))
        return sorted(costs, key=lambda cost: -cost.share)

    def _measure(self, names: Sequence[str]) -> float:
        graph, weights = copy_graph(self._compiled.graph), self._compiled.weights.clone()
        restore(graph, weights, {name: self._keeper.kept[name] for name in names})
        candidate = partial(forward, graph, weights)
        return fidelity(self._original, candidate, **self._options).mean_kl.mean


def restore(graph: fx.Graph, weights: Weights, kept: dict[str, tuple[Constant, Constant | None]]) -> None:
    """Put linears back to full precision.

    Before:  linear_packed(quantize_act(x), codes, …), or any other quantized linear, and its correction of low rank
    After:   linear(x, W, b)

    Args:
        kept: by module name, the constants W and b.
    """
    for node in [n for n in graph.nodes if is_call(n, *QUANTIZED_LINEARS) and site_name(n) in kept]:
        name = site_name(node)
        quantizer = activation_quantizer(node)
        x = args_of(node)[0] if quantizer is None else args_of(quantizer)[0]
        parts: list[fx.Node | None] = []
        for role, constant in zip(("weight", "bias"), kept[name], strict=True):
            if constant is None:
                parts.append(None)
                continue
            weights.define(f"{name}.restored.{role}", constant)
            parts.append(read(graph, weights, f"{name}.restored.{role}", node))
            parts[-1].meta["val"] = parts[-1].meta["val"].to(node.meta["val"].dtype)  # type: ignore[union-attr]
        replace(corrected(node), call_before(graph, node, LINEAR, (x, *parts)))
    sweep(graph, weights)
