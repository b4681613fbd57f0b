"""quantize_embedding: lookups give rows of the rounded table; a tied head multiplies with the very same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.check import check
from dlqc.contract import Declined
from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.packing import pack, unpack
from dlqc.graph import EMBEDDING, LINEAR, args_of, aten, call_before, fingerprint, is_call
from dlqc.manager import PassManager
from dlqc.ops import EMBEDDING_PACKED, LINEAR_PACKED, QUANTIZE_ACT
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_embedding import QuantizeEmbedding
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.rotate_hidden import RotateHidden
from dlqc.report import measure_storage
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]
WTE = {"dream": "model.embed_tokens", "layer norm": "embed"}


def table(k: Any, fmt: IntFormat, name: str = "model.transformer.wte") -> torch.Tensor:
    """The table that the graph's constants stand for."""
    parts = {role: k.ctx.weights.value(f"{name}.{role}") for role in ("codes_packed", "scales")}
    scales = parts["scales"]
    codes = unpack(parts["codes_packed"], fmt.bits, fmt.group_size * scales.shape[1] if fmt.group_size else k.width)
    zeros = None if fmt.symmetric else unpack(k.ctx.weights.value(f"{name}.zeros_packed"), fmt.bits, scales.shape[1])
    return QuantizedWeight(codes, scales, zeros, fmt).dequantize()


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("llada", IntFormat(8, None, True)),
        ("llada bf16", IntFormat(4, 32, False)),
        ("llada tied", IntFormat(8, None, True)),
        ("llada tied", IntFormat(4, 16, False)),
        ("dream", IntFormat(4, 32, True)),
        ("layer norm", IntFormat(3, 16, False)),
    ],
    ids=str,
)
def test_the_graph_computes_with_the_rounded_table(case: CaseMaker, name: str, fmt: IntFormat) -> None:
    """Equal to the captured graph with the rounded table put in place of the original, at both ends if tied."""
    k, plain = case(name), case(name)
    wte = WTE.get(name, "model.transformer.wte")
    original = k.model.state_dict()[f"{wte}.weight"]
    k.width = original.shape[1]
    report = k.apply(QuantizeEmbedding(fmt.bits, fmt.group_size, fmt.symmetric))
    assert report.sites == 1
    expected = fmt.quantize(original.double(), clip="mse").dequantize()
    assert torch.equal(table(k, fmt, wte), expected)
    plain.ctx.weights.put(f"{wte}.weight", expected)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"normal-form", "quantized-embeddings"}, after="the pass")
    for dtype, bound in ((None, 1e-5), (torch.float64, 1e-12)):
        if name == "llada bf16":
            bound = 0.02  # its head multiplies in bfloat16, with or without us
        found, wanted = k.forward(k.ids(), dtype), plain.forward(k.ids(), dtype)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound * float(wanted.abs().max()))
    assert not torch.allclose(found, case(name).forward(k.ids(), torch.float64), atol=1e-3 * float(wanted.abs().max()))
    assert report.details[wte]["bits_per_weight"] == fmt.bits_per_weight(*original.shape)
    assert report.details[wte]["weight_sqnr_db"] > {8: 35, 4: 15, 3: 9}[fmt.bits]


def test_a_tied_table_is_stored_once_and_counted_once(case: CaseMaker) -> None:
    k = case("llada tied")
    before = k.ctx.weights.clone()
    report = k.apply(QuantizeEmbedding(4, 32, False))
    assert report.notes == ["model.transformer.wte is the head, too, and both read one stored table"]
    lookup, head = (next(n for n in k.graph.nodes if is_call(n, op)) for op in (EMBEDDING_PACKED, LINEAR_PACKED))
    for part in (1, 2, 3):
        assert args_of(lookup)[part].target == args_of(head)[part].target
    assert not any(is_call(n, EMBEDDING) for n in k.graph.nodes)
    assert "model.transformer.wte.weight" not in k.ctx.weights
    storage = measure_storage(before, k.graph, k.ctx.weights, {})
    assert storage.quantized == 61 * 64
    assert storage.bits_quantized == 61 * (64 * 4 + 2 * 16 + 32)  # zero points are padded to a word
    assert "model.transformer.wte" not in " ".join(storage.kept)


def test_only_the_rows_that_are_looked_up_are_dequantized() -> None:
    """All others are poisoned: their scales are NaN, their codes not even there at the width that is asked for."""
    fmt = IntFormat(4, 8, False)
    q = fmt.quantize(torch.randn(50, 24))
    ids = torch.tensor([[3, 3, 49], [0, 3, 7]])
    bad = torch.ones(50, dtype=torch.bool).index_fill(0, ids.reshape(-1), False)
    scales = q.scales.clone()
    scales[bad] = torch.nan
    found = EMBEDDING_PACKED(ids, pack(q.codes, 4), scales, pack(q.zeros, 4), 4, 8, 24, torch.float32)
    assert torch.equal(found, q.dequantize()[ids])
    empty = EMBEDDING_PACKED(ids[:0], pack(q.codes, 4), scales, pack(q.zeros, 4), 4, 8, 24, torch.bfloat16)
    assert empty.shape == (0, 3, 24)
    assert empty.dtype == torch.bfloat16


def test_behind_transforms_and_before_what_goes_block_by_block(case: CaseMaker) -> None:
    """The rotated table is what is rounded, and the blocks' states come from the rounded one."""
    k, rotated = case("llada tied"), case("llada tied")
    k.width = 64
    passes = (FoldNormScale(untie=True), RotateHidden())
    PassManager(passes).run(rotated.graph, rotated.ctx)
    expected = IntFormat(8, None, True).quantize(
        rotated.ctx.weights.value("model.transformer.wte.weight", torch.float64), clip="mse"
    )
    PassManager((*passes, QuantizeEmbedding(), QuantizeWeights(8, None, True, Rtn(), head=8), Pack(), Lower())).run(
        k.graph, k.ctx
    )
    assert torch.equal(table(k, IntFormat(8, None, True)), expected.dequantize())
    assert not any(is_call(n, LINEAR, EMBEDDING) for n in k.graph.nodes)


def test_a_tied_head_reads_quantized_activations_where_all_do(case: CaseMaker) -> None:
    k = case("llada tied")
    PassManager((QuantizeEmbedding(), QuantizeWeights(8, None, True, Rtn()), QuantizeActivations(), Pack())).run(
        k.graph, k.ctx
    )
    head = next(n for n in reversed(k.graph.nodes) if is_call(n, LINEAR_PACKED))
    assert str(args_of(head)[1].target) == "model.transformer.wte.codes_packed"
    assert is_call(args_of(head)[0], QUANTIZE_ACT)
    assert sum(is_call(n, LINEAR_PACKED) for n in k.graph.nodes) == 15


def test_transforms_that_come_later_are_stuck_at_it(case: CaseMaker) -> None:
    k = case("llada")
    message = r"stuck at %embedding_packed_default \(dlqc\.embedding_packed\): no rule moves a transform"
    with pytest.raises(ContractError, match=message):
        PassManager((FoldNormScale(), QuantizeEmbedding(), RotateHidden())).run(k.graph, k.ctx)


# Declines


def test_declines_what_skip_names(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    report = k.apply(QuantizeEmbedding(skip=("*.wte",)))
    assert (report.sites, report.declined) == (0, [Declined("model.transformer.wte", "named by skip=")])
    assert fingerprint(k.graph, k.ctx.weights) == mark
    plan = PassManager((QuantizeEmbedding(skip=("*.wte",), required=False),)).plan(k.graph, k.ctx)
    assert not plan.tables
    assert not plan.problems


def test_declines_a_table_that_is_read_otherwise(case: CaseMaker) -> None:
    k = case("llada")
    lookup = next(n for n in k.graph.nodes if is_call(n, EMBEDDING))
    call_before(k.graph, lookup, aten.t.default, (args_of(lookup)[0],))
    report = k.apply(QuantizeEmbedding())
    reason = "%t_default reads it, too, and is neither an embedding nor a linear"
    assert (report.sites, report.declined) == (0, [Declined("model.transformer.wte", reason)])


def test_running_it_twice_finds_nothing_the_second_time(case: CaseMaker) -> None:
    k = case("llada tied")
    k.apply(QuantizeEmbedding())
    mark = fingerprint(k.graph, k.ctx.weights)
    assert k.apply(QuantizeEmbedding()).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(ContractError, match=r"pass 'quantize_embedding' found nothing to rewrite"):
        PassManager((QuantizeEmbedding(), QuantizeEmbedding())).run(*(lambda c: (c.graph, c.ctx))(case("llada")))


# Plan, options, law


def test_the_plan(case: CaseMaker) -> None:
    k = case("llada")
    plan = PassManager((QuantizeEmbedding(4, 32, False), QuantizeWeights(4, 32, method=Rtn()))).plan(k.graph, k.ctx)
    assert plan.tables == {"model.transformer.wte": (IntFormat(4, 32, False), 61, 64)}
    assert plan.kept == {"model.transformer.ff_out": "outside the repeated blocks"}
    tied = case("llada tied")
    plan = PassManager((QuantizeEmbedding(), QuantizeWeights(4, 32, method=Rtn()))).plan(tied.graph, tied.ctx)
    assert not plan.tables
    assert not plan.kept
    assert plan.sites["model.transformer.wte"].weight == IntFormat(8, None, True)


def test_groups_that_do_not_divide(case: CaseMaker) -> None:
    k = case("llada")
    message = r"^model\.transformer\.wte: 64 input features do not divide by group 48 \(use group_size=None, or exclude"
    with pytest.raises(FeasibilityError, match=message):
        PassManager((QuantizeEmbedding(4, 48, False),)).run(k.graph, k.ctx)


def test_a_skip_pattern_that_names_nothing(case: CaseMaker) -> None:
    k = case("llada")
    with pytest.raises(FeasibilityError, match=r"skip pattern '\*\.wtf' matches no embedding; Known: model"):
        PassManager((QuantizeEmbedding(skip=("*.wtf",)),)).run(k.graph, k.ctx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"^bits: 5 is not a width of an integer weight\. Use 2, 3, 4 or 8$"),
        ({"group_size": 0}, r"^group_size: a group of 0 input features is impossible"),
        ({"clip": "max"}, r"^clip: unknown clip 'max'\. Use 'minmax' or 'mse'$"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeEmbedding(**options)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("scales", r"law L7 is broken after x: %embedding_packed_default: scales .* is \[61, 4\], must be \[61, 2\]"),
        ("codes_packed", r"codes .* is \[61, 4\], must be \[61, 32\]"),
    ],
)
def test_the_law_sees_parts_that_do_not_fit(case: CaseMaker, part: str, message: str) -> None:
    k = case("llada")
    k.apply(QuantizeEmbedding(4, 32, True))
    name = f"model.transformer.wte.{part}"
    wrong = torch.ones(61, 4, dtype=k.ctx.weights[name].leaf.dtype)
    k.ctx.weights.put(name, wrong)
    node = next(n for n in k.graph.nodes if n.op == "get_attr" and n.target == name)
    node.meta["val"] = node.meta["val"].new_empty(61, 4)
    with pytest.raises(ContractError, match=message):
        check(k.graph, k.ctx.weights, k.ctx.spec, set(), after="x", propagate=False)
