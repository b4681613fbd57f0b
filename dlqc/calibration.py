"""Calibration for diffusion: text becomes denoising states, states get token weights.

A denoiser never sees clean text at run time: it sees a canvas of which a part is [MASK]. A `StateSampler` draws such states
from token rows; a `TokenWeight` says how much each token counts in every statistic. Both are frozen dataclasses, and any
sampler goes with any weight and any method.

    Clean                 nothing masked: what tools for autoregressive models do
    ForwardProcess        t ~ U(0, 1), each token masked with probability t (LLaDA, eq. 1); optionally the response only
    MaskedSimulation      MCS of Quant-dLLM (arXiv 2510.03274, section 3.1): a visible prefix of ⌊γL⌋ tokens, then each token
                          masked with probability t on a grid of timesteps t = 1/T … 1

    Uniform               c = 1
    Certainty             CGQ of DLLMQuant (arXiv 2508.14090, eq. 10): c = base + slope·confidence if masked, else `visible`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, RecipeError


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
        t: float32 [S], mask probability of each state.
        weights: float32 [S, L], token weights, by the row of the model's output that predicts the token (for a model with
            shifted logits that is one to the left); mean 1.
        source: what they were made from.
    """

    ids: torch.Tensor
    clean: torch.Tensor
    t: torch.Tensor
    weights: torch.Tensor
    source: str

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def batches(self, size: int) -> Iterator[slice]:
        for start in range(0, self.ids.shape[0], size):
            yield slice(start, min(start + size, self.ids.shape[0]))


@dataclass(frozen=True)
class StateSampler:
    """Base of the state samplers. `sample` maps clean rows [R, L] to (masked [R, L] bool, t [R])."""

    name: ClassVar[str]

    def sample(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        raise TypeError(f"{type(self).__name__} does not define sample()")


@dataclass(frozen=True)
class Clean(StateSampler):
    """No token is masked."""

    name: ClassVar[str] = "clean"

    def sample(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(rows, dtype=torch.bool), torch.zeros(rows.shape[0])


@dataclass(frozen=True)
class ForwardProcess(StateSampler):
    """LLaDA's forward process: t ~ U(0, 1), stratified over the rows; each token of the response masked with probability t.

    Options:
        prompt: share of each row, from its start, that is prompt and never masked.
    """

    name: ClassVar[str] = "forward_process"
    prompt: float = 0.0

    def __post_init__(self) -> None:
        _check_share(self.prompt, "forward_process.prompt")

    def sample(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        count, length = rows.shape
        order = torch.randperm(count, generator=generator)
        t = (order + torch.rand(count, generator=generator)) / count
        masked = torch.rand(count, length, generator=generator) < t[:, None]
        masked[:, : math.floor(self.prompt * length + 1e-9)] = False
        return masked, t


@dataclass(frozen=True)
class MaskedSimulation(StateSampler):
    """Masked calibration simulation (MCS): visible prefix ⌊γL⌋, timestep grid t = 1/T … T/T, linear schedule.

    The paper sums over all T timesteps of every row; one timestep a row, dealt evenly over the rows, estimates the same sum
    without bias at 1/T of the cost.

    Options:
        prefix: γ, share of the row that is always visible. timesteps: T.
    """

    name: ClassVar[str] = "masked_simulation"
    prefix: float = 0.25
    timesteps: int = 20

    def __post_init__(self) -> None:
        _check_share(self.prefix, "masked_simulation.prefix")
        if self.timesteps < 1:
            raise RecipeError(
                f"{self.timesteps} timesteps are none", where="masked_simulation.timesteps", remedy="Use 20"
            )

    def sample(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        count, length = rows.shape
        order = torch.randperm(count, generator=generator).double()
        # One offset for all rows: every timestep gets its share of them, up to one row, and none is favoured.
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        level = ((order + offset) * self.timesteps / count).floor().clamp(max=self.timesteps - 1)
        t = ((level + 1) / self.timesteps).float()
        masked = torch.rand(count, length, generator=generator) < t[:, None]
        masked[:, : math.floor(self.prefix * length + 1e-9)] = False
        return masked, t


def _check_share(share: float, where: str) -> None:
    if not 0.0 <= share < 1.0:
        raise RecipeError(f"{share} is outside [0, 1)", where=where, remedy="Give the share of the row, such as 0.25")


@dataclass(frozen=True)
class TokenWeight:
    """Base of the token weights: c [S, L] from which tokens are masked and how sure the model is of them."""

    name: ClassVar[str]
    needs_confidence: ClassVar[bool] = False

    def weigh(self, masked: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not define weigh()")


@dataclass(frozen=True)
class Uniform(TokenWeight):
    """Every token counts the same."""

    name: ClassVar[str] = "uniform"

    def weigh(self, masked: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor:
        return torch.ones(masked.shape)


@dataclass(frozen=True)
class Certainty(TokenWeight):
    """Certainty-guided weights: masked tokens count base + slope·confidence, visible ones `visible`.

    DLLMQuant's constants are 0.7 for visible and 1 times the token's score for masked tokens.
    """

    name: ClassVar[str] = "certainty"
    needs_confidence: ClassVar[bool] = True
    visible: float = 0.7
    base: float = 0.0
    slope: float = 1.0

    def weigh(self, masked: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor:
        if confidence is None:
            raise CalibrationError("certainty weights need the model's confidences", where="weight")
        return torch.where(masked, self.base + self.slope * confidence, torch.tensor(self.visible))


SAMPLERS: tuple[type[StateSampler], ...] = (Clean, ForwardProcess, MaskedSimulation)
WEIGHTS: tuple[type[TokenWeight], ...] = (Uniform, Certainty)


def draw_states(
    rows: TokenRows,
    sampler: StateSampler,
    weight: TokenWeight,
    spec: DiffusionSpec,
    *,
    seed: int,
    logits: Callable[[torch.Tensor], torch.Tensor],
    batch: int = 8,
) -> States:
    """Draw one denoising state from each row, with its token weights (mean 1 over all tokens)."""
    generator = torch.Generator().manual_seed(seed)
    masked, t = sampler.sample(rows.ids, generator)
    ids = torch.where(masked, spec.mask_id, rows.ids)
    confidence = None
    if weight.needs_confidence:
        parts = [logits(ids[i : i + batch]) for i in range(0, ids.shape[0], batch)]
        confidence = torch.cat([torch.softmax(part.float(), dim=-1).amax(dim=-1) for part in parts])
        confidence = shift_rows(confidence) if spec.shift else confidence
    c = weight.weigh(masked, confidence)
    if spec.shift:
        # The row that predicts token i is i - 1, so the weight of token i belongs to row i - 1.
        c = torch.cat((c[:, 1:], c[:, -1:]), dim=1)
    if not bool((c >= 0).all()) or not bool(torch.isfinite(c).all()) or float(c.sum()) <= 0:
        raise CalibrationError(
            "token weights must be finite, not negative, and not all zero",
            where=weight.name,
            remedy="Check the options of the weight",
        )
    return States(ids, rows.ids, t, c / c.mean(), rows.source)


def shift_rows(values: torch.Tensor) -> torch.Tensor:
    """Move what row i - 1 says about token i to position i; row 0 stands in for position 0. values [B, L, ...]."""
    return torch.cat((values[:, :1], values[:, :-1]), dim=1)


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
    share = float(torch.bincount(ids.reshape(-1)).max()) / ids.numel()
    if share > 0.5:
        raise CalibrationError(
            f"the model's own rollouts are degenerate: {share:.0%} of the tokens are the same",
            where="calibration",
            remedy="Give text with calibration=",
        )
    return TokenRows(ids, f"the model's own rollouts ({rows} rows, data-free)")
