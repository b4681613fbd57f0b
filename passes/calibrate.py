"""Draw the denoising states that later passes calibrate on.

Before:  token rows [R, L], or nothing
After:   denoising states (ids with [MASK] in place, t, token weights); the graph is not touched

The rows come from `compile(calibration=...)`. Without any, the model denoises empty canvases itself (data-free), and
the report says so. See `dlqc.samplers`, `dlqc.rollout` and `dlqc.token_weights` for the choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from dlqc.calibration import (
    BlockStates,
    Certainty,
    Clean,
    ForwardProcess,
    Frontier,
    MaskedSimulation,
    Rollout,
    SinkAware,
    States,
    TokenRows,
    Uniform,
    draw_states,
    rollout_rows,
)
from dlqc.contract import Context, Pass, PassReport, Plan
from dlqc.errors import CalibrationError
from dlqc.execute import forward
from dlqc.sinks import attention_mass

SampleOption = Clean | ForwardProcess | MaskedSimulation | BlockStates | Rollout
WeightOption = Uniform | Certainty | Frontier | SinkAware


@dataclass(frozen=True)
class Calibrate(Pass):
    """Make the calibration states.

    Options:
        sampler: how text becomes denoising states.
        weight: how much each token counts in every statistic.
        sequences: number of states; rows are used again (with other masks) when there are fewer.
        length: tokens per row, where the text is cut into rows or rolled out.
    """

    name: ClassVar[str] = "calibrate"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form"})
    gives: ClassVar[frozenset[str]] = frozenset({"states"})

    sampler: SampleOption = field(default_factory=MaskedSimulation)
    weight: WeightOption = field(default_factory=Uniform)
    sequences: int = 128
    length: int = 128

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        if self.sequences < 1 or self.length < 2:
            plan.problems.append(f"calibrate: {self.sequences} sequences of {self.length} tokens hold nothing")
        if self.length > max(ctx.spec.max_length, 128):  # the default is cut to a shorter model without a word
            plan.problems.append(f"calibrate: rows of {self.length} tokens, but the model takes {ctx.spec.max_length}")

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        def logits(ids: torch.Tensor) -> torch.Tensor:
            return forward(graph, ctx.weights, ids)

        def mass(ids: torch.Tensor) -> torch.Tensor:
            return attention_mass(graph, ctx.weights, ids)

        if ctx.rows is None:
            ctx.rows = rollout_rows(logits, ctx.spec, rows=min(self.sequences, 64), length=self.length, seed=ctx.seed)
        rows = self._pick(ctx.rows, ctx.seed)
        ctx.states = draw_states(rows, self.sampler, self.weight, ctx.spec, seed=ctx.seed, logits=logits, mass=mass)
        masked = float((ctx.states.ids == ctx.spec.mask_id).float().mean())
        metrics = {"states": ctx.states.ids.shape[0], "tokens": ctx.states.tokens, "masked_share": masked}
        distinct = min(ctx.rows.ids.shape[0], self.sequences)
        size = f"{ctx.states.ids.shape[0]} states of {ctx.states.ids.shape[1]} tokens"
        made = f"sampler {self.sampler.name}, {self.sampler.emphasis} emphasis, weight {self.weight.name}"
        note = f"{size} from {distinct} rows of {rows.source}, {masked:.0%} masked; {made}; {_histogram(ctx.states)}"
        return PassReport(sites=ctx.states.ids.shape[0], metrics=metrics, notes=[note])

    def _pick(self, rows: TokenRows, seed: int) -> TokenRows:
        """`sequences` rows, evenly spread over the text; over again where there are fewer."""
        count = rows.ids.shape[0]
        if count == 0:
            raise CalibrationError("there are no token rows", where="calibration", remedy="Give more text")
        order = torch.arange(self.sequences) * max(count, self.sequences) // self.sequences % count
        return TokenRows(rows.ids[order], rows.source)


def _histogram(states: States) -> str:
    """How many states there are by their t, in quarters; clean ones apart."""
    level = (states.t.double() * 4 - 1e-6).ceil().long()
    clean, *quarters = torch.bincount(level, minlength=5).tolist()
    by_quarter = ", ".join(f"{count} to {(i + 1) / 4:g}" for i, count in enumerate(quarters))
    return f"states by mask ratio: {clean} at 0, {by_quarter}"
