"""How queries, keys and values of an attention are quantized.

    dynamic   scales from the numbers themselves at run time, one per token and head, or one per token for all heads
    static    fixed scales from calibration, shared by all tokens: one for all heads, one per head, or one per channel
    ia_aq     static scales of values, chosen by what the attention makes of them (DLLMQuant)

A scale per channel is for values alone: an attention sums q·kᵀ over channels, so that scales of queries and keys by channel would
not come out of an integer sum; P·v is summed over tokens, and its channels stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import fx

from dlqc.errors import RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.graph import args_of
from dlqc.observers import AttendedObserver, MaskRatios, RangeObserver
from dlqc.ranges import MinMax, Mse, Range, Ranges, Seen, inner_edges

Shared = Literal["tensor", "head", "channel"]


@dataclass(frozen=True)
class Dynamic:
    """Scales from the numbers themselves.

    Options:
        per: "head" is one scale per token and head, "token" one per token. symmetric: no zero point.
    """

    name: ClassVar[str] = "dynamic"
    per: Literal["head", "token"] = "head"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.per not in ("head", "token"):
            raise RecipeError(f"no scales are per {self.per!r}", where="dynamic.per", remedy="Use head or token")

    @property
    def label(self) -> str:
        return f"per {'token and head' if self.per == 'head' else 'token'}{'' if self.symmetric else ' asymmetric'}"


@dataclass(frozen=True)
class Static:
    """Fixed scales.

    Options:
        per: what shares a scale: all heads ("tensor"), a "head", or a "channel" (values only). symmetric: no zero point.
        ranges: the estimator.
        buckets: of mask ratio, each with ranges of its own: how many, of equal width, or the ratios between them.
    """

    name: ClassVar[str] = "static"
    per: Shared = "head"
    symmetric: bool = True
    ranges: Ranges = field(default_factory=MinMax)
    buckets: int | tuple[float, ...] = 1

    def __post_init__(self) -> None:
        _check_per(self.per, self.name)
        self.edges  # noqa: B018  impossible buckets are refused here

    @property
    def edges(self) -> tuple[float, ...]:
        return inner_edges(self.buckets, f"{self.name}.buckets")

    @property
    def label(self) -> str:
        return f"static {_shared(self)} by {self.ranges.name}"

    def observer(self, attention: fx.Node, value: fx.Node, where: str, bits: int, mask_id: int) -> RangeObserver:
        """Looks at one of the values that an attention reads."""
        ratios = MaskRatios(mask_id, self.edges)
        return RangeObserver(value, where, _seen(self, self.ranges, value, bits), ratios)

    def estimate(self, seen: Seen, bits: int) -> Range:
        return self.ranges.estimate(seen, static_format(self, bits))


@dataclass(frozen=True)
class IaAq:
    """IA-AQ of DLLMQuant (arXiv 2508.14090, eq. 7-9): fixed scales of values that mind who is looked at.

        s* = argmin over α of Σ_j a_j·‖Q(v_j; α·s) - v_j‖²,    a_j: attention's column mass of token j, see `AttendedObserver`

    s is the scale of the largest number. A token that nobody looks at may be clamped, however large it is. The paper searches one
    scale for all of v; here one for each head, or channel, is to be had as well, each with an α of its own. Scales of one token
    would make the weights void: hence fixed scales.

    Options:
        per: what shares a scale: all heads ("tensor"), a "head", or a "channel". symmetric: no zero point; otherwise both ends of
            the range shrink, then one at a time.
        points, smallest: the grid of α, evenly from `smallest` to 1. floor: what every token counts besides a_j of mean 1.
        buckets: of mask ratio, each with scales of its own: how many, of equal width, or the ratios between them.
    """

    name: ClassVar[str] = "ia_aq"
    per: Shared = "head"
    symmetric: bool = True
    points: int = 96
    smallest: float = 0.05
    floor: float = 1e-4
    buckets: int | tuple[float, ...] = 1

    def __post_init__(self) -> None:
        _check_per(self.per, self.name)
        self.search  # noqa: B018  an impossible grid is refused here
        self.edges  # noqa: B018
        if not 0.0 <= self.floor < float("inf"):
            raise RecipeError(f"{self.floor} is no floor", where="ia_aq.floor", remedy="1e-4 is the usual value")

    @property
    def edges(self) -> tuple[float, ...]:
        return inner_edges(self.buckets, f"{self.name}.buckets")

    @property
    def search(self) -> Mse:
        return Mse(self.points, self.smallest)

    @property
    def label(self) -> str:
        return f"static {_shared(self)} by {self.name}"

    def observer(self, attention: fx.Node, value: fx.Node, where: str, bits: int, mask_id: int) -> AttendedObserver:
        """Looks at the values of an attention, and at who is looked at."""
        ratios = MaskRatios(mask_id, self.edges)
        return AttendedObserver(attention, where, _seen(self, self.search, value, bits), ratios, self.floor)

    def estimate(self, seen: Seen, bits: int) -> Range:
        return self.search.estimate(seen, static_format(self, bits))


Fixing = Static | IaAq


def static_format(scheme: Fixing, bits: int) -> ActFormat:
    return ActFormat(bits, None, scheme.symmetric, len(scheme.edges) + 1)


def shape_of(scheme: Fixing, value: fx.Node) -> tuple[int, int]:
    """(heads, channels) of the scales of a value [B, H, L, D]: 1 where all share one."""
    heads, width = int(value.meta["val"].shape[1]), int(value.meta["val"].shape[3])
    return (1 if scheme.per == "tensor" else heads, width if scheme.per == "channel" else 1)


def _seen(scheme: Fixing, ranges: Ranges, value: fx.Node, bits: int) -> Seen:
    heads, channels = shape_of(scheme, value)
    return ranges.seen(len(scheme.edges) + 1, heads * channels, static_format(scheme, bits))


def _shared(scheme: Fixing) -> str:
    ratios = f" and {len(scheme.edges) + 1} mask ratios" if scheme.edges else ""
    return f"per {scheme.per}{ratios}{'' if scheme.symmetric else ' asymmetric'}"


def _check_per(per: str, name: str) -> None:
    if per not in ("tensor", "head", "channel"):
        remedy = "Use tensor, head or channel"
        raise RecipeError(f"no fixed scales are per {per!r}", where=f"{name}.per", remedy=remedy)


def parts_of(attention: fx.Node) -> dict[str, fx.Node]:
    """Queries, keys and values of an attention."""
    return dict(zip(("queries", "keys", "values"), args_of(attention)[:3], strict=True))
