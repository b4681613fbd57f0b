"""Sums of sign planes: Ŵ = Σ_k (r_k c_kᵀ) ∘ B_k, B_k in {-1, +1}, for each group of columns (Quant-dLLM, arXiv 2510.03274).

Shapes: W is [N, K_in] (N output, K_in input features); a group is `group_size` = g neighbouring input features in all
rows. A group of order K has K planes; plane k has a row scale for each row of W, r_k [N], and a column scale for each
of its columns, c_k [g]. Orders are 1, 2 or 3 and may differ from group to group. The planes of all groups are numbered
in one sequence, group after group: P = Σ K over the groups, so row scales are [N, P] and column scales [P, g].

A weight's code is K bits, bit k set where B_k is +1. Each element so has 2^K levels ±s_1 ±s_2 …, s_k = r_k·c_k: a
symmetric grid without zero point whose spacing follows the rows and the columns. Scales may have either sign: -s with
-B is the same plane.

Stored bits per weight, with scales of b bits and a 2-bit tag for the order of each group:

    mean over groups of K·(1 + b/g + b/N)  +  2/(N·g)        2.258 for K = 2, b = 16, g = 128, N = 4096

Arithmetic is float32 (or float64 where a tile is). Tiles are kept transposed, [g, N]: a column of W is contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.contract import Part
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack, packed_shape, unpack

MAX_ORDER = 3
TAG_BITS = 2
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Elements of W that one step of dequantize, pack or unpack handles: working memory is a few times this many words.
CHUNK = 1 << 20


@dataclass(frozen=True)
class PlanesFormat:
    """A weight format of sign planes.

    Attributes:
        order: planes of a group where none are given, 1, 2 or 3; it is the mean that mixed orders keep.
        group_size: input features of a group; None means one group of all columns.
        scale_dtype: "bfloat16" or "float16", the type that both kinds of scales are rounded to and stored in.
    """

    name: ClassVar[str] = "planes"

    order: int = 2
    group_size: int | None = 128
    scale_dtype: str = "bfloat16"

    max_order: ClassVar[int] = MAX_ORDER

    def __post_init__(self) -> None:
        if self.order not in range(1, MAX_ORDER + 1):
            raise RecipeError(f"{self.order!r} planes are no order", where="order", remedy="Use 1, 2 or 3")
        if self.group_size is not None and self.group_size < 1:
            what = f"a group of {self.group_size} input features is impossible"
            raise RecipeError(what, where="group_size", remedy="Use 64 or 128, or None for one group of all columns")
        if self.scale_dtype not in SCALE_DTYPES:
            what = f"scales of planes cannot be stored as {self.scale_dtype!r}"
            raise RecipeError(what, where="scale_dtype", remedy=f"Use {' or '.join(SCALE_DTYPES)}")

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> PlanesFormat().label, PlanesFormat(3, None).label
        ('planes2 g128', 'planes3 matrix')
        """
        return f"planes{self.order} " + ("matrix" if self.group_size is None else f"g{self.group_size}")

    @property
    def dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_dtype]

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause.

        >>> PlanesFormat(group_size=96).check(11008)
        '11008 input features do not divide by group 96'
        """
        size = self.group_size or in_features
        if in_features > 0 and in_features % size == 0:
            return None
        return f"{in_features} input features do not divide by group {self.group_size or 1}"

    def groups(self, in_features: int) -> int:
        """G, the number of groups; a FeasibilityError if the group does not divide."""
        reason = self.check(in_features)
        if reason is not None:
            sizes = IntFormat.suggest_groups(in_features)
            remedy = f"Use {', '.join(map(str, sizes))}, or" if sizes else "Use"
            raise FeasibilityError(reason, where="group_size", remedy=f"{remedy} None for one group of all columns")
        return 1 if self.group_size is None else in_features // self.group_size

    def orders(self, in_features: int, orders: Sequence[int] | None = None) -> tuple[int, ...]:
        """The order of each group: `orders` if they fit this width, else `order` everywhere."""
        groups = self.groups(in_features)
        if orders is None:
            return (self.order,) * groups
        found = tuple(int(order) for order in orders)
        if len(found) != groups or not all(1 <= order <= MAX_ORDER for order in found):
            what = f"orders {_brief(found)} are not {groups} numbers from 1 to {MAX_ORDER}, one for each group"
            raise ContractError(what, where="orders", remedy="Take them from dlqc.rounding.abmp, for this weight")
        return found

    def bits_per_weight(self, out_features: int, in_features: int, orders: Sequence[int] | None = None) -> float:
        """Stored bits of a [N, K_in] weight over N·K_in: planes, all scales, and the order tags.

        Not counted: the zero bits that pad a packed row, and the tags, to whole 4-byte words.

        >>> round(PlanesFormat().bits_per_weight(4096, 4096), 4)
        2.2578
        """
        found = self.orders(in_features, orders)
        size = in_features // len(found)
        per_plane = out_features * size + 8 * self.dtype.itemsize * (out_features + size)
        return (sum(found) * per_plane + TAG_BITS * len(found)) / (out_features * in_features)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K_in] weight whose groups have `order` planes on average."""
        groups = self.groups(in_features)
        size, planes = in_features // groups, groups * self.order
        return {
            "bits": (packed_shape(out_features, planes * size, 1), torch.uint8),
            "row_scales": ((out_features, planes), self.dtype),
            "column_scales": ((planes, size), self.dtype),
            "tags": (packed_shape(1, groups, TAG_BITS)[1:], torch.uint8),
        }

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> PlanesWeight:
        """The weight that `PlanesWeight.pack` was called on, K_in = `in_features`."""
        tags = unpack(parts["tags"].unsqueeze(0), TAG_BITS, self.groups(in_features))
        orders = self.orders(in_features, tuple(int(tag) + 1 for tag in tags[0]))
        bits, rows, columns = parts["bits"], parts["row_scales"], parts["column_scales"]
        count, size = bits.shape[0], in_features // len(orders)
        _check_scales(rows, columns, count, in_features, orders, self)
        codes = torch.zeros(count, in_features, dtype=torch.uint8, device=bits.device)
        for chunk in _row_chunks(count, sum(orders) * size):
            planes = unpack(bits[chunk], 1, sum(orders) * size).reshape(-1, sum(orders), size)
            part = codes[chunk].reshape(-1, len(orders), size)  # a view: what is written to it lands in `codes`
            plane = 0
            for group, order in enumerate(orders):
                for bit in range(order):
                    part[:, group] |= planes[:, plane] << bit
                    plane += 1
        return PlanesWeight(codes, rows, columns, orders, self)

    def quantize(self, weight: torch.Tensor, *, orders: Sequence[int] | None = None, sweeps: int = 10) -> PlanesWeight:
        """Round `weight` [N, K_in] to planes of least squared error, group by group, with no statistics."""
        tiles, size, unit = [], weight.shape[1] // self.groups(weight.shape[1]), power_of_two(finite_peak(weight))
        for group, order in enumerate(self.orders(weight.shape[1], orders)):
            target = weight[:, group * size : (group + 1) * size].float().T / unit
            tile = fit(target, order, sweeps=sweeps)
            tile.store(self.dtype)
            tile.choose(target)
            tiles.append(tile)
        return assemble(tiles, self, unit)


@dataclass(frozen=True, eq=False)
class PlanesWeight:
    """A weight [N, K_in] in planes, not packed.

    Attributes:
        codes: uint8 [N, K_in]; bit k is set where plane k is +1, bits from the group's order on are 0.
        row_scales: [N, P] in `format.scale_dtype`, P the number of planes of all groups.
        column_scales: [P, g] likewise.
        orders: the planes of each group.
        format: the number format.
    """

    codes: torch.Tensor
    row_scales: torch.Tensor
    column_scales: torch.Tensor
    orders: tuple[int, ...]
    format: PlanesFormat

    def __post_init__(self) -> None:
        count, width = self.codes.shape
        self.format.orders(width, self.orders)
        if self.codes.dtype != torch.uint8:
            raise ContractError(f"codes are {self.codes.dtype}, not torch.uint8", where="codes")
        _check_scales(self.row_scales, self.column_scales, count, width, self.orders, self.format)
        size = width // len(self.orders)
        for group, order in enumerate(self.orders):
            top = int(self.codes[:, group * size : (group + 1) * size].max()) if count else 0
            if top >> order:
                raise ContractError(f"code {top} in group {group} needs more than {order} planes", where="codes")

    @property
    def bits_per_weight(self) -> float:
        count, width = self.codes.shape
        return self.format.bits_per_weight(count, width, self.orders)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K_in] that the planes stand for."""
        count, width = self.codes.shape
        size = width // len(self.orders)
        values = torch.zeros(count, width, dtype=torch.float32, device=self.codes.device)
        columns = self.column_scales.float()
        for rows in _row_chunks(count, size):
            scales = self.row_scales[rows].float()
            plane = 0
            for group, order in enumerate(self.orders):
                place = slice(group * size, (group + 1) * size)
                for bit in range(order):
                    signs = (self.codes[rows, place] >> bit & 1).float().mul_(2).sub_(1)
                    values[rows, place] += signs.mul_(scales[:, plane : plane + 1]).mul_(columns[plane])
                    plane += 1
        return values

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "bits", "row_scales", "column_scales", "tags".

        A row of "bits" is its planes one after the other, g bits each, in one dense little-endian stream, uint8 [N,
        4·ceil(P·g/32)]: bit p·g + j is plane p at column j of its group, 1 for +1. Where g divides by 8, as 128 does, each
        plane of a group is g/8 whole bytes. "tags" is uint8, order - 1 of each group in 2 bits, padded to 4-byte words.
        """
        count, width = self.codes.shape
        size = width // len(self.orders)
        parts = []
        for rows in _row_chunks(count, sum(self.orders) * size):
            part = self.codes[rows].reshape(-1, len(self.orders), size)
            planes = [part[:, group] >> bit & 1 for group, order in enumerate(self.orders) for bit in range(order)]
            parts.append(pack(torch.cat(planes, dim=1), 1))
        tags = pack(torch.tensor([self.orders], dtype=torch.uint8) - 1, TAG_BITS)
        bits = torch.cat(parts) if parts else pack(self.codes, 1)
        scales = {"row_scales": self.row_scales, "column_scales": self.column_scales}
        return {"bits": bits, **scales, "tags": tags.flatten()}


@dataclass(eq=False)
class Tile:
    """One group of columns while it is fitted, transposed.

    Attributes:
        signs: ±1 in floating point, [K, g, N].
        rows: r, [K, N].
        columns: c, [K, g].
    """

    signs: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def plane(self, k: int) -> torch.Tensor:
        """(r_k c_kᵀ) ∘ B_k, transposed: [g, N]."""
        return self.signs[k] * self.columns[k].unsqueeze(1) * self.rows[k]

    def value(self) -> torch.Tensor:
        """Ŵ of the group, transposed: [g, N]."""
        total = self.plane(0)
        for k in range(1, len(self.rows)):
            total += self.plane(k)
        return total

    def choose(self, target: torch.Tensor) -> None:
        """Set all signs jointly: each element of `target` [g, N] takes the nearest of its 2^K levels."""
        for start in range(0, target.shape[0], 16):  # 16 columns: the few temporaries stay in the cache
            place = slice(start, start + 16)
            levels = self.columns[:, place].unsqueeze(2) * self.rows.unsqueeze(1)
            self.signs[:, place] = nearest_signs(target[place], levels)

    def store(self, dtype: torch.dtype) -> None:
        """Round the scales to what is stored. A power of two moves to the rows, so that columns are about 1."""
        for k in range(len(self.rows)):
            unit = power_of_two(float(self.columns[k].square().mean().sqrt()))
            self.columns[k] = (self.columns[k] / unit).to(dtype)
            self.rows[k] = (self.rows[k] * unit).to(dtype)


def nearest_signs(target: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The signs b in {-1, +1} that minimise |target - Σ_k b_k·levels_k|, jointly; of ties, one of them.

    One plane: b = sign(t·s). Two: the error for b_1 is ||t - b_1·s_1| - |s_2||, and the difference of the squares for
    b_1 = +1 and -1 is 4·sign(t·s_1)·min(|t|, |s_1|)·(|s_2| - max(|t|, |s_1|)), whose sign is that of -b_1. Three: both
    signs of the third are tried.

    Args:
        target: any shape. levels: [K, *target.shape].

    Returns:
        [K, *target.shape] in the dtype of `target`.
    """
    if len(levels) == 1:
        return _sign(target * levels)
    signs = torch.empty_like(levels)
    if len(levels) == 2:
        first, second = levels
        signs[0] = _sign(torch.maximum(target.abs(), first.abs()).sub_(second.abs()).mul_(first).mul_(target))
        signs[1] = _sign(torch.addcmul(target, signs[0], first, value=-1).mul_(second))
        return signs
    last = levels[2]
    up, down = (nearest_signs(target - last * sign, levels[:2]) for sign in (1, -1))
    error = [(target - last * sign - (pair * levels[:2]).sum(dim=0)).abs_() for sign, pair in ((1, up), (-1, down))]
    better = error[0] <= error[1]
    signs[:2] = torch.where(better, up, down)
    signs[2] = torch.where(better, 1.0, -1.0)
    return signs


def fit(
    target: torch.Tensor,
    order: int,
    *,
    importance: torch.Tensor | None = None,
    sweeps: int = 10,
    joint: bool = True,
) -> Tile:
    """Planes of small weighted squared error for a transposed group `target` [g, N]: greedy start, then RSR sweeps.

    The start takes the planes one after the other from what the earlier ones left over, B = sign(R), c_j = mean_i |R_ij|,
    r_i = mean_j |R_ij|/c_j. A sweep then sets, plane by plane with the others held, r, c (Quant-dLLM's Row-Scale
    Refinement, without its ε: a scale whose denominator is zero is left as it is)

        r_i = Σ_j L_ij R_ij B_ij c_j / Σ_j L_ij c_j²,      c_j = Σ_i L_ij R_ij B_ij r_i / Σ_i L_ij r_i²,

    and the signs. Each is an exact minimiser, so no sweep raises Σ L·(target - Ŵ)².

    Args:
        importance: L ≥ 0, [g, N]; None weighs all elements alike.
        joint: signs by comparing all 2^K patterns after each sweep; otherwise plane by plane, given the others.
    """
    tile = start(target, order)
    for _ in range(sweeps):
        sweep(tile, target, importance, joint=joint)
    return tile


def start(target: torch.Tensor, order: int) -> Tile:
    """Greedy residual planes, as `fit` describes."""
    size, count = target.shape
    tile = Tile(target.new_empty(order, size, count), target.new_empty(order, count), target.new_empty(order, size))
    left = target.clone()
    for k in range(order):
        tile.signs[k] = _sign(left)
        mass = left.abs()
        tile.columns[k] = mass.mean(dim=1)
        live = tile.columns[k] > 0
        inverse = torch.where(live, tile.columns[k].reciprocal(), 0.0)
        tile.rows[k] = (inverse @ mass) / max(int(live.sum()), 1)
        left -= tile.plane(k)
    return tile


def sweep(tile: Tile, target: torch.Tensor, importance: torch.Tensor | None, *, joint: bool) -> None:
    """One RSR sweep on `tile` in place."""
    left = target - tile.value()
    for k in range(len(tile.rows)):
        left += tile.plane(k)
        signed = left * tile.signs[k]
        if importance is not None:
            signed *= importance
        squares = tile.columns[k].square()
        below = squares.sum() if importance is None else squares @ importance
        tile.rows[k] = torch.where(below > 0, (tile.columns[k] @ signed) / below, tile.rows[k])
        squares = tile.rows[k].square()
        below = squares.sum() if importance is None else importance @ squares
        tile.columns[k] = torch.where(below > 0, (signed @ tile.rows[k]) / below, tile.columns[k])
        if not joint:
            tile.signs[k] = _sign(left * tile.columns[k].unsqueeze(1) * tile.rows[k])
        left -= tile.plane(k)
    if joint:
        tile.choose(target)


def assemble(tiles: Sequence[Tile], fmt: PlanesFormat, unit: float = 1.0) -> PlanesWeight:
    """The weight whose groups are `tiles`, times `unit`."""
    codes = []
    for tile in tiles:
        code = torch.zeros(tile.signs.shape[1:], dtype=torch.uint8, device=tile.signs.device)
        for k, signs in enumerate(tile.signs):
            code |= (signs > 0).to(torch.uint8) << k
        codes.append(code.T)
    exact = torch.cat([tile.rows for tile in tiles]).T * unit
    rows = exact.to(fmt.dtype).contiguous()
    if not bool(torch.isfinite(rows).all()):
        what = f"row scales reach {exact.abs().max().item():.3g}: they do not fit {fmt.scale_dtype}"
        raise FeasibilityError(what, where="scale_dtype", remedy="Use 'bfloat16'")
    columns = torch.cat([tile.columns for tile in tiles]).to(fmt.dtype)
    return PlanesWeight(
        torch.cat(codes, dim=1).contiguous(), rows, columns, tuple(len(tile.rows) for tile in tiles), fmt
    )


def finite_peak(weight: torch.Tensor) -> float:
    """The largest |w|; a ModelError if a weight is not finite as float32."""
    peak = float(weight.float().abs().max()) if weight.numel() else 0.0
    if peak < float("inf"):
        return peak
    count = int((~torch.isfinite(weight.float())).sum())
    what = f"{count} of {weight.numel()} weights are not finite as float32"
    raise ModelError(what, remedy="Check the checkpoint, and the transforms folded into this weight")


def power_of_two(size: float) -> float:
    """A power of two near `size`, 1 for zero: dividing by it changes no digit of a normal number.

    >>> power_of_two(0.3), power_of_two(5.0), power_of_two(0.0)
    (0.25, 4.0, 1.0)
    """
    return 2.0 ** max(-126, min(126, torch.tensor(size).double().log2().floor().int().item())) if size > 0 else 1.0


def _sign(values: torch.Tensor) -> torch.Tensor:
    """±1, +1 for zero."""
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


def _row_chunks(count: int, width: int) -> list[slice]:
    step = max(1, CHUNK // max(width, 1))
    return [slice(begin, begin + step) for begin in range(0, count, step)]


def _brief(orders: tuple[int, ...]) -> str:
    return str(orders) if len(orders) <= 8 else f"({', '.join(map(str, orders[:8]))}, …) of length {len(orders)}"


def _check_scales(
    rows: torch.Tensor, columns: torch.Tensor, count: int, width: int, orders: Sequence[int], fmt: PlanesFormat
) -> None:
    shapes = {
        "row_scales": (rows, (count, sum(orders))),
        "column_scales": (columns, (sum(orders), width // len(orders))),
    }
    for name, (scales, shape) in shapes.items():
        if scales.shape != shape or scales.dtype != fmt.dtype:
            found = f"{tuple(scales.shape)} {scales.dtype}"
            raise ContractError(f"scales are {found}, not {shape} {fmt.dtype}", where=name)
