"""Unusual wiring: a transform keeps the function or declines; it never breaks the law and never leaves an infinity behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlqc.backend import load_backend
from dlqc.blocks import find_blocks
from dlqc.capture import Captured, capture
from dlqc.certificate import deviation
from dlqc.contract import Context, PassReport
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError
from dlqc.execute import forward
from dlqc.manager import PassManager
from dlqc.recipe import parse_line

VOCAB, D = 23, 16
SPEC = DiffusionSpec(VOCAB - 1, VOCAB, 32)


class Gain(nn.Module):
    """An RMS norm written out, with a gain of any size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.LayerNorm(D) if how == "head norm" else Gain(1 if how == "one gain" else D)
        self.second = nn.LayerNorm(8) if how == "head norm" else Gain(D)
        self.q, self.k, self.g = (nn.Linear(D, D) for _ in range(3))
        self.o = nn.Linear(D, D)
        self.w = nn.Parameter(torch.rand(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "two norms":
            return x + self.o(F.silu(self.g(self.norm(x) + self.second(self.k(x)))))
        if self.how == "head norm":
            heads = self.second(x.reshape(*x.shape[:2], 2, 8)).reshape(x.shape)
            return x + self.o(F.gelu(self.g(self.norm(x)))) + self.k(self.q(heads))
        if self.how == "square":
            return x + self.o(self.norm(x) + self.g(F.gelu(self.k(x))) * ((1 + self.w) * (1 + self.w)))
        h = self.norm(x)
        if self.how == "no values":
            q, k, v = (a.view(*a.shape[:2], 2, 8).transpose(1, 2) for a in (self.q(h), self.k(h), x))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.o(F.silu(self.g(h)))


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList([Block(how) for _ in range(2)])
        self.last, self.head = (nn.LayerNorm(D) if how == "head norm" else Gain(D)), nn.Linear(D, VOCAB)
        for tensor in self.parameters():
            tensor.data = torch.randn(tensor.shape) * 0.4 + (tensor.dim() == 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def run(found: Captured, line: str) -> tuple[list[PassReport], float]:
    ctx = Context(found.weights, SPEC, load_backend("reference"))
    ctx.blocks = find_blocks(found.graph)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    before = forward(found.graph, found.weights, ids, dtype=torch.float64)
    reports = [report for _, report in PassManager(parse_line(line)).run(found.graph, ctx)]
    return reports, deviation(forward(found.graph, found.weights, ids, dtype=torch.float64), before)


LINE = (
    "center_norms(required=False), fold_norm_scale(required=False), rotate_hidden(required=False), "
    "rotate_heads(required=False), equalize(required=False), rotate_down(sites='all')"
)


@pytest.mark.parametrize("how", ["plain", "two norms", "head norm", "square", "no values", "one gain"])
def test_every_pass_keeps_the_function_or_declines(how: str) -> None:
    _, error = run(capture(Model(how).eval(), SPEC), LINE)
    assert error < 1e-9


@pytest.mark.parametrize(
    ("how", "line", "reason"),
    [
        ("two norms", "fold_norm_scale", "it would only move into the gain of another norm"),
        ("no values", "fold_norm_scale, rotate_heads(required=False)", "outside of the block"),
        ("head norm", "center_norms", "stuck at"),
    ],
)
def test_what_is_declined_says_why(how: str, line: str, reason: str) -> None:
    reports, error = run(capture(Model(how).eval(), SPEC), line)
    assert error < 1e-9
    assert any(reason in d.reason for d in reports[-1].declined)


def test_a_stream_that_attention_reads_turns_within_its_heads() -> None:
    reports, error = run(capture(Model("no values").eval(), SPEC), "fold_norm_scale, rotate_hidden")
    assert reports[1].sites == 1
    assert error < 1e-12


def test_a_number_that_float16_cannot_hold_is_an_error() -> None:
    model = Model("plain")
    model.blocks[0].norm.w.data[0] = 3e4
    model.blocks[0].g.weight.data[0, 0] = 3.0
    found = capture(model.half().eval(), SPEC)
    run(found, "fold_norm_scale")
    name = next(n for n in found.weights if n.endswith("blocks.0.g.weight"))
    with pytest.raises(ContractError) as caught:
        found.weights.value(name)
    assert str(caught.value) == (
        f"{name}: a transform made a number that float16 cannot hold. "
        "Load the model in bfloat16 or float32, or leave this site out"
    )
