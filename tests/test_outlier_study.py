"""Outliers before and after the transforms of a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from dlqc.contract import Context, Pass, PassReport
from dlqc.errors import FeasibilityError
from dlqc.models.load import load_model
from dlqc.models.outlier_twin import outlier_twin
from dlqc.outlier_study import OutlierStudy, _surface_ratio, _transforms, study, worst_sites
from dlqc.outliers import OutlierReport
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.recipe import Recipe

IDS = torch.randint(5, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
STEPS = (FoldNormScale(), Calibrate(sequences=8, length=32), Smooth())


@pytest.fixture(scope="module")
def twin() -> torch.nn.Module:
    return outlier_twin(load_model("tiny-llada", dtype=torch.float32), factor=32.0)


@pytest.fixture(scope="module")
def found(twin: torch.nn.Module) -> OutlierStudy:
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    steps = Recipe("mine", (*STEPS, QuantizeWeights(4, 128), Pack()))
    done = study(twin, IDS, recipe=steps, calibration=IDS, ratios=(0.0, 0.5, 1.0), surfaces=2, source="a table")
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
    return done


def crest(report: OutlierReport, kind: str) -> float:
    return report.summary()[kind, "visible"].crest_median


def test_a_stage_for_each_exact_pass(found: OutlierStudy) -> None:
    assert [stage.stage for stage in found.stages] == ["as captured", "after fold_norm_scale", "after smooth"]
    assert (found.model, found.source) == ("tiny-llada", "a table")
    assert {len(stage.cells) for stage in found.stages} == {17 * 4}


def test_transforms_remove_what_was_planted_where_they_reach(found: OutlierStudy) -> None:
    captured, folded, smoothed = found.stages
    for kind in ("q_proj, k_proj, v_proj", "ff_proj, up_proj"):
        # The norm's gain carries what was planted: folding it away undoes that, smoothing flattens the rest.
        assert captured.summary()[kind, "visible"].normal_mean >= 3
        assert folded.summary()[kind, "visible"].normal_mean < 1
        assert crest(captured, kind) > 1.4 * crest(folded, kind)
        assert crest(folded, kind) > 1.4 * crest(smoothed, kind)
    # Neither pass moves anything through attention or a gated product here.
    assert captured.select(kind="attn_out") != []
    for kind in ("attn_out", "ff_out"):
        assert crest(smoothed, kind) == pytest.approx(crest(captured, kind), rel=1e-3)


def test_surfaces_follow_the_worst_sites_of_the_first_stage(found: OutlierStudy) -> None:
    worst = worst_sites(found.stages[0], 2)
    assert [(s.site, s.stage) for s in found.surfaces] == [
        (site, stage.stage) for site in worst for stage in found.stages
    ]
    assert all(s.ratio == 0.5 and int(s.masked.sum()) == 16 for s in found.surfaces)
    assert all(s.values.shape[0] == 32 for s in found.surfaces)


def test_worst_sites_take_every_kind_before_a_second_of_one(found: OutlierStudy) -> None:
    report = found.stages[0]
    kinds = {site.name: site.kind for site in report.sites}
    assert len({kinds[name] for name in worst_sites(report, 5)}) == 5
    top = max(report.cells, key=lambda c: c.crest_median).site
    assert worst_sites(report, 1) == [top]
    assert len(worst_sites(report, 99)) == 17
    assert worst_sites(report, 0) == []


def test_render_has_every_site_and_stage_uncut(found: OutlierStudy) -> None:
    text = found.render()
    assert text.startswith("tiny-llada: 4 rows of 32 tokens from a table, mask ratios 0, 0.5, 1\n")
    for kind in found.stages[0].kinds:
        assert text.count(f"\n{kind} ") == 4  # once a stage, and once in the table by ratio
    assert "…" not in text
    assert text.count("after smooth\n") == 0
    assert "after smooth, over layers and mask ratios:" in text
    summary = found.stages[2].summary()["ff_out", "masked"]
    assert f"{summary.crest_median:.1f} ({summary.crest_low:.1f}-{summary.crest_high:.1f})" in text


def test_plain_data_is_json(found: OutlierStudy) -> None:
    plain = json.loads(json.dumps(found.to_plain(), allow_nan=False))
    assert [OutlierReport.from_plain(stage) for stage in plain["stages"]] == list(found.stages)


def test_without_a_recipe_there_is_one_stage_and_no_pass_runs(twin: torch.nn.Module) -> None:
    seen: list[str] = []
    done = study(twin, IDS[:1], ratios=(0.5,), progress=seen.append)
    assert [stage.stage for stage in done.stages] == seen == ["as captured"]
    assert done.surfaces == ()


@dataclass(frozen=True)
class Prune(Pass):
    """A lossy pass that says nothing about facts."""

    name: ClassVar[str] = "prune"

    def apply(self, graph: Any, ctx: Context) -> PassReport:
        raise AssertionError("not reached")


@dataclass(frozen=True)
class OwnQuantizer(Prune):
    """Gives no fact that dlqc knows, but ends one."""

    name: ClassVar[str] = "own_quantizer"
    invalidates: ClassVar[frozenset[str]] = frozenset({"float-weights"})


@pytest.mark.parametrize(
    ("passes", "kept"),
    [
        ((*STEPS, QuantizeWeights(4, 128), Pack()), STEPS),
        ((*STEPS, QuantizeActivations(), Smooth()), STEPS),
        ((FoldNormScale(), Calibrate(), QuantizeWeights(4, 128)), (FoldNormScale(),)),
        ((FoldNormScale(), Prune(), Smooth(), Prune()), (FoldNormScale(), Prune(), Smooth())),
        ((FoldNormScale(), OwnQuantizer(), Smooth()), (FoldNormScale(),)),
    ],
    ids=["weights", "activations", "calibrate-last", "own", "own-quantizer"],
)
def test_passes_up_to_the_last_exact_one(passes: tuple[Pass, ...], kept: tuple[Pass, ...]) -> None:
    assert _transforms(Recipe("r", passes)).passes == kept


def test_a_recipe_without_transforms_is_refused(twin: torch.nn.Module) -> None:
    with pytest.raises(FeasibilityError) as caught:
        study(twin, IDS, recipe="w4a16-rtn")
    assert str(caught.value) == (
        "recipe: recipe 'w4a16-rtn' transforms nothing before it quantizes, so there is no before and after. "
        "Leave the recipe out, or use one that has fold_norm_scale or smooth"
    )


def test_ratios_are_checked_before_any_work() -> None:
    with pytest.raises(FeasibilityError, match="a mask ratio of -1 is no share"):
        study(torch.nn.Identity(), IDS, ratios=(-1,))


def test_surfaces_prefer_states_that_are_partly_masked() -> None:
    assert _surface_ratio((0.0, 0.25, 0.5, 1.0)) == 0.5
    assert _surface_ratio((0.0, 0.9, 1.0)) == 0.9
    assert _surface_ratio((0.0,)) == 0.0
