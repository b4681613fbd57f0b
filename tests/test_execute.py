"""Running graphs node by node: the same numbers as the eager model, in little memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dlqc.capture import Captured, capture
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.execute import Executor, compute_dtype, forward, logits_node, needed, placeholder
from dlqc.graph import LINEAR, is_call
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.weights import Weights

VOCAB = 31
SPEC = DiffusionSpec(VOCAB - 1, VOCAB, 64)


class Steps(nn.Module):
    """A chain of linears, with what has no dtype of its own: a table, a quotient of integers, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])
        self.register_buffer("count", torch.tensor([3, 4]))

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.embed(ids) + (torch.arange(length) / 3)[:, None] * torch.ones(8) + self.count.sum()
        mask = torch.ones(length, length) * 0.1
        x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]
        for step in self.steps:
            x = step(x.float()).tanh()
        return self.head(x)


def llada() -> nn.Module:
    return LLaDAModelLM(
        LLaDAConfig(d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=24, vocab_size=VOCAB, mask_id=30)
    )


@pytest.fixture(scope="module", params=[Steps, llada], ids=["steps", "llada"])
def both(request: pytest.FixtureRequest) -> tuple[nn.Module, Captured]:
    torch.manual_seed(0)
    model = request.param().eval()
    return model, capture(model, SPEC)


@pytest.fixture(scope="module")
def steps() -> Captured:
    torch.manual_seed(0)
    return capture(Steps(), SPEC)


def ids_of(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def attributes(found: Captured) -> fx.GraphModule:
    """The graph as torch itself would run it."""
    root = nn.Module()
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in found.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        if node.op == "get_attr":
            env[node].target = str(node.target).replace(".", "__")
            setattr(root, env[node].target, found.weights.value(str(node.target), compute_dtype(node, None)))
    return fx.GraphModule(root, graph)


def linear_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if is_call(node, LINEAR)]


def test_equals_the_graph_module(both: tuple[nn.Module, Captured]) -> None:
    _, found = both
    with torch.no_grad():
        expected = attributes(found)(ids_of())
    assert torch.equal(forward(found.graph, found.weights, ids_of()), expected)


def test_float64_is_float64_throughout(both: tuple[nn.Module, Captured]) -> None:
    """Tables and masks too: the deviation from a float64 model is that of float64."""
    model, found = both
    executor = Executor(
        found.graph, found.weights, [placeholder(found.graph)], [logits_node(found.graph)], dtype=torch.float64
    )
    kinds = set()
    taps = {
        n: lambda _, value: kinds.add(value.dtype) for n in executor.nodes if isinstance(n.meta["val"], torch.Tensor)
    }
    (value,) = executor(ids_of(), taps=taps)
    assert value.dtype is torch.float64
    assert torch.float32 not in kinds
    assert torch.get_default_dtype() is torch.float32
    coarse = forward(found.graph, found.weights, ids_of())
    assert 0 < float((value - coarse).abs().max()) < 1e-4
    if isinstance(model, Steps):
        torch.testing.assert_close(value, in_float64(model, ids_of()), rtol=1e-13, atol=1e-13)


def in_float64(model: Steps, ids: Tensor) -> Tensor:
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    length = ids.shape[1]
    x = w["embed.weight"][ids] + (torch.arange(length, dtype=torch.float64) / 3)[:, None] + 7
    scores = x @ x.transpose(1, 2) / 8**0.5
    x = scores.softmax(-1) @ x
    for i in range(6):
        x = (x @ w[f"steps.{i}.weight"].T + w[f"steps.{i}.bias"]).tanh()
    return x @ w["head.weight"].T + w["head.bias"]


def test_default_dtype_comes_back_after_an_error(steps: Captured) -> None:
    run = Executor(
        steps.graph, steps.weights, [placeholder(steps.graph)], [logits_node(steps.graph)], dtype=torch.float64
    )
    with pytest.raises(IndexError):
        run(torch.zeros(2, dtype=torch.int64))
    assert torch.get_default_dtype() is torch.float32


def test_values_die_after_their_last_use(steps: Captured) -> None:
    """At every linear at most a few activations are alive, whatever the depth."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def tap(node: fx.Node, value: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    nodes = linear_nodes(steps.graph)
    run = Executor(steps.graph, steps.weights, [placeholder(steps.graph)], [logits_node(steps.graph)])
    run(ids_of(), taps=dict.fromkeys(nodes, tap))
    assert len(alive) == 7
    assert most <= 2


class Recording(Weights):
    """Weights that remember which values they gave out, and how many of them live."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(dict(weights))
        self.given: list[weakref.ref[Tensor]] = []
        self.names: list[str] = []
        self.most = 0

    def value(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        value = super().value(name, dtype).clone()
        self.given.append(weakref.ref(value))
        self.names.append(name)
        self.most = max(self.most, sum(ref() is not None for ref in self.given))
        return value


@pytest.mark.parametrize("keep", [False, True])
def test_weights_are_freed_unless_kept(steps: Captured, keep: bool) -> None:
    weights = Recording(steps.weights)
    nodes = linear_nodes(steps.graph)
    run = Executor(steps.graph, weights, [nodes[0].args[0]], [nodes[-1]], keep_weights=keep)
    x = torch.randn(2, 9, 8)
    first = run(x)[0]
    assert len(weights.given) == 14
    living = sum(ref() is not None for ref in weights.given)
    assert living == (14 if keep else 0)
    assert torch.equal(run(x)[0], first)
    assert len(weights.given) == (14 if keep else 28)


def test_weights_do_not_pile_up(steps: Captured) -> None:
    """Constants are read where they are used, not all at the start."""
    weights = Recording(steps.weights)
    forward(steps.graph, weights, ids_of())
    assert weights.most <= 4


def test_only_what_is_needed_runs(steps: Captured) -> None:
    nodes = linear_nodes(steps.graph)
    weights = Recording(steps.weights)
    run = Executor(steps.graph, weights, [nodes[1]], [nodes[3]])
    run(torch.randn(1, 4, 8))
    assert set(weights.names) == {f"steps.{i}.{part}" for i in (2, 3) for part in ("weight", "bias")}
    assert nodes[1] not in run.nodes
    assert needed(steps.graph, [nodes[3]], [nodes[3]]) == []


def test_taps_see_values_inputs_and_outputs(steps: Captured) -> None:
    nodes = linear_nodes(steps.graph)
    seen: dict[str, Tensor] = {}
    ids = placeholder(steps.graph)
    run = Executor(steps.graph, steps.weights, [ids], [nodes[2], nodes[5]])
    taps = dict.fromkeys([ids, nodes[0], nodes[5]], lambda node, value: seen.update({node.name: value}))
    two, five = run(ids_of(), taps=taps)
    assert list(seen) == [ids.name, nodes[0].name, nodes[5].name]
    assert torch.equal(seen[ids.name], ids_of())
    assert seen[nodes[5].name] is five
    assert two.shape == five.shape


def test_output_that_is_an_input(steps: Captured) -> None:
    node = linear_nodes(steps.graph)[2]
    x = torch.randn(1, 3, 8)
    assert Executor(steps.graph, steps.weights, [node], [node])(x)[0] is x


def test_result_needs_no_gradient(steps: Captured) -> None:
    assert not forward(steps.graph, steps.weights, ids_of()).requires_grad


def test_input_that_is_missing_is_named(steps: Captured) -> None:
    run = Executor(steps.graph, steps.weights, [], [logits_node(steps.graph)])
    with pytest.raises(RuntimeError, match="input_ids: placeholder node was given no value"):
        run()


def test_integers_keep_their_dtype(steps: Captured) -> None:
    node = next(n for n in steps.graph.nodes if n.target == "count")
    assert compute_dtype(node, torch.float64) is None
    value: Any = Executor(steps.graph, steps.weights, [], [node], dtype=torch.float64)()[0]
    assert value.tolist() == [3, 4]


def test_differentiable_runs_compute_with_what_is_given(steps: Captured) -> None:
    """The same numbers as without, gradients of what is given alone, and what goes into a call can be changed."""
    source, target = placeholder(steps.graph), logits_node(steps.graph)
    run = Executor(steps.graph, steps.weights, [source], [target])
    ids = torch.arange(6).reshape(2, 3)
    plain = run(ids)[0]
    torch.testing.assert_close(run.differentiable(ids, constants={})[0], plain, rtol=0, atol=0)
    name = "steps.2.weight"
    weight = (steps.weights.value(name) * 2).requires_grad_()
    out = run.differentiable(ids, constants={name: weight})[0]
    changed = Weights({**steps.weights})
    changed.put(name, weight.detach())
    torch.testing.assert_close(out, forward(steps.graph, changed, ids))
    (gradient,) = torch.autograd.grad(out.square().sum(), [weight])
    h = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (run.differentiable(ids, constants={name: weight + s * h})[0].square().sum() for s in (1, -1))
        assert not run.differentiable(ids, constants={name: weight})[0].requires_grad
    assert float((up - down) / 2e-2) == pytest.approx(float(gradient.norm()), rel=1e-2)
    first = next(n for n in run.nodes if is_call(n, LINEAR) and str(n.args[1].target) == name)  # type: ignore[union-attr]
    silent = run.differentiable(ids, constants={}, entering={first: torch.zeros_like})[0]
    bias = Weights({**steps.weights})
    bias.put(name, torch.zeros_like(weight))
    torch.testing.assert_close(silent, forward(steps.graph, bias, ids))
    torch.testing.assert_close(run(ids)[0], plain, rtol=0, atol=0)
