"""Canonical form, rule by rule: what is rewritten, what looks alike and must stay, and that nothing else changes.

One long file: a rule is a short test, and the rules share the models that spell things out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dlqc import canonical, capture
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.execute import forward, mask_class
from dlqc.graph import LINEAR, RMS_NORM, SDPA, arg, fingerprint, is_call
from dlqc.ops import ROPE
from dlqc.weights import Weights

VOCAB, D, LENGTH = 23, 16, 96
SPEC = DiffusionSpec(VOCAB - 1, VOCAB, LENGTH)
aten = torch.ops.aten

Body = Callable[["Toy", Tensor], Tensor]


class Toy(nn.Module):
    """An embedding [V, 16], then `body(self, x [B, L, 16])`; some weights for it to use."""

    def __init__(self, body: Body, ids: bool = False) -> None:
        super().__init__()
        self.body, self.takes_ids = body, ids
        self.embed, self.gain = nn.Embedding(VOCAB, D), nn.Parameter(torch.randn(D))
        self.fused, self.bare = nn.Linear(D, 48), nn.Linear(D, 48, bias=False)
        self.wide, self.square = nn.Parameter(torch.randn(D, 48)), nn.Parameter(torch.randn(D, D))
        self.quarter, self.eight = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("tril", torch.ones(LENGTH + 1, LENGTH + 1, dtype=torch.bool).tril())

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self, ids) if self.takes_ids else self.body(self, self.embed(ids))


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[fx.Graph, Weights]]:
    """raw(body): the graph as torch.export gives it, no rule applied."""

    def make(body: Body, *, ids: bool = False) -> tuple[fx.Graph, Weights]:
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            patch.setattr(capture, "canonicalize", lambda graph, weights: {})
            found = capture.capture(Toy(body, ids), SPEC)
        return found.graph, found.weights

    return make


@pytest.fixture
def rewrite(raw: Any) -> Callable[..., tuple[fx.Graph, Weights, dict[str, int]]]:
    """rewrite(body): the canonical graph, checked to compute in float64 what the raw one does."""

    def run(body: Body, *, ids: bool = False) -> tuple[fx.Graph, Weights, dict[str, int]]:
        graph, weights = raw(body, ids=ids)
        tokens = [torch.randint(0, VOCAB, shape) for shape in ((1, 2), (2, 7), (3, 90))]
        before = [forward(graph, weights, t, dtype=torch.float64) for t in tokens]
        counts = canonical.canonicalize(graph, weights)
        graph.lint()
        for token, value in zip(tokens, before, strict=True):
            after = forward(graph, weights, token, dtype=torch.float64)
            assert after.dtype is value.dtype
            torch.testing.assert_close(after, value, rtol=1e-12, atol=1e-12)
        return graph, weights, counts

    return run


def count(graph: fx.Graph, *targets: object) -> int:
    return sum(is_call(node, *targets) for node in graph.nodes)


def names(graph: fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes)


# Norms


def rms(x: Tensor, dim: int = -1, power: float = 2, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + eps)


NORMS: dict[str, tuple[Body, int]] = {
    "gain": (lambda m, x: m.gain * rms(x), 1),
    "gain on the right": (lambda m, x: rms(x) * m.gain, 1),
    "no gain": (lambda m, x: rms(x) + 1, 1),
    "product for square": (lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6), 1),
    "casts": (lambda m, x: m.gain * rms(x.float()).to(x.dtype), 1),
    "gain plus one": (lambda m, x: rms(x) * (1.0 + m.gain), 1),
    "two norms": (lambda m, x: m.gain * rms(rms(x) * m.gain), 2),
    "wrong dim": (lambda m, x: m.gain * rms(x, dim=1), 0),
    "mean without keepdim": (lambda m, x: (x[..., 0] * torch.rsqrt(x.pow(2).mean(-1) + 1e-6))[..., None], 0),
    "weighted eps": (lambda m, x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2)), 0),
    "other power": (lambda m, x: rms(x.abs(), power=1) * m.gain, 0),
    "product of two": (lambda m, x: x * torch.rsqrt((x * m.gain).mean(-1, keepdim=True).abs() + 1e-6), 0),
    "other value scaled": (lambda m, x: m.gain * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 0),
    "rsqrt read twice": (lambda m, x: (lambda r: x * r + r)(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), 0),
    "layer norm": (lambda m, x: F.layer_norm(x, [D], m.gain), 0),
}


@pytest.mark.parametrize("name", NORMS)
def test_rms_norm(rewrite: Any, name: str) -> None:
    body, wanted = NORMS[name]
    graph, _, counts = rewrite(body)
    assert counts["raise_rms_norm"] == count(graph, RMS_NORM) == wanted
    assert ("rsqrt" in names(graph)) == (wanted == 0 and name != "layer norm")


@pytest.mark.parametrize(
    ("name", "gain"), [("gain", True), ("no gain", False), ("casts", True), ("gain plus one", True)]
)
def test_gain_of_the_norm(rewrite: Any, name: str, gain: bool) -> None:
    graph, _, _ = rewrite(NORMS[name][0])
    norm = next(node for node in graph.nodes if is_call(node, RMS_NORM))
    assert (arg(norm, 2, "weight") is not None) == gain
    assert norm.args[1] == [D]
    assert norm.args[3] == 1e-6


def test_value_before_the_gain_stays_where_others_read_it(rewrite: Any) -> None:
    graph, _, counts = rewrite(lambda m, x: (lambda y: y * m.gain + y.tanh())(rms(x)))
    assert counts["raise_rms_norm"] == 1
    assert arg(next(n for n in graph.nodes if is_call(n, RMS_NORM)), 2, "weight") is None


def test_rounding_between_norm_and_gain_stays(raw: Any) -> None:
    graph, weights = raw(lambda m, x: (rms(x).to(torch.bfloat16) * m.gain).float())
    ids = torch.randint(0, VOCAB, (2, 9))
    before = forward(graph, weights, ids)
    canonical.canonicalize(graph, weights)
    assert count(graph, RMS_NORM) == 1
    torch.testing.assert_close(forward(graph, weights, ids), before, rtol=0, atol=0)


def test_exact_casts_between_norm_and_gain_go(raw: Any) -> None:
    graph, weights = raw(lambda m, x: rms(x).double() * m.gain.double())
    ids = torch.randint(0, VOCAB, (2, 9))
    before = forward(graph, weights, ids)
    canonical.canonicalize(graph, weights)
    after = forward(graph, weights, ids)
    assert after.dtype is before.dtype
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


# Rotary embedding


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : D // 2], x[..., D // 2 :]


def tables(x: Tensor, width: int = D) -> tuple[Tensor, Tensor]:
    angle = torch.arange(x.shape[1])[:, None] / 100.0 ** torch.linspace(0, 1, width // 2).repeat(2)
    return angle.cos(), angle.sin()


def rope(x: Tensor, rotate: Callable[[Tensor], Tensor], swap: bool = False) -> Tensor:
    cos, sin = tables(x)
    return sin * rotate(x) + x * cos if swap else x * cos + rotate(x) * sin


def by_slices(x: Tensor) -> Tensor:
    low, high = halves(x)
    return torch.cat((-high, low), -1)


def by_chunks(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), 2)


def by_split(x: Tensor) -> Tensor:
    low, high = x.split(D // 2, dim=-1)
    return torch.cat((-high, low), -1)


def unequal(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 6:], x[..., :6]), -1)


def interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def odd_chunks(m: Toy, x: Tensor) -> Tensor:
    x = x[..., :15]
    low, high = x.chunk(2, -1)
    return x * 0.5 + torch.cat((-high, low), -1) * 0.25 * x.new_ones(15)


ROPES: dict[str, tuple[Body, int]] = {
    "slices": (lambda m, x: rope(x, by_slices), 1),
    "chunks": (lambda m, x: rope(x, by_chunks), 1),
    "split": (lambda m, x: rope(x, by_split), 1),
    "operands swapped": (lambda m, x: rope(x, by_slices, swap=True), 1),
    "queries and keys": (lambda m, x: rope(x, by_slices) * rope(m.fused(x)[..., :D], by_slices), 2),
    "other sign": (lambda m, x: rope(x, lambda y: -by_slices(y)), 0),
    "halves not swapped": (lambda m, x: rope(x, lambda y: torch.cat((-halves(y)[0], halves(y)[1]), -1)), 0),
    "second negative": (lambda m, x: rope(x, lambda y: torch.cat((halves(y)[1], -halves(y)[0]), -1)), 0),
    "unequal parts": (lambda m, x: rope(x, unequal), 0),
    "interleaved": (lambda m, x: rope(x, interleaved), 0),
    "other value rotated": (lambda m, x: rope(x, lambda y: by_slices(y.tanh())), 0),
    "odd width": (odd_chunks, 0),
    "difference": (lambda m, x: x * tables(x)[0] - by_slices(x) * tables(x)[1], 0),
    "weighted sum": (lambda m, x: torch.add(x * tables(x)[0], by_slices(x) * tables(x)[1], alpha=2), 0),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope(rewrite: Any, name: str) -> None:
    body, wanted = ROPES[name]
    graph, _, counts = rewrite(body)
    assert counts["raise_rope"] == count(graph, ROPE) == wanted


# Fused projections


def cut(kind: str, layer: str = "fused") -> Body:
    def body(m: Toy, x: Tensor) -> Tensor:
        y = getattr(m, layer)(x)
        q, k, v = {
            "split": lambda: y.split(16, dim=-1),
            "chunk": lambda: y.chunk(3, dim=2),
            "sizes": lambda: y.split([16, 16, 16], dim=-1),
        }[kind]()
        return q * k + v.tanh()

    return body


def uneven(m: Toy, x: Tensor) -> Tensor:
    q, k, v = m.fused(x).split([32, 8, 8], dim=-1)
    return q[..., :8] + 2 * k + 3 * v


def grouped(m: Toy, x: Tensor) -> Tensor:
    a, b, c = m.fused(x).split(20, dim=-1)
    return torch.cat((a * 2, b * 3, c * 4), -1)


@pytest.mark.parametrize("layer", ["fused", "bare"])
@pytest.mark.parametrize("kind", ["split", "chunk", "sizes"])
def test_fused_projection(rewrite: Any, kind: str, layer: str) -> None:
    graph, weights, counts = rewrite(cut(kind, layer))
    assert counts["split_fused"] == 1
    assert count(graph, LINEAR) == 3
    assert [name for name in weights if name.startswith(layer) and name.endswith("weight")] == [
        f"{layer}.rows_{i}_{i + 16}.weight" for i in (0, 16, 32)
    ]
    assert weights[f"{layer}.rows_16_32.weight"].shape == (16, D)
    assert (f"{layer}.rows_16_32.bias" in weights) == (layer == "fused")
    assert f"{layer}.weight" not in weights


def test_uneven_parts(rewrite: Any) -> None:
    _, weights, _ = rewrite(uneven)
    assert {"fused.rows_0_32.weight", "fused.rows_32_40.bias", "fused.rows_40_48.weight"} <= set(weights)


def test_last_part_of_a_split_may_be_shorter(rewrite: Any) -> None:
    _, weights, _ = rewrite(grouped)
    assert {"fused.rows_0_20.weight", "fused.rows_40_48.bias"} <= set(weights)


def test_unread_part_is_dropped(rewrite: Any) -> None:
    graph, weights, _ = rewrite(lambda m, x: m.fused(x).chunk(3, -1)[1])
    assert count(graph, LINEAR) == 1
    assert "fused.rows_0_16.weight" not in weights


def test_layer_used_twice_is_split_twice(rewrite: Any) -> None:
    body = cut("chunk")
    graph, weights, counts = rewrite(lambda m, x: body(m, body(m, x)))
    assert counts["split_fused"] == 2
    assert count(graph, LINEAR) == 6
    assert sum(name.endswith("weight") and name.startswith("fused") for name in weights) == 3


WHOLE: dict[str, Body] = {
    "read elsewhere too": lambda m, x: (lambda y: y.chunk(3, -1)[0] + y.sum(-1, keepdim=True))(m.fused(x)),
    "computed weight": lambda m, x: F.linear(x, m.fused.weight * 2).chunk(3, -1)[0],
    "computed bias": lambda m, x: F.linear(x, m.fused.weight, m.fused.bias * 2).chunk(3, -1)[0],
}


@pytest.mark.parametrize("name", WHOLE)
def test_linear_that_stays_whole(rewrite: Any, name: str) -> None:
    graph, _, counts = rewrite(WHOLE[name])
    assert counts["split_fused"] == 0
    assert count(graph, LINEAR) == 1


# Attention


def heads(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def join(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def repeat(k: Tensor, n: int) -> Tensor:
    b, h, length, d = k.shape
    return k[:, :, None, :, :].expand(b, h, n, length, d).reshape(b, h * n, length, d)


def tile(k: Tensor, n: int) -> Tensor:
    b, h, length, d = k.shape
    return k[:, None].expand(b, n, h, length, d).reshape(b, n * h, length, d)


def attend(
    m: Toy, x: Tensor, keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor], **kw: Any
) -> Tensor:
    q, k, v = heads(m.bare(x)[..., :16], 4), heads(x[..., :8], 2), heads(x[..., 8:], 2)
    return join(F.scaled_dot_product_attention(q, keys(k), values(v), **kw))


GROUPS: dict[str, tuple[Body, int]] = {
    "repeat": (lambda m, x: attend(m, x, lambda k: repeat(k, 2), lambda v: repeat(v, 2)), 1),
    "own scale": (lambda m, x: attend(m, x, lambda k: repeat(k, 2), lambda v: repeat(v, 2), scale=0.3), 1),
    "causal": (lambda m, x: attend(m, x, lambda k: repeat(k, 2), lambda v: repeat(v, 2), is_causal=True), 1),
    "tiled": (lambda m, x: attend(m, x, lambda k: tile(k, 2), lambda v: tile(v, 2)), 0),
    "keys only": (lambda m, x: attend(m, x, lambda k: repeat(k, 2), lambda v: tile(v, 2)), 0),
    "grouped already": (lambda m, x: attend(m, x, lambda k: k, lambda v: v, enable_gqa=True), 0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_queries(rewrite: Any, name: str) -> None:
    body, wanted = GROUPS[name]
    graph, _, counts = rewrite(body)
    assert counts["raise_gqa"] == wanted
    call = next(node for node in graph.nodes if is_call(node, SDPA))
    assert call.args[1].meta["val"].shape[1] == (2 if wanted or name == "grouped already" else 4)
    assert arg(call, 5, "is_causal", False) == (name == "causal")
    assert call.kwargs.get("scale") == (0.3 if name == "own scale" else None)


def narrowed(m: Toy, x: Tensor) -> Tensor:
    """Repeats one head out of two: the slice between unsqueeze and expand is no identity."""
    q, k = heads(m.bare(x)[..., :16], 4), heads(x[..., :8], 2)
    b, _, length, d = k.shape
    wide = k[:, :, None][:, 1:].expand(b, 1, 4, length, d).reshape(b, 4, length, d)
    return join(F.scaled_dot_product_attention(q, wide, wide))


def test_sliced_heads_are_no_repetition(rewrite: Any) -> None:
    _, _, counts = rewrite(narrowed)
    assert counts["raise_gqa"] == 0


def masked(make: Callable[[Toy, Tensor], Tensor | None], **kw: Any) -> Body:
    def body(m: Toy, ids: Tensor) -> Tensor:
        x = heads(m.embed(ids), 4)
        return join(F.scaled_dot_product_attention(x, x, x, attn_mask=make(m, ids), **kw))

    return body


def distance(ids: Tensor) -> Tensor:
    i = torch.arange(ids.shape[1])
    return i[:, None] - i[None, :]


def ones(ids: Tensor, **kw: Any) -> Tensor:
    return torch.ones(ids.shape[0], 1, ids.shape[1], ids.shape[1], **kw)


MASKS: dict[str, tuple[Callable[[Toy, Tensor], Tensor], str]] = {
    "all true": (lambda m, ids: ones(ids, dtype=torch.bool), "full"),
    "padding mask of ones": (lambda m, ids: torch.ones_like(ids).bool()[:, None, None, :], "full"),
    "zeros added": (lambda m, ids: ones(ids) * 0.0, "full"),
    "ones minus itself": (lambda m, ids: (1.0 - ones(ids)) * torch.finfo(torch.float32).min, "full"),
    "buffer row": (lambda m, ids: m.tril[LENGTH, : ids.shape[1]][None, None, None], "full"),
    "causal": (lambda m, ids: distance(ids) >= 0, "causal"),
    "causal buffer": (lambda m, ids: m.tril[: ids.shape[1], : ids.shape[1]], "causal"),
    "causal added": (lambda m, ids: torch.full((ids.shape[1], ids.shape[1]), -1e9).triu(1), "causal"),
    "window": (lambda m, ids: distance(ids).abs() <= 3, "other"),
    "window that shows late": (lambda m, ids: distance(ids).abs() < 80, "other"),
    "window beyond the length": (lambda m, ids: distance(ids).abs() <= 2000, "full"),
    "causal window": (lambda m, ids: (distance(ids) >= 0) & (distance(ids) < 64), "other"),
    "blocks": (lambda m, ids: (torch.arange(ids.shape[1]) // 32)[:, None] >= torch.arange(ids.shape[1]) // 32, "other"),
    "padding": (lambda m, ids: (ids != 5)[:, None, None, :], "other"),
    "bias": (lambda m, ids: ones(ids) * 0.5, "other"),
    "distance bias": (lambda m, ids: -distance(ids).abs().float(), "other"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(rewrite: Any, raw: Any, name: str) -> None:
    make, kind = MASKS[name]
    graph, weights = raw(masked(make), ids=True)
    mask = arg(next(node for node in graph.nodes if is_call(node, SDPA)), 3, "attn_mask")
    assert mask_class(graph, weights, mask) == kind
    graph, _, counts = rewrite(masked(make), ids=True)
    assert counts["drop_open_masks"] == (kind == "full")
    left = arg(next(node for node in graph.nodes if is_call(node, SDPA)), 3, "attn_mask")
    assert (left is None) == (kind == "full")


def test_mask_by_keyword_and_the_other_options_survive(rewrite: Any) -> None:
    graph, _, _ = rewrite(masked(MASKS["all true"][0], scale=0.7), ids=True)
    call = next(node for node in graph.nodes if is_call(node, SDPA))
    assert arg(call, 3, "attn_mask") is None
    assert call.kwargs.get("scale") == 0.7


def test_mask_of_a_model_without_weights_is_not_guessed() -> None:
    with torch.device("meta"):
        model = Toy(masked(MASKS["causal buffer"][0]), ids=True)
    found = capture.capture(model, SPEC)
    assert found.rewrites["drop_open_masks"] == 0


def test_mask_with_a_number_too_large_to_try_is_kept() -> None:
    spec = DiffusionSpec(VOCAB - 1, VOCAB, 1 << 17)
    model = Toy(masked(lambda m, ids: distance(ids).abs() < 5000), ids=True)
    assert capture.capture(model, spec).rewrites["drop_open_masks"] == 0


# What does nothing

NOTHING: dict[str, Body] = {
    "clone": lambda m, x: x.clone() * 2,
    "same dtype": lambda m, x: x.float().to(torch.float32).type_as(m.gain) * 2,
    "contiguous": lambda m, x: x.contiguous() * 2,
    "detach": lambda m, x: x.detach() * 2,
    "dropout": lambda m, x: F.dropout(x, 0.3, training=m.training) * 2,
    "dropout in place": lambda m, x: F.dropout(x * 1.5, 0.3, training=m.training, inplace=True),
    "plus zero": lambda m, x: (x + 0) * 2,
    "times one": lambda m, x: (x * 1.0) * 2,
    "view as it is": lambda m, x: x.view(x.shape[0], x.shape[1], D) * 2,
    "expand as it is": lambda m, x: x.expand(x.shape[0], -1, D) * 2,
    "empty cat": lambda m, x: torch.cat((torch.empty(0), x), 1) * 2,
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_goes(rewrite: Any, name: str) -> None:
    graph, _, _ = rewrite(NOTHING[name])
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert calls == ["aten.embedding.default", "aten.mul.Tensor"]


SOMETHING: dict[str, tuple[Body, object]] = {
    "rounding cast": (lambda m, x: x.to(torch.bfloat16).float(), aten.to.dtype),
    "widening cast": (lambda m, x: x.double(), aten.to.dtype),
    "reshape": (lambda m, x: x.reshape(x.shape[0], x.shape[1], 4, 4).sum(-1), aten.reshape.default),
    "broadcast": (lambda m, x: x.sum(-1, keepdim=True).expand(-1, -1, 5) * 2, aten.expand.default),
    "plus one": (lambda m, x: x + 1, aten.add.Tensor),
    "times two": (lambda m, x: x * 2, aten.mul.Tensor),
    "times one of another type": (lambda m, x: (x > 0) * 1.0, aten.mul.Tensor),
    "times a tensor of one": (lambda m, x: x * m.gain.new_ones(D), aten.mul.Tensor),
    "plus itself": (lambda m, x: x + x, aten.add.Tensor),
    "cat": (lambda m, x: torch.cat((x, x), -1), aten.cat.default),
}


@pytest.mark.parametrize("name", SOMETHING)
def test_what_does_something_stays(raw: Any, name: str) -> None:
    body, target = SOMETHING[name]
    graph, weights = raw(body)
    ids = torch.randint(0, VOCAB, (2, 9))
    before, calls = forward(graph, weights, ids), count(graph, target)
    canonical.canonicalize(graph, weights)
    after = forward(graph, weights, ids)
    assert count(graph, target) == calls > 0
    assert after.dtype is before.dtype
    assert torch.equal(after, before)


def test_dropout_that_is_always_on_stays(raw: Any) -> None:
    graph, weights = raw(lambda m, x: F.dropout(x, 0.3, training=True))
    canonical.canonicalize(graph, weights)
    assert count(graph, aten.dropout.default) == 1


# Constants that their readers change


PLUS: dict[str, tuple[Body, int]] = {
    "gain": (lambda m, x: x * (1.0 + m.gain), 1),
    "gain on the left": (lambda m, x: x * (m.gain + 1), 1),
    "read before and after": (lambda m, x: x * (1.0 + m.gain) + m.gain, 1),
    "twice": (lambda m, x: x * (1.0 + m.gain) + (1.0 + m.gain), 2),
    "widened": (lambda m, x: x * (1.0 + m.gain.double()), 1),
    "another number": (lambda m, x: x * (2.0 + m.gain), 0),
    "weighted": (lambda m, x: x * torch.add(m.gain, 1.0, alpha=2), 0),
    "narrowed": (lambda m, x: x * (1.0 + m.gain.to(torch.bfloat16)), 0),
    "computed": (lambda m, x: x * (1.0 + m.gain.tanh()), 0),
    "matrix": (lambda m, x: F.linear(x, 1.0 + m.bare.weight), 0),
    "integers": (lambda m, x: x[..., :4] * (1 + m.counts), 0),
}


@pytest.mark.parametrize("name", PLUS)
def test_one_plus_a_constant_is_a_constant(raw: Any, name: str) -> None:
    body, wanted = PLUS[name]
    graph, weights = raw(body)
    ids = torch.randint(0, VOCAB, (2, 9))
    before, constants = forward(graph, weights, ids), dict(weights)
    counts = canonical.canonicalize(graph, weights)
    assert counts["fold_plus_one"] == wanted
    assert torch.equal(forward(graph, weights, ids), before)
    made = {key: weights.value(key) for key in set(weights) - set(constants)}
    assert list(made) == (["plus_one.gain"] if wanted else [])
    assert all(torch.equal(value, 1 + constants["gain"].leaf) for value in made.values())
    others = {"read before and after", "another number", "weighted", "narrowed", "computed"}
    assert ("gain" in weights) == (name in others)


def test_one_plus_a_rounded_gain_is_not_rounded_again() -> None:
    """A gain that is stored in bfloat16 is read in float32; 1 + w would lose most of w in bfloat16."""
    torch.manual_seed(0)
    toy = Toy(lambda m, x: rms(x) * (1.0 + m.gain)).to(torch.bfloat16)
    found = capture.capture(toy, SPEC)
    assert torch.equal(found.weights.value("plus_one.gain"), 1 + toy.gain.float())
    assert found.weights.value("plus_one.gain").dtype is torch.float32


def addmm(m: Toy, x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """As GPT-2's Conv1D writes it."""
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[-1])


PRODUCTS: dict[str, tuple[Body, int]] = {
    "conv1d": (lambda m, x: addmm(m, x, m.fused.bias, m.wide), 1),
    "read twice": (lambda m, x: addmm(m, x, m.fused.bias, m.wide) + addmm(m, x.tanh(), m.fused.bias, m.wide), 2),
    "square": (lambda m, x: addmm(m, x, m.gain, m.square), 1),
    "no constant": (lambda m, x: addmm(m, x, m.fused.bias, m.wide.tanh()), 0),
    "computed bias": (lambda m, x: addmm(m, x, m.fused.bias.tanh(), m.wide), 0),
    "bias of rows": (lambda m, x: addmm(m, x, m.square[:1, :1].expand(1, 48), m.wide), 0),
    "weighted": (lambda m, x: torch.addmm(m.gain, x.view(-1, D), m.square, beta=2).view(x.shape), 0),
    "other rows": (lambda m, x: addmm(m, x, m.gain, m.square).transpose(0, 1).transpose(0, 1), 1),
    "rows moved": (lambda m, x: torch.addmm(m.gain, x.reshape(-1, D), m.square).view(x.shape[0], -1, 4, 4).sum(-1), 0),
    "half rows": (lambda m, x: torch.addmm(m.eight, x.reshape(-1, 8), m.quarter).view(x.shape), 0),
    "flat value read": (
        lambda m, x: (lambda y: y.view(*x.shape[:-1], D) + y.mean())(torch.addmm(m.gain, x.view(-1, D), m.square)),
        0,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_transposed_weight(rewrite: Any, name: str) -> None:
    body, wanted = PRODUCTS[name]
    graph, weights, counts = rewrite(body)
    assert counts["raise_addmm"] == count(graph, LINEAR) == wanted
    assert (count(graph, aten.addmm.default) > 0) == (wanted == 0)
    assert sum("transposed" in key for key in weights) == (1 if wanted else 0)


def test_a_transposed_weight_is_cut(rewrite: Any) -> None:
    graph, weights, counts = rewrite(lambda m, x: sum(addmm(m, x, m.fused.bias, m.wide).split(16, dim=-1)))
    assert (counts["raise_addmm"], counts["split_fused"], count(graph, LINEAR)) == (1, 1, 3)
    assert {"transposed.rows_16_32.wide", "fused.rows_16_32.bias"} <= set(weights)


def test_reshapes_in_a_row_are_one(rewrite: Any) -> None:
    graph, _, counts = rewrite(
        lambda m, x: x.reshape(-1, 4).reshape(*x.shape[:-1], 2, 8).reshape(*x.shape[:2], 8, 2).sum(-1)
    )
    assert counts["merge_reshapes"] == 2
    assert count(graph, aten.reshape.default) == 1


def test_a_reshape_that_others_read_stays(rewrite: Any) -> None:
    graph, _, counts = rewrite(lambda m, x: (lambda y: y.reshape(x.shape) * y.mean())(x.reshape(*x.shape[:2], 2, 8)))
    assert counts["merge_reshapes"] == 1
    assert count(graph, aten.reshape.default) == 1


def test_asserts_go(raw: Any) -> None:
    graph, weights = raw(lambda m, x: x.to(torch.float32, copy=False) * 2)
    canonical.canonicalize(graph, weights)
    assert "assert" not in names(graph)


def test_canonical_form_is_a_fixed_point(rewrite: Any) -> None:
    def body(m: Toy, x: Tensor) -> Tensor:
        return rope(m.gain * rms(cut("chunk")(m, x)), by_slices)

    graph, weights, _ = rewrite(body)
    before = fingerprint(graph, weights)
    assert not any(canonical.canonicalize(graph, weights).values())
    assert fingerprint(graph, weights) == before


def test_every_rule_is_counted(rewrite: Any) -> None:
    _, _, counts = rewrite(lambda m, x: x.clone())
    assert set(counts) == {rule.__name__ for rule in canonical.RULES}
    assert counts["drop_no_ops"] == 1


def test_a_view_of_what_contiguous_made_becomes_a_reshape(raw: Any) -> None:
    """Without the copy a view would not fit the strides; torch's own attention is written like that."""
    graph, weights = raw(
        lambda m, x: x.transpose(0, 1).contiguous().view(x.shape[1], x.shape[0], 4, 4).sum(-1).transpose(0, 1)
    )
    ids = torch.randint(0, VOCAB, (2, 9))
    before = forward(graph, weights, ids)
    assert canonical.canonicalize(graph, weights)["views_are_reshapes"] == 1
    assert torch.equal(forward(graph, weights, ids), before)
    assert count(graph, aten.contiguous.default) == count(graph, aten.clone.default) == 0
