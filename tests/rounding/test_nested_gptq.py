"""nested_gptq against the algorithm restated in loops, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.nested import NestedFormat
from dlqc.rounding.hessian import factorize
from dlqc.rounding.nested_gptq import NestedGptq, losses, nested_gptq


def problem(seed: int, rows: int = 5, width: int = 16) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(40, width, generator=rng, dtype=torch.float64) @ torch.randn(width, width, generator=rng).double()
    return torch.randn(rows, width, generator=rng), x.T @ x


def naive(weight: Tensor, hessian: Tensor, fmt: NestedFormat, ratio: float, damp: float) -> list[Tensor]:
    """Codes of every width: the published running update W[:, k:] -= e·U[k, k:], H⁻¹ = UᵀU, children of the width before."""
    rows, width = weight.shape
    order = sorted(range(width), key=lambda k: -float(hessian[k, k]))
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(width)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    groups, found = fmt.groups(width), []
    for i, bits in enumerate(fmt.counts):
        codes = torch.zeros(rows, width, dtype=torch.int64)
        for r in range(rows):
            w = weight[r].double()[order]
            for at, k in enumerate(order):
                group = weight[r].reshape(groups, -1)[k // (width // groups)]
                least, most = group.min(), group.max()
                span, middle = (most - least) * ratio, (most + least) / 2
                step = float((span / 2 ** fmt.widths[i]).half())
                first = float((middle - span / 2 + span / 2 ** (fmt.widths[i] + 1)).half())
                low = int(found[-1][r, k]) << bits if found else 0
                code = min(max(round((float(w[at]) - first) / step), low), low + 2**bits - 1)
                codes[r, k] = code
                error = (w[at] - (code * step + first)) / upper[at, at]
                w[at:] -= error * upper[at, at:]
        found.append(codes)
    return found


@pytest.mark.parametrize(("planes", "group", "ratio"), [("2+1+1", 8, 1.0), ("3+2", None, 0.8), ("2+1+1+4", 4, 1.15)])
def test_codes_are_those_of_the_published_update(planes: str, group: int | None, ratio: float) -> None:
    for seed in range(3):
        weight, hessian = problem(seed)
        fmt = NestedFormat(planes, group)
        made = nested_gptq(weight, fmt, factorize(hessian, damp=0.1), ratio)
        for width, codes in zip(fmt.widths, naive(weight, hessian, fmt, ratio, 0.1), strict=True):
            assert torch.equal((made.codes >> (fmt.bits - width)).long(), codes)


def test_feedback_pays_at_the_narrowest_width() -> None:
    weight, hessian = problem(3, rows=32, width=64)
    fmt = NestedFormat("2+1+1+4", 32)
    factor = factorize(hessian, damp=0.01)
    rounded = NestedGptq(damp=0.01).round(weight[:, :64], fmt, {"hessian": hessian})
    nearest = losses(fmt.quantize(weight), weight, factor)
    found = losses(rounded.weight, weight, factor)  # type: ignore[arg-type]
    assert found[0] < nearest[0] / 2
    assert found == sorted(found, reverse=True)
    assert rounded.metrics["sqnr_db"] == rounded.metrics["sqnr_db 8"] > rounded.metrics["sqnr_db 2"]


def test_without_correlation_codes_are_bins() -> None:
    weight, _ = problem(4)
    fmt = NestedFormat("2+1+1", 8)
    made = nested_gptq(weight, fmt, factorize(torch.eye(16, dtype=torch.float64)), 1.0)
    grouped = weight.reshape(5, 2, 8)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    bins = ((grouped - low) / (high - low) * 16).floor().clamp(0, 15).reshape(5, 16)
    assert ((made.codes - bins).abs() > 0).sum() <= 2  # float16 scales move a border


def test_refusals() -> None:
    weight, hessian = problem(0)
    with pytest.raises(
        CalibrationError, match=r"nested_gptq needs the statistic 'hessian'. Collect it, or use rounding 'rtn'"
    ):
        NestedGptq().round(weight, NestedFormat("2+2", 8), {})
    with pytest.raises(CalibrationError, match="hessian: the Hessian is of 8 input features, the weight of 16"):
        NestedGptq().round(weight, NestedFormat("2+2", 8), {"hessian": hessian[:8, :8]})
    with pytest.raises(
        RecipeError, match="damp: damping of 11.0 times the mean diagonal is not within 0 and 10. Use 0.1"
    ):
        NestedGptq(damp=11.0)
