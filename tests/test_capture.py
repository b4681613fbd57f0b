"""Capture: the graph computes what the model computes, the model stays as it was, and a wrong graph is caught.

One long file: what is captured and what is caught are the two sides of one contract.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from dlqc import canonical, capture
from dlqc.capture import Captured, verify
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CaptureError
from dlqc.execute import forward, placeholder
from dlqc.graph import EMBEDDING, LINEAR, RMS_NORM, SDPA, arg, is_call
from dlqc.models.bidirectional import Bidirectional
from dlqc.models.describe import spec_of
from dlqc.models.dream import DreamConfig, DreamModel
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.models.load import load_model
from dlqc.ops import ROPE

VOCAB, MASK, LENGTH = 41, 40, 128
SPEC = DiffusionSpec(MASK, VOCAB, LENGTH)
SHAPES = [(1, 2), (1, 128), (3, 5), (4, 33)]


def llada(**options: Any) -> nn.Module:
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "vocab_size": VOCAB}
    return LLaDAModelLM(LLaDAConfig(**(sizes | {"max_sequence_length": LENGTH, "mask_id": MASK} | options)))


def sizes(**options: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
    } | options


def dream() -> nn.Module:
    return DreamModel(DreamConfig(**sizes(num_key_value_heads=2, mask_token_id=MASK)))


def decoder(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**sizes(num_key_value_heads=2, **options))
    return Bidirectional(getattr(transformers, f"{name}ForCausalLM")(config))


class Plain(nn.Module):
    """Somebody's own model: fused projections, learned positions, dropout, no configuration."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, d), nn.Embedding(LENGTH, d)
        self.norm, self.qkv, self.out, self.head = (
            nn.LayerNorm(d),
            nn.Linear(d, 3 * d),
            nn.Linear(d, d),
            nn.Linear(d, VOCAB),
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1)))
        return self.head(x)


class InPlace(Plain):
    """Statements that change a tensor: their results have no reader of their own."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        y = x.clone()
        y[:, 0] = 0.5
        y.add_(self.out(x))
        y.masked_fill_((ids == 3)[..., None], 2.0)
        return self.head(x + y)


class Counting(Plain):
    """Counts its calls, which its logits do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(ids)


class Wide(Plain):
    """Computes in float32 under autocast and no_grad regions, reads a plain tensor attribute and a literal one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(-1, 1, 16)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            x = self.tokens(ids).float() * self.table
        return self.head(x + torch.tensor([0.5]))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llada": llada,
    "llada grouped tied": lambda: llada(n_kv_heads=2, weight_tying=True),
    "llada biases": lambda: llada(include_bias=True),
    "dream": dream,
    "llama": lambda: decoder("Llama"),
    "qwen2": lambda: decoder("Qwen2"),
    "qwen3": lambda: decoder("Qwen3", head_dim=8),
    "gemma": lambda: decoder("Gemma", head_dim=8),
    "gemma2": lambda: decoder("Gemma2", head_dim=8, sliding_window=4),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes())),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes(embedding_size=16))),
    "plain": Plain,
    "in place": InPlace,
    "counting": Counting,
    "wide": Wide,
}


def randomize(model: nn.Module) -> nn.Module:
    """Ordinary weights, and gains and biases that matter."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = (noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1 + 0.3 * noise).to(tensor.dtype)
    return model.eval()


@pytest.fixture(scope="module")
def captured() -> Callable[[str], tuple[nn.Module, Captured]]:
    """captured("llada"): one of MODELS and its capture, made once."""
    made: dict[str, tuple[nn.Module, Captured]] = {}

    def get(name: str) -> tuple[nn.Module, Captured]:
        if name not in made:
            model = randomize(MODELS[name]())
            made[name] = model, capture.capture(model, SPEC)
        return made[name]

    return get


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def eager(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return capture.logits_of_output(model(ids))


@pytest.mark.parametrize("name", MODELS)
def test_graph_equals_eager(captured: Any, name: str) -> None:
    model, found = captured(name)
    for batch, length in SHAPES:
        ids = random_ids(batch, length)
        torch.testing.assert_close(forward(found.graph, found.weights, ids), eager(model, ids), rtol=1e-5, atol=1e-5)
    check = verify(model, found, SPEC)
    assert (check.cases, check.tolerance, check.dtype) == (4, 1e-4, "float32")
    assert check.worst < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_constants_are_the_checkpoints_tensors_under_their_names(captured: Any, name: str) -> None:
    model, found = captured(name)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    own = {key: c for key, c in found.weights.items() if key in state}
    assert all(constant.leaf.data_ptr() == state[key].data_ptr() for key, constant in own.items())
    others = set(found.weights) - set(own)
    assert all(key.startswith(("qkv.rows_", "lifted_tensor_", "table")) or ".plus_one." in key for key in others)
    assert any(".plus_one." in key for key in others) == name.startswith("gemma")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "bert", "albert"])
def test_attention_is_full(captured: Any, name: str) -> None:
    """Any changed token changes every row, at distances beyond Gemma 2's sliding window too; no mask is left."""
    _, found = captured(name)
    ids = random_ids(1, 24)
    before = forward(found.graph, found.weights, ids)
    for position in (0, 11, 23):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 7) % MASK
        changed = (forward(found.graph, found.weights, other) - before).abs().amax(-1)[0]
        assert bool((changed > 1e-6).all())
    calls = [node for node in found.graph.nodes if is_call(node, SDPA)]
    assert all(arg(node, 3, "attn_mask") is None and not arg(node, 5, "is_causal", False) for node in calls)


@pytest.mark.parametrize(
    ("name", "linears", "norms", "ropes", "attentions"),
    [("llada", 15, 5, 4, 2), ("dream", 15, 5, 4, 2), ("llama", 15, 5, 4, 2), ("qwen3", 15, 9, 4, 2)],
)
def test_normal_form(captured: Any, name: str, linears: int, norms: int, ropes: int, attentions: int) -> None:
    _, found = captured(name)
    counts = [sum(is_call(n, op) for n in found.graph.nodes) for op in (LINEAR, RMS_NORM, ROPE, SDPA, EMBEDDING)]
    assert counts == [linears, norms, ropes, attentions, 1]
    assert placeholder(found.graph).name == "input_ids"
    found.graph.lint()


def test_fused_projection_is_split_in_the_users_model(captured: Any) -> None:
    _, found = captured("plain")
    assert {"qkv.rows_0_16.weight", "qkv.rows_16_32.bias", "qkv.rows_32_48.weight"} <= set(found.weights)
    assert "qkv.weight" not in found.weights


def test_tied_head_is_one_constant_with_two_names(captured: Any) -> None:
    _, found = captured("albert")
    ties = {constant.aliases for constant in found.weights.values() if constant.aliases}
    names = ("albert.embeddings.word_embeddings.weight", "predictions.decoder.weight")
    assert ties == {names, ("predictions.bias", "predictions.decoder.bias")}
    assert sum(name in found.weights for name in names) == 1


def test_bundled_model_in_its_own_dtype() -> None:
    model = load_model("tiny-llada")
    spec = spec_of(model)
    found = capture.capture(model, spec)
    assert all(c.leaf.dtype is torch.bfloat16 for c in found.weights.values())
    assert verify(model, found, spec).worst < 1e-5


def test_large_models_are_checked_in_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_CHECK_IN_FLOAT32_BELOW", 0)
    model = randomize(llada()).to(torch.bfloat16)
    check = verify(model, capture.capture(model, SPEC), SPEC)
    assert (check.dtype, check.tolerance) == ("bfloat16", 3e-2)


def test_inputs_of_the_check_come_from_given_rows(captured: Any) -> None:
    model, found = captured("plain")
    assert verify(model, found, SPEC, ids=random_ids(4, 100)).cases == 4


def test_short_models_are_checked_within_their_length() -> None:
    spec = DiffusionSpec(MASK, VOCAB, 12)
    model = randomize(Plain())
    assert verify(model, capture.capture(model, spec), spec).worst < 1e-5


# The user's model stays as it was


@pytest.mark.parametrize("name", ["llada", "albert", "plain", "counting"])
def test_the_model_is_unchanged(name: str) -> None:
    model = randomize(MODELS[name]()).train()
    model.get_submodule(next(n for n, _ in model.named_modules() if n)).eval()
    flags = [m.training for m in model.modules()]
    before = {n: (p, p.clone(), p._version) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    found = capture.capture(model, SPEC)
    verify(model, found, SPEC)
    assert [m.training for m in model.modules()] == flags
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(after) == list(before)
    for key, (tensor, value, version) in before.items():
        assert after[key] is tensor
        assert tensor._version == version
        assert torch.equal(tensor, value)


def test_training_mode_is_captured_in_evaluation_semantics() -> None:
    model = randomize(Plain()).train()
    found = capture.capture(model, SPEC)
    assert model.training
    assert model.drop.training
    assert not any("dropout" in str(node.target) for node in found.graph.nodes)
    ids = random_ids(2, 9)
    torch.testing.assert_close(forward(found.graph, found.weights, ids), eager(model.eval(), ids))


def test_failed_capture_restores_the_training_flag() -> None:
    model = Branching().train()
    with pytest.raises(CaptureError):
        capture.capture(model, SPEC)
    assert all(m.training for m in model.modules())


# Models that are no graphs


class Branching(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if x.sum() > 0:
            x = x * 2
        return self.head(x)


class Returns(Plain):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, ids: Tensor) -> Any:
        return self.what(self.head(self.tokens(ids)))


class Conditional(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.head(torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,)))


class Mismatched(Plain):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tokens(ids)[..., :3])


def test_data_dependent_branch_names_its_line() -> None:
    with pytest.raises(
        CaptureError, match=r"test_capture\.py:\d+: if x\.sum\(\) > 0:: the model branches on the values"
    ):
        capture.capture(Branching(), SPEC)


def test_failing_line_is_named() -> None:
    with pytest.raises(
        CaptureError, match=r"test_capture\.py:\d+: return self\.head\(.*\): torch\.export could not trace"
    ):
        capture.capture(Mismatched(), SPEC)


@pytest.mark.parametrize(
    ("rows", "limit"),
    [
        (lambda x: x + torch.zeros(16, 1), r"Returns: the model works at one length only, a graph must"),
        (
            lambda x: x if x.shape[1] <= 64 else 2 * x,
            r"works only where 2 <= length and length <= 64, .*smaller max_length",
        ),
    ],
    ids=["fixed", "limited"],
)
def test_limited_lengths_are_named(rows: Callable[[Tensor], Tensor], limit: str) -> None:
    with pytest.raises(CaptureError, match=limit):
        capture.capture(Returns(rows), SPEC)


def test_control_flow_over_tensors_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"cond branches or loops over tensors.* torch\.where"):
        capture.capture(Conditional(), SPEC)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: None, r"forward: the model returns NoneType, which holds no logits\. Return the logits"),
        (lambda x: {"scores": x}, r"returns dict, which holds no logits"),
        (lambda x: (), r"returns tuple, which holds no logits"),
        (lambda x: x.sum(1), r"returns \[batch, 41\], which are no logits"),
        (lambda x: x.transpose(1, 2), r"returns \[batch, 41, length\], which are no logits"),
        (lambda x: torch.cat((x, x), 1), r"returns \[batch, 2\*s\d+, 41\], which are no logits"),
        (lambda x: x.sum(), r"returns \[\], which are no logits"),
    ],
    ids=["None", "dict", "empty tuple", "rank 2", "transposed", "doubled", "scalar"],
)
def test_models_that_return_no_logits(what: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture.capture(Returns(what), SPEC)


@pytest.mark.parametrize(
    "what",
    [lambda x: (x, None), lambda x: transformers.modeling_outputs.MaskedLMOutput(logits=x)],
    ids=["tuple", "output object"],
)
def test_wrapped_logits(what: Callable[[Tensor], Any]) -> None:
    model = randomize(Returns(what))
    assert verify(model, capture.capture(model, SPEC), SPEC).worst < 1e-5


def test_uncopyable_attribute_is_named() -> None:
    model = Plain()
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"Plain: the model cannot be copied \(TypeError: cannot pickle"):
        capture.capture(model, SPEC)


# A wrong graph is caught


def wrong_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.ops.dlqc.rope(x, cos, -sin)


def swap(graph: Any, old: Any, new: Any) -> None:
    next(node for node in graph.nodes if is_call(node, old)).target = new


def break_rope(found: Captured) -> None:
    swap(found.graph, ROPE, wrong_rope)


def break_eps(found: Captured) -> None:
    node = next(node for node in found.graph.nodes if is_call(node, RMS_NORM))
    node.args = (*node.args[:3], 0.5)


def break_attention(found: Captured) -> None:
    node = next(node for node in found.graph.nodes if is_call(node, SDPA))
    node.args, node.kwargs = (*node.args[:3], None, 0.0, True), {}


def break_residual(found: Captured) -> None:
    swap(found.graph, torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


def break_scale(found: Captured) -> None:
    node = next(node for node in found.graph.nodes if is_call(node, SDPA))
    node.kwargs = {**node.kwargs, "scale": 0.3}


def break_weight(found: Captured) -> None:
    name = "model.transformer.blocks.1.up_proj.weight"
    broken = found.weights[name].leaf.clone()
    broken[3] = 0
    found.weights.put(name, broken)


@pytest.mark.parametrize(
    "plant",
    [break_rope, break_eps, break_attention, break_residual, break_scale, break_weight],
    ids=lambda f: f.__name__,
)
def test_planted_error_is_caught(plant: Callable[[Captured], None]) -> None:
    model = randomize(llada())
    found = capture.capture(model, SPEC)
    plant(found)
    message = r"input \[\d+, \d+\]: the graph differs from the eager model by [\d.e-]+ relative, bound 0\.0001\. "
    with pytest.raises(CaptureError, match=message):
        verify(model, found, SPEC)


def test_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canonicalization that takes the other rotation for the rotary one."""
    monkeypatch.setattr(canonical, "_rotated_half", lambda cat: cat.args[0][0].args[0] if is_cat(cat) else None)
    model = randomize(Interleaved())
    with pytest.raises(CaptureError, match="the graph differs from the eager model"):
        verify(model, capture.capture(model, SPEC), SPEC)


def is_cat(node: Any) -> bool:
    return is_call(node, torch.ops.aten.cat.default)


class Interleaved(Plain):
    """Rotates with the other sign: x·cos + [x₂, -x₁]·sin."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        angle = torch.arange(ids.shape[1])[:, None] / 10.0 ** torch.arange(8).repeat(2)
        return self.head(x * angle.cos() + torch.cat((x[..., 8:], -x[..., :8]), -1) * angle.sin())


def test_other_shape_is_caught(captured: Any) -> None:
    _, found = captured("plain")
    with pytest.raises(
        CaptureError, match=r"input \[1, 2\]: the graph returns \[1, 2, 41\] where the model returns \[1, 2, 40\]"
    ):
        verify(Returns(lambda x: x[..., 1:]), found, SPEC)


def test_state_is_caught() -> None:
    """Logits that depend on how often the model ran."""

    class Stateful(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, ids: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(ids) * (1.0 + self.seen)

    model = randomize(Stateful())
    with pytest.raises(CaptureError, match="The model reads state or shapes that a graph cannot see"):
        verify(model, capture.capture(model, SPEC), SPEC)


def test_not_a_number_is_the_models_own_fault() -> None:
    model = randomize(Plain())
    found = capture.capture(model, SPEC)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(CaptureError, match="the model itself returns NaN or Inf"):
        verify(model, found, SPEC)


# Full size

FULL = """
import json, resource, sys, time
import torch
from dlqc.capture import capture
from dlqc.models.describe import spec_of
from dlqc.models.dream import DreamConfig, DreamModel
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
made = {"llada": (LLaDAConfig, LLaDAModelLM, {"mask_token_id": 126336}), "dream": (DreamConfig, DreamModel, {})}
config, model, options = made[sys.argv[1]]
with torch.device("meta"):
    model = model(config(**options)).to(torch.bfloat16)
start = time.perf_counter()
found = capture(model, spec_of(model))
seconds = time.perf_counter() - start
linears = sum(str(node.target) == "aten.linear.default" for node in found.graph.nodes)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak": peak * 1024, "linears": linears}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts in kilobytes on Linux")
@pytest.mark.parametrize(("name", "linears"), [("llada", 32 * 7 + 1), ("dream", 28 * 7 + 1)])
def test_full_size_captures(name: str, linears: int) -> None:
    """LLaDA-8B and Dream-7B from the configuration alone."""
    run = subprocess.run([sys.executable, "-c", FULL, name], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["linears"] == linears
    assert seen["seconds"] < 60
    assert seen["peak"] < 2 << 30
