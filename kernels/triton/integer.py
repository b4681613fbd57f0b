"""Low-bit weights by 8-bit activations with exact integer sums: W8A8 and W4A8 (device/integer.py, persistent.py).

    y = (Σ_k (code - zero) · q) · s_w · s_x + x_o · W_oᵀ + b + r,    q, s_x = codes and scales of x, one scale per token

What is done to x just before (a norm, a gate, Hadamard blocks) is done by the kernel that quantizes its rows, and r is added to
the sums before they are rounded, so that nothing of either goes to memory. So is x_o · W_oᵀ, the columns with outliers, which
are not quantized (LLM.int8()).

Shapes:  x [..., K]; words as of `packing.arrange_integers`; scales [G, N'], zeros uint8 [G, N'] or None, N' being
         N padded to 128; bias [N] or None; residual r [..., N] or None; kind to block as of `rows.Before`;
         x_o = whole[..., columns], whole [..., K'], columns int32 [O], outliers [O, N'] as of `packing.outliers` → [..., N].
Dtypes:  codes of x are those of `ActFormat.quantize_dynamic`. Sums over K (over 128 features where the weight has groups) are
         int32 and exact; scales, zero points of groups, and the bias are applied in float32; then the dtype of x.
Layout:  4-bit codes stay in 4 bits; one packed copy for every number of tokens. On Hopper and later many tokens by int8 weights
         are left to programs that stay and copies by descriptor (`Config.persistent`), with the same bits.
Order:   as of `weight_only`: the same bits in every run, and in every batch of a bucket.
Requires: one symmetric scale per token; 4- or 8-bit weights with one scale per channel or groups that 128 divides; sums that fit.

On a CPU the op computes the definition, with float64 in place of the integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.formats.activation import ActFormat
from dlqc.kernels.reference.layout import blank, canonical, misfit, outcome, rows
from dlqc.kernels.triton import packing, runtime
from dlqc.kernels.triton.device import integer as device
from dlqc.kernels.triton.device import persistent as device_persistent
from dlqc.kernels.triton.dispatch import Config, Shape, choose
from dlqc.kernels.triton.language import TensorDescriptor
from dlqc.kernels.triton.rows import AS_IS, Before, Codes
from dlqc.kernels.triton.rows import quantize as quantize_rows

BLOCK = packing.PADDED
#: Rows of tiles that are under way at a time where programs stay: 8 x 16 tiles are about as many as there are multiprocessors.
STRIPE = 8


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
    kind: str = "as_is",
    other: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    block: int = 1,
    residual: Tensor | None = None,
    whole: Tensor | None = None,
    columns: Tensor | None = None,
    outliers: Tensor | None = None,
) -> Tensor:
    """See the module docstring. `group` is 0 for one scale per channel."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    before = Before(kind, None if other is None else rows(other, in_features), gain, shift, eps, block)
    added = None if residual is None else rows(residual, out_features)
    apart = None
    if whole is not None and columns is not None and outliers is not None:
        apart = Apart(rows(whole, whole.shape[-1]), columns, outliers)
    packed = Packed(words, scales, zeros, in_features, out_features, bits, group or in_features)
    if not runtime.launchable(x):
        codes, scale, _ = ActFormat(act_bits).quantize_dynamic(before.value(flat))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = ((codes.double() @ packed.dequantize().T) * scale).to(wide)
        y = y if apart is None else y + apart.value(wide)[:, :out_features]
        return outcome(y if added is None else y + added.to(wide), bias, x)
    config = config_of(packed.shape, flat.shape[0], runtime.device_of(x), apart is not None, added is not None)
    y = flat.new_empty(flat.shape[0], out_features, dtype=runtime.interpretable(x))
    launch(quantize(flat, act_bits, packed, before, config.dependent), packed, bias, y, config, added, apart)
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
    kind: str = "as_is",
    other: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    block: int = 1,
    residual: Tensor | None = None,
    whole: Tensor | None = None,
    columns: Tensor | None = None,
    outliers: Tensor | None = None,
) -> Tensor:
    return blank(x, in_features, out_features)


INTEGER = torch.ops.dlqc_triton.integer.default


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
class Apart:
    """Columns of tokens that are multiplied as they are: x [M, ...], columns int32 [O] of it, outliers [O, N']."""

    x: Tensor
    columns: Tensor
    outliers: Tensor

    def value(self, wide: torch.dtype) -> Tensor:
        """The definition, [M, N']."""
        return self.x.index_select(1, self.columns).to(wide) @ self.outliers.to(wide)


def quantize(x: Tensor, bits: int, packed: Packed, before: Before = AS_IS, dependent: bool = False) -> Codes:
    """Codes of x [M, K] as the product of `packed` reads them: in whole blocks of K, with the sums its zero points need."""
    stored = packed.words.shape[1] * BLOCK
    return quantize_rows(x, bits, before, stored=stored, sums=packed.sums, dependent=dependent)


def config_of(shape: Shape, tokens: int, device_: runtime.Device, apart: bool = False, added: bool = False) -> Config:
    """The choice; what is held beside the sums of a large tile takes more threads, and sums of columns apart no descriptors."""
    found = choose(shape, tokens, device_)
    if apart and found.persistent:
        found = replace(found, bn=128, persistent=False)
    return replace(found, warps=8) if (apart or added) and found.bm > 64 else found


def launch(
    codes: Codes,
    packed: Packed,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
    residual: Tensor | None = None,
    apart: Apart | None = None,
) -> None:
    """y [M, N] of quantized tokens, with unit stride in its rows."""
    if config.persistent:
        launch_persistent(codes, packed, bias, y, config, residual)
        return
    m, n, splits = codes.q.shape[0], packed.n, config.splits
    target = y
    if splits > 1:
        kind = torch.int32 if packed.channel else torch.float32
        target = torch.empty((splits + (apart is not None)) * m, n, dtype=kind, device=y.device)
    spare = packed.words  # stands for a tensor that is not there and is not read
    added = spare if residual is None else residual.contiguous()
    zeros = spare if packed.zeros is None else packed.zeros
    last = (zeros, codes.sums, codes.scales, spare if bias is None else bias, added)
    same = {"N": n, "BITS": packed.bits, "ZEROS": packed.zeros is not None, "BIAS": bias is not None}
    x, columns, outliers = (spare, spare, spare) if apart is None else (apart.x, apart.columns, apart.outliers)
    x = x if x.stride(-1) == 1 else x.contiguous()
    same |= {"ADD": residual is not None, "OUT": 0 if apart is None else len(columns), "SPLITS": splits}
    asm = torch.version.hip is None and not runtime.interpreting()
    with runtime.on(y):
        device.integer[packing.padded(n) // config.bn * splits, -(-m // config.bm)](
            *(
                codes.q,
                packed.words,
                packed.scales,
                *last,
                x,
                columns,
                outliers,
                target,
                m,
                x.stride(0),
                target.stride(0),
            ),
            **same,
            **{"NP": packing.padded(n), "K": packed.k, "KP": codes.q.shape[1], "GROUP": packed.group, "ASM": asm},
            **{"CT": runtime.in_triton(runtime.product_dtype(y))},
            **{"BN": config.bn, "BM": config.bm, "num_warps": config.warps, "num_stages": config.stages},
            **runtime.dependent(config.dependent),
        )
        if splits > 1:
            width = 512
            device.add_shares[m, -(-n // width)](
                *(target, packed.scales, *last, y, m, y.stride(0)),
                **same,
                **runtime.dependent(config.dependent),
                CHANNEL=packed.channel,
                BLOCK=width,
            )


def launch_persistent(
    codes: Codes, packed: Packed, bias: Tensor | None, y: Tensor, config: Config, residual: Tensor | None
) -> None:
    """As `launch`, for int8 weights with a scale a channel and no columns apart."""
    (m, stored), n, spare = codes.q.shape, packed.n, packed.words
    words = packed.words.flatten(1, 2)
    tokens = TensorDescriptor.from_tensor(codes.q, [config.bm, BLOCK])
    weights = TensorDescriptor.from_tensor(words, [config.bn // packing.ROWS, packing.ROWS, BLOCK])
    tiles = -(-m // config.bm) * -(-packing.padded(n) // config.bn)
    with runtime.on(y):
        device_persistent.persistent[(min(tiles, runtime.device_of(y).units),)](
            *(
                tokens,
                weights,
                packed.scales,
                spare if packed.zeros is None else packed.zeros,
                codes.sums,
                codes.scales,
            ),
            *(spare if bias is None else bias, spare if residual is None else residual.contiguous()),
            *(y, m, y.stride(0)),
            **{
                "N": n,
                "NP": packing.padded(n),
                "KP": stored,
                "ZEROS": packed.zeros is not None,
                "BIAS": bias is not None,
            },
            **{"ADD": residual is not None, "BN": config.bn, "BM": config.bm, "STRIPE": STRIPE},
            **{"num_warps": config.warps, "num_stages": config.stages},
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
        return Lowered(INTEGER, tensors, scalars)
