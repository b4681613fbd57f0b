"""The packed cache: bins and their bound, what a step reads, and the whole against plain loops in float64."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_attention import HEADS, MASK, VOCAB, WIDTH, ToyDenoiser, naive_forward

from dlqc.backend import load_backend
from dlqc.cached import CachedModel
from dlqc.capture import Captured, capture
from dlqc.compiled import build_module
from dlqc.contract import Context
from dlqc.diffusion.masking import generator
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import DlqcError, FeasibilityError, RecipeError
from dlqc.graph import copy_graph
from dlqc.kv_cache import (
    Bins,
    KeyFormat,
    Stored,
    ValueFormat,
    check_stored,
    correction,
    decode,
    encode,
    exchange,
    stored_bits,
)
from dlqc.passes.quantize_kv import QuantizeKv

SPEC = DiffusionSpec(mask_id=MASK, vocab_size=VOCAB, max_length=64)
SIZE = WIDTH // HEADS


@functools.cache
def captured(block: int | None) -> tuple[ToyDenoiser, Captured, DiffusionSpec]:
    model = ToyDenoiser(1, block)
    spec = SPEC if block is None else dataclasses.replace(SPEC, attention="block-causal")
    return model, capture(model, spec, dtype=torch.float64), spec


@functools.cache
def toy(options: QuantizeKv | None, block: int | None = None) -> tuple[ToyDenoiser, CachedModel]:
    model, found, spec = captured(block)
    graph, weights = copy_graph(found.graph), found.weights.clone()
    if options is not None:
        assert options.apply(graph, Context(weights, spec, load_backend("reference"))).sites == 2
    return model, CachedModel(build_module(graph, weights), spec)


# --- bins


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 3),
    st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 3e4]),
    st.sampled_from([0.0, 1.0, -40.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_no_number_is_off_by_more_than_half_a_step(
    bits: int, groups: int, size: float, shift: float, own: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, groups * 8, generator=rng, dtype=torch.float64).clamp(-2, 2) * size + shift
    rows[1] = rows[1, 0]  # a row of one number
    centers = rows.mean(1, keepdim=True).half() if own else None
    bins = Bins.of(rows, groups, bits, centers)
    found = bins.numbers(torch.float64)
    steps = bins.steps.double().repeat_interleave(8, 1)
    assert bool(((found - rows).abs() <= steps / 2 * (1 + 1e-12)).all())
    half = (rows.reshape(3, groups, 8) - bins.centers.double().unsqueeze(-1)).abs().amax(-1)
    # No wider than it has to be: float16's own resolution.
    assert bool((bins.steps.double() <= 2 * half / 2**bits * (1 + 2**-9) + 2**-23).all())
    assert bins.nbytes == bins.codes.numel() + 2 * (bins.steps.numel() + bins.centers.numel())


def test_a_number_that_float16_holds_is_exact_when_it_is_alone() -> None:
    rows = torch.tensor([[0.0] * 8, [-2.5] * 8])
    assert torch.equal(Bins.of(rows, 1, 2).numbers(torch.float32), rows)


def test_numbers_beyond_float16_are_refused() -> None:
    with pytest.raises(FeasibilityError, match=r"cache: keys or values reach 1e\+06, their scales do not fit float16"):
        Bins.of(torch.full((1, 8), 1e6), 1, 4)


# --- what is stored


def naive_bins(numbers: list[float], bits: int, center: float) -> list[float]:
    """The docstring's formula, one number at a time."""
    half = max(abs(x - center) for x in numbers)
    wide = half * 2 / 2**bits
    step = float(torch.tensor(wide * (1 + 2**-10) + 2**-24 if half else 0.0, dtype=torch.float64).half())
    found = []
    for x in numbers:
        code = min(max(math.floor((x - center) / step) + 2 ** (bits - 1), 0), 2**bits - 1) if step else 0
        found.append(center + (code + 0.5 - 2 ** (bits - 1)) * step)
    return found


def half(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).half())


def naive_stored(part: list[Tensor], fmt: KeyFormat | ValueFormat, bits: int) -> list[Tensor]:
    """What is read of vectors [D] at neighbouring positions, one head."""
    if bits == 16:
        return part
    if isinstance(fmt, ValueFormat):
        rows = []
        for v in part:
            least, most = float(v.min()), float(v.max())
            rows.append(torch.tensor(naive_bins(v.tolist(), bits, half(least + (most - least) / 2))))
        return [row.double() for row in rows]
    columns = []
    for j in range(SIZE):
        channel = [float(k[j]) for k in part]
        mean, column = half(sum(channel) / len(channel)), []
        for at in range(0, len(channel), fmt.group_size):
            group = channel[at : at + fmt.group_size]
            middle = half(min(group) + (max(group) - min(group)) / 2)
            column += naive_bins(group, bits, mean if fmt.symmetric else middle)
        columns.append(torch.tensor(column, dtype=torch.float64))
    return list(torch.stack(columns, dim=1))


def requantize(store: dict[Any, Any], window: range, masked: int, options: QuantizeKv) -> None:
    """Round what a forward left in the naive store, in the segments before and from the first mask on."""
    keys, values = options.formats["keys"], options.formats["values"]
    border = min(max(masked, window.start), window.stop)
    for layer in range(2):
        for segment, after in ((range(window.start, border), False), (range(border, window.stop), True)):
            for head in range(HEADS) if segment else ():
                pairs = [store[layer, i][head] for i in segment]
                ks = [k for k, _ in pairs] if keys is None else None
                vs = [v for _, v in pairs] if values is None else None
                if isinstance(keys, KeyFormat):
                    ks = naive_stored([k for k, _ in pairs], keys, keys.masked_bits if after else keys.bits)
                if isinstance(values, ValueFormat):
                    vs = naive_stored([v for _, v in pairs], values, values.masked_bits if after else values.bits)
                assert ks is not None
                assert vs is not None
                for i, k, v in zip(segment, ks, vs, strict=True):
                    store[layer, i][head] = (k, v)


OPTIONS = [
    QuantizeKv(keys=4, values=4, correct=False),
    QuantizeKv(keys=2, values=None, correct=False),
    QuantizeKv(keys=None, values=4),
    QuantizeKv(keys=3, values=4, symmetric=False, masked=8),
    QuantizeKv(keys=8, values=8, masked=16),
]


@pytest.mark.parametrize(
    ("options", "length"), [*((o, 12) for o in OPTIONS), (OPTIONS[3], 36)], ids=lambda value: str(value)[25:80]
)
def test_the_cached_steps_are_those_of_plain_loops_that_round_at_the_same_points(
    options: QuantizeKv, length: int
) -> None:
    """Refresh, dual and prefix windows, another refresh; 36 positions are a group and a part of one."""
    naive, model = toy(options)
    rng, store = generator(0, "ids"), {}
    x = torch.randint(0, VOCAB - 1, (length,), generator=rng).tolist()
    x[5:] = [MASK] * (length - 5)
    cache = model.new_cache(1, length)
    windows = [range(length), range(5, 9), range(5, 9), range(5, length), range(length), range(9, 12), range(9, length)]
    for number, window in enumerate(windows):
        expected = naive_forward(naive, x, window, store, length)
        found = model.step(torch.tensor([x[window.start : window.stop]]), window.start, cache)[0]
        torch.testing.assert_close(found, torch.stack([expected[i] for i in window]), rtol=0, atol=1e-9)
        masked = next((i for i in window if x[i] == MASK), window.stop)
        requantize(store, window, masked, options)
        x[5 + number] = number  # a commit
    plain = toy(None)[1]
    old = plain.new_cache(1, length)
    assert cache.nbytes < old.nbytes


def test_a_step_may_read_its_own_window_as_stored() -> None:
    keys, rng = Stored(KeyFormat(4, 4, fresh=False), (1, 1, 8, 4), torch.float32, torch.device("cpu")), generator(0, 1)
    new = torch.randn(1, 1, 8, 4, generator=rng)
    found = exchange(keys, new, 0, 8)
    assert torch.equal(found, keys.read(8))
    assert not torch.equal(found, new)
    fresh = Stored(KeyFormat(4, 4), (1, 1, 8, 4), torch.float32, torch.device("cpu"))
    assert torch.equal(exchange(fresh, new, 0, 8), new)
    assert torch.equal(fresh.read(8), keys.read(8))


def test_masked_positions_in_16_bits_are_bitwise_those_of_a_cache_as_it_is() -> None:
    (_, marked), (_, plain) = toy(QuantizeKv(keys=2, values=4, masked=16, correct=True)), toy(None)
    ids = torch.full((2, 12), MASK)
    caches = marked.new_cache(2, 12), plain.new_cache(2, 12)
    assert torch.equal(marked(ids), plain(ids))
    for start, stop in ((0, 12), (4, 8), (4, 12)):
        a, b = (m.step(ids[:, start:stop], start, c) for m, c in zip((marked, plain), caches, strict=True))
        assert torch.equal(a, b)
    ids[:, :6] = 1
    plain.step(ids, 0, caches[1])
    marked.step(ids, 0, caches[0])
    assert not torch.equal(marked.step(ids[:, 4:8], 4, caches[0]), plain.step(ids[:, 4:8], 4, caches[1]))


def test_a_refresh_takes_new_scales_and_drops_what_it_covers() -> None:
    store = Stored(ValueFormat(8, 8), (2, 1, 40, 8), torch.float32, torch.device("cpu"))
    rng = generator(0, 2)
    small, large = torch.randn(2, 1, 40, 8, generator=rng) * 1e-3, torch.randn(2, 1, 40, 8, generator=rng)
    for numbers in (large, small):
        store.first_masked = 10
        store.write(0, numbers)
        store.write(10, numbers[:, :, 10:20])
        store.write(10, numbers[:, :, 10:20])
    assert [(s.start, s.stop) for s in store.segments] == [(0, 10), (10, 40), (10, 20)]
    assert float((store.read(40) - small).abs().max()) < 1e-4
    assert store.nbytes == 2 * (40 + 10) * (8 + 4)
    assert store.read(15).shape == (2, 1, 15, 8)


def test_bits_are_counted_whole() -> None:
    rows, width = 64, 128
    for fmt in (KeyFormat(4, 4, 64), KeyFormat(2, 2, 32, symmetric=False), ValueFormat(3, 3)):
        store = Stored(fmt, (1, 2, rows, width), torch.float32, torch.device("cpu"), first_masked=rows)
        store.write(0, torch.randn(1, 2, rows, width, generator=generator(0, 3)))
        means = 2 * 2 * width if isinstance(fmt, KeyFormat) and fmt.symmetric else 0
        assert (store.nbytes - means) * 8 == stored_bits(fmt, width) * 2 * rows * width


# --- the correction of scores


def test_the_correction_makes_up_for_what_rounding_adds_on_average() -> None:
    """log E exp(t·q·e) for errors uniform in ±s/2 is Σ log(sinh(a)/a), a = t·q·s/2; what is left is below Σ a⁴/180."""
    rng = generator(0, 4)
    store = Stored(KeyFormat(2, 2, corrected=True), (1, 2, 40, 8), torch.float64, torch.device("cpu"), first_masked=40)
    store.write(0, torch.randn(1, 2, 40, 8, generator=rng, dtype=torch.float64))
    q = torch.randn(1, 4, 3, 8, generator=rng, dtype=torch.float64)
    found = correction(store, q, 37, 40, None)
    assert found is not None
    assert bool((found[..., 37:] == 0).all())
    steps = store.squared_steps(40, slice(0, 0)).sqrt()
    for head in range(4):
        for i in range(3):
            for j in range(37):
                a = (q[0, head, i] * steps[0, head // 2, j]).abs() / math.sqrt(8) / 2
                exact = float((a.sinh() / a).log().sum())
                assert -float(found[0, head, i, j]) == pytest.approx(exact, abs=float((a**4).sum()) / 180 + 1e-12)
    assert bool((found[..., :37] < 0).all())


def test_the_steps_of_the_correction_are_those_of_the_codes() -> None:
    store = Stored(KeyFormat(2, 2, corrected=True), (1, 1, 40, 8), torch.float64, torch.device("cpu"), first_masked=36)
    store.format = dataclasses.replace(store.format, masked_bits=16)
    numbers = torch.randn(1, 1, 40, 8, generator=generator(0, 5), dtype=torch.float64)
    store.write(0, numbers)
    steps = store.squared_steps(40, slice(0, 0)).sqrt()
    assert bool((steps[:, :, 36:] == 0).all())
    held = store.segments[0].held
    assert isinstance(held, Bins)
    assert torch.equal(steps[0, 0, :32], held.steps.double()[:, 0].expand(32, 8))
    assert torch.equal(steps[0, 0, 32:36], held.steps.double()[:, 1].expand(4, 8))


@pytest.mark.parametrize("block", [None, 4])
def test_a_corrected_step_is_attention_with_the_scores_corrected(block: int | None) -> None:
    """Against softmax spelled out; the mask of a block-causal model stays closed."""
    _, model = toy(QuantizeKv(keys=2, values=None, correct=True), block)
    cache, rng = model.new_cache(1, 12), generator(0, 6)
    ids = torch.randint(0, VOCAB - 1, (1, 12), generator=rng)
    model.step(ids, 0, cache)
    from dlqc.cached import cached_attention

    q, k, v = (torch.randn(1, HEADS, 4, SIZE, generator=rng, dtype=torch.float64) for _ in range(3))
    closed = torch.ones(4, 12, dtype=torch.bool)
    closed[0, :3] = False
    keys, values = cache.keys[0], cache.values[0]
    found = cached_attention(q, k, v, keys, values, 4, 12, mask=closed)
    assert isinstance(keys, Stored)
    seen = keys.read(12)
    seen[:, :, 4:8] = k
    scores = q @ seen.transpose(2, 3) / math.sqrt(SIZE)
    steps = keys.squared_steps(12, slice(4, 8))
    scores = scores - torch.einsum("bhld,bhsd->bhls", q**2, steps) / SIZE / 24
    expected = scores.masked_fill(~closed, -torch.inf).softmax(-1) @ values[:, :, :12]  # type: ignore[index]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- through a sampler


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_the_sampler_says_how_large_the_cache_was(kind: str) -> None:
    sampler = FastDLLMSampler(gen_length=32, block_length=8, cache=kind, threshold=None, steps=8)
    prompt = torch.randint(0, VOCAB - 1, (2, 8), generator=generator(0, 7))
    plain = sampler.run(toy(None)[1], prompt, SPEC)
    packed = sampler.run(toy(QuantizeKv(keys=4, values=4))[1], prompt, SPEC)
    assert plain.cache_bytes == 2 * 2 * 2 * HEADS * 40 * SIZE * 8
    assert 0 < packed.cache_bytes < plain.cache_bytes / 4
    none = dataclasses.replace(sampler, cache="none")
    assert none.run(toy(None)[1], prompt, SPEC).cache_bytes == 0
    many = sampler.run(toy(QuantizeKv(keys=8, values=8))[1], [prompt[0], prompt[1, :5]], SPEC)
    assert many.cache_bytes > 0


# --- texts and refusals


def test_formats_are_text() -> None:
    for fmt in (KeyFormat(2, 16, 64, False, False, True), ValueFormat(3, 8)):
        assert decode(encode(fmt)) == fmt


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeyFormat(5, 5), "bits: 5 is not a width of stored keys or values. Use 2, 3, 4 or 8"),
        (
            lambda: ValueFormat(4, 3),
            "masked: masked positions in 3 bits, the others in 4. Use 2, 3, 4, 8 or 16, and not less",
        ),
        (
            lambda: KeyFormat(4, 4, 24),
            "group_size: the codes of 24 tokens do not fill whole 32-bit words. Use 32, 64 or 128",
        ),
    ],
)
def test_formats_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make()
    assert str(error.value).startswith(message)


def test_a_mark_that_does_not_fit() -> None:
    assert check_stored(encode(KeyFormat()), 8, 1) is None
    assert check_stored(encode(KeyFormat()), 8, 2) == "keys are stored where others are read"
    assert (
        check_stored(encode(ValueFormat(2, 2)), 8, 2)
        == "8 channels of 2 bits are 16 bits, no whole number of 32-bit words"
    )
    assert check_stored("rm -rf", 8, 1) == "'rm -rf' spells no weight format"
    with pytest.raises(DlqcError):
        decode("values(bits=4)")
