"""LLaDA: a bidirectional Llama that denoises (Nie et al. 2025, arXiv 2502.09992).

Native classes for LLaDA-8B Base, Instruct and 1.5, iLLaDA (grouped queries, tied head, `mask_id`) and tiny-llada.
Configuration keys and tensor names are those of the checkpoints, so the Hub's own code is not needed:

    model.transformer.wte.weight                                              [V, d]
    model.transformer.blocks.{i}.{attn_norm,ff_norm}.weight                   [d]
    model.transformer.blocks.{i}.{q_proj,k_proj,v_proj,attn_out}.weight
    model.transformer.blocks.{i}.{ff_proj,up_proj,ff_out}.weight              ff_out(silu(ff_proj(x)) · up_proj(x))
    model.transformer.ln_f.weight                                             [d]
    model.transformer.ff_out.weight                                           [V, d], absent where the head is tied

Attention sees every position; row i of the logits predicts token i.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dlqc.errors import ModelError
from dlqc.models.rotary import rotary_attention, rotary_tables

#: Keys that change the mathematics, and the values that are implemented here.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "clip_qkv": (None,),
    "multi_query_attention": (False, None),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1, None),
    "qk_layernorm": (False, None),
    "num_experts": (0, None),
    "partial_rotary_factor": (1.0, None),
}


def refuse(key: str, value: object) -> ModelError:
    """The error for a configuration key that asks for mathematics that the native classes do not have."""
    return ModelError(
        f"{key}={value!r} is not implemented here",
        where="config.json",
        remedy="Load the checkpoint's own code with trust_remote_code=True",
    )


def plain_rope(theta: float, kwargs: dict[str, Any]) -> float:
    """Rotary base, after the spellings that transformers 4 and 5 give it are taken out of `kwargs`.

    Raises:
        ModelError: the configuration asks for scaled frequencies.
    """
    for key in ("rope_scaling", "rope_parameters"):
        given = kwargs.pop(key, None) or {}
        if given.get("rope_type", given.get("type", "default")) != "default":
            raise refuse(key, given)
        theta = given.get("rope_theta", theta)
    return float(theta)


def check_heads(width: int, heads: int, kv_heads: int) -> None:
    """Refuse heads that do not divide the width, or key heads that do not divide the heads."""
    if width % heads or heads % kv_heads:
        raise ModelError(
            f"width {width}, {heads} heads and {kv_heads} key heads do not divide",
            where="config.json",
            remedy="Copy the file again",
        )


class LLaDAConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration with LLaDA's own keys. Unknown keys are kept; keys that ask for other mathematics are refused."""

    model_type = "llada"
    attribute_map = {  # noqa: RUF012  the form transformers wants
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = 12288,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        include_bias: bool = False,
        include_qkv_bias: bool = False,
        mask_token_id: int | None = None,
        mask_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for key, values in _IMPLEMENTED.items():
            if key in kwargs and kwargs[key] not in values:
                raise refuse(key, kwargs[key])
        rope_theta = plain_rope(rope_theta, kwargs)
        self.d_model, self.n_layers, self.n_heads = d_model, n_layers, n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_heads(d_model, n_heads, self.n_kv_heads)
        self.mlp_hidden_size = kwargs.get("mlp_ratio", 4) * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.max_sequence_length, self.rope_theta, self.rms_norm_eps = max_sequence_length, rope_theta, rms_norm_eps
        self.weight_tying, self.include_bias, self.include_qkv_bias = weight_tying, include_bias, include_qkv_bias
        self.mask_token_id = mask_id if mask_token_id is None else mask_token_id
        kwargs["tie_word_embeddings"] = weight_tying
        kwargs.setdefault("use_cache", False)
        super().__init__(**kwargs)


class _Block(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        d, f, bias = config.d_model, config.mlp_hidden_size, config.include_bias
        self.head_dim = d // config.n_heads
        d_kv = config.n_kv_heads * self.head_dim
        qkv_bias = bias or config.include_qkv_bias
        self.attn_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(d, d, bias=qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=qkv_bias)
        self.attn_out = nn.Linear(d, d, bias=bias)
        self.ff_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.ff_out = nn.Linear(f, d, bias=bias)

    def forward(
        self, x_BLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        x_BLD = x_BLD + self._attention(self.attn_norm(x_BLD), cos, sin, mask)
        y_BLD = self.ff_norm(x_BLD)
        out: torch.Tensor = x_BLD + self.ff_out(F.silu(self.ff_proj(y_BLD)) * self.up_proj(y_BLD))
        return out

    def _attention(
        self, y_BLD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = self.q_proj(y_BLD), self.k_proj(y_BLD), self.v_proj(y_BLD)
        mixed: torch.Tensor = self.attn_out(rotary_attention(q, k, v, self.head_dim, cos, sin, mask))
        return mixed


class _Model(nn.Module):
    """The checkpoint's `model.` level."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList([_Block(config) for _ in range(config.n_layers)]),
            "ln_f": nn.RMSNorm(config.d_model, eps=config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias)
        self.transformer = nn.ModuleDict(parts)


class LLaDAModelLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """LLaDA with its head. `forward(input_ids [B, L])` gives logits [B, L, V], V = embedding_size."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  a tied head has no tensor of its own here

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = _Model(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> MaskedLMOutput:
        """Args: input_ids int64 [B, L]; attention_mask [B, L], nonzero where a key may be seen."""
        parts = self.model.transformer
        x_BLD = parts["wte"](input_ids)
        head_dim = self.config.d_model // self.config.n_heads
        cos, sin = rotary_tables(input_ids.shape[1], head_dim, self.config.rope_theta, input_ids.device)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for block in parts["blocks"]:
            x_BLD = block(x_BLD, cos, sin, mask)
        x_BLD = parts["ln_f"](x_BLD)
        logits = F.linear(x_BLD, parts["wte"].weight) if self.config.weight_tying else parts["ff_out"](x_BLD)
        return MaskedLMOutput(logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.transformer["wte"]
        return found

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.transformer["wte" if self.config.weight_tying else "ff_out"]
        return found

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config, "init_std", 0.02)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
