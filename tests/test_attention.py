"""Attention spelled out, against torch's own in float64, and its rounding against the formula number by number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc import attention, ops

LENGTH = 12


def block_causal(block: int = 4) -> Tensor:
    """Every token sees its block and those before it."""
    part = torch.arange(LENGTH) // block
    return part[:, None] >= part[None, :]


def closed() -> Tensor:
    """Row 3 sees nothing."""
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[0, :, 3] = False
    return mask


MASKS: dict[str, Tensor | None] = {
    "full": None,
    "block causal": block_causal(),
    "padded": (torch.arange(LENGTH) < torch.tensor([7, 12])[:, None])[:, None, None, :],
    "by head": torch.rand(2, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.7,
    "added": torch.randn(1, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)),
    "added, closed": torch.zeros(LENGTH, LENGTH).masked_fill(~block_causal(), -torch.inf),
    "a closed row": closed(),
}


def qkv(kv_heads: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, LENGTH, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, LENGTH, 8, generator=g, dtype=torch.float64) for _ in range(2))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
def test_without_rounding_it_is_what_torch_computes(kv_heads: int, scale: float | None, mask: str) -> None:
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        q, k, v = qkv(kv_heads, dtype)
        given = MASKS.get(mask)
        added = given.to(dtype) if given is not None and given.is_floating_point() else given
        causal = mask == "causal"
        expected = F.scaled_dot_product_attention(q, k, v, added, is_causal=causal, scale=scale, enable_gqa=True)
        found = ops.attention(q, k, v, added, causal, scale, 0, False)
        assert found.dtype is dtype
        assert float((found - expected).abs().max() / expected.abs().max()) < bound
        other = ops.attention(q, k.flip(1) if kv_heads > 1 else -k, v, added, causal, scale, 0, False)
        assert float((other - expected).abs().max()) > 0.1, "the bound can fail"


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bits: int, by_row: bool) -> Tensor:
    """One query after another, from the docstring."""
    top, out = 2**bits - 1, torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                s = k[b, kv] @ q[b, h, i] * q.shape[3] ** -0.5
                if mask is not None:
                    seen = mask.expand(q.shape[0], q.shape[1], LENGTH, LENGTH)[b, h, i]
                    s = s.masked_fill(~seen, -torch.inf)
                if bool((s == -torch.inf).all()):
                    continue
                raised = (s - s.max()).exp()
                p = (
                    (raised * top).round() / top / raised.sum()
                    if by_row
                    else (raised / raised.sum() * top).round() / top
                )
                out[b, h, i] = p @ v[b, kv]
    return out


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("mask", ["full", "block causal", "a closed row"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_probabilities(mask: str, bits: int, by_row: bool) -> None:
    q, k, v = qkv(2, torch.float64)
    found = ops.attention(q, k, v, MASKS[mask], False, None, bits, by_row)
    expected = naive(q, k, v, MASKS[mask], bits, by_row)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert float((found - ops.attention(q, k, v, MASKS[mask], False, None, 0, False)).abs().max()) > 2.0**-bits / 20


def test_every_probability_is_a_code_and_off_by_half_a_step_at_most() -> None:
    q, k, _ = qkv(4, torch.float64)
    found = attention.scores(q, k, None, False, None)
    p = attention.rounded(found, 8, False)
    assert bool(((p * 255).round() - p * 255).abs().max() < 1e-12)
    assert float((p - attention.probabilities(found)).abs().max()) <= 1 / 510 + 1e-15


def test_an_even_attention_over_many_tokens_is_lost_unless_rows_are_rounded_before_their_sum() -> None:
    q, k, v = torch.zeros(1, 1, 600, 8), torch.zeros(1, 1, 600, 8), torch.ones(1, 1, 600, 8)
    assert bool((ops.attention(q, k, v, None, False, None, 8, False) == 0).all())
    torch.testing.assert_close(ops.attention(q, k, v, None, False, None, 8, True), v)
    few = ops.attention(q[:, :, :400], k[:, :, :400], v[:, :, :400], None, False, None, 8, False)
    assert float(few.mean()) == pytest.approx(400 / 255, rel=1e-5)  # 0.6 of a step is a whole one


@pytest.mark.parametrize("chunk", [1 << 24, 300])
@pytest.mark.parametrize("mask", list(MASKS))
def test_column_mass(mask: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CHUNK", chunk)
    q, k, _ = qkv(2, torch.float64)
    c = torch.rand(2, LENGTH)
    found = attention.column_mass(q, k, MASKS[mask], False, None, c)
    p = attention.probabilities(attention.scores(q, k, MASKS[mask], False, None))
    expected = torch.zeros(2, LENGTH, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for i in range(LENGTH):
                expected[b] += float(c[b, i]) * p[b, h, i]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_column_mass_of_a_causal_attention_falls_on_the_first_tokens() -> None:
    q, k = torch.zeros(1, 2, LENGTH, 8), torch.zeros(1, 2, LENGTH, 8)
    found = attention.column_mass(q, k, None, True, None, torch.ones(1, LENGTH))[0]
    expected = torch.tensor([sum(2 / (i + 1) for i in range(j, LENGTH)) for j in range(LENGTH)])
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)
    assert float(found.sum()) == pytest.approx(2 * LENGTH)
