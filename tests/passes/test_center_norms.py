"""center_norms takes the mean out where the stream is written, and only where nobody misses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.graph import LAYER_NORM, RMS_NORM, is_call
from dlqc.manager import PassManager
from dlqc.passes import center_norms
from dlqc.passes.center_norms import CenterNorms
from dlqc.recipe import parse_line
from dlqc.transform import Center, Identity

CaseMaker = Callable[..., Any]


def test_layer_norms_become_rms_norms_of_a_centered_stream(case: CaseMaker) -> None:
    k = case("final layer norm")
    before = k.forward(k.ids(), torch.float64)
    report = CenterNorms().apply(k.graph, k.ctx)
    assert (report.sites, report.declined) == (3, [])
    assert not any(is_call(node, LAYER_NORM) for node in k.graph.nodes)
    assert sum(is_call(node, RMS_NORM) for node in k.graph.nodes) == 3
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    embedding = k.ctx.weights.value("embed.weight", torch.float64)
    assert embedding.mean(dim=1).abs().max() < 1e-15
    down = k.ctx.weights.value("layers.0.down.weight", torch.float64)
    assert down.mean(dim=0).abs().max() < 1e-15


def test_the_norm_s_gain_and_bias_are_left_where_they_are(case: CaseMaker) -> None:
    k = case("final layer norm")
    CenterNorms().apply(k.graph, k.ctx)
    for name in ("layers.0.norm.weight", "layers.1.norm.bias", "final.weight"):
        assert k.ctx.weights[name].folds == ()


def test_it_makes_the_way_for_a_rotation(case: CaseMaker) -> None:
    k = case("final layer norm")
    before = k.forward(k.ids(), torch.float64)
    line = "center_norms, fold_norm_scale, rotate_hidden"
    reports = PassManager(parse_line(line)).run(k.graph, k.ctx)
    assert [report.sites for _, report in reports] == [3, 3, 1]
    assert all(report.certificate is not None and report.certificate < 1e-12 for _, report in reports)
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12


def test_declines_a_stream_that_others_read(case: CaseMaker) -> None:
    k = case("layer norm")  # the head reads the stream itself
    report = CenterNorms().apply(k.graph, k.ctx)
    assert report.sites == 0
    assert {d.reason for d in report.declined} == {
        "stuck at %linear_4 (aten.linear): it reads the mean that would be taken away"
    }


def test_declines_a_post_norm_model(case: CaseMaker) -> None:
    k = case("post norm")
    report = CenterNorms().apply(k.graph, k.ctx)
    assert report.sites == 0
    assert report.declined[1].reason == (
        "stuck at %layer_norm (aten.layer_norm): its gain does not keep the mean at zero"
    )


def test_finds_nothing_in_a_model_with_rms_norms(case: CaseMaker) -> None:
    k = case("llada")
    report = CenterNorms().apply(k.graph, k.ctx)
    assert (report.sites, report.declined) == (0, [])


def test_a_planted_error_shows(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("final layer norm")
    before = k.forward(k.ids(), torch.float64)
    monkeypatch.setattr(center_norms, "fold", lambda weights, region, t: None)
    CenterNorms().apply(k.graph, k.ctx)
    assert deviation(k.forward(k.ids(), torch.float64), before) > 1e-3
    assert torch.equal(Center(4)(torch.ones(4)), torch.zeros(4))
    assert not torch.equal(Identity(4)(torch.ones(4)), torch.zeros(4))
