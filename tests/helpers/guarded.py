"""Tensors that end where readable memory ends: one element too far stops the process."""

from __future__ import annotations

import ctypes
import mmap

import torch


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte lies before a page that may be neither read nor written."""
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    last = ctypes.addressof(ctypes.c_char.from_buffer(memory, whole))
    failed = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(last), mmap.PAGESIZE, 0)
    assert not failed, ctypes.get_errno()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return copy.view(tensor.shape).copy_(tensor)
