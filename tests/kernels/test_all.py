"""What every kernel must do: right numbers at all shapes, strides and dtypes; one node in a graph; spoken errors."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.backend import CodedKernel, Kernel, LinearSpec, StaticKernel
from dlqc.backends.cpu import BACKEND as CPU
from dlqc.backends.reference import BACKEND as REFERENCE
from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.cpu import build, selfcheck

# Those for integers that can run here; the others are in test_coded.py.
NATIVE = ("linear8", "linear16")
KERNELS = {
    k.name: k
    for k in (*REFERENCE.kernels, *CPU.kernels)
    if not isinstance(k, CodedKernel | StaticKernel) and (k.name not in NATIVE or build.unavailable(k.name) is None)
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LEADS = ((0,), (1,), (2,), (63,), (65,), (), (2, 3), (3, 0, 2), (1, 1))
TOKEN8 = ActFormat(8)

# On a CPU without VNNI int8_mm refuses 8-bit weights (`test_selfcheck.py`), and is tried with narrower ones.
WIDEST = 8 if selfcheck.int_mm(128) is None else 4

every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def plain(name: str, *, has_bias: bool = True) -> LinearSpec:
    """A spec that the kernel of this name supports."""
    bits, group, act = {
        "linear8": (3, 32, TOKEN8),
        "linear16": (3, 32, None),
        "int8_mm": (WIDEST, None, TOKEN8),
        "int8pack": (8, None, None),
        "int4pack": (4, 32, None),
        "dequant": (3, 32, TOKEN8),
        "reference": (3, 32, TOKEN8),
    }[name]
    return LinearSpec(64, 48, IntFormat(bits, group), act, has_bias)


@st.composite
def specs(draw: st.DrawFn, name: str) -> LinearSpec:
    """Specs that the kernel of this name must support, ragged wherever it allows."""
    symmetric, scale = draw(st.booleans()), draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    k, n = draw(st.integers(1, 130)), draw(st.integers(1, 70))
    group: int | None = None
    act: ActFormat | None = ActFormat(draw(st.integers(2, 8)))
    if name == "int8_mm":
        bits = min(bits, WIDEST)
        symmetric, k = symmetric or bits == 8, k + 1
    elif name == "linear8":
        group, act_group = draw(st.sampled_from([None, 32, 64, 96, 128])), None
        k = k if group is None else group * draw(st.integers(1, 5))
        if group is not None and k % 64 == 0:
            act_group = draw(
                st.sampled_from([None, *(g for g in (32, 64, group, k) if max(g, group) % min(g, group) == 0)])
            )
        act = ActFormat(draw(st.integers(2, 8)), act_group)
    else:
        if name == "int8pack":
            bits, symmetric, k = 8, True, 16 * draw(st.integers(1, 9))
        elif name == "int4pack":
            group = draw(st.sampled_from([None, 32, 64, 96, 128]))
            bits, k, n = min(bits, 4), (group or 32) * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 6))
        elif name == "linear16":
            group = draw(st.sampled_from([None, 32, 64, 96, 128]))
            k = k if group is None else group * draw(st.integers(1, 3))
        else:
            group = draw(st.sampled_from([None, 1, 7, 32, 64, 128]))
            k = k if group is None else group * draw(st.integers(1, 3))
        act_group = draw(st.sampled_from([None, *(g for g in (3, 32) if k % g == 0)]))
        act = ActFormat(draw(st.integers(2, 8)), act_group, draw(st.booleans())) if draw(st.booleans()) else None
    return LinearSpec(k, n, IntFormat(bits, group, symmetric, scale), act, draw(st.booleans()))


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "columns":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def test_empty_memory_is_poisoned() -> None:
    assert torch.empty(4).isnan().all()
    assert torch.ops.aten.empty_like(torch.ones(4, dtype=torch.bfloat16)).isnan().all()


@every_kernel
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values(kernel: Kernel, judge: Any, data: st.DataObject) -> None:
    spec = data.draw(specs(kernel.name))
    assert kernel.supports(spec) is None
    problem = judge.make(spec, data.draw(st.integers(0, 10**9)))
    dtype, lead = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LEADS))
    x = problem.input(lead, dtype, data.draw(st.integers(0, 10**9)))
    x = strided(x, data.draw(st.sampled_from(["dense", "columns", "transposed"])))
    before = x.clone()
    y = problem.run(kernel, x)
    assert y.is_contiguous()
    assert problem.excess(x, y, judge.rounding(kernel, dtype)) <= 1
    assert torch.equal(x, before)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_rows(kernel: Kernel, judge: Any, dtype: torch.dtype) -> None:
    """Sums long enough for blocked code paths, many tokens, extreme codes in some rows."""
    problem = judge.make(replace(plain(kernel.name), in_features=4096, out_features=208), 0)
    problem.codes[:3] = torch.tensor([[0], [problem.spec.weight.top], [1]], dtype=torch.uint8)
    x = problem.input((130,), dtype, 1)
    x[:3] = torch.tensor([[1.0], [-1.0], [0.0]])
    assert problem.excess(x, problem.run(kernel, x), judge.rounding(kernel, dtype)) <= 1


@every_kernel
@pytest.mark.parametrize("planted", ["code", "scale", "zero", "bias", "token", "nan"])
def test_planted_errors_break_the_bound(kernel: Kernel, judge: Any, planted: str) -> None:
    spec = plain(kernel.name)
    problem = judge.make(replace(spec, weight=replace(spec.weight, symmetric=planted != "zero")), 3)
    if kernel.supports(problem.spec) is not None:
        # 8-bit kernels without zero points: the same slip is all codes of a channel off by one.
        problem = judge.make(spec, 3)
    x = torch.ones(4, 64)
    allowed = judge.rounding(kernel, x.dtype)
    wrong = judge.make(problem.spec, 3)
    if planted == "code":
        # The three lowest bits of one weight.
        wrong.codes[5, 9] ^= 7
    elif planted == "scale":
        wrong.scales[5:7] = wrong.scales[5:7].flip(0)
    elif planted == "zero":
        target = wrong.codes[5] if wrong.zeros is None else wrong.zeros[5]
        target += torch.where(target == 0, 1, -1).to(torch.uint8)
    elif planted == "bias":
        wrong.bias[5] += 32
    y = wrong.run(kernel, x)
    if planted == "token":
        y = y.roll(1, dims=1)
    elif planted == "nan":
        y[3, 5] = torch.nan
    assert problem.excess(x, problem.run(kernel, x), allowed) <= 1
    assert problem.excess(x, y, allowed) > 1


@every_kernel
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(kernel: Kernel, judge: Any, has_bias: bool) -> None:
    problem = judge.make(plain(kernel.name, has_bias=has_bias), 0)
    lowered = kernel.lower(problem.spec, *problem.canonical)
    for x in (torch.randn(3, 64), torch.randn(2, 3, 64, dtype=torch.bfloat16), torch.randn(64, 5).T):
        torch.library.opcheck(lowered.op, (x, *lowered.tensors.values(), *lowered.scalars))


class Site(torch.nn.Module):
    def __init__(self, kernel: Kernel, problem: Any) -> None:
        super().__init__()
        self.lowered = kernel.lower(problem.spec, *problem.canonical)
        for role, tensor in self.lowered.tensors.items():
            self.register_buffer(role, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = [getattr(self, role) for role in self.lowered.tensors]
        return self.lowered.op(x * 2, *tensors, *self.lowered.scalars).relu()


@every_kernel
def test_export_keeps_one_node_and_any_batch(kernel: Kernel, judge: Any) -> None:
    site = Site(kernel, judge.make(plain(kernel.name), 0))
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(site, (torch.randn(2, 5, 64),), dynamic_shapes=({1: tokens},))
    called = [node for node in program.graph.nodes if node.target is site.lowered.op]
    assert len(called) == 1
    x = torch.randn(2, 33, 64)
    torch.testing.assert_close(program.module()(x), site(x), rtol=0, atol=0)


@every_kernel
def test_compiles_without_a_break(kernel: Kernel, judge: Any) -> None:
    site = Site(kernel, judge.make(plain(kernel.name), 0))
    torch._dynamo.reset()
    compiled = torch.compile(site, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for count in (1, 7, 65):
            x = torch.randn(count, 64)
            torch.testing.assert_close(compiled(x), site(x), rtol=0, atol=0)


@every_kernel
def test_wrong_inputs_are_refused(kernel: Kernel, judge: Any) -> None:
    problem = judge.make(plain(kernel.name), 0)
    # An op that torch calls in C++ can raise nothing but RuntimeError; the text stays.
    error = RuntimeError if kernel.name == "linear8" else ContractError
    for x in (torch.randn(2, 128), torch.ones(2, 64, dtype=torch.int64), torch.tensor(1.0)):
        text = f"x: the input is {tuple(x.shape)} {x.dtype}, not [..., 64] of a floating dtype"
        with pytest.raises(error, match=re.escape(text)):
            problem.run(kernel, x)


@every_kernel
def test_wrong_weights_are_refused_at_lowering(kernel: Kernel, judge: Any) -> None:
    problem = judge.make(plain(kernel.name), 0)
    spec, (packed, scales, zeros, bias) = problem.spec, problem.canonical
    with pytest.raises(ContractError, match="packed: the packed weight holds 47 rows, not 48"):
        kernel.lower(spec, packed[:47], scales, zeros, bias)
    with pytest.raises(ContractError, match=r"packed: packed codes are"):
        kernel.lower(spec, packed[:, 4:], scales, zeros, bias)
    with pytest.raises(ContractError, match=r"scales: scales are .* not \(48, "):
        kernel.lower(spec, packed, scales[:1], zeros, bias)
    points = pack(torch.zeros(scales.shape, dtype=torch.uint8), spec.weight.bits)
    with pytest.raises(ContractError, match=r"zeros: a weight in .* has no zero points"):
        kernel.lower(spec, packed, scales, points, bias)
    with pytest.raises(ContractError, match="bias: has_bias=True, but a bias is missing"):
        kernel.lower(spec, packed, scales, zeros, None)
    with pytest.raises(ContractError, match="bias: has_bias=False, but a bias came"):
        kernel.lower(replace(spec, has_bias=False), packed, scales, zeros, bias)
    with pytest.raises(ContractError, match=r"bias: the bias is \(47,\), not \(48,\)"):
        kernel.lower(spec, packed, scales, zeros, bias[:47])


@every_kernel
def test_groups_that_do_not_divide(kernel: Kernel) -> None:
    spec = plain(kernel.name)
    wide = replace(spec, weight=replace(spec.weight, group_size=48))
    assert kernel.supports(wide) == "64 input features do not divide by group 48"
    assert kernel.supports(replace(spec, act=ActFormat(8, 48))) == "64 input features do not divide by group 48"
