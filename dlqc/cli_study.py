"""`dlqc study`: a grid of recipes on models and tasks, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlqc.cli_common import Json, print_json, screen


def study_command(
    file: Annotated[Path, typer.Argument(help="a study file, such as examples/study.yaml")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for cells, study.json and study.md")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="processes that measure at the same time")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="measure on a Ray cluster: local, auto or its address; needs dlqc[ray]")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="also draw study.png; needs dlqc[plots]")] = False,
    as_json: Json = False,
) -> None:
    """Measure bit-widths × methods × tasks × models; run it again after an interruption, and it goes on."""
    from dlqc.figures import need_matplotlib
    from dlqc.study.figure import save_study
    from dlqc.study.run import run_study
    from dlqc.study.spec import read_study

    study = read_study(file)
    if figures:
        need_matplotlib()
    summary = run_study(study, out, jobs=jobs, ray=ray, tell=lambda line: typer.echo(line, err=True))
    paths = save_study(summary, out) if figures else []
    if as_json:
        print_json(summary.to_plain() | {"figures": [str(path) for path in paths]})
        return
    screen.print(summary.render(), highlight=False, markup=False)
    for path in paths:
        screen.print(f"wrote {path}", highlight=False, markup=False)
