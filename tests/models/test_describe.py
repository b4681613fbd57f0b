"""The facts of a model, read from its configuration and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ModelError
from dlqc.models.describe import spec_of
from dlqc.models.load import find_folder, load_model

SMALL: dict[str, Any] = dict(
    vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)


def test_tiny_llada() -> None:
    assert spec_of(load_model("tiny-llada")) == DiffusionSpec(
        mask_id=2047, vocab_size=2048, max_length=512, eos_id=2041, pad_id=2041
    )


def test_rows_of_the_logits_are_the_embedding_size(toys: Any) -> None:
    spec = spec_of(toys.llada(vocab_size=61, embedding_size=64, eos_token_id=[58, 57]))
    assert (spec.vocab_size, spec.mask_id, spec.eos_id, spec.pad_id, spec.shift) == (64, 60, 58, 59, False)
    assert spec_of(toys.llada(mask_token_id=None, mask_id=5)).mask_id == 5
    assert spec_of(toys.llada(logits_shift=True)).shift


def test_a_width_is_not_a_vocabulary() -> None:
    config = AlbertConfig(**SMALL, embedding_size=16, max_position_embeddings=40)
    assert spec_of(AlbertForMaskedLM(config), mask_id=3).vocab_size == 2048


def test_rows_that_are_no_positions_do_not_count() -> None:
    roberta = RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=66))
    assert spec_of(roberta, mask_id=3).max_length == 64  # positions begin after padding id 1


def test_the_tokenizer_of_the_folder_knows_the_mask(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((find_folder("tiny-llada") / name).read_bytes())
    assert spec_of(load_model(tmp_path)).mask_id == 2047


def test_no_mask_token(toys: Any) -> None:
    with pytest.raises(ModelError) as caught:
        spec_of(toys.llada(mask_token_id=None))
    assert str(caught.value) == (
        "LLaDAModelLM: the model has no mask token. "
        "Give its id with mask_id=; a model without one is no masked diffusion model"
    )
    assert spec_of(toys.llada(mask_token_id=None), mask_id=0).mask_id == 0


@pytest.mark.parametrize("mask", [64, -1])
def test_mask_outside_the_vocabulary(mask: int, toys: Any) -> None:
    with pytest.raises(ModelError) as caught:
        spec_of(toys.llada(), mask_id=mask)
    assert str(caught.value) == (
        f"mask_id: mask id {mask} lies outside the vocabulary of 64 tokens. Give the id that the model was trained with"
    )


def test_a_plain_module_says_it_by_its_embedding_or_not_at_all() -> None:
    assert spec_of(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), mask_id=8).vocab_size == 9
    with pytest.raises(ModelError, match=r"Linear: the size of the vocabulary is unknown. Give the model a .config"):
        spec_of(nn.Linear(2, 2), mask_id=0)
