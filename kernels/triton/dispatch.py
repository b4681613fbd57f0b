"""Which tile, split and pipeline a kernel gets, by number of tokens: a table for known devices, a rule for all others.

Tokens come in buckets, and everything about a launch follows from the bucket. So a row of the result has the same bits
whatever stands beside it in the batch, as long as the batch stays in its bucket.

A table is a file in `configs/`, made and replaced by `benchmarks/gpu.py --tune`; its `status` is "measured", or "predicted"
while it holds what the rule says.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dlqc.kernels.triton.packing import block_of, padded, run_of
from dlqc.kernels.triton.runtime import H200, Device

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FOLDER = Path(__file__).parent / "configs"
#: From here on a weight is worth making dense for a library's product: it is a small part of the time by then.
DENSE = 2048
#: From this bucket on (above 512 tokens) there is nothing but tensor cores to wait for. Programs stay where each has a tile and
#: some have more, whatever number of tokens the bucket holds.
PERSISTENT = 1024
#: Output features and tokens of the tiles of programs that stay.
STAYING = (256, 128)
#: Up to here a product takes so few microseconds that the gap ahead of it counts.
DEPENDENT = 128


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Attributes:
        bn, bm: output features and tokens of a tile. splits: shares of K, summed afterwards in a fixed order.
        warps, stages: of a program, as Triton takes them.
        pre: scale weights before the product and not its sums.
        dense: make the weight dense and leave the product to the library.
        persistent: programs stay and take tile after tile (device/persistent.py).
        dependent: begin before the kernel ahead has ended (device/dependent.py).
    """

    bn: int = 64
    bm: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 3
    pre: bool = False
    dense: bool = False
    persistent: bool = False
    dependent: bool = False


@dataclass(frozen=True)
class Shape:
    """What a choice depends on besides the device and the tokens.

    Attributes:
        kernel: "w16", "coded" (as w16, for formats that are not integers), "w8" or "e4m3". bits: of a weight.
        k, n: input and output features. group: input features with one scale.
    """

    kernel: str
    bits: int
    k: int
    n: int
    group: int

    @property
    def key(self) -> str:
        """As tables spell it."""
        group = "channel" if self.group >= self.k else f"g{self.group}"
        return f"{self.kernel} int{self.bits} {group} {self.k}x{self.n}"

    @property
    def weight_bytes(self) -> int:
        """Of codes and 16-bit scales."""
        return self.n * (self.k * self.bits // 8 + 2 * -(-self.k // self.group))


def bucket(tokens: int) -> int:
    """The smallest bucket that holds so many tokens; above the largest, multiples of it.

    >>> bucket(1), bucket(17), bucket(5000)
    (16, 32, 8192)
    """
    found = next((size for size in BUCKETS if tokens <= size), None)
    return found or -(-tokens // BUCKETS[-1]) * BUCKETS[-1]


def choose(shape: Shape, tokens: int, device: Device = H200) -> Config:
    """The table's word on a launch, or else the rule's."""
    size = bucket(tokens)
    row = table(device.name).get(shape.key, {})
    return row.get(min(size, BUCKETS[-1])) or rule(shape, size, device)


def rule(shape: Shape, size: int, device: Device = H200) -> Config:
    """What the roofline says of a bucket of `size` tokens.

    Few tokens wait for memory: all loads of a layer should be under way at once, which takes about four programs a unit, so K is
    split, as long as writing and reading the parts costs less than half of reading the weight. Many tokens wait for the tensor
    cores: one large tile a program, and scales applied to weights, since there are fewer of them than of sums.
    """
    wide = shape.kernel in ("w16", "coded")
    if wide and size >= DENSE:
        return Config(bn=64, dense=True)
    if size >= PERSISTENT and tiled(shape, device) and _tiles(shape, size) > device.units:
        return Config(*STAYING, warps=8, stages=min(4, _stages(device)), persistent=True)
    block = block_of(shape.bits, run_of(shape.bits, shape.k, shape.group)) if wide else 128
    entries = shape.kernel == "coded" and shape.bits < 8
    # Tokens of a long block would fill the shared memory, and entries of tables the registers of single warps.
    large = 64 if block >= 512 or (entries and not device.warpgroups) else 128
    bm = min(size, large)
    bn = 64 if size < 64 else large
    programs = padded(shape.n) // bn * -(-size // bm)
    blocks = -(-shape.k // block)
    splits = 1
    while (
        2 * splits * programs <= 4 * device.units
        and 4 * splits <= blocks
        and 2 * splits * size * shape.n * 8 <= shape.weight_bytes
    ):
        splits *= 2
    # Sums of groups beside those of all of K (in e4m3, of blocks) are twice the registers, and so are numbers made of codes: the
    # tile is then spread over more threads, as it is where a product is one warp's.
    both, tables = shape.kernel != "w8" or shape.group < shape.k, shape.kernel == "coded"
    crowded = bm > 64 and both if device.warpgroups else bm > 32 or (tables and block >= 512)
    warps = 8 if crowded or (bn > 64 and tables) else 4
    stage = bm * block * (2 if wide else 1) + bn * block * shape.bits // 8
    spare = device.shared - ((block * bn * 4) if tables else 0)  # entries of tables change places there
    stages = max(1, min(3, spare // stage))
    early = device.warpgroups and size <= DEPENDENT
    return Config(bn, bm, splits, warps, stages, pre=wide and bm >= 64, dependent=early)


def tiled(shape: Shape, device: Device) -> bool:
    """Whether tiles can be copied as they lie, three stages of them at least: int8, a scale a channel, Hopper and later."""
    plain = shape.kernel == "w8" and shape.bits == 8 and shape.group >= shape.k
    return plain and device.warpgroups and _stages(device) >= 3


def _tiles(shape: Shape, size: int) -> int:
    """Tiles of the fewest tokens in a bucket: one more than half of it."""
    bn, bm = STAYING
    return -(-(size // 2 + 1) // bm) * -(-padded(shape.n) // bn)


def _stages(device: Device) -> int:
    """How many blocks of 128 features of tiles of 128 x 256 fit beside what scales and stores one."""
    return (device.shared - 32768) // (sum(STAYING) * 128)


@cache
def table(device: str) -> dict[str, dict[int, Config]]:
    """The configurations of a device, by shape and bucket; empty for one that has no file."""
    for path in sorted(FOLDER.glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if device.startswith(stored["device"]):
            rows = stored["configs"].items()
            return {key: {int(size): Config(**row) for size, row in sizes.items()} for key, sizes in rows}
    return {}


def as_table(device: Device, shapes: list[Shape], status: str, found: dict[tuple[str, int], Config]) -> dict[str, Any]:
    """What a file holds: the found configuration of a shape and bucket, or the rule's."""
    rows: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        rows[shape.key] = {}
        for size in BUCKETS:
            config = found.get((shape.key, size)) or rule(shape, size, device)
            rows[shape.key][str(size)] = asdict(config)
    return {"device": device.name, "status": status, "configs": rows}
