"""All native libraries of the package ahead of time, for users without a compiler: what `make native-libraries` runs.

    python -m dlqc.kernels.cpu.prebuild

It fills `dlqc/prebuilt`, which a wheel built afterwards brings along. Such a wheel is for one platform:

    python -m pip wheel --no-deps . --config-settings=--build-option=--plat-name=linux_x86_64
"""

from __future__ import annotations

from pathlib import Path

from dlqc import native
from dlqc.kernels.cpu import build


def sources() -> list[tuple[Path, tuple[str, ...]]]:
    """Every C++ source of the package, and the options that it is asked for with."""
    core = [(file, ()) for file in sorted(native.SOURCES.glob("*.cpp"))]
    return [*core, *((file, build.COMMON) for file in sorted(build.SOURCES.glob("*.cpp")))]


if __name__ == "__main__":
    for made in native.prebuild(sources()):
        print(made)
