import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.lattice import (
    GAUSSIAN_STD,
    LatticeFormat,
    LatticeWeight,
    codebook,
    decode,
    nearest,
    patterns,
)


def test_the_codebook_is_the_one_of_the_definition() -> None:
    points = codebook()
    assert torch.unique(points, dim=0).shape == (65536, 8)
    # Every point is a quarter off a vector of odd halves with an even sum, +1/4 in the first half of the codes.
    half = points - torch.where(torch.arange(65536) < 32768, 0.25, -0.25).unsqueeze(1)
    assert torch.equal((half * 2) % 2, torch.ones_like(half))
    assert torch.equal(half.sum(dim=1) % 2, torch.zeros(65536))
    norms = half.square().sum(dim=1)
    # All of that set with a squared norm of at most 10: 227 patterns with 128 choices of signs, under both shifts.
    axis = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    grid = torch.cartesian_prod(*[axis.abs().unique()] * 8)
    assert int((grid.square().sum(dim=1) <= 10).sum()) == 227
    assert int((norms <= 10).sum()) == 227 * 256
    assert torch.equal(norms[norms > 10], torch.full((29 * 256,), 12.0))
    # The last 29, by the rule of this file: stored codes depend on it.
    places = [torch.nonzero(pattern == 0.5).flatten().tolist() for pattern in patterns()[227:]]
    assert places[:3] == [[0, 1, 3], [0, 1, 5], [0, 1, 7]]
    assert [sum(place) % 2 for place in places] == [0] * 28 + [1]
    assert places[28] == [0, 1, 2]


def test_signs_and_shift_are_where_the_code_says() -> None:
    code = torch.tensor([[0, 1 << 15, 1 << 8, 1 << 14]], dtype=torch.uint16)
    first = torch.full((8,), 0.5)
    assert torch.equal(patterns()[0], first)
    found = decode(code).reshape(4, 8)
    assert torch.equal(found[0], first + 0.25)
    assert torch.equal(found[1], first - 0.25)
    # A pattern without 3/2 has an even number of negative elements: the last one follows.
    assert torch.equal(found[2], torch.tensor([-0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -0.5]) + 0.25)
    assert torch.equal(found[3], torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -0.5, -0.5]) + 0.25)


@pytest.mark.parametrize("size", [0.02, 0.3, 1.0, 1.5, 3.0, 100.0])
def test_the_nearest_point_is_that_of_all_65536(size: float) -> None:
    x = torch.randn(400, 8) * size
    points = codebook().double()
    distance = torch.cdist(x.double(), points)
    found = points[nearest(x.T.contiguous()).long()]
    # A tie up to the roundoff of float32 may go either way: compare distances, not codes.
    assert bool(((x - found).norm(dim=1) <= distance.amin(dim=1) + 1e-6 * size).all())


def test_the_last_patterns_are_found() -> None:
    points = codebook()[torch.arange(227, 65536, 256)]
    noisy = points + 0.05 * torch.randn(points.shape)
    found = nearest(noisy.T.contiguous())
    assert torch.equal(codebook()[found.long()], points)
    assert torch.equal(found, torch.arange(227, 65536, 256, dtype=torch.int32))


def test_every_point_is_its_own_nearest() -> None:
    assert torch.equal(nearest(codebook().T.contiguous()), torch.arange(65536, dtype=torch.int32))


def test_the_error_on_gaussian_weights() -> None:
    # Scalar: 0.1175 (Max 1960), rate-distortion bound: 0.0625. 0.0914 is measured, on 2^20 vectors to ±0.0002.
    x = torch.randn(1 << 17, 8)

    def error(std: float) -> float:
        y = x * std
        return (codebook()[nearest(y.T.contiguous()).long()] - y).square().mean().item() / std**2

    best = error(GAUSSIAN_STD)
    assert best == pytest.approx(0.0914, abs=0.0006)
    assert best < min(error(GAUSSIAN_STD - 0.06), error(GAUSSIAN_STD + 0.06))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_packing_returns_the_same_weight(rows: int, vectors: int, groups: int, channel: bool, seed: int) -> None:
    weight = torch.randn(rows, 8 * vectors * groups, generator=torch.Generator().manual_seed(seed))
    fmt = LatticeFormat(None if channel else 8 * vectors)
    found = fmt.quantize(weight)
    again = fmt.unpack(found.pack(), weight.shape[1])
    assert torch.equal(again.codes.to(torch.int32), found.codes.to(torch.int32))
    assert torch.equal(again.dequantize(), found.dequantize())
    # Groups stand alone.
    if not channel:
        part = fmt.quantize(weight[:, : 8 * vectors])
        assert torch.equal(part.dequantize(), found.dequantize()[:, : 8 * vectors])


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_bits_per_weight_counts_the_stored_bytes(group: int | None, scale_dtype: str) -> None:
    fmt = LatticeFormat(group, scale_dtype)
    stored = sum(part.nbytes for part in fmt.quantize(torch.randn(16, 192)).pack().values())
    assert fmt.bits_per_weight(16, 192) * 16 * 192 == 8 * stored


def test_refitting_scales_never_hurts() -> None:
    weight = torch.randn(400, 128) ** 3
    fmt = LatticeFormat(8)
    found = [fmt.quantize(weight, refits=n).dequantize() for n in range(4)]
    errors = [(part - weight).reshape(400, 16, 8).square().sum(-1) for part in found]
    for more, less in zip(errors[1:], errors[:-1], strict=True):
        assert bool((more <= less * (1 + 1e-5)).all())
    assert errors[3].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("fmt", [LatticeFormat(), LatticeFormat(8, "float16"), LatticeFormat(None, "float32")])
def test_zeros_constants_and_denormals(fmt: LatticeFormat) -> None:
    weight = torch.zeros(4, 16)
    weight[1] = 0.7
    weight[2] = 2.0**-140
    weight[3, 0] = 2.0**-149
    found = fmt.quantize(weight).dequantize()
    assert bool(torch.isfinite(found).all())
    # The codebook has no zero: a scale of 1 would leave ±1/4 in a row of zeros.
    assert torch.equal(found[0], torch.zeros(16))
    assert bool(((found[1] - 0.7).abs() <= 0.7).all())
    assert bool((found[2:].abs() <= 2.0**-20).all())


def test_many_rows_equal_one_row_at_a_time() -> None:
    weight = torch.randn(600, 1024)  # several chunks
    whole, part = LatticeFormat().quantize(weight), LatticeFormat().quantize(weight[250:251])
    assert torch.equal(whole.codes[250:251].to(torch.int32), part.codes.to(torch.int32))
    assert torch.equal(whole.scales[250:251], part.scales)


def test_impossible_formats_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"^group_size: a group of 12 input features does not hold whole vectors of 8\. U"
    ):
        LatticeFormat(12)
    with pytest.raises(
        RecipeError, match=r"^scale_dtype: scales cannot be stored as 'fp8'\. Use bfloat16, float16, fl"
    ):
        LatticeFormat(scale_dtype="fp8")
    with pytest.raises(
        FeasibilityError, match=r"^group_size: 12 input features do not divide by 8, the vectors of e8p\. U"
    ):
        LatticeFormat().quantize(torch.randn(2, 12))
    with pytest.raises(
        FeasibilityError, match=r"^group_size: 24 input features do not divide by group 16\. Use another"
    ):
        LatticeFormat(16).bits_per_weight(8, 24)
    with pytest.raises(
        FeasibilityError, match=r"^scale_dtype: a scale of 1e\+06 does not fit float16\. Use 'bfloat16' or"
    ):
        LatticeFormat(scale_dtype="float16").stored(torch.tensor([1e6]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.randn(4, 16)
    fmt = LatticeFormat(8)
    scales = fmt.parameters(weight)
    weight[2, 3] = value
    message = r"^1 of 64 weights are not finite as float32\. Check the checkpoint"
    with pytest.raises(ModelError, match=message):
        fmt.quantize(weight)
    with pytest.raises(ModelError, match=message):
        fmt.encode(weight, scales)


def test_ill_formed_weights_are_refused() -> None:
    codes, scales = torch.zeros(2, 2, dtype=torch.uint16), torch.ones(2, 1, dtype=torch.bfloat16)
    with pytest.raises(ContractError, match=r"^codes: codes are \(2, 2\) torch.uint8, not \[N, K/8\] torch.uint16$"):
        LatticeWeight(codes.to(torch.uint8), scales, LatticeFormat())
    with pytest.raises(
        ContractError, match=r"^scales: scales are \(2, 1\) torch.float32, not \(2, 1\) torch.bfloat16$"
    ):
        LatticeWeight(codes, scales.float(), LatticeFormat())
