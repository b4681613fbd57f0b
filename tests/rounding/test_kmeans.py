from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import CalibrationError, ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.integer import IntFormat
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.kmeans import BINS, Kmeans, choose_outliers, kmeans, sensitivity
from dlqc.rounding.vector import factorize_blocks

FULL = CodebookFormat(3, table_dtype="float32")


def hessian(width: int, rows: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    sizes = torch.exp(torch.randn(width, generator=generator, dtype=torch.float64) / 2)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width)) * sizes
    return x.T @ x


def energy(error: torch.Tensor, h: torch.Tensor) -> float:
    return ((error.double() @ h) * error.double()).sum().item()


def error_of(values: torch.Tensor, mass: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Σ mass·(value - nearest)², float64 [R]."""
    nearest = (values.double().unsqueeze(2) - table.double().unsqueeze(1)).square().amin(dim=2)
    return (nearest * mass).sum(dim=1)


def optimum(values: list[float], mass: list[float], clusters: int) -> float:
    """The least error over all ways to cut the sorted numbers into at most `clusters` intervals."""
    pairs = sorted(zip(values, mass, strict=True))

    def cost(part: list[tuple[float, float]]) -> float:
        total = sum(m for _, m in part)
        mean = sum(m * v for v, m in part) / total if total else 0.0
        return sum(m * (v - mean) ** 2 for v, m in part)

    best = float("inf")
    for cuts in combinations(range(1, len(pairs)), min(clusters, len(pairs)) - 1):
        edges = [0, *cuts, len(pairs)]
        best = min(best, sum(cost(pairs[a:b]) for a, b in pairwise(edges)))
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 11), st.sampled_from([2, 4, 8]), st.integers(0, 2**31), st.booleans())
def test_short_rows_end_at_the_optimum(count: int, clusters: int, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, count, generator=generator)
    if ties:
        values = (2 * values).round() / 2
    mass = torch.rand(3, count, generator=generator) ** 3
    found = error_of(values, mass, kmeans(values, mass, clusters))
    for row in range(3):
        best = optimum(values[row].tolist(), mass[row].tolist(), clusters)
        assert found[row].item() == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("clusters", "expected"), [(2, 0.36338), (4, 0.11748), (8, 0.03454), (16, 0.009497)])
def test_many_gaussian_numbers_give_the_quantizer_of_max(clusters: int, expected: float) -> None:
    # Max 1960, table I: distortion of the best quantizers of a Gaussian. A table fitted to 2^16 numbers is near it.
    values = torch.randn(8, 1 << 16)
    found = error_of(values, torch.ones(()), kmeans(values, torch.ones(8, 1 << 16), clusters)) / (1 << 16)
    assert found.mean().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("clusters", [4, 16])
def test_long_rows_come_near_the_optimum_and_beat_quantiles(clusters: int) -> None:
    # The optimum of 300 numbers by dynamic programming in plain Python, and Lloyd's steps from quantiles.
    values = torch.randn(4, 300).sort(dim=1).values
    mass = torch.exp(2 * torch.randn(4, 300))
    assert values.shape[1] > BINS
    found = error_of(values, mass, kmeans(values, mass, clusters))
    plain = values[:, torch.linspace(0, 299, clusters + 2)[1:-1].long()].double()
    for _ in range(100):
        nearest = (values.double().unsqueeze(2) - plain.unsqueeze(1)).abs().argmin(dim=2)
        held = torch.nn.functional.one_hot(nearest, clusters) * mass.double().unsqueeze(2)
        total = held.sum(1)
        plain = torch.where(total > 0, (held * values.unsqueeze(2)).sum(1) / total.clamp(min=1e-300), plain)
    assert bool((found <= error_of(values, mass, plain) * (1 + 1e-9)).all())
    for row in range(4):
        v, m = values[row].double(), mass[row].double()
        zero = torch.zeros(1, dtype=torch.float64)
        s0, s1, s2 = (torch.cat([zero, part.cumsum(0)]) for part in (m, m * v, m * v * v))
        ahead = s0.unsqueeze(0) - s0.unsqueeze(1)
        cost = s2.unsqueeze(0) - s2.unsqueeze(1) - (s1.unsqueeze(0) - s1.unsqueeze(1)) ** 2 / ahead.clamp(min=1e-300)
        cost = torch.where(torch.ones(301, 301).tril().bool(), torch.inf, cost).fill_diagonal_(0)
        least = cost[0]
        for _ in range(clusters - 1):
            least = (least.unsqueeze(1) + cost).amin(0)
        assert least[-1] * (1 - 1e-6) <= found[row] <= least[-1] * 1.03


def test_steps_only_reduce_the_error() -> None:
    values, mass = torch.randn(20, 500), torch.rand(20, 500)
    errors = [error_of(values, mass, kmeans(values, mass, 8, iterations=n)) for n in (0, 1, 5, 50)]
    for more, less in zip(errors[1:], errors[:-1], strict=True):
        assert bool((more <= less * (1 + 1e-9)).all())
    assert errors[-1].sum() < 0.999 * errors[0].sum()


def test_degenerate_rows() -> None:
    values = torch.zeros(6, 200)
    values[1] = 0.7
    values[2] = torch.tensor([1.0, -2, 3, 5]).repeat(50)
    values[3] = torch.randn(200) * 2.0**-140
    values[4] = torch.randn(200).clamp(-1, 1) * 3e38
    values[5] = torch.randn(200)
    mass = torch.ones(6, 200)
    mass[5] = 0
    table = kmeans(values, mass, 4)
    assert table.shape == (6, 4)
    assert bool(torch.isfinite(table).all())
    assert error_of(values[:3], mass[:3], table[:3]).tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    # Exact scaling: tables follow the units of the row.
    for row, unit in ((3, 2.0**140), (4, 2.0**-127)):
        scaled = values[row : row + 1].double() * unit
        expected = kmeans(scaled.float(), mass[:1], 4)
        torch.testing.assert_close(table[row : row + 1] * unit, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table[5:], kmeans(values[5:], torch.ones(1, 200), 4))


def test_many_rows_equal_one_row_at_a_time() -> None:
    values, mass = torch.randn(300, 4096), torch.rand(300, 4096)  # several chunks
    assert torch.equal(kmeans(values, mass, 4)[270:271], kmeans(values[270:271], mass[270:271], 4))


def test_with_the_fisher_information() -> None:
    weight, fisher, h = torch.randn(12, 64), torch.rand(12, 64) ** 4, hessian(64)
    found = Kmeans("fisher").round(weight, FULL, {"fisher": fisher, "hessian": h})
    expected = FULL.quantize(weight, kmeans(weight, fisher, 8).reshape(12, 1, 8))
    torch.testing.assert_close(found.weight.dequantize(), expected.dequantize(), rtol=1e-3, atol=1e-3)
    error = weight - found.weight.dequantize()
    assert found.metrics["error"] == pytest.approx(
        ((error**2 * fisher).sum() / (weight**2 * fisher).sum()).item(), rel=1e-3
    )
    assert found.metrics["loss"] == pytest.approx(energy(error, h), rel=1e-4)
    ratio = energy(weight, h) / energy(error, h)
    assert found.metrics["sqnr_db"] == pytest.approx(10 * torch.tensor(ratio).log10().item(), abs=1e-3)
    assert Kmeans("fisher").round(weight, FULL, {"fisher": fisher}).metrics.keys() == {"error"}


def test_more_steps_never_raise_the_objective_under_the_fisher_information() -> None:
    weight, fisher = torch.randn(7, 300) ** 3, torch.rand(7, 300) ** 6
    errors = [
        Kmeans("fisher", iterations=steps).round(weight, CodebookFormat(3), {"fisher": fisher}).metrics["error"]
        for steps in (0, 1, 2, 4, 8, 50)
    ]
    # Tables are stored in float16, which may take back a trifle.
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


def test_without_it_columns_weigh_as_the_diagonal_of_the_hessian() -> None:
    weight, h = torch.randn(12, 64), hessian(64)
    found = Kmeans().round(weight, FULL, {"hessian": h}).weight
    expected = FULL.quantize(weight, kmeans(weight, h.diagonal().expand(12, 64), 8).reshape(12, 1, 8))
    torch.testing.assert_close(found.dequantize(), expected.dequantize(), rtol=1e-4, atol=1e-4)
    # It is the weighted error that got small.
    plain = FULL.quantize(weight, kmeans(weight, torch.ones(12, 64), 8).reshape(12, 1, 8))
    ours, other = ((weight - part.dequantize()).square() @ h.diagonal().float() for part in (found, plain))
    assert ours.sum() < 0.9 * other.sum()


def test_with_feedback_columns_weigh_as_their_share_of_the_loss() -> None:
    h = hessian(64)
    found = factorize_blocks(h, 1)
    expected = torch.empty(64, dtype=torch.float64)
    for place, column in enumerate(found.order.tolist()):
        expected[column] = found.factor.upper[place, place] ** 2
    mass = sensitivity(torch.zeros(3, 64), None, found)
    torch.testing.assert_close(mass[0].double(), expected / expected.max(), rtol=1e-6, atol=0)


def test_groups_have_tables_of_their_own() -> None:
    weight, fisher = torch.randn(5, 96), torch.rand(5, 96)
    whole = Kmeans("fisher").round(weight, CodebookFormat(2, 32), {"fisher": fisher}).weight.dequantize()
    for part in range(3):
        columns = slice(32 * part, 32 * part + 32)
        own = Kmeans("fisher").round(weight[:, columns], CodebookFormat(2), {"fisher": fisher[:, columns]}).weight
        torch.testing.assert_close(whole[:, columns], own.dequantize())


@pytest.mark.parametrize("feedback", [False, True])
def test_outliers_are_the_sensitive_and_the_large(feedback: bool) -> None:
    fmt = CodebookFormat(3, None, 0.02)
    weight, fisher, h = torch.randn(40, 100), torch.rand(40, 100), hessian(100)
    weight[7, 5], fisher[8, 6] = 30, 50
    stats = {"fisher": fisher, "hessian": h}
    mask = choose_outliers(weight, sensitivity(weight, fisher, None), fmt, 0.005)
    assert int(mask.sum()) == 80
    sensitive = fisher.flatten().topk(20).indices
    assert bool(mask.flatten()[sensitive].all())
    rest = mask.flatten().clone()
    rest[sensitive] = False
    others = weight.abs().flatten().clone()
    others[sensitive] = 0
    assert torch.equal(rest.nonzero().squeeze(1), others.topk(60).indices.sort().values)
    found = Kmeans("fisher", sensitive=0.005, feedback=feedback).round(weight, fmt, stats)
    starts, columns = found.weight.starts.long(), found.weight.columns.long()
    rows = torch.repeat_interleave(torch.arange(40), starts.diff())
    assert torch.equal(torch.stack([rows, columns], 1), mask.nonzero())
    dense = Kmeans("fisher", feedback=feedback).round(weight, CodebookFormat(3), stats)
    assert found.metrics["error"] < 0.8 * dense.metrics["error"]
    assert bool((found.weight.dequantize() - weight)[7, 5].abs() < 0.02 if not feedback else True)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1])
)
def test_the_metrics_are_those_of_the_result(
    rows: int, group: int, groups: int, channel: bool, feedback: bool, sparse: float
) -> None:
    width = group * groups
    fmt = CodebookFormat(2, None if channel else group, sparse)
    weight, h = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)), hessian(width)
    rounding = Kmeans(feedback=feedback)
    found = rounding.round(weight, fmt, rounding.prepare({"hessian": h}))
    error = energy(weight - found.weight.dequantize(), h)
    assert found.metrics["loss"] == pytest.approx(error, rel=1e-3, abs=1e-6 * energy(weight, h))


def test_feedback_reduces_the_output_error() -> None:
    weight, h = torch.randn(300, 128), hessian(128)
    plain = Kmeans().round(weight, CodebookFormat(3), {"hessian": h}).metrics
    ours = Kmeans(feedback=True).round(weight, CodebookFormat(3), {"hessian": h}).metrics
    assert ours["loss"] < 0.8 * plain["loss"]
    assert ours["loss"] < 0.8 * ours["loss_rtn"]
    sparse = Kmeans(feedback=True).round(weight, CodebookFormat(3, sparse=0.02), {"hessian": h}).metrics
    assert sparse["loss"] < ours["loss"]


def test_feedback_beats_gptq_on_heavy_tails() -> None:
    weight, h = torch.randn(64, 256) ** 3, hessian(256)
    tables = Kmeans(feedback=True).round(weight, CodebookFormat(3), {"hessian": h})
    grid = Gptq().round(weight, IntFormat(3, None), {"hessian": h})
    assert tables.metrics["loss"] < 0.7 * grid.metrics["loss"]


def test_nothing_that_comes_in_is_changed() -> None:
    weight, fisher, h = torch.randn(6, 64).double(), torch.rand(6, 64), hessian(64)
    copies = [weight.clone(), fisher.clone(), h.clone()]
    Kmeans("fisher", feedback=True).round(weight, CodebookFormat(3, None, 0.1), {"fisher": fisher, "hessian": h})
    assert all(torch.equal(a, b) for a, b in zip((weight, fisher, h), copies, strict=True))
    assert Kmeans().prepare({"hessian": h}) == {"hessian": h}
    assert Kmeans(feedback=True).prepare({}) == {}


@pytest.mark.parametrize("feedback", [False, True])
def test_zero_rows_and_rows_without_sensitivity(feedback: bool) -> None:
    weight, fisher = torch.randn(4, 64), torch.rand(4, 64)
    weight[1], fisher[2], fisher[3, 10:] = 0, 0, 0
    stats = {"fisher": fisher, "hessian": hessian(64)}
    for fmt in (CodebookFormat(3), CodebookFormat(3, 16, 0.05)):
        found = Kmeans("fisher", feedback=feedback).round(weight, fmt, stats).weight.dequantize()
        assert torch.equal(found[1], torch.zeros(64))
        assert bool(torch.isfinite(found).all())
        assert (found[2] - weight[2]).square().mean() < (0.4 if feedback else 0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(ModelError, match=r"^1 of 256 weights are not finite as float32\. Check the checkpoint"):
        Kmeans().round(weight, CodebookFormat(3), {"hessian": hessian(64)})


def test_errors() -> None:
    weight, h, fmt = torch.randn(4, 64), hessian(64), CodebookFormat(3)
    with pytest.raises(
        RecipeError, match=r"^iterations: -1 steps are impossible\. Use 50, or 0 for the initial tables$"
    ):
        Kmeans(iterations=-1)
    with pytest.raises(
        RecipeError, match=r"^sensitive: a share of 2 sensitive weights is not within 0 and 0.5\. Use 0.0005"
    ):
        Kmeans(sensitive=2)
    with pytest.raises(
        RecipeError, match=r"^damp: damping of 11 times the mean diagonal is not within 0 and 10\. Use 0"
    ):
        Kmeans(damp=11)
    with pytest.raises(
        RecipeError, match=r"^fmt: kmeans rounds to tables, not to 'int4 g128'\. Use CodebookFormat, or an"
    ):
        Kmeans().round(weight, IntFormat(4), {"hessian": h})
    with pytest.raises(
        FeasibilityError, match=r"^group_size: 64 input features do not divide by group 48\. Use a divis"
    ):
        Kmeans().round(weight, CodebookFormat(3, 48), {"hessian": h})
    with pytest.raises(
        CalibrationError, match=r"^kmeans needs the statistic 'fisher' or 'hessian'\. Collect one of them"
    ):
        Kmeans().round(weight, fmt, {})
    with pytest.raises(
        CalibrationError, match=r"^kmeans with feedback needs the statistic 'hessian'\. Collect it, or u"
    ):
        Kmeans(feedback=True).round(weight, fmt, {"fisher": torch.ones(4, 64)})
    with pytest.raises(
        CalibrationError, match=r"^fisher: the Fisher information is \(4, 32\), the weight \(4, 64\)\. Use"
    ):
        Kmeans("fisher").round(weight, fmt, {"fisher": torch.ones(4, 32)})
    for feedback in (False, True):
        with pytest.raises(
            CalibrationError, match=r"^hessian: the Hessian is of 32 input features, the weight of 64\. U"
        ):
            Kmeans(feedback=feedback).round(weight, fmt, {"hessian": hessian(32)})
    for bad in (float("nan"), -1.0):
        with pytest.raises(
            CalibrationError, match=r"^fisher: the sensitivity has elements that are negative or not fin"
        ):
            Kmeans("fisher").round(weight, fmt, {"fisher": torch.full((4, 64), bad)})
    with pytest.raises(
        ContractError, match=r"^hessian: the factor was made for blocks of 8 columns, not of 1\. Call pre"
    ):
        Kmeans(feedback=True).round(weight, fmt, {"hessian": factorize_blocks(h, 8)})
