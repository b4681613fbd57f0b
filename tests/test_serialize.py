"""Graphs as JSON: what is written reads back as the same graph."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dlqc.capture import capture
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ArtifactError
from dlqc.execute import forward
from dlqc.graph import structure
from dlqc.models.describe import spec_of
from dlqc.models.dream import DreamConfig, DreamModel
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.ops import LINEAR_Q
from dlqc.serialize import decode_graph, encode_graph, is_pure
from dlqc.transform import decode
from dlqc.weights import Constant, Weights

aten = torch.ops.aten
SPEC = DiffusionSpec(mask_id=15, vocab_size=16, max_length=16)


class Odd(nn.Module):
    """Arguments that JSON has no word for, alone and in company."""

    spec = SPEC

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.register_buffer("blocked", torch.tensor([False, True] * 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        x = x.masked_fill(self.blocked, -math.inf).softmax(-1)
        x = x + torch.zeros(8, device="cpu", layout=torch.strided) + torch.arange(8).to(torch.float64).float()
        x = x + torch.div(x, 3, rounding_mode="floor") + torch.nn.functional.gelu(x, approximate="tanh")
        x = torch.cat([x[..., :3], x[..., 3:]], dim=2).reshape(-1, ids.shape[1], 8)
        return self.head(x)


def llada() -> nn.Module:
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 32, "vocab_size": 16}
    return LLaDAModelLM(LLaDAConfig(max_sequence_length=16, mask_token_id=15, **sizes)).eval()


def dream() -> nn.Module:
    config = DreamConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        mask_token_id=15,
        pad_token_id=0,
    )
    return DreamModel(config).eval()


@pytest.mark.parametrize("make", [Odd, llada, dream])
def test_round_trip(make: Callable[[], nn.Module]) -> None:
    model = make()
    captured = capture(model, spec_of(model))
    data = encode_graph(captured.graph)
    text = json.dumps(data, allow_nan=False)
    graph = decode_graph(json.loads(text), spec_of(model))
    assert json.dumps(encode_graph(graph)) == text
    assert shapeless(graph) == shapeless(captured.graph)
    ids = torch.randint(0, 16, (3, 7))
    assert torch.equal(forward(graph, captured.weights, ids), forward(captured.graph, captured.weights, ids))
    boundaries = [[n.meta.get("block_boundary") for n in g.nodes] for g in (graph, captured.graph)]
    assert boundaries[0] == boundaries[1]


def shapeless(graph: fx.Graph) -> list[str]:
    """The graph as text without shapes, whose symbols have other names."""
    return [line.split(" : ")[0] for line in structure(graph).splitlines()]


def test_batch_and_length_are_symbolic_again() -> None:
    model = llada()
    graph = decode_graph(encode_graph(capture(model, spec_of(model)).graph), spec_of(model))
    (output,) = (n for n in graph.nodes if n.op == "output")
    batch, length, vocabulary = output.args[0].meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert isinstance(length, torch.SymInt)
    assert vocabulary == 16


def one_call(target: Any, args: list[Any], kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A graph of one call on the ids."""
    call = {"name": "call", "op": "call_function", "target": target, "args": args, "kwargs": kwargs or {}}
    return {
        "nodes": [
            {"name": "ids", "op": "placeholder"},
            call,
            {"name": "output", "op": "output", "args": [{"node": "call"}], "kwargs": {}},
        ]
    }


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        ("aten.clone.default", [{"node": "ids"}], {"memory_format": {"memory_format": "contiguous_format"}}),
        ("aten.zeros.default", [[2, 3]], {"device": {"device": "cpu"}}),
        ("aten.zeros.default", [[2, 3]], {"layout": {"layout": "strided"}}),
        ("aten.zeros.default", [[2, 3]], {"dtype": {"dtype": "bfloat16"}}),
        ("aten.full.default", [[2], {"float": "-inf"}], {}),
        ("aten.full.default", [[2], {"float": "nan"}], {}),
        ("aten.sym_size.int", [{"node": "ids"}, 1], {}),
        ("operator.getitem", [[1, 2, 3], 1], {}),
        ("torch.sym_max", [3, 4], {}),
    ],
)
def test_one_argument_of_each_kind(target: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    """A lone keyword looks like a tagged value; it is not one."""
    data = one_call(target, args, kwargs)
    graph = decode_graph(data, SPEC)
    assert encode_graph(graph) == data


def test_dtype_and_fake_value_follow_the_arguments() -> None:
    graph = decode_graph(one_call("aten.zeros.default", [[2, 3]], {"dtype": {"dtype": "bfloat16"}}), SPEC)
    call = next(n for n in graph.nodes if n.name == "call")
    assert call.meta["val"].dtype == torch.bfloat16
    assert call.meta["val"].fake_mode is not None


@pytest.mark.parametrize(
    "op",
    [
        aten.from_file.default,
        aten.silu_.default,
        aten.silu.out,
        aten.add_.Tensor,
        aten.set_.source_Tensor,
        aten._assert_async.msg,
        torch.ops.aten.save.default,
        torch.ops.aten.warn.default,
        torch.ops.aten.format.default,
    ],
    ids=str,
)
def test_ops_that_act_are_not_pure(op: Any) -> None:
    assert not is_pure(op)


@pytest.mark.parametrize(
    "op",
    [
        aten.linear.default,
        aten.scaled_dot_product_attention.default,
        aten.gelu.default,
        aten.div.Tensor_mode,
        aten.einsum.default,
        aten.arange.start_step,
        aten._to_copy.default,
        aten.split_with_sizes.default,
        LINEAR_Q,
    ],
    ids=str,
)
def test_ops_that_compute_are_pure(op: Any) -> None:
    assert is_pure(op)


class TestWhatCannotBeStored:
    def graph(self, target: Any, *args: Any) -> fx.Graph:
        graph = fx.Graph()
        graph.output(graph.call_function(target, args))
        return graph

    @pytest.mark.parametrize("target", [aten.silu_.default, torch.nn.functional.silu, operator.truediv, print])
    def test_a_target(self, target: Any) -> None:
        with pytest.raises(ArtifactError, match=r"graph: a call of .* cannot be stored. Compile without the pass that"):
            encode_graph(self.graph(target))

    def test_an_argument(self) -> None:
        with pytest.raises(ArtifactError, match="graph: an argument of type slice cannot be stored. Compile without"):
            encode_graph(self.graph(operator.getitem, [1], slice(0, 1)))


def test_a_tensor_among_the_weights_does_not_come_from_the_graph() -> None:
    """Decoding makes names, never values: the weights are the caller's."""
    model = llada()
    captured = capture(model, spec_of(model))
    graph = decode_graph(encode_graph(captured.graph), spec_of(model))
    zeros = Weights({n: type(c)(torch.zeros_like(c.leaf)) for n, c in captured.weights.items()})
    assert forward(graph, zeros, torch.zeros(1, 4, dtype=torch.int64)).abs().max() == 0


# dlqc::transform


def transform_graph(spec: Any, *shapes: tuple[list[int], str]) -> dict[str, Any]:
    """embedding [.., 8] → transform by parts of these shapes."""
    parts = [
        {"name": f"part_{i}", "op": "get_attr", "target": f"part.{i}", "shape": shape, "dtype": dtype}
        for i, (shape, dtype) in enumerate(shapes)
    ]
    table = {"name": "table", "op": "get_attr", "target": "table", "shape": [16, 8], "dtype": "float32"}
    embed = {"name": "embed", "op": "call_function", "target": "aten.embedding.default", "kwargs": {}}
    turn = {"name": "turn", "op": "call_function", "target": "dlqc.transform.default", "kwargs": {}}
    return {
        "nodes": [
            {"name": "ids", "op": "placeholder"},
            table,
            *parts,
            embed | {"args": [{"node": "table"}, {"node": "ids"}]},
            turn | {"args": [{"node": "embed"}, [{"node": p["name"]} for p in parts], spec]},
            {"name": "output", "op": "output", "args": [{"node": "turn"}], "kwargs": {}},
        ]
    }


GOOD = [
    ("had(8,4,1)", ()),
    ("diag(0)", (([8], "float32"),)),
    ("perm(0)", (([8], "int64"),)),
    ("blocks(0)", (([2, 4, 4], "float32"),)),
    ("kron(blocks(0),diag(1))*center(8)*id(8)", (([1, 2, 2], "float32"), ([4], "float32"))),
]


@pytest.mark.parametrize(("spec", "shapes"), GOOD)
def test_a_transform_reads_back_and_runs(spec: str, shapes: tuple[tuple[list[int], str], ...]) -> None:
    data = transform_graph(spec, *shapes)
    graph = decode_graph(json.loads(json.dumps(data)), SPEC)
    assert encode_graph(graph) == data
    parts = [torch.randperm(8) if d == "int64" else torch.randn(s) for s, d in shapes]
    weights = Weights({f"part.{i}": Constant(p) for i, p in enumerate(parts)} | {"table": Constant(torch.randn(16, 8))})
    ids = torch.randint(0, 16, (2, 5))
    expected = (
        weights.value("table")[ids]
        @ decode(spec, [p.double() if p.is_floating_point() else p for p in parts]).matrix().float()
    )
    torch.testing.assert_close(forward(graph, weights, ids), expected)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("", ()),
        ("had(4,4,0)", ()),  # another width than the value
        ("had(8,3,0)", ()),
        ("had(999999999999,7,0)", ()),
        ("id(8)*had(16,16,0)", ()),
        ("kron(id(2),id(2))", ()),
        ("kron(" * 500 + "id(8)", ()),
        ("id(8)*" * 5000 + "id(8)", ()),
        ("__import__(0)", ()),
        ("diag(0)", ()),
        ("diag(1)", (([8], "float32"),)),
        ("diag(0)", (([4], "float32"),)),
        ("diag(0)", (([1, 8], "float32"),)),
        ("diag(0)", (([8], "int64"),)),
        ("perm(0)", (([8], "float32"),)),
        ("perm(0)", (([7], "int64"),)),
        ("blocks(0)", (([8, 8], "float32"),)),
        ("blocks(0)", (([2, 4, 5], "float32"),)),
        ("blocks(0)", (([1, 4, 4], "float32"),)),
        (7, ()),
        (None, ()),
    ],
)
def test_hostile_transforms_are_refused(spec: Any, shapes: tuple[tuple[list[int], str], ...]) -> None:
    with pytest.raises(ArtifactError, match=r"^graph\.json: node 'turn' cannot be computed: .*The file was changed"):
        decode_graph(transform_graph(spec, *shapes), SPEC)
