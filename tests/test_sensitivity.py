"""Sensitivities against the eager model with one weight exchanged, and against the exact Fisher information."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from zoo import captured

from dlqc import sensitivity
from dlqc.backend import load_backend
from dlqc.blocks import find_blocks
from dlqc.calibration import TokenRows
from dlqc.contract import Context, Declined
from dlqc.errors import CalibrationError, ModelError
from dlqc.formats.integer import IntFormat
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.rtn import Rtn
from dlqc.schemes import Scheme
from dlqc.sensitivity import Unit, output_fisher, probes, sensitivities, units_of

CaseMaker = Callable[..., Any]
TWO, FOUR = (Scheme(IntFormat(bits, 32, False), Rtn()) for bits in (2, 4))


def short(units: list[Unit]) -> list[list[str]]:
    return [[name.rpartition(".")[2] for name in unit.names] for unit in units]


# Units


def test_linears_that_read_one_value_are_one_unit(case: CaseMaker) -> None:
    k = case("llada")
    units, left = units_of(k.graph, k.ctx)
    block = [["q_proj", "k_proj", "v_proj"], ["attn_out"], ["ff_proj", "up_proj"], ["ff_out"]]
    assert [sorted(names) for names in short(units)] == [sorted(names) for names in block * 2]
    assert [unit.block for unit in units] == [0] * 4 + [1] * 4
    assert left == []
    assert sum(unit.weights for unit in units) == 2 * (4 * 64 * 64 + 3 * 64 * 96)
    alone, _ = units_of(k.graph, k.ctx, fused=False)
    assert short(alone) == [[name] for names in block * 2 for name in names]


def test_skip_and_routers_are_left_alone() -> None:
    graph, weights, spec = captured("llada-moe")
    ctx = Context(weights, spec, load_backend("reference"), blocks=find_blocks(graph))
    units, left = units_of(graph, ctx, skip=("*.o_proj",))
    reasons = {"self_attn.o_proj": "named by skip=", "mlp.gate": "a router: its output picks experts"}
    assert left == [Declined(f"model.layers.{i}.{name}", why) for i in range(2) for name, why in reasons.items()]
    # All experts read what the router reads; what their second linears read is their own.
    block = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"] * 6, *[["down_proj"]] * 6]
    assert short(units) == block * 2


def test_a_shared_weight_is_one_site(case: CaseMaker) -> None:
    k = case("shared")
    units, _ = units_of(k.graph, k.ctx)
    assert [unit.names for unit in units] == [("layers.0.up",), ("layers.0.down",)]


# Measured metrics


def exchanged(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with other weights."""
    other = copy.deepcopy(model)
    for name, value in weights.items():
        parameter = other.get_parameter(name)
        parameter.data = value.to(parameter.dtype)
    return other


def logits(model: nn.Module, ids: Tensor, shift: bool) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    out = getattr(out, "logits", out).double()
    return torch.cat((out[:, :1], out[:, :-1]), dim=1) if shift else out


@pytest.mark.parametrize("name", ["llada", "llada grouped bias", "dream", "shared"])
def test_the_model_is_run_with_only_the_unit_rounded(case: CaseMaker, name: str) -> None:
    k = case(name)
    units, _ = units_of(k.graph, k.ctx)
    ratios = (0.25, 0.75)
    found = sensitivities(k.graph, k.ctx, units, [(TWO, FOUR)] * len(units), rows=4, ratios=ratios)
    assert [set(cost) for row in found for cost in row] == [{"kl", "confidence", "mse"}] * (2 * len(units))
    states = probes(k.ctx, rows=4, ratios=ratios)
    masked = states.ids == k.ctx.spec.mask_id
    assert torch.equal(states.measured, masked)
    assert masked.sum(dim=1).tolist() == [4] * 4 + [12] * 4
    before = logits(k.model, states.ids, k.ctx.spec.shift)
    state = k.model.state_dict()
    for unit, row in zip(units, found, strict=True):
        for scheme, cost in zip((TWO, FOUR), row, strict=True):
            weights = {s.weight: scheme.format.quantize(state[s.weight]).dequantize() for s in unit.sites}
            after = logits(exchanged(k.model, weights), states.ids, k.ctx.spec.shift)
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            by_token = {
                "kl": (p.exp() * (p - q)).sum(-1),
                "confidence": (p.exp().amax(-1) - q.exp().amax(-1)).square(),
                "mse": (before - after).square().mean(-1),
            }
            for metric, values in by_token.items():
                expected = torch.stack([v[m].mean() for v, m in zip(values, masked, strict=True)]).mean()
                assert cost[metric] == pytest.approx(float(expected), rel=2e-3, abs=1e-7), (unit.names, metric)


def test_it_does_not_depend_on_how_it_is_cut_up(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")
    units, _ = units_of(k.graph, k.ctx)
    candidates = [(Scheme(IntFormat(3, 32, False), Gptq()),)] * len(units)
    first = sensitivities(k.graph, k.ctx, units, candidates, "fisher", rows=4)
    assert sensitivities(k.graph, k.ctx, units, candidates, "fisher", rows=4) == first
    whole = sensitivities(k.graph, k.ctx, units, candidates, rows=4)
    monkeypatch.setattr(sensitivity, "_BATCH", 3)
    monkeypatch.setattr(sensitivity, "_KEPT", 0)
    parts = sensitivities(k.graph, k.ctx, units, candidates, rows=4)
    for (a,), (b,) in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    # A unit's costs are its own: they stay when the others are not asked for.
    alone = sensitivities(k.graph, k.ctx, units[5:6], candidates[5:6], rows=4)
    assert alone[0][0] == pytest.approx(parts[5][0], rel=1e-3)


def test_few_logits_are_kept(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")
    full = probes(k.ctx, rows=6, ratios=(0.25, 0.75))
    assert [part for part in full.batches(k.ctx.spec.vocab_size)] == [slice(0, 8), slice(8, 16)]
    monkeypatch.setattr(sensitivity, "_LOGITS", 12 * 5 * k.ctx.spec.vocab_size)
    few = probes(k.ctx, rows=6, ratios=(0.25, 0.75))
    assert torch.equal(few.ids, full.ids)
    assert few.measured.sum(dim=1).tolist() == [4] * 6 + [5] * 6
    assert not bool((few.measured & ~full.measured).any())
    assert float((few.share[:, None] * few.measured).sum()) == pytest.approx(1)
    assert next(iter(few.batches(k.ctx.spec.vocab_size))) == slice(0, 3)  # 3·16 logits, of 60 that are allowed


# Estimates


def naive_fisher(k: Any, states: Any, layer: str) -> Tensor:
    """Σ over outputs i and tokens y of p(y)·(∂ log p(y) / ∂y_tn)², each by a backward pass of its own."""
    model = copy.deepcopy(k.model).double()
    kept: list[Tensor] = []
    module = model.get_submodule(layer)
    module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    total = torch.zeros(module.out_features, dtype=torch.float64)
    for ids, measured in zip(states.ids, states.measured, strict=True):
        kept.clear()
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        count = int(measured.sum())
        for i in measured.nonzero()[:, 0].tolist():
            for token in range(log_p.shape[-1]):
                (g,) = torch.autograd.grad(log_p[i, token], kept[0], retain_graph=True)
                weight = float(log_p[i, token].detach().exp()) / count / len(states.ids)
                total += weight * g.square().reshape(-1, g.shape[-1]).sum(dim=0)
    return total


def test_output_fisher_is_unbiased(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.rows = TokenRows(k.ctx.rows.ids[:, :6], "short")
    states = probes(k.ctx, rows=2, ratios=(0.5,))
    units, _ = units_of(k.graph, k.ctx)
    draws = []
    for seed in range(60):
        k.ctx.seed = seed
        draws.append(output_fisher(k.graph, k.ctx, units, states))
    for layer in ("blocks.0.v_proj", "blocks.1.ff_out"):
        exact = naive_fisher(k, states, f"model.transformer.{layer}")
        drawn = torch.stack([draw[f"model.transformer.{layer}.weight"] for draw in draws])
        spread = drawn.sum(1).std() / len(draws) ** 0.5
        assert abs(float(drawn.sum(1).mean() - exact.sum())) < 4 * float(spread)
        assert float(spread) < 0.1 * float(exact.sum())
        cosine = torch.nn.functional.cosine_similarity(drawn.mean(0), exact, dim=0)
        assert float(cosine) > 0.97


def test_estimates_are_what_they_say(case: CaseMaker) -> None:
    """tr(E H Eᵀ)/T from the inputs themselves, and the same with F; and F brings it near the measured KL."""
    k = case("llada")
    units, _ = units_of(k.graph, k.ctx)
    found = sensitivities(k.graph, k.ctx, units, [(TWO, FOUR)] * len(units), "fisher", rows=6)
    fisher = output_fisher(k.graph, k.ctx, units, probes(k.ctx, rows=6, ratios=sensitivity.RATIOS))
    kept: dict[str, Tensor] = {}
    model = copy.deepcopy(k.model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, inputs, _o, name=name: kept.update({name: inputs[0]}))
    with torch.no_grad():
        model(k.ctx.states.ids)
    for unit, row in zip(units, found, strict=True):
        for scheme, cost in zip((TWO, FOUR), row, strict=True):
            assert set(cost) == {"hessian", "fisher"}
            plain = weighed = 0.0
            for site in unit.sites:
                weight = model.get_parameter(site.weight).detach()
                error = weight - scheme.format.quantize(weight).dequantize()
                out = (kept[site.name].reshape(-1, site.in_features) @ error.T).double().square().mean(dim=0)
                plain += float(out.sum())
                weighed += 0.5 * float(out @ fisher[site.weight])
            assert cost["hessian"] == pytest.approx(plain, rel=1e-3)
            assert cost["fisher"] == pytest.approx(weighed, rel=1e-3)
    measured = sensitivities(k.graph, k.ctx, units, [(FOUR,)] * len(units), rows=6)
    ratio = [row[1]["fisher"] / cost[0]["kl"] for row, cost in zip(found, measured, strict=True)]
    assert 0.4 < min(ratio)
    assert max(ratio) < 2.5


def test_a_method_that_collects_a_hessian_brings_that_estimate_along(case: CaseMaker) -> None:
    k = case("llada")
    units, _ = units_of(k.graph, k.ctx)
    by_gptq = Scheme(IntFormat(2, 32, False), Gptq())
    found = sensitivities(k.graph, k.ctx, units, [(by_gptq, TWO)] * len(units), rows=2)
    assert set(found[0][0]) == {"kl", "confidence", "mse", "hessian"}
    assert all(gptq["hessian"] < rtn["hessian"] for gptq, rtn in found)


# Errors


def test_no_clean_row(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.rows = TokenRows(torch.full((3, 8), k.ctx.spec.mask_id), "masks")
    message = (
        r"^calibration: no token row is free of masks, so there is nothing to mask and to measure on\. Give clean text"
    )
    with pytest.raises(CalibrationError, match=message):
        probes(k.ctx, rows=2, ratios=(0.5,))
    k.ctx.rows = None
    with pytest.raises(CalibrationError, match=message):
        probes(k.ctx, rows=2, ratios=(0.5,))


@dataclass(frozen=True)
class Broken(Rounding):
    """Rounds to infinity."""

    name: ClassVar[str] = "broken"

    def round(self, weight: Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        made = Rtn().round(weight, fmt, stats)
        made.weight.scales.fill_(float("inf"))
        return made


def test_logits_that_are_not_finite(case: CaseMaker) -> None:
    k = case("llada")
    units, _ = units_of(k.graph, k.ctx)
    broken: Any = Broken()
    with pytest.raises(
        ModelError,
        match=r"^model\.transformer\.blocks\.0\.q_proj\.weight: with only these linears rounded, the logits are not finite\. "
        r"Leave them out with skip=, or use more bits$",
    ):
        sensitivities(k.graph, k.ctx, units, [(Scheme(TWO.format, broken),)] * len(units), rows=2)
