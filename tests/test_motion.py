"""Motion rules are exact in float64, refuse what is not, and the tests notice a rule that is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from dlqc import motion
from dlqc.capture import Captured, capture
from dlqc.certificate import deviation
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.execute import forward
from dlqc.graph import LINEAR, NORMS, aten, is_call, structure
from dlqc.motion import Diagonal, can_move_down, can_move_up, insert, insert_pair, move_down, move_up
from dlqc.weights import ScaleColumns, Weights

VOCAB = 11
EXACT = 1e-12  # float64: a few hundred roundings of 1e-16


class Chain(nn.Module):
    """embedding → norm → two linears → gated product → linear → head, with every part optional."""

    def __init__(self, d: int, f: int, *, norm: str = "rms", bias: bool = True, gate: str = "left") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.norm = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "bare": nn.RMSNorm}[norm](
            d, elementwise_affine=norm != "bare"
        )
        self.a, self.b = nn.Linear(d, f, bias=bias), nn.Linear(d, f, bias=bias)
        self.down, self.head = nn.Linear(f, d, bias=bias), nn.Linear(d, VOCAB, bias=bias)
        self.gate = gate
        for tensor in self.parameters():
            tensor.data = torch.randn(tensor.shape)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.embed(ids))
        a, b = self.a(y), self.b(y)
        return self.head(self.down(F.silu(a) * b if self.gate == "left" else a * torch.tanh(b)))


def taken(model: nn.Module) -> Captured:
    return capture(model.eval(), DiffusionSpec(VOCAB - 1, VOCAB, 32))


def run(captured: Captured) -> torch.Tensor:
    ids = torch.arange(VOCAB).repeat(2)[:14].reshape(2, 7)
    return forward(captured.graph, captured.weights, ids, dtype=torch.float64)


def find(graph: fx.Graph, *targets: object) -> fx.Node:
    return next(node for node in graph.nodes if is_call(node, *targets))


def diagonal(size: int, seed: int) -> Diagonal:
    generator = torch.Generator().manual_seed(seed)
    size_of = torch.exp(torch.randn(size, generator=generator, dtype=torch.float64))
    return Diagonal(size_of * torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0))


def moved_error(captured: Captured, value: fx.Node, transform: Diagonal) -> float:
    """Insert a pair after `value`, move both halves to rest; gives the deviation of the logits."""
    before = run(captured)
    nodes, names = structure(captured.graph), set(captured.weights)
    upper, lower = insert_pair(captured.graph, captured.weights, value, transform)
    assert deviation(run(captured), before) < EXACT  # with the halves on the edge
    move_down(captured.graph, captured.weights, lower)
    move_up(captured.graph, captured.weights, upper)
    captured.graph.lint()
    assert structure(captured.graph) == nodes  # every half has folded: the same nodes and constants are left
    assert set(captured.weights) == names
    return deviation(run(captured), before)


@settings(max_examples=12, deadline=None)
@given(
    d=st.integers(1, 9),
    f=st.integers(1, 9),
    norm=st.sampled_from(["rms", "layer"]),
    bias=st.booleans(),
    gate=st.sampled_from(["left", "right"]),
    edge=st.sampled_from(["norm", "product"]),
    seed=st.integers(0, 99),
)
def test_every_rule_is_exact(d: int, f: int, norm: str, bias: bool, gate: str, edge: str, seed: int) -> None:
    torch.manual_seed(seed)
    captured = taken(Chain(d, f, norm=norm, bias=bias, gate=gate))
    value = find(captured.graph, *NORMS) if edge == "norm" else find(captured.graph, aten.mul.Tensor)
    assert can_move_down(captured.graph, captured.weights, value) is None
    assert can_move_up(captured.graph, captured.weights, value) is None
    assert moved_error(captured, value, diagonal(d if edge == "norm" else f, seed)) < EXACT


def test_between_two_linears() -> None:
    captured = taken(Chain(4, 6))
    down = next(n for n in captured.graph.nodes if is_call(n, LINEAR) and is_call(n.args[0], aten.mul.Tensor))
    assert can_move_up(captured.graph, captured.weights, down) is None
    assert moved_error(captured, down, diagonal(4, 0)) < EXACT
    assert [type(f).__name__ for f in captured.weights["down.weight"].folds] == ["ScaleRows"]
    assert [type(f).__name__ for f in captured.weights["down.bias"].folds] == ["ScaleColumns"]


@pytest.mark.parametrize(("gate", "scaled"), [("left", "b"), ("right", "a")])
def test_the_gated_product_takes_the_side_that_is_linear(gate: str, scaled: str) -> None:
    captured = taken(Chain(4, 6, gate=gate))
    moved_error(captured, find(captured.graph, aten.mul.Tensor), diagonal(6, 0))
    assert {name for name, c in captured.weights.items() if c.folds} == {
        f"{scaled}.weight",
        f"{scaled}.bias",
        "down.weight",
    }


PLANTED = {
    "move_down folds the wrong way": ("move_down", "ScaleColumns", lambda v: ScaleColumns(1 / v)),
    "move_up forgets to fold rows": ("product", "ScaleRows", lambda v: ScaleColumns(torch.ones(1))),
    "move_up folds the wrong gain": ("move_up", "ScaleColumns", lambda v: ScaleColumns(v.roll(1))),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_error_in_any_rule_is_seen(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong = PLANTED[plant]
    captured = taken(Chain(5, 7))
    before = run(captured)
    value = find(captured.graph, aten.mul.Tensor) if where == "product" else find(captured.graph, *NORMS)
    transform = diagonal(7 if where == "product" else 5, 3)
    upper, lower = insert_pair(captured.graph, captured.weights, value, transform)
    for move, half in ((move_down, lower), (move_up, upper)):
        with monkeypatch.context() as patch:
            if (where == "move_down") == (move is move_down):
                patch.setattr(motion, name, wrong)
            move(captured.graph, captured.weights, half)
    assert deviation(run(captured), before) > 1e-3


def test_a_bias_that_stays_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = taken(Chain(5, 7, norm="layer"))
    before = run(captured)
    upper, lower = insert_pair(captured.graph, captured.weights, find(captured.graph, *NORMS), diagonal(5, 3))
    move_down(captured.graph, captured.weights, lower)
    fold = Weights.fold
    monkeypatch.setattr(Weights, "fold", lambda self, name, f: None if "bias" in name else fold(self, name, f))
    move_up(captured.graph, captured.weights, upper)
    assert deviation(run(captured), before) > 1e-3


def test_insert_names_never_collide() -> None:
    captured = taken(Chain(3, 4))
    value = find(captured.graph, *NORMS)
    before = run(captured)
    first, second = (insert(captured.graph, captured.weights, value, diagonal(3, i)) for i in (1, 2))
    move_down(captured.graph, captured.weights, first)
    third = insert(captured.graph, captured.weights, value, diagonal(3, 3))
    names = [node.args[1].target for node in (second, third)]
    assert len(set(names)) == 2
    total = diagonal(3, 1).v * diagonal(3, 2).v * diagonal(3, 3).v
    insert(captured.graph, captured.weights, value, Diagonal(1 / total))
    assert deviation(run(captured), before) < EXACT


class Refused(nn.Module):
    """One reason to refuse at a time."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why
        d = 1 if why == "broadcast" else 4
        self.embed, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)
        self.norm = nn.LayerNorm(4) if "norm bias" in why else nn.RMSNorm(4, elementwise_affine=why != "no gain")
        self.norm2 = nn.LayerNorm(4) if "norm bias" in why else nn.RMSNorm(4)
        self.a, self.b, self.c = nn.Linear(4, d), nn.Linear(4, 4), nn.Linear(4, 4)
        if why == "shared gain":
            self.norm2.weight = self.norm.weight
        if why == "shared norm bias":
            self.norm2.bias = self.norm.bias
        if why == "shared bias":
            self.c.bias = self.b.bias
        if why == "tied":
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.norm(x)
        if self.why == "tied":
            return self.head(y)
        if self.why == "square":
            a = self.a(y)
            return self.head(a * a)
        if self.why == "broadcast":
            return self.head(torch.sigmoid(y) * self.a(y))
        if self.why == "product without a linear":
            return self.head(torch.sigmoid(y) * torch.tanh(y))
        if self.why == "shared bias":
            return self.head(torch.tanh(self.c(y)) * self.b(y))
        if self.why == "residual":
            return self.head(y + self.b(y))
        if self.why == "weight read elsewhere":
            return self.head(self.norm2(self.b(y) + self.b(x)))
        if self.why == "other reader":
            b = self.b(y)
            return self.head(torch.tanh(b) * b)
        if self.why == "no constant":
            return self.head(torch.sigmoid(y) * F.linear(y, self.b.weight * 2))
        return self.head(self.norm2(self.b(y)))


def reason(why: str, target: object, direction: str) -> str | None:
    captured = taken(Refused(why))
    node = find(captured.graph, target)
    ask = can_move_down if direction == "down" else can_move_up
    return ask(captured.graph, captured.weights, node)


RMS, LAYER, MUL = NORMS[0], NORMS[1], aten.mul.Tensor


@pytest.mark.parametrize(
    ("why", "target", "direction", "message"),
    [
        ("residual", RMS, "down", r"^it is also read by %add \(aten\.add\), which is no linear on a constant weight$"),
        ("weight read elsewhere", RMS, "down", r"^weight 'b\.weight' is also read by %linear_1$"),
        ("tied", RMS, "down", r"^weight '(embed|head)\.weight' is tied to '(head|embed)\.weight'$"),
        ("no gain", RMS, "up", r"^%rms_norm has no gain to fold into$"),
        ("shared gain", RMS, "up", r"^gain 'norm2?\.weight' is shared$"),
        ("shared norm bias", LAYER, "up", r"^bias 'norm2?\.bias' is shared$"),
        ("shared bias", MUL, "up", r"^bias '[bc]\.bias' is shared$"),
        ("square", MUL, "up", r"^%mul is a square, in which a diagonal would count twice$"),
        ("broadcast", MUL, "up", r"^%linear is broadcast in %mul$"),
        ("product without a linear", MUL, "up", r"^a diagonal does not move through %tanh \(aten\.tanh\)$"),
        ("other reader", MUL, "up", r"^%linear has other readers$"),
        ("residual", aten.add.Tensor, "up", r"^a diagonal does not move through %add \(aten\.add\)$"),
        ("residual", LINEAR, "down", r"^it is also read by %add"),
        ("no constant", LINEAR, "up", r"^its weight is no constant$"),
        ("weight read elsewhere", LINEAR, "up", r"^weight 'b\.weight' is also read by %linear_1$"),
    ],
)
def test_refusals(why: str, target: object, direction: str, message: str) -> None:
    found = reason(why, target, direction)
    assert found is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


@pytest.mark.parametrize(
    ("why", "target", "direction"),
    [
        ("plain", RMS, "down"),
        ("plain", RMS, "up"),
        ("plain", LINEAR, "up"),
        ("norm bias", LAYER, "up"),
    ],
)
def test_the_same_module_without_the_obstacle_is_taken(why: str, target: object, direction: str) -> None:
    assert reason(why, target, direction) is None


def test_nobody_reads_it() -> None:
    captured = taken(Chain(3, 4))
    norm = find(captured.graph, *NORMS)
    with captured.graph.inserting_after(norm):
        dead = captured.graph.call_function(aten.neg.default, (norm,))
    dead.meta["val"] = norm.meta["val"]
    assert can_move_down(captured.graph, captured.weights, dead) == "nobody reads it"


def test_asking_changes_nothing() -> None:
    captured = taken(Chain(3, 4))
    before = (structure(captured.graph), captured.weights.clone().fingerprint())
    for node in list(captured.graph.nodes):
        if node.op == "call_function":
            can_move_down(captured.graph, captured.weights, node)
            can_move_up(captured.graph, captured.weights, node)
    assert (structure(captured.graph), captured.weights.fingerprint()) == before
