"""straight_through: the value is the quantizer's, the gradient that of a function which scales as the quantizer does."""

from __future__ import annotations

import pytest
import torch

from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.straight_through import quantized_activations, quantized_weight, straight_through

SHAPE = (6, 32)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x with one large channel, and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    x[:, 3] *= 10
    return x.requires_grad_(), torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("fmt", [ActFormat(4), ActFormat(8, 8), ActFormat(4, symmetric=False), ActFormat(3, 16, False)])
@pytest.mark.parametrize("scale", [False, True])
def test_activations(fmt: ActFormat, scale: bool) -> None:
    """Q((1 + ε)·x) = (1 + ε)·Q(x), so the derivative in the direction x is Q(x) itself where the scale is seen."""
    x, v = pair()
    y = quantized_activations(x, fmt, scale=scale)
    exact = fmt.fake_quantize(x.detach())
    assert torch.allclose(y, exact, atol=1e-5)
    (g,) = torch.autograd.grad((y * v).sum(), x)
    expected = exact if scale else x.detach()
    assert float((g * x.detach()).sum()) == pytest.approx(float((v * expected).sum()), rel=1e-4)
    assert torch.equal(g, v) is not scale


@pytest.mark.parametrize("fmt", [IntFormat(4, None), IntFormat(2, 16), IntFormat(3, 8, symmetric=False)])
@pytest.mark.parametrize("scale", [False, True])
def test_weights(fmt: IntFormat, scale: bool) -> None:
    w, v = pair(1)
    y = quantized_weight(w, fmt, scale=scale)
    exact = fmt.quantize(w.detach()).dequantize()
    assert torch.allclose(y, exact, atol=1e-5)
    (g,) = torch.autograd.grad((y * v).sum(), w)
    expected = exact if scale else w.detach()
    assert float((g * w.detach()).sum()) == pytest.approx(float((v * expected).sum()), rel=1e-4)


def test_the_range_gets_the_gradient_of_the_error() -> None:
    """Only the largest channel of a token sets its step: elsewhere the gradient goes straight through."""
    x, v = pair()
    (g,) = torch.autograd.grad((quantized_activations(x, ActFormat(4)) * v).sum(), x)
    assert torch.nonzero(g != v)[:, 1].tolist() == x.detach().abs().argmax(dim=1).tolist()


def test_without_a_format_nothing_happens() -> None:
    x, _ = pair()
    assert quantized_activations(x, None) is x
    assert quantized_weight(x, None) is x


def test_zeros_stay_finite() -> None:
    x = torch.zeros(SHAPE, requires_grad=True)
    (g,) = torch.autograd.grad(quantized_activations(x, ActFormat(4)).sum(), x)
    assert torch.equal(g, torch.ones(SHAPE))


def test_a_rounding_keeps_its_value_to_the_last_bit() -> None:
    x = (torch.randn(1000) * 37).requires_grad_()
    y = straight_through(x, torch.round)
    assert torch.equal(y, x.detach().round())
    (g,) = torch.autograd.grad((y * torch.arange(1000.0)).sum(), x)
    assert torch.equal(g, torch.arange(1000.0))
