"""CUDA kernels as ops and as a backend, without a GPU; compiled ahead of time where nvcc is at hand."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from plane_weights import stored

from dlqc import native
from dlqc.backend import LinearSpec, choose_kernel, load_backend
from dlqc.backends.cuda import BACKEND
from dlqc.backends.triton import BACKEND as TRITON
from dlqc.errors import LoweringError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.planes import PlanesFormat
from dlqc.kernels.cuda import build, launch, planes, w4a8
from dlqc.kernels.triton import runtime

ROOT = Path(__file__).parents[2]
TOKEN8 = ActFormat(8)
W4A8, PLANES = w4a8.W4A8(), planes.SignPlanes()

needs_compiler = pytest.mark.skipif(native.compiler() is not None, reason=f"{native.compiler()}")


@pytest.mark.parametrize("kernel", ["w4a8", "planes"])
def test_ops_are_well_behaved(judge: Any, kernel: str) -> None:
    """On the CPU they compute their definitions; opcheck, export and torch.compile see one node."""
    if kernel == "w4a8":
        problem = judge.make(LinearSpec(128, 48, IntFormat(4, 128, False), TOKEN8, True), 1)
        lowered = W4A8.lower(problem.spec, *problem.canonical)
        x = problem.input((2, 3), torch.float32, 1)
        assert problem.excess(x, problem.run(W4A8, x), judge.rounding(W4A8, x.dtype)) <= 1
    else:
        weight, x = stored(PlanesFormat(2, 64), 48, 128, [3, 1], 1), torch.randn(2, 3, 128)
        lowered = PLANES.lower_coded(LinearSpec(128, 48, weight.format, TOKEN8, False), weight.pack(), None)
        expected = TOKEN8.fake_quantize(x).double() @ weight.dequantize().double().T
        y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    rest = (*lowered.tensors.values(), *lowered.scalars)
    assert lowered.op(x[:0], *rest).shape == (0, 3, 48)
    torch.library.opcheck(lowered.op, (x, *rest), test_utils=("test_schema", "test_faketensor"))

    class Site(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return lowered.op(x, *rest)

    program = torch.export.export(Site(), (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=1, max=4096)},))
    assert sum("dlqc_cuda" in str(node.target) for node in program.graph.nodes) == 1
    torch._dynamo.reset()
    x = torch.randn(2, 9, 128)
    torch.testing.assert_close(torch.compile(Site(), backend="aot_eager", fullgraph=True)(x), Site()(x), rtol=0, atol=0)


def test_packing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4a8, "CHUNK", 1)  # every tile by itself
    monkeypatch.setattr(planes, "CHUNK", 1)
    for n, k in ((1, 1), (130, 300)):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        assert torch.equal(w4a8.restore(w4a8.arrange(codes), n, k).int(), codes.int() - 8)
        signs = torch.randint(0, 2, (n, -(-k // 128) * 128), dtype=torch.uint8)
        assert torch.equal(planes.restore(planes.arrange(signs), n), signs)


CHOICES = [
    (IntFormat(4, None), TOKEN8, "w4a8"),
    (IntFormat(4, 128, False), TOKEN8, "w4a8"),
    (IntFormat(4, 64), TOKEN8, "w4a8: weights have a scale per group of 64, it needs a multiple of 128"),
    (IntFormat(4, 128, True, "float32"), TOKEN8, "w4a8: scales of groups are float32, it needs bfloat16"),
    (IntFormat(8, None), TOKEN8, "w4a8: weights have 8 bits, it needs 4"),
    (IntFormat(4, None), ActFormat(8, 64), "w4a8: activations have a scale per group of 64, it needs one per token"),
    (IntFormat(4, None), ActFormat(8, None, False), "w4a8: activations are asymmetric, it needs symmetric ones"),
    (IntFormat(4, None), None, "w4a8: activations are not quantized"),
    (PlanesFormat(2), None, "sign_planes"),
    (PlanesFormat(3, 64), TOKEN8, "sign_planes"),
    (PlanesFormat(2, 32), None, "sign_planes: groups of 32 are not a multiple of 64"),
    (PlanesFormat(2, 96), None, "sign_planes: 256 input features do not divide by group 96"),
    (PlanesFormat(2, 128, "float16"), None, "sign_planes: scales are float16, it needs bfloat16"),
    (Nf4Format(64), None, "sign_planes: codes of nf4 g64 double are no sign planes"),
]


@pytest.mark.parametrize(("weight", "act", "said"), CHOICES)
def test_who_gets_which_site(
    anywhere: None, weight: object, act: ActFormat | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "unavailable", lambda: None)
    kernel, refusals = choose_kernel(BACKEND, LinearSpec(256, 64, weight, act, True))  # type: ignore[arg-type]
    name, _, reason = said.partition(": ")
    if not reason:
        assert kernel is not None
        assert kernel.name == name
        return
    assert refusals[name] == reason
    # What these two refuse goes to Triton's, unless no kernel can have it: features that groups do not divide.
    assert kernel in TRITON.kernels or (kernel is None and "do not divide" in reason)


def test_sums_that_could_overflow_are_refused(anywhere: None) -> None:
    spec = LinearSpec(w4a8.MOST_FEATURES + 1, 64, IntFormat(4, None), TOKEN8, False)
    assert W4A8.supports(spec) == "sums over 132105 input features can overflow, it takes up to 132104"


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal() -> str:
        with pytest.raises(LoweringError) as caught:
            load_backend("cuda")
        start, end = "backend: backend 'cuda' cannot run here: ", ". Use backend='auto'"
        assert str(caught.value).startswith(start)
        assert str(caught.value).endswith(end)
        reason = str(caught.value)[len(start) : -len(end)]
        assert W4A8.supports(LinearSpec(128, 64, IntFormat(4), TOKEN8, False)) == reason
        assert PLANES.supports(LinearSpec(128, 64, PlanesFormat(), None, False)) == reason
        return reason

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal() == "torch sees no GPU (it takes a CUDA build of torch and an NVIDIA driver)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert refusal() == "the GPU has compute capability 7.5, it needs 8.0 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("PATH", "NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = "no CUDA compiler (nvcc, $CUDA_HOME/bin/nvcc, /usr/local/cuda/bin/nvcc, or $NVCC)"
    assert refusal() == f"{missing}: install the CUDA toolkit, or use backend='triton'"
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    assert refusal() == ("/nowhere/nvcc: No such file or directory: install the CUDA toolkit, or use backend='triton'")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert refusal() == "the GPU is none of NVIDIA's: backend='triton' takes it"


@needs_compiler
def test_a_launch_that_is_refused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="^a CUDA kernel was not launched: no such number of tokens in a block$"):
        build.check(emulation.library("planes"), -1)
    monkeypatch.setattr(native, "library", lambda *given: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build, "lacking", lambda: "torch sees no GPU")
    with pytest.raises(RuntimeError, match="^the CUDA library planes is not there: torch sees no GPU$"):
        build.library("planes")


def test_native_code_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "lacking", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("DLQC_NATIVE", "0")
    assert build.unavailable("w4a8") == "native code is turned off by DLQC_NATIVE=0"


def test_a_launch_follows_from_the_bucket() -> None:
    assert [launch.bucket(m) for m in (1, 8, 9, 64, 65, 5000)] == [8, 8, 16, 64, 128, 8192]
    shares = [launch.splits(m, m, 4096, 32, 4096 * 2048, runtime.H200) for m in (8, 32, 64)]
    assert shares == [8, 8, 4]
    assert launch.splits(32, 32, 24576, 32, 24576 * 2048, runtime.H200) == 2
    assert launch.splits(128, 128, 4096, 32, 4096 * 2048, runtime.H200) == 2
    assert launch.splits(8, 8, 128, 4, 128 * 256, runtime.H200) == 1


RESULTS = ROOT / "docs" / "results" / "cuda_aot.json"


def test_committed_machine_code_is_of_these_sources() -> None:
    """`benchmarks/cuda_aot.py --out docs/results/cuda_aot.json` has to be run again when a source changes."""
    found = json.loads(RESULTS.read_text())
    code = b"".join(path.read_bytes() for path in sorted(build.SOURCES.iterdir()))
    assert found["sources"] == hashlib.sha256(code).hexdigest()
    assert {row["target"] for row in found["rows"]} == {"sm_80", "sm_90a"}
    assert not any(row["faults"] or row["spills"] or row["stack"] for row in found["rows"])


@pytest.mark.skipif(native.compiler(build.NVCC) is not None, reason=f"{native.compiler(build.NVCC)}")
def test_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One source for one GPU within the gates of `benchmarks/cuda_aot.py`, which compiles both for two."""
    pytest.importorskip("triton", reason="machine code is read with Triton's tools")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cuda_aot = importlib.import_module("cuda_aot")
    rows = cuda_aot.compile_all("planes", "sm_90a")
    assert [row["faults"] for row in rows] == [[]] * 12
    assert sum(row.get("products", {}).get("HMMA", 0) for row in rows) == 2 * (16 + 32 + 64 + 128)
    wrong = {**rows[2], "stack": 8, "outside": 3, "products": {}, "per_weight": {"instructions": 9.0, "integer": 0.0}}
    assert cuda_aot.faults(wrong) == [
        "8 bytes of stack",
        "no tensor-core instruction",
        "3 tensor-core instructions outside of the loop",
        "9.0 instructions a weight, at most 1.6",
        "0.0 integer a weight, at most 0.9",
    ]
