"""Native code, built by the user's own compiler when it is first used.

`library("fwht")` compiles `dlqc/csrc/fwht.cpp` once for this processor and compiler, in a second or two, and keeps it in a
cache folder: $DLQC_CACHE, else $XDG_CACHE_HOME/dlqc, else ~/.cache/dlqc, and in a private temporary folder if that cannot
be used. Others bring sources in a folder of their own, and a `Toolchain` if they are not C++. Sources have a plain C interface
and know nothing of torch or Python, so nothing else is needed to build them and no version has to match. Where there is no
compiler, a library that came with the package is used if it fits (`dlqc.shipped`); else `available` tells why there is none, and
callers have a slower way in torch.

A library is code that runs as the user: it is loaded only from a folder that nobody else can write to. Processes that
build at the same time each write a file of their own and move it into place as a whole.

DLQC_NATIVE=0 turns native code off; CXX names a compiler, with options if need be.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dlqc import shipped
from dlqc.errors import ArtifactError

SOURCES = Path(__file__).parent / "csrc"


@dataclass(frozen=True)
class Toolchain:
    """A kind of compiler, and how it is called.

    Attributes:
        what: as reasons name it. suffix: of its sources.
        names: commands that are looked for, in this order; a path may hold variables of the environment.
        variable: of the environment; names a command, with options if need be, in place of all others.
        flags: what it is always told. tuned: what it is told in addition, each until one succeeds.
        headers: patterns of the files beside a source that belong to it.
        patience_s: seconds that it may take.
    """

    what: str
    suffix: str
    names: tuple[str, ...]
    variable: str
    flags: tuple[str, ...]
    tuned: tuple[tuple[str, ...], ...] = ((),)
    headers: tuple[str, ...] = ("*.h",)
    patience_s: int = 120


CXX = Toolchain(
    what="C++ compiler",
    suffix=".cpp",
    names=("c++", "g++", "clang++"),
    variable="CXX",
    flags=("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-pipe"),
    tuned=(("-march=native",), ()),  # some compilers do not know their own processor
)

_Key = tuple[str, Path | None, tuple[str, ...], Toolchain]

_LEFT_BEHIND_S = 24 * 3600  # age of a folder that nobody builds in any more

_lock = threading.Lock()  # of what follows
_building: dict[_Key, threading.Lock] = {}
_found: dict[_Key, ctypes.CDLL | str] = {}
_prebuilt: dict[_Key, str] = {}


def _after_fork() -> None:
    """A thread of the parent that builds does not exist in a child, which would wait for its locks forever."""
    global _lock
    _lock = threading.Lock()
    _building.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Unavailable(Exception):
    """Why there is no library."""


class _NoRoom(Exception):
    """The folder cannot take the library; another one may."""


def library(
    name: str, folder: Path | None = None, options: tuple[str, ...] = (), toolchain: Toolchain = CXX
) -> ctypes.CDLL | None:
    """The library built from `<name>.cpp`, or None where it cannot be had (`available` says why).

    Args:
        name: of the source; headers beside it belong to it.
        folder: where it lies; None for `dlqc/csrc`.
        options: for the compiler, after its own: they win over -march=native.
        toolchain: what builds it, and gives the source its suffix.
    """
    if os.environ.get("DLQC_NATIVE") == "0":
        return None
    key = (name, folder, options, toolchain)
    found = _found.get(key)
    if found is None:
        with _lock:
            mine = _building.setdefault(key, threading.Lock())
        with mine:  # others may be built at the same time
            found = _found.get(key)
            if found is None:
                try:
                    found = _load(name, folder or SOURCES, options, toolchain, key)
                except _Unavailable as error:
                    found = str(error)
                _found[key] = found
    return None if isinstance(found, str) else found


def available(
    name: str = "fwht", folder: Path | None = None, options: tuple[str, ...] = (), toolchain: Toolchain = CXX
) -> str | None:
    """None if the library can be used, or why not."""
    if os.environ.get("DLQC_NATIVE") == "0":
        return "turned off by DLQC_NATIVE=0"
    library(name, folder, options, toolchain)
    found = _found[name, folder, options, toolchain]
    return found if isinstance(found, str) else None


def prebuilt(name: str = "fwht", folder: Path | None = None, options: tuple[str, ...] = ()) -> str | None:
    """None if the library in use was compiled here, or which one of the package's own it is, and why."""
    return _prebuilt.get((name, folder, options, CXX))


def prebuild(sources: Iterable[tuple[Path, tuple[str, ...]]], target: Path | None = None) -> list[Path]:
    """Compile C++ sources, each with its options, for all of `shipped.paths()` into a folder, and write its manifest.

    The folder is that of the package, if none is given.

    Raises:
        ArtifactError: there is no compiler, or it does not take a source.
    """
    target = target or shipped.FOLDER
    target.mkdir(parents=True, exist_ok=True)
    (target / shipped.MANIFEST).unlink(missing_ok=True)
    libraries: dict[str, dict[str, dict[str, object]]] = {}
    made = []
    try:
        command, _ = _compiler()
        for source, options in sources:
            for path, (instructions, _) in shipped.paths().items():
                file, flags = target / f"{source.stem}-{path}.so", (*instructions, *options)
                _build(source, command, flags, replace(CXX, tuned=((),)), file)
                file.chmod(0o755)
                libraries.setdefault(source.stem, {})[path] = shipped.entry(file, _code(source), (*CXX.flags, *flags))
                made.append(file)
    except (_Unavailable, _NoRoom) as error:
        raise ArtifactError(str(error), where="prebuild", remedy="Install a C++ compiler, or name one by CXX") from None
    shipped.write(target, libraries)
    return made


def compiler(toolchain: Toolchain = CXX) -> str | None:
    """None if there is a compiler, or why not. Nothing is built."""
    try:
        _compiler(toolchain)
    except _Unavailable as error:
        return str(error)
    return None


def _load(name: str, sources: Path, options: tuple[str, ...], toolchain: Toolchain, key: _Key) -> ctypes.CDLL:
    if os.name != "posix":
        raise _Unavailable(f"not built on {platform.system()}")
    source = sources / f"{name}{toolchain.suffix}"
    try:
        code = _code(source, toolchain)
    except OSError as error:
        raise _Unavailable(f"the source {source.name} cannot be read: {error.strerror}") from None
    try:
        return _compiled(source, code, options, toolchain)
    except _Unavailable as error:
        if toolchain != CXX or not shipped.FOLDER.is_dir():
            raise
        try:
            file, path = shipped.find(name, code, CXX.flags, options)
            if not all(_safe_above(parent) for parent in file.resolve().parents):
                raise shipped.Refused(f"others can write to a folder above {file}")
            found = ctypes.CDLL(str(file))
        except shipped.Refused as refusal:
            raise _Unavailable(f"{error}; {refusal}") from None
        except OSError as failure:
            raise _Unavailable(f"{error}; the prebuilt library of {name} cannot be loaded: {failure}") from None
        _prebuilt[key] = f"prebuilt for {path}: {error}"
        return found


def _code(source: Path, toolchain: Toolchain = CXX) -> bytes:
    """All text that a library is made of."""
    headers = sorted(file for pattern in toolchain.headers for file in source.parent.glob(pattern))
    return b"".join(file.read_bytes() for file in (source, *headers))


def _compiled(source: Path, code: bytes, options: tuple[str, ...], toolchain: Toolchain) -> ctypes.CDLL:
    """From the cache, or built anew."""
    command, version = _compiler(toolchain)
    file = f"{source.stem}-{_key(code, version, options, toolchain)}.so"
    try:
        folder = _cache()
        try:
            return _open(folder / file)
        except OSError:  # not there yet, or not whole
            _build(source, command, options, toolchain, folder / file)
            return _open(folder / file)
    except (_NoRoom, OSError):
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="dlqc-") as private:  # a loaded library needs its file no longer
            _build(source, command, options, toolchain, Path(private) / file)
            return _open(Path(private) / file)
    except (_NoRoom, OSError) as error:
        raise _Unavailable(f"no folder to build in: {error}") from None


def _compiler(toolchain: Toolchain = CXX) -> tuple[list[str], str]:
    """The command of the compiler, and what it says about itself."""
    variable = toolchain.variable
    if chosen := os.environ.get(variable):
        try:
            candidates = [shlex.split(chosen)]
        except ValueError as error:
            raise _Unavailable(f"{variable}={chosen!r} is no command: {error}") from None
    else:
        candidates = [[found] for name in toolchain.names if (found := shutil.which(os.path.expandvars(name)))]
    reasons = []
    for command in candidates:
        try:
            told = _call([*command, "--version"], toolchain.patience_s)
        except OSError as error:
            reasons.append(f"{shlex.join(command)}: {error.strerror}")
            continue
        if told.returncode == 0:
            return command, f"{command} {told.stdout}"
        reasons.append(f"{shlex.join(command)} --version failed with {told.returncode}")
    raise _Unavailable("; ".join(reasons) or f"no {toolchain.what} ({', '.join(toolchain.names)}, or ${variable})")


def _call(command: list[str], patience_s: int, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C"} | ({"TMPDIR": str(folder)} if folder else {})
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{command[0]} did not end within {patience_s} s") from None


def _key(code: bytes, version: str, options: tuple[str, ...], toolchain: Toolchain) -> str:
    """A hash of all that the machine code depends on."""
    parts = (
        code,
        version,
        toolchain.flags,
        toolchain.tuned,
        options,
        platform.system(),
        platform.machine(),
        _processor(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _processor() -> str:
    """What -march=native looks at: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "model", "cpu family", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in names}))


def _cache() -> Path:
    """The cache folder, made if need be."""
    if chosen := os.environ.get("DLQC_CACHE"):
        base = Path(chosen)
    elif chosen := os.environ.get("XDG_CACHE_HOME"):
        base = Path(chosen) / "dlqc"
    else:
        try:
            base = Path.home() / ".cache" / "dlqc"
        except RuntimeError as error:
            raise _NoRoom(str(error)) from None
    folder = base.absolute() / "native"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()
    if not _ours(folder) or not all(_safe_above(parent) for parent in folder.parents):
        raise _NoRoom(f"others can write to {folder}")
    return folder


def _ours(path: Path) -> bool:
    """Whether the path belongs to this user, and nobody else can write to it."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _safe_above(folder: Path) -> bool:
    """Whether no other user (but root) can put something else in the place of what lies in the folder."""
    found = folder.stat()
    if found.st_mode & stat.S_ISVTX:  # as /tmp: only the owner of an entry moves it
        return True
    shared = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid())
    return found.st_uid in (0, os.geteuid()) and not shared


def _open(path: Path) -> ctypes.CDLL:
    if not _ours(path):
        raise OSError(f"others can write to {path}")
    return ctypes.CDLL(str(path))


def _build(source: Path, compiler: list[str], options: tuple[str, ...], toolchain: Toolchain, target: Path) -> None:
    """Compile, then move the result to its place in one step."""
    _sweep(target.parent)
    try:
        place = tempfile.TemporaryDirectory(prefix="build-", dir=target.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise _NoRoom(str(error)) from None
    with place as name:
        folder = Path(name)
        made = folder / target.name
        for tuned in toolchain.tuned:
            command = [*compiler, *toolchain.flags, *tuned, *options, "-o", str(made), str(source)]
            try:
                told = _call(command, toolchain.patience_s, folder)
            except OSError as error:
                raise _Unavailable(f"{compiler[0]}: {error.strerror}") from None
            if told.returncode == 0 and made.exists():
                with made.open("rb") as written:
                    os.fsync(written.fileno())  # a half-written library would be found, and end the process
                made.chmod(0o700)
                os.replace(made, target)
                return
            if "No space left" in told.stderr or "quota exceeded" in told.stderr:
                raise _NoRoom("no space left on the device")
        said = next((line for line in told.stderr.splitlines() if "error" in line), told.stderr.strip()[:200])
        raise _Unavailable(f"{shlex.join(compiler)} failed with {told.returncode}{f': {said}' if said else ''}")


def _sweep(folder: Path) -> None:
    """Remove what processes left behind that were killed while they built."""
    for left in folder.glob("build-*"):
        try:
            old = time.time() - left.stat().st_mtime > _LEFT_BEHIND_S
        except OSError:  # just finished
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)
