"""The four findings of QDLM (Lin et al., arXiv 2508.14896), checked on what was run.

    1 bit-width    4-bit weights, and 8-bit weights and activations, cost next to nothing; 3-bit weights and W4A4 cost more
    2 method       GPTQ is better than AWQ for weights; rotations (QuaRot, DuQuant) better than SmoothQuant for W4A4, DuQuant best
    3 task         math and code lose more than general tasks
    4 model type   models tuned to instructions lose less than their base models

A claim is a number with its 95 % interval and the side of a bound where it should lie. Cells are compared with their like: two
methods where both were run with the same model and bits, two widths with the same model and method, two models of a family with
the same bits and method. So a grid that lacks one side does not cover the claim.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dlqc.diffusion.intervals import Interval
from dlqc.study.losses import Losses, Place
from dlqc.study.spec import ModelEntry

Verdict = Literal["holds", "reversed", "no difference seen", "not covered by this grid"]

_UNCOVERED: Verdict = "not covered by this grid"

#: Bits that QDLM calls tolerable.
MILD = ("w4a16", "w8a8")
ROTATIONS = ("quarot", "duquant")


@dataclass(frozen=True)
class Claim:
    """A part of a finding.

    Attributes:
        text: what should be.
        side: on which side of `bound` the value should lie.
        value: percent of the reference's score, with its interval; None where the grid does not cover the claim.
        kl: the same contrast of KL from the references, nats per masked token; None where it makes no sense or has no text.
        cells: how many cells went into it.
    """

    text: str
    value: Interval | None
    side: Literal["above", "below"] = "above"
    bound: float = 0.0
    kl: Interval | None = None
    cells: int = 0

    @property
    def verdict(self) -> Verdict:
        return _verdict(self.value, self.side, self.bound)

    @property
    def verdict_by_kl(self) -> Verdict:
        return _verdict(self.kl, self.side, 0.0)

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"claim": self.text, "verdict": self.verdict, "cells": self.cells}
        if self.value is not None:
            plain["percent"] = {"mean": self.value.mean, "low": self.value.low, "high": self.value.high}
            plain["expected"] = f"{self.side} {self.bound:g}"
        if self.kl is not None:
            plain["kl"] = {"mean": self.kl.mean, "low": self.kl.low, "high": self.kl.high}
            plain["verdict_by_kl"] = self.verdict_by_kl
        return plain


@dataclass(frozen=True)
class Finding:
    """A finding with its claims."""

    title: str
    claims: tuple[Claim, ...]

    @property
    def verdict(self) -> str:
        """That of its claims; where covered ones disagree, "in part" with how many hold."""
        seen = [claim.verdict for claim in self.claims if claim.verdict != _UNCOVERED]
        if len(set(seen)) <= 1:
            return seen[0] if seen else _UNCOVERED
        counts = [f"{seen.count(v)} {v}" for v in typing.get_args(Verdict) if v in seen]
        return f"in part ({', '.join(counts)})"

    def to_plain(self) -> dict[str, Any]:
        return {"finding": self.title, "verdict": self.verdict, "claims": [claim.to_plain() for claim in self.claims]}


def check_findings(losses: Losses, models: Mapping[str, ModelEntry]) -> tuple[Finding, ...]:
    """All four, on the cells that were measured."""
    return (_bit_width(losses), _method(losses), _task(losses), _model_type(losses, models))


def _bit_width(losses: Losses) -> Finding:
    claims = []
    for bits, name in (("w4a16", "4-bit weights"), ("w8a8", "W8A8")):
        places = [place for place in losses.percent if place[1] == bits]
        text = f"{name} lose under 1 %"
        claims.append(Claim(text, losses.of(places), "below", 1.0, cells=len(places)))
    for fewer, more in (("w3a16", "w4a16"), ("w4a4", "w8a8")):
        text = f"{fewer.upper()} loses more than {more.upper()}"
        claims.append(_contrast(losses, text, _matched(losses, 1, fewer, more)))
    return Finding("bit-width: W4A16 and W8A8 are safe, fewer bits are not", tuple(claims))


def _method(losses: Losses) -> Finding:
    def weights_alone(place: Place) -> bool:
        return place[1].endswith("a16")

    def w4a4(place: Place) -> bool:
        return place[1] == "w4a4"

    claims = [
        _contrast(losses, "weights alone: AWQ loses more than GPTQ", _matched(losses, 2, "awq", "gptq", weights_alone))
    ]
    for name, label in zip(ROTATIONS, ("QuaRot", "DuQuant"), strict=True):
        text = f"W4A4: SmoothQuant loses more than {label}"
        claims.append(_contrast(losses, text, _matched(losses, 2, "smoothquant", name, w4a4)))
    text = "W4A4: QuaRot loses more than DuQuant"
    claims.append(_contrast(losses, text, _matched(losses, 2, "quarot", "duquant", w4a4)))
    return Finding("method: GPTQ before AWQ, rotations before SmoothQuant, DuQuant first", tuple(claims))


def _task(losses: Losses) -> Finding:
    """On the widths that are not mild, where there is something to lose; on all if there are no others."""
    pressed = [place for place in losses.percent if place[1] not in MILD] or list(losses.percent)
    claims = [
        Claim(
            f"{category} loses more than general tasks",
            losses.between(pressed, (category,), ("general",)),
            cells=len(pressed),
        )
        for category in ("math", "code")
    ]
    return Finding("task: math and code lose more than general tasks", tuple(claims))


def _model_type(losses: Losses, models: Mapping[str, ModelEntry]) -> Finding:
    base, tuned = [], []
    for model, bits, method in losses.percent:
        for other, entry in models.items():
            mine, place = models[model], (other, bits, method)
            related = mine.family == entry.family and (mine.type, entry.type) == ("base", "instruct")
            if related and place in losses.percent:
                base.append((model, bits, method))
                tuned.append(place)
    claim = _contrast(losses, "base models lose more than those tuned from them", (base, tuned))
    return Finding("model type: tuned models are more robust than base models", (claim,))


def _matched(
    losses: Losses, field: int, more: str, less: str, among: Callable[[Place], bool] = lambda place: True
) -> tuple[list[Place], list[Place]]:
    """Places that have `more` in a field of theirs, and those with `less` there and all else the same."""
    left, right = [], []
    for place in losses.percent:
        other = (*place[:field], less, *place[field + 1 :])
        if place[field] == more and other in losses.percent and among(place):
            left.append(place)
            right.append(other)
    return left, right  # type: ignore[return-value]


def _contrast(losses: Losses, text: str, sides: tuple[Sequence[Place], Sequence[Place]]) -> Claim:
    kl = losses.contrast(*sides, kl=True)
    return Claim(text, losses.contrast(*sides), kl=kl, cells=len(sides[0]) + len(sides[1]))


def _verdict(value: Interval | None, side: str, bound: float) -> Verdict:
    if value is None:
        return _UNCOVERED
    low, high = (value.low, value.high) if side == "above" else (2 * bound - value.high, 2 * bound - value.low)
    return "holds" if low > bound else "reversed" if high < bound else "no difference seen"
