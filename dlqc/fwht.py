"""Block Hadamard transforms of a matrix in native code (`csrc/fwht.cpp`), where that code could be built.

`run` writes Tᵀ·W·S, W [N, K], for two *sides* S and T: a diagonal matrix, a block Hadamard matrix, another diagonal matrix, each
of which may be absent. W and the result may have any of the four floating types; in between, numbers are float32 or
float64. Nothing but one side's working set is held: a row, a panel of columns, or, for two sides, at most a quarter of
the matrix in the wide type.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from dlqc import native

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


@dataclass(frozen=True)
class Side:
    """x → x · diag(pre) · (I ⊗ H/√order ⊗ I_inner) · diag(post), as often as it fits into the length of x.

    Attributes:
        order: n = k·2ᵖ, order of the Hadamard matrix H_k ⊗ H_2ᵖ; 1 for none.
        core: H_k, int8 [k, k], already transposed if H is; None for k = 1.
        inner: how far apart two entries of a block are.
        pre, post: float64, one number for each entry of x; None for ones.
    """

    order: int = 1
    core: torch.Tensor | None = None
    inner: int = 1
    pre: torch.Tensor | None = None
    post: torch.Tensor | None = None


NOTHING = Side()


class _Side(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int64),
        ("core", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("h", ctypes.c_void_p),
        ("pre", ctypes.c_void_p),
        ("post", ctypes.c_void_p),
    )


def run(w: torch.Tensor, out: torch.Tensor, wide: torch.dtype, row: Side = NOTHING, column: Side = NOTHING) -> bool:
    """Write Tᵀ·w·S to `out`, S of `row` and T of `column`; False, and nothing written, where this cannot be done here.

    It is done for matrices on the CPU whose rows are contiguous, and that do not overlap. The arithmetic is that of `wide`,
    float32 or float64.

    Raises:
        MemoryError: not even the working set could be had.
    """
    if not (_fits(w) and _fits(out)) or w.shape != out.shape:
        return False
    call = _function()
    if call is None:
        return False
    if w.numel() == 0:
        return True
    keep: list[torch.Tensor] = []
    sides = [_pass(side, length, keep) for side, length in ((row, w.shape[1]), (column, w.shape[0]))]
    failed = call(
        *(w.data_ptr(), _TYPES[w.dtype], w.stride(0), out.data_ptr(), _TYPES[out.dtype], out.stride(0), *w.shape),
        *(ctypes.byref(sides[0]), ctypes.byref(sides[1]), int(wide == torch.float64), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a transform of {list(w.shape)}")
    return True


def _fits(t: torch.Tensor) -> bool:
    plain = type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.layout == torch.strided
    return plain and t.dim() == 2 and t.dtype in _TYPES and (t.shape[1] == 1 or t.stride(1) == 1)


def _pass(side: Side, length: int, keep: list[torch.Tensor]) -> _Side:
    """The side as C sees it; `keep` holds the memory it points to."""
    core = side.core
    if length % (side.order * side.inner):
        raise ValueError(f"blocks of {side.order} · {side.inner} in {length}")

    def address(t: torch.Tensor | None, dtype: torch.dtype, count: int) -> int | None:
        if t is None:
            return None
        keep.append(t.detach().to("cpu", dtype).contiguous())
        if t.numel() != count:
            raise ValueError(f"{t.numel()} numbers for {count}")
        return keep[-1].data_ptr()

    k = 1 if core is None else len(core)
    h = address(core, torch.int8, k * k)
    return _Side(side.order, k, side.inner, h, *(address(v, torch.float64, length) for v in (side.pre, side.post)))


def _function() -> ctypes._NamedFuncPointer | None:
    found = native.library("fwht")
    return None if found is None else _declared(found)


@functools.cache
def _declared(found: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    pointer, integer, length = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    call = found.dlqc_fwht
    matrix = (pointer, integer, length)
    call.argtypes = (*matrix, *matrix, length, length, *2 * (ctypes.POINTER(_Side),), integer, integer)
    call.restype = integer
    return call
