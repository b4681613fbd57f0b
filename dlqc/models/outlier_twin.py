"""Twins: copies of a model that compute the same function and have outliers that are known exactly.

What a transform against outliers (smoothing, rotation, rescaling) should undo can be tested on them: the logits must
stay, and where the outliers are is known. In each block, with a few random channels and a factor f:

    norm gain[j] · f        and the columns j of all its readers / f       (attention, feed-forward)
    rows j of v · f         and the columns of the output projection / f   (for grouped keys: of every head in the group)
    rows j of up · f        and the columns of the down projection / f

`massive_twin` uses the last of these alone, on a channel that is large for few tokens only, so that few tokens explode, as
in large models (Sun et al. 2024, arXiv 2402.17762; Lin et al. 2025, arXiv 2508.14896, find them at this very site).

Exact in real arithmetic. In floating point a power of two as factor only moves exponents: the weights are then the same to
the last bit in every dtype; with another factor the dtype of the model rounds, so use float32 or float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlqc.errors import FeasibilityError, ModelError
from dlqc.models.dream import DreamModel
from dlqc.models.llada import LLaDAModelLM


@dataclass(frozen=True)
class _Parts:
    """The modules of one block by role. Weights [out, in]; gains [d]."""

    norms: tuple[tuple[nn.Module, tuple[nn.Linear, ...]], ...]
    v: nn.Linear
    o: nn.Linear
    up: nn.Linear
    down: nn.Linear
    head_dim: int


def outlier_twin(model: nn.Module, channels: int = 3, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """A copy with planted normal outliers: channels that are `factor` times as large for every token.

    Args:
        model: native LLaDA or Dream; it is not changed.
        channels: how many at each of the four places of each block, drawn anew for each.
        factor: how much larger, finite and positive.
        seed: of the channels.

    Raises:
        ModelError: another class of model, or one without weights.
        FeasibilityError: more channels than a place has, or a factor that is no positive number.
    """
    _check_factor(factor)
    blocks = _blocks_of(model)
    least = min(m.out_features for b in blocks for m in (b.v, b.up, b.down))
    if not 0 <= channels <= least:
        raise FeasibilityError(
            f"{channels} channels, the narrowest place has {least}", where="channels", remedy="Plant fewer, such as 3"
        )
    twin = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in _blocks_of(twin):
            for norm, readers in block.norms:
                gain: Any = norm.weight
                picked = _draw(gain.shape[0], channels, rng)
                gain[picked] *= factor
                for reader in readers:
                    reader.weight[:, picked] /= factor
            _raise(block.v, block.o, _draw(block.v.out_features, channels, rng), factor, block.head_dim)
            _raise(block.up, block.down, _draw(block.up.out_features, channels, rng), factor)
    return twin


def massive_twin(model: nn.Module, ids: Tensor, *, channels: int = 1) -> nn.Module:
    """A copy with massive outliers: at the input of each down projection, `channels` channels explode on few tokens.

    Chosen are the channels whose largest value over the tokens stands out most above the 99th percentile. Each is scaled up
    by a power of two until its largest value is over twice max(100, 1000·median |X|), so that the massive entries of
    `dlqc.outliers` are there; the tokens below half of its largest value mostly are not hit. The scaled channel of all
    other tokens grows by the same factor: it may count as a normal outlier as well.

    Args:
        model: native LLaDA or Dream; it is not changed.
        ids: token ids int64 [B, L] to look for such channels on, masks in place; at least 100 tokens are wise.
        channels: how many in each block.

    Raises:
        ModelError, FeasibilityError: as for `outlier_twin`.
    """
    blocks = _blocks_of(model)
    least = min(b.down.in_features for b in blocks)
    if not 0 <= channels <= least:
        raise FeasibilityError(
            f"{channels} channels, the narrowest place has {least}", where="channels", remedy="Plant fewer, such as 1"
        )
    twin = copy.deepcopy(model)
    chosen: dict[nn.Linear, list[tuple[int, float]]] = {}

    def look(down: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        size = inputs[0].reshape(-1, inputs[0].shape[-1]).double().abs()
        largest, usual = size.amax(dim=0), size.quantile(0.99, dim=0)
        standing_out = (largest / usual.clamp(min=1e-30)).masked_fill(largest == 0, 0.0)
        goal = 2 * max(100.0, 1000 * float(size.median()))
        assert isinstance(down, nn.Linear)
        for j in standing_out.topk(channels).indices.tolist():
            chosen.setdefault(down, []).append((j, _power_of_two(goal / float(largest[j]))))

    parts = _blocks_of(twin)
    hooks = [block.down.register_forward_pre_hook(look) for block in parts]
    try:
        with torch.no_grad():
            twin(ids)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for block in parts:
            for j, factor in chosen.get(block.down, []):
                _raise(block.up, block.down, torch.tensor([j]), factor)
    return twin


def _raise(producer: nn.Linear, reader: nn.Linear, rows: Tensor, factor: float, head_dim: int | None = None) -> None:
    """Output rows of one linear times the factor, the columns that read them divided by it.

    Args:
        head_dim: where attention lies between them. Producer row h·head_dim + j is then read by every query head of group h.
    """
    producer.weight[rows] *= factor
    if producer.bias is not None:
        producer.bias[rows] *= factor
    columns = rows
    if head_dim is not None:
        repeat = reader.in_features // producer.out_features
        heads = (rows // head_dim)[:, None] * repeat + torch.arange(repeat)
        columns = (heads * head_dim + (rows % head_dim)[:, None]).flatten()
    reader.weight[:, columns] /= factor


def _draw(width: int, count: int, rng: torch.Generator) -> Tensor:
    return torch.randperm(width, generator=rng)[:count]


def _power_of_two(least: float) -> float:
    """The smallest power of two that is `least` or more, and 1 or more."""
    return 2.0 ** max(0, math.ceil(math.log2(least)))


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor > 0):
        raise FeasibilityError(f"{factor:g} is no factor", where="factor", remedy="Use a positive number, such as 32")


def _blocks_of(model: nn.Module) -> list[_Parts]:
    if isinstance(model, LLaDAModelLM):
        found = list(_llada(model.model.transformer["blocks"]))
    elif isinstance(model, DreamModel):
        found = list(_dream(model.model.layers))
    else:
        raise ModelError(
            f"no twin is known of a {type(model).__name__}",
            where="model",
            remedy="Give a native LLaDA or Dream model, without trust_remote_code",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model has no weights", where="model", remedy="Load it without meta=True")
    return found


def _llada(blocks: Iterable[Any]) -> Iterator[_Parts]:
    for b in blocks:
        norms = ((b.attn_norm, (b.q_proj, b.k_proj, b.v_proj)), (b.ff_norm, (b.ff_proj, b.up_proj)))
        yield _Parts(norms, b.v_proj, b.attn_out, b.up_proj, b.ff_out, b.head_dim)


def _dream(layers: Iterable[Any]) -> Iterator[_Parts]:
    for layer in layers:
        a, m = layer.self_attn, layer.mlp
        norms = (
            (layer.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)),
            (layer.post_attention_layernorm, (m.gate_proj, m.up_proj)),
        )
        yield _Parts(norms, a.v_proj, a.o_proj, m.up_proj, m.down_proj, a.head_dim)
