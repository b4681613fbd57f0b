"""Twins compute the same function, and their outliers are where and what they should be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dlqc.capture import capture
from dlqc.errors import FeasibilityError, ModelError
from dlqc.models.describe import spec_of
from dlqc.models.load import load_model
from dlqc.models.outlier_twin import massive_twin, outlier_twin
from dlqc.outliers import Thresholds, outliers

MODELS = {
    "llada": lambda toys: toys.llada(),
    "llada grouped bias": lambda toys: toys.llada(n_kv_heads=2, include_bias=True),
    "llada multi-query tied": lambda toys: toys.llada(n_kv_heads=1, weight_tying=True),
    "dream": lambda toys: toys.dream(),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, toys: Any) -> nn.Module:
    found: nn.Module = MODELS[request.param](toys).double()
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What each linear reads, [B·L, d]."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))

    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(ids)
    for h in hooks:
        h.remove()
    return seen


def deviation(a: nn.Module, b: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        x, y = a(ids).logits, b(ids).logits
    return float((x - y).abs().max() / x.abs().max())


@pytest.mark.parametrize("factor", [30.0, 32.0, 1000.0, 0.125])
def test_the_function_stays(model: nn.Module, factor: float, toys: Any) -> None:
    before, ids = state(model), toys.ids()
    twin = outlier_twin(model, factor=factor)
    assert deviation(model, twin, ids) < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    changed = [name for name, tensor in twin.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len([name for name in changed if "norm" in name]) == 4
    assert len([name for name in changed if "norm" not in name and name.endswith("weight")]) == 14


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2)]),
    st.integers(0, 8),
    st.integers(0, 10**6),
    st.floats(1e-2, 1e3),
)
def test_any_grouping_and_channels(toys: Any, heads: tuple[int, int], channels: int, seed: int, factor: float) -> None:
    model = toys.llada(n_heads=heads[0], n_kv_heads=heads[1]).double()
    channels = min(channels, 32 // heads[0] * heads[1])
    assert deviation(model, outlier_twin(model, channels, factor, seed), toys.ids()) < 1e-12


def test_a_wrong_column_would_show(toys: Any) -> None:
    """The bound can fail: leave one of the divisions out."""
    model = toys.llada(n_kv_heads=2).double()
    twin = outlier_twin(model, channels=1)
    out = twin.model.transformer["blocks"][0].attn_out
    original = model.model.transformer["blocks"][0].attn_out.weight
    column = int((out.weight != original).any(0).nonzero()[0])
    out.weight.data[:, column] = original[:, column]
    assert deviation(model, twin, toys.ids()) > 1e-3


def test_each_site_has_the_factor_in_as_many_channels_as_planted(toys: Any) -> None:
    model, ids = toys.llada(n_kv_heads=2).double(), toys.ids()
    plain, planted = inputs(model, ids), inputs(outlier_twin(model, channels=3, factor=30.0, seed=4), ids)
    assert plain.keys() == planted.keys()
    for name, x in plain.items():
        ratio = planted[name] / x
        hit = (ratio - 30).abs().amax(0) < 1e-9
        assert bool(((ratio - 1).abs().amax(0) < 1e-9)[~hit].all()), name
        # Two query heads read each value head, and the head of the model reads what nothing was planted in.
        expected = 0 if name == "model.transformer.ff_out" else 6 if name.endswith("attn_out") else 3
        assert int(hit.sum()) == expected, name
    picks = {
        name: tuple(((planted[name] / x - 30).abs().amax(0) < 1e-9).nonzero().flatten().tolist())
        for name, x in plain.items()
        if name.endswith(("q_proj", "ff_proj", ".ff_out"))
    }
    assert len(set(picks.values())) == len(picks)  # drawn anew at each place


def test_the_seed_decides(toys: Any) -> None:
    model = toys.llada()
    a, b, c = (state(outlier_twin(model, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_the_random_state_of_the_caller_stays(toys: Any) -> None:
    model = toys.llada()
    before = torch.get_rng_state()
    outlier_twin(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_power_of_two_survives_bfloat16_and_a_file(tmp_path: Path, toys: Any) -> None:
    model = toys.llada().to(torch.bfloat16)
    outlier_twin(model, factor=32.0).save_pretrained(tmp_path)
    loaded = load_model(tmp_path).double()
    assert deviation(copy.deepcopy(model).double(), loaded, toys.ids()) < 1e-12
    # 30 is none: bfloat16 rounds the weights, by 2⁻⁹ of each.
    rounded = outlier_twin(model, factor=30.0).double()
    assert 1e-6 < deviation(copy.deepcopy(model).double(), rounded, toys.ids()) < 0.1


def test_the_bundled_model_s_twin_has_what_was_planted() -> None:
    model = load_model("tiny-llada", dtype=torch.float32)
    twin, spec = outlier_twin(model, factor=32.0), spec_of(model)
    ids = torch.randint(5, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
    reports = []
    for one in (model, twin):
        found = capture(one, spec)
        reports.append(outliers(found.graph, found.weights, ids, spec, ratios=(0.5,)))
    plain, planted = ({c.site: c for c in r.select(rows="visible") if "ff_out" not in c.site} for r in reports)
    assert len(plain) == 12
    assert all(len(plain[site].normal) <= 1 for site in plain)
    assert all(3 <= len(cell.normal) <= 4 for cell in planted.values())
    assert all(planted[site].crest_median > plain[site].crest_median for site in plain)


def test_massive_outliers_are_few_and_the_function_stays(model: nn.Module, toys: Any) -> None:
    before = state(model)
    ids = torch.randint(0, 58, (8, 40), generator=torch.Generator().manual_seed(1))
    twin = massive_twin(model, ids)
    assert deviation(model, twin, ids) < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    spec = spec_of(twin)
    found = capture(twin, spec)
    report = outliers(found.graph, found.weights, ids, spec, ratios=(0.0,), thresholds=Thresholds())
    down = [
        c for c in report.cells if c.site.endswith(("ff_out", "down_proj")) and ("blocks" in c.site or "mlp" in c.site)
    ]
    assert len(down) == 2
    for cell in down:
        assert cell.massive.channels == 1
        assert 1 <= cell.massive.tokens <= 0.1 * cell.tokens
    assert all(c.massive.entries == 0 for c in report.cells if c not in down)


def test_massive_factors_are_powers_of_two(toys: Any) -> None:
    model, ids = toys.llada().to(torch.bfloat16), toys.ids()
    twin = massive_twin(model, ids, channels=2)
    assert deviation(copy.deepcopy(model).double(), twin.double(), ids) < 1e-12
    assert not list(twin.model.transformer["blocks"][0].ff_out._forward_pre_hooks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.0}, "factor: 0 is no factor. Use a positive number, such as 32"),
        ({"factor": float("inf")}, "factor: inf is no factor"),
        ({"channels": 33}, "channels: 33 channels, the narrowest place has 32. Plant fewer, such as 3"),
        ({"channels": -1}, "channels: -1 channels, the narrowest place has 32"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, toys: Any) -> None:
    with pytest.raises(FeasibilityError) as caught:
        outlier_twin(toys.llada(), **options)
    assert message in str(caught.value)


def test_massive_channels_are_checked(toys: Any) -> None:
    with pytest.raises(FeasibilityError) as caught:
        massive_twin(toys.llada(), toys.ids(), channels=49)
    assert str(caught.value) == "channels: 49 channels, the narrowest place has 48. Plant fewer, such as 1"


def test_other_models_are_refused(toys: Any) -> None:
    with pytest.raises(ModelError) as caught:
        outlier_twin(nn.Linear(2, 2))
    assert str(caught.value) == (
        "model: no twin is known of a Linear. Give a native LLaDA or Dream model, without trust_remote_code"
    )
    with pytest.raises(ModelError) as caught:
        outlier_twin(load_model("tiny-llada", meta=True))
    assert str(caught.value) == "model: the model has no weights. Load it without meta=True"
