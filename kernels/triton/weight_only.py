"""Low-bit weights by 16-bit activations: W4A16, W2A16, W3A16, W8A16 of any group that 32 divides (device/weight_only.py).

    y = x̂ · Ŵᵀ + b + r,    Ŵ = (codes - zero) · scale,    x̂ = x, or what the codes of x stand for

Shapes:  x [..., K]; low as of `packing.arrange`; scales [G, N'], zeros uint8 [G, N'] or None with N' = N padded to 128;
         bias [N] or None; residual r [..., N] or None → [..., N].
Dtypes:  both operands have the dtype of x if it has 16 bits; float32 x is rounded to bfloat16. codes - zero is exact; Ŵ is
         rounded to that dtype where a configuration scales before the product (`Config.pre`, and dense weights), else scales and
         sums are float32. Then the dtype of x. x in float64 takes the definition below.
Layout:  one packed copy for every number of tokens. From `dispatch.DENSE` tokens on Ŵ is made dense at each call and the library
         multiplies; the working memory is then all of Ŵ in 16 bits.
Order:   shares of K are summed in a fixed order, without atomics: a row has the same bits in every run, and in every batch
         whose number of tokens is in the same bucket.

On a CPU the op computes the definition: the packed words back to codes, Ŵ in float32, one product in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlqc.backend import LinearSpec, Lowered
from dlqc.kernels.reference.layout import act_format, act_scalars, blank, canonical, misfit, outcome, rows
from dlqc.kernels.triton import packing, runtime
from dlqc.kernels.triton.device import weight_only as device
from dlqc.kernels.triton.dispatch import Config, Shape, bucket, choose

#: What codes stand for: themselves, entries of one table, entries of a table for each row and group, numbers in e4m3.
INTEGERS, SHARED, PER_GROUP, FLOAT8 = range(4)


@torch.library.custom_op("dlqc_triton::weight_only", mutates_args=())
def weight_only(
    x: Tensor,
    low: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int = 0,
    act_group: int = 0,
    act_symmetric: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """See the module docstring. `group` is 0 for one scale per channel, `act_bits` 0 for x as it is."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32)).to(x.dtype)
    packed = Packed(low, scales, zeros, in_features, out_features, bits, group or in_features)
    return product(x, flat, packed, bias, residual)


@weight_only.register_fake
def _(
    x: Tensor,
    low: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
    act_bits: int = 0,
    act_group: int = 0,
    act_symmetric: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    return blank(x, in_features, out_features)


WEIGHT_ONLY = torch.ops.dlqc_triton.weight_only.default


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of this kernel; `group` is K for one scale per channel.

    `code` says what codes stand for, as in device/weight_only.py; `table` is float32 [2^bits], or [G, N', 2^bits], and then there
    are no scales.
    """

    low: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    k: int
    n: int
    bits: int
    group: int
    code: int = 0
    table: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """What the choice of a configuration depends on."""
        return Shape("coded" if self.code else "w16", self.bits, self.k, self.n, self.group)

    @property
    def run(self) -> int:
        """Input features of one product."""
        return packing.run_of(8, self.k, self.group) if self.bits == 8 else packing.run_in(self.low, self.bits)

    def dequantize(self) -> Tensor:
        """Ŵ float32 [N, K], in plain PyTorch."""
        codes = packing.restore(self.low, self.bits, self.n, self.k)
        if self.code == PER_GROUP:
            assert self.table is not None
            group = torch.arange(self.k, device=codes.device) // self.group
            row = torch.arange(self.n, device=codes.device).unsqueeze(1)
            return self.table[group, row, codes.long()].to(torch.float32)
        if self.code == SHARED:
            assert self.table is not None
            values = self.table[codes.long()].to(torch.float32)
        elif self.code == FLOAT8:
            values = codes.view(torch.float8_e4m3fn).to(torch.float32)
        else:
            middle = 0.5 if self.bits == 1 else 1 << (self.bits - 1)
            zero = middle if self.zeros is None else self._spread(self.zeros)
            values = codes.to(torch.float32) - zero
        assert self.scales is not None
        return values * self._spread(self.scales)

    def _spread(self, values: Tensor) -> Tensor:
        """Parameters [G, N'] as float32 [N, K]."""
        return values[:, : self.n].T.to(torch.float32).repeat_interleave(self.group, 1)[:, : self.k]

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """What kernels take, `low` in place of what is not there and not read."""
        parts = (self.scales, self.zeros, self.table)
        return (self.low, *(self.low if part is None else part for part in parts))

    def constants(self, product: torch.dtype) -> dict[str, object]:
        """The compile-time arguments that the weight decides."""
        asm = product != torch.float32 and torch.version.hip is None and not runtime.interpreting()
        sizes = {"N": self.n, "NP": packing.padded(self.n), "K": self.k, "BITS": self.bits, "GROUP": self.group}
        return {
            **sizes,
            "ZEROS": self.zeros is not None,
            "CODE": self.code,
            "RUN": self.run,
            "ASM": asm,
            "CT": runtime.in_triton(product),
        }


def product(x: Tensor, flat: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """y [..., N] of x [..., K], `flat` being what x is multiplied as, [M, K]: by the kernel, or by the definition."""
    added = None if residual is None else rows(residual, packed.n)
    if not runtime.launchable(x):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = flat.to(wide) @ packed.dequantize().to(wide).T
        return outcome(y if added is None else y + added.to(wide), bias, x)
    config = choose(packed.shape, flat.shape[0], runtime.device_of(x))
    if config.dense:
        y = multiply_dense(flat, packed, bias, config)
        y = y if added is None else y + added
        return y.to(x.dtype).reshape(*x.shape[:-1], packed.n)
    y = flat.new_empty(flat.shape[0], packed.n, dtype=runtime.interpretable(x))
    launch(flat, packed, bias, y, config, added)
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.n)


def launch(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, config: Config, residual: Tensor | None = None
) -> None:
    """y [M, N] of x [M, K], both with unit stride in their rows."""
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n, splits = x.shape[0], packed.n, config.splits
    target = y if splits == 1 else torch.empty(splits * m, n, dtype=torch.float32, device=x.device)
    grid = (packing.padded(n) // config.bn * splits, -(-m // config.bm))
    spare = packed.low  # stands for a tensor that is not there and is not read
    last = (spare if bias is None else bias, spare if residual is None else residual.contiguous())
    with runtime.on(x):
        device.weight_only[grid](
            *(x, *packed.pointers, *last, target, m, x.stride(0), target.stride(0)),
            **packed.constants(runtime.product_dtype(x)),
            **{
                "BIAS": bias is not None,
                "ADD": residual is not None,
                "BN": config.bn,
                "BM": config.bm,
                "SPLITS": splits,
                "PRE": config.pre,
            },
            **runtime.dependent(config.dependent),
            **{"num_warps": config.warps, "num_stages": config.stages},
        )
        if splits > 1:
            width = 512
            device.add_splits[(m, -(-n // width))](
                *(target, *last, y, m, y.stride(0)),
                **{"N": n, "SPLITS": splits, "BIAS": bias is not None, "ADD": residual is not None, "BLOCK": width},
                **runtime.dependent(config.dependent),
            )


def multiply_dense(x: Tensor, packed: Packed, bias: Tensor | None, config: Config) -> Tensor:
    """y [M, N] by the library's product; rows are padded to the bucket, since the library chooses its code by their number."""
    product = runtime.product_dtype(x)
    weight = torch.empty(packed.n, packed.k, dtype=product, device=x.device)
    grid = (packing.padded(packed.n) // config.bn, packed.low.shape[1])
    with runtime.on(x):
        device.dense[grid](
            *(*packed.pointers, weight),
            **packed.constants(product),
            **{"BN": config.bn, "num_warps": config.warps},
        )
    short = bucket(x.shape[0]) - x.shape[0]
    y = torch.nn.functional.pad(x.to(product), (0, 0, 0, short)) @ weight.T
    return outcome(y[: x.shape[0]], bias, x)


@dataclass(frozen=True)
class WeightOnly:
    """Integer weights of 2, 3, 4 and 8 bits by activations in 16 bits."""

    name: str = "weight_only"

    def supports(self, spec: LinearSpec) -> str | None:
        if (reason := misfit(spec)) is not None:
            return reason
        size = spec.integers.group_size or spec.in_features
        if size != spec.in_features and size % packing.RUN:
            return f"weights have a scale per group of {size}, it needs a multiple of {packing.RUN}"
        return runtime.unavailable()

    def note(self, spec: LinearSpec) -> str:
        act = "" if spec.act is None else f"; activations are rounded to {spec.act.label}, then multiplied as floats"
        return f"16-bit products, float32 sums; float32 activations are rounded to bfloat16 on a GPU{act}"

    def lower(
        self, spec: LinearSpec, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> Lowered:
        weight, k, bits = canonical(spec, packed, scales, zeros, bias), spec.in_features, spec.integers.bits
        tensors = {
            "low": packing.arrange(weight.codes, bits, packing.run_of(bits, k, spec.integers.group_size or k)),
            "scales": packing.columns(weight.scales),
            "zeros": None if weight.zeros is None else packing.columns(weight.zeros),
            "bias": None if bias is None else bias.to(torch.float32).contiguous(),
        }
        group = 0 if spec.integers.group_size in (None, k) else spec.integers.group_size or 0
        scalars = (k, spec.out_features, bits, group, *act_scalars(spec.act))
        return Lowered(WEIGHT_ONLY, tensors, scalars)
