"""From a model to the facts that samplers, calibration and metrics need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ModelError

#: Length assumed for a module that does not say what it was made for.
DEFAULT_LENGTH = 2048
#: Model types whose row i of the logits predicts token i + 1; others say it with `logits_shift` in their configuration.
SHIFTED = ("Dream", "dream", "Fast_dLLM_Qwen")


def spec_of(model: nn.Module, *, mask_id: int | None = None) -> DiffusionSpec:
    """Read the facts of a model from its configuration and tokenizer.

    Args:
        mask_id: token id of [MASK]; overrides what the configuration says.

    Raises:
        ModelError: the vocabulary or the mask token is unknown, or the mask id lies outside the vocabulary.
    """
    given = getattr(model, "spec", None)
    config = getattr(model, "config", None)
    if isinstance(given, DiffusionSpec):
        return given if mask_id is None else replace(given, mask_id=_inside(mask_id, given.vocab_size))
    rows = _vocabulary(model, config)
    mask = mask_id if mask_id is not None else _mask_of(model, config)
    if mask is None:
        raise ModelError(
            "the model has no mask token",
            where=type(model).__name__,
            remedy="Give its id with mask_id=; a model without one is no masked diffusion model",
        )
    return DiffusionSpec(
        mask_id=_inside(mask, rows),
        vocab_size=rows,
        max_length=_length(model, config),
        eos_id=_number(_first(config, "eos_token_id")),
        pad_id=_number(_first(config, "pad_token_id")),
        shift=str(getattr(config, "model_type", "")) in SHIFTED or bool(_first(config, "logits_shift")),
    )


def _inside(mask: int, rows: int) -> int:
    if not 0 <= mask < rows:
        raise ModelError(
            f"mask id {mask} lies outside the vocabulary of {rows} tokens",
            where="mask_id",
            remedy="Give the id that the model was trained with",
        )
    return int(mask)


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _number(value: Any) -> int | None:
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return None if value is None else int(value)


def _length(model: nn.Module, config: Any) -> int:
    stated = int(_first(config, "max_sequence_length", "max_position_embeddings") or DEFAULT_LENGTH)
    for name, module in model.named_modules():
        # RoBERTa counts positions from its padding index on, so the first rows of the table are no positions.
        padding: int | None = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and padding is not None:
            return min(stated, module.num_embeddings - padding - 1)
    return stated


def _vocabulary(model: nn.Module, config: Any) -> int:
    rows = _first(config, "embedding_size", "vocab_size") if _says(config, "d_model") else _first(config, "vocab_size")
    if rows is not None:
        return int(rows)
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise ModelError(
            "the size of the vocabulary is unknown",
            where=type(model).__name__,
            remedy="Give the model a .config with vocab_size, or a .spec of type dlqc.DiffusionSpec",
        )
    return embedding.num_embeddings


def _says(config: Any, name: str) -> bool:
    # ALBERT's `embedding_size` is a width; in LLaDA's configuration it is the number of rows.
    return getattr(config, name, None) is not None and getattr(config, "model_type", "") == "llada"


def _mask_of(model: nn.Module, config: Any) -> int | None:
    found = _first(config, "mask_token_id", "mask_id")
    if found is None:
        from dlqc.models.load import load_tokenizer

        found = getattr(load_tokenizer(model), "mask_token_id", None)
    return None if found is None else int(found)
