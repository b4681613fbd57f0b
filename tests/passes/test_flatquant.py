"""flatquant: the error is the quantizers' own, learning lowers it, and the transform leaves the function alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlqc.affine import Affine
from dlqc.certificate import deviation
from dlqc.contract import PassReport
from dlqc.errors import ContractError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.graph import LINEAR, args_of, call_before, is_call, linears
from dlqc.manager import PassManager
from dlqc.ops import TRANSFORM
from dlqc.passes import flatquant
from dlqc.passes.flatquant import Flatquant, nearest_factor
from dlqc.recipe import parse_line
from dlqc.regions import insert, transform_of
from dlqc.stats import Collector

CaseMaker = Callable[..., Any]
BLOCK = "model.transformer.blocks.0"
RTN = "quantize_weights(bits=4, group_size=None, symmetric=True, method='rtn'), quantize_activations(bits=4)"


def run(k: Any, line: str) -> PassReport:
    report: PassReport = PassManager(parse_line(line)).run(k.graph, k.ctx)[0][1]
    return report


def with_outliers(k: Any, factor: float = 20.0) -> Any:
    """Two channels of each norm are large for every token."""
    for name in [n for n in k.ctx.weights if n.endswith("norm.weight")]:
        gain = k.ctx.weights.value(name).clone()
        gain[[5, 40]] *= factor
        k.ctx.weights.put(name, gain)
    return k


@pytest.mark.parametrize(
    ("name", "edges"), [("llada", 8), ("llada bf16", 8), ("llada grouped bias", 8), ("dream", 8), ("layer norm", 4)]
)
def test_the_function_stays(case: CaseMaker, name: str, edges: int) -> None:
    k = case(name)
    before, single = k.forward(k.ids(), torch.float64), k.forward(k.ids())
    report = run(k, "flatquant(steps=3)")
    assert report.sites + len(report.declined) == edges
    assert report.sites >= edges - 2
    assert report.certificate < 1e-12
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    assert deviation(k.forward(k.ids()), single) < (1e-4 if "bf16" not in name else 3e-2)
    assert sum(is_call(node, TRANSFORM) for node in k.graph.nodes) == report.sites == report.metrics["online"]


def test_one_op_of_two_small_factors_and_the_scale_in_the_norm(case: CaseMaker) -> None:
    k = with_outliers(case("llada"))
    gain = k.ctx.weights.value(f"{BLOCK}.attn_norm.weight", torch.float64)
    run(k, "flatquant(steps=3)")
    first = next(node for node in k.graph.nodes if is_call(node, TRANSFORM))
    assert args_of(first)[2] == "kron(blocks(0),blocks(1))"
    assert [tuple(k.ctx.weights[p.target].shape) for p in args_of(first)[1]] == [(1, 8, 8), (1, 8, 8)]
    now = k.ctx.weights.value(f"{BLOCK}.attn_norm.weight", torch.float64)
    ratio = now / gain
    assert float(ratio[[5, 40]].max()) < float(ratio.mean())  # outliers are scaled down before they are mixed


def test_the_scale_stays_in_the_op_where_it_cannot_fold(case: CaseMaker) -> None:
    """A norm without a gain takes no scale."""
    k = with_outliers(case("llada"))
    norm = k.node("rms_norm")
    norm.update_arg(2, None)
    k.graph.eliminate_dead_code()
    k.ctx.weights.drop(f"{BLOCK}.attn_norm.weight")
    before = k.forward(k.ids(), torch.float64)
    run(k, "flatquant(steps=2, start='identity')")
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    spelled = {args_of(node)[2] for node in k.graph.nodes if is_call(node, TRANSFORM)}
    assert "diag(0)*kron(blocks(1),blocks(2))" in spelled
    assert "kron(blocks(0),blocks(1))" in spelled


def test_the_error_is_that_of_the_quantizers(case: CaseMaker) -> None:
    """The error in the report, from what is left in the graph: the op, the folded weights, and the formats."""
    k, plain = with_outliers(case("llada")), with_outliers(case("llada"))
    x = collected(plain).stats[f"{BLOCK}.q_proj.weight"]["sample"][::8]
    report = run(k, "flatquant(steps=5, alpha=None)")
    turned = transform_of(k.node("transform_default"), k.ctx.weights)(x.double()).float()
    total = 0.0
    for reader in ("q_proj", "k_proj", "v_proj"):
        was, now = (w.ctx.weights.value(f"{BLOCK}.{reader}.weight") for w in (plain, k))
        rounded = IntFormat(4, None).quantize(now).dequantize()
        total += float((ActFormat(4).fake_quantize(turned) @ rounded.T - x @ was.T).square().sum())
    details = report.details[f"{BLOCK}.q_proj"]
    assert total == pytest.approx(min(details["error_learned"], details["error_start"]), rel=1e-2)


def test_learning_lowers_the_error_on_rows_it_has_not_seen(case: CaseMaker) -> None:
    k = with_outliers(case("llada"))
    report = run(k, "flatquant(steps=60, lr=0.02)")
    plain, start, learned = (
        sum(d[f"error_{e}"] for d in report.details.values()) for e in ("plain", "start", "learned")
    )
    assert learned < 0.9 * start < start < plain


def test_the_quantized_model_is_nearer(case: CaseMaker) -> None:
    """End to end at W4A4: the logits of the outlier model, with and without."""
    found = {}
    for line in (RTN, f"flatquant(steps=40, lr=0.02), {RTN}"):
        k = with_outliers(case("llada"))
        before = k.forward(k.ids())
        run(k, line)
        found[line] = float((k.forward(k.ids()) - before).square().mean() / before.square().mean())
    assert found[f"flatquant(steps=40, lr=0.02), {RTN}"] < 0.7 * found[RTN]


@pytest.mark.parametrize("start", ["hadamard", "orthogonal", "identity"])
def test_the_contragredient_undoes_it(start: str) -> None:
    """x·T·(W·T⁻ᵀ)ᵀ = x·Wᵀ for a affine in any state, and `found` is the same transform."""
    affine = Affine([flatquant._STARTS[start](n, n) for n in (4, 6)])
    affine.smooth(torch.randn(40, 24), [torch.randn(8, 24)], 0.3)
    with torch.no_grad():
        for p in affine.parameters:
            p.add_(0.3 * torch.randn(p.shape))
    x, w = torch.randn(5, 24), torch.randn(7, 24)
    assert torch.allclose(affine(x) @ affine(w, undo=True).T, x @ w.T, atol=1e-4)
    t = affine.found()
    assert torch.allclose(t.online(apart=False)(x.double()).float(), affine(x), atol=1e-4)
    assert t.condition == pytest.approx(float(torch.linalg.cond(t.online(apart=False).matrix())), rel=10)
    assert not torch.allclose(t.online(apart=True)(x), t.online(apart=False)(x))


def test_the_start_is_smoothquants(case: CaseMaker) -> None:
    x, w = torch.randn(50, 12), torch.randn(9, 12)
    x[:, 2] = 0
    affine = Affine([torch.eye(3), torch.eye(4)])
    affine.smooth(x, [w, 2 * w], 0.3)
    c = affine.found().c
    assert c is not None
    s = x.abs().amax(0) ** 0.3 / (2 * w).abs().amax(0) ** 0.7
    live = torch.arange(12) != 2
    assert float(c[2]) == 1.0
    assert torch.allclose((c * s)[live] / (c * s)[0], torch.ones(11, dtype=torch.float64), atol=1e-6)


def test_without_scales(case: CaseMaker) -> None:
    k = case("llada")
    report = run(k, "flatquant(steps=2, alpha=None)")
    assert report.sites > 0
    assert k.ctx.weights[f"{BLOCK}.attn_norm.weight"].folds == ()


@pytest.mark.parametrize(("d", "n"), [(64, 8), (96, 8), (12288, 96), (3584, 56), (18944, 128), (13, 1)])
def test_sizes(d: int, n: int) -> None:
    assert nearest_factor(d) == n


def test_what_learning_makes_worse_keeps_its_start(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def astray(self: Any, affine: Affine, x: Tensor, matrices: Any) -> None:
        with torch.no_grad():
            for p in affine.parameters:
                p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr(Flatquant, "descend", astray)
    k = with_outliers(case("llada"))
    report = run(k, "flatquant")
    assert report.sites > 0
    note = f"{BLOCK}.q_proj: learning did not lower the error on held-out rows, so its start counts"
    assert note in report.notes
    first = next(node for node in k.graph.nodes if is_call(node, TRANSFORM))
    assert torch.linalg.cond(transform_of(first, k.ctx.weights).matrix()) < 1 + 1e-5


def test_a_transform_that_cannot_be_undone_is_refused(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten(self: Any, affine: Affine, x: Tensor, matrices: Any) -> None:
        with torch.no_grad():
            affine._log_s[0][0] = -20.0

    monkeypatch.setattr(Flatquant, "descend", flatten)
    with pytest.raises(ContractError) as caught:
        run(case("llada"), "flatquant")
    assert str(caught.value) == (
        "model.transformer.blocks.0.q_proj: the transform of its input cannot be undone: "
        "the matrix of a transform has condition number 4.85e+08, more than 1e+06. "
        "Lower lr= or steps=, or run smooth first"
    )

    def diverge(self: Any, affine: Affine, x: Tensor, matrices: Any) -> None:
        with torch.no_grad():
            affine._skew[1].fill_(torch.nan)

    monkeypatch.setattr(Flatquant, "descend", diverge)
    with pytest.raises(ContractError, match="condition number inf, more than 1e"):
        run(case("llada"), "flatquant")

    def stretch(self: Any, affine: Affine, x: Tensor, matrices: Any) -> None:
        with torch.no_grad():
            affine._log_c[0] = 20.0

    monkeypatch.setattr(Flatquant, "descend", stretch)
    with pytest.raises(ContractError, match=r"the transform has condition number .*e\+\d\d, more than 1e\+06"):
        run(case("llada"), "flatquant")


def test_declines(case: CaseMaker) -> None:
    report = run(case("shared"), "flatquant(steps=1, required=False)")
    assert {d.site for d in report.declined} <= {"input of layers.0.up", "input of layers.0.down"}
    k = case("llada")
    run(k, "rotate_down")
    report = run(k, "flatquant(steps=1)")
    reasons = {d.site: d.reason for d in report.declined}
    assert reasons["input of model.transformer.blocks.0.ff_out"] == "it is transformed at run time already"


def test_declines_what_no_transform_improves(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flatquant, "error_of", lambda self, x, matrices, affine: 1.0 if affine else 0.5)
    report = Flatquant(steps=1).apply((k := case("llada")).graph, collected(k))
    assert report.sites == 0
    assert {d.reason for d in report.declined} == {"no transform lowers the error on held-out rows"}
    assert not any(is_call(node, TRANSFORM) for node in k.graph.nodes)


def test_declines_a_value_that_is_zero(case: CaseMaker) -> None:
    k = case("llada")
    ctx = collected(k)
    ctx.stats = {name: {"sample": torch.zeros_like(s["sample"])} for name, s in ctx.stats.items()}
    report = Flatquant(steps=1).apply(k.graph, ctx)
    assert {d.reason for d in report.declined} == {"it is zero on the sample"}


def test_declines_a_weight_that_somebody_else_reads(case: CaseMaker) -> None:
    k = case("llada")
    site = next(linears(k.ctx.blocks[0].nodes(k.graph), k.ctx.weights))
    call_before(k.graph, site.node, LINEAR, (k.ctx.blocks[0].input(k.graph), args_of(site.node)[1]))
    report = Flatquant(steps=1).apply(k.graph, collected(k))
    reasons = [d.reason for d in report.declined if d.site == f"input of {BLOCK}.q_proj"]
    assert len(reasons) == 1
    assert f"it reads '{BLOCK}.q_proj.weight', too, and would see it changed" in reasons[0]


def collected(k: Any) -> Any:
    """The context in block 0 with samples of its linears."""
    k.ctx.block = k.ctx.blocks[0]
    collector = Collector({"sample"}, list(linears(k.ctx.block.nodes(k.graph), k.ctx.weights)))
    run_block = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [k.ctx.block.output(k.graph)])
    run_block(k.ctx.states.ids, taps=collector.taps(k.ctx.states.weights))
    k.ctx.stats = collector.result()
    return k.ctx


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("steps=0", "flatquant.steps: 0 is less than 1. Use 200"),
        ("lr=0.0", "flatquant.lr: 0.0 is no learning rate. Use a positive number, such as 0.005"),
        ("alpha=1.5", "flatquant.alpha: 1.5 is outside [0, 1]. 0.3 is the usual value, or None for no scales"),
        ("weight_bits=5", "bits: 5 is not a width of an integer weight. Use 2, 3, 4 or 8"),
        (
            "act_bits=9",
            "bits: 9 is not a width of an integer activation. Use 2 to 8, or leave activations unquantized",
        ),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_line(f"flatquant({options})")
    assert str(caught.value) == message


def test_an_unknown_start() -> None:
    with pytest.raises(RecipeError) as caught:
        Flatquant(start="zeros")  # type: ignore[arg-type]
    assert str(caught.value) == ("flatquant.start: unknown start 'zeros'. Use hadamard, orthogonal, identity")


def test_a_planted_error_shows(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale goes into the readers only."""

    class Wrong(flatquant.Edge):
        def scale(self, weights: Any, s: Tensor) -> None: ...

    real = flatquant.scalable
    monkeypatch.setattr(
        flatquant, "scalable", lambda *a: [Wrong(e.name, e.kind, e.region, e.readers) for e in real(*a)]
    )
    monkeypatch.setattr(flatquant, "keep_online", _online_only)
    with pytest.raises(ContractError, match="claims to preserve the function"):
        run(case("llada"), "flatquant(steps=1)")


def _online_only(graph: Any, weights: Any, region: Any, t: Any) -> Any:
    value = next(iter(region.carries))
    return insert(graph, weights, value, t, [u for u in value.users if is_call(u, LINEAR)])
