"""Round to nearest: each weight goes to the nearest code of its group, whatever the others do.

Every format that needs no data has its own `quantize`; integers choose in addition how much of a group's range is covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlqc.errors import RecipeError
from dlqc.formats.contract import WeightFormat
from dlqc.formats.fp8 import Fp8Format
from dlqc.formats.integer import Clip, IntFormat
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.microscaling import MicroscalingFormat
from dlqc.formats.nested import NestedFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.offset import OffsetFormat
from dlqc.formats.planes import PlanesFormat
from dlqc.formats.sparse import SparseFormat
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.hessian import output_energy, sqnr_db


@dataclass(frozen=True)
class Rtn(Rounding):
    """Round to nearest.

    Attributes:
        clip: "minmax" covers each group's whole range; "mse" shrinks it to the smallest squared error. Integers only.

    `stats` never changes the result. If it has a "hessian" [K, K], the metrics have `sqnr_db` and `loss`, tr(E H Eᵀ).
    """

    name: ClassVar[str] = "rtn"
    takes: ClassVar[tuple[type[Any], ...]] = (
        IntFormat,
        Nf4Format,
        Fp8Format,
        MicroscalingFormat,
        LatticeFormat,
        PlanesFormat,
        OffsetFormat,
        NestedFormat,
        SparseFormat,
    )

    clip: Clip = "minmax"

    def __post_init__(self) -> None:
        if self.clip not in ("minmax", "mse"):
            raise RecipeError(f"unknown clip {self.clip!r}", where="clip", remedy="Use 'minmax' or 'mse'")

    def refusal(self, fmt: IntFormat | WeightFormat) -> str | None:
        if self.clip != "minmax" and isinstance(fmt, self.takes) and not isinstance(fmt, IntFormat):
            return f"rtn(clip={self.clip!r}) does not round to {fmt.label}, whose ranges are not clipped"
        return super().refusal(fmt)

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        rounded = fmt.quantize(weight, clip=self.clip) if isinstance(fmt, IntFormat) else fmt.quantize(weight)
        hessian = stats.get("hessian")
        if hessian is None:
            return Rounded(rounded)
        exact = weight.float()
        noise = output_energy(exact - rounded.dequantize(), hessian).sum().item()
        signal = output_energy(exact, hessian).sum().item()
        return Rounded(rounded, {"sqnr_db": sqnr_db(signal, noise), "loss": noise})
