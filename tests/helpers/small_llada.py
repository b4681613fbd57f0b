"""A LLaDA of two blocks with random weights."""

from __future__ import annotations

import torch

from dlqc.models.llada import LLaDAConfig, LLaDAModelLM


def small_llada(vocab: int = 61, *, tied: bool = False) -> LLaDAModelLM:
    """Width 16; the last id is [MASK]; 14 linears in its blocks."""
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=16,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=32,
        vocab_size=vocab,
        max_sequence_length=64,
        mask_token_id=vocab - 1,
        init_std=0.3,
        weight_tying=tied,
    )
    return LLaDAModelLM(config).eval()
