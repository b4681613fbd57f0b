"""Denoising states have the statistics they promise; bad text is refused with a reason."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dlqc.calibration import (
    BlockStates,
    Certainty,
    Clean,
    ForwardProcess,
    MaskedSimulation,
    Rollout,
    StateSampler,
    TokenRows,
    TokenWeight,
    Uniform,
    draw_states,
    rollout_rows,
    rows_from,
    shift_rows,
)
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, RecipeError

VOCAB, MASK, EOS = 50, 49, 48
SPEC = DiffusionSpec(MASK, VOCAB, 64, eos_id=EOS)
SHIFTED = DiffusionSpec(MASK, VOCAB, 64, eos_id=EOS, shift=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int = 64, length: int = 32) -> TokenRows:
    return TokenRows(torch.randint(0, EOS, (count, length), generator=generator()), "random")


def model(ids: torch.Tensor) -> torch.Tensor:
    """Logits that depend on the whole canvas, so that a wrong one is seen."""
    table = torch.randn(VOCAB, VOCAB, generator=generator(3))
    return table[ids] + 0.1 * (ids == MASK).float().sum(1)[:, None, None] * table[0]


def states(sampler: StateSampler, weight: TokenWeight | None = None, spec: DiffusionSpec = SPEC, **options: Any) -> Any:
    given = options.pop("given", rows())
    return draw_states(given, sampler, weight or Uniform(), spec, seed=options.pop("seed", 0), logits=model, **options)


# Samplers


def test_forward_process_masks_a_share_of_about_t() -> None:
    masked, t = ForwardProcess().sample(torch.zeros(400, 200, dtype=torch.int64), generator())
    # Five standard deviations of a binomial share of 200.
    assert bool(((masked.float().mean(1) - t).abs() <= 5 * (t * (1 - t) / 200).sqrt() + 0.01).all())
    # t is stratified: one in each of 400 intervals.
    assert torch.equal((t * 400).floor().sort().values, torch.arange(400.0))
    assert not torch.equal((t * 400).floor(), torch.arange(400.0))


def test_forward_process_leaves_the_prompt_visible() -> None:
    masked, t = ForwardProcess(prompt=0.5).sample(torch.zeros(200, 41, dtype=torch.int64), generator())
    assert not bool(masked[:, :20].any())
    assert abs(float(masked[:, 20:].float().mean() - t.mean())) < 0.05
    assert bool(masked[:, 20].any())


@pytest.mark.parametrize("count", [40, 64, 7])
def test_masked_simulation_has_a_prefix_and_a_grid(count: int) -> None:
    sampler = MaskedSimulation(prefix=0.25, timesteps=20)
    masked, t = sampler.sample(torch.zeros(count, 32, dtype=torch.int64), generator())
    assert not bool(masked[:, :8].any())
    assert bool(masked[:, 8].any())
    level = t * 20
    torch.testing.assert_close(level, level.round())
    assert bool(((level.round() >= 1) & (level.round() <= 20)).all())
    shares = torch.bincount(level.round().long(), minlength=21)[1:]
    assert int(shares.max() - shares.min()) <= 1
    assert bool(masked[t == 1][:, 8:].all())


def test_masked_simulation_favours_no_timestep_when_there_are_few_rows() -> None:
    """Fewer rows than timesteps still reach over the whole grid, and every timestep comes up as often."""
    sampler = MaskedSimulation(timesteps=20)
    drawn = torch.cat([sampler.sample(torch.zeros(8, 4), generator(seed))[1] for seed in range(400)])
    shares = torch.bincount((drawn * 20).round().long(), minlength=21)[1:] / len(drawn)
    assert float((shares - 0.05).abs().max()) < 0.02
    assert abs(float(drawn.mean()) - 0.525) < 0.01
    one = sampler.sample(torch.zeros(8, 4), generator(5))[1]
    assert float(one.max() - one.min()) > 0.8


def test_masked_simulation_masks_a_share_of_about_t() -> None:
    masked, t = MaskedSimulation(prefix=0.0, timesteps=4).sample(torch.zeros(40, 500), generator())
    assert float((masked.float().mean(1) - t).abs().max()) < 0.12


@pytest.mark.parametrize(
    ("sampler", "prompt"),
    [
        (Clean(), 0),
        (ForwardProcess(prompt=0.5), 16),
        (MaskedSimulation(prefix=0.25), 8),
        (BlockStates(8, prompt=0.25), 8),
        (Rollout(steps=8, prompt=0.25, temperature=4.0), 8),
    ],
)
def test_mask_ratios_are_those_behind_the_prompt(sampler: StateSampler, prompt: int) -> None:
    drawn = states(sampler)
    assert drawn.prompt == prompt
    assert not bool((drawn.ids[:, :prompt] == MASK).any())
    expected = [sum(int(token) == MASK for token in row[prompt:]) / (32 - prompt) for row in drawn.ids]
    assert drawn.mask_ratio(MASK).tolist() == expected


def test_clean_masks_nothing() -> None:
    found = states(Clean())
    assert torch.equal(found.ids, found.clean)
    assert torch.equal(found.t, torch.zeros(64))


@pytest.mark.parametrize("sampler", [ForwardProcess(), MaskedSimulation()])
def test_states_differ_from_the_text_only_where_masked(sampler: StateSampler) -> None:
    given = rows()
    found = states(sampler, given=given)
    hidden = found.ids != given.ids
    assert bool((found.ids[hidden] == MASK).all())
    assert 0.2 < float(hidden.float().mean()) < 0.8
    assert torch.equal(found.clean, given.ids)
    assert found.source == "random"
    assert found.tokens == 64 * 32
    assert torch.equal(states(sampler, given=given).ids, found.ids)
    assert not torch.equal(states(sampler, given=given, seed=1).ids, found.ids)


def test_batches_cover_all_states_once() -> None:
    found = states(Clean())
    assert [(s.start, s.stop) for s in found.batches(30)] == [(0, 30), (30, 60), (60, 64)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardProcess(prompt=1.0), r"^forward_process\.prompt: 1\.0 is outside \[0, 1\)\. Give the share"),
        (lambda: ForwardProcess(prompt=-0.1), r"^forward_process\.prompt: -0\.1 is outside"),
        (lambda: MaskedSimulation(prefix=1.5), r"^masked_simulation\.prefix: 1\.5 is outside \[0, 1\)"),
        (lambda: MaskedSimulation(timesteps=0), r"^masked_simulation\.timesteps: 0 timesteps are none\. Use 20$"),
    ],
)
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


# Weights


def test_uniform_weights_are_one() -> None:
    for spec in (SPEC, SHIFTED):
        assert torch.equal(states(ForwardProcess(), spec=spec).weights, torch.ones(64, 32))


@pytest.mark.parametrize("spec", [SPEC, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("weight", [Uniform(), Certainty(), Certainty(0.2, 0.1, 3.0)])
def test_weights_have_mean_one(spec: DiffusionSpec, weight: TokenWeight) -> None:
    assert float(states(ForwardProcess(), weight, spec).weights.double().mean()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("batch", [7, 64])
def test_certainty_is_its_formula(batch: int) -> None:
    weight = Certainty(visible=0.7, base=0.1, slope=2.0)
    found = states(ForwardProcess(), weight, batch=batch)
    confidence = model(found.ids).double().softmax(-1).amax(-1)
    c = torch.where(found.ids == MASK, 0.1 + 2.0 * confidence, 0.7)
    torch.testing.assert_close(found.weights.double(), c / c.mean(), rtol=1e-5, atol=0)


def test_shifted_logits_move_confidence_and_weight_to_the_predicting_row() -> None:
    found = states(ForwardProcess(), Certainty(), SHIFTED)
    # Row i - 1 of the logits is about token i; so confidence of token i is read there, and its weight goes there.
    confidence = model(found.ids).double().softmax(-1).amax(-1)
    c = torch.empty(64, 32, dtype=torch.float64)
    for i in range(32):
        c[:, i] = torch.where(found.ids[:, i] == MASK, confidence[:, max(i - 1, 0)], 0.7)
    by_row = torch.stack([c[:, min(i + 1, 31)] for i in range(32)], dim=1)
    torch.testing.assert_close(found.weights.double(), by_row / by_row.mean(), rtol=1e-5, atol=0)


def test_shift_rows() -> None:
    assert shift_rows(torch.tensor([[1, 2, 3, 4]])).tolist() == [[1, 1, 2, 3]]
    assert shift_rows(torch.arange(6).reshape(1, 3, 2)).tolist() == [[[0, 1], [0, 1], [2, 3]]]


def test_certainty_without_confidences_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^weight: certainty weights need the model's confidences$"):
        Certainty().weigh(torch.ones(1, 2, dtype=torch.bool), None)


@pytest.mark.parametrize(
    "weight", [Certainty(visible=-1.0), Certainty(0.0, 0.0, 0.0), Certainty(base=math.nan), Certainty(slope=math.inf)]
)
def test_useless_weights_are_refused(weight: Certainty) -> None:
    message = r"^certainty: token weights must be finite, not negative, and not all zero\. Check the options"
    with pytest.raises(CalibrationError, match=message):
        states(ForwardProcess(), weight)


def test_bases_cannot_be_used() -> None:
    with pytest.raises(TypeError, match=r"StateSampler does not define sample\(\)"):
        StateSampler().sample(torch.zeros(1, 1), generator())
    with pytest.raises(TypeError, match=r"TokenWeight does not define weigh\(\)"):
        TokenWeight().weigh(torch.zeros(1, 1), None)


# Rows


class Letters:
    """One token a character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(c) % 40 for c in text]}


def take(data: Any, **options: Any) -> TokenRows:
    return rows_from(data, **({"tokenizer": Letters(), "spec": SPEC, "length": 8} | options))


def test_documents_are_joined_with_the_end_token_and_cut() -> None:
    found = take(["abcde", "", "  ", "fghijklmno"])
    stream = [*(ord(c) % 40 for c in "abcde"), EOS, *(ord(c) % 40 for c in "fghijklmno"), EOS]
    assert found.ids.reshape(-1).tolist() == stream[:16]
    assert found.ids.shape == (2, 8)
    assert found.ids.dtype is torch.int64
    assert found.source == "4 texts"


def test_without_an_end_token_nothing_is_put_between() -> None:
    found = take(["abcd", "efgh"], spec=DiffusionSpec(MASK, VOCAB, 64))
    assert found.ids.tolist() == [[ord(c) % 40 for c in "abcdefgh"]]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_read_by_documents(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc\n<|doc|>\ndefghijkl")
    found = take(kind(path))
    assert found.ids.reshape(-1).tolist() == [*(ord(c) % 40 for c in "abc"), EOS, *(ord(c) % 40 for c in "defg")]
    assert found.source == "text.txt"


def test_a_text_is_a_text() -> None:
    assert take("word " * 100).source == "a text"
    assert take("x" * 5000).ids.shape == (625, 8)


def test_rows_are_no_longer_than_the_model_takes() -> None:
    assert take("x" * 200, length=500).ids.shape == (3, 64)


@pytest.mark.parametrize("data", ["", "  \n ", [], ["", " "]])
def test_empty_text(data: Any) -> None:
    with pytest.raises(CalibrationError, match=r"^calibration: the text is empty\. Give at least a few pages of text$"):
        take(data)


def test_too_short() -> None:
    message = r"^calibration: the text has 4 tokens, which do not fill one row of 8\. Give at least 8 tokens, or set"
    with pytest.raises(CalibrationError, match=message):
        take("abc")


@pytest.mark.parametrize("data", [Path("nowhere"), Path("nowhere.bin"), "nowhere.txt", "folder/nowhere.jsonl"])
def test_no_such_file(data: Any) -> None:
    with pytest.raises(
        CalibrationError, match=r"nowhere\S*: there is no such file\. Give a text file, texts, or token"
    ):
        take(data)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_bytes(b"\xff\xfe\x00\x81" * 10)
    with pytest.raises(CalibrationError, match=r"weights\.txt: the file is not UTF-8 text\. Give a text file"):
        take(path)


def test_no_tokenizer() -> None:
    message = r"^calibration: text was given but the model has no tokenizer\. Give token ids \[rows, length\], or load"
    with pytest.raises(CalibrationError, match=message):
        take("some text that is long enough", tokenizer=None)


def test_the_tokenizer_of_another_model() -> None:
    with pytest.raises(CalibrationError, match=r"token ids reach from \d+ to 39, the vocabulary from 0 to 29\. Encode"):
        take("\x27 some text that is long enough", spec=DiffusionSpec(29, 30, 64))


@pytest.mark.parametrize("length", [0, -3])
def test_rows_of_nothing(length: int) -> None:
    with pytest.raises(
        CalibrationError, match=rf"^calibration: rows of {length} tokens hold nothing\. Use length=128$"
    ):
        take("some text", length=length)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(3, dtype=torch.int64), r"torch\.int64\[3\]"),
        (torch.zeros(2, 3), r"torch\.float32\[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.bool), r"torch\.bool\[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.complex64), r"torch\.complex64\[2, 3\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"torch\.int64\[2, 0\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int32), r"torch\.int32\[1, 2, 3\]"),
    ],
)
def test_ids_of_the_wrong_type_or_shape(ids: torch.Tensor, said: str) -> None:
    message = (
        rf"^calibration: token ids must be integers \[rows, length\], not {said}\. Give a tensor of int64 with two"
    )
    with pytest.raises(CalibrationError, match=message):
        take(ids)


@pytest.mark.parametrize(("bad", "low", "high"), [(-1, -1, 0), (VOCAB, 0, VOCAB)])
def test_ids_outside_the_vocabulary(bad: int, low: int, high: int) -> None:
    message = rf"^calibration: token ids reach from {low} to {high}, the vocabulary from 0 to 49\. Encode the text with"
    with pytest.raises(CalibrationError, match=message):
        take(torch.tensor([[0, bad]]))


def test_rows_too_long() -> None:
    message = r"^calibration: rows have 65 tokens, the model takes 64\. Cut the rows to 64 tokens or fewer$"
    with pytest.raises(CalibrationError, match=message):
        take(torch.zeros(2, 65, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_are_taken_as_they_are(dtype: torch.dtype) -> None:
    found = take(torch.tensor([[0, EOS], [3, MASK]], dtype=dtype), tokenizer=None)
    assert found.ids.tolist() == [[0, EOS], [3, MASK]]
    assert found.ids.dtype is torch.int64
    assert found.source == "2 rows of token ids"


# Rollouts


def test_rollouts_are_drawn_from_the_model() -> None:
    """A model that knows each token's successor: rollouts follow it, are complete, and repeat with the seed."""
    sharp = torch.full((VOCAB,), -30.0)
    sharp[[3, 4, 5]] = torch.tensor([0.0, 0.0, math.log(2.0)])
    found = rollout_rows(lambda ids: sharp.expand(*ids.shape, VOCAB), SPEC, rows=40, length=32, seed=0)
    assert found.ids.shape == (40, 32)
    share = torch.bincount(found.ids.reshape(-1), minlength=VOCAB) / found.ids.numel()
    torch.testing.assert_close(share[3:6], torch.tensor([0.25, 0.25, 0.5]), rtol=0, atol=0.05)
    assert float(share[3:6].sum()) == 1
    assert found.source == "the model's own rollouts (40 rows, data-free)"


def test_rollouts_commit_an_equal_share_each_step_and_keep_it() -> None:
    seen: list[torch.Tensor] = []

    def watch(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return model(ids)

    found = rollout_rows(watch, SPEC, rows=4, length=32, seed=0, steps=8)
    assert [int((ids == MASK).sum(1)[0]) for ids in seen] == [32, 28, 24, 20, 16, 12, 8, 4]
    for earlier, later in zip(seen, [*seen[1:], found.ids], strict=True):
        done = earlier != MASK
        assert torch.equal(later[done], earlier[done])
    assert not bool((found.ids == MASK).any())


def test_rollouts_of_shifted_logits_read_the_row_before() -> None:
    def by_row(ids: torch.Tensor) -> torch.Tensor:
        """Row i wants token i + 1."""
        out = torch.full((*ids.shape, VOCAB), -50.0)
        for i in range(ids.shape[1]):
            out[:, i, i + 1] = 50.0
        return out

    assert rollout_rows(by_row, SHIFTED, rows=2, length=8, seed=0).ids.tolist() == [[1, 1, 2, 3, 4, 5, 6, 7]] * 2
    assert rollout_rows(by_row, SPEC, rows=2, length=8, seed=0).ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2


@pytest.mark.parametrize(("length", "steps"), [(100, 16), (5, 16), (7, 3)])
def test_rollouts_are_complete_at_any_number_of_steps(length: int, steps: int) -> None:
    found = rollout_rows(model, SPEC, rows=17, length=length, seed=0, steps=steps)
    assert found.ids.shape == (17, min(length, 64))
    assert not bool((found.ids == MASK).any())
    again = rollout_rows(model, SPEC, rows=17, length=length, seed=0, steps=steps)
    other = rollout_rows(model, SPEC, rows=17, length=length, seed=1, steps=steps)
    assert torch.equal(again.ids, found.ids)
    assert not torch.equal(other.ids, found.ids)


def test_degenerate_rollouts_are_refused() -> None:
    one = torch.zeros(VOCAB)
    one[7] = 60.0
    with pytest.raises(CalibrationError, match=r"degenerate: 100% of 16 generated tokens are token 7\. Give text"):
        rollout_rows(lambda ids: one.expand(*ids.shape, VOCAB), SPEC, rows=2, length=8, seed=0)


def test_rollouts_leave_the_logits_alone() -> None:
    logits = torch.zeros(2, 8, VOCAB)
    rollout_rows(lambda ids: logits, SPEC, rows=2, length=8, seed=0)
    assert bool(torch.isfinite(logits).all())
