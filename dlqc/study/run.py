"""Running a study: one JSON file a cell, written whole, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlqc.backend import load_backend
from dlqc.errors import ArtifactError
from dlqc.study.cell import Cell, cells_of, measure
from dlqc.study.spec import Study
from dlqc.study.spread import check_engine, spread
from dlqc.study.summary import Measured, Summary, summarize

Tell = Callable[[str], None]


def run_study(
    study: Study, folder: str | Path, *, jobs: int = 1, ray: str | None = None, tell: Tell | None = None
) -> Summary:
    """Measure what is not measured yet, and sum up.

    Args:
        study: what `read_study` gave.
        folder: gets `cells/*.json`, `study.json` and `study.md`. A cell whose settings have not changed since is not measured
            again; files of other settings stay and are not looked at.
        jobs: processes on this machine.
        ray: measure on a Ray cluster instead: "local", or its address.
        tell: called with a line for each cell.

    Raises:
        DlqcError: something named in the study is missing or cannot be; before any work where it can be known.
    """
    check_engine(jobs, ray)
    if ray is None:
        load_backend(study.backend)  # refused here where this machine has it not
    cells, place = cells_of(study), Path(folder) / "cells"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made ({error.strerror or error})"
        raise ArtifactError(what, where=str(place), remedy="Name a folder that you may write to") from error
    found = {cell.key: known for cell in cells if (known := _read(place / cell.file, cell)) is not None}
    todo = [cell for cell in cells if cell.key not in found]
    if tell is not None and len(todo) < len(cells):
        tell(f"{len(cells) - len(todo)} of {len(cells)} cells are measured already")
    for done, (number, result) in enumerate(spread(measure, [c.job for c in todo], jobs=jobs, ray=ray), 1):
        cell = todo[number]
        if "refused" not in result:  # that may have been the machine: the next run tries again
            write_whole(place / cell.file, json.dumps({"key": cell.key, "settings": cell.settings, **result}))
        found[cell.key] = result
        if tell is not None:
            tell(f"{done}/{len(todo)} {cell.label}" + (f": {result['refused']}" if "refused" in result else ""))
    summary = summarize(study, [Measured(cell, found[cell.key]) for cell in cells])
    write_whole(Path(folder) / "study.json", json.dumps(summary.to_plain(), indent=1) + "\n")
    write_whole(Path(folder) / "study.md", summary.render())
    return summary


def _read(path: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell that was measured with these settings; None where there is none."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["settings"] == cell.settings and data["tasks"].keys() == cell.settings["tasks"].keys():
            return dict(data)
        reason = "its settings are not those of its name"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ArtifactError(f"is no cell of a study ({reason})", where=str(path), remedy="Delete it to measure it again")


def write_whole(path: Path, text: str) -> None:
    """Write a file beside the old one, then put it in its place: an interruption leaves one of the two whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise ArtifactError(
            what, where=str(path), remedy="Free space; cells that were finished before are kept"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
