"""LLaDA-MoE: LLaDA with a mixture of experts in every layer (Zhu et al. 2025, arXiv 2509.24389).

Native class for LLaDA-MoE-7B-A1B Base and Instruct. Tensor names are those of the checkpoints, which follow OLMoE:

    model.embed_tokens.weight                                                   [V, d]
    model.layers.{i}.{input_layernorm,post_attention_layernorm}.weight          [d]
    model.layers.{i}.self_attn.{q,k,v,o}_proj.weight
    model.layers.{i}.self_attn.{q,k}_norm.weight                                [d/heads], before the rotation
    model.layers.{i}.mlp.gate.weight                                            [E, d], the router
    model.layers.{i}.mlp.experts.{e}.{gate,up,down}_proj.weight
    model.norm.weight, lm_head.weight

The router's scores are p = softmax(gate(x)) in float32; the k largest are the weights of their experts and are not
normalized again (the checkpoints' code sets `norm_topk_prob` to False whatever the configuration says, and so does this
one). Attention sees every position; row i of the logits predicts token i.

Every expert is computed at every token, and the experts that were not chosen get the weight 0. That is exact in value,
and E/k times the work: shapes do not depend on what the router says, so the graph can be captured, and every expert's
linears are ordinary ones that passes see.

Unverified, for want of the checkpoint: that q and k are normed per head (as two independent ports have it; OLMoE norms
all heads at once), the mask id, and the rotary base.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dlqc.errors import ModelError
from dlqc.models.llada import check_heads, plain_rope, refuse
from dlqc.models.rotary import rotary_attention, rotary_tables

#: Keys that change the mathematics, and the values that are implemented here.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "qk_layernorm": (True,),
    "moe_router_score_function": ("softmax", None),
    "moe_router_enable_expert_bias": (False, None),
    "router_num_group": (0, 1, None),
    "router_topk_group": (0, 1, None),
    "routed_scaling_factor": (1, None),
    "shared_expert_intermediate_size": (0, None),
    "partial_rotary_factor": (1, None),
}


class LLaDAMoEConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration with the checkpoint's keys. Unknown keys are kept; keys that ask for other mathematics are refused.

    Raises:
        ModelError: such a key, heads that do not divide the width, or more experts a token than there are.
    """

    model_type = "lladamoe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        expert_intermediate_size: int = 1024,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 50000.0,
        mask_token_id: int = 156895,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        for key, values in _IMPLEMENTED.items():
            if key in kwargs and kwargs[key] not in values:
                raise refuse(key, kwargs[key])
        if any(not layer for layer in kwargs.get("moe_layer_freq") or ()):
            raise refuse("moe_layer_freq", kwargs["moe_layer_freq"])
        rope_theta = plain_rope(rope_theta, kwargs)
        check_heads(hidden_size, num_attention_heads, num_key_value_heads)
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ModelError(
                f"{num_experts_per_tok} experts a token of {num_experts} do not exist",
                where="config.json",
                remedy="Copy the file again",
            )
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.expert_intermediate_size = expert_intermediate_size
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.max_position_embeddings, self.rms_norm_eps = max_position_embeddings, rms_norm_eps
        self.rope_theta, self.mask_token_id = rope_theta, mask_token_id
        kwargs.setdefault("use_cache", False)
        kwargs |= {"tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)


class _Attention(nn.Module):
    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.head_dim = d // config.num_attention_heads
        d_kv = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d_kv, bias=False)
        self.v_proj = nn.Linear(d, d_kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, y_BLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        q, k = self._normed(self.q_proj(y_BLD), self.q_norm), self._normed(self.k_proj(y_BLD), self.k_norm)
        mixed: torch.Tensor = self.o_proj(rotary_attention(q, k, self.v_proj(y_BLD), self.head_dim, cos, sin, mask))
        return mixed

    def _normed(self, x_BLd: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Norm over each head on its own."""
        batch, length, d = x_BLd.shape
        heads: torch.Tensor = norm(x_BLd.view(batch, length, d // self.head_dim, self.head_dim))
        return heads.reshape(batch, length, d)


class _Expert(nn.Module):
    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.expert_intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, y_BLD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(y_BLD)) * self.up_proj(y_BLD))
        return out


class _Mixture(nn.Module):
    """Σₑ wₑ(x) · expertₑ(x), with wₑ = pₑ for the k largest of p = softmax(gate(x)) and 0 for the rest."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([_Expert(config) for _ in range(config.num_experts)])

    def forward(self, y_BLD: torch.Tensor) -> torch.Tensor:
        # In float32 or wider: a rounded score may choose another expert.
        wide = torch.promote_types(y_BLD.dtype, torch.float32)
        p_BLE = F.linear(y_BLD.to(wide), self.gate.weight.to(wide)).softmax(-1)
        values, indices = p_BLE.topk(self.chosen, dim=-1)
        w_BLE = torch.zeros_like(p_BLE).scatter(-1, indices, values).to(y_BLD.dtype)
        columns = w_BLE.split(1, dim=-1)  # type: ignore[no-untyped-call]
        parts = (w_BL1 * expert(y_BLD) for w_BL1, expert in zip(columns, self.experts, strict=True))
        out: torch.Tensor = next(parts)
        for part in parts:
            out = out + part
        return out


class _Layer(nn.Module):
    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _Mixture(config)
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

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LLaDAMoEModelLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """LLaDA-MoE with its head. `forward(input_ids [B, L])` gives logits [B, L, V]: row i predicts token i."""

    config_class = LLaDAMoEConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  the form transformers wants

    def __init__(self, config: LLaDAMoEConfig) -> None:
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
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
