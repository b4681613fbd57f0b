"""Integer activations: x ≈ (code - zero) · scale, with scales taken from x at run time, or fixed after calibration.

Dynamic: one scale per token or per group of features. With b bits and the absolute maximum or the range taken over the token
(last dimension) or its group:

Symmetric:   scale = max|x| / (2^(b-1) - 1), code = round(x / scale) in ±(2^(b-1) - 1), no zero point
Asymmetric:  lo = min(0, min x), hi = max(0, max x), scale = (hi - lo) / (2^b - 1),
             zero = round(-2^(b-1) - lo / scale), code = clamp(round(x / scale) + zero, -2^(b-1), 2^(b-1) - 1)

Both obey |x - x̂| ≤ scale/2, up to float32 rounding: no symmetric value is clamped, and in the asymmetric case the
rounding of the zero point moves either end of the range by at most half a step. Zeros stay exactly zero, and a row of
zeros has scale 1. Scales are float32 and never zero.

Static: the same formulas on a range [lo, hi] that calibration found (`dlqc.ranges`), one for all tokens and features or for
each group of features; what lies outside is clamped. A symmetric code then runs over all of -2^(b-1) … 2^(b-1) - 1, as
engines with fixed scales have it. `sets` > 1 are as many ranges for as many mask ratios: each row takes the set of the share
of [MASK] among its ids.

Nothing is checked on this path, because a check would wait for the device: a token with an infinity or a NaN has
undefined codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlqc.errors import ContractError, FeasibilityError, RecipeError


@dataclass(frozen=True)
class ActFormat:
    """How the input of a quantized linear is quantized.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: features that share a scale; None means one scale per token.
        symmetric: whether codes are centred on zero.
        sets: 0 takes scales from x at run time; n ≥ 1 are n sets of fixed scales (None as group: one for the whole tensor).
        widths: those among which the mask ratio chooses, rising, `bits` the last, with scales from x; () is one width.
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    sets: int = 0
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, *self.widths):
            if not 2 <= bits <= 8:
                what = f"{bits!r} is not a width of an integer activation"
                raise RecipeError(what, where="bits", remedy="Use 2 to 8, or leave activations unquantized")
        if self.group_size is not None and self.group_size < 1:
            what = f"a group of {self.group_size} features is impossible"
            raise RecipeError(what, where="group_size", remedy="Use 32, 64 or 128, or None for one scale per token")
        if self.sets < 0:
            raise RecipeError(f"{self.sets} sets of scales are impossible", where="sets", remedy="Use 0 or more")

    @property
    def static(self) -> bool:
        """Whether scales are fixed before run time."""
        return self.sets > 0

    @property
    def by_node(self) -> bool:
        """Whether kernels may leave rounding to a node in front: with fixed scales, or where the mask ratio chooses a width."""
        return self.static or bool(self.widths)

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) + (self.symmetric and not self.static)

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> ActFormat().label, ActFormat(4, group_size=64, symmetric=False).label
        ('int8 token', 'int4 g64 asymmetric')
        >>> ActFormat(sets=1).label, ActFormat(4, 64, sets=4).label
        ('int8 static tensor', 'int4 static g64 by 4 mask ratios')
        >>> ActFormat(8, widths=(4, 6, 8)).label
        'int4/6/8 token by mask ratio'
        """
        whole = "static tensor" if self.static else "token"
        group = whole if self.group_size is None else f"{'static ' if self.static else ''}g{self.group_size}"
        ratios = f" by {self.sets} mask ratios" if self.sets > 1 else " by mask ratio" if self.widths else ""
        bits = "/".join(map(str, self.widths or (self.bits,)))
        return f"int{bits} {group}" + ("" if self.symmetric else " asymmetric") + ratios

    def check(self, in_features: int) -> str | None:
        """None if inputs with `in_features` features can be quantized, else the reason they cannot, one clause."""
        if self.group_size is None or (in_features > 0 and in_features % self.group_size == 0):
            return None
        return f"{in_features} input features do not divide by group {self.group_size}"

    def quantize_dynamic(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Quantize `x` [..., K] of any floating dtype.

        Returns:
            codes int8 [..., K]; scale float32 [..., G]; zero int8 [..., G], or None if symmetric. G = 1 per token.
        """
        codes, scale, zero = self._quantize(x)
        stored = None if zero is None else zero.squeeze(-1).to(torch.int8)
        return codes.flatten(-2).to(torch.int8), scale.squeeze(-1), stored

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        """The values that `quantize_dynamic(x)` stands for, computed in float32 and rounded to the dtype of `x`."""
        codes, scale, zero = self._quantize(x)
        centred = codes if zero is None else codes - zero
        return (centred * scale).flatten(-2).to(x.dtype)

    def parameters(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point (None if symmetric) of ranges [low, high] of any shape, both float32; 0 is in every range."""
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        half = 1 << (self.bits - 1)
        if self.symmetric:
            return _positive(torch.maximum(-low, high) / (half - 1)), None
        # Divided before subtracting: the range of finite float32 values may itself be infinite.
        scale = _positive(high / (2 * half - 1) - low / (2 * half - 1))
        return scale, (-half - low / scale).round().clamp(-half, half - 1)

    def codes(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Codes, as float32, of x [...] under scales and zero points that broadcast against it."""
        rounded = (x.float() / scale).round()
        return (rounded if zero is None else rounded + zero).clamp(self.low, self.high)

    def fake_quantize_at(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """The values that `codes` stand for, computed in float32 and rounded to the dtype of `x`."""
        codes = self.codes(x, scale, zero)
        return ((codes if zero is None else codes - zero) * scale).to(x.dtype)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] as [..., G, K/G]."""
        width = x.shape[-1]
        reason = self.check(width)
        if reason is not None:
            raise FeasibilityError(reason, where="group_size", remedy="Use a divisor, or None for one scale per token")
        groups = 1 if self.group_size is None else width // self.group_size
        return x.reshape(*x.shape[:-1], groups, width // groups)

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [..., G, g], scale and zero [..., G, 1], all float32."""
        if self.static:
            raise ContractError(f"{self.label} takes no scales from x", where="x", remedy="Give the fixed scales")
        grouped = self.grouped(x).float()
        if self.symmetric:
            high = torch.linalg.vector_norm(grouped, torch.inf, dim=-1, keepdim=True)
            scale, zero = self.parameters(-high, high)
        else:
            scale, zero = self.parameters(grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True))
        return self.codes(grouped, scale, zero), scale, zero


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """1 in place of 0, and no scale below float32's smallest normal, so that x / scale stays finite."""
    return torch.where(scale == 0, 1.0, scale.clamp(min=2.0**-126))
