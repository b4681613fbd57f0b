"""Running a graph, or a part of it, node by node.

Only what the wanted nodes need is computed, each value is freed after its last use, and a weight is evaluated when it
is first read: the whole of a model runs in the memory of its largest layer. Everything that looks at numbers inside the
compiler (capture check, certificates, calibration, block propagation) runs through here; speed at run time is the
lowered module's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from dlqc.graph import args_of, is_call
from dlqc.ops import MASK_BUCKET
from dlqc.weights import Weights

Tap = Callable[[fx.Node, torch.Tensor], None]


class Executor:
    """Computes `outputs` from values given for `inputs`.

    Args:
        graph: the graph that holds all the nodes.
        weights: its constants.
        inputs: nodes whose values are given at each call; nothing above them is computed.
        outputs: nodes whose values are returned.
        dtype: None computes as captured; another floating dtype replaces the captured float32 everywhere.
        grad: whether autograd follows, to the values that are given and to those that are returned.
        keep_weights: keep evaluated weights between calls (a block that sees many batches), or free each after its last
            use (a whole model that sees few).
    """

    def __init__(
        self,
        graph: fx.Graph,
        weights: Weights,
        inputs: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        *,
        dtype: torch.dtype | None = None,
        grad: bool = False,
        keep_weights: bool = False,
    ) -> None:
        self._weights = weights
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._dtype = dtype
        self._grad = grad
        self._keep = keep_weights
        self._cache: dict[str, torch.Tensor] = {}
        self.nodes = _read_late(needed(graph, inputs, outputs))
        self._dies = _last_uses(self.nodes, keep=set(outputs))

    def __call__(self, *values: torch.Tensor, taps: Mapping[fx.Node, Tap] | None = None) -> list[torch.Tensor]:
        """Run once. `taps` are called with the value of a node as soon as it is known."""
        with torch.set_grad_enabled(self._grad):
            return self._run(values, taps or {}, {}, {})

    def differentiable(
        self,
        *values: torch.Tensor,
        constants: Mapping[str, torch.Tensor],
        entering: Mapping[fx.Node, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> list[torch.Tensor]:
        """Run once, with gradients where they are enabled.

        Args:
            constants: by name, what is computed with in place of the weights.
            entering: by call, what its first argument goes through before.
        """
        return self._run(values, {}, constants, entering or {})

    def _run(
        self,
        values: Sequence[torch.Tensor],
        taps: Mapping[fx.Node, Tap],
        constants: Mapping[str, torch.Tensor],
        entering: Mapping[fx.Node, Callable[[torch.Tensor], torch.Tensor]],
    ) -> list[torch.Tensor]:
        env: dict[fx.Node, Any] = dict(zip(self._inputs, values, strict=True))
        with _default_dtype(self._dtype):
            for node in self._inputs:
                if node in taps:
                    taps[node](node, env[node])
            for node in self.nodes:
                given = constants.get(str(node.target)) if node.op == "get_attr" else None
                env[node] = self._value(node, env, entering.get(node)) if given is None else given
                if node in taps:
                    taps[node](node, env[node])
                for dead in self._dies.get(node, ()):
                    env.pop(dead, None)
        return [env[node] for node in self._outputs]

    def _value(
        self, node: fx.Node, env: dict[fx.Node, Any], entering: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Any:
        if node.op == "get_attr":
            return self._constant(node)
        if node.op != "call_function":
            raise RuntimeError(f"{node.name}: {node.op} node was given no value")
        args: tuple[Any, ...]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        if self._dtype is not None:
            args, kwargs = self._retype(args), self._retype(kwargs)
        if entering is not None:
            entered: Any = args[0]
            args = (entering(entered), *args[1:])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _constant(self, node: fx.Node) -> torch.Tensor:
        name = str(node.target)
        if name not in self._cache:
            value = self._weights.value(name, compute_dtype(node, self._dtype))
            if not self._keep:
                return value
            self._cache[name] = value
        return self._cache[name]

    def _retype(self, tree: Any) -> Any:
        return torch.utils._pytree.tree_map(lambda leaf: self._dtype if leaf is torch.float32 else leaf, tree)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors made without a dtype (masks, tables, quotients of integers) get it too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compute_dtype(node: fx.Node, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype in which a constant enters arithmetic: as captured, or `dtype` where the capture says float32."""
    val = node.meta.get("val")
    captured = val.dtype if isinstance(val, torch.Tensor) else None
    if captured is None or not captured.is_floating_point:
        return None
    return dtype if dtype is not None and captured is torch.float32 else captured


def needed(graph: fx.Graph, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes, in graph order, that must be computed to get from `inputs` to `outputs`."""
    given, wanted = set(inputs), set()
    stack = [node for node in outputs if node not in given]
    while stack:
        node = stack.pop()
        if node in wanted:
            continue
        wanted.add(node)
        stack.extend(a for a in node.all_input_nodes if a not in given and a not in wanted)
    return [node for node in graph.nodes if node in wanted]


def _read_late(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The same nodes, each constant directly before its first reader."""
    waiting = {node for node in nodes if node.op == "get_attr"}
    order: list[fx.Node] = []
    for node in nodes:
        if node in waiting:
            continue
        constants = [a for a in node.all_input_nodes if a in waiting]
        waiting.difference_update(constants)
        order += [*constants, node]
    return order + [node for node in nodes if node in waiting]


def _last_uses(nodes: Sequence[fx.Node], keep: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            last[used] = node
    dies: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        if used not in keep:
            dies.setdefault(node, []).append(used)
    return dies


def placeholder(graph: fx.Graph) -> fx.Node:
    """The token ids."""
    found: fx.Node = next(node for node in graph.nodes if node.op == "placeholder")
    return found


def logits_node(graph: fx.Graph) -> fx.Node:
    """The node whose value the graph returns."""
    output = next(node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    assert isinstance(result, fx.Node)
    return result


def forward(
    graph: fx.Graph,
    weights: Weights,
    ids: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    mask_ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [B, L, V] of token ids [B, L], streaming the weights; mask_ratio [B]: see `dlqc.precision`."""
    given = mask_buckets(graph)
    run = Executor(graph, weights, [placeholder(graph), *given], [logits_node(graph)], dtype=dtype)
    return run(ids, *bucket_values(given, ids, mask_ratio))[0]


def mask_buckets(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that say which bucket of mask ratio each token's row is in."""
    return [node for node in graph.nodes if is_call(node, MASK_BUCKET)]


def bucket_values(nodes: Sequence[fx.Node], ids: torch.Tensor, mask_ratio: torch.Tensor | None) -> list[torch.Tensor]:
    """The values of such nodes, int64 [B, L] each; mask_ratio float64 [B], None: counted on the ids."""
    return [MASK_BUCKET(ids, *args_of(node)[1:3], mask_ratio) for node in nodes]


def mask_class(graph: fx.Graph, weights: Weights, mask: fx.Node) -> str:
    """What an attention mask lets through: "full" or "causal" at every length, or "other".

    A boolean mask lets through where it is true, an additive one where it is zero. The mask is computed at two short
    lengths, and at one beyond every number in its definition (a window shows only past its width). One that depends on
    which tokens the row holds, or on a number too large to try, is "other".
    """
    ids = placeholder(graph)
    run = Executor(graph, weights, [ids], [mask])
    lengths = _telling_lengths(run.nodes, ids, weights)
    if lengths is None or _reads_tokens(run.nodes, ids):
        return "other"
    kinds = set()
    for length in lengths:
        value = run(torch.zeros(1, length, dtype=torch.int64))[0]
        through = value if value.dtype is torch.bool else value == 0
        if bool(through.all()):
            kinds.add("full")
        elif through.shape[-2:] == (length, length) and bool(
            (through == through.new_ones(length, length).tril()).all()
        ):
            kinds.add("causal")
        else:
            kinds.add("other")
    return kinds.pop() if len(kinds) == 1 else "other"


#: Longest row at which a mask is computed: 16 million elements.
_LONGEST_MASK = 4096
#: Calls that take the shape of a tensor and none of its values.
_SHAPE_ONLY = ("sym_size", "new_", "ones_like", "zeros_like", "full_like", "empty_like")


def _telling_lengths(nodes: Sequence[fx.Node], ids: fx.Node, weights: Weights) -> list[int] | None:
    numbers: list[int] = []
    for node in nodes:
        if node.op == "get_attr":
            leaf = weights[str(node.target)].leaf
            if leaf.is_meta:
                return None
            numbers.extend(leaf.shape)
            if leaf.numel() == 1 and not leaf.is_floating_point():
                numbers.append(int(leaf.abs().clamp(max=1 << 31)))
        leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        # Positions are integers; 2**31 and beyond stand for "to the end" in slices. Floats are what a mask adds.
        numbers.extend(abs(n) for n in leaves if isinstance(n, int) and abs(n) < 1 << 31)
    longest = _longest(ids)
    far = min(max(numbers, default=0) + 2, longest)
    return sorted({min(5, longest), min(12, longest), far}) if far <= _LONGEST_MASK else None


def _longest(ids: fx.Node) -> int:
    """The longest row that the graph was captured for."""
    val = ids.meta.get("val")
    length: Any = val.shape[1] if isinstance(val, torch.Tensor) else _LONGEST_MASK
    if not isinstance(length, torch.SymInt):
        return int(length)
    return int(min(length.node.shape_env.bound_sympy(length.node.expr).upper, 1 << 31))


def _reads_tokens(nodes: Sequence[fx.Node], ids: fx.Node) -> bool:
    return any(
        ids in node.all_input_nodes and not str(node.target).removeprefix("aten.").startswith(_SHAPE_ONLY)
        for node in nodes
    )
