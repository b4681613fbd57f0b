"""What `gpu.py` times: our kernels, the products of torch and those of packages that are installed, behind one interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlqc.formats.activation import ActFormat
from dlqc.formats.fp8 import Fp8Format, Fp8Weight
from dlqc.formats.planes import PlanesFormat, PlanesWeight
from dlqc.kernels.cuda import build, launch, planes, w4a8
from dlqc.kernels.triton import dispatch, float8, integer, packing, runtime, weight_only
from dlqc.kernels.triton.rows import quantize

WRONG = 1e-2


@dataclass(frozen=True)
class Entry:
    """An implementation at one shape.

    Attributes:
        name: what tables call it. weight_bits, act_bits: for the floor.
        copies: makes `count` calls that read different copies of the weight, each a function of x.
        truth: rows of Ŵ, float64 [R, K], for output features 0 … R-1, or None where x̂ · Ŵ is not plain.
        tolerance: the largest relative error in norm.
    """

    name: str
    weight_bits: float
    act_bits: int
    copies: Callable[[int], list[Callable[[Tensor], Tensor]]]
    truth: Tensor | None
    tolerance: float = WRONG


def ours(k: int, n: int, device_: str) -> list[Entry]:
    """The kernels of this project, each on its own random weight."""
    made = []
    for bits, group, act in (
        (4, 128, 16),
        (4, k, 16),
        (3, 128, 16),
        (2, 128, 16),
        (8, k, 16),
        (8, k, 8),
        (4, k, 8),
        (4, 128, 8),
    ):
        codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=device_)
        scales = (torch.rand(n, k // group, device=device_) + 0.5).bfloat16() / (k**0.5 * (1 << (bits - 1)))
        shown = min(n, 128)
        truth = (codes[:shown].double() - (1 << (bits - 1))) * scales[:shown].double().repeat_interleave(group, 1)
        name = f"W{bits}A{act} {'channel' if group == k else f'g{group}'}"
        packed = packed_weight(dispatch.Shape("w16" if act == 16 else "w8", bits, k, n, group), codes, scales)
        made.append(Entry(name, bits + 16 / group, act, _copies(packed), truth, 4e-3 if act == 16 else 2e-2))
        if (bits, group, act) in ((4, 128, 16), (8, k, 8)):
            # What an early begin gains for few tokens, descriptors and programs that stay for many.
            made.append(replace(made[-1], name=f"{name}, plain launch", copies=_copies(packed, plain=True)))
        if act == 8:
            given = Given(partial(integer.quantize, bits=8, packed=packed))
            made.append(replace(made[-1], name=f"{name}, codes given", copies=_copies(packed, given)))
    return [*made, *_float8(k, n, device_)]


@dataclass(frozen=True)
class E4m3:
    """A weight of `float8`: e4m3 [N', K'] and scales float32 [N']."""

    weight: Tensor
    scales: Tensor
    k: int
    n: int


def packed_weight(shape: dispatch.Shape, codes: Tensor, scales: Tensor) -> Any:
    """Codes uint8 [N, K] and scales [N, K / group] as the kernel of a shape reads them."""
    held = packing.columns(scales)
    sizes = (shape.k, shape.n, shape.bits, shape.group)
    if shape.kernel == "e4m3":
        stored = Fp8Weight(codes.view(torch.float8_e4m3fn), scales.float(), Fp8Format())
        return E4m3(*float8.arrange(stored), shape.k, shape.n)
    if shape.kernel == "w8":
        return integer.Packed(packing.arrange_integers(codes, shape.bits), held, None, *sizes)
    low = packing.arrange(codes, shape.bits, packing.run_of(shape.bits, shape.k, shape.group))
    return weight_only.Packed(low, held, None, *sizes)


def _float8(k: int, n: int, device_: str) -> list[Entry]:
    """Our product in e4m3, quantization of tokens included, where the device has such products."""
    if float8.unavailable() is not None:
        return []
    stored = Fp8Format().quantize(torch.randn(n, k, device=device_).div_(k**0.5))
    codes, scales = float8.arrange(stored)

    def call(weight: Tensor, x: Tensor) -> Tensor:
        return float8.float8(x, weight, scales, None, k, n)

    return [Entry("W8A8 e4m3", 8, 8, turns(codes, call), stored.dequantize()[: min(n, 128)].double(), 6e-2)]


def cuda(k: int, n: int, device_: str) -> list[Entry]:
    """The kernels in CUDA C++, where this machine can build them; on the CPU, for a rehearsal, their definitions."""
    if device_ != "cpu" and (reason := build.lacking()) is not None:
        print(f"the CUDA kernels are left out: {reason}")
        return []
    made, shown = [], min(n, 128)
    for group in (k, 128):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device_)
        scales = (torch.rand(n, k // group, device=device_) + 0.5).bfloat16() / (k**0.5 * 8)
        truth = (codes[:shown].double() - 8) * scales[:shown].double().repeat_interleave(group, 1)
        held = packing.columns(scales.float()) if group == k else w4a8.lay_out(scales, group, k)
        packed = w4a8.Packed(w4a8.arrange(codes), held, None, k, n, group == k)
        name = f"W4A8 {'channel' if group == k else f'g{group}'} CUDA"
        made.append(Entry(name, 4 + 16 / group, 8, _copies(packed), truth, 2e-2))
        if device_ != "cpu":
            given = Given(partial(w4a8.quantize, packed=packed, act_bits=8))
            made.append(replace(made[-1], name=f"{name}, codes given", copies=_copies(packed, given)))
    fmt, groups = PlanesFormat(2, 128), k // 128
    stored = PlanesWeight(
        torch.randint(0, 4, (n, k), dtype=torch.uint8, device=device_),
        (torch.rand(n, 2 * groups, device=device_) / k**0.5).bfloat16(),
        (torch.rand(2 * groups, 128, device=device_) + 0.5).bfloat16(),
        *((2,) * groups, fmt),
    )
    first = replace(stored, codes=stored.codes[:shown], row_scales=stored.row_scales[:shown])
    packed_planes = planes.lay_out(stored)
    bits = fmt.bits_per_weight(n, k)
    made.append(Entry("W2A16 planes g128 CUDA", bits, 16, _copies(packed_planes), first.dequantize().double(), 6e-3))
    return made


def _copies(
    packed: Any, given: Given | None = None, plain: bool = False
) -> Callable[[int], list[Callable[[Tensor], Tensor]]]:
    def copies(count: int) -> list[Callable[[Tensor], Tensor]]:
        calls = []
        for _ in range(count):
            if isinstance(packed, weight_only.Packed):
                own = replace(packed, low=packed.low.clone())
            else:
                own = replace(packed, words=packed.words.clone())
            calls.append(partial(run, own, given=given, plain=plain))
        return calls

    return copies


def run(
    packed: Any, x: Tensor, config: dispatch.Config | None = None, given: Given | None = None, plain: bool = False
) -> Tensor:
    """y [M, N], by the op's own choice or a given configuration; `plain`: one launch after the other, a tile a program."""
    if isinstance(packed, w4a8.Packed | planes.Packed):
        return run_cuda(packed, x, given)
    y = torch.empty(x.shape[0], packed.n, dtype=runtime.interpretable(x), device=x.device)
    where = runtime.device_of(x)
    if isinstance(packed, E4m3):
        config = config or float8.config_of(*packed.weight.shape, x.shape[0], where)
        q = quantize(x, 8, stored=packed.weight.shape[1], float8=True, dependent=config.dependent)
        float8.launch(q.q.view(torch.float8_e4m3fn), q.scales, packed.weight, packed.scales, None, y, config)
        return y
    config = config or dispatch.choose(packed.shape, x.shape[0], where)
    if plain:
        config = dispatch.Config(bn=128, bm=128) if config.persistent else replace(config, dependent=False)
    if isinstance(packed, integer.Packed):
        codes = given(x) if given else integer.quantize(x, 8, packed, dependent=config.dependent)
        integer.launch(codes, packed, None, y, config)
    elif config.dense:
        return weight_only.multiply_dense(x, packed, None, config)
    else:
        weight_only.launch(x, packed, None, y, config)
    return y


def run_cuda(packed: w4a8.Packed | planes.Packed, x: Tensor, given: Given | None) -> Tensor:
    """y [M, N] by a kernel in CUDA C++, or by its definition on the CPU."""
    if not build.launchable(x):
        if isinstance(packed, w4a8.Packed):
            x = ActFormat(8).fake_quantize(x)
        return (x.double() @ packed.dequantize().double().T).to(x.dtype)
    device = runtime.device_of(x)
    if isinstance(packed, planes.Packed):
        return planes.multiply(x, packed, None, device)
    if given is None:
        return w4a8.multiply(x, packed, None, 8, device)
    y = x.new_empty(x.shape[0], packed.n)
    w4a8.product(given(x), packed, None, y, packed.splits(launch.bucket(x.shape[0]), device))
    return y


def turns(
    weight: Tensor, call: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[int], list[Callable[[Tensor], Tensor]]]:
    """Copies of `call(weight, x)` for `Entry.copies`."""
    return lambda count: [partial(call, weight.clone()) for _ in range(count)]


class Given:
    """What quantization makes of x, made once for each x: to time a product by itself."""

    def __init__(self, quantize: Callable[[Tensor], Any]) -> None:
        self.quantize, self.seen = quantize, {}

    def __call__(self, x: Tensor) -> Any:
        if id(x) not in self.seen:
            self.seen[id(x)] = (x, self.quantize(x))
        return self.seen[id(x)][1]


def _rows(dtype: torch.dtype, top: float) -> Given:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1, keepdim=True).float() / top
        codes = x.float() / scale
        return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale

    return Given(quantize)


def library(k: int, n: int, device_: str) -> list[Entry]:
    """cuBLAS in 16 bits, torch's int4, int8 and FP8 products (codes given), and what else is installed."""
    w = torch.randn(n, k, device=device_).div_(k**0.5).bfloat16()
    truth = w[: min(n, 128)].double()
    made = [Entry("bf16", 16, 16, turns(w, lambda w, x: F.linear(x, w.to(x.dtype))), truth)]
    if device_ == "cpu":
        return made
    tokens = _rows(torch.int8, 127)
    q, scale = tokens.quantize(w)

    def int_mm(q: Tensor, x: Tensor) -> Tensor:
        codes, s = tokens(x)
        return (torch._int_mm(codes, q.T) * s * scale.T).bfloat16()

    made.append(Entry("torch _int_mm", 8, 8, turns(q, int_mm), truth, 2e-2))
    if torch.cuda.get_device_capability() >= (8, 9):
        floats = _rows(torch.float8_e4m3fn, 448)
        e4m3, most = floats.quantize(w)

        def scaled_mm(e4m3: Tensor, x: Tensor) -> Tensor:
            codes, s = floats(x)
            return torch._scaled_mm(codes, e4m3.T, s, most.T.contiguous(), out_dtype=torch.bfloat16)

        made.append(Entry("fp8 torch _scaled_mm rows", 8, 8, turns(e4m3, scaled_mm), truth, 6e-2))
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32, device=device_)
    scales = torch.full((k // 128, n), 0.01, dtype=torch.bfloat16, device=device_)
    both = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
    dense = (codes[: min(n, 128)].double() - 8) * float(scales[0, 0])
    for name, add in (
        (
            "tinygemm",
            lambda: torch.ops.aten._convert_weight_to_int4pack(
                (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8
            ),
        ),
        ("gemlite", lambda: gemlite(w)),
        ("bitsandbytes", lambda: bitsandbytes(w)),
    ):
        if name != "tinygemm" and not importlib.util.find_spec(name):
            continue
        try:
            found = add()
        except Exception as error:  # a peer's fault must not end the run
            print(f"{name} is left out: {type(error).__name__}: {error}"[:200])
            continue
        if name == "tinygemm":
            call = turns(found, lambda f, x: torch.ops.aten._weight_int4pack_mm(x, f, 128, both))
            found = Entry("torch int4 (tinygemm) g128", 4.25, 16, call, dense)
        made.append(found)
    return made


def gemlite(w: Tensor) -> Entry:
    from gemlite.helper import A16W4

    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    linear.weight.data = w
    made = A16W4(device=str(w.device)).from_linear(linear)
    return Entry("gemlite A16W4", 4.25, 16, lambda count: [made] * count, w[:128].double(), 0.2)


def bitsandbytes(w: Tensor) -> Entry:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    from bitsandbytes import matmul_4bit

    calls = turns(packed, lambda p, x: matmul_4bit(x, p.t(), state))
    return Entry("bitsandbytes nf4", 4.5, 16, calls, bnb.dequantize_4bit(packed, state)[:128].double())
