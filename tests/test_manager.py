"""The manager: order, feasibility, blame, instruments, the nested pipeline."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from dlqc.contract import FACTS_OF_CAPTURE, Context, Declined, Pass, PassReport, Plan
from dlqc.errors import ContractError, FeasibilityError
from dlqc.execute import Executor, forward, placeholder
from dlqc.graph import LINEAR, aten, fingerprint, is_call, linears, structure
from dlqc.manager import Instrument, PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.rounding.rtn import Rtn
from dlqc.transform import Diagonal
from dlqc.weights import OnColumns

CaseMaker = Callable[..., Any]
CALIBRATE = Calibrate(sequences=6, length=16)


@dataclass(frozen=True)
class Probe(Pass):
    """Reports what it is told and runs a function."""

    name: ClassVar[str] = "probe"
    found: int = 1
    declined: tuple[Declined, ...] = ()
    action: Callable[[fx.Graph, Context], object] = field(default=lambda graph, ctx: None)

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        self.action(graph, ctx)
        return PassReport(sites=self.found, declined=list(self.declined))


@dataclass(frozen=True)
class BlockProbe(Probe):
    name: ClassVar[str] = "block_probe"
    scope: ClassVar = "block"


@dataclass(frozen=True)
class StatProbe(BlockProbe):
    name: ClassVar[str] = "stat_probe"

    def statistics(self) -> frozenset[str]:
        return frozenset({"hessian", "absmax"})


@dataclass(frozen=True)
class Liar(Probe):
    name: ClassVar[str] = "liar"
    preserves: ClassVar = "exact"


@dataclass(frozen=True)
class BlockLiar(BlockProbe):
    name: ClassVar[str] = "block_liar"
    preserves: ClassVar = "exact"


def untouched(k: Any, mark: str) -> None:
    assert fingerprint(k.graph, k.ctx.weights) == mark


# Order


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            (Smooth(), CALIBRATE),
            r"^passes: pass 'smooth' needs 'states', which does not hold here\. "
            r"Move 'calibrate', which gives it, before 'smooth'$",
        ),
        (
            (QuantizeWeights(4, 32, method=Rtn()), FoldNormScale()),
            r"^passes: pass 'fold_norm_scale' needs 'float-weights', which does not hold here\. "
            r"Move 'fold_norm_scale' before 'quantize_weights', which ends it$",
        ),
        (
            (QuantizeWeights(4, 32),),
            r"^passes: pass 'quantize_weights' needs 'states', which does not hold here\. "
            r"No pass in this pipeline gives 'states'$",
        ),
        ((Pack(),), r"No pass in this pipeline gives 'quantized-weights'$"),
        (
            (QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(), QuantizeActivations()),
            r"Move 'quantize_activations' before 'quantize_activations', which ends it$",
        ),
    ],
)
def test_a_wrong_order_is_refused_with_the_remedy(case: CaseMaker, passes: tuple[Pass, ...], message: str) -> None:
    k = case("llada")
    k.ctx.facts = set(FACTS_OF_CAPTURE)
    mark = fingerprint(k.graph, k.ctx.weights)
    with pytest.raises(ContractError, match=message):
        PassManager(passes).run(k.graph, k.ctx)
    untouched(k, mark)


def test_a_context_that_has_states_can_run_smooth_alone(case: CaseMaker) -> None:
    k = case("llada")
    (only,) = PassManager((Smooth(),)).run(k.graph, k.ctx)
    assert only[1].sites == 4


def test_a_pass_that_reports_no_change_must_not_have_changed_anything(case: CaseMaker) -> None:
    @dataclass(frozen=True)
    class Secretive(Pass):
        name: ClassVar[str] = "secretive"

        def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
            ctx.weights.fold(next(iter(ctx.weights)), OnColumns(Diagonal(torch.ones(1))))
            return PassReport()

    k = case("llada")
    with pytest.raises(ContractError, match=r"pass 'secretive' reports that it changed nothing, but .* changed"):
        PassManager((Secretive(required=False),)).run(k.graph, k.ctx)


def test_the_right_order_is_taken() -> None:
    passes = (FoldNormScale(), CALIBRATE, Smooth(), QuantizeWeights(), QuantizeActivations(), Pack())
    assert PassManager(passes).check_order() is None
    assert PassManager((QuantizeWeights(method=Rtn()),)).check_order() is None


# Feasibility


def test_all_offenders_are_listed_at_once_and_nothing_is_changed(case: CaseMaker) -> None:
    k = case("llada")
    states, mark = k.ctx.states, fingerprint(k.graph, k.ctx.weights)
    manager = PassManager((Calibrate(sequences=0), QuantizeWeights(4, 64)))
    with pytest.raises(FeasibilityError) as caught:
        manager.run(k.graph, k.ctx)
    reason = "96 input features do not divide by group 64 (use 32, or exclude it with skip=)"
    assert str(caught.value) == (
        "calibrate: 0 sequences of 128 tokens hold nothing; "
        f"model.transformer.blocks.0.ff_out: {reason}; "
        f"model.transformer.blocks.1.ff_out: {reason}. Nothing was changed or written"
    )
    untouched(k, mark)
    assert k.ctx.states is states
    assert manager.reports == []


def test_a_long_list_is_cut(case: CaseMaker) -> None:
    k = case("llada")
    with pytest.raises(
        FeasibilityError, match=r"do not divide by group 40 \(use 32, 64.* \(and 6 more\)\. Nothing was"
    ):
        PassManager((CALIBRATE, QuantizeWeights(4, 40))).check_feasibility(k.graph, k.ctx)


def test_the_plan_reads_no_weight(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")
    monkeypatch.setattr("dlqc.weights.Constant.exact", lambda self: pytest.fail("a weight was read"))
    monkeypatch.setattr("dlqc.weights.Constant.stored", lambda self: pytest.fail("a weight was read"))
    passes = (FoldNormScale(), CALIBRATE, Smooth(), QuantizeWeights(4, 32), QuantizeActivations(), Pack())
    plan = PassManager(passes).plan(k.graph, k.ctx)
    assert len(plan.sites) == 14
    assert plan.problems == []
    assert plan.kept == {"model.transformer.ff_out": "outside the repeated blocks"}


def test_plans_of_passes_see_those_before_them(case: CaseMaker) -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Looks(Probe):
        def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
            seen.append(len(plan.sites))

    k = case("llada")
    PassManager((Looks(), QuantizeWeights(4, 32), Looks())).plan(k.graph, k.ctx)
    assert seen == [0, 14]


# Passes that find nothing, fail, lie or break the graph


@pytest.mark.parametrize("kind", [Probe, BlockProbe])
def test_a_pass_that_finds_nothing_is_an_error(case: CaseMaker, kind: type[Probe]) -> None:
    k = case("llada")
    with pytest.raises(ContractError, match=r"found nothing to rewrite \(no site looks like it\)\. Remove it from"):
        PassManager((kind(found=0),)).run(k.graph, k.ctx)
    with pytest.raises(ContractError, match=r"found nothing to rewrite \(a\.b: it is tied(; a\.b: it is tied)?\)"):
        PassManager((kind(found=0, declined=(Declined("a.b", "it is tied"),)),)).run(k.graph, k.ctx)
    reports = PassManager((kind(found=0, required=False),)).run(k.graph, k.ctx)
    assert reports[0][1].sites == 0


def test_a_block_pass_need_only_find_one_site_in_all_blocks(case: CaseMaker) -> None:
    @dataclass(frozen=True)
    class Second(BlockProbe):
        def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
            assert ctx.block is not None
            return PassReport(sites=int(ctx.block.index == 1))

    k = case("llada")
    assert PassManager((Second(),)).run(k.graph, k.ctx)[0][1].sites == 1


def explode(graph: fx.Graph, ctx: Context) -> None:
    if ctx.block is None or ctx.block.index == 1:
        raise ZeroDivisionError("boom")


def test_notes_name_the_pass_and_the_block(case: CaseMaker) -> None:
    k = case("llada")
    with pytest.raises(ZeroDivisionError, match="boom") as caught:
        PassManager((FoldNormScale(), Probe(action=explode))).run(k.graph, k.ctx)
    assert caught.value.__notes__ == ["in pass 'probe', after fold_norm_scale"]
    k = case("llada")
    with pytest.raises(ZeroDivisionError, match="boom") as caught:
        PassManager((FoldNormScale(), BlockProbe(), BlockProbe(action=explode))).run(k.graph, k.ctx)
    assert caught.value.__notes__ == ["in block 1 of 2", "in pass 'block_probe', after fold_norm_scale"]
    assert k.ctx.block is None


def louder(graph: fx.Graph, ctx: Context) -> None:
    name = next(n for n in ctx.weights if n.endswith("blocks.1.q_proj.weight"))
    ctx.weights.fold(name, OnColumns(Diagonal(torch.full((64,), 1.5))))


def test_a_lying_pass_is_refused_by_its_certificate(case: CaseMaker) -> None:
    k = case("llada")
    with pytest.raises(ContractError, match=r"^the whole graph: pass 'liar' claims to preserve the function, but it"):
        PassManager((Liar(action=louder),)).run(k.graph, k.ctx)

    def second(graph: fx.Graph, ctx: Context) -> None:
        if ctx.block is not None and ctx.block.index == 1:
            louder(graph, ctx)

    k = case("llada")
    with pytest.raises(ContractError, match=r"^block 1: pass 'block_liar' claims to preserve the function") as caught:
        PassManager((BlockLiar(action=second),)).run(k.graph, k.ctx)
    assert "in block 1 of 2" in caught.value.__notes__


def smuggle(graph: fx.Graph, ctx: Context) -> None:
    node = next(n for n in graph.nodes if is_call(n, LINEAR))
    with graph.inserting_after(node):
        new = graph.call_function(operator.pow, (node, 1))
    new.meta["val"] = node.meta["val"]


@pytest.mark.parametrize(("kind", "name"), [(Probe, "probe"), (BlockProbe, "block_probe")])
def test_a_pass_that_breaks_the_graph_is_blamed(case: CaseMaker, kind: type[Probe], name: str) -> None:
    k = case("llada")
    message = rf"law L4 is broken after pass '{name}': %pow_\d calls .*pow.*This is a fault of pass '{name}'"
    with pytest.raises(ContractError, match=message):
        PassManager((FoldNormScale(), kind(action=smuggle))).run(k.graph, k.ctx)


def test_a_fact_that_a_later_pass_ends_unnoticed_is_refused(case: CaseMaker) -> None:
    k = case("llada")

    def regain(graph: fx.Graph, ctx: Context) -> None:
        ctx.weights.put("model.transformer.ln_f.weight", torch.full((64,), 2.0))

    with pytest.raises(ContractError, match=r"law L9 is broken after pass 'probe': fact 'unit-gain' does not hold"):
        PassManager((FoldNormScale(), Probe(action=regain))).run(k.graph, k.ctx)


def test_facts_follow_the_passes(case: CaseMaker) -> None:
    k = case("llada")
    PassManager((FoldNormScale(), CALIBRATE, Smooth(), QuantizeWeights(4, 32), Pack())).run(k.graph, k.ctx)
    float_still = {"float-activations", "float-attention"}
    assert k.ctx.facts == {"normal-form", "states", "original", "quantized-weights", "packed"} | float_still


# Instruments


class Log(Instrument):
    def __init__(self, lines: list[str], name: str) -> None:
        self.lines, self.name = lines, name

    def before(self, p: Pass, graph: fx.Graph, ctx: Context) -> None:
        self.lines.append(f"{self.name} before {p.name}")

    def after(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        self.lines.append(f"{self.name} after {p.name} {report.sites}")

    def on_error(self, p: Pass, graph: fx.Graph, ctx: Context, error: Exception) -> None:
        self.lines.append(f"{self.name} error {p.name} {type(error).__name__}")


def test_instruments_are_called_in_order(case: CaseMaker) -> None:
    k = case("llada")
    lines: list[str] = []
    PassManager((Probe(), BlockProbe(), StatProbe(), Probe()), (Log(lines, "a"), Log(lines, "b"))).run(k.graph, k.ctx)
    assert lines == [
        "a before probe",
        "b before probe",
        "a after probe 1",
        "b after probe 1",
        "a before block_probe",
        "b before block_probe",
        "a before stat_probe",
        "b before stat_probe",
        "a after block_probe 2",
        "b after block_probe 2",
        "a after stat_probe 2",
        "b after stat_probe 2",
        "a before probe",
        "b before probe",
        "a after probe 1",
        "b after probe 1",
    ]


@pytest.mark.parametrize(
    ("p", "kind"),
    [
        (Probe(action=explode), "ZeroDivisionError"),
        (BlockProbe(action=explode), "ZeroDivisionError"),
        (Probe(found=0), "ContractError"),
        (BlockProbe(found=0), "ContractError"),
    ],
)
def test_instruments_hear_of_every_error(case: CaseMaker, p: Pass, kind: str) -> None:
    k = case("llada")
    lines: list[str] = []
    with pytest.raises((ZeroDivisionError, ContractError)):
        PassManager((p,), (Log(lines, "a"),)).run(k.graph, k.ctx)
    assert lines == [f"a before {p.name}", f"a error {p.name} {kind}"]


def test_progress_is_told(case: CaseMaker) -> None:
    k = case("llada")
    seen: list[tuple[str, int, int]] = []
    PassManager((BlockProbe(),), progress=lambda *tick: seen.append(tick)).run(k.graph, k.ctx)
    assert seen == [("block_probe block 1", 0, 2), ("block_probe block 2", 1, 2), ("blocks", 2, 2)]


# The nested pipeline


def reference_inputs(k: Any, graph: fx.Graph, weights: Any, node: fx.Node) -> torch.Tensor:
    """The value of a node on all calibration states, in one run from the token ids."""
    value = Executor(graph, weights, [placeholder(graph)], [node])(k.ctx.states.ids)[0]
    return value.reshape(-1, value.shape[-1])


@pytest.mark.parametrize("batch", [2, 4, 100])
def test_a_block_is_calibrated_on_the_quantized_blocks_before_it(case: CaseMaker, batch: int) -> None:
    k = case("llada")
    hessians: dict[tuple[int, str], torch.Tensor] = {}

    def keep(graph: fx.Graph, ctx: Context) -> None:
        assert ctx.block is not None
        hessians.update({(ctx.block.index, w): s["hessian"].clone() for w, s in ctx.stats.items()})

    original = k.ctx.weights.clone()
    before = {s.weight: s.x.name for s in linears(k.graph.nodes, k.ctx.weights)}
    passes = (CALIBRATE, StatProbe(action=keep), QuantizeWeights(2, 32, method=Rtn()))
    PassManager(passes, batch=batch).run(k.graph, k.ctx)
    assert {index for index, _ in hessians} == {0, 1}
    assert len(hessians) == 14
    c = k.ctx.states.weights.reshape(-1, 1).double()
    # The inputs of block 1's first linears, from the finished graph: block 0 is quantized in it, block 1 lies after.
    weight = "model.transformer.blocks.1.q_proj.weight"
    node = next(n for n in k.graph.nodes if n.name == before[weight])
    x = reference_inputs(k, k.graph, k.ctx.weights, node).double()
    torch.testing.assert_close(hessians[1, weight], (x * c).T @ x, rtol=1e-4, atol=1e-4)
    # On the unquantized block 0 the same statistic differs.
    clean = case("llada")
    y = reference_inputs(k, clean.graph, original, clean.node(before[weight])).double()
    off = (hessians[1, weight] - (y * c).T @ y).norm() / hessians[1, weight].norm()
    assert off > 0.05


def test_statistics_see_the_passes_before_in_the_same_block(case: CaseMaker) -> None:
    k = case("llada")
    peaks: list[dict[str, torch.Tensor]] = []

    def keep(graph: fx.Graph, ctx: Context) -> None:
        peaks.append({w: s["absmax"] for w, s in ctx.stats.items()})

    PassManager((CALIBRATE, StatProbe(action=keep), Smooth(alpha=1.0), StatProbe(action=keep))).run(k.graph, k.ctx)
    plain, smoothed = peaks[0], peaks[1]
    weight = "model.transformer.blocks.0.q_proj.weight"
    # With alpha 1 every channel of a smoothed input has largest magnitude 1.
    assert not torch.allclose(plain[weight], torch.ones(64), atol=0.1)
    torch.testing.assert_close(smoothed[weight], torch.ones(64), rtol=1e-4, atol=1e-4)


def test_statistics_are_there_only_for_those_who_ask(case: CaseMaker) -> None:
    k = case("llada")
    seen: list[set[str]] = []
    passes = (
        StatProbe(action=lambda g, c: seen.append(set(next(iter(c.stats.values()))))),
        BlockProbe(action=lambda g, c: seen.append(set(c.stats))),
    )
    PassManager(passes).run(k.graph, k.ctx)
    assert seen == [{"absmax", "hessian"}, set()] * 2
    assert k.ctx.stats == {}


def test_statistics_without_states_are_refused(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.states = None
    with pytest.raises(ContractError, match=r"block passes ask for statistics, but there are no states\. Add 'calib"):
        PassManager((StatProbe(),)).run(k.graph, k.ctx)


def test_block_passes_without_blocks_are_refused(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")
    k.ctx.blocks = ()
    monkeypatch.setattr("dlqc.manager.find_blocks", lambda graph: [])
    with pytest.raises(FeasibilityError, match=r"^blocks: no embedding leads to the logits .*Use graph-scoped passes"):
        PassManager((BlockProbe(),)).run(k.graph, k.ctx)


@pytest.mark.parametrize("name", ["llada bf16", "dream", "shared"])
def test_two_runs_are_bit_equal(case: CaseMaker, name: str) -> None:
    passes = (CALIBRATE, QuantizeWeights(3, 32), QuantizeActivations(), Pack())
    cases = [case(name), case(name)]
    for k in cases:
        if name != "shared":
            k.ctx.rows = None  # rollouts are drawn anew; those of the other model are degenerate
        PassManager(passes, batch=3).run(k.graph, k.ctx)
    a, b = cases
    assert structure(a.graph) == structure(b.graph)
    assert list(a.ctx.weights) == list(b.ctx.weights)
    for key in a.ctx.weights:
        assert torch.equal(a.ctx.weights.value(key), b.ctx.weights.value(key)), key
    assert torch.equal(a.forward(a.ids()), b.forward(b.ids()))


def test_another_seed_gives_another_result(case: CaseMaker) -> None:
    found = []
    for seed in (0, 1):
        k = case("llada")
        k.ctx.seed = seed
        PassManager((CALIBRATE, QuantizeWeights(3, 32))).run(k.graph, k.ctx)
        found.append(k.forward(k.ids()))
    assert not torch.equal(*found)


def test_the_users_model_is_unharmed(case: CaseMaker) -> None:
    k = case("dream")
    before = {name: tensor.clone() for name, tensor in k.model.state_dict().items()}
    with torch.no_grad():
        logits = k.model(k.ids()).logits
    passes = (FoldNormScale(), CALIBRATE, Smooth(), QuantizeWeights(4, 32), QuantizeActivations(), Pack())
    PassManager(passes).run(k.graph, k.ctx)
    assert all(torch.equal(tensor, before[name]) for name, tensor in k.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(k.model(k.ids()).logits, logits)
    assert not torch.allclose(forward(k.graph, k.ctx.weights, k.ids()), logits)


def test_reports_of_blocks_add_up(case: CaseMaker) -> None:
    k = case("llada")
    reports = PassManager((FoldNormScale(), CALIBRATE, Smooth(), QuantizeWeights(4, 32))).run(k.graph, k.ctx)
    assert [report.sites for _, report in reports] == [5, 6, 4, 14]
    assert 0 < max(report.certificate for _, report in reports if report.certificate is not None) < 1e-12
    assert len(reports[-1][1].details) == 14
    assert aten.linear.default in {n.target for n in k.graph.nodes}


def test_a_pass_that_claims_sites_must_have_changed_something(case: CaseMaker) -> None:
    @dataclass(frozen=True)
    class Boastful(Pass):
        name: ClassVar[str] = "boastful"
        gives: ClassVar[frozenset[str]] = frozenset({"unit-gain"})

        def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
            return PassReport(sites=3)

    k = case("llada")
    with pytest.raises(ContractError, match=r"pass 'boastful' reports 3 sites, but nothing changed"):
        PassManager((Boastful(),)).run(k.graph, k.ctx)


def test_nothing_comes_after_lowering() -> None:
    passes = (QuantizeWeights(4, 32, method=Rtn()), Pack(), Lower(), FoldNormScale())
    with pytest.raises(ContractError, match=r"comes after the graph is lowered.*Move 'fold_norm_scale' before 'lower'"):
        PassManager(passes).check_order()
