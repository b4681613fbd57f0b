"""GPTQ for nested codes: width after width, the narrowest first, each among the children of the codes of the last.

    width w_0   ŵ_k = nearest(t_k) of all 2^w_0 levels
    width w_i   ŵ_k = nearest(t_k) of the 2^(w_i - w_{i-1}) levels in the bin that the code of width w_{i-1} stands for

t_k = w_k + Σ_{j before k} (w_j - ŵ_j)·R_jk/R_kk with the errors of the width at hand, H = R·Rᵀ (`dlqc.rounding.gptq`). So every
width is rounded against its own errors in the output, and the codes stay nested: c_{i-1} = c_i >> (w_i - w_{i-1}). What a wider
width may choose is bound by what the narrower ones chose, which is what one stored weight costs: the further t_k of the
narrowest width strays from w_k, the less is left for the others. More damping keeps it nearer, so `damp` moves quality from
narrow widths to wide ones.

Levels of a width are the middles of its bins. The range that the bins divide is that of each group, shrunk by the part of
RATIOS with the least loss tr(E H Eᵀ), each width's relative to the first, summed over the widths and up to 128 evenly spaced
rows.

With H a multiple of the identity there is no feedback, and codes are bins of W, as the format itself rounds (there, scales are
fitted).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.nested import NestedFormat, NestedWeight
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.gptq import sample_rows
from dlqc.rounding.hessian import MAX_DAMP, Factor, energy, factorize, output_energy, sqnr_db

#: Parts of a group's range that are tried. Above 1: errors that feed on each other take targets beyond the range.
RATIOS = (1.0, 1.15, 0.9, 0.8, 0.7)


@dataclass(frozen=True)
class NestedGptq(Rounding):
    """GPTQ for nested codes.

    Attributes:
        act_order: round columns by falling diagonal of H.
        damp: the first λ tried, as a fraction of the mean diagonal; ten times that of GPTQ, see above.

    Metrics: `sqnr_db` of all planes, `sqnr_db <bits>` of each width, `ratio` of the range.
    """

    name: ClassVar[str] = "nested_gptq"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})
    takes: ClassVar[tuple[type[Any], ...]] = (NestedFormat,)

    act_order: bool = True
    damp: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= MAX_DAMP:
            what = f"damping of {self.damp} times the mean diagonal is not within 0 and {MAX_DAMP:g}"
            raise RecipeError(what, where="damp", remedy="Use 0.1")

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Factorize the Hessian once for all linears that read the same input."""
        hessian = stats.get("hessian")
        if not isinstance(hessian, Tensor):
            return stats
        return {**stats, "hessian": factorize(hessian, act_order=self.act_order, damp=self.damp)}

    def round(self, weight: Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        factor = self.prepare(stats).get("hessian")
        if not isinstance(factor, Factor):
            raise CalibrationError(
                "nested_gptq needs the statistic 'hessian'", remedy="Collect it, or use rounding 'rtn'"
            )
        if factor.order.shape[0] != weight.shape[1]:
            what = f"the Hessian is of {factor.order.shape[0]} input features, the weight of {weight.shape[1]}"
            raise CalibrationError(what, where="hessian", remedy="Use the statistics of this layer")
        exact = weight.to(torch.float32)
        sample = exact[sample_rows(exact)]
        trials = torch.tensor([losses(nested_gptq(sample, fmt, factor, ratio), sample, factor) for ratio in RATIOS])
        ratio = RATIOS[int((trials / trials[0].clamp(min=1e-300)).sum(1).argmin())]
        found = nested_gptq(exact, fmt, factor, ratio)
        signal = energy(exact, factor.hessian, sample_rows(exact, 256))
        noise = losses(found, exact, factor)
        widths = {f"sqnr_db {w}": sqnr_db(signal, n) for w, n in zip(fmt.widths, noise, strict=True)}
        return Rounded(found, {"sqnr_db": sqnr_db(signal, noise[-1]), **widths, "ratio": ratio})


def losses(rounded: NestedWeight, exact: Tensor, factor: Factor) -> list[float]:
    """tr(E H Eᵀ) of each width."""
    hessian = factor.hessian
    return [float(output_energy(exact - rounded.at(w), hessian).sum()) for w in rounded.format.widths]


def nested_gptq(exact: Tensor, fmt: NestedFormat, factor: Factor, ratio: float) -> NestedWeight:
    """Round float32 weights [N, K] with ranges shrunk by `ratio`."""
    count, width = exact.shape
    groups = fmt.groups(width)
    least, most = torch.aminmax(exact.reshape(count, groups, -1), dim=-1)
    middle, span = (least + most) / 2, (most - least) * ratio
    scales = torch.stack([(span / 2**w).half() for w in fmt.widths])
    offsets = torch.stack([(middle - span / 2 + span / 2 ** (w + 1)).half() for w in fmt.widths])
    upper, order = factor.upper.to(exact.dtype), factor.order
    near = upper / upper.diagonal().unsqueeze(1)
    group = order // (width // groups)
    turned = exact.T.index_select(0, order).contiguous()  # [K, N], the last to be rounded first
    codes = torch.zeros(width, count, dtype=torch.float32, device=exact.device)
    for i, bits in enumerate(fmt.counts):
        steps = scales[i].float().T.index_select(0, group)  # [K, N]
        first = offsets[i].float().T.index_select(0, group)
        low = codes * 2**bits
        error = torch.zeros_like(turned)
        for k in range(width - 1, -1, -1):
            target = torch.addmv(turned[k], error[k + 1 :].T, near[k, k + 1 :])
            level = torch.where(steps[k] > 0, (target - first[k]) / steps[k], 0.0).round_()
            level = torch.minimum(torch.maximum(level, low[k]), low[k] + (2**bits - 1))
            codes[k] = level
            error[k] = turned[k] - (level * steps[k] + first[k])
    back = torch.argsort(order)
    return NestedWeight(codes.index_select(0, back).T.to(torch.uint8).contiguous(), scales, offsets, fmt)
