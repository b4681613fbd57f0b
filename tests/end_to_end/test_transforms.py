"""Every transform on every class of model: the same logits in float64, and the number of sites that it did of how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import MASK, VOCAB, ZOO, captured

from dlqc.backend import load_backend
from dlqc.blocks import find_blocks
from dlqc.calibration import MaskedSimulation, TokenRows, Uniform, draw_states
from dlqc.capture import capture
from dlqc.certificate import deviation
from dlqc.contract import Context, PassReport
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ContractError
from dlqc.execute import forward
from dlqc.manager import PassManager
from dlqc.recipe import parse_line

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def canvas() -> torch.Tensor:
    """One row at each mask ratio."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB - 1, (1, 20), generator=generator)
    order = torch.rand(ids.shape, generator=generator)
    return torch.cat([torch.where(order < ratio, MASK, ids) for ratio in RATIOS])


def prepared(name: str) -> tuple[Any, Context]:
    graph, weights, spec = captured(name)
    ctx = Context(weights, spec, load_backend("reference"))
    ctx.rows = TokenRows(torch.randint(0, VOCAB - 1, (6, 16), generator=torch.Generator().manual_seed(1)), "random")
    ctx.states = draw_states(
        ctx.rows, MaskedSimulation(), Uniform(), spec, seed=0, logits=lambda ids: forward(graph, weights, ids)
    )
    ctx.facts.add("states")
    ctx.blocks = find_blocks(graph)
    return graph, ctx


def transform(name: str, line: str) -> tuple[list[PassReport], float, float]:
    """The reports, and the worst deviation of a row in float64 and in float32."""
    graph, ctx = prepared(name)
    ids = canvas()
    before = [forward(graph, ctx.weights, ids, dtype=dtype) for dtype in (torch.float64, None)]
    reports = [report for _, report in PassManager(parse_line(line)).run(graph, ctx)]
    after = [forward(graph, ctx.weights, ids, dtype=dtype) for dtype in (torch.float64, None)]
    worst = [max(deviation(x, y) for x, y in zip(a, b, strict=True)) for a, b in zip(after, before, strict=True)]
    return reports, worst[0], worst[1]


FOLDED = "center_norms(untie=True, required=False), fold_norm_scale(untie=True, required=False)"
LINES = {
    "fold_norm_scale": "fold_norm_scale(untie=True, required=False)",
    "smooth": "smooth(required=False)",
    "smooth products": "smooth(sites='product', required=False)",
    "awq_scale": "awq_scale(group_size=8, required=False)",
    "equalize": "equalize(required=False)",
    "rotate_hidden": f"{FOLDED}, rotate_hidden(required=False)",
    "rotate_heads": "rotate_heads",
    "rotate_heads across": "rotate_heads(across=True)",
    "rotate_qk": "rotate_qk",
    "rotate_down": "rotate_down",
    "rotate_down all": "rotate_down(sites='all')",
    "duquant": "duquant(block=8, steps=8)",
}
#: Sites done of sites seen, in the order of ZOO. Post norms close no region that goes through them (BERT); head norms have
#: a gain that attention cannot take; a spelled-out GELU adds numbers (GPT-2).
SITES = {
    "fold_norm_scale": "7/7 5/5 5/5 5/9 5/5 5/5 5/9 5/5 2/6 5/5",
    "smooth": "6/6 4/4 4/4 4/4 4/4 4/4 4/4 4/4 0/4 4/4",
    "smooth products": "9/9 6/6 6/6 16/16 6/6 6/6 6/6 6/6 0/4 4/6",
    "awq_scale": "12/12 8/8 8/8 18/18 8/8 8/8 8/8 8/8 2/8 6/8",
    "equalize": "6/6 4/4 4/4 14/14 4/4 4/4 4/4 4/4 2/4 2/4",
    "rotate_hidden": "1/1 1/1 1/1 1/1 1/1 1/1 1/1 1/1 0/1 1/1",
    "rotate_heads": "3/3 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2",
    "rotate_heads across": "3/3 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2",
    "rotate_qk": "3/3 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2",
    "rotate_down": "3/3 2/2 2/2 12/12 2/2 2/2 2/2 2/2 2/2 2/2",
    "rotate_down all": "12/12 8/8 8/8 18/18 8/8 8/8 8/8 8/8 8/8 8/8",
    "duquant": "12/12 8/8 8/8 18/18 8/8 8/8 8/8 8/8 8/8 8/8",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", ZOO)
def test_every_transform_on_every_model(name: str, line: str) -> None:
    reports, double, single = transform(name, LINES[line])
    assert double < 1e-9
    assert single < 1e-4
    last = reports[-1]
    assert last.certificate is not None
    assert last.certificate < 1e-9
    assert f"{last.sites}/{last.sites + len(last.declined)}" == dict(zip(ZOO, SITES[line].split(), strict=True))[name]


PARTS = (
    "smooth(sites='all')",
    "awq_scale(group_size=8)",
    "equalize",
    "fold_norm_scale, rotate_hidden",
    "rotate_heads",
    "rotate_down",
)


@pytest.mark.parametrize("seed", range(8))
def test_transforms_compose_in_any_order(seed: int) -> None:
    order = torch.randperm(len(PARTS), generator=torch.Generator().manual_seed(seed)).tolist()
    reports, double, single = transform("dream", ", ".join(PARTS[i] for i in order))
    assert double < 1e-9
    assert single < 1e-4
    assert len(reports) == len(PARTS) + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "calibrate, rotate_hidden",
            "passes: pass 'rotate_hidden' needs 'unit-gain', which does not hold here. "
            "No pass in this pipeline gives 'unit-gain'",
        ),
        (
            "rotate_hidden, fold_norm_scale",
            "passes: pass 'rotate_hidden' needs 'unit-gain', which does not hold here. "
            "Move 'fold_norm_scale', which gives it, before 'rotate_hidden'",
        ),
        (
            "fold_norm_scale, calibrate, smooth, rotate_hidden",
            "passes: pass 'rotate_hidden' needs 'unit-gain', which does not hold here. "
            "Move 'rotate_hidden' before 'smooth', which ends it",
        ),
        (
            "quantize_weights(method=rtn), rotate_heads",
            "passes: pass 'rotate_heads' needs 'float-weights', which does not hold here. "
            "Move 'rotate_heads' before 'quantize_weights', which ends it",
        ),
        (
            "smooth",
            "passes: pass 'smooth' needs 'states', which does not hold here. No pass in this pipeline gives 'states'",
        ),
    ],
)
def test_an_illegal_order_is_refused_with_a_hint(line: str, message: str) -> None:
    with pytest.raises(ContractError) as caught:
        PassManager(parse_line(line)).check_order()
    assert str(caught.value) == message


class Odd(nn.Module):
    """A stack whose stream no rotation may pass: `how` says why."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(VOCAB, 32)
        self.norm = nn.RMSNorm(16 if how == "slice" else 32, eps=1e-6)
        self.up, self.down = nn.Linear(self.norm.weight.numel(), 64), nn.Linear(64, 32)
        self.last, self.head = nn.RMSNorm(32, eps=1e-6), nn.Linear(32, VOCAB)
        self.last.weight.data += 0.5

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(F.silu(self.up(self.norm(x[..., :16] if self.how == "slice" else x))))
        if self.how == "soft cap":
            x = 5.0 * torch.tanh(x / 5.0)
        logits = self.head(self.last(x))
        if self.how == "shared":
            logits = logits + self.down.bias.sum()
        return logits


ODD = {
    "soft cap": "stuck at %tanh (aten.tanh): a nonlinear function of each channel moves only permutations",
    "slice": "stuck at %slice_1 (aten.slice): it cuts the channels apart",
    "shared": "stuck at %sum_1 (aten.sum): it reads 'down.bias', too, and would see it changed",
}


@pytest.mark.parametrize("how", ODD)
@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_proven_is_declined_or_in_strict_an_error(how: str, strict: bool) -> None:
    found = capture(Odd(how).eval(), DiffusionSpec(MASK, VOCAB, 64))
    ctx = Context(found.weights, DiffusionSpec(MASK, VOCAB, 64), load_backend("reference"))
    line = f"fold_norm_scale, rotate_hidden(required=False, strict={strict})"
    manager = PassManager(parse_line(line))
    if strict:
        with pytest.raises(ContractError) as caught:
            manager.run(found.graph, ctx)
        what = f"pass 'rotate_hidden' left 1 of 1 sites alone (residual stream: {ODD[how]})"
        assert str(caught.value) == f"passes: {what}. Exclude them, or set strict=False"
        return
    ((_, _), (_, report)) = manager.run(found.graph, ctx)
    assert [(d.site, d.reason) for d in report.declined] == [("residual stream", ODD[how])]
