"""`compile`: model in, optimized module out. The file to read first.

check order → capture → check feasibility → check against eager → passes, the law after each → runnable module
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import fx, nn

from dlqc.backend import Backend, load_backend
from dlqc.calibration import TokenRows, rows_from
from dlqc.capture import CaptureCheck, Captured, capture, verify
from dlqc.check import check
from dlqc.compiled import Compiled
from dlqc.contract import FACTS_OF_CAPTURE, Context, Pass, Plan
from dlqc.diffusion.fidelity import fidelity
from dlqc.diffusion.masking import device_of
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ModelError
from dlqc.execute import forward
from dlqc.graph import ACT_QUANTIZERS, HEAD_QUANTIZERS, copy_graph, is_call
from dlqc.instruments import Timing
from dlqc.manager import Instrument, PassManager
from dlqc.manager import Progress as Tick
from dlqc.models.describe import spec_of
from dlqc.models.load import check_finite, load_model, load_tokenizer
from dlqc.ops import ATTENTION
from dlqc.recipe import Recipe, _line, as_recipe
from dlqc.report import Report, Step, measure_storage, versions
from dlqc.weights import Weights

#: Models with more parameters than this are not run again for the report's fidelity; `dlqc eval --against` does it.
_MEASURE_BELOW = 1 << 28
_MEASURE_ROWS = 8
_MEASURE_RATIOS = (0.25, 0.5, 0.75)

Text = str | Path | Sequence[str] | torch.Tensor


def compile(
    model: nn.Module | str | Path,
    passes: str | Path | Recipe | Pass | Sequence[Pass] = "w4a16-gptq",
    *,
    calibration: Text | None = None,
    backend: str = "auto",
    mask_id: int | None = None,
    seed: int = 0,
    progress: bool = True,
    instruments: Sequence[Instrument] = (),
) -> Compiled:
    """Compile a masked diffusion model.

    Args:
        model: takes token ids int64 [B, L], gives logits [B, L, V]; or what `load_model` takes. It is not changed.
        passes: a preset name (`dlqc.recipe.PRESETS`), a recipe file, one line of text, or Pass objects.
        calibration: a text file, texts, or token ids [R, L]; without it the model's own rollouts are used.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; "auto" goes by the device that the model is on: "triton" on a
            CUDA GPU that its kernels can use, "reference" on one that they cannot, else "cpu".
        mask_id: token id of [MASK], where the model's configuration does not tell it.
        seed: of everything random; the same seed gives the same result.
        progress: show a progress bar on the terminal.
        instruments: called around every pass, for example `dlqc.instruments.Dump(folder)`.

    Raises:
        DlqcError: one of its subclasses, naming place, reason and remedy; before any long work where it can.
    """
    model = _original(model)
    recipe = as_recipe(passes)
    target = load_backend(backend, device_of(model))
    captured, outcome, context = prepare(
        model, target, calibration=calibration, mask_id=mask_id, seed=seed, recipe=recipe
    )
    original = context.reference = (copy_graph(captured.graph), captured.weights.clone())
    timing, stored = Timing(), _BeforeLowering()
    with _bar(progress) as tick:
        manager = PassManager(recipe.passes, (timing, stored, *instruments), progress=tick)
        plan = manager.plan(captured.graph, context)
        reports = manager.run(captured.graph, context)
    graph, weights = stored.kept or (copy_graph(captured.graph), context.weights.clone())
    cost = _fidelity(original, (captured.graph, context.weights), context)
    steps = [Step.of(p, _line(p), r, record) for (p, r), record in zip(reports, timing.records, strict=True)]
    report = Report(
        model=getattr(model, "dlqc_source", type(model).__name__).rstrip("/").split("/")[-1],
        recipe=f"{recipe.name}: {recipe}",
        backend=target.name,
        seed=seed,
        calibration=context.states.source if context.states else "none",
        capture=outcome,
        steps=steps,
        storage=measure_storage(original[1], graph, weights, plan.kept),
        fidelity=cost,
        notes=_notes(cost, captured.graph),
        versions=versions(),
    )
    return Compiled(
        graph,
        weights,
        (captured.graph, context.weights),
        spec=context.spec,
        recipe=recipe,
        report=report,
        tokenizer=load_tokenizer(model),
        config=_config_of(model),
    )


def plan(
    model: nn.Module,
    passes: str | Path | Recipe | Pass | Sequence[Pass] = "w4a16-gptq",
    *,
    backend: str = "auto",
    mask_id: int | None = None,
) -> tuple[Plan, Captured, DiffusionSpec]:
    """What `compile` would do: sites, formats, kernels, problems. Reads no weight; works on a model without weights."""
    recipe, target = as_recipe(passes), load_backend(backend, device_of(model))
    spec = spec_of(model, mask_id=mask_id)
    captured = capture(model, spec)
    context = Context(captured.weights, spec, target)
    manager = PassManager(recipe.passes)
    manager.check_order()
    return manager.plan(captured.graph, context), captured, spec


def prepare(
    model: nn.Module,
    backend: Backend,
    *,
    calibration: Text | None,
    mask_id: int | None,
    seed: int,
    recipe: Recipe,
) -> tuple[Captured, dict[str, Any], Context]:
    """Capture the model, refuse what cannot work, compare with the eager model, and gather what the passes will see."""
    PassManager(recipe.passes).check_order()
    spec = spec_of(model, mask_id=mask_id)
    rows = _rows(calibration, model, spec, recipe)
    started = time.perf_counter()
    captured = capture(model, spec)
    seconds = time.perf_counter() - started
    check(captured.graph, captured.weights, spec, set(FACTS_OF_CAPTURE), after="capture")
    context = Context(captured.weights, spec, backend, seed=seed, rows=rows)
    PassManager(recipe.passes).check_feasibility(captured.graph, context)
    check_finite((name, c.leaf) for name, c in captured.weights.items())
    outcome = _summary(captured, verify(model, captured, spec, seed=seed, ids=rows.ids if rows else None), seconds)
    return captured, outcome, context


def _original(model: nn.Module | str | Path) -> nn.Module:
    """The module to compile, loaded where a name or folder was given."""
    if isinstance(model, Compiled):
        raise ModelError(
            "is compiled already", where="model", remedy="Compile the original model with the passes you want"
        )
    if not isinstance(model, nn.Module | str | Path):
        raise ModelError(
            f"a {type(model).__name__} is no model", where="model", remedy="Give a module, a folder or a name"
        )
    return load_model(model)


def _fidelity(
    original: tuple[fx.Graph, Weights], result: tuple[fx.Graph, Weights], context: Context
) -> dict[str, dict[str, float]]:
    """KL and agreement with the captured model on a few calibration rows, for models small enough to run twice."""
    parameters = sum(c.leaf.numel() for c in original[1].values())
    if context.rows is None or parameters > _MEASURE_BELOW:
        return {}
    rows = context.rows.ids[:_MEASURE_ROWS]
    clean = rows[(rows != context.spec.mask_id).all(dim=1)]
    if clean.shape[0] < 2:
        return {}
    before, after = (partial(forward, *pair) for pair in (original, result))
    table = fidelity(before, after, clean, context.spec, ratios=_MEASURE_RATIOS, seed=context.seed)
    costs = zip(table.ratios, table.kl_by_ratio, table.agreement_by_ratio, strict=True)
    return {
        f"{ratio:g}": {"kl": kl.mean, "agreement": agreement.mean, "rows": kl.count} for ratio, kl, agreement in costs
    }


def _notes(cost: dict[str, dict[str, float]], graph: fx.Graph) -> list[str]:
    """What the reader should not have to find out alone."""
    notes = []
    if not cost:
        notes.append("KL and agreement were not measured (no calibration rows, or too large): use dlqc eval --against")
    if any(is_call(node, *ACT_QUANTIZERS, *HEAD_QUANTIZERS, ATTENTION) for node in graph.nodes):
        notes.append("activation quantization is simulated at sites that no kernel took over")
    return notes


def _rows(calibration: Text | None, model: nn.Module, spec: DiffusionSpec, recipe: Recipe) -> TokenRows | None:
    if calibration is None:
        return None
    length = next((int(getattr(p, "length", 128)) for p in recipe.passes if p.name == "calibrate"), 128)
    return rows_from(calibration, tokenizer=load_tokenizer(model), spec=spec, length=length)


def _summary(captured: Captured, outcome: CaptureCheck, seconds: float) -> dict[str, Any]:
    return {
        "nodes": len(captured.graph.nodes),
        "seconds": seconds,
        "rewrites": captured.rewrites,
        "cases": outcome.cases,
        "worst": outcome.worst,
        "tolerance": outcome.tolerance,
        "dtype": outcome.dtype,
    }


class _BeforeLowering(Instrument):
    """Keeps the graph as it is before lowering: that is what artifacts and exports hold."""

    def __init__(self) -> None:
        self.kept: tuple[fx.Graph, Weights] | None = None

    def before(self, p: Pass, graph: fx.Graph, ctx: Context) -> None:
        if "lowered" in p.gives:
            self.kept = (copy_graph(graph), ctx.weights.clone())


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {} if config is None or not hasattr(config, "to_dict") else dict(config.to_dict())


@contextmanager
def _bar(show: bool) -> Iterator[Tick | None]:
    """A progress bar on the error stream, or nothing."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compile", total=None)

        def tick(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        yield tick
