"""DAQ: each step against its definition, the whole against round to nearest, and Hessians that a real run can meet."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import CalibrationError, ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.formats.integer import IntFormat
from dlqc.formats.planes import PlanesFormat, Tile, fit
from dlqc.rounding import daq as module
from dlqc.rounding.abmp import allocate, scores
from dlqc.rounding.daq import PAPER, Daq, condition, daq, descend, emphasis, feedback, fit_columns, fit_rows
from dlqc.rounding.gptq import gptq
from dlqc.rounding.hessian import output_energy
from dlqc.rounding.rtn import Rtn

DOUBLE = torch.float64


def problem(rows: int, columns: int, samples: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K_in] and the Hessian of correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=DOUBLE)
    mix *= torch.logspace(0, -1.5, columns, dtype=DOUBLE)
    noise = torch.randn(samples or 4 * columns, columns, generator=generator, dtype=DOUBLE)
    x = noise @ mix.T + 0.1 * noise.roll(1, 0)
    x[:, 1::7] *= 5
    return torch.randn(rows, columns, generator=generator), x.T @ x


def group(size: int, rows: int, order: int, seed: int = 0) -> tuple[Tile, torch.Tensor, torch.Tensor]:
    """A fitted tile, its target [g, N] and R = U_gg⁻¹ [g, g], float64."""
    weight, hessian = problem(rows, size, seed=seed)
    block = condition(hessian, size, act_order=False).blocks[0]
    target = weight.T.double()
    return fit(target, order), target, block


def loss(tile: Tile, target: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """‖(T - Q)R‖² of each row."""
    return (block.mT @ (target - tile.value())).square().sum(dim=0)


def damped(hessian: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=DOUBLE)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [3, 7, 100])
def test_the_metric_is_what_it_says(act_order: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COLUMNS", columns)
    _, hessian = problem(1, 24)
    metric = condition(hessian, 8, act_order=act_order)
    inverse = torch.linalg.inv(damped(hessian))
    found = metric.inverse.double().mT @ metric.inverse.double() / metric.unit
    torch.testing.assert_close(found, inverse[metric.order][:, metric.order], rtol=1e-4, atol=1e-6 * float(found.max()))
    assert torch.equal(metric.inverse, metric.inverse.triu())
    torch.testing.assert_close(metric.spread / metric.unit, inverse.diagonal())
    near = metric.inverse[8:16, 8:16].double()
    torch.testing.assert_close(near @ metric.blocks[1], torch.eye(8, dtype=DOUBLE), rtol=0, atol=1e-4)
    # Groups stay together, and come by falling diagonal, as their columns do.
    assert torch.equal(metric.order.reshape(3, 8) // 8, metric.groups.unsqueeze(1).expand(3, 8))
    inside = hessian.diagonal()[metric.order].reshape(3, 8)
    assert bool((inside.diff(dim=1) <= 0).all() and (inside.sum(1).diff() <= 0).all()) == act_order
    torch.testing.assert_close(
        metric.columns(slice(8, 16), DOUBLE) * metric.unit, damped(hessian)[metric.order][:, metric.order[8:16]]
    )


def test_compensation_is_the_least_squares_answer_of_the_columns_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(5, 24)
    seen: list[torch.Tensor] = []
    done: list[torch.Tensor] = []
    original = module.round_group

    def spy(target: torch.Tensor, *args: object) -> Tile:
        seen.append(target.clone())
        tile = original(target, *args)
        done.append(tile.value())
        return tile

    monkeypatch.setattr(module, "round_group", spy)
    for act_order in (False, True):
        seen.clear(), done.clear()
        daq(weight, hessian, PlanesFormat(2, 8), replace(PAPER, act_order=act_order), dtype=DOUBLE)
        metric = condition(hessian, 8, act_order=act_order)
        whole = damped(hessian)[metric.order][:, metric.order]
        exact = weight.double()[:, metric.order] / 2 ** weight.abs().max().log2().floor()
        for g in (1, 2):
            # min over E_rest of tr(E H Eᵀ) with the errors E_done given: E_rest H_rr = -E_done H_dr.
            cut = 8 * g
            errors = exact[:, :cut] - torch.cat(done[:g]).T
            answer = -torch.linalg.solve(whole[cut:, cut:], (errors @ whole[:cut, cut:]).T).T
            expected = (exact[:, cut:] - answer)[:, :8]
            torch.testing.assert_close(seen[g].T, expected, rtol=1e-4, atol=1e-4)


def test_diagonal_and_no_compensation_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(5, 16)
    seen: list[torch.Tensor] = []
    original = module.round_group
    monkeypatch.setattr(module, "round_group", lambda t, *a: (seen.append(t.T.clone()), original(t, *a))[1])
    for how in ("none", "diagonal"):
        daq(weight, hessian, PlanesFormat(2, 8), replace(PAPER, compensation=how), dtype=DOUBLE)
    unit = 2 ** weight.abs().max().log2().floor()
    torch.testing.assert_close(seen[1], weight[:, 8:].double() / unit)
    first = PlanesFormat(2, 8).quantize(weight[:, :8])
    upper = condition(hessian, 8, act_order=False).inverse.double()
    plain = replace(PAPER, dor=False)
    seen.clear()
    daq(weight, hessian, PlanesFormat(2, 8), replace(plain, compensation="diagonal"), dtype=DOUBLE)
    errors = (weight[:, :8].double() - first.dequantize().double()) / upper.diagonal()[:8]
    torch.testing.assert_close(seen[1], (weight[:, 8:].double() - errors @ upper[:8, 8:]) / unit, rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 3), st.integers(0, 10**6))
def test_no_step_in_the_metric_raises_its_loss(size: int, rows: int, order: int, seed: int) -> None:
    tile, target, block = group(size, rows, order, seed)
    metric = block @ block.mT
    steps = [
        lambda gradient: feedback(tile, target, block),
        lambda gradient: fit_columns(tile, gradient, metric, torch.bfloat16),
        lambda gradient: fit_rows(tile, gradient, metric, torch.bfloat16),
        lambda gradient: descend(tile, gradient, metric),
    ]
    for step in (*steps, *steps):
        before = loss(tile, target, block)
        gradient = step(metric @ (target - tile.value()))
        after = loss(tile, target, block)
        slack = 1e-9 * (before.sum() + (block.mT @ target).square().sum())
        assert after.sum() <= before.sum() + slack
        if step is not steps[1]:  # column scales are fitted for all rows together
            assert bool((after <= before + slack).all())
        if gradient is not None:
            expected = metric @ (target - tile.value())
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8 * float(metric.max()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scales_are_fitted_to_the_least_squares_answer(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RIDGE", 1e-13)
    tile, target, block = group(6, 9, order)
    metric = block @ block.mT
    # Columns: (T - Q)R is linear in c, one equation for each element.
    design = torch.zeros(order, 6, 6 * 9, dtype=DOUBLE)
    for k, j in product(range(order), range(6)):
        one = torch.zeros(6, 9, dtype=DOUBLE)
        one[j] = tile.signs[k, j] * tile.rows[k]
        design[k, j] = (block.mT @ one).flatten()
    answer = torch.linalg.lstsq(design.flatten(0, 1).T, (block.mT @ target).flatten().unsqueeze(1)).solution
    fit_columns(tile, metric @ (target - tile.value()), metric, DOUBLE)
    torch.testing.assert_close(tile.columns.flatten(), answer.flatten(), rtol=1e-6, atol=1e-7)
    # Rows: one problem of K unknowns each.
    before = tile.columns.clone()
    fit_rows(tile, metric @ (target - tile.value()), metric, DOUBLE)
    for i in range(9):
        parts = (tile.signs[:, :, i] * before) @ block
        answer = torch.linalg.lstsq(parts.T, (target[:, i] @ block).unsqueeze(1)).solution
        torch.testing.assert_close(tile.rows[:, i], answer[:, 0], rtol=1e-6, atol=1e-7)


def test_descent_ends_where_no_single_code_can_improve() -> None:
    tile, target, block = group(20, 7, 2)
    metric = block @ block.mT
    for _ in range(50):
        descend(tile, metric @ (target - tile.value()), metric)
    best = loss(tile, target, block)
    for j, pattern in product(range(20), product((-1.0, 1.0), repeat=2)):
        other = Tile(tile.signs.clone(), tile.rows, tile.columns)
        other.signs[:, j] = torch.tensor(pattern, dtype=DOUBLE).unsqueeze(1)
        assert bool((loss(other, target, block) >= best * (1 - 1e-9)).all())


def test_feedback_is_the_greedy_choice_column_after_column() -> None:
    tile, target, block = group(20, 7, 2)
    before, losses = tile.signs.clone(), loss(tile, target, block)
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=DOUBLE)
    expected = torch.empty_like(before)
    for i in range(7):
        errors = torch.zeros(20, dtype=DOUBLE)
        for j in range(20):
            # Column j of (T - Q)R holds errors of columns up to j.
            options = target[j, i] - patterns @ (tile.columns[:, j] * tile.rows[:, i])
            cost = (errors[:j] @ block[:j, j] + options * block[j, j]).abs()
            errors[j] = options[cost.argmin()]
            expected[:, j, i] = patterns[cost.argmin()]
    feedback(tile, target, block)
    tried = Tile(expected, tile.rows, tile.columns)
    better = loss(tried, target, block) < losses
    assert bool(better.any())
    assert torch.equal(tile.signs, torch.where(better, expected, before))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_codes_of_tiny_groups_against_exhaustive_search(order: int) -> None:
    size = {1: 8, 2: 4, 3: 3}[order]
    ratios = []
    for seed in range(20):
        tile, target, block = group(size, 6, order, seed)
        feedback(tile, target, block)
        for _ in range(5):
            descend(tile, block @ block.mT @ (target - tile.value()), block @ block.mT)
        found, best = loss(tile, target, block), torch.full((6,), float("inf"), dtype=DOUBLE)
        for pattern in product((-1.0, 1.0), repeat=order * size):
            tile.signs[:] = torch.tensor(pattern, dtype=DOUBLE).reshape(order, size, 1)
            best = torch.minimum(best, loss(tile, target, block))
        assert bool((found >= best * (1 - 1e-9)).all())
        ratios.append(found / best)
    assert torch.cat(ratios).median() < 1.2
    assert torch.cat(ratios).mean() < 2


def test_outliers_of_saliency_count_more() -> None:
    target = torch.randn(8, 200, generator=torch.Generator().manual_seed(0)).clamp_(-1, 1)
    target[2, 5] = 9
    spread = torch.ones(8)
    weights = emphasis(target, spread, 3.0)
    assert weights[2, 5] == 9
    assert int((weights != 1).sum()) == 1
    spread[2] = 100  # a small 1/D takes the outlier back
    assert emphasis(target, spread, 3.0)[2, 5] == 1
    assert torch.equal(emphasis(torch.ones(3, 4), torch.ones(3), 2.0), torch.ones(3, 4))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("options", [Daq(), PAPER], ids=["default", "paper"])
def test_the_loss_is_below_round_to_nearest_and_falls_with_the_order(order: int, options: Daq) -> None:
    for seed in range(3):
        weight, hessian = problem(64, 96, seed=seed)
        found = daq(weight, hessian, PlanesFormat(order, 32), options).metrics["loss"]
        if order >= 2:
            fmt = IntFormat(order, 32, symmetric=False)
            assert found < Rtn().round(weight, fmt, {"hessian": hessian}).metrics["loss"]
            assert found < daq(weight, hessian, PlanesFormat(order - 1, 32), options).metrics["loss"]
        assert found < float(output_energy(weight, hessian).sum())


def test_each_part_beyond_the_paper_helps_and_together_they_beat_gptq() -> None:
    def mean(options: Daq) -> float:
        found = [
            daq(*problem(96, 128, seed=seed), PlanesFormat(2, 32), options).metrics["sqnr_db"] for seed in range(3)
        ]
        return sum(found) / 3

    paper, default = mean(PAPER), mean(Daq())
    for change in ({"feedback": 1}, {"refine": 2}, {"polish": 2}):
        assert mean(replace(PAPER, **change)) > paper + 0.5
    for change in ({"rsr": False}, {"compensation": "diagonal"}, {"compensation": "none"}):
        assert mean(replace(PAPER, **change)) < paper - 0.1
    rival = sum(gptq(*problem(96, 128, seed=seed), IntFormat(2, 32, False)).metrics["sqnr_db"] for seed in range(3)) / 3
    assert default > rival + 0.5
    assert default > paper + 1


def test_metrics_are_what_they_say() -> None:
    weight, hessian = problem(30, 64)
    found = daq(weight, hessian, PlanesFormat(2, 32))
    error = weight.double() - found.weight.dequantize().double()
    noise, signal = (float((e @ hessian * e).sum()) for e in (error, weight.double()))
    assert found.metrics["loss"] == pytest.approx(noise, rel=1e-4)
    assert found.metrics["sqnr_db"] == pytest.approx(10 * float(torch.tensor(signal / noise).log10()), abs=1e-3)
    assert (found.metrics["damp"], found.metrics["damp_tries"]) == (0.01, 1)


def test_what_is_stored_is_what_was_rounded() -> None:
    # Codes are final for the stored scales: another sweep of descent on them changes next to nothing.
    weight, hessian = problem(20, 32)
    options = Daq(polish=30)
    found = daq(weight, hessian, PlanesFormat(2, 32), options).weight
    unit = condition(hessian, 32, act_order=False)
    codes = torch.stack([(found.codes.T >> k & 1).double() * 2 - 1 for k in range(2)])
    tile = Tile(codes, found.row_scales.T.double(), found.column_scales.double())
    torch.testing.assert_close(tile.value().T.float(), found.dequantize())
    metric = unit.columns(slice(None), DOUBLE)
    descend(tile, metric @ (weight.T.double() - tile.value()), metric)
    assert (tile.signs != codes).double().mean() < 0.002


def test_orders_may_differ_by_group() -> None:
    weight, hessian = problem(40, 64)
    fmt = PlanesFormat(2, 16)
    found = Daq().round(weight, fmt, {"hessian": hessian, "orders": (3, 1, 2, 2)}).weight
    assert found.orders == (3, 1, 2, 2)
    assert [int(part.max()) for part in found.codes.split(16, dim=1)] == [7, 1, 3, 3]
    assert found.bits_per_weight == fmt.bits_per_weight(40, 64)
    shared = Daq(share=0.25).round(weight, fmt, {"hessian": hessian}).weight
    assert shared.orders == allocate(scores(weight, condition(hessian, 16).spread, 4), 0.25)
    assert sorted(shared.orders) == [1, 2, 2, 3]


def test_energies_are_the_loss_of_dropping_a_group() -> None:
    weight, hessian = problem(6, 24)
    metric = condition(hessian, 8)
    whole, first = damped(hessian), int(metric.groups[0])
    inside, rest = metric.order[:8], metric.order[8:]
    schur = whole[inside][:, inside] - whole[inside][:, rest] @ torch.linalg.solve(
        whole[rest][:, rest], whole[rest][:, inside]
    )
    part = weight[:, inside].double()
    assert float(metric.energies(weight)[first]) == pytest.approx(float((part @ schur * part).sum()), rel=1e-4)


def degenerate(kind: str) -> torch.Tensor:
    _, hessian = problem(1, 32)
    match kind:
        case "rank one":
            x = torch.randn(32, dtype=DOUBLE)
            hessian = torch.outer(x, x)
        case "dead columns":
            hessian[:, [0, 5, 31]] = 0
            hessian[[0, 5, 31]] = 0
        case "dead group":
            hessian[:, 16:] = 0
            hessian[16:] = 0
        case "duplicated columns":
            twice = torch.arange(32) % 16
            hessian = hessian[twice][:, twice]
        case "one live column":
            hessian = torch.zeros_like(hessian)
            hessian[3, 3] = 1
        case "enormous":
            hessian *= 1e30
        case "minute":
            hessian *= 1e-30
    return hessian


KINDS = ["rank one", "dead columns", "dead group", "duplicated columns", "one live column", "enormous", "minute"]


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("options", [Daq(), PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_degenerate_hessians(kind: str, options: Daq, damp: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, hessian = torch.randn(12, 32), degenerate(kind).to(dtype)
    weight[4], weight[5] = 0, 0.5
    for order in (1, 2, 3):
        found = daq(weight, hessian, PlanesFormat(order, 16), replace(options, damp=damp))
        assert bool(torch.isfinite(found.weight.dequantize()).all())
        assert all(abs(value) < float("inf") for value in found.metrics.values())
        assert found.metrics["loss"] <= float(output_energy(weight, hessian).sum())


def test_weights_of_zeros_stay_zero() -> None:
    _, hessian = problem(1, 32)
    found = daq(torch.zeros(4, 32), hessian, PlanesFormat(2, 16))
    assert torch.equal(found.weight.dequantize(), torch.zeros(4, 32))
    assert found.metrics["loss"] == 0


@pytest.mark.parametrize("group_size", [None, 1, 5, 30])
@pytest.mark.parametrize("rows", [1, 3])
def test_odd_shapes(group_size: int | None, rows: int) -> None:
    weight, hessian = problem(rows, 30)
    found = daq(weight, hessian, PlanesFormat(2, group_size))
    assert found.weight.codes.shape == (rows, 30)
    assert found.metrics["sqnr_db"] > 5


def test_the_same_twice_and_no_argument_is_changed() -> None:
    weight, hessian = problem(100, 128)
    copies = weight.clone(), hessian.clone()
    first, second = (daq(weight, hessian, PlanesFormat(2, 32)) for _ in range(2))
    assert torch.equal(first.weight.codes, second.weight.codes)
    assert torch.equal(first.weight.row_scales, second.weight.row_scales)
    assert torch.equal(first.weight.column_scales, second.weight.column_scales)
    assert first.metrics == second.metrics
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_linears_of_one_input_share_the_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(10, 32)
    calls: list[int] = []
    original = module.condition
    monkeypatch.setattr(module, "condition", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    method = Daq()
    stats = method.prepare({"hessian": hessian, "count": torch.ones(())})
    assert stats["count"] == 1
    assert method.prepare({}) == {}
    parts = [method.round(part, PlanesFormat(2, 16), stats).weight for part in weight.split(5)]
    assert len(calls) == 1
    alone = method.round(weight[:5], PlanesFormat(2, 16), {"hessian": hessian}).weight
    assert torch.equal(parts[0].codes, alone.codes)
    assert (Daq.name, Daq.statistics) == ("daq", {"hessian"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h.zero_(),
            r"^hessian: the Hessian is zero\. Check that calibration reaches this layer and that its",
        ),
        (lambda h: h.fill_(float("nan")), r"^hessian: the Hessian is not finite\. The layer's input overflowed: calib"),
        (lambda h: h[2].fill_(float("inf")), r"^hessian: the Hessian is not finite\. The layer's input overflowed: ca"),
        (lambda h: h.neg_(), r"^hessian: the Hessian is not positive, even damped by 10 times its mean diagonal\. It "),
    ],
)
def test_unusable_hessians_are_refused(change: object, message: str) -> None:
    weight, hessian = problem(4, 8)
    change(hessian)
    for options in (Daq(), PAPER):
        with pytest.raises(CalibrationError, match=message):
            daq(weight, hessian, PlanesFormat(2, 4), options)


def test_errors() -> None:
    weight, hessian = problem(4, 16)
    with pytest.raises(
        CalibrationError, match=r"^daq needs the statistic 'hessian'\. Collect it, or use PlanesFormat\."
    ):
        Daq().round(weight, PlanesFormat(2, 8), {})
    with pytest.raises(
        CalibrationError, match=r"^hessian: the Hessian is of 16 input features, the weight of 8\. Use t"
    ):
        daq(weight[:, :8], hessian, PlanesFormat(2, 8))
    with pytest.raises(
        CalibrationError, match=r"^hessian: the Hessian is of 16 input features, the weight of 8\. Use t"
    ):
        daq(weight[:, :8], condition(hessian, 8), PlanesFormat(2, 8))
    with pytest.raises(
        CalibrationError, match=r"^hessian: the Hessian is of 16 input features, the weight of 8\. Use t"
    ):
        Daq().round(weight[:, :8], PlanesFormat(2, 8), Daq().prepare({"hessian": hessian}))
    with pytest.raises(
        CalibrationError, match=r"^hessian: the Hessian is of 16 input features, the weight of 12\. Use "
    ):
        Daq().round(weight[:, :12], PlanesFormat(2, 12), Daq().prepare({"hessian": hessian}))
    with pytest.raises(
        ContractError, match=r"^hessian: the metric was made for groups of 8 columns, the format has 4\. "
    ):
        daq(weight, condition(hessian, 8), PlanesFormat(2, 4))
    with pytest.raises(
        ContractError, match=r"^orders: orders \(2,\) are not 2 numbers from 1 to 3, one for each group\."
    ):
        daq(weight, hessian, PlanesFormat(2, 8), orders=(2,))
    with pytest.raises(
        FeasibilityError, match=r"^group_size: 16 input features do not divide by group 12\. Use None f"
    ):
        daq(weight, hessian, PlanesFormat(2, 12))
    weight[0, 0] = float("nan")
    with pytest.raises(
        ModelError, match=r"^1 of 64 weights are not finite as float32\. Check the checkpoint, and the "
    ):
        daq(weight, hessian, PlanesFormat(2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "obs"}, r"^compensation: unknown compensation 'obs'\. Use 'exact', 'diagonal' or 'none'$"),
        ({"damp": -1.0}, r"^damp: damping of -1.0 times the mean diagonal is not within 0 and 10\. Use 0.01$"),
        ({"lambda_": 0.5}, r"^lambda_: outliers cannot count 0.5 times as much as the rest\. Use 2, or dor=False to c"),
        ({"share": 0.7}, r"^share: a share of 0.7 of the groups cannot go up and another go down\. Use 0.05, or 0 for"),
        ({"polish": -1}, r"^polish: -1 rounds are impossible\. Use 2, or 0 for none$"),
        ({"sweeps": -2}, r"^sweeps: -2 rounds are impossible\. Use 10, or 0 for none$"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Daq(**options)
