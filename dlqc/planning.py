"""`dlqc plan`: what a compilation would do, found from shapes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from dlqc.backend import LinearSpec, choose_kernel, load_backend
from dlqc.blocks import find_blocks
from dlqc.compile import plan
from dlqc.diffusion.masking import device_of
from dlqc.graph import Linear, linears
from dlqc.recipe import as_recipe
from dlqc.stats import PAIRED

#: For the estimate of time only; a server does many times as much.
_FLOPS_PER_SECOND = 5e10


@dataclass(frozen=True)
class PlanReport:
    """The plan of a compilation.

    Attributes:
        recipe: the passes. blocks: how many. sites: linears to quantize. kernels: how many sites each kernel gets.
        parameters: of the model. bits: to be stored. peak_bytes: of the largest block while it is rounded: its Hessians, the
            factor of one, and one weight in float64 with its working copies.
        seconds: of rounding by GPTQ: K³/3 flops an input and N·K² a linear; GPTAQ's correction on top.
        formats: how many sites each number format gets, where that is known beforehand. notes: sentences of the passes.
        problems: what would fail. kept: linears that stay, and why.

    Where widths are assigned while compiling, `bits` is the most that the budget allows.
    """

    recipe: str
    nodes: int
    blocks: int
    sites: int
    kernels: dict[str, int]
    parameters: int
    bits: float
    peak_bytes: int
    seconds: float
    formats: dict[str, int]
    notes: list[str]
    problems: list[str]
    kept: dict[str, str]

    def to_plain(self) -> dict[str, Any]:
        return self.__dict__ | {"megabytes": self.bits / 8e6, "bits_per_weight": self.bits / self.parameters}

    def render(self) -> str:
        lines = [
            f"recipe: {self.recipe}",
            f"graph: {self.nodes} nodes, {self.blocks} blocks, {self.sites} linears to quantize",
            f"size: {self.bits / 8e6:,.1f} MB, {self.bits / self.parameters:.3f} bits per weight, everything counted",
            f"peak memory beside the model and the calibration states: about {self.peak_bytes / 1e6:,.0f} MB",
            f"rounding time: about {self.seconds:,.0f} s at {_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s, forward passes not counted",
        ]
        lines += [f"{label}: {count} sites" for label, count in self.formats.items() if len(self.formats) > 1]
        lines += self.notes
        lines += [f"kernel {name}: {count} sites" for name, count in self.kernels.items()]
        lines += [f"stays: {name} ({why})" for name, why in self.kept.items()]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def plan_report(model: nn.Module, recipe: str, *, backend: str = "auto", mask_id: int | None = None) -> PlanReport:
    """Plan a compilation on a model that may have no weights."""
    found, captured, _ = plan(model, recipe, backend=backend, mask_id=mask_id)
    target, chosen = load_backend(backend, device_of(model)), as_recipe(recipe)
    kernels: Counter[str] = Counter()
    parameters = bits = 0.0
    names = {f"{name}.weight" for name in (*found.sites, *found.tables)}
    seen = set()
    for name, constant in captured.weights.items():
        if id(constant.leaf) in seen:
            continue
        seen.add(id(constant.leaf))
        parameters += constant.leaf.numel()
        if name not in names:
            bits += constant.leaf.numel() * constant.leaf.element_size() * 8
    formats: Counter[str] = Counter()
    specs: dict[str, list[LinearSpec]] = {}
    for name, spec in found.specs():
        specs.setdefault(name, []).append(spec)
    for name, candidates in specs.items():
        chosen_by = [choose_kernel(target, spec)[0] for spec in candidates]
        kernels[" or ".join(dict.fromkeys(kernel.name if kernel else "none" for kernel in chosen_by))] += 1
        bits += found.beside.get(name, 0)
        if name not in found.assigned:
            (spec,) = candidates
            n, k = spec.out_features, spec.in_features
            bits += n * k * spec.weight.bits_per_weight(n, k)
            formats[spec.weight.label] += 1
    bits += found.limit_bits
    bits += sum(rows * width * fmt.bits_per_weight(rows, width) for fmt, rows, width in found.tables.values())
    wanted = frozenset[str]().union(*(p.statistics() for p in chosen.passes))
    blocks = find_blocks(captured.graph)
    costs = [_block_cost(list(linears(b.nodes(captured.graph), captured.weights)), wanted) for b in blocks]
    return PlanReport(
        recipe=f"{chosen.name}: {chosen}",
        nodes=len(captured.graph.nodes),
        blocks=len(blocks),
        sites=len(found.sites),
        kernels=dict(kernels),
        parameters=int(parameters),
        bits=bits,
        peak_bytes=max((peak for peak, _ in costs), default=0),
        seconds=sum(flops for _, flops in costs) / _FLOPS_PER_SECOND,
        formats=dict(formats),
        notes=found.notes,
        problems=found.problems,
        kept=found.kept,
    )


def _block_cost(sites: list[Linear], wanted: frozenset[str]) -> tuple[int, float]:
    """(peak bytes, flops) of rounding a block's linears with these statistics of their inputs."""
    widths = list({site.x: site.in_features for site in sites}.values())
    largest = max((site.in_features * site.out_features for site in sites), default=0)
    if "hessian" not in wanted:
        return 3 * 8 * largest, 0.0
    squares, widest = 8 * sum(k * k for k in widths), 8 * max(widths, default=0) ** 2
    flops = sum(k**3 / 3 for k in widths) + sum(s.out_features * s.in_features**2 for s in sites)
    if not wanted & PAIRED:
        return squares + widest + 17 * largest, float(flops)
    # The drift beside each Hessian, and what it is divided to; dividing, and applying the quotient.
    flops += sum(2 * k**3 for k in widths) + sum(2 * s.out_features * s.in_features**2 for s in sites)
    return 2 * squares + 2 * widest + 17 * largest, float(flops)
