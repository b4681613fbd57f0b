"""Fisher information of weights: how much the loss of masked diffusion feels each one.

    F = 1/S · Σ_s (∂ℓ_s/∂W)²   [N, K],      ℓ_s = 1/L · Σ_{i masked} c_i/t_s · (-log p(x_i | state s))

the diagonal of the empirical Fisher matrix over the calibration states, squared state by state as SqueezeLLM does it sample by
sample (arXiv 2306.07629, section 4.1, equation 3). ℓ is the loss that LLaDA is trained with (arXiv 2502.09992, equation 3), c the
token weights. To second order, F weighs what moving a weight alone costs. States without a masked token add nothing.

One backward sweep through the blocks, on the weights as they are when it begins. The states go forward once and leave their
hidden values at the input of each block; the loss gives the gradient behind the last block; then each block, from the last to
the first, is run again with gradients. The gradient of a weight is never made for a whole batch: of each state it is the
product δᵀx of what a linear's output receives and what it reads, [N, L]·[L, K], as many operations as a forward of the
weight; a weight that is called several times gets the sum of its calls before it is squared.

Memory: hidden values of all states at all blocks, (blocks + 1)·S·L·d; one block's weights and activations of a batch; and F,
in bfloat16 where the checkpoint has 16 bits (it is a weight of k-means, three digits are plenty), else in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dlqc.blocks import Block
from dlqc.contract import Context
from dlqc.diffusion.masking import logits_of
from dlqc.errors import CalibrationError
from dlqc.execute import Executor, logits_node, placeholder
from dlqc.graph import Linear, linears
from dlqc.observers import Batch, by_tokens
from dlqc.samplers import shift_rows


def fisher(graph: fx.Graph, ctx: Context, *, batch: int = 8) -> dict[str, Tensor]:
    """F [N, K] by name of the weight, for the linears of all blocks; see the module docstring.

    Args:
        batch: states that run at a time.

    Raises:
        CalibrationError: there are no states, none has a masked token, a gradient is not finite, or a linear reads rows that
            belong to no state.
    """
    states = ctx.states
    if states is None or not bool((states.ids == ctx.spec.mask_id).any()):
        what = "no calibration state has a masked token, so the masked loss has no gradient"
        raise CalibrationError(
            what, where="fisher", remedy="Calibrate with masked states: calibrate(sampler=masked_simulation)"
        )
    ids, cuts = placeholder(graph), [b.input(graph) for b in ctx.blocks] + [ctx.blocks[-1].output(graph)]
    slices = list(states.batches(batch))
    values = [[states.ids[s] for s in slices]]
    for at, target in itertools.pairwise([ids, *cuts]):
        run = Executor(graph, ctx.weights, [ids, at], [target], keep_weights=True)
        values.append([run(states.ids[s], value)[0] for s, value in zip(slices, values[-1], strict=True)])
    gradients = _of_the_loss(graph, ctx, slices, cuts[-1], values.pop())
    found: dict[str, Tensor] = {}
    for block in reversed(ctx.blocks):
        sums, gradients = _of_a_block(graph, ctx, block, slices, values.pop(), gradients)
        for weight, total in sums.items():
            if not bool(torch.isfinite(total.sum())):
                remedy = "Calibrate in bfloat16 or float32, and check the weights behind this layer"
                raise CalibrationError("squared gradients are not finite", where=weight, remedy=remedy)
            narrow = ctx.weights[weight].leaf.dtype.itemsize < 4
            found[weight] = (total / len(states.ids)).to(torch.bfloat16 if narrow else torch.float32)
    return found


def state_losses(logits: Tensor, ctx: Context, part: slice) -> Tensor:
    """ℓ_s [B] of some states from their logits [B, L, V], rows in place."""
    states, spec = ctx.states, ctx.spec
    assert states is not None
    ids, c = states.ids[part], states.weights[part]
    masked = ids == spec.mask_id
    c = (shift_rows(c) if spec.shift else c) / states.t[part].clamp_min(1e-6)[:, None]
    nll = torch.zeros(ids.shape, dtype=torch.float32)
    nll = nll.masked_scatter(
        masked, F.cross_entropy(logits[masked].float(), states.clean[part][masked], reduction="none")
    )
    return (nll * c).sum(dim=1) / ids.shape[1]


def _of_the_loss(
    graph: fx.Graph, ctx: Context, slices: Sequence[slice], last: fx.Node, values: list[Tensor]
) -> list[Tensor]:
    """Gradients of ℓ at the output of the last block, batch by batch; takes the values there out of the list."""
    run = Executor(graph, ctx.weights, [placeholder(graph), last], [logits_node(graph)], grad=True, keep_weights=True)
    found = []
    for part in slices:
        hidden = values.pop(0).requires_grad_()
        assert ctx.states is not None
        ids = ctx.states.ids[part]
        with torch.enable_grad():
            loss = state_losses(logits_of(_Behind(run, hidden), ids, ctx.spec), ctx, part).sum()
        found.append(torch.autograd.grad(loss, hidden)[0])
    return found


@dataclass(frozen=True)
class _Behind:
    """The model behind a value, as a function of token ids."""

    run: Executor
    hidden: Tensor

    def __call__(self, ids: Tensor) -> Tensor:
        return self.run(ids, self.hidden)[0]


def _of_a_block(
    graph: fx.Graph,
    ctx: Context,
    block: Block,
    slices: Sequence[slice],
    values: list[Tensor],
    gradients: list[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Σ_s (∂ℓ_s/∂W)² of the block's weights, float32, and the gradients at its input. Takes its arguments out of the lists."""
    sites = list(linears(block.nodes(graph), ctx.weights))
    inputs = [placeholder(graph), block.input(graph)]
    targets = [block.output(graph), *(s.x for s in sites), *(s.node for s in sites)]
    run = Executor(graph, ctx.weights, inputs, targets, grad=True, keep_weights=True)
    sums = {site.weight: torch.zeros(site.out_features, site.in_features) for site in sites}
    behind = []
    for part in slices:
        assert ctx.states is not None
        hidden = values.pop(0).requires_grad_()
        top, *taps = run(ctx.states.ids[part], hidden)
        xs, ys = taps[: len(sites)], taps[len(sites) :]
        before, *deltas = torch.autograd.grad(top, [hidden, *ys], gradients.pop(0))
        behind.append(before)
        states = Batch(ctx.states.ids[part], ctx.states.weights[part])
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for site, x, delta in zip(sites, xs, deltas, strict=True):
            pair = (_by_state(x.detach(), site.x, site, states), _by_state(delta, site.node, site, states))
            calls.setdefault(site.weight, []).append(pair)
        for weight, pairs in calls.items():
            for s in range(len(states.ids)):
                sums[weight] += torch.stack([delta[s].T @ x[s] for x, delta in pairs]).sum(dim=0).square_()
    return sums, behind


def _by_state(value: Tensor, node: fx.Node, site: Linear, states: Batch) -> Tensor:
    """Rows of what a linear reads or gives, float32 [B, L, K]."""
    found = by_tokens(value, node, states)
    if found is None:
        what = "its rows are not the tokens of the states, so no gradient belongs to one state"
        raise CalibrationError(what, where=site.name, remedy="Use sensitivity='hessian', or exclude it with skip=")
    return found.float()
