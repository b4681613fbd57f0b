"""Loading models: the bundled one, a local folder, a Hub id, or a module that is there already.

Native classes are built without memory and take their tensors from the memory-mapped safetensors files, so an 8B model
costs nothing until it is touched. Loading is strict: a missing, unexpected, mis-shaped, truncated or corrupt tensor is
an error that names it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlqc.errors import ModelError, nearest
from dlqc.models.bidirectional import Bidirectional
from dlqc.models.checkpoint import check_names, read_config, read_tensors
from dlqc.models.shims import accept_arguments, keep, remote_code_shims

BUNDLED = "tiny-llada"


def register() -> None:
    """Make transformers' Auto classes know the native ones. Safe to call again."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    from dlqc.models.dream import DreamConfig, DreamModel
    from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
    from dlqc.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM

    native: tuple[Any, ...] = (
        (LLaDAConfig, LLaDAModelLM),
        (LLaDAMoEConfig, LLaDAMoEModelLM),
        (DreamConfig, DreamModel),
    )
    for config, model in native:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForMaskedLM.register(config, model, exist_ok=True)


def _native() -> dict[str, tuple[type[Any], type[Any]]]:
    from dlqc.models.dream import DreamConfig, DreamModel
    from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
    from dlqc.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM

    return {
        "llada": (LLaDAConfig, LLaDAModelLM),
        "lladamoe": (LLaDAMoEConfig, LLaDAMoEModelLM),
        "Dream": (DreamConfig, DreamModel),
    }


def _kind_of(config: dict[str, Any]) -> str:
    """The model type; copies of LLaDA-MoE spell theirs in three ways, one of them LLaDA's own."""
    kind = str(config.get("model_type", ""))
    mixture = any("LLaDAMoE" in str(name) for name in config.get("architectures") or [])
    return "lladamoe" if kind == "llada_moe" or (kind == "llada" and mixture) else kind


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
        bidirectional: make a causal decoder see every position; None decides by the configuration (it does where that
            names a mask token). Masked models are bidirectional as they are.

    Raises:
        ModelError: the folder, configuration or a tensor is missing or wrong; the message names it.
    """
    if isinstance(source, nn.Module):
        return source
    folder = find_folder(source, code=trust_remote_code)
    if (folder / "manifest.json").is_file() and (folder / "graph.json").is_file():
        raise ModelError(
            "is an artifact, compiled already",
            where=str(folder),
            remedy="Open it with dlqc.load; compile the original model",
        )
    config = read_config(folder)
    kind = _kind_of(config)
    if config.get("quantization_config"):
        raise ModelError(
            "the checkpoint is quantized already",
            where=str(folder / "config.json"),
            remedy="Give the original weights, or dlqc.load for what dlqc saved",
        )
    with _quiet():
        register()
        if trust_remote_code and config.get("auto_map"):
            model = _load_remote(folder, config, dtype, meta)
        elif kind in _native():
            model = _load_native(folder, config, kind, dtype, meta)
        else:
            model = _load_transformers(folder, config, dtype, meta, bidirectional)
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

    try:
        with _quiet():
            register()
            return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the tokenizer cannot be read ({first})", where=str(folder), remedy="Copy the tokenizer files again"
        ) from error


def find_folder(source: str | Path, *, code: bool = False) -> Path:
    """The local folder of a model; a Hub id is downloaded, its Python files only with `code`."""
    if str(source) == BUNDLED:
        return Path(str(files("dlqc") / "data" / BUNDLED))
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ModelError(
            "there is no such folder",
            where=str(source),
            remedy=f"{nearest(str(source), [BUNDLED])}; or give a folder or a Hub id owner/name",
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and the system's errors
        raise ModelError(
            f"cannot be downloaded ({type(error).__name__})",
            where=str(source),
            remedy="Check the name and the network, or give a local folder",
        ) from error


def _load_native(folder: Path, data: dict[str, Any], kind: str, dtype: torch.dtype | None, meta: bool) -> nn.Module:
    config_class, model_class = _native()[kind]
    skipped = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")
    config = config_class(**{k: v for k, v in data.items() if k not in skipped})
    config.architectures = data.get("architectures")
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    if meta:
        return model.to(dtype or _declared_dtype(data) or torch.bfloat16)
    ties = dict(getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else {}
    return _assign(model, folder, ties, dtype).requires_grad_(False)


def _declared_dtype(data: dict[str, Any]) -> torch.dtype | None:
    found = getattr(torch, str(data.get("dtype", data.get("torch_dtype"))), None)
    return found if isinstance(found, torch.dtype) else None


def _assign(model: nn.Module, folder: Path, ties: dict[str, str], dtype: torch.dtype | None) -> nn.Module:
    """Give a model without memory the tensors of its checkpoint, mapped, not copied."""
    tensors = read_tensors(folder)
    check_names(model, tensors, folder, ties)
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, source in ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
    return model


def _load_transformers(
    folder: Path, data: dict[str, Any], dtype: torch.dtype | None, meta: bool, bidirectional: bool | None
) -> nn.Module:
    """A model that transformers has a class for: a masked language model, or a decoder made bidirectional."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    causal = _is_causal(folder, data, bidirectional)
    auto: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    with _explained(folder):
        if meta:
            config = AutoConfig.from_pretrained(folder)
            with _parameters_on_meta():
                model: nn.Module = auto.from_config(config)
            kind = dtype or _declared_dtype(data)
            model = model if kind is None else model.to(kind)
        else:
            # Older models ship a pickle; transformers reads it with torch's restricted unpickler (weights only).
            pickled = not any(folder.glob("*.safetensors")) and (folder / "pytorch_model.bin").is_file()
            if not pickled:
                read_tensors(folder)  # its errors name the shard
            model, found = auto.from_pretrained(
                folder, dtype=dtype or "auto", use_safetensors=not pickled, output_loading_info=True
            )
            if found["missing_keys"]:  # transformers fills them with random numbers
                check = sorted(found["missing_keys"])
                raise ModelError(
                    f"tensor {check[0]!r} is missing ({len(check)} in all)",
                    where=str(folder),
                    remedy=f"Give a checkpoint that was saved from {type(model).__name__}",
                )
            # A checkpoint may hold parts for other tasks, as BERT's next-sentence head; they are said, not hidden.
            model.dlqc_unused = tuple(sorted(found["unexpected_keys"]))  # type: ignore[assignment]
    return Bidirectional(model) if causal else model


def _is_causal(folder: Path, data: dict[str, Any], bidirectional: bool | None) -> bool:
    """Whether the checkpoint is a decoder that has to be made bidirectional."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    names = [str(name) for name in data.get("architectures") or []]
    kind = str(data.get("model_type", ""))
    decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder:
        return False
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = " and brings code of its own" if data.get("auto_map") else ""
        raise ModelError(
            f"model type {kind!r} is no language model that transformers knows{own}",
            where=str(folder),
            remedy="Pass trust_remote_code=True if you trust that code" if own else "Give a masked model or a decoder",
        )
    declared = data.get("mask_token_id", data.get("mask_id")) is not None
    if not (declared if bidirectional is None else bidirectional):
        raise ModelError(
            f"{names[0] if names else kind} is a causal decoder, not a denoiser",
            where=str(folder),
            remedy="Pass bidirectional=True (and mask_id= to compile) to make it see every position",
        )
    return True


def _load_remote(folder: Path, data: dict[str, Any], dtype: torch.dtype | None, meta: bool) -> nn.Module:
    """The checkpoint's own Python code, called directly: the Auto classes would prefer the native ones."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    mapped: dict[str, Any] = data["auto_map"]
    entry = next((e for e in ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel") if e in mapped), None)
    if entry is None:
        raise ModelError(
            "auto_map names no model class", where=str(folder / "config.json"), remedy="Load it without its own code"
        )
    with _explained(folder), remote_code_shims():
        config_class: Any = AutoConfig
        if "AutoConfig" in mapped:
            config_class = get_class_from_dynamic_module(mapped["AutoConfig"], folder)
        model_class: Any = get_class_from_dynamic_module(mapped[entry], folder)
        accept_arguments(model_class)
        config = config_class.from_pretrained(folder)
        if str(getattr(config, "init_device", "")).startswith("cuda"):
            config.init_device = "cpu"
        with _parameters_on_meta():
            model: nn.Module = model_class(config)
        if meta:
            kind = dtype or _declared_dtype(data)
            model = model if kind is None else model.to(kind)
        else:
            ties = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
            _assign(model, folder, ties, dtype)
        keep(model)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters take no memory; buffers (rotary frequencies, position ids) get their values."""
    original = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is on meta already stays the same object, or ties would come apart.
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Whatever transformers or remote code raise becomes a ModelError, with the original as its cause."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ModelError(
            f"transformers cannot load it ({type(error).__name__}: {first})",
            where=str(folder),
            remedy="Check that config.json fits the weights and the installed transformers",
        ) from error


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
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the screen; errors still raise."""
    import transformers

    logging: Any = transformers.utils.logging
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
