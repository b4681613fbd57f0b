"""adapt_precision: the op, the schedule and its search, cached steps, the artifact, and refusals."""

from __future__ import annotations

import itertools
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


def test_a_cached_step_goes_by_the_whole_canvas(model: Compiled) -> None:
    """The window alone would be all masks; the canvas is a third."""
    ids = canvas(18, 6)
    cache = model.cached.new_cache(1, 18)
    full = model.cached.step(ids, 0, cache)
    torch.testing.assert_close(full, model(ids), rtol=1e-4, atol=1e-4)
    rows = model.cached.step(ids[:, 12:], 12, cache, canvas=ids)
    torch.testing.assert_close(rows, full[:, 12:], rtol=1e-4, atol=1e-4)
    other = model.cached.step(ids[:, 12:], 12, cache)
    assert float((other - rows).abs().max()) > 1e-2


def test_samplers_obey_and_the_artifact_keeps_it(model: Compiled, tmp_path: Path) -> None:
    model.save(tmp_path / "m")
    again = dlqc.load(tmp_path / "m")
    assert again.schedule == model.schedule
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
    bits = []
    for budget in (0.02, 0.5):
        made = dlqc.compile(
            zoo.model("llada"),
            f"{recipe}, adapt_precision(budget={budget}, edges=(0.5,))",
            calibration=rows,
            progress=False,
        )
        step = next(s for s in made.report.steps if s.name == "adapt_precision")
        found = [step.details[f"mask ratio {low:g} to {high:g}"] for low, high in ((0, 0.5), (0.5, 1))]
        assert made.schedule is not None
        assert made.schedule.widths == tuple(row["bits"] for row in found)
        cost = sum(row[f"kl at {row['bits']} bits"] / 2 for row in found)
        assert step.metrics["kl"] == pytest.approx(cost)
        assert cost <= budget
        assert sum(row["states"] for row in found) <= 16
        assert step.metrics["average_bits_read"] == made.schedule.average() + 1
        bits.append(made.schedule.average())
    assert bits[0] > bits[1]
    with pytest.raises(
        FeasibilityError, match=r"budget: the divergence is .* nats at the best widths, the budget is 1e-12"
    ):
        dlqc.compile(
            zoo.model("llada"),
            f"{recipe}, adapt_precision(budget=1e-12, edges=(0.5,))",
            calibration=rows,
            progress=False,
        )
    with pytest.raises(CalibrationError, match="no state has a mask ratio from 0.9 to 1"):
        dlqc.compile(
            zoo.model("llada"),
            f"calibrate(sequences=8, length=16), {NESTED}, adapt_precision(edges=(0.9,))",
            calibration=rows,
            progress=False,
        )


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
                cheapest(kl, widths, budget, parts)
        return
    found, cost = cheapest(kl, widths, budget, parts)
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
    plain = compiled("w8a16-rtn")
    assert plain.schedule is None
    with pytest.raises(
        FeasibilityError, match="schedule: the weights are stored for one width. Compile with adapt_prec"
    ):
        plain.with_schedule(PrecisionSchedule((), (2,)))


def test_the_law(model: Compiled) -> None:
    for widths, message in (([8, 3, 5], "is read in \\[8, 3, 5\\] bits"), ([8, 3], "has 2 widths for 3 buckets")):
        graph = copy_graph(model.graph)
        node = next(n for n in graph.nodes if is_call(n, LINEAR_NESTED))
        node.args = (*args_of(node)[:6], widths)
        with pytest.raises(ContractError, match=message):
            check(graph, model.weights, model.spec, set(), after="test")
