"""The inner loops of rounding to integers in native code (`csrc/rounding.cpp`), where that code could be built.

`round_block` rounds a block of columns one after the other, each against the errors of those before; `search` looks for the
range of each group that leaves the least error. Both take float32 on the CPU, answer None or False for anything else, and
agree with the same loops in torch up to the order of their sums.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from dlqc import native

_SCALE_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

_POINTER, _LENGTH, _INTEGER, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _LENGTH) for name in ("size", "width")),
        *((name, _POINTER) for name in ("target", "work", "codes", "near")),
        ("near_pitch", _LENGTH),
        *((name, _POINTER) for name in ("scale", "zero", "group")),
        *((name, _NUMBER) for name in ("midpoint", "top")),
        *((name, _POINTER) for name in ("share", "losses")),
    )


class _Search(ctypes.Structure):
    _fields_ = (
        *((name, _LENGTH) for name in ("count", "size", "cycle")),
        *((name, _POINTER) for name in ("weight", "root", "least", "most", "coarse", "fine")),
        *((name, _LENGTH) for name in ("coarse_count", "fine_count")),
        *((name, _INTEGER) for name in ("symmetric", "type")),
        *((name, _NUMBER) for name in ("top", "midpoint", "floor")),
        *((name, _POINTER) for name in ("scale", "zero")),
    )


def round_block(
    target: torch.Tensor,
    work: torch.Tensor,
    codes: torch.Tensor,
    near: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: torch.Tensor,
    midpoint: int,
    top: int,
    share: torch.Tensor,
    losses: torch.Tensor,
) -> bool:
    """Round the rows of `target` [B, N] from the last to the first; False, and nothing written, if it cannot be done here.

    Row k is rounded at t_k = target_k + Σ_{j>k} near_kj·e_j to the nearest level of `scale` and `zero` (tables [G, N], row
    group_k, float32; no `zero`: `midpoint`); e_k = work_k - ŵ_k.

    Args:
        target, near: [B, N] and unit upper triangular [B, B], float32.
        work: w on entry, e on return, float32 [B, N].
        codes: written, uint8 [B, N].
        group: int64 [B]. share: float32 [B]. losses: float64 [2, N], Σ_k share_k·(t_k - ŵ_k)² and Σ_k e_k² are added.
    """
    tables = [scale] if zero is None else [scale, zero]
    floats = [target, work, near, share, *tables]
    call = _function("dlqc_round_block") if all(_plain(t, torch.float32) for t in floats) else None
    if call is None or not _plain(codes, torch.uint8) or not _plain(losses, torch.float64):
        return False
    group = group.to(torch.int64).contiguous()
    block = _Block(
        *target.shape,
        *(t.data_ptr() for t in (target, work, codes, near)),
        near.shape[1],
        *(scale.data_ptr(), None if zero is None else zero.data_ptr(), group.data_ptr()),
        *(midpoint, top, share.data_ptr(), losses.data_ptr()),
    )
    return not call(ctypes.byref(block), torch.get_num_threads())


def search(
    part: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    root: torch.Tensor | None,
    *,
    coarse: Sequence[float],
    fine: Sequence[float],
    symmetric: bool,
    stored: torch.dtype,
    top: int,
    midpoint: int,
    floor: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scales and zero points, float32 [R, G], of the shrunk ranges with the least error; None if it cannot be done here.

    What it does is `IntFormat._search`: `part` is [R, G, g], `least` and `most` [R, G] its range, `root` [G, g].
    """
    part = part.contiguous()
    given = [part, least, most] if root is None else [part, least, most, root]
    call = _function("dlqc_search") if all(_plain(t, torch.float32) for t in given) else None
    if call is None or stored not in _SCALE_TYPES:
        return None
    scale, zero = torch.empty_like(least), torch.empty_like(least)
    steps = [torch.tensor(ratios, dtype=torch.float32) for ratios in (coarse, fine)]
    task = _Search(
        *(least.numel(), part.shape[-1], part.shape[1]),
        *(part.data_ptr(), None if root is None else root.data_ptr(), least.data_ptr(), most.data_ptr()),
        *(steps[0].data_ptr(), steps[1].data_ptr(), len(coarse), len(fine)),
        *(int(symmetric), _SCALE_TYPES[stored], top, midpoint, floor),
        *(scale.data_ptr(), zero.data_ptr()),
    )
    call(ctypes.byref(task), torch.get_num_threads())
    return scale, zero


def _plain(t: torch.Tensor, dtype: torch.dtype) -> bool:
    return t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous()


@functools.cache
def _declared(found: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer:
    call: ctypes._NamedFuncPointer = getattr(found, name)
    call.argtypes = (ctypes.POINTER(_Block if name == "dlqc_round_block" else _Search), _INTEGER)
    call.restype = _INTEGER if name == "dlqc_round_block" else None
    return call


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    found = native.library("rounding")
    return None if found is None else _declared(found, name)
