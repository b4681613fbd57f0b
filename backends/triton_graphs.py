"""Forwards of a lowered model replayed as CUDA graphs: one launch in place of hundreds, which is what a step of few tokens costs.

    fast = captured(dlqc.compile(model, …, backend="triton"))         generate(fast, prompt, …) as before
    logits = fast(ids)                                                ids [B, L]

A graph is recorded for each length and bucket of rows (1, 2, 4, 8, …) that is asked for. A call copies its ids into the graph's
own input, replays, and gives the rows that it asked for; rows that are left over hold what they held. Rows do not see each other,
so that does not matter; positions do, so lengths are never padded. The least recently used graph goes when there are more than
`limit`, and all of them go when the model's tensors have moved.

What a graph cannot hold is refused by name (`uncapturable`): work on the host that reads a tensor, or weights elsewhere than on
the GPU. The block step over a cache is not captured: it writes at places that are numbers of Python, not tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from dlqc.compiled import Compiled
from dlqc.errors import LoweringError
from dlqc.graph import aten, is_call
from dlqc.kernels.triton import runtime
from dlqc.ops import LINEAR_NESTED

#: Forwards before a recording: kernels are compiled and libraries make their handles in them.
WARM_UP = 2
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


@dataclass(frozen=True)
class Recording:
    """One graph: its input [rows, L], what replays it, and where its result is."""

    ids: Tensor
    replay: Callable[[], None]
    logits: Tensor


class Captured(nn.Module):
    """ids int64 [B, L] -> logits [B, L, V], by replay.

    Attributes:
        spec, tokenizer: of the model, for samplers. recordings: by (rows, length), least recently used first.
    """

    def __init__(self, model: Compiled, recorder: Recorder, limit: int) -> None:
        super().__init__()
        self.model, self.spec, self.tokenizer = model, model.spec, model.tokenizer
        self.recordings: OrderedDict[tuple[int, int], Recording] = OrderedDict()
        self._recorder, self._limit = recorder, limit
        self._places = self._tensors()

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        if not ids.numel():
            nothing: Tensor = self.model(ids)
            return nothing
        if self._places != (places := self._tensors()):
            self.recordings.clear()
            self._places = places
        key = (1 << (rows - 1).bit_length(), length)
        if key not in self.recordings:
            self.recordings[key] = self._record(ids, key)
            if len(self.recordings) > self._limit:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        found = self.recordings[key]
        found.ids[:rows].copy_(ids)
        found.replay()
        # The next replay writes to the same place.
        return found.logits[:rows].clone()

    def _record(self, ids: Tensor, key: tuple[int, int]) -> Recording:
        place = torch.full(key, self.spec.mask_id, dtype=ids.dtype, device=ids.device)
        place[: ids.shape[0]].copy_(ids)
        replay, logits = self._recorder.record(lambda: self.model(place))
        return Recording(place, replay, logits)

    def _tensors(self) -> tuple[int, ...]:
        """Where the model's tensors are: a graph holds addresses."""
        return tuple(buffer.data_ptr() for buffer in self.model.buffers())


def captured(model: Compiled, *, limit: int = 8, recorder: Recorder | None = None) -> Captured:
    """A compiled model whose forwards are replayed.

    Args:
        limit: graphs that are held at once; each has logits and activations of its own.
        recorder: None for CUDA graphs.

    Raises:
        LoweringError: the model cannot be captured, with the node or the tensor in the way.
    """
    if limit < 1:
        raise LoweringError(f"{limit} graphs hold nothing", where="limit", remedy="Use 1 or more")
    reason = uncapturable(model.lowered)
    reason = reason or (misplaced(model) if recorder is None else None)
    if reason is not None:
        raise LoweringError(f"the model cannot be captured: {reason}", where="graph", remedy="Call it as it is")
    return Captured(model, recorder or CudaRecorder(), limit)


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
