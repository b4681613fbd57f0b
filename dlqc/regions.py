"""Regions: all values that must carry a transform together, found by following the motion rules on the dataflow.

    seed  →  its producer and its readers are asked  →  more values carry T  →  …  →  every thread ends in a constant

    residual stream   embedding, writers (linears, rows) … adds, norms … readers (linears, columns), head
    value heads       v projection … sdpa … output projection                       per KV head
    query and key     q and k projections … rope … sdpa                             q carries T, k carries T⁻ᵀ
    an edge           norm or gated product … the linears that read it

A region is either closed, or it is refused with the first node at which T got stuck and the reason. `fold` then moves a
concrete transform into the constants of a closed region; the graph keeps its nodes. What cannot close may stay
online: `keep_online` puts T on an edge as one op, and its readers undo it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import fx

from dlqc.errors import ContractError
from dlqc.graph import EMBEDDINGS, LINEAR, SDPA, args_of, aten, call_before, constant_name, is_call, linears, read, uses
from dlqc.motion import Absorb, Carry, Choice, Kind, Site, Ties, rule_for, shape
from dlqc.ops import TRANSFORM
from dlqc.routers import is_router
from dlqc.transform import Center, Diagonal, Transform, decode
from dlqc.weights import OnColumns, OnRows, Weights


@dataclass(frozen=True)
class Refused:
    """Why a region does not close: the node at which the transform got stuck, and the reason."""

    node: fx.Node
    reason: str

    def __str__(self) -> str:
        target = str(self.node.target).removesuffix(".default").removesuffix(".Tensor")
        return f"stuck at %{self.node.name} ({target}): {self.reason}"


@dataclass
class Region:
    """A closed region.

    Attributes:
        kind: what transforms it takes.
        width: of the transform.
        carries: the values that carry it, the seed first.
        absorbs: the constants that take it.
        takers: by constant, the nodes that read it where it takes the transform.
        heads, paired, positive: what T must fulfil (see `dlqc.motion.Ties`).
        flow: the dataflow of the carried values and the nodes that absorb.
    """

    kind: Kind
    width: int
    carries: dict[fx.Node, Carry] = field(default_factory=dict)
    absorbs: dict[str, Absorb] = field(default_factory=dict)
    takers: dict[str, set[fx.Node]] = field(default_factory=dict)
    heads: int = 1
    paired: bool = False
    positive: bool = False

    def copy(self) -> Region:
        takers = {name: set(nodes) for name, nodes in self.takers.items()}
        return replace(self, carries=dict(self.carries), absorbs=dict(self.absorbs), takers=takers)

    @property
    def sources(self) -> list[Absorb]:
        """Where the transform enters: weights of writers, embeddings, gains."""
        return [a for a in self.absorbs.values() if a.by in self.carries]

    @property
    def sinks(self) -> list[Absorb]:
        """Where it is undone: weights of readers."""
        return [a for a in self.absorbs.values() if a.by not in self.carries]

    @property
    def flow(self) -> nx.DiGraph[fx.Node]:
        graph: nx.DiGraph[fx.Node] = nx.DiGraph()
        graph.add_nodes_from(self.carries)
        takers = set[fx.Node]().union(*self.takers.values())
        for node in self.carries:
            for user in node.users:
                if user in self.carries or user in takers:
                    graph.add_edge(node, user)
        return graph


def grow(
    graph: fx.Graph,
    weights: Weights,
    seed: fx.Node | Carry,
    kind: Kind,
    *,
    upward: bool = True,
    only: Collection[fx.Node] | None = None,
) -> Region | Refused:
    """The region of a value that is to carry a transform along its last axis (or as a `Carry` says).

    Args:
        upward: False leaves the producer of the seed alone: only its readers are to undo the transform.
        only: the readers of the seed that are to carry it; None for all of them.
    """
    if isinstance(seed, fx.Node):
        seed = Carry(seed, (len(shape(seed)) - 1,))
    width = 1
    for d in seed.dims:
        width *= int(shape(seed.node)[d])
    region = Region(kind, width // seed.repeat, {seed.node: seed})
    work = [(user, seed) for user in seed.node.users if only is None or user in only]
    if not work:
        return Refused(seed.node, "nobody reads it")
    found = _follow(region, [*([(seed.node, seed)] if upward else []), *work], graph, weights)
    if isinstance(found, Refused):
        return found
    if not upward and (found.paired or found.positive):
        return Refused(seed.node, "a rotary embedding or relu on the way takes only some diagonals")
    return _owned(found, graph, weights, seed.node)


def _follow(region: Region, work: list[tuple[fx.Node, Carry]], graph: fx.Graph, weights: Weights) -> Region | Refused:
    """Ask every node in `work` what the carried value next to it means, until nothing new comes up."""
    while work:
        node, carry = work.pop(0)
        answer = _ask(node, Site(node, carry, region.kind, graph, weights))
        if isinstance(answer, str):
            return Refused(node, answer)
        if isinstance(answer, Ties):
            refusal = _accept(region, node, answer, work)
            if refusal is not None:
                return refusal
            continue
        if any(c.node in region.carries and c.node is not node for o in answer.options for c in o.carries):
            continue  # a factor carries it already
        refusals = []
        for option in answer.options:
            trial, rest = region.copy(), list(work)
            refusal = _accept(trial, node, option, rest)
            found = refusal or _follow(trial, rest, graph, weights)
            if isinstance(found, Region):
                return found
            refusals.append(found)
        return refusals[0]
    return region


def _ask(node: fx.Node, site: Site) -> Ties | Choice | str:
    rule = rule_for(node)
    if rule is not None:
        return rule(site)
    if node.op == "output":
        return "it is the result of the model"
    return f"no rule moves a transform of kind {site.kind!r} through it"


def _accept(region: Region, by: fx.Node, ties: Ties, work: list[tuple[fx.Node, Carry]]) -> Refused | None:
    """Add what a rule answered; new values put their producer and readers on the list."""
    if ties.heads > 1 or ties.paired:
        if (region.heads > 1 or region.paired) and region.heads != ties.heads:
            return Refused(by, f"it needs {ties.heads} separate heads, what came before {region.heads}")
        region.heads = ties.heads
    region.paired |= ties.paired
    region.positive |= ties.positive
    for absorb in ties.absorbs:
        if region.kind in ("orthogonal", "permutation"):
            absorb = replace(absorb, undo=False)  # T⁻ᵀ is T
        known = region.absorbs.setdefault(absorb.name, absorb)
        if (known.rows, known.undo, known.repeat) != (absorb.rows, absorb.undo, absorb.repeat):
            return Refused(by, f"constant {absorb.name!r} would have to change in two ways at once")
        region.takers.setdefault(absorb.name, set()).add(by)
    for carry in ties.carries:
        known_carry = region.carries.get(carry.node)
        if known_carry is None:
            if region.kind == "diagonal" and _factors(carry.node, by, region):
                return Refused(by, "both factors of a product would carry the diagonal")
            region.carries[carry.node] = carry
            work += [(n, carry) for n in (carry.node, *carry.node.users) if n is not by]
        elif known_carry != carry:
            return Refused(carry.node, "the transform comes back to it in another form")
    return None


def _factors(node: fx.Node, by: fx.Node, region: Region) -> bool:
    """Whether a diagonal would enter a product through two of its factors, constants included."""
    return any(
        is_call(user, aten.mul.Tensor)
        and sum(
            a is node or a in region.carries or user in region.takers.get(str(constant_name(a)), ())
            for a in user.all_input_nodes
        )
        > 1
        for user in node.users
    )


def _owned(region: Region, graph: fx.Graph, weights: Weights, seed: fx.Node) -> Region | Refused:
    """Refuse a region that would change a constant which somebody outside of it reads."""
    for name in region.absorbs:
        for user in uses(graph, name):
            if user not in region.takers[name]:
                return Refused(user, f"it reads {name!r}, too, and would see it changed")
        others = [alias for alias in weights[name].aliases if alias != name]
        if others and len(uses(graph, name)) < 2:
            return Refused(seed, f"{name!r} is tied to {others[-1]!r}")
    return region


def fits(region: Region, t: Transform) -> str | None:
    """None if a transform may be folded into a region, else what it lacks."""
    if t.width != region.width:
        return f"its width is {t.width}, the region's {region.width}"
    if region.kind == "center" and not isinstance(t, Center):
        return "it is not center"
    if region.kind != "center" and region.kind not in t.groups:
        return f"it is not {region.kind}"
    if region.heads > 1:
        try:
            t.repeat(region.heads, 1)
        except ContractError as error:
            return error.what
    if region.paired or region.positive:
        if not isinstance(t, Diagonal):
            return "it is no diagonal"
        halves = t.v.reshape(region.heads, -1).tensor_split(2, dim=1)
        if region.paired and not torch.equal(*halves):
            return "the halves of a head differ, which rotary embeddings mix"
        if region.positive and not bool((t.v > 0).all()):
            return "it has negative entries"
    return None


def fold(weights: Weights, region: Region, t: Transform) -> None:
    """Move a transform into the constants of a closed region: every carried value v becomes v·T, the function stays.

    A router that takes part is stored in float32 from then on: rounded to 16 bits again, it might pick another expert.

    Raises:
        ContractError: the transform is none that the region takes.
    """
    reason = fits(region, t)
    if reason is not None:
        raise ContractError(
            f"a transform does not fit its region: {reason}",
            where=next(iter(region.carries)).name,
            remedy="This is a fault of the pass that made the transform",
        )
    for absorb in region.absorbs.values():
        part = t if absorb.repeat == 1 else t.repeat(region.heads, absorb.repeat)
        part = part.contragredient() if absorb.undo else part
        weights.fold(absorb.name, OnRows(part) if absorb.rows else OnColumns(part))
        if is_call(absorb.by, LINEAR) and is_router(absorb.by):
            weights.define(absorb.name, replace(weights[absorb.name], dtype=torch.float32))


def push(weights: Weights, region: Region, s: Transform) -> None:
    """Move x → x·S, which was taken from the value itself, into the readers of a region grown with upward=False.

    S need not have an inverse (linear(x·S, W) = linear(x, W·Sᵀ)), unless constants are added to the value on the way:
    x·S + b = (x + b·S⁻¹)·S.
    """
    reason = fits(region, s)
    if reason is not None:
        raise ContractError(
            f"a transform does not pass to the readers: {reason}",
            where=next(iter(region.carries)).name,
            remedy="This is a fault of the pass that made the transform",
        )
    for absorb in region.absorbs.values():
        part = s if absorb.repeat == 1 else s.repeat(region.heads, absorb.repeat)
        part = part.transpose() if absorb.undo else part.inverse()
        weights.fold(absorb.name, OnRows(part) if absorb.rows else OnColumns(part))


def readers(graph: fx.Graph, weights: Weights, value: fx.Node, kind: Kind = "invertible") -> Region | Refused:
    """The region of a value on its way into the linears that read it, other readers left alone; for `keep_online`."""
    return grow(graph, weights, value, kind, upward=False, only=[site.node for site in linears(value.users, weights)])


def keep_online(graph: fx.Graph, weights: Weights, region: Region, t: Transform) -> fx.Node:
    """Apply T at run time, as one op, on the way from a value to its readers, which undo it; gives the new node.

    Args:
        region: what `readers` found.
    """
    fold(weights, region, t)
    value = next(iter(region.carries))
    inside = set[fx.Node]().union(*region.takers.values())
    return insert(graph, weights, value, t, [user for user in value.users if user in inside])


def insert(graph: fx.Graph, weights: Weights, value: fx.Node, t: Transform, users: list[fx.Node]) -> fx.Node:
    """Put x → x·T between a value and some of its users, as one op; gives the new node."""
    parts: list[torch.Tensor] = []
    spec = t.encode(parts)
    first = next(node for node in graph.nodes if node in users)
    names = (n for i in itertools.count() if (n := f"transform.{value.name}.{i}") not in weights)
    nodes = []
    for part in parts:
        name = next(names)
        weights.put(name, part, dtype=torch.float32 if part.is_floating_point() else None)
        nodes.append(read(graph, weights, name, first))
        nodes[-1].meta["val"] = nodes[-1].meta["val"].to(weights[name].storage_dtype)
    node = call_before(graph, first, TRANSFORM, (value, nodes, spec))
    for user in users:
        user.replace_input_with(value, node)
    return node


def transform_of(node: fx.Node, weights: Weights) -> Transform:
    """The transform that an online node applies, in float64."""
    _, parts, spec = args_of(node)
    return decode(spec, [weights.value(str(part.target), torch.float64) for part in parts])


def residual_stream(graph: fx.Graph, weights: Weights, kind: Kind = "orthogonal") -> Region | Refused:
    """The region that begins at the token embedding."""
    for node in graph.nodes:
        if is_call(node, *EMBEDDINGS):
            return grow(graph, weights, node, kind)
    output = next(node for node in graph.nodes if node.op == "output")
    return Refused(output, "the graph has no embedding")


def value_heads(graph: fx.Graph, weights: Weights, attention: fx.Node, kind: Kind) -> Region | Refused:
    """The region of the values of an attention, transformed per KV head."""
    return grow(graph, weights, Carry(args_of(attention)[2], (1, 3)), kind)


def query_key(graph: fx.Graph, weights: Weights, attention: fx.Node, kind: Kind) -> Region | Refused:
    """The region of queries and keys of an attention: k carries T per KV head, q its contragredient."""
    return grow(graph, weights, Carry(args_of(attention)[1], (1, 3)), kind)


def edge(graph: fx.Graph, weights: Weights, value: fx.Node, kind: Kind) -> Region | Refused:
    """The region of a value that linears read: up into what makes it, down into who reads it."""
    return grow(graph, weights, value, kind)


def edges(nodes: list[fx.Node], weights: Weights) -> list[fx.Node]:
    """The values that linears on constant weights read, in order, each once."""
    return list(dict.fromkeys(site.x for site in linears(nodes, weights)))


def attentions(nodes: list[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if is_call(node, SDPA)]
