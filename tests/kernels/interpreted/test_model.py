"""A model on the Triton backend, interpreted: the logits of the reference, sites that are refused by name."""

from __future__ import annotations

import pytest
import torch
from zoo import MASK, VOCAB, ZOO

import dlqc
from dlqc.compiled import Compiled
from dlqc.errors import FeasibilityError

IDS = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))


def compiled(backend: str, passes: str) -> Compiled:
    return dlqc.compile(ZOO["gpt2"](), f"{passes}, lower", backend=backend, mask_id=MASK, progress=False)


def test_logits_are_those_of_the_reference() -> None:
    passes = "quantize_weights(bits=4, group_size=None, method=rtn), quantize_activations(bits=8, group_size=16), pack"
    made, judge = (compiled(backend, passes) for backend in ("triton", "reference"))
    assert {text.split(" ")[0] for text in made.report.steps[-1].choices.values()} == {"weight_only"}
    torch.testing.assert_close(made(IDS), judge(IDS), rtol=1e-4, atol=1e-4)


def test_sites_without_a_kernel_are_listed() -> None:
    with pytest.raises(FeasibilityError) as caught:
        compiled("triton", "quantize_weights(bits=4, group_size=16, method=rtn), pack")
    said = str(caught.value)
    assert said.count("no kernel of backend 'triton' supports it") == 8
    assert (
        "integer: activations are not quantized; weight_only: weights have a scale per group of 16, it needs a multiple"
        in said
    )
    assert "(and 4 more)" in said
