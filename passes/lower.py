"""Hand every quantized linear to a kernel of the backend.

Before:  linear_packed(quantize_act(x), packed, scales, zeros, b), or linear_coded(quantize_act(x), parts, b)
After:   <kernel>(x, the kernel's own layout of the weight, …)

Each kernel of the backend says whether it supports the site; the first that does gets it, and the report says which kernel
each site got and why the ones before it did not. A kernel takes the activation quantizer with it. Nothing falls back in
silence: if no kernel supports a site, all such sites are listed and nothing is lowered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc.backend import AnyKernel, CodedKernel, LinearSpec, Lowered, choose_kernel
from dlqc.contract import Context, Pass, PassReport, Plan
from dlqc.errors import LoweringError
from dlqc.formats.activation import ActFormat
from dlqc.formats.coded import decode
from dlqc.formats.integer import IntFormat
from dlqc.graph import (
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
from dlqc.ops import LINEAR_CODED, LINEAR_PACKED


@dataclass(frozen=True)
class Lower(Pass):
    """Replace logical quantized linears by the backend's kernels."""

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
        # Calls that share a weight share its layout only if they also agree on the bias and on how x is quantized.
        made: dict[tuple[str, LinearSpec, str | None], _Made] = {}
        for node, (name, kernel, spec, refusals) in zip(sites, chosen, strict=True):
            assert kernel is not None
            key = (name, spec, constant_name(_parts_and_bias(node)[1]))
            if key not in made:
                same = sum(1 for other in made if other[0] == name)
                made[key] = self._lower(node, f"{name}.{same}" if same else name, kernel, spec, ctx)
                passed = "".join(f"; not {k}: {why}" for k, why in refusals.items())
                note = kernel.note(spec)
                report.choices[name] = f"{kernel.name}{f' ({note})' if note else ''}{passed}"
            self._rewrite(node, made[key], graph, ctx)
            report.sites += 1
        sweep(graph, ctx.weights)
        return report

    def _choose(self, node: fx.Node, ctx: Context) -> tuple[str, AnyKernel | None, LinearSpec, dict[str, str]]:
        spec = spec_of_node(node, ctx)
        kernel, refusals = choose_kernel(ctx.backend, spec)
        return site_name(node), kernel, spec, refusals

    def _lower(self, node: fx.Node, name: str, kernel: AnyKernel, spec: LinearSpec, ctx: Context) -> _Made:
        parts, last = _parts_and_bias(node)
        tensors = [None if part is None else ctx.weights.value(str(constant_name(part))) for part in parts]
        bias = None if last is None else ctx.weights.value(str(constant_name(last)))
        if isinstance(kernel, CodedKernel):
            assert not isinstance(spec.weight, IntFormat)
            roles = sorted(spec.weight.parts_of(spec.out_features, spec.in_features))
            given = {role: tensor for role, tensor in zip(roles, tensors, strict=True) if tensor is not None}
            lowered = kernel.lower_coded(spec, given, bias)
        else:
            assert tensors[0] is not None
            assert tensors[1] is not None
            lowered = kernel.lower(spec, tensors[0], tensors[1], tensors[2], bias)
        names: list[str | None] = []
        for role, tensor in lowered.tensors.items():
            key = None if tensor is None else f"{name}.{kernel.name}.{role}"
            if key is not None and tensor is not None:
                ctx.weights.put(key, tensor)
            names.append(key)
        return lowered, names

    def _rewrite(self, node: fx.Node, made: _Made, graph: fx.Graph, ctx: Context) -> None:
        lowered, names = made
        quantizer = activation_quantizer(node)
        x = args_of(node)[0] if quantizer is None else args_of(quantizer)[0]
        tensors = [None if name is None else read(graph, ctx.weights, name, node) for name in names]
        args = (x, tensors, *lowered.scalars) if lowered.listed else (x, *tensors, *lowered.scalars)
        replace(node, call_before(graph, node, lowered.op, args))


_Made = tuple[Lowered, list[str | None]]


def _parts_and_bias(node: fx.Node) -> tuple[list[fx.Node | None], fx.Node | None]:
    """The stored tensors of a packed or coded linear, and its bias."""
    if is_call(node, LINEAR_CODED):
        return list(args_of(node)[1]), args_of(node)[2]
    return list(args_of(node)[1:4]), args_of(node)[4]


def spec_of_node(node: fx.Node, ctx: Context) -> LinearSpec:
    """What a packed or coded linear computes."""
    x = args_of(node)[0]
    quantizer = activation_quantizer(node)
    act = None
    if quantizer is not None:
        _, act_bits, act_group, symmetric = args_of(quantizer)
        act = ActFormat(act_bits, act_group or None, bool(symmetric))
    if is_call(node, LINEAR_CODED):
        _, _, bias, spec, out_features = args_of(node)
        return LinearSpec(width(x), out_features, decode(spec), act, bias is not None)
    _, packed, scales, zeros, bias, bits, group = args_of(node)
    dtype = str(ctx.weights[str(constant_name(scales))].leaf.dtype).removeprefix("torch.")
    fmt = IntFormat(bits, group or None, zeros is None, dtype)
    out_features = int(ctx.weights[str(constant_name(packed))].shape[0])
    return LinearSpec(width(x), out_features, fmt, act, bias is not None)
