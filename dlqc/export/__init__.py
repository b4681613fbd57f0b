"""Writers for formats that other engines read."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dlqc.errors import ExportError, nearest

if TYPE_CHECKING:
    from dlqc.compiled import Compiled

FORMATS = ("compressed-tensors",)


def export(model: Compiled, folder: str | Path, *, format: str = "compressed-tensors") -> dict[str, int]:
    """Write a compiled model in another engine's format.

    Args:
        folder: a new or empty folder; it appears whole or not at all.
        format: one of `FORMATS`.

    Returns:
        Size in bytes by file name.

    Raises:
        ExportError: the format is unknown or cannot hold the model, or the folder holds something else.
    """
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}", where="format", remedy=nearest(format, FORMATS))
    from dlqc.export import compressed_tensors

    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError("the folder holds something", where=str(target), remedy="Choose an empty or new folder")
    compressed_tensors.check_exportable(model)
    staging: Path | None = None
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
        compressed_tensors.export(model, staging)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(staging)
        for path in staging.iterdir():
            os.chmod(path, 0o644)
        os.chmod(staging, 0o755)
        if target.is_dir():
            target.rmdir()
        os.rename(staging, target)
    except OSError as error:
        raise ExportError(
            f"cannot be written ({error.strerror or error})",
            where=str(target),
            remedy="Free space or choose another folder",
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
    return {p.name: p.stat().st_size for p in sorted(target.iterdir())}
