"""Writers for formats that other engines read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from dlqc.errors import ExportError, nearest
from dlqc.folder import whole_folder

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

    target = Path(os.path.abspath(folder))
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ExportError("the folder holds something", where=str(target), remedy="Choose an empty or new folder")
        compressed_tensors.check_exportable(model)
        with whole_folder(target) as staging:
            compressed_tensors.export(model, staging)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(staging)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"cannot be written ({getattr(error, 'strerror', None) or error})",
            where=str(target),
            remedy="Free space or choose another folder",
        ) from error
    return {p.name: p.stat().st_size for p in sorted(target.iterdir())}
