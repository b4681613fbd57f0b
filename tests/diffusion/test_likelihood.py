from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlqc.diffusion.intervals import mean_interval, t_quantile, wilson
from dlqc.diffusion.likelihood import RATIOS, NllTable, log_likelihood, masked_nll, nelbo, paired_difference
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError

Model = Callable[[Tensor], Tensor]


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(0, 10, (6, 32), generator=torch.Generator().manual_seed(0))


def uniform(ids: Tensor) -> Tensor:
    return torch.full((*ids.shape, 11), 3.0)


class Recorder:
    """A model that keeps what it was asked."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.seen: list[Tensor] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.seen.append(ids.clone())
        return self.model(ids)


@pytest.mark.parametrize("measure", [masked_nll, nelbo])
def test_a_uniform_model_costs_log_v(measure: Callable[..., NllTable], rows: Tensor, spec: DiffusionSpec) -> None:
    table = measure(uniform, rows, spec)
    assert table.values.shape == (6, 8)
    assert table.ratios == RATIOS == (0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375)
    assert torch.allclose(table.values, torch.tensor(math.log(11), dtype=torch.float64), rtol=0, atol=1e-15)
    assert table.nelbo.mean == pytest.approx(math.log(11), abs=1e-14)


def test_values_are_the_mean_cross_entropy_at_masked_positions(
    toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec
) -> None:
    recorder = Recorder(toy(0))
    table = masked_nll(recorder, rows, spec, ratios=(0.25, 0.5), repeats=2, batch_size=6)
    assert len(recorder.seen) == 4
    for level, ratio in enumerate((0.25, 0.5)):
        for row in range(6):
            total = 0.0
            for state in recorder.seen[2 * level : 2 * level + 2]:
                hidden = (state[row] == 10).nonzero().flatten().tolist()
                assert len(hidden) == ratio * 32
                logits = toy(0)(state)[row]
                losses = [-float(logits[i].log_softmax(-1)[rows[row, i]]) for i in hidden]
                total += sum(losses) / len(losses) / 2
            assert float(table.values[row, level]) == pytest.approx(total, rel=1e-12)


def test_masks_are_the_same_for_every_model_and_batch_size(
    toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec
) -> None:
    for measure in (masked_nll, nelbo):
        a, b = Recorder(toy(0)), Recorder(toy(1))
        one = measure(a, rows, spec, seed=3, batch_size=6)
        torch.manual_seed(99)
        two = measure(b, rows, spec, seed=3, batch_size=4)
        assert torch.equal(torch.cat(a.seen), torch.cat(b.seen))
        assert one.masks == two.masks
        assert one.masks != measure(uniform, rows, spec, seed=4).masks
        assert torch.equal(one.values, measure(toy(0), rows, spec, seed=3, batch_size=1).values)


def test_a_mask_ratio_has_the_same_masks_alone_and_in_company(rows: Tensor, spec: DiffusionSpec) -> None:
    a, b = Recorder(uniform), Recorder(uniform)
    masked_nll(a, rows, spec, ratios=(0.5,), batch_size=6)
    masked_nll(b, rows, spec, ratios=(0.1, 0.5), batch_size=6)
    assert torch.equal(a.seen[0], b.seen[1])


def test_only_the_maskable_region_is_masked(rows: Tensor, spec: DiffusionSpec) -> None:
    region = torch.zeros_like(rows, dtype=torch.bool)
    region[:, 20:30] = True
    recorder = Recorder(uniform)
    masked_nll(recorder, rows, spec, maskable=region, ratios=(0.5,), batch_size=6)
    nelbo(recorder, rows, spec, maskable=region, batch_size=6)
    assert ((recorder.seen[0] == 10).sum(1) == 5).all()
    assert not bool(((torch.cat(recorder.seen) == 10) & ~region.repeat(9, 1)).any())


def test_nelbo_counts_are_uniform_with_one_in_each_stratum(spec: DiffusionSpec) -> None:
    rows = torch.zeros(600, 10, dtype=torch.long)
    recorder = Recorder(uniform)
    nelbo(recorder, rows, spec, levels=4, batch_size=600)
    counts = torch.stack([(state == 10).sum(1) for state in recorder.seen])
    for level in range(4):
        assert int(counts[level].min()) == math.floor(level * 2.5) + 1
        assert int(counts[level].max()) == math.ceil((level + 1) * 2.5)
    share = torch.bincount(counts.flatten(), minlength=11)[1:] / counts.numel()
    assert torch.allclose(share, torch.full((10,), 0.1), atol=0.02)


def test_nelbo_is_unbiased(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    """Against the sum over every subset of a row of 5 tokens."""
    row = torch.tensor([[1, 2, 3, 4, 5]])
    model, exact = toy(2), 0.0
    for bits in range(1, 32):
        hidden = torch.tensor([bool(bits >> i & 1) for i in range(5)])
        size = int(hidden.sum())
        logits = model(row.masked_fill(hidden, 10))[0]
        loss = float(-logits.log_softmax(-1)[hidden].gather(1, row[0, hidden][:, None]).mean())
        exact += loss / math.comb(5, size) / 5
    table = nelbo(model, row.expand(500, 5), spec, levels=4, batch_size=500)
    assert table.nelbo.low < exact < table.nelbo.high
    assert table.nelbo.high - table.nelbo.low < 0.3


def test_shifted_logits_are_shifted_back(toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec) -> None:
    shifted = DiffusionSpec(mask_id=10, vocab_size=11, max_length=64, shift=True)

    def late(ids: Tensor) -> Tensor:
        return torch.cat([toy(0)(ids)[:, 1:], uniform(ids)[:, :1].double()], 1)

    region = torch.ones_like(rows, dtype=torch.bool)
    region[:, 0] = False
    a = masked_nll(toy(0), rows, spec, maskable=region)
    b = masked_nll(late, rows, shifted, maskable=region)
    assert torch.equal(a.values, b.values)


def test_paired_difference_is_narrow_where_models_move_together(
    toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec
) -> None:
    def worse(ids: Tensor) -> Tensor:
        return toy(0)(ids) * 1.01

    a, b = masked_nll(worse, rows, spec), masked_nll(toy(0), rows, spec)
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(a.nelbo.mean - b.nelbo.mean, abs=1e-12)
    assert difference.high - difference.low < (b.nelbo.high - b.nelbo.low) / 10
    same = paired_difference(b, b)
    assert (same.mean, same.low, same.high, same.count) == (0.0, 0.0, 0.0, 6)
    assert paired_difference(a.values[:, 0], b.values[:, 0]).count == 6


def test_paired_difference_refuses_what_does_not_pair(rows: Tensor, spec: DiffusionSpec) -> None:
    message = "measured on different rows or masks. Measure both with the same rows, ratios, repeats and seed"
    with pytest.raises(FeasibilityError, match=message):
        paired_difference(masked_nll(uniform, rows, spec, seed=0), masked_nll(uniform, rows, spec, seed=1))
    with pytest.raises(FeasibilityError, match=r"values of shape \[3\] and \[4\] do not pair"):
        paired_difference(torch.zeros(3), torch.zeros(4))
    with pytest.raises(FeasibilityError, match=r"rows: 1 row gives no interval. Measure at least two rows"):
        paired_difference(torch.zeros(1), torch.zeros(1))


def test_t_interval_against_known_quantiles() -> None:
    known = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 5: 2.5705818, 30: 2.0422725, 120: 1.9799304, 500: 1.9647198}
    for freedom, value in known.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=1e-6)
    assert t_quantile(501) == pytest.approx(1.9647137, abs=1e-5)
    interval = mean_interval(torch.tensor([1.0, 2.0, 3.0]))
    assert interval.mean == 2.0
    assert interval.high - interval.mean == pytest.approx(4.3026527 / math.sqrt(3), abs=1e-6)
    assert str(interval) == "2.0000 [-0.4841, 4.4841]"


@given(total=st.integers(1, 500), data=st.data())
def test_wilson_holds_the_share_and_solves_its_equation(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    interval = wilson(right, total)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    for bound in (interval.low, interval.high):
        z = abs(right / total - bound) - 1.959963985 * math.sqrt(max(bound * (1 - bound), 0) / total)
        assert z == pytest.approx(0, abs=1e-6)


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(FeasibilityError, match=r"total: 3 right of 2. Score at least one item"):
        wilson(3, 2)


def test_log_likelihood_of_one_token_is_exact(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    model = toy(0)
    exact = float(model(torch.tensor([[1, 2, 10]]))[0, 2].log_softmax(-1)[7])
    for mc_num in (1, 5):
        assert log_likelihood(model, [1, 2], [7], spec, mc_num=mc_num) == pytest.approx(exact, rel=1e-12)


def test_log_likelihood_of_a_uniform_model_is_exact_for_stratified_counts(spec: DiffusionSpec) -> None:
    assert log_likelihood(uniform, [1], [2, 3, 4, 5], spec, mc_num=8) == pytest.approx(-4 * math.log(11), rel=1e-12)


def test_log_likelihood_masks_stratified_counts_of_the_answer_only(spec: DiffusionSpec) -> None:
    recorder = Recorder(uniform)
    first = log_likelihood(recorder, torch.tensor([1, 2, 3]), torch.tensor([4] * 8), spec, mc_num=16, batch_size=5)
    states = torch.cat(recorder.seen)
    assert [len(state) for state in recorder.seen] == [5, 5, 5, 1]
    assert not bool((states[:, :3] == 10).any())
    counts = torch.bincount((states == 10).sum(1), minlength=9)[1:]
    assert counts.sum() == 16
    assert 1 <= int(counts.min()) <= int(counts.max()) <= 3
    assert first == log_likelihood(uniform, [1, 2, 3], [4] * 8, spec, mc_num=16, batch_size=16)


def test_log_likelihood_approaches_the_exact_bound(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    model, exact = toy(5), 0.0
    answer = torch.tensor([3, 4, 5])
    for bits in range(1, 8):
        hidden = torch.tensor([bool(bits >> i & 1) for i in range(3)])
        size = int(hidden.sum())
        logits = model(torch.cat([torch.tensor([1]), answer.masked_fill(hidden, 10)])[None])[0, 1:]
        loss = float(logits.log_softmax(-1)[hidden].gather(1, answer[hidden][:, None]).sum())
        exact += loss * 3 / size / math.comb(3, size) / 3
    value = log_likelihood(model, [1], answer, spec, mc_num=1500, batch_size=1500)
    assert value == pytest.approx(exact, abs=0.3)


def test_guidance_moves_the_likelihood(toy: Callable[..., Model], spec: DiffusionSpec) -> None:
    model = toy(0)
    cond, blind = model(torch.tensor([[1, 2, 10]]))[0, 2], model(torch.tensor([[10, 10, 10]]))[0, 2]
    exact = float((blind + 1.5 * (cond - blind)).log_softmax(-1)[7])
    assert log_likelihood(model, [1, 2], [7], spec, mc_num=1, cfg_scale=0.5) == pytest.approx(exact, rel=1e-12)


def test_refusals(rows: Tensor, spec: DiffusionSpec) -> None:
    with pytest.raises(FeasibilityError, match=r"rows: row 0 has the mask token 10 at position 0"):
        masked_nll(uniform, torch.full((2, 3), 10), spec)
    with pytest.raises(FeasibilityError, match=r"repeats: 0 is less than 1. Use 1 or more"):
        nelbo(uniform, rows, spec, repeats=0)
    with pytest.raises(FeasibilityError, match=r"ratios: 0 is less than 1"):
        masked_nll(uniform, rows, spec, ratios=())
    with pytest.raises(FeasibilityError, match=r"maskable: a torch.bool tensor of shape \[1, 2\] for rows \[6, 32\]"):
        nelbo(uniform, rows, spec, maskable=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(FeasibilityError, match=r"maskable: row 0 has no maskable token"):
        nelbo(uniform, rows, spec, maskable=torch.zeros(6, 32, dtype=torch.bool))
    with pytest.raises(ModelError, match=r"the loss of row 0 at mask ratio 0.0625 is not finite. Check the model"):
        masked_nll(lambda ids: torch.full((*ids.shape, 11), torch.nan), rows, spec)
    with pytest.raises(FeasibilityError, match=r"answer: the answer is empty. Give at least one token"):
        log_likelihood(uniform, [1], [], spec)
    with pytest.raises(FeasibilityError, match=r"mc_num 0 and batch_size 32. Use 1 or more of each"):
        log_likelihood(uniform, [1], [2], spec, mc_num=0)
    with pytest.raises(FeasibilityError, match=r"prompt \+ answer: row 0 has the mask token"):
        log_likelihood(uniform, [1, 10], [2], spec)
