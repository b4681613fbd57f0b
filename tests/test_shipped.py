"""Native libraries that come with the package: used where nothing can be compiled, if they are the right ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlqc import native, shipped
from dlqc.doctor import examine
from dlqc.errors import ArtifactError

if native.compiler() is not None:
    pytest.skip(f"native code: {native.compiler()}", allow_module_level=True)

#: What it was compiled for: 2, 1, 0 as in the kernels.
SOURCE = """
#if defined(DLQC_PORTABLE) || !defined(__AVX2__)
extern "C" int answer() { return 0; }
#elif defined(__AVX512VNNI__)
extern "C" int answer() { return 2; }
#else
extern "C" int answer() { return 1; }
#endif
"""
NO_COMPILER = "/bin/false --version failed with 1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and its prebuilt libraries."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "csrc").mkdir()
    (folder / "csrc" / "fwht.cpp").write_text(SOURCE)
    native.prebuild([(folder / "csrc" / "fwht.cpp", ())], folder / "prebuilt")
    return folder


@pytest.fixture
def package(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in the place of the package's own, in a process that has found nothing yet and has no compiler."""
    shutil.copytree(made, tmp_path / "package")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "package" / "csrc")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package" / "prebuilt")
    monkeypatch.setattr(native, "_found", {})
    monkeypatch.setattr(native, "_prebuilt", {})
    monkeypatch.setenv("DLQC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/bin/false")
    return tmp_path / "package"


def answer(options: tuple[str, ...] = ()) -> int:
    found = native.library("fwht", None, options)
    assert found is not None, native.available("fwht", None, options)
    return int(found.answer())


def test_without_a_compiler(package: Path) -> None:
    best = next(path for path, (_, needs) in shipped.paths().items() if needs <= shipped.features())
    assert answer() == {"avx512vnni": 2, "avx2": 1, "portable": 0}[best]
    assert native.prebuilt() == f"prebuilt for {best}: {NO_COMPILER}"
    assert examine()["machine"]["native code"] == f"in use, prebuilt for {best}: {NO_COMPILER}"


def test_a_compiler_goes_first(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    assert native.available() is None
    assert native.prebuilt() is None
    assert answer() in (0, 1, 2)


@pytest.mark.skipif(len(shipped.paths()) == 1, reason="one path alone")
@pytest.mark.parametrize("lacking", ["avx512_vnni", "avx512bw", "fma", "abm"])
def test_nothing_that_the_processor_lacks(lacking: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = frozenset().union(*(needs for _, needs in shipped.paths().values()))
    monkeypatch.setattr(shipped, "features", lambda: everything - {lacking})
    found, path = shipped.find("fwht", native._code(package / "csrc" / "fwht.cpp"), native.CXX.flags, ())
    assert path == ("avx2" if "512" in lacking else "portable")
    assert found.name == f"fwht-{path}.so"
    assert native.available("fwht", None, ("-march=x86-64-v4", "-mavx512vnni")) == (
        f"{NO_COMPILER}; this processor has no avx512vnni"
    )


@pytest.mark.skipif(len(shipped.paths()) == 1, reason="one path alone")
def test_the_path_that_options_name(package: Path) -> None:
    """As DLQC_CPU_ISA makes them."""
    assert answer(("-march=x86-64", "-O1", "-DDLQC_PORTABLE")) == 0


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / shipped.MANIFEST).read_text())
        change(manifest)
        (folder / shipped.MANIFEST).write_text(json.dumps(manifest))

    return apply


def damage(folder: Path) -> None:
    for file in folder.glob("*.so"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder.parent / "csrc" / "new.h").write_text("\n//"), "of fwht was made from other sources"),
        (rewrite(lambda m: m["libraries"].clear()), "no prebuilt library of fwht is for this processor"),
        (rewrite(lambda m: m.update(machine="z80")), "the prebuilt libraries are for .* on z80"),
        (rewrite(lambda m: m.pop("machine")), r"the manifest of .* cannot be read \(KeyError\)"),
        (lambda folder: (folder / shipped.MANIFEST).write_text("{"), r"cannot be read \(JSONDecodeError\)"),
        (lambda folder: (folder / shipped.MANIFEST).unlink(), r"cannot be read \(FileNotFoundError\)"),
        (damage, r"fwht-\w+\.so is not what the manifest says"),
        (lambda folder: [file.unlink() for file in folder.glob("*.so")], "cannot be read: No such file or directory"),
        (lambda folder: [file.chmod(0o666) for file in folder.glob("*.so")], r"others can write to .*\.so"),
        (lambda folder: folder.chmod(0o777), "others can write to .*prebuilt"),
        (lambda folder: folder.parent.chmod(0o777), "others can write to a folder above"),
    ],
)
def test_refused(harm: Callable[[Path], object], reason: str, package: Path) -> None:
    harm(package / "prebuilt")
    told = native.available()
    assert told is not None
    assert told.startswith(f"{NO_COMPILER}; ")
    assert re.search(reason, told), told
    assert native.prebuilt() is None


def test_other_flags_are_refused(package: Path) -> None:
    told = native.available("fwht", None, ("-DOTHER",))
    assert told == f"{NO_COMPILER}; the prebuilt library of fwht was made with other flags"


def test_nothing_can_be_made_without_a_compiler(package: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{NO_COMPILER}.*Install a C\+\+ compiler"):
        native.prebuild([(package / "csrc" / "fwht.cpp", ())])
    assert not (package / "prebuilt" / shipped.MANIFEST).exists()  # what is left there is not used


def test_all_sources_are_prebuilt() -> None:
    from dlqc.kernels.cpu.prebuild import sources

    root = Path(native.__file__).parents[1]
    assert {file.name for file, _ in sources()} == {file.name for file in root.rglob("csrc/*.cpp")}
