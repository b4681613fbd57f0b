from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlqc.diffusion.fidelity import fidelity
from dlqc.diffusion.likelihood import log_likelihood, masked_nll
from dlqc.diffusion.masking import (
    apply_mask,
    bernoulli_mask,
    check_clean,
    check_ids,
    derived_seed,
    device_of,
    fixed_count_mask,
    generator,
    logits_of,
    ratio_mask,
    stratified_t,
)
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_fast_dllm import FastDLLMSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError


def test_logits_of_takes_tensors_and_outputs(spec: DiffusionSpec) -> None:
    logits = torch.randn(2, 3, 11)
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert logits_of(lambda _: logits, ids, spec) is logits
    assert logits_of(lambda _: SimpleNamespace(logits=logits), ids, spec) is logits


def test_a_model_that_counts_masks_is_told_the_ratio_of_what_is_to_be_filled(spec: DiffusionSpec) -> None:
    """By metrics and samplers alike: neither the prompt nor what may not be masked counts. Others see the ids alone."""
    told: list[float] = []

    class Counting:
        counts_masks = True

        def __call__(self, ids: Tensor, mask_ratio: Tensor) -> Tensor:
            assert mask_ratio.dtype is torch.float64
            told.extend(mask_ratio.tolist())
            return torch.eye(11)[ids.clamp(max=9)]

    rows, half = torch.arange(8)[None].repeat(2, 1), torch.arange(8).ge(4)[None].repeat(2, 1)
    fidelity(lambda ids: torch.eye(11)[ids], Counting(), rows, spec, maskable=half, ratios=(0.5,))
    masked_nll(Counting(), rows, spec, maskable=half, ratios=(0.75,))
    assert told == [0.5, 0.5, 0.75, 0.75]
    told.clear()
    log_likelihood(Counting(), rows[0, :4], rows[0, 4:], spec, mc_num=4)
    assert sorted(told) == [0.25, 0.5, 0.75, 1.0]
    told.clear()
    log_likelihood(Counting(), rows[0, :4], rows[0, 4:], spec, mc_num=1, cfg_scale=1.0)
    assert told[0] == told[1]
    for sampler in (
        LLaDASampler(gen_length=4),
        DreamSampler(gen_length=4),
        FastDLLMSampler(gen_length=4, cache="none"),
    ):
        told.clear()
        sampler.run(Counting(), rows[:1], spec)
        assert told[:2] == [1.0, 0.75], sampler
    canvas = rows[:1].clone()
    canvas[0, [1, 6]] = spec.mask_id
    told.clear()
    LLaDASampler(steps=2).fill(Counting(), canvas, spec, seed=0)
    assert told == [1.0, 0.5]


def test_logits_of_shifts_rows() -> None:
    spec = DiffusionSpec(mask_id=10, vocab_size=11, max_length=8, shift=True)
    logits = torch.randn(1, 4, 11)
    shifted = logits_of(lambda _: logits, torch.zeros(1, 4, dtype=torch.long), spec)
    assert torch.equal(shifted[0], logits[0, [0, 0, 1, 2]])


def test_logits_of_refuses_what_is_no_logits(spec: DiffusionSpec) -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ModelError, match=r"the model returned str, which is no tensor and has no .logits"):
        logits_of(lambda _: "no", ids, spec)
    with pytest.raises(ModelError, match=r"logits \[2, 1, 11\] for ids \[2, 3\]; expected \[2, 3, 11\]"):
        logits_of(lambda _: torch.zeros(2, 1, 11), ids, spec)
    with pytest.raises(ModelError, match=r"logits \[2, 3, 5\].*check spec.vocab_size"):
        logits_of(lambda _: torch.zeros(2, 3, 5), ids, spec)


@given(count=st.integers(1, 40), seed=st.integers(0, 99))
def test_stratified_t_has_one_in_each_stratum(count: int, seed: int) -> None:
    t = stratified_t(count, generator(seed), low=0.0)
    assert sorted((t * count).floor().long().tolist()) == list(range(count))


def test_stratified_t_keeps_its_range_and_refuses_others() -> None:
    t = stratified_t(1000, generator(0), low=0.1, high=0.3)
    assert 0.1 <= float(t.min())
    assert float(t.max()) < 0.3
    with pytest.raises(FeasibilityError, match=r"count: 0 mask probabilities were asked for"):
        stratified_t(0, generator(0))
    with pytest.raises(FeasibilityError, match=r"the range 0.5 to 0.2 is not inside 0 to 1"):
        stratified_t(3, generator(0), low=0.5, high=0.2)


def test_bernoulli_mask_has_the_probability_of_its_row() -> None:
    region = torch.ones(3, 20_000, dtype=torch.bool)
    region[:, :5000] = False
    t = torch.tensor([0.0, 0.3, 1.0])
    masked = bernoulli_mask(region, t, generator(1))
    assert not bool(masked[:, :5000].any())
    share = masked[:, 5000:].double().mean(1)
    assert share[0] == 0
    assert share[2] == 1
    assert abs(float(share[1]) - 0.3) < 0.015


def test_bernoulli_mask_refuses_wrong_probabilities() -> None:
    region = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(FeasibilityError, match=r"t: \[3\] mask probabilities for 2 rows"):
        bernoulli_mask(region, torch.rand(3), generator(0))
    with pytest.raises(FeasibilityError, match=r"a mask probability lies outside 0 to 1"):
        bernoulli_mask(region, torch.tensor([0.5, 1.5]), generator(0))
    with pytest.raises(FeasibilityError, match=r"maskable: a torch.int64 tensor of shape \[2, 4\]"):
        bernoulli_mask(region.long(), torch.rand(2), generator(0))


@settings(max_examples=20)
@given(rows=st.integers(1, 5), length=st.integers(1, 30), seed=st.integers(0, 99), data=st.data())
def test_fixed_count_mask_masks_exactly_the_count_inside_the_region(
    rows: int, length: int, seed: int, data: st.DataObject
) -> None:
    region = torch.rand(rows, length, generator=generator(seed)) < 0.7
    counts = torch.tensor([data.draw(st.integers(0, int(row.sum()))) for row in region])
    masked = fixed_count_mask(region, counts, generator(seed, "x"))
    assert masked.sum(1).tolist() == counts.tolist()
    assert not bool((masked & ~region).any())


def test_fixed_count_mask_is_uniform_over_positions() -> None:
    region = torch.ones(20_000, 5, dtype=torch.bool)
    masked = fixed_count_mask(region, torch.full((20_000,), 2), generator(3))
    assert torch.allclose(masked.double().mean(0), torch.full((5,), 0.4, dtype=torch.float64), atol=0.015)


def test_fixed_count_mask_refuses_impossible_counts() -> None:
    region = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(FeasibilityError, match=r"row 1 has 4 maskable tokens, 5 were to be masked"):
        fixed_count_mask(region, torch.tensor([1, 5]), generator(0))
    with pytest.raises(FeasibilityError, match=r"counts: \[1\] counts for 2 rows"):
        fixed_count_mask(region, torch.tensor([1]), generator(0))


def test_ratio_mask_rounds_and_masks_at_least_one() -> None:
    region = torch.ones(1, 40, dtype=torch.bool)
    for ratio, count in ((0.001, 1), (0.0125, 1), (0.5, 20), (0.99, 40), (1.0, 40)):
        assert int(ratio_mask(region, ratio, 0).sum()) == count


def test_ratio_mask_is_common_random_numbers() -> None:
    region = torch.ones(4, 32, dtype=torch.bool)
    torch.manual_seed(1)
    first = ratio_mask(region, 0.5, 7, 0)
    torch.manual_seed(2)
    assert torch.equal(first, ratio_mask(region, 0.5, 7, 0))
    assert not torch.equal(first, ratio_mask(region, 0.5, 8, 0))
    assert not torch.equal(first, ratio_mask(region, 0.5, 7, 1))


def test_ratio_mask_refuses_empty_rows_and_ratios() -> None:
    region = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(FeasibilityError, match=r"ratio: a mask ratio of 0 masks nothing"):
        ratio_mask(region, 0.0, 0)
    region[1] = False
    with pytest.raises(FeasibilityError, match=r"maskable: row 1 has no maskable token. Leave the row out"):
        ratio_mask(region, 0.5, 0)


def test_derived_seeds_are_fixed_for_ever() -> None:
    assert derived_seed(0, "ratio", 0.5) == 7719900952201383692
    assert derived_seed(0) != derived_seed(1)


def test_apply_mask() -> None:
    ids = torch.tensor([[1, 2, 3]])
    masked = torch.tensor([[False, True, False]])
    assert apply_mask(ids, masked, 10).tolist() == [[1, 10, 3]]
    assert ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"x: a torch.int64 tensor of shape \[3\]. Give int64 ids of shape \[B, L\]"),
        (torch.zeros(1, 3), r"a torch.float32 tensor"),
        (torch.zeros(0, 3, dtype=torch.long), "x: the batch is empty. Give at least one row"),
        (
            torch.zeros(1, 65, dtype=torch.long),
            "rows of 65 tokens, the model was made for 64. Cut the rows to 64 tokens",
        ),
        (torch.tensor([[1, 11]]), "ids from 1 to 11, the vocabulary has 11. Use the tokenizer of this model"),
        (torch.tensor([[1, 2], [3, 10]]), "row 1 has the mask token 10 at position 1"),
    ],
)
def test_check_clean_says_what_is_wrong(ids: Tensor, message: str, spec: DiffusionSpec) -> None:
    with pytest.raises(FeasibilityError, match=message):
        check_clean(ids, spec, where="x")


def test_check_ids_lets_masks_pass_and_names_the_room(spec: DiffusionSpec) -> None:
    check_ids(torch.tensor([[10, 1]]), spec, where="x")
    message = "60 with 10 to generate are 70 tokens, the model was made for 64. Use gen_length=4 or less"
    with pytest.raises(FeasibilityError, match=message):
        check_ids(torch.zeros(1, 60, dtype=torch.long), spec, where="x", more=10)


def test_device_of_asks_parameters_then_the_attribute() -> None:
    assert device_of(torch.nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(torch.nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(SimpleNamespace(device="cuda:1")) == torch.device("cuda", 1)
    assert device_of(torch.nn.ReLU()) is None
    assert device_of(lambda ids: ids) is None
