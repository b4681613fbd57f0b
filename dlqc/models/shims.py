"""What the Hub code of LLaDA, Dream and LLaDA2 needs to run under transformers 5.

| model | what breaks | shim |
|---|---|---|
| LLaDA | the base configuration lost `use_cache` | a default on the base class |
| LLaDA | `post_init` may never run, so `all_tied_weights_keys` is missing | an empty one on the base class |
| Dream, LLaDA2, LLaDA-MoE | `ROPE_INIT_FUNCTIONS["default"]` is gone | registered again |
| LLaDA2 | `is_torch_fx_available` is gone from `transformers.utils.import_utils` | a function that says yes |
| several | `_tied_weights_keys` is a list, transformers 5 wants a dict | each name tied to the input embedding |
| several | an overridden `tie_weights` takes no arguments, transformers 5 gives some | `accept_arguments` |

The context manager puts everything back on exit; `keep` first leaves on the model what its forward will ask for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ABSENT = object()
#: Attributes that transformers 4 gave to every configuration.
_CONFIG_DEFAULTS: dict[str, Any] = {
    "use_cache": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _default_rope(config: Any, device: torch.device | None = None, *_: Any, **__: Any) -> tuple[torch.Tensor, float]:
    """Plain rotary frequencies 1/theta^(2i/d), [d/2], and the attention factor 1."""
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = getattr(config, "rope_theta", None) or parameters.get("rope_theta", 10000.0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * getattr(config, "partial_rotary_factor", 1.0))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / dim
    return 1.0 / theta**exponents, 1.0


def _tied_to_embedding(model: Any) -> dict[str, str]:
    """A list of tied names as transformers 5 wants it: name -> name of the input embedding's weight."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return {}
    names = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    source = next((name for name, p in names.items() if p is weight), None)
    return {} if source is None else {k: source for k in model._tied_weights_keys if k in names and k != source}


@contextmanager
def remote_code_shims() -> Iterator[None]:
    """Make transformers 5 offer what remote code written for transformers 4 asks for."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.utils import import_utils

    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        old = owner.__dict__.get(name, _ABSENT)
        setattr(owner, name, value)
        undo.append(lambda: delattr(owner, name) if old is _ABSENT else setattr(owner, name, old))

    original = transformers.PreTrainedModel.get_expanded_tied_weights_keys

    def expanded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._tied_weights_keys, list | tuple | set):
            # On the instance: the class stays as its author wrote it, and the model works after the shims are gone.
            self._tied_weights_keys = _tied_to_embedding(self)
        return original(self, *args, **kwargs)

    try:
        for name, value in _CONFIG_DEFAULTS.items():
            if not hasattr(transformers.PretrainedConfig, name):
                put(transformers.PretrainedConfig, name, value)
        if not hasattr(transformers.PreTrainedModel, "all_tied_weights_keys"):
            put(transformers.PreTrainedModel, "all_tied_weights_keys", {})
        if not hasattr(import_utils, "is_torch_fx_available"):
            put(import_utils, "is_torch_fx_available", lambda: True)
        if "default" not in ROPE_INIT_FUNCTIONS:
            ROPE_INIT_FUNCTIONS["default"] = _default_rope
            undo.append(lambda: ROPE_INIT_FUNCTIONS.__delitem__("default"))
        put(transformers.PreTrainedModel, "get_expanded_tied_weights_keys", expanded)
        yield
    finally:
        for step in reversed(undo):
            step()


def accept_arguments(model_class: type[Any]) -> None:
    """Let the class's own `tie_weights(self)` be called with the arguments that transformers 5 gives it."""
    own = model_class.__dict__.get("tie_weights")
    if own is None or len(inspect.signature(own).parameters) > 1:
        return

    @functools.wraps(own)
    def tie_weights(self: Any, *_: Any, **__: Any) -> Any:
        return own(self)

    model_class.tie_weights = tie_weights


def keep(model: nn.Module) -> None:
    """Leave on this model, inside the shims, the attributes that its forward may ask for after they are gone."""
    config: Any = model.config
    for name, value in _CONFIG_DEFAULTS.items():
        if name not in vars(config) and getattr(config, name, None) == value:
            setattr(config, name, value)
    if "all_tied_weights_keys" not in vars(model):
        model.all_tied_weights_keys = {}  # type: ignore[assignment]
