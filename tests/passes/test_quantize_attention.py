"""quantize_attention: queries, keys, values and probabilities, by choice, in front of and in the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dlqc
from dlqc.attention import column_mass
from dlqc.check import check
from dlqc.contract import Pass
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, ContractError, FeasibilityError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.formats.activation import ActFormat
from dlqc.graph import SDPA, aten, call_before, fingerprint, is_call
from dlqc.heads import Dynamic, IaAq, Static
from dlqc.manager import PassManager
from dlqc.observers import Batch
from dlqc.ops import ATTENTION, MASK_BUCKET, QUANTIZE_HEADS, QUANTIZE_HEADS_STATIC
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_attention import QuantizeAttention
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.ranges import MinMax, Mse, Percentile
from dlqc.rounding.rtn import Rtn
from dlqc.samplers import ForwardProcess

CaseMaker = Callable[..., Any]
WEIGHTS = QuantizeWeights(8, None, True, Rtn())


def run(k: Any, *passes: Pass) -> list[Any]:
    return [report for _, report in PassManager(passes).run(k.graph, k.ctx)]


def calls(k: Any, target: Any) -> list[Any]:
    return [n for n in k.graph.nodes if is_call(n, target)]


def values(k: Any, nodes: list[Any], ids: torch.Tensor) -> list[torch.Tensor]:
    return Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], nodes)(ids)


@pytest.mark.parametrize("name", ["llada", "dream", "llada grouped bias"])
@pytest.mark.parametrize(("queries", "keys", "values"), [(None, 8, 8), (4, 4, 4), (None, None, 4)])
def test_every_attention_reads_what_was_asked_for(
    case: CaseMaker, name: str, queries: int | None, keys: int | None, values: int | None
) -> None:
    k = case(name)
    report = k.apply(QuantizeAttention(queries, keys, values))
    assert report.sites == 2
    widths = (queries, keys, values)
    for node in calls(k, SDPA):
        for part, bits in zip(node.args[:3], widths, strict=True):
            assert is_call(part, QUANTIZE_HEADS) == (bits is not None)
            assert bits is None or part.args[1] == bits
    assert len(calls(k, QUANTIZE_HEADS)) == 2 * sum(bits is not None for bits in widths)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-attention"}, after="quantize_attention")


@pytest.mark.parametrize("scheme", [Dynamic(), Dynamic("token"), Dynamic("token", False)])
def test_the_attention_computes_with_rounded_values(case: CaseMaker, scheme: Dynamic) -> None:
    k = case("dream")  # two key heads for four queries
    k.apply(QuantizeAttention(4, 4, 4, qk=scheme, v=scheme))
    node = calls(k, SDPA)[0]
    exact = [part.args[0] for part in node.args[:3]]
    *found, out = values(k, [*exact, node], k.ids())
    rounded = []
    for x in found:
        rows = x.transpose(1, 2).flatten(2) if scheme.per == "token" else x
        fmt = ActFormat(4, None, scheme.symmetric)
        rows = fmt.fake_quantize(rows)
        rounded.append(rows.reshape(x.transpose(1, 2).shape).transpose(1, 2) if scheme.per == "token" else rows)
    expected = torch.nn.functional.scaled_dot_product_attention(*rounded, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    plain = torch.nn.functional.scaled_dot_product_attention(*found, enable_gqa=True)
    assert float((out - plain).norm() / plain.norm()) > 0.02


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_probabilities(case: CaseMaker, name: str, by_row: bool) -> None:
    k, exact = case(name), case(name)
    report = k.apply(QuantizeAttention(None, None, None, 8, by_row=by_row))
    assert report.sites == 2
    assert not calls(k, SDPA)
    assert len(calls(k, ATTENTION)) == 2
    assert "scale 1/255" in report.notes[0]
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-attention"}, after="quantize_attention")
    ids = k.ids()
    error = float((k.forward(ids) - exact.forward(ids)).norm() / exact.forward(ids).norm())
    assert 1e-5 < error < 0.05


def test_masks_scales_and_flags_come_along(case: CaseMaker) -> None:
    """A mask that shuts out every second key, and a scale of one's own."""
    k = case("llada")
    for sdpa in calls(k, SDPA):
        ids = placeholder(k.graph)
        row = call_before(k.graph, sdpa, aten.sym_size.int, (ids, 1))
        ones = call_before(k.graph, sdpa, aten.new_ones.default, (ids, [row, row]), {"dtype": torch.float32})
        steps = call_before(k.graph, sdpa, aten.cumsum.default, (ones, 1))
        odd = call_before(k.graph, sdpa, aten.remainder.Scalar, (steps, 2))
        sdpa.update_kwarg("attn_mask", call_before(k.graph, sdpa, aten.to.dtype, (odd, torch.bool)))
        sdpa.update_kwarg("scale", 0.4)
    ids = k.ids()
    expected = k.forward(ids)
    k.apply(QuantizeAttention(None, None, None, 8))
    for node in calls(k, ATTENTION):
        assert node.args[4:] == (False, 0.4, 8, False)
        node.args = (*node.args[:6], 0, False)  # without rounding it is the same attention
    assert float((k.forward(ids) - expected).abs().max() / expected.abs().max()) < 1e-5
    for node in calls(k, ATTENTION):
        node.args = (*node.args[:3], None, *node.args[4:])
    assert float((k.forward(ids) - expected).abs().max() / expected.abs().max()) > 1e-2


@pytest.mark.parametrize("order", ["before", "after"])
def test_before_and_after_the_weights(case: CaseMaker, order: str) -> None:
    k = case("llada")
    attention = QuantizeAttention(8, 8, 8, 8, v=Static(ranges=Percentile()))
    passes = (attention, WEIGHTS) if order == "before" else (WEIGHTS, attention)
    run(k, *passes, QuantizeActivations(), Pack(), Lower())
    assert k.ctx.facts >= {"quantized-attention", "quantized-activations", "lowered"}
    exact = case("llada")
    ids = k.ids()
    assert 0 < float((k.forward(ids) - exact.forward(ids)).norm() / exact.forward(ids).norm()) < 0.1


def test_twice_is_once(case: CaseMaker) -> None:
    for made in (QuantizeAttention(), QuantizeAttention(probabilities=8)):
        k = case("llada")
        assert k.apply(made).sites == 2
        mark = fingerprint(k.graph, k.ctx.weights)
        assert k.apply(made).sites == 0
        assert fingerprint(k.graph, k.ctx.weights) == mark
    with pytest.raises(ContractError, match=r"'quantize_attention' needs 'float-attention', which does not hold here"):
        run(case("llada"), QuantizeAttention(), QuantizeAttention(4, 4, 4))


def test_a_model_without_attention(case: CaseMaker) -> None:
    k = case("layer norm")
    message = r"^quantize_attention: the repeated blocks hold no scaled dot-product attention\. Nothing was changed"
    with pytest.raises(FeasibilityError, match=message):
        run(k, QuantizeAttention())
    mark = fingerprint(k.graph, k.ctx.weights)
    assert run(k, QuantizeAttention(required=False))[0].sites == 0
    assert fingerprint(k.graph, k.ctx.weights) == mark


class Flat(nn.Module):
    """Attention on heads that are folded into the batch."""

    spec = DiffusionSpec(mask_id=15, vocab_size=16, max_length=16)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(16, 32), nn.Linear(32, 16)
        self.qkv = nn.ModuleList([nn.ModuleList([nn.Linear(32, 32) for _ in range(3)]) for _ in range(2)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for parts in self.qkv:
            b, n, _ = x.shape
            q, k, v = (p(x).reshape(b, n, 4, 8).transpose(1, 2).reshape(b * 4, n, 8) for p in parts)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + mixed.reshape(b, 4, n, 8).transpose(1, 2).reshape(b, n, 32)
        return self.head(x)


def test_declines_heads_that_are_folded_into_the_batch() -> None:
    recipe = "quantize_attention(required=False)"
    report = dlqc.compile(Flat().eval(), recipe, backend="reference", progress=False).report.steps[0]
    assert report.sites == 0
    reason = "its queries, keys and values are not laid out [batch, heads, length, width]"
    assert [why for _, why in report.declined] == [reason, reason]
    assert [name for name, _ in report.declined] == ["qkv.0.attention", "qkv.1.attention"]
    with pytest.raises(
        ContractError, match=r"found nothing to rewrite \(qkv\.0\.attention: its queries, keys and values"
    ):
        dlqc.compile(Flat().eval(), "quantize_attention", backend="reference", progress=False)


# Fixed scales


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        (Static("tensor"), (1, 1, 1)),
        (Static("head"), (1, 2, 1)),
        (Static("channel", False), (1, 2, 16)),
        (Static("head", buckets=3), (3, 2, 1)),
        (IaAq("channel", buckets=(0.4,)), (2, 2, 16)),
    ],
)
def test_fixed_scales_have_their_shape(case: CaseMaker, scheme: Any, shape: tuple[int, ...]) -> None:
    k = case("dream")
    run(k, Calibrate(sampler=ForwardProcess()), QuantizeAttention(None, None, 4, v=scheme))
    nodes = calls(k, QUANTIZE_HEADS_STATIC)
    assert len(nodes) == 2
    for node in nodes:
        scale = k.ctx.weights[str(node.args[1].target)]
        assert tuple(scale.shape) == shape
        assert str(node.args[1].target).endswith(".self_attn.attention.values.scale")
        assert (node.args[2] is None) == scheme.symmetric
        assert (node.args[3] is not None) == (shape[0] > 1)
    assert len(calls(k, MASK_BUCKET)) == (shape[0] > 1)
    check(k.graph, k.ctx.weights, k.ctx.spec, {"quantized-attention"}, after="quantize_attention")


def test_each_row_takes_the_scales_of_its_mask_ratio(case: CaseMaker) -> None:
    k = case("llada")
    run(k, Calibrate(sampler=ForwardProcess()), QuantizeAttention(8, 8, 8, qk=Static(buckets=4), v=Static(buckets=4)))
    ids = torch.randint(0, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    for row, masked in enumerate((0, 3, 6, 9, 12)):
        ids[row, :masked] = k.ctx.spec.mask_id
    together = k.forward(ids)
    torch.testing.assert_close(together, torch.cat([k.forward(row[None]) for row in ids]), rtol=1e-4, atol=1e-5)
    node = calls(k, QUANTIZE_HEADS_STATIC)[0]
    x, found = values(k, [node.args[0], node], ids)
    scale = k.ctx.weights.value(str(node.args[1].target))
    for row, bucket in enumerate((0, 0, 1, 2, 3)):
        step = scale[bucket][:, None]
        torch.testing.assert_close(found[row], (x[row] / step).round().clamp(-128, 127) * step)
    assert len(set(scale[:, 0, 0].tolist())) > 1


def test_ranges_are_those_of_the_values(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.facts.add("states")
    states = k.ctx.states
    exact = next(node.args[1] for node in calls(k, SDPA))
    keys = values(k, [exact], states.ids)[0]
    run(k, QuantizeAttention(None, 8, None, qk=Static("head", ranges=MinMax())))
    scale = k.ctx.weights.value(str(calls(k, QUANTIZE_HEADS_STATIC)[0].args[1].target))
    torch.testing.assert_close(scale[0, :, 0], keys.abs().amax(dim=(0, 2, 3)) / 127)


# IA-AQ


def attended(k: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [S, H, L, D] of the first attention on the states, and the weight of each token [S, L], from the formula."""
    q, key, v = values(k, list(calls(k, SDPA)[0].args[:3]), k.ctx.states.ids)
    c = k.ctx.states.weights
    p = torch.softmax(q.double() @ key.double().transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    mass = torch.einsum("bhij,bi->bj", p, c.double())
    weights = mass / mass.mean() + 1e-4
    torch.testing.assert_close(column_mass(q, key, None, False, None, c), mass, rtol=1e-4, atol=1e-4)
    return v, weights


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "head"])
def test_ia_aq_is_the_best_of_an_exhaustive_search(case: CaseMaker, per: str, bits: int) -> None:
    """Σ a·‖Q(v; α·s) - v‖² on the numbers themselves, for every α of the grid; a finer one finds little more."""
    k = case("llada")
    v, a = attended(k)
    v = v.double()
    run(k, QuantizeAttention(None, None, bits, v=IaAq(per)))  # type: ignore[arg-type]
    scale = k.ctx.weights.value(str(calls(k, QUANTIZE_HEADS_STATIC)[0].args[1].target)).double().reshape(-1)
    half = 2 ** (bits - 1)
    parts = [v] if per == "tensor" else [v[:, h : h + 1] for h in range(4)]
    for found, part in zip(scale.tolist(), parts, strict=True):
        full = float(part.abs().max()) / (half - 1)

        def error(step: float, part: torch.Tensor = part) -> float:
            rounded = (part / step).round().clamp(-half, half - 1) * step
            return float(((rounded - part).square() * a[:, None, :, None]).sum())

        assert error(found) <= 1.02 * min(error(alpha * full) for alpha in torch.linspace(0.05, 1, 96).tolist())
        assert error(found) <= 1.1 * min(error(alpha * full) for alpha in torch.linspace(0.05, 1, 400).tolist())
        assert error(found) <= error(full)
        assert 0.05 * full <= found <= full * (1 + 1e-6)


def planted(case: CaseMaker, attention: float, scheme: IaAq | Static) -> float:
    """The largest number that scales reach where token 5 is fifty times as large as the others, and has this score more."""
    k = case("llada")
    node, g = calls(k, SDPA)[0], torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(3, 4, 12, 16, generator=g) for _ in range(3))
    q[..., 0], key[..., 0] = 4.0, 0.0  # scores are divided by 4
    key[:, :, 5, 0] = attention
    v[:, :, 5] *= 50
    observer = scheme.observer(node, node.args[2], "values", 4, k.ctx.spec.mask_id)
    given = (v,) if isinstance(scheme, Static) else (q, key, v)
    observer.add(given, Batch(k.ids(), torch.ones(3, 12)))
    low, high = scheme.estimate(observer.seen, 4)
    return float(torch.maximum(-low, high).max()) / float(v.abs().max())


def test_a_large_token_is_given_up_only_where_nobody_looks_at_it(case: CaseMaker) -> None:
    assert planted(case, -30.0, IaAq()) < 0.1
    assert planted(case, 5.0, IaAq()) > 0.5
    assert planted(case, -30.0, Static(ranges=Mse())) == planted(case, 5.0, Static(ranges=Mse())) > 0.3
    assert planted(case, -30.0, Static()) == 1.0
    assert planted(case, -30.0, IaAq(floor=1e3)) > 0.3, "a floor that drowns the attention"


def test_queries_are_weighed_like_their_tokens(case: CaseMaker) -> None:
    """What is looked at by tokens of weight zero alone does not count."""
    k = case("llada")
    node, found = calls(k, SDPA)[0], []
    q, key, v = torch.zeros(1, 4, 12, 16), torch.zeros(1, 4, 12, 16), torch.ones(1, 4, 12, 16)
    q[:, :, 0, 0], key[:, :, 5, 0] = 100.0, 100.0  # token 0 looks at token 5, the others everywhere
    v[:, :, 5] = 20.0
    for weight in (0.0, 1.0):
        c = torch.ones(1, 12)
        c[0, 0] = weight
        observer = IaAq(floor=0.0).observer(node, node.args[2], "values", 4, k.ctx.spec.mask_id)
        observer.add((q, key, v), Batch(k.ids(1), c))
        assert observer.seen.histogram is not None
        found.append(observer.seen.histogram.mass[0].sum(0))
    values, weights = (part / part.sum() for part in found)
    assert float(weights[-200:].sum()) > 1.5 * float(values[-200:].sum())


# Errors


def test_a_value_that_is_not_finite_names_its_place(case: CaseMaker) -> None:
    k = case("llada")
    broken = k.ctx.weights.value("model.transformer.blocks.1.v_proj.weight").clone()
    broken[3] = torch.nan
    k.ctx.weights.put("model.transformer.blocks.1.v_proj.weight", broken)
    message = (
        r"^model\.transformer\.blocks\.1\.attention\.values: NaN or Inf in the activations \(1 of 64 channels\)\. Check"
    )
    with pytest.raises(CalibrationError, match=message):
        run(k, QuantizeAttention(None, None, 8, v=Static()))


def test_values_that_are_always_zero(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.weights.put("model.transformer.blocks.0.v_proj.weight", torch.zeros(64, 64))
    message = (
        r"^model\.transformer\.blocks\.0\.attention\.values: the activations are zero on all 96 calibration tokens"
    )
    with pytest.raises(CalibrationError, match=message):
        run(k, QuantizeAttention(None, None, 8, v=IaAq()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: QuantizeAttention(None, None, None),
            r"^quantize_attention: nothing is quantized\. Give a width for que",
        ),
        (
            lambda: QuantizeAttention(keys=9),
            r"^quantize_attention\.keys: 9 is not a width\. Use 2 to 8, or none to leave",
        ),
        (lambda: QuantizeAttention(probabilities=1), r"^quantize_attention\.probabilities: 1 is not a width"),
        (
            lambda: QuantizeAttention(qk=Static("channel")),
            r"^quantize_attention\.qk: fixed scales of queries and keys by channel do not come out of the sum over channels "
            r"in q·kᵀ\. Use per=head$",
        ),
        (lambda: Dynamic("channel"), r"^dynamic\.per: no scales are per 'channel'\. Use head or token$"),
        (lambda: Static("token"), r"^static\.per: no fixed scales are per 'token'\. Use tensor, head or channel$"),
        (lambda: IaAq(smallest=0.0), r"^mse\.smallest: 0\.0 is outside \(0, 1\)"),
        (lambda: IaAq(floor=-1.0), r"^ia_aq\.floor: -1\.0 is no floor\. 1e-4 is the usual value$"),
        (lambda: IaAq(buckets=0), r"^ia_aq\.buckets: 0 mask-ratio buckets are not 1 to 256"),
    ],
)
def test_impossible_options(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()
