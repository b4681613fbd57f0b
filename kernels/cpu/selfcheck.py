"""Does the torch of this machine compute what the kernels assume? Each op is asked once, on small known numbers.

The ops behind `int8_mm`, `int8pack` and `int4pack` are private to torch and choose their code by the instruction set.
What is checked is what has been seen to go wrong without an error, or what the kernels take on trust:

    _int_mm                      without VNNI instructions, pairs of products 255·w are added in 16 bits and saturate
                                 once |w| > 64: random data mostly pass, large equal values do not
    _weight_int8pack_mm          in bfloat16 it reads past the end of rows when K does not divide by 16: wrong results
                                 or a crash. Refused by `Int8Pack.supports`; the check stays on safe shapes
    _weight_int4pack_mm_for_cpu  the meaning of its arguments: (code - 8)·scale + offset, offsets after scales; and the
                                 order of its bytes, which differs between instruction sets

An answer is kept for the life of the process. It is None, or the reason why the op cannot be used, one clause.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

TOKENS = (1, 5, 64)


@cache
def int_mm(reach: int) -> str | None:
    """`torch._int_mm` on int8 [M, K] by [K, N] must be exact for -128 ≤ x ≤ 127 and |w| ≤ reach (128 stands for -128)."""

    def exact() -> bool:
        k, n = 68, 20
        low, high = -reach, min(reach, 127)
        ends = torch.tensor([low, high], dtype=torch.int8)
        # Rows of W: all low, all high, alternating, and a ramp, in turn.
        w = torch.stack([ends[:1].expand(k), ends[1:].expand(k), ends.repeat(k // 2), _ramp(k, high)]).repeat(n // 4, 1)
        for tokens in TOKENS:
            x = torch.full((tokens, k), 127, dtype=torch.int8)
            x[1::3] = -128
            x[2::3] = _ramp(k, 127)
            if not torch.equal(torch._int_mm(x, w.T).double(), x.double() @ w.double().T):
                return False
        return True

    return _ask(exact, "torch._int_mm is not exact on this CPU (8-bit products saturate without VNNI instructions)")


@cache
def int8pack() -> str | None:
    """`_weight_int8pack_mm`: y = x · (w · scale)ᵀ for x bfloat16 [M, K], w int8 [N, K], scale bfloat16 [N]."""

    def right() -> bool:
        w = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(5).reshape(20, 64)
        scale = torch.tensor([0.5, 2.0], dtype=torch.bfloat16).repeat(10)
        return all(
            _near(torch.ops.aten._weight_int8pack_mm(x, w, scale), x, w.double() * scale.double().unsqueeze(1))
            for x in map(_tokens, TOKENS)
        )

    return _ask(right, "torch's _weight_int8pack_mm is wrong on this CPU")


@cache
def int4pack() -> str | None:
    """`_weight_int4pack_mm_for_cpu`: y = x · ((code - 8) · scale + offset)ᵀ, scale and offset bfloat16 [K/g, N, 2]."""

    def right() -> bool:
        n, k, group = 80, 64, 32
        codes = (torch.arange(n * k, dtype=torch.int32) * 7 % 16).reshape(n, k)
        scale = (1 + torch.arange(2 * n).reshape(2, n) % 3).to(torch.bfloat16)
        offset = (torch.arange(2 * n).reshape(2, n) % 5 - 2).to(torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        wide = [part.double().T.repeat_interleave(group, 1) for part in (scale, offset)]
        weight, both = (codes.double() - 8) * wide[0] + wide[1], torch.stack((scale, offset), -1)
        return all(
            _near(torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, both), x, weight)
            for x in map(_tokens, TOKENS)
        )

    return _ask(right, "torch's _weight_int4pack_mm_for_cpu is wrong on this CPU")


@cache
def native(name: str, options: tuple[str, ...]) -> str | None:
    """The native product `name`, as compiled with `options`, must be exact on whole numbers for every width of codes."""

    def exact() -> bool:
        from dlqc.kernels.cpu import build  # whose kernels ask

        n, k, group = 50, 128, 64
        op, acts = (torch.ops.dlqc_cpu.linear8, (8, 0)) if name == "linear8" else (torch.ops.dlqc_cpu.linear16, ())
        for bits in (2, 3, 4, 8):
            codes = (torch.arange(n * k, dtype=torch.int32) * 37 % (1 << bits)).to(torch.uint8).reshape(n, k)
            codes[:2] = torch.tensor([[0], [(1 << bits) - 1]], dtype=torch.uint8)
            zeros = (torch.arange(2 * n).reshape(n, 2) * 5 % (1 << bits)).to(torch.uint8)
            scales = torch.tensor([1.0, 2.0]).repeat(n, 1).to(torch.bfloat16)
            wide = [part.double().repeat_interleave(group, 1) for part in (zeros, scales)]
            weight = (codes.double() - wide[0]) * wide[1]
            tensors = build.arrange(codes, bits, name), build.in_panels(scales), build.in_panels(zeros), None
            for tokens in (1, 6, 8, 19):
                x = torch.full((tokens, k), 127.0)
                x[1::3, ::2] = -127
                x[2::3, 1:] = _ramp(k - 1, 127).float()
                y = op(x, *tensors, k, n, bits, group, *acts)
                expected = x.double() @ weight.T
                if not torch.equal(y.double(), expected):
                    return False
                y = op(x.to(torch.bfloat16), *tensors, k, n, bits, group, *acts)
                if not torch.equal(y, expected.to(torch.bfloat16)):
                    return False
        return True

    return _ask(exact, "the native product is wrong on this CPU")


def _ask(question: Callable[[], bool], reason: str) -> str | None:
    try:
        # Sites may be asked about while a graph is traced with fake or meta tensors; this needs real ones.
        with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
            return None if question() else reason
    except (RuntimeError, AttributeError) as error:
        return f"this build of torch cannot run it ({str(error).splitlines()[0]})"


def _ramp(length: int, top: int) -> torch.Tensor:
    return (torch.arange(length) * 37 % (2 * top + 1) - top).to(torch.int8)


def _tokens(count: int) -> torch.Tensor:
    """Small whole numbers, bfloat16 [count, 64]: their products with the weights above are exact in float32."""
    return (torch.arange(count * 64).reshape(count, 64) * 5 % 9 - 4).to(torch.bfloat16)


def _near(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether y is x · Wᵀ up to the one rounding to bfloat16, or one more of the same size."""
    expected = x.double() @ weight.T
    return bool(((y.double() - expected).abs() <= expected.abs() * 2.0**-7).all())
