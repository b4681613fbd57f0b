import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.codebook import CodebookFormat, CodebookWeight, midpoints


def tables(fmt: CodebookFormat, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return fmt.stored(torch.randn(rows, fmt.groups(width), fmt.entries, generator=generator))


def some(fmt: CodebookFormat, rows: int, width: int, seed: int = 0) -> torch.Tensor | None:
    """A mask of as many random weights as the format stores in CSR."""
    if not fmt.sparse:
        return None
    mask = torch.zeros(rows * width, dtype=torch.bool)
    mask[torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed))[: fmt.outliers(rows, width)]] = (
        True
    )
    return mask.reshape(rows, width)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("table_dtype", ["float16", "bfloat16", "float32"])
def test_each_code_is_the_nearest_value(bits: int, group: int | None, table_dtype: str) -> None:
    fmt = CodebookFormat(bits, group, table_dtype=table_dtype)
    weight, table = torch.randn(30, 64) * 1.5, tables(fmt, 30, 64)
    found = fmt.quantize(weight, table)
    error = (weight.reshape(30, table.shape[1], -1, 1) - table.float().unsqueeze(2)).abs()
    own = (weight - found.dequantize()).abs().reshape(error.shape[:3])
    assert torch.equal(own, error.amin(dim=3))
    assert bool((table.float().diff(dim=2) >= 0).all())


def test_halfway_goes_down_and_tables_need_not_be_sorted() -> None:
    fmt = CodebookFormat(2)
    found = fmt.quantize(torch.tensor([[-2.0, -1.5, 0.0, 0.5, 0.51, 9.0]]), torch.tensor([[[3.0, -2, 1, -1]]]))
    assert found.tables.flatten().tolist() == [-2, -1, 1, 3]
    assert found.codes.flatten().tolist() == [0, 0, 1, 2, 2, 3]
    assert bool(torch.isfinite(midpoints(torch.tensor([-3.4e38, 3.4e38, 3.4e38]))).all())


@pytest.mark.parametrize("table_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group", [None, 8])
def test_sparse_weights_are_as_exact_as_their_type(table_dtype: str, group: int | None) -> None:
    fmt = CodebookFormat(3, group, 0.1, table_dtype)
    weight, table, mask = torch.randn(20, 40), tables(fmt, 20, 40), some(fmt, 20, 40)
    weight[mask] *= 50
    found = fmt.quantize(weight, table, mask)
    dense = CodebookFormat(3, group, 0.0, table_dtype).quantize(weight, table)
    assert torch.equal(found.codes, dense.codes)
    assert torch.equal(found.dequantize()[~mask], dense.dequantize()[~mask])
    left = (weight - dense.dequantize())[mask].abs()
    roundoff = 2.0 ** (-11 if table_dtype == "float16" else -23)
    assert bool(
        ((weight - found.dequantize())[mask].abs() <= roundoff * (left + weight[mask].abs() * 2**-10) + 1e-7).all()
    )
    # The parts are the CSR matrix of the difference.
    sparse, starts = torch.zeros(20, 40), found.starts.tolist()
    for row in range(20):
        for entry in range(starts[row], starts[row + 1]):
            sparse[row, int(found.columns[entry])] = float(found.values[entry])
    torch.testing.assert_close(found.dequantize(), dense.dequantize() + sparse)
    assert torch.equal(sparse != 0, mask)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 3, 4]),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.integers(0, 2**31),
)
def test_packing_returns_the_same_weight(
    bits: int, rows: int, group: int, groups: int, channel: bool, sparse: float, seed: int
) -> None:
    fmt = CodebookFormat(bits, None if channel else group, sparse)
    width = group * groups
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    found = fmt.quantize(weight, tables(fmt, rows, width, seed), some(fmt, rows, width, seed))
    again = fmt.unpack(found.pack(), width)
    assert torch.equal(again.dequantize(), found.dequantize())
    assert torch.equal(again.codes, found.codes)


@pytest.mark.parametrize("fmt", [CodebookFormat(4), CodebookFormat(3, 32), CodebookFormat(2, 64, 0.0045, "float32")])
def test_bits_per_weight_counts_the_stored_bytes(fmt: CodebookFormat) -> None:
    found = fmt.quantize(torch.randn(33, 192), tables(fmt, 33, 192), some(fmt, 33, 192))
    stored = sum(part.nbytes for part in found.pack().values())
    assert fmt.bits_per_weight(33, 192) * 33 * 192 == pytest.approx(8 * stored, rel=1e-15)


def test_wide_rows_need_wider_column_numbers() -> None:
    fmt = CodebookFormat(2, None, 1e-4)
    weight = torch.randn(1, 70000)
    mask = torch.zeros(1, 70000, dtype=torch.bool)
    mask[0, -7:] = True
    found = fmt.quantize(weight, tables(fmt, 1, 70000), mask)
    assert found.columns.tolist() == list(range(69993, 70000))
    assert found.columns.dtype == torch.int32
    expected = 2 * 70000 + 4 * 16 + 7 * (16 + 32) + 64
    assert fmt.bits_per_weight(1, 70000) * 70000 == pytest.approx(expected, rel=1e-14)


def test_many_rows_equal_one_row_at_a_time() -> None:
    fmt, weight = CodebookFormat(3, 128), torch.randn(600, 2048)
    table = tables(fmt, 600, 2048)
    assert torch.equal(fmt.encode(weight, table)[250:251], fmt.encode(weight[250:251], table[250:251]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    fmt, weight = CodebookFormat(3, 16), torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(ModelError, match=r"^1 of 256 weights are not finite as float32\. Check the checkpoint"):
        fmt.quantize(weight, tables(fmt, 4, 64))


def test_huge_finite_weights_are_not_called_infinite() -> None:
    fmt = CodebookFormat(2, table_dtype="float32")
    found = fmt.quantize(torch.full((2, 8), 3e38), torch.tensor([[-3e38, 0, 1, 3e38]] * 2).reshape(2, 1, 4))
    assert torch.equal(found.dequantize(), torch.full((2, 8), 3e38))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: 5 is not a width of a codebook\. Use 2, 3 or 4$"),
        ({"bits": 4, "group_size": 0}, r"^group_size: a group of 0 input features is impossible\. Use 512 or more, or"),
        ({"bits": 4, "sparse": 0.6}, r"^sparse: a share of 0.6 sparse weights is not within 0 and 0.5\. Use 0.0045$"),
        (
            {"bits": 4, "table_dtype": "fp8"},
            r"^table_dtype: tables cannot be stored as 'fp8'\. Use bfloat16, float16, fl",
        ),
    ],
)
def test_impossible_formats_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        CodebookFormat(**options)


def test_what_does_not_fit_is_refused() -> None:
    fmt = CodebookFormat(2, 16)
    with pytest.raises(
        FeasibilityError, match=r"^group_size: 40 input features do not divide by group 16\. Use a divisor"
    ):
        fmt.bits_per_weight(2, 40)
    with pytest.raises(
        FeasibilityError, match=r"^table_dtype: table values reach 1e\+06: they do not fit float16\. Use "
    ):
        fmt.stored(torch.full((1, 1, 4), 1e6))
    sparse = CodebookFormat(2, None, 0.25)
    with pytest.raises(
        FeasibilityError, match=r"^table_dtype: sparse values reach 1e\+06: they do not fit float16\. Use"
    ):
        sparse.quantize(
            torch.tensor([[1e6, 0, 0, 0]]), torch.zeros(1, 1, 4), torch.tensor([[True, False, False, False]])
        )


def test_ill_formed_weights_are_refused() -> None:
    fmt, sparse = CodebookFormat(2), CodebookFormat(2, None, 0.25)
    codes, table = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 1, 4, dtype=torch.float16)
    starts, columns = torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.uint16)
    values = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(
        ContractError, match=r"^tables: tables are \(2, 1, 8\) torch.float16, not \(2, 1, 4\) torch.float"
    ):
        fmt.encode(torch.zeros(2, 8), torch.zeros(2, 1, 8, dtype=torch.float16))
    with pytest.raises(ContractError, match=r"^codes: codes are torch.int8, not torch.uint8$"):
        CodebookWeight(codes.to(torch.int8), table, None, None, None, fmt)
    with pytest.raises(
        ContractError, match=r"^tables: tables are \(2, 1, 4\) torch.float32, not \(2, 1, 4\) torch.float"
    ):
        CodebookWeight(codes, table.float(), None, None, None, fmt)
    with pytest.raises(ContractError, match=r"^starts: a weight in codebook2 channel has no starts, columns, values$"):
        CodebookWeight(codes, table, starts, columns, values, fmt)
    with pytest.raises(
        ContractError, match=r"^starts: a weight in .* \+25% sparse needs all of starts, columns, values$"
    ):
        CodebookWeight(codes, table, starts, columns, None, sparse)
    with pytest.raises(ContractError, match=r"^starts: row starts are \(2,\) torch.int32, not \(3,\) torch.int32$"):
        CodebookWeight(codes, table, starts[:2], columns, values, sparse)
    with pytest.raises(
        ContractError, match=r"^columns: sparse columns are \(4,\) torch.int32, not \(4,\) torch.uint16$"
    ):
        CodebookWeight(codes, table, starts, columns.to(torch.int32), values, sparse)
    with pytest.raises(
        ContractError, match=r"^values: sparse values are \(3,\) torch.float16, not \(4,\) torch.float16$"
    ):
        CodebookWeight(codes, table, starts, columns, values[:3], sparse)
