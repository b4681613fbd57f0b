"""Toy models: exact functions of the ids, so that two ways of computing agree to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlqc.diffusion.spec import DiffusionSpec

ToyMaker = Callable[..., Callable[[Tensor], Tensor]]


@pytest.fixture
def spec() -> DiffusionSpec:
    return DiffusionSpec(mask_id=10, vocab_size=11, max_length=64, eos_id=9)


@pytest.fixture
def toy() -> ToyMaker:
    """toy(seed, vocab=11, decimals=None, ban=10): logits float64 looked up by an integer hash of position and row.

    `decimals` rounds them, which makes ties; `ban` is a token that never wins.
    """

    def make(
        seed: int, vocab: int = 11, decimals: int | None = None, ban: int | None = 10
    ) -> Callable[[Tensor], Tensor]:
        rng = torch.Generator().manual_seed(seed)
        table = torch.randn(997, vocab, generator=rng, dtype=torch.float64) * 2
        if decimals is not None:
            table = table.round(decimals=decimals)
        if ban is not None:
            table[:, ban] = -40.0
        weight = torch.randint(1, 997, (64, 64), generator=rng)

        def model(ids: Tensor) -> Tensor:
            length = ids.shape[1]
            return table[((ids + 1) @ weight[:length, :length] + torch.arange(length)) % 997]

        return model

    return make
