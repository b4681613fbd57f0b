"""Activations of every kind, from the recipe to the artifact."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import dlqc
from dlqc.artifact import save, verify
from dlqc.contract import Context, Pass
from dlqc.manager import Instrument
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.passes.calibrate import Calibrate
from dlqc.recipe import as_recipe
from dlqc.rollout import Rollout
from dlqc.weights import Ones

MASK = 60
STATES = "calibrate(sampler=forward_process, sequences=12, length=24)"
INTEGERS = "quantize_weights(bits=8, group_size=None, symmetric=True, method=rtn)"
ATTENTION = (
    "quantize_attention(queries=8, keys=8, values=8, probabilities=8, qk=static(buckets=2), "
    "v=ia_aq(per='channel', symmetric=False, buckets=3))"
)
STATIC = "quantize_activations(ranges=mse(points=20), symmetric=False, group_size=32)"
RECIPES = {
    "all at once": f"{STATES}, {ATTENTION}, {INTEGERS}, quantize_activations(ranges=percentile, buckets=3), pack, lower",
    "coded weights": f"{STATES}, quantize_weights(format=nf4(block=32), method=rtn), {STATIC}, "
    "quantize_attention(by_row=True, probabilities=8), lower",
    "w4a4-kv4-dllmquant": "",
}


@functools.cache
def tiny() -> nn.Module:
    """Grouped keys, a bias on every linear."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 128, "vocab_size": 61}
    config = LLaDAConfig(max_sequence_length=32, mask_token_id=MASK, include_bias=True, **sizes)
    model = LLaDAModelLM(config).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        tensor.normal_(std=0.1 if name.endswith("bias") else tensor.shape[-1] ** -0.5).add_("norm" in name)
    return model


def small(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """A preset on fewer states; a random model says the same word over and over unless it is warm."""

    def fewer(p: Pass) -> Pass:
        if not isinstance(p, Calibrate):
            return p
        warm = {"sampler": Rollout(steps=8, temperature=1.0)} if isinstance(p.sampler, Rollout) else {}
        return dataclasses.replace(p, sequences=12, length=24, **warm)

    return tuple(map(fewer, passes))


def rows() -> torch.Tensor:
    return torch.randint(0, MASK, (12, 24), generator=torch.Generator().manual_seed(1))


class Watch(Instrument):
    """What the model was when its rollouts were drawn."""

    def __init__(self) -> None:
        self.folded: list[bool] = []
        self.facts: list[set[str]] = []

    def before(self, p: Pass, graph: fx.Graph, ctx: Context) -> None:
        if isinstance(p, Calibrate):
            folds = [c.folds for name, c in ctx.weights.items() if name.endswith("q_proj.weight")]
            self.folded.append(all(any(not isinstance(f, Ones) for f in members) for members in folds))
            self.facts.append(set(ctx.facts))


WATCHES: dict[str, Watch] = {}


@functools.cache
def compiled(name: str) -> dlqc.Compiled:
    passes: Any = RECIPES.get(name) or small(as_recipe(name).passes)
    WATCHES[name] = Watch()
    return dlqc.compile(tiny(), passes, calibration=rows(), progress=False, instruments=(WATCHES[name],))


def ids() -> torch.Tensor:
    """Rows with no, some and all tokens masked."""
    made = rows()[:5].clone()
    for row, count in enumerate((0, 6, 12, 18, 24)):
        made[row, :count] = MASK
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_the_artifact_computes_the_same(name: str, tmp_path: Path) -> None:
    """Also on the reference backend, up to codes that fall to the other side of a tie."""
    model = compiled(name)
    found = model(ids())
    save(model, tmp_path / "out", verify_reload=False)
    again = dlqc.load(tmp_path / "out", check_hashes=False)
    assert torch.equal(again(ids()), found)
    assert verify(tmp_path / "out")["deviation"] < 0.1
    exact = tiny()(ids()).logits
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.7


@pytest.mark.parametrize("name", RECIPES)
def test_a_row_does_not_depend_on_the_batch(name: str) -> None:
    model = compiled(name)
    together, alone = model(ids()), torch.cat([model(row[None]) for row in ids()])
    assert float((together - alone).abs().max() / together.abs().max()) < 1e-5


def test_the_report_names_the_scheme() -> None:
    text = compiled("all at once").explain()
    flat = " ".join(text.split())
    assert "inputs of linears are int8 static tensor by 3 mask ratios, ranges by percentile" in flat
    assert (
        "attentions read queries in 8 bits static per head and 2 mask ratios by min_max; keys in 8 bits static per head and "
        "2 mask ratios by min_max; values in 8 bits static per channel and 3 mask ratios asymmetric by ia_aq; probabilities in "
        "8 unsigned bits, scale 1/255"
    ) in flat
    assert "activation quantization is simulated at sites that no kernel took over" in flat
    assert "input_scale" not in text, "scales are no weights that stay"
    coded = " ".join(compiled("coded weights").explain().split())
    assert (
        "activations are rounded to int8 static g32 asymmetric by an op of their own, then multiplied as floats"
        in coded
    )


def test_rollouts_are_those_of_the_transformed_model() -> None:
    """DLLMQuant's order; the rotated model computes the same function, so its states are those of the original."""
    q, watch = compiled("w4a4-kv4-dllmquant"), WATCHES["w4a4-kv4-dllmquant"]
    assert watch.folded == [True]
    assert watch.facts[0] >= {"float-weights", "float-activations", "float-attention"}
    steps = {s.name: s for s in q.report.steps}
    assert steps["rotate_hidden"].certificate is not None
    drawn = next(p for p in q.recipe.passes if isinstance(p, Calibrate))
    plain = dlqc.compile(tiny(), (drawn,), calibration=rows(), progress=False)
    assert steps["calibrate"].notes == plain.report.steps[0].notes


def test_a_second_calibration_replaces_the_first() -> None:
    """AWQ looks at states, and the model behind it is rolled out again."""
    q, watch = compiled("w4a4-dllmquant-awq"), WATCHES["w4a4-dllmquant-awq"]
    assert watch.folded == [False, True]
    assert [s.name for s in q.report.steps].count("calibrate") == 2
    assert torch.isfinite(q(ids())).all()
