"""Head, argmax and confidence of rows in native code (csrc/head.cpp), without logits in memory.

    token = argmax_v (x · Wᵀ + b)_v,    confidence = softmax(x · Wᵀ + b)_token

`excluded` is a token that is never chosen but counts in the softmax, as [MASK] does in every sampler; -1 for none.

Shapes:  x [..., K], the weight [V, K], bias [V] or None → token int64 [...], confidence float64 [...].
Dtypes:  x and weight float32 or bfloat16, products in float32, sums of probabilities in float64: 1 - confidence is as accurate as
         the logits are, so that positions can be ranked by it where they are all nearly sure. Logits are not rounded to the dtype
         of x; of equal ones the first counts.
Values:  where a logit is NaN or infinite the confidence is NaN, and samplers ask for the logits, which they refuse; the token is
         then the first NaN, or the first of the largest.
Memory:  x in float32, and 40 bytes for each row and part of the vocabulary, of which there are at most 128.
Layout:  the weight as a module has it, which may share its memory with the embedding; nothing is packed.

What a sampler needs of masked rows: pass those rows alone (`dlqc.proposal` does). Other dtypes and layouts take the definition,
a piece of the vocabulary at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc.errors import ContractError
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.native_op import native_op, register_fake
from dlqc.kernels.reference.layout import rows

#: Numbers that the definition has in memory at a time, of logits and of the weight.
PIECE = 1 << 18


@native_op
def head_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None, excluded: int = -1) -> tuple[Tensor, Tensor]:
    """See the module docstring.

    Raises:
        ContractError: x and the weight do not fit together, or `excluded` is no token.
    """
    if weight.dim() != 2 or not weight.shape[0]:
        raise ContractError(f"the weight is {list(weight.shape)}, not [V, K]", where="head_argmax")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ContractError(f"the bias is {list(bias.shape)}, not {[weight.shape[0]]}", where="head_argmax")
    if not -1 <= excluded < weight.shape[0]:
        raise ContractError(
            f"{excluded} is none of {weight.shape[0]} tokens", where="excluded", remedy="Use -1 for none"
        )
    flat = rows(x, weight.shape[1])
    wide = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    flat, count = flat.to(wide), max(1, PIECE // max(1, *flat.shape))
    # What is found is kept in place: small tensors made anew among the large ones would break up the memory that these leave.
    best, total = (torch.full((flat.shape[0],), -torch.inf, dtype=torch.float64, device=x.device) for _ in range(2))
    token, odd = torch.zeros_like(best, dtype=torch.int64), torch.zeros_like(best, dtype=torch.bool)
    for start in range(0, weight.shape[0], count):
        piece = slice(start, start + count)
        logits = F.linear(flat, weight[piece].to(wide), None if bias is None else bias[piece].to(wide)).double()
        total.copy_(torch.logaddexp(total, logits.logsumexp(-1)))
        odd |= logits.isneginf().any(-1)
        if start <= excluded < start + count:
            logits[:, excluded - start] = -torch.inf
        most, which = logits.max(-1)
        better = (most > best) | (most.isnan() & ~best.isnan())
        best.copy_(torch.where(better, most, best))
        token.copy_(torch.where(better, which + start, token))
    confidence = (best - total).exp().masked_fill(total.isposinf() | odd, torch.nan)
    return token.reshape(x.shape[:-1]), confidence.reshape(x.shape[:-1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, excluded: int = -1) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape[:-1], dtype=torch.float64)


register_fake(head_argmax, _fake)


def unavailable() -> str | None:
    """None if the native code can be used, or why not, one clause."""
    reason = build.unavailable("head")
    if reason is None:
        build.library("head")
    return reason
