"""Store the keys and values of a decoding cache in few bits.

Before:  sdpa(q, k, v, mask)                                          the cache of a block step holds k and v
After:   sdpa(q, cached(k, offset; spec), cached(v; spec), mask)      it holds codes, see `dlqc.kv_cache`

    k ≈ RoPE(b) + c + (code + ½ - 2^(b-1))·s    s for a channel and a group of tokens, c the channel's mean
    v ≈ m + (code + ½ - 2^(b-1))·s              s and m for a token and head

so that |k - k̂| ≤ s/2, |v - v̂| ≤ s/2 for every element. `cached` is a mark: a forward without a cache computes what it did, and
`Compiled.cached` makes a packed cache of the marks. A refresh stores everything anew with new scales. The window at hand is
read as computed (`fresh`), and positions from the first [MASK] on may have more bits (`masked`), since a cache is worth most
where text is still open. RoPE(b) is the bias of the linear that makes the keys, turned as the keys are: it is computed anew,
not stored.

How this differs from `quantize_attention`: that one rounds what attentions multiply, in every forward, and stores nothing. A
key is rounded once, so the two exclude each other.

With 2-bit keys scores are corrected for what rounding adds to exp(q·k) on average (`correct`).

Declines an attention whose queries, keys and values are not laid out [batch, heads, length, width]. Refused where a head's
codes do not fill 32-bit words, and where no block step can be made of the graph. Should come behind transforms: none passes the
mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc.attention_sites import sites, unfit
from dlqc.cached import block_step, reads_tokens
from dlqc.contract import Context, Declined, Pass, PassReport, Plan
from dlqc.errors import FeasibilityError, RecipeError
from dlqc.execute import placeholder
from dlqc.graph import (
    CODED_LINEARS,
    LINEAR,
    QUANTIZED_LINEARS,
    arg,
    args_of,
    aten,
    call_before,
    constant_name,
    is_call,
    read,
)
from dlqc.kv_cache import Format, KeyFormat, ValueFormat, encode, misfit, stored_bits
from dlqc.ops import CACHED, LOW_RANK, ROPE

_PARTS = ("keys", "values")


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """Store cached keys and values in few bits.

    Options:
        keys, values: widths, 2, 3, 4 or 8; None stores them as they are.
        masked: width from the first position on that is [MASK] when it is stored; 16 keeps these as they are, None is as the
        others. group_size: tokens that share a step of a key's channel, a multiple of 32. symmetric: steps of keys around the
        channel's mean; else each group has a middle of its own, which is stored with it. bias: take RoPE(bias of the keys'
        linear) off first, where there is one. fresh: a step reads the keys and values of its own window as computed, and not as
        stored. correct: correct scores for the error of keys; None does so with 2-bit keys.
    """

    name: ClassVar[str] = "quantize_kv"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-attention"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantized-cache"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"float-attention"})
    scope: ClassVar = "block"

    keys: int | None = 4
    values: int | None = 4
    masked: int | None = None
    group_size: int = 32
    symmetric: bool = True
    bias: bool = True
    fresh: bool = True
    correct: bool | None = None

    def __post_init__(self) -> None:
        if self.keys is None and self.values is None:
            raise RecipeError(
                "nothing is stored in few bits", where="quantize_kv", remedy="Give a width for keys or values"
            )
        if self.correct and self.keys is None:
            what = "keys stay as they are, their scores need no correction"
            raise RecipeError(what, where="quantize_kv.correct", remedy="Leave correct out")
        self.formats  # noqa: B018  a wrong width or group is refused here

    @property
    def formats(self) -> dict[str, Format | None]:
        """How keys and values are stored, None as they are."""
        found: dict[str, Format | None] = dict.fromkeys(_PARTS)
        if self.keys is not None:
            corrected = self.keys == 2 if self.correct is None else self.correct
            masked = self.keys if self.masked is None else self.masked
            found["keys"] = KeyFormat(self.keys, masked, self.group_size, self.symmetric, self.fresh, corrected)
        if self.values is not None:
            masked = self.values if self.masked is None else self.masked
            found["values"] = ValueFormat(self.values, masked, self.fresh)
        return found

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        inside = {node for block in ctx.blocks for node in block.nodes(graph)}
        mine = [(name, node) for name, node in sites(list(graph.nodes)) if node in inside]
        if self.required and not mine:
            plan.problems.append("quantize_kv: the repeated blocks hold no scaled dot-product attention")
            return
        for name, node in mine:
            for part, value in zip(_PARTS, args_of(node)[1:3], strict=True):
                fmt = self.formats[part]
                reason = None if fmt is None else misfit(fmt, int(value.meta["val"].shape[-1]))
                if reason is not None:
                    plan.problems.append(f"{name}.{part}: {reason} (use 2, 4 or 8 bits, or {part}=none)")
        try:
            block_step(graph)
        except FeasibilityError as error:
            plan.problems.append(
                f"quantize_kv: there is no cache to store: {error.where}: {error.what} (drop the pass)"
            )

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        tokens = reads_tokens(graph, placeholder(graph))
        numbers = bits = 0.0
        for name, node in list(sites(ctx.nodes(graph))):
            reason = unfit(node)
            if reason is not None:
                report.declined.append(Declined(name, reason))
                continue
            arguments = list(args_of(node))
            for place, part in enumerate(_PARTS, 1):
                fmt, value = self.formats[part], arguments[place]
                heads, width = int(value.meta["val"].shape[1]), int(value.meta["val"].shape[3])
                numbers += heads * width
                if fmt is None:
                    bits += heads * width * 8 * value.meta["val"].dtype.itemsize
                    continue
                offset = turned_bias(graph, ctx, value, node, tokens) if part == "keys" and self.bias else None
                arguments[place] = call_before(graph, node, CACHED, (value, offset, encode(fmt)))
                bits += heads * width * stored_bits(fmt, width)
                report.details[f"{name}.{part}"] = {
                    "bits": stored_bits(fmt, width),
                    "without_bias": float(offset is not None),
                }
            node.args = tuple(arguments)
            report.sites += 1
        if report.sites:
            report.metrics["cache_bytes_per_token"] = bits / 8
            report.notes.append(f"the cache stores {bits / numbers:.3g} bits per number, scales counted: {self.label}")
        return report

    @property
    def label(self) -> str:
        """The scheme in words."""
        said = [f"{part} in {fmt.bits} bits" for part, fmt in self.formats.items() if fmt is not None]
        said += [f"{self.masked} from the first mask on"] if self.masked is not None else []
        said += ["scores corrected"] if isinstance(k := self.formats["keys"], KeyFormat) and k.corrected else []
        return ", ".join(said)


def turned_bias(graph: fx.Graph, ctx: Context, key: fx.Node, before: fx.Node, tokens: set[fx.Node]) -> fx.Node | None:
    """RoPE(bias) [1, H, L, D] of keys that are RoPE(heads of a linear with a bias), or None.

    Without rotary embeddings the bias is the same at all positions, and the mean takes it off.
    """
    if not is_call(key, ROPE):
        return None
    heads, cos, sin = args_of(key)
    if not is_call(heads, aten.transpose.int) or {int(d) % 4 for d in args_of(heads)[1:3]} != {1, 2}:
        return None
    split = args_of(heads)[0]
    if not is_call(split, aten.reshape.default, aten.view.default) or {cos, sin} & tokens:
        return None
    linear = args_of(split)[0]
    linear = args_of(linear)[0] if is_call(linear, LOW_RANK) else linear
    bias = constant_name(bias_of(linear))
    if bias is None:
        return None
    shape = key.meta["val"].shape
    own = read(graph, ctx.weights, bias, before)
    if own.meta["val"].dtype is not key.meta["val"].dtype:
        own = call_before(graph, before, aten.to.dtype, (own, key.meta["val"].dtype))
    rows = call_before(graph, before, aten.reshape.default, (own, [1, int(shape[1]), 1, int(shape[3])]))
    return call_before(graph, before, ROPE, (rows, cos, sin))


def bias_of(linear: object) -> fx.Node | None:
    """The bias of a linear, quantized or not."""
    if is_call(linear, LINEAR):
        found: fx.Node | None = arg(linear, 2, "bias")
        return found
    if is_call(linear, *QUANTIZED_LINEARS):
        return args_of(linear)[2 if is_call(linear, *CODED_LINEARS) else 4]  # type: ignore[no-any-return]
    return None
