"""Observers: what a block-scoped pass wants to see of a block besides statistics of its linears' inputs.

A pass names observers (`Pass.observers`), each with the values it wants; the states run through the block as it is then, and
each observer is given its values batch by batch, with the ids and token weights of the states. Memory holds one batch of the
values, and what the observers keep.

Values are brought to [B, L, C] first, states × tokens × features: heads [B, H, L, D] become H·D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import fx

from dlqc import ops
from dlqc.attention import column_mass
from dlqc.errors import CalibrationError
from dlqc.execute import placeholder
from dlqc.graph import arg, args_of
from dlqc.ranges import Seen

Layout = Literal["tokens", "length first", "flat", "heads", "other"]


@dataclass(frozen=True)
class Batch:
    """Some of the states: ids int64 [B, L], token weights float32 [B, L], mask ratios float64 [B] (None: of the ids)."""

    ids: torch.Tensor
    weights: torch.Tensor
    mask_ratio: torch.Tensor | None = None


class Observer(Protocol):
    """Looks at values while states run through a block."""

    @property
    def nodes(self) -> Sequence[fx.Node]:
        """The values it wants, in the order in which `add` takes them."""

    def add(self, values: Sequence[torch.Tensor], batch: Batch) -> None:
        """See the values of one batch."""


def layout(node: fx.Node) -> Layout:
    """How the tokens [B, L] of the ids lie in the leading sizes of a value."""
    batch, length = placeholder(node.graph).meta["val"].shape
    sizes = [str(size) for size in node.meta["val"].shape]
    if sizes[:-1] == [str(batch), str(length)]:
        return "tokens"
    if sizes[:-1] == [str(length), str(batch)]:
        return "length first"
    if sizes[:-1] == [str(batch * length)]:
        return "flat"
    return "heads" if len(sizes) == 4 and [sizes[0], sizes[2]] == [str(batch), str(length)] else "other"


def by_tokens(value: torch.Tensor, node: fx.Node, batch: Batch) -> torch.Tensor | None:
    """A value as [B, L, C], or None if its rows are other than the tokens."""
    match layout(node):
        case "tokens":
            return value
        case "length first":
            return value.transpose(0, 1)
        case "flat":
            return value.reshape(*batch.ids.shape, -1)
        case "heads":
            return value.transpose(1, 2).flatten(2)
    return None


def laid_out(value: torch.Tensor, how: Layout) -> torch.Tensor:
    """A value [B, L, C] with its tokens laid out in one of these ways; as it is for "heads" and "other"."""
    if how == "length first":
        return value.transpose(0, 1).contiguous()
    return value.flatten(0, 1) if how == "flat" else value


@dataclass(frozen=True)
class MaskRatios:
    """Which set of scales a row takes: by the number of `edges` below its mask ratio."""

    mask_id: int
    edges: tuple[float, ...] = ()

    @property
    def sets(self) -> int:
        return len(self.edges) + 1

    def of_rows(self, batch: Batch) -> torch.Tensor:
        """int64 [B], as the op in the graph has it."""
        found: torch.Tensor = ops.mask_bucket(batch.ids, self.mask_id, list(self.edges), batch.mask_ratio)
        return found[:, 0]


@dataclass(frozen=True)
class RangeObserver:
    """Records the numbers of one value.

    Attributes:
        node: the value. where: what errors call it. seen: the record. ratios: how states are told apart.
    """

    node: fx.Node
    where: str
    seen: Seen
    ratios: MaskRatios

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node,)

    def add(self, values: Sequence[torch.Tensor], batch: Batch) -> None:
        x, c = by_tokens(values[0], self.node, batch), batch.weights
        if x is None:
            x = values[0].flatten(0, -2).unsqueeze(0)
            if self.ratios.sets > 1 or not bool((c == c[0, 0]).all()):
                raise CalibrationError(
                    f"reads {x.shape[1]} rows where the states have {c.numel()} tokens, so neither token weights nor "
                    "mask ratios apply",
                    where=self.where,
                    remedy="Use weight=uniform and buckets=1, or scales that are taken at run time (ranges=None)",
                )
            c, batch = torch.ones(x.shape[:2]), Batch(batch.ids[:1], batch.weights[:1])
        record(self.seen, x, c, self.ratios.of_rows(batch), self.where)


@dataclass(frozen=True)
class AttendedObserver:
    """Records the values v of an attention, each token weighed by how much it is looked at (IA-AQ, arXiv 2508.14090, eq. 7-9).

        a_j = Σ over heads h and queries q of c_q·P_hqj,    weight of token j = a_j / (number of heads) + floor

    The mean of a_j over the tokens of all states is the number of heads, since the mean of c is 1 and rows of P sum to 1: the
    weights have mean 1, before the floor is added.

    Attributes:
        attention: the call of scaled dot-product attention.
    """

    attention: fx.Node
    where: str
    seen: Seen
    ratios: MaskRatios
    floor: float = 1e-4

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        mask = arg(self.attention, 3, "attn_mask")
        return (*args_of(self.attention)[:3], *([mask] if isinstance(mask, fx.Node) else []))

    def add(self, values: Sequence[torch.Tensor], batch: Batch) -> None:
        q, k, v = values[:3]
        causal: bool = arg(self.attention, 5, "is_causal", False)
        scale: Any = self.attention.kwargs.get("scale")
        mass = column_mass(q, k, values[3] if len(values) > 3 else None, causal, scale, batch.weights)
        weights = mass / q.shape[1] + self.floor
        record(self.seen, v.transpose(1, 2).flatten(2), weights, self.ratios.of_rows(batch), self.where)


def record(seen: Seen, x: torch.Tensor, c: torch.Tensor, set_of: torch.Tensor, where: str) -> None:
    """Add to a record, after a look for numbers that are none."""
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(0, 1).any(dim=0).sum())
        raise CalibrationError(
            f"NaN or Inf in the activations ({bad} of {x.shape[-1]} channels)",
            where=where,
            remedy="Check the weights before this layer and the calibration text",
        )
    seen.add(x, c, set_of)
