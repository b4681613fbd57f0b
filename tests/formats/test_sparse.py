"""Sparse weights: what is stored is what is counted, and what was pruned is exactly zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, ModelError, RecipeError
from dlqc.formats.coded import decode, encode, fault, weight_of
from dlqc.formats.integer import IntFormat
from dlqc.formats.sparse import SparseFormat, SparseWeight


def pruned(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


@pytest.mark.parametrize(
    "fmt", [SparseFormat(4, 8), SparseFormat(3, None), SparseFormat(8, 16, True), SparseFormat(16)], ids=str
)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_from_the_stored_tensors_and_the_text_alone(
    fmt: SparseFormat, rows: int, groups: int, density: float, seed: int
) -> None:
    weight = pruned(rows, 16 * groups, density, seed)
    stored = fmt.quantize(weight)
    parts = [part for _, part in sorted(stored.pack().items())]
    spec = encode(stored.format)
    assert decode(spec) == stored.format
    assert fault(spec, parts, rows, 16 * groups) is None
    found = weight_of(spec, parts, rows, 16 * groups).dequantize()
    dense = weight.to(torch.bfloat16).float() if fmt.bits == 16 else fmt.integers.quantize(weight).dequantize()
    assert torch.equal(found, dense)  # integers have an exact zero, so the dense weight has zeros at the same places
    assert not bool(found[weight == 0].any())
    exact = stored.format.parts_of(rows, 16 * groups)
    assert {role: (tuple(t.shape), t.dtype) for role, t in stored.pack().items()} == exact


@pytest.mark.parametrize(
    ("fmt", "dense"), [(SparseFormat(4, 64), 4), (SparseFormat(8, 64, True), 8), (SparseFormat(16), 16)]
)
def test_what_is_counted_is_what_is_stored_and_less_than_dense(fmt: SparseFormat, dense: int) -> None:
    stored = fmt.quantize(pruned(128, 512))
    bits = 8 * sum(part.nbytes for part in stored.pack().values())
    counted = 128 * 512 * stored.format.bits_per_weight(128, 512)
    assert 0 <= bits - counted < 128 * 32 + 32  # padding of zero points and of the run, to words
    whole = 16.0 if dense == 16 else IntFormat(dense, 64, fmt.symmetric).bits_per_weight(128, 512)
    assert stored.format.bits_per_weight(128, 512) == pytest.approx(whole - dense / 2 + 1, abs=0.1)


def test_two_of_four_costs_what_positions_cost() -> None:
    """Hardware stores two positions of two bits for four weights: one bit a weight, as the mask does."""
    weight = torch.randn(8, 64)
    order = weight.reshape(-1, 4).abs().argsort(dim=1)
    weight = weight.reshape(-1, 4).scatter(1, order[:, :2], 0).reshape(8, 64)
    stored = SparseFormat(16).quantize(weight)
    assert stored.format.density == 0.5
    assert stored.pack()["mask"].numel() * 8 == weight.numel() / 4 * 2 * 2


def test_the_mask_may_keep_more_than_what_is_not_zero() -> None:
    """A kept weight that is rounded to zero is stored; a pruned one is not, whatever its code was."""
    kept = torch.tensor([[True, False, True, False]])
    rounded = IntFormat(4, None, False).quantize(torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
    stored = SparseFormat(4, None).store(rounded, kept)
    assert len(stored.values) == 2
    assert stored.dequantize().tolist() == [[0.0, 0.0, pytest.approx(1, abs=0.1), 0.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: 5 is not a width of an integer weight"),
        ({"group_size": 0}, r"^group_size: a group of 0 input features"),
        (
            {"bits": 16, "group_size": 64},
            r"^bits: bfloat16 numbers have neither groups nor zero points\. Write sparse\(bits=16\)$",
        ),
        ({"density": 1.5}, r"^density: a density of 1\.5 is not within 0 and 1\. Leave it out: pruning decides$"),
        ({"density": float("nan")}, r"^density: a density of nan"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SparseFormat(**options)


def test_widths() -> None:
    assert SparseFormat(4, 48).check(64) == "64 input features do not divide by group 48"
    assert SparseFormat(16).check(63) is None


def test_a_mask_and_values_that_do_not_belong_together() -> None:
    stored = SparseFormat(4, 8).quantize(pruned(4, 16))
    with pytest.raises(
        ContractError, match=r"^values: the mask keeps \d+ weights, \d+ are said to be, \d+ came\. Use the"
    ):
        SparseWeight(~stored.kept, stored.values[1:], stored.scales, stored.zeros, stored.format)
    parts = [part for _, part in sorted(stored.pack().items())]
    parts[0] = torch.zeros_like(parts[0])
    with pytest.raises(ContractError, match="the mask keeps 0 weights"):
        weight_of(encode(stored.format), parts, 4, 16)


def test_a_weight_that_bfloat16_cannot_hold() -> None:
    with pytest.raises(ModelError, match="1 of 4 weights are not finite as float32"):
        SparseFormat(16).quantize(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]))
