"""GPTAQ against least squares, against the paper's algorithm column by column, and against exhaustive search."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.rounding.gptaq import Gptaq
from dlqc.rounding.gptq import Gptq, gptq
from dlqc.rounding.hessian import divide, factorize

PLAIN = Gptaq(act_order=False, clip="minmax")


class Problem:
    """A weight [N, K], its inputs x0 before rounding and x behind it, token weights c, and their statistics."""

    def __init__(self, rows: int, columns: int, samples: int | None = None, seed: int = 0, noise: float = 0.15) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        samples = samples or 6 * columns
        mix = normal(columns, columns) * torch.logspace(0, -1.2, columns, dtype=torch.float64)
        self.x0 = normal(samples, columns) @ mix.T
        self.x0[:, 1::7] *= 4
        # Rounding turns the inputs by a fixed error, and adds what does not depend on them.
        error = noise * normal(columns, columns) / columns**0.5
        self.x = self.x0 + self.x0 @ error + noise * self.x0.square().mean().sqrt() * normal(samples, columns)
        self.c = torch.rand(samples, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(rows, columns, generator=generator)
        self.hessian = (self.x * self.c[:, None]).T @ self.x
        self.drift = ((self.x0 - self.x) * self.c[:, None]).T @ self.x

    @property
    def stats(self) -> dict[str, torch.Tensor]:
        return {"hessian": self.hessian, "drift": self.drift}

    def objective(self, values: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
        """Σ c·‖Ŵx - Wx0‖² + λ·‖Ŵ - W‖², by row."""
        error = self.x @ values.double().T - self.x0 @ self.weight.double().T
        return (self.c[:, None] * error.square()).sum(0) + ridge * (
            values.double() - self.weight.double()
        ).square().sum(1)

    def least_squares(self, ridge: float) -> torch.Tensor:
        """The weight with the least objective, by a solver that knows no Hessian."""
        root = self.c.sqrt()[:, None]
        left = torch.cat([self.x * root, ridge**0.5 * torch.eye(self.x.shape[1], dtype=torch.float64)])
        weight = self.weight.double().T
        right = torch.cat([(self.x0 * root) @ weight, ridge**0.5 * weight])
        return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 40, 300])
def test_the_target_is_the_least_squares_solution(columns: int, act_order: bool) -> None:
    """Over more than one panel of the factor, in its order or in another."""
    problem = Problem(5, columns)
    factor = factorize(problem.hessian, act_order=act_order)
    weight = problem.weight.double()
    target = weight + weight @ divide(problem.drift, factor)
    torch.testing.assert_close(target, problem.least_squares(factor.ridge), rtol=1e-8, atol=1e-8)
    assert bool((problem.objective(target, factor.ridge) <= problem.objective(weight, factor.ridge)).all())
    prepared = Gptaq(act_order=act_order).prepare(problem.stats)["drift"].matrix
    torch.testing.assert_close(weight + weight @ prepared.double(), target, rtol=1e-3, atol=1e-3)


def papers_algorithm(problem: Problem, found: QuantizedWeight, ridge: float) -> torch.Tensor:
    """Algorithm 1 of the paper in float64, column by column, on a grid that is given: ŵ.

    H⁻¹ = UᵀU;  P = ((ΔX·Xᵀ·Uᵀ) ⊙ M)·U, M strictly upper triangular;  for each column j: round it,
    W[:, j:] += -(w_j - ŵ_j)/U_jj·U[j, j:] + w_j·P[j, j:].
    """
    width = len(problem.hessian)
    inverse = torch.linalg.inv(problem.hessian + ridge * torch.eye(width, dtype=torch.float64))
    upper = torch.linalg.cholesky(inverse, upper=True)
    push = (problem.drift @ upper.T).triu(1) @ upper
    work, rounded = problem.weight.double().clone(), torch.zeros(problem.weight.shape, dtype=torch.float64)
    group = width // found.scales.shape[1]
    for j in range(width):
        w, scale = work[:, j].clone(), found.scales[:, j // group].double()
        zero = found.format.midpoint if found.zeros is None else found.zeros[:, j // group].double()
        code = (torch.round(w / scale) + zero).clamp(0, found.format.top)
        rounded[:, j] = (code - zero) * scale
        work[:, j:] -= torch.outer((w - rounded[:, j]) / upper[j, j], upper[j, j:])
        work[:, j:] += torch.outer(w, push[j, j:])
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_objective_is_less_than_the_paper_s_and_gptq_s(bits: int) -> None:
    """On the same grid. The paper leaves a part of the correction out, which shows the more the finer the grid is."""
    ratios, gains = [], []
    for seed in range(6):
        problem = Problem(24, 48, seed=seed)
        fmt = IntFormat(bits, 24, False)
        found = PLAIN.round(problem.weight, fmt, problem.stats)
        assert isinstance(found.weight, QuantizedWeight)
        ridge = factorize(problem.hessian, act_order=False).ridge
        ours = problem.objective(found.weight.dequantize()).sum()
        ratios.append(float(ours / problem.objective(papers_algorithm(problem, found.weight, ridge)).sum()))
        plain = gptq(problem.weight, problem.hessian, fmt, Gptq(act_order=False, clip="minmax")).weight
        gains.append(float(ours / problem.objective(plain.dequantize()).sum()))
    assert max(ratios) < {2: 0.9, 3: 0.7, 4: 0.6, 8: 0.6}[bits]
    assert max(gains) < {2: 0.7, 3: 0.45, 4: 0.35, 8: 0.35}[bits]


def test_on_a_fine_grid_the_optimum_is_reached_and_the_paper_s_algorithm_stays_away() -> None:
    problem = Problem(16, 32)
    found = PLAIN.round(problem.weight, IntFormat(8, 8, False), problem.stats).weight
    assert isinstance(found, QuantizedWeight)
    ridge = factorize(problem.hessian, act_order=False).ridge
    best = problem.objective(problem.least_squares(ridge), ridge).sum()
    assert best <= problem.objective(found.dequantize(), ridge).sum() < 1.01 * best
    assert problem.objective(papers_algorithm(problem, found, ridge), ridge).sum() > 1.2 * best


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"act_order": False, "static_groups": False}])
@pytest.mark.parametrize("clip", ["minmax", "mse", "trial"])
def test_it_is_gptq_of_the_target(options: dict[str, bool], clip: str) -> None:
    problem, fmt = Problem(20, 64), IntFormat(3, 16)
    method = Gptaq(clip=clip, **options)  # type: ignore[arg-type]
    factor = factorize(problem.hessian, act_order=method.act_order)
    target = problem.least_squares(factor.ridge)
    expected = gptq(target.float(), factor, fmt, Gptq(clip=clip, **options)).weight  # type: ignore[arg-type]
    found = method.round(problem.weight, fmt, problem.stats)
    assert isinstance(found.weight, QuantizedWeight)
    assert (found.weight.codes != expected.codes).float().mean() < 0.01  # float32 on the way to the target
    error = (problem.weight - found.weight.dequantize()).double()
    signal = (problem.weight.double() @ problem.hessian * problem.weight).sum()
    noise, moved = ((e @ problem.hessian * e).sum() for e in (error, target - problem.weight))
    assert found.metrics["sqnr_db"] == pytest.approx(float(10 * (signal / noise).log10()), abs=0.01)
    assert found.metrics["correction_db"] == pytest.approx(float(10 * (signal / moved).log10()), abs=0.01)


def test_without_drift_or_without_correction_it_is_gptq() -> None:
    problem, fmt = Problem(20, 64), IntFormat(3, 16)
    expected = Gptq().round(problem.weight, fmt, problem.stats).weight.codes
    still = {"hessian": problem.hessian, "drift": torch.zeros_like(problem.drift)}
    assert torch.equal(Gptaq().round(problem.weight, fmt, still).weight.codes, expected)
    assert torch.equal(Gptaq(alpha=0.0).round(problem.weight, fmt, problem.stats).weight.codes, expected)
    codes = [Gptaq(alpha=a).round(problem.weight, fmt, problem.stats).weight.codes for a in (0.25, 1.0)]
    changed = [float((c != expected).float().mean()) for c in codes]
    assert 0 < changed[0] < changed[1]


def test_prepared_statistics_are_shared_and_arguments_unharmed() -> None:
    problem, fmt = Problem(20, 64), IntFormat(4, 16)
    before = (problem.weight.clone(), problem.hessian.clone(), problem.drift.clone())
    prepared = Gptaq().prepare(problem.stats)
    whole = Gptaq().round(problem.weight, fmt, prepared)
    again = Gptaq().round(problem.weight, fmt, problem.stats)
    assert torch.equal(whole.weight.codes, again.weight.codes)
    assert whole.metrics == again.metrics
    for now, then in zip((problem.weight, problem.hessian, problem.drift), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("act_order", [True, False])
def test_tiny_problems_against_exhaustive_search(act_order: bool) -> None:
    """2 columns, 2 bits: the greedy choice written out, and the best of all 16 codes."""
    fmt, every = IntFormat(2, None), torch.tensor(list(product(range(4), repeat=2)), dtype=torch.float64)
    ratios = []
    for seed in range(20):
        problem = Problem(8, 2, seed=seed)
        found = Gptaq(act_order=act_order, clip="minmax").round(problem.weight, fmt, problem.stats).weight
        assert isinstance(found, QuantizedWeight)
        factor = factorize(problem.hessian, act_order=act_order)
        scale = found.scales.double()
        damped = problem.hessian + factor.ridge * torch.eye(2, dtype=torch.float64)
        target = problem.least_squares(factor.ridge)
        first, second = factor.order.flip(0).tolist()
        # Given the error of the first column, the second is best moved by e·H_12 / H_22.
        codes = torch.zeros(8, 2, dtype=torch.float64)
        codes[:, first] = (torch.round(target[:, first] / scale[:, 0]) + 2).clamp(0, 3)
        error = target[:, first] - (codes[:, first] - 2) * scale[:, 0]
        aim = target[:, second] + error * damped[first, second] / damped[second, second]
        codes[:, second] = (torch.round(aim / scale[:, 0]) + 2).clamp(0, 3)
        assert torch.equal(found.codes.double(), codes)
        best = torch.stack([problem.objective((code - 2) * scale, factor.ridge) for code in every]).amin(dim=0)
        loss = problem.objective(found.dequantize(), factor.ridge)
        assert bool((loss >= best * (1 - 1e-9)).all())
        ratios.append(loss / best)
    assert torch.cat(ratios).median() < 1.1


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7, 16]),
    samples=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4, 8]),
    options=st.sampled_from([{}, {"act_order": False}, {"act_order": False, "static_groups": False}]),
    dead=st.booleans(),
    zero_row=st.booleans(),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_any_shape_and_rank(rows, groups, group, samples, bits, options, dead, zero_row, scale, seed) -> None:  # type: ignore[no-untyped-def]
    width = groups * group
    problem = Problem(rows, width, samples, seed)
    hessian, drift, weight = problem.hessian * scale, problem.drift * scale, problem.weight
    if dead and width > 1:
        hessian[0], hessian[:, 0], drift[:, 0] = 0, 0, 0
    if zero_row:
        weight[0] = 0
    found = Gptaq(**options).round(weight, IntFormat(bits, group, False), {"hessian": hessian, "drift": drift})
    values = found.weight.dequantize()
    assert bool(torch.isfinite(values).all())
    assert all(abs(value) < float("inf") for value in found.metrics.values())
    if zero_row:
        assert bool((values[0] == 0).all())
    again = Gptaq(**options).round(weight, IntFormat(bits, group, False), {"hessian": hessian, "drift": drift})
    assert torch.equal(values, again.weight.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drift": None}, r"^gptaq needs the statistic 'drift'\. Collect it, or use rounding 'gptq'$"),
        ({"hessian": None}, r"^gptaq needs the statistic 'hessian'\. Collect it, or use rounding 'gptq'$"),
        (
            {"drift": torch.full((8, 8), float("nan"))},
            r"^drift: the drift is not finite\. The layer's input overflowed: calibrate in bfloat16 or float32$",
        ),
        (
            {"drift": torch.full((8, 8), float("inf"))},
            r"^drift: the drift is not finite\. The layer's input overflowed: calibrate in bfloat16 or float32$",
        ),
        (
            {"drift": torch.zeros(4, 8)},
            r"^drift: the drift is 4 by 8, the Hessian of 8 input features\. Use the statistics of this layer$",
        ),
        ({"hessian": torch.zeros(8, 8)}, r"^hessian: the Hessian is zero\. Check that calibration reaches this layer"),
        ({"hessian": -torch.eye(8)}, r"^hessian: the Hessian is not positive, even damped by 10 times its mean diag"),
    ],
)
def test_unusable_statistics_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    problem = Problem(4, 8)
    with pytest.raises(CalibrationError, match=message):
        Gptaq().round(problem.weight, IntFormat(4, None), problem.stats | change)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_bad_options_are_refused(alpha: float) -> None:
    message = rf"^alpha: a correction of {alpha} times the drift is not within 0 and 1\. Use 1, or 0\.25 as the auth"
    with pytest.raises(RecipeError, match=message):
        Gptaq(alpha=alpha)
