"""Siblings: linears on one input become one call that gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dlqc
from dlqc.backends.cpu import CpuBackend
from dlqc.check import check
from dlqc.graph import aten, is_call, site_name
from dlqc.kernels.cpu import build
from dlqc.ops import LINEAR_PACKED
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn
from dlqc.schemes import Override
from dlqc.siblings import siblings

CaseMaker = Callable[..., Any]
SCHEMES = {
    "w4a16 g32": (QuantizeWeights(4, 32, method=Rtn()),),
    "w4a8 g32": (QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(8)),
    "w8a8": (QuantizeWeights(8, None, True, Rtn()), QuantizeActivations(8)),
}


class Unfused(CpuBackend):
    """The calls alone, so that only merging differs."""

    def fuse(self, graph: Any, weights: Any) -> dict[str, int]:
        return {}


def packed(case: CaseMaker, name: str, backend: Any, *passes: Any) -> Any:
    k = case(name, backend)
    for p in (*passes, Pack()):
        k.apply(p)
    return k


def groups(k: Any) -> list[list[str]]:
    return [[site_name(n).rpartition(".")[2] for n in nodes] for nodes in siblings(k.graph, k.ctx.weights)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_and_single_calls_give_the_same_bits(case: CaseMaker, scheme: str) -> None:
    if build.unavailable("linear8") is not None:
        pytest.skip("torch's own products are not promised to be the same bits at every width")
    found, calls = {}, {}
    for merges in (False, True):
        k = packed(case, "dream", Unfused(merges=merges), *SCHEMES[scheme])
        sites = sum(is_call(n, LINEAR_PACKED) for n in k.graph.nodes)
        report = k.apply(Lower())
        check(k.graph, k.ctx.weights, k.ctx.spec, {"packed", "lowered"}, after="lower")
        assert report.sites == sites
        assert not any(key.endswith("_packed") for key in k.ctx.weights)
        found[merges], calls[merges] = k.forward(k.ids()), report.metrics["calls"]
        names = set(report.choices)
        assert "model.layers.0.self_attn.v_proj" in names
        assert not any("_and_" in member for member in names)
    assert torch.equal(found[True], found[False])
    assert calls[True] < calls[False]


def test_query_key_value_and_gate_up_are_what_is_merged(case: CaseMaker) -> None:
    k = packed(case, "dream", Unfused(), *SCHEMES["w4a8 g32"])
    layers = 2
    assert groups(k) == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * layers
    assert k.apply(Lower()).metrics["calls"] == layers * 4 + 1  # and the output, the down projection, the head


def test_other_widths_stay_alone(case: CaseMaker) -> None:
    override = Override(sites=("*.v_proj",), bits=8)
    k = packed(case, "dream", Unfused(), QuantizeWeights(4, 32, method=Rtn(), overrides=(override,)))
    assert groups(k) == [["q_proj", "k_proj"], ["gate_proj", "up_proj"]] * 2


def test_a_weight_with_other_partners_elsewhere_is_stored_once(case: CaseMaker) -> None:
    """Another call reads q's weight at another place: then q stays alone, and k and v are not merged with it either."""
    k = packed(case, "dream", Unfused(), *SCHEMES["w4a16 g32"])
    q = next(n for n in k.graph.nodes if is_call(n, LINEAR_PACKED))
    o = next(n for n in k.graph.nodes if is_call(n, LINEAR_PACKED) and site_name(n).endswith("0.self_attn.o_proj"))
    o.args = (o.args[0], *q.args[1:])
    assert groups(k) == [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def test_a_merged_model_saves_loads_and_decodes_with_a_cache(tmp_path: Any) -> None:
    compiled = dlqc.compile(dlqc.load_model("tiny-llada"), "w4a8-rtn", backend="cpu", progress=False)
    cuts = [n for n in compiled.lowered.nodes if is_call(n, aten.slice.Tensor)]
    assert len(cuts) == 5 * 4  # q, k, v and gate, up of each block
    assert "_and_" not in compiled.explain()
    compiled.save(tmp_path / "m")
    ids = torch.randint(0, 100, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = compiled(ids)
    assert torch.equal(dlqc.load(tmp_path / "m", backend="cpu")(ids), expected)
    model = compiled.cached
    torch.testing.assert_close(model.step(ids, 0, model.new_cache(2, 32)), expected, rtol=1e-3, atol=1e-3)
