"""lower: every site gets a kernel that computes it, or all that get none are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import dlqc
from dlqc.backend import LinearSpec, Lowered, load_backend
from dlqc.check import check
from dlqc.errors import ContractError, FeasibilityError, LoweringError
from dlqc.execute import Executor, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.graph import fingerprint, is_call, site_name
from dlqc.kernels.reference.linear import ReferenceLinear
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_PACKED, QUANTIZE_ACT
from dlqc.passes.lower import Lower, spec_of_node
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]
VOCAB = 61

SCHEMES = {
    "w4a16 g32": (QuantizeWeights(4, 32, method=Rtn()),),
    "w3a16": (QuantizeWeights(3, None, True, Rtn()),),
    "w8a8": (QuantizeWeights(8, None, True, Rtn()), QuantizeActivations()),
    "w4a4 g32": (QuantizeWeights(4, 32, True, Rtn()), QuantizeActivations(4, 32, False)),
}


@dataclass(frozen=True)
class Picky:
    """Takes nothing, or only small inputs, and runs the rest as the reference does."""

    name: str = "picky"
    largest: int = 0

    def supports(self, spec: LinearSpec) -> str | None:
        return (
            None if spec.in_features <= self.largest else f"{spec.in_features} input features are over {self.largest}"
        )

    def note(self, spec: LinearSpec) -> str:
        return ""

    def lower(self, spec: LinearSpec, *tensors: Any) -> Lowered:
        return ReferenceLinear().lower(spec, *tensors)


@dataclass(frozen=True)
class FakeBackend:
    kernels: tuple[Any, ...]
    name: str = "fake"
    merges: bool = False

    def fuse(self, graph: Any, weights: Any) -> dict[str, int]:
        return {}

    def available(self) -> str | None:
        return None


@dataclass(frozen=True)
class Singly(FakeBackend):
    """A real backend's kernels, one call for each linear."""


def packed(case: CaseMaker, name: str, scheme: str, backend: Any = "reference") -> Any:
    k = case(name, backend)
    for p in (*SCHEMES[scheme], Pack()):
        k.apply(p)
    return k


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["dream", "shared"])
def test_the_lowered_graph_equals_the_logical_one(case: CaseMaker, name: str, backend: str, scheme: str) -> None:
    k = packed(case, name, scheme, Singly(load_backend(backend).kernels))
    ids = k.ids()
    logits = k.forward(ids)
    sites = [n for n in k.graph.nodes if is_call(n, LINEAR_PACKED)]
    inputs = [n.args[0].args[0] if is_call(n.args[0], QUANTIZE_ACT) else n.args[0] for n in sites]
    quantizers = sum(is_call(n, QUANTIZE_ACT) for n in k.graph.nodes)
    values = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [*inputs, *sites])(ids)
    report = k.apply(Lower())
    check(k.graph, k.ctx.weights, k.ctx.spec, {"packed", "lowered"}, after="lower")
    assert report.sites == len(sites)
    assert (quantizers > 0) == ("a16" not in scheme)
    assert not any(is_call(n, LINEAR_PACKED, QUANTIZE_ACT) for n in k.graph.nodes)
    assert not any(key.endswith("_packed") for key in k.ctx.weights)
    lowered = [n for n in k.graph.nodes if getattr(n.target, "namespace", "") in ("dlqc_reference", "dlqc_cpu")]
    for node, x, expected in zip(lowered, values[: len(sites)], values[len(sites) :], strict=True):
        (found,) = Executor(k.graph, k.ctx.weights, [node.args[0]], [node])(x)
        # Kernels that multiply in bfloat16 round x and W to 2⁻⁹ of their size; integers and float32 are summed exactly.
        bound = 2.0**-20 if backend == "reference" or scheme == "w8a8" else 2.0**-7
        assert float((found - expected).norm()) < bound * float(expected.norm()), node.name
        assert float((found.roll(1, -1) - expected).norm()) > bound * float(expected.norm())
    if backend == "reference":
        torch.testing.assert_close(k.forward(ids), logits, rtol=1e-4, atol=1e-4)


def test_on_the_reference_in_float64_it_is_exact(case: CaseMaker) -> None:
    """No activation is quantized: nothing is left but float64 rounding, and the float32 product of code and scale."""
    k = packed(case, "dream", "w4a16 g32")
    expected = k.forward(k.ids(), torch.float64)
    k.apply(Lower())
    found = k.forward(k.ids(), torch.float64)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_the_report_names_the_kernel_and_why_not_the_others(case: CaseMaker) -> None:
    k = packed(case, "dream", "w4a16 g32", FakeBackend((Picky(largest=64), ReferenceLinear())))
    report = k.apply(Lower())
    assert len(report.choices) == 15
    assert report.choices["model.layers.0.self_attn.q_proj"] == "picky"
    choice = report.choices["model.layers.1.mlp.down_proj"]
    assert choice.startswith("reference (the definition in plain PyTorch")
    assert choice.endswith("; not picky: 96 input features are over 64")
    keys = [key for key in k.ctx.weights if key.startswith("model.layers.0.self_attn.q_proj.")]
    assert sorted(keys) == [
        f"model.layers.0.self_attn.q_proj.picky.{role}" for role in ("bias", "codes", "scales", "zeros")
    ]


# Refusals


def test_no_kernel_for_a_site_lists_all_such_sites_and_lowers_nothing(case: CaseMaker) -> None:
    k = packed(case, "dream", "w4a16 g32", FakeBackend((Picky("small", 64), Picky("tiny", 8))))
    mark = fingerprint(k.graph, k.ctx.weights)
    reason = "small: 96 input features are over 64; tiny: 96 input features are over 8"
    with pytest.raises(LoweringError) as caught:
        k.apply(Lower())
    assert str(caught.value) == (
        f"no kernel of backend 'fake' supports model.layers.0.mlp.down_proj: {reason}; "
        f"model.layers.1.mlp.down_proj: {reason}. Use backend='auto' or another scheme"
    )
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_the_plan_says_so_before_any_work(case: CaseMaker) -> None:
    k = case("dream", FakeBackend((Picky("small", 64),)))
    mark = fingerprint(k.graph, k.ctx.weights)
    message = (
        r"^model\.layers\.0\.mlp\.down_proj: no kernel of backend 'fake' supports it "
        r"\(small: 96 input features are over 64\); model\.layers\.1\.mlp\.down_proj: .* Nothing was changed or written$"
    )
    with pytest.raises(FeasibilityError, match=message):
        PassManager((QuantizeWeights(4, 32, method=Rtn()), Pack(), Lower())).run(k.graph, k.ctx)
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_plan_and_lowering_see_the_same_sites(case: CaseMaker) -> None:
    passes = (QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(4, 32, False), Pack())
    k = case("dream")
    plan = PassManager(passes).plan(k.graph, k.ctx)
    PassManager(passes).run(k.graph, k.ctx)
    nodes = [n for n in k.graph.nodes if is_call(n, LINEAR_PACKED)]
    assert {site_name(n): spec_of_node(n, k.ctx) for n in nodes} == plan.sites
    spec = plan.sites["model.layers.0.self_attn.k_proj"]
    assert spec == LinearSpec(64, 32, IntFormat(4, 32, False), ActFormat(4, 32, False), True)


def test_a_shared_weight_is_laid_out_once(case: CaseMaker) -> None:
    k = packed(case, "shared", "w8a8")
    report = k.apply(Lower())
    assert report.sites == 7
    assert len(report.choices) == 3
    assert sum(key.endswith("reference.codes") for key in k.ctx.weights) == 3


def test_leaves_an_unquantized_graph_identical(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    assert k.apply(Lower()).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(ContractError, match=r"pass 'lower' needs 'packed', which does not hold here\. No pass in this"):
        PassManager((Lower(),)).run(k.graph, k.ctx)


def test_twice_is_once(case: CaseMaker) -> None:
    k = packed(case, "dream", "w8a8")
    k.apply(Lower())
    mark = fingerprint(k.graph, k.ctx.weights)
    assert k.apply(Lower()).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_the_whole_pipeline_gives_the_facts(case: CaseMaker) -> None:
    k = case("dream", "cpu")
    PassManager((*SCHEMES["w8a8"], Pack(), Lower())).run(k.graph, k.ctx)
    assert {"packed", "lowered", "quantized-weights", "quantized-activations"} <= k.ctx.facts
    assert torch.isfinite(k.forward(k.ids())).all()


class TwoBiases(nn.Module):
    """One weight, two biases: what the second call adds must not come from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 64)
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.first = nn.Parameter(torch.linspace(3, -3, 64))
        self.second = nn.Parameter(torch.linspace(-3, 3, 64))
        self.head = nn.Linear(64, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = torch.tanh(nn.functional.linear(x, self.weight, self.first))
        x = torch.tanh(nn.functional.linear(x, self.weight, self.second))
        return self.head(x)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_calls_that_share_a_weight_keep_their_own_bias(backend: str) -> None:
    torch.manual_seed(0)
    model = TwoBiases().eval()
    rows = torch.randint(0, VOCAB - 1, (4, 16))
    q = dlqc.compile(model, "w8a16-rtn", calibration=rows, mask_id=VOCAB - 1, backend=backend, progress=False)
    expected = model(rows).detach()
    assert float((q(rows) - expected).norm() / expected.norm()) < 0.03
