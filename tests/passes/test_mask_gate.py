"""mask_gate: each class loses the other's subspace and nothing else, and at tolerance 0 the function stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.calibration import Clean, Uniform, draw_states
from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import PassReport
from dlqc.errors import RecipeError
from dlqc.execute import Executor, forward, placeholder
from dlqc.graph import args_of, aten, fingerprint, is_call, linears
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_Q, QUANTIZE_ACT, TRANSFORM
from dlqc.passes import mask_gate
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.duquant import Duquant
from dlqc.passes.mask_gate import MaskGate, Subspaces, affordable, ends, moment
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.recipe import parse_line
from dlqc.regions import transform_of
from dlqc.rounding.rtn import Rtn
from dlqc.serialize import decode_graph, encode_graph
from dlqc.stats import Collector

CaseMaker = Callable[..., Any]
FIRST = "model.transformer.blocks.0.ff_proj"  # shares its input with up_proj


def applied(k: Any, p: MaskGate) -> PassReport:
    """Apply the pass to every block with its statistics."""
    total = PassReport()
    for block in k.ctx.blocks:
        k.ctx.block = block
        collector = Collector(p.statistics(), list(linears(block.nodes(k.graph), k.ctx.weights)))
        run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [block.output(k.graph)])
        ids = k.ctx.states.ids
        run(ids, taps=collector.taps(k.ctx.states.weights, ids == k.ctx.spec.mask_id))
        k.ctx.stats = collector.result()
        total.merge(p.apply(k.graph, k.ctx))
    k.ctx.block = None
    check(k.graph, k.ctx.weights, k.ctx.spec, {"float-weights"}, after="mask_gate")
    return total


def classes(rows: int = 400, d: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a masked class in q[:, :8] and of a visible one in q[:, 5:]: 5 directions, 4 directions, 3 in common."""
    generator = torch.Generator().manual_seed(2)
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    masked = torch.randn(rows, 8, generator=generator, dtype=torch.float64) @ q[:, :8].T
    visible = torch.randn(rows, d - 5, generator=generator, dtype=torch.float64) @ q[:, 5:].T
    return masked, visible, q


# The choice of subspaces


def test_finds_the_subspaces_that_were_planted() -> None:
    masked, visible, q = classes()
    found = Subspaces.choose(masked, visible, 1e-6, seed=0)
    assert (found.masked, found.visible) == (5, 4)
    assert found.masked_lose < 1e-6  # not zero: the ridge tilts the directions a little
    assert found.visible_lose < 1e-6
    u_m, u_u = found.basis[:, 3:8], found.basis[:, 8:]
    torch.testing.assert_close(u_m @ u_m.T, q[:, :5] @ q[:, :5].T, rtol=0, atol=2e-3)
    torch.testing.assert_close(u_u @ u_u.T, q[:, 8:] @ q[:, 8:].T, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(12).double(), rtol=0, atol=1e-12)


def test_tolerance_zero_shares_everything() -> None:
    masked, visible, _ = classes()
    found = Subspaces.choose(masked, visible, 0.0, seed=0)
    assert (found.masked, found.visible, found.masked_lose, found.visible_lose) == (0, 0, 0.0, 0.0)


@pytest.mark.parametrize("tolerance", [1e-3, 0.02, 0.3])
def test_the_loss_stays_below_the_tolerance_and_is_the_one_reported(tolerance: float) -> None:
    masked, visible, _ = classes()
    generator = torch.Generator().manual_seed(4)
    masked, visible = (
        x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (masked, visible)
    )
    found = Subspaces.choose(masked, visible, tolerance, seed=0)
    shared = 12 - found.masked - found.visible
    for rows, first, last, lose in (
        (visible[1::2], shared, shared + found.masked, found.visible_lose),
        (masked[1::2], shared + found.masked, 12, found.masked_lose),
    ):
        lost = sum(float((row @ found.basis[:, j]) ** 2) for row in rows for j in range(first, last))
        variance = sum(float(((row - rows.mean(0)) ** 2).sum()) for row in rows)
        assert lose == pytest.approx(lost / variance)
        assert lose <= tolerance
    looser = Subspaces.choose(masked, visible, min(2 * tolerance, 0.9), seed=0)
    assert looser.masked >= found.masked


def test_directions_that_nobody_uses_belong_to_nobody() -> None:
    masked, visible, _ = classes()
    masked, visible = (torch.cat((x, torch.zeros(len(x), 6).double()), dim=1) for x in (masked, visible))
    found = Subspaces.choose(masked, visible, 1e-6, seed=0)
    assert (found.masked, found.visible) == (5, 4)


def test_a_class_without_variance_loses_nothing() -> None:
    rows = torch.ones(9, 4, dtype=torch.float64)
    q, lose = affordable(torch.eye(4, dtype=torch.float64), torch.zeros(4, 0, dtype=torch.float64), rows, 0.5)
    assert (q.shape[1], lose) == (0, 0.0)


def test_ends_are_the_generalized_eigenvectors() -> None:
    masked, visible, _ = classes()
    a, b = moment(masked[:, :5]), moment(visible[:, :5])
    left, right = ends(a, b)
    both = a + b + 0.01 / 5 * torch.eye(5, dtype=torch.float64)
    values = [float((v @ (a - b) @ v) / (v @ both @ v)) for v in torch.cat((left, right.flip(1)), dim=1).T]
    expected = torch.linalg.eigvals(torch.linalg.solve(both, a - b)).real.sort(descending=True).values
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected, rtol=1e-8, atol=1e-10)


# On models


@pytest.mark.parametrize(
    ("name", "sites"), [("llada", 8), ("llada grouped bias", 8), ("dream", 8), ("layer norm", 4), ("post norm", 4)]
)
def test_tolerance_zero_keeps_the_function(case: CaseMaker, name: str, sites: int) -> None:
    k = case(name)
    before = k.forward(k.ids(), torch.float64)
    report = applied(k, MaskGate(0.0))
    assert (report.sites, report.declined) == (sites, [])
    assert sum(is_call(node, TRANSFORM) for node in k.graph.nodes) == sites
    assert not any(is_call(node, aten.where.self, aten.eq.Scalar) for node in placeholder(k.graph).users)
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-9
    assert deviation(k.forward(k.ids()).double(), before) < 1e-4


@pytest.mark.parametrize("inverted", [False, True])
def test_each_token_loses_the_subspace_of_the_other_class(case: CaseMaker, inverted: bool) -> None:
    """Against the model itself with hooks that project token by token; with the classes exchanged (planted) it differs."""
    k, ids = case("llada"), case("llada").ids()
    report = applied(k, MaskGate(0.3, sites=(FIRST,)))
    found = {key: int(value) for key, value in report.details[FIRST].items() if key.endswith("only")}
    assert found["visible only"] > 3
    basis = transform_of(next(n for n in k.graph.nodes if is_call(n, TRANSFORM)), k.ctx.weights).matrix()
    u_u = basis[:, 64 - found["visible only"] :]
    u_m = basis[:, 64 - found["visible only"] - found["masked only"] : 64 - found["visible only"]]

    def project(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = inputs[0].clone()
        for row in range(ids.shape[0]):
            for at in range(ids.shape[1]):
                lost = u_u if (ids[row, at] == 60) != inverted else u_m
                x[row, at] -= lost @ (lost.T @ x[row, at])
        return (x,)

    model = case("llada").model.double()
    block = model.model.transformer["blocks"][0]
    hooks = [linear.register_forward_pre_hook(project) for linear in (block.ff_proj, block.up_proj)]
    try:
        with torch.no_grad():
            expected = model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.float()
    worst = deviation(k.forward(ids, torch.float64), expected)
    assert worst > 1e-3 if inverted else worst < 1e-6


def test_all_sites_share_the_flags(case: CaseMaker) -> None:
    k = case("dream")
    report = applied(k, MaskGate(0.3))
    equal = [node for node in k.graph.nodes if is_call(node, aten.eq.Scalar)]
    assert [args_of(node)[1] for node in equal] == [k.ctx.spec.mask_id]
    (flags,) = equal[0].users
    gated = sum(d["masked only"] + d["visible only"] > 0 for d in report.details.values())
    assert len(flags.users) == gated > 1


def test_half_precision_stays_half(case: CaseMaker) -> None:
    k = case("llada bf16")
    dtype = k.forward(k.ids()).dtype
    applied(k, MaskGate(0.3))
    assert k.forward(k.ids()).dtype == dtype


def test_an_artifact_can_hold_it(case: CaseMaker) -> None:
    k = case("llada")
    applied(k, MaskGate(0.3))
    again = decode_graph(encode_graph(k.graph), k.ctx.spec)
    assert torch.equal(forward(again, k.ctx.weights, k.ids()), k.forward(k.ids()))


def test_quantizers_find_their_sites_behind_it(case: CaseMaker) -> None:
    k = case("llada")
    quantize = (QuantizeWeights(bits=8, group_size=None, symmetric=True, method=Rtn()), QuantizeActivations())
    first = (Calibrate(sequences=6, length=16), MaskGate(0.3), Duquant(block=16, steps=2, sites=("*.ff_out",)))
    reports = PassManager((*first, *quantize)).run(k.graph, k.ctx)
    assert [report.sites for _, report in reports[1:]] == [8, 2, 14, 14]
    gated = 0
    for node in k.graph.nodes:
        if is_call(node, LINEAR_Q):
            assert is_call(node.args[0], QUANTIZE_ACT)
            gated += is_call(node.args[0].args[0], aten.mul.Tensor)
    assert gated > 2


# Declines


def test_declines_where_one_class_is_missing(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.states = draw_states(
        k.ctx.rows, Clean(), Uniform(), k.ctx.spec, seed=0, logits=lambda ids: forward(k.graph, k.ctx.weights, ids)
    )
    mark = fingerprint(k.graph, k.ctx.weights)
    report = applied(k, MaskGate())
    assert report.sites == 0
    reason = "the sample holds 0 masked and 96 visible tokens, 4 of each are needed"
    assert {d.reason for d in report.declined} == {reason}
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_declines_what_is_transformed_already(case: CaseMaker) -> None:
    k = case("llada")
    applied(k, MaskGate(0.0))
    report = applied(k, MaskGate(0.0))
    assert report.sites == 0
    assert {d.reason for d in report.declined} == {"it is transformed at run time already"}


def test_declines_rows_that_are_no_tokens(case: CaseMaker) -> None:
    k = case("llada")
    flat = k.node("rms_norm")
    flat.meta["val"] = flat.meta["val"].reshape(-1, 64)
    assert mask_gate.unfit(flat, torch.ones(9).bool(), k.graph) == "its rows are not the tokens"


def test_declines_a_weight_that_somebody_else_reads(case: CaseMaker) -> None:
    report = applied(case("shared"), MaskGate(0.0))
    assert report.sites == 0
    assert any("it reads 'layers.0.up.weight', too" in d.reason for d in report.declined)


# Options


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_tolerance_outside_its_range(tolerance: float) -> None:
    message = rf"^mask_gate\.tolerance: {tolerance} is outside \[0, 1\)\. 0\.001 is the usual value, 0 loses nothing$"
    with pytest.raises(RecipeError, match=message):
        MaskGate(tolerance)


def test_no_sites() -> None:
    with pytest.raises(RecipeError, match=r"^mask_gate\.sites: no pattern\. Use \('\*',\) for all inputs of linears$"):
        MaskGate(sites=())


def test_recipes_name_it() -> None:
    assert parse_line("mask_gate(tolerance=0.01)") == (MaskGate(0.01),)
