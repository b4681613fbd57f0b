"""Recipes: a named tuple of passes, in Python, as YAML, and as one line of text.

    python   (Calibrate(sequences=64), QuantizeWeights(bits=4), Pack(), Lower())
    yaml     passes: [{calibrate: {sequences: 64}}, {quantize_weights: {bits: 4}}, pack, lower]
    line     calibrate(sequences=64), quantize_weights(bits=4), pack, lower

The three round-trip exactly. A pass is named by its file name under `passes/`, a pass of the user's own by its dotted
import path. TOML files of the same shape are read too; TOML has no null, so there it is `group_size = "none"`. Presets,
whose names say what they make, are in `dlqc.presets`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import yaml
from torch import fx

from dlqc.contract import Context, Pass, PassReport
from dlqc.errors import RecipeError, nearest
from dlqc.presets import PRESETS, preset

PASSES = {
    "center_norms": "CenterNorms",
    "fold_norm_scale": "FoldNormScale",
    "rotate_hidden": "RotateHidden",
    "rotate_heads": "RotateHeads",
    "rotate_qk": "RotateQk",
    "rotate_down": "RotateDown",
    "smooth": "Smooth",
    "equalize": "Equalize",
    "awq_scale": "AwqScale",
    "awq_clip": "AwqClip",
    "duquant": "Duquant",
    "flatquant": "Flatquant",
    "learn_rotation": "LearnRotation",
    "mask_gate": "MaskGate",
    "calibrate": "Calibrate",
    "split_outliers": "SplitOutliers",
    "sparsify": "Sparsify",
    "quantize_embedding": "QuantizeEmbedding",
    "assign_bits": "AssignBits",
    "quantize_weights": "QuantizeWeights",
    "quantize_activations": "QuantizeActivations",
    "correct_bias": "CorrectBias",
    "quantize_attention": "QuantizeAttention",
    "quantize_kv": "QuantizeKv",
    "adapt_precision": "AdaptPrecision",
    "pack": "Pack",
    "lower": "Lower",
}

_ACCEPTED = "Give Pass objects, a preset name, a file, or one line of text"


@dataclass(frozen=True)
class Recipe:
    """A named pipeline."""

    name: str
    passes: tuple[Pass, ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain data with every option spelled out."""
        return {"name": self.name, "passes": [_encode(p) for p in self.passes]}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_plain(), sort_keys=False)

    def __str__(self) -> str:
        return ", ".join(_line(p) for p in self.passes)


def as_recipe(source: str | Path | Recipe | Pass | Sequence[Pass]) -> Recipe:
    """Read a recipe from a preset name, a file, a line of text, or Python objects."""
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Pass):
        return Recipe(source.name, (source,))
    if isinstance(source, str | Path):
        return _from_text(source)
    if not isinstance(source, Sequence):
        raise RecipeError(f"{source!r} is no recipe", where="passes", remedy=_ACCEPTED)
    for item in source:
        if not isinstance(item, Pass):
            raise RecipeError(
                f"{item!r} is no pass",
                where="passes",
                remedy=_ACCEPTED,
            )
    return Recipe("custom", tuple(p for p in source if isinstance(p, Pass)))


def _from_text(source: str | Path) -> Recipe:
    text = str(source)
    if text.endswith((".yaml", ".yml", ".toml")):
        return _from_file(Path(text))
    if isinstance(source, Path):
        raise RecipeError("is no recipe file", where=text, remedy="Recipe files end in .yaml, .yml or .toml")
    made = preset(text, pass_class)
    if made is not None:
        return Recipe(text, made)
    if "(" in text or "," in text or text in PASSES or "." in text:
        return Recipe("custom", parse_line(text))
    raise RecipeError(f"unknown recipe {text!r}", where="passes", remedy=nearest(text, [*PRESETS, *PASSES]))


def _from_file(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the recipe cannot be read", where=str(path), remedy="Check the path") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"not valid: {error}", where=str(path), remedy="See docs/recipes.md for the shape") from error
    return from_plain(data, where=str(path))


def from_plain(data: Any, *, where: str = "recipe", imports: bool = True) -> Recipe:
    """A recipe from plain data: `{name: …, passes: [pack, {calibrate: {sequences: 64}}, …]}`.

    Args:
        imports: whether a pass of the user's own is imported, which runs its code. If not, it stays a `ForeignPass`.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("passes"), list):
        raise RecipeError(
            "a recipe is a mapping with a list 'passes'", where=where, remedy="See docs/recipes.md for the shape"
        )
    for key in data.keys() - {"name", "passes"}:
        raise RecipeError(f"unknown key {key!r}", where=where, remedy=nearest(str(key), ["name", "passes"]))
    return Recipe(str(data.get("name", "custom")), tuple(_decode_pass(item, where, imports) for item in data["passes"]))


def parse_line(text: str) -> tuple[Pass, ...]:
    """Passes from one line: calls with keyword options, separated by commas. Nothing is executed.

    >>> [p.name for p in parse_line("quantize_weights(bits=3), pack")]
    ['quantize_weights', 'pack']
    """
    try:
        tree = ast.parse(f"({text},)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unreadable(text) from error
    if not isinstance(tree, ast.Tuple):
        raise _unreadable(text)
    return tuple(_decode_pass(_from_ast(node, text), "passes") for node in tree.elts)


def _unreadable(text: str) -> RecipeError:
    remedy = "Write it like: calibrate(sequences=64), pack, lower"
    return RecipeError(f"cannot read {text!r}", where="passes", remedy=remedy)


def _from_ast(node: ast.expr, text: str) -> Any:
    """A call becomes {name: {options}}, a bare name its string, anything else a literal."""
    if isinstance(node, ast.Call):
        if node.args or any(k.arg is None for k in node.keywords):
            raise RecipeError(f"options need names in {text!r}", where="passes", remedy="Write option=value")
        return {_from_ast(node.func, text): {str(k.arg): _from_ast(k.value, text) for k in node.keywords}}
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_from_ast(node.value, text)}.{node.attr}"
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_from_ast(element, text) for element in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"{ast.unparse(node)!r} is no plain value", where="passes", remedy="Use numbers and names"
        ) from error


def from_call(text: str, classes: Mapping[str, type[Any]], *, where: str) -> Any:
    """One frozen dataclass from a name or a call, such as `fast_dllm(threshold=0.8)`. Nothing is executed.

    Args:
        classes: what the names stand for. where: what is read, for messages.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        remedy = f"Write it like: {next(iter(classes))}(option=value)"
        raise RecipeError(f"cannot read {text!r}", where=where, remedy=remedy) from error
    name, options = _name_and_options(_from_ast(tree, text), where)
    if name not in classes:
        raise RecipeError(f"unknown {where} {name!r}", where=where, remedy=nearest(name, classes))
    return _build(classes[name], options, name)


@dataclass(frozen=True)
class ForeignPass(Pass):
    """A pass of the user's own that was not imported: what an artifact keeps of it. It can be printed, not run.

    Options:
        path: import path of the class. options: as written.
    """

    name: ClassVar[str] = "foreign"

    path: str
    options: dict[str, Any]

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        raise RecipeError(
            "the pass came with an artifact and was not imported",
            where=self.path,
            remedy="Write the recipe to a file with to_yaml() and compile with that",
        )


def _decode_pass(item: Any, where: str, imports: bool = True) -> Pass:
    name, options = _name_and_options(item, where)
    if not imports and name not in PASSES:
        return ForeignPass(name, options)
    made = _build(pass_class(name), options, name)
    assert isinstance(made, Pass)
    return made


def _name_and_options(item: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(item, str):
        return item, {}
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, options),) = item.items()
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise RecipeError(f"{item!r} is neither a name nor {{name: options}}", where=where, remedy="See docs/recipes.md")


def pass_class(name: str) -> type[Pass]:
    """The class of a pass by file name, or by dotted import path for a user's own."""
    if name in PASSES:
        found: type[Pass] = getattr(importlib.import_module(f"dlqc.passes.{name}"), PASSES[name])
        return found
    module, _, attribute = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")) or not module:
        raise RecipeError(f"unknown pass {name!r}", where="passes", remedy=nearest(name, PASSES))
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's module may raise anything
        raise RecipeError(f"cannot import the pass ({error})", where=name, remedy="Check the import path") from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise RecipeError("not a subclass of dlqc.Pass", where=name, remedy="Derive it from dlqc.Pass")
    return cls


def _build(cls: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """Make a frozen dataclass from plain options, checking names and types."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise RecipeError(
            f"the type of an option is unknown ({error})", where=where, remedy="Import it in the pass's module"
        ) from error
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise RecipeError(f"unknown option {key!r}", where=where, remedy=nearest(str(key), fields))
        values[key] = _option(hints[key], value, f"{where}.{key}")
    for key, f in fields.items():
        if key not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise RecipeError(f"option {key!r} is missing", where=where, remedy=f"Write {key}=…")
    return cls(**values)


def _option(hint: Any, value: Any, where: str) -> Any:
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if type(None) in members and value in (None, "none"):
        return None
    choices = {m.name: m for m in members if dataclasses.is_dataclass(m) and hasattr(m, "name")}
    if choices:
        if any(isinstance(value, m) for m in members if isinstance(m, type)):
            return value
        name, options = _name_and_options(value, where)
        if name not in choices:
            raise RecipeError(f"unknown choice {name!r}", where=where, remedy=nearest(name, choices))
        return _build(typing.cast(Any, choices[name]), options, where)
    item: Any = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    if dataclasses.is_dataclass(item):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise RecipeError(f"{value!r} is no list", where=where, remedy="Write a list, in brackets")
        return tuple(_option(item, one, f"{where}[{i}]") for i, one in enumerate(value))
    try:
        if isinstance(value, bool) and bool not in members and hint is not Any:
            raise TypeError(f"{value} is no number or text")  # pydantic would take True for 1
        return pydantic.TypeAdapter(hint).validate_python(value)
    except (TypeError, pydantic.ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else error
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise RecipeError(f"{value!r} does not fit ({reason})", where=where, remedy=f"Expected {expected}") from error


def _encode(options: Any) -> Any:
    """A frozen dataclass as `{name: {option: value}}` (its import path where it is not ours)."""
    if isinstance(options, ForeignPass):
        return {options.path: options.options}
    fields = {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}
    return {_spelling(options): fields}


def _spelling(options: Any) -> str:
    ours = not isinstance(options, Pass) or PASSES.get(options.name) == type(options).__name__
    return str(options.name) if ours else f"{type(options).__module__}.{type(options).__qualname__}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _encode(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _line(options: Any) -> str:
    """The one-line spelling, options at their defaults left out."""
    if isinstance(options, ForeignPass):
        return f"{options.path}({', '.join(f'{key}={value!r}' for key, value in options.options.items())})"
    parts = []
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if value != default:
            parts.append(f"{f.name}={_literal(value)}")
    name = _spelling(options)
    return f"{name}({', '.join(parts)})" if parts else name


def _literal(value: Any) -> str:
    """The value of an option as the line spells it."""
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return f"({', '.join(map(_line, value))},)"
    return _line(value) if dataclasses.is_dataclass(value) else repr(value)
