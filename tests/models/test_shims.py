"""Remote code written for transformers 4, one break each, loads and computes; afterwards everything is as it was.

The Python files below are written for these tests, in the manner of the Hub's.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import modeling_rope_utils
from transformers.utils import import_utils

from dlqc.errors import ModelError
from dlqc.models.load import load_model
from dlqc.models.shims import accept_arguments, remote_code_shims

CONFIGURATION = """
from transformers import PretrainedConfig

class OldConfig(PretrainedConfig):
    model_type = "MODEL_TYPE"

    def __init__(self, vocab_size=32, hidden_size=16, num_attention_heads=2, rope_theta=100.0, init_device="cuda",
                 mask_token_id=31, **kwargs):
        self.vocab_size, self.hidden_size, self.rope_theta = vocab_size, hidden_size, rope_theta
        self.num_attention_heads, self.init_device, self.mask_token_id = num_attention_heads, init_device, mask_token_id
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_old import OldConfig

if is_torch_fx_available():
    import torch.fx


class OldRotary(nn.Module):
    def __init__(self, config, device=None):
        super().__init__()
        inv_freq, self.scaling = ROPE_INIT_FUNCTIONS["default"](config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, length):
        return (torch.arange(length)[:, None] * self.inv_freq).cos() * self.scaling


class OldModel(PreTrainedModel):
    config_class = OldConfig
    _tied_weights_keys = ["head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, device=config.init_device)
        self.rotary = OldRotary(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        POST_INIT

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        assert not use_cache and self.config.pad_token_id is None
        x = self.embed(input_ids)
        return MaskedLMOutput(logits=self.head(x * self.rotary(x.shape[1]).repeat(1, 4)))
"""
IDS = torch.arange(12).view(2, 6)


def old_checkpoint(folder: Path, *, tied: bool = False, post_init: bool = True, model_type: str = "llada") -> Any:
    """A folder with remote code and weights; gives the logits that it must compute for IDS."""
    folder.mkdir(exist_ok=True)
    (folder / "configuration_old.py").write_text(CONFIGURATION.replace("MODEL_TYPE", model_type))
    (folder / "modeling_old.py").write_text(MODELING.replace("POST_INIT", "self.post_init()" if post_init else "pass"))
    auto_map = {"AutoConfig": "configuration_old.OldConfig", "AutoModel": "modeling_old.OldModel"}
    keys = {"model_type": model_type, "architectures": ["OldModel"], "auto_map": auto_map, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(keys))
    generator = torch.Generator().manual_seed(1)
    embed, head = torch.randn(32, 16, generator=generator), torch.randn(32, 16, generator=generator)
    tensors = {"embed.weight": embed} if tied else {"embed.weight": embed, "head.weight": head}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    speed = torch.tensor([100.0 ** (-j / 4) for j in range(4)])
    turn = (torch.arange(6)[:, None] * speed).cos().repeat(1, 4)
    return (embed[IDS] * turn) @ (embed if tied else head).T


@pytest.fixture(autouse=True, scope="module")
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of remote code go to a folder of the tests, not to the user's cache; one, as Python remembers where."""
    cache = str(tmp_path_factory.mktemp("modules"))
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("transformers.dynamic_module_utils"), "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [cache, *sys.path])
        yield
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def surface() -> dict[str, Any]:
    """Everything that the shims may touch."""
    return {
        "config": dict(vars(transformers.PretrainedConfig)),
        "model": dict(vars(transformers.PreTrainedModel)),
        "rope": dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS),
        "imports": dict(vars(import_utils)),
        "register": torch.nn.Module.register_parameter,
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("post_init", [False, True])
@pytest.mark.parametrize("model_type", ["llada", "old_unknown"])
def test_old_code_computes_what_it_says(tied: bool, post_init: bool, model_type: str, tmp_path: Path) -> None:
    folder = tmp_path / f"{model_type}_{tied}_{post_init}"
    expected = old_checkpoint(folder, tied=tied, post_init=post_init, model_type=model_type)
    before = surface()
    model = load_model(folder, trust_remote_code=True)
    assert surface() == before
    assert type(model).__name__ == "OldModel"
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (model.get_parameter("head.weight") is model.get_parameter("embed.weight")) is tied
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_each_break_is_real_without_the_shims(tmp_path: Path) -> None:
    """If transformers mends one of these, its shim can go."""
    assert not hasattr(transformers.PretrainedConfig(), "use_cache")
    assert "default" not in modeling_rope_utils.ROPE_INIT_FUNCTIONS
    assert not hasattr(import_utils, "is_torch_fx_available")
    assert not hasattr(transformers.PreTrainedModel, "all_tied_weights_keys")


def test_the_shims_come_off_after_an_error() -> None:
    def fail() -> None:
        with remote_code_shims():
            assert surface() != before
            raise KeyError

    before = surface()
    with pytest.raises(KeyError):
        fail()
    assert surface() == before


def test_shims_nest() -> None:
    before = surface()
    with remote_code_shims(), remote_code_shims():
        assert "default" in modeling_rope_utils.ROPE_INIT_FUNCTIONS
    assert surface() == before


def test_the_default_rope_follows_the_configuration() -> None:
    with remote_code_shims():
        rope = modeling_rope_utils.ROPE_INIT_FUNCTIONS["default"]
        config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=10000.0)
        found, scaling = rope(config, None)
        assert scaling == 1.0
        torch.testing.assert_close(found, torch.tensor([10000.0 ** (-2 * j / 16) for j in range(8)]))
        config.partial_rotary_factor = 0.5
        assert rope(config, None)[0].shape == (4,)


def test_an_old_tie_weights_takes_new_arguments() -> None:
    class Old:
        def tie_weights(self) -> str:
            return "tied"

    class New:
        def tie_weights(self, recompute_mapping: bool = True) -> bool:
            return recompute_mapping

    accept_arguments(Old)
    accept_arguments(New)
    accept_arguments(object)
    assert Old().tie_weights(missing_keys=None, recompute_mapping=False) == "tied"  # type: ignore[call-arg]
    assert New().tie_weights(recompute_mapping=False) is False


def test_remote_code_without_trust_is_never_run(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "untrusted", model_type="old_unknown")
    (tmp_path / "untrusted" / "configuration_old.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"brings code of its own. Pass trust_remote_code=True if you trust that code"):
        load_model(tmp_path / "untrusted")


def test_meta_takes_no_memory_and_keeps_buffers(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "meta")
    model = load_model(tmp_path / "meta", trust_remote_code=True, meta=True, dtype=torch.bfloat16)
    assert {(p.is_meta, p.dtype) for p in model.parameters()} == {(True, torch.bfloat16)}
    assert not model.get_buffer("rotary.inv_freq").is_meta


def test_remote_code_that_fails_says_so_and_keeps_the_cause(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "broken")
    (tmp_path / "broken" / "modeling_old.py").write_text("from transformers import NoSuchThing")
    with pytest.raises(ModelError, match=r"transformers cannot load it \(ImportError: cannot import name") as caught:
        load_model(tmp_path / "broken", trust_remote_code=True)
    assert isinstance(caught.value.__cause__, ImportError)
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "c.C"}}))
    with pytest.raises(ModelError, match=r"config.json: auto_map names no model class. Load it without its own code"):
        load_model(tmp_path / "broken", trust_remote_code=True)


def test_strictness_holds_for_remote_code_too(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "strict")
    save_file({"embed.weight": torch.zeros(32, 16)}, tmp_path / "strict" / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor 'head.weight' is missing. Download the checkpoint again"):
        load_model(tmp_path / "strict", trust_remote_code=True)
