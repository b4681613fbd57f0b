"""Formats by name: their text in a graph, and the weight that a text and its tensors stand for.

    nf4(block=64,scale_block=256)    codebook(bits=3,group_size=None,sparse=0.0045,table_dtype=float16)

A text names the format and all its options in order, so that one format has one text; anything else is refused. It is read by
a pattern and looked up in a table, never evaluated.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dlqc.errors import ContractError, DlqcError
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.contract import Part, StoredWeight, WeightFormat
from dlqc.formats.fp8 import Fp8Format
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.microscaling import MicroscalingFormat
from dlqc.formats.nested import NestedFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.offset import OffsetFormat
from dlqc.formats.planes import PlanesFormat
from dlqc.formats.sparse import SparseFormat

CodedFormat = (
    PlanesFormat
    | CodebookFormat
    | Nf4Format
    | Fp8Format
    | MicroscalingFormat
    | LatticeFormat
    | OffsetFormat
    | NestedFormat
    | SparseFormat
)
CLASSES: dict[str, type[Any]] = {cls.name: cls for cls in typing.get_args(CodedFormat)}

_SPEC = re.compile(r"([a-z0-9_]{1,16})\(((?:[a-z_]{1,16}=[A-Za-z0-9_.+-]{1,24},?){0,8})\)")
#: Numbers of a file may be no larger than any weight is wide, so that nothing absurd is computed from them.
_LARGEST = 1 << 24


def encode(fmt: WeightFormat) -> str:
    """The text of a format.

    >>> encode(Nf4Format()), encode(Fp8Format())
    ('nf4(block=64,scale_block=256)', 'fp8(unit=channel)')
    """
    if CLASSES.get(fmt.name) is not type(fmt):
        raise ContractError(
            f"{type(fmt).__name__} is no format of a graph", where="spec", remedy=f"Use one of {', '.join(CLASSES)}"
        )
    return spell(fmt)


@functools.lru_cache(maxsize=256)
def decode(spec: str) -> WeightFormat:
    """The format that `encode` spelled.

    Raises:
        ContractError: the text is no format, has an option that no format has, or is not as `encode` writes it.
    """
    fmt: WeightFormat = parse(spec, CLASSES)
    return fmt


def spell(options: Any) -> str:
    """A frozen dataclass of numbers and words as `name(option=value,…)`."""
    fields = ((f.name, getattr(options, f.name)) for f in dataclasses.fields(options))
    return f"{options.name}({','.join(f'{name}={value}' for name, value in fields)})"


def parse(spec: str, classes: Mapping[str, type[Any]]) -> Any:
    """What `spell` spelled, one of `classes` by name; a ContractError for any other text."""
    found = _SPEC.fullmatch(spec) if len(spec) <= 256 else None
    if found is None or found[1] not in classes:
        raise _malformed(spec)
    cls = classes[found[1]]
    try:
        hints = typing.get_type_hints(cls)
        given = dict(item.split("=") for item in found[2].split(",") if item)
        options = cls(**{f.name: _value(given[f.name], hints[f.name]) for f in dataclasses.fields(cls)})
        same = spell(options) == spec
    except (KeyError, ValueError, OverflowError, DlqcError) as error:
        raise _malformed(spec) from error
    if not same:
        raise _malformed(spec)
    return options


def _value(text: str, hint: Any) -> Any:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if text == "None" and type(None) in members:
        return None
    if bool in members:
        return {"True": True, "False": False}[text]
    if float in members:
        return float(text)
    if int not in members:
        return text
    if not 0 <= int(text) <= _LARGEST:
        raise ValueError(text)
    return int(text)


def _malformed(spec: str) -> ContractError:
    return ContractError(f"{spec[:80]!r} spells no weight format", where="spec", remedy="See dlqc/formats/coded.py")


def fault(spec: str, parts: Sequence[torch.Tensor], out_features: int, in_features: int) -> str | None:
    """None if the tensors `parts`, in sorted order of roles, are those of a [N, K] weight, else what is wrong, one clause."""
    try:
        fmt = decode(spec)
    except ContractError as error:
        return error.what
    if out_features < 1:
        return f"a weight of {out_features} output features is none"
    reason = fmt.check(in_features)
    if reason is not None:
        return reason
    return misfit(fmt.label, fmt.parts_of(out_features, in_features), parts)


def misfit(label: str, parts_of: Mapping[str, Part], parts: Sequence[torch.Tensor]) -> str | None:
    """None if `parts`, in sorted order of roles, have the shapes and dtypes that `parts_of` says, else what is wrong."""
    expected = sorted(parts_of.items())
    if len(parts) != len(expected):
        return f"{label} has the parts {', '.join(role for role, _ in expected)}, {len(parts)} came"
    for (role, (shape, dtype)), part in zip(expected, parts, strict=True):
        if tuple(part.shape) != shape or part.dtype != dtype:
            return f"{role} is {_type(tuple(part.shape), part.dtype)}, must be {_type(shape, dtype)}"
    return None


def weight_of(spec: str, parts: Sequence[torch.Tensor], out_features: int, in_features: int) -> StoredWeight:
    """The [N, K] weight that `parts`, in sorted order of roles, stand for; a ContractError if they do not fit.

    Where a graph runs in float64, float32 constants come as float64: they are taken back, which is exact.
    """
    parts = [part.float() if part.dtype == torch.float64 else part for part in parts]
    what = fault(spec, parts, out_features, in_features)
    if what is not None:
        raise ContractError(what, where="parts", remedy="Use the tensors that pack() of the weight gave")
    fmt = decode(spec)
    return fmt.unpack(dict(zip(sorted(fmt.parts_of(out_features, in_features)), parts, strict=True)), in_features)


def _type(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
