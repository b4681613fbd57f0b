"""Forwards of a lowered model replayed as CUDA graphs: one launch in place of hundreds, which is what a step of few tokens costs.

    fast = captured(dlqc.compile(model, …, backend="triton"))         generate(fast, prompt, …) as before
    logits = fast(ids)                                                ids [B, L]
    generate(fast, prompt, sampler="fast_dllm")                       block steps over a cache are replayed, too

A graph is recorded for each length and bucket of rows (1, 2, 4, 8, …) that is asked for. A call copies its ids into the graph's
own input, replays, and gives the rows that it asked for; rows that are left over hold what they held. Rows do not see each other,
so that does not matter; positions do, so lengths are never padded. The least recently used graph goes when there are more than
`limit`, and all of them go when the model's tensors have moved.

A block step (`dlqc.cached`) writes at places that are numbers of Python, so one graph is recorded for each window, (start, S,
total), and cache. A decoding asks for few windows, many times each. A graph holds addresses, so the tensors of a cache that is no
longer held are cleared and given to the next cache of that size, whose windows are then recorded already; caches in use share
nothing.

What a graph cannot hold is refused by name (`uncapturable`): work on the host that reads a tensor, or weights elsewhere than on
the GPU; of block steps, keys and values that are stored in codes, which are lists of segments on the host.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from dlqc.cached import CachedModel
from dlqc.compiled import Compiled
from dlqc.errors import LoweringError
from dlqc.graph import aten, is_call
from dlqc.kernels.triton import runtime
from dlqc.kv_cache import KeyValueCache
from dlqc.ops import CACHED, LINEAR_NESTED

#: Forwards before a recording: kernels are compiled and libraries make their handles in them.
WARM_UP = 2
#: Caches that are kept for the next of their size.
SPARE = 4
#: Ops whose shape or code depends on values, so that the host waits for them.
READS_VALUES = (
    aten.item.default,
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
    LINEAR_NESTED,
)


class Recorder(Protocol):
    """What records work on a device and replays it."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that does the work again, and the tensor that its result is in after each time."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()
        return graph.replay, result


class Key(NamedTuple):
    """What one graph is for.

    Attributes:
        rows, length: of ids. start, total, places: of a block step, and where its keys and values are.
        told: names of further inputs.
    """

    rows: int
    length: int
    start: int = 0
    total: int = 0
    places: tuple[int, ...] = ()
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """One graph: its inputs by name, what replays it, where its result is, and what it reads that nothing else may hold."""

    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    result: Tensor
    reads: Any


class Replays:
    """What was recorded of a module, by what was asked for, least recently used first."""

    def __init__(self, module: nn.Module, mask_id: int, recorder: Recorder, limit: int) -> None:
        self.recordings: OrderedDict[Key, Recording] = OrderedDict()
        self._module, self._recorder, self._limit = module, recorder, limit
        self._fill = {"ids": mask_id, "mask_ratio": 1.0, "visible": True}
        self._places = self._tensors()

    def __call__(
        self,
        key: Key,
        work: Callable[..., Tensor],
        reads: Callable[[], Any] | None = None,
        **inputs: Tensor | None,
    ) -> Tensor:
        """`work(**inputs)` by replay, inputs being [B, …] and recorded with `key.rows` rows, B or more.

        Work is not kept: it knows who holds the recordings, and graphs in such a circle would wait for the garbage collector.
        """
        if self._places != (places := self._tensors()):
            self.recordings.clear()
            self._places = places
        given = {name: value for name, value in inputs.items() if value is not None}
        key = key._replace(told=tuple(sorted(given.keys() - {"ids"})))
        if key not in self.recordings:
            own = {
                name: torch.full((key.rows, *value.shape[1:]), self._fill[name], dtype=value.dtype, device=value.device)
                for name, value in given.items()
            }
            _refill(own, given)
            held = None if reads is None else reads()
            self.recordings[key] = Recording(own, *self._recorder.record(lambda: work(**own)), held)
            if len(self.recordings) > self._limit:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        found = self.recordings[key]
        _refill(found.inputs, given)
        found.replay()
        # The next replay writes to the same place.
        return found.result[: len(given["ids"])].clone()

    def _tensors(self) -> tuple[int, ...]:
        """Where the module's tensors are: a graph holds addresses."""
        return tuple(buffer.data_ptr() for buffer in self._module.buffers())


def _refill(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    for name, value in given.items():
        own[name][: len(value)].copy_(value)


class Forwards:
    """The forward by replay, which a captured model and its steps share."""

    def __init__(self, model: Compiled, recorder: Recorder, limit: int) -> None:
        self.model, self.replays = model, Replays(model, model.spec.mask_id, recorder, limit)

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask_ratio: Tensor | None = None) -> Tensor:
        if not ids.numel():
            nothing: Tensor = self.model(ids)
            return nothing
        key = Key(1 << (len(ids) - 1).bit_length(), ids.shape[1])
        ratio = mask_ratio if self.model.counts_masks else None
        return self.replays(key, self._work, ids=ids, mask_ratio=ratio)

    def _work(self, ids: Tensor, mask_ratio: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(ids, mask_ratio)
        return logits


class Captured(nn.Module):
    """ids int64 [B, L] -> logits [B, L, V], by replay.

    Attributes:
        spec, tokenizer, counts_masks: of the model, for samplers. replays: of forwards, by (rows, length).
    """

    def __init__(self, model: Compiled, recorder: Recorder, limit: int, step_limit: int) -> None:
        super().__init__()
        self.model, self.spec, self.tokenizer = model, model.spec, model.tokenizer
        self.counts_masks = model.counts_masks
        self._forwards = Forwards(model, recorder, limit)
        self.replays = self._forwards.replays
        self._recorder, self._step_limit = recorder, step_limit
        self._steps: CapturedSteps | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return self.model.device

    def forward(self, ids: Tensor, mask_ratio: Tensor | None = None) -> Tensor:
        logits: Tensor = self._forwards(ids, mask_ratio)
        return logits

    @property
    def cached(self) -> CapturedSteps:
        """Full forward and block step, both by replay; what samplers with a cache take.

        Raises:
            FeasibilityError: the graph has no block step. LoweringError: the step cannot be captured, with the node in the way.
        """
        made = self.model.cached  # another one where the model's tensors have moved
        if self._steps is None or self._steps.source is not made:
            if self._steps is not None:
                self._steps.replays.recordings.clear()  # whoever still holds it: they read what the model has left
            self._steps = CapturedSteps(self._forwards, made, self._recorder, self._step_limit)
        return self._steps


class CapturedSteps(CachedModel):
    """The block step of a captured model, by replay.

    Attributes:
        source: the same without replay. replays: of steps.
    """

    def __init__(self, forwards: Forwards, source: CachedModel, recorder: Recorder, limit: int) -> None:
        for node in source.module.graph.nodes:
            if is_call(node, CACHED):
                what = f"%{node.name} stores keys or values in codes, which are kept in lists on the host"
                raise LoweringError(f"the block step cannot be captured: {what}", where="graph", remedy=_AS_IT_IS)
        vars(self).update(vars(source))  # which has made the step and compared it
        self.source, self.tokenizer = source, forwards.model.tokenizer
        self.replays = Replays(self._step, self.spec.mask_id, recorder, limit)
        self._forwards = forwards
        self._spare: list[KeyValueCache] = []
        self._returned: list[KeyValueCache] = []

    def __call__(self, ids: Tensor, mask_ratio: Tensor | None = None) -> Tensor:
        """The full forward."""
        logits: Tensor = self._forwards(ids, mask_ratio)
        return logits

    def new_cache(self, batch: int, length: int, *, plain: bool = False) -> KeyValueCache:
        """An empty cache; its tensors may have been those of one that nobody holds any more."""
        while self._returned:
            self._spare.append(self._returned.pop(0))
        held = next((c for c in reversed(self._spare) if (c.keys[0].shape[0], c.length) == (batch, length)), None)
        self._spare = [cache for cache in self._spare if cache is not held]
        while len(self._spare) > SPARE:
            place = _tensors(self._spare.pop(0))[0].data_ptr()
            for key in [key for key in self.replays.recordings if key.places[0] == place]:
                del self.replays.recordings[key]
        if held is None:
            held = super().new_cache(batch, length, plain=plain)
        else:
            for part in _tensors(held):
                part.zero_()
        given = KeyValueCache(held.keys, held.values)
        # A collection can come at any time, that of a recording too: no more is done in it than to append.
        weakref.finalize(given, self._returned.append, held).atexit = False
        return given

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        start: int,
        cache: KeyValueCache,
        *,
        total: int | None = None,
        visible: Tensor | None = None,
        mask_ratio: Tensor | None = None,
    ) -> Tensor:
        """As of `CachedModel`, by replay."""
        end = cache.length if total is None else total
        self.check_window(ids, start, end, cache)
        own = KeyValueCache(cache.keys, cache.values)

        def work(ids: Tensor, **told: Tensor) -> Tensor:
            return CachedModel.step(self, ids, start, own, total=end, **told)

        places = tuple(part.data_ptr() for part in _tensors(own))
        key = Key(len(ids), ids.shape[1], start, end, places)
        ratio = mask_ratio if self.counts_masks else None
        # Tables are made for a total and forgotten when others are asked for; a graph goes on reading those of its recording.
        return self.replays(key, work, lambda: (own, self._tables(end)), ids=ids, visible=visible, mask_ratio=ratio)


def _tensors(cache: KeyValueCache) -> list[Tensor]:
    """Keys and values of a cache that holds the numbers themselves."""
    return [part for part in (*cache.keys, *cache.values) if isinstance(part, Tensor)]


_AS_IT_IS = "Call it as it is"


def captured(model: Compiled, *, limit: int = 8, step_limit: int = 32, recorder: Recorder | None = None) -> Captured:
    """A compiled model whose forwards are replayed.

    Args:
        limit, step_limit: graphs of forwards and of block steps held at once; each has logits and activations of its own.
        recorder: None for CUDA graphs.

    Raises:
        LoweringError: the model cannot be captured, with the node or the tensor in the way.
    """
    if min(limit, step_limit) < 1:
        name = "limit" if limit < 1 else "step_limit"
        raise LoweringError(f"{min(limit, step_limit)} graphs hold nothing", where=name, remedy="Use 1 or more")
    reason = uncapturable(model.lowered)
    reason = reason or (misplaced(model) if recorder is None else None)
    if reason is not None:
        raise LoweringError(f"the model cannot be captured: {reason}", where="graph", remedy=_AS_IT_IS)
    return Captured(model, recorder or CudaRecorder(), limit, step_limit)


def uncapturable(graph: fx.Graph) -> str | None:
    """None if the calls of a lowered graph can be recorded, else what stands in the way, one clause."""
    for node in graph.nodes:
        if is_call(node, *READS_VALUES):
            return f"%{node.name} ({node.target}) reads values on the host"
        if node.op == "call_function" and str(node.target).startswith(("dlqc_cpu", "dlqc_reference")):
            return f"%{node.name} ({node.target}) is no kernel of a GPU"
    return None


def misplaced(model: Compiled) -> str | None:
    """None if all of a model is on one GPU that can run it, else what is not."""
    reason = runtime.unavailable() or ("kernels are interpreted" if runtime.interpreting() else None)
    if reason is not None:
        return reason
    devices = {str(buffer.device) for buffer in model.buffers()}
    if len(devices) == 1 and next(iter(devices)).startswith("cuda"):
        return None
    return f"its tensors are on {', '.join(sorted(devices)) or 'no device'}"
