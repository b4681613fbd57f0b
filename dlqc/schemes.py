"""What a weight is rounded to and by which method, in general and site by site.

    scheme      a number format and a rounding method: what one weight gets
    variant     the parts in which a scheme differs from another; what is left out stays as it is
    override    a variant for the linears that some glob patterns name

In a recipe: `quantize_weights(bits=3, overrides=(override(sites=('*.ff_out',), bits=4),))`. What a pass finds out while it
runs is not written there but left in `Context.assignment`, site → scheme (`passes/assign_bits.py`).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dlqc.contract import Plan, matches
from dlqc.errors import RecipeError
from dlqc.formats.coded import CodedFormat
from dlqc.formats.integer import SCALE_DTYPES, IntFormat
from dlqc.formats.packing import packed_shape
from dlqc.graph import Linear
from dlqc.rounding.contract import BlockRounding
from dlqc.rounding.daq import Daq
from dlqc.rounding.gptaq import Gptaq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.hqq import Hqq
from dlqc.rounding.kmeans import Kmeans
from dlqc.rounding.nested_gptq import NestedGptq
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.signround import SignRound
from dlqc.rounding.vector import Ldlq
from dlqc.weights import Weights

Method = Rtn | Gptq | Gptaq | NestedGptq | Daq | Kmeans | Ldlq | Hqq | SignRound


@dataclass(frozen=True)
class Scheme:
    """A number format and the method that rounds to it."""

    format: IntFormat | CodedFormat
    method: Method

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> Scheme(IntFormat(3), Rtn()).label
        'int3 g128 by rtn'
        """
        return f"{self.format.label} by {self.method.name}"

    @property
    def parts(self) -> tuple[IntFormat | CodedFormat, Method]:
        return self.format, self.method

    def checked(self, where: str = "method") -> Scheme:
        """The scheme itself, if the method rounds to the format; a RecipeError at option `where` if it does not."""
        reason = self.method.refusal(self.format)
        if reason is not None:
            fitting = [m.name for m in typing.get_args(Method) if isinstance(self.format, m.takes)]
            raise RecipeError(reason, where=where, remedy=f"Use method={' or '.join(fitting)}")
        return self


@dataclass(frozen=True)
class Variant:
    """How a scheme differs from another.

    Options:
        bits, group_size, symmetric: of integers, as in `quantize_weights`, but group_size=0 for one scale per output channel.
        method: the rounding method.
        format: a format other than integers; then the first three have no say.

    None leaves each as it is.
    """

    name: ClassVar[str] = "variant"

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    method: Method | None = None
    format: CodedFormat | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("bits", "group_size", "symmetric") if getattr(self, n) is not None]
        if self.format is not None and given:
            what = f"{given[0]}={getattr(self, given[0])} is for integers, weights become {self.format.label}"
            raise RecipeError(what, where=f"{self.name}.{given[0]}", remedy="Leave it out, or leave format out")

    def of(self, base: Scheme) -> Scheme:
        """`base` with this variant's parts in place of its own.

        Raises:
            RecipeError: the method does not round to the format, or the width is missing where `base` is no integer format.
        """
        method = self.method or base.method
        return Scheme(self.format or self._integers(base) or base.format, method).checked(f"{self.name}.method")

    def _integers(self, base: Scheme) -> IntFormat | None:
        if (self.bits, self.group_size, self.symmetric) == (None, None, None):
            return None
        usual = base.format
        if not isinstance(usual, IntFormat):
            if self.bits is None:
                what = f"weights are {usual.label}, and for integers the width is missing"
                raise RecipeError(what, where=f"{self.name}.bits", remedy="Write bits=4")
            usual = IntFormat(self.bits, symmetric=False)
        return dataclasses.replace(
            usual,
            bits=usual.bits if self.bits is None else self.bits,
            group_size=usual.group_size if self.group_size is None else self.group_size or None,
            symmetric=usual.symmetric if self.symmetric is None else self.symmetric,
        )


@dataclass(frozen=True)
class Override(Variant):
    """A variant for some linears.

    Options:
        sites: glob patterns of module names. The others are those of `variant`.
    """

    name: ClassVar[str] = "override"

    sites: tuple[str, ...] = ()


def overridden(name: str, base: Scheme, overrides: Sequence[Override]) -> Scheme:
    """The scheme of the linear `name`; where several overrides name it, the last one counts."""
    chosen = next((o for o in reversed(overrides) if matches(name, o.sites)), None)
    return base if chosen is None else chosen.of(base)


def overrides_of(schemes: Mapping[str, Scheme]) -> tuple[Override, ...]:
    """Overrides that give every named linear its scheme, one for each scheme, spelled out whole."""
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    found = []
    for scheme, names in members.items():
        fmt = scheme.format
        if isinstance(fmt, IntFormat):
            sites = Override(fmt.bits, fmt.group_size or 0, fmt.symmetric, scheme.method, sites=tuple(names))
        else:
            sites = Override(method=scheme.method, format=fmt, sites=tuple(names))
        found.append(sites)
    return tuple(found)


def head_format(bits: int | None, blocks: IntFormat | CodedFormat) -> IntFormat | None:
    """What linears behind the last block become, where the blocks' are `blocks`; None leaves them alone.

    8 bits have a scale for each output channel, fewer the groups and zero points of the blocks' integers.
    """
    if bits is None or bits == 8:
        return None if bits is None else IntFormat(8, None, True)
    usual = blocks if isinstance(blocks, IntFormat) else IntFormat(4, 128, False)
    return dataclasses.replace(usual, bits=bits)


def operands(
    weights: Weights, name: str, method: Method, stats: Mapping[str, Any]
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """A weight, float64, and its statistics as a method takes them: with the mask, if it makes up for pruning itself."""
    kept = weights[name].kept() if method.compensates else None
    if kept is None:
        return weights.value(name, torch.float64), stats
    return weights[name].unpruned.exact(), {**stats, "kept": kept}


def stored_bits(fmt: IntFormat | CodedFormat, out_features: int, in_features: int) -> int:
    """Bits of all tensors that a [N, K] weight is stored in, padding included.

    >>> stored_bits(IntFormat(4), 4096, 4096) / 4096**2
    4.125
    """
    if not isinstance(fmt, IntFormat):
        parts = fmt.parts_of(out_features, in_features).values()
        return 8 * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
    groups = fmt.groups(in_features)
    packed = [packed_shape(out_features, in_features, fmt.bits)]
    packed += [] if fmt.symmetric else [packed_shape(out_features, groups, fmt.bits)]
    scales = out_features * groups * SCALE_DTYPES[fmt.scale_dtype].itemsize
    return 8 * (scales + sum(math.prod(shape) for shape in packed))


def stored_names(fmt: IntFormat | CodedFormat, site: Linear) -> tuple[str, ...]:
    """Names of the tensors that the weight of `site` is stored in."""
    if not isinstance(fmt, IntFormat):
        return tuple(f"{site.name}.{role}" for role in fmt.parts_of(site.out_features, site.in_features))
    roles = ("codes_packed", "scales") if fmt.symmetric else ("codes_packed", "scales", "zeros_packed")
    return tuple(f"{site.name}.{role}" for role in roles)


def at_odds(plan: Plan, own: Sequence[Scheme], mine: Collection[str], head: int | None) -> Iterator[str]:
    """What keeps a pass that rounds from following the schemes that another one is going to assign, one clause each.

    Args:
        own: the schemes of the pass, that of the blocks first, then those of a head and of overrides.
        mine: the linears of the blocks that it rounds. head: bits of those behind.
    """
    if len(own) > 1 + (head is not None):
        yield "overrides= are a second word on linears that are assigned (name them in fixed= of assign_bits)"
    for name in sorted(plan.assigned.keys() ^ set(mine)):
        what = "is assigned, and skipped here" if name in plan.assigned else "is rounded here, and not assigned"
        yield f"{name} {what} (give both passes the same skip=)"
    if plan.assigned_head != head:
        yield f"head={head}, and assign_bits counts on head={plan.assigned_head} (give both the same)"
    schemes = {scheme for candidates in plan.assigned.values() for scheme in candidates}
    if not isinstance(own[0].format, IntFormat) and any(isinstance(scheme.format, IntFormat) for scheme in schemes):
        yield "integers are assigned (leave format= out)"
    collected = frozenset[str]().union(*(scheme.method.statistics for scheme in own))
    for method in {scheme.method for scheme in schemes} - {own[0].method}:
        alone = not isinstance(method, BlockRounding) and not isinstance(own[0].method, BlockRounding)
        if not alone or method.statistics - collected:
            what = "needs statistics" if alone else "does not go together with the method here"
            yield f"{method.name} is assigned and {what} (set method={method.name})"
