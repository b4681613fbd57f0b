"""CUDA kernels without a GPU: run thread by thread on the CPU against float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from guarded import at_the_end
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plane_weights import stored
from small_llada import small_llada

import dlqc
from dlqc import native
from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.planes import PlanesFormat, PlanesWeight
from dlqc.kernels.cuda import build, planes, w4a8
from dlqc.kernels.triton import runtime

TOKEN8 = ActFormat(8)
W4A8 = w4a8.W4A8()

needs_compiler = pytest.mark.skipif(native.compiler() is not None, reason=f"{native.compiler()}")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Kernels run on the CPU; call it to choose the order in which threads and blocks take turns."""
    monkeypatch.setattr(build, "library", emulation.library)

    def order(seed: int) -> None:
        for name in ("planes", "w4a8"):
            emulation.library(name).dlqc_order(seed)

    order(0)
    return order


def on_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels ask for ends where a page begins that may not be touched, and holds ones."""
    empty = torch.empty

    def guarded(*size: Any, **given: Any) -> torch.Tensor:
        made = at_the_end(empty(*size, **given))
        made.view(torch.uint8).fill_(255)
        return made

    monkeypatch.setattr(torch, "empty", guarded)


# ---- sign planes -------------------------------------------------------------------------------------------------------


def size_of(weight: PlanesWeight) -> torch.Tensor:
    """Σ_p |r_p · c_p|, float64 [N, K]: what rounding errors are measured by."""
    ones = replace(
        weight, codes=weight.codes.clone(), row_scales=weight.row_scales.abs(), column_scales=weight.column_scales.abs()
    )
    width = weight.codes.shape[1] // len(weight.orders)
    for group, order in enumerate(weight.orders):
        ones.codes[:, group * width : (group + 1) * width] = (1 << order) - 1
    return ones.dequantize().double()


def excess(weight: PlanesWeight, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> float:
    """The largest error over its bound: z in bfloat16, float32 sums over K' (started at half of the sum of z), y in its dtype."""
    exact, b = x.double(), 0 if bias is None else bias.double()
    truth = exact @ weight.dequantize().double().T + b
    size = exact.abs() @ size_of(weight).T + (0 if bias is None else bias.double().abs())
    terms = sum(weight.orders) * weight.codes.shape[1] // len(weight.orders)
    out = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[y.dtype]
    bound = (2.0**-8 + 2.0**-24 + 3 * (terms + 16) * 2.0**-24) * size + out * truth.abs()
    ratio = (y.double() - truth).abs() / (bound + (2.0**-25 if y.dtype == torch.float16 else 1e-300))
    return float("inf") if bool(ratio.isnan().any()) else float(ratio.max())


SHAPES = [(PlanesFormat(2, 128), 128, None), (PlanesFormat(3, 64), 192, [1, 3, 1]), (PlanesFormat(1, None), 77, None)]


@needs_compiler
@settings(
    max_examples=14, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_planes_against_float64(emulated: Any, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([64, 128, 192, None]))
    k = data.draw(st.integers(1, 200)) if group is None else group * data.draw(st.integers(1, 2))
    orders = data.draw(st.lists(st.integers(1, 3), min_size=k // (group or k), max_size=k // (group or k)))
    m, n = data.draw(st.sampled_from([1, 7, 9, 20, 50])), data.draw(st.sampled_from([1, 33, 130]))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    weight = stored(PlanesFormat(2, group), n, k, orders, data.draw(st.integers(0, 99)))
    x = torch.randn(m, k + data.draw(st.sampled_from([0, 3])))[:, :k].to(dtype)
    bias = torch.randn(n) if data.draw(st.booleans()) else None
    y = torch.full((m, n), torch.nan, dtype=dtype)
    emulated(data.draw(st.integers(0, 3)))
    planes.product(x, planes.lay_out(weight), bias, y, data.draw(st.integers(1, 3)))
    assert excess(weight, x, bias, y) <= 1


@needs_compiler
@pytest.mark.parametrize(("fmt", "k", "orders"), SHAPES)
def test_signs_are_exact(emulated: Any, fmt: PlanesFormat, k: int, orders: list[int] | None) -> None:
    """Whole numbers: nothing is rounded, so each of the 16 places of a bit in its word has to be read as what it is."""
    weight = stored(fmt, 40, k, orders, 1)
    weight.row_scales.copy_(torch.randint(-3, 4, weight.row_scales.shape))
    weight.column_scales.copy_(2.0 ** torch.randint(-2, 6, weight.column_scales.shape))
    x = torch.randint(-7, 8, (9, k)).float()
    y = torch.full((9, 40), torch.nan)
    planes.product(x, planes.lay_out(weight), None, y, 1)
    assert torch.equal(y.double(), x.double() @ weight.dequantize().double().T)
    weight.codes[39, k - 1] ^= 1
    weight.row_scales.fill_(1)
    before, y = y, torch.full((9, 40), torch.nan)
    planes.product(x, planes.lay_out(weight), None, y, 2)
    assert torch.equal(y.double(), x.double() @ weight.dequantize().double().T)
    assert not torch.equal(before, y)


@needs_compiler
def test_tokens_of_any_size(emulated: Any) -> None:
    """A power of two goes through unchanged, up to where float32 ends; a row of zeros gives the bias."""
    weight = planes.lay_out(stored(PlanesFormat(2, 128), 20, 128, None, 0))
    x, bias = torch.randn(8, 128).bfloat16().float(), torch.zeros(20)
    powers = torch.tensor([0, -140, -100, -20, 20, 60, 100, 115])
    found = []
    for scale in (torch.zeros(8), powers):
        y = torch.full((8, 20), torch.nan)
        planes.product(torch.ldexp(x, scale.unsqueeze(1)), weight, bias, y, 1)
        found.append(y)
    found[0] = torch.ldexp(found[0], powers.unsqueeze(1))
    assert torch.equal(found[0][[0, *range(2, 8)]], found[1][[0, *range(2, 8)]])
    # Of x itself little is left that far down.
    assert (found[0][1].double() - found[1][1].double()).abs().max() <= 2.0**-142
    planes.product(torch.zeros(3, 128), weight, bias + 2, y[:3], 1)
    assert (y[:3] == 2).all()


@needs_compiler
@pytest.mark.parametrize(("fmt", "k", "orders"), SHAPES)
def test_planes_made_dense(emulated: Any, fmt: PlanesFormat, k: int, orders: list[int] | None) -> None:
    weight = stored(fmt, 33, k, orders, 2)
    packed = planes.lay_out(weight)
    assert torch.equal(packed.dequantize(), weight.dequantize())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(planes.dense(packed, dtype), weight.dequantize().to(dtype))
    x, bias = torch.randn(67, k).bfloat16(), torch.randn(33)
    y = planes.multiply(x, packed, bias, runtime.H200)
    expected = x.double() @ weight.dequantize().bfloat16().double().T
    assert ((y.double() - expected - bias.double()).abs() <= 2.0**-6 * (expected.abs() + bias.abs()) + 1e-3).all()


# ---- 4-bit weights by 8-bit activations --------------------------------------------------------------------------------


def packed(problem: Any) -> tuple[w4a8.Packed, torch.Tensor | None]:
    held = W4A8.lower(problem.spec, *problem.canonical)
    words, scales, points, bias = held.tensors.values()
    return w4a8.Packed(words, scales, points, *held.scalars[:3]), bias  # type: ignore[arg-type]


def run(problem: Any, x: torch.Tensor, splits: int) -> torch.Tensor:
    weight, bias = packed(problem)
    y = torch.full((x.shape[0], weight.n), torch.nan, dtype=x.dtype)
    w4a8.product(w4a8.quantize(x, weight, problem.spec.act.bits), weight, bias, y, splits)
    return y


@needs_compiler
@settings(
    max_examples=14, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_w4a8_against_float64(emulated: Any, anywhere: None, judge: Any, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([None, 128, 256]))
    k = data.draw(st.integers(1, 300)) if group is None else group * data.draw(st.integers(1, 2))
    fmt = IntFormat(4, group, data.draw(st.booleans()))
    act = ActFormat(data.draw(st.sampled_from([4, 8])))
    spec = LinearSpec(k, data.draw(st.integers(1, 140)), fmt, act, data.draw(st.booleans()))
    assert W4A8.supports(spec) is None
    problem = judge.make(spec, data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    x = problem.input((data.draw(st.sampled_from([1, 7, 9, 20, 50, 70])),), dtype, 1)
    emulated(data.draw(st.integers(0, 3)))
    assert problem.excess(x, run(problem, x, data.draw(st.integers(1, 3))), judge.rounding(W4A8, dtype)) <= 1


@needs_compiler
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "splits"), [(None, 1), (None, 2), (128, 1), (128, 2)])
def test_sums_are_exact(emulated: Any, judge: Any, group: int | None, symmetric: bool, splits: int) -> None:
    """Tokens are whole numbers with 127 among them and scales are 1: every step is exact, the outermost codes included."""
    problem = judge.make(LinearSpec(512, 40, IntFormat(4, group, symmetric), TOKEN8, False), 1)
    problem.scales.fill_(1.0)
    problem.codes[::7], problem.codes[1::7] = 0, 15
    x = torch.randint(-127, 128, (5, 512)).float()
    x[:, 3], x[2] = 127.0, 127.0
    middle = torch.full_like(problem.scales, 8) if symmetric else problem.zeros
    weight = problem.codes.double() - middle.double().repeat_interleave(512 // middle.shape[1], 1)
    y = run(problem, x, splits)
    assert torch.equal(y.double(), x.double() @ weight.T)
    problem.codes[39, 511] ^= 1
    assert not torch.equal(run(problem, x, splits), y)


@needs_compiler
def test_codes_are_those_of_the_reference(emulated: Any) -> None:
    x = torch.full((6, 304), torch.nan)[:, :303]
    x.copy_(torch.randn(6, 303))
    x[1], x[2], x[3] = 0.0, 1e-42, 3e38
    for row, top in ((4, 7), (5, 127)):  # a scale of 1, and all ties
        x[row] = torch.arange(303) % (2 * top) - top + 0.5
        x[row, 300] = top
    words, held = torch.zeros(4, 6, 2, 32, 4, dtype=torch.int32), torch.zeros(1)
    for bits in (4, 8):
        for channel in (True, False):
            found = w4a8.quantize(x, w4a8.Packed(words, held, None, 303, 1, channel), bits)
            codes, scale, _ = ActFormat(bits).quantize_dynamic(x)
            q = found.q.transpose(0, 1).flatten(1)
            assert torch.equal(q[:6, :303], codes)
            assert torch.equal(found.scales[:6], scale[:, 0])
            assert not q[:, 303:].any()
            assert not q[6:].any()
            sums = q.view(8, -1, 128).float().sum(-1)
            assert torch.equal(found.sums, sums.sum(1).unsqueeze(0) if channel else sums.T)


# ---- both --------------------------------------------------------------------------------------------------------------


def both(judge: Any, n: int = 53, k: int = 384) -> list[Callable[[torch.Tensor, torch.Tensor, int], None]]:
    """Calls of (x, y, splits) whose tensors all end where readable memory ends."""
    calls: list[Callable[[torch.Tensor, torch.Tensor, int], None]] = []
    for fmt, orders in (
        (PlanesFormat(2, 128), [1, 2, 3]),
        (PlanesFormat(3, 64), [2, 1, 3, 1, 1, 1]),
        (PlanesFormat(1, 192), None),
    ):
        weight = planes.lay_out(stored(fmt, n, k, orders, 3))
        weight = replace(
            weight, **{r: at_the_end(getattr(weight, r)) for r in ("words", "rows", "columns", "offsets", "first")}
        )
        bias = at_the_end(torch.randn(n))
        calls.append(lambda x, y, s, w=weight, b=bias: planes.product(x, w, b, y, s))  # type: ignore[misc]
    for group, symmetric in ((None, False), (128, True), (128, False)):
        integers, b = packed(judge.make(LinearSpec(k, n, IntFormat(4, group, symmetric), TOKEN8, True), 3))
        held = {r: getattr(integers, r) for r in ("words", "scales", "points")}
        integers = replace(integers, **{r: None if t is None else at_the_end(t) for r, t in held.items()})
        b = at_the_end(b)
        calls.append(lambda x, y, s, w=integers, b=b: w4a8.product(w4a8.quantize(x, w, 8), w, b, y, s))  # type: ignore[misc]
    return calls


@needs_compiler
@pytest.mark.parametrize("m", [5, 19])
@pytest.mark.parametrize("kernel", range(6))
def test_memory_around_is_left_alone(
    emulated: Any, judge: Any, kernel: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 53, 384
    call = both(judge)[kernel]
    on_pages(monkeypatch)
    source = torch.randn(m, k)
    x = at_the_end(torch.full((m * (k + 7) - 7,), torch.nan)).as_strided((m, k), (k + 7, 1))
    x.copy_(source)
    plain = torch.full((m, n), torch.nan)
    call(source, plain, 2)
    held = at_the_end(torch.full((m * (n + 5) - 5,), 7.0))
    call(x, held.as_strided((m, n), (n + 5, 1)), 2)
    assert torch.equal(held.as_strided((m, n), (n + 5, 1)), plain)
    assert (torch.nn.functional.pad(held, (0, 5)).view(m, n + 5)[:-1, n:] == 7.0).all()


@needs_compiler
@pytest.mark.parametrize("kernel", range(6))
def test_the_same_bits_in_every_run_and_batch(emulated: Any, judge: Any, kernel: int) -> None:
    call, x = both(judge)[kernel], torch.randn(16, 384)
    whole, order = torch.full((16, 53), torch.nan), torch.randperm(16)
    call(x, whole, 2)
    assert whole.isfinite().all()
    for seed in (1, 2, 3):
        emulated(seed)
        again = torch.full((11, 53), torch.nan)
        call(x[order][:11], again, 2)
        assert torch.equal(again, whole[order][:11])


MODELS = {
    "w4a8": "quantize_weights(bits=4, group_size=None, method=rtn), quantize_activations(bits=8), pack, lower",
    "sign_planes": "quantize_weights(format=planes(group_size=none), method=rtn), lower",
}


@needs_compiler
@pytest.mark.parametrize("kernel", MODELS)
def test_a_model_on_the_backend(emulated: Any, anywhere: None, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear of the blocks runs by the emulated kernel, of integers in one call where they read one input."""
    monkeypatch.setattr(build, "lacking", lambda: None)
    monkeypatch.setattr(build, "launchable", lambda x: True)
    ids = torch.randint(0, 60, (1, 5), generator=torch.Generator().manual_seed(3))
    made, judge = (
        dlqc.compile(small_llada(), MODELS[kernel], backend=name, progress=False) for name in ("cuda", "reference")
    )
    assert {text.split(" ")[0] for text in made.report.steps[-1].choices.values()} == {kernel}
    targets = [str(node.target) for node in made.lowered.nodes]
    assert sum("dlqc_cuda" in target for target in targets) == (8 if kernel == "w4a8" else 14)
    slack = 1e-4 if kernel == "w4a8" else 0.05
    torch.testing.assert_close(made(ids), judge(ids), rtol=slack, atol=slack)


@needs_compiler
def test_the_emulation_shows_races(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing barrier must be seen: what a GPU would do wrong now and then is wrong in some order of threads."""
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    source = tmp_path / "csrc" / "planes.cu"
    text, wait = source.read_text(), "copies_done<STAGES - 2>();\n"
    assert text.count(f"{wait}        barrier();") == 1
    source.write_text(text.replace(f"{wait}        barrier();", wait))
    monkeypatch.setenv("DLQC_CACHE", str(tmp_path / "cache"))
    broken = emulation.library("planes", tmp_path / "csrc")
    monkeypatch.setattr(build, "library", lambda name: broken)
    weight, x = stored(PlanesFormat(2, 128), 128, 512, None, 0), torch.randn(8, 512)
    right = []
    for seed in (0, 1):
        broken.dlqc_order(seed)
        y = torch.full((8, 128), torch.nan)
        planes.product(x, planes.lay_out(weight), None, y, 1)
        right.append(excess(weight, x, None, y) <= 1)
    assert not all(right)
