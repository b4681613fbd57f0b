"""Range estimators against closed forms, sorted data, exhaustive search, and the published loops written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.ranges import (
    Ema,
    Fixed,
    Kl,
    MinMax,
    Mse,
    Percentile,
    RangeEstimator,
    Seen,
    fixed_scales,
    inner_edges,
    kl_bins,
    rounding_error,
)

ALL: list[RangeEstimator] = [MinMax(), Ema(), Percentile(), Mse(), Kl()]
FORMATS = [ActFormat(b, None, s, 1) for b in (4, 8) for s in (True, False)]


def seen(
    estimator: RangeEstimator,
    x: torch.Tensor,
    fmt: ActFormat,
    c: torch.Tensor | None = None,
    *,
    batch: int = 3,
    groups: int = 1,
    set_of: torch.Tensor | None = None,
    sets: int = 1,
) -> Seen:
    """What an estimator sees of states x [S, L, C], in batches."""
    c = torch.ones(x.shape[:2]) if c is None else c
    set_of = torch.zeros(x.shape[0], dtype=torch.int64) if set_of is None else set_of
    made = estimator.seen(sets, groups, fmt)
    for i in range(0, x.shape[0], batch):
        some = slice(i, i + batch)
        made.add(x[some], c[some], set_of[some])
    return made


def one(
    estimator: RangeEstimator, x: torch.Tensor, fmt: ActFormat, c: torch.Tensor | None = None
) -> tuple[float, float]:
    low, high = estimator.estimate(seen(estimator, x, fmt, c), fmt)
    return float(low), float(high)


def data(kind: str, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 40, 16, generator=g)
    match kind:
        case "heavy":
            x = x / torch.rand(x.shape, generator=g).clamp(min=0.02)
        case "positive":
            x = x.abs()
        case "shifted":
            x = x + 2
        case "outliers":
            x[2, 3, 5], x[4, 1, 0] = 60, -45
    return x


KINDS = ("normal", "heavy", "positive", "shifted", "outliers")


# min_max, ema


@pytest.mark.parametrize("kind", KINDS)
def test_min_max_is_the_smallest_and_the_largest_number(kind: str) -> None:
    x = data(kind)
    assert one(MinMax(), x, FORMATS[0]) == (min(0.0, float(x.min())), float(x.max()))


def test_groups_and_sets_are_apart() -> None:
    x, set_of = data("heavy"), torch.tensor([0, 2, 0, 2, 2, 0, 0])
    low, high = MinMax().estimate(seen(MinMax(), x, FORMATS[0], groups=4, set_of=set_of, sets=3), FORMATS[0])
    for s in (0, 2):
        for g in range(4):
            part = x[set_of == s][..., 4 * g : 4 * g + 4]
            assert (float(low[s, g]), float(high[s, g])) == (float(part.min()), float(part.max()))
    assert bool((low[1] == 0).all() & (high[1] == 0).all())


def test_ema_is_the_loop_over_states() -> None:
    x = data("heavy")
    low, high = float(x[0].min()), float(x[0].max())
    for state in x[1:]:
        low = 0.9 * low + 0.1 * float(state.min())
        high = 0.9 * high + 0.1 * float(state.max())
    assert one(Ema(0.9), x, FORMATS[0]) == pytest.approx((low, high), rel=1e-12)


def test_a_state_of_weight_three_moves_the_average_like_three() -> None:
    x = data("heavy")
    c = torch.ones(x.shape[:2])
    c[4] = 3
    again = torch.cat((x[:5], x[4:5], x[4:5], x[5:]))
    assert one(Ema(0.8), x, FORMATS[0], c) == pytest.approx(one(Ema(0.8), again, FORMATS[0]), rel=1e-12)


# Token weights


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: e.name)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
def test_tokens_of_weight_zero_are_not_seen(estimator: RangeEstimator, fmt: ActFormat) -> None:
    x = data("outliers")
    c = torch.ones(x.shape[:2])
    c[2, 3] = c[4, 1] = 0
    without = x.clone()
    without[2, 3] = without[4, 1] = without[0, 0]
    kept = torch.ones(c.shape)
    kept[2, 3] = kept[4, 1] = 0
    assert one(estimator, x, fmt, c) == one(estimator, without, fmt, kept)
    assert one(estimator, x, fmt, c)[1] < 10
    assert one(MinMax(), x, fmt)[1] == 60


@pytest.mark.parametrize("estimator", [Percentile(0.99), Mse(), Kl()], ids=lambda e: e.name)
def test_a_token_of_weight_two_counts_like_two(estimator: RangeEstimator) -> None:
    fmt, x = FORMATS[0], data("heavy")
    c = torch.ones(x.shape[:2])
    c[1, ::2] = 2
    twice = torch.cat((x, x[1:2, ::2].expand(1, -1, -1).repeat(1, 2, 1)))
    weights = torch.cat((torch.ones(c.shape), torch.cat((torch.ones(1, 20), torch.zeros(1, 20)), dim=1)))
    assert one(estimator, x, fmt, c) == pytest.approx(one(estimator, twice, fmt, weights), rel=1e-9)


@pytest.mark.parametrize("estimator", [e for e in ALL if e.name != "ema"], ids=lambda e: e.name)
def test_order_and_batches_do_not_matter(estimator: RangeEstimator) -> None:
    x, fmt = data("heavy"), FORMATS[1]
    first = estimator.estimate(seen(estimator, x, fmt, batch=2), fmt)
    second = estimator.estimate(seen(estimator, x.flip(0), fmt, batch=7), fmt)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


# percentile


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.9, 0.99, 0.9999, 1.0])
def test_percentile_is_that_of_the_sorted_numbers(kind: str, share: float) -> None:
    """Within the width of a bin, 1/64 of the number at 4 bits; weights are counted by repeating numbers."""
    x = data(kind)
    c = torch.randint(1, 4, x.shape[:2]).float()
    every = x.repeat_interleave(1, 0).flatten(0, 1).repeat_interleave(c.flatten().long(), dim=0).flatten()
    for fmt in FORMATS[:2]:
        low, high = one(Percentile(share), x, fmt, c)
        if fmt.symmetric:
            ranked = every.abs().sort().values
            expected = float(ranked[max(0, math.ceil(share * len(ranked)) - 1)])
            assert max(-low, high) == pytest.approx(expected, rel=1 / 32)
            assert low == max(float(x.min().clamp(max=0)), -max(-low, high))
        else:
            ranked, cut = every.sort().values, (1 - share) / 2
            ends = (ranked[max(0, math.ceil(cut * len(ranked)) - 1)], ranked[math.ceil((1 - cut) * len(ranked)) - 1])
            assert low == pytest.approx(min(0.0, float(ends[0])), rel=1 / 16, abs=0.02)
            assert high == pytest.approx(float(ends[1]), rel=1 / 16)


def test_all_of_the_weight_is_min_max() -> None:
    for fmt in FORMATS:
        assert one(Percentile(1.0), data("heavy"), fmt) == pytest.approx(one(MinMax(), data("heavy"), fmt))


# mse


def error_of(x: torch.Tensor, fmt: ActFormat, low: float, high: float, c: torch.Tensor) -> float:
    """Σ c·(Q(x) - x)², by the formulas of the format, number by number."""
    half = 2 ** (fmt.bits - 1)
    if fmt.symmetric:
        scale, zero = max(-low, high) / (half - 1), 0.0
    else:
        scale = (high - low) / (2 * half - 1)
        zero = round(-half - low / scale)
    codes = torch.round(x.double() / scale + 0.0) + zero
    found = (codes.clamp(-half, half - 1) - zero) * scale
    return float(((found - x.double()).square() * c.double()[..., None]).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_within_a_hair_of_the_best_of_all_ranges(kind: str, bits: int) -> None:
    """Symmetric: against every α of a grid ten times as fine, on the numbers themselves."""
    x, fmt = data(kind), ActFormat(bits, None, True, 1)
    c = torch.rand(x.shape[:2])
    full = one(MinMax(), x, fmt, c)
    errors = [error_of(x, fmt, a * full[0], a * full[1], c) for a in torch.linspace(0.01, 1, 1000).tolist()]
    found = error_of(x, fmt, *one(Mse(), x, fmt, c), c)
    assert found <= 1.03 * min(errors)
    assert found <= error_of(x, fmt, *full, c)


@pytest.mark.parametrize("kind", KINDS)
def test_asymmetric_mse_against_every_pair_of_ends(kind: str) -> None:
    """Two ends searched one after the other, against the exhaustive grid of both."""
    x, fmt = data(kind), ActFormat(4, None, False, 1)
    made = seen(Mse(), x, fmt)
    assert made.histogram is not None
    values, mass = made.histogram.signed(0)
    grid = Mse(40, 0.025).grid
    pairs = torch.cartesian_prod(grid * made.low[0, 0], grid * made.high[0, 0])
    best = float(rounding_error(fmt, values, mass, pairs[:, 0], pairs[:, 1]).min())
    ends = torch.tensor([one(Mse(40, 0.025), x, fmt)], dtype=torch.float64)
    found = float(rounding_error(fmt, values, mass, ends[:, 0], ends[:, 1]))
    assert best <= found <= 1.15 * best
    common = rounding_error(fmt, values, mass, grid * made.low[0, 0], grid * made.high[0, 0])
    assert found <= float(common.min())


def test_rounding_error_is_that_of_the_numbers() -> None:
    """A planted slip in the codes shows: the errors of the histogram are those of its numbers, for every range."""
    for fmt in FORMATS:
        x = torch.randn(200, dtype=torch.float64).float().double()
        low, high = torch.tensor([-1.0, -3.0, -0.2]), torch.tensor([1.5, 2.0, 4.0])
        found = rounding_error(fmt, x, torch.ones(200, dtype=torch.float64), low, high)
        expected = [
            error_of(x[:, None], fmt, a, b, torch.ones(200)) for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9)


def test_more_outliers_shrink_the_range_less() -> None:
    """One token of 50 is given up at 4 bits; with a heavy weight it is not."""
    x, c = data("normal"), torch.ones(7, 40)
    x[3, 7, 2] = 50
    assert one(Mse(), x, FORMATS[0], c)[1] < 10
    c[3, 7] = 1e6
    assert one(Mse(), x, FORMATS[0], c)[1] > 45


# kl


def naive_kl(mass: list[float], levels: int) -> int:
    """The loop of the TensorRT slides, number by number: divergence of each threshold, the largest of the best."""
    best, found = math.inf, len(mass)
    total = sum(mass)
    for i in range(levels, len(mass) + 1):
        p = mass[:i]
        p[-1] += sum(mass[i:])
        q = [0.0] * i
        for j in range(levels):
            run = range(j * i // levels, (j + 1) * i // levels)
            live = [b for b in run if p[b] > 0]
            for b in live:
                q[b] = sum(mass[k] for k in run) / len(live)
        kept, divergence = sum(mass[:i]), 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                divergence += math.inf if b == 0 else a / total * math.log(a / total / (b / kept))
        if divergence <= best + 1e-12:
            best, found = min(best, divergence), i
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 7.0, 100.0]), min_size=12, max_size=48), st.integers(2, 9))
def test_kl_bins_is_the_published_loop(mass: list[float], levels: int) -> None:
    mass[0] = 5.0
    assert kl_bins(torch.tensor(mass, dtype=torch.float64), levels) == naive_kl(list(mass), levels)


def test_kl_cuts_a_lonely_outlier_and_keeps_an_even_range() -> None:
    x = data("normal")
    x[3, 7, 2] = 50
    assert 2 < one(Kl(), x, FORMATS[2])[1] < 10
    even = torch.linspace(-1, 1, 7 * 40 * 16).reshape(7, 40, 16)
    assert one(Kl(), even, FORMATS[2])[1] > 0.97


def test_kl_reads_the_histogram_of_its_numbers() -> None:
    """The whole estimator against the published loop on a linear histogram of the numbers, within a few of its 2048 bins."""
    for kind in KINDS:
        x = data(kind)
        reach = float(x.abs().max())
        counts = torch.histc(x.abs(), 2048, 0, reach).double()
        expected = kl_bins(counts, 8) * reach / 2048
        low, high = one(Kl(), x, FORMATS[0])
        assert max(-low, high) == pytest.approx(expected, rel=0.15), kind


# What becomes of ranges


def fixed(x: torch.Tensor, fmt: ActFormat = FORMATS[0], **options: object) -> Fixed:
    made = seen(MinMax(), x, fmt, **options)  # type: ignore[arg-type]
    return fixed_scales(made, *MinMax().estimate(made, fmt), fmt, "here")


def test_scales_are_those_of_the_format() -> None:
    x = data("shifted")
    low, high = float(x.min()), float(x.max())
    made = fixed(x, ActFormat(8, None, False, 1))
    assert made.zero is not None
    assert float(made.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert int(made.zero) == round(-128 - low / float(made.scale))
    assert made.zero.dtype is torch.int8
    assert float(fixed(x).scale) == pytest.approx(max(high, -low) / 7, rel=1e-6)


def test_a_bucket_without_states_borrows_from_its_neighbour() -> None:
    x = data("normal") * torch.arange(1, 8)[:, None, None]
    set_of = torch.tensor([1, 1, 4, 4, 4, 4, 4])
    made = fixed(x, ActFormat(8, None, True, 6), set_of=set_of, sets=6)
    scale = made.scale[:, 0]
    assert bool((scale[[0, 2]] == scale[1]).all())
    assert bool((scale[[3, 5]] == scale[4]).all())
    assert scale[1] != scale[4]
    assert made.notes[0] == "mask-ratio bucket 0 saw no token and takes the ranges of bucket 1"
    assert [note.split()[2] for note in made.notes] == ["0", "2", "3", "5"]


def test_of_two_neighbours_the_one_with_more_tokens_lends() -> None:
    x, set_of = data("normal") * torch.arange(1, 8)[:, None, None], torch.tensor([0, 0, 2, 2, 2, 2, 2])
    scale = fixed(x, ActFormat(8, None, True, 3), set_of=set_of, sets=3).scale
    assert scale[1] == scale[2] != scale[0]


def test_a_bucket_of_zeros_borrows_and_a_dead_group_takes_the_widest_range() -> None:
    x, set_of = data("normal"), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    x[4:] = 0
    x[..., 4:8] = 0
    made = fixed(x, ActFormat(8, None, True, 2), set_of=set_of, sets=2, groups=4)
    assert torch.equal(made.scale[0], made.scale[1])
    assert made.scale[0, 1] == made.scale[0].max()
    assert made.notes == (
        "here: 1 groups are always zero and take the widest range",
        "mask-ratio bucket 1 saw zeros alone at here and takes the ranges of bucket 0",
    )


def test_nothing_to_take_a_range_from() -> None:
    message = (
        r"^here: the activations are zero on all 280 calibration tokens, so there is no range\. Use scales that are"
    )
    with pytest.raises(CalibrationError, match=message):
        fixed(torch.zeros(7, 40, 16))
    message = r"^here: no token of positive weight was seen, so there is no range\. Draw more states, or weights that"
    with pytest.raises(CalibrationError, match=message):
        fixed(data("normal"), c=torch.zeros(7, 40))
    made = seen(MinMax(), data("normal"), FORMATS[0])
    with pytest.raises(CalibrationError, match=r"^here: a range is not finite\. Check the weights before this layer$"):
        fixed_scales(made, made.low * torch.inf, made.high, FORMATS[0], "here")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ema(1.0), r"^ema\.momentum: 1\.0 is outside \[0, 1\)\. 0\.95 is usual$"),
        (lambda: Percentile(0.3), r"^percentile\.share: 0\.3 is outside \[0\.5, 1\]\. 0\.9999 is usual$"),
        (lambda: Mse(1), r"^mse\.points: a grid of 1 leaves nothing to choose\. 100 is usual$"),
        (lambda: Mse(10, 1.0), r"^mse\.smallest: 1\.0 is outside \(0, 1\)\. 0\.05 reaches outliers of twenty times$"),
        (lambda: inner_edges(0, "b"), r"^b: 0 mask-ratio buckets are not 1 to 256\. 4 is usual$"),
        (
            lambda: inner_edges((0.5, 0.5), "b"),
            r"^b: \(0\.5, 0\.5\) are no ascending mask ratios between 0 and 1\. Give",
        ),
        (lambda: inner_edges((), "b"), r"^b: \(\) are no ascending mask ratios between 0 and 1\. Give a number"),
    ],
)
def test_impossible_options(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_memory_does_not_grow_with_the_states() -> None:
    for estimator in ALL:
        made = estimator.seen(4, 3, FORMATS[2])
        made.add(torch.randn(2, 5, 6), torch.ones(2, 5), torch.tensor([0, 3]))
        before = [] if made.histogram is None else [made.histogram.mass.shape]
        for _ in range(3):
            made.add(torch.randn(9, 50, 6) * 100, torch.ones(9, 50), torch.arange(9) % 4)
        assert before == ([] if made.histogram is None else [made.histogram.mass.shape])
        assert made.low.shape == (4, 3)
