"""What every kernel shares: reading the canonical weight, and the shapes of `y = act(x) · dequant(W)ᵀ + b`.

Letters: M tokens (all leading dimensions of x), K input features, N output features, G groups a row of W.

    canonical weight    packed uint8 [N, 4·⌈K·bits/32⌉], scales [N, G], zeros uint8 [N, 4·⌈G·bits/32⌉] or None
                        (the tensors of `dlqc::linear_packed`: codes and zero points in layout "rows")
    activation format   three scalars of an op: bits (0: x is not quantized), group (0: per token), symmetric
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.packing import unpack

if TYPE_CHECKING:
    from dlqc.backend import LinearSpec


def canonical(
    spec: LinearSpec,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> QuantizedWeight:
    """Unpack a canonical weight; a ContractError if a tensor is not what `spec` says."""
    shape = (spec.out_features, spec.in_features)
    codes = unpack(packed, spec.integers.bits, spec.in_features)
    if codes.shape != shape:
        raise ContractError(f"the packed weight holds {codes.shape[0]} rows, not {shape[0]}", where="packed")
    points = None if zeros is None else unpack(zeros, spec.integers.bits, spec.integers.groups(spec.in_features))
    if (bias is not None) != spec.has_bias:
        raise ContractError(
            f"has_bias={spec.has_bias}, but a bias {'is missing' if bias is None else 'came'}", where="bias"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ContractError(f"the bias is {tuple(bias.shape)}, not {shape[:1]}", where="bias")
    return QuantizedWeight(codes, scales, points, spec.integers)


def misfit(spec: LinearSpec) -> str | None:
    """None if W is integers and the groups of weight and activation divide K, else the reason, one clause."""
    if not isinstance(spec.weight, IntFormat):
        return f"codes of {spec.weight.label} are not integers"
    return spec.weight.check(spec.in_features) or (spec.act.check(spec.in_features) if spec.act else None)


def act_scalars(act: ActFormat | None) -> tuple[int, int, bool]:
    """The three scalars that stand for `act` in the arguments of an op."""
    return (act.bits, act.group_size or 0, act.symmetric) if act else (0, 0, True)


def act_format(bits: int, group: int, symmetric: bool) -> ActFormat | None:
    """Undo `act_scalars`."""
    return ActFormat(bits, group or None, symmetric) if bits else None


def rows(x: torch.Tensor, in_features: int) -> torch.Tensor:
    """x [..., K] as [M, K]. Checked, because a wrong K that divides would reshape in silence."""
    if x.dim() == 0 or x.shape[-1] != in_features or not x.dtype.is_floating_point:
        what = f"the input is {tuple(x.shape)} {x.dtype}, not [..., {in_features}] of a floating dtype"
        raise ContractError(what, where="x")
    return x.reshape(-1, in_features)


def outcome(y: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """y [M, N] plus the bias, in the dtype and leading dimensions of x. The sum is made in float32 or wider."""
    if bias is not None:
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        y = y.to(wide) + bias.to(wide)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[1])


def blank(x: torch.Tensor, in_features: int, out_features: int) -> torch.Tensor:
    """What `outcome` returns, without values: the fake implementation of every kernel, and the result for no tokens."""
    rows(x, in_features)
    return x.new_empty((*x.shape[:-1], out_features))
