from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import dlqc
from dlqc.cached import CachedModel
from dlqc.capture import capture
from dlqc.compiled import build_module
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError

LENGTH = 20


def cached(name: str) -> CachedModel:
    graph, weights, spec = zoo.captured(name)
    return CachedModel(build_module(graph, weights), spec)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_a_window_on_fresh_keys_is_the_full_forward(name: str) -> None:
    model = cached(name)
    ids = torch.randint(0, zoo.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    full, cache = model(ids), model.new_cache(2, LENGTH)
    torch.testing.assert_close(model.step(ids, 0, cache), full, rtol=1e-4, atol=1e-4)
    for start, stop in ((0, 5), (7, 8), (13, LENGTH)):
        rows = model.step(ids[:, start:stop], start, cache)
        torch.testing.assert_close(rows, full[:, start:stop], rtol=1e-4, atol=1e-4)


def test_other_tokens_meet_the_old_keys() -> None:
    """The window writes its own keys and leaves the others; the next full pass replaces them all."""
    model = cached("llada")
    ids = torch.randint(0, zoo.VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(1, LENGTH)
    model.step(ids, 0, cache)
    before = [k.clone() for k in cache.keys]
    changed = ids.clone()
    changed[0, 5:8] = (changed[0, 5:8] + 1) % zoo.VOCAB
    rows = model.step(changed[:, 5:8], 5, cache)
    for old, new in zip(before, cache.keys, strict=True):
        assert torch.equal(old[:, :, :5], new[:, :, :5])
        assert torch.equal(old[:, :, 8:], new[:, :, 8:])
        assert not torch.equal(old[:, :, 5:8], new[:, :, 5:8])
    exact = model(changed)[:, 5:8]
    assert float((rows - exact).abs().max()) > 1e-3  # later layers saw stale neighbours
    model.step(changed, 0, cache)
    torch.testing.assert_close(model.step(changed[:, 5:8], 5, cache), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in sorted(zoo.ZOO) if n not in ("bert", "gpt2")])
def test_padding_on_the_left_is_not_seen(name: str) -> None:
    model = cached(name)
    ids = torch.randint(0, zoo.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    visible = torch.ones(2, LENGTH, dtype=torch.bool)
    visible[1, :6] = False
    found = model.padded(ids, visible)
    torch.testing.assert_close(found[0], model(ids[:1])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, 6:], model(ids[1:, 6:])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_absolute_positions_cannot_be_padded(name: str) -> None:
    model = cached(name)
    assert model.pads is not None
    with pytest.raises(FeasibilityError, match=r"visible: %add\w* reads absolute positions, which padding would move"):
        model.padded(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("recipe", ["quantize_weights(group_size=32, method=rtn), pack, lower", "w8a8-rtn"])
def test_both_variants_of_a_quantized_model_read_one_set_of_buffers(recipe: str) -> None:
    model = dlqc.compile(zoo.model("llada"), recipe, progress=False)
    held = {b.data_ptr() for b in model.module.buffers()}
    step = model.cached._step
    assert {b.data_ptr() for b in step.buffers()} <= held
    ids = torch.randint(0, zoo.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    cache = model.cached.new_cache(2, LENGTH)
    full = model(ids)
    model.cached.step(ids, 0, cache)
    rows = model.cached.step(ids[:, 4:12], 4, cache)
    deviation = float((rows - full[:, 4:12]).square().mean().sqrt() / full.square().mean().sqrt())
    assert deviation < 2e-2, deviation


class Base(nn.Module):
    """An embedding, attention that a subclass may spoil, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = DiffusionSpec(mask_id=7, vocab_size=8, max_length=32)
        rng = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(8, 16, generator=rng))
        self.mix = nn.Parameter(torch.randn(16, 16, generator=rng) / 4)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)

    def attend(self, x: Tensor, **options: Any) -> Tensor:
        q, k, v = self.heads(x), self.heads(x @ self.mix), self.heads(x)
        y = nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return y.transpose(1, 2).reshape(x.shape)

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.attend(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(nn.functional.embedding(ids, self.embed), ids) @ self.embed.T


class Causal(Base):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.attend(x, is_causal=True)


class Window(Base):
    """An additive mask that depends on the distance."""

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        far = (at[:, None] - at).abs() > 3
        return x + self.attend(x, attn_mask=torch.zeros(far.shape).masked_fill(far, -torch.inf))


@pytest.mark.parametrize("kind", [Causal, Window])
def test_masks_are_cut_to_the_window(kind: type[Base]) -> None:
    source = kind()
    captured = capture(source, source.spec)
    model = CachedModel(build_module(captured.graph, captured.weights), source.spec)
    ids = torch.randint(0, 8, (2, 16), generator=torch.Generator().manual_seed(4))
    cache = model.new_cache(2, 16)
    model.step(ids, 0, cache)
    torch.testing.assert_close(model.step(ids[:, 5:9], 5, cache), source(ids)[:, 5:9])
    at = torch.arange(16)
    seen = at[:, None] >= at if kind is Causal else (at[:, None] - at).abs() <= 3
    assert torch.equal(model.mask(16), seen)
    assert model.pads is not None


class Pooled(Base):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.attend(x) + x.mean(1, keepdim=True)


class Summed(Base):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.attend(x) + x.cumsum(1)


class Scored(Base):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + (x @ x.transpose(1, 2)).softmax(-1) @ x + self.attend(x)


class Biased(Base):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        return self.attend(x) + (at[:, None] == at).float() @ x


class Hiding(Base):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.attend(x, attn_mask=(ids != 3)[:, None, None, :])


class Plain(Base):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + x @ self.mix


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Pooled, "mean: aten.mean.dim joins all positions. Decode without a cache: cache='none'"),
        (Summed, "cumsum: aten.cumsum.default gives other values for a window than for all positions (by"),
        (Scored, "relates positions with each other outside of an attention op"),
        (Biased, "a table over pairs of positions enters matmul_1, which is no attention op"),
        (Hiding, "the attention mask depends on which tokens the row holds"),
        (Plain, "graph: the graph has no attention, so nothing to cache"),
    ],
)
def test_what_mixes_positions_otherwise_is_refused_by_name(kind: Callable[[], Base], message: str) -> None:
    source = kind()
    captured = capture(source, source.spec)
    with pytest.raises(FeasibilityError) as caught:
        CachedModel(build_module(captured.graph, captured.weights), source.spec)
    assert message in str(caught.value)


def test_windows_outside_of_the_cache_are_refused() -> None:
    model = cached("llada")
    cache = model.new_cache(1, 8)
    with pytest.raises(FeasibilityError, match=r"window: positions 6 to 10 of 8, the cache holds 8. Keep start"):
        model.step(torch.zeros(1, 4, dtype=torch.long), 6, cache)
