"""Pruning against naive restatements of the papers, exhaustive search over masks, and inputs that a real run can meet."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import CalibrationError, RecipeError
from dlqc.pruning import Magnitude, Pattern, SparseGpt, Wanda, refine, sparsegpt
from dlqc.rounding.hessian import factorize

HALF, TWO_FOUR = Pattern.read(0.5, None), Pattern.read(0.5, "2:4")


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and the Hessian of correlated inputs with a few large channels, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns, dtype=torch.float64)
    mix += torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    x[:, 1::5] *= 4
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def loss(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error.double() @ hessian) * error.double()).sum())


# Patterns


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 5), st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (3, 5)]), st.integers(0, 999)
)
def test_an_n_m_pattern_keeps_the_n_largest_of_every_m(
    rows: int, groups: int, shape: tuple[int, int], seed: int
) -> None:
    kept, of = shape
    scores = torch.randn(rows, groups * of, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    mask = Pattern.read(0.9, f"{kept}:{of}").of_all(scores)
    assert torch.equal(mask, Pattern.read(0.9, f"{kept}:{of}").of_rows(scores))
    for row in range(rows):
        for start in range(0, groups * of, of):
            own, chosen = scores[row, start : start + of], mask[row, start : start + of]
            assert int(chosen.sum()) == kept
            assert float(own[chosen].min()) >= float(own[~chosen].max())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 23), st.floats(0.01, 0.99), st.integers(0, 999))
def test_a_ratio_prunes_that_share_and_the_smallest(rows: int, columns: int, ratio: float, seed: int) -> None:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    everywhere, by_row = (getattr(Pattern.read(ratio, None), how)(scores) for how in ("of_all", "of_rows"))
    assert int((~everywhere).sum()) == int(ratio * rows * columns)
    assert ((~by_row).sum(dim=1) == int(ratio * columns)).all()
    for mask, part in [(everywhere, scores), *zip(by_row, scores, strict=True)]:
        if bool(mask.any()) and not bool(mask.all()):
            assert float(part[~mask].max()) <= float(part[mask].min())


@pytest.mark.parametrize(
    ("ratio", "text", "message"),
    [
        (0.0, None, r"^ratio: a ratio of 0\.0 is not between 0 and 1\. Use 0\.5$"),
        (1.0, None, r"^ratio: a ratio of 1\.0 is not between"),
        (
            0.5,
            "4:2",
            r"^pattern: '4:2' is no pattern of so many weights that stay among so many\. Use '2:4', '4:8', or None",
        ),
        (0.5, "0:4", r"^pattern: '0:4' is no pattern"),
        (0.5, "half", r"^pattern: 'half' is no pattern"),
    ],
)
def test_patterns_that_are_none(ratio: float, text: str | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Pattern.read(ratio, text)


def test_widths_that_a_pattern_fits() -> None:
    assert TWO_FOUR.check(12) is None
    assert TWO_FOUR.check(10) == "10 input features do not divide into groups of 4"
    assert HALF.check(7) is None
    assert (TWO_FOUR.label, TWO_FOUR.ratio, HALF.label) == ("2:4", 0.5, "50%")


# Magnitude and Wanda, restated


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77])
def test_magnitude_is_one_threshold_for_the_matrix(ratio: float) -> None:
    weight = problem(13, 20)[0]
    found = Magnitude().prune(weight, Pattern.read(ratio, None), {})
    limit = sorted(weight.abs().flatten().tolist())[int(ratio * 260)]
    assert torch.equal(found.kept, weight.abs() >= limit)
    assert found.moved is None


@pytest.mark.parametrize("pattern", [HALF, Pattern.read(0.3, None), TWO_FOUR])
def test_wanda_compares_within_a_row_by_the_norm_of_the_input(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (9, 50))
    x[:, 3] *= 30
    x[:, 4] = 0
    found = Wanda().prune(weight, pattern, {"energy": x.square().sum(dim=0)}).kept
    for n in range(9):
        score = [abs(float(weight[n, k])) * float(x[:, k].norm()) for k in range(20)]
        for start in range(0, 20, pattern.of or 20):
            own = list(range(start, start + (pattern.of or 20)))
            gone = sorted(own, key=score.__getitem__)[
                : pattern.of - pattern.kept if pattern.of else int(pattern.ratio * 20)
            ]
            assert {k for k in own if not found[n, k]} == set(gone)
    assert bool(found[:, 3].all())
    assert not bool(found[:, 4].any())


# SparseGPT, restated: Algorithm 1 with H⁻¹ and its Cholesky factor spelled out, right-looking, in float64


def restated(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, block: int, damp: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    w = weight.clone()
    ridge = damp * float(hessian.diagonal()[hessian.diagonal() != 0].mean())
    inverse = torch.linalg.inv(hessian + ridge * torch.eye(k, dtype=torch.float64))
    u = torch.linalg.cholesky(inverse, upper=True)
    kept = torch.ones(n, k, dtype=torch.bool)
    for i in range(0, k, block):
        errors = torch.zeros(n, min(block, k - i), dtype=torch.float64)
        stop = min(k, i + block)
        for j in range(i, stop):
            together = pattern.of or block
            if j % together == 0:
                part = slice(j, min(k, j + together))
                score = w[:, part].square() / u.diagonal()[part].square()
                if pattern.of:
                    gone = score.argsort(dim=1)[:, : pattern.of - pattern.kept]
                    kept[:, part] = kept[:, part].scatter(1, gone, False)
                else:
                    gone = score.flatten().argsort()[: int(pattern.ratio * score.numel())]
                    mask = torch.ones(score.numel(), dtype=torch.bool)
                    mask[gone] = False
                    kept[:, part] = mask.reshape(score.shape)
            errors[:, j - i] = w[:, j] * ~kept[:, j] / u[j, j]
            w[:, j:stop] -= errors[:, j - i : j - i + 1] * u[j, j:stop]
        w[:, stop:] -= errors @ u[i:stop, stop:]
    return kept, w * kept


@pytest.mark.parametrize(
    ("text", "ratio", "block", "columns"),
    [
        (None, 0.5, 8, 40),
        (None, 0.3, 16, 40),
        (None, 0.8, 128, 24),
        ("2:4", 0.5, 8, 40),
        ("4:8", 0.5, 128, 48),
        ("1:2", 0.5, 7, 20),
    ],
)
def test_sparsegpt_is_algorithm_1(text: str | None, ratio: float, block: int, columns: int) -> None:
    weight, hessian = problem(11, columns, seed=columns)
    pattern = Pattern.read(ratio, text)
    # n:m masks are chosen m columns at a time, so the paper's block must be whole groups.
    kept, moved = restated(
        weight, hessian, pattern, max(block // (pattern.of or 1), 1) * (pattern.of or 1) if text else block
    )
    found = SparseGpt(block=block, refine=0).prune(weight, pattern, {"hessian": hessian})
    assert torch.equal(found.kept, kept)
    assert found.moved is not None
    torch.testing.assert_close(found.moved.double(), moved, rtol=0, atol=2e-4 * float(moved.abs().max()))
    assert found.metrics["loss"] == pytest.approx(loss(weight - moved, hessian), rel=1e-3)
    # A planted error: a mask that is off in one place moves other weights.
    assert not torch.allclose(found.moved.double(), moved.roll(1, 0), atol=1e-2)


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=["50%", "2:4"])
def test_on_tiny_weights_against_all_masks(pattern: Pattern) -> None:
    """One row of 8: every mask with the weights that are best for it. None is better; magnitude is much worse than SparseGPT."""
    ratios = []
    for seed in range(12):
        weight, hessian = problem(1, 8, seed)
        best = []
        for chosen in itertools.combinations(range(8), 4):
            if pattern.of and sum(k < 4 for k in chosen) != 2:
                continue
            keep = list(chosen)
            held = torch.zeros(1, 8, dtype=torch.float64)
            held[0, keep] = torch.linalg.solve(hessian[keep][:, keep], (weight @ hessian)[0, keep])
            best.append(loss(weight - held, hessian))
        found = SparseGpt(block=8, refine=0).prune(weight, pattern, {"hessian": hessian})
        plain = Magnitude().prune(weight, pattern, {}).kept
        assert found.moved is not None
        own = loss(weight - found.moved, hessian)
        assert own >= min(best) * (1 - 1e-4)
        ratios.append((own / min(best), loss(weight * ~plain, hessian) / min(best)))
    greedy, magnitude = (sorted(r) for r in zip(*ratios, strict=True))
    assert greedy[6] < 2.5
    assert sum(magnitude) > 2 * sum(greedy)


def test_refining_never_raises_the_loss_and_ends_at_the_best_weights_on_the_mask() -> None:
    weight, hessian = problem(9, 32)
    factor = factorize(hessian, act_order=False, damp=0.001, dtype=torch.float32)
    damped = hessian + factor.ridge * torch.eye(32, dtype=torch.float64)
    kept, moved = sparsegpt(weight, factor, HALF)
    kept[3], kept[4] = False, True  # a row with nothing left, and one with all
    moved = moved * kept
    losses = []
    for steps in (0, 1, 2, 3, 5, 8, 300):
        found = refine(weight.float(), moved, kept, factor, steps)
        assert not bool(found[~kept].any())
        losses.append(loss(weight - found, damped))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[5] < 0.9 * losses[0]
    for n in range(9):
        own = kept[n].nonzero()[:, 0]
        best = torch.linalg.solve(damped[own][:, own], (weight[n] @ damped)[own])
        torch.testing.assert_close(found[n, own].double(), best, rtol=0, atol=1e-3)


def test_with_a_diagonal_hessian_it_is_wanda_over_the_block_and_moves_nothing() -> None:
    weight, energies = problem(6, 16)[0], torch.linspace(0.5, 9, 16, dtype=torch.float64)
    found = SparseGpt(damp=0.0).prune(weight, HALF, {"hessian": energies.diag()})
    score = weight.abs() * energies.sqrt()
    assert torch.equal(found.kept, score > score.flatten().sort().values[47])
    assert found.moved is not None
    torch.testing.assert_close(found.moved.double(), weight * found.kept, rtol=0, atol=1e-5)


def test_the_loss_is_far_below_that_of_the_same_mask_without_moving() -> None:
    weight, hessian = problem(40, 96)
    found = SparseGpt().prune(weight, HALF, {"hessian": hessian})
    assert found.moved is not None
    assert loss(weight - found.moved, hessian) < 0.8 * loss(weight * ~found.kept, hessian)
    wanda = Wanda().prune(weight, HALF, {"energy": hessian.diagonal()}).kept
    magnitude = Magnitude().prune(weight, HALF, {}).kept
    assert loss(weight - found.moved, hessian) < 0.9 * loss(weight * ~wanda, hessian)
    assert loss(weight * ~wanda, hessian) < 0.5 * loss(weight * ~magnitude, hessian)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 4), st.booleans(), st.integers(0, 99))
def test_degenerate_statistics(rows: int, groups: int, dead: int, constant: bool, seed: int) -> None:
    """Inputs that are always zero, rows of one number, more columns than rows of text."""
    generator = torch.Generator().manual_seed(seed)
    columns = 4 * groups
    x = torch.randn(3, columns, generator=generator, dtype=torch.float64)
    x[:, : min(dead, columns - 1)] = 0
    weight = torch.full((rows, columns), 0.5) if constant else torch.randn(rows, columns, generator=generator)
    for pattern in (HALF, TWO_FOUR):
        found = SparseGpt(block=6).prune(weight, pattern, {"hessian": x.T @ x})
        assert found.moved is not None
        assert bool(torch.isfinite(found.moved).all())
        assert not bool(found.moved[~found.kept].any())
    assert (found.kept.reshape(rows, groups, 4).sum(-1) == 2).all()


def test_arguments_stay_as_they_were() -> None:
    weight, hessian = problem(3, 8)
    copies = weight.clone(), hessian.clone()
    for method, stats in ((SparseGpt(), {"hessian": hessian}), (Wanda(), {"energy": hessian.diagonal()})):
        method.prune(weight, HALF, method.prepare(stats))
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_a_factor_can_be_shared() -> None:
    weight, hessian = problem(5, 16)
    factor = factorize(hessian, act_order=False, dtype=torch.float32)
    own = SparseGpt().prune(weight, HALF, {"hessian": hessian}).kept
    assert torch.equal(sparsegpt(weight, factor, HALF)[0], own)
    assert torch.equal(SparseGpt().prune(weight, HALF, SparseGpt().prepare({"hessian": hessian})).kept, own)


@pytest.mark.parametrize(
    ("method", "stats", "message"),
    [
        (Wanda(), {}, r"^wanda needs the statistic 'energy'\. Collect it, or use method=magnitude$"),
        (SparseGpt(), {}, r"^sparsegpt needs the statistic 'hessian'\."),
        (
            Wanda(),
            {"energy": torch.ones(3)},
            r"^energy: the energies are of 3 input features, the weight of 8\. Use the",
        ),
        (
            SparseGpt(),
            {"hessian": torch.eye(3)},
            r"^hessian: the Hessian is of 3 input features, the weight of 8\. Use the",
        ),
    ],
)
def test_statistics_that_are_missing_or_of_another_layer(method: Any, stats: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        method.prune(torch.ones(2, 8), HALF, stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, r"^block: a block of 0 columns is impossible\. Use 128$"),
        ({"refine": -1}, r"^refine: -1 steps are impossible\. Use 8, or 0$"),
        ({"damp": -1.0}, r"^damp: damping of -1\.0 times the mean diagonal is not within 0 and 10\. Use 0\.01$"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SparseGpt(**options)
