"""Tiny random models of every class that transforms must work on, and their captures.

    ZOO["qwen3"]()        a fresh model, always the same one: two or three layers, float32, evaluation mode
    captured("qwen3")     its (graph, weights, spec): a fresh copy of a capture that is made once a process
    model("qwen3")        the model of that capture, whose tensors the weights are: never change it

Nothing is at its neutral value: gains differ from one, biases from zero, so that a transform that forgets one shows.
Widths are powers of two in some and 3·2ⁿ or 7·2ⁿ in others; feed-forward widths are 12·2ⁿ; heads are grouped, and of
a width that is not d/heads, in some; heads of the vocabulary are tied in some.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import fx, nn

from dlqc.capture import Captured, capture
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.graph import copy_graph
from dlqc.models.bidirectional import Bidirectional
from dlqc.models.describe import spec_of
from dlqc.models.dream import DreamConfig, DreamModel
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from dlqc.weights import Weights

VOCAB, MASK, LENGTH = 61, 60, 64


def disturbed(model: nn.Module, *, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Matrices of size 1/√fan-in, biases of size 0.3, gains of size 0.3 around `gain`."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensor.data = noise / tensor.shape[-1] ** 0.5
        else:
            tensor.data = 0.3 * noise + (0.0 if name.endswith("bias") else gain)
    return model.eval()


def llada() -> nn.Module:
    config = LLaDAConfig(
        d_model=64,
        n_layers=3,
        n_heads=4,
        mlp_hidden_size=96,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        mask_token_id=MASK,
    )
    return disturbed(LLaDAModelLM(config))


def llada_biased() -> nn.Module:
    """Grouped keys, a bias on every linear, a tied head, 3·2ⁿ wide."""
    config = LLaDAConfig(
        d_model=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        mlp_hidden_size=96,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        mask_token_id=MASK,
        include_bias=True,
        weight_tying=True,
    )
    return disturbed(LLaDAModelLM(config))


def _sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "mask_token_id": MASK,
    } | changes


def dream() -> nn.Module:
    """Grouped keys, biases on q, k and v, logits shifted by one; 3·2ⁿ wide."""
    return disturbed(DreamModel(DreamConfig(**_sizes(hidden_size=48, pad_token_id=0))))


def llada_moe() -> nn.Module:
    """Two of six experts a token; norms on the heads of q and k; grouped keys."""
    sizes = _sizes(hidden_size=32, expert_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
    del sizes["intermediate_size"]
    return disturbed(LLaDAMoEModelLM(LLaDAMoEConfig(**sizes)))


def _decoder(name: str, *, gain: float = 1.0, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**_sizes(**changes))
    return disturbed(Bidirectional(getattr(transformers, f"{name}ForCausalLM")(config)), gain=gain)


def llama() -> nn.Module:
    """A bias on every linear of the blocks."""
    return _decoder("Llama", attention_bias=True, mlp_bias=True)


def qwen2() -> nn.Module:
    """Biases on q, k and v; a tied head; 7·2ⁿ wide."""
    return _decoder("Qwen2", hidden_size=56, tie_word_embeddings=True)


def qwen3() -> nn.Module:
    """Norms on the heads of q and k; heads together wider than the residual stream."""
    return _decoder("Qwen3", hidden_size=32, head_dim=16)


def gemma() -> nn.Module:
    """Gains written as 1 + w, scaled embeddings, one key head, a tied head; 3·2ⁿ wide."""
    return _decoder("Gemma", gain=0.0, hidden_size=48, head_dim=16, num_key_value_heads=1)


def bert() -> nn.Module:
    """Layer norms behind the sums, learned positions, a tied head behind a transform of its own; 3·2ⁿ wide."""
    sizes = _sizes(hidden_size=48)
    del sizes["num_key_value_heads"]
    return disturbed(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))


def gpt2() -> nn.Module:
    """Weights stored transposed, q, k and v in one, learned positions, a spelled-out GELU, a tied head."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_inner=96,
        mask_token_id=MASK,
        bos_token_id=0,
        eos_token_id=0,
    )
    return disturbed(Bidirectional(transformers.GPT2LMHeadModel(config)))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "llada": llada,
    "llada-biased": llada_biased,
    "dream": dream,
    "llada-moe": llada_moe,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "bert": bert,
    "gpt2": gpt2,
}


@functools.cache
def _made(name: str) -> tuple[nn.Module, Captured, DiffusionSpec]:
    made = ZOO[name]()
    spec = spec_of(made)
    return made, capture(made, spec), spec


def model(name: str) -> nn.Module:
    """The model that `captured(name)` captured. Shared: read it, never change it."""
    return _made(name)[0]


def captured(name: str) -> tuple[fx.Graph, Weights, DiffusionSpec]:
    """Graph in normal form, weights and facts of one of ZOO: copies that a test may rewrite."""
    _, found, spec = _made(name)
    return copy_graph(found.graph), found.weights.clone(), spec
