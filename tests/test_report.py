"""Reports: plain data and back, whole bits, and text that says what happened."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dlqc
from dlqc.artifact import save
from dlqc.contract import PassReport
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.report import Report, Step, Storage

SMOOTHED = (
    "calibrate(sequences=4, length=16), smooth, quantize_weights(group_size=32, skip=('*.up_proj',)), pack, lower"
)


def compiled(recipe: object, dtype: torch.dtype = torch.float32, **options: object) -> dlqc.Compiled:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 96, "vocab_size": 64}
    config = LLaDAConfig(max_sequence_length=32, mask_token_id=63, **(sizes | options))
    rows = torch.randint(0, 63, (8, 16), generator=torch.Generator().manual_seed(1))
    model = LLaDAModelLM(config).to(dtype).eval()
    return dlqc.compile(model, recipe, calibration=rows, backend="reference", progress=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def smoothed() -> dlqc.Compiled:
    return compiled(SMOOTHED)


def test_plain_round_trip(smoothed: dlqc.Compiled) -> None:
    plain = smoothed.report.to_plain()
    assert Report.from_plain(plain) == smoothed.report
    assert Report.from_plain(json.loads(json.dumps(plain))) == smoothed.report
    assert plain["bits_per_weight"] == smoothed.report.storage.bits_per_weight
    assert plain["bits_per_quantized_weight"] == smoothed.report.storage.bits_per_quantized_weight


@pytest.mark.parametrize("wrong", [[], {}, {"steps": 3}, None])
def test_data_that_is_no_report(wrong: object) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Report.from_plain(wrong)  # type: ignore[arg-type]


class TestStorage:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "recipe", [[], "w8a8-rtn", "w4a16-g32-rtn", "w3a16-g32-rtn", "w2a16-channel-rtn", SMOOTHED]
    )
    @pytest.mark.parametrize("tied", [False, True])
    def test_bits_are_those_of_the_file(self, recipe: object, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
        layers = 2 if recipe == SMOOTHED else 1  # it names the second
        model = compiled(recipe, dtype, weight_tying=tied, n_layers=layers)
        storage = model.report.storage
        save(model, tmp_path / "out", verify_reload=False)
        tensors = load_file(tmp_path / "out" / "weights.safetensors")
        assert storage.bits == 8 * sum(t.nbytes for t in tensors.values())
        header = 8 + int.from_bytes((tmp_path / "out" / "weights.safetensors").read_bytes()[:8], "little")
        assert storage.bits == 8 * ((tmp_path / "out" / "weights.safetensors").stat().st_size - header)

        parts = ("codes_packed", "scales", "zeros_packed")
        quantized = [t for name, t in tensors.items() if name.endswith(parts)]
        assert storage.bits_quantized == 8 * sum(t.nbytes for t in quantized)

    def test_parameters_are_the_model_s(self) -> None:
        for tied in (False, True):
            model = compiled("w4a16-g32-rtn", weight_tying=tied)
            eager = LLaDAModelLM(LLaDAConfig(**{k: v for k, v in model.config.items() if k != "architectures"}))
            storage = model.report.storage
            assert storage.parameters == sum(p.numel() for p in eager.parameters())
            assert storage.original_bits == 32 * storage.parameters
            blocks = [m for m in eager.model.transformer["blocks"].modules() if isinstance(m, nn.Linear)]
            assert storage.quantized == sum(m.weight.numel() for m in blocks)
            assert storage.bits_per_weight == storage.bits / storage.parameters

    def test_bits_per_quantized_weight(self) -> None:
        """4 bits, one bfloat16 scale in 32, one 4-bit zero point in 32; rows of zero points end on 32-bit words."""
        storage = compiled("w4a16-g8-rtn", mlp_hidden_size=64).report.storage
        assert storage.bits_per_quantized_weight == 4 + 16 / 8 + 4 / 8
        assert compiled([]).report.storage.bits_per_quantized_weight == 0

    def test_what_is_kept_is_named_with_its_reason(self, smoothed: dlqc.Compiled) -> None:
        kept = smoothed.report.storage.kept
        assert kept["model.transformer.wte.weight"] == (64 * 64, "an embedding")
        assert kept["model.transformer.ff_out.weight"] == (64 * 64, "outside the repeated blocks")
        assert kept["model.transformer.blocks.1.up_proj.weight"] == (96 * 64, "named by skip=")
        assert len(kept) == 4

    def test_a_recipe_without_quantization_says_so(self) -> None:
        kept = compiled([]).report.storage.kept
        assert len(kept) == 2 * 7 + 2
        assert {reason for _, reason in kept.values()} == {"an embedding", "no pass quantizes it"}


class TestRender:
    def test_tells_what_each_pass_did(self, smoothed: dlqc.Compiled) -> None:
        text = smoothed.explain()
        lines = text.splitlines()
        assert lines[0].startswith(
            "LLaDAModelLM → custom: calibrate(sequences=4, length=16), smooth, quantize_weights("
        )
        assert "backend reference" in text
        assert "captured " in text
        head = next(i for i, line in enumerate(lines) if line.startswith("pass "))
        table = [line.split() for line in lines[head + 1 : head + 6]]
        rows = {words[0]: words[1:] for words in table}
        assert list(rows) == ["calibrate", "smooth", "quantize_weights", "pack", "lower"]
        assert rows["smooth"][:2] == ["4", "0"]
        assert rows["quantize_weights"][:2] == ["12", "2"]
        assert rows["pack"][:2] == ["12", "0"]
        assert rows["lower"][:2] == ["12", "0"]
        details = next(s for s in smoothed.report.steps if s.name == "quantize_weights").details
        worst = min(d["sqnr_db"] for d in details.values())
        assert rows["quantize_weights"][4] == f"{worst:.1f}"

    def test_lists_what_was_declined(self, smoothed: dlqc.Compiled) -> None:
        declined = [line for line in smoothed.explain().splitlines() if "declined" in line and "pass" not in line]
        site = "model.transformer.blocks.{}.up_proj"
        assert declined == [f"  quantize_weights declined {site.format(i)}: named by skip=" for i in (0, 1)]

    def test_names_the_kernels(self, smoothed: dlqc.Compiled) -> None:
        (line,) = (line for line in smoothed.explain().splitlines() if line.startswith("kernel "))
        assert line.startswith("kernel reference (")
        assert ": 12 sites" in line

    def test_counts_bits(self, smoothed: dlqc.Compiled) -> None:
        storage, text = smoothed.report.storage, smoothed.explain()
        assert f"{storage.quantized:,} of {storage.parameters:,} parameters quantized" in text
        assert f"{storage.bits_per_quantized_weight:.3f} bits each" in text
        assert f"whole model: {storage.bits / 8e6:.2f} MB, {storage.bits_per_weight:.3f} bits per weight" in text
        assert "not quantized, named by skip=: model.transformer.blocks.0.up_proj.weight, " in text
        assert "(12,288 parameters)" in text

    def test_tells_the_cost(self, smoothed: dlqc.Compiled) -> None:
        assert smoothed.report.fidelity
        for ratio, cost in smoothed.report.fidelity.items():
            assert f"calibration rows, {float(ratio):.0%} masked: KL {cost['kl']:.4f} nats" in smoothed.explain()

    def test_names_are_not_markup(self, smoothed: dlqc.Compiled) -> None:
        """rich would swallow [words in brackets] and turn :colons: into pictures."""
        declined = [("blocks[ids]", "a [bold]reason[/bold] of :smile:")]
        step = dataclasses.replace(smoothed.report.steps[0], name="mine", declined=declined, choices={"a": "k [x]"})
        report = dataclasses.replace(smoothed.report, model="[red]m", recipe="r: skip=('[ab]*',)", steps=[step])
        text = dataclasses.replace(report, notes=["[note]"]).render()
        assert "[red]m → r: skip=('[ab]*',), backend" in text
        assert "mine declined blocks[ids]: a [bold]reason[/bold] of :smile:" in text
        assert "mine chose k [x]: 1 sites (a)" in text
        assert "note: [note]" in text

    def test_width(self, smoothed: dlqc.Compiled) -> None:
        assert max(len(line) for line in smoothed.report.render(width=60).splitlines()) <= 60


def test_lowering_anew_changes_what_lowering_said_and_nothing_else(smoothed: dlqc.Compiled) -> None:
    again = smoothed.report.lowered_anew("cpu", PassReport(sites=3, choices={"a": "fast"}, notes=["n"]))
    assert again.backend == "cpu"
    assert again.steps[-1] == dataclasses.replace(
        smoothed.report.steps[-1], sites=3, choices={"a": "fast"}, notes=["n"]
    )
    assert again.steps[:-1] == smoothed.report.steps[:-1]
    assert dataclasses.replace(again, backend="reference", steps=smoothed.report.steps) == smoothed.report


def test_nothing_divides_by_zero() -> None:
    storage = Storage(parameters=0, quantized=0, bits=0, bits_quantized=0, original_bits=0, kept={})
    assert storage.bits_per_weight == storage.bits_per_quantized_weight == 0
    step = Step("p", "p", 0, [], 0.0, 0.0, None, {}, {}, {}, [])
    capture = {"nodes": 1, "seconds": 0.0, "worst": 0.0, "tolerance": 1e-4, "cases": 1, "dtype": "float32"}
    assert "0 of 0 parameters" in Report("m", "r", "b", 0, "none", capture, [step], storage).render()
