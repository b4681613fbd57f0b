"""Fused work on rows of activations: norm + quantize, silu · up (+ block Hadamard) + quantize, block Hadamard (device/rows.py).

    norm_quantize    q, s = codes of gain · h / √(mean h² + ε),   h = x + residual, rounded to the dtype of x
    silu_quantize    q, s = codes of (silu(gate) · up) · H
    block_hadamard   y = x · H,    H block-diagonal, of Sylvester's matrices over √block

Shapes:  x, residual, gate, up [..., K], gain [K] → q int8 [..., K], s float32 [..., 1], h and y as x.
Dtypes:  float32 in between, whatever x is; codes are those of `ActFormat.quantize_dynamic` on the float32 values.
Requires: a block that is a power of two, divides K and is at most 4096.

Elsewhere than on a GPU the ops compute their definitions, which are spelled out here. No pass puts them into graphs yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.device import rows as device

#: The widest block of a Hadamard matrix, and the most features a program holds of a row.
WIDEST = 4096


@torch.library.custom_op("dlqc_triton::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor, residual: Tensor | None, gain: Tensor, epsilon: float, act_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, s, h; see the module docstring. Without a residual h is empty: it would be x."""
    flat = _flat(x, gain.shape[0])
    if not runtime.launchable(x) or not x.numel():
        h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
        wide = h.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * gain.float()
        q, scale, _ = ActFormat(act_bits).quantize_dynamic(normed)
        return q, scale, x.new_empty(0) if residual is None else h
    other = flat if residual is None else _flat(residual, gain.shape[0])
    q, scales = _codes(flat)
    k = flat.shape[1]
    total = flat.new_empty(0 if residual is None else flat.shape, dtype=runtime.interpretable(x))
    with runtime.on(x):
        device.norm_quantize[flat.shape[0],](
            *(flat, other, gain.contiguous(), total, q, scales, k, epsilon),
            **_sizes(k, act_bits),
            ADD=residual is not None,
        )
    h = total if residual is None else total.reshape(x.shape)
    return q.reshape(x.shape), scales.reshape(*x.shape[:-1], 1), h.to(x.dtype)


@norm_quantize.register_fake
def _(x: Tensor, residual: Tensor | None, gain: Tensor, epsilon: float, act_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = _blank(x)
    return q, scale, x.new_empty(0) if residual is None else x.new_empty(x.shape)


@torch.library.custom_op("dlqc_triton::silu_quantize", mutates_args=())
def silu_quantize(gate: Tensor, up: Tensor, block: int, act_bits: int) -> tuple[Tensor, Tensor]:
    """q, s; see the module docstring. `block` 1 turns nothing."""
    flat, other = _flat(gate, up.shape[-1]), _flat(up, gate.shape[-1])
    k = _checked(block, flat.shape[1])
    if not runtime.launchable(gate) or not gate.numel():
        value = torch.nn.functional.silu(gate.float()) * up.float()
        q, scale, _ = ActFormat(act_bits).quantize_dynamic(_turned(value, block))
        return q, scale
    q, scales = _codes(flat)
    with runtime.on(gate):
        device.silu_quantize[flat.shape[0],](
            flat, other, q, scales, k, k, block**-0.5, **_sizes(k, act_bits), BLOCK=block
        )
    return q.reshape(gate.shape), scales.reshape(*gate.shape[:-1], 1)


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
    flat = _flat(x, k)
    y = flat.new_empty(flat.shape, dtype=runtime.interpretable(x))
    width = max(block, min(WIDEST, 1 << (k - 1).bit_length()))
    with runtime.on(x):
        device.hadamard[flat.shape[0], -(-k // width)](
            flat, y, k, k, block**-0.5, K=k, BLOCK=block, WIDTH=width, num_warps=_warps(width)
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
    return x.reshape(-1, width).contiguous()


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


def _codes(flat: Tensor) -> tuple[Tensor, Tensor]:
    m = flat.shape[0]
    return torch.empty_like(flat, dtype=torch.int8), torch.empty(m, dtype=torch.float32, device=flat.device)


def _blank(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _sizes(k: int, bits: int) -> dict[str, int]:
    width = 1 << (k - 1).bit_length()
    return {"K": k, "KP": k, "TOP": (1 << (bits - 1)) - 1, "WIDTH": width, "num_warps": _warps(width)}


def _warps(width: int) -> int:
    """Warps of a program that holds so many features: 16 to 64 a thread."""
    return min(8, max(1, width // 512))
