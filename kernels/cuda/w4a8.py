"""4-bit weights by 8-bit activations on the tensor cores, exact integer sums, in CUDA (csrc/w4a8.cu).

    y = (Σ_k (code - zero) · q) · s_w · s_x + b,    q, s_x = codes and scales of x, one scale per token, quantized on the fly

Shapes:  x [..., K]; words as of `arrange`; scales float32 [1, N'] for one per channel, else bfloat16 [K'/128, N']; points
         bfloat16 likewise, 16·(8 - zero), or None; N' and K' are padded to 128; bias float32 [N] or None → [..., N].
Dtypes:  codes of x are those of `ActFormat.quantize_dynamic`. Sums over K (over 128 features where the weight has groups) are
         exact; scales, zero points of groups and the bias are applied in float32; then the dtype of x.
Layout:  4-bit codes in the order of the fragments of mma.sync m16n8k32 (sm_80 and newer; wgmma is not used, so on Hopper
         the tensor cores reach about two thirds of their rate). One packed copy for every number of tokens.
Order:   shares of K are summed in a fixed order, without atomics; what a launch does follows from the bucket of M.
Requires: one symmetric scale per token; one scale per channel, or bfloat16 scales of groups that 128 divides; sums that fit.

On a CPU the op computes the definition, with float64 in place of the integers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.activation import ActFormat
from dlqc.kernels.cuda import build, launch
from dlqc.kernels.cuda.launch import STEP
from dlqc.kernels.reference.layout import blank, canonical, misfit, outcome, rows
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.packing import CHUNK, columns, padded

#: 16 · 8 · 127 a term: up to here sums are exact in int32, and sums of codes in float32.
MOST_FEATURES = ((1 << 31) - 1) // (128 * 127)


class Integers(ctypes.Structure):
    """`Integers` of csrc/w4a8.cu."""

    _fields_ = (
        ("to", build.Target),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("type", "k", "steps", "channel", "top", "padded")),
        *((name, ctypes.c_void_p) for name in ("words", "scales", "points", "q", "tokens", "sums")),
    )


@torch.library.custom_op("dlqc_cuda::w4a8", mutates_args=())
def w4a8(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    points: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    channel: bool,
    act_bits: int,
) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    packed = Packed(words, scales, points, in_features, out_features, channel)
    if not build.launchable(x):
        codes, scale, _ = ActFormat(act_bits).quantize_dynamic(flat)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return outcome(((codes.double() @ packed.dequantize().T) * scale).to(wide), bias, x)
    with runtime.on(x):
        return multiply(flat, packed, bias, act_bits, runtime.device_of(x)).reshape(*x.shape[:-1], out_features)


@w4a8.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    points: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    channel: bool,
    act_bits: int,
) -> Tensor:
    return blank(x, in_features, out_features)


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of this kernel; `channel` tells whether a channel has one scale."""

    words: Tensor
    scales: Tensor
    points: Tensor | None
    k: int
    n: int
    channel: bool

    @property
    def steps(self) -> int:
        """Steps of 128 input features."""
        return self.words.shape[1] // 2

    def block(self, size: int) -> int:
        """Tokens of a block of threads for a bucket: more than 64 leave no registers for sums of groups."""
        return min(size, 128 if self.channel else 64)

    def splits(self, size: int, device: runtime.Device) -> int:
        """Shares of K for a bucket."""
        return launch.splits(size, self.block(size), self.n, self.steps, self.words.numel() * 4, device)

    def dequantize(self) -> Tensor:
        """Ŵ float64 [N, K], in plain PyTorch."""
        codes = restore(self.words, self.n, self.k).double()
        if self.points is not None:
            codes = codes + self._spread(self.points) / 16
        return codes * self._spread(self.scales)

    def _spread(self, values: Tensor) -> Tensor:
        wide = values[:, : self.n].T.double().repeat_interleave(self.k if self.channel else STEP, 1)
        return wide[:, : self.k]


def arrange(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] as int32 words [⌈N/128⌉·4, ⌈K/128⌉·2, 2, 32, 4] (csrc/w4a8.cu); padding is the middle, 0."""
    n, k = codes.shape
    tiles, blocks = padded(n) // 32, -(-k // STEP) * 2
    words = torch.empty(tiles, blocks, 2, 32, 4, dtype=torch.int32, device=codes.device)
    step = max(1, CHUNK // (32 * 64 * blocks))
    for start in range(0, tiles, step):
        part = codes[start * 32 : (start + step) * 32] ^ 8  # less the middle, in two's complement
        count = min(step, tiles - start)
        part = F.pad(part, (0, blocks * 64 - k, 0, count * 32 - part.shape[0]))
        low, high = part.reshape(count, 8, 4, blocks, 4, 2, 2, 4).unbind(6)
        byte = (low | high << 4).permute(0, 3, 5, 1, 4, 2, 6).contiguous()  # tile, block, f, quad, member, r, e
        words[start : start + step] = byte.view(torch.int32).reshape(count, blocks, 2, 32, 4)
    return words


def restore(words: Tensor, out_features: int, in_features: int) -> Tensor:
    """Codes less 8, int8 [N, K]: undo `arrange`."""
    tiles, blocks = words.shape[:2]
    byte = words.view(torch.int8).reshape(tiles, blocks, 2, 8, 4, 4, 4)
    halves = torch.stack(((byte << 4) >> 4, byte >> 4), -2)  # tile, block, f, quad, member, r, half, e
    codes = halves.permute(0, 3, 5, 1, 4, 2, 6, 7).reshape(tiles * 32, blocks * 64)
    return codes[:out_features, :in_features].contiguous()


def lay_out(values: Tensor, group: int, in_features: int) -> Tensor:
    """Parameters [N, G] in bfloat16, as the kernel reads them: a row of N' for each step, or one for all of K."""
    spread = values if group == in_features else values.repeat_interleave(group // STEP, 1)
    return columns(spread.to(torch.bfloat16))


@dataclass(frozen=True)
class Codes:
    """Quantized tokens, padded to whole blocks: codes int8 [K'/64, M', 64], scales float32 [M'], sums float32 [_, M']."""

    q: Tensor
    scales: Tensor
    sums: Tensor


def quantize(x: Tensor, packed: Packed, act_bits: int) -> Codes:
    """Codes of x [M, K]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    block = packed.block(launch.bucket(x.shape[0]))
    m, steps = -(-x.shape[0] // block) * block, packed.steps
    codes = Codes(
        torch.empty(2 * steps, m, STEP // 2, dtype=torch.int8, device=x.device),
        torch.empty(m, dtype=torch.float32, device=x.device),
        torch.empty(1 if packed.channel else steps, m, dtype=torch.float32, device=x.device),
    )
    call = _call(packed, codes)
    call.to.m = x.shape[0]
    call.x, call.x_stride, call.type, call.top = (
        x.data_ptr(),
        x.stride(0),
        build.TYPES[x.dtype],
        (1 << (act_bits - 1)) - 1,
    )
    found = build.library("w4a8")
    build.check(found, found.dlqc_quantize(ctypes.byref(call), ctypes.c_void_p(build.stream(x))))
    return codes


def product(codes: Codes, packed: Packed, bias: Tensor | None, y: Tensor, splits: int) -> None:
    """y [M, N] of quantized tokens, with unit stride in its rows."""
    call = _call(packed, codes)
    call.to, parts = launch.target(y, bias, codes.scales, splits, 1.0 if packed.channel else 0.0625)
    found = build.library("w4a8")
    bm = packed.block(launch.bucket(y.shape[0]))
    build.check(found, found.dlqc_w4a8(ctypes.byref(call), bm, ctypes.c_void_p(build.stream(y))))
    del parts


def _call(packed: Packed, codes: Codes) -> Integers:
    points = None if packed.points is None else packed.points.data_ptr()
    sizes = {"k": packed.k, "steps": packed.steps, "channel": packed.channel, "padded": len(codes.scales)}
    weight = {"words": packed.words.data_ptr(), "scales": packed.scales.data_ptr(), "points": points}
    tokens = {"q": codes.q.data_ptr(), "tokens": codes.scales.data_ptr(), "sums": codes.sums.data_ptr()}
    return Integers(**sizes, **weight, **tokens)


def multiply(x: Tensor, packed: Packed, bias: Tensor | None, act_bits: int, device: runtime.Device) -> Tensor:
    """y [M, N] of x [M, K] by the kernel."""
    y = x.new_empty(x.shape[0], packed.n)
    splits = packed.splits(launch.bucket(x.shape[0]), device)
    product(quantize(x, packed, act_bits), packed, bias, y, splits)
    return y


@dataclass(frozen=True)
class W4A8:
    """4-bit integer weights by integer activations."""

    name: str = "w4a8"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        weight, act, k = spec.integers, spec.act, spec.in_features
        if act is None:
            return "activations are not quantized"
        if act.group_size not in (None, k):
            return f"activations have a scale per group of {act.group_size}, it needs one per token"
        if not act.symmetric:
            return "activations are asymmetric, it needs symmetric ones"
        if weight.bits != 4:
            return f"weights have {weight.bits} bits, it needs 4"
        size = weight.group_size or k
        if size != k and size % STEP:
            return f"weights have a scale per group of {size}, it needs a multiple of {STEP}"
        if size != k and weight.scale_dtype != "bfloat16":
            return f"scales of groups are {weight.scale_dtype}, it needs bfloat16"
        if k > MOST_FEATURES:
            return f"sums over {k} input features can overflow, it takes up to {MOST_FEATURES}"
        return build.unavailable("w4a8")

    def note(self, spec: LinearSpec) -> str:
        return "exact integer sums"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        assert spec.act is not None
        weight, k = canonical(spec, packed, scales, zeros, bias), spec.in_features
        size = spec.integers.group_size or k
        tensors = {
            "words": arrange(weight.codes),
            "scales": lay_out(weight.scales, size, k),
            "points": None if weight.zeros is None else lay_out(16 * (8 - weight.zeros.float()), size, k),
            "bias": None if bias is None else bias.to(torch.float32).contiguous(),
        }
        if size == k:
            tensors["scales"] = columns(weight.scales.to(torch.float32))
        scalars = (k, spec.out_features, size == k, spec.act.bits)
        return Lowered(torch.ops.dlqc_cuda.w4a8.default, tensors, scalars)
