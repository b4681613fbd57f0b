import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, RecipeError
from dlqc.formats.packing import pack, packed_shape, unpack

WIDTHS = range(1, 9)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def bits_of(codes: list[int], bits: int) -> list[int]:
    return [code >> i & 1 for code in codes for i in range(bits)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8), st.integers(0, 6), st.integers(0, 70), st.sampled_from(["rows", "planes"]), st.integers(0, 99)
)
def test_round_trip(bits: int, rows: int, columns: int, layout: str, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits, layout)
    assert tuple(packed.shape) == packed_shape(rows, columns, bits, layout)
    assert torch.equal(unpack(packed, bits, columns, layout), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 64])
def test_rows_are_a_little_endian_bit_stream(bits: int, columns: int) -> None:
    codes = random_codes(3, columns, bits)
    packed = pack(codes, bits)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = bits_of(row, bits)
        assert bits_of(stored, 8) == stream + [0] * (-len(stream) % 32)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 64])
def test_planes_hold_one_bit_of_every_code(bits: int, columns: int) -> None:
    codes = random_codes(3, columns, bits)
    packed = pack(codes, bits, "planes")
    for plane in range(bits):
        for row, stored in zip((codes >> plane & 1).tolist(), packed[plane].tolist(), strict=True):
            assert bits_of(stored, 8) == row + [0] * (-columns % 8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 9, 32, 128, 257])
def test_rows_are_the_words_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    words = pack(codes, bits).view(torch.int32)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("bits", [2, 3])
def test_many_chunks_and_views(layout: str, bits: int) -> None:
    codes = random_codes(300, 8193, bits)
    packed = pack(codes, bits, layout)
    assert torch.equal(unpack(packed, bits, 8193, layout), codes)
    # A view that is neither contiguous nor aligned packs as its copy does.
    view = codes[1::2, 3:8000]
    assert torch.equal(pack(view, bits, layout), pack(view.clone(), bits, layout))
    assert torch.equal(unpack(packed[..., 1:9, :], bits, 8193, layout), codes[1:9])


def test_errors() -> None:
    codes = random_codes(2, 8, 4)
    with pytest.raises(RecipeError, match=r"^layout: unknown layout 'row'\. Did you mean 'rows'\?$"):
        pack(codes, 4, "row")
    with pytest.raises(RecipeError, match=r"^bits: codes of 9 bits cannot be packed\. Use 1 to 8$"):
        pack(codes, 9)
    with pytest.raises(ContractError, match=r"^codes: code 15 does not fit in 3 bits$"):
        pack(torch.full((1, 3), 15, dtype=torch.uint8), 3)
    with pytest.raises(ContractError, match=r"^codes: codes are \(2, 8\) torch.int32, not \[N, K\] torch.uint8$"):
        pack(codes.int(), 4)
    message = (
        r"^packed: packed codes are \(2, 4\) torch.uint8, not \(2, 8\) torch.uint8\. Check bits=4, in_features=9, 'ro"
    )
    with pytest.raises(ContractError, match=message):
        unpack(pack(codes, 4), 4, 9)
    with pytest.raises(
        ContractError, match=r"^packed: packed codes are \(4,\) torch.uint8, not \(0, 4\) torch.uint8\."
    ):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 8)
