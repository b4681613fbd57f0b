from itertools import product

import pytest
import torch

from dlqc.errors import FeasibilityError, RecipeError
from dlqc.formats.activation import ActFormat

FORMATS = [ActFormat(b, g, s) for b, g, s in product((2, 4, 8), (None, 8), (True, False))]


def inputs(kind: str) -> torch.Tensor:
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    match kind:
        case "shifted":
            x = x + 10
        case "huge":
            x = x / x.abs().max() * torch.finfo(torch.float32).max / 4
        case "tiny":
            x = x * 2.0**-126
        case "outlier":
            x[..., 3] *= 1000
    return x


def dequantize(fmt: ActFormat, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale, zero = fmt.quantize_dynamic(x)
    group = x.shape[-1] // scale.shape[-1]
    scale = scale.repeat_interleave(group, dim=-1)
    centred = codes.float() if zero is None else codes.float() - zero.float().repeat_interleave(group, dim=-1)
    return centred * scale, scale


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("kind", ["normal", "shifted", "huge", "tiny", "outlier"])
def test_the_error_is_at_most_half_a_step(fmt: ActFormat, kind: str) -> None:
    x = inputs(kind)
    found, scale = dequantize(fmt, x)
    roundoff = 2.0**-22 * x.double().abs() + 2.0**-148
    assert bool(((x.double() - found.double()).abs() <= scale.double() / 2 * (1 + 2.0**-20) + roundoff).all())
    assert torch.equal(fmt.fake_quantize(x), found)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_codes_scales_and_zero_points(fmt: ActFormat) -> None:
    codes, scale, zero = fmt.quantize_dynamic(inputs("shifted"))
    groups = 1 if fmt.group_size is None else 5
    half = 1 << (fmt.bits - 1)
    assert codes.dtype == torch.int8
    assert codes.shape == (3, 5, 40)
    assert scale.dtype == torch.float32
    assert scale.shape == (3, 5, groups)
    assert int(codes.max()) <= half - 1
    assert int(codes.min()) >= (1 - half if fmt.symmetric else -half)
    assert (zero is None) == fmt.symmetric
    if zero is not None:
        assert zero.dtype == torch.int8
        assert zero.shape == scale.shape


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_zeros_are_exact_and_scales_are_positive(fmt: ActFormat) -> None:
    x = inputs("shifted")
    x[0, 0] = 0
    x[1, 1, 7] = 0
    _, scale, _ = fmt.quantize_dynamic(x)
    found = fmt.fake_quantize(x)
    assert bool((found[0, 0] == 0).all())
    assert found[1, 1, 7] == 0
    assert bool((scale[0, 0] == 1).all())
    assert bool((scale > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    x = inputs("normal").to(dtype)
    found = ActFormat().fake_quantize(x)
    assert found.dtype == dtype
    assert torch.equal(found, ActFormat().fake_quantize(x.float()).to(dtype))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    codes, scale, _ = ActFormat(4, 8).quantize_dynamic(torch.randn(shape))
    assert codes.shape == shape
    assert scale.shape == (*shape[:-1], 5)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x = inputs("outlier")
    assert torch.equal(ActFormat(4).fake_quantize(x)[1, 2], ActFormat(4).fake_quantize(x[1, 2]))


def test_errors() -> None:
    with pytest.raises(
        RecipeError, match=r"^bits: 1 is not a width of an integer activation\. Use 2 to 8, or leave act"
    ):
        ActFormat(1)
    with pytest.raises(
        RecipeError, match=r"^group_size: a group of -1 features is impossible\. Use 32, 64 or 128, or Non"
    ):
        ActFormat(8, -1)
    fmt = ActFormat(8, 16)
    assert fmt.check(32) is None
    assert fmt.check(40) == "40 input features do not divide by group 16"
    message = (
        r"^group_size: 40 input features do not divide by group 16\. Use a divisor, or None for one scale per token$"
    )
    with pytest.raises(FeasibilityError, match=message):
        fmt.fake_quantize(torch.randn(2, 40))
