"""Replayed forwards: which graphs are recorded, what they are given, when they go. A fake recorder stands for the GPU."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dlqc
import dlqc.kernels.reference.coded
from dlqc.backends.triton_graphs import SPARE, Key, captured, uncapturable
from dlqc.cached import CachedModel
from dlqc.compiled import Compiled
from dlqc.diffusion.masking import device_of
from dlqc.errors import FeasibilityError, LoweringError
from dlqc.graph import aten
from dlqc.kernels.triton import runtime
from dlqc.kv_cache import KeyValueCache
from dlqc.ops import CACHED

CODED = torch.ops.dlqc_reference.coded.default
RATIOS = (
    "calibrate(sampler=forward_process, sequences=4), quantize_weights(bits=8, group_size=None, symmetric=True, method=rtn), "
    "quantize_activations(ranges=min_max, buckets=3), pack, lower"
)
RECIPE = "quantize_weights(bits=4, group_size=32, method=rtn), pack, lower"


class Fake:
    """Replays by doing the work again, into the tensor of the first time, as a graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = torch.full_like(work(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())

        return replay, result


@pytest.fixture(scope="module")
def model() -> Compiled:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "unavailable", lambda: None)
        from zoo import MASK, ZOO

        return dlqc.compile(ZOO["llada"](), RECIPE, backend="triton", mask_id=MASK, progress=False)


def ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_buckets_refills_and_results(model: Compiled) -> None:
    fake = Fake()
    fast = captured(model, recorder=fake)
    kept = []
    for rows, length, seed in ((3, 7, 1), (4, 7, 2), (1, 7, 3), (3, 9, 4), (3, 7, 5)):
        x = ids(rows, length, seed)
        kept.append((fast(x), model(x)))
    for found, expected in kept:  # also what earlier calls returned is still theirs
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sorted(fast.replays.recordings) == [Key(1, 7), Key(4, 7), Key(4, 9)]
    assert (fake.recorded, fake.replayed) == (3, 5)
    # Where samplers put the ids of a prompt.
    assert device_of(fast) == device_of(model) == device_of(fast.cached) == torch.device("cpu")
    assert fast(ids(0, 7, 0)).shape == (0, 7, model(ids(1, 7, 0)).shape[2])


def test_the_oldest_goes_and_moved_tensors_drop_all(model: Compiled) -> None:
    fake = Fake()
    fast = captured(model, recorder=fake, limit=2)
    for length in (5, 6, 5, 7, 5):
        fast(ids(1, length, 0))
    assert list(fast.replays.recordings) == [Key(1, 7), Key(1, 5)]
    assert fake.recorded == 3
    name, buffer = next(iter(model.module.named_buffers()))
    model.module.register_buffer(name, buffer.clone())
    fast(ids(1, 5, 0))
    assert list(fast.replays.recordings) == [Key(1, 5)]
    assert fake.recorded == 4


@pytest.mark.parametrize("anew", [False, True])
def test_moved_tensors_drop_the_steps(model: Compiled, anew: bool) -> None:
    own, fake, x = copy.deepcopy(model), Fake(), ids(1, 8, 0)
    fast = captured(own, recorder=fake)

    def step(of: CachedModel) -> Tensor:
        return of.step(x, 0, of.new_cache(1, 8))

    steps = fast.cached
    before = step(steps)
    assert fast.cached is steps
    if anew:
        for name, part in list(own.module.named_buffers()):
            own.module.register_buffer(name, part * 1.5 if part.is_floating_point() else part)
    else:
        own._apply(lambda part: part * 1.5 if part.is_floating_point() else part.clone())
    torch.testing.assert_close(step(fast.cached), step(own.cached), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(step(fast.cached), before, rtol=1e-2, atol=1e-2)
    assert fast.cached is not steps
    assert not steps.replays.recordings
    assert fake.recorded == 2


def test_mask_ratios_are_told(model: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows at several ratios by one recording; a bucket's rows that are left over count as masked."""
    monkeypatch.setattr(runtime, "unavailable", lambda: None)
    from zoo import MASK, ZOO

    counting = dlqc.compile(ZOO["llada"](), RATIOS, backend="triton", mask_id=MASK, progress=False)
    fake, x = Fake(), ids(3, 8, 0)
    fast = captured(counting, recorder=fake)
    steps, plain = fast.cached, counting.cached
    cache, other = steps.new_cache(3, 8), plain.new_cache(3, 8)
    found = []
    for ratio in (torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)):
        found.append(fast(x, ratio))
        torch.testing.assert_close(found[-1], counting(x, ratio), rtol=1e-5, atol=1e-5)
        made = steps.step(x, 0, cache, mask_ratio=ratio)
        torch.testing.assert_close(made, plain.step(x, 0, other, mask_ratio=ratio), rtol=1e-5, atol=1e-5)
    assert not torch.equal(*found)
    assert list(fast.replays.recordings) == [Key(4, 8, told=("mask_ratio",))]
    assert fast.replays.recordings[Key(4, 8, told=("mask_ratio",))].inputs["mask_ratio"][3] == 1
    assert [key.told for key in steps.replays.recordings] == [("mask_ratio",)]
    assert fake.recorded == 2
    fast = captured(model, recorder=fake)  # which does not go by it
    fast(x, ratio)
    assert list(fast.replays.recordings) == [Key(4, 8)]
    with pytest.raises(TypeError, match="mask_ration"):
        steps.step(x, 0, cache, mask_ration=ratio)  # type: ignore[call-arg]


class Once:
    """Records what a graph would, and nothing of how it was made."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        return (lambda: None), work()


def test_graphs_go_with_who_holds_them(model: Compiled) -> None:
    fast = captured(model, recorder=Once())
    steps = fast.cached
    cache = steps.new_cache(1, 6)
    fast(ids(1, 6, 0))
    steps.step(ids(1, 6, 0), 0, cache)
    held = [weakref.ref(found) for of in (fast, steps) for found in of.replays.recordings.values()]
    assert len(held) == 2
    gc.disable()  # no cycle has to be found
    try:
        del fast, steps, cache
        assert [found() for found in held] == [None, None]
    finally:
        gc.enable()


def test_samplers_take_it(model: Compiled) -> None:
    options: dict[str, Any] = {"sampler": "llada", "steps": 4, "gen_length": 8, "block_length": 8}
    fast = captured(model, recorder=Fake())
    found, expected = (dlqc.generate(m, ids(1, 6, 0), **options) for m in (fast, model))
    assert list(found.ids) == list(expected.ids)


def test_steps_are_recorded_by_window_and_cache(model: Compiled) -> None:
    fake, plain = Fake(), model.cached
    steps = captured(model, recorder=fake).cached
    x = ids(2, 12, 0)

    def decode(of: CachedModel, cache: KeyValueCache, seed: int) -> list[Tensor]:
        found = [of.step(x, 0, cache)]
        for start, stop, total in ((4, 8, 12), (4, 8, 12), (8, 12, 12), (2, 6, 8)):
            found.append(of.step(ids(2, stop - start, seed + start), start, cache, total=total))
        return found

    for turn in range(2):
        for found, expected in zip(
            decode(steps, steps.new_cache(2, 12), turn), decode(plain, plain.new_cache(2, 12), turn), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The second cache has the tensors of the first.
    assert (fake.recorded, fake.replayed) == (4, 10)
    assert [key[1:4] for key in steps.replays.recordings] == [(12, 0, 12), (4, 4, 12), (4, 8, 12), (4, 2, 8)]
    first, second = steps.new_cache(2, 12), steps.new_cache(2, 12)
    assert not any(bool(part.any()) for part in (*first.keys, *second.values))
    steps.step(x, 0, first)
    assert not second.keys[0].any()
    assert fake.recorded == 4
    steps.step(x, 0, second)
    assert fake.recorded == 5
    with pytest.raises(FeasibilityError, match="positions 10 to 14 of 12, the cache holds 12"):
        steps.step(x[:, :4], 10, first)
    del first, second
    del (caches := [steps.new_cache(1, 4 + i) for i in range(SPARE)])[:]
    del caches
    assert len(steps.replays.recordings) == 5
    steps.new_cache(3, 3)
    assert not steps.replays.recordings  # went with their caches, when another was asked for


def test_decoding_with_a_cache_is_replayed(model: Compiled) -> None:
    options: dict[str, Any] = {"sampler": "fast_dllm(cache='dual', threshold=None)", "gen_length": 8, "block_length": 4}
    fake = Fake()
    fast = captured(model, recorder=fake)
    steps = fast.cached
    for seed, replayed in enumerate((fast, steps)):
        found, expected = (dlqc.generate(m, ids(1, 6, seed), steps=8, **options) for m in (replayed, model))
        assert list(found.ids) == list(expected.ids)
    assert fake.recorded == 3  # all positions, and two blocks
    assert fake.replayed == 16
    several = [ids(1, length, length)[0] for length in (3, 6)]
    made, wanted = (dlqc.generate_batch(m, several, steps=8, **options) for m in (steps, model))
    assert [list(g.ids) for g in made] == [list(g.ids) for g in wanted]
    assert captured(model, recorder=fake).cached is not steps


def test_steps_over_codes_are_refused(model: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    node = next(n for n in model.module.graph.nodes if n.op == "call_function")
    monkeypatch.setattr(node, "target", CACHED)
    said = rf"graph: the block step cannot be captured: %{node.name} stores keys or values in codes.* Call it as it is"
    with pytest.raises(LoweringError, match=said):
        _ = captured(model, recorder=Fake()).cached


def test_what_cannot_be_captured_is_refused(model: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoweringError, match=r"^limit: 0 graphs hold nothing\. Use 1 or more"):
        captured(model, limit=0)
    with pytest.raises(LoweringError, match=r"^step_limit: 0 graphs hold nothing\. Use 1 or more"):
        captured(model, step_limit=0)
    said = r"graph: the model cannot be captured: {}\. Call it as it is"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not runtime.interpreting():
        with pytest.raises(LoweringError, match=said.format("torch sees no GPU")):
            captured(model)
    monkeypatch.setattr(runtime, "unavailable", lambda: None)
    with pytest.raises(LoweringError, match=said.format("its tensors are on cpu")):
        captured(model)
    node = next(n for n in model.lowered.nodes if n.op == "call_function")
    with monkeypatch.context() as patch:
        patch.setattr(node, "target", aten.nonzero.default)
        assert uncapturable(model.lowered) == f"%{node.name} (aten.nonzero.default) reads values on the host"
    monkeypatch.setattr(node, "target", CODED)
    with pytest.raises(LoweringError, match=r"\(dlqc_reference\.coded\.default\) is no kernel of a GPU"):
        captured(model, recorder=Fake())
