"""Tables that depend on a length alone: made once for each, the same values, and no weight among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from dlqc.tables import KEPT, Tables


class Model(nn.Module):
    """Positions enter through a table that reads a buffer, a constant, and a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.5]))
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor, total: int) -> Tensor:
        angles = torch.outer(torch.arange(total), self.frequencies).cos()
        base = torch.arange(0, 4, 2) / 4
        return x @ self.weight.t() + angles[: x.shape[0]] + base + total


@pytest.fixture
def split() -> tuple[fx.GraphModule, Tables, fx.GraphModule]:
    whole = fx.symbolic_trace(Model())
    tables = Tables(whole, whole.graph, "total")
    return whole, tables, fx.GraphModule(whole, tables.rest)


def test_the_two_halves_are_the_whole(split: tuple[fx.GraphModule, Tables, fx.GraphModule]) -> None:
    whole, tables, rest = split
    for total in (3, 5, 3):
        x = torch.randn(3, 2)
        assert torch.equal(rest(x, total, *tables(total)), whole(x, total))
    targets = {node.target for node in tables.rest.nodes}
    assert torch.outer not in targets
    assert torch.arange not in targets
    assert "weight" in targets  # stays where it is used
    assert "frequencies" not in targets


def test_they_are_made_once_for_each_length(split: tuple[fx.GraphModule, Tables, fx.GraphModule]) -> None:
    _, tables, _ = split
    first = tables(3)
    assert tables(3) is first
    for total in range(10, 10 + KEPT - 1):
        tables(total)
        assert tables(3) is first  # asked for last, so it stays
    for total in range(30, 30 + KEPT):
        tables(total)
    assert tables(3) is not first
    assert len(tables._held) == KEPT


def test_constants_that_were_written_to(split: tuple[fx.GraphModule, Tables, fx.GraphModule]) -> None:
    whole, tables, rest = split
    x = torch.randn(3, 2)
    rest(x, 3, *tables(3))
    whole.frequencies.fill_(0.25)
    assert torch.equal(rest(x, 3, *tables(3)), whole(x, 3))
