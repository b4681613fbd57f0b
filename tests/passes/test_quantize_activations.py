"""quantize_activations: one quantizer for each value, in front of quantized linears only; dynamic, and with fixed ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dlqc
from dlqc.check import check
from dlqc.contract import PassReport
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, ContractError, FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.graph import fingerprint, is_call
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_Q, MASK_BUCKET, QUANTIZE_ACT, QUANTIZE_ACT_STATIC
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.lower import Lower
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.ranges import Ema, MinMax, Mse, Percentile
from dlqc.rounding.rtn import Rtn
from dlqc.samplers import Clean, ForwardProcess

CaseMaker = Callable[..., Any]


def quantized(case: CaseMaker, name: str = "llada", **options: Any) -> Any:
    k = case(name)
    k.apply(QuantizeWeights(8, None, True, Rtn(), **options))
    return k


@pytest.mark.parametrize(
    ("name", "sites", "quantizers"), [("llada", 15, 9), ("dream", 15, 9), ("layer norm", 5, 5), ("shared", 7, 7)]
)
def test_readers_of_one_value_share_a_quantizer(case: CaseMaker, name: str, sites: int, quantizers: int) -> None:
    k = quantized(case, name)
    report = k.apply(QuantizeActivations())
    assert report.sites == sites
    assert report.metrics == {"quantizers": quantizers}
    nodes = [n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT)]
    assert len(nodes) == quantizers
    assert len({n.args[0] for n in nodes}) == quantizers
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-weights"}, after="quantize_activations")


def test_q_k_and_v_read_the_same_codes(case: CaseMaker) -> None:
    k = quantized(case)
    k.apply(QuantizeActivations())
    first = next(n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT))
    assert len(first.users) == 3
    assert {str(n.args[1].target).split(".")[-2] for n in first.users} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, True), (4, 32, True), (4, None, False), (2, 32, False)]
)
def test_the_value_that_a_linear_reads_is_the_formats(
    case: CaseMaker, bits: int, group: int | None, symmetric: bool
) -> None:
    k = quantized(case)
    k.apply(QuantizeActivations(bits, group, symmetric))
    node = next(n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT))
    run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [node.args[0], node])
    x, found = run(k.ids())
    assert torch.equal(found, ActFormat(bits, group, symmetric).fake_quantize(x))
    grouped = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    span = grouped.abs().amax(-1) * 2 if symmetric else grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
    step = span / (2**bits - 2 if symmetric else 2**bits - 1)
    error = (found - x).reshape(grouped.shape).abs().amax(-1)
    assert bool((error <= step * 0.5001).all())
    assert bool((error > 0).any())


def test_more_bits_are_closer(case: CaseMaker) -> None:
    expected = quantized(case)
    ids, errors = expected.ids(), []
    for bits in (3, 4, 6, 8):
        k = quantized(case)
        k.apply(QuantizeActivations(bits))
        errors.append(float((k.forward(ids) - expected.forward(ids)).norm() / expected.forward(ids).norm()))
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < 0.05 < errors[0]


def test_linears_that_are_not_quantized_keep_their_inputs(case: CaseMaker) -> None:
    k = quantized(case, skip=("*.q_proj", "*.ff_out", "model.transformer.ff_out"))
    report = k.apply(QuantizeActivations())
    assert report.sites == 10
    for node in (n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT)):
        assert all(is_call(user, LINEAR_Q) for user in node.users)


def test_leaves_a_float_graph_identical(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    report = k.apply(QuantizeActivations())
    assert (report.sites, report.metrics) == (0, {"quantizers": 0})
    assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(ContractError, match=r"'quantize_activations' needs 'quantized-weights', which does not hold"):
        PassManager((QuantizeActivations(),)).run(k.graph, k.ctx)


def test_twice_is_once(case: CaseMaker) -> None:
    k = quantized(case)
    k.apply(QuantizeActivations())
    mark = fingerprint(k.graph, k.ctx.weights)
    assert k.apply(QuantizeActivations()).sites == 0
    assert k.apply(QuantizeActivations(4)).sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_groups_that_do_not_divide_are_listed(case: CaseMaker) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    message = (
        r"^model\.transformer\.blocks\.0\.ff_out: activations: 96 input features do not divide by group 64; "
        r"model\.transformer\.blocks\.1\.ff_out: activations: 96 input features .* Nothing was changed or written$"
    )
    with pytest.raises(FeasibilityError, match=message):
        PassManager((QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(8, 64))).run(k.graph, k.ctx)
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_the_plan_has_the_format(case: CaseMaker) -> None:
    k = case("llada")
    plan = PassManager((QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(4, 32, False))).plan(k.graph, k.ctx)
    assert {spec.act for spec in plan.sites.values()} == {ActFormat(4, 32, False)}


def test_impossible_options() -> None:
    with pytest.raises(RecipeError, match=r"^bits: 9 is not a width of an integer activation\. Use 2 to 8"):
        QuantizeActivations(9)
    with pytest.raises(RecipeError, match=r"^group_size: a group of 0 features is impossible"):
        QuantizeActivations(group_size=0)


def test_no_tokens_at_all(case: CaseMaker) -> None:
    for symmetric in (True, False):
        k = quantized(case)
        k.apply(QuantizeActivations(8, None, symmetric))
        assert k.forward(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 61)


# Fixed ranges

RTN = QuantizeWeights(8, None, True, Rtn())


def static(case: CaseMaker, name: str = "llada", *, weights: Any = RTN, **options: Any) -> tuple[Any, PassReport]:
    k = case(name)
    passes = (Calibrate(sampler=ForwardProcess()), weights, QuantizeActivations(**options))
    reports = PassManager(passes).run(k.graph, k.ctx)
    return k, reports[-1][1]


def fixed(k: Any) -> list[Any]:
    return [n for n in k.graph.nodes if is_call(n, QUANTIZE_ACT_STATIC)]


@pytest.mark.parametrize(("name", "sites", "quantizers"), [("llada", 14, 8), ("dream", 14, 8), ("shared", 6, 6)])
@pytest.mark.parametrize("buckets", [1, 3])
def test_readers_of_one_value_share_fixed_scales(
    case: CaseMaker, name: str, sites: int, quantizers: int, buckets: int
) -> None:
    k, report = static(case, name, ranges=MinMax(), buckets=buckets)
    assert (report.sites, report.metrics["quantizers"]) == (sites, quantizers)
    nodes = fixed(k)
    assert len(nodes) == len({n.args[0] for n in nodes}) == len({n.args[1].target for n in nodes}) == quantizers
    assert all(tuple(k.ctx.weights[n.args[1].target].shape) == (buckets, 1) for n in nodes)
    assert sum(is_call(n, MASK_BUCKET) for n in k.graph.nodes) == (buckets > 1)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-activations"}, after="quantize_activations")
    label = "int8 static tensor" + (" by 3 mask ratios" if buckets > 1 else "")
    assert f"inputs of linears are {label}, ranges by min_max" in report.notes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
def test_fixed_ranges_hold_what_the_states_showed(case: CaseMaker, group: int | None, symmetric: bool) -> None:
    """min_max on the first block, whose inputs nothing before it has changed."""
    k, report = static(case, group_size=group, symmetric=symmetric, ranges=MinMax())
    node = fixed(k)[0]
    scale, zero = (None if a is None else k.ctx.weights.value(a.target)[0] for a in node.args[1:3])
    x, found = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [node.args[0], node])(k.ctx.states.ids)
    parts = x.reshape(-1, x.shape[-1] // (group or 64), group or 64)
    low, high = parts.amin((0, 2)).clamp(max=0), parts.amax((0, 2)).clamp(min=0)
    expected = torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    torch.testing.assert_close(scale, expected)
    assert (zero is None) == symmetric
    steps = scale.repeat_interleave(group or 64)
    assert bool(((found - x).abs() <= 0.5001 * steps).all())  # nothing is clamped
    assert report.details["model.transformer.blocks.0.q_proj"]["kept"] == 1.0


def test_a_clipped_range_clamps(case: CaseMaker) -> None:
    k, report = static(case, bits=4, ranges=Percentile(0.9))
    node = fixed(k)[0]
    x, found = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [node.args[0], node])(k.ctx.states.ids)
    scale = k.ctx.weights.value(node.args[1].target)[0, 0]
    assert float(x.abs().max()) > 8.5 * float(scale)
    torch.testing.assert_close(found, (x / scale).round().clamp(-8, 7) * scale)
    assert report.details["model.transformer.blocks.0.q_proj"]["kept"] < 0.7


def test_each_row_takes_the_set_of_its_mask_ratio(case: CaseMaker) -> None:
    k, report = static(case, ranges=Mse(points=20), buckets=(0.3, 0.7))
    ids = torch.randint(0, 60, (4, 10), generator=torch.Generator().manual_seed(0))
    for row, masked in enumerate((0, 3, 4, 8)):
        ids[row, :masked] = k.ctx.spec.mask_id
    node = fixed(k)[2]
    x, found = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [node.args[0], node])(ids)
    scale = k.ctx.weights.value(node.args[1].target)[:, 0]
    assert len(set(scale.tolist())) == 3
    for row, s in enumerate((0, 0, 1, 2)):
        torch.testing.assert_close(found[row], (x[row] / scale[s]).round().clamp(-128, 127) * scale[s])
    alone = torch.cat([k.forward(row[None]) for row in ids])
    torch.testing.assert_close(k.forward(ids), alone, rtol=1e-4, atol=1e-5)
    assert {f"{word} {s}" for word in ("low", "high", "kept", "tokens") for s in range(3)} == set(
        report.details["model.transformer.blocks.1.ff_out"]
    )


def test_a_bucket_without_states_is_told_once(case: CaseMaker) -> None:
    k = case("llada")
    passes = (Calibrate(sampler=Clean()), RTN, QuantizeActivations(ranges=Ema(), buckets=2))
    report = PassManager(passes).run(k.graph, k.ctx)[-1][1]
    assert report.notes[0] == "mask-ratio bucket 1 saw no token and takes the ranges of bucket 0"
    assert len(report.notes) == 2
    assert all(torch.equal(*k.ctx.weights.value(n.args[1].target)) for n in fixed(k))


def test_other_formats_of_weights(case: CaseMaker) -> None:
    k, report = static(case, weights=QuantizeWeights(method=Rtn(), format=Nf4Format(block=32)), ranges=MinMax())
    assert report.sites == 14
    assert "model.transformer.blocks.0.q_proj.input_scale" in k.ctx.weights
    PassManager((Lower(),)).run(k.graph, k.ctx)


class SequenceFirst(torch.nn.Module):
    """Two layers on [L, B, d], or on [L·B, d]."""

    spec = DiffusionSpec(mask_id=31, vocab_size=32, max_length=16)

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = flat
        self.embed = torch.nn.Embedding(32, 16)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(2)])
        self.head = torch.nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x.reshape(-1, 16) if self.flat else x.transpose(0, 1)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x.reshape(*ids.shape, 16) if self.flat else x.transpose(0, 1))


@pytest.mark.parametrize("flat", [True, False])
def test_rows_find_their_set_however_tokens_are_laid_out(flat: bool) -> None:
    recipe = (
        "calibrate(sampler=forward_process, sequences=16), quantize_weights(bits=8, group_size=None, symmetric=True, "
        "method=rtn), quantize_activations(ranges=min_max, buckets=2), pack, lower"
    )
    rows = torch.randint(0, 31, (16, 12), generator=torch.Generator().manual_seed(1))
    q = dlqc.compile(SequenceFirst(flat).eval(), recipe, calibration=rows, progress=False, backend="cpu")
    ids = rows[:4].clone()
    ids[1:3, 2:] = 31
    torch.testing.assert_close(q(ids), torch.cat([q(row[None]) for row in ids]))
    q.weights.put("layers.0.input_scale", torch.tensor([[0.01], [0.5]]))
    node = fixed(q)[0]
    x, found = Executor(q.graph, q.weights, [placeholder(q.graph)], [node.args[0], node])(ids)
    if flat:
        x, found = (part.reshape(*ids.shape, 16) for part in (x, found))
    else:
        x, found = x.transpose(0, 1), found.transpose(0, 1)
    for row, step in enumerate((0.01, 0.5, 0.5, 0.01)):
        torch.testing.assert_close(found[row], (x[row] / step).round().clamp(-128, 127) * step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"buckets": 4},
            r"^quantize_activations\.buckets: scales that are taken from x at run time know no buckets\. Name an",
        ),
        (
            {"ranges": MinMax(), "group_size": 1},
            r"^quantize_activations\.group_size: a fixed scale for each channel does not come out of a linear's sum over "
            r"channels\. Fold the scales into the weights with smooth\(alpha=1\.0\), and use group_size=None$",
        ),
        (
            {"ranges": MinMax(), "buckets": (0.5, 0.2)},
            r"^quantize_activations\.buckets: \(0\.5, 0\.2\) are no ascending",
        ),
    ],
)
def test_impossible_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeActivations(**options)


def test_folded_channel_scales_are_static_scales_per_channel(case: CaseMaker) -> None:
    """smooth(alpha=1) gives every channel of the norms' outputs one range, so that one scale is as good as one for each."""
    k = case("llada")
    passes = (Calibrate(sampler=ForwardProcess()), Smooth(alpha=1.0), RTN, QuantizeActivations(ranges=MinMax()))
    PassManager(passes).run(k.graph, k.ctx)
    node = fixed(k)[0]
    x = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [node.args[0]])(k.ctx.states.ids)[0]
    torch.testing.assert_close(x.abs().amax((0, 1)), torch.ones(64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k.ctx.weights.value(node.args[1].target), torch.tensor([[1 / 127]]), rtol=1e-4, atol=0)


def test_activations_that_are_always_zero_or_not_finite(case: CaseMaker) -> None:
    for gain, message in (
        (
            0.0,
            r"^input of model\.transformer\.blocks\.1\.q_proj: the activations are zero on all 2048 calibration tokens",
        ),
        (
            float("inf"),
            r"^input of model\.transformer\.blocks\.1\.q_proj: NaN or Inf in the activations \(64 of 64 channels",
        ),
    ):
        k = case("llada")
        k.ctx.weights.put("model.transformer.blocks.1.attn_norm.weight", torch.full((64,), gain))
        passes = (Calibrate(sampler=ForwardProcess()), RTN, QuantizeActivations(ranges=MinMax()))
        with pytest.raises(CalibrationError, match=message):
            PassManager(passes).run(k.graph, k.ctx)
