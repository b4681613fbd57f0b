"""Factors of low rank as they are stored, and texts that spell none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, RecipeError
from dlqc.formats.coded import spell
from dlqc.formats.low_rank import DTYPES, LowRankFormat, low_rank_fault, low_rank_format
from dlqc.ops import LOW_RANK

#: Largest relative error of an element: half a step of the dtype; for int8 half a step of the row's largest, with its scale in
#: bfloat16.
ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "int8": 1 / 255 + 2.0**-8}


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5), st.integers(5, 40), st.integers(5, 40), st.sampled_from(sorted(DTYPES)), st.integers(0, 2**31)
)
def test_factors_come_back(rank: int, rows: int, columns: int, dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(rank, width, generator=generator, dtype=torch.float64) for width in (rows, columns)]
    fmt = LowRankFormat(rank, dtype)
    parts = fmt.store(*factors)
    assert {r: (tuple(p.shape), p.dtype) for r, p in parts.items()} == fmt.parts_of(rows, columns)
    assert fmt.bits(rows, columns) == 8 * sum(part.nbytes for part in parts.values())
    ordered = [part for _, part in sorted(parts.items())]
    assert low_rank_fault(spell(fmt), ordered, rows, columns) is None
    for found, factor in zip(fmt.factors(parts), factors, strict=True):
        unit = factor.abs().amax(1, keepdim=True) if dtype == "int8" else factor.abs()
        assert bool(((found - factor).abs() <= ERROR[dtype] * unit + 1e-7).all())
    x, y = torch.randn(3, columns, generator=generator), torch.randn(3, rows, generator=generator)
    left, right = fmt.factors(parts)
    torch.testing.assert_close(LOW_RANK(y, x, ordered, spell(fmt)), y + x @ right.T @ left, rtol=1e-5, atol=1e-4)
    wide = LOW_RANK(
        y.double(), x.double(), [p.double() if p.dtype == torch.float32 else p for p in ordered], spell(fmt)
    )
    torch.testing.assert_close(wide, y + x.double() @ right.double().T @ left.double(), rtol=1e-12, atol=1e-12)
    half = LOW_RANK(y.bfloat16(), x.bfloat16(), ordered, spell(fmt))
    assert half.dtype == torch.bfloat16


def test_the_text_is_what_artifacts_hold() -> None:
    assert spell(LowRankFormat(16)) == "low_rank(rank=16,dtype=int8)"
    assert low_rank_format("low_rank(rank=4,dtype=float16)") == LowRankFormat(4, "float16")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "low_rank",
        "low_rank(rank=4)",
        "low_rank(rank=0,dtype=int8)",
        "low_rank(rank=-4,dtype=int8)",
        "low_rank(rank=04,dtype=int8)",
        "low_rank(rank=99999999999,dtype=int8)",
        "low_rank(rank=4,dtype=float64)",
        "low_rank(dtype=int8,rank=4)",
        "low_rank(rank=4,dtype=int8,rank=4)",
        "low_rank(rank=4,dtype=int8)\n",
        "nf4(block=64,scale_block=256)",
    ],
)
def test_a_text_that_spells_none(spec: str) -> None:
    with pytest.raises(ContractError, match=r"^spec: '.*' spells no weight format\. See dlqc/formats/coded\.py$"):
        low_rank_format(spec)
    assert low_rank_fault(spec, [], 8, 8) is not None


def test_factors_that_do_not_fit_are_named() -> None:
    fmt = LowRankFormat(2, "bfloat16")
    parts = [part for _, part in sorted(fmt.store(torch.randn(2, 5), torch.randn(2, 7)).items())]
    spec = spell(fmt)
    assert low_rank_fault(spec, parts, 5, 7) is None
    assert low_rank_fault(spec, parts[:1], 5, 7) == f"{spec} has the parts left, right, 1 came"
    assert low_rank_fault(spec, parts, 6, 7) == "left is bfloat16[2, 5], must be bfloat16[2, 6]"
    assert low_rank_fault(spec, [parts[0], parts[1].half()], 5, 7) == "right is float16[2, 7], must be bfloat16[2, 7]"
    assert low_rank_fault(spec, parts, 1, 7) == "a [1, 7] matrix has no rank of 2"
    with pytest.raises(
        ContractError, match=r"^low_rank: left is bfloat16\[2, 5\], must be bfloat16\[2, 4\]\. Use the te"
    ):
        LOW_RANK(torch.zeros(1, 4), torch.zeros(1, 7), parts, spec)


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"^rank: a rank of 0 is none\. Use 16, or leave low_rank out$"):
        LowRankFormat(0)
    with pytest.raises(RecipeError, match=r"^dtype: factors cannot be stored as 'int4'\. Use bfloat16, float16, int8$"):
        LowRankFormat(4, "int4")
