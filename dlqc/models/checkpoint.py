"""Reading a checkpoint folder: config.json and memory-mapped safetensors, strictly.

Tensors are views of the mapped file, so that reading a folder costs no memory until a tensor is touched. Whatever is
missing, unexpected, mis-shaped, truncated or corrupt is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dlqc.errors import ModelError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: Tables that old conversions stored beside the weights; they follow from the configuration.
_DERIVED = (".rotary_emb.inv_freq",)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError("there is no config.json", where=str(folder), remedy="Give a folder with a Hugging Face model")
    return _read_json(path)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, memory-mapped; one file, or shards with an index.

    Raises:
        ModelError: no safetensors, a missing, truncated or corrupt shard, an index that does not fit its shards.
    """
    index = folder / _INDEX
    if index.is_file():
        where = _weight_map(index)
        shards = sorted(set(where.values()))
    elif (folder / _SINGLE).is_file():
        where, shards = {}, [_SINGLE]
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        raise ModelError(
            f"there is no {_SINGLE}" + (f", only {pickles[0]}, and pickle files are not read" if pickles else ""),
            where=str(folder),
            remedy="Convert the checkpoint to safetensors" if pickles else "Download the checkpoint again",
        )
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors |= _read_shard(folder / shard)
    for name, shard in where.items():
        if name not in tensors:
            raise ModelError(
                f"tensor {name!r} is not in the shard, though the index says so",
                where=str(folder / shard),
                remedy="Download the checkpoint again",
            )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_DERIVED)}


def check_names(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, ties: Mapping[str, str]) -> None:
    """Refuse tensors that do not fit the model's.

    Args:
        ties: name -> name of the tensor that it shares; the first may be absent, and must be equal where it is there.
    """
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors and name not in ties]
    if missing:
        raise ModelError(f"{_some(missing)} missing", where=str(folder), remedy="Download the checkpoint again")
    unexpected = [name for name in tensors if name not in wanted]
    if unexpected:
        raise ModelError(
            f"{_some(unexpected)} unexpected", where=str(folder), remedy="The configuration does not fit the weights"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(
                f"is {list(tensor.shape)}, the configuration says {list(wanted[name].shape)}",
                where=name,
                remedy="The configuration does not fit the weights",
            )
    for name, source in ties.items():
        if name in tensors and source in tensors and not torch.equal(tensors[name], tensors[source]):
            raise ModelError(
                f"differs from {source}, to which the configuration ties it",
                where=name,
                remedy="Correct tie_word_embeddings in config.json",
            )


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more) are" if len(names) > 1 else " is"
    return f"tensor {names[0]!r}{more}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"not valid JSON ({error})", where=str(path), remedy="Copy the file again") from error
    if not isinstance(found, dict):
        raise ModelError("holds no JSON object", where=str(path), remedy="Copy the file again")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ModelError("has no weight_map", where=str(index), remedy="Download the checkpoint again")
    outside: Iterable[object] = (shard for shard in where.values() if Path(str(shard)).name != shard)
    for shard in outside:
        raise ModelError(
            f"names the shard {shard!r}, which lies outside the folder",
            where=str(index),
            remedy="Do not trust this checkpoint",
        )
    return where


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError("the shard is missing", where=str(path), remedy="Download the checkpoint again")
    try:
        with safe_open(path, "pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"the shard is corrupt or truncated ({error})", where=str(path), remedy="Download it again"
        ) from error
