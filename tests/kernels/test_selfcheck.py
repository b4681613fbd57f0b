"""The self-checks: silent on a good machine, and each finds the fault it is there for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dlqc.kernels.cpu import selfcheck

REASON = "torch._int_mm is not exact on this CPU (8-bit products saturate without VNNI instructions)"


def saturating(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """How int8 products run without VNNI: x + 128 unsigned, neighbours along K added in 16 bits, then corrected."""
    pairs = (x.double() + 128).unsqueeze(-1) * w.double()
    pairs = pairs.reshape(x.shape[0], -1, 2, w.shape[1]).sum(2).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(1) - 128 * w.double().sum(0)).to(torch.int32)


def test_this_machine_is_sound_for_narrow_weights() -> None:
    assert selfcheck.int_mm(8) is None
    assert selfcheck.int_mm(15) is None
    assert selfcheck.int8pack() is None
    assert selfcheck.int4pack() is None


def test_saturation_is_found_from_65_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """255·64·2 fits in 16 bits, 255·65·2 does not."""
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert selfcheck.int_mm.__wrapped__(15) is None
    assert selfcheck.int_mm.__wrapped__(64) is None
    assert selfcheck.int_mm.__wrapped__(65) == REASON
    assert selfcheck.int_mm.__wrapped__(128) == REASON


@pytest.mark.parametrize(
    ("check", "op", "reason"),
    [
        (selfcheck.int8pack, "_weight_int8pack_mm", "torch's _weight_int8pack_mm is wrong on this CPU"),
        (selfcheck.int4pack, "_weight_int4pack_mm_for_cpu", "torch's _weight_int4pack_mm_for_cpu is wrong on this CPU"),
    ],
)
def test_wrong_and_missing_ops_are_found(
    check: Callable[[], str | None], op: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(torch.ops.aten, op)

    def off_by_a_column(*args: object) -> torch.Tensor:
        y: torch.Tensor = real(*args)
        return y.roll(1, dims=1)

    def missing(*args: object) -> torch.Tensor:
        raise RuntimeError("not compiled\nwith details")

    fresh = check.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.ops.aten, op, off_by_a_column)
    assert fresh() == reason
    monkeypatch.setattr(torch.ops.aten, op, missing)
    assert fresh() == "this build of torch cannot run it (not compiled)"


def test_asks_real_tensors_while_a_graph_is_traced() -> None:
    with FakeTensorMode(), torch.device("meta"):
        assert selfcheck.int_mm.__wrapped__(8) is None
        assert selfcheck.int8pack.__wrapped__() is None
        assert selfcheck.int4pack.__wrapped__() is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the switch is for x86 instruction sets")
def test_without_vnni_the_site_goes_elsewhere() -> None:
    """The real thing: oneDNN told to do without VNNI. 8-bit weights are refused, 4-bit ones are still exact."""
    script = """
from dlqc.backend import LinearSpec, choose_kernel, load_backend
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
for bits in (8, 4):
    spec = LinearSpec(64, 48, IntFormat(bits, None), ActFormat(8), False)
    kernel, refusals = choose_kernel(load_backend("cpu"), spec)
    print(kernel.name, refusals)
"""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "DLQC_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    off = {"linear8": "native code is turned off by DLQC_NATIVE=0"}
    why = {**off, "int8_mm": REASON, "linear16": off["linear8"]}
    assert run.stdout.splitlines() == [f"int8pack {why}", f"int8_mm {off}"]
