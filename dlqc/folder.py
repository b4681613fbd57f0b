"""Folders that appear whole or not at all: what artifacts and exports are written through."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into; it takes the place of `target` when the block ends without an error.

    What was at `target` is there until then, and is gone after. A link is followed: its folder is replaced.
    Permissions are those that the process's umask gives (safetensors would keep its files from everybody else). Files
    reach the disk before the rename, because some file systems tell of a full disk only then.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(target, "new")
    staging.mkdir()
    try:
        yield staging
        for path in [*staging.iterdir(), staging]:
            _settle(path, staging.stat().st_mode)
        _swap(staging, target)
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}.{secrets.token_hex(4)}"


def _settle(path: Path, folder_mode: int) -> None:
    if not path.is_dir():
        os.chmod(path, folder_mode & 0o666)
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _swap(staging: Path, target: Path) -> None:
    """Rename; a folder that is there already steps aside first, and comes back if the rename fails."""
    if not target.exists():
        os.rename(staging, target)
        return
    old = _beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
