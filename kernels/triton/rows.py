"""Rows of activations to codes, together with what is done to them just before, and block Hadamard (device/rows.py).

    quantize         q, s, Σ q = codes of what a `Before` makes of x: x, a norm of x, silu(x) · other; turned or not
    norm_quantize    q, s = codes of gain · h / √(mean h² + ε),   h = x + residual, rounded to the dtype of x
    silu_quantize    q, s = codes of (silu(gate) · up) · H
    block_hadamard   y = x · H,    H block-diagonal, of Sylvester's matrices over √block

Shapes:  x, residual, gate, up [..., K], gain [K] → q int8 [..., K], s float32 [..., 1], h and y as x.
Dtypes:  float32 in between, whatever x is; codes are those of `ActFormat.quantize_dynamic` on the float32 values.
Requires: a block that is a power of two, divides K and is at most 4096.

Elsewhere than on a GPU the ops compute their definitions, which are spelled out here. In graphs products take `Before` along
(`integer.py`, `backends/triton_fusion.py`); the ops are for those who write a layer by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.device import rows as device

#: The widest block of a Hadamard matrix, and the most features a program holds of a row.
WIDEST = 4096
#: What the width of a row of codes is rounded up to in a kernel.
MULTIPLE = 128


#: What may be done to a row before it is quantized; numbers are those of the kernel.
KINDS = {"as_is": 0, "rms_norm": 1, "layer_norm": 2, "silu_times": 3}


@dataclass(frozen=True)
class Before:
    """What is done to rows x [..., K] before they are quantized.

    Attributes:
        kind: one of `KINDS`. other: [..., K], the factor of silu(x). gain, shift: [K], of a norm, or None; gain of x as
            it is, too. eps: of a norm.
        block: order of the Hadamard matrices that blocks of the result are multiplied with; 1 for none.
    """

    kind: str = "as_is"
    other: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0
    block: int = 1

    def value(self, x: Tensor) -> Tensor:
        """The definition, float32, or float64 where x is."""
        wide = x if x.dtype == torch.float64 else x.float()
        gain, shift, other = (None if t is None else t.to(wide.dtype) for t in (self.gain, self.shift, self.other))
        if self.kind == "rms_norm":
            wide = F.rms_norm(wide, wide.shape[-1:], gain, self.eps)
        elif self.kind == "layer_norm":
            wide = F.layer_norm(wide, wide.shape[-1:], gain, shift, self.eps)
        elif other is not None:
            wide = F.silu(wide) * other
        elif gain is not None:
            wide = wide * gain
        return wide if self.block == 1 else _turned(wide, self.block)


AS_IS = Before()


@dataclass(frozen=True)
class Codes:
    """Quantized tokens: codes int8 [M, K or more, then zeros], scales float32 [M], sums int32 [_, M] where asked for."""

    q: Tensor
    scales: Tensor
    sums: Tensor


def quantize(
    x: Tensor,
    bits: int,
    before: Before = AS_IS,
    *,
    stored: int | None = None,
    sums: int = 0,
    total: Tensor | None = None,
    float8: bool = False,
    dependent: bool = False,
) -> Codes:
    """Codes of rows x [M, K] on a GPU.

    Args:
        stored: width of a row of codes, K or more. sums: of how many groups of a stored row the codes are summed.
        total: [M, K], takes x + other, which then goes on in place of x.
        float8: codes are uint8, the bits of numbers in e4m3.
        dependent: as of `dispatch.Config`.
    """
    (m, k), group = x.shape, max(1, sums)
    stored = stored or k
    width = 1 << (max(stored, MULTIPLE) - 1).bit_length()
    q = torch.empty(m, stored, dtype=torch.uint8 if float8 else torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    found = torch.empty(group, m, dtype=torch.int32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    other = before.other
    other = other if other is None or other.stride(1) == 1 else other.contiguous()
    given = (other, before.gain, before.shift, total)
    with runtime.on(x):
        device.quantize_rows[(m,)](
            *(x, *(x if t is None else t for t in given), q, scales, found, m),
            *(x.stride(0), x.stride(0) if other is None else other.stride(0), before.eps, before.block**-0.5),
            **{"KIND": KINDS[before.kind], "ADD": total is not None, "GAIN": before.gain is not None},
            **{"SHIFT": before.shift is not None, "BLOCK": before.block, "FLOAT8": float8, "K": k},
            **{"TOP": (1 << (bits - 1)) - 1, "GROUP": stored // group, "SUMS": sums, "WIDTH": width, "KP": stored},
            **runtime.dependent(dependent),
            num_warps=warps(width),
        )
    return Codes(q, scales, found)


@torch.library.custom_op("dlqc_triton::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor, residual: Tensor | None, gain: Tensor, epsilon: float, act_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, s, h; see the module docstring. Without a residual h is empty: it would be x."""
    flat = _flat(x, gain.shape[0])
    before = Before("rms_norm", None if residual is None else _flat(residual, gain.shape[0]), gain, None, epsilon)
    if not runtime.launchable(x) or not x.numel():
        h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
        q, scale, _ = ActFormat(act_bits).quantize_dynamic(before.value(h))
        return q, scale, x.new_empty(0) if residual is None else h
    total = None if residual is None else flat.new_empty(flat.shape, dtype=runtime.interpretable(x))
    codes = quantize(flat, act_bits, before, total=total)
    h = flat.new_empty(0) if total is None else total.to(x.dtype).reshape(x.shape)
    return codes.q.reshape(x.shape), codes.scales.reshape(*x.shape[:-1], 1), h


@norm_quantize.register_fake
def _(x: Tensor, residual: Tensor | None, gain: Tensor, epsilon: float, act_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = _blank(x)
    return q, scale, x.new_empty(0) if residual is None else x.new_empty(x.shape)


@torch.library.custom_op("dlqc_triton::silu_quantize", mutates_args=())
def silu_quantize(gate: Tensor, up: Tensor, block: int, act_bits: int) -> tuple[Tensor, Tensor]:
    """q, s; see the module docstring. `block` 1 turns nothing."""
    flat, other = _flat(gate, up.shape[-1]), _flat(up, gate.shape[-1])
    _checked(block, flat.shape[1])
    before = Before("silu_times", other, block=block)
    if not runtime.launchable(gate) or not gate.numel():
        q, scale, _ = ActFormat(act_bits).quantize_dynamic(before.value(flat))
        return q.reshape(gate.shape), scale.reshape(*gate.shape[:-1], 1)
    codes = quantize(flat, act_bits, before)
    return codes.q.reshape(gate.shape), codes.scales.reshape(*gate.shape[:-1], 1)


@silu_quantize.register_fake
def _(gate: Tensor, up: Tensor, block: int, act_bits: int) -> tuple[Tensor, Tensor]:
    return _blank(gate)


@torch.library.custom_op("dlqc_triton::block_hadamard", mutates_args=())
def block_hadamard(x: Tensor, block: int) -> Tensor:
    """y; see the module docstring."""
    k = _checked(block, x.shape[-1])
    if not runtime.launchable(x) or not x.numel():
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return _turned(x.to(wide), block).to(x.dtype)
    flat = _flat(x, k).contiguous()
    y = flat.new_empty(flat.shape, dtype=runtime.interpretable(x))
    width = max(block, min(WIDEST, 1 << (k - 1).bit_length()))
    with runtime.on(x):
        device.hadamard[flat.shape[0], -(-k // width)](
            flat, y, k, k, block**-0.5, K=k, BLOCK=block, WIDTH=width, num_warps=warps(width)
        )
    return y.to(x.dtype).reshape(x.shape)


@block_hadamard.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


def _flat(x: Tensor, width: int) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != width or not x.dtype.is_floating_point:
        raise ContractError(
            f"the input is {tuple(x.shape)} {x.dtype}, not [..., {width}] of a floating dtype", where="x"
        )
    return x.reshape(-1, width)


def _checked(block: int, k: int) -> int:
    """K, of which `block` must be a divisor."""
    if block < 1 or block & (block - 1) or block > WIDEST or k % block:
        what = f"blocks of {block} do not turn {k} features"
        raise ContractError(what, where="block", remedy=f"Use a power of two up to {WIDEST} that divides them")
    return k


def _turned(value: Tensor, block: int) -> Tensor:
    """value · H by the definition: Sylvester's matrix, entry (-1)^(number of ones that i and j share)."""
    index = torch.arange(block, device=value.device)
    shared = index.unsqueeze(1) & index
    ones = sum((shared >> bit & 1 for bit in range(block.bit_length())), torch.zeros_like(shared))
    matrix = (1 - 2 * (ones % 2)).to(value.dtype) * block**-0.5
    turned: Tensor = value.reshape(*value.shape[:-1], -1, block) @ matrix
    return turned.reshape(value.shape)


def _blank(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def warps(width: int) -> int:
    """Warps of a program that holds so many features: 16 to 64 a thread."""
    return min(8, max(1, width // 512))
