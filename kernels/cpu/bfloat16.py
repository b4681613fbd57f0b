"""The activation side of the kernels that multiply in bfloat16 (`int8pack`, `int4pack`).

    x  →  x̂ (if the site quantizes activations: float32 values that their codes stand for)  →  bfloat16 [M, K]

torch's weight-only ops also take float16 and float32, on a far slower path. Rounding x (or x̂) to bfloat16 changes an
element by at most 2^-8 of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.backend import LinearSpec
from dlqc.kernels.reference.layout import act_format, rows


def narrow(x: Tensor, in_features: int, act_bits: int, act_group: int, act_symmetric: bool) -> Tensor:
    """x [..., K] as bfloat16 [M, K], contiguous, quantized and dequantized on the way if act_bits > 0."""
    flat = rows(x, in_features)
    act = act_format(act_bits, act_group, act_symmetric)
    if act is not None:
        flat = act.fake_quantize(flat.to(torch.float32))
    return flat.to(torch.bfloat16).contiguous()


def remarks(spec: LinearSpec) -> list[str]:
    """What a user should know about any kernel that multiplies in bfloat16."""
    said = ["bfloat16 product"]
    if spec.act is not None:
        said.append(f"activations are rounded to {spec.act.label}, then to bfloat16")
    if spec.integers.scale_dtype != "bfloat16":
        said.append(f"{spec.integers.scale_dtype} scales are rounded to bfloat16")
    return said
