"""Ops of torch whose kernel on the CPU is native code: torch's dispatcher calls it without Python in between.

    @native_op                       dlqc_cpu::<name> as Python defines it (and dlqc_cpu::<name>_in_python, always)
    def name(...): ...
    connect(library, "name")         its `dlqc_op_<name>` is the kernel from now on

A call through Python costs tens of microseconds, and ten times that once other data have pushed the interpreter out of the
caches, as the weights of a model do. The native kernel takes float32 and bfloat16 in layouts whose rows lie evenly, and hands
anything else to the twin in Python.

torch's interface for this is in C and kept stable (torch/csrc/stable of its sources; `aoti_torch_library_impl`). Where a build of
torch lacks a function of it, the ops stay in Python and compute the same.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "dlqc_cpu"
LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]

#: As `Torch` of csrc/torch_op.h has them.
FUNCTIONS = (
    "aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides",
    "aoti_torch_get_dtype", "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object", "aoti_torch_call_dispatcher",
    "torch_get_num_threads",
)  # fmt: skip
#: Those that torch may lack.
FURTHER = ("torch_exception_get_what_without_backtrace",)
REGISTRATION = (
    "aoti_torch_library_init_impl", "aoti_torch_library_impl", "aoti_torch_delete_library_object",
)  # fmt: skip
NUMBERS = (
    "aoti_torch_dtype_float32", "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_bool", "aoti_torch_dtype_uint8",
    "aoti_torch_device_type_cpu", "aoti_torch_dtype_int64", "aoti_torch_dtype_float64", "aoti_torch_dtype_float16",
)  # fmt: skip

#: By name: whose kernel it is, and torch's handle of the registration.
_connected: dict[str, tuple[ctypes.CDLL, ctypes.c_void_p]] = {}
_forked = False
_lock = threading.Lock()  # of registrations


class _Torch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*FUNCTIONS, *FURTHER)),
        *((name, ctypes.c_int32) for name in NUMBERS),
    )


def _after_fork() -> None:
    """The threads of the parent do not exist in a child: libgomp would wait for them forever, and so would a lock they held."""
    global _forked, _lock
    _forked, _lock = True, threading.Lock()
    rebind()


def rebind() -> None:
    """Tell the connected libraries anew whose threads they may use."""
    for library, _ in list(_connected.values()):
        _bind(library)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def native_op(definition: Callable[..., Any]) -> torch._ops.OpOverload:
    """An op by its definition in Python, whose kernel on the CPU can be replaced."""
    schema = torch.library.infer_schema(definition, mutates_args=())
    name = definition.__name__
    for said in (name, f"{name}_in_python"):
        LIBRARY.define(said + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(said, definition, "CompositeExplicitAutograd")
    op: torch._ops.OpOverload = getattr(torch.ops.dlqc_cpu, name).default
    return op


def register_fake(op: torch._ops.OpOverload, fake: Callable[..., Any]) -> None:
    """What shapes and dtypes the op gives."""
    for said in (op._schema.name, f"{op._schema.name}_in_python"):
        torch.library.register_fake(said, fake, lib=LIBRARY)


def connect(library: ctypes.CDLL, *names: str) -> bool:
    """Make `dlqc_op_<name>` of a library the kernel of each op; False where torch has no interface for it."""
    torch_cpu = _torch_cpu()
    if torch_cpu is None or _torch() is None:
        return False
    with _lock:
        return all(_connect(torch_cpu, library, name) for name in names)


def _connect(torch_cpu: ctypes.CDLL, library: ctypes.CDLL, name: str) -> bool:
    connected = _connected.get(name)
    if connected is not None:
        if connected[0] is library:
            return True
        torch_cpu.aoti_torch_delete_library_object(connected[1])
        del _connected[name]
    _bind(library)
    handle = ctypes.c_void_p()
    place = (NAMESPACE.encode(), b"CPU", __file__.encode(), ctypes.c_uint32(0))
    entry = ctypes.cast(getattr(library, f"dlqc_op_{name}"), ctypes.c_void_p)
    if torch_cpu.aoti_torch_library_init_impl(*place, ctypes.byref(handle)):
        return False
    if torch_cpu.aoti_torch_library_impl(handle, name.encode(), entry):
        torch_cpu.aoti_torch_delete_library_object(handle)
        return False
    _connected[name] = library, handle
    return True


def team() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch loaded, if it has one of that kind and may use it."""
    found = _torch_cpu()
    return None if _forked or found is None else _address(found, "GOMP_parallel")


def _bind(library: ctypes.CDLL) -> None:
    table = _torch()
    if table is not None:
        library.dlqc_bind(ctypes.byref(table), ctypes.c_void_p(team()))


@cache
def _torch_cpu() -> ctypes.CDLL | None:
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        except OSError:
            continue
    return None


@cache
def _torch() -> _Torch | None:
    """The functions of torch that native ops call; None where one is missing."""
    found = _torch_cpu()
    if found is None:
        return None
    addresses: list[Any] = [_address(found, name) for name in FUNCTIONS]
    others = [_address(found, name) for name in (*REGISTRATION, *NUMBERS)]
    if None in addresses or None in others:
        return None
    further = (_address(found, name) for name in FURTHER)
    return _Torch(*addresses, *further, *(int(getattr(found, name)()) for name in NUMBERS))


def _address(library: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None
