"""learn_rotation: the loss is that of the quantized model, its gradient is right, and what is learned folds exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlqc.cayley import orthogonality_error, skew
from dlqc.certificate import deviation
from dlqc.contract import PassReport
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, ContractError, RecipeError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.manager import PassManager
from dlqc.ops import ROPE, TRANSFORM
from dlqc.passes import learn_rotation
from dlqc.passes.learn_rotation import LearnRotation, Trained, split
from dlqc.passes.rotate_hidden import randomized_hadamard
from dlqc.recipe import parse_line
from dlqc.transform import Chain, Diagonal, Hadamard, Kronecker, Permutation, Transform, blocks

CaseMaker = Callable[..., Any]
FOLD = "fold_norm_scale(untie=True)"


def run(k: Any, line: str) -> list[PassReport]:
    return [report for _, report in PassManager(parse_line(line)).run(k.graph, k.ctx)]


def confident(k: Any, seed: int = 7) -> Any:
    """The text becomes what the model itself predicts, so that quantization costs likelihood; token weights differ."""
    states, generator = k.ctx.states, torch.Generator().manual_seed(seed)
    logits = k.forward(states.ids)
    logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if k.ctx.spec.shift else logits
    clean = torch.where(states.ids == k.ctx.spec.mask_id, logits.argmax(-1), states.ids)
    weights = 0.5 + torch.rand(states.ids.shape, generator=generator)
    k.ctx.states = dataclasses.replace(states, clean=clean, weights=weights)
    return k


def trained(k: Any, act: int | None = 4, weight: int | None = None) -> tuple[Trained, list[Tensor]]:
    """The differentiable model and rotations to start from."""
    p = LearnRotation()
    regions = p.regions(k.graph, k.ctx, PassReport())
    starts = [randomized_hadamard(r.width // r.heads, i).matrix() for i, r in enumerate(regions)]
    formats = None if act is None else ActFormat(act), None if weight is None else IntFormat(weight, None)
    return Trained(k.graph, k.ctx, regions, formats, scale=True), starts


def naive_loss(logits: Tensor, states: Any, picked: Tensor, spec: DiffusionSpec) -> float:
    """LLaDA's loss, token by token; with shifted logits row i - 1 predicts token i, and its weight lies there."""
    total = 0.0
    for b in picked.tolist():
        for i in range(states.ids.shape[1]):
            if states.ids[b, i] == spec.mask_id:
                row = max(i - 1, 0) if spec.shift else i
                nll = -torch.log_softmax(logits[b, row].double(), -1)[states.clean[b, i]]
                total += float(states.weights[b, row] / states.t[b] * nll)
    return total / (len(picked) * states.ids.shape[1])


@pytest.mark.parametrize("name", ["llada", "llada bf16", "llada tied", "llada grouped bias", "dream"])
def test_the_function_stays(case: CaseMaker, name: str) -> None:
    k = case(name)
    before, single = k.forward(k.ids(), torch.float64), k.forward(k.ids())
    report = run(k, f"{FOLD}, learn_rotation(iterations=2, batch=2)")[1]
    assert (report.sites, report.declined) == (3, [])
    assert report.certificate < 1e-12
    assert deviation(k.forward(k.ids(), torch.float64), before) < 1e-12
    assert deviation(k.forward(k.ids()), single) < (1e-4 if "bf16" not in name else 3e-2)
    assert report.metrics["orthogonality_error"] < 1e-12


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_the_loss_is_that_of_the_quantized_model(case: CaseMaker, name: str) -> None:
    """The held-out loss in the report, against the model that the quantizing passes make, token by token."""
    k = confident(case(name))
    learn = "learn_rotation(iterations=3, batch=3, lr=0.5, weight_bits=4)"
    rest = "quantize_weights(bits=4, group_size=None, symmetric=True, method='rtn'), quantize_activations(bits=4)"
    report = run(k, f"{FOLD}, rotate_down, {learn}, {rest}")[2]
    _, held_out = split(k.ctx)
    found = naive_loss(k.forward(k.ctx.states.ids), k.ctx.states, held_out, k.ctx.spec)
    better = min(report.metrics["held_out_after"], report.metrics["held_out_before"])
    assert found == pytest.approx(better, rel=1e-3)


@pytest.mark.parametrize("name", ["llada", "llada grouped bias", "dream"])
def test_the_gradient_is_the_slope(case: CaseMaker, name: str) -> None:
    """Off the manifold the loss without rounding changes; central differences of the whole model."""
    k = confident(case(name))
    run(k, f"{FOLD}, rotate_down")
    model, starts = trained(k, act=None)
    picked = torch.arange(4)
    leaves = [r.clone().requires_grad_() for r in starts]
    gradients = torch.autograd.grad(model.loss(leaves, picked), leaves)
    generator = torch.Generator().manual_seed(3)
    for i, g in enumerate(gradients):
        z = torch.randn(g.shape, generator=generator, dtype=torch.float64)
        z = z + 5 * g / g.norm() * z.norm()  # a direction with a slope that float32 can see
        step = 1e-2 / float(z.norm())
        up, down = (
            float(model.loss([r + s * step * z if i == j else r for j, r in enumerate(starts)], picked).detach())
            for s in (1, -1)
        )
        assert (up - down) / (2 * step) == pytest.approx(float((g * z).sum()), rel=2e-2)


def test_without_rounding_no_rotation_changes_the_loss(case: CaseMaker) -> None:
    k = confident(case("llada"))
    run(k, FOLD)

    def along(act: int | None) -> list[float]:
        model, starts = trained(k, act=act)
        leaves = [r.clone().requires_grad_() for r in starts]
        gradients = torch.autograd.grad(model.loss(leaves, torch.arange(4)), leaves)
        return [float(skew(r, g).norm() / g.norm()) for r, g in zip(starts, gradients, strict=True)]

    assert max(along(None)) < 1e-4
    assert min(along(3)) > 1e-2


def test_learning_helps_on_states_it_has_not_seen(case: CaseMaker) -> None:
    k = confident(case("llada"))
    run(k, FOLD)
    states = k.ctx.states
    many = {
        f.name: getattr(states, f.name).repeat(4, *[1] * (getattr(states, f.name).dim() - 1))
        for f in dataclasses.fields(states)
        if f.name not in ("source", "prompt")
    }
    k.ctx.states = dataclasses.replace(states, **many)
    report = LearnRotation(iterations=25, act_bits=3, batch=8).apply(k.graph, k.ctx)
    assert report.notes == []
    gap = report.metrics["held_out_before"] - report.metrics["held_out_unrounded"]
    assert report.metrics["held_out_after"] - report.metrics["held_out_unrounded"] < 0.8 * gap


def test_a_result_no_better_than_the_start_is_not_used(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    k = case("llada")
    run(k, FOLD)
    monkeypatch.setattr(LearnRotation, "learn", lambda self, model, starts, training, seed, report: list(starts))
    table = k.ctx.weights.value("model.transformer.wte.weight", torch.float64)
    report = LearnRotation(seed=5).apply(k.graph, k.ctx)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("what was learned is no better on held-out states (")
    assert report.notes[0].endswith("the rotations stay randomized Hadamard matrices")
    turned = k.ctx.weights.value("model.transformer.wte.weight", torch.float64)
    assert torch.allclose(turned, randomized_hadamard(64, 5)(table), atol=1e-13)


def test_the_same_seed_learns_the_same(case: CaseMaker) -> None:
    found = []
    for seed in (1, 1, 2):
        k = case("llada")
        run(k, FOLD)
        LearnRotation(iterations=2, batch=2, seed=seed).apply(k.graph, k.ctx)
        found.append(k.ctx.weights.value("model.transformer.wte.weight", torch.float64))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_without_r2_the_heads_stay(case: CaseMaker) -> None:
    k = case("llada")
    run(k, FOLD)
    report = LearnRotation(iterations=1, r2=False).apply(k.graph, k.ctx)
    assert report.sites == 1
    folds = [len(k.ctx.weights[f"model.transformer.blocks.0.{n}.weight"].folds) for n in ("v_proj", "attn_out")]
    assert folds == [2, 1]  # the norm's gain and R1; R1


def test_declines(case: CaseMaker) -> None:
    k = case("layer norm")
    report = run(k, "fold_norm_scale, learn_rotation(required=False)")[1]
    assert [(d.site, d.reason) for d in report.declined] == [
        (
            "residual stream",
            "stuck at %layer_norm (aten.layer_norm): a layer norm takes the mean away; run center_norms first",
        )
    ]
    with pytest.raises(ContractError, match="pass 'learn_rotation' needs 'unit-gain', which does not hold here"):
        PassManager(parse_line("calibrate, learn_rotation")).check_order()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("iterations=0", "learn_rotation.iterations: 0 is less than 1. Use 100"),
        ("batch=0", "learn_rotation.batch: 0 is less than 1. Use 8"),
        ("lr=0.0", "learn_rotation.lr: 0.0 is no learning rate. Use a positive number, such as 1.5"),
        ("lr=-1.0", "learn_rotation.lr: -1.0 is no learning rate. Use a positive number, such as 1.5"),
        (
            "act_bits=None",
            "learn_rotation.act_bits: nothing is rounded, so no rotation is better than another. Set act_bits=4",
        ),
        (
            "act_bits=1",
            "bits: 1 is not a width of an integer activation. Use 2 to 8, or leave activations unquantized",
        ),
        ("weight_bits=5", "bits: 5 is not a width of an integer weight. Use 2, 3, 4 or 8"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_line(f"learn_rotation({options})")
    assert str(caught.value) == message


def test_states_without_masks(case: CaseMaker) -> None:
    k = case("llada")
    run(k, FOLD)
    k.ctx.states = dataclasses.replace(k.ctx.states, ids=k.ctx.states.clean)
    with pytest.raises(CalibrationError) as caught:
        LearnRotation().apply(k.graph, k.ctx)
    assert str(caught.value) == (
        "learn_rotation: 0 of 6 states have masked tokens; learning needs two or more. "
        "Calibrate with masked states: calibrate(sampler=masked_simulation)"
    )


def test_a_gradient_that_is_not_finite(case: CaseMaker) -> None:
    k = case("llada")
    run(k, FOLD)
    name = "model.transformer.blocks.0.ff_out.weight"
    k.ctx.weights.put(name, torch.full(tuple(k.ctx.weights[name].shape), torch.nan))
    with pytest.raises(CalibrationError) as caught:
        LearnRotation(iterations=1).apply(k.graph, k.ctx)
    assert str(caught.value) == (
        "learn_rotation: the gradient of step 1 is not finite, the loss nan. "
        "Check the weights and the calibration text, or lower lr="
    )


def test_a_rotation_that_left_the_manifold_is_refused(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted error: the optimizer scales."""

    class Scaling(learn_rotation.CayleySGD):
        def step(self, gradients: Any, lr: float) -> None:
            for x in self._matrices:
                x.data.mul_(1.01)

    monkeypatch.setattr(learn_rotation, "CayleySGD", Scaling)
    k = case("llada")
    run(k, FOLD)
    with pytest.raises(CalibrationError) as caught:
        LearnRotation(iterations=1).apply(k.graph, k.ctx)
    assert str(caught.value) == (
        "learn_rotation: a learned rotation is off orthogonal by 0.0201, more than 1e-06. Lower lr="
    )


def test_a_planted_error_shows(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are turned one by one in the weights of values only."""

    def wrong(weights: Any, region: Any, t: Transform) -> None:
        real(weights, dataclasses.replace(region, absorbs=dict([*region.absorbs.items()][:1])), t)

    real = learn_rotation.fold
    monkeypatch.setattr(learn_rotation, "fold", wrong)
    with pytest.raises(ContractError, match="claims to preserve the function"):
        run(case("llada"), f"{FOLD}, learn_rotation(iterations=1)")


# The ops it trains through


def test_the_gradient_of_rope() -> None:
    cos, sin = (torch.randn(5, 8, dtype=torch.float64) for _ in range(2))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ROPE(x, cos, sin), (x,))


@pytest.mark.parametrize(
    "t",
    [
        Hadamard(12, 12),  # not symmetric
        Diagonal(torch.arange(1.0, 13.0, dtype=torch.float64)),
        Permutation(torch.tensor([3, 0, 1, 2, 4, 6, 5, 11, 7, 8, 9, 10])),
        Chain((Kronecker(blocks(torch.randn(3, 3)), blocks(torch.randn(4, 4))), Hadamard(12, 4, True))),
    ],
    ids=["hadamard", "diagonal", "permutation", "chain"],
)
def test_the_gradient_of_a_transform(t: Transform) -> None:
    parts: list[Tensor] = []
    spec = t.encode(parts)
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: TRANSFORM(x, parts, spec), (x,))
    assert orthogonality_error(Hadamard(12, 12).matrix()) < 1e-14
