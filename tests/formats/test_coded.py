"""Formats by name: what every format of a graph must keep, and texts that no format has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.errors import ContractError, DlqcError
from dlqc.formats import coded
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.coded import CLASSES, decode, encode, fault, weight_of
from dlqc.formats.fp8 import Fp8Format
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.microscaling import MicroscalingFormat
from dlqc.formats.nested import NestedFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.offset import OffsetFormat
from dlqc.formats.planes import PlanesFormat
from dlqc.formats.sparse import SparseFormat

FORMATS: dict[str, Any] = {
    encode(f): f
    for f in (
        PlanesFormat(group_size=32),
        PlanesFormat(3, None, "float16"),
        CodebookFormat(3, sparse=0.0045),
        CodebookFormat(2, 32, 1e-05, "bfloat16"),
        CodebookFormat(4, table_dtype="float32"),
        Nf4Format(32, 7),
        Nf4Format(scale_block=None),
        Fp8Format(),
        Fp8Format("block"),
        Fp8Format("tensor"),
        MicroscalingFormat(),
        MicroscalingFormat("mxfp4", "even"),
        MicroscalingFormat("nvfp4"),
        LatticeFormat(),
        LatticeFormat(32, "float32"),
        SparseFormat(4, 64, density=1.0),
        SparseFormat(3, None, True),
        SparseFormat(16),
        OffsetFormat(3, 64),
        OffsetFormat(8, None, "bfloat16"),
        NestedFormat("2+1+1", 64),
        NestedFormat("2+1+1+4", None),
    )
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def stored(fmt: Any, count: int = 40, width: int = 192, seed: int = 0) -> Any:
    """A random weight in the format."""
    weight = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    if not isinstance(fmt, CodebookFormat):
        return fmt.quantize(weight)
    tables = torch.randn(count, fmt.groups(width), fmt.entries, generator=torch.Generator().manual_seed(seed + 1))
    outlier = torch.zeros(weight.numel(), dtype=torch.bool)
    outlier[: fmt.outliers(count, width)] = True
    return fmt.quantize(weight, tables, outlier.reshape(weight.shape) if fmt.sparse else None)


def test_every_class_has_its_name_and_is_tried() -> None:
    assert {type(f) for f in FORMATS.values()} == set(CLASSES.values())
    assert CLASSES.keys() == {
        "planes",
        "codebook",
        "nf4",
        "fp8",
        "microscaling",
        "lattice",
        "offset",
        "sparse",
        "nested",
    }


@every_format
def test_the_text_round_trips(fmt: Any) -> None:
    assert decode(encode(fmt)) == fmt
    assert encode(decode(encode(fmt))) == encode(fmt)


def test_texts_are_what_artifacts_hold() -> None:
    """Changing one of these makes artifacts unreadable."""
    assert {encode(f) for f in (PlanesFormat(), CodebookFormat(3, sparse=0.0045), Nf4Format(), Fp8Format())} == {
        "planes(order=2,group_size=128,scale_dtype=bfloat16)",
        "codebook(bits=3,group_size=None,sparse=0.0045,table_dtype=float16)",
        "nf4(block=64,scale_block=256)",
        "fp8(unit=channel)",
    }
    assert encode(MicroscalingFormat("nvfp4")) == "microscaling(kind=nvfp4,rounding=floor)"
    assert encode(LatticeFormat()) == "lattice(group_size=None,scale_dtype=bfloat16)"
    assert encode(OffsetFormat(4)) == "offset(bits=4,group_size=128,scale_dtype=float16)"


@every_format
@pytest.mark.parametrize(("count", "width"), [(40, 192), (1, 64), (131, 320)])
def test_parts_are_what_the_format_says(fmt: Any, count: int, width: int) -> None:
    parts = stored(fmt, count, width).pack()
    said = fmt.parts_of(count, width)
    assert {role: (tuple(p.shape), p.dtype) for role, p in parts.items()} == said
    bits = 8 * sum(p.nbytes for p in parts.values())
    # What bits_per_weight leaves out is the padding of packed rows to words, the tags of planes included.
    assert -1e-6 <= bits - fmt.bits_per_weight(count, width) * count * width <= 32 * (count + 1)


@every_format
def test_a_weight_comes_back_from_its_parts(fmt: Any) -> None:
    weight = stored(fmt)
    parts = [part for _, part in sorted(weight.pack().items())]
    assert fault(encode(fmt), parts, 40, 192) is None
    assert torch.equal(weight_of(encode(fmt), parts, 40, 192).dequantize(), weight.dequantize())


@every_format
def test_parts_that_do_not_fit_are_named(fmt: Any) -> None:
    spec, parts = encode(fmt), dict(sorted(stored(fmt).pack().items()))
    roles, tensors = list(parts), list(parts.values())
    with pytest.raises(ContractError, match=rf"has the parts {', '.join(roles)}, {len(roles) - 1} came\. Use the t"):
        weight_of(spec, tensors[1:], 40, 192)
    for i, role in enumerate(roles):
        longer = torch.zeros(tensors[i].numel() + 1).to(tensors[i].dtype)
        for wrong in (longer, tensors[i].to(torch.float64)):
            what = fault(spec, [*tensors[:i], wrong, *tensors[i + 1 :]], 40, 192)
            assert what is not None
            assert what.startswith(f"{role} is ")
    assert fault(spec, tensors, 41, 192) is not None
    assert fault(spec, tensors, 0, 192) == "a weight of 0 output features is none"


def test_a_width_that_does_not_divide_is_named() -> None:
    assert fault("nf4(block=64,scale_block=256)", [], 8, 100) == "100 input features do not divide by block 64"


HOSTILE = (
    "",
    "nf4",
    "nf4()",
    "nf4(block=64)",
    "nf4(scale_block=256,block=64)",
    "nf4(block=64,scale_block=256,)",
    "nf4(block=64,scale_block=256)\n",
    "nf4(block=064,scale_block=256)",
    "nf4(block=+64,scale_block=256)",
    "nf4(block=6_4,scale_block=256)",
    "nf4(block=0,scale_block=256)",
    "nf4(block=-64,scale_block=256)",
    "nf4(block=99999999999,scale_block=256)",
    "nf4(block=64,scale_block=256,name=x)",
    "nf4(block=64,block=64,scale_block=256)",
    "nf4(block=None,scale_block=256)",
    "nf4(block=__import__('os'),scale_block=256)",
    "os.system(x=1)",
    "int4(block=64)",
    "codebook(bits=3,group_size=None,sparse=nan,table_dtype=float16)",
    "codebook(bits=3,group_size=None,sparse=inf,table_dtype=float16)",
    "codebook(bits=3,group_size=None,sparse=0,table_dtype=float16)",
    "codebook(bits=3,group_size=None,sparse=0.0,table_dtype=complex64)",
    "codebook(bits=3.0,group_size=None,sparse=0.0,table_dtype=float16)",
    "planes(order=9,group_size=128,scale_dtype=bfloat16)",
    "fp8(unit=__class__)",
    "microscaling(kind=mxfp4,rounding=None)",
    "fp8(unit=channel)fp8(unit=channel)",
    "fp8(unit=channel" + " " * 10_000 + ")",
    "nf4(" + "a=1," * 100_000 + ")",
)


@pytest.mark.parametrize("spec", HOSTILE, ids=lambda s: repr(s[:40]))
def test_other_texts_are_refused(spec: str) -> None:
    with pytest.raises(ContractError, match=r"^spec: .* spells no weight format\. See dlqc/formats/coded\.py$"):
        decode(spec)
    assert "spells no weight format" in str(fault(spec, [], 8, 64))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"(nf4|fp8|planes)\([a-z_=0-9,.]{0,30}\)", fullmatch=True))
def test_any_text_is_a_format_or_a_spoken_error(spec: str) -> None:
    try:
        assert encode(decode(spec)) == spec
    except DlqcError:
        pass


def test_a_class_of_the_users_own_has_no_text() -> None:
    class Mine(Nf4Format):
        pass

    with pytest.raises(
        ContractError, match=r"^spec: Mine is no format of a graph\. Use one of planes, codebook, nf4, "
    ):
        encode(Mine())


def test_planes_whose_mean_order_is_another_are_refused() -> None:
    fmt = PlanesFormat(group_size=32)
    weight = fmt.quantize(torch.randn(8, 96), orders=(1, 2, 2))
    parts = [part for _, part in sorted(weight.pack().items())]
    assert "bits is uint8[8, 20], must be uint8[8, 24]" in str(fault(encode(fmt), parts, 8, 96))
    mixed = fmt.quantize(torch.randn(8, 96), orders=(1, 2, 3))
    parts = [part for _, part in sorted(mixed.pack().items())]
    assert torch.equal(coded.weight_of(encode(fmt), parts, 8, 96).dequantize(), mixed.dequantize())
