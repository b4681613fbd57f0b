"""LLaDA's native class: the checkpoint's names, and the logits of the architecture stated in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlqc.errors import ModelError
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM

#: Share of the largest logit. Float32 rounds by 2^-24 = 6e-8; two layers and some amplification give a few 1e-6.
BOUND = 1e-5


def test_tensor_names_are_the_checkpoints(toys: Any) -> None:
    leaves = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
    blocks = {f"model.transformer.blocks.{i}.{leaf}.weight" for i in range(2) for leaf in leaves}
    outer = {f"model.transformer.{leaf}.weight" for leaf in ("wte", "ln_f", "ff_out")}
    assert set(toys.llada().state_dict()) == toys.names(toys.llada()) == blocks | outer
    assert set(toys.llada(weight_tying=True).state_dict()) == blocks | outer - {"model.transformer.ff_out.weight"}


def test_the_8b_configuration_has_the_published_size() -> None:
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184
    assert shapes["model.transformer.ff_out.weight"] == (126464, 4096)
    assert shapes["model.transformer.blocks.31.ff_out.weight"] == (4096, 12288)
    assert not list(model.buffers())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "weight_tying": True},
        {"include_qkv_bias": True},
        {"include_bias": True, "bias_for_layer_norm": False},
    ],
    ids=["mha", "gqa", "mqa-tied", "qkv-bias", "bias"],
)
def test_logits_are_the_architectures(changes: dict[str, Any], toys: Any) -> None:
    model, ids = toys.llada(**changes), toys.ids()
    names = dict(toys.llada_names)
    if changes.get("weight_tying"):
        names["head"] = names["embed"]
    expected = toys.restate(model.state_dict(), ids, names, layers=2, heads=4, theta=500.0, eps=1e-5)
    found = model(ids).logits
    assert found.shape == (2, 11, 64)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=BOUND * float(expected.abs().max()))
    # A planted error is far outside: the bound can fail.
    wrong = toys.restate(model.state_dict(), ids, names, layers=2, heads=4, theta=520.0, eps=1e-5)
    assert (found - wrong).abs().max() > 100 * BOUND * expected.abs().max()


def test_the_last_token_changes_the_first_row(toys: Any) -> None:
    model, ids = toys.llada(), toys.ids()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 61
    assert (model(ids).logits - model(other).logits)[:, 0].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_key_mask_hides_padding(dtype: torch.dtype, toys: Any) -> None:
    model, ids = toys.llada(n_kv_heads=2), toys.ids()
    mask = torch.ones(2, 11, dtype=dtype)
    mask[:, 7:] = 0
    torch.testing.assert_close(model(ids, mask).logits[:, :7], model(ids[:, :7]).logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16_and_near(toys: Any) -> None:
    model, ids = toys.llada(), toys.ids()
    exact = model(ids).logits
    found = model.to(torch.bfloat16)(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_type", "sequential"),
        ("layer_norm_type", "low_precision"),
        ("layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
        ("activation_type", "gelu"),
        ("rope", False),
        ("alibi", True),
        ("attention_layer_norm", True),
        ("scale_logits", True),
        ("clip_qkv", 8.0),
        ("num_experts", 64),
    ],
)
def test_other_mathematics_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        LLaDAConfig(**{key: value})
    assert str(caught.value) == (
        f"config.json: {key}={value!r} is not implemented here. "
        "Load the checkpoint's own code with trust_remote_code=True"
    )


def test_scaled_rotary_is_refused_and_plain_spellings_are_read() -> None:
    with pytest.raises(ModelError, match=r"rope_scaling=\{'type': 'linear', 'factor': 2\} is not implemented here"):
        LLaDAConfig(rope_scaling={"type": "linear", "factor": 2})
    assert LLaDAConfig(rope_scaling=None, rope_theta=7.0).rope_theta == 7.0
    assert LLaDAConfig(rope_parameters={"rope_type": "default", "rope_theta": 9.0}).rope_theta == 9.0


def test_heads_must_divide() -> None:
    with pytest.raises(ModelError, match=r"config.json: width 4096, 32 heads and 5 key heads do not divide"):
        LLaDAConfig(n_kv_heads=5)


def test_unknown_keys_are_kept_and_both_spellings_of_the_mask_are_read() -> None:
    assert LLaDAConfig(init_fn="mitchell").init_fn == "mitchell"
    assert LLaDAConfig(mask_id=5).mask_token_id == LLaDAConfig(mask_token_id=5).mask_token_id == 5
    assert LLaDAConfig(d_model=64, n_heads=4, mlp_hidden_size=None).mlp_hidden_size == 256
