"""Export to compressed-tensors, the format that vLLM, SGLang and transformers read.

    pack-quantized   int2 … int8 weights: weight_packed int32 [N, ⌈K·bits/32⌉], weight_scale [N, G], weight_shape [2],
                     and weight_zero_point int32 [⌈N·bits/32⌉, G] where there are zero points (packed along N)
    int-quantized    int8 weights with int8 dynamic activations: weight int8 [N, K], weight_scale [N, 1]

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
    activation_quantizer,
    args_of,
    as_linear,
    constant_name,
    is_call,
    module_name,
    site_name,
    width,
)
from dlqc.ops import LINEAR_CODED, LINEAR_PACKED, LINEAR_Q, LOW_RANK
from dlqc.weights import Weights

if TYPE_CHECKING:
    from dlqc.compiled import Compiled


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


def sites_of(graph: fx.Graph, weights: Weights) -> Iterator[Site]:
    """The packed linears of a graph, each weight once."""
    seen: set[str] = set()
    for node in graph.nodes:
        if not is_call(node, LINEAR_PACKED):
            continue
        x, codes, scales, zeros, _, bits, group = args_of(node)
        names = [constant_name(part) for part in (codes, scales, zeros)]
        name = module_name(str(names[0]).removesuffix("_packed"))
        if name in seen:
            continue
        seen.add(name)
        quantizer = activation_quantizer(node)
        act = (
            None
            if quantizer is None
            else ActFormat(args_of(quantizer)[1], args_of(quantizer)[2] or None, bool(args_of(quantizer)[3]))
        )
        dtype = str(weights[str(names[1])].leaf.dtype).removeprefix("torch.")
        fmt = IntFormat(bits, group or None, zeros is None, dtype)
        yield Site(name, fmt, act, width(x), str(names[0]), str(names[1]), names[2])


def check_exportable(model: Compiled) -> list[Site]:
    """The sites to write, or an ExportError that lists everything the format cannot hold."""
    coded = [
        f"{constant_name(args_of(n)[1][0])}".rpartition(".")[0] + f" is stored as {decode(args_of(n)[3]).label}"
        for n in model.graph.nodes
        if is_call(n, LINEAR_CODED)
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
    problems += [f"{s.name} has activations in groups" for s in sites if s.act and s.act.group_size is not None]
    problems += [f"constant {n!r} is a transform" for n in model.weights if n.startswith("transform.")]
    corrections = [n for n in model.graph.nodes if is_call(n, LOW_RANK)]
    problems += [f"{site_name(args_of(n)[0])} has a correction of low rank" for n in corrections]
    added = [n for n in model.weights if ADDED_BIAS in n.split(".")]
    problems += [f"{n.partition(f'.{ADDED_BIAS}')[0]} has a bias that its class does not read" for n in added]
    if problems:
        raise ExportError(
            "; ".join(problems[:8]), where="compressed-tensors", remedy="Use save(), which holds any graph"
        )
    return sites


def export(model: Compiled, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` with its quantization_config into an existing folder."""
    sites = check_exportable(model)
    tensors: dict[str, torch.Tensor] = {}
    written: set[str] = set()
    for site in sites:
        tensors |= _tensors(site, model.weights)
        written |= {site.codes, site.scales, *([site.zeros] if site.zeros else [])}
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
    return {"num_bits": act.bits, "type": "int", "symmetric": act.symmetric, "strategy": "token", "dynamic": True}


def _ignored(model: Compiled, quantized: set[str]) -> list[str]:
    """Linears that stay as they are, by module name."""
    context = Context(model.weights, model.spec, backend=None)  # type: ignore[arg-type]
    linears = (as_linear(node, context.weights) for node in model.graph.nodes)
    return sorted({site.name for site in linears if site is not None} - quantized)
