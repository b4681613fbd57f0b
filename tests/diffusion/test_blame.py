from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn

import dlqc
from dlqc.diffusion.blame import first_not_finite
from dlqc.errors import ModelError


def broken() -> nn.Module:
    """An MLP of the second block overflows; everything after it is spoiled, too."""
    model = copy.deepcopy(zoo.model("llada"))
    weight = model.model.transformer["blocks"][1].ff_out.weight  # type: ignore[union-attr,index]
    weight.data[:, :] = torch.finfo(torch.float32).max
    return model


def test_the_layer_of_a_module_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        dlqc.generate(broken(), [1, 2, 3], gen_length=4)
    assert str(caught.value).startswith(
        "step 0: the logits of 4 of 4 positions are not finite, first in row 0 at position 0"
    )
    assert "; the first values that are not come out of model.transformer.blocks.1.ff_out. Check the model" in str(
        caught.value
    )


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_the_layer_of_a_graph_is_named(cache: str) -> None:
    model = dlqc.compile(zoo.model("llada"), (), progress=False)
    name = next(n for n, b in model.module.named_buffers() if "blocks_1_ff_out" in n)
    model.module.get_buffer(name).fill_(torch.finfo(torch.float32).max)
    with pytest.raises(ModelError, match=r"come out of model\.transformer\.blocks\.1\.ff_out\. Check"):
        dlqc.generate(model, [1, 2, 3], sampler=f"fast_dllm(cache='{cache}')", gen_length=4)


def test_nothing_to_blame() -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert first_not_finite(zoo.model("llada"), ids) is None
    assert first_not_finite(lambda ids: ids, ids) is None
