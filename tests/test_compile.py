"""compile(): from a model to a module that runs; and what is refused before any long work."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlqc
from dlqc.artifact import save
from dlqc.contract import Plan
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import (
    CalibrationError,
    ContractError,
    DlqcError,
    FeasibilityError,
    LoweringError,
    ModelError,
    RecipeError,
)
from dlqc.instruments import Dump
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.rounding.rtn import Rtn


def llada(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64, "vocab_size": 64}
    return LLaDAModelLM(LLaDAConfig(**({"max_sequence_length": 32, "mask_token_id": 63} | sizes | options))).eval()


def rows(count: int = 8, length: int = 16, top: int = 63) -> Tensor:
    return torch.randint(0, top, (count, length), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, passes: Any = "w4a16-g32-rtn", **options: Any) -> dlqc.Compiled:
    return dlqc.compile(model, passes, **({"backend": "reference", "progress": False} | options))


class TestResult:
    def test_without_passes_the_model_is_itself(self) -> None:
        model = llada()
        q = run(model, [])
        assert torch.equal(q(rows()), model(rows()).logits)
        assert not q(rows()).requires_grad

    def test_quantized_weights_are_what_runs(self) -> None:
        """The result equals the eager model with the rounded weights put in, up to the order of sums."""
        model = llada()
        q = run(model, (QuantizeWeights(bits=3, group_size=32, method=Rtn()), Pack(), Lower()))
        rounded = copy.deepcopy(model)
        for name, module in rounded.named_modules():
            if isinstance(module, nn.Linear) and "blocks" in name:
                fmt = QuantizeWeights(bits=3, group_size=32).target
                module.weight.data = fmt.quantize(module.weight.data).dequantize()
        expected = rounded(rows()).logits.detach()
        assert torch.allclose(q(rows()), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(
            q(rows()), model(rows()).logits.detach(), rtol=0, atol=1e-2 * float(expected.abs().max())
        )

    def test_the_model_is_not_changed(self) -> None:
        model = llada()
        before = copy.deepcopy(model.state_dict())
        q = run(model, "w4a16-g32-gptq", calibration=rows())
        for tensor in q.buffers():
            tensor.zero_()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_the_same_seed_gives_the_same(self) -> None:
        recipe = "calibrate(sequences=8, length=16), quantize_weights(bits=2, group_size=32), pack, lower"
        first, again, other = (run(llada(), recipe, seed=s)(rows()) for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_any_batch_and_length(self) -> None:
        q = run(llada())
        for batch, length in ((1, 1), (1, 32), (5, 7)):
            assert q(rows(batch, length)).shape == (batch, length, 64)

    def test_attributes(self) -> None:
        model = llada()
        q = run(model, "w4a16-g32-rtn", seed=3)
        assert q.spec == DiffusionSpec(mask_id=63, vocab_size=64, max_length=32)
        assert q.recipe.name == "w4a16-g32-rtn"
        assert q.report.seed == 3
        assert q.report.backend == "reference"
        assert q.report.calibration == "none"
        assert q.report.model == "LLaDAModelLM"
        assert q.report.recipe == f"w4a16-g32-rtn: {q.recipe}"
        assert q.config["model_type"] == "llada"
        assert q.tokenizer is None
        assert not q.training
        assert "parameters quantized" in q.explain()

    def test_calibration_is_told(self) -> None:
        recipe = "calibrate(sequences=4, length=16), quantize_weights(group_size=32), pack, lower"
        assert run(llada(), recipe, calibration=rows()).report.calibration == "8 rows of token ids"
        assert "own rollouts" in run(llada(), recipe).report.calibration

    def test_instruments_watch(self, tmp_path: Path) -> None:
        run(llada(), instruments=[Dump(tmp_path)])
        assert {p.name for p in tmp_path.glob("*.txt")} == {
            "00-capture.txt",
            "01-quantize_weights.txt",
            "02-pack.txt",
            "03-lower.txt",
        }

    def test_plan_needs_no_weights(self) -> None:
        with torch.device("meta"):
            model = llada()
        plan, captured, spec = dlqc.plan(model, "w8a8-rtn", backend="reference")
        assert isinstance(plan, Plan)
        assert len(plan.sites) == 14
        assert {(s.weight.label, s.act.label) for s in plan.sites.values() if s.act} == {("int8 channel", "int8 token")}
        assert plan.problems == []
        assert spec.mask_id == 63
        assert len(captured.graph.nodes) > 50


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the model, even to compare, is long work; what is refused must be refused before."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(importlib.import_module("dlqc.compile"), "verify", forbidden)


@pytest.mark.usefixtures("no_work")
class TestRefusedBeforeWork:
    def refused(self, kind: type[DlqcError], words: str, model: nn.Module | None = None, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            run(model or llada(), **options)
        assert words in str(caught.value), str(caught.value)
        return str(caught.value)

    def test_the_fixture_works(self) -> None:
        with pytest.raises(AssertionError, match="the model was run"):
            run(llada())

    def test_unknown_recipe(self) -> None:
        self.refused(RecipeError, "unknown recipe 'w4a16'. Did you mean 'w4a16-rtn'?", passes="w4a16")

    def test_unknown_backend(self) -> None:
        self.refused(LoweringError, "backend: unknown backend 'gpu'. Did you mean 'cpu'?", backend="gpu")

    def test_wrong_order(self) -> None:
        self.refused(ContractError, "pass 'pack' needs 'quantized-weights'", passes="pack, lower")

    def test_a_group_that_does_not_divide_names_every_site(self) -> None:
        text = self.refused(FeasibilityError, "Nothing was changed or written", passes="w4a16-g48-rtn")
        for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
            assert f"model.transformer.blocks.0.{name}: 64 input features do not divide by group 48 (use 32, 64" in text
        assert "(and 6 more)" in text

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("passes", [[], "w4a16-g32-rtn"])
    def test_weights_that_are_not_finite(self, value: float, passes: Any) -> None:
        model = llada()
        model.model.transformer["blocks"][1].up_proj.weight.data[2, :3] = value
        words = "model.transformer.blocks.1.up_proj.weight: 3 of 4096 weights are NaN or Inf. The checkpoint is damaged"
        self.refused(ModelError, words, model, passes=passes)

    def test_no_mask_token(self) -> None:
        self.refused(ModelError, "LLaDAModelLM: the model has no mask token. Give its id", llada(mask_token_id=None))

    @pytest.mark.parametrize("mask", [-1, 64, 10**9])
    def test_a_mask_outside_the_vocabulary(self, mask: int) -> None:
        words = f"mask_id: mask id {mask} lies outside the vocabulary of 64 tokens"
        self.refused(ModelError, words, mask_id=mask)

    def test_a_mask_in_the_configuration_outside_the_vocabulary(self) -> None:
        self.refused(ModelError, "mask id 64 lies outside the vocabulary", llada(mask_token_id=64))

    @pytest.mark.parametrize(
        ("calibration", "words"),
        [
            ("", "calibration: the text is empty"),
            ([], "calibration: the text is empty"),
            (["", "  \n"], "calibration: the text is empty"),
            ("a long text", "text was given but the model has no tokenizer"),
            ("missing.txt", "missing.txt: there is no such file"),
            (Path("nowhere"), "nowhere: there is no such file"),
            (torch.zeros(0, 4, dtype=torch.int64), "int64[0, 4]. Give a tensor of int64 with two dimensions"),
            (torch.zeros(4), "float32[4]. Give a tensor of int64 with two dimensions"),
            (torch.full((2, 8), 64), "token ids reach from 64 to 64, the vocabulary from 0 to 63"),
            (torch.zeros(2, 33, dtype=torch.int64), "rows have 33 tokens, the model takes 32. Cut the rows"),
        ],
    )
    def test_calibration_text(self, calibration: Any, words: str) -> None:
        self.refused(CalibrationError, words, passes="w4a16-g32-gptq", calibration=calibration)

    def test_a_text_too_short(self) -> None:
        class Tokenizer:
            def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
                return {"input_ids": [1] * len(text)}

        model = llada()
        model.tokenizer = Tokenizer()  # type: ignore[assignment]
        words = (
            "the text has 5 tokens, which do not fill one row of 32. Give at least 32 tokens, or set a smaller length="
        )
        self.refused(CalibrationError, words, model, passes="w4a16-g32-gptq", calibration="short")


def test_a_refused_compilation_leaves_the_model_alone() -> None:
    model = llada()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FeasibilityError):
        run(model, "w4a16-g48-rtn")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert run(model)(rows()).shape == (8, 16, 64)


def test_the_failing_pass_is_named() -> None:
    with pytest.raises(ContractError) as caught:
        run(llada(), "quantize_weights(group_size=32, method=rtn), quantize_weights(group_size=32, method=rtn)")
    assert "pass 'quantize_weights' needs 'float-weights', which does not hold here" in str(caught.value)

    class Failing(Pack):
        def apply(self, graph: Any, ctx: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as failed:
        run(llada(), (QuantizeWeights(4, 32, method=Rtn()), Failing()))
    assert failed.value.__notes__ == ["in block 0 of 2", "in pass 'pack', before any other has finished"]


class Encoder(nn.Module):
    """What a stranger writes first: torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(2))
        self.head = nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class TestStrangers:
    def test_torch_s_own_encoder_layers(self) -> None:
        torch.manual_seed(0)
        model = Encoder().eval()
        q = run(model, "w8a16-rtn", mask_id=49)
        expected = model(rows(top=49)).detach()
        assert float((q(rows(top=49)) - expected).norm() / expected.norm()) < 0.02
        assert q.report.storage.quantized > 0

    def test_a_model_that_is_compiled_already(self) -> None:
        with pytest.raises(ModelError, match=r"model: is compiled already\. Compile the original model"):
            run(run(llada(), []))

    def test_what_is_no_model(self) -> None:
        with pytest.raises(ModelError, match=r"model: a NoneType is no model\. Give a module, a folder or a name"):
            run(None)  # type: ignore[arg-type]

    def test_a_name_will_do(self) -> None:
        assert run("tiny-llada", []).report.model == "tiny-llada"  # type: ignore[arg-type]

    def test_an_artifact_given_as_a_model(self, tmp_path: Path) -> None:
        save(run(llada()), tmp_path / "a" / ".." / "b", verify_reload=False)
        with pytest.raises(ModelError, match=r"b: is an artifact, compiled already\. Open it with dlqc\.load"):
            dlqc.load_model(tmp_path / "b")

    def test_blocks_without_a_linear(self) -> None:
        class Bare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(50, 32)
                self.mix = nn.Parameter(torch.randn(32, 32))
                self.head = nn.Linear(32, 50)

            def forward(self, ids: Tensor) -> Tensor:
                return self.head(torch.relu(self.embed(ids) @ self.mix))

        with pytest.raises(FeasibilityError, match="the repeated blocks hold no linear on a constant weight"):
            run(Bare().eval(), "w8a16-rtn", mask_id=49)

    def test_rows_longer_than_the_model_takes(self) -> None:
        with pytest.raises(FeasibilityError, match="calibrate: rows of 4000 tokens, but the model takes 32"):
            run(llada(), "calibrate(length=4000), quantize_weights(group_size=16), pack", calibration=rows())

    def test_a_pass_that_returns_nothing(self) -> None:
        from dlqc.contract import Pass

        class Silent(Pass):
            name = "silent"

            def apply(self, graph: Any, ctx: Any) -> Any:
                return None

        with pytest.raises(
            ContractError, match=r"apply\(\) of pass 'silent' returned NoneType\. Return a dlqc\.PassReport"
        ):
            run(llada(), (Silent(),))

    def test_token_ids_need_no_tokenizer(self) -> None:
        made = dlqc.generate(run(llada(), []), [1, 2, 3], gen_length=4, steps=4)
        assert made.text.split() == [str(i) for i in made.ids]

    def test_a_broken_tokenizer(self, tmp_path: Path) -> None:
        llada().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(ModelError, match="the tokenizer cannot be read"):
            dlqc.load_tokenizer(tmp_path)
