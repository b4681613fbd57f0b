"""Integer codes with real zero points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.offset import OffsetFormat, OffsetWeight


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_code_is_the_nearest_on_the_stored_grid(bits: int, dtype: str) -> None:
    weight = torch.randn(7, 96) * torch.rand(7, 1) + torch.randn(7, 1)
    found = OffsetFormat(bits, 32, dtype).quantize(weight)
    scales, offsets = (part.double().unsqueeze(-1) for part in (found.scales, found.offsets))
    grid = offsets.unsqueeze(-1) + scales.unsqueeze(-1) * torch.arange(2**bits, dtype=torch.float64)
    error = (weight.double().reshape(7, 3, 32, 1) - grid).abs()
    own = error.gather(3, found.codes.reshape(7, 3, 32, 1).long())[..., 0]
    assert bool((own <= error.amin(dim=3) + 1e-5 * scales).all())
    exact = offsets + scales * found.codes.reshape(7, 3, 32)
    torch.testing.assert_close(found.dequantize(), exact.reshape(7, 96).float(), rtol=1e-5, atol=1e-6)
    # Half a step, and what the ends lose to the rounding of the scale and the offset.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}[dtype]
    slack = unit * ((2**bits - 1) * scales + offsets.abs()) + 1e-5 * scales
    assert bool((own <= scales / 2 + slack).all())


def test_the_grid_covers_the_range_and_not_zero() -> None:
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert torch.equal(OffsetFormat(2, None).quantize(weight).dequantize(), weight)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**31))
def test_packing_returns_the_same_weight(rows: int, group: int, groups: int, bits: int, seed: int) -> None:
    weight = torch.randn(rows, group * groups, generator=torch.Generator().manual_seed(seed))
    fmt = OffsetFormat(bits, group)
    found = fmt.quantize(weight)
    again = fmt.unpack(found.pack(), group * groups)
    assert torch.equal(again.dequantize(), found.dequantize())
    stored = sum(part.nbytes for role, part in found.pack().items() if role != "codes")
    assert fmt.bits_per_weight(rows, group * groups) == pytest.approx(bits + 8 * stored / weight.numel())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zeros_constants_and_extremes(dtype: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = -0.75
    weight[2] = 1e-30
    weight[3, 5] = 3.5
    found = OffsetFormat(3, 64, dtype).quantize(weight).dequantize()
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-30)
    for size in (2.0**-149, 2.0**-130, 2.0**-60, 1e4, 1e37):
        drawn = torch.randn(3, 64).clamp(-3, 3) * size
        if dtype == "float16" and size > 65504:
            with pytest.raises(
                FeasibilityError, match=r"^scale_dtype: a scale or offset of .* does not fit float16\. Use 'bfl"
            ):
                OffsetFormat(4, 64, dtype).quantize(drawn)
            continue
        again = OffsetFormat(4, 64, dtype).quantize(drawn).dequantize()
        floor = 2.0**-24 if dtype == "float16" else 2.0**-126
        assert bool(((again - drawn).abs() <= size / 2 + floor).all())


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"^bits: 5 is not a width of an integer weight\. Use 2, 3, 4 or 8$"):
        OffsetFormat(5)
    with pytest.raises(RecipeError, match=r"^group_size: a group of 0 input features is impossible"):
        OffsetFormat(4, 0)
    with pytest.raises(RecipeError, match=r"^scale_dtype: scales cannot be stored as 'int8'"):
        OffsetFormat(4, 32, "int8")
    with pytest.raises(FeasibilityError, match=r"^group_size: 100 input features do not divide by group 64"):
        OffsetFormat(4, 64).quantize(torch.randn(2, 100))
    weight = torch.randn(4, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(ModelError, match=r"^1 of 256 weights are not finite as float32\. Check the checkpoint"):
        OffsetFormat(4, 64).quantize(weight)
    codes, ones = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.float16)
    fmt = OffsetFormat(4, 64)
    with pytest.raises(ContractError, match=r"^codes: codes are torch.int8, not torch.uint8$"):
        OffsetWeight(codes.to(torch.int8), ones, ones, fmt)
    with pytest.raises(
        ContractError, match=r"^offsets: offsets are \(2, 1\) torch.float32, not \(2, 1\) torch.float16$"
    ):
        OffsetWeight(codes, ones, ones.float(), fmt)
    with pytest.raises(ContractError, match=r"^scales: scales are \(1, 2\) torch.float16, not \(2, 1\)"):
        OffsetWeight(codes, ones.T, ones, fmt)
