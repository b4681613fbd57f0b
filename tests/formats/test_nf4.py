import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.nf4 import Nf4Format, Nf4Weight, dynamic_tree, levels

# QLoRA (arXiv 2305.14314), appendix E.
PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_the_levels_are_those_of_the_paper() -> None:
    torch.testing.assert_close(levels(), torch.tensor(PUBLISHED), rtol=0, atol=1e-6)
    assert [levels()[i].item() for i in (0, 7, 15)] == [-1, 0, 1]


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    # Φ of the unscaled levels is evenly spaced on either side of zero.
    def phi(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    outermost = 1 - (1 / 32 + 1 / 30) / 2
    low, high = 0.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) < outermost else (low, middle)
    probabilities = torch.tensor([phi(level * low) for level in levels().double().tolist()], dtype=torch.float64)
    for half, steps in ((probabilities[:8], 7), (probabilities[7:], 8)):
        expected = torch.full((steps,), (outermost - 0.5) / steps, dtype=torch.float64)
        torch.testing.assert_close(half.diff(), expected, rtol=1e-5, atol=0)


def test_the_dynamic_tree_is_the_one_of_the_definition() -> None:
    tree = dynamic_tree()
    assert tree.shape == (256,)
    assert bool((tree.diff() > 0).all())
    # Values of bitsandbytes' create_dynamic_map, computed by hand: 0.55 of a decade; 0.325, 0.775; … and 1 on top.
    for value in (0.0, 1.0, 0.55e-6, 0.325e-5, 0.775e-5, -0.55e-6, 0.1 + 0.9 / 128, -(1 - 0.9 / 128)):
        assert (tree - value).abs().min() <= 1e-7 * abs(value)
    assert int((tree > 0).sum()) == 128
    assert torch.equal(tree[tree < 0], -tree[(tree > 0) & (tree < 1)].flip(0))


@pytest.mark.parametrize("scale_block", [None, 256, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_code_is_the_nearest_level_under_the_stored_scale(scale_block: int | None, dtype: torch.dtype) -> None:
    weight = (torch.randn(9, 128) * torch.rand(9, 1)).to(dtype)
    found = Nf4Format(32, scale_block).quantize(weight)
    scales = found.block_scales()
    candidates = levels() * scales.reshape(9, 4, 1, 1)
    error = (weight.float().reshape(9, 4, 32, 1) - candidates).abs()
    own = error.gather(3, found.codes.reshape(9, 4, 32, 1).long()).squeeze(3)
    assert bool((own <= error.amin(dim=3) * (1 + 1e-5) + 1e-7 * scales.unsqueeze(2)).all())
    expected = candidates.expand(9, 4, 32, 16).gather(3, found.codes.reshape(9, 4, 32, 1).long()).reshape(9, 128)
    assert torch.equal(found.dequantize(), expected)
    largest = weight.float().reshape(9, 4, 32).abs().amax(2)
    if scale_block is None:
        assert torch.equal(scales, largest)
    else:
        # Half the widest step of the tree, 0.9/64, under the largest deviation from the mean.
        assert (scales - largest).abs().max() <= 0.9 / 128 * (largest - largest.mean()).abs().max() * (1 + 1e-5)


def test_the_error_on_gaussian_weights() -> None:
    weight = torch.randn(512, 1024)
    plain, double = (Nf4Format(64, block).quantize(weight).dequantize() for block in (None, 256))
    exact = (plain - weight).square().mean()
    # Measured.
    assert exact == pytest.approx(0.00862, rel=0.02)
    assert (double - weight).square().mean() == pytest.approx(exact.item(), rel=0.01)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 1, 3, 256]), st.integers(0, 2**31)
)
def test_packing_returns_the_same_weight(
    rows: int, block: int, blocks: int, scale_block: int | None, seed: int
) -> None:
    weight = torch.randn(rows, block * blocks, generator=torch.Generator().manual_seed(seed))
    fmt = Nf4Format(block, scale_block)
    found = fmt.quantize(weight)
    assert torch.equal(fmt.unpack(found.pack(), block * blocks).dequantize(), found.dequantize())


@pytest.mark.parametrize("scale_block", [None, 256, 7])
def test_bits_per_weight_counts_the_stored_bytes(scale_block: int | None) -> None:
    fmt = Nf4Format(64, scale_block)
    stored = sum(part.nbytes for part in fmt.quantize(torch.randn(33, 192)).pack().values())
    assert fmt.bits_per_weight(33, 192) * 33 * 192 == pytest.approx(8 * stored, rel=1e-15)
    assert Nf4Format().bits_per_weight(4096, 4096) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)


@pytest.mark.parametrize("scale_block", [None, 256])
def test_zeros_constants_and_denormals(scale_block: int | None) -> None:
    weight = torch.zeros(5, 128)
    weight[1] = 0.75
    weight[2, :64] = -3
    fmt = Nf4Format(64, scale_block)
    found = fmt.quantize(weight).dequantize()
    assert torch.equal(found[weight == 0], torch.zeros(int((weight == 0).sum())))
    torch.testing.assert_close(found, weight, rtol=0, atol=0 if scale_block is None else 0.9 / 128 * 3)
    assert torch.equal(fmt.quantize(torch.zeros(2, 64)).dequantize(), torch.zeros(2, 64))
    constant = torch.full((2, 64), 0.3)
    assert torch.equal(fmt.quantize(constant).dequantize(), constant)
    for size in (2.0**-149, 2.0**-130, 3e38):
        tiny = torch.randn(2, 64).clamp(-1, 1) * size
        again = fmt.quantize(tiny).dequantize()
        assert bool(torch.isfinite(again).all())
        assert bool(((again - tiny).abs() <= 0.16 * size + 2.0**-149).all())


def test_a_block_far_smaller_than_all_others_is_still_rounded_to_nearest() -> None:
    # Its stored scale may be negative: then ±1 levels change places, and nothing else.
    weight = torch.cat([torch.full((1, 64 * 9), 1.0), torch.full((1, 64 * 9), 1e-4)])
    weight[0, 0] = 40
    found = Nf4Format().quantize(weight)
    tiny = found.block_scales()[1, 0]
    assert bool(((found.dequantize()[1] - 1e-4).abs() <= max(1e-4, 0.16 * abs(tiny))).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(ModelError, match=r"^1 of 256 weights are not finite as float32\. Check the checkpoint"):
        Nf4Format().quantize(weight)


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"^block: a block of 0 input features is impossible\. Use 64$"):
        Nf4Format(0)
    with pytest.raises(
        RecipeError, match=r"^scale_block: a block of 0 scales is impossible\. Use 256, or None for floa"
    ):
        Nf4Format(64, 0)
    with pytest.raises(FeasibilityError, match=r"^block: 100 input features do not divide by block 64\. Use a divisor"):
        Nf4Format().quantize(torch.randn(2, 100))
    codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 1)
    with pytest.raises(ContractError, match=r"^codes: codes are torch.int8, not torch.uint8$"):
        Nf4Weight(codes.to(torch.int8), scales, None, None, Nf4Format(64, None))
    with pytest.raises(ContractError, match=r"^scales: scales are \(2, 1\) torch.float32, not \(2, 1\) torch.uint8$"):
        Nf4Weight(codes, scales, None, None, Nf4Format())
    with pytest.raises(
        ContractError, match=r"^scale_scales: scales of scales and their mean are missing, not \(\(1,\), "
    ):
        Nf4Weight(codes, scales.to(torch.uint8), None, None, Nf4Format())
    with pytest.raises(ContractError, match=r"^scale_scales: .* are \(\(1,\), \(1,\)\), not wanted$"):
        Nf4Weight(codes, scales, torch.ones(1), torch.ones(1), Nf4Format(64, None))
