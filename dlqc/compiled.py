"""The result of a compilation: a module that runs, and the graph it came from."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import fx, nn

from dlqc.cached import CachedModel
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.execute import compute_dtype, mask_buckets, placeholder
from dlqc.graph import args_of, copy_graph
from dlqc.precision import PrecisionSchedule
from dlqc.proposal import Proposals, Proposing
from dlqc.recipe import Recipe
from dlqc.report import Report
from dlqc.weights import Weights

if TYPE_CHECKING:
    from dlqc.artifact import Saved


class Compiled(nn.Module):
    """An optimized model. Call it with token ids int64 [B, L]; it returns logits [B, L, V].

    Attributes:
        spec: facts of the diffusion model (mask token, shift, …).
        recipe: the passes that made it.
        report: what they did; `explain()` prints it.
        tokenizer: the model's tokenizer, or None.
        graph, weights: the optimized graph before lowering (what `save` and `export` write) and its constants.
        lowered: the graph that runs.
        config: the model's configuration as plain data, for exports.
        counts_masks: whether widths or scales follow the mask ratio of a row.
    """

    def __init__(
        self,
        graph: fx.Graph,
        weights: Weights,
        lowered: tuple[fx.Graph, Weights],
        *,
        spec: DiffusionSpec,
        recipe: Recipe,
        report: Report,
        tokenizer: Any = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.weights = weights
        self.spec = spec
        self.recipe = recipe
        self.report = report
        self.tokenizer = tokenizer
        self.config = config or {}
        self.lowered = lowered[0]
        self.counts_masks = bool(mask_buckets(graph))
        self.module = build_module(*lowered)
        self._variants: dict[str, Any] = {}  # made from the module when first asked for
        self._held: list[tuple[dict[str, Any], str, Any]] = []  # its buffers then, and where they are
        self.eval()

    def forward(self, input_ids: torch.Tensor, mask_ratio: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, L, V] of token ids [B, L].

        Args:
            mask_ratio: float64 [B], share of [MASK] among the tokens of each row that are to be filled, where widths or scales
                follow it; None counts all tokens. Samplers and metrics say it.
        """
        with torch.no_grad():
            logits: torch.Tensor = self.module(input_ids, mask_ratio) if self.counts_masks else self.module(input_ids)
        return logits

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return next((buffer.device for buffer in self.module.buffers()), torch.device("cpu"))

    @property
    def cached(self) -> CachedModel:
        """Full forward and block step over the buffers of `module`; made when first asked for.

        Raises:
            FeasibilityError: the graph cannot be computed for a window of positions, with the node in the way.
        """
        made: CachedModel = self._variant("cached", lambda: CachedModel(self.module, self.spec))
        return made

    def propose(
        self, rows: torch.Tensor, input_ids: torch.Tensor, mask_ratio: torch.Tensor | None = None
    ) -> Proposals | None:
        """Token and confidence of some rows, without logits; None where the backend has no op for it.

        Args:
            rows: int64 [M], numbers of the B·L rows of the logits; row i of them is that of `forward`, whatever it predicts.
            input_ids, mask_ratio: as of `forward`.
        """
        if not self.proposes:
            return None
        return self._proposing(rows, input_ids, *([mask_ratio] if self.counts_masks else []))

    @property
    def proposes(self) -> bool:
        """Whether `propose` has an answer; it has none where hooks or a subclass change what `forward` gives."""
        plain = type(self).forward is Compiled.forward
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (self, self.module))
        return plain and not hooked and bool(self._proposing)

    @property
    def _proposing(self) -> Proposing:
        made: Proposing = self._variant(
            f"proposing {self.spec.mask_id}", lambda: Proposing(self.module, self.spec.mask_id)
        )
        return made

    def _variant(self, name: str, make: Callable[[], Any]) -> Any:
        """What was made of the module, or is made anew where buffers were put in the place of those that it reads."""
        if any(place.get(key) is not buffer for place, key, buffer in self._held):
            self._forget()
        if not self._held:
            self._held = [(m._buffers, key, part) for m in self.module.modules() for key, part in m._buffers.items()]
        if name not in self._variants:
            self._variants[name] = make()
        return self._variants[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without the other variants of the module, which are made again: what they know of the graph cannot be copied."""
        return {**self.__dict__, "_variants": {}, "_held": []}

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._forget()  # they read the buffers as they were
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call, no-any-return]

    def _forget(self) -> None:
        self._variants, self._held = {}, []

    @property
    def schedule(self) -> PrecisionSchedule | None:
        """Bits of weights and activations by mask ratio, which every forward obeys; None where they have one width."""
        return PrecisionSchedule.of(self.graph)

    def with_schedule(self, schedule: PrecisionSchedule) -> Compiled:
        """This model computing by another schedule of the same edges; the weights are shared, and what has no widths there stays.

        Raises:
            FeasibilityError: weights are not nested (or activations not adapted), or masks are counted in other buckets.
            ContractError: a width that is not stored.
        """
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._forget()
        other.graph, other.lowered = schedule.written(self.graph), schedule.written(self.lowered)
        other.module = fx.GraphModule(self.module, schedule.written(self.module.graph), class_name="DlqcModule")
        now = other.schedule
        assert now is not None
        changed: dict[str, Any] = {"widths": now.widths or None, "act_widths": now.act_widths, "act_bits": ()}
        passes = (dataclasses.replace(p, **changed) if p.name == "adapt_precision" else p for p in self.recipe.passes)
        other.recipe = Recipe(self.recipe.name, tuple(passes))
        return other.eval()

    def explain(self) -> str:
        """What each pass did, what it declined and why, bits, error, time, memory, kernels."""
        return self.report.render()

    def save(self, folder: str | Path) -> Saved:
        """Write the artifact: safetensors and JSON, atomically; reloads it in a fresh process and compares logits."""
        from dlqc.artifact import save

        return save(self, folder)


def build_module(graph: fx.Graph, weights: Weights, *, share: bool = False) -> fx.GraphModule:
    """A runnable module: generated code for the calls, buffers for the constants.

    Constants are stored once, in the dtype they take part in arithmetic with. Where the graph counts masks, the module takes the
    mask ratios of the rows as a second argument, None unless given.

    Args:
        share: read the user's tensors where they are instead of copying them; the module then changes with them.
    """
    graph = copy_graph(graph)
    _take_ratio(graph)
    root = nn.Module()
    buffers: dict[tuple[int, torch.dtype], str] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        dtype = compute_dtype(node, None)
        constant = weights[name]
        key = (id(constant), dtype or constant.leaf.dtype)
        if key not in buffers:
            # Numbered, because "a.b_c" and "a_b.c" must not meet, and reduced to word characters, because the name is
            # spelled out in generated code.
            buffers[key] = f"{re.sub(r'[^0-9A-Za-z]', '_', name)}_{len(buffers)}"
            value = weights.value(name, dtype)
            # A checkpoint tensor is the user's, or a view of a file mapped read-only: own what will run.
            shared = value.untyped_storage().data_ptr() == constant.leaf.untyped_storage().data_ptr()
            root.register_buffer(buffers[key], value.clone() if shared and not share else value)
        node.target = buffers[key]
    return fx.GraphModule(root, graph, class_name="DlqcModule")


def _take_ratio(graph: fx.Graph) -> None:
    """Let the nodes that count masks read the mask ratio as it is told."""
    counting = mask_buckets(graph)
    if not counting:
        return
    with graph.inserting_after(placeholder(graph)):
        told = graph.placeholder("mask_ratio", default_value=None)
    for node in counting:
        node.args = (*args_of(node)[:3], told)
