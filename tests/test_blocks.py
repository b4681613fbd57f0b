"""Blocks: how many, that they share nothing, and that they outlive rewriting."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn

from dlqc.blocks import Block, find_blocks
from dlqc.capture import Captured, capture
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.execute import Executor, forward, logits_node, placeholder
from dlqc.graph import LINEAR, call_before, is_call, linears, replace
from dlqc.models.bidirectional import Bidirectional
from dlqc.models.dream import DreamConfig, DreamModel
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM

VOCAB = 31
SPEC = DiffusionSpec(VOCAB - 1, VOCAB, 64)
aten = torch.ops.aten


def llada(layers: int) -> nn.Module:
    return LLaDAModelLM(
        LLaDAConfig(d_model=16, n_layers=layers, n_heads=2, mlp_hidden_size=24, vocab_size=VOCAB, mask_id=30)
    )


def sizes(layers: int, **options: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    } | options


class Mlp(nn.Module):
    """`layers` residual layers; `order` says which one runs when."""

    def __init__(self, layers: int, order: list[int] | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.up = nn.ModuleList([nn.Linear(16, 24) for _ in range(layers)])
        self.down = nn.ModuleList([nn.Linear(24, 16) for _ in range(layers)])
        self.order = list(range(layers)) if order is None else order

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in self.order:
            x = x + self.down[i](F.gelu(self.up[i](x)))
        return self.head(x)


class Uneven(Mlp):
    """Layers of different kinds: nothing repeats."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down[0](F.gelu(self.up[0](x)))
        return self.head(torch.tanh(self.down[1](self.up[1](x))))


class Skipping(Mlp):
    """The embedding reaches the logits past all layers: no value separates them, so the head lies in the block."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = x
        for up, down in zip(self.up, self.down, strict=True):
            y = y + down(F.gelu(up(y)))
        return self.head(y) * self.head(x)


class Flat(Mlp):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    "llada": (lambda: llada(3), 3, [7, 7, 7]),
    "llada 2": (lambda: llada(2), 2, [7, 7]),
    "llada 1": (lambda: llada(1), 1, [7]),
    "dream": (lambda: DreamModel(DreamConfig(**sizes(4, num_key_value_heads=1, mask_token_id=30))), 4, [7] * 4),
    "llama": (
        lambda: Bidirectional(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(3)))),
        3,
        [7, 7, 7],
    ),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes(3))), 3, [6, 6, 6]),
    "albert": (lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes(4))), 1, [24]),
    "mlp": (lambda: Mlp(5), 5, [2] * 5),
    "mlp shared": (lambda: Mlp(1, [0, 0, 0]), 1, [6]),
    "mlp shared in pairs": (lambda: Mlp(2, [0, 0, 1, 1]), 2, [4, 4]),
    "mlp palindrome": (lambda: Mlp(2, [0, 1, 1, 0]), 1, [8]),
    "mlp 1": (lambda: Mlp(1), 1, [2]),
    "uneven": (lambda: Uneven(2), 1, [4]),
}


@pytest.fixture(scope="module")
def blocks() -> Callable[[str], tuple[Captured, list[Block]]]:
    """blocks("llada"): one of MODELS, captured once, with its blocks."""
    made: dict[str, tuple[Captured, list[Block]]] = {}

    def get(name: str) -> tuple[Captured, list[Block]]:
        if name not in made:
            torch.manual_seed(0)
            found = capture(MODELS[name][0]().eval(), SPEC)
            made[name] = found, find_blocks(found.graph)
        return made[name]

    return get


def weights_of(found: Captured, block: Block) -> list[str]:
    return [site.name for site in linears(block.nodes(found.graph), found.weights)]


@pytest.mark.parametrize("name", MODELS)
def test_number_of_blocks_and_of_their_linears(blocks: Any, name: str) -> None:
    found, cut = blocks(name)
    _, count, sites = MODELS[name]
    assert len(cut) == count
    assert [len(weights_of(found, block)) for block in cut] == sites
    assert [block.index for block in cut] == list(range(count))
    assert all(a.stop == b.start for a, b in itertools.pairwise(cut))


@pytest.mark.parametrize(("name", "prefix"), [("llada", "model.transformer.blocks.{}."), ("dream", "model.layers.{}.")])
def test_block_is_the_layer_of_the_checkpoint(blocks: Any, name: str, prefix: str) -> None:
    found, cut = blocks(name)
    for block in cut:
        assert all(weight.startswith(prefix.format(block.index)) for weight in weights_of(found, block))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_partition(blocks: Any, name: str) -> None:
    """No node lies in two blocks, no weight matrix is read by two, and the head belongs to none."""
    found, cut = blocks(name)
    nodes = [node for block in cut for node in block.nodes(found.graph)]
    assert len(nodes) == len(set(nodes))
    read = [set(weights_of(found, block)) for block in cut]
    assert sum(map(len, read)) == len(set().union(*read))
    assert logits_node(found.graph) not in nodes
    for block in cut:
        assert block.nodes(found.graph)[-1] is block.output(found.graph)
        assert block.input(found.graph) not in block.nodes(found.graph)


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_is_the_model(blocks: Any, name: str) -> None:
    """A block's output follows from its input and the token ids, which give the lengths."""
    found, cut = blocks(name)
    graph, weights = found.graph, found.weights
    ids, torch_ids = placeholder(graph), torch.randint(0, VOCAB, (2, 9))
    (x,) = Executor(graph, weights, [ids], [cut[0].input(graph)])(torch_ids)
    for block in cut:
        (x,) = Executor(graph, weights, [ids, block.input(graph)], [block.output(graph)])(torch_ids, x)
    (logits,) = Executor(graph, weights, [ids, cut[-1].output(graph)], [logits_node(graph)])(torch_ids, x)
    torch.testing.assert_close(logits, forward(graph, weights, torch_ids), rtol=0, atol=0)


def test_graph_without_layers_has_no_blocks() -> None:
    assert find_blocks(capture(Flat(1), SPEC).graph) == []


def test_graph_without_an_embedding_has_no_blocks() -> None:
    class OneHot(Mlp):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(F.one_hot(ids, 16).float())

    assert find_blocks(capture(OneHot(1), DiffusionSpec(15, 16, 64)).graph) == []


def test_graph_that_nothing_separates_is_one_block() -> None:
    found = capture(Skipping(2), SPEC)
    (block,) = find_blocks(found.graph)
    assert block.output(found.graph) is logits_node(found.graph)
    assert len(weights_of(found, block)) == 6


@pytest.fixture
def copied(blocks: Any) -> tuple[fx.Graph, Captured, list[Block]]:
    torch.manual_seed(0)
    found = capture(llada(3).eval(), SPEC)
    return found.graph, found, find_blocks(found.graph)


def test_boundaries_survive_the_replacement_of_a_boundary_node(copied: Any) -> None:
    graph, found, cut = copied
    before = [weights_of(found, block) for block in cut]
    for block in cut:
        old = block.output(graph)
        new = call_before(graph, old, aten.add.Tensor, old.args)
        replace(old, new)
        assert block.output(graph) is new
    assert [weights_of(found, block) for block in cut] == before


def test_boundaries_survive_rewriting_inside(copied: Any) -> None:
    graph, found, cut = copied
    sites = [len(weights_of(found, block)) for block in cut]
    for node in list(graph.nodes):
        if is_call(node, LINEAR):
            wide = call_before(graph, node, aten.mul.Tensor, (node.args[0], 1.0))
            node.update_arg(0, wide)
    assert [len(weights_of(found, block)) for block in cut] == sites
    assert sum(is_call(n, aten.mul.Tensor) for block in cut for n in block.nodes(graph)) == 3 * 8


def test_finding_again_gives_the_same(copied: Any) -> None:
    graph, _, cut = copied
    where = [block.output(graph).name for block in cut]
    again = find_blocks(graph)
    assert again == cut
    assert [block.output(graph).name for block in again] == where
