"""Vector-quantized weights at 2 bits: eight weights share one 16-bit code of the E8P codebook (QuIP#, arXiv 2402.04396).

The codebook, from its definition. D̂8 is the set of vectors of 8 odd multiples of 1/2 with an even sum; E8 + 1/4 is
(D̂8 + 1/4) ∪ (D̂8 - 1/4). Taking absolute values, 227 patterns of D̂8 have ‖a‖² ≤ 10: with n₃ elements of 3/2 and n₅ of
5/2, ‖a‖² = 2 + 2·n₃ + 6·n₅, so n₃ + 3·n₅ ≤ 4. They are filled up to 256 with 29 of the 56 patterns of five 3/2 and
three 1/2 (‖a‖² = 12). An odd element changes its sum by an odd number when its sign flips, so the number of negative
elements of a vector in D̂8 is even or odd as n₃ is. A code, uint16, holds

    bits 0 to 7   the pattern of absolute values a
    bits 8 to 14  the signs of elements 0 to 6, 1 for negative; that of element 7 follows from the parity of n₃
    bit 15        the shift: 0 for +1/4, 1 for -1/4

and stands for the vector ±a ± 1/4, times a scale: 2^16 different points. All 56 candidates for the last 29 are alike up
to the order of coordinates; here they are taken by a rule (even sums of the positions of the three 1/2 first, each
half in lexicographic order), where the QuIP# code has a list. The choice does not show in the error, but codes of the
last 29 patterns, and the order of all patterns, are this file's own.

Nearest point. For y = x ∓ 1/4 the point of ±a nearest to y has the largest y·a - ‖a‖²/2. All orders of (n₃, n₅) are in
the codebook for ‖a‖² ≤ 10, so by the rearrangement inequality the best one puts the largest a on the largest |y| and
takes the signs of y; if their parity is wrong it flips the element that costs least, the one with the smallest |y|
(there a = 1/2: the loss is |y|). That leaves 7 numbers to compare for 227·128 points. The 29 are compared one by one,
but only where the best of their 56 relatives, found in the same way, would win. Arithmetic is float32: where two
points are equally near up to roundoff, either may be taken.

Scale: one for each row, or each group of neighbours along K. For Gaussian weights the best one is rms / GAUSSIAN_STD,
with a relative squared error of 0.0914 (best scalar quantizer of 2 bits: 0.1175; bound for any code of 2 bits: 0.0625). A
group of zeros has scale 0, since the codebook has no zero. `refits` improves scales on the weights at hand: with x̂ the
decoded points, s = (w·x̂) / (x̂·x̂) is the best scale for these codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import ClassVar

import torch

from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.formats.contract import Part
from dlqc.formats.integer import SCALE_DTYPES, _not_finite
from dlqc.formats.packing import pack, packed_shape, unpack

# Weights that share a code.
DIM = 8

# Codebook units that one standard deviation of Gaussian weights should have: the argument of the smallest error.
GAUSSIAN_STD = 1.04

# Vectors in flight: eight float32 of each stay in the second-level cache.
CHUNK = 1 << 15

# n₃ and n₅ of the patterns that come with all their permutations.
TYPES = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1))


@dataclass(frozen=True)
class LatticeFormat:
    """E8P weights.

    Attributes:
        group_size: input features that share a scale, a multiple of 8; None means one scale per output channel.
        scale_dtype: "bfloat16", "float16" or "float32", the type that scales are rounded to and stored in.
    """

    name: ClassVar[str] = "lattice"

    group_size: int | None = None
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size < DIM or self.group_size % DIM):
            what = f"a group of {self.group_size} input features does not hold whole vectors of {DIM}"
            raise RecipeError(what, where="group_size", remedy="Use 64 or 128, or None for one scale per channel")
        if self.scale_dtype not in SCALE_DTYPES:
            remedy = f"Use {', '.join(SCALE_DTYPES)}"
            raise RecipeError(f"scales cannot be stored as {self.scale_dtype!r}", where="scale_dtype", remedy=remedy)

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> LatticeFormat().label, LatticeFormat(128).label
        ('e8p channel', 'e8p g128')
        """
        return "e8p " + ("channel" if self.group_size is None else f"g{self.group_size}")

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause.

        >>> LatticeFormat().check(100)
        '100 input features do not divide by 8, the vectors of e8p'
        """
        if in_features <= 0 or in_features % DIM:
            return f"{in_features} input features do not divide by {DIM}, the vectors of e8p"
        if self.group_size is not None and in_features % self.group_size:
            return f"{in_features} input features do not divide by group {self.group_size}"
        return None

    def groups(self, in_features: int) -> int:
        """G, the number of groups in a row; a FeasibilityError if the weight cannot be stored."""
        reason = self.check(in_features)
        if reason is not None:
            raise FeasibilityError(reason, where="group_size", remedy="Use another group, or exclude it with skip=")
        return 1 if self.group_size is None else in_features // self.group_size

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K: codes and scales.

        The codebook is part of the format, not of the weight; a packed row is padded to whole 4-byte words (not counted).

        >>> LatticeFormat().bits_per_weight(4096, 4096), LatticeFormat(128).bits_per_weight(4096, 4096)
        (2.00390625, 2.125)
        """
        scales = self.groups(in_features) * 8 * SCALE_DTYPES[self.scale_dtype].itemsize
        return (2 * in_features + scales) / in_features

    def parameters(self, weight: torch.Tensor, *, std: float = GAUSSIAN_STD) -> torch.Tensor:
        """Scales [N, G] in `scale_dtype` that give each group of `weight` [N, K] the standard deviation `std`."""
        grouped = weight.to(torch.float32).reshape(weight.shape[0], self.groups(weight.shape[1]), -1)
        if not bool(torch.isfinite(grouped).all()):
            raise _not_finite(weight)
        # In units of the largest element, so that squares neither overflow nor vanish.
        largest = grouped.abs().amax(dim=-1)
        unit = torch.where(largest > 0, largest, 1.0)
        rms = (grouped / unit.unsqueeze(-1)).square().mean(dim=-1).sqrt() * unit
        return self.stored(rms / std)

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """Float32 scales as they are stored: in `scale_dtype`, and no smaller than a normal number unless 0."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        floor = 2.0**-24 if self.scale_dtype == "float16" else 2.0**-126
        rounded = torch.where(scales == 0, 0.0, scales.clamp(min=floor)).to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            what = f"a scale of {scales.max().item():.3g} does not fit {self.scale_dtype}"
            raise FeasibilityError(what, where="scale_dtype", remedy="Use 'bfloat16' or 'float32'")
        return rounded

    def encode(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes uint16 [N, K/8] of the points nearest to `weight` [N, K] over its scales [N, G]."""
        count, width = weight.shape
        groups = self.groups(width)
        codes = torch.empty(count, width // DIM, dtype=torch.uint16, device=weight.device)
        step = max(1, CHUNK * DIM // width)
        for rows in (slice(start, start + step) for start in range(0, count, step)):
            part = weight[rows].to(torch.float32).reshape(-1, groups, width // groups)
            scaled = part / divisors(scales[rows]).unsqueeze(-1)
            if not bool(torch.isfinite(scaled.sum())):
                raise _not_finite(weight)
            codes[rows] = nearest(scaled.reshape(-1, DIM).T.contiguous()).reshape(-1, width // DIM).to(torch.uint16)
        return codes

    def quantize(self, weight: torch.Tensor, *, refits: int = 1) -> LatticeWeight:
        """Round each vector of `weight` [N, K] to the nearest point.

        Args:
            refits: times the scales are set to the best ones for the codes and the codes chosen anew. Neither step raises
                the squared error: in it, a parabola of the scale, the stored scale nearest to the best one is the lowest.
        """
        scales = self.parameters(weight)
        codes = self.encode(weight, scales)
        grouped = weight.to(torch.float32).reshape(*scales.shape, -1)
        for _ in range(refits):
            points = decode(codes).reshape(grouped.shape)
            gain = (grouped / divisors(scales).unsqueeze(-1) * points).sum(dim=-1) / points.square().sum(dim=-1)
            scales = self.stored(torch.where(gain > 0, gain, 1.0) * scales.float())
            codes = self.encode(weight, scales)
        return LatticeWeight(codes, scales, self)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        scales = ((out_features, self.groups(in_features)), SCALE_DTYPES[self.scale_dtype])
        return {"codes": (packed_shape(out_features, in_features // 4, 8), torch.uint8), "scales": scales}

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> LatticeWeight:
        """The weight that `LatticeWeight.pack` was called on, K = `in_features`."""
        self.groups(in_features)
        codes = unpack(parts["codes"], 8, in_features // 4).view(torch.uint16)
        return LatticeWeight(codes, parts["scales"], self)


@dataclass(frozen=True, eq=False)
class LatticeWeight:
    """An E8P weight [N, K].

    Attributes:
        codes: uint16 [N, K/8]; see the module docstring for the bits.
        scales: [N, G] in `format.scale_dtype`.
        format: the number format.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: LatticeFormat

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint16:
            what = f"codes are {tuple(self.codes.shape)} {self.codes.dtype}, not [N, K/8] torch.uint16"
            raise ContractError(what, where="codes")
        shape = (self.codes.shape[0], self.format.groups(DIM * self.codes.shape[1]))
        if self.scales.shape != shape or self.scales.dtype != SCALE_DTYPES[self.format.scale_dtype]:
            found = f"{tuple(self.scales.shape)} {self.scales.dtype}"
            raise ContractError(f"scales are {found}, not {shape} torch.{self.format.scale_dtype}", where="scales")

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K]: points of the codebook times scales."""
        points = decode(self.codes).reshape(*self.scales.shape, -1)
        return points.mul_(self.scales.float().unsqueeze(-1)).reshape(self.codes.shape[0], -1)

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "codes" uint8 [N, K/4 rounded up to 4], two bytes a code, the low one first; "scales"."""
        return {"codes": pack(self.codes.contiguous().view(torch.uint8), 8), "scales": self.scales}


@cache
def patterns() -> torch.Tensor:
    """The 256 patterns of absolute values, float32 [256, 8]. Shared: do not write to it."""
    found = []
    for threes, fives in TYPES:
        for five in combinations(range(DIM), fives):
            for three in combinations([i for i in range(DIM) if i not in five], threes):
                found.append([2.5 if i in five else 1.5 if i in three else 0.5 for i in range(DIM)])
    triples = sorted(combinations(range(DIM), 3), key=lambda triple: (sum(triple) % 2, triple))
    found += [[0.5 if i in triple else 1.5 for i in range(DIM)] for triple in triples[: 256 - len(found)]]
    return torch.tensor(found)


@cache
def codebook() -> torch.Tensor:
    """The points of all codes, float32 [65536, 8], 2 MiB. Shared: do not write to it."""
    codes = torch.arange(1 << 16)
    sizes = patterns()[codes & 255]
    negative = (codes.unsqueeze(1) >> torch.arange(8, 15)) & 1
    last = (negative.sum(dim=1) + (sizes == 1.5).sum(dim=1)) & 1
    signs = 1 - 2 * torch.cat([negative, last.unsqueeze(1)], dim=1)
    return sizes * signs + 0.25 - 0.5 * (codes >> 15).unsqueeze(1)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Points of the codebook, float32 [N, K], for codes uint16 [N, K/8]."""
    index = codes.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return codebook().to(codes.device).index_select(0, index.flatten()).reshape(codes.shape[0], -1)


def divisors(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32 with 1 in place of 0."""
    exact = scales.to(torch.float32)
    return torch.where(exact == 0, 1.0, exact)


def code_of(points: torch.Tensor) -> torch.Tensor:
    """Codes int32 [M] of points of the lattice, float32 [M, 8]; -1 for those that are not in the codebook.

    >>> codes = torch.arange(1 << 16)
    >>> bool((code_of(codebook()) == codes).all()), int(code_of(torch.full((1, 8), 4.25)))
    (True, -1)
    """
    shifted = ((points[:, 0] - 0.25) % 1) != 0.5
    centre = points - torch.where(shifted, -0.25, 0.25).unsqueeze(1)
    size = centre.abs()
    weights = 1 << torch.arange(DIM, device=points.device)
    threes, fives = ((size == 1.5) * weights).sum(dim=1), ((size == 2.5) * weights).sum(dim=1)
    pattern = _pattern_of_masks().to(points.device)[threes + 256 * fives]
    known = (size <= 2.5).all(dim=1) & ((pattern > 0) | (threes + fives == 0))
    signs = ((centre[:, :-1] < 0) * weights[:-1]).sum(dim=1)
    return torch.where(known, pattern + 256 * signs + 32768 * shifted, -1).to(torch.int32)


def nearest(vectors: torch.Tensor) -> torch.Tensor:
    """Codes int32 [M] of the codebook points nearest to `vectors`, float32 [8, M], one vector a column."""
    score, code = _nearest_in_d8(vectors - 0.25)
    other, shifted = _nearest_in_d8(vectors + 0.25)
    # ‖x - (c ± 1/4)‖² = ‖x‖² + 1/2 - 2·(score ± Σx/4), score = y·c - ‖c‖²/2 with y = x ∓ 1/4.
    return torch.where(other - score > vectors.sum(dim=0) / 2, shifted + (1 << 15), code)


@cache
def _pattern_of_masks() -> torch.Tensor:
    """The pattern with 3/2 at the bits of m and 5/2 at the bits of n, int32 [65536] at m + 256·n; 0 if there is none."""
    weights = 1 << torch.arange(DIM)
    keys = ((patterns() == 1.5) * weights).sum(dim=1) + 256 * ((patterns() == 2.5) * weights).sum(dim=1)
    table = torch.zeros(1 << 16, dtype=torch.int32)
    table[keys] = torch.arange(256, dtype=torch.int32)
    return table


def _nearest_in_d8(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The point c = ±a nearest to each column of `y` [8, M]: y·c - ‖c‖²/2, float32 [M]; bits 0 to 14 of its code."""
    size = y.abs()
    negative = y < 0
    odd = torch.zeros_like(negative[0])
    for row in negative:
        odd = odd ^ row
    rank = _rank(size)
    top = [(size * (rank == place)).sum(dim=0) for place in range(5)]
    least = size.amin(dim=0)
    half = size.sum(dim=0) / 2
    # y·c of the pattern of eight 1/2, where the number of negative elements must be even, or odd.
    even_base, odd_base = half - odd * least, half - ~odd * least
    best, kind = even_base - 1, torch.zeros_like(rank[0])
    held = torch.zeros_like(half)
    for threes in range(1, 5):
        held = held + top[threes - 1]
        tried = (odd_base if threes % 2 else even_base) + (held - (1 + threes))
        kind = torch.where(tried > best, threes, kind)
        best = torch.maximum(tried, best)
    for fives, tried in ((5, even_base + (2 * top[0] - 4)), (6, odd_base + (2 * top[0] + top[1] - 5))):
        kind = torch.where(tried > best, fives, kind)
        best = torch.maximum(tried, best)

    count3 = torch.tensor([t for t, _ in TYPES], dtype=rank.dtype, device=y.device)[kind.int()]
    count5 = torch.tensor([f for _, f in TYPES], dtype=rank.dtype, device=y.device)[kind.int()]
    flip = odd ^ (count3 % 2 == 1)
    signs = negative ^ (flip & (rank == DIM - 1))
    code = _pattern_of_masks().to(y.device)[
        _bits((rank >= count5) & (rank < count5 + count3)) | _bits(rank < count5) << 8
    ]
    code = code | _bits(signs[:-1]) << 8

    # The best of all 56 patterns of five 3/2; those of them in the codebook reach at most this.
    hopeful = torch.nonzero(odd_base + held + top[4] - 6 > best).squeeze(1)
    if hopeful.numel():
        score, found = _nearest_of_the_last(size[:, hopeful], negative[:, hopeful], odd[hopeful])
        better = score > best[hopeful]
        best[hopeful] = torch.where(better, score, best[hopeful])
        code[hopeful] = torch.where(better, found, code[hopeful])
    return best, code


def _nearest_of_the_last(
    size: torch.Tensor, negative: torch.Tensor, odd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_nearest_in_d8`, among the patterns that come without all their permutations (‖a‖² = 12)."""
    first = int((patterns().square().sum(dim=1) < 11).sum())
    last = patterns()[first:].to(size.device)
    score = last @ size - 6
    cost = last[:, :1] * size[:1]
    for element in range(1, DIM):
        cost = torch.minimum(cost, last[:, element : element + 1] * size[element : element + 1])
    score, pattern = (score - 2 * cost * ~odd).max(dim=0)
    place = (last[pattern].T * size).argmin(dim=0)
    elements = torch.arange(DIM, device=size.device).unsqueeze(1)
    signs = negative ^ (~odd & (elements == place))
    return score, (pattern + first).to(torch.int32) | _bits(signs[:-1]) << 8


def _rank(size: torch.Tensor) -> torch.Tensor:
    """How many elements of its column come before each element of `size` [8, M] by falling size; int8. Ties: the last."""
    rank = torch.zeros_like(size, dtype=torch.int8)
    for left in range(DIM):
        for right in range(left + 1, DIM):
            before = size[left] > size[right]
            rank[right] += before
            rank[left] += ~before
    return rank


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """Boolean [n, M] as one int32 [M], row 0 the lowest bit."""
    word = rows[0].to(torch.int32)
    for place in range(1, len(rows)):
        word = word | rows[place].to(torch.int32) << place
    return word
