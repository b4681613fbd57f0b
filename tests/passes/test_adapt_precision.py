"""adapt_precision: the op, the schedule and its search, cached steps, the artifact, and refusals."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import dlqc
from dlqc.check import check
from dlqc.compiled import Compiled
from dlqc.errors import CalibrationError, ContractError, DlqcError, ExportError, FeasibilityError, RecipeError
from dlqc.finetune import finetune
from dlqc.formats.coded import encode
from dlqc.formats.nested import NestedFormat
from dlqc.graph import args_of, copy_graph, is_call
from dlqc.ops import LINEAR_NESTED
from dlqc.passes.adapt_precision import AdaptPrecision
from dlqc.precision import PrecisionSchedule, cheapest, shares
from dlqc.recipe import as_recipe, parse_line

NESTED = "quantize_weights(format=nested(planes='2+1+1+4', group_size=32), method=rtn)"
EDGES = (0.25, 0.5)


@pytest.fixture(scope="module")
def model() -> Compiled:
    return dlqc.compile(
        zoo.model("llada"), f"{NESTED}, adapt_precision(edges={EDGES}, widths=(8, 3, 2))", progress=False
    )


def canvas(length: int, masks: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, zoo.MASK, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[:, length - masks :] = zoo.MASK
    return ids


@functools.cache
def plainly(width: int) -> Compiled:
    return dlqc.compile(zoo.model("llada"), f"{NESTED}, adapt_precision(edges=(), widths=({width},))", progress=False)


def test_the_op_reads_each_row_in_its_width() -> None:
    rng = torch.Generator().manual_seed(0)
    weight, x, bias = (
        torch.randn(6, 32, generator=rng),
        torch.randn(4, 5, 32, generator=rng),
        torch.randn(6, generator=rng),
    )
    fmt = NestedFormat("2+2+4", 16)
    made = fmt.quantize(weight)
    parts = made.pack()
    listed = [parts[role] for role in sorted(parts)]
    bucket = torch.tensor([0, 2, 1, 0])[:, None].expand(4, 5)
    found = torch.ops.dlqc.linear_nested(x, listed, bias, encode(fmt), 6, bucket, [8, 4, 2])
    for row, width in enumerate((8, 2, 4, 8)):
        expected = x[row].double() @ made.at(width).double().T + bias.double()
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
    alone = torch.ops.dlqc.linear_nested(x, listed, None, encode(fmt), 6, None, [4])
    torch.testing.assert_close(alone, x @ made.at(4).T)
    with pytest.raises(ContractError, match="has no nested codes"):
        torch.ops.dlqc.linear_nested(x, listed, None, "nf4(block=64,scale_block=256)", 6, None, [4])


def test_a_forward_is_that_of_the_width_for_its_mask_ratio(model: Compiled) -> None:
    """Also row by row of a batch, and after a change of schedule on the same weights."""
    single = {w: plainly(w) for w in (2, 3, 8)}
    rows = torch.cat([canvas(16, 4), canvas(16, 5), canvas(16, 16)])
    found = model(rows)
    for row, width in enumerate((8, 3, 2)):
        torch.testing.assert_close(found[row], single[width](rows)[row], rtol=1e-4, atol=1e-4)
    turned = model.with_schedule(PrecisionSchedule(EDGES, (2, 3, 8)))
    assert torch.equal(turned(rows[:1]), single[2](rows[:1]))
    assert turned.schedule == PrecisionSchedule(EDGES, (2, 3, 8))
    assert model.schedule == PrecisionSchedule(EDGES, (8, 3, 2))
    assert {b.data_ptr() for b in turned.module.buffers()} == {b.data_ptr() for b in model.module.buffers()}
    assert "widths=(2, 3, 8)" in str(turned.recipe)
    assert single[2].schedule == PrecisionSchedule((), (2,))


def test_a_cached_step_goes_by_the_ratio_it_is_told(model: Compiled) -> None:
    """The window alone would be all masks; the canvas is a third."""
    ids = canvas(18, 6)
    cache = model.cached.new_cache(1, 18)
    full = model.cached.step(ids, 0, cache)
    torch.testing.assert_close(full, model(ids), rtol=1e-4, atol=1e-4)
    rows = model.cached.step(ids[:, 12:], 12, cache, mask_ratio=torch.tensor([1 / 3]))
    torch.testing.assert_close(rows, full[:, 12:], rtol=1e-4, atol=1e-4)
    other = model.cached.step(ids[:, 12:], 12, cache)
    assert float((other - rows).abs().max()) > 1e-2


def test_samplers_obey_and_the_artifact_keeps_it(tmp_path: Path) -> None:
    adapt = f"adapt_precision(edges={EDGES}, widths=(8, 3, 2), act_widths=(8, 6, 4))"
    model = dlqc.compile(zoo.model("llada"), f"{NESTED}, quantize_activations(bits=8), {adapt}", progress=False)
    model.save(tmp_path / "m")
    again = dlqc.load(tmp_path / "m")
    assert again.schedule == model.schedule == PrecisionSchedule(EDGES, (8, 3, 2), (8, 6, 4))
    assert str(again.recipe) == str(model.recipe)
    for sampler in (
        "llada(steps=4)",
        "fast_dllm(cache='dual', threshold=None)",
        "fast_dllm(cache='none', threshold=None)",
    ):
        texts = [dlqc.generate(m, [1, 2, 3, 4], sampler=sampler, gen_length=8).ids for m in (model, again)]
        assert texts[0] == texts[1]
    with pytest.raises(ExportError, match="is stored as nested int 2/3/4/8 g32"):
        dlqc.export(model, tmp_path / "out", format="compressed-tensors")


def test_the_search_on_a_model() -> None:
    """The schedule is within its budget on the states, and a larger budget takes fewer bits."""
    recipe = "calibrate(sampler=forward_process, sequences=16, length=16), " + NESTED
    rows = torch.randint(0, zoo.MASK, (16, 16), generator=torch.Generator().manual_seed(0))
    adapt = "adapt_precision(budget=0.02, edges=(0.5,))"
    made = dlqc.compile(zoo.model("llada"), f"{recipe}, {adapt}", calibration=rows, progress=False)
    step = next(s for s in made.report.steps if s.name == "adapt_precision")
    found = [step.details[f"mask ratio {low:g} to {high:g}"] for low, high in ((0, 0.5), (0.5, 1))]
    assert made.schedule is not None
    assert made.schedule.widths == tuple(row["bits"] for row in found)
    cost = sum(row[f"kl at {row['bits']} bits"] / 2 for row in found)
    assert step.metrics["kl"] == pytest.approx(cost)
    assert cost <= 0.02
    assert sum(row["states"] for row in found) <= 16
    assert step.metrics["average_bits_read"] == made.schedule.average() + 1
    table = [[row[f"kl at {w} bits"] for w in (2, 3, 4, 8)] for row in found]
    wide, _ = cheapest(table, [(2, 3, 4, 8)] * 2, 0.5, (0.5, 0.5))
    assert sum((2, 3, 4, 8)[i] for i in wide) < sum(made.schedule.widths)
    with pytest.raises(
        FeasibilityError, match=r"budget: the divergence is .* nats at the best widths, the budget is 1e-12"
    ):
        cheapest(table, [(2, 3, 4, 8)] * 2, 1e-12, (0.5, 0.5))
    never = "calibrate(sampler=block_states(block_length=4, prompt=0.0, later=absent), sequences=4, length=16)"
    with pytest.raises(CalibrationError, match="no state has a mask ratio from 0.9 to 1"):
        dlqc.compile(
            zoo.model("llada"),
            f"{never}, {NESTED}, adapt_precision(edges=(0.9,))",
            calibration=rows,
            progress=False,
        )


ACTS = "quantize_weights(bits=4, group_size=32, method=rtn), quantize_activations(bits=8)"


@functools.cache
def only(bits: int) -> Compiled:
    return dlqc.compile(zoo.model("llada"), f"{ACTS.replace('bits=8', f'bits={bits}')}, pack, lower", progress=False)


ADAPTED = f"{ACTS}, adapt_precision(edges={EDGES}, widths=(), act_widths=(8, 6, 4)), pack, lower"


@pytest.fixture(scope="module")
def acts() -> Compiled:
    return dlqc.compile(zoo.model("llada"), ADAPTED, backend="reference", progress=False)


def test_activations_are_rounded_to_the_bits_of_their_mask_ratio(acts: Compiled, tmp_path: Path) -> None:
    """Row by row those of a model with one width; lowered, cached, by another schedule, and never exported."""
    model = acts
    step = next(s for s in model.report.steps if s.name == "adapt_precision")
    assert step.metrics["average_activation_bits"] == model.schedule.act_average() == (8 + 6 + 8) / 4  # type: ignore[union-attr]
    rows = torch.cat([canvas(16, 4), canvas(16, 5), canvas(16, 16)])
    found = model(rows)
    for row, bits in enumerate((8, 6, 4)):
        torch.testing.assert_close(found[row], only(bits)(rows)[row], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.cached.step(rows, 0, model.cached.new_cache(3, 16), mask_ratio=None), found)
    turned = model.with_schedule(PrecisionSchedule(EDGES, act_widths=(4, 4, 8)))
    assert turned.schedule == PrecisionSchedule(EDGES, (), (4, 4, 8))
    assert "act_widths=(4, 4, 8)" in str(turned.recipe)
    torch.testing.assert_close(turned(rows[2:]), only(8)(rows[2:]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ExportError, match="has activations in int4/6/8 token by mask ratio"):
        dlqc.export(model, tmp_path / "out", format="compressed-tensors")
    with pytest.raises(FeasibilityError, match="schedule: the weights are stored for one width"):
        model.with_schedule(PrecisionSchedule(EDGES, (2, 3, 8)))


def test_every_kernel_reads_what_the_rounding_left(acts: Compiled) -> None:
    """The CPU's kernels are told of float activations, and the report says that they are rounded by an op of their own."""
    fast = dlqc.compile(zoo.model("llada"), ADAPTED, backend="cpu", progress=False)
    ids = torch.cat([canvas(16, 4), canvas(16, 12)])
    torch.testing.assert_close(fast(ids), acts(ids), rtol=2e-2, atol=2e-2)
    lowered = next(s for s in fast.report.steps if s.name == "lower")
    assert all("int4/6/8 token by mask ratio by an op of their own" in said for said in lowered.choices.values())


@pytest.mark.parametrize(
    "how", ["llada(steps=4)", "llada(steps=4, cfg_scale=0.5)", "fast_dllm(cache='dual', threshold=None)"]
)
def test_the_mask_ratio_is_that_of_the_tokens_to_fill(
    model: Compiled, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt, or padding, moves no schedule: the bits of each step are those of a run without them."""
    read: list[int] = []
    honest = NestedFormat.weight_at

    def watched(self: NestedFormat, parts: Mapping[str, torch.Tensor], in_features: int, width: int) -> torch.Tensor:
        read.append(width)
        return honest(self, parts, in_features, width)

    assert model.cached.pads is None
    monkeypatch.setattr(NestedFormat, "weight_at", watched)
    found = []
    for prompts in ([[5]], [list(range(1, 25))], [[5], list(range(1, 25))]):
        read.clear()
        dlqc.generate_batch(model, prompts, sampler=how, gen_length=8)
        found.append([width for width, _ in itertools.groupby(read)])
    assert found == [[2, 3, 8]] * 3


def test_activations_are_searched_together_with_weights() -> None:
    """Exhaustively: no pair of schedules within the budget has fewer bit operations."""
    recipe = f"calibrate(sampler=forward_process, sequences=16, length=16), {NESTED}, quantize_activations(bits=8), "
    rows = torch.randint(0, zoo.MASK, (16, 16), generator=torch.Generator().manual_seed(0))
    adapt = "adapt_precision(budget=0.2, edges=(0.5,), act_bits=(4, 6, 8))"
    made = dlqc.compile(zoo.model("llada"), recipe + adapt, calibration=rows, progress=False)
    step = next(s for s in made.report.steps if s.name == "adapt_precision")
    buckets = [step.details["mask ratio 0 to 0.5"], step.details["mask ratio 0.5 to 1"]]
    pairs = [(w, a) for w in (2, 3, 4, 8) for a in (4, 6, 8)]
    every = []
    for two in itertools.product(pairs, repeat=2):
        kl = [b[f"kl at {w} bits and {a}-bit activations"] for b, (w, a) in zip(buckets, two, strict=True)]
        every.append((sum(w * a / 2 for w, a in two), sum(kl) / 2))
    best = min(size for size, kl in every if kl <= 0.2)
    schedule = made.schedule
    assert schedule is not None
    assert sum(w * a / 2 for w, a in zip(schedule.widths, schedule.act_widths, strict=True)) == best
    assert step.metrics["kl"] <= 0.2
    assert best < 64


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000), st.floats(0.0, 1.5))
def test_the_search_is_exhaustive(buckets: int, count: int, seed: int, budget: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    kl = torch.rand(buckets, count, generator=rng, dtype=torch.float64).tolist()
    widths = (2, 3, 4, 8)[:count]
    edges = tuple(k / buckets for k in range(1, buckets))
    parts = shares(edges)
    every = []
    for choice in itertools.product(range(count), repeat=buckets):
        cost = sum(p * kl[b][c] for b, (p, c) in enumerate(zip(parts, choice, strict=True)))
        every.append((sum(p * widths[c] for p, c in zip(parts, choice, strict=True)), cost))
    within = [bits for bits, cost in every if cost <= budget - 1e-9]
    if not within:
        if min(cost for _, cost in every) > budget + 1e-9:
            with pytest.raises(FeasibilityError):
                cheapest(kl, [widths] * buckets, budget, parts)
        return
    chosen, cost = cheapest(kl, [widths] * buckets, budget, parts)
    found = tuple(widths[i] for i in chosen)
    assert cost <= budget
    assert PrecisionSchedule(edges, found).average() <= min(within) + 4e-3  # shares are counted in ten-thousandths


def test_schedules() -> None:
    schedule = PrecisionSchedule((0.25, 0.5), (4, 3, 2))
    assert [schedule.width(r) for r in (0.0, 0.25, 0.26, 0.5, 1.0)] == [4, 4, 3, 3, 2]
    assert schedule.average([0.1, 0.3, 0.9, 1.0]) == 2.75
    assert parse_line("adapt_precision(edges=(0.5,), widths=(4, 2))") == (AdaptPrecision(edges=(0.5,), widths=(4, 2)),)
    passes = as_recipe("w8a16-nested-adaptive").passes
    assert parse_line(str(as_recipe(passes))) == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "edges=(0.5, 0.25)",
            "edges: (0.5, 0.25) are no rising mask ratios between 0 and 1. Write for example (0.25, 0.5",
        ),
        (
            "widths=(2, 3)",
            "widths: 2 widths for 4 buckets of mask ratio. Give one for each bucket, the lowest ratio first",
        ),
        (
            "act_bits=(4, 8), act_widths=(4, 4, 8, 8)",
            "adapt_precision.act_bits: act_widths says what act_bits lets the search choose. Give one of the two",
        ),
        ("widths=()", "widths: a schedule without widths says nothing. Give bits of weights, or of activations, for"),
        ("act_bits=(9,)", "bits: 9 is not a width of an integer activation. Use 2 to 8"),
        ("budget=0", "adapt_precision.budget: a budget of 0 nats leaves nothing to choose. Use for example 0.01"),
    ],
)
def test_options_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_line(f"adapt_precision({text})")
    assert str(error.value).startswith(message)


def test_what_cannot_be_adapted(model: Compiled) -> None:
    def compiled(recipe: str) -> Compiled:
        return dlqc.compile(zoo.model("llada"), recipe, progress=False)

    with pytest.raises(DlqcError, match="found nothing to rewrite|adapt_precision"):
        compiled("quantize_weights(group_size=32, method=rtn), adapt_precision(edges=(), widths=(4,)), pack, lower")
    with pytest.raises(ContractError, match="nested int 2/3/4/8 g32 is not read in 5 bits. Use 2, 3, 4, 8"):
        compiled(f"{NESTED}, adapt_precision(edges=(), widths=(5,))")
    mixed = NESTED[:-1]
    override = "overrides=(override(format=nested(planes='4+4', group_size=32), sites=('*.q_proj',)),))"
    with pytest.raises(
        ContractError, match=r"weights are stored in planes 2\+1\+1\+4 and 4\+4. Give all linears the same"
    ):
        compiled(f"{mixed}, {override}, adapt_precision(edges=(), widths=(4,))")
    with pytest.raises(FeasibilityError, match=r"buckets with edges \(0.25, 0.5\), the schedule has \(0.5,\)"):
        model.with_schedule(PrecisionSchedule((0.5,), (2, 3)))
    with pytest.raises(FeasibilityError, match="model: its linears are read in several widths, and gradients know one"):
        finetune(model, torch.zeros(2, 8, dtype=torch.int64))
    plain = compiled("w8a16-rtn")
    assert plain.schedule is None
    with pytest.raises(
        FeasibilityError, match="schedule: the weights are stored for one width. Compile with adapt_prec"
    ):
        plain.with_schedule(PrecisionSchedule((), (2,)))


def test_activations_that_cannot_be_adapted() -> None:
    def compiled(recipe: str) -> Compiled:
        return dlqc.compile(zoo.model("llada"), recipe, progress=False)

    adapt = "adapt_precision(edges=(0.5,), widths=(), act_widths=(4, 8))"
    with pytest.raises(ContractError, match="quantized-activations"):
        compiled(f"quantize_weights(group_size=32, method=rtn), {adapt}, pack, lower")
    with pytest.raises(ContractError, match=r"adapt_precision.widths: no weight has planes to read. Give widths=\(\)"):
        compiled(f"{ACTS}, {adapt.replace('widths=()', 'widths=(2, 4)')}, pack, lower")
    fixed = "calibrate(sampler=forward_process, sequences=4, length=8), quantize_weights(group_size=32, method=rtn)"
    with pytest.raises(DlqcError, match="found nothing to rewrite .*its scales are fixed, for one width"):
        compiled(f"{fixed}, quantize_activations(ranges=min_max), {adapt}, pack, lower")


def test_the_law(model: Compiled) -> None:
    for widths, message in (([8, 3, 5], "is read in \\[8, 3, 5\\] bits"), ([8, 3], "has 2 widths for 3 buckets")):
        graph = copy_graph(model.graph)
        node = next(n for n in graph.nodes if is_call(n, LINEAR_NESTED))
        node.args = (*args_of(node)[:6], widths)
        with pytest.raises(ContractError, match=message):
            check(graph, model.weights, model.spec, set(), after="test")
