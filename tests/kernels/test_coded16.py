"""coded16: normal floats, codebooks and sign planes in native code, against the dequantized weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlqc.backend import LinearSpec, choose_kernel
from dlqc.backends.cpu import BACKEND
from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.fp8 import Fp8Format
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.planes import PlanesFormat
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.coded16 import Coded16

LIBRARY = "linear16"  # whose paths `isa` takes in turn

KERNEL = Coded16()
FORMATS = (
    *(Nf4Format(), Nf4Format(32, None), Nf4Format(192)),
    *(CodebookFormat(2), CodebookFormat(3, 96), CodebookFormat(4, 64, table_dtype="float32")),
    *(PlanesFormat(1, 64), PlanesFormat(2, 96), PlanesFormat(2, None), PlanesFormat(3, 64)),
)
K = 192


def stored(fmt: Any, n: int, k: int = K) -> Any:
    g = torch.Generator().manual_seed(n)
    w = torch.randn(n, k, generator=g)
    if isinstance(fmt, CodebookFormat):
        return fmt.quantize(w, torch.randn(n, fmt.groups(k), fmt.entries, generator=g))
    if isinstance(fmt, PlanesFormat) and fmt.order == 2 and fmt.group_size == 96:
        return fmt.quantize(w, orders=[1, 3])
    return fmt.quantize(w)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize(
    ("tokens", "n", "dtype"), [(1, 50, torch.float32), (9, 33, torch.bfloat16), (30, 97, torch.float64)]
)
def test_values(fmt: Any, tokens: int, n: int, dtype: torch.dtype) -> None:
    weight = stored(fmt, n)
    bias = torch.randn(n) if tokens > 1 else None
    act = ActFormat(8, 64) if tokens == 30 else None
    spec = LinearSpec(K, n, fmt, act, bias is not None)
    assert KERNEL.supports(spec) is None
    lowered = KERNEL.lower_coded(spec, weight.pack(), bias)
    x = torch.randn(K, tokens, dtype=torch.float64).to(dtype).T
    y = lowered.op(x, list(lowered.tensors.values()), *lowered.scalars)
    exact = (x if act is None else act.fake_quantize(x.float())).double()
    expected = exact @ weight.dequantize().double().T + (0 if bias is None else bias.double())
    size = exact.abs() @ weight.dequantize().double().abs().T + (0 if bias is None else bias.double().abs())
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-53
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= (K + 8) * 2.0**-24 * size + rounding * expected.abs()).all()


@pytest.mark.parametrize(
    "fmt", [CodebookFormat(3), PlanesFormat(2, None), PlanesFormat(3, None)], ids=lambda f: f.label
)
def test_one_group_of_an_odd_width(fmt: Any) -> None:
    weight = stored(fmt, 5, 77)
    lowered = KERNEL.lower_coded(LinearSpec(77, 5, fmt, None, False), weight.pack(), None)
    x = torch.randn(3, 77)
    y = lowered.op(x, list(lowered.tensors.values()), *lowered.scalars)
    torch.testing.assert_close(y, x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [
        (Fp8Format(), "it has no code for fp8 channel"),
        (CodebookFormat(3, sparse=0.0045), "codebook3 channel +0.45% sparse has a sparse part"),
        (Nf4Format(16), "groups of 16 are not a multiple of 32"),
        (Nf4Format(100), "192 input features do not divide by block 100"),
        (IntFormat(4, 64), "codes are integers, which have kernels of their own"),
    ],
)
def test_refusals(fmt: Any, reason: str) -> None:
    assert KERNEL.supports(LinearSpec(K, 40, fmt, None, False)) == reason


def test_it_goes_before_the_definition() -> None:
    kernel, _ = choose_kernel(BACKEND, LinearSpec(K, 40, Nf4Format(), None, False))
    assert kernel is not None
    assert kernel.name == ("coded16" if build.unavailable("linear16") is None else "coded")
    kernel, refusals = choose_kernel(BACKEND, LinearSpec(K, 40, Fp8Format(), None, False))
    assert kernel is not None
    assert kernel.name == "coded"
    assert refusals["coded16"] == "it has no code for fp8 channel"


def test_wrong_parts_are_refused() -> None:
    parts = stored(Nf4Format(), 40).pack()
    with pytest.raises(ContractError, match="parts: codes is"):
        KERNEL.lower_coded(LinearSpec(K, 41, Nf4Format(), None, False), parts, None)


@pytest.mark.parametrize("fmt", FORMATS[::3], ids=lambda f: f.label)
def test_opcheck(fmt: Any) -> None:
    spec = LinearSpec(K, 40, fmt, None, False)
    lowered = KERNEL.lower_coded(spec, stored(fmt, 40).pack(), None)
    torch.library.opcheck(lowered.op, (torch.randn(2, 3, K), list(lowered.tensors.values()), *lowered.scalars))
