"""The contract of a rounding method: weight, number format and statistics in; codes, scales and metrics out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dlqc.contract import Reads
from dlqc.formats.activation import ActFormat
from dlqc.formats.contract import StoredWeight, WeightFormat
from dlqc.formats.integer import IntFormat, QuantizedWeight

if TYPE_CHECKING:
    from dlqc.reconstruct import Objective


@dataclass(frozen=True)
class Rounded:
    """A rounded weight and what the rounding cost.

    Attributes:
        weight: codes, scales, zero points, or what the format stores in their place.
        metrics: numbers for the report, by name. Every method that has a Hessian gives `sqnr_db`, the output
            signal-to-noise ratio 10·log10(tr(W H Wᵀ) / tr(E H Eᵀ)), E = W - dequant(W).
    """

    weight: QuantizedWeight | StoredWeight
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounding:
    """Base of the rounding methods: a frozen dataclass whose fields are the options.

    Class attributes:
        name: spelling in recipes.
        statistics: statistics of the layer input that `round` needs (`dlqc.stats` names), for example {"hessian"}.
        takes: the classes of formats that `round` rounds to.
        compensates: whether `round` makes up for pruned weights itself. It then gets with the statistics "kept", bool
            [N, K], and the weight as it was before pruning, unless pruning has moved the others to make up for it already.
            Other methods get the pruned weight, and leave zero what is zero.
    """

    name: ClassVar[str]
    statistics: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[tuple[type[Any], ...]] = (IntFormat,)
    compensates: ClassVar[bool] = False

    def refusal(self, fmt: IntFormat | WeightFormat) -> str | None:
        """None if the method rounds to this format, else the reason it does not, one clause."""
        return None if isinstance(fmt, self.takes) else f"{self.name} does not round to {fmt.label}"

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do the work on the statistics that linears with the same input can share; `round` gets what this returns."""
        return stats

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        """Round `weight` [N, K] (float64 or float32) to `fmt`. Pure: no argument is changed, no global is read."""
        raise TypeError(f"{type(self).__name__} does not define round()")


@dataclass(frozen=True)
class BlockRounding(Rounding):
    """Base of the methods that round all linears of a block together, looking at the block's output."""

    def reads(self) -> Reads:
        """Which states at the input of the block the objective is taken on (`Pass.reads`)."""
        return "current"

    @property
    def act(self) -> ActFormat | None:
        """What the inputs of the linears are rounded to in the objective."""
        return None

    def round_block(
        self, weights: Mapping[str, torch.Tensor], formats: Mapping[str, Any], objective: Objective, seed: int
    ) -> tuple[dict[str, Rounded], dict[str, float]]:
        """Round `weights`, each to its format: the rounded ones by name, and numbers of the block as a whole. Pure."""
        raise TypeError(f"{type(self).__name__} does not define round_block()")
