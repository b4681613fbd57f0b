"""The command line: compile, plan, recommend, generate, eval, lm-eval, bisect, study, finetune, report, explain, export, verify,
doctor.

Every verb takes `--json` and then prints one JSON object and nothing else. An error is one line on the error stream and exit
status 2; it says what, where, why and what to do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dlqc.cli_common import (
    Backend,
    Bidirectional,
    Folder,
    Json,
    MaskId,
    Original,
    RecipeOption,
    SamplerText,
    Source,
    Trust,
    screen,
)
from dlqc.cli_common import load_any as _any
from dlqc.cli_common import load_original as _model
from dlqc.cli_common import print_json as _print_json
from dlqc.cli_study import finetune_command, lm_eval_command, study_command
from dlqc.errors import DlqcError, FeasibilityError, ModelError, RecipeError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command("compile")
def compile_command(
    model: Original,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")],
    recipe: RecipeOption = "w4a16-gptq",
    text: Annotated[str | None, typer.Option(help="calibration text file; without it the model's own rollouts")] = None,
    backend: Backend = "auto",
    mask_id: MaskId = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    dump: Annotated[Path | None, typer.Option(help="folder for the graph after every pass")] = None,
    as_json: Json = False,
) -> None:
    """Compile a model and save the artifact."""
    from dlqc.artifact import refuse_foreign
    from dlqc.compile import compile
    from dlqc.instruments import Dump

    refuse_foreign(out)
    instruments = (Dump(dump),) if dump else ()
    compiled = compile(
        _model(model, trust_remote_code, bidirectional),
        recipe,
        calibration=Path(text) if text else None,
        backend=backend,
        mask_id=mask_id,
        seed=seed,
        progress=not as_json,
        instruments=instruments,
    )
    saved = compiled.save(out)
    if as_json:
        _print_json(compiled.report.to_plain() | {"folder": str(saved.folder), "files": saved.files})
        return
    screen.print(compiled.explain(), highlight=False)
    screen.print(
        f"saved {saved.folder} ({saved.bytes / 1e6:.2f} MB); reloaded in a fresh process, deviation {saved.reload_deviation:.1e}"
    )


@app.command()
def plan(
    model: Original,
    recipe: RecipeOption = "w4a16-gptq",
    backend: Backend = "auto",
    mask_id: MaskId = None,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Say what compiling would do, without touching a weight: sites, sizes, kernels, problems."""
    from dlqc.planning import plan_report

    found = plan_report(
        _model(model, trust_remote_code, bidirectional, meta=True), recipe, backend=backend, mask_id=mask_id
    )
    if as_json:
        _print_json(found.to_plain())
    else:
        screen.print(found.render(), highlight=False)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def generate(
    model: Source,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    sampler: SamplerText = None,
    length: Annotated[int | None, typer.Option(help="tokens to generate; 64 without --sampler")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; 64 without --sampler")] = None,
    block: Annotated[int | None, typer.Option(help="block length of semi-autoregressive decoding")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    show: Annotated[bool, typer.Option("--stream", help="print the tokens of every step as they are fixed")] = False,
    seed: Annotated[int, typer.Option(help="of all noise")] = 0,
    backend: Backend = "auto",
    mask_id: MaskId = None,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Write text by denoising."""
    from dlqc.diffusion.denoising import Commit
    from dlqc.diffusion.generate import generate as run
    from dlqc.models.describe import spec_of
    from dlqc.models.load import load_tokenizer

    loaded = _any(model, backend, trust_remote_code, bidirectional)
    spec = spec_of(loaded, mask_id=mask_id)
    given = {"gen_length": length, "steps": steps, "block_length": block, "temperature": temperature}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if sampler is None:
        options = {"gen_length": 64, "steps": 64} | options
    words = load_tokenizer(loaded)

    def say(commit: Commit) -> None:
        token = commit.token if words is None else words.decode([commit.token])
        screen.print(f"{commit.step:4d}  {commit.position:4d}  {commit.confidence:8.4f}  {token}", markup=False)

    made = run(
        loaded,
        prompt,
        sampler=sampler,
        spec=spec,
        seed=seed,
        progress=not (as_json or show) and sys.stderr.isatty(),
        on_commit=say if show and not as_json else None,
        **options,
    )
    if as_json:
        facts = {
            "nfe": made.nfe,
            "tokens_per_forward": made.tokens_per_forward,
            "seconds": made.seconds,
            "cache_bytes": made.cache_bytes,
        }
        _print_json({"text": made.text, "ids": list(made.ids)} | facts)
        return
    screen.print(made.text, highlight=False, markup=False)
    screen.print(
        f"{made.nfe} forwards, {made.tokens_per_forward:.2f} tokens per forward, {made.seconds:.2f} s", style="dim"
    )


@app.command("eval")
def eval_command(
    model: Source,
    against: Annotated[str | None, typer.Option(help="reference model for paired differences and KL")] = None,
    text: Annotated[Path | None, typer.Option(help="text file; the bundled evaluation tales where absent")] = None,
    rows: Annotated[int, typer.Option(min=2, help="rows of text at most")] = 64,
    length: Annotated[int, typer.Option(min=8, help="tokens a row, the model's maximum at most")] = 128,
    tasks: Annotated[int, typer.Option(help="items per generated task, 0 for none")] = 0,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="also compare denoising runs; needs --against")
    ] = False,
    prompts: Annotated[int, typer.Option(min=2, help="rows whose beginnings are continued, for --trajectory")] = 16,
    sampler: SamplerText = None,
    seed: Annotated[int, typer.Option(help="of masks, items and noise")] = 0,
    backend: Backend = "auto",
    mask_id: MaskId = None,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Masked NLL by mask ratio, with intervals; with --against also KL and agreement, and --trajectory how runs go apart."""
    from dlqc.diffusion.registry import as_sampler
    from dlqc.evaluate import comparison_table, evaluate, rows_to_measure
    from dlqc.models.describe import spec_of
    from dlqc.models.load import load_tokenizer

    if trajectory and against is None:
        raise FeasibilityError(
            "a trajectory is compared with another model's", where="trajectory", remedy="Name the model with --against"
        )
    if sampler is not None and not trajectory:
        raise FeasibilityError("only trajectories are sampled", where="sampler", remedy="Add --trajectory")
    loaded = _any(model, backend, trust_remote_code, bidirectional)
    spec, tokenizer = spec_of(loaded, mask_id=mask_id), load_tokenizer(loaded)
    decoding = as_sampler(sampler, spec) if sampler else None
    ids = rows_to_measure(tokenizer, spec, text, length=length)[:rows]
    columns = {}
    reference = _any(against, backend, trust_remote_code, bidirectional) if against else None
    options: dict[str, Any] = {"tokenizer": tokenizer, "task_items": tasks, "seed": seed}
    if reference is not None and against is not None:
        columns[against] = evaluate(reference, ids, spec, **options)
    baseline = next(iter(columns.values()), None)
    options |= {"prompts": prompts if trajectory else 0, "sampler": decoding}
    columns[model] = evaluate(loaded, ids, spec, reference=reference, baseline=baseline, **options)
    if as_json:
        _print_json({name: e.to_plain() for name, e in columns.items()})
    else:
        screen.print(comparison_table(columns))


@app.command("bisect")
def bisect_command(
    model: Source,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="what to look into; an artifact brings its own")
    ] = None,
    against: Annotated[str | None, typer.Option(help="the original of an artifact")] = None,
    text: Annotated[str | None, typer.Option(help="calibration text file; without it the model's own rollouts")] = None,
    data: Annotated[
        Path | None, typer.Option(help="text to measure on; the bundled evaluation tales if absent")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="KL in nats that a recipe may cost")] = 0.01,
    worst: Annotated[int, typer.Option(help="blocks whose linears are looked at one by one")] = 1,
    rows: Annotated[int, typer.Option(min=2, help="rows of text at most")] = 8,
    length: Annotated[int, typer.Option(min=8, help="tokens a row, the model's maximum at most")] = 128,
    seed: Annotated[int | None, typer.Option(help="of everything random; an artifact brings its own")] = None,
    backend: Backend = "auto",
    mask_id: MaskId = None,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Name the pass and the layers behind a drop in quality."""
    from dlqc.artifact import read_report
    from dlqc.bisect import bisect
    from dlqc.evaluate import rows_to_measure
    from dlqc.models.describe import spec_of
    from dlqc.models.load import load_tokenizer

    artifact = (Path(model) / "manifest.json").is_file()
    if artifact and (against is None or recipe is not None):
        raise FeasibilityError(
            "an artifact brings its recipe, and not its original",
            where=model,
            remedy="Name the original with --against, and leave --recipe out",
        )
    passes: Any = recipe
    made: Any = None
    if artifact:
        made = _any(model, backend)
        passes = made.recipe
        seed = read_report(Path(model)).seed if seed is None else seed
    elif recipe is None:
        raise FeasibilityError("no recipe was named", where="recipe", remedy="Add --recipe, such as -r w4a16-rtn")
    original = _model(against if artifact and against else model, trust_remote_code, bidirectional)
    ids = rows_to_measure(load_tokenizer(original), spec_of(original, mask_id=mask_id), data, length=length)[:rows]
    found = bisect(
        original,
        passes,
        ids,
        tolerance=tolerance,
        worst=worst,
        calibration=Path(text) if text else None,
        backend=backend,
        mask_id=mask_id,
        seed=seed or 0,
        tuned=made,
    )
    if as_json:
        _print_json(found.to_plain())
    else:
        screen.print(found.render(), highlight=False)


@app.command()
def report(
    model: Original,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="measure outliers at the inputs of linears; this or --pareto is needed")
    ] = False,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="bits against quality: the best assignments of widths, for every budget")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="outliers: measure again after each of its transforms, before it quantizes; "
            "pareto: a recipe with assign_bits, w3.2a16-mixed-gptq where absent",
        ),
    ] = None,
    measure: Annotated[int, typer.Option(min=0, help="pareto: so many assignments are rounded and measured")] = 0,
    text: Annotated[str | None, typer.Option(help="calibration text file, for recipes that calibrate")] = None,
    data: Annotated[
        Path | None, typer.Option(help="text to measure on; the bundled evaluation tales where absent")
    ] = None,
    ratios: Annotated[str, typer.Option(help="mask ratios, with commas")] = "0,0.25,0.5,0.75,1",
    rows: Annotated[int, typer.Option(min=1, help="rows of text at most; they run as one batch")] = 16,
    length: Annotated[int, typer.Option(min=8, help="tokens a row, the model's maximum at most")] = 128,
    figures: Annotated[Path | None, typer.Option(help="folder for figures (PNG); needs dlqc[plots]")] = None,
    seed: Annotated[int, typer.Option(help="of masks and calibration")] = 0,
    mask_id: MaskId = None,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Measure a model: outliers before and after the transforms of a recipe, or bits against quality.

    What was done to a saved one, `explain` tells.
    """
    from dlqc.models.describe import spec_of
    from dlqc.models.load import load_tokenizer

    if outliers == pareto:
        raise FeasibilityError(
            "two things to measure were named" if outliers else "nothing to measure was named",
            where="report",
            remedy="Add --outliers or --pareto; for what the passes did to a saved model, use dlqc explain",
        )
    if (Path(model) / "manifest.json").is_file():
        raise ModelError(
            "is an artifact, quantized already",
            where=model,
            remedy="Give the original model, and the recipe with --recipe",
        )
    from dlqc.evaluate import bundled_text, rows_to_measure
    from dlqc.figures import need_matplotlib, save_figures, save_pareto
    from dlqc.outlier_study import study
    from dlqc.pareto import pareto as find_pareto

    levels = _numbers(ratios, "--ratios")
    if figures is not None:
        need_matplotlib()
    loaded = _model(model, trust_remote_code, bidirectional)
    ids = rows_to_measure(load_tokenizer(loaded), spec_of(loaded, mask_id=mask_id), data, length=length)[:rows]
    same: dict[str, Any] = {"calibration": Path(text) if text else None, "mask_id": mask_id, "seed": seed}
    if pareto:
        frontier = find_pareto(loaded, recipe or "w3.2a16-mixed-gptq", measure=measure, rows=ids, **same)
        paths = [] if figures is None else save_pareto(frontier, figures)
        _print_report(frontier, paths, as_json)
        return
    found = study(
        loaded,
        ids,
        recipe=recipe,
        ratios=levels,
        surfaces=0 if figures is None else 2,
        source=(data or bundled_text("eval")).name,
        backend="reference",
        **same,
    )
    _print_report(found, [] if figures is None else save_figures(found, figures), as_json)


def _print_report(found: Any, drawn: list[Path], as_json: bool) -> None:
    """A report as text or as JSON, with the figures that were drawn."""
    if as_json:
        _print_json(found.to_plain() | {"figures": [str(path) for path in drawn]})
        return
    screen.print(found.render(), highlight=False, markup=False)
    for path in drawn:
        screen.print(f"wrote {path}", highlight=False, markup=False)


@app.command("recommend")
def recommend_command(
    model: Original,
    scenario: Annotated[str, typer.Option(help="general, quality, math-code, extreme or edge")] = "general",
    text: Annotated[str | None, typer.Option(help="text file to try on; without it the model's own rollouts")] = None,
    tolerance: Annotated[float | None, typer.Option(help="largest KL, nats per masked token")] = None,
    probe: Annotated[str, typer.Option(help="compile, sites (an estimate, for large models) or auto")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="recipe file to write, .yaml")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    mask_id: MaskId = None,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Print the recipe for a purpose, tried on the model, with its reasons; `compile --recipe` takes what is printed."""
    from dlqc.recommend import recommend

    if out is not None and (out.suffix not in (".yaml", ".yml") or not out.parent.is_dir()):
        raise RecipeError("cannot hold a recipe", where=str(out), remedy="Name a .yaml file in a folder that exists")
    loaded = _model(model, trust_remote_code, bidirectional)
    calibration = Path(text) if text else None
    options: Any = {"tolerance": tolerance, "probe": probe, "mask_id": mask_id, "seed": seed}
    if sys.stderr.isatty():
        options["progress"] = lambda name: typer.echo(f"trying {name}", err=True)
    found = recommend(loaded, scenario, calibration=calibration, **options)
    if out is not None:
        out.write_text(found.render(), encoding="utf-8")
    if as_json:
        _print_json(found.to_plain())
    else:
        typer.echo(found.render())


@app.command()
def explain(folder: Folder, as_json: Json = False) -> None:
    """Print what the passes did to a saved model."""
    from dlqc.artifact import read_report

    report = read_report(folder)
    if as_json:
        _print_json(report.to_plain())
    else:
        screen.print(report.render(), highlight=False, markup=False)


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")],
    format: Annotated[str, typer.Option("--format", "-f", help="compressed-tensors")] = "compressed-tensors",
    as_json: Json = False,
) -> None:
    """Write a saved model in another engine's format."""
    from dlqc.artifact import load
    from dlqc.export import export as write

    files = write(load(folder, backend="reference"), out, format=format)
    if as_json:
        _print_json({"folder": str(out), "files": files})
    else:
        screen.print(f"wrote {out} ({sum(files.values()) / 1e6:.2f} MB): {', '.join(files)}", highlight=False)


@app.command()
def verify(folder: Folder, backend: Backend = "auto", as_json: Json = False) -> None:
    """Check an artifact: hashes, shapes, the graph law, and the backend against the reference."""
    from dlqc.artifact import verify as check

    found = check(folder, backend=backend)
    if as_json:
        _print_json(found)
    else:
        for line in found["checks"]:
            screen.print(f"ok  {line}", highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has: versions, backends, kernels, and why one is missing."""
    from dlqc.doctor import examine

    found = examine()
    if as_json:
        _print_json(found)
        return
    for section, facts in found.items():
        screen.print(section, style="bold")
        for key, value in facts.items():
            screen.print(f"  {key}: {value}", highlight=False, markup=False)


def _numbers(text: str, where: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise FeasibilityError(
            f"cannot read {text!r}", where=where, remedy="Write numbers with commas, such as 0,0.5,1"
        ) from None


app.command("study")(study_command)
app.command("finetune")(finetune_command)
app.command("lm-eval")(lm_eval_command)


def main() -> None:
    """Entry point of the `dlqc` command."""
    try:
        app()
    except DlqcError as error:
        typer.echo(f"error: {error}", err=True)
        for note in getattr(error, "__notes__", []):
            typer.echo(f"  {note}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
