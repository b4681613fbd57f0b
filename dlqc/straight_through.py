"""Quantization that lets gradients through: what learned transforms are trained with.

    x̂ = x + s·u,   u = (Q(x) - x)/s held constant,   s the range that the step is proportional to (max |x| of a token or row)

The value is Q(x). The gradient is that of x, plus that of the error through its step: a transform that flattens a row makes
its range, and with it its error, smaller. With `scale=False` the error is held constant as a whole, the plain
straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat


def straight_through(x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """rounding(x), to the last bit, with the gradient of x."""
    return rounding(x.detach()) + (x - x.detach())


def quantized_activations(x: torch.Tensor, fmt: ActFormat | None, *, scale: bool = True) -> torch.Tensor:
    """Q(x) for x [..., K]; x itself without a format."""
    if fmt is None:
        return x
    with torch.no_grad():
        rounded = fmt.fake_quantize(x)
    return _through(x, rounded, fmt.group_size, fmt.symmetric, scale)


def quantized_weight(w: torch.Tensor, fmt: IntFormat | None, *, scale: bool = True) -> torch.Tensor:
    """Q(W) for W [N, K], rounded to nearest; W itself without a format."""
    if fmt is None:
        return w
    with torch.no_grad():
        rounded = fmt.quantize(w).dequantize().to(w.dtype)
    return _through(w, rounded, fmt.group_size, fmt.symmetric, scale)


def _through(x: torch.Tensor, rounded: torch.Tensor, group: int | None, symmetric: bool, scale: bool) -> torch.Tensor:
    error = (rounded - x).detach()
    if not scale:
        return x + error
    size = group or x.shape[-1]
    cut = x.reshape(*x.shape[:-1], -1, size)
    if symmetric:
        span = cut.abs().amax(dim=-1, keepdim=True)
    else:
        span = cut.amax(dim=-1, keepdim=True).clamp_min(0) - cut.amin(dim=-1, keepdim=True).clamp_max(0)
    unit = error.reshape(cut.shape) / span.detach().clamp_min(torch.finfo(x.dtype).tiny)
    return (cut + span * unit).reshape(x.shape)
