"""Triton's decorator and language where Triton is installed, else stand-ins, so that every module imports without it."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    #: A function of compile-time values that runs while a kernel is compiled.
    at_compile_time: Any = triton.constexpr_function
    MISSING = False
except ImportError:  # pragma: no cover - the development environment has it

    class _Absent:
        """Any attribute of a language that is not there."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, value: Any = None) -> Any:
            return value

    tl: Any = _Absent()  # type: ignore[no-redef]
    jit = at_compile_time = lambda function: function
    MISSING = True

__all__ = ["MISSING", "at_compile_time", "jit", "tl"]
