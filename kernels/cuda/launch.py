"""How many tokens a block of threads takes, and into how many shares K is cut: by bucket of the number of tokens.

As of the Triton kernels everything about a launch follows from the bucket, so a row of the result has the same bits in every
batch of its bucket. There is one bucket more, of 8: a fragment of the tensor cores is 8 tokens wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlqc.kernels.cuda import build
from dlqc.kernels.triton import dispatch
from dlqc.kernels.triton.packing import PADDED, padded
from dlqc.kernels.triton.runtime import Device

STEP = 128
#: Blocks of 128 threads that a multiprocessor holds of the smaller tiles; so many should be under way at once.
RESIDENT = 4


def bucket(tokens: int) -> int:
    """The smallest bucket that holds so many tokens.

    >>> bucket(3), bucket(9), bucket(65)
    (8, 16, 128)
    """
    return 8 if tokens <= 8 else dispatch.bucket(tokens)


def splits(size: int, bm: int, n: int, steps: int, weight_bytes: int, device: Device) -> int:
    """Shares of K for a bucket of `size` tokens in blocks of `bm`.

    Shares are doubled while there is room for more blocks, each keeps four steps, and to write and read their sums costs less
    than half of reading the weight.
    """
    blocks = padded(n) // PADDED * -(-size // bm)
    found = 1
    while (
        2 * found * blocks <= RESIDENT * device.units
        and 8 * found <= steps
        and 2 * found * size * n * 8 <= weight_bytes
    ):
        found *= 2
    return found


def target(
    y: Tensor, bias: Tensor | None, tokens: Tensor, shares: int, unit: float
) -> tuple[build.Target, Tensor | None]:
    """Where y [M, N] goes, and the memory of its shares (4 bytes each), which must outlive the launch."""
    m, n = y.shape
    parts = torch.empty(shares, m, padded(n), dtype=torch.int32, device=y.device) if shares > 1 else None
    held = (y.data_ptr(), None if parts is None else parts.data_ptr(), tokens.data_ptr())
    to = build.Target(
        *(
            *held,
            None if bias is None else bias.data_ptr(),
            y.stride(0),
            build.TYPES[y.dtype],
            m,
            n,
            padded(n),
            shares,
            unit,
        )
    )
    return to, parts
