"""Budgets for what weights are stored in.

    "3.2bpw"                     bits per weight: stored bits of the quantized linears, scales, zero points and padding included,
                                 over their number of weights. What is not quantized is not counted
    "4.5GB", "850MB", "64kB"     size of the artifact's weight files, 10⁹, 10⁶, 10³ bytes: everything counted, embeddings and head
    "4.2GiB", "800MiB", "64KiB"  in their stored dtypes and the files' headers, too. 2³⁰, 2²⁰, 2¹⁰ bytes

Both are upper limits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from dlqc.errors import RecipeError, nearest
from dlqc.weights import Weights

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BPW = "bpw"

#: Digits behind the point of what an error offers in place of a budget.
_DIGITS = 3


@dataclass(frozen=True)
class Budget:
    """An upper limit.

    Attributes:
        amount: how many of the unit. unit: "bpw", or a key of `UNITS`.
    """

    amount: Fraction
    unit: str

    @classmethod
    def read(cls, text: str) -> Budget:
        """Read "3.2bpw" or "4.5GB"; a space before the unit may stand.

        Raises:
            RecipeError: no number, no unit, an unknown unit, or nothing at all to spend.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
        if found is None:
            raise RecipeError(f"{text!r} is no budget", where="budget", remedy="Write '3.2bpw', '4.5GB' or '800MiB'")
        if found[2] not in (BPW, *UNITS):
            what = f"unit {found[2]!r} of {text!r} is unknown" if found[2] else f"{text!r} has no unit"
            alike = [unit for unit in (BPW, *UNITS) if unit.lower() == found[2].lower()]
            remedy = f"Did you mean {alike[0]!r}?" if alike else nearest(found[2], (BPW, *UNITS))
            raise RecipeError(what, where="budget", remedy=remedy)
        if Fraction(found[1]) == 0:
            raise RecipeError(f"{text!r} leaves nothing", where="budget", remedy="Write '3.2bpw' or '4.5GB'")
        return cls(Fraction(found[1]), found[2])

    def limit(self, weights: int, rest: int) -> int:
        """Bits that the quantized linears may take: `weights` in number, where the files hold `rest` other bits."""
        if self.unit == BPW:
            return math.floor(self.amount * weights)
        return math.floor(self.amount * UNITS[self.unit] * 8) - rest

    def spelled(self, bits: int, weights: int, rest: int) -> str:
        """What linears of `bits` come to in this budget's unit, rounded up.

        >>> Budget.read("1GiB").spelled(2**33, 10**9, 8)
        '1.001GiB'
        """
        exact = Fraction(bits, weights) if self.unit == BPW else Fraction(bits + rest, 8 * UNITS[self.unit])
        return f"{math.ceil(exact * 10**_DIGITS) / 10**_DIGITS:.{_DIGITS}f}{self.unit}"


def rest_bits(weights: Weights, but: Mapping[str, tuple[str, ...]], planned: Mapping[str, int] | None = None) -> int:
    """Bits in the weight files besides the tensors of quantized weights.

    Args:
        weights: the constants. but: those to be quantized → the names of the tensors that each will be stored in.
        planned: bits that others will be stored in, where it is not as they are: tables and heads that are quantized, too.

    All other constants in their stored dtypes, and an upper bound of the headers of safetensors.
    """
    kept = [name for name in weights if name not in but]
    bits = {name: 8 * weights[name].shape.numel() * weights[name].storage_dtype.itemsize for name in kept}
    bits.update(planned or {})
    names = [*kept, *(f"{name}.{role}" for name in planned or () for role in ("scales", "zeros_packed"))]
    names += [name for stored in but.values() for name in stored]
    total = sum(c.shape.numel() for c in weights.values()) * torch.float64.itemsize
    entry = {"dtype": "F8_E4M3", "shape": [total] * 3, "data_offsets": [total, total]}
    files = 1 + total // (1 << 30)
    header = sum(len(json.dumps({name: entry})) for name in names) + 64 * files
    return sum(bits.values()) + 8 * header
