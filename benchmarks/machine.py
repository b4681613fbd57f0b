"""Where numbers come from: the machine and the versions that every result names."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """Name of the CPU, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def facts() -> dict[str, Any]:
    """Processor, its instruction set as torch sees it, cores, threads in use, versions of Python and torch."""
    return {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
