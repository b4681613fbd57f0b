"""A study from file to findings: what is refused, what is kept, what is measured, and where."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlqc.capture import Captured
from dlqc.cli import main
from dlqc.errors import ArtifactError, FeasibilityError, LoweringError, RecipeError
from dlqc.graph import copy_graph
from dlqc.study import cell as cell_module
from dlqc.study.cell import cells_of
from dlqc.study.figure import study_figure
from dlqc.study.run import run_study
from dlqc.study.spec import read_study
from dlqc.study.spread import spread

MINI: dict[str, Any] = {
    "name": "mini",
    "models": {"base": {"source": "tiny-llada"}},
    "grids": [{"bits": ["w4a16", "w2a16"], "methods": ["rtn"]}],
    "tasks": {
        "text": {"kind": "nll", "rows": 2, "length": 16},
        "next": {"kind": "choice", "items": 2, "choices": 2, "prompt": 4, "answer": 2, "mc_num": 1},
        "back": {"kind": "exact_match", "category": "code", "tasks": ["rev"], "items": 4},
    },
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(MINI | changes, sort_keys=False))
    return path


def fake(job: dict[str, Any]) -> dict[str, Any]:
    """A result without a model: worse with fewer bits."""
    calls.append(job)
    plain = json.dumps(job["recipe"])
    worse = 0.1 * ("bits" in plain and '"bits": 2' in plain)
    if '"bits": 3' in plain:
        return {"refused": "blocks.0: no such kernel. Use another"}
    text = {"category": "general", "kind": "nll", "values": [2.0 + worse, 3.0 + worse], "kl": [worse, worse]}
    return {
        "tasks": {
            "text": text,
            "next": {"category": "general", "kind": "choice", "values": [1, 0]},
            "back": {"category": "code", "kind": "exact_match", "values": [1, 1, 0, 0 if worse else 1]},
        },
        "bits_per_weight": 4.0,
        "kept": [],
        "seconds": {"compile": 1.0, "measure": 1.0},
    }


calls: list[dict[str, Any]] = []


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls.clear()
    monkeypatch.setattr("dlqc.study.run.measure", fake)
    return calls


def test_a_study_is_measured_once(tmp_path: Path, faked: list[dict[str, Any]]) -> None:
    study = read_study(written(tmp_path))
    summary = run_study(study, tmp_path / "out")
    assert len(faked) == 3
    first = (tmp_path / "out" / "study.json").read_text()
    said: list[str] = []
    again = run_study(study, tmp_path / "out", tell=said.append)
    assert (len(faked), said) == (3, ["3 of 3 cells are measured already"])
    assert (tmp_path / "out" / "study.json").read_text() == first
    assert again.to_plain() == summary.to_plain()
    assert (tmp_path / "out" / "study.md").read_text() == summary.render()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_changed_settings_make_new_cells(tmp_path: Path, faked: list[dict[str, Any]]) -> None:
    study = read_study(written(tmp_path))
    run_study(study, tmp_path / "out")
    before = {cell.key for cell in cells_of(study)}
    for change in (
        {"seed": 1},
        {"tasks": MINI["tasks"] | {"text": {"kind": "nll", "rows": 3, "length": 16}}},
        {"grids": [{"bits": ["w4a16", "w2a16"], "methods": ["rtn"], "recipes": {"rtn": "{bits}-sym-rtn"}}]},
    ):
        other = read_study(written(tmp_path, **change))
        # The reference has no recipe, so another recipe leaves it as it is.
        assert len({cell.key for cell in cells_of(other)} & before) == ("grids" in change), change
    faked.clear()
    run_study(other, tmp_path / "out")
    assert len(faked) == 2


def test_an_interrupted_study_goes_on(
    tmp_path: Path, faked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(job: dict[str, Any]) -> dict[str, Any]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fake(job)

    monkeypatch.setattr("dlqc.study.run.measure", stopped)
    study = read_study(written(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2
    assert not (tmp_path / "out" / "study.json").exists()
    monkeypatch.setattr("dlqc.study.run.measure", fake)
    run_study(study, tmp_path / "out")
    assert len(faked) == 3, "the two that were finished are not measured again"


def test_a_refused_cell_is_listed_and_tried_again(tmp_path: Path, faked: list[dict[str, Any]]) -> None:
    study = read_study(written(tmp_path, grids=[{"bits": ["w4a16", "w3a16"], "methods": ["rtn"]}]))
    for count in (3, 4):
        summary = run_study(study, tmp_path / "out")
        assert len(faked) == count
    assert summary.refused == {("base", "w3a16", "rtn"): "blocks.0: no such kernel. Use another"}
    assert "Refused: base w3a16 rtn: blocks.0: no such kernel. Use another" in summary.render()
    assert [row.place for row in summary.rows] == [("base", "w4a16", "rtn")]


def test_a_damaged_cell_is_refused(tmp_path: Path, faked: list[dict[str, Any]]) -> None:
    study = read_study(written(tmp_path))
    run_study(study, tmp_path / "out")
    path = next((tmp_path / "out" / "cells").glob("*w4a16*"))
    whole = path.read_text()
    for damage, reason in (
        (whole[:-9], "JSONDecodeError"),
        (whole.replace('"seed": 0', '"seed": 5'), "its settings are not those of its name"),
        ("[]", "TypeError"),
    ):
        path.write_text(damage)
        with pytest.raises(ArtifactError, match=reason) as error:
            run_study(study, tmp_path / "out")
        assert str(error.value).startswith(str(path))
        assert error.value.remedy == "Delete it to measure it again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": [4]}, "bits: Extra inputs are not permitted"),
        ({"models": {}}, "models: Dictionary should have at least 1 item after validation, not 0"),
        ({"models": {"a/b": {"source": "tiny-llada"}}}, "models.a/b"),
        ({"grids": [{"bits": ["w4a16"], "methods": []}]}, "grids.0.methods: Tuple should have at least 1 item"),
        ({"grids": [{"bits": ["w4a16"], "methods": ["gptqq"]}]}, "unknown recipe 'w4a16-gptqq'"),
        ({"grids": [{"bits": ["w4a16"], "methods": ["rtn"], "recipes": {"rtm": "x"}}]}, "Did you mean 'rtn'?"),
        ({"grids": [{"bits": ["w4a16"], "methods": ["rtn"]}] * 2}, "w4a16 by rtn is in two grids. Leave it out of one"),
        ({"tasks": {"x": {"kind": "nnl"}}}, "tasks.x"),
        ({"tasks": {"x": {"kind": "nll", "rows": 1}}}, "rows: Input should be greater than or equal to 2"),
        (
            {"tasks": {"x": {"kind": "exact_match", "tasks": ["adds"]}}},
            "tasks.x: 'adds' is no task. Did you mean 'add'?",
        ),
        ({"backend": "referense"}, "backend: unknown backend 'referense'. Did you mean 'reference'?"),
        ({"text": "no.txt"}, "text: there is no file 'no.txt'. Give a path relative to the study file"),
    ],
)
def test_what_a_study_file_may_not_say(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_study(written(tmp_path, **changes))
    assert message in str(error.value)


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read \(No such file or directory\)\. Name a YAML file"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_study(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("[]")
    with pytest.raises(RecipeError, match=r"list\.yaml: Input should be a valid dictionary"):
        read_study(tmp_path / "list.yaml")


def test_the_command_and_the_figure(
    tmp_path: Path, faked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    arguments = ["dlqc", "study", str(path), "-o", str(tmp_path / "out"), "--figures"]
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", arguments + extra)
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        printed = capsys.readouterr()
    assert "3 of 3 cells are measured already" in printed.err
    plain = json.loads(printed.out)
    assert plain["figures"] == [str(tmp_path / "out" / "study.png")]
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert [cell["class"] for cell in plain["cells"]] == ["under 1 %", "over 4 %"]
    assert {f["finding"].partition(":")[0] for f in plain["findings"]} == {"bit-width", "method", "task", "model type"}
    figure = study_figure(run_study(read_study(path), tmp_path / "out"))
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["w4a16\nrtn", "w2a16\nrtn"]
    assert ax.get_legend_handles_labels()[1] == ["general", "code"]
    monkeypatch.setattr("dlqc.figures.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main()
    assert "figures: matplotlib is not installed" in capsys.readouterr().err


def test_the_example_is_a_study() -> None:
    study = read_study(Path(__file__).parents[2] / "examples" / "study.yaml")
    assert len(study.recipes()) == 12
    assert {task.category for task in study.tasks.values()} == {"general", "math", "code"}


class Absent:
    def available(self) -> str:
        return "it is away"


def test_engines_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"jobs": 0}, "jobs: 0 processes are none. Use 1 or more"),
        ({"jobs": 2, "ray": "local"}, "jobs: Ray and processes of its own do not go together. Leave one out"),
    ):
        with pytest.raises(FeasibilityError) as error:
            list(spread(fake, [], **options))  # type: ignore[arg-type]
        assert str(error.value) == message
    monkeypatch.setattr("dlqc.study.spread.find_spec", lambda name: None)
    with pytest.raises(FeasibilityError) as error:
        run_study(read_study(written(tmp_path)), tmp_path / "out", ray="auto")
    assert str(error.value) == "ray: ray is not installed. Install it with: pip install 'dlqc[ray]', or use --jobs"
    monkeypatch.setattr("dlqc.backends.reference.BACKEND", Absent())
    with pytest.raises(LoweringError, match="backend 'reference' cannot run here: it is away"):
        run_study(read_study(written(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "refused before any work"


def test_a_folder_that_cannot_be_written(tmp_path: Path, faked: list[dict[str, Any]]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be made"):
        run_study(read_study(written(tmp_path)), tmp_path / "file" / "out")
    assert faked == []


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    """`eval` is a function that every process finds, as it finds `measure`. The third job dies, when the others are done."""
    jobs: Any = ["[2 * 3]", "[__import__('os').getpid(), __import__('torch').get_num_threads()]"]
    here = dict(spread(eval, jobs))
    go = tmp_path / "go"
    waited = (
        f"all(not __import__('time').sleep(0.02) for _ in iter(__import__('pathlib').Path({str(go)!r}).exists, True))"
    )
    found = spread(eval, [*jobs, f"{waited} and __import__('os')._exit(1)"], jobs=2)  # type: ignore[list-item]
    there = dict([next(found), next(found)])
    go.touch()
    assert here[0] == there[0] == [6]
    assert here[1][0] == os.getpid() != there[1][0]
    assert there[1][1] == max(1, (os.cpu_count() or 1) // 2)
    with pytest.raises(FeasibilityError) as error:
        next(found)
    assert str(error.value) == (
        "jobs: a process died, perhaps for lack of memory. Run it again with fewer jobs; cells that were finished are kept"
    )


def test_a_local_ray_cluster() -> None:
    pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = spread(lambda job: {"x": job["x"] ** 2}, [{"x": 3}, {"x": 4}], ray="local")
        assert dict(found) == {0: {"x": 9}, 1: {"x": 16}}


def test_a_real_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, but everything is real: compiled, measured on all three kinds of task, summed up.

    Half of the time is capture, which sees the same model twice: here once.
    """
    honest, kept = sys.modules["dlqc.compile"].capture, []  # type: ignore[attr-defined]

    def once(*args: Any) -> Captured:
        kept.append(kept[0] if kept else honest(*args))
        return dataclasses.replace(kept[0], graph=copy_graph(kept[0].graph), weights=kept[0].weights.clone())

    monkeypatch.setattr(sys.modules["dlqc.compile"], "capture", once)
    study = read_study(written(tmp_path, grids=[{"bits": ["w2a16"], "methods": ["rtn"]}]))
    summary = run_study(study, tmp_path / "out")
    (row,) = summary.rows
    assert row.kl is not None
    assert 0.1 < row.kl.mean < 1
    assert row.bits_per_weight == pytest.approx(2.14, abs=0.1)
    assert set(row.by_category) <= {"general", "code"}
    assert summary.scores["base", "back"].mean >= 0.5
    plain = summary.to_plain()
    assert plain["findings"][3]["verdict"] == "not covered by this grid"
    assert len(kept) == 2
    cell_module._reference.cache_clear()
