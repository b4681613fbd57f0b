"""Token and confidence by the native head: by their definition in float64, and in the place of logits in samplers."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import at_the_end
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_llada import small_llada

import dlqc
from dlqc.compiled import Compiled
from dlqc.diffusion.denoising import Sampler, Step
from dlqc.diffusion.network import Network
from dlqc.diffusion.sampler_block import BlockDiffusionSampler
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.errors import ContractError, ModelError
from dlqc.graph import CHOOSER
from dlqc.kernels.cpu.head import head_argmax, unavailable

LIBRARY = "head"  # whose paths `isa` takes in turn

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native code: {unavailable()}")

IN_PYTHON = torch.ops.dlqc_cpu.head_argmax_in_python.default


def by_definition(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, excluded: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax and its softmax, in float64."""
    logits = x.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    p = logits.softmax(-1)
    if excluded >= 0:
        logits[..., excluded] = -math.inf
    token = logits.argmax(-1)
    return token, p.gather(-1, token[..., None])[..., 0]


@pytest.mark.usefixtures("isa")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 20), st.sampled_from([2, 16, 47, 48, 49, 100, 1000]), st.integers(1, 150)),
    long=st.sampled_from([0, 0, 0, 250]),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    layout=st.sampled_from(["plain", "rows apart", "features apart", "three sizes"]),
    biased=st.booleans(),
    excluded=st.sampled_from([-1, 0, 1]),
    seed=st.integers(0, 99),
)
def test_head_argmax(
    sizes: tuple[int, int, int],
    long: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: str,
    biased: bool,
    excluded: int,
    seed: int,
) -> None:
    """Sums of products of small whole numbers are exact, so tokens have to agree wherever logits are equal."""
    g = torch.Generator().manual_seed(seed)
    m, v, k = sizes
    m += long
    x, weight = (torch.randint(-2, 3, (n, k + 1), generator=g).to(t) for n, t in zip((m, v), dtypes, strict=True))
    x, weight = x[:, :k], weight[:, :k]  # rows lie apart
    if layout == "plain":
        x, weight = x.contiguous(), weight.contiguous()
    elif layout == "features apart":
        x = x.T.contiguous().T
    elif layout == "three sizes":
        x = x.contiguous().reshape(1, m, k)
    bias = torch.randint(-3, 4, (v,), generator=g).float() if biased else None
    expected = by_definition(x, weight, bias, excluded)
    for op in (head_argmax, IN_PYTHON):
        token, confidence = op(x, weight, bias, excluded)
        assert token.dtype is torch.int64
        assert confidence.dtype is torch.float64
        assert torch.equal(token, expected[0])
        torch.testing.assert_close(confidence, expected[1], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("isa")
def test_of_equal_ones_the_first_counts() -> None:
    """In a strip, a panel, a part of the vocabulary, and over them."""
    weight = torch.zeros(48 * 300 + 5, 4)
    for places in ([3, 17, 47], [47, 48], [48 * 299, 48 * 300 + 4], [5, 48 * 150, 48 * 300]):
        weight.zero_()[places, 2] = 1.0
        x = torch.tensor([[0.0, 0.0, 2.0, 0.0]]).expand(9, 4)
        assert head_argmax(x, weight)[0].tolist() == [places[0]] * 9
        assert head_argmax(x, weight, None, places[0])[0].tolist() == [places[1]] * 9
    assert head_argmax(torch.zeros(2, 4), weight)[0].tolist() == [0, 0]


@pytest.mark.usefixtures("isa")
def test_confidence_near_one_keeps_what_is_missing() -> None:
    """Positions are ranked by it: in float32 all of these would be 1."""
    gaps = torch.arange(18.0, 30.0)
    weight = torch.zeros(100, 1)
    weight[60] = 1.0
    _, confidence = head_argmax(gaps[:, None], weight)
    missing = 99 * (-gaps.double()).exp()
    torch.testing.assert_close(1 - confidence, missing / (1 + missing), rtol=1e-4, atol=2e-16)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("op", [head_argmax, IN_PYTHON], ids=["native", "python"])
def test_logits_that_are_no_numbers(op: Any) -> None:
    """The confidence is NaN; the token as of argmax."""
    x, weight = torch.ones(1, 1), torch.zeros(200, 1)
    inf, nan = math.inf, math.nan
    for where, excluded, expected in (
        ({7: inf, 120: inf}, -1, 7),
        ({130: nan, 7: inf, 199: nan}, -1, 130),
        ({130: nan}, 130, 0),
        ({130: inf, 3: 1.0}, 130, 3),
        (dict.fromkeys(range(200), -inf), -1, 0),
        (dict.fromkeys(range(50, 200), -inf), -1, 0),
        ({199: -inf, 3: 1.0}, -1, 3),
        (dict.fromkeys(set(range(200)) - {7}, -inf), 7, 0),
    ):
        bias = torch.zeros(200)
        for at, value in where.items():
            bias[at] = value
        token, confidence = op(x, weight, bias, excluded)
        assert int(token) == expected
        assert bool(confidence.isnan().all())


def test_empty_and_refused() -> None:
    x, weight = torch.randn(2, 8), torch.randn(50, 8)
    for shape in ((0, 8), (3, 0, 8)):
        token, confidence = head_argmax(torch.zeros(shape), weight)
        assert token.shape == confidence.shape == shape[:-1]
    assert head_argmax(x[0], weight)[0].shape == ()
    cases = (
        ((x[:, :7], weight), "not \\[..., 8\\]"),
        ((x, weight[:0]), "head_argmax: the weight is \\[0, 8\\], not \\[V, K\\]"),
        ((x, weight, torch.zeros(49)), "head_argmax: the bias is \\[49\\], not \\[50\\]"),
        ((x, weight, None, 50), "excluded: 50 is none of 50 tokens. Use -1 for none"),
    )
    for arguments, message in cases:
        with pytest.raises(ContractError, match=message):
            IN_PYTHON(*arguments)
        with pytest.raises((ContractError, RuntimeError), match=message):
            head_argmax(*arguments)


def test_other_dtypes_take_the_definition() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((5, 40), (90, 40), (90,)))
    for kinds in ((torch.float64,) * 3, (torch.float16, torch.float32, None), (torch.float32,) * 2 + (torch.bfloat16,)):
        arguments = [part.to(kind) for part, kind in zip((x, weight, bias), kinds, strict=True) if kind is not None]
        token, confidence = head_argmax(*arguments)
        expected = by_definition(*arguments, *[None] * (3 - len(arguments)), -1)
        assert torch.equal(token, expected[0])
        torch.testing.assert_close(confidence, expected[1], rtol=1e-5, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of memory to set")
@pytest.mark.parametrize("op", [head_argmax, IN_PYTHON], ids=["native", "python"])
def test_no_logits_in_memory(op: Any) -> None:
    import resource

    x, weight = torch.randn(1024, 8), torch.randn(100_000, 8)  # logits: 400 MB
    op(x[:1], weight)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), limits[1]))
    try:
        op(x, weight)
        with pytest.raises(RuntimeError, match="memory"):
            x @ weight.T
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(270, 64, generator=g), torch.randn(3000, 64, generator=g)
    expected = head_argmax(x, weight)
    alone = head_argmax(x[7], weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = head_argmax(x, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (found[0][7], found[1][7]) == alone  # a row does not know its batch


def test_opcheck() -> None:
    x, weight = torch.randn(2, 5, 32), torch.randn(70, 32)
    torch.library.opcheck(head_argmax, (x, weight, torch.randn(70), 3))


def test_nothing_is_read_or_written_outside() -> None:
    for kind in (torch.float32, torch.bfloat16):
        x, weight, bias = (at_the_end(torch.randn(shape).to(kind)) for shape in ((9, 37), (131, 37), (131,)))
        token, _ = head_argmax(x, weight, bias.float())
        assert torch.equal(token, by_definition(x, weight, bias, -1)[0])


# --- samplers ---


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return dlqc.compile(small_llada(101), "w8a8-rtn", backend="cpu", progress=False)


class Spy:
    """Counts what `Network.propose` answers, or takes its answers away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
        self.answered = self.rows = 0
        own = Network.propose

        def propose(net: Network, canvas: torch.Tensor, wanted: torch.Tensor, *args: Any, **options: Any) -> Any:
            found = own(net, canvas, wanted, *args, **options) if answers else None
            self.answered += found is not None
            self.rows += 0 if found is None else int(wanted.sum())
            return found

        monkeypatch.setattr(Network, "propose", propose)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "sampler",
    [
        LLaDASampler(gen_length=12, block_length=6, steps=6),
        FastDLLMSampler(gen_length=12, block_length=6, cache="none", threshold=0.5),
        FastDLLMSampler(gen_length=12, block_length=6, cache="prefix", factor=1.0),
        FastDLLMSampler(gen_length=12, block_length=6, cache="dual", threshold=0.5, refresh=2),
        BlockDiffusionSampler(gen_length=12, block_length=4, threshold=0.5),
        BlockDiffusionSampler(gen_length=12, block_length=4, strategy="sequential", cache=False),
        BlockDiffusionSampler(
            gen_length=12, block_length=4, strategy="joint_threshold", threshold=0.1, edit_threshold=0.0
        ),
    ],
    ids=["llada", "none", "prefix", "dual", "blocks", "blocks without a cache", "edits"],
)
def test_samplers_do_without_logits(
    compiled: Compiled, sampler: Sampler, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens at the same steps, whatever the logits are rounded to; prompts of two lengths, so one is padded."""
    model, spec = compiled, dataclasses.replace(compiled.spec, shift=shift)
    if shift:
        model = copy.deepcopy(compiled)
        model.spec = spec
    # Neither way knows what the model's attention is: what holds of blocks has to hold here.
    monkeypatch.setattr(BlockDiffusionSampler, "_refuse", lambda *_: None)
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 100, (n,), generator=g) for n in (9, 4)]
    runs: list[tuple[Any, list[Step]]] = []
    for answers in (True, False):
        steps: list[Step] = []
        with monkeypatch.context() as patch:
            spy = Spy(patch, answers)
            runs.append((sampler.run(model, prompts, spec, on_step=steps.append), steps))
        assert spy.answered == (runs[-1][0].nfe if answers else 0)  # stores of finished blocks, too
    (found, steps), (expected, others) = runs
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.committed_at, expected.committed_at)
    assert torch.equal(found.edits, expected.edits)
    assert (found.nfe, found.computed, found.cache_bytes) == (expected.nfe, expected.computed, expected.cache_bytes)
    for step, other in zip(steps, others, strict=True):
        torch.testing.assert_close(step.confidence, other.confidence, rtol=1e-4, atol=1e-12)


def test_rules_that_read_more_get_logits(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    monkeypatch.setattr(BlockDiffusionSampler, "_refuse", lambda *_: None)
    samplers: list[Sampler] = [
        *(LLaDASampler(gen_length=4, steps=2, **{name: 0.5}) for name in ("temperature", "cfg_scale")),
        *(
            kind(gen_length=4, block_length=4, **options)
            for kind, options in (
                (LLaDASampler, {"remasking": "random"}),
                (FastDLLMSampler, {"temperature": 0.5}),
                (BlockDiffusionSampler, {"strategy": "entropy_bounded"}),
                (BlockDiffusionSampler, {"top_p": 0.9}),
                (BlockDiffusionSampler, {"top_k": 5}),
                (BlockDiffusionSampler, {"temperature": 0.5}),
            )
        ),
    ]
    spy = Spy(monkeypatch, True)
    for sampler in samplers:
        sampler.run(compiled, prompt, compiled.spec)
    assert spy.rows == 0


@pytest.mark.parametrize("sampler", ["llada(steps=4)", "fast_dllm(cache='dual', threshold=none)"])
@pytest.mark.parametrize("mask", [0, 2, 37, 62])
def test_another_mask_token_is_never_proposed(compiled: Compiled, mask: int, sampler: str) -> None:
    spec = dataclasses.replace(compiled.spec, mask_id=mask)
    made = dlqc.generate(compiled, [1, 5, 9], spec=spec, sampler=sampler, gen_length=8, block_length=8)
    expected = dlqc.generate(
        lambda ids: compiled(ids), [1, 5, 9], spec=spec, sampler="llada(steps=4)", gen_length=8, block_length=8
    )
    assert mask not in made.ids
    if "llada" in sampler:
        assert made.ids == expected.ids


def test_hooks_and_subclasses_are_heard(compiled: Compiled) -> None:
    def only_seven(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -1e4).index_fill_(-1, torch.tensor([7]), 0.0)

    for hooked in (compiled, compiled.module):
        handle = hooked.register_forward_hook(only_seven)
        try:
            assert not compiled.proposes
            assert set(dlqc.generate(compiled, [1, 5, 9], sampler="llada", gen_length=4, block_length=4).ids) == {7}
        finally:
            handle.remove()
    assert compiled.proposes

    class Mine(Compiled):
        def forward(self, *args: Any) -> torch.Tensor:
            return super().forward(*args)

    mine = copy.deepcopy(compiled)
    mine.__class__ = Mine
    assert not mine.proposes


def test_tensors_that_were_put_in_place_of_others_are_seen(compiled: Compiled) -> None:
    model = copy.deepcopy(compiled)
    ids = torch.randint(0, 100, (1, 8), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(8)

    def agree() -> bool:
        logits, cache = model(ids), model.cached.new_cache(1, 8)
        step = model.cached.step(ids, 0, cache)
        torch.testing.assert_close(step, logits, rtol=1e-4, atol=1e-5)
        allowed = logits[0].index_fill(-1, torch.tensor([model.spec.mask_id]), -math.inf)
        found = model.propose(rows, ids)
        assert found is not None
        return torch.equal(found[0], allowed.argmax(-1))

    assert agree()
    before = model.cached
    assert model.cached is before
    head = next(name for name, part in model.module.named_buffers() if "transformer_ff_out_weight" in name)
    turned = {name: part.flip(0) if name == head else part.clone() for name, part in model.module.state_dict().items()}
    model.module.load_state_dict(turned, assign=True)
    assert agree()
    assert model.cached is not before
    model.module.register_buffer(head, model.module.get_buffer(head) * 0.5 + 0.01)
    assert agree()


def test_where_it_comes_from(compiled: Compiled) -> None:
    """The CPU backend leaves the op; copies and the block step have it; the reference backend has none."""
    assert sum(CHOOSER in node.meta for node in compiled.lowered.nodes) == 1
    ids, rows = torch.arange(20).reshape(2, 10), torch.tensor([13, 0, 13])
    found = compiled.propose(rows, ids)
    assert found is not None
    logits = compiled(ids).double().flatten(0, 1)[rows]
    logits[:, compiled.spec.mask_id] = -math.inf
    assert torch.equal(found[0], logits.argmax(-1))
    for other in (copy.deepcopy(compiled), compiled.cached):
        again = other.propose(rows, ids)
        assert again is not None
        assert torch.equal(again[0], found[0])
        assert torch.equal(again[1], found[1])
    assert compiled.proposes
    assert compiled.cached.proposes
    plain = dlqc.compile(small_llada(101), "w8a8-rtn", backend="reference", progress=False)
    assert not plain.proposes
    assert plain.propose(rows, ids) is plain.cached.propose(rows, ids) is None
    assert not any(CHOOSER in node.meta for node in plain.lowered.nodes)


def test_what_is_not_finite_is_refused_as_before(compiled: Compiled) -> None:
    broken = copy.deepcopy(compiled)
    head = next(n for n in broken.module.graph.nodes if n.op == "output").args[0]
    broken.module.get_buffer(head.args[1].target)[5, 0] = math.nan
    with pytest.raises(ModelError, match="step 0: the logits of 4 of 4 positions are not finite, .* come out of"):
        LLaDASampler(gen_length=4, steps=2).run(broken, torch.zeros(1, 4, dtype=torch.int64), broken.spec)
