"""The facts about a masked diffusion model that neither its weights nor its graph tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dlqc.errors import ModelError, nearest

AttentionClass = Literal["full", "block-causal", "prefix"]


@dataclass(frozen=True)
class DiffusionSpec:
    """What a sampler, a calibration sampler and a metric must know about a model.

    Attributes:
        mask_id: token id of [MASK].
        vocab_size: number of rows of the logits (at least every token id + 1).
        max_length: longest sequence the model was made for, in tokens.
        eos_id: end-of-text token, if any.
        pad_id: padding token, if any.
        shift: True if row i of the logits predicts token i + 1 (models made from an autoregressive one); the row that
            predicts position i is then i - 1, and row 0 stands in for position 0.
        attention: class of the attention mask that the model declares.
    """

    mask_id: int
    vocab_size: int
    max_length: int
    eos_id: int | None = None
    pad_id: int | None = None
    shift: bool = False
    attention: AttentionClass = "full"

    def __post_init__(self) -> None:
        known = get_args(AttentionClass)
        if self.attention not in known:
            raise ModelError(
                f"{self.attention!r} is no class of attention",
                where="spec.attention",
                remedy=nearest(self.attention, known),
            )
