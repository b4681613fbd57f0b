"""Tiny models, captured once a session and copied for each test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from dlqc.backend import Backend, load_backend
from dlqc.blocks import find_blocks
from dlqc.calibration import MaskedSimulation, TokenRows, Uniform, draw_states
from dlqc.capture import capture
from dlqc.contract import Context, Pass
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.execute import forward
from dlqc.graph import copy_graph
from dlqc.models.describe import spec_of
from dlqc.models.dream import DreamConfig, DreamModel
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM

VOCAB, MASK = 61, 60

#: Files that take longest, first: the last file of a run has the other workers wait for it.
_LONGEST = (
    "test_artifact", "test_tiny_llada", "test_coded", "test_capture", "test_native", "test_cli", "test_triton_kernels",
    "test_compressed_tensors", "test_regions", "test_adapt_precision", "test_coded16", "test_all", "test_linear8",
    "test_sanitizers", "test_attention", "test_finetune", "test_compile", "test_quantize_kv", "test_siblings",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within them, and among the others, the order stays."""
    place = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of an ordinary size, gains around one, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1 + 0.3 * noise
    return model.eval()


def llada(**options: object) -> nn.Module:
    settings = {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden_size": 96,
        "vocab_size": VOCAB,
        "max_sequence_length": 64,
        "mask_token_id": MASK,
    }
    return randomize(LLaDAModelLM(LLaDAConfig(**(settings | options))))


def dream() -> nn.Module:
    """Grouped queries, biases on q, k and v, logits shifted by one."""
    config = DreamConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        mask_token_id=MASK,
        pad_token_id=0,
    )
    return randomize(DreamModel(config))


class Residual(nn.Module):
    """x + down(act(up(norm(x)))), by layer norm with bias; `post` puts the norm behind the sum, as BERT does."""

    def __init__(self, d: int, post: bool) -> None:
        super().__init__()
        self.norm, self.post = nn.LayerNorm(d), post
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post:
            return self.norm(x + self.down(F.gelu(self.up(x))))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mlp(nn.Module):
    """A stack of residual layers without attention.

    `shared` runs one layer three times, as ALBERT does; `final` has a last norm before the head, as GPT-2 does.
    """

    def __init__(self, *, d: int = 32, post: bool = False, shared: bool = False, final: bool = False) -> None:
        super().__init__()
        self.spec = DiffusionSpec(MASK, VOCAB, 64)
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList([Residual(d, post) for _ in range(1 if shared else 2)])
        self.repeats = 3 if shared else 1
        self.final = nn.LayerNorm(d) if final else nn.Identity()
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for _ in range(self.repeats):
            for layer in self.layers:
                x = layer(x)
        return self.head(self.final(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llada": llada,
    "llada bf16": lambda: llada().to(torch.bfloat16),
    "llada tied": lambda: llada(weight_tying=True),
    "llada grouped bias": lambda: llada(n_kv_heads=2, include_bias=True),
    "dream": dream,
    "final layer norm": lambda: randomize(Mlp(final=True)),
    "layer norm": lambda: randomize(Mlp()),
    "post norm": lambda: randomize(Mlp(post=True)),
    "shared": lambda: randomize(Mlp(shared=True)),
}


@dataclass
class Case:
    """A captured model that a test may rewrite."""

    model: nn.Module
    graph: fx.Graph
    ctx: Context

    def forward(self, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return forward(self.graph, self.ctx.weights, ids, dtype=dtype)

    def ids(self, rows: int = 3, length: int = 12, seed: int = 5) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCAB - 1, (rows, length), generator=generator)
        return torch.where(torch.rand(ids.shape, generator=generator) < 0.4, MASK, ids)

    def node(self, part: str) -> fx.Node:
        """The first node whose name contains `part`."""
        return next(node for node in self.graph.nodes if part in node.name)

    def apply(self, p: Pass) -> object:
        return p.apply(self.graph, self.ctx)


_seen: dict[str, dict[str, torch.Tensor]] = {}


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


@functools.cache
def _captured(name: str) -> tuple[nn.Module, fx.Graph, object, DiffusionSpec]:
    model = MODELS[name]()
    _seen[name] = _state(model)
    spec = spec_of(model)
    found = capture(model, spec)
    return model, found.graph, found.weights, spec


def make_case(name: str, backend: Backend | str = "reference") -> Case:
    model, graph, weights, spec = _captured(name)
    copied = copy_graph(graph)
    target = load_backend(backend) if isinstance(backend, str) else backend
    ctx = Context(weights.clone(), spec, target)  # type: ignore[attr-defined]
    ctx.rows = TokenRows(torch.randint(0, VOCAB - 1, (6, 16), generator=torch.Generator().manual_seed(1)), "random")
    ctx.states = draw_states(
        ctx.rows, MaskedSimulation(), Uniform(), spec, seed=0, logits=lambda ids: forward(copied, ctx.weights, ids)
    )
    ctx.facts.add("states")
    ctx.blocks = find_blocks(copied)
    return Case(model, copied, ctx)


@pytest.fixture
def case() -> Callable[..., Case]:
    """case("llada"): a fresh copy of one of MODELS, with calibration states and blocks."""
    return make_case


@pytest.fixture(params=list(MODELS))
def every_case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so that memory read before it is written shows."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def model_unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test of a pass may change the user's model."""
    yield
    for name, before in _seen.items():
        now = _captured(name)[0].state_dict()
        assert now.keys() == before.keys()
        changed = [key for key, tensor in before.items() if not torch.equal(now[key], tensor)]
        assert not changed, f"{request.node.nodeid} changed {changed} of the model {name!r}"
