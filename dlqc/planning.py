"""`dlqc plan`: what a compilation would do, found from shapes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from dlqc.backend import choose_kernel, load_backend
from dlqc.compile import plan
from dlqc.recipe import as_recipe

#: Rough cost of GPTQ, for the estimate only: multiply-adds by input feature cubed and by weight · input feature.
_GPTQ_FLOPS_PER_K3 = 2.0
_FLOPS_PER_SECOND = 5e10


@dataclass(frozen=True)
class PlanReport:
    """The plan of a compilation.

    Attributes:
        recipe: the passes. blocks: how many. sites: linears to quantize. kernels: how many sites each kernel gets.
        parameters: of the model. bits: to be stored. peak_bytes: largest block's weights in float64 and its Hessians.
        problems: what would fail. kept: linears that stay, and why.
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
    problems: list[str]
    kept: dict[str, str]

    def to_plain(self) -> dict[str, Any]:
        return self.__dict__ | {"megabytes": self.bits / 8e6, "bits_per_weight": self.bits / self.parameters}

    def render(self) -> str:
        lines = [
            f"recipe: {self.recipe}",
            f"graph: {self.nodes} nodes, {self.blocks} blocks, {self.sites} linears to quantize",
            f"size: {self.bits / 8e6:,.1f} MB, {self.bits / self.parameters:.3f} bits per weight, everything counted",
            f"peak memory beside the calibration states: about {self.peak_bytes / 1e6:,.0f} MB (one linear at a time)",
            f"rounding time: about {self.seconds:,.0f} s at {_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s, forward passes not counted",
        ]
        lines += [f"kernel {name}: {count} sites" for name, count in self.kernels.items()]
        lines += [f"stays: {name} ({why})" for name, why in self.kept.items()]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def plan_report(model: nn.Module, recipe: str, *, backend: str = "auto", mask_id: int | None = None) -> PlanReport:
    """Plan a compilation on a model that may have no weights."""
    found, captured, _ = plan(model, recipe, backend=backend, mask_id=mask_id)
    target, chosen = load_backend(backend), as_recipe(recipe)
    kernels: Counter[str] = Counter()
    parameters = bits = 0.0
    names = {f"{name}.weight" for name in found.sites}
    seen = set()
    for name, constant in captured.weights.items():
        if id(constant.leaf) in seen:
            continue
        seen.add(id(constant.leaf))
        parameters += constant.leaf.numel()
        if name not in names:
            bits += constant.leaf.numel() * constant.leaf.element_size() * 8
    widest = 0
    seconds = 0.0
    for site in found.sites.values():
        n, k = site.out_features, site.in_features
        bits += n * k * site.weight.bits_per_weight(n, k)
        widest = max(widest, 8 * n * k + 2 * 8 * k * k)
        seconds += (_GPTQ_FLOPS_PER_K3 * k**3 + 2.0 * n * k * k) / _FLOPS_PER_SECOND
        kernel, _ = choose_kernel(target, site)
        kernels[kernel.name if kernel else "none"] += 1
    rounding = any("hessian" in p.statistics() for p in chosen.passes)
    blocks = sum(1 for node in captured.graph.nodes if "block_boundary" in node.meta)
    return PlanReport(
        recipe=f"{chosen.name}: {chosen}",
        nodes=len(captured.graph.nodes),
        blocks=max(blocks - 1, 0),
        sites=len(found.sites),
        kernels=dict(kernels),
        parameters=int(parameters),
        bits=bits,
        peak_bytes=widest,
        seconds=seconds if rounding else 0.0,
        problems=found.problems,
        kept=found.kept,
    )
