"""What the CPU backend joins in a lowered graph: calls of linear8 with what is around them.

Before:  y = linear8(rms_norm(h, gain), …) + r         After:  y = fused8("rms_norm", h, gain, …, r)
         y = linear8(silu(g) · u, …)                           y = fused8("silu_times", g, u, …)
         y = linear8(x · (I ⊗ H/√n), …)                        y = fused8(…, x, …, n, core), x as any of the above

Attention and rotary embedding become native ops of the same arguments and meaning, so that what reads the lowered graph
(`dlqc.cached`) sees them as what they were; so do norms that no linear took along.
"""

from __future__ import annotations

from torch import Tensor, fx

from dlqc import hadamard
from dlqc.backends import fusion
from dlqc.backends.fusion import Call, Found, Joint
from dlqc.graph import (
    CHOOSER,
    CODER,
    LINEAR,
    RMS_NORM,
    SDPA,
    arg,
    args_of,
    call_before,
    constant_name,
    is_call,
    replace,
    stands_for,
    sweep,
)
from dlqc.kernels.cpu import attention, build, cache, head
from dlqc.kernels.cpu.fused8 import FUSED8, KINDS, LANES, rms_norm
from dlqc.kernels.cpu.linear8 import linear8
from dlqc.ops import CACHED, ROPE
from dlqc.weights import Weights

stands_for(attention.attention, SDPA)
stands_for(attention.rope, ROPE)


def fused8(found: Found) -> Call:
    rotation = (found.block, found.core) if found.block > 1 else ()
    return FUSED8, (KINDS[found.kind], found.x, *found.before, found.residual, *found.rest, *rotation)


def rotates(block: int) -> bool:
    """Whether fused8 can multiply by Hadamard matrices of this order."""
    split = hadamard.order(block)
    return split is not None and (split[0] == 1 or 1 << split[1] >= LANES)


LINEAR8 = Joint(linear8, fused8, rotates=rotates)


def fuse(graph: fx.Graph, weights: Weights) -> dict[str, int]:
    """Join every linear8 of a graph with its only norm, gate or rotation, and its only sum; how many of each kind.

    What becomes a native op of its own is counted as "native_...".
    """
    counts = _attentions(graph) | _head(graph) | _caches(graph) | fusion.fuse(graph, weights, LINEAR8)
    _norms(graph, weights, counts)
    sweep(graph, weights)
    return counts


def _head(graph: fx.Graph) -> dict[str, int]:
    """Leave the op for token and confidence at a head that is not quantized (`dlqc.proposal`)."""
    node = next(n for n in graph.nodes if n.op == "output").args[0]
    if not is_call(node, LINEAR) or node.kwargs or any(part and not constant_name(part) for part in args_of(node)[1:]):
        return {}
    kinds = [part.meta["val"].dtype for part in node.all_input_nodes]
    if any(kind not in build.TYPES for kind in kinds) or head.unavailable() is not None:
        return {}
    node.meta[CHOOSER] = head.head_argmax
    return {"native_head": 1}


def _caches(graph: fx.Graph) -> dict[str, int]:
    """Leave the coder at every mark of keys or values that are stored in few bits."""
    marks = [n for n in graph.nodes if is_call(n, CACHED) and n.meta["val"].dtype in build.TYPES]
    if not marks or cache.unavailable() is not None:
        return {}
    for node in marks:
        node.meta[CODER] = cache.CODER
    return {"native_cache": len(marks)}


def _norms(graph: fx.Graph, weights: Weights, counts: dict[str, int]) -> None:
    """RMS norms that no linear took along become native ops."""
    if build.unavailable("linear8") is not None:
        return
    build.library("linear8")
    for node in [n for n in graph.nodes if is_call(n, RMS_NORM)]:
        value, gain = node.meta.get("val"), arg(node, 2, "weight")
        plain = len(args_of(node)[1]) == 1 and (gain is None or constant_name(gain) is not None)
        if plain and isinstance(value, Tensor) and value.dtype in build.TYPES:
            held, _, eps = fusion.norm(node, graph, weights, node)
            replace(node, call_before(graph, node, rms_norm, (args_of(node)[0], held, eps)))
            counts["native_norm"] = counts.get("native_norm", 0) + 1


def _attentions(graph: fx.Graph) -> dict[str, int]:
    """Give every attention whose heads have a fitting width, and every rotary embedding, to the native ops."""
    counts: dict[str, int] = {}
    if attention.unavailable() is not None:
        return counts
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype not in build.TYPES:
            continue
        if node.target is SDPA and value.shape[-1] % attention.STRIP == 0 and not arg(node, 4, "dropout_p", 0.0):
            node.target = attention.attention
            counts["native_attention"] = counts.get("native_attention", 0) + 1
        elif node.target is ROPE:
            node.target = attention.rope
            counts["native_rope"] = counts.get("native_rope", 0) + 1
    return counts
