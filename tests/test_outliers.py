"""Outlier statistics: against the definitions stated once more in plain Python, and on models whose outliers are known."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dlqc.capture import capture
from dlqc.diffusion.masking import ratio_mask
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, FeasibilityError
from dlqc.graph import fingerprint
from dlqc.outliers import Hits, OutlierReport, Thresholds, _cell, _last, _place, _sites, outliers, surface
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn

CaseMaker = Callable[..., Any]
VOCAB, MASK, D = 61, 60, 8
SPEC = DiffusionSpec(MASK, VOCAB, 64)


class Lookup(nn.Module):
    """Embedding and head, so that the site reads rows of a table that the test fills. `how` changes what it reads."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.how = how
        self.embed, self.mix, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, D), nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.how == "length first":
            x = self.mix(x.transpose(0, 1)).transpose(0, 1)
        elif self.how == "flat":
            x = self.mix(x.reshape(-1, D)).reshape(ids.shape[0], ids.shape[1], D)
        elif self.how == "pooled":
            x = x + self.mix(x.mean(1))[:, None]
        elif self.how == "twice":
            x = self.mix(torch.relu(self.mix(x)))
        elif self.how == "plain":
            x = self.mix(x)
        return self.head(x)


def lookup(table: Tensor | None = None, how: str = "plain") -> tuple[Any, Any, DiffusionSpec]:
    model = Lookup(how).eval()
    if table is not None:
        model.embed.weight.data = table
    found = capture(model, SPEC)
    return found.graph, found.weights, SPEC


def rows(count: int = 4, length: int = 12) -> Tensor:
    return torch.randint(0, VOCAB - 1, (count, length), generator=torch.Generator().manual_seed(3))


def low_median(values: list[float]) -> float:
    return statistics.median_low(values)


def restated(x: list[list[float]], limits: Thresholds) -> dict[str, Any]:
    """The definitions of the module's docstring, entry by entry."""
    size = [[abs(v) for v in row] for row in x]
    every = [v for row in size for v in row]
    channels = list(zip(*size, strict=True))
    largest, typical = [max(c) for c in channels], [low_median(list(c)) for c in channels]
    middle_largest, middle = low_median(largest), low_median(typical)
    median, rms = low_median(every), (sum(v * v for v in every) / len(every)) ** 0.5
    crest = [max(row) / (sum(v * v for v in row) / len(row)) ** 0.5 for row in size if any(row)]
    mean = sum(v for row in x for v in row) / len(every)
    centred = [v - mean for row in x for v in row]
    variance = sum(v**2 for v in centred) / len(every)
    return {
        "absmax": max(every),
        "median": median,
        "rms": rms,
        "crest_median": low_median(crest) if crest else 0.0,
        "crest_max": max(crest, default=0.0),
        "kurtosis": sum(v**4 for v in centred) / len(every) / variance**2 if variance else 0.0,
        "normal": tuple(
            j
            for j in range(len(channels))
            if middle > 0 and largest[j] > limits.normal * middle_largest and typical[j] > limits.normal * middle
        ),
        "massive": hits(size, max(limits.massive_absolute, limits.massive_relative * median)),
        "spikes": hits(size, limits.spike * rms),
    }


def hits(size: list[list[float]], threshold: float) -> Hits:
    over = [(t, j) for t, row in enumerate(size) for j, v in enumerate(row) if v > threshold]
    return Hits(len(over), len({t for t, _ in over}), len({j for _, j in over}))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 24), st.integers(0, 10**6), st.sampled_from(["gauss", "heavy", "sparse"]))
def test_statistics_are_the_definitions(tokens: int, width: int, seed: int, kind: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=rng)
    if kind == "heavy":
        x = x * 10 ** (3 * torch.rand(tokens, width, generator=rng) - 1) * 10 ** torch.rand(width, generator=rng)
    elif kind == "sparse":
        x = torch.relu(x - 0.5)
    limits = Thresholds(normal=1.5, massive_absolute=1.0, massive_relative=4.0, spike=1.7)
    found = _cell(x, "site", 0.5, "masked", limits)
    expected = restated(x.tolist(), limits)
    assert found.tokens == tokens
    for name, value in expected.items():
        same = value if isinstance(value, tuple | Hits) else pytest.approx(value, rel=1e-4)
        assert getattr(found, name) == same, name
    winners = x.abs().argmax(1).tolist()
    assert found.top_share == pytest.approx(winners.count(found.top_channel) / tokens)
    assert found.top_share == max(winners.count(j) for j in winners) / tokens


def test_planted_outliers_are_found_and_told_apart() -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 40 * (1 + 0.1 * x[:, 5])  # every token: normal
    x[17, 30] = 5000.0  # one token: massive
    found = _cell(x, "site", 0.5, "visible", Thresholds())
    assert found.normal == (5,)
    assert found.massive == found.spikes == Hits(1, 1, 1)
    assert (found.top_channel, found.top_share) == (5, 255 / 256)
    assert found.absmax == 5000.0
    assert found.crest_median == pytest.approx(40 / (40**2 / 64 + 1) ** 0.5, rel=0.05)
    assert found.crest_max == pytest.approx(8, rel=1e-3)  # √d: all of the token's size in one channel
    quiet = _cell(torch.randn(256, 64), "site", 0.5, "visible", Thresholds())
    assert (quiet.normal, quiet.massive, quiet.spikes) == ((), Hits(0, 0, 0), Hits(0, 0, 0))
    assert quiet.kurtosis == pytest.approx(3, abs=0.2)


def test_zeros_and_constants_give_no_nan() -> None:
    zeros = _cell(torch.zeros(3, 4), "site", 0.0, "visible", Thresholds())
    assert (zeros.crest_median, zeros.crest_max, zeros.kurtosis, zeros.normal) == (0.0, 0.0, 0.0, ())
    ones = _cell(torch.ones(3, 4), "site", 0.0, "visible", Thresholds())
    assert (ones.crest_median, ones.kurtosis, ones.rms) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("how", ["plain", "length first", "flat"])
def test_masked_and_visible_rows_are_kept_apart(how: str) -> None:
    table = torch.ones(VOCAB, D)
    table[MASK] = 7.0
    table[MASK, 2] = -70.0
    report = outliers(*lookup_rows(table, how), ratios=(0.0, 0.25, 0.5, 1.0))
    (first,) = [s for s in report.sites if s.name == "mix"]
    cells = {(c.ratio, c.rows): c for c in report.select(site=first.name)}
    assert cells.keys() == {
        (0.0, "visible"),
        (0.25, "masked"),
        (0.25, "visible"),
        (0.5, "masked"),
        (0.5, "visible"),
        (1.0, "masked"),
    }
    assert {key: c.tokens for key, c in cells.items()} == {
        (0.0, "visible"): 48,
        (0.25, "masked"): 12,
        (0.25, "visible"): 36,
        (0.5, "masked"): 24,
        (0.5, "visible"): 24,
        (1.0, "masked"): 48,
    }
    for (_, kind), cell in cells.items():
        assert cell.absmax == (70.0 if kind == "masked" else 1.0)
        assert cell.normal == ((2,) if kind == "masked" else ())


def lookup_rows(table: Tensor | None, how: str) -> tuple[Any, Any, Tensor, DiffusionSpec]:
    graph, weights, spec = lookup(table, how)
    return graph, weights, rows(), spec


def test_a_linear_on_other_rows_is_named_and_left_out() -> None:
    report = outliers(*lookup_rows(None, "pooled"))
    assert report.skipped == ("mix",)
    assert [s.name for s in report.sites] == ["head"]
    assert {c.site for c in report.cells} == {"head"}


def test_a_linear_that_runs_twice_has_two_sites() -> None:
    graph, weights, spec = lookup(None, "twice")
    report = outliers(graph, weights, rows(), spec)
    assert [s.name for s in report.sites] == ["mix", "mix (use 2)", "head"]
    first, second = (report.select(site=name, ratio=0.0)[0] for name in ("mix", "mix (use 2)"))
    assert first.absmax != second.absmax
    assert surface(graph, weights, rows()[0], spec, "mix").values.max() > 0


@pytest.mark.parametrize("name", ["llada", "dream", "llada bf16", "layer norm"])
def test_sites_agree_with_hooks_on_the_model(name: str, case: CaseMaker) -> None:
    k = case(name)
    clean = k.ids(rows=4, length=16).clamp(max=MASK - 1)
    report = outliers(k.graph, k.ctx.weights, clean, k.ctx.spec, ratios=(0.5,), seed=9)
    masked = ratio_mask(torch.ones_like(clean, dtype=torch.bool), 0.5, 9, 0)
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, n=n: seen.__setitem__(n, args[0].float()))
        for n, module in k.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        k.model(torch.where(masked, MASK, clean))
    for hook in hooks:
        hook.remove()
    assert {n for site in report.sites for n in site.linears} == set(seen)
    assert len(report.cells) == 2 * len(report.sites)
    tolerance = 0.06 if name == "llada bf16" else 1e-4  # the graph computes in float32, the model in its own dtype
    for cell in report.cells:
        x = seen[cell.site][masked if cell.rows == "masked" else ~masked]
        assert cell.tokens == x.shape[0] == 32
        assert cell.absmax == pytest.approx(float(x.abs().max()), rel=tolerance)
        assert cell.rms == pytest.approx(float(x.square().mean().sqrt()), rel=tolerance)


def test_layers_and_kinds_come_from_names(case: CaseMaker) -> None:
    k = case("llada")
    report = outliers(k.graph, k.ctx.weights, k.ids().clamp(max=MASK - 1), k.ctx.spec)
    assert report.kinds == (
        "q_proj, k_proj, v_proj",
        "attn_out",
        "ff_proj, up_proj",
        "ff_out",
        "model.transformer.ff_out",
    )
    assert [s.layer for s in report.sites] == [0] * 4 + [1] * 4 + [None]
    assert [s.channels for s in report.sites] == [64, 64, 64, 96] * 2 + [64]
    assert _place(["m.layers.2.experts.7.up"]) == (2, "experts.*.up")


def test_the_graph_stays_and_the_head_is_not_computed(case: CaseMaker) -> None:
    k = case("llada")
    before = fingerprint(k.graph, k.ctx.weights)
    found, _ = _sites(k.graph, k.ctx.weights)
    (last,) = _last(k.graph, list(found))
    assert found[last].name == "model.transformer.ff_out"
    outliers(k.graph, k.ctx.weights, k.ids().clamp(max=MASK - 1), k.ctx.spec, ratios=(0.5,))
    assert fingerprint(k.graph, k.ctx.weights) == before


def test_same_seed_same_report_other_seed_another(case: CaseMaker) -> None:
    k = case("llada")
    clean = k.ids().clamp(max=MASK - 1)

    def run(seed: int) -> OutlierReport:
        return outliers(k.graph, k.ctx.weights, clean, k.ctx.spec, ratios=(0.5, 0.0, 0.5), seed=seed)

    assert run(0) == run(0)
    assert run(0).ratios == (0.0, 0.5)
    assert run(0).cells != run(1).cells
    assert run(0).select(ratio=0.0) == run(1).select(ratio=0.0)  # nothing is drawn where nothing is masked


def test_a_report_survives_json(case: CaseMaker) -> None:
    k = case("llada")
    report = outliers(k.graph, k.ctx.weights, k.ids().clamp(max=MASK - 1), k.ctx.spec)
    text = json.dumps(report.to_plain(), allow_nan=False)
    assert OutlierReport.from_plain(json.loads(text)) == report


def test_summary_pools_over_layers_and_ratios(case: CaseMaker) -> None:
    k = case("llada")
    report = outliers(k.graph, k.ctx.weights, k.ids().clamp(max=MASK - 1), k.ctx.spec, ratios=(0.25, 0.5))
    found = report.summary()["ff_out", "masked"]
    cells = [c for c in report.cells if c.site.endswith("ff_out") and "blocks" in c.site and c.rows == "masked"]
    assert len(cells) == 4
    assert (found.sites, found.absmax) == (2, max(c.absmax for c in cells))
    assert (found.crest_low, found.crest_high) == (
        min(c.crest_median for c in cells),
        max(c.crest_median for c in cells),
    )
    assert found.crest_median == statistics.median(c.crest_median for c in cells)
    assert len(report.summary()) == 10
    only = outliers(k.graph, k.ctx.weights, k.ids().clamp(max=MASK - 1), k.ctx.spec, ratios=(0.0,))
    assert {which for _, which in only.summary()} == {"visible"}


def test_a_surface_is_what_the_site_reads() -> None:
    table = torch.arange(VOCAB)[:, None] * torch.ones(D) - 5.0
    graph, weights, spec = lookup(table)
    row = rows()[1]
    found = surface(graph, weights, row, spec, "mix", ratio=0.5, stage="now")
    assert (found.stage, found.site, found.ratio, int(found.masked.sum())) == ("now", "mix", 0.5, 6)
    assert torch.equal(found.values, table[torch.where(found.masked, MASK, row)].abs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": (0.5, 1.5)}, "ratios: a mask ratio of 1.5 is no share. Use numbers from 0 to 1"),
        ({"ratios": (float("nan"),)}, "ratios: a mask ratio of nan is no share. Use numbers from 0 to 1"),
        ({"ratios": ()}, "ratios: there is no mask ratio. Use for example 0,0.25,0.5,0.75,1"),
        ({"rows": torch.full((1, 4), MASK)}, "rows: row 0 has the mask token 60 at position 0"),
        ({"rows": torch.zeros(1, 65, dtype=torch.int64)}, "rows: rows of 65 tokens, the model was made for 64"),
    ],
    ids=["ratio", "nan", "none", "mask", "long"],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    graph, weights, spec = lookup()
    options = {"rows": rows()} | change
    with pytest.raises(FeasibilityError) as caught:
        outliers(graph, weights, options.pop("rows"), spec, **options)
    assert message in str(caught.value)


def test_nan_is_refused_by_site_and_ratio() -> None:
    table = torch.ones(VOCAB, D)
    table[MASK, 0] = float("inf")
    graph, weights, spec = lookup(table)
    with pytest.raises(CalibrationError) as caught:
        outliers(graph, weights, rows(), spec)
    assert str(caught.value) == (
        "mix: NaN or Inf in the input activations at mask ratio 0.25. Check the weights before this layer"
    )


def test_an_unknown_site_is_refused() -> None:
    graph, weights, spec = lookup()
    with pytest.raises(FeasibilityError) as caught:
        surface(graph, weights, rows()[0], spec, "mixx")
    assert str(caught.value) == "mixx: no linear has this name. Did you mean 'mix'?"
    graph, weights, spec = lookup(None, "pooled")
    with pytest.raises(FeasibilityError, match="mix: reads other rows than the tokens"):
        surface(graph, weights, rows()[0], spec, "mix")


def test_a_quantized_graph_is_refused(case: CaseMaker) -> None:
    k = case("layer norm")
    k.apply(QuantizeWeights(4, 32, method=Rtn()))
    with pytest.raises(FeasibilityError) as caught:
        outliers(k.graph, k.ctx.weights, rows(), k.ctx.spec)
    assert str(caught.value) == (
        "outliers: the graph has no linear on a constant weight that is not quantized. "
        "Measure before the weights are quantized"
    )
