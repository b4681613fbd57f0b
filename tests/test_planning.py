"""The plan's estimates of memory and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dlqc.planning import plan_report

CaseMaker = Callable[..., Any]
WIDTHS = (64, 64, 64, 96)  # inputs of q, k, v; of the attention's output; of gate and up; of the last one
SHAPES = (*4 * ((64, 64),), *2 * ((96, 64),), (64, 96))


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_the_cost_of_rounding_is_that_of_its_flops_and_statistics(case: CaseMaker, method: str) -> None:
    found = plan_report(
        case("llada").model, f"calibrate, quantize_weights(group_size=32, method={method}), pack, lower"
    )
    paired = method == "gptaq"
    flops = sum(k**3 / 3 + paired * 2 * k**3 for k in WIDTHS) + sum((1 + 2 * paired) * n * k**2 for n, k in SHAPES)
    assert found.seconds * 5e10 == pytest.approx(2 * flops)
    moments = 8 * sum(k**2 for k in WIDTHS) + 8 * 96**2
    assert found.peak_bytes == (1 + paired) * moments + 17 * 64 * 96


def test_nearest_rounding_has_no_statistics(case: CaseMaker) -> None:
    found = plan_report(case("llada").model, "quantize_weights(group_size=32, method=rtn), pack, lower")
    assert (found.seconds, found.peak_bytes) == (0, 24 * 64 * 96)
