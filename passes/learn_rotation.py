"""SpinQuant: learn the rotations of the residual stream and of the heads (Liu et al. 2024, arXiv 2405.16406, section 3).

Before:  x = embedding(E) + Σ linear(·, W_out, b),        readers linear(rms_norm(x), W_in)
After:   x·R₁ = embedding(E·R₁) + Σ linear(·, R₁ᵀW_out, b·R₁),        linear(rms_norm(x·R₁), W_in·R₁)
         values per KV head v·R₂, W_o·R₂                              (`rotate_hidden`, `rotate_heads`)

R₁ [d, d] is one for the model, R₂ [head, head] one for each attention, shared by its heads. Both start as randomized
Hadamard matrices and descend by Cayley SGD (`dlqc.cayley`) along the orthogonal matrices, on the loss of masked diffusion

    1/(B·L) Σ_{masked i} c_i·1/t·(-log p(token i | x_t))        (Nie et al. 2025, arXiv 2502.09992, eq. 3)

over the calibration states, c their token weights, computed with the inputs of the blocks' linears rounded as
`quantize_activations` will round them (and the weights, if asked for). Without rounding no rotation changes the loss. The
result is made orthogonal in float64 and folds into the weights: exact, nothing is left to do at run time.

One state in eight is held out. If the learned rotations are no better there than those at the start, the start is kept, and
the report says so.

It trains through the whole model in the captured dtype: all weights and the activations of `batch` states have to fit into
memory. Run it after fold_norm_scale and after rotate_down (R₄), whose op it then trains through, in place of rotate_hidden
and rotate_heads.

Differences from the official code:
    - the loss is that of masked diffusion; there next-token cross entropy on clean text
    - the error of rounding scales with the range that was rounded, and the gradient sees that (`dlqc.straight_through`);
      scale_gradient=False is the plain straight-through estimator used there, which gained nothing where we tried both
    - the learning rate falls linearly, as in the paper; in the scripts there as a cosine
    - the Cayley transform is solved exactly in float64; there by five rounds in float32 with rows normalized in between
    - activations and weights are rounded symmetrically and not clipped, the key cache is not rounded; there activations are
      asymmetric, weights clipped. Routers are not rounded

Declines the stream or the values of an attention whose regions do not close (`dlqc.regions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dlqc.calibration import shift_rows
from dlqc.cayley import CayleySGD, nearest_orthogonal, orthogonality_error, random_hadamard
from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.diffusion.masking import logits_of
from dlqc.errors import CalibrationError, RecipeError
from dlqc.execute import Executor, compute_dtype, logits_node, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.graph import linears
from dlqc.regions import Refused, Region, attentions, fold, residual_stream, value_heads
from dlqc.routers import is_router
from dlqc.straight_through import quantized_activations, quantized_weight
from dlqc.transform import Blocks, blocks, per_head

_HELD_OUT = 8  # one state in so many
_FAR = 1e-6  # from orthogonal, before the last correction: rounding is far below, a fault far above


@dataclass(frozen=True)
class LearnRotation(Pass):
    """Rotations of the stream and of the values that lose least when activations are rounded.

    Options:
        iterations: steps of Cayley SGD. lr: of the first, falling linearly to zero. batch: states a step.
        act_bits, weight_bits: what linears' inputs and weights are rounded to while learning; None leaves them alone.
            With GPTQ to come, the paper leaves the weights alone.
        r2: also rotate the values of each attention.
        scale_gradient: whether gradients see that the rounding error is proportional to the range.
        seed: of the start and of the order of states; None takes the compilation's.
    """

    name: ClassVar[str] = "learn_rotation"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "unit-gain", "states"})
    preserves: ClassVar = "exact"

    iterations: int = 100
    lr: float = 1.5
    batch: int = 8
    act_bits: int | None = 4
    weight_bits: int | None = None
    r2: bool = True
    scale_gradient: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, usual in (("iterations", 100), ("batch", 8)):
            value = getattr(self, name)
            if value < 1:
                raise RecipeError(f"{value} is less than 1", where=f"learn_rotation.{name}", remedy=f"Use {usual}")
        if not 0 < self.lr < float("inf"):
            what = f"{self.lr} is no learning rate"
            raise RecipeError(what, where="learn_rotation.lr", remedy="Use a positive number, such as 1.5")
        if self.formats == (None, None):
            what = "nothing is rounded, so no rotation is better than another"
            raise RecipeError(what, where="learn_rotation.act_bits", remedy="Set act_bits=4")

    @property
    def formats(self) -> tuple[ActFormat | None, IntFormat | None]:
        act = None if self.act_bits is None else ActFormat(self.act_bits)
        return act, None if self.weight_bits is None else IntFormat(self.weight_bits, None)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        regions = self.regions(graph, ctx, report)
        if not regions:
            return report
        seed = ctx.seed if self.seed is None else self.seed
        starts = [random_hadamard(r.width // r.heads, seed + i) for i, r in enumerate(regions)]
        training, held_out = split(ctx)
        model = Trained(graph, ctx, regions, self.formats, self.scale_gradient)
        learned = self.learn(model, starts, training, seed, report)
        before, after = model.mean_loss(starts, held_out, self.batch), model.mean_loss(learned, held_out, self.batch)
        report.metrics |= {"held_out_before": before, "held_out_after": after}
        report.metrics["held_out_unrounded"] = model.mean_loss(starts, held_out, self.batch, rounded=False)
        if not after < before:
            compared = f"({after:.4f} against {before:.4f} nats a token at the start)"
            kept = "the rotations stay randomized Hadamard matrices"
            report.notes.append(f"what was learned is no better on held-out states {compared}; {kept}")
            learned = starts
        for region, r in zip(regions, learned, strict=True):
            fold(ctx.weights, region, per_head(blocks(r), region.heads))
            report.sites += 1
        return report

    def regions(self, graph: fx.Graph, ctx: Context, report: PassReport) -> list[Region]:
        """The stream's region, then those of the values; what does not close is declined."""
        found = [("residual stream", residual_stream(graph, ctx.weights))]
        if self.r2:
            for attention in attentions(list(graph.nodes)):
                region = value_heads(graph, ctx.weights, attention, "orthogonal")
                found.append((f"values of %{attention.name}", region))
        report.declined += [Declined(site, str(r)) for site, r in found if isinstance(r, Refused)]
        return [r for _, r in found if isinstance(r, Region)]

    def learn(
        self, model: Trained, starts: Sequence[Tensor], training: Tensor, seed: int, report: PassReport
    ) -> list[Tensor]:
        """Cayley SGD from the starts on the training states; float64, orthogonal."""
        rotations = [start.clone().requires_grad_() for start in starts]
        optimizer = CayleySGD(rotations)
        generator = torch.Generator().manual_seed(seed)
        losses: list[float] = []
        for i in range(self.iterations):
            picked = training[torch.randperm(len(training), generator=generator)[: self.batch]]
            loss = model.loss(rotations, picked)
            losses.append(float(loss.detach()))
            gradients = torch.autograd.grad(loss, rotations)
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                raise CalibrationError(
                    f"the gradient of step {i + 1} is not finite, the loss {losses[-1]:.4g}",
                    where="learn_rotation",
                    remedy="Check the weights and the calibration text, or lower lr=",
                )
            optimizer.step(gradients, self.lr * (1 - i / self.iterations))
        error = max(orthogonality_error(r) for r in rotations)
        if not error <= _FAR:
            raise CalibrationError(
                f"a learned rotation is off orthogonal by {error:.3g}, more than {_FAR:.0e}",
                where="learn_rotation",
                remedy="Lower lr=",
            )
        report.metrics |= {"loss_first": losses[0], "loss_last": losses[-1], "orthogonality_error": error}
        return [nearest_orthogonal(r) for r in rotations]


class Trained:
    """The graph as a differentiable function of the rotations in its regions."""

    def __init__(
        self,
        graph: fx.Graph,
        ctx: Context,
        regions: Sequence[Region],
        formats: tuple[ActFormat | None, IntFormat | None],
        scale: bool,
    ) -> None:
        self._ctx, self._regions, self._formats, self._scale = ctx, regions, formats, scale
        sites = [s for block in ctx.blocks for s in linears(block.nodes(graph), ctx.weights)]
        self._rounded = [s for s in sites if not is_router(s.node)]
        self._run = Executor(graph, ctx.weights, [placeholder(graph)], [logits_node(graph)])
        dtypes = {str(n.target): compute_dtype(n, None) for n in self._run.nodes if n.op == "get_attr"}
        self._constants = {name: ctx.weights.value(name, dtype) for name, dtype in dtypes.items()}

    def logits(self, rotations: Sequence[Tensor], ids: Tensor, rounded: bool = True) -> Tensor:
        """Logits [B, L, V]."""
        constants, entering = self.rotated(rotations), {}
        if rounded:
            act, weight = self._formats
            enter = partial(quantized_activations, fmt=act, scale=self._scale)
            entering = {site.node: enter for site in self._rounded}
            for name in {site.weight for site in self._rounded}:
                constants[name] = quantized_weight(constants[name], weight, scale=self._scale)
        return self._run.differentiable(ids, constants=constants, entering=entering)[0]

    def rotated(self, rotations: Sequence[Tensor]) -> dict[str, Tensor]:
        """The constants with the rotations folded in, as `fold` will do it."""
        trial = self._ctx.weights.clone()
        for region, r in zip(self._regions, rotations, strict=True):
            fold(trial, region, per_head(Blocks(r[None], r.mT[None]), region.heads))
        values = dict(self._constants)
        for name in {name for region in self._regions for name in region.absorbs}:
            value = values[name].float()
            for step in trial[name].folds[len(self._ctx.weights[name].folds) :]:
                value = step(value)
            values[name] = value.to(values[name].dtype)
        return values

    def loss(self, rotations: Sequence[Tensor], picked: Tensor, rounded: bool = True) -> Tensor:
        """Masked diffusion loss of some states, nats a token."""
        states, spec = self._ctx.states, self._ctx.spec
        assert states is not None
        ids, clean = states.ids[picked], states.clean[picked]
        logits = logits_of(lambda canvas: self.logits(rotations, canvas, rounded), ids, spec)
        c = states.weights[picked]
        c = (shift_rows(c) if spec.shift else c) / states.t[picked].clamp_min(1e-6)[:, None]
        masked = ids == spec.mask_id
        nll = F.cross_entropy(logits[masked].float(), clean[masked], reduction="none")
        return (nll * c[masked]).sum() / ids.numel()

    @torch.no_grad()
    def mean_loss(self, rotations: Sequence[Tensor], picked: Tensor, batch: int, rounded: bool = True) -> float:
        """Loss over all picked states."""
        parts = [(float(self.loss(rotations, p, rounded)), len(p)) for p in torch.split(picked, batch)]
        return sum(loss * n for loss, n in parts) / len(picked)


def split(ctx: Context) -> tuple[Tensor, Tensor]:
    """Indices of the training states and of the held-out ones, among those with a masked token."""
    assert ctx.states is not None
    useful = (ctx.states.ids == ctx.spec.mask_id).any(dim=1).nonzero()[:, 0]
    held_out = torch.arange(len(useful)) % _HELD_OUT == 0
    if len(useful) < 2:
        raise CalibrationError(
            f"{len(useful)} of {len(ctx.states.ids)} states have masked tokens; learning needs two or more",
            where="learn_rotation",
            remedy="Calibrate with masked states: calibrate(sampler=masked_simulation)",
        )
    return useful[~held_out], useful[held_out]
