"""What the Hub code of LLaDA, Dream and LLaDA2 needs to run under transformers 5.

| model | what breaks | shim |
|---|---|---|
| LLaDA | the base configuration lost `use_cache`; `post_init` may never run, so `all_tied_weights_keys` is missing | defaults on the base classes |
| Dream, LLaDA2, LLaDA-MoE | `ROPE_INIT_FUNCTIONS["default"]` is gone | registered again |
| LLaDA2 | `is_torch_fx_available` is gone from `transformers.utils.import_utils` | a function that says yes |
| several | `_tied_weights_keys` is a list, transformers 5 wants a dict | seen as one that ties nothing |

The context manager puts everything back on exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ABSENT = object()


def _default_rope(config: Any, device: torch.device | None = None, **_: Any) -> tuple[torch.Tensor, float]:
    """Plain rotary frequencies 1/theta^(2i/d), [d/2], and the attention factor 1."""
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = getattr(config, "rope_theta", None) or parameters.get("rope_theta", 10000.0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * getattr(config, "partial_rotary_factor", 1.0))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / dim
    return 1.0 / theta**exponents, 1.0


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

    if not hasattr(transformers.PretrainedConfig, "use_cache"):
        put(transformers.PretrainedConfig, "use_cache", False)
    if not hasattr(transformers.PreTrainedModel, "all_tied_weights_keys"):
        put(transformers.PreTrainedModel, "all_tied_weights_keys", {})
    if not hasattr(import_utils, "is_torch_fx_available"):
        put(import_utils, "is_torch_fx_available", lambda: True)
    added = "default" not in ROPE_INIT_FUNCTIONS
    if added:
        ROPE_INIT_FUNCTIONS["default"] = _default_rope
    original = transformers.PreTrainedModel.get_expanded_tied_weights_keys

    def expanded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(self, "_tied_weights_keys", None), list):
            return {}
        return original(self, *args, **kwargs)

    put(transformers.PreTrainedModel, "get_expanded_tied_weights_keys", expanded)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()
        if added:
            ROPE_INIT_FUNCTIONS.pop("default", None)
