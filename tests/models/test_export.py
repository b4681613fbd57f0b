"""torch.export (non-strict) of every kind of model, with batch and length free, equals eager at other sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dlqc.errors import ModelError
from dlqc.models.bidirectional import Bidirectional

#: Share of the largest logit. Float32 rounds by 2^-24 = 6e-8; two layers and some amplification give a few 1e-6.
BOUND = 1e-5

SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
SMALL |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1)
GROUPED: dict[str, Any] = SMALL | dict(num_key_value_heads=2)

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=8)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=3)),
}
MASKED: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**SMALL, embedding_size=16)),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_export_equals_eager(model: nn.Module, ids: Callable[..., torch.Tensor]) -> torch.export.ExportedProgram:
    free = {0: torch.export.Dim("batch", min=1, max=32), 1: torch.export.Dim("length", min=2, max=64)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (ids(3, 9),), dynamic_shapes=(free,), strict=False)
        run = program.module()
        for batch, length in ((1, 2), (3, 9), (2, 17), (5, 64)):
            other = ids(batch, length)
            torch.testing.assert_close(logits(run, other), logits(model, other), rtol=1e-5, atol=1e-5)
    return program


@pytest.mark.parametrize("kind", ["llada", "llada-gqa", "dream"])
def test_native_models_keep_their_operations_whole(kind: str, toys: Any) -> None:
    model = {"llada": toys.llada, "llada-gqa": lambda: toys.llada(n_kv_heads=2), "dream": toys.dream}[kind]()
    program = assert_export_equals_eager(model, toys.ids)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    counted = {op: targets.count(f"aten.{op}.default") for op in ("linear", "rms_norm", "silu", "embedding")}
    assert counted == {"linear": 15, "rms_norm": 5, "silu": 2, "embedding": 1}
    attention = [n for n in program.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert len(attention) == 2
    assert {n.kwargs.get("enable_gqa", False) for n in attention} == {kind != "llada"}
    assert all(len(n.args) == 3 and n.kwargs.get("attn_mask") is None for n in attention)
    assert not program.constants


@pytest.mark.parametrize("kind", MASKED)
def test_masked_models_export(kind: str, toys: Any) -> None:
    assert_export_equals_eager(built(MASKED[kind]), toys.ids)


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_made_bidirectional_export_and_see_everything(kind: str, toys: Any) -> None:
    model = Bidirectional(built(DECODERS[kind])).eval()
    assert_export_equals_eager(model, toys.ids)
    with torch.no_grad():
        # Every position changes every row: a causal or a windowed mask would leave rows as they were.
        ids = toys.ids(1, 12)
        for at in range(12):
            other = ids.clone()
            other[0, at] = (other[0, at] + 1) % 61
            moved = (model(ids) - model(other))[0].abs().amax(-1)
            assert moved.min() > 1e-6, f"position {at} does not reach row {int(moved.argmin())}"


def test_a_bidirectional_llama_is_the_llama_without_its_mask(toys: Any) -> None:
    """The names differ from LLaDA's, the mathematics does not."""
    decoder = built(DECODERS["llama"])
    names = {
        "embed": "model.embed_tokens",
        "norm1": "model.layers.{i}.input_layernorm",
        "q": "model.layers.{i}.self_attn.q_proj",
        "k": "model.layers.{i}.self_attn.k_proj",
        "v": "model.layers.{i}.self_attn.v_proj",
        "o": "model.layers.{i}.self_attn.o_proj",
        "norm2": "model.layers.{i}.post_attention_layernorm",
        "gate": "model.layers.{i}.mlp.gate_proj",
        "up": "model.layers.{i}.mlp.up_proj",
        "down": "model.layers.{i}.mlp.down_proj",
        "norm3": "model.norm",
        "head": "lm_head",
    }
    ids = toys.ids()
    expected = toys.restate(decoder.state_dict(), ids, names, layers=2, heads=4, theta=10000.0, eps=1e-6)
    found = Bidirectional(decoder)(ids)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=BOUND * float(expected.abs().max()))


def test_parameters_keep_their_names_below_decoder() -> None:
    decoder = built(DECODERS["qwen3"])
    assert set(Bidirectional(decoder).state_dict()) == {f"decoder.{name}" for name in decoder.state_dict()}
    assert Bidirectional(decoder).get_output_embeddings() is decoder.get_output_embeddings()  # type: ignore[operator]
    assert Bidirectional(decoder).get_input_embeddings() is decoder.get_input_embeddings()  # type: ignore[operator]


def test_other_ways_of_mixing_positions_are_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(
        ModelError, match=r"MambaForCausalLM: .* so it cannot be made bidirectional. Use a decoder with"
    ):
        Bidirectional(mamba)
    with pytest.raises(ModelError, match=r"BloomForCausalLM: does not take its attention mask from outside, so it"):
        Bidirectional(bloom)
