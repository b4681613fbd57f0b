"""Sign planes: what is stored, how many bits it takes, and that fitting is what its equations say."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats import planes
from dlqc.formats.planes import PlanesFormat, PlanesWeight, fit, nearest_signs, start, sweep


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed % 2**31), dtype=dtype)


def example(rows: int, size: int, orders: tuple[int, ...], seed: int, scale_dtype: str = "bfloat16") -> PlanesWeight:
    """Any weight that the format can hold, not one that was fitted."""
    fmt = PlanesFormat(2, size, scale_dtype)
    codes = [torch.randint(0, 1 << order, (rows, size), dtype=torch.uint8) for order in orders]
    scales = noise(rows, sum(orders), seed=seed).to(fmt.dtype), noise(sum(orders), size, seed=seed + 1).to(fmt.dtype)
    return PlanesWeight(torch.cat(codes, dim=1), *scales, orders, fmt)


MIXED = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), MIXED, st.integers(), st.sampled_from(["bfloat16", "float16"]))
def test_packing_round_trips_and_takes_the_bits_it_says(
    rows: int, size: int, orders: tuple[int, ...], seed: int, scale_dtype: str
) -> None:
    torch.manual_seed(seed % 2**31)
    weight = example(rows, size, orders, seed % 2**31, scale_dtype)
    packed = weight.pack()
    again = weight.format.unpack(packed, size * len(orders))
    assert torch.equal(again.codes, weight.codes)
    assert again.orders == orders
    assert torch.equal(again.dequantize(), weight.dequantize())
    padding = rows * (-sum(orders) * size % 32) + (-2 * len(orders) % 32)
    stored = 8 * sum(part.nbytes for part in packed.values())
    assert weight.bits_per_weight * weight.codes.numel() == pytest.approx(stored - padding, rel=1e-12)


def test_the_stream_is_plane_after_plane_little_endian() -> None:
    weight = example(2, 8, (2, 1), 0)
    bits = weight.pack()["bits"]
    assert bits.shape == (2, 4)
    for row, plane in product(range(2), range(3)):
        group, bit = (0, plane) if plane < 2 else (1, 0)
        codes = weight.codes[row, 8 * group : 8 * group + 8] >> bit & 1
        assert int(bits[row, plane]) == sum(int(code) << j for j, code in enumerate(codes))
    assert int(bits[:, 3].max()) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), MIXED, st.integers(0, 1000))
def test_dequantized_is_the_sum_of_the_planes(rows: int, size: int, orders: tuple[int, ...], seed: int) -> None:
    weight = example(rows, size, orders, seed)
    expected = torch.zeros(rows, size * len(orders), dtype=torch.float64)
    first = [sum(orders[:group]) for group in range(len(orders))]
    for i, j in product(range(rows), range(size * len(orders))):
        group = j // size
        for k in range(orders[group]):
            sign = 1 if int(weight.codes[i, j]) >> k & 1 else -1
            plane = first[group] + k
            expected[i, j] += (
                sign * weight.row_scales[i, plane].double() * weight.column_scales[plane, j % size].double()
            )
    torch.testing.assert_close(weight.dequantize().double(), expected, rtol=1e-5, atol=1e-6)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = example(50, 24, (2, 3, 1), 3)
    whole, bits = weight.dequantize(), weight.pack()["bits"]
    monkeypatch.setattr(planes, "CHUNK", 7 * 24)
    assert torch.equal(weight.dequantize(), whole)
    assert torch.equal(weight.pack()["bits"], bits)
    assert torch.equal(weight.format.unpack(weight.pack(), 72).codes, weight.codes)


def test_bits_per_weight_at_the_sizes_of_the_paper() -> None:
    fmt = PlanesFormat()
    assert fmt.bits_per_weight(4096, 4096) == pytest.approx(
        2 * (1 + 16 / 128 + 16 / 4096) + 2 / (128 * 4096), rel=1e-15
    )
    assert round(fmt.bits_per_weight(4096, 4096), 3) == 2.258
    # Scales go with the planes, so mixed orders of the same mean cost the same.
    assert fmt.bits_per_weight(4096, 512, (3, 2, 2, 1)) == fmt.bits_per_weight(4096, 512)
    whole = PlanesFormat(2, None).bits_per_weight(64, 96)
    assert whole == pytest.approx(2 * (1 + 16 / 96 + 16 / 64) + 2 / (96 * 64), rel=1e-15)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 3.0]))
def test_the_signs_are_the_best_of_all_patterns(order: int, seed: int, bias: float) -> None:
    target, levels = 2 * noise(50, seed=seed, dtype=torch.float64), noise(order, 50, seed=seed + 1, dtype=torch.float64)
    levels[0] *= 1 + bias
    levels[:, ::7] = 0
    levels[:, 1::7] = 1
    target[::5] = 0
    signs = nearest_signs(target, levels)
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=order)), dtype=torch.float64)
    best = (target - patterns @ levels).abs().amin(dim=0)
    torch.testing.assert_close((target - (signs * levels).sum(0)).abs(), best, rtol=1e-12, atol=1e-12)


def objective(tile: planes.Tile, target: torch.Tensor, importance: torch.Tensor) -> float:
    return float((importance * (target - tile.value()).square()).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_no_sweep_raises_the_objective(size: int, rows: int, order: int, joint: bool, seed: int) -> None:
    target = noise(size, rows, seed=seed, dtype=torch.float64)
    importance = torch.where(noise(size, rows, seed=seed + 1) > 1, 4.0, 1.0).double()
    importance[:, 0] = 0 if seed % 5 == 0 else 1
    tile = start(target, order)
    before = objective(tile, target, importance)
    for _ in range(5):
        sweep(tile, target, importance, joint=joint)
        after = objective(tile, target, importance)
        assert after <= before * (1 + 1e-12) + 1e-12
        before = after


@pytest.mark.parametrize("weighed", [True, False])
def test_a_sweep_updates_each_scale_to_its_least_squares_answer(weighed: bool) -> None:
    target = noise(6, 5, dtype=torch.float64)
    importance = (noise(6, 5, seed=1) > 0.5).double() * 3 + 1 if weighed else torch.ones(6, 5, dtype=torch.float64)
    tile = start(target, 1)
    signs, columns = tile.signs[0].clone(), tile.columns[0].clone()
    sweep(tile, target, importance if weighed else None, joint=False)
    root = importance.sqrt()
    for i in range(5):
        design = (root[:, i] * signs[:, i] * columns).unsqueeze(1)
        answer = torch.linalg.lstsq(design, (root * target)[:, i : i + 1]).solution
        torch.testing.assert_close(tile.rows[0, i], answer[0, 0])
    for j in range(6):
        design = (root[j] * signs[j] * tile.rows[0]).unsqueeze(1)
        answer = torch.linalg.lstsq(design, (root * target)[j].unsqueeze(1)).solution
        torch.testing.assert_close(tile.columns[0, j], answer[0, 0])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_errors_fall_with_the_order_and_the_sweeps(order: int) -> None:
    weight = noise(256, 128)
    error = [
        float((PlanesFormat(order).quantize(weight, sweeps=n).dequantize() - weight).square().mean()) for n in (0, 10)
    ]
    # Levels fitted to a Gaussian: Lloyd-Max has 0.363, 0.118, 0.0345; two scales a level are a few percent better.
    assert error[1] < 1.05 * (0.363, 0.118, 0.0345)[order - 1]
    assert error[1] < error[0] if order > 1 else error[1] <= 1.01 * error[0]


def test_weights_of_rank_one_with_signs_are_stored_but_for_the_roundoff_of_scales() -> None:
    signs = torch.where(noise(16, 32) > 0, 1.0, -1.0)
    weight = signs * torch.logspace(-2, 2, 16, base=2)[:, None].round() * 0.5
    torch.testing.assert_close(PlanesFormat(1, 32).quantize(weight).dequantize(), weight, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_sizes_of_weights_do_not_matter(size: float) -> None:
    weight = noise(8, 16)
    found = PlanesFormat(2, 16).quantize(weight * size)
    assert torch.equal(found.dequantize(), PlanesFormat(2, 16).quantize(weight).dequantize() * size)
    assert bool(torch.isfinite(PlanesFormat(2, 16).quantize(weight * 2.0**-140).dequantize()).all())


def test_zeros_are_exact_and_dead_columns_do_no_harm() -> None:
    weight = noise(8, 32)
    weight[:, :16], weight[3], weight[:, 20] = 0, 0, 0
    found = PlanesFormat(2, 16).quantize(weight).dequantize()
    assert torch.equal(found[:, :16], torch.zeros(8, 16))
    assert bool(torch.isfinite(found).all())
    assert bool((found[3] == 0).all())
    assert bool((found[:, 20] == 0).all())


def test_the_same_twice_and_no_argument_is_changed() -> None:
    weight = noise(40, 64)
    before = weight.clone()
    first, second = (PlanesFormat(3, 32).quantize(weight) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.row_scales, second.row_scales)
    assert torch.equal(weight, before)
    target = noise(32, 40)
    copy = target.clone()
    fit(target, 2, importance=torch.ones(32, 40))
    assert torch.equal(target, copy)


def test_labels() -> None:
    assert (PlanesFormat().label, PlanesFormat(3, None).label) == ("planes2 g128", "planes3 matrix")


def test_a_group_must_divide() -> None:
    fmt = PlanesFormat(2, 96)
    assert fmt.check(192) is None
    assert fmt.check(11008) == "11008 input features do not divide by group 96"
    assert PlanesFormat(2, None).check(11008) is None
    message = r"^group_size: 11008 input .* by group 96\. Use 32, 64, 128, 256, or None for one group of all columns$"
    with pytest.raises(FeasibilityError, match=message):
        fmt.quantize(torch.randn(2, 11008))
    with pytest.raises(FeasibilityError, match=r"by group 96\. Use None for one group of all columns$"):
        fmt.bits_per_weight(8, 33)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, r"^order: 4 planes are no order\. Use 1, 2 or 3$"),
        ({"group_size": 0}, r"^group_size: a group of 0 input features is impossible\. Use 64 or 128, or None for one"),
        (
            {"scale_dtype": "float32"},
            r"^scale_dtype: scales of planes cannot be stored as 'float32'\. Use bfloat16 or fl",
        ),
    ],
)
def test_impossible_formats_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PlanesFormat(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = noise(4, 16)
    weight[1, 2] = value
    with pytest.raises(ModelError, match=r"^1 of 64 weights are not finite as float32\. Check the checkpoint, and the"):
        PlanesFormat(2, 8).quantize(weight)


def test_scales_that_do_not_fit_are_refused() -> None:
    message = r"^scale_dtype: row scales reach .*e\+06: they do not fit float16\. Use 'bfloat16'$"
    with pytest.raises(FeasibilityError, match=message):
        PlanesFormat(2, 8, "float16").quantize(noise(4, 8) * 1e7)


def test_ill_formed_weights_are_refused() -> None:
    good = example(4, 8, (2, 1), 0)
    parts = (good.codes, good.row_scales, good.column_scales, good.orders, good.format)
    with pytest.raises(ContractError, match=r"^codes: codes are torch.int8, not torch.uint8$"):
        PlanesWeight(good.codes.to(torch.int8), *parts[1:])
    with pytest.raises(ContractError, match=r"^codes: code 2 in group 1 needs more than 1 planes$"):
        PlanesWeight(torch.full_like(good.codes, 2), *parts[1:])
    with pytest.raises(ContractError, match=r"^row_scales: scales are \(4, 2\) torch.bfloat16, not \(4, 3\) torch.bfl"):
        PlanesWeight(good.codes, good.row_scales[:, :2], *parts[2:])
    with pytest.raises(
        ContractError, match=r"^column_scales: scales are \(3, 8\) torch.float32, not \(3, 8\) torch.bf"
    ):
        PlanesWeight(*parts[:2], good.column_scales.float(), *parts[3:])
    message = r"^orders: orders \(2, 4\) are not 2 numbers from 1 to 3, one for each group\. Take them from dlqc\.round"
    with pytest.raises(ContractError, match=message):
        PlanesWeight(*parts[:3], (2, 4), good.format)
    with pytest.raises(ContractError, match=r"^orders: orders \(2, 2, .*, …\) of length 9 are not 2 numbers from 1 to"):
        good.format.bits_per_weight(4, 16, (2,) * 9)
    packed = good.pack()
    with pytest.raises(
        ContractError, match=r"^packed: packed codes are \(4, 2\) torch.uint8, not \(4, 4\) torch.uint8"
    ):
        good.format.unpack(packed | {"bits": packed["bits"][:, :2]}, 16)
