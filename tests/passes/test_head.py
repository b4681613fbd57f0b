"""The linears behind the last block, and the whole way of a model whose two ends are in few bits."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

import dlqc
from dlqc.blocks import tail
from dlqc.errors import ExportError
from dlqc.execute import Executor, logits_node, placeholder
from dlqc.export import export
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.packing import unpack
from dlqc.graph import LINEAR, args_of, is_call, linears
from dlqc.kept import TIED
from dlqc.manager import PassManager
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.ops import LINEAR_CODED, LINEAR_PACKED, LINEAR_Q, QUANTIZE_ACT
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_embedding import QuantizeEmbedding
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.planning import plan_report
from dlqc.rounding.gptq import Gptq, gptq
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]
HEADS = {"llada": "model.transformer.ff_out", "dream": "lm_head", "final layer norm": "head"}


def run(k: Any, *passes: Any) -> list[Any]:
    return [report for _, report in PassManager(passes).run(k.graph, k.ctx)]


@pytest.mark.parametrize("name", HEADS)
def test_the_tail_is_what_is_left(case: CaseMaker, name: str) -> None:
    k = case(name)
    found = tail(k.graph, k.ctx.blocks)
    assert found is not None
    assert found == tail(k.graph, k.ctx.blocks)
    assert found.output(k.graph) is logits_node(k.graph)
    assert [s.name for s in linears(found.nodes(k.graph), k.ctx.weights)] == [HEADS[name]]
    inside = {n for b in k.ctx.blocks for n in b.nodes(k.graph)}
    assert not inside & set(found.nodes(k.graph))
    assert tail(k.graph, []) is None


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_gptq_gets_the_statistics_behind_the_rounded_blocks(case: CaseMaker, name: str, sequential: Any) -> None:
    """The head's codes are those of GPTQ on H summed by hand over what the rounded blocks produce."""
    k = case(name)
    report = run(k, QuantizeWeights(4, 32, sequential=sequential, head=4))[0]
    head = HEADS[name]
    node = next(n for n in k.graph.nodes if is_call(n, LINEAR_Q) and str(args_of(n)[1].target) == f"{head}.codes")
    x = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [args_of(node)[0]])(k.ctx.states.ids)[0]
    rows = x.reshape(-1, x.shape[-1]).double() * k.ctx.states.weights.reshape(-1, 1).double().sqrt()
    weight = k.model.state_dict()[f"{head}.weight"].double()
    expected = gptq(weight, rows.T @ rows, IntFormat(4, 32, False), Gptq())
    found = k.ctx.weights.value(f"{head}.codes")
    # The Hessian is summed in float32 there and in float64 here: a few weights stand between two codes.
    assert float((found != expected.weight.codes).float().mean()) < 0.01
    assert report.details[head]["loss"] == pytest.approx(expected.metrics["loss"], rel=0.02)
    assert report.details[head]["loss"] < report.details[head]["loss_rtn"]
    assert not any(is_call(n, LINEAR) for n in k.graph.nodes)


@pytest.mark.parametrize(
    ("bits", "fmt"), [(8, IntFormat(8, None, True)), (4, IntFormat(4, 32, False)), (3, IntFormat(3, 32, False))]
)
def test_the_formats(case: CaseMaker, bits: int, fmt: IntFormat) -> None:
    k = case("llada")
    p = QuantizeWeights(2, 32, method=Rtn(), head=bits)
    plan = PassManager((p,)).plan(k.graph, k.ctx)
    assert not plan.kept
    assert plan.sites["model.transformer.ff_out"].weight == fmt
    assert plan.sites["model.transformer.blocks.0.ff_out"].weight == IntFormat(2, 32, False)
    run(k, p)
    expected = fmt.quantize(k.model.state_dict()["model.transformer.ff_out.weight"])
    assert torch.equal(k.ctx.weights.value("model.transformer.ff_out.codes"), expected.codes)


def test_beside_another_format_the_head_is_integers_to_nearest(case: CaseMaker) -> None:
    k = case("llada")
    p = QuantizeWeights(format=Nf4Format(32), method=Rtn(), head=8)
    assert p.given_facts() == {"quantized-weights", "original"}  # there are codes left to pack
    assert run(k, p, Pack(), Lower())[0].sites == 15
    k = case("llada")
    run(k, p)
    assert sum(is_call(n, LINEAR_CODED) for n in k.graph.nodes) == 14
    assert sum(is_call(n, LINEAR_Q) for n in k.graph.nodes) == 1


def test_its_input_is_quantized_with_the_others_and_it_is_lowered(case: CaseMaker) -> None:
    k = case("llada", "cpu")
    ids = k.ids()
    expected = k.forward(ids)
    reports = run(k, QuantizeWeights(8, None, True, Rtn(), head=8), QuantizeActivations(), Pack(), Lower())
    assert [r.sites for r in reports] == [15] * 4
    assert not any(is_call(n, LINEAR, LINEAR_PACKED, QUANTIZE_ACT) for n in k.graph.nodes)
    assert reports[-1].choices["model.transformer.ff_out"].startswith(("linear8", "int8_mm"))
    assert float((k.forward(ids) - expected).norm() / expected.norm()) < 0.05


def test_a_tied_head_is_left_to_quantize_embedding(case: CaseMaker) -> None:
    k = case("llada tied")
    p = QuantizeWeights(4, 32, method=Rtn(), head=8)
    assert PassManager((p,)).plan(k.graph, k.ctx).kept == {"model.transformer.wte": TIED}
    report = run(k, p)[0]
    assert report.sites == 14
    assert [(d.site, d.reason) for d in report.declined] == [("model.transformer.wte", TIED)]
    assert "model.transformer.wte.weight" in k.ctx.weights


def test_skip_names_the_head(case: CaseMaker) -> None:
    k = case("dream")
    report = run(k, QuantizeWeights(4, 32, method=Rtn(), head=8, skip=("lm_head",)))[0]
    assert report.sites == 14
    assert [(d.site, d.reason) for d in report.declined] == [("lm_head", "named by skip=")]


def test_without_the_option_the_head_is_not_touched(case: CaseMaker) -> None:
    k = case("dream")
    assert run(k, QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(), Pack())[0].sites == 14
    assert [s.name for s in linears(k.graph.nodes, k.ctx.weights)] == ["lm_head"]


# The whole way


@functools.cache
def tiny(tied: bool) -> LLaDAModelLM:
    config = LLaDAConfig(
        d_model=128,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=128,
        vocab_size=100,
        max_sequence_length=32,
        mask_token_id=99,
        weight_tying=tied,
    )
    torch.manual_seed(0)
    return LLaDAModelLM(config).eval()


@functools.cache
def compiled(recipe: str, tied: bool) -> Any:
    rows = torch.randint(0, 99, (6, 16), generator=torch.Generator().manual_seed(2))
    line = recipe.replace("calibrate,", "calibrate(sequences=4),")
    return dlqc.compile(tiny(tied), line, calibration=rows, backend="cpu", progress=False)


def ids() -> torch.Tensor:
    return torch.randint(0, 100, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("recipe", "tied"), [("w4a16-rtn-e8h8", False), ("w4a16-rtn-e4h4", True)])
def test_saved_loaded_counted_and_refused_by_name(recipe: str, tied: bool, tmp_path: Path) -> None:
    q = compiled(recipe, tied)
    dlqc.artifact.save(q, tmp_path / "a", verify_reload=False)
    again = dlqc.load(tmp_path / "a", backend="cpu")
    assert torch.equal(again(ids()), q(ids()))
    dlqc.artifact.verify(tmp_path / "a", backend="cpu")
    storage = q.report.storage
    assert storage.kept == {}
    count = 100 * 128 * (1 if tied else 2)
    assert storage.quantized == sum(p.numel() for p in tiny(tied).parameters() if p.dim() > 1)
    ends = 8 + 16 / 128 if "e8" in recipe else 4 + 20 / 128
    padding = 0 if "e8" in recipe else 28 / 128  # one zero point a row, in a word of its own
    blocks = storage.quantized - count
    assert storage.bits_quantized == pytest.approx(blocks * (4 + 48 / 128) + count * (ends + padding))
    stored = sum(t.nbytes for t in load_file(tmp_path / "a" / "weights.safetensors").values())
    assert storage.bits == 8 * stored
    # The plan counts a table as the report does, but for the padding.
    plans = [plan_report(tiny(tied), name).bits for name in ("w4a16-rtn", recipe)]
    assert plans[0] - plans[1] == pytest.approx(count * (32 - ends))
    with pytest.raises(ExportError, match=r"model\.transformer\.wte is an embedding in [48] bits. Use save\(\)"):
        export(q, tmp_path / "served")


def test_the_head_is_exported_like_other_linears(tmp_path: Path) -> None:
    q = compiled("w4a16-rtn-h8", False)
    export(q, tmp_path / "served")
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    read = QuantizationConfig.model_validate(config["quantization_config"])
    assert read.ignore == []
    (scheme,) = [s for s in read.config_groups.values() if s.targets == ["model.transformer.ff_out"]]
    tensors = load_file(tmp_path / "served" / "model.safetensors")
    prefix = "model.transformer.ff_out."
    stored = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    wide = stored | {"weight_scale": stored["weight_scale"].float()}
    found = BaseCompressor.get_value_from_registry(scheme.format).decompress(wide, scheme)["weight"]
    expected = IntFormat(8, None, True).quantize(tiny(False).get_parameter("model.transformer.ff_out.weight"))
    assert torch.equal(found, expected.dequantize())


def test_the_states_of_the_blocks_come_from_the_rounded_table(case: CaseMaker) -> None:
    """A coarse table gives the first block other inputs, and so another loss."""
    k = case("llada")
    report = run(k, Calibrate(sequences=4, length=16), QuantizeWeights(4, 32))[1]
    clean = report.details["model.transformer.blocks.0.q_proj"]["loss"]
    k = case("llada")
    coarse = run(k, Calibrate(sequences=4, length=16), QuantizeEmbedding(2, None, True), QuantizeWeights(4, 32))[2]
    assert coarse.details["model.transformer.blocks.0.q_proj"]["loss"] != pytest.approx(clean, rel=1e-3)
    codes = k.ctx.weights.value("model.transformer.wte.codes_packed")
    assert int(unpack(codes, 2, 64).max()) == 3
