"""Schemes by site: what variants and overrides come to, and what each scheme takes in storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import RecipeError
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.coded import CLASSES
from dlqc.formats.fp8 import Fp8Format
from dlqc.formats.integer import IntFormat
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.microscaling import MicroscalingFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.packing import pack
from dlqc.formats.planes import PlanesFormat
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.recipe import Recipe, parse_line
from dlqc.rounding.daq import Daq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.kmeans import Kmeans
from dlqc.rounding.rtn import Rtn
from dlqc.schemes import Override, Scheme, Variant, overridden, overrides_of, stored_bits

BASE = Scheme(IntFormat(4, 128, False), Gptq())


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (Variant(), BASE),
        (Variant(bits=3), Scheme(IntFormat(3, 128, False), Gptq())),
        (Variant(group_size=0, symmetric=True), Scheme(IntFormat(4, None, True), Gptq())),
        (Variant(group_size=64, method=Rtn()), Scheme(IntFormat(4, 64, False), Rtn())),
        (Variant(format=PlanesFormat(), method=Daq()), Scheme(PlanesFormat(), Daq())),
    ],
)
def test_what_is_left_out_stays(variant: Variant, expected: Scheme) -> None:
    assert variant.of(BASE) == expected


def test_integers_instead_of_another_format() -> None:
    base = Scheme(Nf4Format(), Rtn())
    assert Variant(bits=3).of(base) == Scheme(IntFormat(3, 128, False), Rtn())
    assert Variant(method=Rtn()).of(base) == base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Variant(bits=5).of(BASE), r"^bits: 5 is not a width of an integer weight"),
        (lambda: Variant(group_size=-1).of(BASE), r"^group_size: a group of -1 input features is impossible"),
        (
            lambda: Variant(format=Nf4Format()).of(BASE),
            r"^variant\.method: gptq does not round to nf4 g64 double\. Use method=rtn$",
        ),
        (
            lambda: Override(symmetric=True).of(Scheme(Nf4Format(), Rtn())),
            r"^override\.bits: weights are nf4 g64 double, and for integers the width is missing\. Write bits=4$",
        ),
        (
            lambda: Override(bits=4, format=Nf4Format()),
            r"^override\.bits: bits=4 is for integers, weights become nf4 g64 double\. Leave it out, or leave format out$",
        ),
    ],
)
def test_what_cannot_be_had(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_the_last_override_that_names_a_site_counts() -> None:
    overrides = (Override(bits=3, sites=("*.q", "*.k")), Override(bits=8, sites=("a.*",)))
    found = {name: overridden(name, BASE, overrides).format.label for name in ("a.q", "b.q", "b.k", "b.v")}
    assert found == {
        "a.q": "int8 g128 asymmetric",
        "b.q": "int3 g128 asymmetric",
        "b.k": "int3 g128 asymmetric",
        "b.v": "int4 g128 asymmetric",
    }


SCHEMES = st.sampled_from(
    [
        BASE,
        Scheme(IntFormat(2, None, True), Rtn(clip="mse")),
        Scheme(IntFormat(8, 64, False), Gptq(damp=0.1)),
        Scheme(PlanesFormat(1, 64), Daq()),
        Scheme(Nf4Format(), Rtn()),
    ]
)


@given(st.dictionaries(st.from_regex(r"[a-z]\.[a-z]", fullmatch=True), SCHEMES, max_size=6), SCHEMES)
def test_an_assignment_as_overrides_of_a_recipe(assignment: dict[str, Scheme], base: Scheme) -> None:
    """Spelled out and read again, it gives every site its own."""
    method, fmt = base.method, base.format
    options = {} if isinstance(fmt, IntFormat) else {"format": fmt}
    if isinstance(fmt, IntFormat):
        options = {"bits": fmt.bits, "group_size": fmt.group_size, "symmetric": fmt.symmetric}
    line = str(Recipe("", (QuantizeWeights(method=method, overrides=overrides_of(assignment), **options),)))
    (read,) = parse_line(line)
    assert isinstance(read, QuantizeWeights)
    assert {name: overridden(name, read.scheme, read.overrides) for name in assignment} == assignment
    assert overridden("elsewhere", read.scheme, read.overrides) == base


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans())
def test_bits_that_integers_are_stored_in(n: int, groups: int, bits: int, symmetric: bool, channel: bool) -> None:
    """Those of the tensors that `pack` makes, padding included."""
    k = 8 * groups
    fmt = IntFormat(bits, None if channel else 8, symmetric)
    made = fmt.quantize(torch.randn(n, k))
    tensors = [pack(made.codes, bits), made.scales, *([] if made.zeros is None else [pack(made.zeros, bits)])]
    assert stored_bits(fmt, n, k) == 8 * sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("fmt", "method"),
    [
        (PlanesFormat(), Daq()),
        (CodebookFormat(3, sparse=0.01), Kmeans()),
        (Nf4Format(), Rtn()),
        (Fp8Format(), Rtn()),
        (MicroscalingFormat("nvfp4"), Rtn()),
        (LatticeFormat(), Rtn()),
    ],
)
def test_bits_that_other_formats_are_stored_in(fmt: Any, method: Any) -> None:
    assert {type(fmt) for fmt, _ in [(fmt, method)]} <= set(CLASSES.values())
    weight = torch.randn(16, 256, dtype=torch.float64)
    x = torch.randn(512, 256, dtype=torch.float64)
    stats = method.prepare({"hessian": x.T @ x})
    stored = method.round(weight, fmt, stats).weight.pack()
    assert stored_bits(fmt, 16, 256) == 8 * sum(t.nbytes for t in stored.values())
