"""rotate_hidden turns the residual stream of any model whose norms let it, and says why where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.errors import ContractError, RecipeError
from dlqc.graph import EMBEDDING, is_call, uses
from dlqc.manager import PassManager
from dlqc.passes import rotate_hidden
from dlqc.passes.rotate_hidden import RotateHidden, random_orthogonal, randomized_hadamard
from dlqc.recipe import parse_line
from dlqc.transform import Hadamard, Transform

CaseMaker = Callable[..., Any]
WRITERS = {"llada": 2 * 2 + 1, "llada tied": 2 * 2 + 1, "llada grouped bias": 2 * (2 * 2) + 1, "dream": 2 * 2 + 1}


def run(k: Any, line: str) -> list[Any]:
    return [report for _, report in PassManager(parse_line(line)).run(k.graph, k.ctx)]


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada tied", "llada grouped bias", "dream"])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_function_stays(case: CaseMaker, name: str, kind: str) -> None:
    k = case(name)
    before, single = k.forward(k.ids(), torch.float64), k.forward(k.ids())
    reports = run(k, f"fold_norm_scale(untie=True), rotate_hidden(kind={kind!r})")
    assert [(r.sites, r.declined) for r in reports] == [(5, []), (1, [])]
    assert reports[1].certificate < 1e-12
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    assert deviation(k.forward(k.ids()), single) < (1e-4 if "bf16" not in name else 3e-2)
    assert reports[1].metrics["width"] == 64
    if name in WRITERS:
        assert reports[1].metrics["writers"] == WRITERS[name]


def test_the_stream_is_turned_by_the_matrix(case: CaseMaker) -> None:
    k = case("llada")
    run(k, "fold_norm_scale")
    table = next(n for n in k.graph.nodes if is_call(n, EMBEDDING)).args[0].target
    embedding = k.ctx.weights.value(table, torch.float64)
    RotateHidden().apply(k.graph, k.ctx)
    turned = k.ctx.weights.value(table, torch.float64)
    assert torch.allclose(turned, embedding @ randomized_hadamard(64, 0).matrix(), atol=1e-14)


def test_outliers_are_spread(case: CaseMaker) -> None:
    k = case("llada")
    run(k, "fold_norm_scale")
    stream = randomized_hadamard(64, 0)
    spike = torch.zeros(1, 64, dtype=torch.float64)
    spike[0, 7] = 8.0
    assert stream(spike).abs().max() == pytest.approx(1.0)  # 8/√64 everywhere


def test_a_tied_head_stays_tied_where_no_gain_stands_between(case: CaseMaker) -> None:
    k = case("llada tied")
    for node in k.graph.nodes:  # a model whose gains are one
        if (node.op == "get_attr" and "norm" in str(node.target)) or str(node.target).endswith("ln_f.weight"):
            k.ctx.weights.put(str(node.target), torch.ones(64))
    before = k.forward(k.ids(), torch.float64)
    run(k, "fold_norm_scale(required=False), rotate_hidden")
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    table = next(n for n in k.graph.nodes if is_call(n, EMBEDDING)).args[0].target
    assert len(uses(k.graph, table)) == 2
    assert len(k.ctx.weights[table].folds) == 1  # E·Q for both, folded once


def test_a_tied_head_is_refused_with_the_way_out(case: CaseMaker) -> None:
    k = case("llada tied")
    reports = run(k, "fold_norm_scale, rotate_hidden(required=False)")
    assert len(reports[0].declined) == 1
    assert reports[0].declined[0].reason.endswith("set untie=True")
    assert reports[1].sites == 0
    assert "is not one; run fold_norm_scale first" in reports[1].declined[0].reason


def test_untying_is_said(case: CaseMaker) -> None:
    k = case("llada tied")
    reports = run(k, "fold_norm_scale(untie=True)")
    assert len(reports[0].notes) == 1
    assert "was tied to" in reports[0].notes[0]


def test_the_order_is_checked_by_facts(case: CaseMaker) -> None:
    with pytest.raises(ContractError) as caught:
        PassManager(parse_line("calibrate, fold_norm_scale, smooth, rotate_hidden")).check_order()
    assert str(caught.value) == (
        "passes: pass 'rotate_hidden' needs 'unit-gain', which does not hold here. "
        "Move 'rotate_hidden' before 'smooth', which ends it"
    )
    PassManager(parse_line("calibrate, smooth, fold_norm_scale, rotate_hidden, smooth")).check_order()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "post norm",
            "stuck at %layer_norm (aten.layer_norm): a layer norm takes the mean away; run center_norms first",
        ),
        (
            "layer norm",
            "stuck at %layer_norm (aten.layer_norm): a layer norm takes the mean away; run center_norms first",
        ),
    ],
)
def test_declines_with_the_node_and_the_reason(case: CaseMaker, name: str, reason: str) -> None:
    k = case(name)
    reports = run(k, "fold_norm_scale, rotate_hidden(required=False)")
    assert [(d.site, d.reason) for d in reports[1].declined] == [("residual stream", reason)]


def test_nothing_found_is_an_error_that_names_the_obstacle(case: CaseMaker) -> None:
    with pytest.raises(ContractError, match=r"found nothing to rewrite \(residual stream: stuck at %layer_norm"):
        run(case("post norm"), "fold_norm_scale, rotate_hidden")


@pytest.mark.parametrize("d", [12, 48, 56, 64, 96])
def test_the_hadamard_is_orthogonal_at_every_width(d: int) -> None:
    m = randomized_hadamard(d, 3).matrix()
    assert torch.allclose(m @ m.T, torch.eye(d, dtype=torch.float64), atol=1e-13)
    assert (m.abs() * d**0.5).round(decimals=9).unique().numel() == 1  # no channel keeps more than its share


def test_seeds_make_different_rotations() -> None:
    a, b, c = (randomized_hadamard(64, seed).matrix() for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    q = random_orthogonal(16, 2).matrix()
    assert torch.allclose(q @ q.T, torch.eye(16, dtype=torch.float64), atol=1e-13)


def test_a_block_that_does_not_fit(case: CaseMaker) -> None:
    k = case("llada")
    run(k, "fold_norm_scale")
    with pytest.raises(ContractError, match="64 features do not divide into Hadamard blocks of 48"):
        RotateHidden(block=48).apply(k.graph, k.ctx)


def test_a_planted_error_shows(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate_hidden, "randomized_hadamard", lambda d, seed, block: _Wrong(d))
    with pytest.raises(ContractError, match="claims to preserve the function"):
        run(case("llada"), "fold_norm_scale, rotate_hidden")


class _Wrong(Transform):
    """Rotates readers and forgets writers."""

    groups = frozenset({"orthogonal"})

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return Hadamard(self.width, self.width)(x)

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        return w


def test_options_that_are_none() -> None:
    with pytest.raises(RecipeError) as caught:
        RotateHidden(block=6)
    assert (
        str(caught.value)
        == "rotate_hidden.block: no Hadamard matrix of order 6 can be built. Use a power of two, or None"
    )
    with pytest.raises(RecipeError) as caught:
        RotateHidden(kind="foo")  # type: ignore[arg-type]
    assert str(caught.value) == "rotate_hidden.kind: unknown kind 'foo'. Use 'hadamard' or 'orthogonal'"
