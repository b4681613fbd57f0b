import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.microscaling import MicroscalingFormat, MicroscalingWeight, encode, values

FORMATS = [MicroscalingFormat(), MicroscalingFormat(rounding="even"), MicroscalingFormat("nvfp4")]


def label(fmt: MicroscalingFormat) -> str:
    return fmt.label


def test_the_values_are_e2m1() -> None:
    # 1 sign, 2 exponent (bias 1), 1 mantissa: subnormals at exponent 0.
    for code in range(16):
        sign, exponent, mantissa = 1 - 2 * (code >> 3), (code >> 1) & 3, code & 1
        value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert values()[code] == sign * value


def test_elements_are_nearest_with_ties_to_even() -> None:
    x = torch.cat([torch.linspace(-9, 9, 14401), torch.randn(10000) * 3])
    code = encode(x)
    error = (x.unsqueeze(1) - values()).abs()
    assert torch.equal(error.gather(1, code.long().unsqueeze(1)).squeeze(1), error.amin(dim=1))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert encode(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert encode(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    assert encode(torch.tensor([float("inf"), -1e30, -0.0])).tolist() == [7, 15, 8]


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weight_is_element_times_scale(fmt: MicroscalingFormat, dtype: torch.dtype) -> None:
    weight = (torch.randn(20, 96) * torch.exp(torch.randn(20, 96))).to(dtype)
    found = fmt.quantize(weight)
    if found.factor is None:
        scale = torch.ldexp(torch.ones(20, 3), found.scales.int() - 127)
    else:
        scale = found.scales.float() / found.factor
    scale = scale.repeat_interleave(fmt.block, dim=1)
    assert torch.equal(found.dequantize(), values()[found.codes.long()] * scale)
    inside = weight.float().abs() <= 6 * scale
    error = (weight.float() - found.dequantize()).abs() / scale
    assert bool((error <= 1 + 1e-6)[inside].all())
    assert inside.float().mean() > 0.95


def test_exponents_follow_the_ocp_rule() -> None:
    # The largest element of a block, in units of its power of two, and what the scale's exponent is.
    largest = torch.tensor([1.0, 1.0001, 1.5, 1.7499, 1.75, 1.9999, 2.0, 6.0, 7.0])
    weight = torch.zeros(9, 32)
    weight[:, 5] = -largest
    floor = MicroscalingFormat().quantize(weight)
    assert (floor.scales.int() - 127).flatten().tolist() == [-2, -2, -2, -2, -2, -2, -1, 0, 0]
    even = MicroscalingFormat(rounding="even").quantize(weight)
    assert (even.scales.int() - 127).flatten().tolist() == [-2, -2, -2, -2, -1, -1, -1, 0, 1]
    # 7 is clamped to 6 under "floor"; under "even" it is 3.5 · 2, a tie that goes to 4 · 2.
    assert floor.dequantize()[8, 5] == -6
    assert even.dequantize()[8, 5] == -8


def test_mxfp4_is_that_of_compressed_tensors() -> None:
    weight = torch.randn(50, 128) * torch.exp(2 * torch.randn(50, 1))
    found = MicroscalingFormat(rounding="even").quantize(weight)
    largest = weight.reshape(50, 4, 32).abs().amax(2)
    assert torch.equal(found.scales, generate_mx_scales(largest).to(torch.uint8))
    arguments = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    scale = torch.exp2(found.scales.float() - 127)
    codes = quantize(weight, scale, torch.zeros_like(scale), arguments)
    assert torch.equal(values()[found.codes.long()], codes)
    assert torch.equal(found.pack()["codes"], pack_fp4_to_uint8(codes.to(torch.bfloat16)))


def test_nvfp4_is_that_of_compressed_tensors() -> None:
    weight = torch.randn(50, 128) * torch.exp(torch.randn(50, 1))
    found = MicroscalingFormat("nvfp4").quantize(weight)
    factor = generate_gparam(weight.amin(), weight.amax())
    assert torch.equal(found.factor, factor)
    arguments = QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )
    grouped = weight.reshape(50, 8, 16)
    scale, _ = calculate_qparams(grouped.amin(2), grouped.amax(2), arguments, global_scale=factor)
    assert torch.equal(found.scales.float(), scale.float())
    codes = quantize(weight, scale.float(), None, arguments, global_scale=factor)
    assert torch.equal(values()[found.codes.long()], codes)
    assert torch.equal(found.pack()["codes"], pack_fp4_to_uint8(codes.to(torch.bfloat16)))
    theirs = dequantize(codes, scale.float(), args=arguments, global_scale=factor, dtype=torch.float32)
    assert torch.equal(found.dequantize(), theirs)


def test_the_error_on_gaussian_weights() -> None:
    weight = torch.randn(512, 1024)
    errors = [(fmt.quantize(weight).dequantize() - weight).square().mean().item() for fmt in FORMATS]
    # Measured: power-of-two scales cost, blocks of 16 with finer scales win.
    assert errors == pytest.approx([0.0132, 0.0125, 0.0090], rel=0.03)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(FORMATS), st.integers(0, 2**31))
def test_packing_returns_the_same_weight(rows: int, blocks: int, fmt: MicroscalingFormat, seed: int) -> None:
    width = fmt.block * blocks
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    found = fmt.quantize(weight)
    parts = found.pack()
    assert torch.equal(fmt.unpack(parts, width).dequantize(), found.dequantize())
    stored = 8 * sum(part.nbytes for part in parts.values())
    assert fmt.bits_per_weight(rows, width) * rows * width == pytest.approx(stored, rel=1e-14)


def test_bits_per_weight() -> None:
    assert MicroscalingFormat().bits_per_weight(4096, 4096) == 4.25
    assert MicroscalingFormat("nvfp4").bits_per_weight(4096, 4096) == 4.5 + 32 / 4096**2


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_zeros_constants_and_denormals(fmt: MicroscalingFormat) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 0.75
    weight[2, :32] = -0.375
    found = fmt.quantize(weight)
    assert torch.equal(found.dequantize()[weight == 0], torch.zeros(int((weight == 0).sum())))
    torch.testing.assert_close(found.dequantize(), weight, rtol=1e-6 if fmt.kind == "mxfp4" else 2**-4, atol=0)
    assert torch.equal(fmt.quantize(0 * weight).dequantize(), 0 * weight)
    for size in (2.0**-149, 2.0**-130, 2.0**-126, 3e38):
        again = fmt.quantize(torch.randn(3, 64).clamp(-1, 1) * size).dequantize()
        assert bool(torch.isfinite(again).all())
        assert again.abs().max() <= 1.2 * size


def test_blocks_far_smaller_than_the_largest() -> None:
    # NVFP4 scales end at 2^-9 / g. Scales that would round to zero are that, and elements still tell weights apart.
    weight = (torch.randn(1, 160) * 0.05).clamp(-0.14, 0.14)
    weight[0, 0] = 1e5
    found = MicroscalingFormat("nvfp4").quantize(weight)
    smallest = 2.0**-9 * 1e5 / 2688
    assert found.scales[0, 1:].float().unique().tolist() == [2.0**-9]
    assert (found.dequantize() - weight)[0, 16:].abs().max() <= smallest / 4 * (1 + 1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(fmt: MicroscalingFormat, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(ModelError, match=r"^1 of 256 weights are not finite as float32\. Check the checkpoint"):
        fmt.quantize(weight)


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"^kind: unknown kind 'mxfp8'\. Did you mean 'mxfp4'\?$"):
        MicroscalingFormat("mxfp8")
    with pytest.raises(RecipeError, match=r"^rounding: unknown rounding 'ceil'\. Use 'floor' or 'even'$"):
        MicroscalingFormat(rounding="ceil")
    message = r"^kind: 48 input features do not divide by 32, the block of mxfp4\. Use another format, or exclude"
    with pytest.raises(FeasibilityError, match=message):
        MicroscalingFormat().quantize(torch.randn(2, 48))
    with pytest.raises(FeasibilityError, match=message):
        MicroscalingFormat().bits_per_weight(2, 48)
    codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.uint8)
    with pytest.raises(ContractError, match=r"^codes: codes are torch.int8, not torch.uint8$"):
        MicroscalingWeight(codes.to(torch.int8), scales, None, FORMATS[0])
    with pytest.raises(
        ContractError, match=r"^scales: scales are \(2, 2\) torch.uint8, not \(2, 4\) torch.float8_e4m3fn"
    ):
        MicroscalingWeight(codes, scales, None, FORMATS[2])
    with pytest.raises(ContractError, match=r"^factor: a weight in mxfp4 has no factor$"):
        MicroscalingWeight(codes, scales, torch.ones(1), FORMATS[0])
    fine = torch.ones(2, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ContractError, match=r"^factor: a weight in nvfp4 needs a factor$"):
        MicroscalingWeight(codes, fine, None, FORMATS[2])
    with pytest.raises(ContractError, match=r"^factor: the factor is \(2,\) torch.float32, not \(1,\) torch.float32$"):
        MicroscalingWeight(codes, fine, torch.ones(2), FORMATS[2])
