"""Keys and values between forwards: as they are, or packed in few bits.

    keys     a step for each channel and group of tokens, around the mean of the channel          k ≈ c + (code + ½ - 2^(b-1))·s
    values   a step for each token and head, around the middle of the token's range

This is storage. A step of decoding reads the keys and values of its own window as it has just computed them (`fresh`), and all
others as they were stored when they were last computed: at a refresh, or by an earlier window. Nothing is rounded in a forward
without a cache. (`quantize_attention` is the other thing: what the attention multiplies is rounded, in every forward, and kept
nowhere.)

Codes are bins of equal width with the value in the middle, so that |x - x̂| ≤ s/2 for every element: half = max|x - c| over the
group, s = 2·half/2^b rounded up to float16, c rounded to float16 before half is taken. A group of one number that float16 holds
is exact.

Keys have constants in them, from a bias of k_proj or the gain of a norm on keys, that are larger than what differs between
tokens. Per channel around the mean they cost nothing. A bias in front of the rotary embedding turns with the position, so it is
taken off as RoPE(bias), which is computed anew from the weights and not stored.

Each write is a segment of its own, [start, stop), with its own means and steps; what a later write covers is dropped or hidden.
So a refresh stores everything anew with new scales, and no number is ever rounded twice.

**The correction of scores.** Rounding makes a key k + e, and the mean of exp(q·e·t) over the errors is above 1: cached keys draw
attention away from fresh ones. With errors uniform in ±s_j/2, log E exp(t·q·e) = t²·Σ_j q_j²·s_j²/24 up to terms of fourth order,
which is taken off the score (arXiv 2605.26266; t is the scale of the scores). It matters at 2 bits.

Shapes: B batch, H key heads, S positions of a window, L all positions, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.formats.coded import parse, spell
from dlqc.formats.packing import pack, unpack

#: Widths that codes of keys and values may have, and the number that stands for "as they are".
WIDTHS, PLAIN = (2, 3, 4, 8), 16
#: Tokens whose codes fill whole 32-bit words at every width.
WORD = 32


@dataclass(frozen=True)
class KeyFormat:
    """How keys are stored.

    Attributes:
        bits: of a code, 2, 3, 4 or 8.
        masked_bits: from the first position on that was [MASK] when it was written; 16 leaves these as they are.
        group_size: tokens that share a step, a multiple of 32.
        symmetric: steps around the mean of the channel over the segment; else each group has a middle of its own.
        fresh: whether a step reads its own window as computed.
        corrected: whether scores are corrected for the error of keys.
    """

    name: ClassVar[str] = "keys"

    bits: int = 4
    masked_bits: int = 4
    group_size: int = WORD
    symmetric: bool = True
    fresh: bool = True
    corrected: bool = False

    def __post_init__(self) -> None:
        check_widths(self.bits, self.masked_bits)
        if self.group_size < 1 or self.group_size % WORD:
            what = f"the codes of {self.group_size} tokens do not fill whole 32-bit words"
            raise RecipeError(what, where="group_size", remedy="Use 32, 64 or 128")


@dataclass(frozen=True)
class ValueFormat:
    """How values are stored; `bits`, `masked_bits` and `fresh` as in `KeyFormat`."""

    name: ClassVar[str] = "values"

    bits: int = 4
    masked_bits: int = 4
    fresh: bool = True

    def __post_init__(self) -> None:
        check_widths(self.bits, self.masked_bits)


def check_widths(bits: int, masked_bits: int) -> None:
    """Refuse widths that no code has."""
    if bits not in WIDTHS:
        raise RecipeError(f"{bits} is not a width of stored keys or values", where="bits", remedy="Use 2, 3, 4 or 8")
    if masked_bits not in (*WIDTHS, PLAIN) or masked_bits < bits:
        what = f"masked positions in {masked_bits} bits, the others in {bits}"
        raise RecipeError(what, where="masked", remedy=f"Use 2, 3, 4, 8 or 16, and not less than {bits}")


Format = KeyFormat | ValueFormat


def encode(fmt: Format) -> str:
    """The text of a format, as it stands in a graph.

    >>> encode(ValueFormat())
    'values(bits=4,masked_bits=4,fresh=True)'
    """
    return spell(fmt)


def decode(spec: str) -> Format:
    """The format that `encode` spelled; a ContractError for any other text."""
    fmt: Format = parse(spec, {"keys": KeyFormat, "values": ValueFormat})
    return fmt


def misfit(fmt: Format, width: int) -> str | None:
    """None if heads of `width` channels can be stored, else the reason they cannot, one clause.

    >>> misfit(ValueFormat(3, 3), 16)
    '16 channels of 3 bits are 48 bits, no whole number of 32-bit words'
    """
    for bits in (fmt.bits, fmt.masked_bits) if isinstance(fmt, ValueFormat) else ():
        if bits != PLAIN and width * bits % 32:
            return f"{width} channels of {bits} bits are {width * bits} bits, no whole number of 32-bit words"
    return None


def stored_bits(fmt: Format, width: int) -> float:
    """Bits of one element of a revealed position in a long cache, scales included, means of channels left out.

    >>> stored_bits(KeyFormat(4, 4), 128), stored_bits(ValueFormat(4, 4), 128)
    (4.5, 4.25)
    """
    if isinstance(fmt, ValueFormat):
        return fmt.bits + 32 / width
    return fmt.bits + (16 if fmt.symmetric else 32) / fmt.group_size


@dataclass(frozen=True)
class Bins:
    """Numbers [R, N] as codes of equal bins in groups of N/G.

    Attributes:
        codes: uint8 [R, 4·⌈N·bits/32⌉], dense bit streams. count: N. bits: of a code.
        steps: float16 [R, G]. centers: float16 [R, G or 1].
    """

    codes: Tensor
    count: int
    bits: int
    steps: Tensor
    centers: Tensor

    @classmethod
    def of(cls, rows: Tensor, groups: int, bits: int, centers: Tensor | None = None) -> Bins:
        """Round rows [R, N], float32 or float64; without `centers`, the middle of each group is one."""
        grouped = rows.reshape(len(rows), groups, rows.shape[1] // groups)
        if centers is None:
            least, most = grouped.aminmax(dim=-1)
            centers = (least + (most - least) / 2).to(torch.float16)
        around = grouped - centers.to(rows.dtype).unsqueeze(-1)
        half = around.abs().amax(dim=-1)
        # Rounded up, with room for the smallest float16: a step must reach the end of its group.
        wide = half * 2.0 ** (1 - bits)
        steps = torch.where(half == 0, 0.0, wide * (1 + 2**-10) + 2**-24).to(torch.float16)
        if not bool((torch.isfinite(steps) & torch.isfinite(centers)).all()):
            what = f"keys or values reach {float(rows.abs().max()):.3g}, their scales do not fit float16"
            raise FeasibilityError(what, where="cache", remedy="Leave the cache as it is: drop quantize_kv")
        step = steps.to(rows.dtype).unsqueeze(-1)
        level = torch.where(step > 0, around / step, 0.0).floor() + (1 << (bits - 1))
        codes = level.clamp(0, (1 << bits) - 1).to(torch.uint8).flatten(1)
        return cls(pack(codes, bits), rows.shape[1], bits, steps, centers)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The numbers that are stood for, [R, N]."""
        codes = (
            unpack(self.codes, self.bits, self.count)
            .to(dtype)
            .reshape(*self.steps.shape, self.count // self.steps.shape[1])
        )
        level = codes + (0.5 - (1 << (self.bits - 1)))
        return (level * self.steps.to(dtype).unsqueeze(-1) + self.centers.to(dtype).unsqueeze(-1)).flatten(1)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.steps.nbytes + self.centers.nbytes


def quantize(
    numbers: Tensor, centers: Tensor | None, bits: int, group: int, keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and centers (see `Bins`) of numbers [B, H, S, D].

    Args:
        centers: float16 [B·H·D, 1] of keys; None: each group has its middle.
        group: tokens that share a step of a key; values have one group a row.
    """
    wide = _wide(numbers)
    if not keys:
        found = Bins.of(wide.flatten(0, 2), 1, bits)
    else:
        rows, group = wide.transpose(2, 3).flatten(0, 2), min(group, numbers.shape[2])
        # A last group that is not full repeats its last token, which changes no range.
        lacking = -rows.shape[1] % group
        rows = torch.cat([rows, rows[:, -1:].expand(-1, lacking)], dim=1) if lacking else rows
        found = Bins.of(rows, rows.shape[1] // group, bits, centers)
    return found.codes, found.steps, found.centers


def dequantize(
    codes: Tensor,
    steps: Tensor,
    centers: Tensor,
    heads: int,
    length: int,
    width: int,
    bits: int,
    group: int,
    keys: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers [B, heads, length, width] that the results of `quantize` stand for."""
    count = steps.shape[1] * min(group, length) if keys else width
    rows = Bins(codes, count, bits, steps, centers).numbers(dtype)
    if not keys:
        return rows.reshape(-1, heads, length, width)
    return rows.reshape(-1, heads, width, count)[..., :length].transpose(2, 3)


def _wide(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype is torch.float64 else numbers.float()


@dataclass(frozen=True)
class Coder:
    """How numbers become codes and numbers again: `quantize` and `dequantize` of this module, or what computes the same bits."""

    quantize: Callable[[Tensor, Tensor | None, int, int, bool], tuple[Tensor, Tensor, Tensor]] = quantize
    dequantize: Callable[..., Tensor] = dequantize


@dataclass(frozen=True)
class Segment:
    """What one write stored of positions [start, stop).

    Attributes:
        held: the codes, or the numbers [B, H, S, D] themselves where they stay as they are.
        group: tokens that share a step of a key.
    """

    start: int
    stop: int
    held: Bins | Tensor
    group: int = 1


@dataclass
class Stored:
    """Packed keys or values [B, H, L, D] of one attention.

    Attributes:
        kind: "keys" or "values", as the format says. size: (B, H, L, D). dtype: of the numbers that come in and go out.
        first_masked: positions from here on were [MASK] at the write that is under way.
        coder: of numbers in float32 and bfloat16; float64 has its own.
    """

    format: Format
    size: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    first_masked: int = 0
    segments: list[Segment] = field(default_factory=list)
    coder: Coder = Coder()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.size

    @property
    def kind(self) -> Literal["keys", "values"]:
        return "keys" if isinstance(self.format, KeyFormat) else "values"

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(segment.held.nbytes for segment in self.segments)

    def write(self, start: int, numbers: Tensor, offset: Tensor | None = None) -> None:
        """Store numbers [B, H, S, D] at positions start .. start + S; `offset` [1, H, L, D] is taken off first."""
        stop = start + numbers.shape[2]
        self.segments = [s for s in self.segments if not start <= s.start < s.stop <= stop]
        border = min(max(self.first_masked, start), stop)
        for begin, end, bits in ((start, border, self.format.bits), (border, stop, self.format.masked_bits)):
            if begin < end:
                part = numbers[:, :, begin - start : end - start]
                part = part if offset is None else part - offset[:, :, begin:end]
                self.segments.append(self._segment(begin, end, part, bits))

    def _segment(self, start: int, stop: int, part: Tensor, bits: int) -> Segment:
        if bits == PLAIN:
            return Segment(start, stop, part.clone())
        keys, group, centers = self.kind == "keys", 1, None
        if isinstance(self.format, KeyFormat):
            group = min(self.format.group_size, stop - start)
            if self.format.symmetric:
                channels = _wide(part).transpose(2, 3).flatten(0, 2)
                centers = channels.mean(dim=1, keepdim=True).to(torch.float16)
        quantize_ = quantize if part.dtype is torch.float64 else self.coder.quantize
        codes, steps, centers = quantize_(part, centers, bits, group, keys)
        count = steps.shape[1] * group if keys else part.shape[3]
        return Segment(start, stop, Bins(codes, count, bits, steps, centers), group)

    def read(self, total: int, offset: Tensor | None = None) -> Tensor:
        """The first `total` positions as they are stored, [B, H, total, D]; 0 where nothing was written."""
        found = self._empty(total)
        for segment in self.segments:
            stop = min(segment.stop, total)
            if segment.start < stop:
                numbers = self._numbers(segment)[:, :, : stop - segment.start]
                if offset is not None:
                    numbers = numbers + offset[:, :, segment.start : stop]
                found[:, :, segment.start : stop] = numbers
        return found

    def _empty(self, total: int) -> Tensor:
        batch, heads, _, width = self.size
        return torch.zeros(batch, heads, total, width, dtype=self.dtype, device=self.device)

    def _numbers(self, segment: Segment) -> Tensor:
        if isinstance(segment.held, Tensor):
            return segment.held
        (_, heads, _, width), held = self.size, segment.held
        length, keys = segment.stop - segment.start, self.kind == "keys"
        sizes = (heads, length, width, held.bits, segment.group, keys)
        if self.dtype is torch.float64:
            return dequantize(held.codes, held.steps, held.centers, *sizes, dtype=torch.float64)
        return self.coder.dequantize(held.codes, held.steps, held.centers, *sizes)

    def squared_steps(self, total: int, fresh: slice) -> Tensor:
        """s² of each key and channel as an attention reads it, [B, H, total, D]; 0 at positions that are not rounded."""
        (batch, heads, _, width), found = self.size, self._empty(total)
        for segment in self.segments:
            stop = min(segment.stop, total)
            if segment.start < stop:
                own: Tensor | float = 0.0
                if isinstance(segment.held, Bins):
                    steps = segment.held.steps.to(self.dtype).square().reshape(batch, heads, width, -1)
                    spread = steps.repeat_interleave(segment.group, dim=3)[..., : stop - segment.start]
                    own = spread.transpose(2, 3)
                found[:, :, segment.start : stop] = own
        found[:, :, fresh] = 0.0
        return found


def exchange(cache: Tensor | Stored, new: Tensor, start: int, total: int, offset: Tensor | None = None) -> Tensor:
    """Write a window's own numbers [B, H, S, D] and give all that it sees, [B, H, total, D]."""
    stop = start + new.shape[2]
    if isinstance(cache, Tensor):
        cache[:, :, start:stop] = new
        return cache[:, :, :total]
    cache.write(start, new, offset)
    if not cache.format.fresh:
        return cache.read(total, offset)
    if new.shape[2] == total:
        return new
    seen = cache.read(total, offset)
    seen[:, :, start:stop] = new
    return seen


def correction(cache: Tensor | Stored, q: Tensor, start: int, total: int, scale: float | None) -> Tensor | None:
    """What is added to the scores [B, Hq, S, total] of q for the rounding of keys; None where nothing is to be.

    -t²·Σ_j q_j²·s_j²/24, see the module's text.
    """
    if isinstance(cache, Tensor) or not isinstance(cache.format, KeyFormat) or not cache.format.corrected:
        return None
    if cache.format.fresh and q.shape[2] == total:
        return None
    fresh = slice(start, start + q.shape[2]) if cache.format.fresh else slice(0, 0)
    steps = cache.squared_steps(total, fresh).repeat_interleave(q.shape[1] // cache.size[1], dim=1)
    t = q.shape[-1] ** -0.5 if scale is None else scale
    return (q.square() @ steps.transpose(2, 3).to(q.dtype)) * (-t * t / 24)


@dataclass
class KeyValueCache:
    """Keys and values of all attentions of a model.

    Attributes:
        keys, values: for each attention, [B, H, L, D]: the numbers, or what is stored of them.
    """

    keys: Sequence[Tensor | Stored]
    values: Sequence[Tensor | Stored]

    @property
    def length(self) -> int:
        """L, the positions there is room for."""
        return int(self.keys[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are stored now."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def begin(self, masked: Tensor, start: int) -> None:
        """Tell what is written next: bool [B, S], True where the tokens of the window at `start` are still [MASK]."""
        stores = [part for part in (*self.keys, *self.values) if isinstance(part, Stored)]
        if not stores:
            return
        columns = masked.any(0).nonzero()
        first = start + (int(columns[0]) if columns.numel() else masked.shape[1])
        for part in stores:
            part.first_masked = first


def check_stored(spec: str, width: int, position: int) -> str | None:
    """None if a format may stand at argument `position` of an attention whose heads are `width` wide, else what is wrong."""
    try:
        fmt = decode(spec)
    except (ContractError, RecipeError) as error:
        return error.what
    expected = {1: KeyFormat, 2: ValueFormat}.get(position)
    return f"{fmt.name} are stored where others are read" if not isinstance(fmt, expected or ()) else misfit(fmt, width)
