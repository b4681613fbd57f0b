"""Exports to compressed-tensors, read back by the library that owns the format and by transformers.

One long file: what is read back, mixed and refused comes from the same few models and their exports.
"""

from __future__ import annotations

import copy
import errno
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, GemmaConfig, GemmaForCausalLM
from transformers.pytorch_utils import Conv1D

import dlqc
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ExportError
from dlqc.formats.integer import IntFormat
from dlqc.models.bidirectional import Bidirectional
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.models.load import register


def line(weights: str, acts: bool = False) -> str:
    return f"quantize_weights({weights}, method=rtn), {'quantize_activations, ' if acts else ''}pack, lower"


RECIPES = {
    "w4a16 g128 asym": line("bits=4"),
    "w4a16 g64 asym": line("bits=4, group_size=64"),
    "w4a16 g128 sym": line("bits=4, symmetric=True"),
    "w4a16 g64 sym": line("bits=4, group_size=64, symmetric=True"),
    "w4a16 channel asym": line("bits=4, group_size=None"),
    "w3a16 g128 asym": line("bits=3"),
    "w3a16 g64 sym": line("bits=3, group_size=64, symmetric=True"),
    "w2a16 g64 asym": line("bits=2, group_size=64"),
    "w2a16 channel sym": line("bits=2, group_size=None, symmetric=True"),
    "w8a16 channel sym": line("bits=8, group_size=None, symmetric=True"),
    "w8a16 g128 asym": line("bits=8"),
    "w8a8 channel sym": line("bits=8, group_size=None, symmetric=True", acts=True),
    "w8a8 g64 asym": line("bits=8, group_size=64", acts=True),
    "w4a8 g128 asym": line("bits=4", acts=True),
    "w4a8 g64 sym": line("bits=4, group_size=64, symmetric=True", acts=True),
}
FORMAT = re.compile(r"w(?P<bits>\d)a(?P<act>\d+) (?:g(?P<group>\d+)|channel) (?P<kind>a?sym)")
LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


def llada(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 128, "n_layers": 1, "n_heads": 4, "mlp_hidden_size": 192, "vocab_size": 64}
    config = LLaDAConfig(max_sequence_length=32, mask_token_id=63, **({"include_bias": True} | sizes | options))
    model = LLaDAModelLM(config).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.normal_(std=0.1)
    return model


def compiled(recipe: str, model: nn.Module | None = None, **options: Any) -> dlqc.Compiled:
    return dlqc.compile(model or llada(), recipe, **({"backend": "reference", "progress": False} | options))


def ids() -> Tensor:
    made = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(2))
    made[:, 4:] = 63
    return made


class Export:
    """A compiled model, its export, and what the library makes of it."""

    def __init__(self, name: str, folder: Path) -> None:
        found = FORMAT.fullmatch(name)
        assert found is not None
        group = None if found["group"] is None else int(found["group"])
        self.fmt = IntFormat(int(found["bits"]), group, found["kind"] == "sym")
        self.acts = found["act"] == "8"
        # 192 features do not divide by 128.
        self.eager = llada(mlp_hidden_size=256) if group == 128 else llada()
        self.model = compiled(RECIPES[name], self.eager)
        self.sizes = dlqc.export(self.model, folder)
        self.folder = folder
        self.tensors = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.read = QuantizationConfig.model_validate(self.config["quantization_config"])
        (self.scheme,) = self.read.config_groups.values()

    @property
    def sites(self) -> list[str]:
        return [f"model.transformer.blocks.0.{name}" for name in LINEARS]

    def stored(self, site: str) -> dict[str, Tensor]:
        """The tensors of a module, without its bias."""
        prefix = f"{site}."
        found = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        return {n: t for n, t in found.items() if n != "bias"}

    def expected(self, site: str) -> Tensor:
        """The rounded weight, from the model's own weight and the number format alone."""
        return self.fmt.quantize(self.eager.get_parameter(f"{site}.weight")).dequantize()

    def compressor(self) -> type[BaseCompressor]:
        scheme = self.scheme
        assert isinstance(scheme, QuantizationScheme)
        found: type[BaseCompressor] = BaseCompressor.get_value_from_registry(scheme.format)
        return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    made: dict[str, Export] = {}

    def make(name: str) -> Export:
        if name not in made:
            made[name] = Export(name, tmp_path_factory.mktemp("exports") / "served")
        return made[name]

    return make


@pytest.fixture(params=RECIPES)
def case(request: pytest.FixtureRequest, exported: Callable[[str], Export]) -> Export:
    return exported(request.param)


class TestReadBack:
    def test_the_library_decompresses_the_same_weights(self, case: Export) -> None:
        """Bit for bit: it computes in the dtype of the scales, so ours rounded to that; and ours, with wide scales."""
        for site in case.sites:
            stored, expected = case.stored(site), case.expected(site)
            found = case.compressor().decompress(stored, case.scheme)["weight"]
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, expected.to(torch.bfloat16)), site
            wide = stored | {"weight_scale": stored["weight_scale"].float()}
            assert torch.equal(case.compressor().decompress(wide, case.scheme)["weight"], expected), site

    def test_the_library_compresses_to_the_same_tensors(self, case: Export) -> None:
        """Our export is what the library itself would have written, byte for byte."""
        for site in case.sites:
            stored = case.stored(site)
            quantized = case.fmt.quantize(case.eager.get_parameter(f"{site}.weight"))
            given = {"weight": quantized.dequantize(), "weight_scale": quantized.scales.float()}
            if quantized.zeros is not None:
                given["weight_zero_point"] = (quantized.zeros.to(torch.int16) - case.fmt.midpoint).to(torch.int8)
            written = case.compressor().compress(given, case.scheme)
            assert written.keys() == stored.keys()
            for role, tensor in written.items():
                same = stored[role].float() if role == "weight_scale" else stored[role]
                assert same.dtype == tensor.dtype, role
                assert torch.equal(same, tensor), f"{site}.{role}"

    def test_what_is_not_quantized_is_unchanged(self, case: Export) -> None:
        roles = {f"{site}.{role}" for site in case.sites for role in case.stored(site)}
        rest = {n: t for n, t in case.tensors.items() if n not in roles}
        original = case.eager.state_dict()
        assert rest.keys() == original.keys() - {f"{site}.weight" for site in case.sites}
        assert all(torch.equal(t, original[n]) and t.dtype == original[n].dtype for n, t in rest.items())

    def test_the_configuration(self, case: Export) -> None:
        int8 = case.fmt.bits == 8 and case.acts
        assert case.read.quant_method == "compressed-tensors"
        assert case.read.quantization_status == "compressed"
        assert case.read.format == case.scheme.format == ("int-quantized" if int8 else "pack-quantized")
        assert case.scheme.targets == case.sites
        assert case.read.ignore == ["model.transformer.ff_out"], "the head, whose name is an ending of block names"
        weights, acts = case.scheme.weights, case.scheme.input_activations
        assert (weights.num_bits, weights.type, weights.symmetric) == (case.fmt.bits, "int", case.fmt.symmetric)
        assert (weights.strategy, weights.group_size) == (
            ("channel", None) if case.fmt.group_size is None else ("group", case.fmt.group_size)
        )
        assert (acts is not None) == case.acts
        if acts is not None:
            assert (acts.num_bits, acts.type, acts.symmetric, acts.strategy, acts.dynamic) == (
                8,
                "int",
                True,
                "token",
                True,
            )
        assert case.config["model_type"] == "llada"
        assert case.config["d_model"] == 128
        assert case.sizes == {p.name: p.stat().st_size for p in case.folder.iterdir()}

    def test_zero_points_are_there_exactly_where_the_format_wants_them(self, case: Export) -> None:
        for site in case.sites:
            assert ("weight_zero_point" in case.stored(site)) == (not case.fmt.symmetric)


def loaded_by_transformers(folder: Path) -> nn.Module:
    register()
    model: nn.Module = AutoModelForMaskedLM.from_pretrained(folder)
    return model.eval().requires_grad_(False)


class TestTransformers:
    """It loads our folder with our native class and the library's own quantizer."""

    @pytest.mark.parametrize("name", [n for n in RECIPES if n.endswith(" sym") and "a16" in n])
    def test_weights_only(self, name: str, exported: Callable[[str], Export]) -> None:
        case = exported(name)
        found, ours = loaded_by_transformers(case.folder)(ids()).logits, case.model(ids())
        assert float((found - ours).norm() / ours.norm()) < 1e-5
        plain = case.eager(ids()).logits
        assert float((plain - ours).norm() / ours.norm()) > 1e-3, "the weights must have been quantized"

    @pytest.mark.parametrize("name", ["w8a8 channel sym", "w4a8 g64 sym", "w8a8 g64 asym"])
    def test_with_activations(self, name: str, exported: Callable[[str], Export]) -> None:
        """The library's grid for symmetric activations is ±max/127.5 where ours is ±max/127: the same format, and
        the same model but for that. So its result is compared with that grid, put in by hand."""
        case = exported(name)
        found, ours = loaded_by_transformers(case.folder)(ids()).logits, case.model(ids())

        def quantize(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            scale = given[0].abs().amax(-1, keepdim=True) / 127.5
            return ((given[0] / scale).round().clamp(-128, 127) * scale,)

        model = copy.deepcopy(case.eager)
        for site in case.sites:
            model.get_parameter(f"{site}.weight").copy_(case.expected(site))
        without = model(ids()).logits
        for site in case.sites:
            model.get_submodule(site).register_forward_pre_hook(quantize)
        by_hand = model(ids()).logits
        effect = float((by_hand - without).norm())
        assert effect > 1e-3 * float(without.norm())
        assert float((found - by_hand).norm()) < 0.1 * effect
        assert float((found - ours).norm()) < 2 * effect

    def test_zero_points_in_packed_weights(self, exported: Callable[[str], Export]) -> None:
        """compressed-tensors does not pack zero points on the meta device, where transformers shapes a model, so it
        cannot read its own files of this kind either. When this fails, the limit is gone: widen the tests above."""
        with pytest.raises((RuntimeError, AttributeError)):
            loaded_by_transformers(exported("w4a16 g64 asym").folder)


STATIC = "calibrate(sequences=8, length=16, sampler=forward_process), {}, quantize_activations({}), pack, lower"


def with_fixed_ranges(weights: str, options: str, **more: Any) -> dlqc.Compiled:
    rows = torch.randint(0, 63, (8, 16), generator=torch.Generator().manual_seed(1))
    recipe = STATIC.format(f"quantize_weights({weights}, method=rtn)", f"ranges=percentile(share=0.99), {options}")
    return compiled(recipe, calibration=rows, **more)


class TestFixedRanges:
    """Activations with one fixed scale each: transformers computes the very same model from our folder."""

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(
        "weights", ["bits=8, group_size=None, symmetric=True", "bits=4, group_size=64, symmetric=True"]
    )
    def test_transformers_reads_them_and_computes_the_same(self, weights: str, symmetric: bool, tmp_path: Path) -> None:
        model = with_fixed_ranges(weights, f"symmetric={symmetric}")
        dlqc.export(model, tmp_path / "out")
        found, ours = loaded_by_transformers(tmp_path / "out")(ids()).logits, model(ids())
        assert float((found - ours).norm() / ours.norm()) < 1e-5
        plain = compiled(f"quantize_weights({weights}, method=rtn), pack, lower")(ids())
        assert float((plain - ours).norm() / ours.norm()) > 1e-3, "the activations must have been quantized"

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_tensors_and_configuration(self, symmetric: bool, tmp_path: Path) -> None:
        model = with_fixed_ranges("bits=8, group_size=None, symmetric=True", f"symmetric={symmetric}")
        dlqc.export(model, tmp_path / "out")
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        (scheme,) = QuantizationConfig.model_validate(config["quantization_config"]).config_groups.values()
        acts = scheme.input_activations
        assert (acts.num_bits, acts.symmetric, acts.strategy, acts.dynamic) == (8, symmetric, "tensor", False)
        block = "model.transformer.blocks.0"
        stored = model.weights.value(f"{block}.q_proj.input_scale")
        for name in ("q_proj", "k_proj", "v_proj"):
            found = tensors[f"{block}.{name}.input_scale"]
            assert torch.equal(found, stored.reshape(1))
            assert (f"{block}.{name}.input_zero_point" in tensors) == (not symmetric)
        assert not torch.equal(tensors[f"{block}.ff_out.input_scale"], stored.reshape(1))
        roles = {name.rpartition(".")[2] for name in tensors}
        assert roles == {"weight", "bias", "weight_scale", "input_scale", *(() if symmetric else ("input_zero_point",))}


OVERRIDES = (
    "(override(sites=('*.ff_out',), bits=4), override(sites=('*.0.*_proj',), bits=2), "
    "override(sites=('*.attn_out',), bits=8, group_size=0))"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with four widths."""
    folder = tmp_path_factory.mktemp("mixed") / "served"
    dlqc.export(
        compiled(line(f"bits=3, group_size=64, symmetric=True, overrides={OVERRIDES}"), llada(n_layers=2)), folder
    )
    return folder


class TestMixedWidths:
    """Different widths by site: one group of the configuration for each scheme, and one format for all."""

    def expected(self, site: str) -> IntFormat:
        if "attn_out" in site:
            return IntFormat(8, None)
        return IntFormat(4 if "ff_out" in site else 2 if ".0." in site else 3, 64)

    def test_the_library_reads_every_site_in_its_own_width(self, served: Path) -> None:
        config = json.loads((served / "config.json").read_text())["quantization_config"]
        read = QuantizationConfig.model_validate(config)
        assert read.format == "pack-quantized"
        assert len(read.config_groups) == 4
        tensors, original = load_file(served / "model.safetensors"), llada(n_layers=2)
        seen = []
        for scheme in read.config_groups.values():
            assert isinstance(scheme, QuantizationScheme)
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            for site in scheme.targets:
                fmt = self.expected(site)
                assert scheme.weights.num_bits == fmt.bits
                stored = {r: tensors[f"{site}.weight_{r}"] for r in ("packed", "scale", "shape")}
                stored = {f"weight_{role}": tensor for role, tensor in stored.items()}
                found = compressor.decompress(stored | {"weight_scale": stored["weight_scale"].float()}, scheme)[
                    "weight"
                ]
                assert torch.equal(found, fmt.quantize(original.get_parameter(f"{site}.weight")).dequantize()), site
                seen.append(site)
        assert len(seen) == len(set(seen)) == 14

    def test_transformers_loads_it(self, served: Path) -> None:
        found = loaded_by_transformers(served)(ids()).logits
        model = llada(n_layers=2)
        for name, parameter in model.named_parameters():
            if ".blocks." in name and parameter.dim() == 2:
                parameter.copy_(self.expected(name).quantize(parameter).dequantize())
        by_hand = model(ids()).logits
        assert float((found - by_hand).norm() / by_hand.norm()) < 1e-5


class TestRefusals:
    def refused(self, model: dlqc.Compiled, folder: Path, words: str, **options: Any) -> None:
        before = sorted(folder.parent.rglob("*"))
        with pytest.raises(ExportError) as caught:
            dlqc.export(model, folder, **options)
        assert words in str(caught.value), str(caught.value)
        assert sorted(folder.parent.rglob("*")) == before

    def test_codes_that_are_not_packed(self, tmp_path: Path) -> None:
        model = compiled("quantize_weights(group_size=64, method=rtn)")
        self.refused(model, tmp_path / "out", "graph: the codes are not packed. Add 'pack' to the recipe")

    def test_nothing_quantized(self, tmp_path: Path) -> None:
        model = dlqc.compile(llada(), [], backend="reference", progress=False)
        self.refused(model, tmp_path / "out", "graph: no linear is quantized. Compile with a recipe that quantizes")

    def test_activations_in_groups(self, tmp_path: Path) -> None:
        model = compiled(
            "quantize_weights(group_size=64, method=rtn), quantize_activations(group_size=64), pack, lower"
        )
        words = "compressed-tensors: model.transformer.blocks.0.q_proj has activations in groups; "
        self.refused(model, tmp_path / "out", words)

    def test_fixed_ranges_for_several_mask_ratios(self, tmp_path: Path) -> None:
        model = with_fixed_ranges("bits=8, group_size=None, symmetric=True", "buckets=3")
        words = "compressed-tensors: model.transformer.blocks.0.q_proj has 3 sets of input scales; "
        self.refused(model, tmp_path / "out", words)

    def test_what_attentions_read(self, tmp_path: Path) -> None:
        weights = line("bits=4, group_size=64")
        model = compiled(
            f"quantize_attention(keys=None), {weights}", llada(n_layers=2)
        )  # of one in each, all are named
        words = "compressed-tensors: %quantize_heads_default quantizes in an attention; "
        self.refused(model, tmp_path / "out", words)
        model = compiled(f"quantize_attention(keys=None, values=None, probabilities=8), {weights}", llada(n_layers=2))
        self.refused(model, tmp_path / "out", "compressed-tensors: %attention_default quantizes in an attention; ")

    def test_a_fused_projection(self, tmp_path: Path) -> None:
        class Fused(nn.Module):
            spec = DiffusionSpec(mask_id=15, vocab_size=16, max_length=16)

            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(16, 32), nn.Linear(32, 16)
                self.norms = nn.ModuleList([nn.RMSNorm(32) for _ in range(2)])
                self.fused = nn.ModuleList([nn.Linear(32, 64, bias=False) for _ in range(2)])

            def forward(self, ids: Tensor) -> Tensor:
                x = self.embed(ids)
                for norm, fused in zip(self.norms, self.fused, strict=True):
                    a, b = fused(norm(x)).chunk(2, dim=-1)
                    x = x + a.sigmoid() * b
                return self.head(x)

        model = compiled("quantize_weights(group_size=32, method=rtn), pack, lower", Fused().eval())
        self.refused(model, tmp_path / "out", "is a part of a fused projection")

    def test_a_transposed_projection(self, tmp_path: Path) -> None:
        class Transposed(nn.Module):
            spec = DiffusionSpec(mask_id=15, vocab_size=16, max_length=16)

            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(16, 32), nn.Linear(32, 16)
                self.norms = nn.ModuleList([nn.RMSNorm(32) for _ in range(2)])
                self.mix = nn.ModuleList([Conv1D(32, 32) for _ in range(2)])

            def forward(self, ids: Tensor) -> Tensor:
                x = self.embed(ids)
                for norm, mix in zip(self.norms, self.mix, strict=True):
                    x = x + mix(norm(x))
                return self.head(x)

        model = compiled("quantize_weights(group_size=32, method=rtn), pack, lower", Transposed().eval())
        self.refused(model, tmp_path / "out", "mix.0.transposed is transposed in its checkpoint")

    def test_an_online_transform(self, tmp_path: Path) -> None:
        model = compiled(line("bits=4, group_size=64"))
        model.weights.put("transform.hadamard", torch.eye(2))
        words = "compressed-tensors: constant 'transform.hadamard' is a transform. Use save(), which holds any graph"
        self.refused(model, tmp_path / "out", words)

    def test_an_unknown_format(self, exported: Callable[[str], Export], tmp_path: Path) -> None:
        words = "format: unknown format 'compressed_tensors'. Did you mean 'compressed-tensors'?"
        self.refused(exported("w8a8 channel sym").model, tmp_path / "out", words, format="compressed_tensors")

    def test_a_folder_that_holds_something(self, exported: Callable[[str], Export], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("precious")
        words = "out: the folder holds something. Choose an empty or new folder"
        self.refused(exported("w8a8 channel sym").model, tmp_path / "out", words)
        self.refused(exported("w8a8 channel sym").model, tmp_path / "out" / "thesis.txt", "the folder holds something")
        assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"

    @pytest.mark.parametrize("where", ["save_file", "json"])
    def test_a_full_disk(
        self, where: str, exported: Callable[[str], Export], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if where == "json":
            monkeypatch.setattr(Path, "write_text", full)
        else:
            monkeypatch.setattr(importlib.import_module("dlqc.export.compressed_tensors"), where, full)
        words = "out: cannot be written (No space left on device). Free space or choose another folder"
        self.refused(exported("w8a8 channel sym").model, tmp_path / "out", words)


def test_an_empty_folder_is_taken_and_the_umask_kept(exported: Callable[[str], Export], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = os.umask(0o022)
    try:
        dlqc.export(exported("w8a8 channel sym").model, tmp_path / "out")
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o644}
    assert os.listdir(tmp_path) == ["out"]


def test_a_loaded_artifact_exports_the_same(exported: Callable[[str], Export], tmp_path: Path) -> None:
    case = exported("w4a8 g128 asym")
    dlqc.artifact.save(case.model, tmp_path / "artifact", verify_reload=False)
    dlqc.export(dlqc.load(tmp_path / "artifact", backend="reference"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == case.tensors.keys()
    assert all(torch.equal(found[n], t) for n, t in case.tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == case.config


def test_folded_weights_are_what_is_written(tmp_path: Path) -> None:
    """After smoothing, the norms carry 1/s: the exported gains are the folded ones, in float32."""
    recipe = f"calibrate(sequences=4, length=16), smooth, {line('bits=8, group_size=None, symmetric=True')}"
    rows = torch.randint(0, 63, (8, 16), generator=torch.Generator().manual_seed(1))
    model = compiled(recipe, llada().to(torch.bfloat16), calibration=rows)
    dlqc.export(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    gain = tensors["model.transformer.blocks.0.attn_norm.weight"]
    assert gain.dtype == torch.float32
    assert not torch.equal(gain, torch.ones(128))
    assert torch.equal(gain, model.weights.value("model.transformer.blocks.0.attn_norm.weight"))


def test_a_gain_that_is_read_as_one_plus_w_is_written_as_w(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=64, head_dim=32, num_key_value_heads=1, **sizes)).eval()
    gains = {name: p.detach().normal_(std=0.3) for name, p in gemma.named_parameters() if "norm" in name}
    dlqc.export(compiled("w4a16-rtn", Bidirectional(gemma), mask_id=63), tmp_path / "plain")
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(gains) == 5
    assert {name for name in written if "norm" in name} == {f"decoder.{name}" for name in gains}
    for name, w in gains.items():
        # 1 + w was rounded to float32, at a value of about one.
        torch.testing.assert_close(written[f"decoder.{name}"], w, rtol=0, atol=2.0**-23)
    model = compiled(f"fold_norm_scale, {line('bits=4')}", Bidirectional(gemma), mask_id=63)
    dlqc.export(model, tmp_path / "folded")
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    assert not folded["decoder.model.layers.0.input_layernorm.weight"].any()


def test_a_tied_model_and_its_tokenizer(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    model = compiled(line("bits=8, group_size=None, symmetric=True"), llada(weight_tying=True))
    model.tokenizer = Tokenizer()
    dlqc.export(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    found = loaded_by_transformers(tmp_path / "out")(ids()).logits
    ours = model(ids())
    assert float((found - ours).norm() / ours.norm()) < 1e-5
