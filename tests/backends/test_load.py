"""Finding a backend by name."""

from __future__ import annotations

import sys

import pytest
import torch

import dlqc
from dlqc.backend import BACKENDS, automatic, load_backend
from dlqc.backends import cpu, cuda, triton
from dlqc.backends.cpu import BACKEND as CPU
from dlqc.backends.reference import BACKEND as REFERENCE
from dlqc.errors import LoweringError
from dlqc.kernels.triton import runtime


def test_every_name_loads() -> None:
    for name in BACKENDS:
        gpu = {"triton": triton.BACKEND, "cuda": cuda.BACKEND}.get(name)
        if gpu is None or gpu.available() is None:
            assert load_backend(name).name == name
    assert load_backend("auto").name == "cpu"


def test_auto_goes_by_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would say is put in its place: nothing here asks for one."""
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(runtime, "unavailable", lambda: None)
    assert automatic(gpu) == ("triton", "the model is on a GPU")
    assert load_backend("auto", gpu).name == "triton"
    for device in (None, *map(torch.device, ("cpu", "meta", "mps", "xpu"))):
        assert automatic(device) == ("cpu", "the model is on no CUDA GPU")
        assert load_backend("auto", device).name == "cpu"
    monkeypatch.setattr(runtime, "unavailable", lambda: "the GPU has compute capability 7.5, it needs 8.0")
    said = "no Triton kernel can run: the GPU has compute capability 7.5, it needs 8.0"
    assert automatic(gpu) == ("reference", said)
    assert load_backend("auto", gpu).name == "reference"


def test_compile_and_plan_say_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device | None] = []

    class Asked(Exception):
        pass

    def ask(_: str, device: torch.device | None = None) -> None:
        seen.append(device)
        raise Asked

    monkeypatch.setattr(sys.modules["dlqc.compile"], "load_backend", ask)
    for call in (dlqc.compile, dlqc.plan):
        with pytest.raises(Asked):
            call(torch.nn.Linear(2, 2, device="meta"), ())
    assert seen == [torch.device("meta")] * 2


def test_names_of_kernels_are_unique() -> None:
    """One name is one kernel; CPU and reference end with the reference's kernel for formats that are not integers."""
    kernels = [kernel for backend in (REFERENCE, CPU, cuda.BACKEND) for kernel in backend.kernels]
    assert len({kernel.name for kernel in kernels}) == len({type(kernel) for kernel in kernels}) == len(kernels) - 1
    assert [backend.kernels[-1].name for backend in (REFERENCE, CPU)] == ["coded", "coded"]


def test_the_cuda_backend_ends_with_all_of_triton_s() -> None:
    assert [kernel.name for kernel in cuda.BACKEND.kernels][:2] == ["w4a8", "sign_planes"]
    assert cuda.BACKEND.kernels[2:] == triton.BACKEND.kernels
    assert cuda.BACKEND.merges


def test_a_misspelt_name_finds_its_neighbour() -> None:
    with pytest.raises(LoweringError) as caught:
        load_backend("refrence")
    assert str(caught.value) == "backend: unknown backend 'refrence'. Did you mean 'reference'?"


def test_a_foreign_name_lists_what_there_is() -> None:
    with pytest.raises(LoweringError) as caught:
        load_backend("zzz")
    assert str(caught.value) == f"backend: unknown backend 'zzz'. Known: {', '.join(sorted((*BACKENDS, 'auto')))}"


def test_an_absent_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        name = "cpu"
        kernels = ()

        def available(self) -> str | None:
            return "no such device"

    monkeypatch.setattr(cpu, "BACKEND", Absent())
    with pytest.raises(LoweringError) as caught:
        load_backend("cpu")
    assert str(caught.value) == "backend: backend 'cpu' cannot run here: no such device. Use backend='auto'"
