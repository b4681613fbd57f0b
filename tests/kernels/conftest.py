"""The judge of the kernels: float64 values from the formulas, and a derived bound on how far a kernel may be from them.

Nothing of a kernel is used here. A kernel is described by what it is allowed to round (`Rounding`); the bound follows:

    |y - ŷ| ≤ |x̂|·|δW|ᵀ + |δx|·|W + δW|ᵀ        what is rounded before the product, element by element
            + (K + 8)·u·(|x̂|·|W|ᵀ + |b|)         the sum in float32 (u = 2^-24) or float64 (2^-53)
            + u_sum·|x̂·Wᵀ| + u_out·|y|           the result, rounded to the dtype of the sum and to that of x

One per cent covers the products of these errors. A code of x that lies within 1e-4 of a tie may fall to either side:
such an element counts as one step of δx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from dlqc.backend import Kernel, LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import SCALE_DTYPES
from dlqc.formats.packing import pack
from dlqc.kernels.cpu import build as cpu_build
from dlqc.kernels.cuda import build as cuda_build

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty, also inside torch's own code, gives NaN (integers: the largest value) while a test runs."""
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Rounding:
    """What a kernel may round to bfloat16 before the product: x̂, the scales and offsets of W, the elements of W."""

    x: bool = False
    affine: bool = False
    weight: bool = False
    wide: bool = False  # float64 throughout, where x is float64 and not quantized


def rounding(kernel: Kernel, dtype: torch.dtype) -> Rounding:
    """As the module docstring of each kernel says."""
    if kernel.name in ("int4pack", "int8pack"):
        return Rounding(x=True, affine=True)
    if kernel.name == "dequant" and dtype == torch.bfloat16:
        return Rounding(x=True, weight=True)
    return Rounding(wide=kernel.name == "reference")


@dataclass(frozen=True)
class Problem:
    """A random weight for `spec`, in the open and in canonical form."""

    spec: LinearSpec
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None

    @staticmethod
    def make(spec: LinearSpec, seed: int) -> Problem:
        g = torch.Generator().manual_seed(seed)
        n, k, fmt = spec.out_features, spec.in_features, spec.weight
        groups = k // (fmt.group_size or k)
        codes = torch.randint(0, 1 << fmt.bits, (n, k), dtype=torch.uint8, generator=g)
        scales = (0.5 + torch.rand(n, groups, generator=g)).to(SCALE_DTYPES[fmt.scale_dtype])
        zeros = torch.randint(0, 1 << fmt.bits, (n, groups), dtype=torch.uint8, generator=g)
        bias = torch.randn(n, generator=g) if spec.has_bias else None
        return Problem(spec, codes, scales, None if fmt.symmetric else zeros, bias)

    @property
    def canonical(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        bits = self.spec.weight.bits
        zeros = None if self.zeros is None else pack(self.zeros, bits)
        return pack(self.codes, bits), self.scales, zeros, self.bias

    def run(self, kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
        lowered = kernel.lower(self.spec, *self.canonical)
        y: torch.Tensor = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
        return y

    def input(self, lead: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*lead, self.spec.in_features, generator=g, dtype=torch.float64).to(dtype)

    def excess(self, x: torch.Tensor, y: torch.Tensor, allowed: Rounding) -> float:
        """The largest |y - ŷ| over its bound: at most 1 if y is right."""
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], self.spec.out_features)
        if not y.numel():
            return 0.0
        flat, values = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
        act = self.spec.act
        exact, slack = (flat, torch.zeros_like(flat)) if act is None else _quantized(flat, act)
        weight, rounded = self._weight(allowed)
        dx = slack + ((exact - exact.bfloat16().double()).abs() if allowed.x else 0)
        dw = (weight - rounded).abs()
        product = exact @ weight.T
        bias = torch.zeros(values.shape[1]) if self.bias is None else self.bias
        truth = product + bias.double()
        size = exact.abs() @ weight.abs().T + bias.double().abs()
        wide = allowed.wide and x.dtype == torch.float64 and act is None
        bound = exact.abs() @ dw.T + dx @ (weight.abs() + dw).T
        bound += (x.shape[-1] + 8) * ROUNDOFF[torch.float64 if wide else torch.float32] * size
        bound += (ROUNDOFF[torch.bfloat16] if allowed.x else 0) * product.abs() + ROUNDOFF[x.dtype] * truth.abs()
        ratio = (values - truth).abs() / (1.01 * bound + 1e-300)
        return float("inf") if bool(ratio.isnan().any()) else float(ratio.max())

    def _weight(self, allowed: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
        """W in float64, and W as a kernel with this rounding sees it."""
        size = self.spec.weight.group_size or self.spec.in_features
        middle = 2 ** (self.spec.weight.bits - 1)
        codes = self.codes.double()
        scale = self.scales.double().repeat_interleave(size, 1)
        zero = torch.full_like(scale, middle) if self.zeros is None else self.zeros.double().repeat_interleave(size, 1)
        weight = (codes - zero) * scale
        if allowed.affine:
            low, offset = scale.bfloat16().double(), ((middle - zero) * scale).bfloat16().double()
            return weight, (codes - middle) * low + offset
        return weight, weight.bfloat16().double() if allowed.weight else weight


def _quantized(x: torch.Tensor, act: ActFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ in float64 by the formulas of `dlqc.formats.activation`, and one step where a code is close to a tie."""
    parts = x.float().double().reshape(x.shape[0], -1, act.group_size or x.shape[1])
    half = 2 ** (act.bits - 1)
    if act.symmetric:
        scale = parts.abs().amax(-1, keepdim=True) / (half - 1)
        low, high = torch.full_like(scale, 1 - half), torch.full_like(scale, half - 1)
        loose = torch.zeros_like(scale)
    else:
        least, most = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
        scale = (most - least) / (2 * half - 1)
        start = -half - least / scale
        zero = start.round()
        low, high = -half - zero, half - 1 - zero
        loose = _near_tie(start).double()
    scale = torch.where(scale == 0, 1.0, scale)
    steps = parts / scale
    slack = ((_near_tie(steps).double() + loose) * scale).reshape(x.shape)
    return (steps.round().clamp(low, high) * scale).reshape(x.shape), slack


def _near_tie(value: torch.Tensor) -> torch.Tensor:
    return ((value - value.floor()) - 0.5).abs() < 1e-4


class Judge:
    """What tests in this folder ask for by fixture, since test folders are not packages."""

    make = staticmethod(Problem.make)
    rounding = staticmethod(rounding)
    replace = staticmethod(replace)


@pytest.fixture(scope="session")
def judge() -> type[Judge]:
    return Judge


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had all that CUDA kernels need."""
    monkeypatch.setattr(cuda_build, "unavailable", lambda name: None)


@pytest.fixture(params=cpu_build.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path of the library that a file names in LIBRARY, on a machine that can run it."""
    monkeypatch.setenv("DLQC_CPU_ISA", request.param)
    reason = cpu_build.unavailable(request.module.LIBRARY)
    if reason is not None:
        pytest.skip(reason)
    assert cpu_build.isa(request.module.LIBRARY) == request.param
    return str(request.param)
