"""Loading: strict, memory-mapped, and every refusal says what, where and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from dlqc.errors import ModelError
from dlqc.models.bidirectional import Bidirectional
from dlqc.models.load import check_finite, find_folder, load_model, load_tokenizer, register

SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shard(folder: Path) -> Path:
    """The same checkpoint in two shards with an index."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_tiny_llada_loads_with_its_own_dtype_and_predicts() -> None:
    model = load_model("tiny-llada")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == 4_458_752
    assert not model.training
    assert Path(str(model.dlqc_source)).name == "tiny-llada"
    tokenizer = load_tokenizer(model)
    assert tokenizer.mask_token_id == 2047
    # It was trained to reverse digits, in rows of many such items; another wiring of the same weights cannot.
    asked = ["58213", "90417", "33508", "71264", "20956", "84170", "16392", "47085"]
    parts = [tokenizer(f"back {digits}={digits[::-1]}<|endoftext|>").input_ids for digits in asked]
    truth = torch.tensor([[token for part in parts for token in part]])
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    slots = (ends[:, None] - torch.arange(6, 1, -1)).flatten()
    ids = truth.index_fill(1, slots, 2047)
    for _ in range(4):
        confidence, token = model(ids).logits.float().softmax(-1).max(-1)
        best = confidence.masked_fill(ids != 2047, -1)[0].topk(10).indices
        ids[0, best] = token[0, best]
    assert torch.equal(ids, truth)


def test_dtype_converts_and_meta_holds_nothing() -> None:
    assert {p.dtype for p in load_model("tiny-llada", dtype=torch.float32).parameters()} == {torch.float32}
    planned = load_model("tiny-llada", meta=True)
    assert {(p.device.type, p.dtype) for p in planned.parameters()} == {("meta", torch.bfloat16)}
    assert next(load_model("tiny-llada", meta=True, dtype=torch.float16).parameters()).dtype == torch.float16


def test_meta_needs_no_weights(llada_folder: Path) -> None:
    (llada_folder / "model.safetensors").unlink()
    assert next(load_model(llada_folder, meta=True).parameters()).is_meta


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks the kernel what is mapped")
def test_weights_are_views_of_the_mapped_file(llada_folder: Path) -> None:
    model = load_model(llada_folder)
    spans = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(llada_folder / "model.safetensors"))
    ]
    assert all(any(p.data_ptr() in span for span in spans) for p in model.parameters())


def test_writing_into_a_model_leaves_the_file_and_other_models_as_they_are() -> None:
    one, two = load_model("tiny-llada"), load_model("tiny-llada")
    with torch.no_grad():
        one.get_parameter("model.transformer.ln_f.weight").zero_()
    assert two.get_parameter("model.transformer.ln_f.weight").abs().min() > 0
    assert load_model("tiny-llada").get_parameter("model.transformer.ln_f.weight").abs().min() > 0


def test_a_module_is_returned_as_it_is() -> None:
    module = nn.Linear(2, 2)
    assert load_model(module) is module
    assert load_tokenizer(module) is None


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "weight_tying": True}], ids=["plain", "gqa-tied"])
@pytest.mark.parametrize("sharded", [False, True])
def test_llada_survives_save_and_load(changes: dict[str, Any], sharded: bool, tmp_path: Path, toys: Any) -> None:
    model, ids = toys.llada(**changes), toys.ids()
    model.save_pretrained(tmp_path)
    again = load_model(shard(tmp_path) if sharded else tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_dream_survives_save_and_load(tied: bool, tmp_path: Path, toys: Any) -> None:
    model, ids = toys.dream(tie_word_embeddings=tied), toys.ids()
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.get_parameter("lm_head.weight") is again.get_parameter("model.embed_tokens.weight")) is tied


def test_the_auto_classes_know_the_native_ones(llada_folder: Path, toys: Any) -> None:
    register()
    register()
    assert torch.equal(
        AutoModelForMaskedLM.from_pretrained(llada_folder)(toys.ids()).logits, toys.llada()(toys.ids()).logits
    )


@pytest.mark.parametrize("source", ["tiny-lada", "/nowhere/at/all", "./nowhere"])
def test_no_such_folder(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(source)
    assert str(caught.value).startswith(f"{source}: there is no such folder. ")
    assert str(caught.value).endswith("or give a folder or a Hub id owner/name")
    assert ("Did you mean 'tiny-llada'?" in str(caught.value)) is (source == "tiny-lada")


def test_a_failing_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError) as caught:
        load_model("owner/name")
    assert str(caught.value) == (
        "owner/name: cannot be downloaded (ConnectionError). Check the name and the network, or give a local folder"
    )
    assert isinstance(caught.value.__cause__, ConnectionError)
    with pytest.raises(ModelError):
        find_folder("owner/name", code=True)
    assert ["*.py" in patterns for patterns in asked] == [False, True]


def test_configuration_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no config\.json\. Give a folder with a Hugging Face model"):
        load_model(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "holds no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=rf"config\.json: {message}.*Copy the file again"):
            load_model(tmp_path)


def test_no_weights_or_only_pickles(llada_folder: Path) -> None:
    (llada_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"there is no model\.safetensors\. Download the checkpoint again"):
        load_model(llada_folder)
    (llada_folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, and pickle files are not read\. Convert"):
        load_model(llada_folder)


def test_missing_shard(llada_folder: Path) -> None:
    (shard(llada_folder) / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: the shard is missing\. Download the checkpoint again"):
        load_model(llada_folder)


def test_index_that_does_not_fit(llada_folder: Path) -> None:
    index = shard(llada_folder) / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    for weight_map, message in (
        ({**whole, "extra": "a.safetensors"}, r"a\.safetensors: tensor 'extra' is not in the shard, though the index"),
        ({"extra": "../a.safetensors"}, r"names the shard '\.\./a\.safetensors', which lies outside the folder"),
        ({}, "index.json: has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=message):
            load_model(llada_folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1], ids=["empty", "no-header", "half-header", "last-byte"])
def test_truncated_file(kept: int, llada_folder: Path) -> None:
    file = llada_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: the shard is corrupt or truncated .*Download it again"):
        load_model(llada_folder)


def test_corrupt_header(llada_folder: Path) -> None:
    file = llada_folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"the shard is corrupt or truncated"):
        load_model(llada_folder)


def test_missing_unexpected_and_mis_shaped_tensors(llada_folder: Path) -> None:
    whole = tensors_of(llada_folder)
    name = "model.transformer.blocks.1.up_proj.weight"
    write(llada_folder, {k: v for k, v in whole.items() if k != name})
    with pytest.raises(ModelError, match=f"tensor '{name}' is missing. Download the checkpoint again"):
        load_model(llada_folder)
    write(llada_folder, {k: v for k, v in whole.items() if "blocks.1" not in k})
    with pytest.raises(
        ModelError, match=r"tensor 'model\.transformer\.blocks\.1\.attn_norm\.weight' \(and 8 more\) are"
    ):
        load_model(llada_folder)
    write(llada_folder, whole | {"stray": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"tensor 'stray' is unexpected. The configuration does not fit the weights"):
        load_model(llada_folder)
    write(llada_folder, whole | {name: torch.zeros(47, 32)})
    with pytest.raises(ModelError, match=rf"{name}: is \[47, 32\], the configuration says \[48, 32\]"):
        load_model(llada_folder)


def test_a_tied_head_must_be_the_embedding(tmp_path: Path, toys: Any) -> None:
    toys.dream(tie_word_embeddings=True).save_pretrained(tmp_path)
    whole = tensors_of(tmp_path)
    write(tmp_path, whole | {"lm_head.weight": whole["model.embed_tokens.weight"].clone()})
    load_model(tmp_path)
    write(tmp_path, whole | {"lm_head.weight": torch.zeros(64, 32)})
    with pytest.raises(ModelError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight, to which the"):
        load_model(tmp_path)


def test_derived_tables_of_old_conversions_are_passed_over(tmp_path: Path, toys: Any) -> None:
    toys.dream().save_pretrained(tmp_path)
    write(tmp_path, tensors_of(tmp_path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert torch.equal(load_model(tmp_path)(toys.ids()).logits, toys.dream()(toys.ids()).logits)


def test_quantized_checkpoints_are_refused(llada_folder: Path, toys: Any) -> None:
    toys.rewrite(llada_folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"config\.json: the checkpoint is quantized already\. Give the original"):
        load_model(llada_folder)


def test_unusable_weights_are_named() -> None:
    good = torch.ones(4, dtype=torch.bfloat16)
    check_finite([("good", good), ("ids", torch.ones(2, dtype=torch.int64)), ("huge", torch.full((9,), 3e38))])
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ModelError, match=r"bad: 2 of 4 weights are NaN or Inf\. The checkpoint is damaged"):
            check_finite([("good", good), ("bad", torch.tensor([1.0, bad, 2.0, bad]))])


def test_masked_models_of_transformers_load_and_say_what_they_leave(tmp_path: Path, toys: Any) -> None:
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    write(tmp_path, tensors_of(tmp_path) | {"cls.seq_relationship.bias": torch.zeros(2)})
    again = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(again(toys.ids()).logits, model(toys.ids()).logits)
    assert again.dlqc_unused == ("cls.seq_relationship.bias",)


def test_a_missing_tensor_is_never_made_up(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"
    write(tmp_path, {k: v for k, v in tensors_of(tmp_path).items() if k != name})
    with pytest.raises(ModelError, match=rf"tensor '{name}' is missing \(1 in all\).*saved from BertForMaskedLM"):
        load_model(tmp_path)


def test_a_mis_shaped_tensor_of_transformers_is_an_error(tmp_path: Path, toys: Any) -> None:
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    toys.rewrite(tmp_path, intermediate_size=40)
    with pytest.raises(ModelError, match=r"transformers cannot load it .*Check that config.json fits the weights"):
        load_model(tmp_path)


def test_decoders_become_bidirectional_only_when_told(tmp_path: Path, toys: Any) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    for refused in (None, False):
        with pytest.raises(
            ModelError, match=r"LlamaForCausalLM is a causal decoder, not a denoiser. Pass bidirectional="
        ):
            load_model(tmp_path, bidirectional=refused)
    assert isinstance(load_model(tmp_path, bidirectional=True), Bidirectional)
    toys.rewrite(tmp_path, mask_token_id=63)
    assert isinstance(load_model(tmp_path), Bidirectional)


def test_meta_keeps_the_tables_of_a_decoder(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    full = load_model(tmp_path, bidirectional=True)
    plan = load_model(tmp_path, bidirectional=True, meta=True, dtype=torch.bfloat16)
    assert {(p.is_meta, p.dtype) for p in plan.parameters()} == {(True, torch.bfloat16)}
    assert all(not b.is_meta for b in plan.buffers())
    assert [n for n, _ in plan.named_buffers()] == [n for n, _ in full.named_buffers()]


def test_foreign_model_types_are_refused(tmp_path: Path, toys: Any, llada_folder: Path) -> None:
    folder = Path(shutil.copytree(llada_folder, tmp_path / "other"))
    toys.rewrite(folder, model_type="mystery", architectures=["Mystery"])
    with pytest.raises(ModelError, match=r"model type 'mystery' is no language model that transformers knows. Give a"):
        load_model(folder)
    toys.rewrite(folder, auto_map={"AutoModel": "m.M"})
    with pytest.raises(
        ModelError, match=r"and brings code of its own. Pass trust_remote_code=True if you trust that code"
    ):
        load_model(folder)


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    capfd.readouterr()
    load_model(tmp_path)
    load_model("tiny-llada")
    assert capfd.readouterr() == ("", "")
