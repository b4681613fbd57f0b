"""Instruments watch and do not touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlqc.contract import PassReport
from dlqc.errors import ContractError
from dlqc.graph import structure
from dlqc.instruments import Dump, Timing, peak_memory
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth

CaseMaker = Callable[..., Any]
PASSES = (FoldNormScale(), Calibrate(sequences=4, length=16), Smooth(), QuantizeWeights(4, 32), Pack())


def test_timing_has_one_record_a_pass_in_order(case: CaseMaker) -> None:
    k = case("llada")
    timing = Timing()
    reports = PassManager(PASSES, (timing,)).run(k.graph, k.ctx)
    assert len(timing.records) == len(reports) == 5
    assert all(record.seconds > 0 for record in timing.records)
    assert timing.records[-1].peak_mb == pytest.approx(peak_memory(), rel=0.2)
    assert 30 < peak_memory() < 1e5


def test_in_a_nested_pipeline_each_pass_has_its_own_share(case: CaseMaker) -> None:
    k = case("llada")
    timing = Timing()
    p = Pack()
    timing.before(p, k.graph, k.ctx)
    report = PassReport(metrics={"seconds": 123.0, "other": 1.0})
    timing.after(p, k.graph, k.ctx, report)
    assert timing.records[0].seconds == 123.0
    assert report.metrics == {"seconds": 123.0, "other": 1.0}  # the next instrument wants to see it too


def test_dump_writes_graph_and_difference(case: CaseMaker, tmp_path: Path) -> None:
    k = case("llada")
    capture = structure(k.graph)
    PassManager(PASSES, (Dump(tmp_path / "new" / "dump"),)).run(k.graph, k.ctx)
    folder = tmp_path / "new" / "dump"
    assert sorted(p.name for p in folder.iterdir()) == [
        "00-capture.txt",
        "01-fold_norm_scale.diff",
        "01-fold_norm_scale.txt",
        "02-calibrate.diff",
        "02-calibrate.txt",
        "03-smooth.diff",
        "03-smooth.txt",
        "04-quantize_weights.diff",
        "04-quantize_weights.txt",
        "05-pack.diff",
        "05-pack.txt",
    ]
    assert (folder / "00-capture.txt").read_text() == capture + "\n"
    assert (folder / "05-pack.txt").read_text() == structure(k.graph) + "\n"
    diff = (folder / "05-pack.diff").read_text().splitlines()
    assert sum(line.startswith("-%linear_q") for line in diff) == 14
    assert sum(line.startswith("+%linear_packed") for line in diff) == 14


def test_dump_leaves_the_graph_of_a_failure(case: CaseMaker, tmp_path: Path) -> None:
    k = case("llada")
    k.apply(FoldNormScale())
    with pytest.raises(ContractError, match="found nothing to rewrite"):
        PassManager((FoldNormScale(),), (Dump(tmp_path),)).run(k.graph, k.ctx)
    assert (tmp_path / "error-fold_norm_scale.txt").read_text() == structure(k.graph) + "\n"
