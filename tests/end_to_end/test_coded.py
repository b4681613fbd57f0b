"""Weights in formats that are not integers, from the recipe to the artifact."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import dlqc
from dlqc.artifact import save, verify
from dlqc.errors import ContractError, DlqcError, ExportError, FeasibilityError, RecipeError
from dlqc.export import export
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.coded import weight_of
from dlqc.formats.integer import IntFormat
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.microscaling import MicroscalingFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.planes import PlanesFormat
from dlqc.graph import args_of, is_call
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.ops import LINEAR_CODED
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.daq import Daq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.kmeans import Kmeans
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.vector import Ldlq

MASK = 60
PRESETS = {
    "w8a16-fp8": 8.0,
    "w4a16-nf4": 4.0,
    "w4a16-mxfp4": 4.0,
    "w4a16-nvfp4": 4.0,
    "w4a16-squeezellm": 4.0,
    "w2a16-hqq": 2.0,
    "w3a16-squeezellm": 3.0,
    "w2a16-daq": 2.0,
    "w2a16-quant-dllm": 2.0,
    "w2a16-e8p": 2.0,
}
#: The same where the format has another shape, and with activations.
OTHERS = (
    "calibrate(sequences=4), quantize_weights(format=planes(order=3, group_size=64), method=rtn), lower",
    "calibrate(sequences=4), quantize_weights(format=codebook(bits=2, group_size=64), method=kmeans(feedback=True)), lower",
    "quantize_weights(format=nf4(block=32, scale_block=None), method=rtn), lower",
    "quantize_weights(format=fp8(unit='block'), method=rtn), lower",
    "quantize_weights(format=lattice(group_size=64), method=rtn), quantize_activations(bits=8), lower",
    "quantize_weights(format=microscaling(rounding='even'), method=rtn), pack(required=False), lower",
    "quantize_weights(format=offset(bits=4, group_size=32, scale_dtype='bfloat16'), method=hqq), quantize_activations, lower",
)


@functools.cache
def tiny() -> nn.Module:
    """Widths that all formats divide, grouped keys, a bias on every linear."""
    config = LLaDAConfig(
        d_model=128,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        mlp_hidden_size=256,
        vocab_size=61,
        max_sequence_length=32,
        mask_token_id=MASK,
        include_bias=True,
    )
    model = LLaDAModelLM(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1 + 0.3 * noise
    return model.eval()


def ids() -> torch.Tensor:
    found = torch.randint(0, MASK, (3, 12), generator=torch.Generator().manual_seed(1))
    found[:, ::3] = MASK
    return found


@functools.cache
def compiled(recipe: str) -> Any:
    rows = torch.randint(0, MASK, (6, 16), generator=torch.Generator().manual_seed(2))
    return dlqc.compile(tiny(), recipe, backend="reference", calibration=rows, progress=False)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """The dequantized weights by module, read from the constants of the graph."""
    found = {}
    for node in model.graph.nodes:
        if is_call(node, LINEAR_CODED):
            x, parts, _, spec, n = args_of(node)
            tensors = [model.weights.value(str(part.target)) for part in parts]
            name = str(parts[0].target).rpartition(".")[0]
            found[name] = weight_of(spec, tensors, n, int(x.meta["val"].shape[-1])).dequantize()
    return found


def eager(found: dict[str, torch.Tensor]) -> nn.Module:
    """The user's model with these weights put in."""
    model = copy.deepcopy(tiny())
    for name, weight in found.items():
        model.get_submodule(name).weight.data = weight
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a recipe's artifact."""

    @functools.cache
    def of(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("coded") / "a"
        save(compiled(recipe), folder, verify_reload=False)
        return folder

    return of


every_recipe = pytest.mark.parametrize("recipe", [*PRESETS, *OTHERS])


@every_recipe
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_computes_with_the_dequantized_weights(recipe: str, backend: str, saved: Callable[[str], Path]) -> None:
    """As compiled, and as loaded for another backend."""
    model = compiled(recipe) if backend == "reference" else dlqc.load(saved(recipe), backend=backend)
    found = weights(model)
    assert len(found) == 7
    if "quantize_activations" not in recipe:
        with torch.no_grad():
            expected = eager(found)(ids()).logits
        torch.testing.assert_close(model(ids()), expected, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(model(ids()), compiled(recipe)(ids()), rtol=1e-5, atol=1e-5)
    chosen = {choice.split(" ")[0] for choice in model.report.steps[-1].choices.values()}
    assert chosen == {"coded"} or (backend == "cpu" and chosen == {"coded16"})


@every_recipe
def test_the_bits_in_the_report_are_the_bytes_in_the_file(recipe: str, saved: Callable[[str], Path]) -> None:
    model = compiled(recipe)
    again = dlqc.load(saved(recipe), backend="reference")
    assert torch.equal(again(ids()), model(ids()))
    modules = weights(model)
    size = 0
    with safe_open(saved(recipe) / "weights.safetensors", "pt") as f:
        for key in f.keys():
            name, _, role = key.rpartition(".")
            if name in modules and role != "bias":
                size += 8 * f.get_tensor(key).nbytes
    storage = model.report.storage
    assert storage.bits_quantized == size
    assert storage.quantized == sum(weight.numel() for weight in modules.values())
    assert storage.kept.keys() == {"model.transformer.wte.weight", "model.transformer.ff_out.weight"}
    details = model.report.steps[-2 if "pack" not in recipe and "activations" not in recipe else -3].details
    total = sum(details[name]["bits_per_weight"] * weight.numel() for name, weight in modules.items())
    assert total == pytest.approx(size, rel=1e-9)
    if recipe in PRESETS:
        assert (
            PRESETS[recipe] <= storage.bits_per_quantized_weight < PRESETS[recipe] + 2.5
        )  # tables of 16 levels weigh much on 128 inputs


@pytest.mark.parametrize("recipe", ["w4a16-nf4", "w2a16-e8p", "w2a16-daq", OTHERS[4]])
def test_verified(recipe: str, saved: Callable[[str], Path]) -> None:
    assert verify(saved(recipe), backend="cpu")["deviation"] <= 1e-5


@pytest.mark.parametrize("recipe", PRESETS)
def test_weights_are_near_the_originals(recipe: str) -> None:
    """A planted error: with the weights of one format in the wrong order of rows the test would see it."""
    bound = {8.0: 0.04, 4.0: 0.15, 3.0: 0.3, 2.0: 0.75}[PRESETS[recipe]]
    for name, weight in weights(compiled(recipe)).items():
        exact = tiny().get_submodule(name).weight.data
        assert (weight - exact).norm() < bound * exact.norm()
        assert (weight.roll(1, 0) - exact).norm() > 1.1 * bound * exact.norm()


def test_one_changed_byte_of_the_codes_shows() -> None:
    model = compiled("w4a16-nf4")
    wrong = weights(model)
    name = next(iter(wrong))
    wrong[name] = wrong[name].clone()
    wrong[name][3, 5] += 0.5
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(model(ids()), eager(wrong)(ids()).logits, rtol=1e-5, atol=1e-5)


def test_compiled_for_the_cpu_is_what_is_loaded_for_it(saved: Callable[[str], Path]) -> None:
    rows = torch.randint(0, MASK, (6, 16), generator=torch.Generator().manual_seed(2))
    model = dlqc.compile(tiny(), "w4a16-nf4", backend="cpu", calibration=rows, progress=False)
    loaded = dlqc.load(saved("w4a16-nf4"), backend="cpu")
    assert torch.equal(model(ids()), loaded(ids()))
    assert model.report.steps[-1].choices == loaded.report.steps[-1].choices


def test_explain_says_what_it_costs(saved: Callable[[str], Path]) -> None:
    text = " ".join(compiled("w4a16-nf4").explain().split())
    assert "kernel coded (nf4 g64 double is dequantized at each call, which saves memory, not time)" in text
    text = " ".join(dlqc.load(saved("w4a16-nf4"), backend="cpu").explain().split())
    assert "not dequant: codes of nf4 g64 double are not integers" in text


def test_activations_are_quantized_in_front() -> None:
    model = compiled(OTHERS[4])
    with torch.no_grad():
        plain = eager(weights(model))(ids()).logits
    distance = float((model(ids()) - plain).norm() / plain.norm())
    assert 1e-4 < distance < 0.1


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": Nf4Format()}, r"^method: gptq does not round to nf4 g64 double\. Use method=rtn$"),
        ({"format": Nf4Format(), "method": Daq()}, r"^method: daq does not round to nf4 g64 double\. Use method=rtn$"),
        ({"method": Daq()}, r"^method: daq does not round to int4 .*\. Use method=rtn or gptq( or \w+)*$"),
        ({"method": Kmeans()}, r"^method: kmeans does not round to int4 .*\. Use method=rtn or gptq( or \w+)*$"),
        (
            {"format": PlanesFormat(), "method": Gptq()},
            r"^method: gptq does not round to planes2 g128\. Use method=rtn or daq$",
        ),
        (
            {"format": LatticeFormat(), "method": Kmeans()},
            r"^method: kmeans does not round to e8p channel\. Use method=rtn or ldlq$",
        ),
        (
            {"format": CodebookFormat(3), "method": Rtn()},
            r"^method: rtn does not round to codebook3 channel\. Use method=kmeans$",
        ),
        ({"method": Ldlq()}, r"^method: ldlq does not round to int4 .*\. Use method=rtn or gptq( or \w+)*$"),
        (
            {"format": Nf4Format(), "method": Rtn(clip="mse")},
            r"^method: rtn\(clip='mse'\) does not round to nf4 g64 double, whose ranges are not clipped\. Use method=rtn$",
        ),
        (
            {"format": MicroscalingFormat("nvfp4"), "method": Rtn(), "bits": 3},
            r"^bits: bits=3 is for integers, weights become nvfp4\. Set it in format=, or leave format out$",
        ),
        ({"format": Nf4Format(), "method": Rtn(), "group_size": None}, r"^group_size: group_size=None is for integers"),
        ({"format": Nf4Format(), "method": Rtn(), "symmetric": True}, r"^symmetric: symmetric=True is for integers"),
    ],
)
def test_formats_and_methods_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeWeights(**options)


def test_a_recipe_says_which_options_a_format_has() -> None:
    with pytest.raises(RecipeError, match=r"^quantize_weights\.format: unknown choice 'nf5'\. Did you mean 'nf4'\?"):
        compiled("quantize_weights(format=nf5, method=rtn), lower")
    with pytest.raises(RecipeError, match=r"^quantize_weights\.format: option 'bits' is missing\. Write bits=…$"):
        compiled("quantize_weights(format=codebook, method=kmeans), lower")


def test_widths_that_do_not_divide_are_named_before_any_work() -> None:
    message = r"q_proj: 128 input features do not divide by block 48 \(set it in format=, or exclude it with skip=\)"
    with pytest.raises(FeasibilityError, match=message):
        compiled("quantize_weights(format=nf4(block=48), method=rtn), lower")


def test_pack_finds_nothing() -> None:
    with pytest.raises(ContractError, match=r"pass 'pack' found nothing to rewrite .* Remove it from the recipe"):
        compiled("quantize_weights(format=nf4, method=rtn), pack, lower")


def test_export_refuses_by_name(tmp_path: Path) -> None:
    message = r"blocks\.0\.\w+ is stored as nf4 g64 double; .* and what is written here is integers\. Use save\(\)"
    with pytest.raises(ExportError, match=message):
        export(compiled("w4a16-nf4"), tmp_path / "out")


def test_a_method_that_gives_other_parts_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounding whose weight does not keep its format's mean order, on the way into the graph."""
    plain = PlanesFormat.quantize
    monkeypatch.setattr(
        PlanesFormat, "quantize", lambda self, w: plain(self, w, orders=(1,) + (2,) * (w.shape[1] // 64 - 1))
    )
    with pytest.raises(
        ContractError, match=r"_proj: bits is uint8\[.* must be uint8\[.* This is a fault of the rounding method"
    ):
        compiled("quantize_weights(format=planes(group_size=64), method=rtn), lower")


def test_the_default_is_integers() -> None:
    assert QuantizeWeights().target == IntFormat(4, 128, False)
    assert QuantizeWeights().given_facts() == {"quantized-weights", "original"}
    assert QuantizeWeights(format=Nf4Format(), method=Rtn()).given_facts() == {
        "quantized-weights",
        "original",
        "packed",
    }
    assert Pack.gives == {"packed"}
    assert issubclass(RecipeError, DlqcError)
