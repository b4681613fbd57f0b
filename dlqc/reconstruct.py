"""A block as a function of its linears' weights, and how far its output is from that of full precision.

    loss = Σ c·‖y - y*‖² / (d · Σ c)

y are rows of the block's output [.., d] with the weights given, behind the quantized blocks before; y* those of the block as it
is, on the same states or on the states of full precision; c the token weights of the states. States come in parts, so that
one part and one block is what gradients need memory for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from dlqc.contract import BlockInput, Context, PassReport
from dlqc.errors import CalibrationError, ContractError
from dlqc.execute import Executor, bucket_values, mask_buckets, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.graph import Linear
from dlqc.rounding.contract import BlockRounding, Rounded, Rounding
from dlqc.stats import weights_of_rows
from dlqc.straight_through import quantized_activations


class Objective(Protocol):
    """What learned rounding lowers."""

    @property
    def parts(self) -> int:
        """Parts that the states come in."""

    def loss(self, part: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Loss on one part, with the weights by name; differentiable."""

    def total(self, weights: Mapping[str, Tensor]) -> float:
        """Loss on all states."""


def round_block(
    graph: fx.Graph,
    ctx: Context,
    groups: Sequence[Sequence[Sequence[Linear]]],
    method: Rounding,
    formats: Mapping[str, Any],
    report: PassReport,
) -> Mapping[str, Rounded]:
    """What a method that rounds a block at once makes of the weights of `groups`, by name; {} for other methods.

    `formats` has what each is rounded to.
    """
    sites = [site for group in groups for calls in group for site in calls]
    if not isinstance(method, BlockRounding) or not sites:
        return {}
    exact = {site.weight: ctx.weights.value(site.weight, torch.float64).float() for site in sites}
    objective = Reconstruction(graph, ctx, sites, method.act)
    found, numbers = method.round_block(exact, formats, objective, ctx.seed)
    report.metrics |= numbers
    return found


class Reconstruction:
    """The objective of a block.

    Args:
        sites: the linears whose weights will be given.
        act: what their inputs are rounded to, None for not at all.
    """

    def __init__(self, graph: fx.Graph, ctx: Context, sites: Sequence[Linear], act: ActFormat | None = None) -> None:
        block = ctx.block
        if block is None or not ctx.inputs:
            what = "a block is to be reconstructed, and there are no states to do it on"
            raise ContractError(what, where="method", remedy="Run the pass by a PassManager, behind calibrate")
        self._buckets, self._end = mask_buckets(graph), block.output(graph)
        inputs = [placeholder(graph), block.input(graph), *self._buckets]
        # Two executors: what this one evaluates for y*, the weights before rounding, can go then.
        exact = Executor(graph, ctx.weights, inputs, [self._end], keep_weights=True)
        self._run = Executor(graph, ctx.weights, inputs, [self._end], keep_weights=True)
        enter: Callable[[Tensor], Tensor] = partial(quantized_activations, fmt=act)
        self._entering = {site.node: enter for site in sites} if act is not None else {}
        self._inputs = ctx.inputs
        self._targets = [exact(part.ids, part.exact, *self._sets(part))[0] for part in ctx.inputs]
        self._name = f"block {block.index}"
        self._unit = sum(float(self._weights(i).sum(dtype=torch.float64)) for i in range(self.parts))

    @property
    def parts(self) -> int:
        return len(self._inputs)

    def loss(self, part: int, weights: Mapping[str, Tensor]) -> Tensor:
        c = self._weights(part)
        return self._error(part, c, weights) / c.sum().clamp_min(torch.finfo(c.dtype).tiny)

    @torch.no_grad()
    def total(self, weights: Mapping[str, Tensor]) -> float:
        total = sum(float(self._error(i, self._weights(i), weights)) for i in range(self.parts)) / self._unit
        if not total < float("inf"):
            what = f"the error of its output is {total}"
            raise CalibrationError(what, where=self._name, remedy="Check the weights and the calibration text")
        return total

    def _error(self, part: int, c: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Σ c·‖y - y*‖² / d."""
        given = self._inputs[part]
        values = (given.ids, given.hidden, *self._sets(given))
        found = self._run.differentiable(*values, constants=weights, entering=self._entering)[0]
        error = (found.float() - self._targets[part].float()).square().mean(dim=-1)
        return error.reshape(-1) @ c

    def _sets(self, part: BlockInput) -> list[Tensor]:
        return bucket_values(self._buckets, part.ids, part.mask_ratio)

    def _weights(self, part: int) -> Tensor:
        rows = self._targets[part].shape[:-1].numel()
        return weights_of_rows(self._end, self._inputs[part].weights, rows, self._name)
