"""A quantized graph through which gradients go: what fine-tuning trains.

    linear_packed(x, codes, s, z)   ŵ = (q - z)·ŝ,   q = clamp(round(v), 0, T),   ŝ = s·exp(ρ) as it is stored
    linear_coded(x, parts)          ŵ as the format says, constant
    low_rank(y, x, Aᵀ, B)           y + (x·Bᵀ)·Aᵀ
    quantize_act, quantize_heads    their values, with straight-through gradients (`dlqc.straight_through`)

v [N, K] are weights in units of the step, from the codes on: Esser et al.'s learned step size (LSQ, arXiv 1902.08153) with the
latent weight written as v·ŝ, so that v and ρ are independent and all sites learn at one rate. round passes gradients as the
identity; where v leaves [0, T] its gradient ends. With v fixed only ρ is learned, exactly and without any estimator (PEQA, Kim et
al., arXiv 2305.14152); with both fixed, A and B (QLoRA, Dettmers et al., arXiv 2305.14314).

Shapes: x [..., K], N output features, G groups, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from dlqc.errors import FeasibilityError
from dlqc.execute import Executor, logits_node, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.formats.coded import spell, weight_of
from dlqc.formats.integer import SCALE_DTYPES, IntFormat
from dlqc.formats.low_rank import LowRankFormat, low_rank_format
from dlqc.formats.packing import pack, unpack
from dlqc.graph import (
    ACT_QUANTIZERS,
    HEAD_QUANTIZERS,
    LINEAR,
    activation_quantizer,
    args_of,
    call_before,
    constant_name,
    copy_graph,
    corrected,
    follow,
    is_call,
    read,
    replace,
    site_name,
    width,
)
from dlqc.ops import ATTENTION, EMBEDDING_PACKED, LINEAR_CODED, LINEAR_NESTED, LINEAR_PACKED, LOW_RANK, QUANTIZE_ACT
from dlqc.straight_through import quantized_activations, straight_through
from dlqc.weights import Weights

Learn = Literal["codes", "scales", "lora"]


class IntegerSite:
    """An integer weight with what is learned of it."""

    def __init__(self, node: fx.Node, weights: Weights, learn: Learn) -> None:
        x, packed, scales, zeros, _, bits, group = args_of(node)
        self.names = [constant_name(part) for part in (packed, scales, zeros)]
        codes, self.start = unpack(weights.value(str(self.names[0])), bits, width(x)), weights.value(str(self.names[1]))
        points = None if self.names[2] is None else unpack(weights.value(self.names[2]), bits, self.start.shape[1])
        dtype = next(name for name, known in SCALE_DTYPES.items() if known is self.start.dtype)
        self.format = IntFormat(bits, group or None, points is None, dtype)
        self.zero: Any = self.format.midpoint if points is None else points.float().unsqueeze(-1)
        self.codes = codes
        self.v = codes.float().requires_grad_(learn == "codes")
        self.rho = torch.zeros_like(self.start, dtype=torch.float32).requires_grad_(learn != "lora")

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.v, self.rho) if p.requires_grad]

    def scale(self) -> Tensor:
        """ŝ [N, G], differentiable; what it stands for is what is stored."""
        grown = self.start.float() * self.rho.exp()
        return straight_through(grown, lambda s: s.to(self.start.dtype).float().clamp(min=self.format.smallest))

    def value(self) -> Tensor:
        """ŵ [N, K], differentiable."""
        code = straight_through(self.v.clamp(0, self.format.top), torch.round)
        scale = self.scale()
        value: Tensor = ((code.reshape(*scale.shape, -1) - self.zero) * scale.unsqueeze(-1)).reshape(self.v.shape)
        return value

    @torch.no_grad()
    def write(self, weights: Weights) -> None:
        """Put codes and scales where those of the start were; zero points stay."""
        codes = self.v.clamp(0, self.format.top).round().to(torch.uint8)
        weights.put(str(self.names[0]), pack(codes, self.format.bits))
        weights.put(str(self.names[1]), self.scale().to(self.start.dtype).contiguous())

    @torch.no_grad()
    def changed(self) -> float:
        """The share of codes that are not those of the start."""
        return float((self.v.clamp(0, self.format.top).round() != self.codes).float().mean())


class Factors:
    """A correction of low rank with what is learned of it: one that is there, or a new one from zero."""

    def __init__(self, fmt: LowRankFormat, left: Tensor, right: Tensor, *, learned: bool) -> None:
        self.format = fmt
        self.left, self.right = (f.float().clone().requires_grad_(learned) for f in (left, right))

    @classmethod
    def new(cls, fmt: LowRankFormat, out_features: int, in_features: int, rng: torch.Generator) -> Factors:
        """Aᵀ = 0, B ~ N(0, 1/K): nothing is corrected yet, and A has a gradient (LoRA, Hu et al., arXiv 2106.09685)."""
        right = torch.randn(fmt.rank, in_features, generator=rng) / in_features**0.5
        return cls(fmt, torch.zeros(fmt.rank, out_features), right, learned=True)

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.left, self.right) if p.requires_grad]


class Trainable:
    """A quantized graph as a function of what is learned.

    Args:
        graph: behind `pack`, before lowering.
        weights: its constants; they are not changed.
        learn: "codes" (and scales), "scales", or "lora".
        rank: of new corrections.
        dtype: what the factors of new corrections are stored in.
        seed: of new corrections.

    Raises:
        FeasibilityError: nothing is quantized, a format has no such thing to learn, or something has no gradient.
    """

    def __init__(
        self, graph: fx.Graph, weights: Weights, learn: Learn, *, rank: int = 16, dtype: str = "bfloat16", seed: int = 0
    ) -> None:
        _check(graph, learn, rank)
        self._graph, self._weights = graph, weights
        self.integers: dict[str, IntegerSite] = {}
        self.factors: dict[str, Factors] = {}
        self._fixed: dict[str, Tensor] = {}
        rng = torch.Generator().manual_seed(seed)
        tables = {constant_name(args_of(node)[1]) for node in graph.nodes if is_call(node, EMBEDDING_PACKED)}
        for node in graph.nodes:
            if is_call(node, LINEAR_PACKED, LINEAR_CODED) and site_name(node) not in {*self.integers, *self._fixed}:
                name = site_name(node)
                if is_call(node, LINEAR_PACKED):
                    # The codes of a tied head are those of the embedding, which no gradient reaches: they stay.
                    tied = constant_name(args_of(node)[1]) in tables
                    self.integers[name] = IntegerSite(node, weights, "lora" if tied else learn)
                else:
                    parts = [weights.value(str(constant_name(part))) for part in args_of(node)[1]]
                    self._fixed[name] = weight_of(
                        args_of(node)[3], parts, args_of(node)[4], width(args_of(node)[0])
                    ).dequantize()
                self._factors(node, name, LowRankFormat(rank, dtype) if learn == "lora" else None, rng)
        training, constants = self._training_graph()
        ids = placeholder(training)
        self._run = Executor(training, constants, [ids], [logits_node(training)], keep_weights=True)

    def parameters(self) -> list[Tensor]:
        """Everything that is learned, float32."""
        found = [p for site in self.integers.values() for p in site.parameters()]
        return found + [p for one in self.factors.values() for p in one.parameters()]

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, L, V] of ids [B, L], with gradients where they are enabled."""
        given = {f"{name}.trained": site.value() for name, site in self.integers.items()}
        given |= {f"{name}.trained": value for name, value in self._fixed.items()}
        for name, one in self.factors.items():
            given |= {f"{name}.trained.left": one.left, f"{name}.trained.right": one.right}
        return self._run.differentiable(ids, constants=given)[0]

    @torch.no_grad()
    def result(self) -> tuple[fx.Graph, Weights, int]:
        """The graph and weights with what was learned in their formats, and the bits that new corrections take."""
        graph, weights, bits = copy_graph(self._graph), self._weights.clone(), 0
        for site in self.integers.values():
            if site.parameters():
                site.write(weights)
        learned = {name: one for name, one in self.factors.items() if one.parameters()}
        for name, one in learned.items():
            parts = one.format.store(one.left, one.right)
            bits += 0 if f"{name}.low_rank.left" in weights else 8 * sum(part.nbytes for part in parts.values())
            for role, part in parts.items():
                weights.put(f"{name}.low_rank.{role}", part)
        for node in list(graph.nodes):
            if is_call(node, LINEAR_PACKED, LINEAR_CODED) and site_name(node) in learned and corrected(node) is node:
                self._correct(graph, node, weights, learned[site_name(node)].format)
        return graph, weights, bits

    def _factors(self, node: fx.Node, name: str, new: LowRankFormat | None, rng: torch.Generator) -> None:
        there = corrected(node)
        if there is not node:
            fmt, parts = low_rank_format(args_of(there)[3]), args_of(there)[2]
            roles = sorted(fmt.parts_of(width(node), width(args_of(there)[1])))
            stored = {r: self._weights.value(str(constant_name(p))) for r, p in zip(roles, parts, strict=True)}
            self.factors[name] = Factors(fmt, *fmt.factors(stored), learned=new is not None)
        elif new is not None:
            self.factors[name] = Factors.new(new, width(node), width(_unrounded(node)), rng)

    def _correct(self, graph: fx.Graph, node: fx.Node, weights: Weights, fmt: LowRankFormat) -> None:
        """Put a correction behind a quantized linear; it reads the linear's input unrounded."""
        before = node.next
        roles = sorted(fmt.parts_of(width(node), width(_unrounded(node))))
        parts = [read(graph, weights, f"{site_name(node)}.low_rank.{role}", before) for role in roles]
        follow(node, call_before(graph, before, LOW_RANK, (node, _unrounded(node), parts, spell(fmt))))

    def _training_graph(self) -> tuple[fx.Graph, Weights]:
        graph, weights = copy_graph(self._graph), self._weights.clone()
        for node in list(graph.nodes):
            if is_call(node, LINEAR_PACKED, LINEAR_CODED):  # all of them before the quantizers, which tell what x was
                self._open(graph, weights, node)
        for node in list(graph.nodes):
            if is_call(node, *ACT_QUANTIZERS, *HEAD_QUANTIZERS):
                _let_through(graph, node)
            elif is_call(node, LOW_RANK):
                y, x = args_of(node)[:2]
                replace(node, _added(graph, weights, node, y, x, str(node.meta["site"])))
        return graph, weights

    def _open(self, graph: fx.Graph, weights: Weights, node: fx.Node) -> None:
        """A linear on a weight that is given at each call, and its correction."""
        name, bias = site_name(node), args_of(node)[2 if is_call(node, LINEAR_CODED) else 4]
        there, x = corrected(node), _unrounded(node)
        weights.put(f"{name}.trained", torch.zeros(()).expand(width(node), width(x)))
        weight = read(graph, weights, f"{name}.trained", node)
        linear = call_before(graph, node, LINEAR, (args_of(node)[0], weight, bias))
        if there is not node:
            there.meta["site"] = name
        replace(node, linear)
        if there is node and name in self.factors:
            follow(linear, _added(graph, weights, linear.next, linear, x, name))


def _added(graph: fx.Graph, weights: Weights, before: fx.Node, y: fx.Node, x: fx.Node, name: str) -> fx.Node:
    shape = torch.zeros(()).expand(1, 1)
    for side in ("left", "right"):
        weights.put(f"{name}.trained.{side}", shape)
    sides = [read(graph, weights, f"{name}.trained.{side}", before) for side in ("left", "right")]
    with graph.inserting_before(before):
        node = graph.call_function(_with_correction, (y, x, *sides))
    node.meta["val"] = y.meta["val"]
    return node


def _with_correction(y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return y + (x @ right.T) @ left


def _let_through(graph: fx.Graph, node: fx.Node) -> None:
    """A quantizer whose gradient is the identity, or for dynamic ones also that of the step."""
    with graph.inserting_before(node):
        if is_call(node, QUANTIZE_ACT):
            new = graph.call_function(_dynamic, args_of(node))
        else:
            op: Any = node.target
            new = graph.call_function(_through, (op, *args_of(node)))
    new.meta["val"] = node.meta["val"]
    replace(node, new)


def _dynamic(x: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    return quantized_activations(x, ActFormat(bits, group or None, symmetric))


def _through(op: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    return straight_through(x, lambda value: op(value, *rest))


def _unrounded(node: fx.Node) -> fx.Node:
    """What a quantized linear reads, as it is before its quantizer."""
    quantizer = activation_quantizer(node)
    found: fx.Node = args_of(quantizer if quantizer is not None else node)[0]
    return found


def _check(graph: fx.Graph, learn: str, rank: int) -> None:
    sites = {site_name(n): n for n in graph.nodes if is_call(n, LINEAR_PACKED, LINEAR_CODED)}
    if any(is_call(node, LINEAR_NESTED) for node in graph.nodes):
        what = "its linears are read in several widths, and gradients know one"
        raise FeasibilityError(what, where="model", remedy="Compile without adapt_precision, then fine-tune")
    if not sites:
        what = "holds no quantized linear"
        raise FeasibilityError(
            what, where="model", remedy="Compile it with a recipe that quantizes, such as w2a16-gptq"
        )
    if learn not in ("codes", "scales", "lora"):
        raise FeasibilityError(f"{learn!r} is unknown", where="learn", remedy="Use 'codes', 'scales' or 'lora'")
    coded = [name for name, node in sites.items() if is_call(node, LINEAR_CODED)]
    if learn != "lora" and coded:
        what = f"{len(coded)} linears are no integers and have no {learn} to learn, {coded[0]} among them"
        raise FeasibilityError(what, where="learn", remedy="Use learn='lora'")
    if any(is_call(node, ATTENTION) for node in graph.nodes):
        what = "quantized attention probabilities have no gradient"
        raise FeasibilityError(what, where="model", remedy="Compile without -p, then fine-tune")
    for name, node in sites.items() if learn == "lora" else ():
        reason = LowRankFormat(rank).check(width(node), width(args_of(node)[0]))
        if reason is not None and corrected(node) is node:
            raise FeasibilityError(f"{name}: {reason}", where="rank", remedy="Use a lower rank")
