"""The CPU backend: who gets which site, and the same results as the reference backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_llada import small_llada

import dlqc
from dlqc.artifact import save
from dlqc.backend import CodedKernel, LinearSpec, StaticKernel, choose_kernel, load_backend
from dlqc.backends.cpu import BACKEND
from dlqc.backends.reference import BACKEND as REFERENCE
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.kernels.cpu import build, selfcheck

SCHEMES = {
    "w8a8": (IntFormat(8, None), ActFormat(8), "int8_mm"),
    "w4a8 channel": (IntFormat(4, None), ActFormat(8), "int8_mm"),
    "w4a4 channel": (IntFormat(4, None, symmetric=False), ActFormat(4), "int8_mm"),
    "w8a16": (IntFormat(8, None), None, "int8pack"),
    "w8a8 group act": (IntFormat(8, None), ActFormat(8, 32), "int8pack"),
    "w4a16": (IntFormat(4, 32, symmetric=False), None, "int4pack"),
    "w3a16": (IntFormat(3, 64), None, "int4pack"),
    "w2a16 channel": (IntFormat(2, None), None, "int4pack"),
    "w4a4 group": (IntFormat(4, 32), ActFormat(4), "int4pack"),
    "w8a16 group": (IntFormat(8, 32), None, "dequant"),
    "w8a16 asymmetric": (IntFormat(8, None, symmetric=False), None, "dequant"),
    "w4a16 odd group": (IntFormat(4, 16), None, "dequant"),
}


def canonical(spec: LinearSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    g = torch.Generator().manual_seed(0)
    n, k, bits = spec.out_features, spec.in_features, spec.weight.bits
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=g)
    scales = (0.5 + torch.rand(n, spec.weight.groups(k), generator=g)).to(torch.bfloat16)
    zeros = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8, generator=g)
    return pack(codes, bits), scales, None if spec.weight.symmetric else pack(zeros, bits), torch.randn(n, generator=g)


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preferences as on a CPU with VNNI (on another one 8-bit integer products are refused) and without a compiler."""
    monkeypatch.setattr(selfcheck, "int_mm", lambda reach: None)
    monkeypatch.setenv("DLQC_NATIVE", "0")


NATIVE = {
    "linear8": ("w8a8", "w4a8 channel", "w4a4 channel", "w8a8 group act", "w4a4 group"),
    "linear16": ("w8a16", "w4a16", "w3a16", "w2a16 channel", "w8a16 group", "w8a16 asymmetric"),
    "dequant": ("w4a16 odd group",),
}


@pytest.mark.skipif(build.unavailable("linear8") is not None, reason=f"{build.unavailable('linear8')}")
def test_native_kernels_go_first() -> None:
    for name, schemes in NATIVE.items():
        for scheme in schemes:
            weight, act, _ = SCHEMES[scheme]
            kernel, _ = choose_kernel(BACKEND, LinearSpec(128, 64, weight, act, True))
            assert kernel is not None
            assert kernel.name == name
    assert sorted(sum(NATIVE.values(), ())) == sorted(SCHEMES)


@pytest.mark.skipif(build.unavailable("linear16") is not None, reason=f"{build.unavailable('linear16')}")
def test_activations_of_16_bits_may_be_rounded(tmp_path: Path) -> None:
    """Where it is asked for, at sites that quantize no activations, and after loading as before saving."""
    weights = "quantize_weights(bits=4, group_size=None, method=rtn)"
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))

    def made(steps: str) -> tuple[dlqc.Compiled, set[str]]:
        model = dlqc.compile(small_llada(), f"{weights}, {steps}", backend="cpu", progress=False)
        return model, set(model.report.steps[-1].choices.values())

    (exact, plain), (rounded, said) = made("pack, lower"), made("pack, lower(bfloat16=true)")
    assert {"tokens rounded to bfloat16" in text for text in plain} == {False}
    assert {"tokens rounded to bfloat16" in text for text in said} == {True}
    apart = float((rounded(ids) - exact(ids)).norm() / exact(ids).norm())
    assert 1e-5 < apart < 1e-2
    save(rounded, tmp_path / "m", verify_reload=False)
    assert torch.equal(dlqc.load(tmp_path / "m", backend="cpu")(ids), rounded(ids))
    (integers, _), (same, said) = (
        made(f"quantize_activations(bits=8), pack, {lower}") for lower in ("lower", "lower(bfloat16=true)")
    )
    assert not any("bfloat16" in text for text in said)
    assert torch.equal(same(ids), integers(ids))


@pytest.mark.skipif(build.unavailable("linear8") is not None, reason=f"{build.unavailable('linear8')}")
@pytest.mark.parametrize("asymmetric", [False, True])
def test_weight_only_recipes_keep_their_activations(asymmetric: bool) -> None:
    """No kernel for 16-bit activations may round them to 8 bits: one large value would drown the others."""
    spec = LinearSpec(128, 64, IntFormat(4, 32, not asymmetric), None, False)
    packed, scales, zeros, _ = canonical(spec)
    kernel, _ = choose_kernel(BACKEND, spec)
    assert kernel is not None
    lowered = kernel.lower(spec, packed, scales, zeros, None)
    x = torch.full((9, 128), 1e-3)
    without = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    x[:, 5] = 1.0
    spiky = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    x[:, :5], x[:, 6:] = 0, 0
    spike = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    torch.testing.assert_close(spiky - spike, without * (127 / 128), rtol=0, atol=float(without.abs().max()) * 0.2)
    assert float((spiky - spike).abs().max()) > 0


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_who_gets_which_site(scheme: str) -> None:
    weight, act, name = SCHEMES[scheme]
    kernel, refusals = choose_kernel(BACKEND, LinearSpec(128, 64, weight, act, True))
    assert kernel is not None
    assert kernel.name == name
    order = [other.name for other in BACKEND.kernels if not isinstance(other, StaticKernel)]
    assert list(refusals) == order[: order.index(name)]


@pytest.mark.usefixtures("sound")
def test_ragged_shapes_end_in_the_fallback_with_every_reason() -> None:
    kernel, refusals = choose_kernel(BACKEND, LinearSpec(70, 33, IntFormat(4, None), None, False))
    assert kernel is not None
    assert kernel.name == "dequant"
    assert refusals == {
        "linear8": "activations are not quantized",
        "int8_mm": "activations are not quantized",
        "linear16": "native code is turned off by DLQC_NATIVE=0",
        "int8pack": "weights have 4 bits, it needs 8",
        "int4pack": "70 input features in one group do not divide by 32",
    }


def test_a_group_that_does_not_divide_is_for_nobody() -> None:
    for backend in (BACKEND, REFERENCE):
        kernel, refusals = choose_kernel(backend, LinearSpec(70, 33, IntFormat(4, 32), None, False))
        assert kernel is None
        coded = [k.name for k in backend.kernels if isinstance(k, CodedKernel)]
        assert {refusals.pop(name) for name in coded} == {"codes are integers, which have kernels of their own"}
        asked = [k for k in backend.kernels if not isinstance(k, CodedKernel | StaticKernel)]
        assert refusals == {k.name: "70 input features do not divide by group 32" for k in asked}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference_backend(scheme: str, dtype: torch.dtype) -> None:
    """Every kernel that takes the site agrees with the reference on the same canonical tensors."""
    weight, act, _ = SCHEMES[scheme]
    spec = LinearSpec(128, 64, weight, act, True)
    tensors = canonical(spec)
    judge = load_backend("reference").kernels[0].lower(spec, *tensors)
    x = torch.randn(2, 17, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    # In float64, and with |x| and |W| for the size of the sums.
    expected = judge.op(x.double(), *judge.tensors.values(), *judge.scalars)
    codes, scales, zeros = (judge.tensors[role] for role in ("codes", "scales", "zeros"))
    assert codes is not None
    assert scales is not None
    middle = torch.full_like(scales, weight.midpoint) if zeros is None else zeros
    group = weight.group_size or 128
    size = (codes.double() - middle.double().repeat_interleave(group, 1)).abs() * scales.double().repeat_interleave(
        group, 1
    )
    offset = (weight.midpoint - middle.double()).abs().repeat_interleave(group, 1) * scales.double().repeat_interleave(
        group, 1
    )
    # At most three roundings to bfloat16 an element (x̂, offset or W) and two of the result.
    largest = x.double().abs().amax(-1, keepdim=True)
    bound = 2.0**-8 * (2 * x.double().abs() @ (size + offset).T + 2 * expected.abs())
    if act is not None:
        # x̂ is off x by half a step or less; it enters the sizes above.
        step = largest / (2 ** (act.bits - 1) - 1)
        bound += 2.0**-8 * 2 * (step / 2) * (size + offset).sum(1)
    for kernel in BACKEND.kernels:
        if kernel.supports(spec) is not None:
            continue
        lowered = kernel.lower(spec, *tensors)
        y = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
        error = (y.double() - expected).abs()
        assert bool((error <= bound).all()), kernel.name
        # The bound can fail: the neighbour's outputs break it.
        assert bool(((y.double().roll(1, -1) - expected).abs() > bound).any())


def test_available_everywhere() -> None:
    assert BACKEND.available() is None
    assert REFERENCE.available() is None
