"""assign_bits: the best assignment of all, within the budget to the last bit, refused beforehand where there is none."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dlqc
from dlqc.check import check
from dlqc.contract import Declined
from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.sparse import SparseFormat
from dlqc.graph import fingerprint
from dlqc.manager import PassManager
from dlqc.passes.assign_bits import AssignBits
from dlqc.passes.correct_bias import CorrectBias
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_attention import QuantizeAttention
from dlqc.passes.quantize_embedding import QuantizeEmbedding
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.sparsify import Sparsify
from dlqc.pruning import Magnitude
from dlqc.report import measure_storage
from dlqc.rounding.daq import Daq
from dlqc.rounding.gptaq import Gptaq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.kmeans import Kmeans
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.signround import SignRound
from dlqc.schemes import Override, Scheme, Variant
from dlqc.sensitivity import sensitivities, units_of

CaseMaker = Callable[..., Any]
BLOCK = "model.transformer.blocks"


def assigning(budget: str = "3.2bpw", **options: Any) -> AssignBits:
    return AssignBits(budget, **({"bits": (2, 4), "group_size": 32, "method": Rtn(), "rows": 3} | options))


QUANTIZE = QuantizeWeights(group_size=32, method=Rtn())


def run(k: Any, *passes: Any) -> Any:
    """Run the passes; gives the report of the first."""
    return PassManager(passes).run(k.graph, k.ctx)[0][1]


def plan(k: Any, *passes: Any) -> Any:
    return PassManager(passes).plan(k.graph, k.ctx)


@pytest.mark.parametrize("metric", ["kl", "confidence", "mse", "hessian", "fisher"])
def test_no_assignment_within_the_budget_is_better(case: CaseMaker, metric: str) -> None:
    """All 2^8 of them tried, at four budgets."""
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    units, _ = units_of(k.graph, k.ctx)
    schemes = [Scheme(IntFormat(b, 32, False), Rtn()) for b in (2, 4)]
    table: Any = sensitivities(k.graph, k.ctx, units, [schemes] * 8, metric, rows=3)  # type: ignore[arg-type]
    total = sum(u.weights for u in units)
    # Codes, 16-bit scales, and zero points of one or two groups, which fill a word of 32 bits as those of three do.
    sizes = [[sum(n * (k * b + 16 * k // 32 + 32) for n, k in shapes(u)) for b in (2, 4)] for u in units]
    everything = [
        (
            sum(s[c] for s, c in zip(sizes, choice, strict=True)),
            sum(t[c][metric] for t, c in zip(table, choice, strict=True)),
        )
        for choice in itertools.product((0, 1), repeat=8)
    ]
    for budget in (3.4, 3.9, 4.3, 4.9):
        report = run(k, assigning(f"{budget}bpw", metric=metric))
        best = min(cost for size, cost in everything if size <= budget * total)
        assert report.metrics[f"predicted_{metric}"] == pytest.approx(best)
        assert report.metrics["least_possible"] <= best * (1 + 1e-9)
        assert report.metrics["bits_per_quantized_weight"] <= budget
        assert report.sites == len(k.ctx.assignment) == 14
        size = sum(
            n * (w * s.format.bits + 16 * w // 32 + 32)
            for name, s in k.ctx.assignment.items()
            for n, w in [shape(k, name)]
        )
        assert size == pytest.approx(report.metrics["bits_per_quantized_weight"] * total)
    assert fingerprint(k.graph, k.ctx.weights) == mark


def shapes(unit: Any) -> list[tuple[int, int]]:
    return [(site.out_features, site.in_features) for site in unit.sites]


def shape(k: Any, name: str) -> tuple[int, int]:
    n, width = k.model.state_dict()[f"{name}.weight"].shape
    return int(n), int(width)


def test_quantize_weights_follows(case: CaseMaker) -> None:
    k, plain = case("llada"), case("llada")
    original = k.ctx.weights.clone()
    report = run(k, assigning("4bpw"), QUANTIZE, Pack())
    chosen = {name: scheme.format for name, scheme in k.ctx.assignment.items()}
    assert len(set(chosen.values())) == 2
    for names in (("q_proj", "k_proj", "v_proj"), ("ff_proj", "up_proj")):
        for block in range(2):
            assert len({chosen[f"{BLOCK}.{block}.{name}"] for name in names}) == 1
    storage = measure_storage(original, k.graph, k.ctx.weights, {})
    assert storage.bits_per_quantized_weight == pytest.approx(report.metrics["bits_per_quantized_weight"])
    assert storage.bits_per_quantized_weight <= 4
    assert {label: sites for label, (sites, _, _) in storage.formats.items()} == {
        label: sum(f.label == label for f in chosen.values()) for label in {f.label for f in chosen.values()}
    }
    assert sum(bits for _, _, bits in storage.formats.values()) == storage.bits_quantized
    check(k.graph, k.ctx.weights, k.ctx.spec, k.ctx.facts, after="the passes")
    for name, fmt in chosen.items():
        plain.ctx.weights.put(f"{name}.weight", fmt.quantize(k.model.state_dict()[f"{name}.weight"]).dequantize())
    torch.testing.assert_close(k.forward(k.ids()), plain.forward(k.ids()), rtol=0, atol=1e-4)


def test_alone_each_linear_may_differ(case: CaseMaker) -> None:
    costs = []
    for fused in (True, False):
        k = case("llada")
        report = run(k, assigning("4bpw", fused=fused, metric="hessian"))
        assert len(report.details) == (8 if fused else 14)
        costs.append(report.metrics["predicted_hessian"])
    # What is estimated of a unit is the sum over its linears, so freedom can only help.
    assert costs[1] <= costs[0]


def test_the_prior_makes_late_blocks_dearer(case: CaseMaker) -> None:
    k = case("llada")
    plain, weighed = (assigning(metric="hessian", prior=prior) for prior in (0.0, 0.75))
    found = plain.choices(k.graph, k.ctx)
    before, after = (p.costs(k.graph, k.ctx, found) for p in (plain, weighed))
    for unit, a, b in zip(found.units, before, after, strict=True):
        factor = 1.75 if unit.block else 0.25
        assert [cost["hessian"] for cost in b] == pytest.approx([factor * cost["hessian"] for cost in a])
    run(k, assigning("4bpw", metric="hessian", prior=1.0))
    first = {s.format.bits for name, s in k.ctx.assignment.items() if ".0." in name}
    assert first == {2}  # at 1 the first block costs nothing


def test_fixed_linears_and_further_candidates(case: CaseMaker) -> None:
    k = case("llada")
    nf4 = Variant(format=Nf4Format(32, None), method=Rtn())
    fixed = (Override(bits=8, sites=("*.1.ff_out", "*.0.q_proj")),)
    report = run(k, assigning("6bpw", bits=(2, 3), variants=(nf4,), fixed=fixed), QUANTIZE, Pack())
    chosen = {name.removeprefix(f"{BLOCK}."): s.format for name, s in k.ctx.assignment.items()}
    assert {name for name, fmt in chosen.items() if fmt == IntFormat(8, 32, False)} == {
        "1.ff_out",
        *(f"0.{name}" for name in ("q_proj", "k_proj", "v_proj")),
    }
    assert Nf4Format(32, None) in chosen.values()
    assert report.choices[f"{BLOCK}.1.ff_out"] == "int8 g32 asymmetric by rtn"
    check(k.graph, k.ctx.weights, k.ctx.spec, k.ctx.facts, after="the passes")


def test_skip_must_be_the_same(case: CaseMaker) -> None:
    k = case("llada")
    skip = ("*.ff_out",)
    report = run(k, assigning(skip=skip), QuantizeWeights(method=Rtn(), skip=skip))
    assert report.declined == [Declined(f"{BLOCK}.{i}.ff_out", "named by skip=") for i in range(2)]
    assert len(k.ctx.assignment) == 12
    odd = "(give both passes the same skip=)"
    problems = plan(case("llada"), assigning(skip=skip), QUANTIZE).problems
    assert problems[0] == f"quantize_weights: {BLOCK}.0.ff_out is rounded here, and not assigned {odd}"
    problems = plan(case("llada"), assigning(), QuantizeWeights(group_size=32, method=Rtn(), skip=skip)).problems
    assert problems[0] == f"quantize_weights: {BLOCK}.0.ff_out is assigned, and skipped here {odd}"


@pytest.mark.parametrize(
    ("assign", "quantize", "problem"),
    [
        (
            {},
            {"overrides": (Override(bits=8, sites=("*.1.ff_out",)),)},
            "overrides= are a second word on linears that are assigned (name them in fixed= of assign_bits)",
        ),
        ({"method": Gptq()}, {}, "gptq is assigned and needs statistics (set method=gptq)"),
        ({}, {"group_size": 128, "format": Nf4Format(32, None)}, "integers are assigned (leave format= out)"),
        ({}, {"head": 8}, "head=8, and assign_bits counts on head=None (give both the same)"),
        ({}, {"method": SignRound()}, "rtn is assigned and does not go together with the method here (set method=rtn)"),
    ],
)
def test_what_quantize_weights_must_be_able_to_do(
    case: CaseMaker, assign: dict[str, Any], quantize: dict[str, Any], problem: str
) -> None:
    p = QuantizeWeights(**({"group_size": 32, "method": Rtn()} | quantize))
    assert plan(case("llada"), assigning(**assign), p).problems == [f"quantize_weights: {problem}"]


def test_methods_that_round_a_block_at_once(case: CaseMaker) -> None:
    """Another rounding stands in for them while costs are taken; the choice is that rounding's, the result theirs."""
    k = case("llada")
    learned = SignRound(steps=1, looks=1)
    run(k, assigning("4bpw", metric="hessian"))
    by_nearest = {name: scheme.format for name, scheme in k.ctx.assignment.items()}
    k = case("llada")
    quantize = QuantizeWeights(group_size=32, method=learned)
    report = run(k, assigning("4bpw", metric="hessian", method=learned, probe=Rtn()), quantize, Pack())
    assert {name: scheme.format for name, scheme in k.ctx.assignment.items()} == by_nearest
    assert {scheme.method for scheme in k.ctx.assignment.values()} == {learned}
    assert set(report.choices.values()) == {f"int{b} g32 asymmetric by signround" for b in (2, 4)}


def test_gptaq_is_probed_without_drift(case: CaseMaker) -> None:
    found = []
    for method in (Gptq(clip="minmax"), Gptaq(clip="minmax")):
        k = case("llada")
        run(k, assigning("4bpw", metric="hessian", method=method))
        found.append({name: scheme.format for name, scheme in k.ctx.assignment.items()})
    assert found[0] == found[1]


def test_what_is_stored_beside_is_not_in_the_budget(case: CaseMaker) -> None:
    problems = plan(case("llada"), assigning(), QUANTIZE, CorrectBias()).problems
    assert len(problems) == 1
    assert re.fullmatch(
        r"assign_bits: 0\.\d{3} MB are stored beside the weights \(low_rank, correct_bias\), which its budget does not count",
        problems[0],
    )


def test_the_plan_says_what_is_known(case: CaseMaker) -> None:
    k = case("llada")
    found = plan(k, assigning("4bpw"), QUANTIZE, Pack(), Lower())
    assert found.problems == []
    total = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert found.limit_bits == 4 * total
    assert len(found.assigned) == len(found.sites) == 14
    assert found.notes == [
        "assigned while compiling: 14 linears in 8 units among int2 g32 asymmetric by rtn, int4 g32 asymmetric by rtn, "
        "within 4bpw (2.971bpw to 4.971bpw can be reached)"
    ]
    specs = [(name, spec.weight) for name, spec in found.specs()]
    assert len(specs) == 28
    assert {fmt for _, fmt in specs} == {IntFormat(b, 32, False) for b in (2, 4)}


# Budgets out of reach


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "2.9bpw",
            r"assign_bits: budget='2\.9bpw': no assignment is that small, the nearest budget is '2\.971bpw' \(or allow fewer "
            r"bits, or larger groups\)\. Nothing was changed or written$",
        ),
        (
            "5bpw",
            r"assign_bits: budget='5bpw': no assignment is that large, the nearest budget is '4\.971bpw' \(or allow more "
            r"bits\)\. Nothing was changed or written$",
        ),
        ("1kB", r"assign_bits: budget='1kB': no assignment is that small, the nearest budget is '\d+\.\d{3}kB'"),
        ("1GiB", r"assign_bits: budget='1GiB': no assignment is that large, the nearest budget is '0\.001GiB'"),
    ],
)
def test_a_budget_that_nothing_meets_is_refused_before_any_work(case: CaseMaker, budget: str, message: str) -> None:
    k = case("llada")
    p = assigning(budget, bits=(2, 4))
    with pytest.raises(FeasibilityError, match=message):
        PassManager((p, QUANTIZE)).check_feasibility(k.graph, k.ctx)
    problem = plan(k, p).problems[0]
    offered = re.search(r"the nearest budget is '([^']*)'", problem)
    assert offered is not None
    nearest = assigning(offered[1], metric="hessian")
    assert plan(k, nearest, QUANTIZE).problems == []
    run(k, nearest)
    bits = {s.format.bits for s in k.ctx.assignment.values()}
    assert bits == ({2} if "small" in problem else {4})


def test_constants_that_grew_since_the_plan(case: CaseMaker) -> None:
    """A transform of a pass in between stores more; the budget counts it when it is there."""
    k = case("llada")
    p = assigning("70kB", metric="hessian")
    assert plan(k, p).problems == []
    k.ctx.weights.put("transform.late", torch.zeros(1 << 14))
    with pytest.raises(
        FeasibilityError, match=r"^assign_bits: budget '70kB': no assignment is that small, .*Change the budget$"
    ):
        k.apply(p)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (5,)}, r"^bits: 5 is not a width"),
        ({"bits": ()}, r"^assign_bits\.bits: there is nothing to choose from\. Use \(2, 3, 4, 8\)$"),
        ({"method": Daq()}, r"^method: daq does not round to int2 g32 asymmetric\. Use method=rtn or gptq or"),
        (
            {"method": SignRound()},
            r"^assign_bits\.probe: signround rounds the linears of a block together, and has no cost of one alone\. Use probe=",
        ),
        ({"probe": Daq()}, r"^assign_bits\.probe: daq does not round to int2 g32 asymmetric\. Use method="),
        (
            {"variants": (Variant(format=SparseFormat(4, 32)),)},
            r"^assign_bits\.variants: what a sparse weight takes is known when it is pruned, and budgets are reckoned",
        ),
        ({"head": 5}, r"^bits: 5 is not a width"),
        ({"prior": 1.5}, r"^assign_bits\.prior: 1\.5 is outside \[0, 1\]\. Use 0 for none, or 0\.5$"),
        ({"rows": 0}, r"^assign_bits\.rows: 0 rows hold nothing\. Use 8$"),
        ({"ratios": (0.5, 0.0)}, r"^assign_bits\.ratios: \(0\.5, 0\.0\) are no mask ratios\. Use numbers above 0"),
        ({"ratios": ()}, r"^assign_bits\.ratios: \(\) are no mask ratios\."),
        ({"budget": "3.2"}, r"^budget: '3\.2' has no unit"),
        ({"fixed": (Override(format=Nf4Format(), method=Gptq()),)}, r"^override\.method: gptq does not round to nf4"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        assigning(**options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"skip": ("*.q_porj",)}, "assign_bits: skip pattern '*.q_porj' matches no linear; "),
        ({"fixed": (Override(bits=8, sites=("x",)),)}, "assign_bits: fixed pattern 'x' matches no linear; "),
        ({"skip": ("*",)}, "assign_bits: the repeated blocks hold no linear that is not skipped"),
        (
            {"group_size": 64},
            f"assign_bits: {BLOCK}.0.ff_out: 96 input features do not divide by group 64 (choose another group_size, or "
            "exclude it with skip=)",
        ),
        (
            {"fixed": (Override(bits=8, sites=("*.q_proj",)), Override(bits=2, sites=("*.0.v_proj",)))},
            f"assign_bits: {BLOCK}.0.q_proj, {BLOCK}.0.k_proj, {BLOCK}.0.v_proj: fixed= names several schemes, and they are one "
            "unit (fused)",
        ),
    ],
)
def test_problems_are_named_before_any_work(case: CaseMaker, options: dict[str, Any], problem: str) -> None:
    found = plan(case("llada"), assigning(**options))
    assert found.problems[0].startswith(problem)
    assert found.assigned == {}


def test_it_needs_states_and_float_weights() -> None:
    with pytest.raises(ContractError, match=r"pass 'assign_bits' needs 'states'"):
        PassManager((assigning(), QUANTIZE)).check_order()
    with pytest.raises(
        ContractError, match=r"pass 'assign_bits' needs 'float-weights'.*Move 'assign_bits' before 'quantize_"
    ):
        PassManager((QUANTIZE, assigning())).check_order({"normal-form", "float-weights", "states"})


# Beside other formats


@pytest.mark.parametrize("name", ["llada", "llada tied"])
def test_embeddings_and_head_are_counted_as_they_will_be_stored(case: CaseMaker, name: str) -> None:
    """What the plan reckons with beforehand is what the budget has when its turn comes, and what is stored in the end."""
    k = case(name)
    head = None if "tied" in name else 8
    p = assigning("52kB", metric="hessian", head=head)
    passes = (QuantizeEmbedding(), p, QuantizeWeights(group_size=32, method=Rtn(), head=head), Pack())
    found = plan(k, *passes)
    assert found.problems == []
    reports = PassManager(passes).run(k.graph, k.ctx)
    metrics = reports[1][1].metrics
    stored = sum(c.shape.numel() * c.storage_dtype.itemsize for c in k.ctx.weights.values())
    assert stored <= metrics["file_bytes"] <= 52_000
    headers = metrics["file_bytes"] - stored
    assert 0 < headers < 220 * len(k.ctx.weights)
    assert found.limit_bits == pytest.approx(
        8 * (52_000 - metrics["file_bytes"]) + metrics["bits_per_quantized_weight"] * 69632, abs=4000
    )
    plain = plan(case(name), p, QuantizeWeights(group_size=32, method=Rtn(), head=head))
    assert plain.limit_bits < found.limit_bits  # with the embedding as it is, less is left


def test_pruned_weights_stay_zero_while_probed(case: CaseMaker) -> None:
    k = case("llada")
    report = run(k, Sparsify(method=Magnitude()), assigning("4bpw", metric="hessian"), QUANTIZE)
    assert report.sites == 14
    for name in k.ctx.assignment:
        codes, zeros = (k.ctx.weights.value(f"{name}.{role}") for role in ("codes", "zeros"))
        n, width = codes.shape
        zero = zeros.unsqueeze(-1).expand(-1, -1, width // zeros.shape[1]).reshape(n, width)
        assert float((codes == zero).float().mean()) >= 0.5
    coded = Variant(format=CodebookFormat(3, 32), method=Kmeans())
    both = (
        Sparsify(method=Magnitude()),
        assigning("4bpw", variants=(coded,)),
        QuantizeWeights(group_size=32, method=Gptq()),
    )
    problems = plan(case("llada"), *both).problems
    assert problems[0].endswith("has no zero (use another format)")


def test_gradients_do_not_pass_rounded_attention() -> None:
    passes = (QuantizeAttention(), assigning(metric="fisher"))
    holding = {"normal-form", "float-weights", "float-attention", "states"}
    with pytest.raises(ContractError, match=r"pass 'assign_bits' needs 'float-attention'"):
        PassManager(passes).check_order(holding)
    PassManager((QuantizeAttention(), assigning())).check_order(holding)


# Through the whole compiler


def test_the_files_keep_within_a_budget_in_bytes(case: CaseMaker, tmp_path: Path) -> None:
    model = case("llada bf16").model
    rows = torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(3))
    line = (
        "calibrate(sequences=8), assign_bits(budget='54kB', group_size=32, metric=hessian), "
        "quantize_weights(group_size=32), pack, lower"
    )
    compiled = dlqc.compile(model, line, calibration=rows, backend="reference", progress=False)
    compiled.save(tmp_path / "a")
    files = [*(tmp_path / "a").glob("weights*.safetensors")]
    size = sum(f.stat().st_size for f in files)
    step = compiled.report.steps[1]
    assert step.name == "assign_bits"
    assert size <= step.metrics["file_bytes"] <= 54_000
    with safe_open(files[0], "pt") as f:
        assert len(f.keys()) > 40
    # What is between: the bound on the headers, and the steps in which widths come.
    assert size > 50_000
    text = compiled.explain()
    assert re.search(r"note: 5\d\.\d{3}kB of 54kB used: \d\.\d{3} bits per quantized weight", text)
    assert "assign_bits chose int" in text
    assert re.search(r"int2 g32 asymmetric: \d+ matrices, [\d,]+ parameters at 2\.\d{3} bits each", text)
    assert dlqc.load(tmp_path / "a").report.storage == compiled.report.storage
    found = dlqc.artifact.verify(tmp_path / "a", backend="reference")
    assert found["deviation"] < 1e-5
