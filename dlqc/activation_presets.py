"""The part of a preset's name that tells of activations, and the passes that it stands for.

    -asym          weights and activations have zero points
    -ag<size>      activations have one scale per token and group of so many channels
    -static[<n>]   activations have fixed ranges, from states at all mask ratios; n sets of them for n mask ratios
    -qkv<bits>     queries, keys and values are quantized, -kv<bits> keys and values, -v<bits> values: dynamic, per token
    -p<bits>       attention probabilities are quantized, unsigned, with the static scale 1/(2^bits - 1)
    -cache<bits>   the cache of decoding stores keys and values in 2, 3, 4 or 8 bits; what attention computes with stays

In this order; each at most once, and one of the three for queries, keys and values. The last goes with none of what is said of
attention: keys are rounded once, in the cache or in front of the attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dlqc.contract import Pass
from dlqc.errors import RecipeError

#: What stands between the weights and the method in a name.
WORDS = r"(?:-asym)?(?:-ag\d+|-static\d*)?(?:-(?:qkv|kv|v)[2-8])?(?:-p[2-8])?(?:-cache[2348])?"

_PARTS = re.compile(
    r"(?P<asym>-asym)?(?:-ag(?P<group>\d+)|(?P<static>-static)(?P<sets>\d*))?"
    r"(?:-(?P<heads>qkv|kv|v)(?P<bits>[2-8]))?(?:-p(?P<p>[2-8]))?"
    r"(?:-cache(?P<cache>[2348]))?"
)
_HEADS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class Activations:
    """How a name says that activations are quantized.

    Attributes:
        bits: of the inputs of linears, None if they stay.
        group: channels per scale, None for one per token. symmetric: no zero points. static: fixed ranges.
        sets: of fixed ranges. attention: widths of queries, keys, values and probabilities, where they are quantized.
        cache: width of cached keys and values, None if they stay.
    """

    bits: int | None
    group: int | None = None
    symmetric: bool = True
    static: bool = False
    sets: int = 1
    attention: dict[str, int] = field(default_factory=dict)
    cache: int | None = None

    @classmethod
    def of(cls, words: str, bits: int, name: str) -> Activations:
        """Read the words of a name; `bits` are those behind its a, 16 for none."""
        found = _PARTS.fullmatch(words)
        assert found is not None
        if bits == 16 and (found["group"] or found["static"]):
            word = f"ag{found['group']}" if found["group"] else "static"
            what = f"-{word} is about activations of fewer than 16 bits"
            raise RecipeError(what, where=name, remedy="Write a8 or a4, or leave it out")
        heads = {_HEADS[part]: int(found["bits"]) for part in found["heads"] or ""}
        heads |= {"probabilities": int(found["p"])} if found["p"] else {}
        if heads and found["cache"]:
            what = f"-cache{found['cache']} rounds keys and values a second time"
            raise RecipeError(what, where=name, remedy="Name the cache, or what attentions read, not both")
        return cls(
            None if bits == 16 else bits,
            int(found["group"]) if found["group"] else None,
            found["asym"] is None,
            found["static"] is not None,
            int(found["sets"] or 1),
            heads,
            int(found["cache"]) if found["cache"] else None,
        )

    def of_linears(self, pass_class: Callable[[str], Any]) -> list[Pass]:
        """The pass that quantizes inputs of linears."""
        if self.bits is None:
            return []
        options: dict[str, Any] = {"bits": self.bits, "group_size": self.group, "symmetric": self.symmetric}
        if self.static:
            from dlqc.ranges import Percentile

            options |= {"ranges": Percentile(), "buckets": self.sets}
        return [pass_class("quantize_activations")(**options)]

    def of_attention(self, pass_class: Callable[[str], Any], per: str, values: Any = None) -> list[Pass]:
        """The pass that quantizes what attentions read, or what the cache stores of it.

        Args:
            per: "head" or "token", what shares a dynamic scale. values: other scales for the values.
        """
        if self.cache is not None:
            return [pass_class("quantize_kv")(keys=self.cache, values=self.cache)]
        if not self.attention:
            return []
        from dlqc.heads import Dynamic

        dynamic = Dynamic(per, self.symmetric)  # type: ignore[arg-type]
        scales = {"v": values or dynamic} | ({"qk": dynamic} if "keys" in self.attention else {})
        widths = {part: self.attention.get(part) for part in (*_HEADS.values(), "probabilities")}
        return [pass_class("quantize_attention")(**widths, **scales)]
