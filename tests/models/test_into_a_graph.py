"""From a folder to a graph: what load_model gives is captured, remote code included, and costs no memory."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dlqc.capture import capture, verify
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ModelError
from dlqc.graph import LINEAR, RMS_NORM, SDPA, is_call
from dlqc.models.describe import spec_of
from dlqc.models.load import load_model
from dlqc.ops import ROPE

CONFIGURATION = """
from transformers import PretrainedConfig

class FarConfig(PretrainedConfig):
    model_type = "far"

    def __init__(self, vocab_size=32, hidden_size=16, num_attention_heads=2, rope_theta=100.0, mask_token_id=31,
                 max_position_embeddings=64, **kwargs):
        self.vocab_size, self.hidden_size, self.rope_theta = vocab_size, hidden_size, rope_theta
        self.num_attention_heads, self.mask_token_id = num_attention_heads, mask_token_id
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)
"""
MODELING = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_far import FarConfig


class FarNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        with torch.autocast(enabled=False, device_type=x.device.type):
            kind = x.dtype
            x = x.to(torch.float32)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * x.to(kind)


def rotate_half(x):
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-high, low), dim=-1)


class FarModel(PreTrainedModel):
    config_class = FarConfig
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        d = config.hidden_size
        self.embed, self.norm, self.qkv = nn.Embedding(config.vocab_size, d), FarNorm(d), nn.Linear(d, 2 * d)
        self.o, self.drop = nn.Linear(d, d, bias=False), nn.Dropout(0.1)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        frequencies, self.scaling = ROPE_INIT_FUNCTIONS["default"](config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        # post_init is not called

    def forward(self, input_ids, attention_mask=None, past=None, use_cache=None):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        x = self.embed(input_ids)
        b, length, d = x.shape
        q, k, v = self.qkv(self.norm(x)).split((d, d // 2, d // 2), dim=-1)
        q = q.view(b, length, 2, -1).transpose(1, 2)
        k, v = (y.view(b, length, 1, -1).transpose(1, 2) for y in (k, v))
        angles = torch.outer(torch.arange(length, dtype=self.inv_freq.dtype), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        q, k = (y * angles.cos() + rotate_half(y) * angles.sin() for y in (q, k))
        k, v = (y[:, :, None].expand(b, 1, 2, length, d // 2).reshape(b, 2, length, d // 2) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=False)
        x = x + self.drop(self.o(y.transpose(1, 2).contiguous().view(b, length, d)))
        logits = self.lm_head(x)
        return CausalLMOutputWithPast(logits=logits, past_key_values=(k, v) if use_cache else None)
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with code written for transformers 4; its copies stay out of the user's cache."""
    folder, cache = tmp_path_factory.mktemp("far"), str(tmp_path_factory.mktemp("modules"))
    (folder / "configuration_far.py").write_text(CONFIGURATION)
    (folder / "modeling_far.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_far.FarConfig", "AutoModelForCausalLM": "modeling_far.FarModel"}
    config = {"model_type": "far", "architectures": ["FarModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed.weight": (32, 16), "norm.weight": (16,), "qkv.weight": (32, 16), "qkv.bias": (32,)}
    shapes |= {"o.weight": (16, 16), "lm_head.weight": (32, 16)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("transformers.dynamic_module_utils"), "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [cache, *sys.path])
        yield folder
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_remote_code_is_captured_in_normal_form(remote: Path, dtype: torch.dtype | None) -> None:
    model = load_model(remote, trust_remote_code=True, dtype=dtype)
    spec = spec_of(model)
    assert (spec.mask_id, spec.max_length) == (31, 64)
    found = capture(model, spec)
    assert verify(model, found, spec).worst < 1e-5
    counts = [sum(is_call(n, op) for n in found.graph.nodes) for op in (LINEAR, RMS_NORM, ROPE, SDPA)]
    assert counts == [5, 1, 2, 1]
    assert found.rewrites["split_fused"] == found.rewrites["raise_gqa"] == 1
    assert found.weights["qkv.rows_16_24.weight"].leaf.data_ptr() == model.get_parameter("qkv.weight").data_ptr()


def test_remote_code_is_captured_without_weights(remote: Path) -> None:
    model = load_model(remote, trust_remote_code=True, meta=True)
    found = capture(model, spec_of(model))
    assert sum(is_call(node, LINEAR) for node in found.graph.nodes) == 5


def test_without_trust_the_code_is_not_run(remote: Path) -> None:
    with pytest.raises(ModelError, match="Pass trust_remote_code=True if you trust that code"):
        load_model(remote)


BIG = """
import sys
from pathlib import Path
import torch
import dlqc.models.load as load
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024
load.load_model("tiny-llada")
before = resident()
model = load.load_model(sys.argv[1])
print(sum(p.numel() * p.element_size() for p in model.parameters()) >> 20, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the kernel for its memory")
def test_a_large_checkpoint_takes_no_memory(tmp_path: Path) -> None:
    rows, d = 90_000, 512
    names = [f"model.transformer.blocks.0.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "attn_out")]
    shapes = dict.fromkeys(names, (d, d))
    shapes |= {f"model.transformer.blocks.0.{n}.weight": (d, d) for n in ("ff_proj", "up_proj", "ff_out")}
    shapes |= dict.fromkeys(("model.transformer.wte.weight", "model.transformer.ff_out.weight"), (rows, d))
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    norms = ("model.transformer.ln_f", "model.transformer.blocks.0.attn_norm", "model.transformer.blocks.0.ff_norm")
    tensors |= {f"{name}.weight": torch.ones(d, dtype=torch.bfloat16) for name in norms}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llada", "d_model": d, "n_layers": 1, "n_heads": 4, "mlp_hidden_size": d}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": rows, "mask_token_id": 1}))
    run = subprocess.run([sys.executable, "-c", BIG, str(tmp_path)], capture_output=True, text=True, check=True)
    size, grown = map(int, run.stdout.split())
    (tmp_path / "model.safetensors").unlink()
    assert size > 175
    assert grown < 40


class Own(nn.Module):
    """A user's module; what it knows of itself is given as attributes."""

    def __init__(self, **facts: object) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
        for name, value in facts.items():
            setattr(self, name, value)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


SHIFTED = DiffusionSpec(11, 12, 40, eos_id=2, shift=True)


def test_own_spec_is_taken_as_it_is() -> None:
    model = Own(spec=SHIFTED)
    assert spec_of(model) is SHIFTED
    assert verify(model, capture(model, SHIFTED), SHIFTED).worst < 1e-5


def test_mask_id_overrides_only_the_mask_of_an_own_spec() -> None:
    assert spec_of(Own(spec=SHIFTED), mask_id=3) == DiffusionSpec(3, 12, 40, eos_id=2, shift=True)
    with pytest.raises(ModelError, match="mask_id: mask id 12 lies outside the vocabulary of 12 tokens"):
        spec_of(Own(spec=SHIFTED), mask_id=12)


def test_own_tokenizer_knows_the_mask() -> None:
    assert spec_of(Own(tokenizer=SimpleNamespace(mask_token_id=5))).mask_id == 5
    with pytest.raises(ModelError, match="Own: the model has no mask token"):
        spec_of(Own(tokenizer=SimpleNamespace(mask_token_id=None)))
