"""Calibration for diffusion: text becomes token rows, rows become denoising states, states get token weights.

A `StateSampler` (`dlqc.samplers`, `dlqc.rollout`) draws the states, a `TokenWeight` (`dlqc.token_weights`) says how much each
token counts in every statistic, and the sampler's `emphasis` how much each state counts. All are frozen dataclasses, and
any sampler goes with any weight and any method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError
from dlqc.rollout import Rollout, refuse_degenerate
from dlqc.samplers import (
    BlockStates,
    Clean,
    ForwardProcess,
    MaskedSimulation,
    StateSampler,
    Teacher,
    emphasize,
    shift_rows,
)
from dlqc.token_weights import Certainty, Frontier, SinkAware, TokenWeight, Uniform

__all__ = [
    "SAMPLERS",
    "WEIGHTS",
    "BlockStates",
    "Certainty",
    "Clean",
    "ForwardProcess",
    "Frontier",
    "MaskedSimulation",
    "Rollout",
    "SinkAware",
    "StateSampler",
    "States",
    "TokenRows",
    "TokenWeight",
    "Uniform",
    "draw_states",
    "rollout_rows",
    "rows_from",
    "shift_rows",
]


@dataclass(frozen=True)
class TokenRows:
    """Token rows to calibrate on.

    Attributes:
        ids: int64 [R, L].
        source: where they come from, for the report.
    """

    ids: torch.Tensor
    source: str


@dataclass(frozen=True)
class States:
    """Denoising states.

    Attributes:
        ids: int64 [S, L], the canvas with masks in place.
        clean: int64 [S, L], the text underneath.
        t: float32 [S], time of each state, 1 where denoising begins: its mask probability, or its mask ratio in a rollout.
        weights: float32 [S, L], token weights, by the row of the model's output that predicts the token (for a model with
            shifted logits that is one to the left); mean 1.
        source: what they were made from.
        prompt: tokens at the start of each row that are never masked.
    """

    ids: torch.Tensor
    clean: torch.Tensor
    t: torch.Tensor
    weights: torch.Tensor
    source: str
    prompt: int = 0

    def mask_ratio(self, mask_id: int) -> torch.Tensor:
        """float64 [S], the share of [MASK] among the tokens after the prompt."""
        return (self.ids[:, self.prompt :] == mask_id).double().mean(dim=1)

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def batches(self, size: int) -> Iterator[slice]:
        for start in range(0, self.ids.shape[0], size):
            yield slice(start, min(start + size, self.ids.shape[0]))


SAMPLERS: tuple[type[StateSampler], ...] = (Clean, ForwardProcess, MaskedSimulation, BlockStates, Rollout)
WEIGHTS: tuple[type[TokenWeight], ...] = (Uniform, Certainty, Frontier, SinkAware)


def draw_states(
    rows: TokenRows,
    sampler: StateSampler,
    weight: TokenWeight,
    spec: DiffusionSpec,
    *,
    seed: int,
    logits: Callable[[torch.Tensor], torch.Tensor],
    mass: Callable[[torch.Tensor], torch.Tensor] | None = None,
    batch: int = 8,
) -> States:
    """Draw one denoising state for each row, with its token weights: weight of the token × weight of the state, mean 1.

    `logits` and `mass` are the teacher's, see `Teacher`.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = Teacher(logits, spec, batch, mass)
    canvases = sampler.draw(rows.ids, generator, teacher)
    c = weight.draw(canvases, generator, teacher)
    if spec.shift:
        # The row that predicts token i is i - 1, so the weight of token i belongs to row i - 1.
        c = torch.cat((c[:, 1:], c[:, -1:]), dim=1)
    if not bool((c >= 0).all()) or not bool(torch.isfinite(c).all()) or float(c.sum()) <= 0:
        raise CalibrationError(
            "token weights must be finite, not negative, and not all zero",
            where=weight.name,
            remedy="Check the options of the weight",
        )
    c = c * emphasize(canvases.t, sampler.emphasis)[:, None]
    return States(canvases.ids, canvases.clean, canvases.t, c / c.mean(), rows.source, canvases.prompt)


def rows_from(
    data: str | Path | Sequence[str] | torch.Tensor,
    *,
    tokenizer: Any,
    spec: DiffusionSpec,
    length: int = 128,
) -> TokenRows:
    """Token rows [R, length] from a text file, texts, or token ids.

    Documents are encoded one by one, ended with the end-of-text token, joined and cut into rows; the rest that fills no row
    is dropped.
    """
    if isinstance(data, torch.Tensor):
        return _from_ids(data, spec)
    length = min(length, spec.max_length)
    if length < 1:
        raise CalibrationError(f"rows of {length} tokens hold nothing", where="calibration", remedy="Use length=128")
    if isinstance(data, str | Path):
        documents, source = _documents(data)
    else:
        documents, source = list(data), f"{len(data)} texts"
    if not any(document.strip() for document in documents):
        raise CalibrationError("the text is empty", where="calibration", remedy="Give at least a few pages of text")
    if tokenizer is None:
        raise CalibrationError(
            "text was given but the model has no tokenizer",
            where="calibration",
            remedy="Give token ids [rows, length], or load the model from a folder that holds its tokenizer",
        )
    end = [spec.eos_id] if spec.eos_id is not None else []
    ids = [
        i
        for d in documents
        if d.strip()
        for i in [*tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"], *end]
    ]
    rows = len(ids) // length
    if rows == 0:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, which do not fill one row of {length}",
            where="calibration",
            remedy=f"Give at least {length} tokens, or set a smaller length=",
        )
    return TokenRows(_inside(torch.tensor(ids[: rows * length]).reshape(rows, length), spec), source)


def _documents(data: str | Path) -> tuple[list[str], str]:
    path = Path(data)
    try:
        is_file = path.is_file()
    except OSError:  # a long text is no path
        is_file = False
    if is_file:
        try:
            return path.read_text(encoding="utf-8").split("\n<|doc|>\n"), path.name
        except UnicodeDecodeError as error:
            raise CalibrationError(
                "the file is not UTF-8 text", where=str(data), remedy="Give a text file, texts, or token ids"
            ) from error
    if isinstance(data, Path) or ("\n" not in str(data) and str(data).endswith((".txt", ".md", ".jsonl"))):
        raise CalibrationError("there is no such file", where=str(data), remedy="Give a text file, texts, or token ids")
    return [str(data)], "a text"


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _from_ids(ids: torch.Tensor, spec: DiffusionSpec) -> TokenRows:
    if ids.dim() != 2 or ids.dtype not in _INTEGERS or ids.numel() == 0:
        raise CalibrationError(
            f"token ids must be integers [rows, length], not {ids.dtype!s}{list(ids.shape)}",
            where="calibration",
            remedy="Give a tensor of int64 with two dimensions",
        )
    _inside(ids, spec)
    if ids.shape[1] > spec.max_length:
        raise CalibrationError(
            f"rows have {ids.shape[1]} tokens, the model takes {spec.max_length}",
            where="calibration",
            remedy=f"Cut the rows to {spec.max_length} tokens or fewer",
        )
    return TokenRows(ids.to(torch.int64), f"{ids.shape[0]} rows of token ids")


def _inside(ids: torch.Tensor, spec: DiffusionSpec) -> torch.Tensor:
    """The ids, if the model knows them all."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.vocab_size:
        raise CalibrationError(
            f"token ids reach from {low} to {high}, the vocabulary from 0 to {spec.vocab_size - 1}",
            where="calibration",
            remedy="Encode the text with the model's own tokenizer",
        )
    return ids


def rollout_rows(
    logits: Callable[[torch.Tensor], torch.Tensor],
    spec: DiffusionSpec,
    *,
    rows: int,
    length: int,
    seed: int,
    steps: int = 16,
) -> TokenRows:
    """Data-free rows: the model denoises empty canvases by ancestral sampling at temperature 1.

    Each step commits an equal share of the masked positions, chosen at random, with tokens drawn from the model (Austin et
    al. 2021, absorbing state). Degenerate rollouts (over half of all tokens the same) are refused.
    """
    length = min(length, spec.max_length)
    generator = torch.Generator().manual_seed(seed)
    done = []
    for start in range(0, rows, 16):
        ids = torch.full((min(16, rows - start), length), spec.mask_id, dtype=torch.int64)
        order = torch.rand(ids.shape, generator=generator).argsort(dim=1)
        for step in range(steps):
            out = logits(ids).float()
            out = shift_rows(out) if spec.shift else out
            out = out.index_fill(-1, torch.tensor([spec.mask_id]), -torch.inf)
            drawn = torch.multinomial(torch.softmax(out.reshape(-1, out.shape[-1]), -1), 1, generator=generator)
            now = (order >= step * length // steps) & (order < (step + 1) * length // steps)
            ids = torch.where(now, drawn.reshape(ids.shape), ids)
        done.append(ids)
    ids = torch.cat(done)
    refuse_degenerate(ids, "calibration", "Give text with calibration=")
    return TokenRows(ids, f"the model's own rollouts ({rows} rows, data-free)")
