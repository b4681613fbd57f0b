"""Loading models: the bundled one, a local folder, a Hub id, or a module that is there already.

Native classes are built without memory and take their tensors from the memory-mapped safetensors files, so an 8B model costs
nothing until it is touched. Loading is strict: a missing, unexpected, mis-shaped, truncated or corrupt tensor is an
error that names it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dlqc.errors import ModelError
from dlqc.models.bidirectional import Bidirectional
from dlqc.models.shims import remote_code_shims

BUNDLED = "tiny-llada"
_INDEX = "model.safetensors.index.json"


def register() -> None:
    """Make transformers' Auto classes know the native ones. Safe to call again."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    from dlqc.models.dream import DreamConfig, DreamModel
    from dlqc.models.llada import LLaDAConfig, LLaDAModelLM

    for config, model in ((LLaDAConfig, LLaDAModelLM), (DreamConfig, DreamModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForMaskedLM.register(config, model, exist_ok=True)


def _native() -> dict[str, tuple[type[Any], type[Any]]]:
    from dlqc.models.dream import DreamConfig, DreamModel
    from dlqc.models.llada import LLaDAConfig, LLaDAModelLM

    return {"llada": (LLaDAConfig, LLaDAModelLM), "Dream": (DreamConfig, DreamModel)}


def load_model(
    source: str | Path | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    meta: bool = False,
    bidirectional: bool | None = None,
) -> nn.Module:
    """Load a masked diffusion model.

    Args:
        source: "tiny-llada" (bundled), a local folder, a Hub id, or a module (returned as it is).
        dtype: of the weights; the checkpoint's own where None.
        trust_remote_code: run the checkpoint's own Python code instead of the native class.
        meta: no weights at all, for `plan` and `capture`.
        bidirectional: make a causal decoder see every position; None decides by the configuration (it names a mask token).

    Raises:
        ModelError: the folder, configuration or a tensor is missing or wrong; the message names it.
    """
    if isinstance(source, nn.Module):
        return source
    folder = find_folder(source)
    config = read_config(folder)
    kind = str(config.get("model_type", ""))
    with _quiet():
        register()
        if kind in _native() and not trust_remote_code:
            model = _load_native(folder, config, kind, dtype, meta)
        else:
            model = _load_transformers(folder, config, dtype, meta, trust_remote_code, bidirectional)
    model.dlqc_source = str(folder)  # type: ignore[assignment]
    return model.eval()


def load_tokenizer(source: str | Path | nn.Module) -> Any:
    """The tokenizer of a model or folder, or None where there is none."""
    if isinstance(source, nn.Module):
        known = getattr(source, "tokenizer", None)
        if known is not None or getattr(source, "dlqc_source", None) is None:
            return known
        source = str(source.dlqc_source)
    folder = find_folder(source)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    with _quiet():
        register()
        return AutoTokenizer.from_pretrained(folder)


def find_folder(source: str | Path) -> Path:
    """The local folder of a model; a Hub id is downloaded."""
    if str(source) == BUNDLED:
        return Path(str(files("dlqc") / "data" / BUNDLED))
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ModelError(
            "there is no such folder", where=str(source), remedy=f"Give a folder, a Hub id, or {BUNDLED!r}"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.py", "*.model"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and the system's errors
        raise ModelError(
            f"cannot be downloaded ({type(error).__name__})",
            where=str(source),
            remedy="Check the name and the network, or give a local folder",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError("there is no config.json", where=str(folder), remedy="Give a folder with a Hugging Face model")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"not valid JSON ({error})", where=str(path), remedy="Copy the file again") from error
    return found


def _load_native(folder: Path, data: dict[str, Any], kind: str, dtype: torch.dtype | None, meta: bool) -> nn.Module:
    config_class, model_class = _native()[kind]
    skipped = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")
    config = config_class(**{k: v for k, v in data.items() if k not in skipped})
    config.architectures = data.get("architectures")
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    if meta:
        stored = getattr(torch, str(data.get("dtype", data.get("torch_dtype", "bfloat16"))), torch.bfloat16)
        return model.to(dtype or stored)
    tensors = read_tensors(folder)
    _check_names(model, tensors, folder)
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings and hasattr(model, "lm_head"):
        model.lm_head.weight = model.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    return model.requires_grad_(False)


def _check_names(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = dict(model.state_dict())
    tied = set(getattr(model, "_tied_weights_keys", {}) or {}) if model.config.tie_word_embeddings else set()  # type: ignore[union-attr]
    missing = [name for name in wanted if name not in tensors and name not in tied]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(
            f"tensor {missing[0]!r} is missing{more}", where=str(folder), remedy="Download the checkpoint again"
        )
    unexpected = [name for name in tensors if name not in wanted]
    if unexpected:
        raise ModelError(
            f"tensor {unexpected[0]!r} is unexpected",
            where=str(folder),
            remedy="The configuration does not fit the weights",
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(
                f"is {list(tensor.shape)}, the configuration says {list(wanted[name].shape)}",
                where=name,
                remedy="The configuration does not fit the weights",
            )


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, memory-mapped; single file, or shards with an index."""
    index = folder / _INDEX
    if index.is_file():
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
    elif (folder / "model.safetensors").is_file():
        where, shards = {}, ["model.safetensors"]
    else:
        raise ModelError("there are no model.safetensors", where=str(folder), remedy="Download the checkpoint again")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors |= _read_shard(folder / shard)
    for name, shard in where.items():
        if name not in tensors:
            raise ModelError(f"tensor {name!r} is not in it, though the index says so", where=str(folder / shard))
    return tensors


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError("the shard is missing", where=str(path), remedy="Download the checkpoint again")
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  safe_open is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"the shard is corrupt or truncated ({error})", where=str(path), remedy="Download it again"
        ) from error


def _load_transformers(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    meta: bool,
    trust_remote_code: bool,
    bidirectional: bool | None,
) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    names = [str(name) for name in config.get("architectures") or []]
    remote = trust_remote_code and bool(config.get("auto_map"))
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if causal and not remote:
        wanted = config.get("mask_token_id") is not None if bidirectional is None else bidirectional
        if not wanted:
            raise ModelError(
                f"{names[0]} is a causal decoder, not a denoiser",
                where=str(folder),
                remedy="Pass bidirectional=True (and mask_id= to compile) to make it see every position",
            )
    auto: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    if remote:
        mapped = config["auto_map"]
        auto = next(
            (a for a in (AutoModelForMaskedLM, AutoModelForCausalLM, AutoModel) if a.__name__ in mapped), AutoModel
        )
    try:
        with remote_code_shims() if remote else _nothing():
            if meta:
                found = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
                with torch.device("meta"):
                    model: nn.Module = auto.from_config(found, trust_remote_code=remote)
            else:
                model = auto.from_pretrained(folder, dtype=dtype or "auto", trust_remote_code=remote)
    except ModelError:
        raise
    except Exception as error:  # transformers and remote code raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"transformers cannot load it ({type(error).__name__}: {first})",
            where=str(folder),
            remedy="Check the folder; trust_remote_code=True runs the checkpoint's own code",
        ) from error
    return Bidirectional(model) if causal and not remote else model


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that hold NaN or Inf, naming the tensor and how many."""
    for name, tensor in tensors:
        if tensor.device.type == "meta" or not tensor.is_floating_point():
            continue
        # A sum is finite unless an element is not (or it overflows, which the exact count then clears).
        if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ModelError(
                f"{bad} of {tensor.numel()} weights are NaN or Inf",
                where=name,
                remedy="The checkpoint is damaged; get it again",
            )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the screen; errors still raise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
