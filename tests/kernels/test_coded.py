"""The kernel for formats that are not integers: every format, dtype and shape against the dequantized weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dlqc.backend import CodedKernel, LinearSpec
from dlqc.backends.cpu import BACKEND as CPU
from dlqc.backends.reference import BACKEND as REFERENCE
from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.fp8 import Fp8Format
from dlqc.formats.integer import IntFormat
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.microscaling import MicroscalingFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.planes import PlanesFormat
from dlqc.kernels.reference.coded import Coded

FORMATS = (Nf4Format(), Fp8Format("block"), MicroscalingFormat("nvfp4"), LatticeFormat(), PlanesFormat(group_size=64))
K, N = 128, 40


def problem(fmt: Any, *, bias: bool = True, act: ActFormat | None = None) -> tuple[Any, torch.Tensor, Any]:
    """The lowered site, the weight it stands for, and the bias."""
    weight = fmt.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))
    b = torch.randn(N, generator=torch.Generator().manual_seed(1)) if bias else None
    spec = LinearSpec(K, N, fmt, act, bias)
    assert Coded().supports(spec) is None
    return Coded().lower_coded(spec, weight.pack(), b), weight.dequantize(), b


def run(lowered: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = lowered.op(x, list(lowered.tensors.values()), *lowered.scalars)
    return y


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,)])
def test_values(fmt: Any, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, K, dtype=torch.float64).to(dtype)
    for bias in (True, False):
        lowered, weight, b = problem(fmt, bias=bias)
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        found = run(lowered, x)
        assert found.dtype == dtype
        assert found.shape == (*lead, N)
        bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
        torch.testing.assert_close(
            found.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=bound
        )


def test_activations() -> None:
    act = ActFormat(8)
    lowered, weight, b = problem(Nf4Format(), act=act)
    x = torch.randn(5, K)
    torch.testing.assert_close(run(lowered, x), act.fake_quantize(x) @ weight.T + b, rtol=1e-5, atol=1e-5)
    assert float((run(lowered, x) - (x @ weight.T + b)).abs().max()) > 1e-4


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
def test_opcheck(fmt: Any) -> None:
    lowered, _, _ = problem(fmt)
    arguments = (torch.randn(2, 3, K), list(lowered.tensors.values()), *lowered.scalars)
    # The schema test of torch multiplies its arguments, which float8 cannot.
    small = any(t.dtype == torch.float8_e4m3fn for t in lowered.tensors.values())
    tests = ("test_faketensor",) if small else ("test_schema", "test_faketensor")
    torch.library.opcheck(lowered.op, arguments, test_utils=tests)


def test_who_takes_what() -> None:
    """Each kernel refuses the other kind by name, so that every site has one and only one family."""
    integers, other = LinearSpec(K, N, IntFormat(4, 64), None, False), LinearSpec(K, N, Nf4Format(), None, False)
    for backend in (REFERENCE, CPU):
        assert backend is CPU or [k.name for k in backend.kernels if isinstance(k, CodedKernel)] == ["coded"]
        assert backend.kernels[-1].name == "coded"
        for kernel in backend.kernels:
            if isinstance(kernel, CodedKernel):
                assert kernel.supports(other) is None or kernel.name == "coded16"  # which needs a compiler
                assert kernel.supports(integers) == "codes are integers, which have kernels of their own"
            else:
                assert kernel.supports(other) == "codes of nf4 g64 double are not integers"
    with pytest.raises(ContractError, match=r"^weight: nf4 g64 double is no integer format\. Ask supports\(\) first$"):
        other.integers  # noqa: B018
    assert Coded().supports(replace(other, in_features=100)) == "100 input features do not divide by block 64"
    assert Coded().supports(replace(other, act=ActFormat(8, 48))) is not None
    assert "saves memory, not time" in Coded().note(other)


def test_wrong_tensors_are_refused_at_lowering() -> None:
    weight, spec = Nf4Format().quantize(torch.randn(N, K)), LinearSpec(K, N, Nf4Format(), None, True)
    with pytest.raises(ContractError, match=r"^bias: has_bias=True, and the bias is none$"):
        Coded().lower_coded(spec, weight.pack(), None)
    with pytest.raises(ContractError, match=r"^bias: has_bias=True, and the bias is \(3,\)$"):
        Coded().lower_coded(spec, weight.pack(), torch.zeros(3))
    parts = weight.pack() | {"scale_mean": torch.zeros(2)}
    with pytest.raises(ContractError, match=r"^parts: scale_mean is float32\[2\], must be float32\[1\]$"):
        Coded().lower_coded(spec, parts, torch.zeros(N))


def test_wrong_inputs_are_refused() -> None:
    lowered, _, _ = problem(Nf4Format())
    with pytest.raises(ContractError, match=rf"^x: the input is \(2, 64\) torch.float32, not \[\.\.\., {K}\]"):
        run(lowered, torch.zeros(2, 64))
