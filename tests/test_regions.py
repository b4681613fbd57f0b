"""Regions: who is refused and why, word for word; transforms that stay online; pushing what was taken out.

One long file: refusals and what stays online are shown on the same small models, captured once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import dlqc
from dlqc.capture import Captured, capture
from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import Context, Pass, PassReport
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError
from dlqc.execute import Executor, forward, placeholder
from dlqc.graph import SDPA, as_linear, aten, is_call, structure
from dlqc.motion import Kind
from dlqc.ops import TRANSFORM
from dlqc.regions import (
    Region,
    attentions,
    edge,
    edges,
    fits,
    fold,
    grow,
    insert,
    keep_online,
    push,
    query_key,
    readers,
    residual_stream,
    transform_of,
    value_heads,
)
from dlqc.serialize import decode_graph, encode_graph
from dlqc.transform import Center, Chain, Diagonal, Hadamard, Identity, Kronecker, Permutation, Transform, blocks
from dlqc.weights import Constant, Weights

VOCAB, D = 11, 8
SPEC = DiffusionSpec(VOCAB - 1, VOCAB, 32)
IDS = torch.arange(VOCAB).repeat(2)[:14].reshape(2, 7)
EXACT = 1e-12


class Net(nn.Module):
    """head(body(m, embed(ids))), with more modules and constants by name."""

    spec = SPEC

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        for tensor in self.parameters():
            tensor.data = torch.randn(tensor.shape) / (tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1)
        self.body = body

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self, self.embed(ids)))


def lin(n: int = D, out: int = D) -> nn.Linear:
    return nn.Linear(n, out)


def taken(model: nn.Module, dtype: torch.dtype = torch.float32) -> Captured:
    return capture(model.eval(), SPEC, dtype=dtype)


def run(c: Captured, dtype: torch.dtype | None = torch.float64) -> torch.Tensor:
    return forward(c.graph, c.weights, IDS, dtype=dtype)


def node_of(c: Captured, name: str) -> fx.Node:
    """A node by its name or op, or the linear on a weight."""
    for node in c.graph.nodes:
        site = as_linear(node, c.weights)
        if (site is not None and site.name == name) or node.name == name:
            return node
    return next(n for n in c.graph.nodes if n.op == "call_function" and name in str(n.target))


def good(n: int, seed: int = 0) -> Transform:
    u, _, v = torch.linalg.svd(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return blocks(u @ torch.diag(torch.linspace(0.5, 2, n, dtype=torch.float64)) @ v)


def diagonal(n: int, seed: int = 0) -> Diagonal:
    return Diagonal(0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


# Refusals


def attend(
    m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int = 2, mask: torch.Tensor | None = None
) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    angles = (torch.arange(x.shape[-2])[:, None] * 0.3 ** torch.arange(half)[None]).repeat(1, 2)
    return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angles.sin()


def halves(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, 4))


def vec(n: int = D) -> nn.Parameter:
    return nn.Parameter(torch.ones(n))


def tied(m: Net) -> Net:
    m.head.weight = m.embed.weight
    return m


def shared(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.silu(m.a(x)) + F.linear(m.a(x), m.b.weight))


REFUSALS: list[tuple[str, Callable[[], nn.Module], str, Kind, str]] = [
    ("no constant weight", lambda: Net(lambda m, x: F.linear(x, m.a.weight * 2), a=lin()), "embedding", "diagonal",
     "%linear (aten.linear): its weight is no constant"),
    ("other axis", lambda: Net(lambda m, x: m.a(halves(x).transpose(2, 3)).flatten(2), a=lin(2, 2)), "embedding",
     "orthogonal", "%linear (aten.linear): it reads the channels along another axis"),
    ("mean read", lambda: Net(lambda m, x: m.a(x), a=lin()), "embedding", "center",
     "%linear (aten.linear): it reads the mean that would be taken away"),
    ("no constant table", lambda: Net(lambda m, x: x + F.embedding(torch.arange(x.shape[1]), m.t * 2),
                                      t=nn.Parameter(torch.ones(32, D))), "embedding", "diagonal",
     "%embedding_1 (aten.embedding): its table is no constant"),
    ("broadcast operand", lambda: Net(lambda m, x: (halves(m.a(x)) + m.b(x)[..., None, :]).flatten(2), a=lin(),
                                      b=lin(D, 4)), "a", "diagonal",
     "%add (aten.add): %unsqueeze is broadcast in it"),
    ("constant of heads", lambda: Net(lambda m, x: (halves(m.a(x)) + m.t).flatten(2), a=lin(),
                                      t=nn.Parameter(torch.ones(2, 4))), "a", "diagonal",
     "%add (aten.add): constant 't' is laid out by heads"),
    ("integer constant", lambda: Net(lambda m, x: m.a(x) * m.mask, a=lin(), mask=torch.arange(D)), "mul", "diagonal",
     "%mul (aten.mul): constant 'mask' holds no real numbers"),
    ("number", lambda: Net(lambda m, x: x + 1.0), "embedding", "orthogonal",
     "%add (aten.add): it adds the same number to every channel"),
    ("one number a token", lambda: Net(lambda m, x: x - m.g(x), g=lin(D, 1)), "embedding", "diagonal",
     "%sub (aten.sub): it adds the same number to every channel"),
    ("square", lambda: Net(lambda m, x: x * x), "embedding", "diagonal",
     "%mul (aten.mul): a square takes every factor twice"),
    ("product", lambda: Net(lambda m, x: m.a(x) * m.b(x), a=lin(), b=lin()), "a", "orthogonal",
     "%mul (aten.mul): a product of channels moves only diagonals and permutations"),
    ("quotient", lambda: Net(lambda m, x: x / m.v, v=vec()), "embedding", "diagonal",
     "%div (aten.div): a quotient of channels moves nothing"),
    ("quotient by itself", lambda: Net(lambda m, x: x / x), "embedding", "diagonal",
     "%div (aten.div): a quotient of channels moves nothing"),
    ("rounding", lambda: Net(lambda m, x: x.to(torch.int64).float()), "embedding", "diagonal",
     "%to (aten.to.dtype): it rounds to integers"),
    ("gelu", lambda: Net(lambda m, x: F.gelu(x)), "embedding", "diagonal",
     "%gelu (aten.gelu): a nonlinear function of each channel moves only permutations"),
    ("relu rotated", lambda: Net(lambda m, x: F.relu(x)), "embedding", "orthogonal",
     "%relu (aten.relu): a nonlinear function of each channel moves only permutations"),
    ("gain no constant", lambda: Net(lambda m, x: F.rms_norm(x, (D,), m.v * 2), v=vec()), "embedding", "orthogonal",
     "%rms_norm (aten.rms_norm): its gain is no constant"),
    ("bias no constant", lambda: Net(lambda m, x: F.layer_norm(x, (D,), m.v, m.v * 2), v=vec()), "layer_norm",
     "diagonal", "%layer_norm (aten.layer_norm): its bias is no constant"),
    ("norm of two axes", lambda: Net(lambda m, x: F.rms_norm(halves(x), (2, 4)).flatten(2)), "embedding", "orthogonal",
     "%rms_norm (aten.rms_norm): it normalizes another axis"),
    ("size", lambda: Net(lambda m, x: m.n(x), n=nn.RMSNorm(D)), "embedding", "diagonal",
     "%rms_norm (aten.rms_norm): it divides by the size of all channels together"),
    ("no gain", lambda: Net(lambda m, x: F.rms_norm(x, (D,))), "rms_norm", "diagonal",
     "%rms_norm (aten.rms_norm): it has no gain to fold into"),
    ("gain of heads", lambda: Net(lambda m, x: m.n(halves(x)).flatten(2), n=nn.RMSNorm(4)), "flatten", "diagonal",
     "%rms_norm (aten.rms_norm): its gain is the same for all heads"),
    ("mean into a gain", lambda: Net(lambda m, x: m.n(m.n2(x)), n=nn.LayerNorm(D), n2=nn.RMSNorm(D)), "rms_norm",
     "center", "%rms_norm (aten.rms_norm): its gain does not keep the mean at zero"),
    ("mean into an rms norm", lambda: Net(lambda m, x: m.n(x), n=nn.RMSNorm(D)), "embedding", "center",
     "%rms_norm (aten.rms_norm): it reads the mean that would be taken away"),
    ("layer norm", lambda: Net(lambda m, x: m.n(x), n=nn.LayerNorm(D)), "embedding", "orthogonal",
     "%layer_norm (aten.layer_norm): a layer norm takes the mean away; run center_norms first"),
    ("gain other than one", lambda: Net(lambda m, x: m.n(x), n=nn.RMSNorm(D)), "embedding", "orthogonal",
     "%rms_norm (aten.rms_norm): its gain 'n.weight' is not one; run fold_norm_scale first"),
    ("lengths", lambda: Net(lambda m, x: F.rms_norm(x, (D,))), "embedding", "invertible",
     "%rms_norm (aten.rms_norm): it keeps lengths, which only orthogonal transforms do"),
    ("one value for all", lambda: Net(lambda m, x: m.o(attend(m, x, x, x)), o=lin()), "embedding", "orthogonal",
     "%transpose_1 (aten.transpose.int): the transform comes back to it in another form"),
    ("mean into attention", lambda: Net(lambda m, x: attend(m, x, m.a(x), m.b(x)), a=lin(), b=lin()), "embedding",
     "center", "%linear (aten.linear): it reads the mean that would be taken away"),
    ("rotary", lambda: Net(lambda m, x: turned(m.a(x)), a=lin()), "a", "orthogonal",
     "%rope_default (dlqc.rope): it turns pairs of channels; rotate after it"),
    ("scores", lambda: Net(lambda m, x: torch.softmax(m.a(x) @ x.transpose(1, 2), -1) @ x, a=lin()), "a", "orthogonal",
     "%matmul (aten.matmul): it sums over the axis that carries the transform"),
    ("broadcast values", lambda: Net(lambda m, x: m.o((torch.softmax(halves(x).transpose(1, 2) @ halves(
        x).transpose(1, 2).transpose(2, 3), -1) @ m.v(x)[:, None]).transpose(1, 2).flatten(2)), v=lin(D, 4), o=lin()),
     "flatten", "orthogonal", "%matmul_1 (aten.matmul): %unsqueeze is broadcast in it"),
    ("cut", lambda: Net(lambda m, x: m.a(x.reshape(x.shape[0], -1, 4)).reshape(x.shape), a=lin(4, 4)), "embedding",
     "orthogonal", "%reshape (aten.reshape): it cuts the channels apart"),
    ("sliced", lambda: Net(lambda m, x: torch.cat((x[..., 4:], x[..., :4]), -1)), "embedding", "diagonal",
     "%slice_1 (aten.slice): it cuts the channels apart"),
    ("summed", lambda: Net(lambda m, x: x + halves(x).sum(2, keepdim=True).expand(-1, -1, 2, -1).flatten(2)),
     "embedding", "diagonal", "%sum_1 (aten.sum.dim_IntList): it cuts the channels apart"),
    ("gathered", lambda: Net(lambda m, x: x.index_select(-1, torch.arange(D).flip(0))), "embedding", "diagonal",
     "%index_select (aten.index_select): it works along the axis that carries the transform"),
    ("fewer axes", lambda: Net(lambda m, x: x + m.a(x.mean(1))[:, None], a=lin()), "embedding", "diagonal",
     "%mean (aten.mean.dim): it changes the number of axes"),
    ("softmax", lambda: Net(lambda m, x: torch.softmax(x, -1)), "embedding", "diagonal",
     "%softmax (aten.softmax.int): no rule moves a transform of kind 'diagonal' through it"),
    ("result", lambda: Net(lambda m, x: x), "head", "diagonal", "%output (output): it is the result of the model"),
    ("read elsewhere", lambda: Net(shared, a=lin(), b=lin()), "add", "orthogonal",
     "%silu (aten.silu): a nonlinear function of each channel moves only permutations"),
    ("weight read elsewhere", lambda: Net(lambda m, x: m.b(m.a(x)) + m.b(F.silu(x)), a=lin(), b=lin()), "a",
     "orthogonal", "%linear_2 (aten.linear): it reads 'b.weight', too, and would see it changed"),
    ("tied head", lambda: tied(Net(lambda m, x: x)), "embedding", "diagonal",
     "%linear (aten.linear): constant 'head.weight' would have to change in two ways at once"),
    ("two ways", lambda: Net(lambda m, x: x + m.a(x), a=lin()), "embedding", "orthogonal",
     "%linear (aten.linear): constant 'a.weight' would have to change in two ways at once"),
    ("both factors of one value", lambda: Net(lambda m, x: (lambda y: y * (y * 2))(m.a(x)), a=lin()), "a", "diagonal",
     "%mul (aten.mul): both factors of a product would carry the diagonal"),
    ("two attentions", lambda: Net(lambda m, x: (lambda v: m.o(attend(m, x, x, v, 2)) + m.o(attend(m, x, x, v, 4)))(
        m.v(x)), v=lin(), o=lin()), "v", "orthogonal",
     "%scaled_dot_product_attention_1 (aten.scaled_dot_product_attention): it needs 4 separate heads, what came before 2"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "seed", "kind", "reason"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_refusals(make: Callable[[], nn.Module], seed: str, kind: Kind, reason: str) -> None:
    c = taken(make())
    before = (structure(c.graph), c.weights.fingerprint())
    found = grow(c.graph, c.weights, node_of(c, seed), kind)
    assert str(found) == f"stuck at {reason}"
    assert (structure(c.graph), c.weights.fingerprint()) == before


def test_nobody_reads_it() -> None:
    c = taken(Net(lambda m, x: x))
    x = node_of(c, "embedding")
    with c.graph.inserting_after(x):
        dead = c.graph.call_function(aten.neg.default, (x,))
    dead.meta["val"] = x.meta["val"]
    assert str(grow(c.graph, c.weights, dead, "diagonal")) == "stuck at %neg_default (aten.neg): nobody reads it"
    c = taken(Net(lambda m, x: F.silu(x)))
    assert str(readers(c.graph, c.weights, node_of(c, "embedding"))).endswith("nobody reads it")


def test_a_tie_to_something_outside_the_graph() -> None:
    c = taken(Net(lambda m, x: m.a(x), a=lin()))
    c.weights.define("a.weight", dataclasses.replace(c.weights["a.weight"], aliases=("a.weight", "other.weight")))
    found = grow(c.graph, c.weights, node_of(c, "a"), "diagonal")
    assert str(found) == "stuck at %linear (aten.linear): 'a.weight' is tied to 'other.weight'"


def test_a_constant_that_absorbed_may_not_carry_as_well() -> None:
    """m = p·c with c absorbing, while the sum m + p wants p to carry, too: only p may."""
    c = taken(Net(lambda m, x: (lambda p: p * m.v + p)(m.a(x)), a=lin(), v=vec()))
    region = grow(c.graph, c.weights, node_of(c, "mul"), "diagonal")
    assert isinstance(region, Region)
    assert set(region.absorbs) == {"a.weight", "a.bias", "head.weight"}


def test_the_shared_weight_on_one_value_is_read_by_both() -> None:
    c = taken(Net(lambda m, x: m.a(x) * torch.tanh(m.a(x)), a=lin()))
    region = readers(c.graph, c.weights, node_of(c, "embedding"))
    assert isinstance(region, Region)
    assert len(region.takers["a.weight"]) == 2
    before = run(c)
    keep_online(c.graph, c.weights, region, good(D))
    assert deviation(run(c), before) < EXACT


# What fits


@pytest.mark.parametrize(
    ("body", "seed", "kind", "t", "reason"),
    [
        ("plain", "embedding", "diagonal", diagonal(4), "its width is 4, the region's 8"),
        ("plain", "embedding", "diagonal", good(8), "it is not diagonal"),
        ("plain", "embedding", "orthogonal", good(8), "it is not orthogonal"),
        ("plain", "embedding", "permutation", Hadamard(8, 8), "it is not permutation"),
        ("plain", "embedding", "invertible", Center(8), "it is not invertible"),
        ("layer", "embedding", "center", diagonal(8), "it is not center"),
        ("relu", "a", "diagonal", Diagonal(torch.tensor([1.0] * 7 + [-1.0])), "it has negative entries"),
        ("relu", "a", "diagonal", Kronecker(Identity(8), Diagonal(torch.ones(1))), "it is no diagonal"),
        ("heads", "v", "orthogonal", Hadamard(8, 8), "Hadamard of width 8 is not made of 2 separate heads"),
        ("rotary", "k", "diagonal", diagonal(8), "the halves of a head differ, which rotary embeddings mix"),
    ],
)
def test_what_does_not_fit_is_refused(body: str, seed: str, kind: Kind, t: Transform, reason: str) -> None:
    c = taken(
        {
            "plain": lambda: Net(lambda m, x: x),
            "layer": lambda: Net(lambda m, x: m.n(x), n=nn.LayerNorm(D)),
            "relu": lambda: Net(lambda m, x: F.relu(m.a(x)), a=lin()),
            "heads": lambda: Net(lambda m, x: m.o(attend(m, x, x, m.v(x))), v=lin(), o=lin()),
            "rotary": lambda: Net(rotary_attention, q=lin(), k=lin()),
        }[body]()
    )
    region = grow(c.graph, c.weights, node_of(c, seed), kind)
    assert isinstance(region, Region), str(region)
    assert fits(region, t) == reason
    mark = c.weights.fingerprint()
    with pytest.raises(ContractError, match=rf"^\w+: a transform does not fit its region: {reason}\. This is a fault"):
        fold(c.weights, region, t)
    assert c.weights.fingerprint() == mark


def rotary_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = (turned(f(x).unflatten(-1, (2, 4)).transpose(1, 2)) for f in (m.q, m.k))
    return F.scaled_dot_product_attention(q, k, halves(x).transpose(1, 2)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_signs_of_an_odd_width_are_looked_at(width: int) -> None:
    c = taken(Net(lambda m, x: m.b(F.relu(m.a(x))), a=lin(D, width), b=lin(width, D)))
    region = grow(c.graph, c.weights, node_of(c, "a"), "diagonal")
    assert isinstance(region, Region)
    assert fits(region, diagonal(width)) is None
    assert fits(region, Diagonal(-torch.ones(width))) == "it has negative entries"


# Entrances


def test_the_doors_begin_where_they_say() -> None:
    c = taken(Net(lambda m, x: m.o(attend(m, m.q(x), m.k(x), m.v(x))), q=lin(), k=lin(), v=lin(), o=lin()))
    (sdpa,) = attentions(list(c.graph.nodes))
    assert is_call(sdpa, SDPA)
    for region, names in (
        (residual_stream(c.graph, c.weights, "invertible"), {"embed.weight", "q.weight", "k.weight", "v.weight"}),
        (value_heads(c.graph, c.weights, sdpa, "invertible"), {"v.weight", "v.bias", "o.weight"}),
        (query_key(c.graph, c.weights, sdpa, "invertible"), {"q.weight", "q.bias", "k.weight", "k.bias"}),
        (edge(c.graph, c.weights, node_of(c, "o"), "invertible"), {"o.weight", "o.bias", "head.weight"}),
    ):
        assert isinstance(region, Region), str(region)
        assert set(region.absorbs) == names
    assert [n.name for n in edges(list(c.graph.nodes), c.weights)] == ["embedding", "flatten", "linear_3"]


def test_a_graph_without_embedding() -> None:
    c = taken(Net(lambda m, x: x))
    node_of(c, "embedding").target = aten.add.Tensor
    assert str(residual_stream(c.graph, c.weights)) == "stuck at %output (output): the graph has no embedding"


def test_flow_leads_from_the_seed_to_the_readers() -> None:
    c = taken(Net(lambda m, x: x + m.b(F.silu(m.a(x))), a=lin(), b=lin()))
    region = residual_stream(c.graph, c.weights, "invertible")
    assert isinstance(region, Region)
    pairs = {(a.name, b.name) for a, b in region.flow.edges}
    assert pairs == {("embedding", "linear"), ("embedding", "add"), ("linear_1", "add"), ("add", "linear_2")}


# Pushing what was taken out


@pytest.mark.parametrize(
    ("body", "zero"),
    [
        (lambda m, x: m.n(x), True),
        (lambda m, x: -m.n(x) * 2, True),
        (lambda m, x: m.n(x) + m.v, False),
        (lambda m, x: (lambda y: y + m.b(F.silu(m.a(y))))(m.n(x)), False),
        (lambda m, x: m.o(attend(m, m.a(x), m.b(x), m.n(x), 2)), True),
    ],
)
def test_a_gain_moves_to_the_readers(body: Any, zero: bool) -> None:
    c = taken(Net(body, n=nn.RMSNorm(D), a=lin(), b=lin(), o=lin(), v=vec()))
    region = grow(c.graph, c.weights, node_of(c, "rms_norm"), "diagonal", upward=False)
    assert isinstance(region, Region), str(region)
    g = c.weights.value("n.weight", torch.float64).clone()
    if zero:  # nothing has to be divided by it
        g[3] = 0
        c.weights.put("n.weight", g.float())
    before = run(c)
    push(c.weights, region, Diagonal(c.weights.value("n.weight", torch.float64)))
    c.weights.put("n.weight", torch.ones(D))
    assert deviation(run(c), before) < EXACT


def test_what_takes_only_some_diagonals_takes_no_gain() -> None:
    c = taken(Net(lambda m, x: F.relu(m.n(x)), n=nn.RMSNorm(D)))
    found = grow(c.graph, c.weights, node_of(c, "rms_norm"), "diagonal", upward=False)
    reason = "a rotary embedding or relu on the way takes only some diagonals"
    assert str(found) == f"stuck at %rms_norm (aten.rms_norm): {reason}"


def test_a_gain_that_does_not_fit_is_not_pushed() -> None:
    c = taken(Net(lambda m, x: m.n(x), n=nn.RMSNorm(D)))
    region = grow(c.graph, c.weights, node_of(c, "rms_norm"), "diagonal", upward=False)
    assert isinstance(region, Region)
    message = r"^rms_norm: a transform does not pass to the readers: its width is 4, the region's 8\. This is a fault"
    with pytest.raises(ContractError, match=message):
        push(c.weights, region, diagonal(4))


# Transforms that stay online

ONLINE: dict[str, tuple[Transform, int]] = {  # transform, number of parts
    "diagonal": (diagonal(D), 1),
    "permutation": (Permutation(torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])), 1),
    "hadamard": (Hadamard(D, D), 0),
    "dense": (good(D), 1),
    "kronecker": (Kronecker(good(2), good(4, 1)), 2),
    "chain": (Chain((diagonal(D), Hadamard(D, 4), Kronecker(Identity(2), good(4)))), 2),
}


def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The product is read by two linears and by the residual sum."""
    y = F.silu(m.a(x)) * m.b(x)
    return m.c(y) + m.d(y) + y


def gated_net() -> Net:
    return Net(gated, a=lin(), b=lin(), c=lin(), d=lin())


@pytest.mark.parametrize("name", ONLINE)
def test_a_transform_online_is_one_op_and_keeps_the_function(name: str) -> None:
    t, parts = ONLINE[name]
    c = taken(gated_net())
    value = node_of(c, "mul")
    before, count, names = run(c), len(c.graph.nodes), set(c.weights)
    region = readers(c.graph, c.weights, value)
    assert isinstance(region, Region)
    node = keep_online(c.graph, c.weights, region, t)
    assert len(c.graph.nodes) == count + 1 + parts
    assert [n for n in c.graph.nodes if is_call(n, TRANSFORM)] == [node]
    assert set(c.weights) - names == {f"transform.mul.{i}" for i in range(parts)}
    assert {as_linear(u, c.weights).name for u in node.users} == {"c", "d"}  # type: ignore[union-attr]
    assert {u.target for u in value.users} == {TRANSFORM, aten.add.Tensor}  # the sum still reads the value itself
    check(c.graph, c.weights, SPEC, set(), after="keep_online")
    assert deviation(run(c), before) < EXACT
    assert deviation(run(c, None), before) < 1e-5
    x, y = Executor(c.graph, c.weights, [placeholder(c.graph)], [value, node], dtype=torch.float64)(IDS)
    assert deviation(y, x @ t.matrix()) < EXACT
    assert deviation(transform_of(node, c.weights).matrix(), t.matrix()) < 1e-15
    for extra in set(c.weights) - names:
        exact, stored = c.weights.value(extra, torch.float64), c.weights.value(extra)
        if name != "permutation":
            assert (exact.dtype, stored.dtype) == (torch.float64, torch.float32)
            assert torch.equal(exact.float(), stored)
            assert not torch.equal(exact, stored.double())
        else:
            assert stored.dtype is torch.int64


def test_the_reader_is_the_undoing() -> None:
    """A planted error: readers that do not undo."""
    c = taken(gated_net())
    before = run(c)
    insert(c.graph, c.weights, node_of(c, "mul"), good(D), [node_of(c, "c")])
    assert deviation(run(c), before) > 1e-3


def test_names_never_collide() -> None:
    c = taken(gated_net())
    value, users = node_of(c, "mul"), [node_of(c, "c"), node_of(c, "d")]
    before = run(c)
    ts = [diagonal(D, 1), diagonal(D, 2), Diagonal(1 / (diagonal(D, 1).v * diagonal(D, 2).v))]
    node = value
    for t in ts:
        node = insert(c.graph, c.weights, node, t, users)
    assert deviation(run(c), before) < EXACT
    again = insert(c.graph, c.weights, value, diagonal(D), [u for u in value.users if is_call(u, TRANSFORM)])
    assert len({n for n in c.weights if n.startswith("transform")}) == 4
    assert again in value.users


@pytest.mark.parametrize("name", ONLINE)
def test_a_graph_in_half_precision(name: str) -> None:
    c = taken(gated_net().to(torch.bfloat16), torch.bfloat16)
    before = run(c, None)
    region = readers(c.graph, c.weights, node_of(c, "mul"))
    assert isinstance(region, Region)
    node = keep_online(c.graph, c.weights, region, ONLINE[name][0])
    assert node.meta["val"].dtype is torch.bfloat16
    check(c.graph, c.weights, SPEC, set(), after="keep_online")
    after = run(c, None)
    assert after.dtype is torch.bfloat16
    assert deviation(after, before) < 0.05


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_transform_survives_the_file(name: str) -> None:
    c = taken(gated_net())
    region = readers(c.graph, c.weights, node_of(c, "mul"))
    assert isinstance(region, Region)
    keep_online(c.graph, c.weights, region, ONLINE[name][0])
    graph = decode_graph(json.loads(json.dumps(encode_graph(c.graph))), SPEC)
    stored = Weights({n: Constant(c.weights.value(n)) for n in c.weights})
    check(graph, stored, SPEC, set(), after="decode")
    assert torch.equal(forward(graph, stored, IDS), run(c, None))
    assert deviation(forward(graph, stored, IDS, dtype=torch.float64), run(c)) < 1e-5


@dataclasses.dataclass(frozen=True)
class Online(Pass):
    """Rotates the input of every linear `down` online, for the test."""

    name: ClassVar[str] = "online"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    preserves: ClassVar[Any] = "exact"

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for value in edges(ctx.nodes(graph), ctx.weights):
            if is_call(value, aten.mul.Tensor):
                region = readers(graph, ctx.weights, value)
                assert isinstance(region, Region)
                t = Chain((Hadamard(D, D), Kronecker(good(2), good(4))))
                keep_online(graph, ctx.weights, region, t)
                report.sites += 1
        return report


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compile_with_a_transform_before_a_linear(backend: str, tmp_path: Any) -> None:
    model = gated_net().eval()
    with torch.no_grad():
        eager = model(IDS)
    compiled = dlqc.compile(model, [Online()], backend=backend, progress=False)
    assert compiled.report.steps[0].sites == 1
    assert compiled.report.steps[0].certificate < EXACT
    assert deviation(compiled(IDS), eager) < 1e-5
    compiled.save(tmp_path / "artifact")
    assert torch.equal(dlqc.load(tmp_path / "artifact", backend=backend)(IDS), compiled(IDS))
