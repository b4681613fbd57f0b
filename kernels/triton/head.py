"""Head, argmax and confidence of rows, without logits in memory (device/head.py).

    token = argmax_v (x · Ŵᵀ + b)_v,    confidence = softmax(x · Ŵᵀ + b)_token

Shapes:  x [..., K], the weight [V, K] as of `weight_only` → token int64 [...], confidence float32 [...].
Dtypes:  logits are float32 and are not rounded to the dtype of x; of equal ones the first counts.
Memory:  three numbers for each token and tile of the vocabulary, where logits would be as many as the tile is wide.

What a sampler needs of masked rows: pass those rows alone. Elsewhere than on a GPU the op computes the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.kernels.reference.layout import rows
from dlqc.kernels.triton import packing, runtime
from dlqc.kernels.triton.device import head as device
from dlqc.kernels.triton.dispatch import Shape, bucket, rule
from dlqc.kernels.triton.weight_only import Packed

TILE = 128


@torch.library.custom_op("dlqc_triton::head_argmax", mutates_args=())
def head_argmax(
    x: Tensor,
    low: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group: int,
) -> tuple[Tensor, Tensor]:
    """token, confidence; the arguments are those of `weight_only`, as `WeightOnly.lower` makes them."""
    flat = rows(x, in_features)
    packed = Packed(low, scales, zeros, in_features, out_features, bits, group or in_features)
    if not x.numel():
        return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not runtime.launchable(x):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = flat.to(wide) @ packed.dequantize().to(wide).T
        logits = logits if bias is None else logits + bias.to(wide)
        most, token = logits.softmax(-1).max(-1)
    else:
        token, most = launch(flat, packed, bias)
    return token.reshape(x.shape[:-1]), most.to(torch.float32).reshape(x.shape[:-1])


@head_argmax.register_fake
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
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape[:-1], dtype=torch.float32)


def stages(bits: int, bm: int, device: runtime.Device) -> int:
    """Depth of the pipeline, as shared memory allows."""
    return rule(Shape("w16", bits, TILE, TILE, TILE), bm, device).stages


def launch(x: Tensor, packed: Packed, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """token [M] and confidence [M] of x [M, K]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    m, tiles = x.shape[0], packing.padded(packed.n) // TILE
    bm = min(bucket(m), 64)
    kinds = (torch.float32, torch.int32, torch.float32)
    parts = [torch.empty(tiles, m, dtype=kind, device=x.device) for kind in kinds]
    token = torch.empty(m, dtype=torch.int64, device=x.device)
    confidence = torch.empty(m, dtype=torch.float32, device=x.device)
    with runtime.on(x):
        device.confident[tiles, -(-m // bm)](
            *(x, *packed.pointers, packed.low if bias is None else bias, *parts, m, x.stride(0)),
            **packed.constants(runtime.product_dtype(x)),
            **{"BIAS": bias is not None, "BN": TILE, "BM": bm, "PRE": bm >= 64},
            **{"num_warps": 4, "num_stages": stages(packed.bits, bm, runtime.device_of(x))},
        )
        width = max(16, 1 << (tiles - 1).bit_length())
        device.most_confident[m,](*parts, token, confidence, m, TILES=tiles, WIDTH=width)
    return token, confidence
