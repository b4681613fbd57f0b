"""A model on the Triton backend, interpreted: the logits of the reference, artifacts that move, sites that are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import MASK, VOCAB, ZOO

import dlqc
from dlqc.compiled import Compiled
from dlqc.errors import FeasibilityError

IDS = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))


SCHEMES = {
    "weight_only": "quantize_weights(bits=4, group_size=32, method=rtn), pack",
    "integer": "quantize_weights(bits=4, group_size=None, method=rtn), quantize_activations(bits=8), pack",
    "coded_weights": "quantize_weights(format=nf4(block=32,scale_block=None), method=rtn)",
}


def compiled(backend: str, scheme: str) -> Compiled:
    return dlqc.compile(ZOO["llada"](), f"{scheme}, lower", backend=backend, mask_id=MASK, progress=False)


@pytest.mark.parametrize("kernel", SCHEMES)
def test_logits_are_those_of_the_reference(kernel: str, tmp_path: Path) -> None:
    made, judge = (compiled(backend, SCHEMES[kernel]) for backend in ("triton", "reference"))
    assert {text.split(" ")[0] for text in made.report.steps[-1].choices.values()} == {kernel}
    torch.testing.assert_close(made(IDS), judge(IDS), rtol=1e-4, atol=1e-4)
    if kernel == "weight_only":
        made.save(tmp_path / "a")
        torch.testing.assert_close(dlqc.load(tmp_path / "a", backend="reference")(IDS), judge(IDS), rtol=0, atol=0)
        torch.testing.assert_close(dlqc.load(tmp_path / "a", backend="triton")(IDS), made(IDS), rtol=0, atol=0)


def test_sites_without_a_kernel_are_listed() -> None:
    with pytest.raises(FeasibilityError) as caught:
        compiled("triton", "quantize_weights(bits=4, group_size=16, method=rtn), pack")
    said = str(caught.value)
    assert said.count("no kernel of backend 'triton' supports it") == 8
    assert "integer: activations are not quantized; weight_only: weights have a scale per group of 16, it needs a multiple" in said
    assert "(and 13 more)" in said
