"""linear8: integers exact on every instruction set, memory left alone, and when it declines."""

from __future__ import annotations

import ctypes
import multiprocessing
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlqc.kernels.cpu.linear8 as linear8_module
from dlqc import native, shipped
from dlqc.backend import LinearSpec, choose_kernel
from dlqc.backends.cpu import BACKEND
from dlqc.doctor import examine
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.cpu import build, native_op, selfcheck
from dlqc.kernels.cpu.linear8 import Linear8, linear8

LIBRARY = "linear8"  # whose paths `isa` takes in turn

KERNEL = Linear8()
SPEC = LinearSpec(256, 100, IntFormat(4, 64, scale_dtype="float32"), ActFormat(8), False)
GUARD = 64


@pytest.mark.usefixtures("isa")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 110), st.integers(1, 200)),
    group=st.sampled_from([None, 32, 64, 96, 288]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_are_exact(bits: int, shape: tuple[int, int, int], group: int | None, symmetric: bool, seed: int) -> None:
    """Tokens are whole numbers up to 127, and each row shows one of its groups by a scale of 1 there: nothing is rounded."""
    g = torch.Generator().manual_seed(seed)
    m, n, k = shape
    k = k if group is None else group * (1 + k % 3)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=g)
    codes[::7], codes[1::7] = 0, (1 << bits) - 1
    groups = k // (group or k)
    scales = torch.zeros(n, groups).scatter_(1, torch.randint(0, groups, (n, 1), generator=g), 1.0)
    zeros = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8, generator=g)
    spec = LinearSpec(k, n, IntFormat(bits, group, symmetric, "float32"), ActFormat(8), False)
    assert KERNEL.supports(spec) is None
    lowered = KERNEL.lower(spec, pack(codes, bits), scales, None if symmetric else pack(zeros, bits), None)
    x = torch.randint(-127, 128, (m, k), generator=g).float()
    x[torch.arange(m), torch.randint(0, k, (m,), generator=g)] = 127.0
    x[::5] = 127.0
    y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    middle = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    wide = [part.double().repeat_interleave(group or k, 1) for part in (middle, scales)]
    assert torch.equal(y.double(), x.double() @ ((codes.double() - wide[0]) * wide[1]).T)


def restated(x: torch.Tensor, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, act: ActFormat) -> Any:
    """The docstring's formula step by step: integers exact, each group's sum scaled in float64, by group of W and of x."""
    k, groups = x.shape[1], scales.shape[1]
    q, s_x, _ = act.quantize_dynamic(x)
    segment = min(k // groups, k // s_x.shape[1])
    total = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    for start in range(0, k, segment):
        part, g, a = slice(start, start + segment), start * groups // k, start * s_x.shape[1] // k
        centred = codes[:, part].long() - zeros[:, g : g + 1].long()
        total += (q[:, part].long() @ centred.T).double() * scales[:, g].double() * s_x[:, a : a + 1].double()
    return total


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("group", "act_group"), [(64, None), (128, 32), (32, 128), (None, 64), (256, None)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 300])
def test_quantized_tokens_by_the_formula(group: int | None, act_group: int | None, tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    n, k = 70, 768
    groups = k // (group or k)
    codes = torch.randint(0, 8, (n, k), dtype=torch.uint8, generator=g)
    scales, zeros = torch.rand(n, groups, generator=g), torch.randint(0, 8, (n, groups), dtype=torch.uint8, generator=g)
    spec = LinearSpec(k, n, IntFormat(3, group, False, "float32"), ActFormat(8, act_group), False)
    lowered = KERNEL.lower(spec, pack(codes, 3), scales, pack(zeros, 3), None)
    x = torch.randn(tokens, k, generator=g)
    y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    assert spec.act is not None
    expected = restated(x, codes, zeros, scales, spec.act)
    size = restated(x.abs(), codes, torch.zeros_like(zeros), scales, spec.act)
    # Codes are those of the reference to the last one: what is left is float32 rounding of k/segment + 3 operations.
    assert ((y.double() - expected).abs() <= (k / min(group or k, act_group or k) + 3) * 2.0**-24 * size).all()


@pytest.mark.usefixtures("isa")
def test_odd_tokens() -> None:
    """Zeros, denormals, the largest floats; tokens that are not finite reach no other token."""
    lowered = make(SPEC)
    x = torch.randn(20, 256)
    plain = lowered(x)
    x[3], x[4], x[5] = 0.0, 1e-42, 3e38
    x[7, 3], x[8, 5], x[9, 7] = float("inf"), float("-inf"), float("nan")
    y = lowered(x)
    assert torch.equal(y[3], torch.zeros(100))
    assert y[4].isfinite().all()
    kept = [i for i in range(20) if i not in (3, 4, 5, 7, 8, 9)]
    assert torch.equal(y[kept], plain[kept])


def make(spec: LinearSpec, in_python: bool = False) -> Any:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (spec.out_features, spec.in_features), dtype=torch.uint8, generator=g)
    scales = torch.rand(spec.out_features, spec.integers.groups(spec.in_features), generator=g)
    lowered = KERNEL.lower(spec, pack(codes, 4), scales, None, None)
    op = torch.ops.dlqc_cpu.linear8_in_python if in_python else lowered.op
    return lambda x: op(x, *lowered.tensors.values(), *lowered.scalars)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_memory_around_the_result_is_left_alone(dtype: torch.dtype, tokens: int) -> None:
    """Rows of y further apart than they are long, x at an odd address: nothing is written that is not y."""
    spec = replace(SPEC, out_features=53)
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (53, 256), dtype=torch.uint8, generator=g)
    lowered = KERNEL.lower(spec, pack(codes, 4), torch.rand(53, 4, generator=g), None, None)
    x = torch.randn(tokens * 257 + 1, generator=g).to(dtype)[1:].view(tokens, 257)[:, :256]
    pitch = 53 + 5
    whole = torch.full((tokens * pitch + 2 * GUARD,), 7.0, dtype=dtype)
    y = whole.as_strided((tokens, 53), (pitch, 1), GUARD)
    held = {role: part for role, part in lowered.tensors.items() if part is not None}
    weight = build.Weight(53, 256, 64, held["codes"].data_ptr(), held["scales"].data_ptr(), None, None, 4, 0)
    call = linear8_module._function()
    arguments = (
        x.data_ptr(),
        build.TYPES[dtype],
        tokens,
        257,
        y.data_ptr(),
        pitch,
        8,
        0,
        None,
        None,
        0,
        *build.threads(),
    )
    assert call(ctypes.byref(weight), *arguments) == 0
    assert torch.equal(y, lowered.op(x, *lowered.tensors.values(), *lowered.scalars))
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside.as_strided((tokens, 53), (pitch, 1), GUARD).fill_(False)
    assert (whole[outside] == 7).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("own", [False, True], ids=["torch's threads", "its own threads"])
def test_the_number_of_threads_changes_nothing(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = make(replace(SPEC, in_features=2048, out_features=500)), torch.randn(70, 2048)
    monkeypatch.setattr(native_op, "_forked", own)
    native_op.rebind()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(x))
    finally:
        torch.set_num_threads(before)
        monkeypatch.undo()
        native_op.rebind()
    assert all(torch.equal(found[0], other) for other in found[1:])


def _in_child(run: Any, x: torch.Tensor, expected: torch.Tensor, queue: multiprocessing.SimpleQueue[bool]) -> None:
    queue.put(build.threads()[1] is None and torch.equal(run(x), expected))


def test_fork_after_use() -> None:
    """libgomp's threads are not in the child, and it would wait for them."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run, x = make(replace(SPEC, in_features=2048)), torch.randn(64, 2048)
        expected = run(x)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(run, x, expected, queue))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"act": None}, "activations are not quantized"),
        ({"act": ActFormat(8, symmetric=False)}, "activations are asymmetric, it needs symmetric ones"),
        ({"weight": IntFormat(4, 16)}, "weights have a scale per group of 16, it needs a multiple of 32"),
        ({"act": ActFormat(8, 8)}, "activations have a scale per group of 8, it needs a multiple of 32"),
        (
            {"in_features": 384, "weight": IntFormat(4, 96), "act": ActFormat(8, 64)},
            "groups of 64 and 96 do not nest",
        ),
        ({"in_features": 132_105, "weight": IntFormat(8, None)}, "sums over 132105 input features can overflow int32"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    assert KERNEL.supports(replace(SPEC, **change)) == reason  # type: ignore[arg-type]


def test_one_group_a_row_is_one_scale_a_channel() -> None:
    assert KERNEL.supports(replace(SPEC, in_features=70, weight=IntFormat(4, 70), act=ActFormat(8, 70))) is None


def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLQC_CPU_ISA", "mmx")
    assert KERNEL.supports(SPEC) == "DLQC_CPU_ISA=mmx is none of portable, avx2, avx512vnni"


def test_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLQC_CPU_ISA", "avx512vnni")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert KERNEL.supports(SPEC) == "this processor has no avx512vnni"


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(native, "_found", {})
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "prebuilt")
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("DLQC_CACHE", str(tmp_path))
    spec = replace(SPEC, weight=IntFormat(4, None))
    kernel, refusals = choose_kernel(BACKEND, spec)
    assert kernel is not None
    assert kernel.name == "int8_mm"
    assert refusals == {"linear8": "/bin/false --version failed with 1"}
    assert "not linear8: /bin/false --version failed with 1" in examine()["backend cpu"]["w4a8 g128"]


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLQC_NATIVE", "0")
    assert KERNEL.supports(SPEC) == "native code is turned off by DLQC_NATIVE=0"


def test_a_silent_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One code too low, as a product that saturates would be."""
    assert selfcheck.native.__wrapped__("linear8", build.options()) is None
    real = build.arrange

    def lower(codes: torch.Tensor, bits: int, name: str) -> torch.Tensor:
        codes = codes.clone()
        codes[1, 60] -= 1
        return real(codes, bits, name)

    monkeypatch.setattr(build, "arrange", lower)
    assert selfcheck.native.__wrapped__("linear8", build.options()) == "the native product is wrong on this CPU"


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear8_module, "_function", lambda: lambda *arguments: 1)
    with pytest.raises(MemoryError, match=r"no memory to quantize \[3, 256\] activations"):
        make(SPEC, in_python=True)(torch.randn(3, 256))


def test_it_is_one_op() -> None:
    assert linear8.name() == "dlqc_cpu::linear8"
