import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, ModelError, RecipeError
from dlqc.formats.fp8 import Fp8Format, Fp8Weight, quantize_tokens

UNITS = ("tensor", "channel", "block")


def values() -> torch.Tensor:
    """The finite values of E4M3 from their definition, float64, rising."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue  # NaN
            found.append(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    return torch.tensor(sorted({*found, *(-value for value in found)}), dtype=torch.float64)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_code_is_the_nearest_value(unit: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(150, 200) * torch.exp(2 * torch.randn(150, 200))).to(dtype)
    found = Fp8Format(unit).quantize(weight)
    assert found.codes.dtype == torch.float8_e4m3fn
    rows, columns = {"tensor": (150, 200), "channel": (1, 200), "block": (128, 128)}[unit]
    scale = found.scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:150, :200]
    scaled = weight.float() / scale
    error = (scaled.double().unsqueeze(2) - values()).abs().amin(dim=2)
    assert torch.equal((scaled.double() - found.codes.double()).abs(), error)
    assert torch.equal(found.dequantize(), found.codes.float() * scale)
    bound = torch.maximum(weight.float().abs() / 16, scale / 1024)
    assert bool(((found.dequantize() - weight.float()).abs() <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("unit", UNITS)
def test_the_largest_weight_of_a_unit_is_448_scales(unit: str) -> None:
    weight = torch.randn(300, 260)
    found = Fp8Format(unit).quantize(weight)
    rows, columns = {"tensor": (300, 260), "channel": (1, 260), "block": (128, 128)}[unit]
    for i, block in enumerate(weight.split(rows)):
        for j, part in enumerate(block.split(columns, dim=1)):
            assert found.scales[i, j] == part.abs().max() / 448
    assert found.scales.shape == Fp8Format(unit).scale_shape(300, 260)


def test_scales_and_codes_are_those_of_compressed_tensors() -> None:
    weight = torch.randn(40, 96)
    arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), arguments)
    codes = quantize(weight, scale, zero, arguments, dtype=torch.float8_e4m3fn)
    found = Fp8Format().quantize(weight)
    assert torch.equal(found.scales, scale)
    assert torch.equal(found.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found.dequantize(), dequantize(codes, scale, args=arguments, dtype=torch.float32))


def test_ties_go_to_even_and_what_is_too_large_saturates() -> None:
    x = torch.tensor([[448.0, 17, 19, 2.0**-10, 3 * 2.0**-10, 460, -0.0]])
    codes, scale = quantize_tokens(x[:, :5])
    assert scale.item() == 1
    assert codes.float().tolist() == [[448, 16, 20, 0, 2.0**-8]]
    # 460 / (460 / 448) may round above 448, where the plain conversion gives NaN.
    for size in torch.linspace(400, 500, 300).tolist():
        assert bool(torch.isfinite(quantize_tokens(torch.tensor([size, 1.0]))[0].float()).all())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 40), st.integers(0, 2**31))
def test_tokens_have_a_scale_each(shape: list[int], width: int, seed: int) -> None:
    x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    codes, scale = quantize_tokens(x)
    assert codes.shape == x.shape
    assert scale.shape == (*shape, 1)
    assert bool(
        (
            (codes.float() * scale - x.float()).abs() <= torch.maximum(x.float().abs() / 16, scale / 1024) * (1 + 1e-6)
        ).all()
    )
    assert torch.equal(codes.float().abs().amax(-1), torch.full(tuple(shape), 448.0))


def test_tokens_of_zeros_and_denormals() -> None:
    codes, scale = quantize_tokens(torch.tensor([[0.0, 0.0], [2.0**-149, 0.0], [3e38, -3e38]]))
    assert scale[0] == 1
    assert bool((scale > 0).all() & torch.isfinite(codes.float() * scale).all())
    assert torch.equal(codes[0].float(), torch.zeros(2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(UNITS), st.integers(0, 2**31))
def test_packing_returns_the_same_weight(rows: int, columns: int, unit: str, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    fmt = Fp8Format(unit)
    found = fmt.quantize(weight)
    parts = found.pack()
    assert torch.equal(fmt.unpack(parts, columns).dequantize(), found.dequantize())
    stored = parts["codes"].nbytes - rows * (-columns % 4) + parts["scales"].nbytes
    assert fmt.bits_per_weight(rows, columns) * rows * columns == pytest.approx(8 * stored, rel=1e-14)


@pytest.mark.parametrize("unit", UNITS)
def test_zeros_constants_and_denormals(unit: str) -> None:
    weight = torch.zeros(130, 130)
    weight[:2] = 0.75
    found = Fp8Format(unit).quantize(weight)
    torch.testing.assert_close(found.dequantize(), weight, rtol=1e-7, atol=0)
    assert torch.equal(Fp8Format(unit).quantize(0 * weight).scales, torch.ones(found.scales.shape))
    for size in (2.0**-149, 2.0**-130, 3e38):
        again = Fp8Format(unit).quantize(weight * size).dequantize()
        assert bool(torch.isfinite(again).all())
        assert bool(((again - weight * size).abs() <= size / 16 + 2.0**-126 / 1024).all())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(unit: str, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(ModelError, match=r"^1 of 256 weights are not finite as float32\. Check the checkpoint"):
        Fp8Format(unit).quantize(weight)


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"^unit: scales cannot be shared by 'chanel'\. Did you mean 'channel'\?$"):
        Fp8Format("chanel")
    assert Fp8Format().check(33) is None
    assert Fp8Format().check(0) == "0 input features cannot be stored"
    codes = torch.zeros(2, 64).to(torch.float8_e4m3fn)
    with pytest.raises(
        ContractError, match=r"^codes: codes are \(2, 64\) torch.uint8, not \[N, K\] torch.float8_e4m3fn$"
    ):
        Fp8Weight(codes.view(torch.uint8), torch.ones(2, 1), Fp8Format())
    with pytest.raises(ContractError, match=r"^scales: scales are \(1, 1\) torch.float32, not \(2, 1\) torch.float32$"):
        Fp8Weight(codes, torch.ones(1, 1), Fp8Format())
