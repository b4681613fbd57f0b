from itertools import product

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.packing import pack

ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
FORMATS = [IntFormat(b, g, s, d) for b, g, s, d in product((2, 3, 4, 8), (None, 8), (True, False), ROUNDOFF)]


def label(fmt: IntFormat) -> str:
    return f"{fmt.label} {fmt.scale_dtype}"


def weights(kind: str, rows: int = 33, columns: int = 40) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * 0.02
    match kind:
        case "shifted":
            weight += 0.1
        case "negative":
            weight = -weight.abs() - 0.01
        case "heavy":
            weight = weight**3 * 1e4
        case "tiny":
            weight *= 2.0**-120
    return weight


def spread(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
@pytest.mark.parametrize("kind", ["normal", "shifted", "negative", "heavy"])
def test_every_weight_is_within_the_derived_bound(fmt: IntFormat, kind: str) -> None:
    # float16 has subnormal scales here and there: their absolute roundoff is 2^-25.
    weight = weights(kind)
    quantized = fmt.quantize(weight)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) <= fmt.top
    scale = spread(quantized.scales, weight)
    u = ROUNDOFF[fmt.scale_dtype]
    moved = (scale * u / (1 - u)).clamp(min=2.0**-25 if fmt.scale_dtype == "float16" else 0)
    bound = scale / 2 + fmt.top * moved
    error = (weight - quantized.dequantize()).abs()
    assert bool((error <= bound * (1 + 2e-6)).all())
    # Inside the range of the codes, half a step is the whole error.
    clamped = (quantized.codes == 0) | (quantized.codes == fmt.top)
    assert bool((error <= scale / 2 * (1 + 1e-5) + weight.abs() * 2e-7)[~clamped].all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_bound_on_rounded_scales_is_nearly_reached(symmetric: bool) -> None:
    # 8 bits and bfloat16: the outermost code loses up to T/256, almost a step, beyond half a step.
    weight = torch.stack([torch.linspace(-1, 1, 64) * (1 + i / 300) for i in range(300)])
    quantized = IntFormat(8, None, symmetric).quantize(weight)
    steps = ((weight - quantized.dequantize()).abs() / spread(quantized.scales, weight)).max().item()
    assert 0.9 < steps <= 0.5 + 255 * 2**-8 / (1 - 2**-8)


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_zero_groups_and_constant_groups_are_exact(fmt: IntFormat) -> None:
    weight = torch.zeros(6, 16)
    weight[1], weight[2], weight[3] = 0.75, -0.75, 2.0**-10
    weight[4, 8:] = -3.0
    quantized = fmt.quantize(weight)
    assert bool((quantized.scales > 0).all())
    rows = [0, 1, 2, 3] + ([4] if fmt.group_size == 8 else [])
    assert torch.equal(quantized.dequantize()[rows], weight[rows])
    for clip in ("minmax", "mse"):
        assert bool(torch.isfinite(fmt.quantize(weight, clip=clip).dequantize()).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
@pytest.mark.parametrize("size", [2.0**-149, 2.0**-130, 1e-30, 1e-9])
def test_tiny_weights_never_get_a_zero_scale(fmt: IntFormat, size: float) -> None:
    weight = torch.tensor([[1.0, -1, 0.5, 0.25, 0, 1, 1, -0.5]]) * size
    quantized = fmt.quantize(weight)
    assert bool((quantized.scales.float() > 0).all())
    assert bool(torch.isfinite(quantized.dequantize()).all())
    assert quantized.dequantize().abs().max() <= 2 * size


def test_symmetric_scales_are_those_of_compressed_tensors() -> None:
    weight = weights("normal")
    for bits in (2, 3, 4, 8):
        scales, zeros = IntFormat(bits, None, scale_dtype="float32").parameters(weight)
        arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel")
        theirs, _ = calculate_qparams(weight.amin(1), weight.amax(1), arguments)
        assert zeros is None
        torch.testing.assert_close(scales[:, 0], theirs.flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_search_is_never_worse_than_the_full_range(fmt: IntFormat, kind: str, weighed: bool) -> None:
    weight = weights(kind)
    importance = torch.rand(40) + 0.01 if weighed else None
    mass = torch.ones(40) if importance is None else importance

    def error(clip: str) -> torch.Tensor:
        scales, zeros = fmt.parameters(weight, clip=clip, importance=importance)
        found = QuantizedWeight(fmt.encode(weight, scales, zeros), scales, zeros, fmt).dequantize()
        return ((found - weight).double().square() * mass).reshape(33, scales.shape[1], -1).sum(-1)

    assert bool((error("mse") <= error("minmax") * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_is_as_good_as_a_fine_grid(bits: int, symmetric: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    fmt = IntFormat(bits, None, symmetric, "float32")
    grid = []
    for step in range(81):
        scales, zeros = fmt.parameters(weight, shrink=1 - step / 100)
        found = QuantizedWeight(fmt.encode(weight, scales, zeros), scales, zeros, fmt).dequantize()
        grid.append((found - weight).square().sum(1))
    best = torch.stack(grid).amin(0).mean()
    found = (fmt.quantize(weight, clip="mse").dequantize() - weight).square().sum(1).mean()
    assert found <= 1.02 * best
    assert found <= 0.99 * grid[0].mean()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers()
)
def test_rounding_a_rounded_weight_changes_nothing(
    bits: int, symmetric: bool, rows: int, group: int, groups: int, seed: int
) -> None:
    fmt = IntFormat(bits, group, symmetric)
    weight = torch.randn(rows, group * groups, generator=torch.Generator().manual_seed(seed % 2**31))
    first = fmt.quantize(weight)
    again = fmt.encode(first.dequantize(), first.scales, first.zeros)
    assert torch.equal(again, first.codes)


def test_many_rows_equal_one_row_at_a_time() -> None:
    weight = torch.randn(600, 2048)  # several chunks
    fmt = IntFormat(3, 128, symmetric=False)
    whole, part = fmt.quantize(weight, clip="mse"), fmt.quantize(weight[250:251], clip="mse")
    assert torch.equal(whole.codes[250:251], part.codes)
    assert torch.equal(whole.scales[250:251], part.scales)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_taken_as_float32(dtype: torch.dtype) -> None:
    weight = weights("normal").to(dtype)
    before = weight.clone()
    fmt = IntFormat(4, 8)
    assert torch.equal(fmt.quantize(weight).codes, fmt.quantize(weight.float()).codes)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.scale_dtype != "float16"], ids=label)
@pytest.mark.parametrize("columns", [64, 200])
def test_bits_per_weight_counts_the_stored_bytes(fmt: IntFormat, columns: int) -> None:
    quantized = fmt.quantize(torch.randn(16, columns))
    stored = pack(quantized.codes, fmt.bits).nbytes + quantized.scales.nbytes
    if quantized.zeros is not None:
        stored += quantized.zeros.numel() * fmt.bits / 8
    padding = 16 * (-columns * fmt.bits % 32) / 8
    assert fmt.bits_per_weight(16, columns) * 16 * columns == pytest.approx(8 * (stored - padding), rel=1e-15)


def test_zero_points_take_their_packed_bits() -> None:
    fmt = IntFormat(4, 128, symmetric=False)
    quantized = fmt.quantize(torch.randn(4, 1024))
    assert quantized.zeros is not None
    stored = sum(x.nbytes for x in (pack(quantized.codes, 4), quantized.scales, pack(quantized.zeros, 4)))
    assert fmt.bits_per_weight(4, 1024) * 4 * 1024 == 8 * stored


def test_a_group_must_divide() -> None:
    fmt = IntFormat(4, 96)
    assert fmt.check(192) is None
    assert fmt.check(11008) == "11008 input features do not divide by group 96"
    assert fmt.check(0) == "0 input features do not divide by group 96"
    message = r"^group_size: 11008 input .* by group 96\. Use 32, 64, 128, 256, or None for one scale per channel$"
    with pytest.raises(FeasibilityError, match=message):
        fmt.quantize(torch.randn(2, 11008))
    with pytest.raises(FeasibilityError, match=r"by group 96\. Use None for one scale per channel$"):
        fmt.bits_per_weight(8, 33)
    assert IntFormat.suggest_groups(0) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: 5 is not a width of an integer weight\. Use 2, 3, 4 or 8$"),
        (
            {"bits": 4, "group_size": 0},
            r"^group_size: a group of 0 input features is impossible\. Use 32, 64 or 128, or",
        ),
        (
            {"bits": 4, "scale_dtype": "fp8"},
            r"^scale_dtype: scales cannot be stored as 'fp8'\. Use bfloat16, float16, fl",
        ),
    ],
)
def test_impossible_formats_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        IntFormat(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_finite_are_refused(value: float, symmetric: bool) -> None:
    weight = torch.randn(4, 16)
    fmt = IntFormat(4, 8, symmetric)
    scales, zeros = fmt.parameters(weight)
    weight[2, 3] = value
    message = (
        r"^1 of 64 weights are not finite as float32\. Check the checkpoint, and the transforms folded into this weig"
    )
    with pytest.raises(ModelError, match=message):
        fmt.quantize(weight)
    with pytest.raises(ModelError, match=message):
        fmt.encode(weight, scales, zeros)


def test_bad_options_of_parameters_are_refused() -> None:
    fmt, weight = IntFormat(4, 8), torch.randn(2, 16)
    with pytest.raises(RecipeError, match=r"^clip: unknown clip 'max'\. Use 'minmax' or 'mse'$"):
        fmt.parameters(weight, clip="max")
    with pytest.raises(RecipeError, match=r"^shrink: a range cannot shrink to 1.5 of itself\. Use 0.8 to 1$"):
        fmt.parameters(weight, shrink=1.5)
    for bad in (torch.ones(8), torch.zeros(16), torch.full((16,), float("inf"))):
        with pytest.raises(
            ContractError, match=r"^importance: the importance is not 16 finite positive numbers, one fo"
        ):
            fmt.parameters(weight, clip="mse", importance=bad)
    with pytest.raises(
        FeasibilityError, match=r"^scale_dtype: weights reach 1e\+06: their scale does not fit float16\. U"
    ):
        IntFormat(4, 8, scale_dtype="float16").parameters(torch.tensor([[1e6, 0, 0, 0, 0, 0, 0, 0]]))


def test_ill_formed_quantized_weights_are_refused() -> None:
    codes, scales = torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.bfloat16)
    zeros = torch.zeros(2, 2, dtype=torch.uint8)
    symmetric, asymmetric = IntFormat(4, 8), IntFormat(4, 8, symmetric=False)
    with pytest.raises(ContractError, match=r"^codes: codes are torch.int8, not torch.uint8$"):
        QuantizedWeight(codes.to(torch.int8), scales, None, symmetric)
    with pytest.raises(
        ContractError, match=r"^scales: scales are \(2, 1\) torch.bfloat16, not \(2, 2\) torch.bfloat16$"
    ):
        QuantizedWeight(codes, scales[:, :1], None, symmetric)
    with pytest.raises(
        ContractError, match=r"^scales: scales are \(2, 2\) torch.float32, not \(2, 2\) torch.bfloat16$"
    ):
        QuantizedWeight(codes, scales.float(), None, symmetric)
    with pytest.raises(ContractError, match=r"^zeros: a weight in int4 g8 has no zero points$"):
        QuantizedWeight(codes, scales, zeros, symmetric)
    with pytest.raises(ContractError, match=r"^zeros: a weight in int4 g8 asymmetric needs zero points$"):
        QuantizedWeight(codes, scales, None, asymmetric)
    with pytest.raises(ContractError, match=r"^zeros: zero points are \(2, 1\) torch.uint8, not \(2, 2\) torch.uint8$"):
        QuantizedWeight(codes, scales, zeros[:, :1], asymmetric)
