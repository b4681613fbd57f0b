"""Hand every quantized linear to a kernel of the backend.

Before:  linear_packed(quantize_act(x), packed, scales, zeros, b), or linear_coded(quantize_act(x), parts, b)
After:   <kernel>(x, the kernel's own layout of the weight, …)

On a backend that merges, linears that read the same input and would get the same kernel become one call first
(`dlqc.siblings`): query, key and value; gate and up. At the end the backend may join its calls with what is around them:
norms, gates, sums.

Each kernel of the backend says whether it supports the site; the first that does gets it, and the report says which kernel
each site got and why the ones before it did not. A kernel takes the activation quantizer with it; one with fixed scales stays a
node of its own in front of kernels that do not take such scales, and one whose width the mask ratio chooses in front of every
kernel. Nothing falls back in silence: if no kernel supports a site, all
such sites are listed and nothing is lowered. What attentions read is quantized by its definition.

With `bfloat16` a kernel may round x to bfloat16 (relative error 2^-9) at sites whose activations are not quantized: 16 bits, as
W4A16 says. A kernel that knows how is faster then; others go on as they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from dlqc.backend import AnyKernel, CodedKernel, LinearSpec, Lowered, StaticKernel, choose_kernel, offered, remark
from dlqc.contract import Context, Pass, PassReport, Plan
from dlqc.errors import LoweringError
from dlqc.formats.coded import decode
from dlqc.formats.integer import IntFormat
from dlqc.graph import (
    act_format,
    activation_quantizer,
    args_of,
    call_before,
    constant_name,
    is_call,
    read,
    replace,
    site_name,
    sweep,
    width,
)
from dlqc.ops import LINEAR_CODED, LINEAR_PACKED, QUANTIZE_ACT, QUANTIZE_ACT_STATIC
from dlqc.siblings import merge


@dataclass(frozen=True)
class Lower(Pass):
    """Replace logical quantized linears by the backend's kernels.

    Args:
        bfloat16: whether activations that are not quantized may be rounded to bfloat16 where they meet a weight.
    """

    bfloat16: bool = False
    name: ClassVar[str] = "lower"
    needs: ClassVar[frozenset[str]] = frozenset({"packed"})
    gives: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        for name, spec in plan.specs():
            kernel, refusals = choose_kernel(ctx.backend, spec)
            if kernel is None:
                reasons = "; ".join(f"{k}: {why}" for k, why in refusals.items())
                plan.problems.append(f"{name}: no kernel of backend {ctx.backend.name!r} supports it ({reasons})")

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        sites = [node for node in graph.nodes if is_call(node, LINEAR_PACKED, LINEAR_CODED)]
        chosen = [self._choose(node, ctx) for node in sites]
        failed = [
            f"{name}: {'; '.join(f'{k}: {v}' for k, v in why.items())}"
            for name, kernel, _, why in chosen
            if kernel is None
        ]
        if failed:
            raise LoweringError(
                f"no kernel of backend {ctx.backend.name!r} supports {'; '.join(failed)}",
                remedy="Use backend='auto' or another scheme",
            )
        merged = merge(graph, ctx.weights, partial(self._alike, ctx=ctx)) if ctx.backend.merges else {}
        if merged:
            sites = [node for node in graph.nodes if is_call(node, LINEAR_PACKED, LINEAR_CODED)]
            chosen = [self._choose(node, ctx) for node in sites]
        # Calls that share a weight share its layout only if they also agree on the bias and on how x is quantized.
        made: dict[tuple[object, ...], _Made] = {}
        for node, (name, kernel, spec, refusals) in zip(sites, chosen, strict=True):
            assert kernel is not None
            key = (name, spec, *map(constant_name, (_parts_and_bias(node)[1], *_fixed(node))))
            if key not in made:
                same = sum(1 for other in made if other[0] == name)
                made[key] = self._lower(node, f"{name}.{same}" if same else name, kernel, spec, ctx)
                passed = "".join(f"; not {k}: {why}" for k, why in refusals.items())
                note = remark(kernel, spec)
                members = merged.get(name, [name])
                for member in members:
                    report.choices[member] = f"{kernel.name}{f' ({note})' if note else ''}{passed}"
            self._rewrite(node, kernel, made[key], graph, ctx)
            report.sites += len(merged.get(name, [name]))
        sweep(graph, ctx.weights)
        joined = ctx.backend.fuse(graph, ctx.weights)
        own = {what: count for what, count in joined.items() if what.startswith("native_")}
        along_with = {what: count for what, count in joined.items() if what not in own}
        report.metrics |= {"calls": len(sites), **own, **{f"fused_{what}": count for what, count in along_with.items()}}
        if merged:
            taken = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in sorted(along_with.items()))
            along = f"; they take along: {taken}" if taken else ""
            report.note(f"{report.sites} linears run as {len(sites)} calls, those that read one input as one{along}")
        return report

    def _alike(self, nodes: Sequence[fx.Node], ctx: Context) -> bool:
        """Whether the kernel of all of them is also that of the merged linear, which is as wide as they are together."""
        specs = [self._spec(node, ctx) for node in nodes]
        joint = replace_fields(specs[0], out_features=sum(spec.out_features for spec in specs))
        return len({_name(choose_kernel(ctx.backend, spec)[0]) for spec in (*specs, joint)}) == 1

    def _spec(self, node: fx.Node, ctx: Context) -> LinearSpec:
        spec = spec_of_node(node, ctx)
        return replace_fields(spec, bfloat16=self.bfloat16 and spec.act is None)

    def _choose(self, node: fx.Node, ctx: Context) -> tuple[str, AnyKernel | None, LinearSpec, dict[str, str]]:
        spec = self._spec(node, ctx)
        kernel, refusals = choose_kernel(ctx.backend, spec)
        return site_name(node), kernel, spec, refusals

    def _lower(self, node: fx.Node, name: str, kernel: AnyKernel, spec: LinearSpec, ctx: Context) -> _Made:
        parts, last = _parts_and_bias(node)
        seen = offered(kernel, spec)
        assert seen is not None
        tensors, bias = [_value(part, ctx) for part in parts], _value(last, ctx)
        if isinstance(kernel, CodedKernel):
            assert not isinstance(spec.weight, IntFormat)
            roles = sorted(spec.weight.parts_of(spec.out_features, spec.in_features))
            given = {role: tensor for role, tensor in zip(roles, tensors, strict=True) if tensor is not None}
            lowered = kernel.lower_coded(seen, given, bias)
        else:
            packed, scales, zeros = tensors
            assert packed is not None
            assert scales is not None
            if isinstance(kernel, StaticKernel):
                scale, zero = (_value(part, ctx) for part in _fixed(node))
                assert scale is not None
                lowered = kernel.lower_static(seen, packed, scales, zeros, bias, scale, zero)
            else:
                lowered = kernel.lower(seen, packed, scales, zeros, bias)
        names: list[str | None] = []
        for role, tensor in lowered.tensors.items():
            key = None if tensor is None else f"{name}.{kernel.name}.{role}"
            if key is not None and tensor is not None:
                ctx.weights.put(key, tensor)
            names.append(key)
        return lowered, names

    def _rewrite(self, node: fx.Node, kernel: AnyKernel, made: _Made, graph: fx.Graph, ctx: Context) -> None:
        lowered, names = made
        inputs = _inputs(node, kernel)
        tensors = [None if name is None else read(graph, ctx.weights, name, node) for name in names]
        args = (*inputs, tensors, *lowered.scalars) if lowered.listed else (*inputs, *tensors, *lowered.scalars)
        replace(node, call_before(graph, node, lowered.op, args))


_Made = tuple[Lowered, list[str | None]]


def _name(kernel: AnyKernel | None) -> str | None:
    return None if kernel is None else kernel.name


def _value(part: fx.Node | None, ctx: Context) -> torch.Tensor | None:
    return None if part is None else ctx.weights.value(str(constant_name(part)))


def _fixed(node: fx.Node) -> tuple[fx.Node | None, ...]:
    """The fixed scales and zero points of a linear's input, where it has some."""
    quantizer = activation_quantizer(node)
    return args_of(quantizer)[1:3] if is_call(quantizer, QUANTIZE_ACT_STATIC) else ()


def _inputs(node: fx.Node, kernel: AnyKernel) -> tuple[fx.Node | None, ...]:
    """What a kernel reads besides its tensors: x as it was before its quantizer, and with fixed scales each row's set of them.

    A kernel that takes no fixed scales reads what their quantizer makes of x.
    """
    quantizer = activation_quantizer(node)
    if quantizer is None or not (is_call(quantizer, QUANTIZE_ACT) or isinstance(kernel, StaticKernel)):
        return (args_of(node)[0],)
    x = args_of(quantizer)[0]
    return (x, args_of(quantizer)[3]) if isinstance(kernel, StaticKernel) else (x,)


def _parts_and_bias(node: fx.Node) -> tuple[list[fx.Node | None], fx.Node | None]:
    """The stored tensors of a packed or coded linear, and its bias."""
    if is_call(node, LINEAR_CODED):
        return list(args_of(node)[1]), args_of(node)[2]
    return list(args_of(node)[1:4]), args_of(node)[4]


def spec_of_node(node: fx.Node, ctx: Context) -> LinearSpec:
    """What a packed or coded linear computes."""
    x = args_of(node)[0]
    act = act_format(node)
    if is_call(node, LINEAR_CODED):
        _, _, bias, spec, out_features = args_of(node)
        return LinearSpec(width(x), out_features, decode(spec), act, bias is not None)
    _, packed, scales, zeros, bias, bits, group = args_of(node)
    dtype = str(ctx.weights[str(constant_name(scales))].leaf.dtype).removeprefix("torch.")
    fmt = IntFormat(bits, group or None, zeros is None, dtype)
    out_features = int(ctx.weights[str(constant_name(packed))].shape[0])
    return LinearSpec(width(x), out_features, fmt, act, bias is not None)
