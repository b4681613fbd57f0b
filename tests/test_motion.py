"""Motion rules: in every small model a region closes, carries what it says, and keeps the function; errors are seen.

One long file: the models are captured once, and every planted error is tried in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from dlqc import motion
from dlqc.capture import Captured, capture
from dlqc.certificate import deviation
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError
from dlqc.execute import Executor, forward, logits_node, placeholder
from dlqc.graph import LINEAR, SDPA, args_of, as_linear, copy_graph, is_call, structure
from dlqc.motion import Absorb, Carry, Choice, Kind, Rule, Site, Ties
from dlqc.regions import Refused, Region, fold, grow
from dlqc.transform import Blocks, Center, Diagonal, Permutation, Transform
from dlqc.weights import Weights

VOCAB, D = 11, 8
EXACT = 1e-12  # float64: a few hundred roundings of 1e-16, matrices of condition 4
SEEN = 1e-6

Body = Callable[["Net", torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """An embedding, a head, more modules and constants by name, and a body that uses them."""

    def __init__(self, body: Body, **parts: object) -> None:
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
        for module in self.modules():
            if getattr(module, "unit", False):
                module.weight.data = torch.ones_like(module.weight)  # type: ignore[operator, union-attr]
        self.body = body

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self, ids)


def lin(n: int = D, out: int = D, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(n, out, bias=bias)


def rms(d: int = D, *, unit: bool = False) -> nn.Module:
    norm = nn.RMSNorm(d)
    norm.unit = unit  # type: ignore[assignment]
    return norm


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding as everybody writes it."""
    half = x.shape[-1] // 2
    angles = (torch.arange(x.shape[-2])[:, None] * 0.3 ** torch.arange(half)[None]).repeat(1, 2)
    return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angles.sin()


def attention(m: Any, ids: torch.Tensor, *, kv: int = 2, rotary: str = "") -> torch.Tensor:
    x = m.embed(ids)
    q, k, v = split(m.q(x), 4), split(m.k(x), kv), split(m.v(x), kv)
    q, k = turned(q) if "q" in rotary else q, turned(k) if "k" in rotary else k
    return m.head(m.o(merge(F.scaled_dot_product_attention(q, k, v, enable_gqa=kv != 4))))


def projections(kv: int = 2) -> dict[str, nn.Module]:
    return {"q": lin(D, 16), "k": lin(D, 4 * kv), "v": lin(D, 4 * kv), "o": lin(16, D)}


def by_hand(m: Any, ids: torch.Tensor) -> torch.Tensor:
    x = m.embed(ids)
    q, k, v = (split(f(x), 2) for f in (m.q, m.k, m.v))
    return m.head(m.o(merge(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)))


def one_head(m: Any, ids: torch.Tensor) -> torch.Tensor:
    x = m.embed(ids)
    return m.head(torch.bmm(torch.softmax(torch.bmm(m.q(x), m.k(x).transpose(1, 2)), -1), m.v(x)))


def stream(m: Any, ids: torch.Tensor) -> torch.Tensor:
    """One layer, read `times` times, on a residual stream."""
    x = m.embed(ids)
    for _ in range(m.times):
        x = x + m.down(F.silu(m.gate(m.norm(x))) * m.up(m.norm(x)))
    return m.head(m.last(x))


def layer(times: int = 1, norm: Callable[[], nn.Module] | None = None) -> dict[str, Any]:
    norm = norm or functools.partial(rms, unit=True)
    return {"norm": norm(), "last": norm(), "gate": lin(), "up": lin(), "down": lin(), "times": times}


def experts(m: Any, ids: torch.Tensor) -> torch.Tensor:
    x = m.embed(ids)
    w = torch.softmax(m.router(x), -1)
    h = F.silu(m.up(x))
    return m.head(x + m.a(h) * w[..., :1] + m.b(h) * w[..., 1:])


def tie(m: Net) -> Net:
    m.head.weight = m.embed.weight
    return m


def joined(m: Any, ids: torch.Tensor) -> torch.Tensor:
    x = m.embed(ids)
    y = torch.cat((m.a(x), m.b(x)), 1)
    y = y[:, : ids.shape[1]] - y[:, ids.shape[1] :]
    return m.head(y.index_select(1, torch.arange(ids.shape[1]).flip(0))[torch.arange(ids.shape[0]).flip(0)])


def pooled(m: Any, ids: torch.Tensor) -> torch.Tensor:
    y = m.a(m.embed(ids))
    return m.head(y - y.mean(1, keepdim=True) + y.sum(1, keepdim=True).expand(y.shape))


def folded_axes(m: Any, ids: torch.Tensor) -> torch.Tensor:
    y = m.a(m.embed(ids)).reshape(ids.shape[0], ids.shape[1], 2, 4).permute(2, 0, 1, 3)
    return m.head(y.permute(1, 2, 0, 3).flatten(2).transpose(0, 1).transpose(0, 1))


def skip(m: Any, ids: torch.Tensor) -> torch.Tensor:
    y = m.a(m.embed(ids))
    return m.head(y * m.vector + y)


@dataclass(frozen=True)
class Case:
    """A model, where the transform begins, of which kinds it may be, and what closes the region."""

    make: Callable[[], nn.Module]
    seed: str
    kinds: tuple[Kind, ...]
    sources: str
    sinks: str


ANY: tuple[Kind, ...] = ("diagonal", "permutation", "orthogonal", "invertible")
BOTH: tuple[Kind, ...] = ("diagonal", "permutation")
LINEARLY: tuple[Kind, ...] = ("permutation", "orthogonal", "invertible")


def vector() -> nn.Parameter:
    return nn.Parameter(torch.ones(D))


def simple(body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: object) -> Callable[[], nn.Module]:
    """head(body(m, embed(ids)))."""
    return lambda: Net(lambda m, ids: m.head(body(m, m.embed(ids))), **parts)


CASES: dict[str, Case] = {
    "linear": Case(simple(lambda m, x: m.a(x), a=lin()), "a", ANY, "a.weight a.bias", "head.weight"),
    "upward": Case(simple(lambda m, x: -m.a(x), a=lin()), "neg", ANY, "a.weight a.bias", "head.weight"),
    "linear without bias": Case(simple(lambda m, x: m.a(x), a=lin(bias=False)), "a", ANY, "a.weight", "head.weight"),
    "embedding": Case(simple(lambda m, x: x), "embedding", ANY, "embed.weight", "head.weight"),
    "residual": Case(simple(lambda m, x: x + m.b(F.gelu(m.a(x))), a=lin(), b=lin()), "embedding", ANY,
                     "embed.weight b.weight b.bias", "a.weight head.weight"),
    "sums and factors": Case(simple(lambda m, x: -(x * 2 - m.a(F.silu(m.b(x))) / 3), a=lin(), b=lin()), "embedding",
                             ANY, "embed.weight a.weight a.bias", "b.weight head.weight"),
    "casts": Case(simple(lambda m, x: m.a(x).double().float(), a=lin()), "a", ANY, "a.weight a.bias", "head.weight"),
    "vector added": Case(simple(lambda m, x: m.v0 + x - m.v1, v0=vector(), v1=vector()), "embedding", ANY,
                         "embed.weight v0 v1", "head.weight"),
    "table of positions": Case(simple(lambda m, x: x + m.table[: x.shape[1]], table=nn.Parameter(torch.ones(32, D))),
                               "embedding", ANY, "embed.weight table", "head.weight"),
    "embedded positions": Case(simple(lambda m, x: x + m.pos(torch.arange(x.shape[1])), pos=nn.Embedding(32, D)),
                               "embedding", ANY, "embed.weight pos.weight", "head.weight"),
    "rms norm, gain one": Case(simple(lambda m, x: m.norm(x), norm=rms(unit=True)), "embedding", ("orthogonal",),
                               "embed.weight", "head.weight"),
    "rms norm, permuted": Case(simple(lambda m, x: m.norm(x), norm=rms()), "embedding", ("permutation",),
                               "embed.weight norm.weight", "head.weight"),
    "rms norm, its gain": Case(simple(lambda m, x: F.gelu(m.a(m.norm(x)))  + m.b(m.norm(x)), norm=rms(), a=lin(),
                                      b=lin()), "embedding", ("permutation",), "embed.weight norm.weight",
                               "a.weight b.weight"),
    "gain": Case(simple(lambda m, x: m.a(m.norm(x)), norm=rms(), a=lin()), "rms_norm", ("diagonal",), "norm.weight",
                 "a.weight"),
    "gain and bias": Case(simple(lambda m, x: m.a(m.norm(x)), norm=nn.LayerNorm(D), a=lin()), "layer_norm", ("diagonal",),
                          "norm.weight norm.bias", "a.weight"),
    "layer norm, permuted": Case(simple(lambda m, x: m.norm(x), norm=nn.LayerNorm(D)), "embedding", ("permutation",),
                                 "embed.weight norm.weight norm.bias", "head.weight"),
    "center": Case(lambda: Net(stream, **layer(norm=lambda: nn.LayerNorm(D))), "embedding", ("center",),
                   "embed.weight down.weight down.bias", ""),
    "norm of heads": Case(lambda: Net(lambda m, ids: m.head(m.norm(m.a(m.embed(ids)).unflatten(-1, (2, 4))).flatten(2)),
                                      a=lin(), norm=rms(4, unit=True)), "a", ("orthogonal", "permutation"),
                          "a.weight a.bias", "head.weight"),
    "gate left": Case(simple(lambda m, x: F.silu(m.a(x)) * m.b(x), a=lin(), b=lin()), "mul", ("diagonal",),
                      "b.weight b.bias", "head.weight"),
    "gate right": Case(simple(lambda m, x: m.a(x) * torch.tanh(m.b(x)), a=lin(), b=lin()), "mul", ("diagonal",),
                       "a.weight a.bias", "head.weight"),
    "two linear factors": Case(simple(lambda m, x: m.a(x) * m.b(x), a=lin(), b=lin()), "mul", ("diagonal",),
                               "b.weight b.bias", "head.weight"),
    "both factors permuted": Case(simple(lambda m, x: F.silu(m.a(x)) * m.b(x), a=lin(), b=lin()), "mul",
                                  ("permutation",), "a.weight a.bias b.weight b.bias", "head.weight"),
    "from a factor": Case(simple(lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), a=lin(), b=lin()), "a", ("diagonal",),
                          "a.weight a.bias", "head.weight"),
    "square": Case(simple(lambda m, x: F.relu(m.a(x)) * F.relu(m.a(x)), a=lin()), "mul", ("permutation",),
                   "a.weight a.bias", "head.weight"),
    "constant factor": Case(simple(lambda m, x: torch.tanh(m.a(x)) * m.vector, a=lin(), vector=vector()), "mul",
                            ("diagonal",), "vector", "head.weight"),
    "constant factor, permuted": Case(simple(lambda m, x: torch.tanh(m.a(x)) * m.vector, a=lin(), vector=vector()),
                                      "mul", ("permutation",), "vector a.weight a.bias", "head.weight"),
    "around a constant factor": Case(lambda: Net(skip, a=lin(), vector=vector()), "mul", ("diagonal",),
                                     "a.weight a.bias", "head.weight"),
    "one factor for all": Case(simple(lambda m, x: m.a(x) * m.g(x) / m.g(x), a=lin(), g=lin(D, 1)), "a", ANY,
                               "a.weight a.bias", "head.weight"),
    "experts": Case(
        lambda: Net(experts, router=lin(D, 2), up=lin(), a=lin(bias=False), b=lin(bias=False)),
        "embedding", ANY, "embed.weight a.weight b.weight", "router.weight up.weight head.weight"),
    "relu": Case(simple(lambda m, x: F.relu(m.a(x)), a=lin()), "relu", BOTH, "a.weight a.bias", "head.weight"),
    "pointwise": Case(simple(lambda m, x: torch.tanh(F.gelu(F.silu(torch.sigmoid(m.a(x)) + 1))), a=lin()), "a",
                      ("permutation",), "a.weight a.bias", "head.weight"),
    "values": Case(lambda: Net(attention, **projections()), "values", ANY, "v.weight v.bias", "o.weight"),
    "values of all heads": Case(lambda: Net(functools.partial(attention, kv=4), **projections(4)), "values", ANY,
                                "v.weight v.bias", "o.weight"),
    "values of one head": Case(lambda: Net(functools.partial(attention, kv=1), **projections(1)), "values", ANY,
                               "v.weight v.bias", "o.weight"),
    "keys": Case(lambda: Net(attention, **projections()), "keys", ANY, "k.weight k.bias q.weight q.bias", ""),
    "keys of all heads": Case(lambda: Net(functools.partial(attention, kv=4), **projections(4)), "keys", ANY,
                              "k.weight k.bias q.weight q.bias", ""),
    "keys of one head": Case(lambda: Net(functools.partial(attention, kv=1), **projections(1)), "keys", ANY,
                             "k.weight k.bias q.weight q.bias", ""),
    "rotary": Case(lambda: Net(functools.partial(attention, rotary="qk"), **projections()), "keys", ("diagonal",),
                   "k.weight k.bias q.weight q.bias", ""),
    "rotary keys": Case(lambda: Net(functools.partial(attention, rotary="k"), **projections()), "k", ("diagonal",),
                        "k.weight k.bias q.weight q.bias", ""),
    "attention by hand": Case(lambda: Net(by_hand, q=lin(), k=lin(), v=lin(), o=lin()), "v", ANY, "v.weight v.bias",
                              "o.weight"),
    "attention by hand, upward": Case(lambda: Net(by_hand, q=lin(), k=lin(), v=lin(), o=lin()), "flatten", ANY,
                                      "v.weight v.bias", "o.weight"),
    "one head by hand": Case(lambda: Net(one_head, q=lin(), k=lin(), v=lin()), "v", ANY, "v.weight v.bias",
                             "head.weight"),
    "other axes": Case(lambda: Net(joined, a=lin(), b=lin()), "a", ANY, "a.weight a.bias b.weight b.bias",
                       "head.weight"),
    "sums over tokens": Case(lambda: Net(pooled, a=lin()), "a", ANY, "a.weight a.bias", "head.weight"),
    "axes folded": Case(lambda: Net(folded_axes, a=lin()), "a", ANY, "a.weight a.bias", "head.weight"),
    "rows of tokens": Case(lambda: Net(lambda m, ids: m.head(m.a(m.embed(ids)).reshape(-1, D)).reshape(
        *ids.shape, VOCAB), a=lin()), "a", ANY, "a.weight a.bias", "head.weight"),
    "one channel": Case(simple(lambda m, x: m.b(m.a(x) * torch.tanh(m.c(x))), a=lin(D, 1), c=lin(D, 1), b=lin(1, D)),
                        "mul", ("diagonal",), "a.weight a.bias", "b.weight"),
    "tied": Case(lambda: tie(Net(stream, **layer())), "embedding", ("orthogonal",), "head.weight down.weight down.bias",
                 "gate.weight up.weight"),
    "shared layer": Case(lambda: Net(stream, **layer(3)), "embedding", ("orthogonal",),
                         "embed.weight down.weight down.bias", "gate.weight up.weight head.weight"),
    "permuted stream": Case(lambda: Net(stream, **layer(norm=rms)), "embedding", ("permutation",),
                            "embed.weight down.weight down.bias norm.weight last.weight",
                            "gate.weight up.weight head.weight"),
}  # fmt: skip
ALL = [(name, kind) for name, c in CASES.items() for kind in c.kinds]


@functools.cache
def taken_once(name: str) -> Captured:
    return taken(CASES[name].make())


def taken(model: nn.Module) -> Captured:
    return capture(model.eval(), DiffusionSpec(VOCAB - 1, VOCAB, 32))


def fresh(name: str) -> Captured:
    old = taken_once(name)
    return Captured(copy_graph(old.graph), old.weights.clone(), old.rewrites)


IDS = torch.arange(VOCAB).repeat(2)[:14].reshape(2, 7)


def run(captured: Captured) -> torch.Tensor:
    return forward(captured.graph, captured.weights, IDS, dtype=torch.float64)


def seed_of(captured: Captured, seed: str) -> fx.Node | Carry:
    """The value by the linear or op that makes it, or the keys or values of the first attention."""
    nodes = list(captured.graph.nodes)
    if seed in ("values", "keys"):
        node = next(n for n in nodes if is_call(n, SDPA))
        return Carry(args_of(node)[2 if seed == "values" else 1], (1, 3))
    sites = [site for n in nodes if (site := as_linear(n, captured.weights)) is not None]
    own = [site.node for site in sites if site.name == seed]
    return (
        own[0]
        if own
        else next(n for n in nodes if n.op == "call_function" and seed in (n.name, n.target.__name__.split(".")[0]))
    )


def grown(captured: Captured, seed: str, kind: Kind) -> Region | Refused:
    return grow(captured.graph, captured.weights, seed_of(captured, seed), kind)


def random_transform(region: Region, seed: int = 1) -> Transform:
    """As general as the region allows."""
    generator = torch.Generator().manual_seed(seed)
    heads, size = region.heads, region.width // region.heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if region.kind == "center":
        return Center(region.width)
    if region.kind == "permutation":
        orders = [torch.randperm(size, generator=generator) + i * size for i in range(heads)]
        return Permutation(torch.cat(orders))
    if region.kind == "diagonal":
        v = 0.5 + torch.rand(region.heads, size, generator=generator, dtype=torch.float64)
        v = v if region.positive else v * normal(heads, size).sign()
        v = torch.cat((v[:, : size // 2], v[:, : size // 2]), 1) if region.paired else v
        return Diagonal(v.reshape(-1))
    u, _, w = torch.linalg.svd(normal(heads, size, size))
    if region.kind == "orthogonal":
        return Blocks(u @ w, (u @ w).transpose(1, 2))
    s = torch.diag_embed(0.5 + torch.rand(heads, size, generator=generator, dtype=torch.float64))
    return Blocks(u @ s @ w, torch.linalg.inv(u @ s @ w))


def dense(t: Transform, region: Region, carry: Carry) -> torch.Tensor:
    """The matrix by which a carried value has to be multiplied, from the matrix of the transform."""
    m = t.matrix()
    m = torch.linalg.inv(m).T if carry.dual else m
    size = region.width // region.heads
    heads = [m[i : i + size, i : i + size] for i in range(0, region.width, size)]
    return m if carry.repeat == 1 else torch.block_diag(*[h for h in heads for _ in range(carry.repeat)])


def astray(carry: Carry, old: torch.Tensor, new: torch.Tensor, t: Transform, region: Region) -> float:
    """How far a value is from x·T, along the axes that are to carry it."""
    ends = tuple(range(-len(carry.dims), 0))
    flat, found = (v.movedim(carry.dims, ends).flatten(-len(ends)) for v in (old, new))
    return deviation(found, flat @ dense(t, region, carry))


def values(captured: Captured, nodes: list[fx.Node]) -> list[torch.Tensor]:
    return Executor(captured.graph, captured.weights, [placeholder(captured.graph)], nodes, dtype=torch.float64)(IDS)


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_a_region_closes_and_keeps_the_function(name: str, kind: Kind) -> None:
    captured, case = fresh(name), CASES[name]
    region = grown(captured, case.seed, kind)
    assert isinstance(region, Region), str(region)
    assert {a.name for a in region.sources} == set(case.sources.split())
    assert {a.name for a in region.sinks} == set(case.sinks.split())
    before, nodes, names = run(captured), structure(captured.graph), set(captured.weights)
    carried = values(captured, list(region.carries))
    t = random_transform(region)
    fold(captured.weights, region, t)
    assert deviation(run(captured), before) < EXACT
    assert (structure(captured.graph), set(captured.weights)) == (nodes, names)
    assert {n for n, c in captured.weights.items() if c.folds} == set(region.absorbs)
    for carry, old, new in zip(region.carries.values(), carried, values(captured, list(region.carries)), strict=True):
        assert astray(carry, old, new, t, region) < EXACT, carry
        assert deviation(new, old) > 1e-3, carry


def test_asking_changes_nothing() -> None:
    captured = fresh("shared layer")
    before = (structure(captured.graph), captured.weights.fingerprint())
    for node in list(captured.graph.nodes):
        val = node.meta.get("val")
        if (
            node.op == "call_function"
            and isinstance(val, torch.Tensor)
            and val.dim()
            and isinstance(val.shape[-1], int)
        ):
            for kind in ANY:
                grow(captured.graph, captured.weights, node, kind)
    assert (structure(captured.graph), captured.weights.fingerprint()) == before


def test_what_heads_and_pairs_a_region_asks_for() -> None:
    asks = {}
    for name, kind in ALL:
        region = grown(fresh(name), CASES[name].seed, kind)
        assert isinstance(region, Region)
        asks[name, kind] = (region.heads, region.paired, region.positive)
    special = {key: value for key, value in asks.items() if value != (1, False, False)}
    assert special == {
        **dict.fromkeys([("norm of heads", "orthogonal"), ("norm of heads", "permutation")], (2, False, False)),
        ("relu", "diagonal"): (1, False, True),
        **{(n, k): (4 if "all" in n else 2, False, False) for n in ("values", "values of all heads") for k in ANY},
        **{(n, k): (4 if "all" in n else 2, False, False) for n in ("keys", "keys of all heads") for k in ANY},
        ("rotary", "diagonal"): (2, True, False),
        ("rotary keys", "diagonal"): (2, True, False),
        **{(n, k): (2, False, False) for n in ("attention by hand", "attention by hand, upward") for k in ANY},
    }


# Planted errors


def _each(ties: Ties, part: str, change: Callable[[Any], Any]) -> Ties:
    return replace(ties, **{part: tuple(change(item) for item in getattr(ties, part))})


def _kept(ties: Ties, part: str, keep: slice) -> Ties:
    return replace(ties, **{part: getattr(ties, part)[keep]})


FAULTS: dict[str, Callable[[Ties], Ties]] = {
    "forgets the first constant": lambda t: _kept(t, "absorbs", slice(1, None)),
    "forgets the last constant": lambda t: _kept(t, "absorbs", slice(0, -1)),
    "forgets the first value": lambda t: _kept(t, "carries", slice(1, None)),
    "forgets the last value": lambda t: _kept(t, "carries", slice(0, -1)),
    "undoes instead, or not": lambda t: _each(t, "absorbs", lambda a: replace(a, undo=not a.undo)),
    "rows for columns": lambda t: _each(t, "absorbs", lambda a: replace(a, rows=not a.rows)),
    "repeats no constant": lambda t: _each(t, "absorbs", lambda a: replace(a, repeat=1)),
    "repeats no value": lambda t: _each(t, "carries", lambda c: replace(c, repeat=1)),
    "drops the dual": lambda t: _each(t, "carries", lambda c: replace(c, dual=False)),
    "takes the dual": lambda t: replace(t, carries=(*t.carries[:-1], *(replace(c, dual=not c.dual) for c in t.carries[-1:]))),
    "forgets the heads": lambda t: replace(t, heads=1),
    "forgets the pairs": lambda t: replace(t, paired=False),
    "forgets the sign": lambda t: replace(t, positive=False),
}  # fmt: skip
FUNCTIONS: dict[str, Rule] = {rule.__name__: rule for rule in motion.RULES.values()}


@functools.cache
def answers(name: str, kind: Kind) -> dict[str, list[Ties]]:
    """What every rule answers, in order, while the region of a model grows without faults."""
    found: dict[str, list[Ties]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for op, rule in motion.RULES.items():
            patch.setitem(motion.RULES, op, functools.partial(recorded, rule, found.setdefault(rule.__name__, [])))
        grown(taken_once(name), CASES[name].seed, kind)
    return found


def options(answer: Ties | Choice | str) -> tuple[Ties, ...]:
    return () if isinstance(answer, str) else answer.options if isinstance(answer, Choice) else (answer,)


def recorded(rule: Rule, into: list[Ties], site: Site) -> Ties | Choice | str:
    answer = rule(site)
    into.extend(options(answer))
    return answer


def faulty_at(rule: Rule, fault: Callable[[Ties], Ties], at: int, count: list[None], site: Site) -> Any:
    """The rule, but its answer number `at` has the fault."""
    answer = rule(site)
    changed = [fault(ties) if len(count) + i == at else ties for i, ties in enumerate(options(answer))]
    count.extend([None] * len(changed))
    return answer if isinstance(answer, str) else Choice(tuple(changed)) if isinstance(answer, Choice) else changed[0]


def effect(region: Region) -> object:
    """All that a fold does with a region. A diagonal keeps to its heads by itself, unless they are repeated."""
    constants = {(a.name, a.rows, a.undo, a.repeat) for a in region.absorbs.values()}
    free = region.kind == "diagonal" and not region.paired and all(a.repeat == 1 for a in region.absorbs.values())
    return constants, 1 if free else region.heads, region.paired, region.positive


def outcome(name: str, kind: Kind, rule: Rule, fault: Callable[[Ties], Ties], at: int) -> str:
    """What comes of one faulty answer: the "same" region, an "error", "seen" in the numbers, or "slipped through"."""
    captured, seed = fresh(name), CASES[name].seed
    good = grown(captured, seed, kind)
    with pytest.MonkeyPatch.context() as patch:
        wrong = functools.partial(faulty_at, rule, fault, at, [])
        for op in [op for op, r in motion.RULES.items() if r is rule]:
            patch.setitem(motion.RULES, op, wrong)
        found = grown(captured, seed, kind)
    if isinstance(found, Refused):
        return "error"
    assert isinstance(good, Region)
    if effect(good) == effect(found):
        return "same"
    before = values(captured, [logits_node(captured.graph), *good.carries])
    try:
        t = random_transform(found)
        fold(captured.weights, found, t)
        after = values(captured, [logits_node(captured.graph), *good.carries])
    except (ContractError, RuntimeError, TypeError, IndexError):
        return "error"
    if deviation(after[0], before[0]) > SEEN:
        return "seen"
    # Two errors leave the logits alone: a mean before a layer norm, and what is added to all keys before a softmax.
    carries = zip(good.carries.values(), before[1:], after[1:], strict=True)
    return "seen" if any(astray(*c, t, good) > SEEN for c in carries) else "slipped through"


#: Faults that a rule can show at all: it answers with constants, values, heads, pairs or signs.
APPLIES = {
    "_linear": ["forgets the first constant", "forgets the last constant", "undoes instead, or not", "rows for columns",
                "repeats no constant"],
    "_embedding": ["forgets the first constant", "undoes instead, or not", "rows for columns"],
    "_sum": ["forgets the first constant", "forgets the first value", "forgets the last value",
             "undoes instead, or not", "takes the dual"],
    "_product": ["forgets the first constant", "forgets the last value", "undoes instead, or not", "takes the dual"],
    "_quotient": ["forgets the first value", "forgets the last value", "takes the dual"],
    "_unary": ["forgets the first value", "forgets the last value", "takes the dual"],
    "_pointwise": ["forgets the first value", "forgets the last value", "forgets the sign"],
    "_norm": ["forgets the first constant", "forgets the last constant", "forgets the first value",
              "undoes instead, or not", "forgets the heads"],
    "_attention": ["forgets the first value", "forgets the last value", "repeats no value", "drops the dual",
                   "takes the dual", "forgets the heads"],
    "_rope": ["forgets the first value", "forgets the last value", "takes the dual", "drops the dual",
              "forgets the pairs"],
    "_matmul": ["forgets the first value", "forgets the last value", "takes the dual", "forgets the heads"],
    "_reshape": ["forgets the first value", "takes the dual", "repeats no value", "drops the dual"],
    "_permute": ["forgets the first value", "takes the dual", "repeats no value", "drops the dual"],
    "_other_axis": ["forgets the first constant", "forgets the first value", "forgets the last value",
                    "undoes instead, or not", "takes the dual"],
    "_free": [],
}  # fmt: skip
PLANTED = [(rule, fault) for rule, faults in APPLIES.items() for fault in faults]


def test_every_rule_is_planted() -> None:
    assert APPLIES.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize(("rule", "fault"), PLANTED)
def test_a_planted_error_is_seen(rule: str, fault: str) -> None:
    """In no model does a single wrong answer slip through, and in one at least it shows."""
    change, found = FAULTS[fault], {}
    for name, kind in ALL:
        for at, ties in enumerate(answers(name, kind).get(rule, ())):
            if change(ties) != ties and name != "one channel":  # where rows and columns are the same
                found[name, kind, at] = outcome(name, kind, FUNCTIONS[rule], change, at)
    assert {case for case, what in found.items() if what == "slipped through"} == set()
    assert {"seen", "error"} & set(found.values())


def waved_through(site: Site) -> Ties:
    """What a rule would answer that refuses nothing."""
    x = args_of(site.node)[0]
    return Ties((Carry(site.node, site.carry.dims), *([Carry(x, site.carry.dims)] if isinstance(x, fx.Node) else ())))


Q: dict[str, Any] = {
    "gain": (simple(lambda m, x: m.norm(x), norm=rms()), "orthogonal"),
    "mean": (simple(lambda m, x: m.norm(x), norm=nn.LayerNorm(D)), "orthogonal"),
    "size": (simple(lambda m, x: m.norm(x), norm=rms(unit=True)), "diagonal"),
    "square": (simple(lambda m, x: torch.square(x) if m is None else x * x), "diagonal"),
    "product": (simple(lambda m, x: x * m.vector, vector=vector()), "orthogonal"),
    "quotient": (simple(lambda m, x: x / x), "diagonal"),
    "number": (simple(lambda m, x: x + 1.0), "orthogonal"),
    "gelu": (simple(lambda m, x: F.gelu(x)), "diagonal"),
    "rounding": (simple(lambda m, x: (4 * x).to(torch.int64).float()), "orthogonal"),
    "cut": (lambda: Net(lambda m, ids: m.head(m.embed(ids).unflatten(-1, (2, 4)).flip(2).flatten(2))), "orthogonal"),
    "rotary": (lambda: Net(lambda m, ids: m.head(turned(m.embed(ids)))), "orthogonal"),
    "halves": (simple(lambda m, x: torch.cat((x[..., 4:], x[..., :4]), -1)), "diagonal"),
}


@pytest.mark.parametrize("name", Q)
def test_what_is_refused_would_change_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, kind = Q[name]
    captured = taken(make())
    assert isinstance(grown(captured, "embedding", kind), Refused)
    for op in {n.target for n in captured.graph.nodes if n.op == "call_function"}:
        rule = motion.RULES.get(op)
        if rule is None or rule not in (motion._linear, motion._embedding):
            monkeypatch.setitem(motion.RULES, op, waved_through)
    region = grow(captured.graph, captured.weights, seed_of(captured, "embedding"), kind)
    assert isinstance(region, Region)
    before = run(captured)
    fold(captured.weights, region, random_transform(region))
    assert deviation(run(captured), before) > SEEN


@pytest.mark.parametrize("constant", ["a.bias", "a.weight", "head.weight"])
def test_a_constant_that_stays_behind_is_seen(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = fresh("linear")
    region, before = grown(captured, "a", "invertible"), run(captured)
    assert isinstance(region, Region)
    whole = Weights.fold
    monkeypatch.setattr(Weights, "fold", lambda w, name, f: None if name == constant else whole(w, name, f))
    fold(captured.weights, region, random_transform(region))
    assert deviation(run(captured), before) > SEEN


def test_sites_know_which_side_they_are_on() -> None:
    captured = fresh("linear")
    node = next(n for n in captured.graph.nodes if is_call(n, LINEAR))
    made = Site(node, Carry(node, (2,)), "diagonal", captured.graph, captured.weights)
    read = replace(made, carry=Carry(args_of(node)[0], (2,), repeat=3, dual=True))
    assert (made.made, read.made) == (True, False)
    assert made.absorb("w", undo=True) == Absorb("w", node, undo=True)
    assert read.absorb("w", undo=True) == Absorb("w", node, undo=False, repeat=3)
    assert read.absorb("w", rows=True) == Absorb("w", node, rows=True, undo=True, repeat=3)
