"""Uniform integer weights: w ≈ (code - zero) · scale, one scale per output channel or per group of input features.

Shapes: W is [N, K] (N output, K input features); a group is `group_size` neighbours along K, so G = K / group_size
groups a row (G = 1 for one scale per channel). Codes are unsigned, in [0, T] with T = 2^bits - 1.

Symmetric:   zero = 2^(bits-1), scale = 2·max|w| / T        (the compressed-tensors convention)
Asymmetric:  lo = min(0, min w), hi = max(0, max w), scale = (hi - lo) / T, zero = round(-lo / scale)

The scale is rounded to `scale_dtype` first and codes are computed with the rounded one, s, so that what is stored is
what was rounded. With clip="minmax" every weight then obeys

    |w - ŵ| ≤ s/2 + T·|scale - s|,   and |scale - s| ≤ s·u/(1-u), u = 2^-8 (bfloat16), 2^-11 (float16), 0 (float32):

s/2 where the code is not clamped; the second term is the ground that the outermost codes lose when the scale is
rounded down. Two cases are stored exactly: a group of zeros (scale 1), and a group of one repeated value c that
`scale_dtype` holds (scale |c|, code zero ± 1).

clip="mse" shrinks the range, (lo, hi) → r·(lo, hi), per group, to the ratio r that minimises
Σ_k importance_k·(w_k - ŵ_k)². A coarse grid r = 1.0, 0.95 … 0.2 is followed by four steps of 1/60 around the best
point: 21 evaluations with a resolution of 1/60, where the customary search makes 80 of 1/100. r = 1 is on the grid
and ties keep the larger range, so the result is never worse than "minmax".

All arithmetic is float32; float64 weights are rounded to it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from dlqc import intround
from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError

Clip = Literal["minmax", "mse"]

BITS = (2, 3, 4, 8)
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

COARSE = tuple(1 - step / 20 for step in range(17))
FINE = (2 / 60, 1 / 60, -1 / 60, -2 / 60)

# Elements a chunk of rows may have, 4 MiB of float32: few enough to stay in the last-level cache over the passes, many
# enough that threads are rarely started (on a busy machine each start can cost milliseconds).
CHUNK = 1 << 20


@dataclass(frozen=True)
class IntFormat:
    """An integer weight format.

    Attributes:
        bits: width of a code, 2, 3, 4 or 8.
        group_size: input features that share a scale; None means one scale per output channel.
        symmetric: whether the zero point is 2^(bits-1) everywhere (and not stored).
        scale_dtype: "bfloat16", "float16" or "float32", the type that scales are rounded to and stored in.
    """

    bits: int
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RecipeError(
                f"{self.bits!r} is not a width of an integer weight", where="bits", remedy="Use 2, 3, 4 or 8"
            )
        if self.group_size is not None and self.group_size < 1:
            what = f"a group of {self.group_size} input features is impossible"
            raise RecipeError(what, where="group_size", remedy="Use 32, 64 or 128, or None for one scale per channel")
        if self.scale_dtype not in SCALE_DTYPES:
            remedy = f"Use {', '.join(SCALE_DTYPES)}"
            raise RecipeError(f"scales cannot be stored as {self.scale_dtype!r}", where="scale_dtype", remedy=remedy)

    @property
    def top(self) -> int:
        """The largest code, T = 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric weight, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> IntFormat(4).label, IntFormat(3, group_size=None, symmetric=False).label
        ('int4 g128', 'int3 channel asymmetric')
        """
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group}" + ("" if self.symmetric else " asymmetric")

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause.

        >>> IntFormat(4, group_size=96).check(11008)
        '11008 input features do not divide by group 96'
        """
        if self.group_size is None or (in_features > 0 and in_features % self.group_size == 0):
            return None
        return f"{in_features} input features do not divide by group {self.group_size}"

    @staticmethod
    def suggest_groups(in_features: int) -> tuple[int, ...]:
        """The group sizes that kernels know and that divide `in_features`.

        >>> IntFormat.suggest_groups(11008)
        (32, 64, 128, 256)
        """
        return tuple(group for group in (32, 64, 128, 256) if in_features > 0 and in_features % group == 0)

    def groups(self, in_features: int) -> int:
        """G, the number of groups in a row; a FeasibilityError if the group does not divide."""
        reason = self.check(in_features)
        if reason is not None:
            sizes = self.suggest_groups(in_features)
            remedy = f"Use {', '.join(map(str, sizes))}, or" if sizes else "Use"
            raise FeasibilityError(reason, where="group_size", remedy=f"{remedy} None for one scale per channel")
        return 1 if self.group_size is None else in_features // self.group_size

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K: codes, scales, and zero points at `bits` each.

        Not counted: the zero bits that pad a packed row to whole 4-byte words (`dlqc.formats.packing`), none when
        K·bits divides by 32.

        >>> IntFormat(4).bits_per_weight(4096, 4096), IntFormat(4, symmetric=False).bits_per_weight(4096, 4096)
        (4.125, 4.15625)
        """
        per_group = 8 * SCALE_DTYPES[self.scale_dtype].itemsize + (0 if self.symmetric else self.bits)
        total = out_features * (in_features * self.bits + self.groups(in_features) * per_group)
        return total / (out_features * in_features)

    def parameters(
        self,
        weight: torch.Tensor,
        *,
        clip: Clip = "minmax",
        shrink: float = 1.0,
        importance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose scales [N, G] in `scale_dtype` and zero points uint8 [N, G] (None if symmetric) for `weight` [N, K].

        Args:
            weight: finite values of any floating dtype.
            clip: "minmax" covers the whole range; "mse" searches a smaller one (see the module docstring).
            shrink: part of the range that is covered, or the largest one that is searched; within 0 and 1.
            importance: [K], positive weights of the squared errors in the "mse" search; None weighs all alike.
        """
        if clip not in ("minmax", "mse"):
            raise RecipeError(f"unknown clip {clip!r}", where="clip", remedy="Use 'minmax' or 'mse'")
        if not 0 < shrink <= 1:
            raise RecipeError(f"a range cannot shrink to {shrink} of itself", where="shrink", remedy="Use 0.8 to 1")
        count, width = weight.shape
        groups = self.groups(width)
        root = None if importance is None else _root(importance, groups, width)
        scales = torch.empty(count, groups, dtype=SCALE_DTYPES[self.scale_dtype], device=weight.device)
        zeros = None if self.symmetric else torch.empty(count, groups, dtype=torch.uint8, device=weight.device)
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32).reshape(-1, groups, width // groups)
            least, most = torch.aminmax(part, dim=-1)
            if not bool(torch.isfinite(least + most).all()):
                raise _not_finite(weight)
            scale, zero = self._grid(least * shrink, most * shrink)
            if not bool(torch.isfinite(scale).all()):
                raise self._overflow(weight)
            if clip == "mse":
                scale, zero = self._search(part, least * shrink, most * shrink, root)
            level = least.abs().to(scales.dtype).float()
            constant = (least == most) & (level >= self.smallest) & torch.isfinite(level)
            scale = torch.where(constant, level, scale)
            scales[rows] = scale.to(scales.dtype)
            if zeros is not None:
                zeros[rows] = torch.where(constant, (least < 0).float(), zero).to(torch.uint8)
        return scales, zeros

    def encode(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """Round `weight` [N, K] to the nearest codes, uint8 [N, K]: clamp(round(w / scale) + zero, 0, T).

        Ties go to the even multiple of the scale. Weights outside the range take its end.
        """
        count, width = weight.shape
        groups = self.groups(width)
        codes = torch.empty(count, width, dtype=torch.uint8, device=weight.device)
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32).reshape(-1, groups, width // groups)
            scaled = part / scales[rows].to(torch.float32).unsqueeze(-1)
            if not bool(torch.isfinite(scaled.sum())):
                raise _not_finite(weight)
            zero = self.midpoint if zeros is None else zeros[rows].to(torch.float32).unsqueeze(-1)
            scaled.round_().add_(zero).clamp_(0, self.top)
            codes[rows] = scaled.reshape(-1, width).to(torch.uint8)
        return codes

    def quantize(self, weight: torch.Tensor, *, clip: Clip = "minmax") -> QuantizedWeight:
        """Round `weight` [N, K] to nearest with parameters chosen by `parameters`."""
        scales, zeros = self.parameters(weight, clip=clip)
        return QuantizedWeight(self.encode(weight, scales, zeros), scales, zeros, self)

    @property
    def smallest(self) -> float:
        """The smallest scale: not zero in `scale_dtype`, and normal in float32 so that w / scale stays finite."""
        return 2.0**-24 if self.scale_dtype == "float16" else 2.0**-126

    def _grid(self, least: torch.Tensor, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, float32 and already rounded, of groups with values in [least, most]."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        if self.symmetric:
            span = 2 * torch.maximum(-least, most)
        else:
            least, most = least.clamp(max=0), most.clamp(min=0)
            span = most - least
        scale = (span / self.top).to(dtype).float().clamp(min=self.smallest)
        scale = torch.where(span == 0, 1.0, scale)
        if self.symmetric:
            return scale, torch.full_like(scale, self.midpoint)
        return scale, (-least / scale).round_().clamp_(0, self.top)

    def _search(
        self, part: torch.Tensor, least: torch.Tensor, most: torch.Tensor, root: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The grid of the shrunk range with the smallest weighted squared error; `part` is [rows, G, g]."""
        found = intround.search(
            *(part, least, most, root),
            coarse=COARSE[1:],
            fine=FINE,
            symmetric=self.symmetric,
            stored=SCALE_DTYPES[self.scale_dtype],
            top=self.top,
            midpoint=self.midpoint,
            floor=self.smallest,
        )
        return found or self._search_plainly(part, least, most, root)

    def _search_plainly(
        self, part: torch.Tensor, least: torch.Tensor, most: torch.Tensor, root: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = torch.ones_like(least)
        scale, zero = self._grid(least, most)
        error = self._error(part, scale, zero, root)
        for steps in (COARSE[1:], FINE):
            start = ratio.clone()
            for step in steps:
                tried = torch.full_like(ratio, step) if steps is not FINE else (start + step).clamp_(max=1.0)
                new_scale, new_zero = self._grid(least * tried, most * tried)
                new_error = self._error(part, new_scale, new_zero, root)
                better = new_error < error
                error = torch.where(better, new_error, error)
                ratio = torch.where(better, tried, ratio)
                scale = torch.where(better, new_scale, scale)
                zero = torch.where(better, new_zero, zero)
        return scale, zero

    def _error(
        self, part: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, root: torch.Tensor | None
    ) -> torch.Tensor:
        """Root of the weighted squared error of each group, [rows, G]: scale · ‖root · (round(w/scale) - w/scale)‖."""
        scaled = part * scale.reciprocal().unsqueeze(-1)
        if self.symmetric:
            rounded = scaled.round().clamp_(-self.midpoint, self.top - self.midpoint)
        else:
            offset = zero.unsqueeze(-1)
            rounded = scaled.round().clamp_(-offset, self.top - offset)
        rounded.sub_(scaled)
        if root is not None:
            rounded.mul_(root)
        norm: torch.Tensor = torch.linalg.vector_norm(rounded, dim=-1)
        return norm * scale

    def _overflow(self, weight: torch.Tensor) -> FeasibilityError:
        what = f"weights reach {weight.abs().max().item():.3g}: their scale does not fit {self.scale_dtype}"
        return FeasibilityError(what, where="scale_dtype", remedy="Use 'bfloat16' or 'float32'")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight [N, K], not packed.

    Attributes:
        codes: uint8 [N, K], in [0, 2^bits).
        scales: [N, G] in `format.scale_dtype`.
        zeros: uint8 [N, G], or None when the format is symmetric.
        format: the number format.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    format: IntFormat

    def __post_init__(self) -> None:
        count, width = self.codes.shape
        shape = (count, self.format.groups(width))
        if self.codes.dtype != torch.uint8:
            raise ContractError(f"codes are {self.codes.dtype}, not torch.uint8", where="codes")
        if self.scales.shape != shape or self.scales.dtype != SCALE_DTYPES[self.format.scale_dtype]:
            found = f"{tuple(self.scales.shape)} {self.scales.dtype}"
            raise ContractError(f"scales are {found}, not {shape} torch.{self.format.scale_dtype}", where="scales")
        if (self.zeros is None) != self.format.symmetric:
            verb = "has no" if self.format.symmetric else "needs"
            raise ContractError(f"a weight in {self.format.label} {verb} zero points", where="zeros")
        if self.zeros is not None and (self.zeros.shape != shape or self.zeros.dtype != torch.uint8):
            found = f"{tuple(self.zeros.shape)} {self.zeros.dtype}"
            raise ContractError(f"zero points are {found}, not {shape} torch.uint8", where="zeros")

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that the codes stand for: (code - zero) · scale."""
        count, width = self.codes.shape
        zero = self.format.midpoint if self.zeros is None else self.zeros.float().unsqueeze(-1)
        values = self.codes.float().reshape(count, self.scales.shape[1], -1)
        return values.sub_(zero).mul_(self.scales.float().unsqueeze(-1)).reshape(count, width)


def _row_chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of whole rows with about CHUNK elements each."""
    step = max(1, CHUNK // max(width, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def _root(importance: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Square roots of the importance, float32 [G, g], scaled to a largest value of 1 in each group."""
    if importance.shape != (width,) or not bool((importance > 0).all()) or not bool(torch.isfinite(importance).all()):
        what = f"the importance is not {width} finite positive numbers, one for each input feature"
        raise ContractError(what, where="importance")
    root = importance.double().sqrt().reshape(groups, width // groups)
    return (root / root.amax(dim=-1, keepdim=True)).float()


def _not_finite(weight: torch.Tensor) -> ModelError:
    count = int((~torch.isfinite(weight.float())).sum())
    what = f"{count} of {weight.numel()} weights are not finite as float32"
    return ModelError(what, remedy="Check the checkpoint, and the transforms folded into this weight")
