"""Errors: one tree, one form, parts that can be read by programs."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import dlqc
from dlqc import errors
from dlqc.errors import DlqcError, nearest

ROOT = Path(__file__).parent.parent
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, DlqcError)]


def test_the_tree() -> None:
    assert {c.__name__ for c in CLASSES} == {
        "DlqcError",
        "CaptureError",
        "ContractError",
        "FeasibilityError",
        "CalibrationError",
        "LoweringError",
        "ExportError",
        "ArtifactError",
        "ModelError",
        "RecipeError",
    }
    assert all(c.__doc__ for c in CLASSES)
    assert dlqc.DlqcError is DlqcError


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "it is so"),
        ({"where": "blocks.3"}, "blocks.3: it is so"),
        ({"remedy": "Do this"}, "it is so. Do this"),
        ({"where": "blocks.3", "remedy": "Do this"}, "blocks.3: it is so. Do this"),
    ],
)
def test_the_form_of_a_message(cls: type[DlqcError], parts: dict[str, str], text: str) -> None:
    error = cls("it is so", **parts)
    assert str(error) == text
    assert (error.what, error.where, error.remedy) == ("it is so", parts.get("where"), parts.get("remedy"))
    with pytest.raises(DlqcError, match=re.escape(text)):
        raise error


def test_nearest() -> None:
    assert nearest("quantise_weights", ["quantize_weights", "pack"]) == "Did you mean 'quantize_weights'?"
    assert nearest("zzz", ["b", "a"]) == "Known: a, b"
    assert nearest("zzz", iter(["b", "a"])) == "Known: a, b"


def raised() -> list[tuple[str, ast.Call]]:
    """Every construction of an error of ours, in the whole package."""
    names = {c.__name__ for c in CLASSES}
    found = []
    for folder in ("dlqc", "passes", "kernels", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def literal(node: ast.expr) -> str:
    """A text or formatted text, with its holes as {}."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return "{}"


def test_messages_are_clauses_and_remedies_are_sentences() -> None:
    """`what` and `remedy` are joined by a full stop: neither brings its own, and a remedy begins with a capital."""
    wrong = []
    calls = raised()
    for place, call in calls:
        parts = {k.arg: literal(k.value) for k in call.keywords} | {"what": literal(call.args[0])} if call.args else {}
        what, remedy = parts.get("what", "{}"), parts.get("remedy", "{}")
        if what.rstrip().endswith(".") or what != what.strip() or "\n" in what:
            wrong.append(f"{place}: {what!r}")
        if (
            remedy.endswith(".")
            or remedy != remedy.strip()
            or not (remedy[:1].isupper() or remedy[:1] in "{0123456789")
        ):
            wrong.append(f"{place}: {remedy!r}")
        if {k.arg for k in call.keywords} - {"where", "remedy"}:
            wrong.append(f"{place}: unknown keyword")
    assert len(calls) > 80
    assert wrong == []


def test_no_error_of_ours_is_swallowed() -> None:
    """No bare except, and no handler that catches everything and does nothing."""
    wrong = []
    for folder in ("dlqc", "passes", "kernels", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ExceptHandler):
                    continue
                broad = node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                )
                if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []
