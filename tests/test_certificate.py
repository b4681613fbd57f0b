"""A certificate measures what it says, on the probes it says, and a lie costs the pass its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from dlqc import certificate
from dlqc.certificate import BOUND, RATIOS, certified, deviation
from dlqc.contract import Context, Pass, PassReport
from dlqc.errors import ContractError
from dlqc.transform import Diagonal
from dlqc.weights import OnColumns

CaseMaker = Callable[..., Any]
GAIN = "model.transformer.blocks.1.ff_norm.weight"


@dataclass(frozen=True)
class Nudge(Pass):
    """Multiplies a gain by 1 + size."""

    name: ClassVar[str] = "nudge"
    preserves: ClassVar = "exact"
    size: float = 0.0
    gain: str = GAIN

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        n = ctx.weights[self.gain].shape[0]
        ctx.weights.fold(self.gain, OnColumns(Diagonal(torch.full((n,), 1 + self.size, dtype=torch.float64))))
        return PassReport(sites=1)


@dataclass(frozen=True)
class Honest(Nudge):
    """The same, without the claim."""

    name: ClassVar[str] = "honest"
    preserves: ClassVar = "no"


@pytest.mark.parametrize("block", [None, 1])
def test_nothing_changed_is_zero(case: CaseMaker, block: int | None) -> None:
    k = case("llada")
    k.ctx.block = None if block is None else k.ctx.blocks[block]
    assert certified(Nudge(), k.graph, k.ctx).certificate == 0.0


@pytest.mark.parametrize("block", [None, 1])
@pytest.mark.parametrize("size", [1e-6, 0.5, float("nan")])
def test_a_lying_pass_is_refused(case: CaseMaker, block: int | None, size: float) -> None:
    k = case("llada")
    k.ctx.block = None if block is None else k.ctx.blocks[block]
    where = "the whole graph" if block is None else "block 1"
    message = (
        rf"^{where}: pass 'nudge' claims to preserve the function, but it changed by (\S+) relative in float64\. "
        "This is a fault of 'nudge'; leave it out of the recipe$"
    )
    with pytest.raises(ContractError, match=message):
        certified(Nudge(size), k.graph, k.ctx)


def test_a_deviation_within_the_bound_is_stored(case: CaseMaker) -> None:
    k = case("llada")
    found = certified(Nudge(1e-11), k.graph, k.ctx).certificate
    assert 1e-13 < found < BOUND


def test_a_block_does_not_vouch_for_another(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.block = k.ctx.blocks[0]
    assert certified(Nudge(0.5), k.graph, k.ctx).certificate == 0.0


def test_a_lossy_pass_is_not_measured(case: CaseMaker) -> None:
    k = case("llada")
    assert certified(Honest(0.5), k.graph, k.ctx).certificate is None


def test_graph_probes_cover_the_mask_ratios(case: CaseMaker) -> None:
    k = case("llada")
    (ids,) = certificate._probes(k.graph, k.ctx)
    shares = (ids == k.ctx.spec.mask_id).float().mean(1)
    assert ids.shape == (len(RATIOS), 16)
    assert shares[0] < 0.2
    assert shares[-1] == 1
    assert bool((shares.diff() > 0).all())


def test_block_probes_are_plain_spiky_and_alike(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.block = k.ctx.blocks[0]
    ids, (plain, spiky, alike) = certificate._probes(k.graph, k.ctx)
    assert ids.shape == (3, 16)
    ratio = spiky / plain
    assert int((ratio.round() == 1000).all(0).sum()) == 3
    assert int((ratio == 1).all(0).sum()) == 61
    assert torch.equal(alike, plain[:1].expand(16, 64))


def test_probes_fit_a_short_model(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.spec = dataclasses.replace(k.ctx.spec, max_length=4)
    assert certificate._probes(k.graph, k.ctx)[0].shape == (5, 4)


def test_the_seed_decides_the_probes(case: CaseMaker) -> None:
    k = case("llada")
    first = certificate._probes(k.graph, k.ctx)[0]
    assert torch.equal(certificate._probes(k.graph, k.ctx)[0], first)
    k.ctx.seed = 1
    assert not torch.equal(certificate._probes(k.graph, k.ctx)[0], first)


@pytest.mark.parametrize(
    ("found", "expected", "value"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0], [0.0], 0.0),
        ([float("nan")], [1.0], float("inf")),
        ([1.0], [float("inf")], float("inf")),
    ],
)
def test_deviation(found: list[float], expected: list[float], value: float) -> None:
    assert deviation(torch.tensor(found), torch.tensor(expected)) == value


def test_one_large_probe_does_not_hide_a_small_one(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deviation is relative to each probe's own size."""
    k = case("llada")
    results = iter([torch.tensor([[1e6], [1.0]]), torch.tensor([[1e6], [1.1]])])
    monkeypatch.setattr(certificate, "_evaluate", lambda *_: next(results))
    with pytest.raises(ContractError, match=r"changed by 0\.1 relative"):
        certified(Nudge(), k.graph, k.ctx)
