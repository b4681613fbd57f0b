"""Low-bit weights by 8-bit activations with exact integer sums: W8A8 and W4A8 (device/integer.py).

    y = (Σ_k (code - zero) · q) · s_w · s_x + b,    q, s_x = codes and scales of x, one scale per token, quantized on the fly

Shapes:  x [..., K]; words as of `packing.arrange_integers`; scales [G, N'], zeros uint8 [G, N'] or None, N' being
         N padded to 128; bias [N] or None → [..., N].
Dtypes:  codes of x are those of `ActFormat.quantize_dynamic`. Sums over K (over 128 features where the weight has groups) are
         int32 and exact; scales, zero points of groups, and the bias are applied in float32; then the dtype of x.
Layout:  4-bit codes stay in 4 bits; one packed copy for every number of tokens.
Order:   as of `weight_only`: the same bits in every run, and in every batch of a bucket.
Requires: one symmetric scale per token; 4- or 8-bit weights with one scale per channel or groups that 128 divides; sums that fit.

On a CPU the op computes the definition, with float64 in place of the integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.activation import ActFormat
from dlqc.kernels.reference.layout import blank, canonical, misfit, outcome, rows
from dlqc.kernels.triton import packing, runtime
from dlqc.kernels.triton.device import integer as device
from dlqc.kernels.triton.device import rows as device_rows
from dlqc.kernels.triton.dispatch import Config, Shape, choose

BLOCK = packing.PADDED


@torch.library.custom_op("dlqc_triton::integer", mutates_args=())
def integer(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int,
) -> Tensor:
    """See the module docstring. `group` is 0 for one scale per channel."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    packed = Packed(words, scales, zeros, in_features, out_features, bits, group or in_features)
    if not runtime.launchable(x):
        codes, scale, _ = ActFormat(act_bits).quantize_dynamic(flat)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return outcome(((codes.double() @ packed.dequantize().T) * scale).to(wide), bias, x)
    config = choose(packed.shape, flat.shape[0], runtime.device_of(x))
    y = flat.new_empty(flat.shape[0], out_features, dtype=runtime.interpretable(x))
    launch(quantize(flat, act_bits, packed), packed, bias, y, config)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


@integer.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int,
) -> Tensor:
    return blank(x, in_features, out_features)


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of this kernel; `group` is K for one scale per channel."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    k: int
    n: int
    bits: int
    group: int

    @property
    def shape(self) -> Shape:
        """What the choice of a configuration depends on."""
        return Shape("w8", self.bits, self.k, self.n, self.group)

    @property
    def channel(self) -> bool:
        """Whether a channel has one scale."""
        return self.group == self.k

    @property
    def sums(self) -> int:
        """How many sums of codes the zero points need of a token."""
        return 0 if self.zeros is None else 1 if self.channel else self.words.shape[1]

    def dequantize(self) -> Tensor:
        """Ŵ float64 [N, K], in plain PyTorch."""
        codes = packing.restore_integers(self.words, self.bits, self.n, self.k).double()
        if self.zeros is not None:
            codes = codes + (1 << (self.bits - 1)) - self._spread(self.zeros)
        return codes * self._spread(self.scales)

    def _spread(self, values: Tensor) -> Tensor:
        return values[:, : self.n].T.double().repeat_interleave(self.group, 1)


@dataclass(frozen=True)
class Codes:
    """Quantized tokens: codes int8 [M, K in whole blocks], scales float32 [M], sums int32 [_, M] where zero points need them."""

    q: Tensor
    scales: Tensor
    sums: Tensor


def quantize(x: Tensor, bits: int, packed: Packed) -> Codes:
    """Codes of x [M, K]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    m, count = x.shape[0], packed.sums
    wide = packed.words.shape[1] * BLOCK
    width = max(BLOCK, 1 << (wide - 1).bit_length())
    q = torch.empty(m, wide, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    sums = torch.empty(max(count, 1), m, dtype=torch.int32, device=x.device)
    sizes = {"K": packed.k, "KP": wide, "TOP": (1 << (bits - 1)) - 1, "GROUP": BLOCK, "SUMS": count, "WIDTH": width}
    with runtime.on(x):
        device_rows.quantize_rows[(m,)](x, q, scales, sums, m, x.stride(0), **sizes, num_warps=row_warps(width))
    return Codes(q, scales, sums)


def row_warps(width: int) -> int:
    """Warps of a program that holds a row of so many features: 16 to 64 a thread."""
    return min(8, max(1, width // 512))


def launch(codes: Codes, packed: Packed, bias: Tensor | None, y: Tensor, config: Config) -> None:
    """y [M, N] of quantized tokens, with unit stride in its rows."""
    m, n, splits = codes.q.shape[0], packed.n, config.splits
    target = y
    if splits > 1:
        kind = torch.int32 if packed.channel else torch.float32
        target = torch.empty(splits * m, n, dtype=kind, device=y.device)
    spare = packed.words  # stands for a tensor that is not there and is not read
    last = (spare if packed.zeros is None else packed.zeros, codes.sums, codes.scales, spare if bias is None else bias)
    same = {"N": n, "BITS": packed.bits, "ZEROS": packed.zeros is not None, "BIAS": bias is not None, "SPLITS": splits}
    asm = torch.version.hip is None and not runtime.interpreting()
    with runtime.on(y):
        device.integer[packing.padded(n) // config.bn * splits, -(-m // config.bm)](
            *(codes.q, packed.words, packed.scales, *last, target, m, target.stride(0)),
            **same,
            **{"NP": packing.padded(n), "K": packed.k, "KP": codes.q.shape[1], "GROUP": packed.group, "ASM": asm},
            **{"BN": config.bn, "BM": config.bm, "num_warps": config.warps, "num_stages": config.stages},
        )
        if splits > 1:
            width = 512
            device.add_shares[m, -(-n // width)](
                *(target, packed.scales, *last, y, m, y.stride(0)), **same, CHANNEL=packed.channel, BLOCK=width
            )


@dataclass(frozen=True)
class Integer:
    """Integer weights of 4 and 8 bits by integer activations."""

    name: str = "integer"

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
        if weight.bits not in (4, 8):
            return f"weights have {weight.bits} bits, it needs 4 or 8"
        size = weight.group_size or k
        if size != k and size % BLOCK:
            return f"weights have a scale per group of {size}, it needs a multiple of {BLOCK}"
        if k * 255 * 127 >= 1 << 31:
            return f"sums over {k} input features can overflow int32"
        return runtime.unavailable()

    def note(self, spec: LinearSpec) -> str:
        return "exact int32 sums"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        assert spec.act is not None
        weight, k = canonical(spec, packed, scales, zeros, bias), spec.in_features
        tensors = {
            "words": packing.arrange_integers(weight.codes, spec.integers.bits),
            "scales": packing.columns(weight.scales),
            "zeros": None if weight.zeros is None else packing.columns(weight.zeros),
            "bias": None if bias is None else bias.to(torch.float32).contiguous(),
        }
        group = 0 if spec.integers.group_size in (None, k) else spec.integers.group_size or 0
        scalars = (k, spec.out_features, spec.integers.bits, group, spec.act.bits)
        return Lowered(torch.ops.dlqc_triton.integer.default, tensors, scalars)
