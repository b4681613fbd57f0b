"""The tables of `dlqc/kernels/triton/configs`: the shapes that they hold, the rule's word on them, and what a GPU says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_entries import E4m3, packed_weight, run
from torch import Tensor

from dlqc.formats.nf4 import levels
from dlqc.kernels.triton import dispatch, packing, runtime, weight_only
from dlqc.kernels.triton.dispatch import Shape

#: Input and output features: attention's, the feed-forward's, and gate and up in one.
LLADA = ((4096, 4096), (4096, 12288), (12288, 4096), (4096, 24576))


def shapes(k: int, n: int) -> list[Shape]:
    """What a table holds of a layer: 16- and 8-bit activations; NF4, codebooks and FP8 weights; two sign planes; W8A8 in e4m3."""
    w16 = [Shape("w16", bits, k, n, group) for bits, group in ((4, 128), (4, 32), (4, k), (2, 128), (3, 128), (8, k))]
    w8 = [Shape("w8", bits, k, n, group) for bits, group in ((8, k), (4, k), (4, 128))]
    coded = [Shape("coded", bits, k, n, group) for bits, group in ((4, 64), (3, k), (8, k))]
    return [*w16, *w8, *coded, Shape("w16", 1, 2 * k, n, 128), Shape("e4m3", 8, k, n, k)]


def predict(device: runtime.Device = runtime.H200) -> None:
    """Write the table of a device as the rule has it, marked as predicted."""
    held = [shape for k, n in LLADA for shape in shapes(k, n)]
    _write(device, dispatch.as_table(device, held, "predicted", {}))


def random_weight(shape: Shape, device_: str) -> Any:
    """A packed weight of random codes with scales of one."""
    bits, groups = shape.bits, shape.k // shape.group
    codes = torch.randint(0, 0x7F if bits == 8 else 1 << bits, (shape.n, shape.k), dtype=torch.uint8, device=device_)
    scales = torch.ones(shape.n, groups, dtype=torch.bfloat16, device=device_)
    if shape.kernel != "coded":
        return packed_weight(shape, codes, scales)
    packed = packed_weight(replace(shape, kernel="w16"), codes, scales)
    if bits == 8:
        return replace(packed, code=weight_only.FLOAT8)
    if bits == 4:
        return replace(packed, code=weight_only.SHARED, table=levels().to(device_))
    entries = torch.rand(groups, packing.padded(shape.n), 1 << bits, device=device_)
    return replace(packed, code=weight_only.PER_GROUP, scales=None, table=entries)


def tune(clock: Any, device_: str, layers: list[tuple[int, int]], rotated: int) -> None:
    """Measure a small grid around the rule's configuration and write the table of this device, marked as measured."""
    where = runtime.device_of(torch.empty(1, device=device_))
    found = {}
    held = [shape for k, n in layers for shape in shapes(k, n)]
    for shape in held:
        packed = random_weight(shape, device_)
        count = min(32, max(1, -(-rotated // shape.weight_bytes)))
        own = [replace(packed, **_fresh(packed)) for _ in range(count)]
        for size in dispatch.BUCKETS:
            x = torch.randn(size, shape.k, device=device_).bfloat16()
            start = dispatch.rule(shape, size, where)
            times = {}
            for config in _around(start, size, where):
                try:
                    times[config] = clock.seconds([lambda p=p, c=config, x=x: run(p, x, c) for p in own])
                except Exception as error:  # a tile that does not fit is no fault of the run
                    print(f"{shape.key} {size}: {config} left out ({type(error).__name__})")
            best = min(times, key=times.__getitem__)
            found[shape.key, size] = best
            print(
                f"{shape.key} {size}: {best}, {times[best] * 1e6:.2f} us; the rule's {times[start] * 1e6:.2f}",
                flush=True,
            )
    _write(where, dispatch.as_table(where, held, "measured", found))


def _around(start: dispatch.Config, size: int, where: runtime.Device) -> set[dispatch.Config]:
    """What is tried: the rule's, its neighbours in tile, splits and stages, with and without an early begin."""
    if start.persistent:
        tiles = {replace(start, bn=bn, stages=stages) for bn in (128, 256) for stages in (2, 3, 4)}
    else:
        tiles = {
            replace(start, bn=bn, splits=splits, stages=stages, dense=False, bm=min(size, 128))
            for bn in (64, 128)
            for splits in {1, 2, 4, 8, 16} & {max(1, start.splits // 2), start.splits, 2 * start.splits}
            for stages in (2, start.stages, 4)
        }
    if start.persistent:
        tiles.add(dispatch.Config(bn=128, bm=128))
    early = {replace(start, dependent=not start.dependent)} if where.warpgroups else set()
    return {start} | tiles | early


def _fresh(packed: Any) -> dict[str, Tensor]:
    role = "weight" if isinstance(packed, E4m3) else "low" if hasattr(packed, "low") else "words"
    return {role: getattr(packed, role).clone()}


def _write(device: runtime.Device, stored: dict[str, Any]) -> None:
    """A line for each shape and bucket."""
    path = dispatch.FOLDER / f"{device.name.lower().replace(' ', '_')}.json"
    path.write_text(spelled(stored), encoding="utf-8")
    print(f"wrote {_short(path)}")


def spelled(stored: dict[str, Any]) -> str:
    """The text of a table, a line for each shape and bucket."""
    rows = [
        f'"{key}": {{\n' + ",\n".join(f'  "{size}": {json.dumps(row)}' for size, row in sizes.items()) + "\n}"
        for key, sizes in stored["configs"].items()
    ]
    head = json.dumps({"device": stored["device"], "status": stored["status"]})
    return f'{head[:-1]}, "configs": {{\n' + ",\n".join(rows) + "\n}}\n"


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])
