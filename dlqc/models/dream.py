"""Dream: a Qwen2.5 made bidirectional (Ye et al. 2025, arXiv 2508.15487), with Dream-Coder and DiffuCoder.

Native class with the checkpoint's names and keys: `model.embed_tokens`, `model.layers.{i}.self_attn.{q,k,v,o}_proj`
(q, k, v with bias, grouped keys), `mlp.{gate,up,down}_proj`, `input_layernorm`, `post_attention_layernorm`,
`model.norm`, `lm_head`.

The logits are raw: row i predicts token i + 1, as in the autoregressive model it came from. Samplers and calibration
shift (`DiffusionSpec.shift`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dlqc.models.llada import check_heads, plain_rope, refuse
from dlqc.models.rotary import rotary_attention, rotary_tables


class DreamConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Qwen2's configuration keys, and the mask token."""

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int = 4,
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        mask_token_id: int = 151666,
        pad_token_id: int = 151643,
        tie_word_embeddings: bool = False,
        hidden_act: str = "silu",
        **kwargs: Any,
    ) -> None:
        if hidden_act != "silu":
            raise refuse("hidden_act", hidden_act)
        if kwargs.get("use_sliding_window"):
            raise refuse("use_sliding_window", True)
        if kwargs.get("partial_rotary_factor") not in (1.0, None):
            raise refuse("partial_rotary_factor", kwargs["partial_rotary_factor"])
        rope_theta = plain_rope(rope_theta, kwargs)
        check_heads(hidden_size, num_attention_heads, num_key_value_heads)
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings, self.rms_norm_eps = max_position_embeddings, rms_norm_eps
        self.rope_theta, self.mask_token_id, self.hidden_act = rope_theta, mask_token_id, hidden_act
        kwargs.setdefault("use_cache", False)
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)


class _Attention(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.head_dim = d // config.num_attention_heads
        d_kv = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d_kv)
        self.v_proj = nn.Linear(d, d_kv)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(
        self, y_BLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = self.q_proj(y_BLD), self.k_proj(y_BLD), self.v_proj(y_BLD)
        mixed: torch.Tensor = self.o_proj(rotary_attention(q, k, v, self.head_dim, cos, sin, mask))
        return mixed


class _Mlp(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, y_BLD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(y_BLD)) * self.up_proj(y_BLD))
        return out


class _Layer(nn.Module):
    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_BLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos, sin, mask)
        out: torch.Tensor = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return out


class _Model(nn.Module):
    """The checkpoint's `model.` level."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DreamModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Dream with its head. `forward(input_ids [B, L])` gives raw logits [B, L, V]: row i predicts token i + 1."""

    config_class = DreamConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  the form transformers wants

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = _Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> MaskedLMOutput:
        """Args: input_ids int64 [B, L]; attention_mask [B, L], nonzero where a key may be seen."""
        x_BLD = self.model.embed_tokens(input_ids)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rotary_tables(input_ids.shape[1], head_dim, self.config.rope_theta, input_ids.device)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for layer in self.model.layers:
            x_BLD = layer(x_BLD, cos, sin, mask)
        return MaskedLMOutput(logits=self.lm_head(self.model.norm(x_BLD)))

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.embed_tokens
        return found

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.lm_head
        return found

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
