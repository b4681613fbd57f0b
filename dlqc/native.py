"""Native code, built by the user's own C++ compiler when it is first used.

`library("fwht")` compiles `dlqc/csrc/fwht.cpp` once for this processor and compiler, in a second or two, and keeps it in a
cache folder: $DLQC_CACHE, else $XDG_CACHE_HOME/dlqc, else ~/.cache/dlqc, and in a private temporary folder if that cannot
be used. Others bring sources in a folder of their own. Sources have a plain C interface and know nothing of torch or Python,
so nothing else is needed to build them and no version has to match. Where there is no compiler, `available` tells why, and
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
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-pipe")
_TUNED = (("-march=native",), ())  # some compilers do not know their own processor
_COMPILERS = ("c++", "g++", "clang++")
_PATIENCE_S = 120

_lock = threading.Lock()  # of what follows
_building: dict[tuple[str, Path | None, tuple[str, ...]], threading.Lock] = {}
_found: dict[tuple[str, Path | None, tuple[str, ...]], ctypes.CDLL | str] = {}


class _Unavailable(Exception):
    """Why there is no library."""


class _NoRoom(Exception):
    """The folder cannot take the library; another one may."""


def library(name: str, folder: Path | None = None, options: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library built from `<name>.cpp`, or None where it cannot be had (`available` says why).

    Args:
        name: of the source; headers beside it belong to it.
        folder: where it lies; None for `dlqc/csrc`.
        options: for the compiler, after its own: they win over -march=native.
    """
    if os.environ.get("DLQC_NATIVE") == "0":
        return None
    key = (name, folder, options)
    found = _found.get(key)
    if found is None:
        with _lock:
            mine = _building.setdefault(key, threading.Lock())
        with mine:  # others may be built at the same time
            found = _found.get(key)
            if found is None:
                try:
                    found = _load(name, folder or _SOURCES, options)
                except _Unavailable as error:
                    found = str(error)
                _found[key] = found
    return None if isinstance(found, str) else found


def available(name: str = "fwht", folder: Path | None = None, options: tuple[str, ...] = ()) -> str | None:
    """None if the library can be used, or why not."""
    if os.environ.get("DLQC_NATIVE") == "0":
        return "turned off by DLQC_NATIVE=0"
    library(name, folder, options)
    found = _found[name, folder, options]
    return found if isinstance(found, str) else None


def _load(name: str, sources: Path, options: tuple[str, ...]) -> ctypes.CDLL:
    if os.name != "posix":
        raise _Unavailable(f"not built on {platform.system()}")
    source = sources / f"{name}.cpp"
    try:
        code = b"".join(file.read_bytes() for file in (source, *sorted(sources.glob("*.h"))))
    except OSError as error:
        raise _Unavailable(f"the source {source.name} cannot be read: {error.strerror}") from None
    compiler, version = _compiler()
    file = f"{name}-{_key(code, version, options)}.so"
    try:
        folder = _cache()
        try:
            return _open(folder / file)
        except OSError:  # not there yet, or not whole
            _build(source, compiler, options, folder / file)
            return _open(folder / file)
    except (_NoRoom, OSError):
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="dlqc-") as private:  # a loaded library needs its file no longer
            _build(source, compiler, options, Path(private) / file)
            return _open(Path(private) / file)
    except (_NoRoom, OSError) as error:
        raise _Unavailable(f"no folder to build in: {error}") from None


def _compiler() -> tuple[list[str], str]:
    """The command of the compiler, and what it says about itself."""
    if chosen := os.environ.get("CXX"):
        try:
            candidates = [shlex.split(chosen)]
        except ValueError as error:
            raise _Unavailable(f"CXX={chosen!r} is no command: {error}") from None
    else:
        candidates = [[found] for name in _COMPILERS if (found := shutil.which(name))]
    reasons = []
    for command in candidates:
        try:
            told = _call([*command, "--version"])
        except OSError as error:
            reasons.append(f"{shlex.join(command)}: {error.strerror}")
            continue
        if told.returncode == 0:
            return command, f"{command} {told.stdout}"
        reasons.append(f"{shlex.join(command)} --version failed with {told.returncode}")
    raise _Unavailable("; ".join(reasons) or f"no C++ compiler ({', '.join(_COMPILERS)}, or $CXX)")


def _call(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C"} | ({"TMPDIR": str(folder)} if folder else {})
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{command[0]} did not end within {_PATIENCE_S} s") from None


def _key(code: bytes, version: str, options: tuple[str, ...]) -> str:
    """A hash of all that the machine code depends on."""
    parts = (code, version, _FLAGS, _TUNED, options, platform.system(), platform.machine(), _processor())
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


def _build(source: Path, compiler: list[str], options: tuple[str, ...], target: Path) -> None:
    """Compile, then move the result to its place in one step."""
    try:
        place = tempfile.TemporaryDirectory(prefix="build-", dir=target.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise _NoRoom(str(error)) from None
    with place as name:
        folder = Path(name)
        made = folder / target.name
        for tuned in _TUNED:
            command = [*compiler, *_FLAGS, *tuned, *options, "-o", str(made), str(source)]
            try:
                told = _call(command, folder)
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
