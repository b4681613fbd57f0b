"""Weights and activations in e4m3, one scale for each output channel and token: W8A8 FP8 (device/float8.py).

    y = (Σ_k w · q) · s_w · s_x + b,    q, s_x = codes and scales of x, made on the fly (`dlqc.formats.fp8.quantize_tokens`)

Shapes:  x [..., K]; weight e4m3 [N', K'] as of `arrange`; scales float32 [N'], N' and K' being N and K padded to 128;
         bias [N] or None → [..., N].
Dtypes:  sums of 128 features as the tensor cores make them, float32 beyond; then the dtype of x.
Requires: an NVIDIA GPU of compute capability 8.9 or more; K up to 16384.

From `LIBRARY` tokens on, where the device has it (9.0 or more), the product is `torch._scaled_mm`, without its fast accumulation.
No pass makes activations in FP8, so no site of a graph is lowered to this; `benchmarks/gpu.py` times it. Elsewhere than on a GPU
the op computes the definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc.formats.fp8 import DTYPE, Fp8Weight, quantize_tokens
from dlqc.kernels.reference.layout import blank, outcome, rows
from dlqc.kernels.triton import packing, runtime
from dlqc.kernels.triton.device import float8 as device
from dlqc.kernels.triton.device import weight_only as device_weight_only
from dlqc.kernels.triton.dispatch import Config, Shape, choose
from dlqc.kernels.triton.rows import quantize

#: Tokens from which on the library's product is chosen.
LIBRARY = 128


def arrange(weight: Fp8Weight) -> tuple[Tensor, Tensor]:
    """weight and scales of the op, of a weight with a scale per channel."""
    n, k = weight.codes.shape
    short = (0, -k % packing.PADDED, 0, packing.padded(n) - n)
    codes = F.pad(weight.codes.view(torch.uint8), short).view(DTYPE)
    return codes, packing.columns(weight.scales)[0]


@torch.library.custom_op("dlqc_triton::float8", mutates_args=())
def float8(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, in_features: int, out_features: int
) -> Tensor:
    """See the module docstring."""
    if not x.numel():
        return blank(x, in_features, out_features)
    flat = rows(x, in_features)
    if not runtime.launchable(x) or unavailable() is not None:
        codes, scale = quantize_tokens(flat)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = codes.to(wide) @ weight[:out_features, :in_features].to(wide).T
        return outcome(y * scale * scales[:out_features], bias, x)
    config = config_of(weight.shape[0], weight.shape[1], flat.shape[0], runtime.device_of(x))
    found = quantize(flat, 8, stored=weight.shape[1], float8=True, dependent=config.dependent)
    if flat.is_cuda and flat.shape[0] >= LIBRARY and out_features % 16 == 0 and _capability() >= (9, 0):
        y = torch._scaled_mm(
            *(found.q.view(DTYPE), weight[:out_features].T, found.scales[:, None], scales[None, :out_features]),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
        return outcome(y, bias, x)
    y = flat.new_empty(flat.shape[0], out_features, dtype=runtime.interpretable(x))
    launch(found.q.view(DTYPE), found.scales, weight, scales, bias, y, config)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


@float8.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> Tensor:
    return blank(x, in_features, out_features)


def unavailable() -> str | None:
    """None where the kernel can be launched, else the reason it cannot, one clause."""
    reason = runtime.unavailable()
    if reason is not None or runtime.interpreting():
        return reason
    if torch.version.hip is not None:
        return "the GPU's FP8 is another format"
    return None if _capability() >= (8, 9) else "the GPU has no FP8 products, which need compute capability 8.9"


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def config_of(n: int, k: int, tokens: int, device_: runtime.Device) -> Config:
    """The choice for a weight [n, k] as it is stored."""
    return choose(Shape("e4m3", 8, k, n, k), tokens, device_)


def launch(
    q: Tensor, token_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, config: Config
) -> None:
    """y [M, N] of codes q e4m3 [M, K']."""
    (m, n), splits = y.shape, config.splits
    target = y if splits == 1 else torch.empty(splits * m, n, dtype=torch.float32, device=y.device)
    held = scales if bias is None else bias
    with runtime.on(y):
        device.float8[packing.padded(n) // config.bn * splits, -(-m // config.bm)](
            *(q, weight, scales, token_scales, held, target, m, target.stride(0)),
            **{"N": n, "KP": weight.shape[1], "BIAS": bias is not None, "BN": config.bn, "BM": config.bm},
            **{"SPLITS": splits, "num_warps": config.warps, "num_stages": config.stages},
            **runtime.dependent(config.dependent),
        )
        if splits > 1:
            device_weight_only.add_splits[m, -(-n // 512)](
                *(target, held, target, y, m, y.stride(0)),
                N=n,
                SPLITS=splits,
                BIAS=bias is not None,
                ADD=False,
                BLOCK=512,
                **runtime.dependent(config.dependent),
            )
