"""Keys and values to codes and back in native code: the bits of `dlqc.kv_cache`, which is the definition."""

from __future__ import annotations

import math

import pytest
import torch
from guarded import at_the_end
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_llada import small_llada

import dlqc
from dlqc import kv_cache
from dlqc.errors import ContractError, FeasibilityError
from dlqc.graph import CODER
from dlqc.kernels.cpu.cache import CODER as NATIVE
from dlqc.kernels.cpu.cache import dequantize_cache, quantize_cache, unavailable
from dlqc.kv_cache import Coder, KeyFormat, Stored, ValueFormat
from dlqc.ops import CACHED

LIBRARY = "cache"  # whose paths `isa` takes in turn

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native code: {unavailable()}")


def numbers(sizes: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """Of all sizes that float16 scales reach, with constant rows and groups, and numbers on the borders of bins."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes, generator=g)
    x = x * 10.0 ** torch.randint(-9, 5, (sizes[0], sizes[1], 1, sizes[3]), generator=g)
    x[..., 0] = x[..., :1, 0]  # a channel that never changes
    x[:, -1, sizes[2] // 2 :] = 0.0
    x[0, 0, ::2] = x[0, 0, ::2].round()
    x = x.clamp(-6e4, 6e4).to(dtype)
    if layout == "by position":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "a window":
        return torch.cat([x, x, x], dim=2)[:, :, sizes[2] : 2 * sizes[2]]
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "features apart" else x


@pytest.mark.usefixtures("isa")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.sampled_from([1, 5, 16, 31, 32, 33, 70, 130]),
    width=st.sampled_from([1, 8, 16, 24, 32, 33]),
    bits=st.sampled_from(kv_cache.WIDTHS),
    group=st.sampled_from([32, 64, 128]),
    kind=st.sampled_from(["mean", "middle", "values"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["plain", "by position", "a window", "features apart"]),
    seed=st.integers(0, 99),
)
def test_the_bits_of_the_definition(
    batch: int,
    heads: int,
    length: int,
    width: int,
    bits: int,
    group: int,
    kind: str,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    x, keys, centers = numbers((batch, heads, length, width), dtype, layout, seed), kind != "values", None
    if kind == "mean":
        centers = x.float().transpose(2, 3).flatten(0, 2).mean(dim=1, keepdim=True).half()
    found = quantize_cache(x, centers, bits, group, keys)
    expected = kv_cache.quantize(x, centers, bits, group, keys)
    for made, wanted in zip(found, expected, strict=True):
        assert made.dtype is wanted.dtype
        assert torch.equal(made, wanted)
    sizes = (heads, length, width, bits, group, keys)
    y = dequantize_cache(*found, *sizes)
    assert y.shape == x.shape
    assert torch.equal(y, kv_cache.dequantize(*expected, *sizes))


@pytest.mark.usefixtures("isa")
def test_every_scale_of_float16() -> None:
    """Steps and centers are rounded by hand: as torch rounds, from below the smallest number to above the largest."""
    sizes = torch.logspace(-10, 4.6, 4001).repeat(4, 1) * torch.tensor([[1.0], [-1.0], [3.0], [0.999]])
    ends = torch.stack([sizes * 0, sizes, sizes * 0.3]).flatten(1)[None, None]  # one channel each, three tokens
    found, expected = quantize_cache(ends, None, 2, 32, True), kv_cache.quantize(ends, None, 2, 32, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Steps that fall between two numbers of float16, but for the last bits: there a product that is not rounded shows.
    places = torch.arange(0x7800, dtype=torch.int16).view(torch.float16).float()
    between = (places[1:] + places[:-1]) / 2
    ends = 2 * (between - 2**-24).clamp(min=0) / (1 + 2**-10)
    near = torch.cat([(ends.view(torch.int32) + i).clamp(min=0).view(torch.float32) for i in range(-2, 3)])
    x, zero = near[None, None, None], torch.zeros(near.shape[0], 1, dtype=torch.float16)
    found, expected = quantize_cache(x, zero, 2, 32, True), kv_cache.quantize(x, zero, 2, 32, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    given = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    given = given[torch.isfinite(given)][:, None]
    x = torch.zeros(1, 1, 1, given.shape[0])
    codes, steps, centers = quantize_cache(x, given, 8, 32, True)
    assert torch.equal(centers.view(torch.int16), given.view(torch.int16))
    y = dequantize_cache(codes, steps, centers, 1, 1, given.shape[0], 8, 32, True)
    assert torch.equal(y, kv_cache.dequantize(codes, steps, centers, 1, 1, given.shape[0], 8, 32, True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e6])
@pytest.mark.parametrize(
    "fmt", [KeyFormat(4, 4), KeyFormat(4, 4, symmetric=False), ValueFormat(4, 4)], ids=["mean", "middle", "values"]
)
def test_scales_that_do_not_fit_are_refused(fmt: kv_cache.Format, bad: float) -> None:
    """As the definition refuses them, with the same words."""
    said = []
    for coder in (NATIVE, Coder()):
        x = torch.randn(1, 2, 33, 16, generator=torch.Generator().manual_seed(0))
        x[0, 1, 20, 5] = bad
        store = Stored(fmt, (1, 2, 33, 16), torch.float32, torch.device("cpu"), first_masked=33, coder=coder)
        with pytest.raises(
            FeasibilityError, match=r"keys or values reach .*, their scales do not fit float16"
        ) as error:
            store.write(0, x)
        said.append(str(error.value))
        assert not store.segments
    assert said[0] == said[1]


def test_a_number_that_is_none_makes_its_scale_none() -> None:
    """Whatever the center that is given, and wherever in the group it stands."""
    for at in (0, 7, 31, 32):
        x = torch.zeros(1, 1, 40, 3)
        x[0, 0, at, 1] = math.nan
        _, steps, _ = quantize_cache(x, torch.zeros(3, 1, dtype=torch.float16), 4, 32, True)
        assert steps.isnan().tolist() == [[False] * 2, [at < 32, at >= 32], [False] * 2]


def test_what_is_not_stored_is_refused() -> None:
    x = torch.zeros(1, 1, 64, 32)
    message = "cache: 5 bits in groups of 48 tokens are not stored. Use 2, 3, 4, 8 bits and groups that 32 divides"
    for bits, group in ((5, 48), (4, 48), (4, 0)):
        with pytest.raises(RuntimeError, match=message.replace("5", str(bits), 1).replace("48", str(group))):
            quantize_cache(x, None, bits, group, True)
    with pytest.raises(ContractError, match=message):
        torch.ops.dlqc_cpu.quantize_cache_in_python(x, None, 5, 48, True)
    found = quantize_cache(x, None, 4, 32, True)
    with pytest.raises(RuntimeError, match="codes|shape|size"):
        dequantize_cache(found[0][:, :-4], *found[1:], 1, 64, 32, 4, 32, True)


def test_opcheck() -> None:
    x = torch.randn(1, 2, 40, 16)
    centers = x.mean(2).reshape(-1, 1).half()
    for arguments in ((x, centers, 3, 32, True), (x, None, 4, 32, False), (x.double(), centers, 2, 32, True)):
        torch.library.opcheck(quantize_cache, arguments, test_utils=("test_schema", "test_faketensor"))
    found = quantize_cache(x, centers, 3, 32, True)
    torch.library.opcheck(dequantize_cache, (*found, 2, 40, 16, 3, 32, True))


def test_nothing_is_read_or_written_outside() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = at_the_end(torch.randn(1, 2, 37, 24).to(dtype))
        for keys, bits in ((True, 3), (False, 4)):
            found = quantize_cache(x, None, bits, 32, keys)
            assert all(map(torch.equal, found, kv_cache.quantize(x, None, bits, 32, keys)))
            held = [at_the_end(part) for part in found]
            sizes = (2, 37, 24, bits, 32, keys)
            assert torch.equal(dequantize_cache(*held, *sizes), kv_cache.dequantize(*found, *sizes))


def test_the_runtime_works_with_it() -> None:
    """A cache made from a lowered graph has the native coder, and holds what the definition would hold."""
    recipe = "quantize_weights(bits=8, group_size=None, method=rtn), quantize_kv(keys=3, values=4), pack, lower"
    compiled = dlqc.compile(small_llada(101), recipe, backend="cpu", progress=False)
    marks = [n for n in compiled.lowered.nodes if n.op == "call_function" and n.target is CACHED]
    assert marks
    assert all(n.meta[CODER] is NATIVE for n in marks)
    ids = torch.randint(0, 100, (2, 50), generator=torch.Generator().manual_seed(0))
    model = compiled.cached
    cache, other = (model.new_cache(2, 50) for _ in range(2))
    for part in (*cache.keys, *cache.values):
        assert isinstance(part, Stored)
        assert part.coder is NATIVE
    for part in (*other.keys, *other.values):
        assert isinstance(part, Stored)
        part.coder = Coder()
    for store in (cache, other):
        model.step(ids, 0, store)
    logits = [model.step(ids[:, 10:20], 10, store) for store in (cache, other)]
    assert torch.equal(*logits)
    assert cache.nbytes == other.nbytes
