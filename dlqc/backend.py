"""The contract between the compiler and the kernels: what a quantized linear computes, and who can run it.

The core never imports a kernel. A backend is found by name (`dlqc.backends.<name>`), asked at lowering which of its
kernels supports each site, and gives back the op and the tensors that the site calls from then on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from dlqc.errors import ContractError, LoweringError, nearest
from dlqc.formats.activation import ActFormat
from dlqc.formats.contract import WeightFormat
from dlqc.formats.integer import IntFormat
from dlqc.weights import Weights

BACKENDS = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class LinearSpec:
    """A quantized linear `y = act(x) · dequant(W)ᵀ + b`, without its tensors.

    Attributes:
        in_features: K. out_features: N.
        weight: number format of W, [N, K]: integers, or any other.
        act: how x is quantized before the product, on the fly or with fixed scales; None for 16/32-bit activations.
        has_bias: whether b [N] is added.
        bfloat16: whether a kernel may round x to bfloat16 where nothing else rounds it (`lower(bfloat16=True)`).
    """

    in_features: int
    out_features: int
    weight: IntFormat | WeightFormat
    act: ActFormat | None
    has_bias: bool
    bfloat16: bool = False

    @property
    def integers(self) -> IntFormat:
        """`weight`, where it is integers: what a kernel for integers reads once it has said that it supports the site."""
        if not isinstance(self.weight, IntFormat):
            raise ContractError(
                f"{self.weight.label} is no integer format", where="weight", remedy="Ask supports() first"
            )
        return self.weight


@dataclass(frozen=True)
class Lowered:
    """What a kernel makes of a site: the node becomes `op(x, *tensors, *scalars)`.

    Attributes:
        op: a registered custom op (`torch.ops.<namespace>.<name>.default`).
        tensors: role -> the kernel's own layout of the weight, in call order; None stands for an absent bias.
        scalars: the remaining arguments, all int, float, bool or str.
        listed: whether the op takes the tensors as one list, `op(x, [*tensors], *scalars)`; then none is None.
    """

    op: Callable[..., torch.Tensor]
    tensors: dict[str, torch.Tensor | None]
    scalars: tuple[int | float | bool | str, ...] = ()
    listed: bool = False


class Kernel(Protocol):
    """One way to run a quantized linear with integer weights on one kind of device."""

    @property
    def name(self) -> str: ...

    def supports(self, spec: LinearSpec) -> str | None:
        """None if the kernel can run the site, else the reason it cannot, one clause without a full stop."""

    def note(self, spec: LinearSpec) -> str:
        """What a user should know about how this kernel runs the site (arithmetic, memory), or ''."""

    def lower(
        self,
        spec: LinearSpec,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> Lowered:
        """Turn the canonical packed weight (`dlqc.formats.packing`, layout "rows") into the kernel's own layout."""


@runtime_checkable
class CodedKernel(Protocol):
    """One way to run a quantized linear whose weight is in a format that is not integers."""

    @property
    def name(self) -> str: ...

    def supports(self, spec: LinearSpec) -> str | None:
        """As of `Kernel`."""

    def note(self, spec: LinearSpec) -> str:
        """As of `Kernel`."""

    def lower_coded(self, spec: LinearSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> Lowered:
        """Turn the stored tensors of the format, by role, into the kernel's own layout."""


@runtime_checkable
class StaticKernel(Protocol):
    """A kernel for integer weights that takes activations with fixed scales, and no others.

    The node becomes `op(x, bucket, *tensors, *scalars)`: bucket int64, of the leading sizes of x, is the set of scales that each
    row takes, or None.
    """

    @property
    def name(self) -> str: ...

    def supports(self, spec: LinearSpec) -> str | None:
        """As of `Kernel`."""

    def note(self, spec: LinearSpec) -> str:
        """As of `Kernel`."""

    def lower_static(
        self,
        spec: LinearSpec,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        act_scale: torch.Tensor,
        act_zero: torch.Tensor | None,
    ) -> Lowered:
        """As `Kernel.lower`, with the scales float32 [S, G] and zero points int8 [S, G] (None: symmetric) of x."""


AnyKernel = Kernel | CodedKernel | StaticKernel


class Backend(Protocol):
    """A device family: kernels in order of preference, and whether linears that read one input run as one call."""

    @property
    def name(self) -> str: ...

    @property
    def kernels(self) -> Sequence[AnyKernel]: ...

    @property
    def merges(self) -> bool: ...

    def fuse(self, graph: fx.Graph, weights: Weights) -> Mapping[str, int]:
        """Join calls of its kernels with their neighbours in a lowered graph; how many of each kind were joined.

        Other nodes that became ops of the backend are counted as "native_<what>".
        """

    def available(self) -> str | None:
        """None if the backend can run on this machine, else the reason it cannot."""


def offered(kernel: AnyKernel, spec: LinearSpec) -> LinearSpec | None:
    """The site as a kernel sees it; None if it is not for such sites.

    Activations with fixed scales go to kernels that take them. Any other kernel gets x after an op of its own has rounded it, and
    need not know: x̂ is what it multiplies. So it is where the mask ratio chooses the width.
    """
    if isinstance(kernel, StaticKernel):
        return spec if spec.act is not None and spec.act.static else None
    return replace(spec, act=None) if spec.act is not None and spec.act.by_node else spec


def remark(kernel: AnyKernel, spec: LinearSpec) -> str:
    """What a user should know about how a kernel runs a site, or ''."""
    seen = offered(kernel, spec)
    said = kernel.note(seen or spec)
    if seen is None or seen.act == spec.act or spec.act is None:
        return said
    simulated = f"activations are rounded to {spec.act.label} by an op of their own, then multiplied as floats"
    return f"{said}; {simulated}" if said else simulated


def choose_kernel(backend: Backend, spec: LinearSpec) -> tuple[AnyKernel | None, dict[str, str]]:
    """The first kernel that supports the site, and why each one before it (or every one) does not."""
    refusals: dict[str, str] = {}
    for kernel in backend.kernels:
        seen = offered(kernel, spec)
        if seen is None:
            continue
        reason = kernel.supports(seen)
        if reason is None:
            return kernel, refusals
        what = "fixed scales" if spec.act is not None and spec.act.static else "widths by mask ratio"
        refusals[kernel.name] = reason if seen is spec else f"it takes no {what} (behind them: {reason})"
    return None, refusals


def automatic(device: torch.device | None) -> tuple[str, str]:
    """The backend that "auto" stands for, for a model on a device (None: of no known one), and why.

    On a CUDA GPU that is Triton's; where that cannot run, plain PyTorch, since kernels of the `cpu` backend are for CPUs alone.
    """
    if device is None or device.type != "cuda":
        return "cpu", "the model is on no CUDA GPU"
    triton: Any = importlib.import_module("dlqc.backends.triton")
    reason = triton.BACKEND.available()
    return (
        ("triton", "the model is on a GPU") if reason is None else ("reference", f"no Triton kernel can run: {reason}")
    )


def load_backend(name: str, device: torch.device | None = None) -> Backend:
    """Find a backend by name; `auto` goes by the device that the model is on (`automatic`)."""
    if name == "auto":
        name = automatic(device)[0]
    if name not in BACKENDS:
        raise LoweringError(f"unknown backend {name!r}", where="backend", remedy=nearest(name, (*BACKENDS, "auto")))
    module: Any = importlib.import_module(f"dlqc.backends.{name}")
    backend: Backend = module.BACKEND
    reason = backend.available()
    if reason is not None:
        raise LoweringError(f"backend {name!r} cannot run here: {reason}", where="backend", remedy="Use backend='auto'")
    return backend
