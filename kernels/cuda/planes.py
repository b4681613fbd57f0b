"""Sums of sign planes by 16-bit activations on the tensor cores, in CUDA (csrc/planes.cu).

    y = x · Ŵᵀ + b,    Ŵ[n, k] = Σ_p ±r_p[n] · c_p[k]    over the planes of the group of k, of which there are 1 to 3

Shapes:  x [..., K]; words as of `arrange`; rows bfloat16 [K'/stretch, N'], columns bfloat16 [K'], offsets and first int32, N'
         being N padded to 128 and K' all planes one after the other; bias float32 [N] or None → [..., N].
Dtypes:  up to 64 tokens, products of column scales and x are rounded to bfloat16, whatever x is, and all sums are float32; signs
         are exact, so Ŵ is never rounded. From there on Ŵ is made dense in 16 bits at each call and the library multiplies.
         Then the dtype of x. x in float64 takes the definition below.
Layout:  one bit a plane and weight, in the order of the fragments of mma.sync m16n8k16 (sm_80 and newer; wgmma is not used).
         Why no table of levels: each plane has column scales of its own, so the levels of a row differ from column to column.
Order:   shares of K' are summed in a fixed order, without atomics; what a launch does follows from the bucket of M.
Requires: bfloat16 scales; groups that 64 divides, or one group of all columns.

On a CPU the op computes the definition, in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.coded import encode, weight_of
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack, unpack
from dlqc.formats.planes import PlanesFormat, PlanesWeight
from dlqc.kernels.cuda import build, launch
from dlqc.kernels.cuda.launch import STEP
from dlqc.kernels.reference.coded import Coded
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, outcome, rows
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.packing import CHUNK, columns, padded

BLOCK = 64
#: Up to here signs are multiplied as they are; each plane is a product of its own, which more tokens cannot hide behind memory.
MOST_TOKENS = 64
#: Bit i of half a word belongs to this pair of input features (csrc/planes.cu, `place_of`).
PAIRS = (*range(8, 15), *range(8), 15)


class Planes(ctypes.Structure):
    """`Planes` of csrc/planes.cu."""

    _fields_ = (
        ("to", build.Target),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("type", "k", "steps", "width", "size", "padded")),
        *((name, ctypes.c_void_p) for name in ("words", "rows", "columns", "offsets", "first")),
        *((name, ctypes.c_void_p) for name in ("products", "totals", "scales")),
    )


@torch.library.custom_op("dlqc_cuda::planes", mutates_args=())
def planes(
    x: Tensor,
    words: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    offsets: Tensor,
    first: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group: int,
    unit: float,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    """See the module docstring. `group` is 0 for one group, `act_bits` 0 for x as it is; Ŵ is `unit` times what is stored."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32)).to(x.dtype)
    held = (words, row_scales, column_scales, offsets, first)
    packed = Packed(*held, in_features, out_features, group or in_features, unit)
    if not build.launchable(x):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return outcome(flat.to(wide) @ packed.dequantize().to(wide).T, bias, x)
    with runtime.on(x):
        y = multiply(flat, packed, bias, runtime.device_of(x))
    return y.reshape(*x.shape[:-1], out_features)


@planes.register_fake
def _(
    x: Tensor,
    words: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    offsets: Tensor,
    first: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group: int,
    unit: float,
    act_bits: int,
    act_group: int,
    act_symmetric: bool,
) -> Tensor:
    return blank(x, in_features, out_features)


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of this kernel; `group` is K for one group of all columns."""

    words: Tensor
    rows: Tensor
    columns: Tensor
    offsets: Tensor
    first: Tensor
    k: int
    n: int
    group: int
    unit: float

    @property
    def steps(self) -> int:
        """Steps of 128 places in K'."""
        return self.words.shape[1]

    @property
    def width(self) -> int:
        """Places of a plane in K'."""
        return -(-self.group // BLOCK) * BLOCK

    @property
    def stretch(self) -> int:
        """Places of K' that have a row of row scales."""
        return BLOCK if self.width % STEP else STEP

    def splits(self, size: int, device: runtime.Device) -> int:
        """Shares of K' for a bucket."""
        return launch.splits(size, size, self.n, self.steps, self.words.numel() * 4, device)

    def dequantize(self) -> Tensor:
        """Ŵ float32 [N, K], in plain PyTorch."""
        signs = restore(self.words, self.n).float().mul_(2).sub_(1)
        values = signs * self.columns.float() * self.rows[:, : self.n].float().T.repeat_interleave(self.stretch, 1)
        weight = torch.zeros(self.n, self.k, dtype=torch.float32, device=signs.device)
        starts = self.offsets.tolist()
        for plane in range(int(self.first[-1])):
            weight[:, starts[plane] : starts[plane] + self.group] += values[:, plane * self.width :][:, : self.group]
        return weight * self.unit


def arrange(bits: Tensor) -> Tensor:
    """Signs uint8 [N, K'], 1 for +1, as int32 words [⌈N/128⌉·4, K'/128, 32, 4] (csrc/planes.cu)."""
    n, wide = bits.shape
    tiles, steps = padded(n) // 32, wide // STEP
    words = torch.empty(tiles, steps, 32, 4, dtype=torch.int32, device=bits.device)
    pairs = torch.tensor(PAIRS, device=bits.device)
    step = max(1, CHUNK // (32 * wide))
    for start in range(0, tiles, step):
        count = min(step, tiles - start)
        part = bits[start * 32 : (start + step) * 32]
        part = F.pad(part, (0, 0, 0, count * 32 - part.shape[0])).reshape(count, 8, 4, steps, 2, 4, 8, 2)
        # tile, step, quad, member, r, then e and the pairs 8·b + i
        ordered = part.permute(0, 3, 1, 5, 2, 7, 4, 6).reshape(-1, 2, 16)[:, :, pairs]
        words[start : start + step] = pack(ordered.reshape(-1, 32), 1).view(torch.int32).reshape(count, steps, 32, 4)
    return words


def restore(words: Tensor, out_features: int) -> Tensor:
    """Signs uint8 [N, K']: undo `arrange`."""
    tiles, steps = words.shape[:2]
    bits = unpack(words.reshape(-1, 1).view(torch.uint8), 1, 32).reshape(-1, 2, 16)
    ordered = torch.empty_like(bits)
    ordered[:, :, torch.tensor(PAIRS, device=bits.device)] = bits
    parts = ordered.reshape(tiles, steps, 8, 4, 4, 2, 2, 8).permute(0, 2, 4, 1, 6, 3, 7, 5)
    return parts.reshape(tiles * 32, steps * STEP)[:out_features].contiguous()


def lay_out(weight: PlanesWeight) -> Packed:
    """A weight in planes, as this kernel reads it."""
    n, k = weight.codes.shape
    group, device = k // len(weight.orders), weight.codes.device
    width = -(-group // BLOCK) * BLOCK
    total, stretch = sum(weight.orders), BLOCK if width % STEP else STEP
    steps = -(-total * width // STEP)
    bits = torch.zeros(n, steps * STEP, dtype=torch.uint8, device=device)
    plane, offsets = 0, []
    for start, order in zip(range(0, k, group), weight.orders, strict=True):
        for bit in range(order):
            bits[:, plane * width : plane * width + group] = weight.codes[:, start : start + group] >> bit & 1
            offsets.append(start)
            plane += 1
    # The half of a step that may be left over belongs to a plane of zeros.
    extra = -(-steps * STEP // width) - total
    # Column scales are brought to 1 and below; the power of two is given back with the sums.
    unit = 2.0 ** int(torch.frexp(weight.column_scales.float().abs().amax()).exponent)
    scales = F.pad((weight.column_scales.float() / unit).to(torch.bfloat16), (0, width - group)).reshape(-1)
    first = torch.tensor([0, *weight.orders], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed(
        words=arrange(bits),
        rows=columns(
            F.pad(weight.row_scales, (0, extra)).repeat_interleave(width // stretch, 1)[:, : steps * STEP // stretch]
        ),
        columns=F.pad(scales, (0, steps * STEP - len(scales))),
        offsets=torch.tensor([*offsets, *[0] * extra], dtype=torch.int32, device=device),
        first=first.to(device),
        k=k,
        n=n,
        group=group,
        unit=unit,
    )


def multiply(x: Tensor, packed: Packed, bias: Tensor | None, device: runtime.Device) -> Tensor:
    """y [M, N] of x [M, K], by signs or by the dense weight."""
    if x.shape[0] > MOST_TOKENS:
        return multiply_dense(x, packed, bias)
    y = x.new_empty(x.shape[0], packed.n)
    product(x, packed, bias, y, packed.splits(launch.bucket(x.shape[0]), device))
    return y


def product(x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, splits: int) -> None:
    """y [M, N] of x [M, K] up to 64 tokens, with unit stride in its rows."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bm = launch.bucket(x.shape[0])
    products = torch.empty(packed.steps, bm, STEP, dtype=torch.bfloat16, device=x.device)
    totals = torch.empty(packed.steps * STEP // packed.stretch, bm, dtype=torch.float32, device=x.device)
    scales = torch.empty(bm, dtype=torch.float32, device=x.device)
    call = _call(packed)
    # A bit is worth 2: what is between -1 and +1.
    call.to, parts = launch.target(y, bias, scales, splits, 2 * packed.unit)
    call.x, call.x_stride, call.type, call.padded = x.data_ptr(), x.stride(0), build.TYPES[x.dtype], bm
    call.products, call.totals, call.scales = products.data_ptr(), totals.data_ptr(), scales.data_ptr()
    found = build.library("planes")
    build.check(found, found.dlqc_planes(ctypes.byref(call), bm, ctypes.c_void_p(build.stream(x))))
    del parts


def dense(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Ŵ [N, K], rounded to `dtype`."""
    weight = torch.empty(packed.n, packed.k, dtype=dtype, device=packed.words.device)
    call = _call(packed)
    call.to, _ = launch.target(weight, None, packed.rows, 1, packed.unit)
    call.to.n, call.to.columns = packed.n, packed.rows.shape[1]
    found = build.library("planes")
    build.check(found, found.dlqc_planes_dense(ctypes.byref(call), ctypes.c_void_p(build.stream(weight))))
    return weight


def multiply_dense(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y [M, N] by the library's product; rows are padded to the bucket, since the library chooses its code by their number."""
    kind = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    short = launch.bucket(x.shape[0]) - x.shape[0]
    y = F.pad(x.to(kind), (0, 0, 0, short)) @ dense(packed, kind).T
    return outcome(y[: x.shape[0]], bias, x)


def _call(packed: Packed) -> Planes:
    tensors = {role: getattr(packed, role).data_ptr() for role in ("words", "rows", "columns", "offsets", "first")}
    return Planes(k=packed.k, steps=packed.steps, width=packed.width, size=packed.group, **tensors)


@dataclass(frozen=True)
class SignPlanes:
    """Sums of sign planes by activations in 16 bits."""

    name: str = "sign_planes"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := Coded().supports(spec)) is not None:
            return reason
        fmt, k = spec.weight, spec.in_features
        if not isinstance(fmt, PlanesFormat):
            return f"codes of {fmt.label} are no sign planes"
        if fmt.dtype != torch.bfloat16:
            return f"scales are {fmt.scale_dtype}, it needs bfloat16"
        size = fmt.group_size or k
        if size != k and size % BLOCK:
            return f"groups of {size} are not a multiple of {BLOCK}"
        return build.unavailable("planes")

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        return f"products in bfloat16, float32 sums; from {MOST_TOKENS + 1} tokens on a dense weight at each call{act}"

    def lower_coded(self, spec: LinearSpec, parts: Mapping[str, Tensor], bias: Tensor | None) -> Lowered:
        assert not isinstance(spec.weight, IntFormat)
        Coded().lower_coded(spec, parts, bias)  # refuses what does not fit
        stored = weight_of(
            encode(spec.weight), [parts[role] for role in sorted(parts)], spec.out_features, spec.in_features
        )
        assert isinstance(stored, PlanesWeight)
        packed = lay_out(stored)
        tensors = {
            "words": packed.words,
            "row_scales": packed.rows,
            "column_scales": packed.columns,
            "offsets": packed.offsets,
            "first": packed.first,
            "bias": None if bias is None else bias.to(torch.float32).contiguous(),
        }
        group = 0 if packed.group == packed.k else packed.group
        scalars = (packed.k, packed.n, group, packed.unit, *act_scalars(spec.act))
        return Lowered(torch.ops.dlqc_cuda.planes.default, tensors, scalars)
