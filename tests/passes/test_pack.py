"""pack: the same numbers in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.check import check
from dlqc.errors import ContractError
from dlqc.formats.packing import pack, packed_shape, unpack
from dlqc.graph import fingerprint, is_call
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_PACKED, LINEAR_Q
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]


def quantized(case: CaseMaker, name: str, bits: int, symmetric: bool, *, act: bool = False) -> Any:
    k = case(name)
    k.apply(QuantizeWeights(bits, 32, symmetric, Rtn()))
    if act:
        k.apply(QuantizeActivations())
    return k


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["dream", "shared"])
def test_exact_and_smaller(case: CaseMaker, name: str, bits: int, symmetric: bool) -> None:
    k = quantized(case, name, bits, symmetric, act=name == "dream")
    ids, kept = k.ids(), k.ctx.weights.clone()
    before, wide = k.forward(ids), k.forward(ids, torch.float64)
    sites = sum(is_call(n, LINEAR_Q) for n in k.graph.nodes)
    report = k.apply(Pack())
    assert report.sites == sites
    assert sum(is_call(n, LINEAR_PACKED) for n in k.graph.nodes) == sites
    check(k.graph, k.ctx.weights, k.ctx.spec, {"packed", "quantized-weights"}, after="pack")
    assert torch.equal(k.forward(ids), before)
    assert torch.equal(k.forward(ids, torch.float64), wide)
    stored = unpacked = 0
    for key in [n for n in kept if n.endswith((".codes", ".zeros"))]:
        assert key not in k.ctx.weights
        codes, packed = kept.value(key), k.ctx.weights.value(f"{key}_packed")
        assert tuple(packed.shape) == packed_shape(*codes.shape, bits)
        assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)
        unpacked, stored = unpacked + codes.numel(), stored + packed.numel()
    assert report.metrics == {"bytes_unpacked": unpacked, "bytes_packed": stored}
    if symmetric:
        assert stored == unpacked * bits // 8


def test_the_bits_lie_where_the_layout_says(case: CaseMaker) -> None:
    """Element k of a row is bits k·b … k·b + b - 1 of its stream, least significant first."""
    k = quantized(case, "dream", 3, True)
    name = "model.layers.0.mlp.down_proj.codes"
    codes = k.ctx.weights.value(name)
    k.apply(Pack())
    row = k.ctx.weights.value(f"{name}_packed")[5].tolist()
    stream = int.from_bytes(bytes(row), "little")
    assert [stream >> 3 * i & 7 for i in range(96)] == codes[5].tolist()
    assert len(row) == 36


def test_a_shared_weight_is_packed_once(case: CaseMaker) -> None:
    k = quantized(case, "shared", 4, False)
    k.apply(Pack())
    calls = [n for n in k.graph.nodes if is_call(n, LINEAR_PACKED)]
    assert len(calls) == 7
    assert {str(n.args[1].target) for n in calls} == {
        "layers.0.up.codes_packed",
        "layers.0.down.codes_packed",
        "head.codes_packed",
    }


def test_leaves_a_float_graph_identical(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    assert k.apply(Pack()).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(ContractError, match=r"pass 'pack' needs 'quantized-weights', which does not hold here"):
        PassManager((Pack(),)).run(k.graph, k.ctx)


def test_twice_is_once(case: CaseMaker) -> None:
    k = quantized(case, "dream", 4, False)
    k.apply(Pack())
    mark = fingerprint(k.graph, k.ctx.weights)
    assert k.apply(Pack()).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_its_certificate_is_zero_and_a_wrong_bit_is_refused(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = (Calibrate(sequences=4, length=16), QuantizeWeights(4, 32), Pack())
    k = case("llada")
    assert PassManager(passes).run(k.graph, k.ctx)[-1][1].certificate == 0.0
    monkeypatch.setattr("dlqc.passes.pack.pack", lambda codes, bits: pack(codes, bits) ^ 1)
    k = case("llada")
    with pytest.raises(ContractError, match=r"pass 'pack' claims to preserve the function, but it changed by"):
        PassManager(passes).run(k.graph, k.ctx)
