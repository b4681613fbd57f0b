from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlqc.diffusion.generate import generate
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError, RecipeError
from dlqc.models.load import load_model

Model = Callable[[Tensor], Tensor]


class Letters:
    """Tokens 0 to 9 are the letters a to j; 9 is the end and special, 10 the mask."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(ord("a") + i) for i in ids if i != 8)


class Carrier(torch.nn.Module):
    """A model that brings its tokenizer and facts along."""

    def __init__(self, model: Model, spec: DiffusionSpec) -> None:
        super().__init__()
        self.model, self.spec, self.tokenizer = model, spec, Letters()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)


def test_text_ids_and_counts_come_from_the_sampler(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    result = generate(toy(0), "abc", tokenizer=Letters(), spec=spec, gen_length=12, steps=4)
    direct = LLaDASampler(gen_length=12, steps=4).run(toy(0), torch.tensor([[0, 1, 2]]), spec, seed=0)
    assert result.ids == tuple(direct.generated[0].tolist())
    assert result.prompt_ids == (0, 1, 2)
    assert (result.nfe, result.tokens_per_forward) == (4, 3.0)
    assert result.seconds > 0
    assert str(result) == result.text


@pytest.mark.parametrize("prompt", ["abc", [0, 1, 2], torch.tensor([0, 1, 2]), torch.tensor([[0, 1, 2]])])
def test_prompts_of_every_kind(
    toy: Callable[..., Model], spec: DiffusionSpec, prompt: str | list[int] | Tensor
) -> None:
    model = Carrier(toy(0), spec)
    assert generate(model, prompt, gen_length=6).ids == generate(model, "abc", gen_length=6).ids


def test_an_empty_prompt_is_one(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    assert len(generate(Carrier(toy(0), spec), "", gen_length=6).ids) == 6
    assert generate(Carrier(toy(0), spec), [], gen_length=6).prompt_ids == ()


def test_text_stops_at_the_end_and_skips_special_tokens(spec: DiffusionSpec) -> None:
    wanted = torch.tensor([0, 8, 1, 9, 2, 9])

    def model(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(wanted, 11).double().expand(ids.shape[0], 6, 11)

    result = generate(model, "", tokenizer=Letters(), spec=spec, gen_length=6)
    assert result.ids == (0, 8, 1, 9, 2, 9)
    assert result.text == "ab"
    endless = DiffusionSpec(mask_id=10, vocab_size=11, max_length=64)
    assert generate(model, "", tokenizer=Letters(), spec=endless, gen_length=6).text == "abjcj"


def test_shifted_models_get_dreams_sampler(toy: Callable[..., Model]) -> None:
    spec = DiffusionSpec(mask_id=10, vocab_size=11, max_length=64, shift=True)
    result = generate(Carrier(toy(0), spec), "ab", gen_length=8, alg="topk_margin")
    direct = DreamSampler(gen_length=8, alg="topk_margin").run(toy(0), torch.tensor([[0, 1]]), spec, seed=0)
    assert result.ids == tuple(direct.generated[0].tolist())


def test_options_override_the_sampler_and_the_seed_counts(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    model, sampler = Carrier(toy(0), spec), LLaDASampler(gen_length=8, temperature=1.0)
    assert generate(model, "a", sampler=sampler, steps=2).nfe == 2
    assert generate(model, "a", sampler=sampler, seed=1).ids == generate(model, "a", sampler=sampler, seed=1).ids
    assert generate(model, "a", sampler=sampler, seed=1).ids != generate(model, "a", sampler=sampler, seed=2).ids


def test_the_bar_changes_nothing(
    toy: Callable[..., Model], spec: DiffusionSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Carrier(toy(0), spec)
    quiet = generate(model, "ab", gen_length=8)
    assert capsys.readouterr().out == ""
    assert generate(model, "ab", gen_length=8, progress=True).ids == quiet.ids


def test_refusals(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    model = Carrier(toy(0), spec)
    with pytest.raises(RecipeError, match=r"genlength: LLaDASampler has no such option. Did you mean 'gen_length'\?"):
        generate(model, "a", genlength=8)
    with pytest.raises(FeasibilityError, match=r"prompt: a tensor of shape \[2, 3\] is not one prompt"):
        generate(model, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(FeasibilityError, match=r"1 with 128 to generate are 129 tokens.*Use gen_length=63 or less"):
        generate(model, "a")
    with pytest.raises(ModelError, match=r"tokenizer: the model brings no tokenizer. Give tokenizer=, or a prompt"):
        generate(torch.nn.Linear(2, 2), "a", spec=spec)


def test_the_bundled_model_brings_everything_along() -> None:
    model = load_model("tiny-llada")
    result = generate(model, "back 40271=17204<|endoftext|>back 58213=", gen_length=5, steps=5)
    assert result.text.isdigit()
    assert result.text[:2] == "31"
    assert (len(result.ids), result.nfe) == (5, 5)
