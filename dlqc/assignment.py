"""Which schemes linears may get, what each takes in storage, and what the best assignment within a budget is.

`Choices` is known from shapes alone, so that a budget which no assignment meets is refused before any work. With costs from
`dlqc.sensitivity` it becomes the items of a knapsack (`dlqc.knapsack`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from dlqc.blocks import tail
from dlqc.budget import Budget, rest_bits
from dlqc.contract import Context, Declined, matches
from dlqc.formats.integer import IntFormat
from dlqc.graph import module_name
from dlqc.kept import to_round
from dlqc.knapsack import Option
from dlqc.schemes import Override, Scheme, head_format, overridden, stored_bits, stored_names
from dlqc.sensitivity import Unit, units_of


@dataclass(frozen=True)
class Choices:
    """What may be chosen.

    Attributes:
        units: linears that get one scheme each.
        schemes: for each unit its candidates.
        sizes: for each unit the stored bits of each candidate.
        rest: bits of everything else in the weight files.
        left: linears that are left alone.
        problems: why some units have no candidate, one clause each.
    """

    units: tuple[Unit, ...]
    schemes: tuple[tuple[Scheme, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    rest: int
    left: tuple[Declined, ...]
    problems: tuple[str, ...]

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(unit.weights for unit in self.units)

    @property
    def smallest(self) -> int:
        return sum(map(min, self.sizes))

    @property
    def largest(self) -> int:
        return sum(map(max, self.sizes))

    def size(self, choice: Sequence[int]) -> int:
        """Stored bits of the quantized linears."""
        return sum(sizes[c] for sizes, c in zip(self.sizes, choice, strict=True))

    def out_of_reach(self, budget: Budget) -> str | None:
        """None if some assignments meet the budget and others do not (or all do, with nothing left over), else why not.

        A clause with the nearest budget that can be met.
        """
        limit = budget.limit(self.weights, self.rest)
        least, most = (budget.spelled(bits, self.weights, self.rest) for bits in (self.smallest, self.largest))
        if limit < self.smallest:
            return (
                f"no assignment is that small, the nearest budget is '{least}' (or allow fewer bits, or larger groups)"
            )
        if limit > Budget.read(most).limit(self.weights, self.rest):
            return f"no assignment is that large, the nearest budget is '{most}' (or allow more bits)"
        return None

    def items(self, costs: Sequence[Sequence[float]]) -> list[list[Option]]:
        """The knapsack, given the cost of each candidate."""
        return [list(zip(size, cost, strict=True)) for size, cost in zip(self.sizes, costs, strict=True)]

    def assignment(self, choice: Sequence[int]) -> dict[str, Scheme]:
        """Scheme by site."""
        picked = zip(self.units, self.schemes, choice, strict=True)
        return {name: schemes[c] for unit, schemes, c in picked for name in unit.names}


def choices(
    graph: fx.Graph,
    ctx: Context,
    candidates: Sequence[Scheme],
    *,
    fused: bool = True,
    skip: Sequence[str] = (),
    fixed: Sequence[Override] = (),
    head: int | None = None,
    tables: Mapping[str, tuple[IntFormat, int, int]] | None = None,
) -> Choices:
    """What the linears of the blocks may get.

    Args:
        candidates: schemes; those that do not fit the width of a linear are no candidates there.
        fused, skip: as in `units_of`.
        fixed: linears (and with them their units) whose scheme is settled; what is left out is as in the first candidate.
        head: bits that linears behind the last block are going to have, None for as they are.
        tables: by module name, embeddings that are going to be stored in few bits: format, rows and width.
    """
    units, left = units_of(graph, ctx, fused=fused, skip=skip)
    kept: list[Unit] = []
    schemes: list[tuple[Scheme, ...]] = []
    problems: list[str] = []
    for unit in units:
        settled = {overridden(n, candidates[0], fixed) for n in unit.names if any(matches(n, o.sites) for o in fixed)}
        if len(settled) > 1:
            problems.append(f"{', '.join(unit.names)}: fixed= names several schemes, and they are one unit (fused)")
            continue
        reasons = {s: [s.format.check(site.in_features) for site in unit.sites] for s in settled or candidates}
        fitting = tuple(s for s in reasons if not any(reasons[s]))
        if not fitting:
            site, why = next((n, r) for n, r in zip(unit.names, next(iter(reasons.values())), strict=True) if r)
            problems.append(f"{site}: {why} (choose another group_size, or exclude it with skip=)")
            continue
        kept.append(unit)
        schemes.append(fitting)
    sizes = tuple(
        tuple(sum(stored_bits(s.format, site.out_features, site.in_features) for site in unit.sites) for s in fitting)
        for unit, fitting in zip(kept, schemes, strict=True)
    )
    known = tables or {}
    planned = {name: stored_bits(*known[module_name(name)]) for name in ctx.weights if module_name(name) in known}
    behind = tail(graph, ctx.blocks) if head is not None else None
    for weight, sites in to_round(behind.nodes(graph), ctx.weights, skip)[0].items() if behind is not None else ():
        fmt = head_format(head, candidates[0].format)
        assert fmt is not None
        planned[weight] = stored_bits(fmt, sites[0].out_features, sites[0].in_features)
    rest = rest_bits(ctx.weights, _stored(kept, schemes), planned)
    return Choices(tuple(kept), tuple(schemes), sizes, rest, tuple(left), tuple(problems))


def _stored(units: Sequence[Unit], schemes: Sequence[Sequence[Scheme]]) -> Mapping[str, tuple[str, ...]]:
    """For each weight to be quantized, the names of what it is stored in: the longest of its candidates' lists."""
    return {
        site.weight: max((stored_names(s.format, site) for s in fitting), key=lambda names: sum(map(len, names)))
        for unit, fitting in zip(units, schemes, strict=True)
        for site in unit.sites
    }


def in_words(assignment: Mapping[str, Scheme]) -> str:
    """How many sites get which format: "12 at int2 g128, 16 at int4 g128"."""
    counts = Counter(scheme.format.label for scheme in assignment.values())
    return ", ".join(f"{count} at {label}" for label, count in sorted(counts.items()))
