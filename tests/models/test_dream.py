"""Dream's native class: the checkpoint's names, and the logits of the architecture stated in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlqc.errors import ModelError
from dlqc.models.describe import spec_of
from dlqc.models.dream import DreamConfig, DreamModel

#: Share of the largest logit. Float32 rounds by 2^-24 = 6e-8; two layers and some amplification give a few 1e-6.
BOUND = 1e-5


def test_tensor_names_are_the_checkpoints(toys: Any) -> None:
    attention = [f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")] + [
        "self_attn.o_proj.weight"
    ]
    rest = [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = {f"model.layers.{i}.{leaf}" for i in range(2) for leaf in attention + rest + norms}
    assert set(toys.dream().state_dict()) == layers | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_the_7b_configuration_has_the_published_size() -> None:
    with torch.device("meta"):
        model = DreamModel(DreamConfig())
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512  # as Qwen2.5-7B
    assert not list(model.buffers())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_architectures(tied: bool, toys: Any) -> None:
    model, ids = toys.dream(tie_word_embeddings=tied), toys.ids()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    options: dict[str, Any] = dict(layers=2, heads=4, theta=500.0, eps=1e-6)
    expected = toys.restate(model.state_dict(), ids, toys.dream_names, **options)
    found = model(ids).logits
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=BOUND * float(expected.abs().max()))
    without = {k: v for k, v in model.state_dict().items() if not k.endswith("bias")}
    wrong = toys.restate(without, ids, toys.dream_names, **options)
    assert (found - wrong).abs().max() > 1e-2 * expected.abs().max()


def test_the_last_token_changes_the_first_row(toys: Any) -> None:
    model, ids = toys.dream(), toys.ids()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 61
    assert (model(ids).logits - model(other).logits)[:, 0].abs().amax(-1).min() > 1e-3


def test_logits_are_raw_and_the_spec_says_so(toys: Any) -> None:
    spec = spec_of(toys.dream())
    assert (spec.shift, spec.mask_id, spec.pad_id, spec.vocab_size, spec.max_length) == (True, 60, 59, 64, 64)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "gelu"), ("use_sliding_window", True), ("partial_rotary_factor", 0.5)]
)
def test_other_mathematics_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        DreamConfig(**{key: value})
    assert str(caught.value) == (
        f"config.json: {key}={value!r} is not implemented here. "
        "Load the checkpoint's own code with trust_remote_code=True"
    )


def test_scaled_rotary_and_odd_heads_are_refused() -> None:
    with pytest.raises(ModelError, match=r"rope_scaling=.*yarn.* is not implemented here"):
        DreamConfig(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ModelError, match=r"width 3584, 28 heads and 5 key heads do not divide"):
        DreamConfig(num_key_value_heads=5)
