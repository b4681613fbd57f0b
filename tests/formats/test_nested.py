"""Nested codes: planes, widths, the bins they are, and what the fitted lines are worth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.coded import decode, encode, fault
from dlqc.formats.integer import IntFormat
from dlqc.formats.nested import RANGES, NestedFormat

PLANES = ["2+1+1", "4+4", "2+1+1+4", "3", "2+2+2+2", "4+2+1+1"]


def matrix(seed: int, rows: int = 3, columns: int = 32, *, odd: bool = True) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if odd:
        made[0, :8] = 0.0
        made[1, :8] = -1.5
        made[2, 3] = 40.0
    return made


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PLANES), st.sampled_from([8, 16, None]), st.integers(0, 99))
def test_every_width_is_stored_and_read_alone(planes: str, group: int | None, seed: int) -> None:
    fmt, weight = NestedFormat(planes, group), matrix(seed)
    made = fmt.quantize(weight)
    parts = made.pack()
    assert fault(encode(fmt), [parts[role] for role in sorted(parts)], 3, 32) is None
    assert decode(encode(fmt)) == fmt
    again = fmt.unpack(parts, 32)
    assert torch.equal(again.codes, made.codes)
    for level, width in enumerate(fmt.widths):
        alone = {role: part for role, part in parts.items() if int(role[-1]) <= level}
        assert torch.equal(fmt.codes_at(alone, 32, width), made.codes >> (fmt.bits - width))
        assert torch.equal(fmt.weight_at(alone, 32, width), made.at(width))
        assert torch.equal(again.at(width), made.at(width))
    bits = sum(8 * p.numel() * p.element_size() for p in parts.values()) / weight.numel()
    padding = sum(8 * parts[f"codes_{i}"].numel() - 3 * 32 * b for i, b in enumerate(fmt.counts)) / weight.numel()
    assert bits - padding == fmt.bits_per_weight(3, 32)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PLANES), st.integers(0, 99))
def test_lines_are_no_worse_than_the_middles_of_the_bins_of_any_tried_range(planes: str, seed: int) -> None:
    """Restated in float64: for the range that was chosen (unknown here) the sum of relative errors is the least of all."""
    fmt, weight = NestedFormat(planes, 8), matrix(seed, odd=False).double()
    made = fmt.quantize(weight)
    grouped = weight.reshape(3, 4, 8)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    errors: dict[float, list[torch.Tensor]] = {}
    for ratio in RANGES:
        size = (high - low) * ratio
        codes = ((grouped - low * ratio) / size * 2**fmt.bits).floor().clamp(0, 2**fmt.bits - 1)
        for width in fmt.widths:
            upper = (codes / 2 ** (fmt.bits - width)).floor()
            middle = low * ratio + (upper + 0.5) * size / 2**width
            errors.setdefault(ratio, []).append((grouped - middle).square().sum(-1))
    own = [(weight - made.at(w)).reshape(3, 4, 8).square().sum(-1) for w in fmt.widths]
    # The first range's lines are no worse than its middles, so relative errors are at most those to the middles, and no
    # range may do better on average.
    for middles in errors[1.0]:
        assert bool((middles > 0).all())
    total = sum(o / m for o, m in zip(own, errors[1.0], strict=True))
    assert bool((total <= len(fmt.widths) * 1.02).all())


def test_the_full_range_bounds_every_weight_by_half_a_bin() -> None:
    """A uniform weight: nothing is gained by a smaller range, and every width is within half a bin and float16."""
    weight = torch.linspace(-1, 1, 1024).reshape(1, -1)
    made = NestedFormat("2+1+1+4", None).quantize(weight)
    for width in (2, 3, 4, 8):
        step = 2 / 2**width
        assert float((made.at(width) - weight).abs().max()) <= step / 2 + 2e-3
    assert made.codes.tolist()[0] == ((weight[0] + 1) / 2 * 256).floor().clamp(0, 255).int().tolist()


def test_nested_weights_are_as_good_as_integers_of_their_width() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    made = NestedFormat("2+1+1+4").quantize(weight)
    for width in (2, 3, 4, 8):
        alone = IntFormat(width, 128, False).quantize(weight, clip="mse").dequantize()
        ratio = (weight - made.at(width)).square().sum() / (weight - alone).square().sum()
        assert ratio < 1.05, (width, float(ratio))


def test_groups_of_one_number() -> None:
    weight = torch.tensor([[0.0] * 8 + [-1.5] * 8])
    made = NestedFormat("2+1+1", 8).quantize(weight)
    for width in (2, 3, 4):
        assert torch.equal(made.at(width), weight)


@pytest.mark.parametrize("planes", ["", "1+1", "2+7", "9", "2+", "2-1", "0+2", "2+1+1+4+1"])
def test_planes_that_cannot_be(planes: str) -> None:
    with pytest.raises(RecipeError) as error:
        NestedFormat(planes)
    what = f"planes: {planes!r} are no planes of 2 to 8 bits in all. Write the bits of each, the upper first: '2+1+1+4'"
    assert str(error.value) == what


def test_refusals() -> None:
    fmt = NestedFormat("2+2", 128)
    assert fmt.check(96) == "96 input features do not divide by group 128"
    with pytest.raises(ContractError, match=r"width: nested int 2/4 g128 is not read in 3 bits. Use 2, 4"):
        fmt.level(3)
    with pytest.raises(FeasibilityError, match=r"nested: weights reach 1e\+06: their scales do not fit float16"):
        fmt.quantize(torch.full((1, 128), 1e6))
    with pytest.raises(ModelError, match="finite|NaN"):
        fmt.quantize(torch.full((1, 128), torch.nan))
