"""quantize_kv: marks, the bias of keys, refusals, and the way through recipe, artifact and decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from toy_attention import MASK, VOCAB, ToyDenoiser

import dlqc
from dlqc.backend import load_backend
from dlqc.cached import CachedModel
from dlqc.capture import capture
from dlqc.check import check
from dlqc.compiled import build_module
from dlqc.contract import Context, Plan
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError, ExportError, FeasibilityError, RecipeError
from dlqc.graph import SDPA, args_of, is_call
from dlqc.kv_cache import KeyFormat, Stored, ValueFormat, decode, encode
from dlqc.models.describe import spec_of
from dlqc.ops import CACHED
from dlqc.passes.quantize_attention import QuantizeAttention
from dlqc.passes.quantize_kv import QuantizeKv
from dlqc.recipe import as_recipe, parse_line

RECIPE = "quantize_weights(group_size=32, method=rtn), quantize_kv(keys=2, values=4, masked=8), pack, lower"


def marks(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if is_call(node, CACHED)]


@pytest.mark.parametrize("name", ["llada", "qwen2", "gpt2"])
def test_every_attention_gets_its_marks_and_computes_what_it_did(name: str) -> None:
    graph, weights, spec = zoo.captured(name)
    ids = torch.randint(0, zoo.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    before = build_module(graph, weights)(ids)
    context = Context(weights, spec, load_backend("reference"))
    report = QuantizeKv(values=None).apply(graph, context)
    check(graph, weights, spec, set(), after="quantize_kv")
    count = sum(is_call(node, SDPA) for node in graph.nodes)
    assert report.sites == len(marks(graph)) == count
    assert torch.equal(build_module(graph, weights)(ids), before)
    turned = [args_of(node)[1] is not None for node in marks(graph)]
    assert set(turned) == {name == "qwen2"}


def test_a_bias_of_keys_is_taken_off_as_it_is_turned() -> None:
    """Keys that are nothing but their bias are stored exactly; without the offset the turning costs."""
    model = zoo.ZOO["qwen2"]()
    for name, tensor in model.named_parameters():
        if name.endswith("k_proj.weight"):
            tensor.data.zero_()
    spec = spec_of(model, mask_id=zoo.MASK)
    ids = torch.randint(0, zoo.MASK, (1, 12), generator=torch.Generator().manual_seed(0))
    away = {}
    for bias in (True, False):
        captured = capture(model, spec)
        QuantizeKv(keys=2, values=None, bias=bias, correct=False).apply(
            captured.graph, Context(captured.weights, spec, load_backend("reference"))
        )
        cached = CachedModel(build_module(captured.graph, captured.weights), spec)
        cache = cached.new_cache(1, 12)
        full = cached.step(ids, 0, cache)
        rows = cached.step(ids[:, 4:8], 4, cache)
        away[bias] = float((rows - full[:, 4:8]).abs().max())
        stored = cache.keys[0]
        assert isinstance(stored, Stored)
        assert bool((stored.read(12) == 0).all()) == bias
    assert away[True] < 1e-4 < 1e-2 < away[False]


def test_save_load_and_decode(tmp_path: Path) -> None:
    made = dlqc.compile(zoo.model("llada"), RECIPE, progress=False)
    assert "the cache stores 4.25 bits per number" in made.explain().replace("\n", " ")
    folder = tmp_path / "model"
    assert made.save(folder).reload_deviation == pytest.approx(0, abs=0.1)
    again = dlqc.load(folder)
    assert [decode(args_of(node)[2]) for node in marks(again.graph)][:2] == [
        KeyFormat(2, 8, corrected=True),
        ValueFormat(4, 8),
    ]
    prompt = [1, 2, 3, 4]
    texts = [dlqc.generate(m, prompt, sampler="fast_dllm(threshold=None)", gen_length=8) for m in (made, again)]
    assert texts[0].ids == texts[1].ids
    assert 0 < texts[0].cache_bytes == texts[1].cache_bytes
    with pytest.raises(ExportError, match="stores a cache in few bits"):
        dlqc.export(made, tmp_path / "out", format="compressed-tensors")


def test_recipe_text() -> None:
    passes = parse_line("quantize_kv(keys=2, values=none, masked=16, correct=False)")
    assert passes == (QuantizeKv(keys=2, values=None, masked=16, correct=False),)
    assert parse_line(str(as_recipe(passes[0]))) == passes
    assert QuantizeKv(keys=2, values=2) in as_recipe("w4a16-cache2-gptq").passes
    with pytest.raises(RecipeError, match=r"-cache4 rounds keys and values a second time. Name the cache, or what att"):
        as_recipe("w4a4-kv4-cache4-quarot")
    with pytest.raises(ContractError, match="float-attention"):
        dlqc.compile(zoo.model("llada"), (QuantizeAttention(), QuantizeKv()), progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys=none, values=none", "quantize_kv: nothing is stored in few bits. Give a width for keys or values"),
        (
            "keys=none, correct=True",
            "quantize_kv.correct: keys stay as they are, their scores need no correction. Leave",
        ),
        ("keys=5", "bits: 5 is not a width of stored keys or values. Use 2, 3, 4 or 8"),
        ("masked=2", "masked: masked positions in 2 bits, the others in 4. Use 2, 3, 4, 8 or 16, and not less than 4"),
        ("group_size=48", "group_size: the codes of 48 tokens do not fill whole 32-bit words. Use 32, 64 or 128"),
    ],
)
def test_options_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_line(f"quantize_kv({text})")
    assert str(error.value).startswith(message)


def test_heads_that_do_not_pack_are_named_before_any_work() -> None:
    with pytest.raises(FeasibilityError) as error:
        dlqc.compile(zoo.model("llada"), "quantize_kv(values=3)", progress=False)
    what = "blocks.0.attention.values: 16 channels of 3 bits are 48 bits, no whole number of 32-bit words (use 2, 4 or 8 bits,"
    assert what in str(error.value)


class Mixing(ToyDenoiser):
    """Every position sees the mean of all: there is no step of a window."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = super().forward(ids)
        return logits + logits.mean(1, keepdim=True)


def test_a_model_without_a_block_step_is_refused_by_name() -> None:
    spec = DiffusionSpec(mask_id=MASK, vocab_size=VOCAB, max_length=64)
    captured = capture(Mixing(0), spec, dtype=torch.float64)
    context, plan = Context(captured.weights, spec, load_backend("reference")), Plan()
    from dlqc.blocks import find_blocks

    context.blocks = find_blocks(captured.graph)
    QuantizeKv(values=4).plan(captured.graph, context, plan)
    (problem,) = plan.problems
    assert problem.startswith("quantize_kv: there is no cache to store: mean: aten.mean.dim joins all positions (drop")


def test_marks_that_break_the_law() -> None:
    graph, weights, spec = zoo.captured("llada")
    QuantizeKv().apply(graph, Context(weights, spec, load_backend("reference")))
    first, second = marks(graph)[:2]
    first.args = (*args_of(first)[:2], encode(ValueFormat()))
    with pytest.raises(ContractError, match="values are stored where others are read"):
        check(graph, weights, spec, set(), after="test")
    first.args = (*args_of(first)[:2], encode(KeyFormat()))
    second.replace_all_uses_with(args_of(second)[0])
    with pytest.raises(ContractError, match="stores what no attention reads"):
        check(graph, weights, spec, set(), after="test")
