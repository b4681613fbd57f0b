"""Native libraries that come with the package, for machines without a compiler.

`make native-libraries` compiles every C++ source for each instruction set of `paths()` into `dlqc/prebuilt`, beside a manifest:

    {"system": …, "machine": …, "libraries": {name: {path: {"file": …, "sha256": …, "sources": …, "flags": […]}}}}

`dlqc.native` asks for one where it cannot compile. A library is given out only if it was made from the very sources of this
package with the flags that are asked for, if its file is whole and nobody else can write to it, and if the processor has its
instructions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import stat
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "prebuilt"
MANIFEST = "manifest.json"

# What processors of these levels have (x86-64 psABI, section 3.1.1), as Linux names it.
_V3 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
_X86 = {
    "avx512vnni": (("-march=x86-64-v4", "-mavx512vnni"), f"{_V4} avx512_vnni"),
    "avx2": (("-march=x86-64-v3",), _V3),
    "portable": (("-march=x86-64", "-DDLQC_PORTABLE"), ""),
}


class Refused(Exception):
    """Why no library is given out, one clause."""


def paths() -> dict[str, tuple[tuple[str, ...], frozenset[str]]]:
    """By instruction set, best first: what the compiler is told, and what the processor must have."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"portable": (("-DDLQC_PORTABLE",), frozenset())}
    return {name: (flags, frozenset(needs.split())) for name, (flags, needs) in _X86.items()}


def entry(file: Path, code: bytes, flags: tuple[str, ...]) -> dict[str, Any]:
    """What the manifest says about a library made of sources with all these flags."""
    return {"file": file.name, "sha256": _hash(file.read_bytes()), "sources": _hash(code), "flags": list(flags)}


def write(folder: Path, libraries: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write the manifest of a folder: the last step, without which nothing in it is used."""
    told = {"system": platform.system(), "machine": platform.machine(), "libraries": libraries}
    (folder / MANIFEST).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def find(name: str, code: bytes, flags: tuple[str, ...], options: tuple[str, ...]) -> tuple[Path, str]:
    """The file of a library, and the instruction set that it is for.

    Args:
        name: of the source. code: its text and that of its headers.
        flags: that the compiler is always told. options: those of the caller; they may name an instruction set.

    Raises:
        Refused: there is none that may be used here.
    """
    try:
        manifest = json.loads((FOLDER / MANIFEST).read_text(encoding="utf-8"))
        return _choose(manifest, name, _hash(code), flags, options)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Refused(f"the manifest of {FOLDER} cannot be read ({type(error).__name__})") from None


def _choose(
    manifest: dict[str, Any], name: str, sources: str, flags: tuple[str, ...], options: tuple[str, ...]
) -> tuple[Path, str]:
    made_for = manifest["system"], manifest["machine"]
    if made_for != (platform.system(), platform.machine()):
        raise Refused(f"the prebuilt libraries are for {made_for[0]} on {made_for[1]}")
    asked, rest = _asked(options)
    runs = [path for path, (_, needs) in paths().items() if needs <= features()]
    if asked is not None and asked not in runs:
        raise Refused(f"this processor has no {asked}")
    reason = f"no prebuilt library of {name} is for this processor"
    made = manifest["libraries"].get(name, {})
    for path in runs if asked is None else [asked]:
        if path not in made:
            continue
        if made[path]["sources"] != sources:
            raise Refused(f"the prebuilt library of {name} was made from other sources")
        if made[path]["flags"] == [*flags, *paths()[path][0], *rest]:
            return _whole(FOLDER / Path(made[path]["file"]).name, made[path]["sha256"]), path
        reason = f"the prebuilt library of {name} was made with other flags"
    raise Refused(reason)


def _asked(options: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The instruction set that options of `dlqc.kernels.cpu.build` name, if they do, and the others."""
    known = paths()
    naming = {flag for flags, _ in known.values() for flag in flags} | {"-O1"}
    given = [option for option in options if option in naming]
    asked = next((path for path, (flags, _) in known.items() if given and set(flags) <= set(given)), None)
    return asked, tuple(option for option in options if option not in naming)


@functools.cache
def features() -> frozenset[str]:
    """What the processor can do and the system allows; nothing where that is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def _whole(file: Path, expected: str) -> Path:
    """The file, if it is what was built and nobody but its owner, this user or root, can have changed it."""
    try:
        for place in (file, file.parent):
            found = place.stat()
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise Refused(f"others can write to {place}")
        if _hash(file.read_bytes()) != expected:
            raise Refused(f"{file.name} is not what the manifest says")
    except OSError as error:
        raise Refused(f"{file.name} cannot be read: {error.strerror}") from None
    return file


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
