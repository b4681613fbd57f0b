"""Programmatic dependent launch: a kernel begins while the one ahead of it in the stream still runs (Hopper and later).

A step of few tokens is a chain of kernels of a few microseconds, and each would wait for the one ahead to end before its programs
are even started. Begun early, a program has its share of the weight brought to the second-level cache and waits then. Weights are
constants; all else that a kernel reads is read behind `arrive`, which every kernel calls that is launched so. It lets the next
kernel begin behind its own wait, so whatever ran before the one ahead is complete by then.
"""

from __future__ import annotations

from dlqc.kernels.triton.language import gdc_launch_dependents, gdc_wait, jit, tl


@jit
def arrive(DEPENDENT: tl.constexpr):
    """Wait until the kernel ahead is complete and what it wrote can be read; then the kernel behind may begin."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@jit
def fetch_share(
    low, split, PER: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Have a program's share of a packed weight brought to the second-level cache, up to 32 KiB for each 64 of its BN rows.

    A share is the PER blocks from split · PER on, of BLOCKS; a block of 64 rows is SIZE words in one run (`packing`).
    """
    if DEPENDENT:
        LINE: tl.constexpr = 1024 // low.dtype.element_ty.primitive_bitwidth  # 128 bytes
        first = tl.minimum(split * PER, BLOCKS - 1)
        last = tl.minimum(PER, BLOCKS - first) * (SIZE // LINE) - 1
        for tile in tl.static_range(BN // 64):
            start = low + ((tl.program_id(0) // SPLITS * (BN // 64) + tile) * BLOCKS + first) * SIZE
            for part in tl.static_range(2):
                line = tl.minimum(part * 128 + tl.arange(0, 128), last)
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                    "=r,l",
                    [start + line * LINE],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
