"""Budgets: what is read, what it allows, and that the files keep within it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlqc.budget import UNITS, Budget
from dlqc.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("3.2bpw", Budget(Fraction(16, 5), "bpw")),
        (" 4.5 GB ", Budget(Fraction(9, 2), "GB")),
        (".5GiB", Budget(Fraction(1, 2), "GiB")),
        ("800MiB", Budget(Fraction(800), "MiB")),
        ("7B", Budget(Fraction(7), "B")),
    ],
)
def test_what_is_read(text: str, budget: Budget) -> None:
    assert Budget.read(text) == budget


def test_limits() -> None:
    assert Budget.read("3.2bpw").limit(10**6 + 1, 999) == 3_200_003
    assert Budget.read("4.5GB").limit(10, 1000) == 36 * 10**9 - 1000
    assert Budget.read("1KiB").limit(10, 0) == 8192
    assert Budget.read("1kB").limit(10, 0) == 8000


@given(st.integers(1, 10**12), st.integers(1, 10**10), st.integers(0, 10**10), st.sampled_from(["bpw", *UNITS]))
def test_what_is_offered_is_enough_and_not_much_more(bits: int, weights: int, rest: int, unit: str) -> None:
    offered = Budget.read(Budget(Fraction(1), unit).spelled(bits, weights, rest))
    assert offered.unit == unit
    step = Fraction(weights) if unit == "bpw" else Fraction(8 * UNITS[unit])
    assert bits <= offered.limit(weights, rest) <= bits + step / 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3.2", r"^budget: '3\.2' has no unit\. Known: "),
        ("4.5Gb", r"^budget: unit 'Gb' of '4\.5Gb' is unknown\. Did you mean 'GB'\?$"),
        ("4.5gib", r"^budget: unit 'gib' of '4\.5gib' is unknown\. Did you mean 'GiB'\?$"),
        ("8GG", r"^budget: unit 'GG' of '8GG' is unknown\. "),
        ("800KB", r"^budget: unit 'KB' of '800KB' is unknown\. Did you mean 'kB'\?$"),
        ("0.0bpw", r"^budget: '0\.0bpw' leaves nothing\. Write '3\.2bpw' or '4\.5GB'$"),
        ("-3bpw", r"^budget: '-3bpw' is no budget\. Write '3\.2bpw', '4\.5GB' or '800MiB'$"),
        ("1e3MB", r"^budget: '1e3MB' is no budget\."),
        ("3,2bpw", r"^budget: '3,2bpw' is no budget\."),
        ("", r"^budget: '' is no budget\."),
        (3.2, r"^budget: 3\.2 is no budget\."),
    ],
)
def test_what_is_no_budget(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Budget.read(text)
