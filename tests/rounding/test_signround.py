"""SignRound: the published update restated number by number, exhaustive search, and what it promises about its start."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.rounding.signround import SignRound


@dataclass
class Layer:
    """The objective of one linear on rows x that come in parts: mean of ‖x·Ŵᵀ - x·Wᵀ‖² over rows."""

    weight: Tensor
    x: list[Tensor]
    seen: list[Tensor] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    @property
    def parts(self) -> int:
        return len(self.x)

    def loss(self, part: int, weights: Mapping[str, Tensor]) -> Tensor:
        self.seen.append(weights["w"].detach().clone())
        self.asked.append(part)
        return self._error(part, weights["w"])

    def total(self, weights: Mapping[str, Tensor]) -> float:
        return sum(float(self._error(i, weights["w"].detach())) for i in range(self.parts)) / self.parts

    def _error(self, part: int, found: Tensor) -> Tensor:
        return ((found - self.weight) @ self.x[part].T).square().sum() / len(self.x[part])


def problem(rows: int, columns: int, parts: int = 1, seed: int = 0) -> Layer:
    """Correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(parts, 4 * columns, columns, generator=generator) @ mix
    x[..., ::5] *= 3
    return Layer(torch.randn(rows, columns, generator=generator), list(x))


def run(layer: Layer, fmt: IntFormat, options: SignRound, seed: int = 0) -> tuple[QuantizedWeight, dict[str, float]]:
    found, numbers = options.round_block({"w": layer.weight}, {"w": fmt}, layer, seed)
    weight = found["w"].weight
    assert isinstance(weight, QuantizedWeight)
    assert numbers["block_loss"] == pytest.approx(layer.total({"w": weight.dequantize()}), rel=1e-4, abs=1e-7)
    return weight, numbers


def published(layer: Layer, bits: int, group: int, symmetric: bool, steps: int, lr: float) -> list[Tensor]:
    """Ŵ of steps 0, 1, … by the equations of the paper and the chain rule, a weight at a time; round has the gradient of 1."""
    top, mid = 2**bits - 1, 2 ** (bits - 1)
    w, x = layer.weight.double(), layer.x[0].double()
    rows, columns = w.shape
    v = torch.zeros_like(w)
    alpha, beta = (torch.ones(rows, columns // group, dtype=torch.float64) for _ in range(2))
    found = []
    for step in range(steps):
        rounded, inside = torch.zeros_like(w), torch.zeros_like(w)
        scale, zero = torch.zeros_like(alpha), torch.zeros_like(alpha)
        for n, k in itertools.product(range(rows), range(columns)):
            g = k // group
            part = w[n, g * group : (g + 1) * group]
            low, high = part.min().item() * alpha[n, g].item(), part.max().item() * beta[n, g].item()
            if symmetric:
                scale[n, g], zero[n, g] = 2 * max(-low, high) / top, mid
            else:
                scale[n, g] = (max(high, 0) - min(low, 0)) / top
                zero[n, g] = round(-min(low, 0) / scale[n, g].item())
            s, z = scale[n, g].item(), zero[n, g].item()
            # In float32: on a symmetric grid the largest weight of a group is a tie.
            code = round(float(w[n, k].float() / scale[n, g].float() + v[n, k].float())) + z
            inside[n, k] = float(0 <= code <= top)
            rounded[n, k] = s * (min(max(code, 0), top) - z)
        found.append(rounded)
        upstream = 2 / len(x) * (rounded - w) @ x.T @ x
        slopes = [torch.zeros_like(alpha), torch.zeros_like(alpha)]
        new = v.clone()
        for n, k in itertools.product(range(rows), range(columns)):
            g, up, s = k // group, upstream[n, k].item(), scale[n, k // group].item()
            part = w[n, g * group : (g + 1) * group]
            new[n, k] -= lr * (1 - step / steps) * math.copysign(1, up * s) * float(up * s * inside[n, k].item() != 0)
            ends = (part.min().item(), part.max().item())
            # ∂ŵ/∂s with z held: (code - z) + s·∂code/∂s, code following w/s only inside.
            by_scale = rounded[n, k].item() / s - inside[n, k].item() * w[n, k].item() / s
            by_zero = s * (inside[n, k].item() - 1)
            for i, end in enumerate(ends):
                if symmetric:
                    larger = 0 if -ends[0] * alpha[n, g].item() > ends[1] * beta[n, g].item() else 1
                    slope = by_scale * 2 * abs(end) / top if i == larger else 0.0
                else:
                    by_end = (-1 if i == 0 else 1) / top
                    low = ends[0] * alpha[n, g].item()
                    zero_by_end = low / s**2 * by_end - (1 / s if i == 0 else 0)
                    slope = end * (by_scale * by_end + by_zero * zero_by_end)
                slopes[i][n, g] += up * slope
        v = new.clamp(-0.5, 0.5)
        alpha, beta = (
            (p - lr * (1 - step / steps) * d.sign()).clamp(0, 1) for p, d in zip((alpha, beta), slopes, strict=True)
        )
    return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 4), (4, 8)])
def test_the_steps_are_those_of_the_paper(bits: int, group: int, symmetric: bool) -> None:
    layer = problem(3, 8, seed=bits)
    fmt = IntFormat(bits, group, symmetric, "float32")
    lr = 0.27  # V ends near ½ and not on it, where the largest weight of a group would be a tie
    expected = published(layer, bits, group, symmetric, 3, lr)
    run(layer, fmt, SignRound(steps=3, lr=lr, looks=1))
    assert len(layer.seen) == 3
    for found, wanted in zip(layer.seen, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.seen[1], layer.seen[0])
    torch.testing.assert_close(layer.seen[0], fmt.quantize(layer.weight).dequantize(), rtol=1e-6, atol=1e-6)


def test_reaches_the_best_of_all_roundings_up_and_down() -> None:
    """2 x 3 weights, each to one of its two neighbours on a fixed grid: 64 choices."""
    fmt = IntFormat(3, 3, False, "float32")
    reached = 0
    for seed in range(8):
        layer = problem(2, 3, seed=seed)
        scales, zeros = fmt.parameters(layer.weight)
        assert zeros is not None
        low = torch.floor(layer.weight / scales)
        losses = []
        for ups in itertools.product((0.0, 1.0), repeat=6):
            code = (low + torch.tensor(ups).reshape(2, 3) + zeros).clamp(0, 7)
            losses.append(layer.total({"w": (code - zeros) * scales}))
        _, numbers = run(layer, fmt, SignRound(steps=100, ranges=False, looks=100))
        assert numbers["block_loss"] >= min(losses) * (1 - 1e-5)
        assert numbers["block_loss"] <= numbers["block_loss_start"] * (1 + 1e-6)
        reached += numbers["block_loss"] <= min(losses) * (1 + 1e-5)
        assert numbers["block_loss"] <= sorted(losses)[8]
    assert reached >= 6


def test_beats_nearest_rounding_where_errors_can_cancel() -> None:
    """All inputs are alike, so only the sum of a row's weights matters; nearest rounding sends them all one way.

    The weights differ, or else signed gradients would move them all at once.
    """
    weight = torch.linspace(0.1, 0.48, 16).expand(4, 16).clone()
    weight[:, 0], weight[:, 1] = 3.0, -4.0
    layer = Layer(weight, [torch.ones(8, 16)])
    fmt = IntFormat(3, None, False, "float32")
    _, numbers = run(layer, fmt, SignRound(ranges=False))
    assert numbers["block_loss_start"] > 30
    assert numbers["block_loss"] < 2


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from(["normal", "constant", "zero", "positive", "dead inputs"]),
    st.integers(0, 2**31),
)
def test_never_worse_than_its_start(
    rows: int, group: int, groups: int, bits: int, symmetric: bool, kind: str, seed: int
) -> None:
    layer = problem(rows, group * groups, parts=2, seed=seed)
    weight = layer.weight
    others = {"constant": weight[:, :1].expand_as(weight).clone(), "zero": 0 * weight, "positive": weight.abs() + 2}
    layer.weight = others.get(kind, weight)
    if kind == "dead inputs":
        layer.x = [x * (torch.arange(group * groups) % 2) for x in layer.x]
    fmt = IntFormat(bits, group, symmetric)
    found, numbers = run(layer, fmt, SignRound(steps=12, lr=0.1, looks=4))
    begin = fmt.quantize(layer.weight)
    first = layer.total({"w": begin.dequantize()})
    assert numbers["block_loss_start"] == pytest.approx(first, rel=1e-4, abs=1e-6)
    assert layer.total({"w": found.dequantize()}) <= first * (1 + 1e-4) + 1e-6
    if kind == "zero":
        assert not bool(found.dequantize().any())


def test_a_weight_of_zero_stays_zero() -> None:
    layer = problem(8, 32)
    layer.weight[torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    for symmetric in (False, True):
        found, _ = run(layer, IntFormat(3, 16, symmetric), SignRound(steps=40, lr=0.05))
        assert not bool(found.dequantize()[layer.weight == 0].any())
        assert bool(found.dequantize()[layer.weight != 0].any())


def test_the_same_seed_gives_the_same_codes() -> None:
    fmt = IntFormat(3, 16)
    first, second, third = (problem(8, 32, parts=5) for _ in range(3))
    one, two = (run(layer, fmt, SignRound(steps=20), seed=7)[0] for layer in (first, second))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)
    own = run(third, fmt, SignRound(steps=20, seed=8), seed=7)[0]
    assert third.asked != first.asked == second.asked
    assert sorted(third.asked) == sorted(first.asked) == sorted([*range(5)] * 4)  # each part as often as the others
    assert not torch.equal(own.codes, one.codes)


def test_the_ranges_can_be_left_alone() -> None:
    layer, fmt = problem(8, 32), IntFormat(2, 16, False)
    fixed, moved = (run(problem(8, 32), fmt, SignRound(ranges=r)) for r in (False, True))
    assert torch.equal(fixed[0].scales, fmt.parameters(layer.weight)[0])
    assert not torch.equal(moved[0].scales, fixed[0].scales)
    assert moved[1]["block_loss"] < fixed[1]["block_loss"]


def test_statistics_and_states_are_asked_for_as_needed() -> None:
    assert SignRound().statistics == frozenset()
    assert (SignRound().reads(), SignRound(against="current").reads()) == ("paired", "current")
    assert (SignRound().act, SignRound(act_bits=4).act) == (None, ActFormat(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"^steps: 0 is less than 1\. Use 200$"),
        ({"looks": 0}, r"^looks: 0 is less than 1\. Use 10$"),
        ({"lr": -1.0}, r"^lr: -1\.0 is no learning rate\. Use a positive number, or None for 1/steps$"),
        ({"against": "past"}, r"^against: unknown states 'past'\. Use 'exact' or 'current'$"),
        ({"act_bits": 9}, r"^bits: 9 is not a width of an integer activation"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SignRound(**options)


def test_a_gradient_that_is_not_finite() -> None:
    layer = problem(2, 4)
    layer.loss = lambda part, weights: (weights["w"] * float("nan")).sum()  # type: ignore[method-assign]
    with pytest.raises(
        CalibrationError, match=r"^signround: the gradient of step 1 is not finite\. Check the weights and"
    ):
        run(layer, IntFormat(4, 4), SignRound())
