"""Export to compressed-tensors, the format that vLLM, SGLang and transformers read.

    pack-quantized   int2 … int8 weights: weight_packed int32 [N, ⌈K·bits/32⌉], weight_scale [N, G], weight_shape [2],
                     and weight_zero_point int32 [⌈N·bits/32⌉, G] where there are zero points (packed along N)
    int-quantized    int8 weights with int8 activations: weight int8 [N, K], weight_scale [N, 1]

Activations are dynamic per token, or have one fixed scale each: input_scale float32 [1], and input_zero_point int8 [1] unless
they are symmetric. Linears that read the same value get the same numbers.

Our packed rows are the format's words byte for byte, so codes are not touched on the way. Stored codes are unsigned;
the format says q = code - 2^(bits-1), and so do its zero points. Everything that is not quantized is written under its
checkpoint name, in its stored dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import fx

from dlqc.canonical import PLUS_ONE
from dlqc.contract import Context
from dlqc.errors import ExportError
from dlqc.formats.activation import ActFormat
from dlqc.formats.coded import decode
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack, unpack
from dlqc.graph import (
    ADDED_BIAS,
    CODED_LINEARS,
    HEAD_QUANTIZERS,
    act_format,
    activation_quantizer,
    args_of,
    as_linear,
    constant_name,
    is_call,
    site_name,
    width,
)
from dlqc.ops import (
    ATTENTION,
    CACHED,
    EMBEDDING_PACKED,
    LINEAR_PACKED,
    LINEAR_Q,
    LOW_RANK,
    QUANTIZE_ACT_STATIC,
)
from dlqc.weights import Weights

if TYPE_CHECKING:
    from dlqc.compiled import Compiled

#: What quantizes in an attention, which the format has no word for.
IN_ATTENTION = (*HEAD_QUANTIZERS, ATTENTION)


#: End of the names of linears that no checkpoint has: the outlier columns of one that has been split.
OWN = ".outliers.weight"


@dataclass(frozen=True)
class Site:
    """One quantized linear of the graph, ready to be written."""

    name: str
    weight: IntFormat
    act: ActFormat | None
    in_features: int
    codes: str
    scales: str
    zeros: str | None
    input_scale: str | None = None
    input_zero: str | None = None


def sites_of(graph: fx.Graph, weights: Weights) -> Iterator[Site]:
    """The packed linears of a graph, each weight once."""
    seen: set[str] = set()
    for node in graph.nodes:
        if not is_call(node, LINEAR_PACKED):
            continue
        x, codes, scales, zeros, _, bits, group = args_of(node)
        names = [constant_name(part) for part in (codes, scales, zeros)]
        name = site_name(node)
        if name in seen:
            continue
        seen.add(name)
        act = act_format(node)
        dtype = str(weights[str(names[1])].leaf.dtype).removeprefix("torch.")
        fmt = IntFormat(bits, group or None, zeros is None, dtype)
        yield Site(name, fmt, act, width(x), str(names[0]), str(names[1]), names[2], *_fixed(node))


def _fixed(node: fx.Node) -> tuple[str | None, str | None]:
    """The fixed scale and zero point of a linear's input, where it has some."""
    quantizer = activation_quantizer(node)
    if not is_call(quantizer, QUANTIZE_ACT_STATIC):
        return None, None
    scale, zero = (constant_name(part) for part in args_of(quantizer)[1:3])
    return scale, zero


def check_exportable(model: Compiled) -> list[Site]:
    """The sites to write, or an ExportError that lists everything the format cannot hold."""
    coded = [
        f"{constant_name(args_of(n)[1][0])}".rpartition(".")[0] + f" is stored as {decode(args_of(n)[3]).label}"
        for n in model.graph.nodes
        if is_call(n, *CODED_LINEARS)
    ]
    if coded:
        raise ExportError(
            "; ".join(coded[:8]) + ", and what is written here is integers",
            where="compressed-tensors",
            remedy="Use save(), which holds any graph, or quantize to integers",
        )
    if any(is_call(n, LINEAR_Q) for n in model.graph.nodes):
        raise ExportError("the codes are not packed", where="graph", remedy="Add 'pack' to the recipe")
    sites = list(sites_of(model.graph, model.weights))
    if not sites:
        raise ExportError("no linear is quantized", where="graph", remedy="Compile with a recipe that quantizes")
    problems = [f"{name} is a part of a fused projection" for name in model.weights if ".rows_" in name]
    problems += [f"{s.name} is transposed in its checkpoint" for s in sites if "transposed" in s.name.split(".")]
    problems += [
        f"{site_name(n)} is an embedding in {args_of(n)[4]} bits"
        for n in model.graph.nodes
        if is_call(n, EMBEDDING_PACKED)
    ]
    problems += [f"{n.removesuffix('.weight')} is a linear of its own" for n in model.weights if n.endswith(OWN)]
    problems += [f"{s.name} has activations in groups" for s in sites if s.act and s.act.group_size is not None]
    problems += [f"constant {n!r} is a transform" for n in model.weights if n.startswith("transform.")]
    corrections = [n for n in model.graph.nodes if is_call(n, LOW_RANK)]
    problems += [f"{site_name(args_of(n)[0])} has a correction of low rank" for n in corrections]
    added = [n for n in model.weights if ADDED_BIAS in n.split(".")]
    problems += [f"{n.partition(f'.{ADDED_BIAS}')[0]} has a bias that its class does not read" for n in added]
    problems += [f"{s.name} has {s.act.sets} sets of input scales" for s in sites if s.act and s.act.sets > 1]
    problems += [f"{s.name} has activations in {s.act.label}" for s in sites if s.act and s.act.widths]
    problems += _more_scales_than_one(model.graph)
    problems += [f"%{n.name} quantizes in an attention" for n in model.graph.nodes if is_call(n, *IN_ATTENTION)]
    problems += [f"%{n.name} stores a cache in few bits" for n in model.graph.nodes if is_call(n, CACHED)]
    if problems:
        raise ExportError(
            "; ".join(problems[:8]), where="compressed-tensors", remedy="Use save(), which holds any graph"
        )
    return sites


def _more_scales_than_one(graph: fx.Graph) -> list[str]:
    """A module that is called on several values, each with fixed scales of its own."""
    scales: dict[str, set[str | None]] = {}
    for node in graph.nodes:
        if is_call(node, LINEAR_PACKED):
            scales.setdefault(site_name(node), set()).add(_fixed(node)[0])
    return [f"{name} reads {len(found)} inputs of different scales" for name, found in scales.items() if len(found) > 1]


def export(model: Compiled, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` with its quantization_config into an existing folder."""
    sites = check_exportable(model)
    tensors: dict[str, torch.Tensor] = {}
    written: set[str] = set()
    for site in sites:
        tensors |= _tensors(site, model.weights)
        names = (site.codes, site.scales, site.zeros, site.input_scale, site.input_zero)
        written |= {name for name in names if name is not None}
    for name in model.weights:
        if name not in written:
            as_read, value = _as_checkpoint(name, model.weights.value(name))
            tensors[as_read] = value
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = dict(model.config) | {"quantization_config": quantization_config(model, sites)}
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")


def _as_checkpoint(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Name and value by which the checkpoint's class reads a constant: a gain 1 + w is stored as w."""
    parts = name.split(".")
    if PLUS_ONE not in parts:
        return name, value
    return ".".join(part for part in parts if part != PLUS_ONE), (value.double() - 1).to(value.dtype)


def _is_int8(site: Site) -> bool:
    return site.weight.bits == 8 and site.act is not None and site.act.bits == 8


def _tensors(site: Site, weights: Weights) -> dict[str, torch.Tensor]:
    packed, scales = weights.value(site.codes), weights.value(site.scales)
    if _is_int8(site):
        codes = unpack(packed, 8, site.in_features)
        found = {"weight": (codes.to(torch.int16) - 128).to(torch.int8), "weight_scale": scales}
        if site.zeros is not None:
            points = unpack(weights.value(site.zeros), 8, scales.shape[1])
            found["weight_zero_point"] = (points.to(torch.int16) - 128).to(torch.int8)
    else:
        shape = torch.tensor([packed.shape[0], site.in_features])
        found = {"weight_packed": packed.view(torch.int32), "weight_scale": scales, "weight_shape": shape}
        if site.zeros is not None:
            points = unpack(weights.value(site.zeros), site.weight.bits, scales.shape[1])
            along_rows = pack(points.T.contiguous(), site.weight.bits).view(torch.int32)
            found["weight_zero_point"] = along_rows.T.contiguous()
    for role, name in (("input_scale", site.input_scale), ("input_zero_point", site.input_zero)):
        if name is not None:
            found[role] = weights.value(name).reshape(1)
    return {f"{site.name}.{role}": tensor for role, tensor in found.items()}


def quantization_config(model: Compiled, sites: list[Site]) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group a scheme, with the modules it covers by name."""
    groups: dict[tuple[IntFormat, ActFormat | None], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.weight, site.act), []).append(site)
    formats = {("int-quantized" if _is_int8(members[0]) else "pack-quantized") for members in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(members) for i, members in enumerate(groups.values())},
        "ignore": _ignored(model, {site.name for site in sites}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(members: list[Site]) -> dict[str, Any]:
    weight, act = members[0].weight, members[0].act
    return {
        "targets": [site.name for site in members],
        "format": "int-quantized" if _is_int8(members[0]) else "pack-quantized",
        "weights": {
            "num_bits": weight.bits,
            "type": "int",
            "symmetric": weight.symmetric,
            "strategy": "channel" if weight.group_size is None else "group",
            "group_size": weight.group_size,
            "dynamic": False,
            "actorder": None,
        },
        "input_activations": None if act is None else _activations(act),
        "output_activations": None,
    }


def _activations(act: ActFormat) -> dict[str, Any]:
    scales = {"strategy": "tensor", "dynamic": False} if act.static else {"strategy": "token", "dynamic": True}
    return {"num_bits": act.bits, "type": "int", "symmetric": act.symmetric} | scales


def _ignored(model: Compiled, quantized: set[str]) -> list[str]:
    """Linears that stay as they are, by module name."""
    context = Context(model.weights, model.spec, backend=None)  # type: ignore[arg-type]
    linears = (as_linear(node, context.weights) for node in model.graph.nodes)
    return sorted({site.name for site in linears if site is not None} - quantized)
