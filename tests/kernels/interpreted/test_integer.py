"""Integer products: exact on whole numbers, codes of the reference, memory left alone, the same bits in every batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from guarded import at_the_end
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dlqc.backend import LinearSpec
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.kernels.triton import integer as host
from dlqc.kernels.triton import runtime
from dlqc.kernels.triton.device.persistent import place_of
from dlqc.kernels.triton.dispatch import Config

KERNEL = host.Integer()


def packed(problem: Any) -> tuple[host.Packed, torch.Tensor | None]:
    held = KERNEL.lower(problem.spec, *problem.canonical).tensors
    k, n, fmt = problem.spec.in_features, problem.spec.out_features, problem.spec.integers
    parts = [held[role] for role in ("words", "scales", "zeros")]
    return host.Packed(*parts, k, n, fmt.bits, fmt.group_size or k), held["bias"]  # type: ignore[arg-type]


def run(problem: Any, x: torch.Tensor, config: Config, residual: torch.Tensor | None = None) -> torch.Tensor:
    weight, bias = packed(problem)
    y = torch.full((x.shape[0], weight.n), torch.nan, dtype=x.dtype)
    host.launch(host.quantize(x, problem.spec.act.bits, weight), weight, bias, y, config, residual)
    return y


@triton.jit
def _places(rows, columns, down, ACROSS: tl.constexpr, STRIPE: tl.constexpr):
    row, column = place_of(tl.program_id(0), down, ACROSS, STRIPE)
    tl.store(rows + tl.program_id(0), row)
    tl.store(columns + tl.program_id(0), column)


def place_order(down: int, across: int) -> list[tuple[int, int]]:
    rows, columns = torch.full((2, down * across), -1, dtype=torch.int32)
    _places[(down * across,)](rows, columns, down, ACROSS=across, STRIPE=host.STRIPE)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


@settings(max_examples=9, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_values(judge: Any, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([None, 128, 256, 384]))
    k = data.draw(st.integers(1, 300)) if group is None else group * data.draw(st.integers(1, 2))
    fmt = IntFormat(data.draw(st.sampled_from([4, 8])), group, data.draw(st.booleans()), "float32")
    act = ActFormat(data.draw(st.sampled_from([4, 8])))
    spec = LinearSpec(k, data.draw(st.integers(1, 140)), fmt, act, data.draw(st.booleans()))
    assert KERNEL.supports(spec) is None
    problem = judge.make(spec, data.draw(st.integers(0, 99)))
    config = Config(data.draw(st.sampled_from([64, 128])), 16, data.draw(st.sampled_from([1, 2, 3])))
    x = problem.input((data.draw(st.sampled_from([1, 3, 16, 17])),), torch.float32, 1)
    assert problem.excess(x, run(problem, x, config), judge.rounding(KERNEL, x.dtype)) <= 1


@pytest.mark.parametrize(("bits", "group"), [(4, None), (8, None), (4, 128), (8, 256)])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_are_exact(judge: Any, bits: int, group: int | None, splits: int, symmetric: bool) -> None:
    """Tokens are whole numbers with 127 among them and scales are 1: every step is exact, the outermost codes included."""
    spec = LinearSpec(512, 70, IntFormat(bits, group, symmetric, "float32"), ActFormat(8), False)
    problem = judge.make(spec, 1)
    problem.scales.fill_(1.0)
    problem.codes[::7], problem.codes[1::7] = 0, (1 << bits) - 1
    x = torch.randint(-127, 128, (5, 512)).float()
    x[:, 3], x[2] = 127.0, 127.0
    middle = torch.full_like(problem.scales, 1 << (bits - 1)) if symmetric else problem.zeros
    weight = problem.codes.double() - middle.double().repeat_interleave(group or 512, 1)
    y = run(problem, x, Config(128, 16, splits))
    assert torch.equal(y.double(), x.double() @ weight.T)
    problem.codes[69, 511] ^= 1
    assert not torch.equal(run(problem, x, Config(128, 16, splits)), y)


STAY = Config(bn=128, bm=32, persistent=True)


@pytest.mark.parametrize(("m", "n", "k", "symmetric"), [(1, 1, 3, True), (33, 131, 250, False)])
def test_programs_that_stay(
    judge: Any, m: int, n: int, k: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs take all tiles, whole numbers come out exactly, and with scales the bits are those of the other kernel."""
    monkeypatch.setattr(runtime, "device_of", lambda _: runtime.Device("two units", 2, 232448))
    problem = judge.make(LinearSpec(k, n, IntFormat(8, None, symmetric), ActFormat(8), True), 1)
    x = problem.input((m,), torch.float32, 2)
    assert problem.excess(x, run(problem, x, STAY), judge.rounding(KERNEL, x.dtype)) <= 1
    added = torch.randn(m, n)
    assert torch.equal(run(problem, x, STAY, added), run(problem, x, Config(128, 32), added))
    problem.scales.fill_(1.0)
    whole = torch.randint(-127, 128, (m, k)).float()
    whole[:, 0] = 127.0
    middle = 128.0 if symmetric else problem.zeros.double()
    truth = whole.double() @ (problem.codes.double() - middle).T
    plain = replace(problem, bias=None, spec=replace(problem.spec, has_bias=False))
    assert torch.equal(run(plain, whole, STAY).double(), truth.float().double())
    plain.codes[n - 1, k - 1] ^= 1
    assert not torch.equal(run(plain, whole, STAY).double(), truth.float().double())


@pytest.mark.parametrize("early", [True, False])
def test_all_kernels_of_a_chain_begin_early_or_none(judge: Any, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(runtime, "dependent", lambda wanted: seen.append(wanted) or {"DEPENDENT": False})
    monkeypatch.setattr(host, "choose", lambda *_: Config(128, 16, splits=2, dependent=early))
    problem = judge.make(LinearSpec(256, 70, IntFormat(8, None), ActFormat(8), False), 1)
    problem.run(KERNEL, problem.input((2,), torch.float32, 2))
    assert seen == [early] * 3  # rows to codes, product, sum of the shares


def test_tiles_are_taken_once() -> None:
    """Every tile of ragged grids by exactly one place in the order, stripe after stripe."""
    for down, across in ((1, 1), (3, 5), (17, 4), (9, 8)):
        found = place_order(down, across)
        assert sorted(found) == [(row, column) for row in range(down) for column in range(across)]
        assert [row // host.STRIPE for row, _ in found] == sorted(row // host.STRIPE for row, _ in found)


def test_codes_are_those_of_the_reference() -> None:
    x = torch.randn(6, 300)
    x[1], x[2], x[3], x[4] = 0.0, 1e-42, 3e38, torch.arange(300) - 149.5
    held = torch.zeros(1, dtype=torch.uint8)
    for bits in (4, 8):
        weight = host.Packed(torch.zeros(2, 3, 64, 128, dtype=torch.int8), held, held, 300, 1, 8, 128)
        found = host.quantize(x, bits, weight)
        codes, scale, _ = ActFormat(bits).quantize_dynamic(x)
        assert torch.equal(found.q[:, :300], codes)
        assert torch.equal(found.scales, scale[:, 0])
        assert not found.q[:, 300:].any()
        assert torch.equal(found.sums.T, found.q.view(6, 3, 128).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("bits", "group", "config"),
    [
        (4, None, Config(128)),
        (4, 128, Config(128, splits=3)),
        (8, None, Config(128, splits=3)),
        (8, 128, Config(128)),
        (8, None, STAY),
    ],
)
def test_memory_around_is_left_alone(judge: Any, bits: int, group: int | None, config: Config) -> None:
    spec = LinearSpec(256 if group else 250, 53, IntFormat(bits, group, False), ActFormat(8), True)
    problem = judge.make(spec, 1)
    weight, bias = packed(problem)
    weight = replace(weight, **{role: at_the_end(getattr(weight, role)) for role in ("words", "scales", "zeros")})
    m, n, k = 5, 53, weight.k
    x = at_the_end(torch.full(((m - 1) * (k + 7) + k,), torch.nan)).as_strided((m, k), (k + 7, 1))
    x.copy_(problem.input((m,), torch.float32, 2))
    codes = host.quantize(x, 8, weight)
    codes = host.Codes(at_the_end(codes.q), at_the_end(codes.scales), at_the_end(codes.sums))
    held = at_the_end(torch.full((m * (n + 5) - 5,), 7.0))
    y = held.as_strided((m, n), (n + 5, 1))
    host.launch(codes, weight, at_the_end(bias), y, config)
    assert problem.excess(x, y.contiguous(), judge.rounding(KERNEL, x.dtype)) <= 1
    assert (torch.nn.functional.pad(held, (0, 5)).view(m, n + 5)[:-1, n:] == 7.0).all()


def test_the_same_bits_in_every_run_and_batch(judge: Any) -> None:
    problem = judge.make(LinearSpec(512, 70, IntFormat(4, 128, False), ActFormat(8), False), 1)
    x, config = problem.input((16,), torch.float32, 1), Config(128, 16, 2)
    whole = run(problem, x, config)
    assert torch.equal(run(problem, x, config), whole)
    order = torch.randperm(16)
    assert torch.equal(run(problem, x[order][:9], config), whole[order][:9])


def test_the_op_launches_what_the_definition_says(judge: Any) -> None:
    problem = judge.make(LinearSpec(256, 70, IntFormat(4, 128), ActFormat(8), True), 1)
    for dtype, lead in ((torch.float32, (2, 3)), (torch.float64, (2,)), (torch.float16, (0, 2)), (torch.float16, (3,))):
        x = problem.input(lead, dtype, 2)
        assert problem.excess(x, problem.run(KERNEL, x), judge.rounding(KERNEL, dtype)) <= 1
