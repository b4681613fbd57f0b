"""Fisher information against torch.autograd on the eager model, state by state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import captured
from zoo import model as zoo_model

from dlqc.backend import load_backend
from dlqc.blocks import find_blocks
from dlqc.calibration import Certainty, Clean, ForwardProcess, Rollout, TokenRows, Uniform, draw_states
from dlqc.contract import Context
from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.execute import forward
from dlqc.fisher import fisher
from dlqc.formats.codebook import CodebookFormat
from dlqc.graph import linears
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.rounding.kmeans import Kmeans

CaseMaker = Callable[..., Any]
TABLES = CodebookFormat(3, sparse=0.0045)


def by_hand(model: Any, states: Any, spec: Any) -> dict[str, torch.Tensor]:
    """E[g²] of each parameter: one state, one masked token after the other, as the loss is written down."""
    totals: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    wanted = [p.requires_grad for p in parameters.values()]
    for p in parameters.values():
        p.requires_grad_(True)
    for s in range(len(states.ids)):
        out = model(states.ids[s : s + 1])
        logits = (out.logits if hasattr(out, "logits") else out)[0]
        terms = []
        for i in range(states.ids.shape[1]):
            if int(states.ids[s, i]) == spec.mask_id:
                row = max(i - 1, 0) if spec.shift else i
                nll = -torch.log_softmax(logits[row].float(), dim=-1)[states.clean[s, i]]
                terms.append(states.weights[s, row] / states.t[s] * nll / states.ids.shape[1])
        if terms:
            gradients = torch.autograd.grad(torch.stack(terms).sum(), list(parameters.values()), allow_unused=True)
            for name, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    totals[name] = totals.get(name, torch.zeros_like(g)) + g.square() / len(states.ids)
    for p, before in zip(parameters.values(), wanted, strict=True):
        p.requires_grad_(before)
    return totals


@pytest.mark.parametrize(
    ("name", "sampler", "weight"),
    [
        ("llada", ForwardProcess(), Uniform()),
        ("llada tied", Rollout(steps=4, snapshots=2), Certainty()),
        ("dream", ForwardProcess(), Certainty()),  # logits are shifted, keys grouped, biases there
        ("shared", ForwardProcess(), Uniform()),  # one weight is called three times, in one block
    ],
)
def test_it_is_the_mean_square_of_the_gradients_of_single_states(
    case: CaseMaker, name: str, sampler: Any, weight: Any
) -> None:
    k = case(name)
    k.ctx.states = draw_states(k.ctx.rows, sampler, weight, k.ctx.spec, seed=3, logits=lambda ids: k.forward(ids))
    expected = by_hand(k.model, k.ctx.states, k.ctx.spec)
    found = fisher(k.graph, k.ctx, batch=4)
    inside = {s.weight for b in k.ctx.blocks for s in linears(b.nodes(k.graph), k.ctx.weights)}
    assert found.keys() == inside
    for weight_name, value in found.items():
        own = expected[weight_name]
        assert float(own.max()) > 0
        torch.testing.assert_close(value, own, rtol=1e-3, atol=1e-5 * float(own.max()))
        # Squared state by state: the square of the mean gradient, or of a batch, is another number.
        assert not torch.allclose(value, own * 2, rtol=0.2)
    for weight_name, value in fisher(k.graph, k.ctx, batch=3).items():
        torch.testing.assert_close(value, found[weight_name], rtol=1e-3, atol=1e-9)


def test_experts_of_a_mixture() -> None:
    graph, weights, spec = captured("llada-moe")
    ctx = Context(weights, spec, load_backend("reference"), blocks=find_blocks(graph))
    rows = TokenRows(torch.randint(0, 60, (3, 10), generator=torch.Generator().manual_seed(1)), "random")
    ctx.states = draw_states(
        rows, ForwardProcess(), Uniform(), spec, seed=1, logits=lambda ids: forward(graph, weights, ids)
    )
    found, expected = fisher(graph, ctx), by_hand(zoo_model("llada-moe"), ctx.states, spec)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.2.down_proj.weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-4 * float(expected[name].max()))


def test_of_a_16_bit_checkpoint_it_is_kept_in_16_bits(case: CaseMaker) -> None:
    k = case("llada bf16")
    found = fisher(k.graph, k.ctx)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(value).all()) and bool((value >= 0).all()) for value in found.values())


def test_states_without_masks_have_no_gradient(case: CaseMaker) -> None:
    k = case("llada")
    message = (
        r"^fisher: no calibration state has a masked token, so the masked loss has no gradient\. Calibrate with masked"
    )
    with pytest.raises(CalibrationError, match=message):
        PassManager(
            (
                Calibrate(sampler=Clean(), sequences=4, length=16),
                QuantizeWeights(format=TABLES, method=Kmeans("fisher")),
            )
        ).run(k.graph, k.ctx)


def test_gradients_that_are_not_finite(case: CaseMaker) -> None:
    k = case("llada")
    name = "model.transformer.ff_out.weight"
    k.ctx.weights.put(name, torch.full_like(k.ctx.weights.value(name), 3e38))
    with pytest.raises(
        CalibrationError, match=r"weight: squared gradients are not finite\. Calibrate in bfloat16 or float32"
    ):
        fisher(k.graph, k.ctx)


# In the pipeline


def test_kmeans_gets_the_information_of_the_weights_as_they_were(case: CaseMaker) -> None:
    """Of the last block, too: measured before the first block was rounded."""
    k = case("llada")
    expected = fisher(k.graph, k.ctx)
    got: dict[str, torch.Tensor] = {}

    def spy(self: Any, weight: torch.Tensor, fmt: Any, stats: Any) -> Any:
        got[len(got)] = stats["fisher"]  # type: ignore[index]
        return original(self, weight, fmt, stats)

    original = Kmeans.round
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kmeans, "round", spy)
        report = PassManager((QuantizeWeights(format=TABLES, method=Kmeans("fisher")),)).run(k.graph, k.ctx)[0][1]
    assert len(got) == 14
    for value, site in zip(got.values(), report.details, strict=True):
        torch.testing.assert_close(value, expected[f"{site}.weight"], rtol=1e-4, atol=1e-12, msg=site)
    assert {"error", "loss", "sqnr_db"} <= report.details["model.transformer.blocks.1.ff_out"].keys()


def test_passes_that_change_blocks_in_between_are_refused(case: CaseMaker) -> None:
    k = case("llada")
    message = (
        r"^passes: pass 'quantize_weights' wants gradients of the weights, which are taken before the first block, and 'smooth' "
        r"changes the blocks one by one in between\. Leave 'smooth' out, use a transform of the whole graph, or sensitivity="
    )
    with pytest.raises(ContractError, match=message):
        PassManager((Smooth(), QuantizeWeights(format=TABLES, method=Kmeans("fisher")))).run(k.graph, k.ctx)


def test_sensitivities_that_are_unknown_or_missing() -> None:
    with pytest.raises(RecipeError, match=r"^sensitivity: unknown sensitivity 'gradient'\. Use 'fisher' or 'hessian'$"):
        Kmeans("gradient")  # type: ignore[arg-type]
    with pytest.raises(
        CalibrationError, match=r"^kmeans needs the statistic 'fisher'\. Collect it, or use sensitivity='hessian'$"
    ):
        Kmeans("fisher").round(torch.ones(2, 8), CodebookFormat(2), {"hessian": torch.eye(8)})
    assert Kmeans("fisher").statistics == {"fisher", "hessian"}
    assert Kmeans("hessian").statistics == {"hessian"}
