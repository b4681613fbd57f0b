"""Triton's decorator and language where Triton is installed, else stand-ins, so that every module imports without it."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

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
    TensorDescriptor: Any = _Absent()  # type: ignore[no-redef]
    jit = at_compile_time = lambda function: function
    MISSING = True

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    #: Whether kernels can be launched before the one ahead has ended.
    DEPENDENT_LAUNCH = True
except ImportError:  # pragma: no cover - an older Triton
    gdc_launch_dependents = gdc_wait = None
    DEPENDENT_LAUNCH = False

__all__ = [
    "DEPENDENT_LAUNCH",
    "MISSING",
    "TensorDescriptor",
    "at_compile_time",
    "gdc_launch_dependents",
    "gdc_wait",
    "jit",
    "tl",
]
