"""The block step: a model's graph for a window of positions, with keys and values of all others from a cache.

    full forward      ids [B, L]                                        → logits [B, L, V]
    block step        ids [B, S], start, total, K and V of each layer   → logits [B, S, V]
    (and the mask ratio of each row [B], where the graph goes by it)

Before:  y = sdpa(q, k, v, mask)                 L rows, L keys
After:   K[start:start+S], V[start:start+S] = k, v
         y = sdpa(q, K[:total], V[:total], mask[start:start+S])          S rows, `total` keys

What depends on the tokens is computed for the window. What depends on the length alone (rotary tables, position ids, masks) is
computed for `total` positions and cut to the window where the two meet. Nothing else is touched, so the step is made from any
graph, that of a lowered model too, and both variants read one set of buffers.

With the window 0..L the step is the full forward and fills the cache. It is exact where K and V of the positions outside of the
window are what the full forward would make of them: always in a block-causal model whose earlier blocks are final. Elsewhere
they are stale, which is what Fast-dLLM (arXiv 2505.22618) trades for speed.

Where the graph marks what attentions read (`quantize_kv`), the cache holds packed codes, see `dlqc.kv_cache`.

A graph is refused, by the name of the node, where it mixes positions by other means than attention: the structure is checked,
then every node of the step is compared with that of the full forward on random tokens.

Shapes: B batch, L all positions, S positions of the window, H key heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dlqc.diffusion.masking import generator
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError
from dlqc.execute import mask_buckets, placeholder
from dlqc.graph import CODER, SDPA, arg, args_of, aten, is_call
from dlqc.kv_cache import Coder, KeyValueCache, Stored, correction, decode, exchange
from dlqc.ops import CACHED, MASK_BUCKET, ROPE
from dlqc.proposal import Proposals, Proposing
from dlqc.same_rows import Values, check_same
from dlqc.tables import Tables

_REMEDY = "Decode without a cache: cache='none'"


class CachedModel:
    """A captured model in two variants over one set of weights.

    Attributes:
        module: the full forward, ids [B, L] -> logits [B, L, V].
        spec: the model's facts.
        pads: None if rows may be padded on the left, else why not.
        counts_masks: whether the graph goes by the mask ratio of a row.

    Raises:
        FeasibilityError: the graph cannot be computed for a window, with the node that stands in the way.
    """

    def __init__(self, module: fx.GraphModule, spec: DiffusionSpec) -> None:
        self.module = module
        self.spec = spec
        self._attentions = [node for node in module.graph.nodes if is_call(node, SDPA)]
        self.pads = _why_no_padding(module.graph)
        self.counts_masks = bool(mask_buckets(module.graph))
        self._tables = Tables(module, block_step(module.graph), "total")
        self._step = fx.GraphModule(module, self._tables.rest, class_name="BlockStep")
        self._padded: fx.GraphModule | None = None
        self._proposing: dict[fx.GraphModule, Proposing] = {}
        _compare(self)

    def __call__(self, ids: Tensor, mask_ratio: Tensor | None = None) -> Tensor:
        """The full forward."""
        logits: Tensor = self.module(ids, *self._told(mask_ratio))
        return logits

    def propose(self, rows: Tensor, ids: Tensor, mask_ratio: Tensor | None = None) -> Proposals | None:
        """As `Compiled.propose`: of the full forward."""
        return self._variant(self.module)(rows, ids, *self._told(mask_ratio)) if self.proposes else None

    @property
    def proposes(self) -> bool:
        """Whether `propose` and `propose_step` have an answer."""
        return bool(self._variant(self.module))

    def _variant(self, module: fx.GraphModule) -> Proposing:
        if module not in self._proposing:
            self._proposing[module] = Proposing(module, self.spec.mask_id)
        return self._proposing[module]

    def _told(self, mask_ratio: Tensor | None) -> tuple[Tensor | None, ...]:
        return (mask_ratio,) if self.counts_masks else ()

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return next((buffer.device for buffer in self.module.buffers()), torch.device("cpu"))

    def new_cache(self, batch: int, length: int, *, plain: bool = False) -> KeyValueCache:
        """An empty cache for `length` positions; `plain` holds the numbers themselves, whatever the graph says."""
        made: list[list[Tensor | Stored]] = []
        for node in self._attentions:
            pair: list[Tensor | Stored] = []
            for source in args_of(node)[1:3]:
                value = source.meta["val"]
                size = (batch, int(value.shape[1]), length, int(value.shape[3]))
                if is_call(source, CACHED) and not plain:
                    fmt, coder = decode(args_of(source)[2]), source.meta.get(CODER, Coder())
                    pair.append(Stored(fmt, size, value.dtype, self.device, coder=coder))
                else:
                    pair.append(torch.zeros(size, dtype=value.dtype, device=self.device))
            made.append(pair)
        return KeyValueCache([k for k, _ in made], [v for _, v in made])

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
        """Logits [B, S, V] of the window; writes its keys and values into the cache.

        Args:
            ids: int64 [B, S], the tokens at positions start .. start + S.
            start: position of the first.
            cache: read up to `total`, written in the window.
            total: number of positions that the window sees; None: all of the cache.
            visible: bool [B, L], False where a position is padding; None: none is.
            mask_ratio: float64 [B], which the window does not tell, where the graph goes by it; None: as if the window were all.
        """
        module, inputs = self._begin(ids, start, cache, total, visible, mask_ratio)
        logits: Tensor = module(*inputs)
        return logits

    @torch.no_grad()
    def propose_step(
        self,
        rows: Tensor,
        ids: Tensor,
        start: int,
        cache: KeyValueCache,
        *,
        total: int | None = None,
        visible: Tensor | None = None,
        mask_ratio: Tensor | None = None,
    ) -> Proposals | None:
        """Token and confidence of rows int64 [M] of the window's B·S, without logits; else as `step`.

        None, with the cache as it was, where the backend has no op for it.
        """
        if not self.proposes:
            return None
        module, inputs = self._begin(ids, start, cache, total, visible, mask_ratio)
        return self._variant(module)(rows, *inputs)

    def _begin(
        self,
        ids: Tensor,
        start: int,
        cache: KeyValueCache,
        total: int | None,
        visible: Tensor | None,
        mask_ratio: Tensor | None,
    ) -> tuple[fx.GraphModule, tuple[Any, ...]]:
        """The graph of a step and its inputs; the cache knows from then on what it is about to take."""
        total = cache.length if total is None else total
        self.check_window(ids, start, total, cache)
        masked = ids == self.spec.mask_id
        cache.begin(masked if visible is None else masked & visible[:, start : start + ids.shape[1]], start)
        pairs = [part for pair in zip(cache.keys, cache.values, strict=True) for part in pair]
        told = self._told(mask_ratio)
        if visible is None:
            return self._step, (ids, start, total, *told, *pairs, *self._tables(total))
        if self.pads is not None:
            raise FeasibilityError(self.pads, where="visible", remedy="Run rows of one length together")
        if self._padded is None:
            graph = block_step(self.module.graph, padded=True)
            self._padded = fx.GraphModule(self.module, graph, class_name="PaddedStep")
        return self._padded, (ids, start, total, *told, visible, *pairs)

    def check_window(self, ids: Tensor, start: int, total: int, cache: KeyValueCache) -> None:
        """Refuse a window that the cache has no room for."""
        if not 0 <= start < start + ids.shape[1] <= total <= cache.length:
            raise FeasibilityError(
                f"positions {start} to {start + ids.shape[1]} of {total}, the cache holds {cache.length}",
                where="window",
                remedy="Keep start + S <= total <= the length of the cache",
            )

    def padded(self, ids: Tensor, visible: Tensor, mask_ratio: Tensor | None = None) -> Tensor:
        """The full forward [B, L] -> [B, L, V] for rows that are padded on the left (`visible` False)."""
        return self.step(ids, 0, self.new_cache(*ids.shape, plain=True), visible=visible, mask_ratio=mask_ratio)

    def mask(self, length: int) -> Tensor:
        """Which position sees which: bool [length, length] on the CPU, the same for every attention.

        Raises:
            FeasibilityError: layers or heads differ.
        """
        found = None
        run = fx.Interpreter(self.module)
        ids = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        for node in self._attentions:
            given, causal = arg(node, 3, "attn_mask"), bool(arg(node, 5, "is_causal", False))
            seen = torch.ones(length, length, dtype=torch.bool)
            if isinstance(given, fx.Node):
                value = _value(run, given, ids).cpu()
                value = value if value.dtype is torch.bool else value == 0
                if value.numel() != value.shape[-1] * value.shape[-2]:
                    raise FeasibilityError("heads see different positions", where=node.name, remedy=_REMEDY)
                seen = seen & value.reshape(value.shape[-2:])
            seen = seen.tril() if causal else seen
            if found is not None and not torch.equal(found, seen):
                raise FeasibilityError("layers see different positions", where=node.name, remedy=_REMEDY)
            found = seen
        assert found is not None
        return found


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | Stored,
    values: Tensor | Stored,
    start: int,
    total: int,
    mask: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
    offset: Tensor | None = None,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """Attention of a window q [B, Hq, S, D] on the cache, after its own k and v [B, H, S, D] are written there.

    Args:
        keys, values: [B, H, L, D], changed in place at start .. start + S.
        mask: broadcasts to [B, Hq, S, total]; boolean or additive.
        visible: bool [B, L], False at padding.
        causal: position i sees j <= i.
        offset: [1, H, L, D], what keys are stored without.
        attend: torch's attention, or what stands for it.
    """
    stop = start + q.shape[-2]
    held_keys, held_values = exchange(keys, k, start, total, offset), exchange(values, v, start, total)
    if causal:
        mask = torch.ones(stop, total, dtype=torch.bool, device=q.device).tril()[start:]
    if visible is not None:
        seen = visible[:, None, None, :total]
        mask = seen if mask is None else mask & seen
    shifted = correction(keys, q, start, total, scale)
    if shifted is not None and mask is not None:
        mask = shifted.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else shifted + mask
    elif shifted is not None:
        mask = shifted
    return attend(q, held_keys, held_values, attn_mask=mask, scale=scale, enable_gqa=grouped)


def block_step(graph: fx.Graph, *, padded: bool = False) -> fx.Graph:
    """The graph of the block step.

    Inputs of the result: ids [B, S], start, total, the mask ratios where the graph goes by them, `visible` where `padded`, then
    keys and values of each attention in order.

    Raises:
        FeasibilityError: with the node that cannot be computed for a window.
    """
    return _Window(graph, padded).made


class _Window:
    """One rewriting of a graph: `row` gives a node's counterpart for the window, `table` that for all positions."""

    def __init__(self, graph: fx.Graph, padded: bool) -> None:
        ids = placeholder(graph)
        length = ids.meta["val"].shape[1]
        if not isinstance(length, torch.SymInt):
            raise FeasibilityError("the graph works at one length only", where=ids.name, remedy="Capture it again")
        self._length = length.node.expr
        self._tokens = reads_tokens(graph, ids)
        self.made = fx.Graph()
        self._ids = self.made.placeholder("input_ids")
        self._start, self._total = self.made.placeholder("start"), self.made.placeholder("total")
        self._ratio = self.made.placeholder("mask_ratio") if mask_buckets(graph) else None
        self._visible = self.made.placeholder("visible") if padded else None
        attentions = [node for node in graph.nodes if is_call(node, SDPA)]
        if not attentions:
            raise FeasibilityError("the graph has no attention, so nothing to cache", where="graph", remedy=_REMEDY)
        self._caches = {
            node: (self.made.placeholder(f"keys_{i}"), self.made.placeholder(f"values_{i}"))
            for i, node in enumerate(attentions)
        }
        self._rows: dict[fx.Node, Any] = {ids: self._ids}
        self._tables: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node in self._tokens and node is not ids and not is_call(node, CACHED):
                self._check(node)
                if node in self._caches:
                    self._rows[node] = self._attention(node)
                elif is_call(node, MASK_BUCKET):
                    self._rows[node] = self._bucket(node)
                else:
                    self._rows[node] = self._copy(node, self.row)
        result = next(node for node in graph.nodes if node.op == "output").args[0]
        self.made.output(self._rows[result])

    def row(self, node: fx.Node) -> Any:
        """The node for the window; a table is cut to it."""
        if node not in self._rows:
            if node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
                self._rows[node] = self._copy(node, self.row)
            else:
                self._rows[node] = self._cut(node)
        return self._rows[node]

    def table(self, node: fx.Node) -> Any:
        """The node for all `total` positions. Of what depends on tokens, only sizes are asked for."""
        if node.op == "get_attr" or node in self._tokens:
            return self.row(node)
        if node not in self._tables:
            source = args_of(node)[0] if args_of(node) else None
            if is_call(node, aten.sym_size.int) and source in self._tokens:
                self._tables[node] = self._size(node)
            else:
                self._tables[node] = self._copy(node, self.table)
        return self._tables[node]

    def _size(self, node: fx.Node) -> Any:
        size = node.meta.get("val")
        if not self._grows(size):
            return self.row(node)
        if isinstance(size, torch.SymInt) and size.node.expr == self._length:
            return self._total
        raise FeasibilityError(f"a table is built for {size} positions", where=node.name, remedy=_REMEDY)

    def _cut(self, node: fx.Node) -> fx.Node:
        dims = self._position_dims(node)
        value: fx.Node = self.table(node)
        if len(dims) > 1:
            readers = ", ".join(user.name for user in node.users if user in self._tokens)
            raise FeasibilityError(
                f"a table over pairs of positions enters {readers}, which is no attention op",
                where=node.name,
                remedy=_REMEDY,
            )
        for dim in dims:
            value = self._narrow(value, dim)
        return value

    def _narrow(self, value: fx.Node, dim: int) -> fx.Node:
        size = self.made.call_function(aten.sym_size.int, (self._ids, 1))
        return self.made.call_function(aten.narrow.default, (value, dim, self._start, size))

    def _bucket(self, node: fx.Node) -> fx.Node:
        return self.made.call_function(MASK_BUCKET, (self._ids, *args_of(node)[1:3], self._ratio))

    def _attention(self, node: fx.Node) -> fx.Node:
        for source in args_of(node)[:3]:
            dims = self._position_dims(source)
            if source not in self._tokens or dims != [2] or source.meta["val"].dim() != 4:
                raise FeasibilityError(
                    f"attention reads %{source.name}, whose positions are not in the third of four dimensions",
                    where=node.name,
                    remedy=_REMEDY,
                )
        mask = arg(node, 3, "attn_mask")
        if mask in self._tokens:
            raise FeasibilityError(
                "the attention mask depends on which tokens the row holds", where=mask.name, remedy=_REMEDY
            )
        if isinstance(mask, fx.Node):
            queries = self._grows(mask.meta["val"].shape[-2])
            mask = self.table(mask) if mask.op != "get_attr" else self.row(mask)
            mask = self._narrow(mask, -2) if queries else mask
        marks = [source for source in args_of(node)[1:3] if is_call(source, CACHED)]
        new = [self.row(args_of(source)[0] if source in marks else source) for source in args_of(node)[:3]]
        offsets = [args_of(mark)[1] for mark in marks if args_of(mark)[1] is not None]
        options = {
            "mask": mask,
            "visible": self._visible,
            "causal": bool(arg(node, 5, "is_causal", False)),
            "scale": node.kwargs.get("scale"),
            "grouped": bool(node.kwargs.get("enable_gqa", False)),
            "offset": self.table(offsets[0]) if offsets else None,
            "attend": node.target,
        }
        arguments = (*new, *self._caches[node], self._start, self._total)
        return self.made.call_function(cached_attention, arguments, options)

    def _check(self, node: fx.Node) -> None:
        """Every position has its own row in what depends on tokens."""
        values = node.meta.get("val")
        for value in values if isinstance(values, tuple | list) else [values]:
            count = sum(map(self._grows, value.shape)) if isinstance(value, Tensor) else 0
            if count != 1:
                what = (
                    "relates positions with each other outside of an attention op" if count else "joins all positions"
                )
                raise FeasibilityError(f"{node.target} {what}", where=node.name, remedy=_REMEDY)

    def _position_dims(self, node: fx.Node) -> list[int]:
        return [i for i, size in enumerate(node.meta["val"].shape) if self._grows(size)]

    def _grows(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and bool(self._length.free_symbols & size.node.expr.free_symbols)

    def _copy(self, node: fx.Node, place: Any) -> fx.Node:
        sources = {source: place(source) for source in node.all_input_nodes}
        new = self.made.node_copy(node, lambda source: sources[source])
        new.meta["full"] = node.name
        return new


def reads_tokens(graph: fx.Graph, ids: fx.Node) -> set[fx.Node]:
    """The nodes whose values depend on which tokens a row holds, and not on its length alone."""
    found = {ids}
    for node in graph.nodes:
        name = str(node.target).removeprefix("aten.")
        if node.op == "call_function" and not name.startswith(("sym_size", "new_")):
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
    return found


def _why_no_padding(graph: fx.Graph) -> str | None:
    """None where attention sees relative positions only: then a row may begin anywhere."""
    tokens = reads_tokens(graph, placeholder(graph))
    for node in graph.nodes:
        if node not in tokens:
            continue
        if is_call(node, SDPA) and (arg(node, 3, "attn_mask") is not None or arg(node, 5, "is_causal", False)):
            return f"%{node.name} has a mask of its own, which padding would move"
        tables = [s for s in node.all_input_nodes if s not in tokens and s.op != "get_attr" and _has_length(s, graph)]
        if tables and not is_call(node, ROPE, CACHED):
            return f"%{node.name} reads absolute positions, which padding would move"
    return None


def _has_length(node: fx.Node, graph: fx.Graph) -> bool:
    value, length = node.meta.get("val"), placeholder(graph).meta["val"].shape[1].node.expr
    sizes: list[Any] = list(value.shape) if isinstance(value, Tensor) else []
    return any(isinstance(size, torch.SymInt) and length in size.node.expr.free_symbols for size in sizes)


def _value(run: fx.Interpreter, wanted: fx.Node, ids: Tensor) -> Tensor:
    """The value of one node that depends on the length only."""
    env: dict[fx.Node, Any] = {placeholder(wanted.graph): ids}

    def visit(node: fx.Node) -> Any:
        if node not in env:
            for source in node.all_input_nodes:
                visit(source)
            run.env = env
            env[node] = run.run_node(node)
        return env[node]

    found: Tensor = visit(wanted)
    return found


def _compare(model: CachedModel) -> None:
    """Refuse a graph in which a node of the step differs from that of the full forward on the same tokens."""
    length = min(12, model.spec.max_length)
    start, stop = length // 4, length - length // 4
    ids = torch.randint(0, model.spec.vocab_size, (2, length), generator=generator(0, "block step"))
    ids = ids.to(model.device)
    cache = model.new_cache(2, length, plain=True)
    model.step(ids, 0, cache)
    pairs = [tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair]
    full, step = Values(model.module), Values(model._step)
    with torch.no_grad():
        full.run(ids)
        ratio, held = (ids == model.spec.mask_id).double().mean(1), model._tables(length)
        step.run(ids[:, start:stop], start, length, *model._told(ratio), *pairs, *held)
    tokens = reads_tokens(model.module.graph, placeholder(model.module.graph))
    check_same(model.module.graph, tokens, full.values, step.values, slice(start, stop), _REMEDY)
