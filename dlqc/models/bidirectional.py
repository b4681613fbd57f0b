"""Any decoder of transformers, made bidirectional.

A causal decoder becomes a denoiser's backbone when every position sees every other. The wrapper gives the model an
all-true boolean mask [B, 1, L, L]; transformers passes a four-dimensional mask through as it is, to layers with a
sliding window too. Canonicalization finds that the mask lets everything through at every length and drops it, so the
graph has plain full attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlqc.errors import ModelError

#: Kinds of layers whose only mixing of positions is an attention that takes a mask.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class Bidirectional(nn.Module):
    """`forward(input_ids [B, L])` gives logits [B, L, V] with full attention.

    Parameters keep the checkpoint's names below `decoder.`.

    Raises:
        ModelError: the decoder mixes positions by other means (recurrence, convolution, its own mask or position bias).
    """

    def __init__(self, decoder: nn.Module) -> None:
        from transformers import PreTrainedModel  # seconds to import, and not needed to load an artifact

        super().__init__()
        self.config: Any = decoder.config
        kinds = set(getattr(self.config, "layer_types", None) or ()) - set(_ATTENTION)
        replaceable = not isinstance(decoder, PreTrainedModel) or decoder._supports_attention_backend
        if kinds or not replaceable:
            what = f"has {sorted(kinds)[0]} layers" if kinds else "does not take its attention mask from outside"
            raise ModelError(
                f"{what}, so it cannot be made bidirectional",
                where=type(decoder).__name__,
                remedy="Use a decoder with softmax attention in every layer, such as Llama, Qwen or Gemma",
            )
        self.decoder = decoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Args: input_ids int64 [B, L]. Gives logits [B, L, V]."""
        batch, length = input_ids.shape
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=input_ids.device)
        logits: torch.Tensor = self.decoder(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return logits

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.decoder.get_input_embeddings()  # type: ignore[operator]
        return found

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.decoder.get_output_embeddings()  # type: ignore[operator]
        return found
