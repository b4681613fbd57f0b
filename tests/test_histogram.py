"""Histograms against bins looked up one number at a time, in any order and any batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc import histogram
from dlqc.histogram import OCTAVES, Histogram

SIZE = 4


def naive(values: list[float], weights: list[float]) -> dict[tuple[int, float, float], float]:
    """(side, where a bin begins, where it ends) → weight, from the module's docstring alone."""
    largest = max(map(abs, values), default=0.0)
    top = math.frexp(largest)[1]  # 2^(top-1) ≤ largest < 2^top
    found: dict[tuple[int, float, float], float] = {}
    for value, weight in zip(values, weights, strict=True):
        x, base = abs(value), 2.0 ** (top - OCTAVES)
        low = 0.0 if x < base else 2.0 ** (math.frexp(x)[1] - 1)
        width = (base if x < base else low) / SIZE
        begin = low + math.floor((x - low) / width) * width if largest else 0.0
        key = (int(value >= 0), begin, begin + width)
        found[key] = found.get(key, 0.0) + weight
    return found


def table(h: Histogram, index: int = 0) -> dict[tuple[int, float, float], float]:
    edges = h.edges.tolist()
    mass = h.mass[index].tolist()
    return {
        (side, edges[i], edges[i + 1]): weight for side in (0, 1) for i, weight in enumerate(mass[side]) if weight > 0
    }


NUMBERS = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, -4096.0, 1e-30])
ITEMS = st.lists(st.tuples(NUMBERS, st.sampled_from([0.25, 1.0, 3.0])), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 7))
def test_bins_and_weights(items: list[tuple[float, float]], batch: int) -> None:
    """Weights are sums of quarters, so they are compared exactly."""
    h = Histogram(1, SIZE)
    for i in range(0, len(items), batch):
        values, weights = zip(*items[i : i + batch], strict=True)
        h.add(torch.tensor(values)[:, None], torch.tensor(weights), torch.zeros(1, 1, dtype=torch.int64))
    values, weights = (list(part) for part in zip(*items, strict=True))
    expected = naive(values, weights)
    if not any(values):  # the width of the bins is not known yet
        assert float(h.mass.sum()) == sum(weights)
        assert float(h.mass[0, 1, 0]) == sum(weights)
        return
    assert table(h) == expected


def test_order_and_batches_do_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=g) * torch.logspace(-6, 6, 64)[:, None]
    whole, parts = Histogram(1, 16), Histogram(1, 16)
    which = torch.zeros(1, 1, dtype=torch.int64)
    whole.add(x, torch.ones(64), which)
    for rows in torch.randperm(64, generator=g).split(7):
        parts.add(x[rows], torch.ones(len(rows)), which)
    assert parts.exponent == whole.exponent
    assert torch.equal(parts.mass, whole.mass)


def test_several_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its own numbers, whatever the size of the chunks in which bins are computed."""
    x = torch.randn(9, 6)
    which = torch.tensor([[0, 0, 1, 1, 2, 2]])
    made = []
    for chunk in (1 << 22, 12):
        monkeypatch.setattr(histogram, "_CHUNK", chunk)
        h = Histogram(3, 8)
        h.add(x, torch.ones(9), which)
        made.append(h)
    assert torch.equal(made[0].mass, made[1].mass)
    for i in range(3):
        alone, zero = Histogram(1, 8), torch.zeros(1, 1, dtype=torch.int64)
        alone.add(x.abs().max().reshape(1, 1), torch.zeros(1), zero)  # the same octaves, and no weight
        alone.add(x[:, 2 * i : 2 * i + 2], torch.ones(9), zero)
        assert torch.equal(alone.mass[0], made[0].mass[i])


def test_a_number_is_known_to_a_share_of_itself() -> None:
    """Numbers within 12 octaves of the largest: the middle of the bin is off by at most x/(2·M)."""
    x = torch.logspace(-3, 0.4, 300, dtype=torch.float64)
    h = Histogram(300, 64)
    h.add(x[None], torch.ones(1), torch.arange(300)[None])
    middles = torch.cat([h.signed(i)[0] for i in range(300)])
    assert bool(((middles - x).abs() <= x / 128 * (1 + 1e-12)).all())
    assert bool((h.signed(299)[1] == 1).all())


def test_magnitudes_and_signs() -> None:
    h = Histogram(1, 8)
    h.add(torch.tensor([[-3.0, 3.0, 1.0]]), torch.tensor([2.0]), torch.zeros(1, 1, dtype=torch.int64))
    values, mass = h.signed(0)
    assert values.tolist() == sorted(values.tolist())
    assert mass.tolist() == [2.0, 2.0, 2.0]
    assert values[0] == -values[2]
    assert sorted(h.magnitudes(0)[h.magnitudes(0) > 0].tolist()) == [2.0, 4.0]
