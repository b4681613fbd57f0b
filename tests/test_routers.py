"""Which linears pick experts, found by what their output flows into."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dlqc.capture import capture
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.graph import linears
from dlqc.routers import is_router

VOCAB, D, EXPERTS = 23, 16, 4


class Mixed(nn.Module):
    """up → down, then `pick(scores)` decides with weights [B, L, E] over four vectors what is added."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pick = pick
        self.embed, self.norm, self.head = nn.Embedding(VOCAB, D), nn.LayerNorm(D), nn.Linear(D, VOCAB)
        self.up, self.down, self.router = nn.Linear(D, 24), nn.Linear(24, D), nn.Linear(D, EXPERTS)
        self.vectors = nn.Parameter(torch.randn(EXPERTS, D))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(self.up(x).relu())
        return self.head(x + self.pick(self.router(self.norm(x))) @ self.vectors)


def chosen(p: Tensor, k: int = 2) -> Tensor:
    values, indices = p.topk(k, dim=-1)
    return torch.zeros_like(p).scatter(-1, indices, values)


def grouped(p: Tensor) -> Tensor:
    """The best of each group of experts, of which the best group counts, as LLaDA2 routes."""
    best = p.unflatten(-1, (2, 2)).topk(1, dim=-1).values.sum(-1).topk(1, dim=-1).indices
    return p * torch.zeros_like(p[..., :2]).scatter(-1, best, 1.0).repeat_interleave(2, dim=-1)


ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax, then topk": lambda s: chosen(s.softmax(-1)),
    "topk, then softmax": lambda s: chosen(s).softmax(-1),
    "sigmoid with a bias": lambda s: chosen(s.sigmoid() + 0.1),
    "other precision": lambda s: chosen(s.double().softmax(-1)).float(),
    "flattened": lambda s: chosen(s.flatten(0, 1).softmax(-1)).unflatten(0, s.shape[:2]),
    "argmax": lambda s: nn.functional.one_hot(s.argmax(-1), EXPERTS).float(),
    "sort": lambda s: s * (s >= s.sort(dim=-1).values[..., 2:3]),
    "groups": lambda s: grouped(s.sigmoid()),
}


def routers(pick: Callable[[Tensor], Tensor]) -> list[str]:
    found = capture(Mixed(pick).eval(), DiffusionSpec(VOCAB - 1, VOCAB, 64))
    return [site.name for site in linears(found.graph.nodes, found.weights) if is_router(site.node)]


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_known_by_its_choice(name: str) -> None:
    assert routers(ROUTERS[name]) == ["router"]


def test_a_gate_that_chooses_nothing_is_none() -> None:
    assert routers(lambda s: s.softmax(-1)) == []


def test_a_choice_behind_another_mix_is_none() -> None:
    """Scores that are summed over tokens, or multiplied with other scores, are no longer those of one token."""
    assert routers(lambda s: chosen(s.cumsum(1))) == []
    assert routers(lambda s: chosen(s @ s.new_ones(EXPERTS, EXPERTS))) == []
