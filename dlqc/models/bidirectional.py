"""Any decoder of transformers, made bidirectional.

A causal decoder becomes a denoiser's backbone when every position sees every other. The wrapper gives the model an
all-true boolean mask [B, 1, L, L]; transformers passes a four-dimensional mask through as it is. Canonicalization finds
that the mask lets everything through at every length and drops it, so the graph has plain full attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Bidirectional(nn.Module):
    """`forward(input_ids [B, L])` gives logits [B, L, V] with full attention.

    Parameters keep the checkpoint's names below `decoder.`.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.config: Any = decoder.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        batch, length = input_ids.shape
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=input_ids.device)
        logits: torch.Tensor = self.decoder(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return logits
