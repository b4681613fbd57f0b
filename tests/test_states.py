"""The streams of calibration states: what statistics are of, against runs of the graphs before and behind rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from dlqc.backend import load_backend
from dlqc.blocks import Block, find_blocks
from dlqc.capture import capture
from dlqc.contract import Context, Pass, PassReport, Sequential, Statistics
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError
from dlqc.execute import Executor, forward, placeholder
from dlqc.graph import LINEAR, copy_graph, is_call, linears, sweep
from dlqc.graph import read as read_constant
from dlqc.manager import PassManager
from dlqc.ops import LINEAR_Q
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.rotate_hidden import RotateHidden
from dlqc.passes.smooth import Smooth
from dlqc.rounding.gptaq import Gptaq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.rtn import Rtn
from dlqc.states import StateFlow
from dlqc.weights import Weights

CaseMaker = Callable[..., Any]
CALIBRATE = Calibrate(sequences=6, length=16)
ROUGH = QuantizeWeights(2, 32, method=Rtn())
Snapshot = tuple[fx.Graph, Weights]


@dataclass(frozen=True)
class Look(Pass):
    """Keeps the statistics it is given, and a copy of the graph as it is, by block."""

    name: ClassVar[str] = "look"
    scope: ClassVar = "block"
    wanted: tuple[str, ...] = ("hessian",)
    how: Sequential = "block"
    seen: dict[int, Statistics] = field(default_factory=dict)
    graphs: dict[int, Snapshot] = field(default_factory=dict)

    def statistics(self) -> frozenset[str]:
        return frozenset(self.wanted)

    def sequence(self) -> Sequential:
        return self.how

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        assert ctx.block is not None
        self.seen[ctx.block.index] = ctx.stats
        self.graphs[ctx.block.index] = copy_graph(graph), ctx.weights.clone()
        return PassReport(sites=1)


def hidden(snapshot: Snapshot, block: Block, ids: torch.Tensor) -> torch.Tensor:
    """The input of a block, in one run from the token ids."""
    graph, weights = snapshot
    return Executor(graph, weights, [placeholder(graph)], [block.input(graph)])(ids)[0]


def read(snapshot: Snapshot, block: Block, ids: torch.Tensor, entering: torch.Tensor, weight: str) -> torch.Tensor:
    """What the linears with a weight read, given the input of the block; float64 rows."""
    graph, weights = snapshot
    nodes = [s.x for s in linears(block.nodes(graph), weights) if s.weight == weight]
    values = Executor(graph, weights, [placeholder(graph), block.input(graph)], nodes)(ids, entering)
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in values]).double()


def moment(ctx: Context, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    assert ctx.states is not None
    c = ctx.states.weights.reshape(-1, 1).double()
    return (left * c.repeat(len(left) // len(c), 1)).T @ right


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 1e-4 * expected.norm())


@pytest.mark.parametrize("transforms", [(), (FoldNormScale(), RotateHidden())], ids=["plain", "rotated"])
@pytest.mark.parametrize("batch", [2, 100])
def test_the_drift_is_between_two_runs_in_one_basis(case: CaseMaker, transforms: tuple[Pass, ...], batch: int) -> None:
    k, look = case("llada"), Look(("hessian", "drift"))
    PassManager((*transforms, CALIBRATE, Smooth(alpha=0.7), look, ROUGH), batch=batch).run(k.graph, k.ctx)
    ids, block = k.ctx.states.ids, k.ctx.blocks[1]
    assert all(bool((stats["drift"] == 0).all()) for stats in look.seen[0].values())
    # Both snapshots were taken behind the smoothing of their block and before its rounding.
    exact, now = hidden(look.graphs[0], block, ids), hidden(look.graphs[1], block, ids)
    for weight, found in look.seen[1].items():
        x0, x = (read(look.graphs[1], block, ids, entering, weight) for entering in (exact, now))
        assert close(found["hessian"], moment(k.ctx, x, x))
        assert close(found["drift"], moment(k.ctx, x0 - x, x))
        assert found["drift"].norm() > 0.01 * found["hessian"].norm()


def test_without_sequence_statistics_are_those_of_the_model_before_rounding(case: CaseMaker) -> None:
    k, look = case("llada"), Look(("hessian",), "none")
    original = (copy_graph(k.graph), k.ctx.weights.clone())
    PassManager((CALIBRATE, look, ROUGH)).run(k.graph, k.ctx)
    ids = k.ctx.states.ids
    for block in k.ctx.blocks:
        for weight, found in look.seen[block.index].items():
            x = read(original, block, ids, hidden(original, block, ids), weight)
            assert close(found["hessian"], moment(k.ctx, x, x))
    behind = look.graphs[1]
    weight = "model.transformer.blocks.1.q_proj.weight"
    x = read(behind, k.ctx.blocks[1], ids, hidden(behind, k.ctx.blocks[1], ids), weight)
    assert not close(look.seen[1][weight]["hessian"], moment(k.ctx, x, x))


def test_layer_by_layer_each_group_sees_those_before_it(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the dataflow: each Hessian is that of the graph as it was when its group's turn came."""
    k = case("llada")
    collected: list[tuple[list[str], Statistics, Snapshot, Block]] = []
    original = StateFlow.collect

    def spy(self: StateFlow, block: Block, wanted: Any, weights: Any = None, *, exact: bool = False) -> Statistics:
        found = original(self, block, wanted, weights, exact=exact)
        collected.append((list(weights), found, (copy_graph(k.graph), k.ctx.weights.clone()), block))
        return found

    monkeypatch.setattr(StateFlow, "collect", spy)
    report = PassManager((CALIBRATE, QuantizeWeights(2, 32, sequential="layer"))).run(k.graph, k.ctx)[-1][1]
    names = [weights[0].removeprefix("model.transformer.blocks.") for weights, *_ in collected]
    order = ["q_proj", "attn_out", "ff_proj", "ff_out"]
    assert names == [f"{block}.{name}.weight" for block in (0, 1) for name in order]
    assert report.sites == 14
    ids = k.ctx.states.ids
    for (weight,), found, snapshot, block in collected:
        assert found.keys() == {weight}  # no other statistic is held meanwhile
        x = read(snapshot, block, ids, hidden(snapshot, block, ids), weight)
        assert close(found[weight]["hessian"], moment(k.ctx, x, x))
        graph, _ = snapshot
        done = sum(is_call(node, LINEAR_Q) for node in block.nodes(graph))
        assert done == {"q_proj": 0, "attn_out": 3, "ff_proj": 4, "ff_out": 6}[weight.split(".")[-2]]


def test_layer_by_layer_sees_another_input_than_block_by_block(case: CaseMaker) -> None:
    found = {}
    for how in ("block", "layer", "none"):
        k = case("llada")
        method = QuantizeWeights(2, 32, method=Gptq(), sequential=how)  # type: ignore[arg-type]
        PassManager((CALIBRATE, method)).run(k.graph, k.ctx)
        found[how] = {n: k.ctx.weights.value(n) for n in k.ctx.weights if n.endswith(".codes")}
    differs = {
        (a, b): {n.split("blocks.")[1] for n in found[a] if not torch.equal(found[a][n], found[b][n])}
        for a, b in (("block", "layer"), ("block", "none"))
    }
    first = {f"0.{name}.codes" for name in ("q_proj", "k_proj", "v_proj")}
    assert not first & differs["block", "layer"]
    assert "0.attn_out.codes" in differs["block", "layer"]
    # Within a block, nothing is rounded when block by block looks.
    assert differs["block", "none"] == {n for n in differs["block", "layer"] if n.startswith("1.")} | {
        f"1.{name}.codes" for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    }


def test_the_second_stream_exists_only_where_it_is_asked_for(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[bool, bool]] = []
    original = StateFlow.advance

    def spy(self: StateFlow, block: Block) -> None:
        made.append((self._exact is not None, self._original is not None))
        original(self, block)
        assert self._original is None  # the block as it was is dropped as soon as the stream has gone through it

    monkeypatch.setattr(StateFlow, "advance", spy)
    for method, sequential, expected in (
        (Gptq(), "block", False),
        (Gptq(), "layer", False),
        (Gptq(), "none", True),
        (Gptaq(), "block", True),
        (Gptaq(), "layer", True),
    ):
        made.clear()
        k = case("llada")
        PassManager((CALIBRATE, QuantizeWeights(4, 32, method=method, sequential=sequential))).run(k.graph, k.ctx)  # type: ignore[arg-type]
        assert made == [(expected, expected)]


def test_the_exact_stream_is_right_behind_transforms_that_follow_rounding_in_other_blocks(case: CaseMaker) -> None:
    """Smoothing between: the second block is smoothed after the first was rounded, and both streams go through it."""
    errors = []
    for method in (Gptq(), Gptaq()):
        k = case("llada")
        expected = k.forward(k.ctx.rows.ids).softmax(-1)
        passes = (Calibrate(sequences=64, length=16), Smooth(), QuantizeWeights(2, 32, method=method))
        PassManager(passes).run(k.graph, k.ctx)
        errors.append(float((k.forward(k.ctx.rows.ids).softmax(-1) - expected).abs().mean()))
    assert errors[1] < errors[0]


def test_shared_weights_are_one_block_and_see_no_drift_before_they_are_rounded(case: CaseMaker) -> None:
    """ALBERT's case: all calls are rounded at once, so their inputs are still exact, and GPTAQ is GPTQ."""
    codes = []
    for method in (Gptq(), Gptaq()):
        k = case("shared")
        report = PassManager((CALIBRATE, QuantizeWeights(3, 32, method=method))).run(k.graph, k.ctx)[-1][1]
        assert len(k.ctx.blocks) == 1
        assert report.sites == 2
        codes.append({n: k.ctx.weights.value(n) for n in k.ctx.weights if n.endswith(".codes")})
    assert len(codes[0]) == 2
    assert all(torch.equal(value, codes[1][name]) for name, value in codes[0].items())


def test_shared_weights_layer_by_layer_compare_all_calls(case: CaseMaker) -> None:
    """`down` is rounded behind `up`, which all three calls have used: its drift is the sum over the calls."""
    k = case("shared")
    snapshots: list[tuple[Statistics, Snapshot]] = []
    exact = (copy_graph(k.graph), k.ctx.weights.clone())
    method = Gptaq()
    original = type(method).prepare

    class Spy(Gptaq):
        def prepare(self, stats: Any) -> Any:
            snapshots.append((stats, (copy_graph(k.graph), k.ctx.weights.clone())))
            return original(self, stats)

    PassManager((CALIBRATE, QuantizeWeights(3, 32, method=Spy(), sequential="layer"))).run(k.graph, k.ctx)
    (up, _), (down, now) = snapshots
    assert bool((up["drift"] == 0).all())
    block, ids = k.ctx.blocks[0], k.ctx.states.ids
    x0, x = (read(s, block, ids, hidden(s, block, ids), "layers.0.down.weight") for s in (exact, now))
    assert len(x) == 3 * ids.numel()
    assert close(down["drift"], moment(k.ctx, x0 - x, x))
    assert close(down["hessian"], moment(k.ctx, x, x))


@pytest.mark.parametrize("name", ["post norm", "dream", "llada bf16"])
def test_every_kind_of_block_goes_through_both_streams(case: CaseMaker, name: str) -> None:
    """Linears that read the block's own input; biases and grouped queries; 16-bit weights."""
    k = case(name)
    expected = k.forward(k.ctx.rows.ids).float()
    sites = sum(len(list(linears(block.nodes(k.graph), k.ctx.weights))) for block in k.ctx.blocks)
    p = QuantizeWeights(4, 32, method=Gptaq(), sequential="layer")
    report = PassManager((Calibrate(sequences=16, length=16), p)).run(k.graph, k.ctx)[-1][1]
    assert report.sites == sites
    found = k.forward(k.ctx.rows.ids).float()
    assert 0 < (found - expected).norm() < 0.35 * expected.norm()


class Chained(nn.Module):
    """Linears that read each other's output, as a factorized projection does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize("method", [Gptq(), Gptaq(), Rtn()], ids=lambda m: m.name)
def test_linears_that_follow_one_another(method: Any, sequential: Any) -> None:
    """The second reads a node that the first's rewriting has replaced."""
    if not method.statistics and sequential == "layer":
        return
    captured = capture(Chained().eval(), DiffusionSpec(mask_id=31, vocab_size=32, max_length=16))
    graph, weights = captured.graph, captured.weights
    ctx = Context(weights, DiffusionSpec(mask_id=31, vocab_size=32, max_length=16), load_backend("reference"))
    ctx.blocks = find_blocks(graph)
    ids = torch.randint(0, 31, (4, 8))
    before = forward(graph, weights, ids)
    p = QuantizeWeights(8, 8, method=method, sequential=sequential)
    reports = PassManager((Calibrate(sequences=4, length=8), p)).run(graph, ctx)
    assert reports[-1][1].sites == 4
    assert sum(is_call(node, LINEAR_Q) for node in graph.nodes) == 4
    assert sum(is_call(node, LINEAR) for node in graph.nodes) == 1
    torch.testing.assert_close(forward(graph, weights, ids), before, rtol=0, atol=0.05)


def test_what_was_not_there_before_rounding_has_no_drift(case: CaseMaker) -> None:
    """A pass that brings a linear of its own after rounding, and another that asks for its drift."""

    @dataclass(frozen=True)
    class Rename(Pass):
        name: ClassVar[str] = "rename"
        scope: ClassVar = "block"

        def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
            site = next(s for s in linears(ctx.nodes(graph), ctx.weights))
            ctx.weights.put("added.weight", ctx.weights.value(site.weight))
            site.node.replace_input_with(
                site.node.args[1], read_constant(graph, ctx.weights, "added.weight", site.node)
            )
            sweep(graph, ctx.weights)
            return PassReport(sites=1)

    k = case("llada")
    message = (
        r"^added: is not in the block as it was before weights were rounded, so its inputs cannot be compared\. "
        r"Exclude it with skip=, or move the pass that adds it behind"
    )
    skipping = QuantizeWeights(4, 32, method=Rtn(), skip=("*q_proj",))
    with pytest.raises(ContractError, match=message):
        PassManager((CALIBRATE, skipping, Rename(), Look(("drift",)))).run(k.graph, k.ctx)
