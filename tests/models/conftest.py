"""Toy models, and the two architectures stated once more in float64 with plain tensor algebra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dlqc.models.dream import DreamConfig, DreamModel
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM


def toy_llada(**changes: Any) -> LLaDAModelLM:
    keys: dict[str, Any] = dict(
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=48,
        vocab_size=61,
        embedding_size=64,
        max_sequence_length=64,
        rope_theta=500.0,
        mask_token_id=60,
        eos_token_id=58,
        pad_token_id=59,
        init_std=0.3,
    )
    torch.manual_seed(0)
    return _disturbed(LLaDAModelLM(LLaDAConfig(**(keys | changes))))


def toy_dream(**changes: Any) -> DreamModel:
    keys: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=500.0,
        mask_token_id=60,
        pad_token_id=59,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return _disturbed(DreamModel(DreamConfig(**(keys | changes))))


def _disturbed(model: Any) -> Any:
    """Gains and biases that are neither one nor zero, so that leaving one out shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.3 + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def token_ids(batch: int = 2, length: int = 11, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(7))


def rewrite_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture
def llada_folder(tmp_path: Path) -> Path:
    toy_llada().save_pretrained(tmp_path / "llada")
    return tmp_path / "llada"


def names_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def restate(
    w: dict[str, torch.Tensor],
    ids: torch.Tensor,
    names: dict[str, str],
    *,
    layers: int,
    heads: int,
    theta: float,
    eps: float,
) -> torch.Tensor:
    """Logits [B, L, V] in float64. `names` maps roles to tensor names; "{i}" is the layer."""
    w = {k: v.detach().double() for k, v in w.items()}

    def at(role: str, i: int = 0) -> torch.Tensor:
        return w[names[role].format(i=i) + ".weight"]

    def project(x: torch.Tensor, role: str, i: int) -> torch.Tensor:
        bias = w.get(names[role].format(i=i) + ".bias")
        y = torch.einsum("bld,nd->bln", x, at(role, i))
        return y if bias is None else y + bias

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def rotate(x: torch.Tensor) -> torch.Tensor:
        # As complex numbers: component j of the first half is the real part, of the second half the imaginary part.
        half = x.shape[-1] // 2
        speed = torch.tensor([theta ** (-j / half) for j in range(half)], dtype=torch.float64)
        turn = torch.polar(torch.ones(x.shape[1], half, dtype=torch.float64), torch.arange(x.shape[1])[:, None] * speed)
        z = torch.complex(x[..., :half], x[..., half:]) * turn[None, :, None]
        return torch.cat((z.real, z.imag), dim=-1)

    x = at("embed")[ids]
    for i in range(layers):
        y = norm(x, at("norm1", i))
        q, k, v = (project(y, r, i).unflatten(-1, (-1, x.shape[-1] // heads)) for r in ("q", "k", "v"))
        k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
        scores = torch.einsum("bqhc,bkhc->bhqk", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(2)
        x = x + project(mixed, "o", i)
        y = norm(x, at("norm2", i))
        gate = project(y, "gate", i)
        x = x + project(gate / (1 + (-gate).exp()) * project(y, "up", i), "down", i)
    return project(norm(x, at("norm3")), "head", 0)


_BLOCK = "model.transformer.blocks.{i}."
LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "norm1": _BLOCK + "attn_norm",
    "q": _BLOCK + "q_proj",
    "k": _BLOCK + "k_proj",
    "v": _BLOCK + "v_proj",
    "o": _BLOCK + "attn_out",
    "norm2": _BLOCK + "ff_norm",
    "gate": _BLOCK + "ff_proj",
    "up": _BLOCK + "up_proj",
    "down": _BLOCK + "ff_out",
    "norm3": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}
_LAYER = "model.layers.{i}."
DREAM_NAMES = {
    "embed": "model.embed_tokens",
    "norm1": _LAYER + "input_layernorm",
    "q": _LAYER + "self_attn.q_proj",
    "k": _LAYER + "self_attn.k_proj",
    "v": _LAYER + "self_attn.v_proj",
    "o": _LAYER + "self_attn.o_proj",
    "norm2": _LAYER + "post_attention_layernorm",
    "gate": _LAYER + "mlp.gate_proj",
    "up": _LAYER + "mlp.up_proj",
    "down": _LAYER + "mlp.down_proj",
    "norm3": "model.norm",
    "head": "lm_head",
}


class Toys:
    """What tests in this folder ask for by fixture, since test folders are not packages."""

    llada = staticmethod(toy_llada)
    dream = staticmethod(toy_dream)
    ids = staticmethod(token_ids)
    names = staticmethod(names_of)
    rewrite = staticmethod(rewrite_config)
    restate = staticmethod(restate)
    llada_names = LLADA_NAMES
    dream_names = DREAM_NAMES


@pytest.fixture(scope="session")
def toys() -> type[Toys]:
    return Toys
