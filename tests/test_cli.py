"""The command line: every verb with and without --json, and errors as one line with exit status 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dlqc.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dlqc", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "w4"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "compile", "tiny-llada", "-r", "w4a16-rtn", "-o", str(folder), "--json") == 0
    return folder


def output(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_compile_prints_the_pass_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("compile", "tiny-llada", "-r", "w8a8-rtn", "-o", str(tmp_path / "a"), "--dump", str(tmp_path / "d"))
    assert run(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert "quantize_activations" in text
    assert "3,407,872 of 4,458,752 parameters quantized (76.4%)" in text
    assert "reloaded in a fresh process" in text
    diff = (tmp_path / "d" / "03-pack.diff").read_text()
    added = [line for line in diff.splitlines() if line.startswith("+%") and "dlqc.linear_packed" in line]
    assert len(added) == 28
    assert [line for line in diff.splitlines() if line.startswith("# block")] == [f"# block {i}" for i in range(4)]


def test_plan_counts_sites_and_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "plan", "tiny-llada", "-r", "w3a16-gptq", "--json") == 0
    plan = output(capsys)
    assert (plan["sites"], plan["blocks"], plan["problems"]) == (28, 4, [])
    assert plan["kept"] == {"model.transformer.ff_out": "outside the repeated blocks"}
    # 3-bit codes, 16-bit scales and 3-bit zero points in groups of 128; the rest at 16 bit.
    quantized, rest = 3407872, 4458752 - 3407872
    assert plan["bits_per_weight"] == pytest.approx((quantized * (3 + 19 / 128) + rest * 16) / 4458752)


def test_plan_of_a_budget(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "plan", "tiny-llada", "-r", "w3.2a16-mixed-gptq", "--json") == 0
    plan = output(capsys)
    assert (plan["sites"], plan["formats"], plan["problems"]) == (28, {}, [])
    # No more than the budget for what is quantized, and the rest at 16 bit.
    assert plan["bits"] == int(3.2 * 3407872) + 16 * (4458752 - 3407872)
    assert plan["kernels"] in ({"linear16": 28}, {"int4pack or dequant": 28}), "with and without a compiler"
    assert plan["notes"] == [
        "assigned while compiling: 28 linears in 16 units among int2 g128 asymmetric by gptq, int3 g128 asymmetric by gptq, "
        "int4 g128 asymmetric by gptq, int8 g128 asymmetric by gptq, within 3.2bpw (2.231bpw to 8.241bpw can be reached)"
    ]
    overrides = "quantize_weights(method=rtn, bits=3, overrides=(override(bits=8, sites=('*.ff_out',)),)), pack, lower"
    assert run(monkeypatch, "plan", "tiny-llada", "-r", overrides) == 0
    text = capsys.readouterr().out
    assert "int3 g128 asymmetric: 24 sites\nint8 g128 asymmetric: 4 sites\n" in text


def test_plan_lists_every_problem_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", "tiny-llada", "-r", "quantize_weights(group_size=96, method=rtn), pack, lower") == 2
    text = capsys.readouterr().out
    # Every linear reads 256 channels but ff_out, whose 768 divide by 96: three quarters of a block's seven and more.
    assert text.count("problem: ") == 24
    assert "model.transformer.blocks.3.up_proj: 256 input features do not divide by group 96 (use 32, 64, 128" in text


def test_generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    assert run(monkeypatch, "generate", str(artifact), "Once upon", "--length", "8", "--steps", "4", "--json") == 0
    made = output(capsys)
    assert (made["nfe"], made["tokens_per_forward"], len(made["ids"])) == (4, 2.0, 8)


def test_generate_with_a_sampler_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    text = "fast_dllm(cache='dual', threshold=none, block_length=4)"
    assert run(monkeypatch, "generate", str(artifact), "Once upon", "-s", text, "--length", "8", "--stream") == 0
    lines = capsys.readouterr().out.splitlines()
    commits = [line.split() for line in lines if line[:4].strip().isdigit() and len(line.split()) >= 3]
    assert sorted(int(parts[1]) for parts in commits) == list(range(8))
    assert "8 forwards, 1.00 tokens per forward" in lines[-1]
    assert run(monkeypatch, "generate", str(artifact), "Once upon", "-s", "fast_dllm(cach='dual')") == 2
    assert capsys.readouterr().err == "error: fast_dllm: unknown option 'cach'. Did you mean 'cache'?\n"


def test_eval_of_trajectories(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    sizes = ("--rows", "3", "--length", "32", "--prompts", "3", "-s", "llada(gen_length=6, steps=6)")
    assert run(monkeypatch, "eval", str(artifact), "--against", "tiny-llada", "--trajectory", *sizes, "--json") == 0
    apart = output(capsys)[str(artifact)]["trajectory"]
    assert (apart["prompts"], apart["horizon"], apart["nfe_ratio"]["mean"]) == (3, 6, 1.0)
    assert 0 <= apart["flips"]["mean"] <= 1
    assert list(apart["divergence_by_step"]) == [str(step) for step in range(6)]
    assert run(monkeypatch, "eval", str(artifact), "--against", "tiny-llada", "--trajectory", *sizes) == 0
    assert "commit order, Kendall's tau" in capsys.readouterr().out
    assert run(monkeypatch, "eval", str(artifact), "--trajectory") == 2
    assert "trajectory: a trajectory is compared with another model's. Name the model" in capsys.readouterr().err
    assert run(monkeypatch, "eval", str(artifact), "-s", "llada") == 2
    assert "sampler: only trajectories are sampled. Add --trajectory" in capsys.readouterr().err


def test_bisect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--rows", "2", "--length", "16", "--worst", "0", "--tolerance", "1e-6", "--json")
    assert run(monkeypatch, "bisect", "tiny-llada", "-r", "quantize_weights(bits=4, method=rtn)", *sizes) == 0
    found = output(capsys)
    assert [cost["step"] for cost in found["passes"]] == ["quantize_weights(method=rtn)"]
    assert found["guilty"] == "quantize_weights(method=rtn)"
    assert len(found["blocks"]) == 4
    assert found["sites"] == []


def test_eval_against_the_original(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    assert (
        run(monkeypatch, "eval", str(artifact), "--against", "tiny-llada", "--rows", "6", "--length", "64", "--json")
        == 0
    )
    found = output(capsys)
    compiled = found[str(artifact)]
    assert 0 < compiled["kl"]["mean"] < 0.02
    assert compiled["difference"]["low"] < compiled["difference"]["mean"] < compiled["difference"]["high"]
    assert compiled["difference"]["mean"] == pytest.approx(compiled["nll"]["mean"] - found["tiny-llada"]["nll"]["mean"])


def test_eval_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    assert run(monkeypatch, "eval", str(artifact), "--rows", "4", "--length", "32") == 0
    assert "masked NLL, 50% masked" in capsys.readouterr().out


def test_explain_verify_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path
) -> None:
    assert run(monkeypatch, "explain", str(artifact)) == 0
    assert "outside the repeated blocks: model.transformer.ff_out.weight" in capsys.readouterr().out
    assert run(monkeypatch, "explain", str(artifact), "--json") == 0
    assert output(capsys)["storage"]["quantized"] == 3407872
    assert run(monkeypatch, "verify", str(artifact), "--json") == 0
    assert output(capsys)["deviation"] < 0.02
    assert run(monkeypatch, "export", str(artifact), "-o", str(tmp_path / "x"), "--json") == 0
    assert "model.safetensors" in output(capsys)["files"]


def test_report_of_outliers_before_and_after(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    size = ("--outliers", "--rows", "2", "--length", "32", "--ratios", "0,0.5")
    steps = "fold_norm_scale, quantize_weights(bits=4), pack, lower"
    assert run(monkeypatch, "report", "tiny-llada", *size, "-r", steps, "--json") == 0
    found = output(capsys)
    assert [stage["stage"] for stage in found["stages"]] == ["as captured", "after fold_norm_scale"]
    assert found["source"] == "tales_eval.txt"
    assert len(found["stages"][0]["cells"]) == 17 * 3
    text = tmp_path / "mine.txt"
    text.write_text("Once upon a time there was a fox. " * 20)
    folder = tmp_path / "new" / "figures"
    assert run(monkeypatch, "report", "tiny-llada", *size, "--data", str(text), "--figures", str(folder)) == 0
    printed = capsys.readouterr().out
    assert "tiny-llada: 2 rows of 32 tokens from mine.txt, mask ratios 0, 0.5" in printed
    assert f"wrote {folder / 'stages-crest.png'}" in printed
    assert (folder / "stages-crest.png").is_file()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Text for a few rows of 128 tokens."""
    path = tmp_path / "mine.txt"
    tale = "Once upon a time there was a fox who lived in a wood, and every morning he went to the river to fish. "
    path.write_text("\n<|doc|>\n".join(tale * 6 for _ in range(6)))
    return path


def test_report_of_a_frontier(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    steps = (
        "calibrate(sequences=4), assign_bits(budget='3bpw', bits=(2, 8), method=rtn, metric=fisher, rows=2), "
        "quantize_weights(method=rtn), pack, lower"
    )
    arguments = ("report", "tiny-llada", "--pareto", "-r", steps, "--text", str(text), "--rows", "3", "--length", "32")
    assert run(monkeypatch, *arguments, "--json") == 0
    found = output(capsys)
    bits = [point["bits"] for point in found["points"]]
    assert bits == sorted(bits)
    assert (bits[0], bits[-1]) == pytest.approx((2.2308, 8.2404), abs=1e-4)
    assert found["slack"] == 0
    assert {label: point["choice"] for label, point in found["uniform"].items()} == {
        "int2 g128 asymmetric by rtn": [0] * 16,
        "int8 g128 asymmetric by rtn": [1] * 16,
    }
    assert run(monkeypatch, *arguments, "--measure", "2", "--figures", str(tmp_path / "f")) == 0
    printed = capsys.readouterr().out
    assert "assignments of 16 units that no other one beats (exact)" in printed
    assert "predicted fisher" in printed
    assert f"wrote {tmp_path / 'f' / 'pareto.png'}" in printed


def test_recommend_prints_a_recipe_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    path = tmp_path / "r.yaml"
    assert (
        run(monkeypatch, "recommend", "tiny-llada", "--scenario", "math-code", "--text", str(text), "-o", str(path))
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("# w8a16-gptq for tiny-llada, scenario math-code\n# Mathematics and code lose first")
    assert "\n# w8a16-gptq: KL " in printed
    assert path.read_text() == printed.rstrip("\n") + "\n"
    assert run(monkeypatch, "plan", "tiny-llada", "-r", str(path), "--json") == 0
    assert output(capsys)["recipe"].startswith("w8a16-gptq: calibrate, quantize_weights(bits=8, group_size=None")


def test_report_refuses_an_artifact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    assert run(monkeypatch, "report", str(artifact), "--outliers") == 2
    assert capsys.readouterr().err == (
        f"error: {artifact}: is an artifact, quantized already. Give the original model, and the recipe with --recipe\n"
    )


def test_doctor_names_the_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "doctor", "--json") == 0
    found = output(capsys)
    assert found["backend cpu"].keys() == found["backend reference"].keys()
    assert found["backend auto"]["for a model on a CPU"] == "cpu because the model is on no CUDA GPU"
    assert found["backend auto"]["for a model on a GPU"].startswith(("triton because", "reference because no Triton"))
    assert found["versions"]["torch"]
    assert "in use" in found["machine"]["native code"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("compile", "tiny-llada", "-r", "w4a16-gtpq", "-o", "x"),
            "unknown recipe 'w4a16-gtpq'. Did you mean 'w4a16-gptq'?",
        ),
        (("compile", "no/such/folder", "-o", "x"), "no/such/folder: there is no such folder"),
        (("explain", "nowhere"), "nowhere: there is no such folder"),
        (
            ("generate", "tiny-llada", "hi", "--mask-id", "9999"),
            "mask id 9999 lies outside the vocabulary of 2048 tokens",
        ),
        (("compile", "tiny-llada", "-o", "x", "--backend", "tpu"), "unknown backend 'tpu'"),
        (("compile", "tiny-llada", "-o", "x", "--text", "missing.txt"), "missing.txt: there is no such file"),
        (
            ("report", "tiny-llada"),
            "report: nothing to measure was named. Add --outliers or --pareto; for what the passes did",
        ),
        (
            ("report", "tiny-llada", "--outliers", "--ratios", "0,half"),
            "--ratios: cannot read '0,half'. Write numbers with commas, such as 0,0.5,1",
        ),
        (("report", "tiny-llada", "--outliers", "--ratios", "2"), "ratios: a mask ratio of 2 is no share"),
        (("report", "tiny-llada", "--outliers", "--data", "missing.txt"), "missing.txt: there is no such file"),
        (
            ("report", "tiny-llada", "--outliers", "-r", "w4a16-gptq"),
            "recipe: recipe 'w4a16-gptq' transforms nothing before it quantizes",
        ),
        (
            ("report", "tiny-llada", "--outliers", "--pareto"),
            "report: two things to measure were named. Add --outliers or",
        ),
        (
            ("report", "tiny-llada", "--pareto", "-r", "w4a16-gptq"),
            "recipe: recipe 'w4a16-gptq' has 0 passes 'assign_bits', must have one. Use w3.2a16-mixed-gptq, or add",
        ),
        (
            ("recommend", "tiny-llada", "--scenario", "genral"),
            "scenario: unknown 'genral'. Did you mean 'general'?",
        ),
        (("recommend", "tiny-llada", "-o", "r.txt"), "r.txt: cannot hold a recipe. Name a .yaml file in a folder that"),
        (
            ("compile", "tiny-llada", "-o", "x", "-r", "calibrate, assign_bits(budget='3MB'), quantize_weights, pack"),
            "assign_bits: budget='3MB': no assignment is that small, the nearest budget is '3.0",
        ),
    ],
    ids="recipe model artifact mask backend text report numbers ratio data transforms both pareto scenario file budget".split(),
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert run(monkeypatch, "compile", "no/such/model", "-o", str(tmp_path)) == 2
    assert "the folder holds something that is no dlqc artifact" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_verify_refuses_a_backend_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    from dlqc.kernels.cpu.int4pack import Int4Pack

    right = Int4Pack.lower

    def wrong(self: Any, spec: Any, packed: Any, scales: Any, zeros: Any, bias: Any) -> Any:
        return right(self, spec, packed, scales * 0, zeros, bias)

    monkeypatch.setattr(Int4Pack, "lower", wrong)
    monkeypatch.setenv("DLQC_NATIVE", "0")  # so that it is the one that is chosen
    assert run(monkeypatch, "verify", str(artifact), "--backend", "cpu") == 2
    assert "the logits differ from the reference by" in capsys.readouterr().err
