from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest
import torch
import zoo
from rich.console import Console
from torch import fx

import dlqc
from dlqc.bisect import Bisection, _FullPrecision, bisect, restore
from dlqc.cli import main
from dlqc.contract import Context, PassReport
from dlqc.errors import FeasibilityError
from dlqc.execute import forward
from dlqc.graph import copy_graph, is_call, linears
from dlqc.ops import LINEAR_PACKED, LOW_RANK
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn

ROWS = torch.randint(0, zoo.MASK, (4, 24), generator=torch.Generator().manual_seed(0))
ROTATED = (
    "fold_norm_scale, rotate_hidden, "
    "quantize_weights(bits=4, group_size=32, method=rtn, low_rank=low_rank(rank=4, weighting=none)), "
    "quantize_activations(bits=8), pack"
)


class Careless(QuantizeWeights):
    """Quantizes, and damages one linear of the second block."""

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = super().apply(graph, ctx)
        for name in [n for n in ctx.weights if "blocks.1.up_proj" in n and n.endswith("scales")]:
            ctx.weights.put(name, ctx.weights[name].leaf * 3)
        return report


@pytest.fixture(scope="module")
def found() -> Bisection:
    passes = (FoldNormScale(), Careless(bits=8, group_size=32, method=Rtn()))
    return bisect(zoo.model("llada"), passes, ROWS, tolerance=0.005, worst=1)


def test_the_pass_and_the_layer_that_were_damaged_are_named(found: Bisection) -> None:
    assert found.guilty is not None
    assert "Careless" in found.guilty
    assert [cost.within for cost in found.passes] == [True, False]
    assert found.blocks[0].name == "block 1"
    assert [block.linears for block in found.blocks] == [7, 7, 7]
    assert found.sites[0].name == "model.transformer.blocks.1.up_proj"
    assert found.sites[0].share > 0.9
    assert len(found.sites) == 7
    assert max(abs(site.share) for site in found.sites[1:]) < 0.2


def test_the_tables_say_so(found: Bisection) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.render())
    text = console.export_text()
    assert "the first pass beyond 0.005 nats is" in text
    assert "block 1" in text
    assert "model.transformer.blocks.1.up_proj" in text
    narrow = Console(width=80, record=True, file=io.StringIO())
    narrow.print(found.render())
    assert "fold_norm_scale" in narrow.export_text()
    assert json.loads(json.dumps(found.to_plain()))["guilty"] == found.guilty


def test_everything_restored_is_the_original() -> None:
    """Behind rotations, too: the weights kept are those of the rotated graph. Corrections of low rank go with their linear."""
    model, keeper = zoo.model("llada"), _FullPrecision()
    compiled = dlqc.compile(model, ROTATED, progress=False, instruments=(keeper,))
    graph, weights = copy_graph(compiled.graph), compiled.weights.clone()
    assert all(any(is_call(n, op) for n in graph.nodes) for op in (LINEAR_PACKED, LOW_RANK))
    restore(graph, weights, keeper.kept)
    assert not any(is_call(n, LINEAR_PACKED, LOW_RANK) for n in graph.nodes)
    assert len(list(linears(graph.nodes, weights))) == 22
    with torch.no_grad():
        expected = model(ROWS).logits
    torch.testing.assert_close(forward(graph, weights, ROWS), expected, rtol=1e-3, atol=1e-3)


def test_fine_tuning_is_a_stage_of_its_own() -> None:
    """Its cost is that of the tuned model, and so are the layers; here fine-tuning has ruined one."""
    model, recipe = zoo.model("llada"), "quantize_weights(bits=8, group_size=32, method=rtn)"
    start = dlqc.compile(model, recipe, progress=False)
    weights = start.weights.clone()
    for name in [n for n in weights if "blocks.2.up_proj" in n and n.endswith("scales")]:
        weights.put(name, weights[name].leaf * 3)
    step = dataclasses.replace(start.report.steps[-1], name="finetune", options="finetune(learn='scales')")
    report = dataclasses.replace(start.report, steps=[*start.report.steps, step])
    made = (start.graph, weights, (start.graph, weights))
    tuned = dlqc.Compiled(*made, spec=start.spec, recipe=start.recipe, report=report)
    found = bisect(model, recipe, ROWS, tuned=tuned, tolerance=0.005, worst=0)
    assert [cost.within for cost in found.passes] == [True, False]
    assert found.guilty == "finetune(learn='scales')"
    assert found.blocks[0].name == "block 2"
    assert found.blocks[0].share > 0.9


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(FeasibilityError, match=r"tolerance: tolerance 0, worst 1. Use tolerance > 0 and worst >= 0"):
        bisect(zoo.model("llada"), ROTATED, ROWS, tolerance=0)
    for arguments, message in (
        (("bisect", "tiny-llada"), "recipe: no recipe was named. Add --recipe, such as -r w4a16-rtn"),
        (("bisect", str(tmp_path)), "an artifact brings its recipe, and not its original. Name the original with --ag"),
    ):
        (tmp_path / "manifest.json").write_text("{}")
        monkeypatch.setattr(sys, "argv", ["dlqc", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
