"""Ranges of static activations: what calibration sees of a value, and the estimators that choose a range from it.

    min_max      the smallest and the largest number
    ema          an exponential moving average of both over the states (Jacob et al. 2018, arXiv 1712.05877, section 3.1)
    percentile   the range that holds a share of the weight, the rest cut evenly from either end
    mse          the range that rounds with the smallest Σ c·(Q(x) - x)²
    kl           the range that keeps the histogram of |x| closest in KL divergence (TensorRT: Migacz 2017, "8-bit inference with
                 TensorRT"), see `kl_bins`

c are token weights. Numbers of tokens of weight 0 are not seen, by any estimator; a state of weight w moves the average of `ema`
as w equal states would. Percentile, MSE and KL read a histogram (`dlqc.histogram`): nothing grows with the number of states.

Ranges are kept for S sets (mask ratios) × G groups (of neighbouring features), and every range holds 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.histogram import Histogram

#: Bins of TensorRT's histogram.
LINEAR_BINS = 2048

# A range must shrink the error by more than this share to be chosen over a wider one.
_BETTER = 1e-9


class Seen:
    """What was seen of one value.

    Attributes:
        low, high: smallest and largest number by set and group, float64 [S, G]; 0 where nothing was seen.
        averages: moving averages of the smallest and largest number of a state, float64 [2, S, G].
        tokens: how many tokens of positive weight, int64 [S].
        histogram: of all numbers, weighted; None if no estimator asks for one.
    """

    def __init__(self, sets: int, groups: int, *, momentum: float | None = None, bins: int | None = None) -> None:
        self.low = torch.zeros(sets, groups, dtype=torch.float64)
        self.high = torch.zeros(sets, groups, dtype=torch.float64)
        self.averages = torch.zeros(2, sets, groups, dtype=torch.float64)
        self.tokens = torch.zeros(sets, dtype=torch.int64)
        self.histogram = None if bins is None else Histogram(sets * groups, bins)
        self._momentum = momentum

    def add(self, x: torch.Tensor, c: torch.Tensor, set_of: torch.Tensor) -> None:
        """States x [B, L, C] with token weights c [B, L], each in a set, int64 [B]; C is cut into G groups."""
        groups = self.low.shape[1]
        parts = x.detach().reshape(*x.shape[:2], groups, -1)
        live = c > 0
        shown = torch.where(live[:, :, None, None], parts, 0)
        lows, highs = shown.amin(dim=(1, 3)).clamp(max=0).double(), shown.amax(dim=(1, 3)).clamp(min=0).double()
        for b, s in enumerate(set_of.tolist()):
            count = int(live[b].sum())
            if count == 0:
                continue
            self._average(torch.stack((lows[b], highs[b])), s, float(c[b].mean()))
            self.low[s] = torch.minimum(self.low[s], lows[b])
            self.high[s] = torch.maximum(self.high[s], highs[b])
            self.tokens[s] += count
        if self.histogram is not None:
            of_token = (set_of[:, None].expand(c.shape)[live] * groups)[:, None] + torch.arange(groups)
            which = of_token[:, :, None].expand(-1, -1, parts.shape[3])
            self.histogram.add(parts[live].flatten(1), c[live], which.flatten(1))

    def _average(self, ends: torch.Tensor, s: int, weight: float) -> None:
        if self._momentum is None:
            return
        kept = 0.0 if self.tokens[s] == 0 else self._momentum**weight
        self.averages[:, s] = kept * self.averages[:, s] + (1 - kept) * ends


Range = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RangeEstimator:
    """Base of the range estimators: from what was seen to a range [low, high] for each set and group, float64 [S, G] each."""

    name: ClassVar[str]

    def seen(self, sets: int, groups: int, fmt: ActFormat) -> Seen:
        """An empty record that holds what this estimator reads."""
        return Seen(sets, groups, bins=4 << fmt.bits)

    def estimate(self, seen: Seen, fmt: ActFormat) -> Range:
        """The ranges; only those of sets with tokens mean something."""
        low, high = torch.zeros_like(seen.low), torch.zeros_like(seen.high)
        for s in range(low.shape[0]):
            for g in range(low.shape[1]):
                if seen.tokens[s] and bool(seen.low[s, g] < seen.high[s, g]):
                    low[s, g], high[s, g] = self.one(seen, s, g, fmt)
        return low, high

    def one(self, seen: Seen, s: int, g: int, fmt: ActFormat) -> tuple[float, float]:
        """The range of one set and group that holds more than zeros."""
        raise TypeError(f"{type(self).__name__} defines neither one() nor estimate()")


@dataclass(frozen=True)
class MinMax(RangeEstimator):
    """All that was seen."""

    name: ClassVar[str] = "min_max"

    def seen(self, sets: int, groups: int, fmt: ActFormat) -> Seen:
        return Seen(sets, groups)

    def estimate(self, seen: Seen, fmt: ActFormat) -> Range:
        return seen.low, seen.high


@dataclass(frozen=True)
class Ema(RangeEstimator):
    """r ← m·r + (1 - m)·(smallest, largest of the state), beginning with the first state; a state of weight w takes m^w.

    Options:
        momentum: m.
    """

    name: ClassVar[str] = "ema"
    momentum: float = 0.95

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise RecipeError(f"{self.momentum} is outside [0, 1)", where="ema.momentum", remedy="0.95 is usual")

    def seen(self, sets: int, groups: int, fmt: ActFormat) -> Seen:
        return Seen(sets, groups, momentum=self.momentum)

    def estimate(self, seen: Seen, fmt: ActFormat) -> Range:
        return seen.averages[0], seen.averages[1]


@dataclass(frozen=True)
class Percentile(RangeEstimator):
    """Symmetric: the smallest r with weight(|x| ≤ r) ≥ share. Asymmetric: (1 - share)/2 of the weight is cut from either end.

    Options:
        share: of the weight of all numbers that the range holds.
    """

    name: ClassVar[str] = "percentile"
    share: float = 0.9999

    def __post_init__(self) -> None:
        if not 0.5 <= self.share <= 1.0:
            raise RecipeError(f"{self.share} is outside [0.5, 1]", where="percentile.share", remedy="0.9999 is usual")

    def one(self, seen: Seen, s: int, g: int, fmt: ActFormat) -> tuple[float, float]:
        assert seen.histogram is not None
        low, high = float(seen.low[s, g]), float(seen.high[s, g])
        index, edges = s * seen.low.shape[1] + g, seen.histogram.edges
        if fmt.symmetric:
            reach = min(_quantile(edges, seen.histogram.magnitudes(index), self.share), max(-low, high))
            return max(low, -reach), min(high, reach)
        negative, positive = seen.histogram.mass[index]
        mass = torch.cat((negative.flip(0), positive))
        ends = torch.cat((-edges.flip(0), edges[1:]))
        cut = (1 - self.share) / 2
        return max(low, min(_quantile(ends, mass, cut), 0.0)), min(high, max(_quantile(ends, mass, 1 - cut), 0.0))


def _quantile(edges: torch.Tensor, mass: torch.Tensor, share: float) -> float:
    """Where the weight below reaches `share` of all, in bins [n] between edges [n + 1], spread evenly inside a bin."""
    below = mass.cumsum(0)
    wanted = share * float(below[-1])
    i = int(torch.searchsorted(below, wanted * (1 - 1e-12)).clamp(max=len(mass) - 1))
    inside = (wanted - float(below[i] - mass[i])) / max(float(mass[i]), 1e-300)
    return float(edges[i] + min(max(inside, 0.0), 1.0) * (edges[i + 1] - edges[i]))


@dataclass(frozen=True)
class Mse(RangeEstimator):
    """The range that rounds best: Σ c·(Q(x) - x)² over the histogram, at its smallest on a grid.

    Both ends shrink together, to α·low and α·high, for α on the grid; asymmetric ranges then move one end at a time on the grid
    of that end while the error falls. So the error is never above that of α = 1, nor of any common α.

    Options:
        points: of the grid, evenly from `smallest` to 1. smallest: the least α.
    """

    name: ClassVar[str] = "mse"
    points: int = 100
    smallest: float = 0.01

    def __post_init__(self) -> None:
        if self.points < 2:
            what = f"a grid of {self.points} leaves nothing to choose"
            raise RecipeError(what, where=f"{self.name}.points", remedy="100 is usual")
        if not 0.0 < self.smallest < 1.0:
            what = f"{self.smallest} is outside (0, 1)"
            raise RecipeError(what, where=f"{self.name}.smallest", remedy="0.05 reaches outliers of twenty times")

    @property
    def grid(self) -> torch.Tensor:
        """α from 1 down, float64 [points]."""
        return torch.linspace(1.0, self.smallest, self.points, dtype=torch.float64)

    def one(self, seen: Seen, s: int, g: int, fmt: ActFormat) -> tuple[float, float]:
        assert seen.histogram is not None
        x, mass = seen.histogram.signed(s * seen.low.shape[1] + g)
        full_low, full_high = seen.low[s, g], seen.high[s, g]
        low, high, error = _best(fmt, x, mass, self.grid * full_low, self.grid * full_high)
        while not fmt.symmetric:
            before = error
            low, high, error = _best(fmt, x, mass, low, torch.cat((high[None], self.grid * full_high)))
            low, high, error = _best(fmt, x, mass, torch.cat((low[None], self.grid * full_low)), high)
            if error >= before * (1 - _BETTER):
                break
        return float(low), float(high)


def _best(
    fmt: ActFormat, x: torch.Tensor, mass: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The candidate range with the smallest error, the first of equals, and its error."""
    low, high = low.expand(max(low.shape, high.shape)), high.expand(max(low.shape, high.shape))
    errors = rounding_error(fmt, x, mass, low, high)
    i = int((errors <= errors.min() * (1 + _BETTER)).int().argmax())
    return low[i], high[i], float(errors[i])


def rounding_error(
    fmt: ActFormat, x: torch.Tensor, mass: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Σ mass·(Q(x) - x)² for numbers x [n] under each of the ranges [low, high] [A]; float64 [A]."""
    found = []
    for part in range(0, low.shape[0], 16):
        some = slice(part, part + 16)
        scale, zero = fmt.parameters(low[some, None], high[some, None])
        error = fmt.fake_quantize_at(x.float(), scale, zero).double() - x
        found.append(error.square() @ mass)
    return torch.cat(found)


@dataclass(frozen=True)
class Kl(RangeEstimator):
    """The threshold T on |x| whose codes keep most of the distribution; the range is what was seen, cut to [-T, T].

    As many levels as codes of one sign: 2^(b-1), or 2^b where an asymmetric format meets numbers of one sign.
    """

    name: ClassVar[str] = "kl"

    def seen(self, sets: int, groups: int, fmt: ActFormat) -> Seen:
        return Seen(sets, groups, bins=LINEAR_BINS // 2)  # of the highest octave, as fine as the linear ones

    def one(self, seen: Seen, s: int, g: int, fmt: ActFormat) -> tuple[float, float]:
        assert seen.histogram is not None
        low, high = float(seen.low[s, g]), float(seen.high[s, g])
        reach = max(-low, high)
        linear = _linear(seen.histogram.edges, seen.histogram.magnitudes(s * seen.low.shape[1] + g), reach)
        one_sided = not fmt.symmetric and (low == 0 or high == 0)
        cut = kl_bins(linear, 1 << (fmt.bits - (not one_sided))) * reach / LINEAR_BINS
        return max(low, -cut), min(high, cut)


def _linear(edges: torch.Tensor, mass: torch.Tensor, reach: float) -> torch.Tensor:
    """The histogram in `LINEAR_BINS` equal bins on [0, reach], weight spread evenly inside its bins; float64."""
    below = torch.cat((torch.zeros(1, dtype=torch.float64), mass.cumsum(0)))
    at = torch.arange(LINEAR_BINS + 1, dtype=torch.float64) * reach / LINEAR_BINS
    i = torch.searchsorted(edges, at, right=True).clamp(1, len(mass)) - 1
    inside = ((at - edges[i]) / (edges[i + 1] - edges[i])).clamp(0, 1)
    cumulated = below[i] + inside * mass[i]
    cumulated[-1] = below[-1]  # `reach` itself belongs to the last bin
    return cumulated.diff().clamp(min=0)


def kl_bins(mass: torch.Tensor, levels: int) -> int:
    """TensorRT's calibration: how many of the bins, float64 [N] of |x|, to keep when `levels` codes are to stand for them.

    For each i from `levels` to N:  P = the first i bins, the weight of all others added to the last of them
                                    Q = the first i bins without that, merged into `levels` runs of equal length (bins
                                        ⌊j·i/levels⌋ …), each spread evenly over those of its bins that P has
                                    divergence = KL(P/ΣP || Q/ΣQ)
    The i of the smallest divergence is kept, the largest of equals. Where Q is empty and P is not, the divergence is infinite.
    """
    total, n = float(mass.sum()), mass.shape[0]
    kept = torch.arange(levels, n + 1)
    runs = kept[:, None] * torch.arange(levels + 1) // levels
    zero = torch.zeros(1, dtype=torch.float64)
    below = torch.cat((zero, mass.cumsum(0)))
    live = torch.cat((zero, (mass > 0).double().cumsum(0)))
    weights, counts = below[runs].diff(dim=1), live[runs].diff(dim=1)
    tail, last = total - below[kept], mass[kept - 1]
    tail = tail.where(tail > total * 1e-12, 0.0)
    counts[:, -1] += (last == 0) & (tail > 0)
    of_p = weights.clone()
    of_p[:, -1] += tail
    # Σ P·log P over bins: the running sum, with the last bin exchanged for the one that got the tail.
    entropy = torch.cat((zero, torch.xlogy(mass, mass).cumsum(0)))[kept]
    entropy = entropy - torch.xlogy(last, last) + torch.xlogy(last + tail, last + tail)
    spread = weights / counts.clamp(min=1) / below[kept, None].clamp(min=1e-300)
    logs = torch.where(of_p > 0, spread.log(), 0.0)
    divergence = entropy / total - torch.log(torch.tensor(total, dtype=torch.float64)) - (of_p / total * logs).sum(1)
    divergence = divergence.nan_to_num(nan=torch.inf)
    best = (divergence <= divergence.min() + 1e-12).nonzero().max()
    return int(kept[best])


Ranges = MinMax | Ema | Percentile | Mse | Kl


@dataclass(frozen=True)
class Fixed:
    """Fixed scales of one value.

    Attributes:
        scale: float32 [S, G]. zero: int8 [S, G], None if symmetric.
        low, high: the ranges, float64 [S, G].
        notes: what was borrowed, in words.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None
    low: torch.Tensor
    high: torch.Tensor
    notes: tuple[str, ...] = ()


def fixed_scales(seen: Seen, low: torch.Tensor, high: torch.Tensor, fmt: ActFormat, where: str) -> Fixed:
    """Scales of estimated ranges; what has no range of its own borrows one.

    A set of which no token was seen, or zeros alone, takes the ranges of the nearest set (of two, the one with more tokens). A
    group that is always zero takes the widest range of its set.

    Raises:
        CalibrationError: no set has anything to lend, or a range is not finite.
    """
    if not int(seen.tokens.sum()):
        raise CalibrationError(
            "no token of positive weight was seen, so there is no range",
            where=where,
            remedy="Draw more states, or weights that are not zero",
        )
    if not bool(torch.isfinite(torch.stack((low, high))).all()):
        raise CalibrationError("a range is not finite", where=where, remedy="Check the weights before this layer")
    width = high - low
    able = [s for s in range(low.shape[0]) if int(seen.tokens[s]) and float(width[s].max()) > 0]
    if not able:
        raise CalibrationError(
            f"the activations are zero on all {int(seen.tokens.sum())} calibration tokens, so there is no range",
            where=where,
            remedy="Use scales that are taken at run time (ranges=None), or leave the layer out",
        )
    low, high, notes = low.clone(), high.clone(), []
    for s in able:
        dead = width[s] <= 0
        if bool(dead.any()):
            low[s, dead], high[s, dead] = low[s].min(), high[s].max()
            notes.append(f"{where}: {int(dead.sum())} groups are always zero and take the widest range")
    for s in sorted(set(range(low.shape[0])) - set(able)):
        lender = min(able, key=lambda other: (abs(other - s), -int(seen.tokens[other])))
        low[s], high[s] = low[lender], high[lender]
        why = f"saw zeros alone at {where}" if int(seen.tokens[s]) else "saw no token"
        notes.append(f"mask-ratio bucket {s} {why} and takes the ranges of bucket {lender}")
    scale, zero = fmt.parameters(low, high)
    return Fixed(scale, None if zero is None else zero.to(torch.int8), low, high, tuple(notes))


def inner_edges(buckets: int | tuple[float, ...], where: str) -> tuple[float, ...]:
    """The mask ratios that separate buckets: given, or of equal width; () for one bucket.

    >>> inner_edges(4, "buckets"), inner_edges(1, "buckets"), inner_edges((0.1, 0.9), "buckets")
    ((0.25, 0.5, 0.75), (), (0.1, 0.9))
    """
    if not isinstance(buckets, tuple):
        if not 1 <= buckets <= 256:
            raise RecipeError(f"{buckets} mask-ratio buckets are not 1 to 256", where=where, remedy="4 is usual")
        return tuple(i / buckets for i in range(1, buckets))
    if not buckets or any(not 0.0 < e < 1.0 for e in buckets) or list(buckets) != sorted(set(buckets)):
        what = f"{buckets} are no ascending mask ratios between 0 and 1"
        raise RecipeError(
            what, where=where, remedy="Give a number of buckets, or the ratios between them: (0.25, 0.75)"
        )
    return buckets
