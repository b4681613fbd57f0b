"""What this machine has, and why something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from dlqc import native
from dlqc.backend import BACKENDS, LinearSpec, automatic, choose_kernel, load_backend, remark
from dlqc.errors import DlqcError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.planes import PlanesFormat

_PROBES = {
    "w4a16 g128": LinearSpec(4096, 4096, IntFormat(4, 128, False), None, False),
    "w3a16 g128": LinearSpec(4096, 4096, IntFormat(3, 128, False), None, False),
    "w2a16 g128": LinearSpec(4096, 4096, IntFormat(2, 128, False), None, False),
    "w8a16 per channel": LinearSpec(4096, 4096, IntFormat(8, None, True), None, False),
    "w8a8 per token": LinearSpec(4096, 4096, IntFormat(8, None, True), ActFormat(8), False),
    "w8a8 static": LinearSpec(4096, 4096, IntFormat(8, None, True), ActFormat(8, sets=1), False),
    "w4a8 g128": LinearSpec(4096, 4096, IntFormat(4, 128, False), ActFormat(8), False),
    "two planes g128": LinearSpec(4096, 4096, PlanesFormat(2, 128), None, False),
}


def examine() -> dict[str, dict[str, Any]]:
    """Versions, the processor, and for every backend which kernel each common scheme gets, with the reasons."""
    found: dict[str, dict[str, Any]] = {
        "versions": {
            name: _version(name) for name in ("dlqc", "torch", "transformers", "triton", "compressed-tensors")
        },
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor features": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "native code": _native(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        },
    }
    found["backend auto"] = {
        f"for a model on a {what}": " because ".join(automatic(torch.device(kind)))
        for what, kind in (("CPU", "cpu"), ("GPU", "cuda"))
    }
    for name in BACKENDS:
        found[f"backend {name}"] = _backend(name)
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native() -> str:
    reason, prebuilt = native.available(), native.prebuilt()
    if reason is None and prebuilt is not None:
        return f"in use, {prebuilt}"
    return "in use" if reason is None else f"not in use ({reason}); torch does its work, more slowly"


def _backend(name: str) -> dict[str, str]:
    try:
        backend = load_backend(name)
    except DlqcError as error:
        return {"not available": str(error)}
    rows = {}
    for scheme, spec in _PROBES.items():
        kernel, refusals = choose_kernel(backend, spec)
        note = remark(kernel, spec) if kernel else ""
        passed = "".join(f"; not {name}: {why}" for name, why in refusals.items())
        rows[scheme] = f"{kernel.name if kernel else 'none'}{f' ({note})' if note else ''}{passed}"
    return rows
