"""The code of Triton kernels without a GPU: interpreted, in a process of its own, and compiled ahead of time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="triton is not installed")


def test_interpreted() -> None:
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted"]
    environment = os.environ | settings | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/triton_aot.py` as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("triton_aot")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted cannot be compiled")
def test_compiled_ahead_of_time(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few kernels within the gates of `benchmarks/triton_aot.py`, which compiles all of them; a part of a file is replaced."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    out = tmp_path / "rows.json"
    stays = {"kernel": "another", "target": "sm_90"}
    out.write_text(json.dumps({"command": "the whole", "rows": [stays]}))
    monkeypatch.setattr(sys, "argv", ["triton_aot.py", "--sample", "--targets", "sm_90", "--out", str(out)])
    assert script.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 compiled, 0 outside of the gates"
    written = json.loads(out.read_text())
    assert written["command"] == "the whole"
    assert len(written["rows"]) == 5
    assert written["rows"][0] == stays


def test_the_committed_code_is_of_what_is_shipped_and_within_the_gates(script: Any) -> None:
    """`benchmarks/triton_aot.py --out docs/results/triton_aot.json` has to be run again when kernels or tables change."""
    held = json.loads((ROOT / "docs" / "results" / "triton_aot.json").read_text())
    assert {name: tuple(limit) for name, limit in held["limits"].items()} == script.LIMITS
    rows = {(row["kernel"], row["target"]): row for row in held["rows"]}
    jobs = {(job.name, target): job for target in script.TARGETS for job in script.shipped(target)}
    assert sorted(rows) == sorted(jobs)
    for key, job in jobs.items():
        assert rows[key]["faults"] == script.faults(job, rows[key]) == []
    early = [key for key in rows if "waits_for_kernel" in rows[key]]
    stay = [key for key in rows if "descriptor_copies" in rows[key]]
    assert {target for _, target in early} == {target for _, target in stay} == {"sm_90", "sm_100"}
    wrong = {"waits_for_kernel": False, "descriptor_copies": 0, "read_ahead": 1}
    assert "begins before" in script.faults(jobs[early[0]], rows[early[0]] | wrong)[-1]
    assert "no copy by descriptor" in script.faults(jobs[stay[0]], rows[stay[0]] | wrong)
