"""A study as a YAML file: the models, the grids of bit-widths and methods, the tasks.

    name: tiny
    models:
      base: {source: tiny-llada, type: base}
    grids:
      - {bits: [w4a16, w3a16], methods: [gptq, awq]}
    tasks:
      tales: {kind: nll, category: general, rows: 16}
      sums: {kind: exact_match, category: math, tasks: [add, sub], items: 100}

A cell of a grid is the preset `<bits>-<method>`, or what `recipes:` of the grid says for the method: a line of text or a recipe
file, in which `{bits}` stands for the bits. Paths are relative to the file. Unknown names and options are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import Field

from dlqc.backend import BACKENDS
from dlqc.diffusion.tasks import TASKS
from dlqc.errors import RecipeError, nearest
from dlqc.recipe import Recipe, as_recipe

Category = Literal["general", "math", "code"]
ModelType = Literal["base", "instruct"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Entry(pydantic.BaseModel):
    """Data of a study file: unknown keys are refused, nothing changes later."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ModelEntry(Entry):
    """A model. `family` joins a base model with those that were tuned from it."""

    source: str
    type: ModelType = "base"
    family: str = ""


class Grid(Entry):
    """Every width with every method."""

    bits: Annotated[tuple[Name, ...], Field(min_length=1)]
    methods: Annotated[tuple[Name, ...], Field(min_length=1)]
    recipes: dict[str, str] = {}


class NllTask(Entry):
    """Masked NLL of rows of the evaluation text, and KL from the reference; a row's score is exp(-NLL)."""

    kind: Literal["nll"]
    category: Category = "general"
    rows: Annotated[int, Field(ge=2)] = 16
    length: Annotated[int, Field(ge=8)] = 128


class ChoiceTask(Entry):
    """Which of several continuations is the true one, by likelihood, as in HellaSwag; the wrong ones follow other rows."""

    kind: Literal["choice"]
    category: Category = "general"
    items: Annotated[int, Field(ge=2)] = 40
    choices: Annotated[int, Field(ge=2)] = 4
    prompt: Annotated[int, Field(ge=1)] = 32
    answer: Annotated[int, Field(ge=1)] = 16
    mc_num: Annotated[int, Field(ge=1)] = 4


class ExactMatchTask(Entry):
    """Generated questions with one right answer (`dlqc.diffusion.tasks`), `items` of each."""

    kind: Literal["exact_match"]
    category: Category = "math"
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    items: Annotated[int, Field(ge=2)] = 100


Task = Annotated[NllTask | ChoiceTask | ExactMatchTask, Field(discriminator="kind")]


class Study(Entry):
    """The whole file.

    Attributes:
        calibration, text: text files; None: the bundled tales, which share none.
        seed: of states, masks, items and noise.
        backend: "reference" computes the same everywhere.
    """

    name: Name
    models: Annotated[dict[Name, ModelEntry], Field(min_length=1)]
    grids: Annotated[tuple[Grid, ...], Field(min_length=1)]
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    calibration: str | None = None
    text: str | None = None
    seed: int = 0
    backend: str = "reference"

    def recipes(self) -> dict[tuple[str, str], Recipe]:
        """(bits, method) → recipe, in the order of the file.

        Raises:
            RecipeError: a recipe cannot be read, or two grids name the same cell.
        """
        found: dict[tuple[str, str], Recipe] = {}
        for number, grid in enumerate(self.grids):
            for name in grid.recipes.keys() - set(grid.methods):
                raise RecipeError(
                    f"{name!r} is no method of this grid",
                    where=f"grids.{number}.recipes",
                    remedy=nearest(name, grid.methods),
                )
            for bits in grid.bits:
                for method in grid.methods:
                    if (bits, method) in found:
                        what = f"{bits} by {method} is in two grids"
                        raise RecipeError(what, where=f"grids.{number}", remedy="Leave it out of one")
                    text = grid.recipes.get(method, "{bits}-" + method).replace("{bits}", bits)
                    found[bits, method] = as_recipe(text)
        return found


def read_study(path: str | Path) -> Study:
    """Read and check a study file; paths in it become absolute where they exist beside it.

    Raises:
        RecipeError: it cannot be read, is no YAML, or something in it is unknown or of the wrong type; names the place.
    """
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = f"cannot be read ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})"
        raise RecipeError(what, where=str(file), remedy="Name a YAML file such as examples/study.yaml") from error
    try:
        study = Study.model_validate(data)
    except pydantic.ValidationError as error:
        one = error.errors()[0]
        place = ".".join(map(str, one["loc"]))
        what = f"{place}: {one['msg']}" if place else one["msg"]
        raise RecipeError(what, where=str(file), remedy="See examples/study.yaml for what a study says") from error
    for label, task in study.tasks.items():
        for name in task.tasks if isinstance(task, ExactMatchTask) else ():
            if name not in TASKS:
                raise RecipeError(f"{name!r} is no task", where=f"tasks.{label}", remedy=nearest(name, TASKS))
    if study.backend not in (*BACKENDS, "auto"):
        remedy = nearest(study.backend, (*BACKENDS, "auto"))
        raise RecipeError(f"unknown backend {study.backend!r}", where="backend", remedy=remedy)
    models = {n: m.model_copy(update={"source": _beside(file, m.source)}) for n, m in study.models.items()}
    texts = {n: _text(file, n, getattr(study, n)) for n in ("calibration", "text")}
    study = study.model_copy(update={"models": models, **texts})
    study.recipes()
    return study


def _beside(file: Path, source: str) -> str:
    beside = file.parent / source
    return str(beside.resolve()) if beside.exists() else source


def _text(file: Path, option: str, source: str | None) -> str | None:
    if source is None:
        return None
    found = Path(_beside(file, source))
    if not found.is_file():
        raise RecipeError(f"there is no file {source!r}", where=option, remedy="Give a path relative to the study file")
    return str(found)
