"""Instruments: what watches passes from outside.

Timing    seconds and peak memory of every pass, into `records`
Dump      the graph as text after every pass, and the difference to the one before, into a folder
"""

from __future__ import annotations

import difflib
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from dlqc.contract import Context, Pass, PassReport
from dlqc.graph import structure
from dlqc.manager import Instrument


def peak_memory() -> float:
    """Peak resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


@dataclass(frozen=True)
class Record:
    """Seconds that a pass took, and the process's peak memory after it, in MB."""

    seconds: float
    peak_mb: float


class Timing(Instrument):
    """Wall-clock seconds and peak memory by pass; in a nested pipeline, the pass's own share with its statistics."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._start: dict[int, float] = {}

    def before(self, p: Pass, graph: fx.Graph, ctx: Context) -> None:
        self._start[id(p)] = time.perf_counter()

    def after(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        self.records.append(
            Record(report.metrics.get("seconds", time.perf_counter() - self._start[id(p)]), peak_memory())
        )


class Dump(Instrument):
    """Writes `NN-pass.txt` and `NN-pass.diff` after every pass, and `error-pass.txt` where one fails.

    For a pass of a nested pipeline the difference has one part a block, under a line that names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._last: list[str] = []
        self._count = 0
        self._parts: dict[int, list[str]] = {}

    def before(self, p: Pass, graph: fx.Graph, ctx: Context) -> None:
        if not self._last:
            self._last = self._write("00-capture.txt", graph)

    def after_block(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        difference = self._difference(graph)
        if ctx.block is None or ctx.block in ctx.blocks or difference:  # of what follows the blocks, only what changed
            block = "" if ctx.block is None else f"# block {ctx.block.index}\n"
            self._parts.setdefault(id(p), []).append(block + difference)

    def after(self, p: Pass, graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        self._count += 1
        name = f"{self._count:02d}-{p.name}"
        parts = self._parts.pop(id(p), None) or [self._difference(graph)]
        self._write(f"{name}.txt", graph)
        (self._folder / f"{name}.diff").write_text("\n".join(parts) + "\n")

    def _difference(self, graph: fx.Graph) -> str:
        """What changed since the last look."""
        lines = structure(graph).splitlines()
        diff = list(difflib.unified_diff(self._last, lines, "before", "after", lineterm="", n=1))
        self._last = lines
        return "\n".join(diff)

    def on_error(self, p: Pass, graph: fx.Graph, ctx: Context, error: Exception) -> None:
        self._write(f"error-{p.name}.txt", graph)

    def _write(self, name: str, graph: fx.Graph) -> list[str]:
        text = structure(graph)
        (self._folder / name).write_text(text + "\n")
        return text.splitlines()
