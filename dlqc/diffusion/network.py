"""A model as samplers ask it: the whole canvas or a window of it, guided, shifted, padded, counted, and checked for NaN.

Shapes: B batch, L positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from dlqc.diffusion.blame import first_not_finite
from dlqc.diffusion.masking import LogitsFn, check_finite, logits_of, mask_ratio_of
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

if TYPE_CHECKING:
    from dlqc.cached import CachedModel
    from dlqc.compiled import Compiled
    from dlqc.kv_cache import KeyValueCache


class Network:
    """A model as samplers ask it: logits whose row i predicts position i, checked, counted, with a cache where one is asked for.

    Attributes:
        nfe: forwards so far. computed: positions per row that went through them.
        cache_bytes: the most that keys and values took, as they are stored between forwards.

    Args:
        canvas: int64 [B, L] as the run begins: what is [MASK] is to be filled.
        visible: bool [B, L], False at padding; None where there is none.
        cache: whether windows will be asked for.
    """

    def __init__(
        self,
        model: LogitsFn,
        spec: DiffusionSpec,
        canvas: Tensor,
        visible: Tensor | None = None,
        *,
        cache: bool = False,
    ) -> None:
        self._model, self._spec, self._visible = model, spec, visible
        self._fillable = canvas == spec.mask_id
        self._graph: CachedModel | None = None
        self._cache: KeyValueCache | None = None
        if cache or visible is not None:
            self._graph = cached_model(model, spec)
        if cache and self._graph is not None:
            self._cache = self._graph.new_cache(*canvas.shape)
        self.nfe = self.computed = self.cache_bytes = 0

    def full(
        self, canvas: Tensor, *, stop: int | None = None, given: Tensor | None = None, scale: float = 0.0
    ) -> Tensor:
        """Logits [B, stop, V] of the canvas up to `stop` (None: all), guided where `scale` is not 0 (see `guided_logits`)."""
        seen, ratio = canvas[:, :stop], self._ratio(canvas)
        guided = bool(scale) and given is not None
        self._count(seen.shape[1], 2 if guided else 1)
        ask: LogitsFn = self._model
        if self._visible is not None and self._graph is not None:
            ask = _Padded(self._graph, self._visible.repeat(2, 1) if guided else self._visible)
        if not guided:
            return logits_of(ask, seen, self._spec, mask_ratio=ratio)
        return guided_logits(ask, seen, given, self._spec, scale, mask_ratio=ratio)  # type: ignore[arg-type]

    def window(self, canvas: Tensor, start: int, stop: int, *, total: int | None = None) -> Tensor:
        """Logits of positions start .. stop, [B, stop - start, V]; all others from the cache, which takes the window's own.

        Where logits are shifted, the position before the window is computed, too: its row predicts the first.
        """
        assert self._graph is not None
        assert self._cache is not None
        first = start - 1 if self._spec.shift and start else start
        self._count(stop - first, 1)
        window = canvas[:, first:stop]
        told = {"visible": self._visible, "mask_ratio": self._ratio(canvas)}
        rows = self._graph.step(window, first, self._cache, total=total, **told)
        self.cache_bytes = max(self.cache_bytes, self._cache.nbytes)
        if not self._spec.shift:
            return rows
        return rows[:, :-1] if first < start else torch.cat([rows[:, :1], rows[:, :-1]], dim=1)

    def propose(
        self,
        canvas: Tensor,
        wanted: Tensor,
        start: int,
        stop: int,
        *,
        window: tuple[int, int] | None = None,
        total: int | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """What a greedy step reads: argmax (never [MASK]) and its softmax, without logits, for the rows that are wanted alone.

        The same forward as `window` (positions first .. last computed, all others from the cache) or, where that is None, as
        `full` (up to `total`). None where the model gives logits only, and where a confidence is not finite: logits tell more.
        Other rows are not looked at.

        Args:
            wanted: bool [B, stop - start].

        Returns:
            tokens int64 [B, stop - start], 0 where none is wanted; certainty float64, -inf there.
        """
        model = self._proposer(window is not None)
        if model is None:
            return None
        first, last = window or (0, canvas.shape[1] if total is None else total)
        first = first - 1 if self._spec.shift and first else first
        row, column = wanted.nonzero().unbind(1)
        rows = row * (last - first) + (start + column - int(self._spec.shift)).clamp(min=0) - first
        seen, ratio = canvas[:, first:last], self._ratio(canvas)
        if window is None and self._visible is None:
            found = model.propose(rows, seen, ratio)
        else:
            assert self._graph is not None
            cache = self._graph.new_cache(*seen.shape, plain=True) if window is None else self._cache
            assert cache is not None
            told = {"visible": self._visible, "mask_ratio": ratio}
            found = self._graph.propose_step(rows, seen, first, cache, total=total, **told)
            self.cache_bytes = self.cache_bytes if window is None else max(self.cache_bytes, cache.nbytes)
        if found is None or not bool(torch.isfinite(found[1]).all()):
            return None
        self._count(last - first, 1)
        tokens = torch.zeros_like(wanted, dtype=torch.int64)
        certainty = torch.full_like(wanted, -torch.inf, dtype=torch.float64)
        tokens[wanted], certainty[wanted] = found
        return tokens, certainty

    def store(self, canvas: Tensor, start: int, stop: int, *, total: int | None = None) -> None:
        """A window whose logits nobody reads, for its keys and values."""
        nothing = torch.zeros_like(canvas[:, start:stop], dtype=torch.bool)
        if self.propose(canvas, nothing, start, stop, window=(start, stop), total=total) is None:
            self.window(canvas, start, stop, total=total)

    def _proposer(self, cached: bool) -> CachedModel | Compiled | None:
        """The model, or its block step, if it has an op for `propose`, which never gives the mask token of this run."""
        from dlqc.cached import CachedModel
        from dlqc.compiled import Compiled

        model = self._graph if cached or self._visible is not None else self._model
        if not isinstance(model, CachedModel | Compiled) or model.spec.mask_id != self._spec.mask_id:
            return None
        return model if model.proposes else None

    def check(self, logits: Tensor, step: int, canvas: Tensor) -> None:
        """Refuse logits that are not finite; names the step, and the layer where a second run finds it."""
        check_finite(logits, step, blame=lambda: first_not_finite(self._graph or self._model, canvas))

    def _ratio(self, canvas: Tensor) -> Tensor:
        return mask_ratio_of(canvas == self._spec.mask_id, self._fillable)

    def _count(self, positions: int, times: int) -> None:
        self.nfe += times
        self.computed += times * positions


@dataclass(frozen=True)
class _Padded:
    """A graph as a model of canvases that are padded on the left."""

    graph: CachedModel
    visible: Tensor

    counts_masks: ClassVar[bool] = True

    def __call__(self, ids: Tensor, mask_ratio: Tensor | None = None) -> Tensor:
        return self.graph.padded(ids, self.visible, mask_ratio=mask_ratio)


def cached_model(model: LogitsFn, spec: DiffusionSpec) -> CachedModel:
    """Full forward and block step of a model: its own where it has one, else of a fresh capture of the module.

    Raises:
        FeasibilityError: a plain function has no graph.
    """
    from dlqc.cached import CachedModel

    own = model if isinstance(model, CachedModel) else getattr(model, "cached", None)
    if isinstance(own, CachedModel):
        return own
    if not isinstance(model, nn.Module):
        raise FeasibilityError(
            f"a {type(model).__name__} has no graph whose keys and values could be cached",
            where="model",
            remedy="Give a module or what dlqc.compile made of it, or decode with cache='none'",
        )
    from dlqc.capture import capture
    from dlqc.compiled import build_module

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    captured = capture(model, spec, dtype=dtype if dtype is torch.float64 else torch.float32)
    return CachedModel(build_module(captured.graph, captured.weights, share=True), spec)


def guided_logits(
    model: LogitsFn,
    canvas: Tensor,
    given: Tensor,
    spec: DiffusionSpec,
    scale: float,
    *,
    mask_ratio: Tensor | None = None,
) -> Tensor:
    """Logits [B, L, V], guided by what was given: un + (scale + 1) * (cond - un), `given` masked in `un`.

    LLaDA, arXiv 2502.09992, appendix A.2 (unsupervised classifier-free guidance). Both halves run as one batch of 2B, at the
    mask ratio of the canvas.
    """
    if not scale:
        return logits_of(model, canvas, spec, mask_ratio=mask_ratio)
    blind = canvas.masked_fill(given, spec.mask_id)
    both = None if mask_ratio is None else mask_ratio.repeat(2)
    conditional, unconditional = logits_of(model, torch.cat([canvas, blind]), spec, mask_ratio=both).chunk(2)
    return unconditional + (scale + 1) * (conditional - unconditional)
