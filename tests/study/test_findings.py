"""Losses, contrasts and verdicts against closed forms and a naive restatement."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.diffusion.intervals import Interval, mean_interval, stratified_interval
from dlqc.errors import FeasibilityError
from dlqc.study.findings import Claim, Finding, check_findings
from dlqc.study.losses import losses_of
from dlqc.study.spec import ModelEntry
from dlqc.study.summary import degradation

MODELS = {"base": ModelEntry(source="a"), "tuned": ModelEntry(source="b", type="instruct")}
ITEMS = 400


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_one_stratum_is_a_mean(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    found, expected = stratified_interval([(1.0, x)]), mean_interval(x)
    assert (found.mean, found.count) == (pytest.approx(expected.mean), expected.count)
    assert found.high - found.low == pytest.approx(expected.high - expected.low, abs=1e-9)


def test_welch() -> None:
    """A worked example: Welch's test of two samples, degrees of freedom 7.03 rounded down."""
    a, b = torch.tensor([3.0, 4, 1, 2.1]), torch.tensor([490.2, 340, 433.9, 410, 400])
    found = stratified_interval([(1.0, a), (-1.0, b)])
    va, vb = float(a.double().var()) / 4, float(b.double().var()) / 5
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 4)
    assert int(freedom) == 4
    assert found.mean == pytest.approx(float(a.double().mean() - b.double().mean()))
    assert (found.high - found.low) / 2 == pytest.approx(2.776445 * math.sqrt(va + vb), rel=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_coverage_is_nominal_or_more(seed: int) -> None:
    """Not a proof: over 200 draws of two unlike samples the interval misses the truth no more than 24 times (5 % are 10)."""
    rng = torch.Generator().manual_seed(seed)
    missed = 0
    for _ in range(200):
        a = torch.randn(5, generator=rng, dtype=torch.float64)
        b = 4 * torch.randn(12, generator=rng, dtype=torch.float64) + 1
        found = stratified_interval([(0.5, a), (0.5, b)])
        missed += not found.low <= 0.5 <= found.high
    assert missed <= 24


def test_too_little_for_an_interval() -> None:
    for strata in ([], [(1.0, torch.ones(3)), (1.0, torch.ones(1))]):
        with pytest.raises(FeasibilityError, match="strata: a sample of fewer than two values gives no interval"):
            stratified_interval(strata)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(-9.0, "under 1 %"), (0.999, "under 1 %"), (1.0, "1 to 4 %"), (4.0, "1 to 4 %"), (4.01, "over 4 %")],
)
def test_classes(loss: float, expected: str) -> None:
    assert degradation(loss) == expected


def outcome(loss: dict[str, float], seed: int, *, reference: bool = False) -> dict[str, Any]:
    """A cell whose tasks lose so many percent on average, with noise of each item that all cells share."""
    rng = torch.Generator().manual_seed(7)
    difficulty = 3 + torch.rand(ITEMS, generator=rng, dtype=torch.float64)
    noise = torch.randn(ITEMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 100
    tasks: dict[str, Any] = {}
    for name, percent in loss.items():
        if name == "general":
            values = difficulty - math.log1p(-percent / 100) + (0 if reference else noise)
            tasks[name] = {"category": name, "kind": "nll", "values": values.tolist()}
            if not reference:
                tasks[name]["kl"] = (percent / 100 + noise.abs() / 10).tolist()
        else:
            wrong = round(ITEMS * percent / 100)
            order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(seed))
            values = torch.ones(ITEMS)
            values[order[:wrong]] = 0
            tasks[name] = {"category": name, "kind": "exact_match", "values": values.int().tolist()}
    return {"tasks": tasks}


def grid(losses: dict[tuple[str, str], float], *, harder: float = 1.0, tuned: float = 1.0) -> Any:
    """Both models; cells lose so many percent, `harder` times as many in math and code, the tuned model `tuned` times as many."""
    results = {}
    for number, (model, factor) in enumerate((("base", 1.0), ("tuned", tuned))):
        full = dict.fromkeys(("general", "math", "code"), 0.0)
        results[model, "full", "none"] = outcome(full, 0, reference=True)
        for seed, ((bits, method), loss) in enumerate(losses.items()):
            each = {name: factor * loss * (1 if name == "general" else harder) for name in full}
            results[model, bits, method] = outcome(each, 10 * number + seed + 1)
    return losses_of(results)


QDLM = {
    ("w4a16", "gptq"): 0.25,
    ("w4a16", "awq"): 0.5,
    ("w3a16", "gptq"): 5.0,
    ("w3a16", "awq"): 9.0,
    ("w8a8", "smoothquant"): 0.25,
    ("w8a8", "quarot"): 0.25,
    ("w8a8", "duquant"): 0.25,
    ("w4a4", "smoothquant"): 30.0,
    ("w4a4", "quarot"): 12.0,
    ("w4a4", "duquant"): 6.0,
}


def verdicts(losses: Any) -> list[str]:
    return [finding.verdict for finding in check_findings(losses, MODELS)]


def test_all_findings_hold_where_they_were_planted() -> None:
    found = check_findings(grid(QDLM, harder=2.0, tuned=0.5), MODELS)
    assert [f.verdict for f in found] == ["holds"] * 4
    text = {claim.text: claim for finding in found for claim in finding.claims}
    w3 = text["W3A16 loses more than W4A16"]
    assert w3.cells == 8
    # (5 + 9)/2 - (0.25 + 0.5)/2, mean over tasks with weights 1, 2, 2, over models with 1, 0.5.
    assert w3.value is not None
    assert w3.value.mean == pytest.approx(6.625 * (5 / 3) * 0.75, rel=0.05)
    assert w3.kl is not None
    assert w3.kl.mean == pytest.approx(0.06625 * 0.75, rel=0.1)
    assert w3.verdict_by_kl == "holds"
    assert text["math loses more than general tasks"].kl is None


def test_reversed_findings_are_seen() -> None:
    swapped = {("w3a16", "gptq"): 0.2, ("w3a16", "awq"): 0.1, ("w4a16", "gptq"): 9.0, ("w4a16", "awq"): 6.0}
    swapped |= {("w4a4", "smoothquant"): 1.0, ("w4a4", "quarot"): 9.0, ("w4a4", "duquant"): 20.0}
    swapped |= {("w8a8", "smoothquant"): 22.0, ("w8a8", "quarot"): 30.0, ("w8a8", "duquant"): 40.0}
    assert verdicts(grid(swapped, harder=0.3, tuned=2.0)) == ["reversed"] * 4


def test_nothing_is_claimed_where_nothing_differs() -> None:
    same = dict.fromkeys(QDLM, 1.0)
    found = verdicts(grid(same))
    assert found[1:] == ["no difference seen"] * 3


@pytest.mark.parametrize("gone", ["gptq", "awq", "smoothquant", "quarot", "duquant"])
def test_a_grid_that_lacks_a_method_says_so(gone: str) -> None:
    losses = grid({key: loss for key, loss in QDLM.items() if key[1] != gone}, harder=2.0)
    method = check_findings(losses, MODELS)[1]
    left = {"gptq": 3, "awq": 3, "smoothquant": 2, "quarot": 2, "duquant": 2}[gone]
    assert sum(claim.verdict == "holds" for claim in method.claims) == left
    assert sum(claim.verdict == "not covered by this grid" for claim in method.claims) == 4 - left
    assert method.verdict == "holds", "of what is covered"


def test_an_empty_grid_covers_nothing() -> None:
    assert verdicts(losses_of({})) == ["not covered by this grid"] * 4


def test_one_model_has_no_types_to_compare() -> None:
    losses = grid(QDLM)
    kept = losses_of({})
    assert kept.percent == {}
    alone = {"base": MODELS["base"], "tuned": ModelEntry(source="b", type="instruct", family="other")}
    assert check_findings(losses, alone)[3].verdict == "not covered by this grid"


def test_disagreement_is_told() -> None:
    claims = (Claim("a", Interval(2, 1, 3, 9)), Claim("b", Interval(-2, -3, -1, 9)), Claim("c", None))
    assert Finding("x", claims).verdict == "in part (1 holds, 1 reversed)"
    below = [Claim("d", Interval(m, m - 1, m + 1, 9), "below", 5.0).verdict for m in (3, 5, 7)]
    assert below == ["holds", "no difference seen", "reversed"]


def test_a_task_that_the_reference_cannot_do_is_left_out() -> None:
    reference = {"tasks": {"sums": {"category": "math", "kind": "exact_match", "values": [0, 0]}}}
    found = losses_of({("base", "full", "none"): reference, ("base", "w4a16", "rtn"): reference})
    assert found.blind == (("base", "sums"),)
    assert found.of([("base", "w4a16", "rtn")]) is None


def test_losses_of_a_row_and_of_items() -> None:
    full = {"a": {"category": "general", "kind": "nll", "values": [2.0, 3.0]}}
    full["b"] = {"category": "math", "kind": "exact_match", "values": [1, 0]}
    mine = {"a": full["a"] | {"values": [2.1, 2.9], "kl": [0.1, 0.2]}, "b": full["b"] | {"values": [0, 1]}}
    losses = losses_of({("m", "full", "none"): {"tasks": full}, ("m", "w2a16", "x"): {"tasks": mine}})
    percent = losses.percent["m", "w2a16", "x"]
    assert percent["a"].tolist() == pytest.approx([100 * (1 - math.exp(-0.1)), 100 * (1 - math.exp(0.1))])
    assert percent["b"].tolist() == [200.0, -200.0]
    kl = losses.kl_of([("m", "w2a16", "x")])
    assert kl is not None
    assert kl.mean == pytest.approx(0.15)
