"""duquant: the greedy steps and the zigzag are the ones that loops give, T is orthogonal, and the function stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlqc.certificate import deviation
from dlqc.check import check
from dlqc.contract import PassReport
from dlqc.errors import ContractError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.graph import fingerprint, is_call, linears
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_Q, QUANTIZE_ACT, TRANSFORM
from dlqc.passes import duquant
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.duquant import Duquant, greedy_rotation, largest_divisor, spreading, zigzag
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.recipe import parse_line
from dlqc.regions import transform_of
from dlqc.rounding.rtn import Rtn
from dlqc.stats import Collector

CaseMaker = Callable[..., Any]
BLOCK = "model.transformer.blocks.{}"
SMALL = Duquant(block=16, steps=12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outliers(rows: int = 40, d: int = 32) -> torch.Tensor:
    """Ordinary values, three channels 30 times as large, two of them next to each other."""
    x = torch.randn(rows, d, generator=generator(3))
    x[:, [4, 5, 20]] *= 30
    return x


def applied(k: Any, p: Duquant, single_bound: float = 1e-4) -> PassReport:
    """Apply the pass to every block with its statistics; the function must stay."""
    ids, total = k.ids(), PassReport()
    before, single = k.forward(ids, torch.float64), k.forward(ids)
    for block in k.ctx.blocks:
        k.ctx.block = block
        collector = Collector(p.statistics(), list(linears(block.nodes(k.graph), k.ctx.weights)))
        run = Executor(k.graph, k.ctx.weights, [placeholder(k.graph)], [block.output(k.graph)])
        run(k.ctx.states.ids, taps=collector.taps(k.ctx.states.weights))
        k.ctx.stats = collector.result()
        total.merge(p.apply(k.graph, k.ctx))
    k.ctx.block = None
    check(k.graph, k.ctx.weights, k.ctx.spec, {"float-weights"}, after="duquant")
    assert deviation(k.forward(ids, torch.float64), before) < 1e-12
    assert deviation(k.forward(ids), single) < single_bound
    return total


# The greedy rotation, against loops


def naive(x: torch.Tensor, f: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[float]]:
    """One block x [S, b] the long way: matrices spelled out, every prefix kept, the best chosen at the end."""
    b = x.shape[1]
    products, peaks = [torch.eye(b, dtype=torch.float64)], []
    for _ in range(steps + 1):
        now = x.double() @ products[-1]
        peaks.append(float(now.max() - now.min()))
        largest, channel = 0.0, 0
        for s in range(x.shape[0]):
            for j in range(b):
                if abs(float(now[s, j])) > largest:
                    largest, channel = abs(float(now[s, j])), j
        swap = torch.eye(b, dtype=torch.float64)
        swap[[0, channel]] = swap[[channel, 0]]
        products.append(products[-1] @ swap @ f)
    return products[peaks.index(min(peaks))], peaks


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("rows", "b"), [(1, 2), (3, 4), (5, 6)])
def test_greedy_is_what_loops_give(steps: int, rows: int, b: int) -> None:
    x, f = torch.randn(rows, 3, b, generator=generator(b)).double(), spreading(b, generator())
    found = greedy_rotation(x, f, steps)
    for i in range(3):
        expected, _ = naive(x[:, i], f, steps)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)


def test_a_peak_that_only_grows_keeps_the_identity() -> None:
    x = torch.ones(4, 1, 8)
    assert torch.equal(greedy_rotation(x, spreading(8, generator()), 5)[0], torch.eye(8, dtype=torch.float64))


def test_longer_searches_are_never_worse() -> None:
    x, f = outliers()[:, None], spreading(32, generator())
    peaks = []
    for steps in (1, 2, 4, 8, 16, 32):
        y = x[:, 0].double() @ greedy_rotation(x, f, steps)[0]
        peaks.append(float(y.max() - y.min()))
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] < float(x.max() - x.min())


def test_the_first_step_brings_one_spike_down_to_its_even_share() -> None:
    x = torch.zeros(1, 1, 16)
    x[0, 0, 11] = 8.0
    found = greedy_rotation(x, spreading(16, generator()), 1)[0]
    torch.testing.assert_close(found[11], torch.full((16,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("b", [2, 3, 16, 128])
def test_the_spreading_matrix(b: int) -> None:
    f = spreading(b, generator(b))
    torch.testing.assert_close(f @ f.T, torch.eye(b, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(f[0], torch.full((b,), b**-0.5, dtype=torch.float64))
    assert torch.equal(f, spreading(b, generator(b)))


# The zigzag, against dealing cards


@pytest.mark.parametrize(("d", "n"), [(12, 3), (12, 4), (8, 8), (6, 1), (20, 2)])
def test_zigzag_is_a_deal(d: int, n: int) -> None:
    peaks = torch.randn(d, generator=generator(d)).abs()
    hands: list[list[int]] = [[] for _ in range(n)]
    player, step = 0, 1
    for channel in sorted(range(d), key=lambda j: -float(peaks[j])):
        hands[player].append(channel)
        if not 0 <= player + step < n:
            step = -step  # the last player gets two in a row
        else:
            player += step
    assert zigzag(peaks, n).tolist() == [channel for hand in hands for channel in hand]


def test_zigzag_evens_out_the_blocks() -> None:
    peaks = torch.randn(64, generator=generator()).abs().sort().values
    means = lambda v: v.reshape(4, 16).mean(1)  # noqa: E731
    assert float(means(peaks[zigzag(peaks, 4)]).var()) < 0.01 * float(means(peaks).var())


@pytest.mark.parametrize(
    ("d", "most", "b"), [(256, 128, 128), (96, 128, 96), (100, 64, 50), (7, 4, 1), (18944, 128, 128)]
)
def test_largest_divisor(d: int, most: int, b: int) -> None:
    assert largest_divisor(d, most) == b


# T as a whole


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("block", [8, 16, 32, 128])
def test_t_is_orthogonal_and_flattens(shared: bool, block: int) -> None:
    x = outliers()
    t = Duquant(block=block, steps=20, shared=shared).fit(x, seed=0)
    torch.testing.assert_close(t.matrix() @ t.matrix().T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)
    assert "orthogonal" in t.groups
    assert float(t(x).abs().max()) < 0.6 * float(x.abs().max())


def test_t_is_rotation_deal_rotation() -> None:
    x = outliers()
    p = Duquant(block=8, steps=6)
    source = generator(5)
    rotated, matrices = x.clone(), []
    for turn in range(2):
        f = spreading(8, source)
        r = torch.block_diag(*(naive(rotated[:, i : i + 8], f, 6)[0] for i in range(0, 32, 8)))
        rotated = (rotated.double() @ r).float()
        matrices.append(r)
        if turn == 0:
            order = zigzag(rotated.abs().amax(0), 4)
            rotated = rotated[:, order]
            matrices.append(torch.eye(32, dtype=torch.float64)[:, order])
    expected = torch.linalg.multi_dot(matrices)
    torch.testing.assert_close(p.fit(x, seed=5).matrix(), expected, rtol=0, atol=1e-6)


def test_shared_keeps_one_matrix() -> None:
    parts: list[torch.Tensor] = []
    Duquant(block=8, steps=3, shared=True).fit(outliers(), 0).encode(parts)
    assert [tuple(part.shape) for part in parts] == [(1, 8, 8), (32,), (1, 8, 8)]
    parts = []
    Duquant(block=8, steps=3, shared=False).fit(outliers(), 0).encode(parts)
    assert [tuple(part.shape) for part in parts] == [(4, 8, 8), (32,), (4, 8, 8)]


def test_fits_the_tokens_with_the_largest_values() -> None:
    x = outliers()
    largest = x[x.abs().amax(1).topk(5).indices]
    p = Duquant(block=8, steps=4, rows=5)
    assert torch.equal(p.fit(x, 0).matrix(), p.fit(largest, 0).matrix())
    assert not torch.equal(p.fit(x, 0).matrix(), Duquant(block=8, steps=4, rows=40).fit(x, 0).matrix())


# On models


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("name", "sites"),
    [("llada", 8), ("llada tied", 8), ("llada grouped bias", 8), ("dream", 8), ("layer norm", 4), ("post norm", 4)],
)
def test_the_function_stays(case: CaseMaker, name: str, sites: int, shared: bool) -> None:
    k = case(name)
    report = applied(k, Duquant(block=16, steps=4, shared=shared))
    assert (report.sites, report.declined) == (sites, [])
    inside = [s for s in linears(k.graph.nodes, k.ctx.weights) if "head" not in s.name and "wte" not in s.name]
    online = [node for node in k.graph.nodes if is_call(node, TRANSFORM)]
    assert len(online) == sites
    assert sum(is_call(s.x, TRANSFORM) for s in inside) == sum(len(node.users) for node in online)


def test_the_function_stays_in_half_precision(case: CaseMaker) -> None:
    """The expression stays exact; the folded weights are rounded to bfloat16."""
    assert applied(case("llada bf16"), SMALL, single_bound=0.02).sites == 8


def test_readers_of_one_value_share_one_op(case: CaseMaker) -> None:
    k = case("llada")
    applied(k, SMALL)
    users = sorted(len(node.users) for node in k.graph.nodes if is_call(node, TRANSFORM))
    assert users == [1, 1, 1, 1, 2, 2, 3, 3]  # q, k, v; attention output; gate, up; down


def test_the_weights_take_t(case: CaseMaker) -> None:
    k = case("llada")
    name = f"{BLOCK.format(0)}.q_proj.weight"
    before = k.ctx.weights.value(name, torch.float64)
    applied(k, SMALL)
    t = transform_of(next(node for node in k.graph.nodes if is_call(node, TRANSFORM)), k.ctx.weights)
    torch.testing.assert_close(k.ctx.weights.value(name, torch.float64), before @ t.matrix(), rtol=0, atol=1e-12)


def test_globs_choose_the_sites(case: CaseMaker) -> None:
    k = case("llada")
    assert applied(k, Duquant(block=16, steps=2, sites=("*.ff_out", "*.0.k_proj"))).sites == 3
    assert all(k.ctx.weights[f"{BLOCK.format(1)}.{n}_proj.weight"].folds == () for n in "qkv")


def test_the_report_tells_the_peaks(case: CaseMaker) -> None:
    k = case("llada")
    gain = torch.ones(64)
    gain[9] = 40.0
    k.ctx.weights.put(f"{BLOCK.format(0)}.attn_norm.weight", gain)
    found = applied(k, SMALL).details[f"{BLOCK.format(0)}.q_proj"]
    assert (found["width"], found["block"]) == (64, 16)
    assert found["peak before"] > 40
    assert found["peak after"] < 0.5 * found["peak before"]


def test_the_manager_certifies_it_after_smooth(case: CaseMaker) -> None:
    k = case("llada grouped bias")
    passes = (Calibrate(sequences=4, length=16), Smooth(), SMALL)
    report = PassManager(passes).run(k.graph, k.ctx)[2][1]
    assert report.sites == 8
    assert 0 < report.certificate < 1e-12


def test_quantizers_find_their_sites_behind_it(case: CaseMaker) -> None:
    k = case("llada")
    quantize = (QuantizeWeights(bits=8, group_size=None, symmetric=True, method=Rtn()), QuantizeActivations())
    before = k.forward(k.ids())
    PassManager((Calibrate(sequences=4, length=16), SMALL, *quantize)).run(k.graph, k.ctx)
    for node in k.graph.nodes:
        if is_call(node, LINEAR_Q):
            assert is_call(node.args[0], QUANTIZE_ACT)
            assert is_call(node.args[0].args[0], TRANSFORM)
    assert deviation(k.forward(k.ids()), before) < 0.1


def test_a_rotation_that_is_none_is_found_out(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: F stretches one direction. The region takes orthogonal transforms only."""
    real = duquant.spreading
    stretched = lambda b, g: real(b, g) * torch.linspace(1.0, 1.1, b, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(duquant, "spreading", stretched)
    with pytest.raises(ContractError, match="it is not orthogonal"):
        applied(case("llada"), SMALL)


def test_a_weight_that_misses_t_is_found_out(case: CaseMaker) -> None:
    """Planted: one fold of one weight is dropped."""
    k = case("llada")
    before = k.forward(k.ids(), torch.float64)
    applied(k, SMALL)
    name = f"{BLOCK.format(1)}.k_proj.weight"
    k.ctx.weights.put(name, k.ctx.weights[name].leaf)
    assert deviation(k.forward(k.ids(), torch.float64), before) > 1e-3


# Declines


def test_a_width_takes_the_largest_block_that_divides_it(case: CaseMaker) -> None:
    report = applied(case("llada"), Duquant(block=5, steps=2, sites=("*.ff_out",)))
    assert report.sites == 2
    assert report.details[f"{BLOCK.format(0)}.ff_out"]["block"] == 4  # 96 = 4·24


def test_declines_a_width_without_a_divisor(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duquant, "width", lambda node: 97)
    report = applied(case("llada"), Duquant(block=16, sites=("*.1.ff_out",)))
    assert [(d.site, d.reason) for d in report.declined] == [
        (f"input of {BLOCK.format(1)}.ff_out", "97 features do not divide into blocks of 2 to 16")
    ]


def test_declines_a_second_time(case: CaseMaker) -> None:
    k = case("llada")
    applied(k, SMALL)
    mark = fingerprint(k.graph, k.ctx.weights)
    report = applied(k, SMALL)
    assert report.sites == 0
    assert {d.reason for d in report.declined} == {"it is transformed at run time already"}
    assert len(report.declined) == 8
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_declines_zeros_and_takes_constants(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.weights.put(f"{BLOCK.format(0)}.attn_norm.weight", torch.zeros(64))
    report = applied(k, SMALL)
    zero = [f"input of {BLOCK.format(0)}.{n}" for n in ("q_proj", "attn_out")]
    assert [(d.site, d.reason) for d in report.declined] == [(site, "it is zero on all states") for site in zero]
    t = SMALL.fit(torch.full((5, 32), 2.0), seed=0)
    torch.testing.assert_close(t.matrix() @ t.matrix().T, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)


def test_declines_a_weight_that_somebody_else_reads(case: CaseMaker) -> None:
    k = case("shared")
    report = applied(k, SMALL)
    assert report.sites == 0
    up = [d.reason for d in report.declined if d.site == "input of layers.0.up"]
    assert len(up) == 3
    assert all("it reads 'layers.0.up.weight', too" in reason for reason in up)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1}, r"^duquant\.block: 1 is less than 2\. Use 128$"),
        ({"steps": 0}, r"^duquant\.steps: 0 is less than 1\. Use 256$"),
        ({"rows": 0}, r"^duquant\.rows: 0 is less than 1\. Use 64$"),
        ({"sites": ()}, r"^duquant\.sites: no pattern\. Use \('\*',\) for all inputs of linears$"),
    ],
)
def test_options_outside_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Duquant(**options)


def test_recipes_name_it() -> None:
    assert parse_line("duquant(block=64, sites=['*.q_proj'])") == (Duquant(block=64, sites=("*.q_proj",)),)
