"""LLaDA-MoE's native class: the checkpoint's names, and its logits computed token by token, expert by expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM

import dlqc
from dlqc.capture import capture, verify
from dlqc.errors import ModelError
from dlqc.formats.integer import IntFormat
from dlqc.models.describe import spec_of
from dlqc.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from dlqc.models.load import load_model, register

#: Share of the largest logit, as for LLaDA.
BOUND = 1e-5
SIZES: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    expert_intermediate_size=24,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    rope_theta=500.0,
    mask_token_id=60,
    initializer_range=0.3,
)


def toy(**changes: Any) -> LLaDAMoEModelLM:
    torch.manual_seed(0)
    model = LLaDAMoEModelLM(LLaDAMoEConfig(**(SIZES | changes)))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.3)
    return model.eval().requires_grad_(False)


def restated(model: LLaDAMoEModelLM, ids: Tensor, **changes: Any) -> Tensor:
    """Logits [B, L, V] in float64, one token at a time; only chosen experts are touched."""
    w = {key: tensor.double() for key, tensor in model.state_dict().items()}
    c = {key: getattr(model.config, key) for key in SIZES} | changes
    heads, kv, eps = c["num_attention_heads"], c["num_key_value_heads"], model.config.rms_norm_eps
    dim = c["hidden_size"] // heads

    def norm(x: Tensor, gain: str) -> Tensor:
        return x / (x.dot(x) / x.numel() + eps).sqrt() * w[gain]

    def rotate(x: Tensor, position: int) -> Tensor:
        half = dim // 2
        angle = position * torch.tensor([c["rope_theta"] ** (-j / half) for j in range(half)], dtype=torch.float64)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag))

    def attention(xs: list[Tensor], layer: str) -> list[Tensor]:
        ys = [norm(x, f"{layer}.input_layernorm.weight") for x in xs]
        q, k, v = ([w[f"{layer}.self_attn.{n}_proj.weight"] @ y for y in ys] for n in "qkv")
        out = []
        for i in range(len(ys)):
            mixed = []
            for h in range(heads):
                part = slice(h * dim, (h + 1) * dim)
                shared = slice(h * kv // heads * dim, (h * kv // heads + 1) * dim)
                query = rotate(norm(q[i][part], f"{layer}.self_attn.q_norm.weight"), i)
                keys = [rotate(norm(t[shared], f"{layer}.self_attn.k_norm.weight"), j) for j, t in enumerate(k)]
                scores = torch.stack([query.dot(key) for key in keys]) / dim**0.5
                mixed.append(sum(p * t[shared] for p, t in zip(scores.softmax(0), v, strict=True)))
            out.append(w[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(mixed))
        return out

    def mixture(y: Tensor, mlp: str) -> Tensor:
        scores = (w[f"{mlp}.gate.weight"] @ y).exp()
        probabilities = (scores / scores.sum()).tolist()
        ranked = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])
        total = torch.zeros_like(y)
        for e in ranked[: c["num_experts_per_tok"]]:
            gate, up, down = (w[f"{mlp}.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down"))
            total += probabilities[e] * (down @ ((gate @ y) * torch.sigmoid(gate @ y) * (up @ y)))
        return total

    rows = []
    for row in ids.tolist():
        xs = [w["model.embed_tokens.weight"][token] for token in row]
        for i in range(c["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            xs = [x + a for x, a in zip(xs, attention(xs, layer), strict=True)]
            xs = [x + mixture(norm(x, f"{layer}.post_attention_layernorm.weight"), f"{layer}.mlp") for x in xs]
        rows.append(torch.stack([w["lm_head.weight"] @ norm(x, "model.norm.weight") for x in xs]))
    return torch.stack(rows)


def ids() -> Tensor:
    rows = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(7))
    rows[:, ::3] = 60
    return rows


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 6}],
    ids=["mha", "gqa", "top-1", "all"],
)
def test_logits_are_the_architectures(changes: dict[str, Any]) -> None:
    model = toy(**changes)
    expected, found = restated(model, ids()), model(ids()).logits
    assert found.shape == (2, 9, 61)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=BOUND * float(expected.abs().max()))
    # Planted errors are far outside: the bound can fail.
    for wrong in ({"rope_theta": 520.0}, {"num_experts_per_tok": 3}):
        other = restated(model, ids(), **wrong)
        assert (found - other).abs().max() > 100 * BOUND * expected.abs().max()


def test_experts_that_were_not_chosen_do_not_count() -> None:
    model, rows = toy(), ids()
    before = model(rows).logits
    mixture = model.model.layers[1].mlp
    seen: list[Tensor] = []
    handle = mixture.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(rows)
    handle.remove()
    chosen = mixture.gate(seen[0]).topk(2, dim=-1).indices
    for e, expert in enumerate(mixture.experts):
        kept = expert.down_proj.weight.clone()
        expert.down_proj.weight.zero_()
        changed = (model(rows).logits != before).any(-1)
        expert.down_proj.weight.copy_(kept)
        assert torch.equal(changed, (chosen == e).any(-1))


def test_the_router_is_in_float32_where_the_model_is_not() -> None:
    model = toy().to(torch.bfloat16)
    mixture = model.model.layers[0].mlp
    y = torch.randn(1, 500, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    p = (y.double() @ mixture.gate.weight.double().T).softmax(-1)
    parts = torch.stack([expert(y) for expert in mixture.experts], dim=-2).double()
    values, indices = p.topk(2, dim=-1)
    exact = (torch.zeros_like(p).scatter(-1, indices, values)[..., None] * parts).sum(-2)
    assert mixture(y).dtype == torch.bfloat16
    # A token whose second expert is another one would be off by much more than bfloat16 rounds.
    torch.testing.assert_close(mixture(y).double(), exact, rtol=2e-2, atol=2e-2)


def test_tensor_names_are_the_checkpoints() -> None:
    attention = [f"self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    experts = [f"mlp.experts.{e}.{n}_proj.weight" for e in range(6) for n in ("gate", "up", "down")]
    leaves = [*attention, *experts, "mlp.gate.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = {f"model.layers.{i}.{leaf}" for i in range(2) for leaf in leaves}
    assert set(toy().state_dict()) == layers | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_7b_configuration_has_the_published_size() -> None:
    with torch.device("meta"):
        model = LLaDAMoEModelLM(LLaDAMoEConfig())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    idle = sum(n for name, n in sizes.items() if ".experts." in name) * (64 - 8) // 64
    assert (sum(sizes.values()), sum(sizes.values()) - idle) == (7_356_880_896, 1_719_736_320)


@pytest.mark.parametrize("kind", ["lladamoe", "llada_moe", "llada"])
@pytest.mark.parametrize("tied", [False, True])
def test_survives_save_and_load(kind: str, tied: bool, tmp_path: Path) -> None:
    """Copies of the checkpoint spell the model type in three ways."""
    model = toy(tie_word_embeddings=tied)
    if tied:
        model.tie_weights()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "lladamoe"
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    again = load_model(tmp_path)
    assert type(again) is LLaDAMoEModelLM
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert (again.get_parameter("lm_head.weight") is again.get_parameter("model.embed_tokens.weight")) is tied


def test_the_loader_is_strict(tmp_path: Path) -> None:
    toy().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    save_file({k: t for k, t in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor '{name}' is missing"):
        load_model(tmp_path)


def test_the_auto_classes_know_it(tmp_path: Path) -> None:
    toy().save_pretrained(tmp_path)
    register()
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(ids()).logits, toy()(ids()).logits)


def test_facts() -> None:
    spec = spec_of(toy(eos_token_id=58, pad_token_id=59))
    assert (spec.mask_id, spec.vocab_size, spec.max_length, spec.eos_id, spec.pad_id) == (60, 61, 64, 58, 59)
    assert not spec.shift
    assert spec_of(LLaDAMoEModelLM(LLaDAMoEConfig(**(SIZES | {"vocab_size": 64})))).vocab_size == 64


def test_a_key_mask_hides_padding() -> None:
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    found, alone = toy()(ids(), mask).logits[:, :6], toy()(ids()[:, :6]).logits
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_captured() -> None:
    model = toy().to(torch.bfloat16)
    found = capture(model, spec_of(model))
    assert verify(model, found, spec_of(model)).worst < BOUND
    assert found.weights["model.layers.0.mlp.gate.weight"].leaf.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("clip_qkv", 8.0),
        ("qk_layernorm", False),
        ("moe_router_score_function", "sigmoid"),
        ("moe_router_enable_expert_bias", True),
        ("router_num_group", 8),
        ("router_topk_group", 4),
        ("routed_scaling_factor", 2.5),
        ("shared_expert_intermediate_size", 512),
        ("partial_rotary_factor", 0.5),
        ("moe_layer_freq", [0, 1]),
        ("rope_scaling", {"type": "linear", "factor": 2}),
    ],
)
def test_other_mathematics_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        LLaDAMoEConfig(**{key: value})
    assert str(caught.value) == (
        f"config.json: {key}={value!r} is not implemented here. "
        "Load the checkpoint's own code with trust_remote_code=True"
    )


def test_what_the_checkpoint_says_is_taken() -> None:
    """Keys of the published configuration; `norm_topk_prob` says nothing there, and is not asked."""
    config = LLaDAMoEConfig(
        hidden_act="silu",
        qk_layernorm=True,
        moe_layer_freq=[1] * 16,
        moe_router_score_function="softmax",
        routed_scaling_factor=1.0,
        norm_topk_prob=None,
        rope_scaling=None,
        dense_intermediate_size=8192,
    )
    assert (config.rope_theta, config.dense_intermediate_size, config.mask_token_id) == (50000.0, 8192, 156895)


def test_more_experts_than_there_are() -> None:
    with pytest.raises(ModelError) as caught:
        LLaDAMoEConfig(num_experts=4, num_experts_per_tok=5)
    assert str(caught.value) == "config.json: 5 experts a token of 4 do not exist. Copy the file again"
    with pytest.raises(ModelError, match="0 experts a token of 64"):
        LLaDAMoEConfig(num_experts_per_tok=0)


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w8a8-rtn"])
def test_compiled_its_experts_are_quantized_and_its_routers_are_not(recipe: str, tmp_path: Path) -> None:
    model = toy(hidden_size=128, expert_intermediate_size=128)
    found = dlqc.compile(model, recipe, backend="reference", progress=False)
    kept = found.report.storage.kept
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert {name for name, (_, why) in kept.items() if why == "a router: its output picks experts"} == routers
    # Four projections and six experts of three linears in each layer.
    assert found.report.steps[0].sites == 2 * (4 + 6 * 3)
    for name in routers:
        assert torch.equal(found.weights.value(name), model.get_parameter(name))
    found.save(tmp_path / "artifact")
    assert torch.equal(dlqc.load(tmp_path / "artifact", backend="reference")(ids()), found(ids()))
    if recipe == "w8a8-rtn":
        return  # activations are rounded, too
    rounded = {
        name: IntFormat(4, 128, False).quantize(tensor).dequantize().float()
        for name, tensor in model.state_dict().items()
        if "_proj." in name
    }
    expected = torch.func.functional_call(model, rounded, (ids(),)).logits
    torch.testing.assert_close(found(ids()), expected, rtol=0, atol=BOUND * float(expected.abs().max()))
    assert (found(ids()) - model(ids()).logits).abs().max() > 100 * BOUND * expected.abs().max()
