"""A cell of a study: one model compiled by one recipe, measured on all tasks, item by item.

What a cell depends on (the files of the model, every option of the recipe, the texts, the tasks, the seed) is hashed into its
key. Plain data goes in and comes out, so that a cell can be measured in any process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from dlqc import __version__
from dlqc.compile import compile
from dlqc.compiled import Compiled
from dlqc.diffusion.fidelity import fidelity
from dlqc.diffusion.likelihood import log_likelihood, masked_nll
from dlqc.diffusion.masking import generator
from dlqc.diffusion.tasks import answered
from dlqc.errors import DlqcError, FeasibilityError
from dlqc.evaluate import RATIOS, bundled_text, rows_to_measure
from dlqc.models.load import find_folder, load_model
from dlqc.recipe import Recipe, from_plain
from dlqc.study.spec import ChoiceTask, ExactMatchTask, NllTask, Study, Task

#: Bits and method of the cell that the others of its model are compared with.
REFERENCE = ("full", "none")


@dataclass(frozen=True)
class Cell:
    """What is to be measured.

    Attributes:
        model, bits, method: its place in the grid.
        settings: all that the result depends on, as plain data.
        job: what `measure` needs, as plain data.
    """

    model: str
    bits: str
    method: str
    settings: dict[str, Any]
    job: dict[str, Any]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        return f"{self.model} {self.bits} {self.method}"

    @property
    def file(self) -> str:
        return f"{self.model}-{self.bits}-{self.method}-{self.key}.json"


def cells_of(study: Study) -> list[Cell]:
    """All cells, the reference of each model first.

    Raises:
        DlqcError: a model or text is missing, or a recipe cannot be.
    """
    recipes = {REFERENCE: Recipe("none", ()), **study.recipes()}
    calibration = Path(study.calibration) if study.calibration else bundled_text("calib")
    text = Path(study.text) if study.text else bundled_text("eval")
    same = {
        "tasks": {name: task.model_dump(mode="json") for name, task in study.tasks.items()},
        "seed": study.seed,
        "backend": study.backend,
    }
    shared = {"version": __version__, "calibration": _sha256(calibration), "text": _sha256(text), **same}
    cells = []
    for name, entry in study.models.items():
        identity = fingerprint(entry.source)
        for (bits, method), recipe in recipes.items():
            plain = recipe.to_plain()
            job = {"source": entry.source, "recipe": plain, "calibration": str(calibration), "text": str(text), **same}
            settings = {"model": identity, "passes": plain["passes"], **shared}
            cells.append(Cell(name, bits, method, settings, job))
    return cells


def fingerprint(source: str) -> str:
    """Digest of the files of a model, whatever its folder is called."""
    folder = find_folder(source)
    names = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".json", ".model", ".txt")]
    return hashlib.sha256("\n".join(f"{p.name} {_sha256(p)}" for p in names).encode()).hexdigest()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Compile and measure. A refusal of the compiler is a result: {"refused": why}."""
    started = time.perf_counter()
    try:
        reference = _reference(job["source"], job["backend"], job["seed"])
        recipe = from_plain(job["recipe"])
        model = reference
        if recipe.passes:
            model = compile(
                load_model(job["source"]),
                recipe,
                calibration=Path(job["calibration"]),
                backend=job["backend"],
                seed=job["seed"],
                progress=False,
            )
        compiled = time.perf_counter()
        tasks = {}
        for name, plain in job["tasks"].items():
            task = pydantic.TypeAdapter[Any](Task).validate_python(plain)
            tasks[name] = {"category": task.category, "kind": task.kind} | _scores(task, model, reference, job)
    except DlqcError as error:
        return {"refused": str(error)}
    storage = model.report.storage
    return {
        "tasks": tasks,
        "bits_per_weight": storage.bits_per_quantized_weight,
        "kept": sorted(storage.kept),
        "seconds": {"compile": compiled - started, "measure": time.perf_counter() - compiled},
    }


def _scores(task: Any, model: Compiled, reference: Compiled, job: dict[str, Any]) -> dict[str, list[float]]:
    """`values`, one a row or item, and for text also `kl`."""
    spec, words, seed = model.spec, model.tokenizer, job["seed"]
    if isinstance(task, ExactMatchTask):
        found = [answered(model, words, spec, name, items=task.items, seed=seed) for name in task.tasks]
        return {"values": torch.cat(found).int().tolist()}
    if isinstance(task, ChoiceTask):
        return {"values": _chosen(task, model, job).int().tolist()}
    assert isinstance(task, NllTask)
    rows = _rows(words, spec, job["text"], task.length, task.rows)[: task.rows]
    nll = masked_nll(model, rows, spec, ratios=RATIOS, seed=seed)
    made = {"values": _rounded(nll.rows)}
    if model is not reference:
        made["kl"] = _rounded(fidelity(reference, model, rows, spec, ratios=RATIOS, seed=seed).kl.mean(1))
    return made


def _chosen(task: ChoiceTask, model: Compiled, job: dict[str, Any]) -> Tensor:
    """Whether the true continuation is the likeliest, bool [items]; the same masks for all continuations of an item."""
    width = task.prompt + task.answer
    rows = _rows(model.tokenizer, model.spec, job["text"], width, max(task.items, task.choices)).flip(0)
    right = torch.zeros(task.items, dtype=torch.bool)
    for item in range(task.items):
        rng = generator(job["seed"], "choice", item)
        others = torch.randperm(rows.shape[0] - 1, generator=rng)[: task.choices - 1]
        picked = [item, *(others + (others >= item)).tolist()]
        scores = [
            log_likelihood(
                model,
                rows[item, : task.prompt],
                rows[row, task.prompt :],
                model.spec,
                mc_num=task.mc_num,
                seed=job["seed"] + item,
            )
            for row in picked
        ]
        right[item] = scores[0] > max(scores[1:])
    return right


def _rows(words: Any, spec: Any, text: str, length: int, needed: int) -> Tensor:
    rows = rows_to_measure(words, spec, text, length=length)
    if rows.shape[0] < needed:
        raise FeasibilityError(
            f"the text has {rows.shape[0]} rows of {length} tokens, {needed} are needed",
            where="text",
            remedy=f"Ask for {rows.shape[0]} or fewer, or give a longer text",
        )
    return rows


@functools.lru_cache(maxsize=1)
def _reference(source: str, backend: str, seed: int) -> Compiled:
    """The model as captured, without passes: the same arithmetic, nothing rounded."""
    return compile(load_model(source), (), backend=backend, seed=seed, progress=False)


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 7) for v in values.tolist()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
