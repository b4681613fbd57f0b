"""Figures are drawn from what was measured. What they look like was judged by eye; here, that they show the numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dlqc import figures
from dlqc.errors import ArtifactError, FeasibilityError
from dlqc.figures import crest_by_stage, layers_by_ratio, save_figures, surfaces_of
from dlqc.outlier_study import OutlierStudy
from dlqc.outliers import Cell, Hits, OutlierReport, Site, Surface, Thresholds

RATIOS = (0.0, 0.5, 1.0)


def report(stage: str = "as captured", layers: int = 3, crest: float = 4.0) -> OutlierReport:
    """Crest of layer i is `crest` + i, doubled for masked rows; a head outside the layers."""
    sites = [Site(f"m.layers.{i}.up", (f"m.layers.{i}.up",), i, "up", 16) for i in range(layers)]
    sites.append(Site("lm_head", ("lm_head",), None, "lm_head", 16))
    cells = [
        cell(site.name, ratio, rows, (crest + (site.layer or 0)) * (2 if rows == "masked" else 1))
        for ratio in RATIOS
        for site in sites
        for rows in ("masked", "visible")
        if (ratio, rows) not in ((0.0, "masked"), (1.0, "visible"))
    ]
    return OutlierReport(stage, RATIOS, (2, 8), Thresholds(), tuple(sites), tuple(cells))


def cell(site: str, ratio: float, rows: Any, crest: float, normal: tuple[int, ...] = (1, 2)) -> Cell:
    none = Hits(0, 0, 0)
    return Cell(site, ratio, rows, 8, 9.0, 1.0, 0.5, crest, crest + 1, 3.0, normal, none, none, 0, 0.5)


def surfaces(stage: str, site: str = "m.layers.0.up") -> Surface:
    values = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    return Surface(stage, site, 0.5, values, torch.arange(8) < 4)


def texts(axes: Any) -> list[str]:
    return [t.get_text() for t in axes.texts]


def test_every_figure_is_a_picture(tmp_path: Path) -> None:
    stages = (report(), report("after smooth(alpha=0.5)", crest=2.0))
    shown = tuple(surfaces(s.stage, site) for site in ("m.layers.0.up", "lm_head") for s in stages)
    paths = save_figures(OutlierStudy("m", "text", stages, shown), tmp_path / "a" / "b")
    # Nothing is massive and nothing spikes, so there are no figures of them.
    names = ["layers-crest.png", "layers-normal.png", "stages-crest.png", "surface-1.png", "surface-2.png"]
    assert [p.name for p in paths] == names
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert 400 < width < 4000
        assert 300 < height < 4000


def test_layers_show_the_measured_numbers() -> None:
    figure = layers_by_ratio((report(), report("after smooth", crest=1.0)), "crest")
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in panels][:1] == ["up"]  # the head has no layer
    # Masked and visible rows of the first stage, then of the second; rows of cells by layer, columns by ratio.
    assert [n for n in texts(panels[0]) if "." in n] == ["8.0", "8.0", "10.0", "10.0", "12.0", "12.0"]
    assert [n for n in texts(panels[3]) if "." in n] == ["1.0", "1.0", "2.0", "2.0", "3.0", "3.0"]
    assert torch.isnan(torch.tensor(panels[0].images[0].get_array().filled(float("nan")))[:, 0]).all()


def test_many_layers_have_no_numbers_in_the_cells() -> None:
    figure = layers_by_ratio((report(layers=40),), "crest")
    assert all(not texts(ax) for ax in figure.axes)
    assert len(figure.axes[0].get_yticks()) <= 10


def test_a_model_without_layers_has_a_figure_too() -> None:
    found = report(layers=0)
    assert layers_by_ratio((found,), "normal").axes[0].get_title() == "lm_head"


def test_one_kind_of_rows_alone_is_enough(tmp_path: Path) -> None:
    found = report()
    only = OutlierReport(
        found.stage, (0.0,), found.states, found.thresholds, found.sites, tuple(found.select(rows="visible", ratio=0.0))
    )
    assert len(save_figures(OutlierStudy("m", "text", (only,)), tmp_path)) == 3


def test_stages_stand_side_by_side() -> None:
    figure = crest_by_stage((report(), report("after smooth", crest=2.0)))
    masked, visible = figure.axes
    assert (masked.get_title(), visible.get_title()) == ("masked rows", "visible rows")
    first, second = (c.lines[0].get_ydata().tolist() for c in visible.containers)
    assert (first, second) == ([5.0, 4.0], [3.0, 2.0])
    assert [t.get_text() for t in figure.legends[0].texts] == ["as captured", "after smooth"]


def test_a_wide_surface_keeps_its_largest_channel() -> None:
    values = torch.full((4, 5000), 0.1)
    values[2, 4321] = 77.0
    figure = surfaces_of([Surface("as captured", "x", 0.5, values, torch.zeros(4, dtype=torch.bool))])
    shown = torch.as_tensor(figure.axes[0].images[0].get_array())
    assert shown.shape == (4, 512)
    assert float(shown.max()) == 77.0
    assert figure.axes[0].images[0].get_extent()[1] == 4999.5


def test_a_silent_surface_is_drawn(tmp_path: Path) -> None:
    figure = surfaces_of([Surface("s", "x", 0.5, torch.zeros(4, 8), torch.ones(4, dtype=torch.bool))])
    figure.savefig(tmp_path / "silent.png")


def test_without_matplotlib_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(figures, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    with pytest.raises(FeasibilityError) as caught:
        save_figures(OutlierStudy("m", "text", (report(),)), tmp_path / "f")
    assert str(caught.value) == "figures: matplotlib is not installed. Install it with: pip install 'dlqc[plots]'"
    assert not (tmp_path / "f").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(ArtifactError) as caught:
        save_figures(OutlierStudy("m", "text", (report(),)), tmp_path / "f")
    assert str(caught.value) == (
        f"{tmp_path / 'f'}: the figures cannot be written (File exists). Name a folder that you may write to"
    )
    assert (tmp_path / "f").read_text() == "mine"
