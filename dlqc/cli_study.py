"""`dlqc study`: a grid of recipes on models and tasks, from a file. `dlqc finetune`: recover what one of them cost.
`dlqc lm-eval`: tasks of EleutherAI's harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dlqc.cli_common import (
    Backend,
    Bidirectional,
    Folder,
    Json,
    MaskId,
    SamplerText,
    Source,
    Trust,
    load_any,
    load_original,
    print_json,
    screen,
)


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


def finetune_command(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")],
    text: Annotated[Path, typer.Option(help="text file to learn from; an eighth of its rows is set aside to judge by")],
    teacher: Annotated[
        str | None, typer.Option(help="the model before quantization, to learn from its probabilities, too")
    ] = None,
    learn: Annotated[str, typer.Option(help="codes (and scales), scales, or lora: a correction of low rank")] = "codes",
    steps: Annotated[int, typer.Option(help="steps of Adam")] = 100,
    batch: Annotated[int, typer.Option(help="rows a step")] = 8,
    lr: Annotated[float | None, typer.Option(help="learning rate; one that needs no search where absent")] = None,
    distill: Annotated[
        float | None, typer.Option(help="share of the teacher in the loss, 0 to 1; 0.5 with a teacher")
    ] = None,
    rank: Annotated[int, typer.Option(help="of corrections, for lora")] = 16,
    dtype: Annotated[str, typer.Option(help="of their factors: bfloat16, float16 or int8")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="of rows and masks")] = 0,
    backend: Backend = "auto",
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Fine-tune an artifact with the masked-diffusion loss, and save it as another."""
    from dlqc.artifact import load, refuse_foreign
    from dlqc.finetune import Finetune, finetune

    chosen = cast(Any, learn)
    how = Finetune(chosen, steps, batch, lr, distill, rank, dtype, seed=seed)
    refuse_foreign(out)
    start = load(folder, backend=backend)
    known = load_original(teacher, trust_remote_code, bidirectional) if teacher else None

    def tell(step: int, loss: float) -> None:
        typer.echo(f"step {step}: loss {loss:.4f} on the rows set aside", err=True)

    made = finetune(start, text, how, teacher=cast(Any, known), tell=tell)
    saved = made.save(out)
    if as_json:
        told = {"folder": str(saved.folder), "files": saved.files, "reload_deviation": saved.reload_deviation}
        print_json(made.report.to_plain() | told)
        return
    screen.print(made.explain(), highlight=False, markup=False)
    screen.print(
        f"saved {saved.folder} ({saved.bytes / 1e6:.2f} MB); deviation after reloading {saved.reload_deviation:.1e}"
    )


def lm_eval_command(
    model: Source,
    tasks: Annotated[str, typer.Option(help="names of the harness, with commas")],
    shots: Annotated[int | None, typer.Option(help="examples in the prompts; QDLM's where absent")] = None,
    limit: Annotated[int | None, typer.Option(help="documents of each task at most")] = None,
    include: Annotated[Path | None, typer.Option(help="folder of further task files")] = None,
    mc_num: Annotated[int | None, typer.Option(help="masks an answer; QDLM's where absent")] = None,
    sampler: SamplerText = None,
    cfg_scale: Annotated[float, typer.Option(help="guidance of likelihoods")] = 0.0,
    check_greedy: Annotated[bool, typer.Option("--check-greedy", help="also say which answers are greedy")] = False,
    batch_size: Annotated[int, typer.Option(help="masks a forward")] = 32,
    seed: Annotated[int, typer.Option(help="of masks and noise")] = 0,
    backend: Backend = "auto",
    mask_id: MaskId = None,
    trust_remote_code: Trust = False,
    bidirectional: Bidirectional = False,
    as_json: Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness; needs dlqc[lm-eval]."""
    from dlqc.integrations.lm_eval import evaluate, need_lm_eval
    from dlqc.models.describe import spec_of

    need_lm_eval()
    manager = None
    if include is not None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(include))
    loaded = load_any(model, backend, trust_remote_code, bidirectional)
    options: dict[str, Any] = {"sampler": sampler, "mc_num": mc_num, "cfg_scale": cfg_scale, "seed": seed}
    options |= {"check_greedy": check_greedy, "batch_size": batch_size, "spec": spec_of(loaded, mask_id=mask_id)}
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = evaluate(loaded, names, shots=shots, limit=limit, task_manager=manager, **options)
    if as_json:
        print_json(found)
        return
    for task, metrics in found.items():
        for name, value in metrics.items():
            screen.print(f"{task}  {name}  {value}", highlight=False, markup=False)
