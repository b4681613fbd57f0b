"""Corrections of low rank against the theorem of Eckart and Young, and in graphs from the recipe to the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import dlqc
from dlqc.artifact import save
from dlqc.check import check
from dlqc.compile import plan
from dlqc.errors import CalibrationError, ContractError, ExportError, FeasibilityError, RecipeError
from dlqc.export import export
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.graph import args_of, corrected, is_call
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_CODED, LINEAR_PACKED, LINEAR_Q, LOW_RANK, QUANTIZE_ACT
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.planning import plan_report
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.low_rank import LowRank, leading
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]
CALIBRATE = Calibrate(sequences=6, length=16)


def problem(rows: int, columns: int, samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E [N, K] and H [K, K] of `samples` inputs with a few large channels, float64; H is singular for few samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x[:, ::5] *= 20
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def best(error: torch.Tensor, root: torch.Tensor, rank: int) -> float:
    """Eckart and Young: the squared singular values of E·L that rank r leaves, H = L·Lᵀ."""
    return float(torch.linalg.svdvals(error @ root)[rank:].square().sum())


def loss(rest: torch.Tensor, moment: torch.Tensor) -> float:
    return float(torch.einsum("nk,kj,nj->", rest, moment, rest))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 40), st.integers(1, 24), st.integers(0, 2**31))
def test_the_closed_form_is_reached(rows: int, columns: int, samples: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    error, moment = problem(rows, columns, samples, seed)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(0).sqrt()
    diagonal = moment.diagonal()
    for given_moment, factor, whole in (
        (moment, root, moment),
        (diagonal, torch.diag(diagonal.sqrt()), torch.diag(diagonal)),
        (None, torch.eye(columns, dtype=torch.float64), torch.eye(columns, dtype=torch.float64)),
    ):
        left, right = leading(error, given_moment, rank)
        assert (left.shape, right.shape) == ((rank, rows), (rank, columns))
        found, least, scale = loss(error - left.T @ right, whole), best(error, factor, rank), loss(error, whole)
        assert found == pytest.approx(least, rel=1e-9, abs=1e-10 * scale)
    # A full rank leaves nothing.
    left, right = leading(error, moment, min(rows, columns))
    torch.testing.assert_close(left.T @ right, error, rtol=0, atol=1e-10 * float(error.abs().max()))


def test_no_step_away_from_it_is_better() -> None:
    error, moment = problem(12, 9, 40, 0)
    left, right = leading(error, moment, 3)
    least = loss(error - left.T @ right, moment)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = (f + 1e-3 * torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in (left, right))
        assert loss(error - a.T @ b, moment) > least


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("weighting", ["hessian", "diagonal", "none"])
def test_the_metrics_are_of_what_is_stored(weighting: str, dtype: str) -> None:
    exact, moment = problem(20, 32, 100, 1)
    rounded = IntFormat(2, 32, False).quantize(exact).dequantize()
    error = exact - rounded
    options = LowRank(6, weighting, dtype)  # type: ignore[arg-type]
    fit = options.fit(exact, error, moment)
    left, right = options.format.factors(fit.parts)
    torch.testing.assert_close(fit.rest, error - left.double().T @ right.double(), rtol=0, atol=1e-12)
    whole = {"hessian": moment, "diagonal": torch.diag(moment.diagonal()), "none": torch.eye(32, dtype=torch.float64)}
    before, after = (loss(e, whole[weighting]) for e in (error, fit.rest))
    assert 10 ** (fit.metrics["low_rank_gain_db"] / 10) == pytest.approx(before / after, rel=1e-6)
    assert fit.metrics["loss"] == pytest.approx(loss(fit.rest, moment), rel=1e-5)
    assert 10 ** (fit.metrics["sqnr_db"] / 10) == pytest.approx(loss(exact, moment) / loss(fit.rest, moment), rel=1e-4)
    assert fit.bits_per_weight == sum(8 * part.nbytes for part in fit.parts.values()) / exact.numel()
    # Storage costs little of what the rank gains.
    values, vectors = torch.linalg.eigh(whole[weighting])
    least = best(error, vectors * values.clamp_min(0).sqrt(), 6)
    assert after <= least + 0.02 * (before - least)


def test_each_weighting_is_best_by_its_own_measure() -> None:
    exact, moment = problem(24, 24, 200, 2)
    error = exact - IntFormat(2, 24).quantize(exact).dequantize()
    rests = {w: LowRank(4, w, "float16").fit(exact, error, moment).rest for w in ("hessian", "diagonal", "none")}  # type: ignore[arg-type]
    measures = {
        "hessian": moment,
        "diagonal": torch.diag(moment.diagonal()),
        "none": torch.eye(24, dtype=torch.float64),
    }
    for measure, whole in measures.items():
        losses = {w: loss(rest, whole) for w, rest in rests.items()}
        assert min(losses, key=losses.__getitem__) == measure
    assert loss(rests["hessian"], moment) < 0.9 * loss(rests["none"], moment)


def test_errors() -> None:
    with pytest.raises(
        RecipeError, match=r"^weighting: unknown weighting 'fisher'\. Use 'hessian', 'diagonal' or 'none'$"
    ):
        LowRank(weighting="fisher")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"^rank: a rank of 0 is none"):
        LowRank(rank=0)
    eye = torch.eye(4, dtype=torch.float64)
    with pytest.raises(
        CalibrationError, match=r"^low_rank: low_rank needs the statistic 'hessian'\. Collect it, or use we"
    ):
        LowRank(1).fit(eye, eye, None)
    with pytest.raises(CalibrationError, match=r"^low_rank: the Hessian is not finite\. The layer's input overflowed"):
        LowRank(1).fit(eye, eye, eye * float("inf"))


# In graphs


def effective(k: Any) -> dict[str, torch.Tensor]:
    """Ŵ + A·B by module, from a graph of packed or plain integers, by running it on unit vectors."""
    found = {}
    for node in k.graph.nodes:
        if not is_call(node, LINEAR_Q, LINEAR_CODED):
            continue
        out = corrected(node)
        assert is_call(out, LOW_RANK)
        constants = {str(a.target): k.ctx.weights.value(str(a.target)) for a in k.graph.nodes if a.op == "get_attr"}
        width = args_of(out)[1].meta["val"].shape[-1]

        def value(part: Any, constants: dict[str, torch.Tensor] = constants) -> Any:
            if isinstance(part, (list, tuple)):
                return [value(p) for p in part]
            return constants[str(part.target)] if hasattr(part, "target") else part

        x = torch.eye(width)
        place = 2 if is_call(node, LINEAR_CODED) else 4
        args = [x, *[None if i == place else value(a) for i, a in enumerate(args_of(node)) if i]]
        y = node.target(*args)
        name = str(args_of(out)[2][0].target).partition(".low_rank.")[0]
        found[name] = LOW_RANK(y, x, value(args_of(out)[2]), args_of(out)[3]).T
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "group_size": 32, "method": Gptq(), "low_rank": LowRank(4)},
        {"bits": 3, "group_size": None, "method": Rtn(), "low_rank": LowRank(3, "none", "bfloat16")},
        {"format": Nf4Format(32), "method": Rtn(), "low_rank": LowRank(2, "diagonal", "float16")},
    ],
)
@pytest.mark.parametrize("name", ["llada", "dream", "shared"])
def test_the_graph_computes_with_the_corrected_weights(case: CaseMaker, name: str, options: dict[str, Any]) -> None:
    k, plain = case(name), case(name)
    p = QuantizeWeights(**options)
    assert ("states" in p.needed_facts()) == (p.low_rank is not None and p.low_rank.weighting != "none")
    report = PassManager((CALIBRATE, p)).run(k.graph, k.ctx)[-1][1]
    found = effective(k)
    assert found.keys() == report.details.keys()
    state = k.model.state_dict()
    for module, weight in found.items():
        plain.ctx.weights.put(f"{module}.weight", weight)
        numbers = report.details[module]
        exact = state[f"{module}.weight"]
        noise = (exact - weight).square().sum()
        assert 10 ** (numbers["weight_sqnr_db"] / 10) == pytest.approx(float(exact.square().sum() / noise), rel=1e-2)
        assert numbers["low_rank_gain_db"] > 0.1
    torch.testing.assert_close(k.forward(k.ids()), plain.forward(k.ids()), rtol=1e-4, atol=1e-4)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights"}, after="quantize_weights")


def test_activation_quantizers_pass_by_the_correction(case: CaseMaker) -> None:
    k = case("llada")
    p = QuantizeWeights(2, 32, method=Rtn(), low_rank=LowRank(4))
    steps = (CALIBRATE, p, QuantizeActivations(bits=4), Pack(), Lower())
    PassManager(steps[:3]).run(k.graph, k.ctx)
    corrections = [n for n in k.graph.nodes if is_call(n, LOW_RANK)]
    assert len(corrections) == 14
    for node in corrections:
        y, x = args_of(node)[:2]
        assert is_call(y, LINEAR_Q)
        assert is_call(args_of(y)[0], QUANTIZE_ACT)
        assert args_of(args_of(y)[0])[0] is x
    logits = k.forward(k.ids())
    other = case("llada")
    PassManager(steps).run(other.graph, other.ctx)
    assert sum(is_call(n, LOW_RANK) for n in other.graph.nodes) == 14
    torch.testing.assert_close(other.forward(k.ids()), logits, rtol=1e-4, atol=1e-4)


def test_it_helps_at_the_logits(case: CaseMaker) -> None:
    clean = case("llada")
    expected = clean.forward(clean.ctx.rows.ids).softmax(-1)
    errors = []
    for low_rank in (None, LowRank(8), LowRank(64, dtype="float16")):
        k = case("llada")
        PassManager((CALIBRATE, QuantizeWeights(2, 32, method=Rtn(), low_rank=low_rank))).run(k.graph, k.ctx)
        errors.append(float((k.forward(k.ctx.rows.ids).softmax(-1) - expected).abs().mean()))
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.01 * errors[0]  # the full rank of 64 by 64; at 96 columns it is full, too


def test_a_rank_beyond_the_matrix_is_refused_with_all_its_sites(case: CaseMaker) -> None:
    k = case("llada")
    message = (
        r"^model\.transformer\.blocks\.0\.q_proj: a \[64, 64\] matrix has no rank of 65 \(use a lower rank in low_rank=, or "
        r"exclude it with skip=\); .*and 6 more\)\. Nothing was changed or written$"
    )
    with pytest.raises(FeasibilityError, match=message):
        PassManager((QuantizeWeights(4, 32, method=Rtn(), low_rank=LowRank(65, "none")),)).run(k.graph, k.ctx)


RECIPE = "calibrate(sequences=4), quantize_weights(bits=2, group_size=32, symmetric=True, low_rank=low_rank(rank=4)), pack, lower"


def test_from_the_recipe_to_the_artifact(case: CaseMaker, tmp_path: Path) -> None:
    k = case("llada")
    model = dlqc.compile(k.model, RECIPE, calibration=k.ctx.rows.ids, backend="reference", progress=False)
    save(model, tmp_path / "a", verify_reload=False)
    again = dlqc.load(tmp_path / "a", backend="reference")
    assert torch.equal(again(k.ids()), model(k.ids()))
    with safe_open(tmp_path / "a" / "weights.safetensors", "pt") as f:
        sizes = {key: 8 * f.get_tensor(key).nbytes for key in f.keys()}
    storage = model.report.storage
    assert sum(".low_rank." in key for key in sizes) == 4 * 14
    kept = ("norm.weight", "wte.weight", "transformer.ff_out.weight", "ln_f.weight")
    assert storage.bits_quantized == sum(size for key, size in sizes.items() if not key.endswith(kept))
    assert storage.bits == sum(sizes.values())
    details = next(s.details for s in model.report.steps if s.name == "quantize_weights")
    total = sum(d["bits_per_weight"] * k.model.get_submodule(name).weight.numel() for name, d in details.items())
    assert total == storage.bits_quantized
    said = plan_report(k.model, RECIPE, backend="reference")
    assert said.bits == pytest.approx(storage.bits, rel=0.01)
    assert not said.problems
    found, _, _ = plan(k.model, RECIPE, backend="reference")
    assert set(found.beside.values()) == {LowRank(4).format.bits(*s) for s in ((64, 64), (96, 64), (64, 96))}
    message = r"^compressed-tensors: model\.transformer\.blocks\.0\.q_proj has a correction of low rank; .*Use save\(\)"
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ("spec", r"a \[64, 64\] matrix has no rank of 99"),
        ("part", r"left is uint8\[2, 3\], must be uint8\[4, 64\]"),
        ("computed", "a part is no constant"),
        ("input", r"reads %\w+, which %linear_q\w* does not read"),
        ("output", r"corrects %\w+, which is no quantized linear"),
    ],
)
def test_law_l7(case: CaseMaker, plant: str, message: str) -> None:
    from dlqc.graph import aten, call_before, read

    k = case("llada")
    k.apply(QuantizeWeights(2, 32, method=Rtn(), low_rank=LowRank(4, "none")))
    node = next(n for n in k.graph.nodes if is_call(n, LOW_RANK))
    y, x, parts, spec = args_of(node)
    if plant == "spec":
        node.update_arg(3, spec.replace("4", "99"))
    elif plant == "part":
        k.ctx.weights.put("planted", torch.zeros(2, 3, dtype=torch.uint8))
        node.update_arg(2, [read(k.graph, k.ctx.weights, "planted", node), *parts[1:]])
        k.graph.erase_node(parts[0])
        k.ctx.weights.drop(str(parts[0].target))
    elif plant == "computed":
        node.update_arg(2, [call_before(k.graph, node, aten.clone.default, (parts[0],)), *parts[1:]])
    elif plant == "input":
        node.update_arg(1, call_before(k.graph, node, aten.neg.default, (x,)))
    else:
        node.update_arg(0, call_before(k.graph, node, aten.neg.default, (y,)))
    with pytest.raises(ContractError, match=rf"law L7 .*: %low_rank\w*:? {message}"):
        check(k.graph, k.ctx.weights, k.ctx.spec, set(), after="x", propagate=False)


def test_packed_linears_keep_their_correction(case: CaseMaker) -> None:
    k = case("llada")
    k.apply(QuantizeWeights(2, 32, method=Rtn(), low_rank=LowRank(4, "none")))
    before = k.forward(k.ids(), torch.float64)
    k.apply(Pack())
    assert all(is_call(args_of(n)[0], LINEAR_PACKED) for n in k.graph.nodes if is_call(n, LOW_RANK))
    torch.testing.assert_close(k.forward(k.ids(), torch.float64), before, rtol=0, atol=1e-12)
