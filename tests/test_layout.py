"""The layout: what lives where, and who may import whom."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("passes", "kernels", "backends")
CODE = ("dlqc", *LINKED)


def files(*folders: str, pattern: str = "*.py") -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob(pattern)) if p.is_file()]


def linked(path: Path) -> bool:
    """Whether a path goes through one of the links (rglob follows none, but be sure)."""
    return path.relative_to(ROOT).parts[:2] in {("dlqc", name) for name in LINKED}


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, in full; what only type checkers see is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_links_are_links() -> None:
    for name in LINKED:
        assert os.readlink(ROOT / "dlqc" / name) == f"../{name}"
        assert (ROOT / name).is_dir()
        assert not (ROOT / name).is_symlink()


def test_init_files() -> None:
    """Only `kernels/` has none: with one, it would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in ("passes", "backends", *(f"kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if p.is_dir())):
        if "__pycache__" in folder:
            continue
        tree = ast.parse((ROOT / folder / "__init__.py").read_text())
        assert ast.get_docstring(tree), folder
        assert len(tree.body) == 1, f"{folder}/__init__.py is a docstring and nothing else"
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_every_pass_has_a_test() -> None:
    names = {p.stem for p in (ROOT / "passes").glob("*.py")} - {"__init__"}
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "passes").glob("test_*.py")}
    assert names - tested == set()


@pytest.fixture(scope="module")
def loaded() -> dict[str, object]:
    """What a fresh process has after importing every module, with the root on the path and without triton."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files("dlqc") if not linked(p)]
    modules += ["dlqc." + ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files(*LINKED)]
    names = [m.removesuffix(".__init__") for m in modules if not m.endswith("__main__")]
    script = (
        "import importlib, importlib.util, json, os, sys\n"
        "sys.modules['triton'] = None\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "names = json.loads(sys.argv[1])\n"
        "[importlib.import_module(n) for n in names]\n"
        "root = os.path.realpath(sys.argv[2])\n"
        "found = [(n, os.path.realpath(m.__file__)) for n, m in list(sys.modules.items()) if getattr(m, '__file__', None)]\n"
        "inside = [f for f in found if f[1].startswith(root + os.sep) and '.venv' not in f[1]]\n"
        "from dlqc.backend import LinearSpec, choose_kernel, load_backend\n"
        "from dlqc.backends.triton import BACKEND\n"
        "from dlqc.formats.integer import IntFormat\n"
        "said = [choose_kernel(BACKEND, LinearSpec(64, 64, IntFormat(4, 32), None, False))[1]['weight_only']]\n"
        "try: load_backend('triton')\n"
        "except Exception as error: said.append(str(error))\n"
        "print(json.dumps({'modules': inside, 'kernels': spec and spec.origin, 'said': said}))\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, json.dumps(names), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    found["asked"] = names
    return found


def test_each_module_loads_under_one_name(loaded: dict[str, object]) -> None:
    modules: list[tuple[str, str]] = loaded["modules"]  # type: ignore[assignment]
    names = [name for name, _ in modules]
    paths = [path for _, path in modules]
    assert len(paths) == len(set(paths)), "a file was loaded twice"
    assert set(loaded["asked"]) <= set(names)  # type: ignore[call-overload]
    assert [n for n in names if n.split(".")[0] in LINKED] == []


def test_kernels_is_never_our_folder_as_a_package(loaded: dict[str, object]) -> None:
    """As a folder without `__init__.py` it may be found, but any real package of that name goes first."""
    assert loaded["kernels"] is None


def test_without_triton_everything_imports_and_says_so(loaded: dict[str, object]) -> None:
    missing = "backend: backend 'triton' cannot run here: triton is not installed. Use backend='auto'"
    assert loaded["said"] == ["triton is not installed", missing]


def test_the_core_imports_no_kernel_and_no_backend() -> None:
    checked = [p for p in files("dlqc") if not linked(p)]
    wrong = [
        f"{p.relative_to(ROOT)}: {name}"
        for p in checked
        for name in imports(p)
        if re.match(r"(dlqc\.)?(kernels|backends)(\.|$)", name)
    ]
    assert len(checked) > 40
    assert wrong == []


def test_a_pass_imports_the_core_alone() -> None:
    wrong = [
        f"{p.name}: {name}"
        for p in files("passes")
        for name in imports(p)
        if re.match(r"dlqc\.(passes|kernels|backends)(\.|$)", name)
        or name.split(".")[0] not in {"__future__", "dlqc", "torch", *sys.stdlib_module_names}
    ]
    assert wrong == []


def test_a_kernel_imports_torch_and_numerics_alone() -> None:
    allowed = {"__future__", "torch", "triton", *sys.stdlib_module_names}
    ours = ("dlqc.backend.", "dlqc.errors.", "dlqc.formats.", "dlqc.kernels.", "dlqc.kv_cache.", "dlqc.native")
    wrong = [
        f"{p.relative_to(ROOT)}: {name}"
        for p in files("kernels")
        for name in imports(p)
        if name.split(".")[0] not in allowed and not name.startswith(ours)
    ]
    assert wrong == []


def test_a_backend_imports_the_core_and_kernels_alone() -> None:
    wrong = [
        f"{p.name}: {name}"
        for p in files("backends")
        for name in imports(p)
        if name.split(".")[0] not in {"__future__", "dlqc", "torch", *sys.stdlib_module_names}
        or name.startswith("dlqc.passes")
    ]
    assert wrong == []


def test_no_model_is_named_in_a_pass() -> None:
    models = re.compile(r"llada|dream|qwen|llama|mistral|gemma|bert|gpt2|\bopt\b|phi3|q_proj|lm_head", re.IGNORECASE)
    wrong = [
        f"{p.name}:{i}: {line.strip()}"
        for p in files("passes")
        for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if models.search(line)
    ]
    assert wrong == []


def test_no_file_is_long() -> None:
    long = {str(p.relative_to(ROOT)): n for p in files(*CODE) if (n := len(p.read_text().splitlines())) >= 500}
    assert long == {}


def test_no_machine_s_paths_are_in_the_sources() -> None:
    machine = re.compile(r"/(?:work|root|home|Users|mnt)/[A-Za-z0-9_.]")
    folders = (*CODE, "tests", "examples", "benchmarks", "docs", ".ci")
    texts = [p for f in folders for p in files(f, pattern="*") if p.suffix in {".py", ".md", ".json", ".yaml", ".sh"}]
    texts += [p for p in ROOT.iterdir() if p.suffix in {".md", ".toml", ".txt"} or p.name == "Makefile"]
    wrong = [
        f"{p.relative_to(ROOT)}:{i}"
        for p in texts
        for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if machine.search(line)
    ]
    assert len(texts) > 80
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    assert [str(p) for p in files(*CODE) if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))] == []
