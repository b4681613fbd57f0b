"""Weights as sums of sign planes, drawn at random."""

from __future__ import annotations

import torch

from dlqc.formats.planes import PlanesFormat, PlanesWeight


def stored(fmt: PlanesFormat, n: int, k: int, orders: list[int] | None, seed: int) -> PlanesWeight:
    """A weight of random planes with scales of both signs."""
    g = torch.Generator().manual_seed(seed)
    found = fmt.orders(k, orders)
    codes = torch.cat([torch.randint(0, 1 << order, (n, k // len(found)), generator=g) for order in found], 1)
    rows, columns = (torch.randn(*size, generator=g) for size in ((n, sum(found)), (sum(found), k // len(found))))
    return PlanesWeight(codes.to(torch.uint8), rows.to(fmt.dtype), columns.to(fmt.dtype), found, fmt)
