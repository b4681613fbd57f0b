"""How much attention each token of a state gets from all attentions of the model: where the sinks are.

    m_j = L/(A·H·L) · Σ_{attentions, heads, queries} P_hqj        [B, L], mean 1 over the tokens of a state

With the original model, before anything is quantized. One forward of each state up to the last attention; scores are made for a
few heads at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dlqc.attention import column_mass
from dlqc.errors import CalibrationError
from dlqc.execute import Executor, placeholder
from dlqc.graph import arg, args_of
from dlqc.regions import attentions
from dlqc.weights import Weights


def attention_mass(graph: fx.Graph, weights: Weights, ids: Tensor) -> Tensor:
    """m [B, L], float64, of token ids [B, L].

    Raises:
        CalibrationError: the graph has no attention over the tokens.
    """
    batch, length = (str(size) for size in placeholder(graph).meta["val"].shape)
    found = [n for n in attentions(list(graph.nodes)) if _sizes(args_of(n)[1]) == [batch, length]]
    if not found:
        what = "no attention of the model has the tokens for its keys, so there are no sinks"
        raise CalibrationError(what, where="sink_aware", remedy="Use weight=uniform")
    seen = _Seen(found, ids)
    Executor(graph, weights, [placeholder(graph)], [found[-1]])(ids, taps=seen.taps())
    return seen.total / seen.total.mean(dim=1, keepdim=True)


def _sizes(keys: fx.Node) -> list[str]:
    """Batch and length of keys [B, H, S, D]."""
    sizes = [str(size) for size in keys.meta["val"].shape]
    return [sizes[0], sizes[2]] if len(sizes) == 4 else []


@dataclass
class _Seen:
    """Adds up the column masses of attentions as their values come by."""

    calls: list[fx.Node]
    ids: Tensor
    values: dict[fx.Node, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.ids.shape, dtype=torch.float64)
        self._even = torch.ones(self.ids.shape)

    def taps(self) -> Mapping[fx.Node, Any]:
        operands = [a for call in self.calls for a in _operands(call) if a is not None]
        return {**dict.fromkeys(operands, self.keep), **dict.fromkeys(self.calls, self.add)}

    def keep(self, node: fx.Node, value: Tensor) -> None:
        self.values[node] = value

    def add(self, node: fx.Node, _: Tensor) -> None:
        q, k, mask = (None if a is None else self.values[a] for a in _operands(node))
        assert q is not None
        assert k is not None
        causal, scale = bool(arg(node, 5, "is_causal", False)), arg(node, 6, "scale")
        self.total += column_mass(q, k, mask, causal, scale, self._even) / q.shape[1]
        # A mask may serve attentions to come.
        for a in _operands(node)[:2]:
            self.values.pop(a, None)  # type: ignore[arg-type]


def _operands(call: fx.Node) -> tuple[fx.Node | None, ...]:
    """Queries, keys and mask."""
    return (*args_of(call)[:2], arg(call, 3, "attn_mask"))
