"""Artifacts: what is saved comes back bit for bit, and nothing else than what was saved is accepted.

One long file, because every case starts from the same few models, compiled and saved once for the whole of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import dlqc
import dlqc.artifact
from dlqc.artifact import FORMAT, read_report, save, verify
from dlqc.contract import Context, Pass, PassReport
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ArtifactError
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.recipe import ForeignPass
from dlqc.rounding.rtn import Rtn

RECIPES = {
    "w8a8": "w8a8-rtn",
    "w4a16": "w4a16-g32-gptq",
    "w3": "w3a16-g64-rtn",
    "w2": "w2a16-g32-rtn",
    "smooth": "calibrate(sequences=4, length=16), smooth, "
    "quantize_weights(group_size=32, method=rtn, skip=('*.0.q_proj',)), pack, lower",
    "nothing": [],
    "not lowered": "quantize_weights(group_size=32, method=rtn), pack",
}


def llada(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64, "vocab_size": 64}
    return LLaDAModelLM(LLaDAConfig(max_sequence_length=32, mask_token_id=63, **(sizes | options))).eval()


def compiled(recipe: Any, model: nn.Module | None = None, backend: str = "reference") -> dlqc.Compiled:
    rows = torch.randint(0, 63, (8, 16), generator=torch.Generator().manual_seed(1))
    model = llada() if model is None else model
    return dlqc.compile(model, recipe, calibration=rows, backend=backend, progress=False)


def ids() -> Tensor:
    made = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(2))
    made[:, 4:] = 63
    return made


@pytest.fixture(scope="module")
def models() -> dict[str, dlqc.Compiled]:
    return {name: compiled(recipe) for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def originals(models: dict[str, dlqc.Compiled], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of each recipe; tests that change one take a copy."""
    root = tmp_path_factory.mktemp("artifacts")
    for name, model in models.items():
        save(model, root / name, verify_reload=False)
    return root


@pytest.fixture
def artifact(originals: Path, tmp_path: Path) -> Path:
    """A copy of the 4-bit artifact, to be damaged."""
    return Path(shutil.copytree(originals / "w4a16", tmp_path / "artifact"))


def sign(folder: Path) -> None:
    """Write the sizes and hashes of what is there now into the manifest, as somebody would who tampers with care."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    names = [p.name for p in folder.iterdir() if p != path]
    manifest["files"] = {
        n: {"sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest(), "bytes": (folder / n).stat().st_size}
        for n in names
    }
    path.write_text(json.dumps(manifest))


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """JSON data to change; written back, with hashes that fit."""
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))
    if path.name != "manifest.json":
        sign(path.parent)


def refused(folder: Path, *words: str, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        dlqc.load(folder, backend="reference", **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestRoundTrip:
    @pytest.mark.parametrize("name", RECIPES)
    def test_logits_are_equal_bit_for_bit(
        self, name: str, models: dict[str, dlqc.Compiled], originals: Path, tmp_path: Path
    ) -> None:
        loaded = dlqc.load(originals / name, backend="reference")
        assert torch.equal(loaded(ids()), models[name](ids()))
        assert loaded(ids()).dtype == models[name](ids()).dtype
        assert loaded.recipe == models[name].recipe
        assert loaded.report == models[name].report
        assert loaded.spec == models[name].spec
        assert loaded.config == json.loads(json.dumps(models[name].config))
        assert loaded.tokenizer is None

    @pytest.mark.parametrize("name", RECIPES)
    def test_saving_again_writes_the_same_bytes(self, name: str, originals: Path, tmp_path: Path) -> None:
        save(dlqc.load(originals / name, backend="reference"), tmp_path / "again", verify_reload=False)
        again, first = content(tmp_path / "again"), content(originals / name)
        assert again.keys() == first.keys()
        assert [n for n in first if again[n] != first[n] and n not in ("report.json", "manifest.json")] == []

    def test_a_fresh_process_computes_the_same(
        self, models: dict[str, dlqc.Compiled], originals: Path, tmp_path: Path
    ) -> None:
        save_file({"ids": ids()}, tmp_path / "ids.safetensors")
        script = (
            "import sys, dlqc; from safetensors.torch import load_file, save_file\n"
            "root, scratch, *names = sys.argv[1:]\n"
            "ids = load_file(f'{scratch}/ids.safetensors')['ids']\n"
            "made = {n: dlqc.load(f'{root}/{n}', backend='reference')(ids) for n in names}\n"
            "save_file(made, f'{scratch}/logits.safetensors')\n"
        )
        command = [sys.executable, "-W", "error", "-c", script, str(originals), str(tmp_path), *models]
        subprocess.run(command, check=True, timeout=120)
        found = load_file(tmp_path / "logits.safetensors")
        assert found.keys() == models.keys()
        for name, logits in found.items():
            assert torch.equal(logits, models[name](ids())), name

    def test_the_other_backend(self, models: dict[str, dlqc.Compiled], originals: Path, tmp_path: Path) -> None:
        expected = models["w4a16"](ids())
        loaded = dlqc.load(originals / "w4a16", backend="cpu")
        deviation = float((loaded(ids()) - expected).norm() / expected.norm())
        assert deviation < 2e-2  # bfloat16 products where no compiler is, the same sums where one is
        assert loaded.report.backend == "cpu"
        lowering = [next(s for s in r.steps if s.name == "lower") for r in (loaded.report, models["w4a16"].report)]
        assert lowering[0].choices.keys() == lowering[1].choices.keys()
        assert all(not c.startswith("reference") for c in lowering[0].choices.values()), "explain() names what runs"
        # What was loaded for one backend is saved and compared on that one.
        assert save(loaded, tmp_path / "again").reload_deviation == 0.0
        assert torch.equal(dlqc.load(tmp_path / "again", backend="reference")(ids()), expected)

    @pytest.mark.parametrize("recipe", [[], "w4a16-g32-rtn"])
    def test_tied_weights_are_stored_once(self, recipe: Any, tmp_path: Path) -> None:
        model = compiled(recipe, llada(weight_tying=True))
        save(model, tmp_path / "tied", verify_reload=False)
        assert torch.equal(dlqc.load(tmp_path / "tied", backend="reference")(ids()), model(ids()))
        tensors = load_file(tmp_path / "tied" / "weights.safetensors")
        assert sum(t.shape == (64, 64) and t.is_floating_point() for t in tensors.values()) == (1 if recipe else 15)

    def test_declared_ties_and_shared_modules(self, tmp_path: Path) -> None:
        class Tied(nn.Module):
            """Two modules of one weight, and one module that runs twice."""

            spec = DiffusionSpec(mask_id=15, vocab_size=16, max_length=16)

            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
                self.a, self.b, self.shared = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
                self.b.weight = self.a.weight

            def forward(self, ids: Tensor) -> Tensor:
                x = self.embed(ids)
                return self.head(self.shared(self.b(self.a(self.shared(x)))))

        model = dlqc.compile(Tied().eval(), [], backend="reference", progress=False)
        assert any(c.aliases for c in model.weights.values())
        save(model, tmp_path / "tied")
        loaded = dlqc.load(tmp_path / "tied")
        given = torch.randint(0, 16, (2, 5))
        assert torch.equal(loaded(given), model(given))
        assert {n: c.aliases for n, c in loaded.weights.items()} == {n: c.aliases for n, c in model.weights.items()}

    def test_bfloat16(self, tmp_path: Path) -> None:
        model = compiled(
            "calibrate(sequences=4, length=16), smooth, quantize_weights(group_size=32, method=rtn), pack, lower",
            llada().to(torch.bfloat16),
        )
        save(model, tmp_path / "out", verify_reload=False)
        assert torch.equal(dlqc.load(tmp_path / "out", backend="reference")(ids()), model(ids()))

    def test_names_that_differ_in_dots_only(self, tmp_path: Path) -> None:
        class Dots(nn.Module):
            spec = DiffusionSpec(mask_id=15, vocab_size=16, max_length=16)

            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(16, 8)
                self.a, self.a_b = nn.Module(), nn.Linear(8, 16, bias=False)
                self.a.b = nn.Linear(8, 8, bias=False)

            def forward(self, ids: Tensor) -> Tensor:
                return self.a_b(self.a.b(self.embed(ids)))

        eager = Dots().eval()
        model = dlqc.compile(eager, [], backend="reference", progress=False)
        assert torch.equal(model(ids() % 16), eager(ids() % 16))
        save(model, tmp_path / "out", verify_reload=False)
        assert torch.equal(dlqc.load(tmp_path / "out")(ids() % 16), eager(ids() % 16))

    def test_shards(
        self,
        models: dict[str, dlqc.Compiled],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(dlqc.artifact, "SHARD_BYTES", 20_000)
        save(models["nothing"], tmp_path / "out", verify_reload=False)
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        assert [p.name for p in shards[:2]] == ["weights-00001.safetensors", "weights-00002.safetensors"]
        assert all(sum(t.nbytes for t in load_file(p).values()) <= 20_000 for p in shards)
        assert torch.equal(dlqc.load(tmp_path / "out")(ids()), models["nothing"](ids()))

    def test_verify_and_read_report(self, originals: Path, models: dict[str, dlqc.Compiled]) -> None:
        found = verify(originals / "w4a16", backend="reference")
        assert found["deviation"] == 0.0
        assert found["agreement"] == 1.0
        assert len(found["checks"]) == 4
        assert read_report(originals / "w4a16") == models["w4a16"].report

    def test_the_bundled_model_with_its_tokenizer(self, tmp_path: Path) -> None:
        model = dlqc.load_model("tiny-llada")
        q = dlqc.compile(model, "w8a8-rtn", backend="reference", progress=False)
        saved = q.save(tmp_path / "out")
        assert saved.reload_deviation == 0.0
        assert saved.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
        loaded = dlqc.load(tmp_path / "out", backend="reference")
        text = "Once upon a time, Lily's café burned 37 times."
        encoded = loaded.tokenizer(text)["input_ids"]
        assert encoded == q.tokenizer(text)["input_ids"]
        assert loaded.tokenizer.decode(encoded) == q.tokenizer.decode(encoded)
        assert loaded.tokenizer.mask_token_id == q.tokenizer.mask_token_id
        given = torch.tensor([encoded])
        assert torch.equal(loaded(given), q(given))


def test_the_format_is_what_its_page_says(originals: Path, models: dict[str, dlqc.Compiled]) -> None:
    """A reader written from docs/format.md alone, without safetensors, dlqc or torch's packing."""
    folder, site = originals / "w3", "model.transformer.blocks.1.up_proj"
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    assert f"# The artifact, format {FORMAT}\n" in page
    raw = (folder / "weights.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])

    def stored(role: str) -> tuple[list[int], str, bytes]:
        entry = header[f"{site}.{role}"]
        start, end = entry["data_offsets"]
        return entry["shape"], entry["dtype"], raw[8 + size :][start:end]

    def codes(role: str, count: int, bits: int) -> list[list[int]]:
        (rows, width), dtype, data = stored(role)
        assert (width, dtype) == (4 * -(-count * bits // 32), "U8")
        streams = [int.from_bytes(data[r * width : (r + 1) * width], "little") for r in range(rows)]
        return [[(s >> (k * bits)) & (2**bits - 1) for k in range(count)] for s in streams]

    graph = json.loads((folder / "graph.json").read_text())
    constants = {n["target"]: n["name"] for n in graph["nodes"] if n["op"] == "get_attr"}
    (node,) = (
        n
        for n in graph["nodes"]
        if n.get("target") == "dlqc.linear_packed.default"
        and n["args"][1] == {"node": constants[f"{site}.codes_packed"]}
    )
    *_, bits, group = node["args"]
    assert (bits, group, node["module"].endswith("up_proj")) == (3, 64, True)
    (rows, groups), dtype, data = stored("scales")
    assert dtype == "BF16"
    words = [int.from_bytes(data[i : i + 2], "little") << 16 for i in range(0, len(data), 2)]
    scales = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32).reshape(rows, groups)
    zeros = torch.tensor(codes("zeros_packed", groups, bits))
    values = torch.tensor(codes("codes_packed", 64, bits)).reshape(rows, groups, -1)
    found = ((values - zeros[..., None]) * scales[..., None]).reshape(rows, 64)

    expected = QuantizeWeights(bits=3, group_size=64).target.quantize(llada().get_parameter(f"{site}.weight").data)
    assert torch.equal(found, expected.dequantize())


class TestSaving:
    def test_reports_a_fresh_process(self, models: dict[str, dlqc.Compiled], tmp_path: Path) -> None:
        saved = models["w2"].save(tmp_path / "new" / "folder")
        assert saved.reload_deviation == 0.0
        assert saved.files == {p.name: p.stat().st_size for p in (tmp_path / "new" / "folder").iterdir()}

    @pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
    def test_permissions_are_the_umask_s(
        self, umask: int, file: int, folder: int, models: dict[str, dlqc.Compiled], tmp_path: Path
    ) -> None:
        old = os.umask(umask)
        try:
            save(models["w2"], tmp_path / "out", verify_reload=False)
        finally:
            os.umask(old)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {file}
        assert (tmp_path / "out").stat().st_mode & 0o777 == folder

    def test_an_artifact_is_replaced_whole(
        self, artifact: Path, models: dict[str, dlqc.Compiled], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dlqc.artifact, "SHARD_BYTES", 20_000)
        save(models["nothing"], artifact, verify_reload=False)
        assert torch.equal(dlqc.load(artifact)(ids()), models["nothing"](ids()))
        assert "weights.safetensors" not in content(artifact), "a file of the old artifact is left"
        assert os.listdir(artifact.parent) == ["artifact"]

    def test_a_damaged_artifact_may_be_replaced(self, artifact: Path, models: dict[str, dlqc.Compiled]) -> None:
        (artifact / "graph.json").unlink()
        save(models["w2"], artifact, verify_reload=False)
        assert torch.equal(dlqc.load(artifact, backend="reference")(ids()), models["w2"](ids()))

    def test_a_link_keeps_pointing(self, artifact: Path, models: dict[str, dlqc.Compiled]) -> None:
        link = artifact.parent / "link"
        link.symlink_to("artifact")
        save(models["w2"], link, verify_reload=False)
        assert link.is_symlink()
        assert torch.equal(dlqc.load(artifact, backend="reference")(ids()), models["w2"](ids()))

    def test_an_empty_folder_is_taken(self, models: dict[str, dlqc.Compiled], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        save(models["w2"], tmp_path / "out", verify_reload=False)
        assert dlqc.load(tmp_path / "out").spec == models["w2"].spec

    def test_a_folder_that_holds_something_else(self, models: dict[str, dlqc.Compiled], tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(ArtifactError, match="holds something that is no dlqc artifact. Choose an empty or new"):
            save(models["w2"], tmp_path)
        assert content(tmp_path) == {"thesis.txt": b"precious"}

    def test_somebody_else_s_manifest(self, models: dict[str, dlqc.Compiled], tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text('{"manifest_version": 3, "name": "a browser extension"}')
        (tmp_path / "main.js").write_text("precious")
        before = content(tmp_path)
        with pytest.raises(ArtifactError, match="no dlqc artifact"):
            save(models["w2"], tmp_path)
        assert content(tmp_path) == before

    def test_a_file_put_into_an_artifact_is_not_deleted(self, artifact: Path, models: dict[str, dlqc.Compiled]) -> None:
        (artifact / "notes.md").write_text("precious")
        before = content(artifact)
        with pytest.raises(ArtifactError, match=r"holds 'notes.md' besides an artifact, and saving would delete it"):
            save(models["w2"], artifact)
        assert content(artifact) == before

    def test_a_file_in_place_of_the_folder(self, models: dict[str, dlqc.Compiled], tmp_path: Path) -> None:
        (tmp_path / "out").write_text("precious")
        with pytest.raises(ArtifactError, match="out: is a file, not a folder. Choose another name"):
            save(models["w2"], tmp_path / "out")
        assert content(tmp_path) == {"out": b"precious"}

    def test_a_file_in_place_of_the_parent(self, models: dict[str, dlqc.Compiled], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("precious")
        with pytest.raises(ArtifactError, match="cannot be written"):
            save(models["w2"], tmp_path / "file" / "out")
        assert content(tmp_path) == {"file": b"precious"}


class TestFullDisk:
    """The old artifact stays whole, and nothing is left behind."""

    def fails(self, models: dict[str, dlqc.Compiled], artifact: Path, words: str) -> None:
        before = content(artifact)
        with pytest.raises(ArtifactError, match=words) as caught:
            save(models["nothing"], artifact, verify_reload=False)
        assert "what was there before is unchanged" in str(caught.value)
        assert content(artifact) == before
        assert os.listdir(artifact.parent) == ["artifact"]
        assert torch.equal(dlqc.load(artifact, backend="reference")(ids()), models["w4a16"](ids()))

    @pytest.mark.parametrize("limit", [100, 20_000, 200_000])
    def test_the_system_refuses_to_write_on(self, limit: int, models: dict[str, dlqc.Compiled], artifact: Path) -> None:
        """A real limit on file size: the weights (with 200,000 all but the last bytes) or nothing fits."""
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            self.fails(models, artifact, "cannot be written .*File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    @pytest.mark.parametrize("module", ["save_file", "_json", "_sha256"])
    def test_half_way(
        self, module: str, models: dict[str, dlqc.Compiled], artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(dlqc.artifact, module, full)
        before = content(artifact)
        with pytest.raises(ArtifactError, match=r"cannot be written \(No space left on device\). Free space or choose"):
            save(models["nothing"], artifact, verify_reload=False)
        monkeypatch.undo()
        assert content(artifact) == before
        assert os.listdir(artifact.parent) == ["artifact"]

    def test_at_the_flush(
        self, models: dict[str, dlqc.Compiled], artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(os, "fsync", full)
        self.fails(models, artifact, "Disk quota exceeded")

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
    def test_at_the_last_rename(
        self,
        error: BaseException,
        models: dict[str, dlqc.Compiled],
        artifact: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The old folder has stepped aside already, and comes back."""
        calls: list[Path] = []
        rename = os.rename

        def failing(source: Path, target: Path) -> None:
            calls.append(Path(source))
            if len(calls) == 2:
                raise error
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        before = content(artifact)
        with pytest.raises((ArtifactError, KeyboardInterrupt)):
            save(models["nothing"], artifact, verify_reload=False)
        assert len(calls) == 3
        assert content(artifact) == before
        assert os.listdir(artifact.parent) == ["artifact"]

    def test_where_even_the_way_back_fails_the_old_folder_is_kept(
        self, models: dict[str, dlqc.Compiled], artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename, calls = os.rename, []

        def failing(source: Path, target: Path) -> None:
            calls.append(source)
            if len(calls) > 1:
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        before = content(artifact)
        with pytest.raises(ArtifactError, match="Input/output error"):
            save(models["nothing"], artifact, verify_reload=False)
        (left,) = artifact.parent.iterdir()
        assert ".old." in left.name
        assert content(left) == before

    def test_a_copy_that_computes_something_else_is_not_kept(
        self, artifact: Path, models: dict[str, dlqc.Compiled], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = content(artifact)
        monkeypatch.setattr(dlqc.artifact.Weights, "value", lambda self, name, dtype=None: self[name].stored() * 0)
        with pytest.raises(ArtifactError, match="the saved copy computes something else"):
            save(models["nothing"], artifact)
        assert content(artifact) == before

    def test_a_copy_that_does_not_load_is_not_kept(
        self, artifact: Path, models: dict[str, dlqc.Compiled], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = content(artifact)
        monkeypatch.setattr(dlqc.artifact, "FORMAT", FORMAT + 1)
        with pytest.raises(ArtifactError, match=rf"does not load again: .*has format {FORMAT + 1}, this dlqc reads"):
            save(models["nothing"], artifact)
        assert content(artifact) == before


class TestFolders:
    def test_no_such_folder(self, tmp_path: Path) -> None:
        refused(tmp_path / "nowhere", "nowhere: there is no such folder. Check the path")

    def test_no_artifact(self, tmp_path: Path) -> None:
        refused(tmp_path, "no manifest.json in it: this is no dlqc artifact")

    def test_a_newer_format(self, artifact: Path) -> None:
        with edited(artifact / "manifest.json") as manifest:
            manifest["format"], manifest["versions"]["dlqc"] = FORMAT + 1, "7.5"
        refused(artifact, f"has format {FORMAT + 1}, this dlqc reads up to {FORMAT}. Install dlqc 7.5 or newer")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "1"),
            ("format", True),
            ("format", 0),
            ("format", None),
            ("versions", []),
            ("files", ["graph.json"]),
            ("files", {"graph.json": {"bytes": 3}}),
            ("files", {"graph.json": "x"}),
        ],
    )
    def test_a_manifest_of_another_shape(self, key: str, value: Any, artifact: Path) -> None:
        with edited(artifact / "manifest.json") as manifest:
            manifest[key] = value
        refused(artifact, f"manifest.json: is no manifest of dlqc ({key}", "save the model again")

    def test_a_manifest_that_is_a_list(self, artifact: Path) -> None:
        (artifact / "manifest.json").write_text("[]")
        refused(artifact, "is no manifest of dlqc")

    @pytest.mark.parametrize("name", ["manifest.json", "graph.json", "spec.json", "report.json"])
    @pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["cut", "no utf-8", "deep"])
    def test_invalid_json(self, name: str, text: bytes, artifact: Path) -> None:
        (artifact / name).write_bytes(text)
        if name != "manifest.json":
            sign(artifact)
        refused(artifact, f"{name}: cannot be read as JSON", "Copy it again")

    @pytest.mark.parametrize("name", ["graph.json", "recipe.yaml", "report.json", "spec.json", "weights.safetensors"])
    def test_a_missing_file(self, name: str, artifact: Path) -> None:
        (artifact / name).unlink()
        refused(artifact, f"{name}: is missing. Copy the whole folder again")
        sign(artifact)
        expected = "tensor " if name == "weights.safetensors" else f"the manifest does not list {name}"
        refused(artifact, expected)

    def test_a_truncated_file(self, artifact: Path) -> None:
        path = artifact / "weights.safetensors"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-10])
        refused(
            artifact, f"weights.safetensors: has {size - 10} bytes, the manifest says {size}. The file is truncated"
        )
        sign(artifact)
        refused(artifact, "weights.safetensors: cannot be read")

    @pytest.mark.parametrize("name", ["graph.json", "recipe.yaml", "report.json", "spec.json", "weights.safetensors"])
    def test_a_flipped_bit(self, name: str, artifact: Path) -> None:
        path = artifact / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        refused(artifact, f"{name}: does not have the hash in the manifest")

    @pytest.mark.parametrize("name", ["extra.safetensors", "tokenizer_config.json", "model.bin"])
    def test_an_unlisted_file(self, name: str, artifact: Path) -> None:
        (artifact / name).write_bytes(b"{}")
        refused(artifact, f"{name}: is not listed in the manifest. Remove it")

    def test_a_readme_and_hidden_files_are_let_be(self, artifact: Path) -> None:
        (artifact / "README.md").write_text("my model")
        (artifact / ".gitattributes").write_text("")
        assert dlqc.load(artifact).spec.mask_id == 63

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", ".", "a/b.json", "..\\x", ""])
    @pytest.mark.parametrize("check_hashes", [True, False])
    def test_a_name_that_leaves_the_folder(self, name: str, check_hashes: bool, artifact: Path) -> None:
        save_file({"x": torch.zeros(1)}, artifact.parent / "x.safetensors")
        with edited(artifact / "manifest.json") as manifest:
            manifest["files"][name] = {"sha256": "", "bytes": 0}
        refused(artifact, f"the manifest lists {name!r}, which is no file of the folder", check_hashes=check_hashes)


class TestTensors:
    @contextmanager
    def edited(self, artifact: Path) -> Iterator[dict[str, Tensor]]:
        tensors = load_file(artifact / "weights.safetensors")
        yield tensors
        save_file(tensors, artifact / "weights.safetensors")
        sign(artifact)

    def test_missing(self, artifact: Path) -> None:
        with self.edited(artifact) as tensors:
            del tensors["model.transformer.wte.weight"]
        refused(artifact, "tensor 'model.transformer.wte.weight' is missing")

    def test_unexpected(self, artifact: Path) -> None:
        with self.edited(artifact) as tensors:
            tensors["more"] = torch.zeros(1)
        refused(artifact, "tensor 'more' is unexpected")

    def test_misshapen(self, artifact: Path) -> None:
        with self.edited(artifact) as tensors:
            tensors["model.transformer.wte.weight"] = torch.zeros(65, 64)
        refused(artifact, "'model.transformer.wte.weight' is float32[65, 64], the graph says float32[64, 64]")

    @pytest.mark.parametrize("role", ["codes_packed", "scales"])
    def test_of_another_kind_of_number(self, role: str, artifact: Path) -> None:
        name = f"model.transformer.blocks.0.q_proj.{role}"
        with self.edited(artifact) as tensors:
            tensors[name] = tensors[name].to(torch.int16)
        refused(artifact, f"tensor {name!r} is int16", "the graph says ")

    def test_twice(self, artifact: Path) -> None:
        shutil.copy(artifact / "weights.safetensors", artifact / "weights-2.safetensors")
        sign(artifact)
        refused(artifact, "is there twice")

    def test_packed_codes_of_the_wrong_width(self, artifact: Path) -> None:
        """Tensor and graph agree with each other, but not with the bits that the op is told."""
        name = "model.transformer.blocks.0.q_proj.codes_packed"
        with self.edited(artifact) as tensors:
            tensors[name] = tensors[name][:, :-4].contiguous()
        with edited(artifact / "graph.json") as graph:
            node = next(n for n in graph["nodes"] if n.get("target") == name)
            node["shape"][1] -= 4
        refused(artifact, "the graph is not legal (law L7 is broken after loading", "must be [64, 32]")


NASTY = "x=__import__('os').system('touch pwned')"


class TestGraph:
    def node(self, graph: Any, part: str) -> dict[str, Any]:
        found: dict[str, Any] = next(n for n in graph["nodes"] if part in n.get("target", n["name"]))
        return found

    @pytest.mark.parametrize(
        "target",
        [
            "os.system",
            "builtins.eval",
            "operator.methodcaller",
            "operator.attrgetter",
            "torch.load",
            "aten.from_file.default",
            "aten.save.default",
            "aten.silu_.default",
            "aten.silu.out",
            "aten.silu",
            "aten.nosuch.default",
            "aten.__class__.mro",
            "dlqc_cpu.dequant.default",
            "prim.device.default",
            "",
            None,
            ["aten.silu.default"],
        ],
    )
    def test_a_target_outside_the_list(self, target: Any, artifact: Path) -> None:
        with edited(artifact / "graph.json") as graph:
            self.node(graph, "aten.silu")["target"] = target
        refused(artifact, f"graph.json: {target!r} is no op that a graph may call")

    def test_a_file_is_not_written(self, artifact: Path) -> None:
        """`aten.from_file` creates a file; it is refused before it is called."""
        victim = artifact.parent / "victim"
        with edited(artifact / "graph.json") as graph:
            made = {"name": "evil", "op": "call_function", "target": "aten.from_file.default"}
            graph["nodes"].insert(0, made | {"args": [str(victim), True, 16], "kwargs": {}})
        refused(artifact, "is no op that a graph may call")
        assert not victim.exists()

    @pytest.mark.parametrize("part", ["input_ids", "aten.silu", "model.transformer.wte.weight"])
    def test_a_name_that_is_code(self, part: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """fx writes the names of nodes into the function that it generates."""
        monkeypatch.chdir(artifact.parent)
        text = (artifact / "graph.json").read_text()
        with edited(artifact / "graph.json") as graph:
            old = self.node(graph, part)["name"]
        (artifact / "graph.json").write_text(text.replace(json.dumps(old), json.dumps(NASTY)))
        sign(artifact)
        refused(artifact, "is no name for a node")
        assert not Path("pwned").exists()

    @pytest.mark.parametrize("name", ["x\")+__import__('os').system('touch pwned')#", "a b", "a'b", "a\\b", "a(b)", ""])
    def test_a_constant_that_is_code(self, name: str, artifact: Path) -> None:
        with edited(artifact / "graph.json") as graph:
            self.node(graph, "model.transformer.wte.weight")["target"] = name
        refused(artifact, "is no constant")

    def test_a_constant_with_an_odd_name_runs(self, models: dict[str, dlqc.Compiled], artifact: Path) -> None:
        """Names that pass the check are still not spelled out in generated code."""
        odd = "größe[0]-:;@,$"
        with edited(artifact / "graph.json") as graph:
            self.node(graph, "model.transformer.wte.weight")["target"] = odd
        tensors = load_file(artifact / "weights.safetensors")
        tensors[odd] = tensors.pop("model.transformer.wte.weight")
        save_file(tensors, artifact / "weights.safetensors")
        sign(artifact)
        assert torch.equal(dlqc.load(artifact, backend="reference")(ids()), models["w4a16"](ids()))

    @pytest.mark.parametrize(
        ("part", "change", "words"),
        [
            ("aten.silu", {"op": "call_method"}, "is a 'call_method', which no graph may hold"),
            ("aten.silu", {"op": "call_module"}, "is a 'call_module', which no graph may hold"),
            ("wte.weight", {"dtype": "complex64"}, "unknown dtype 'complex64'"),
            ("wte.weight", {"dtype": "Tensor"}, "unknown dtype 'Tensor'"),
            ("wte.weight", {"dtype": ["float32"]}, "unknown dtype ['float32']"),
            ("wte.weight", {"shape": [-1, 64]}, "is no constant"),
            ("ln_f.weight", {"shape": [64, 1]}, "cannot be computed"),
            ("wte.weight", {"shape": ["a"]}, "is not of the expected shape (ValueError"),
            ("aten.linear.default", {"args": []}, "cannot be computed"),
            ("aten.linear.default", {"args": [3, 4]}, "cannot be computed"),
            ("aten.silu", {"kwargs": {"inplace": True}}, "cannot be computed"),
            ("aten.silu", {"kwargs": []}, "is not of the expected shape"),
            ("aten.silu", {"args": [{"node": "later"}]}, "node 'later' is used before it is defined"),
            ("aten.silu", {"args": [{"node": ["x"]}]}, "is not of the expected shape"),
            ("aten.silu", {"args": [{"code": "1"}]}, "{'code': '1'} is no argument"),
            ("aten.silu", {"args": [{"dtype": "object"}]}, "unknown dtype 'object'"),
            ("aten.silu", {"args": [{"device": 0}]}, "is no argument"),
            ("aten.silu", {"args": [{"device": "c u"}]}, "is no argument"),
            ("aten.silu", {"args": [{"device": "abacus"}]}, "is not of the expected shape (RuntimeError"),
            ("aten.silu", {"args": [{"layout": "sparse"}]}, "is no argument"),
            ("aten.silu", {"args": [{"memory_format": "x"}]}, "is no argument"),
            ("aten.silu", {"args": [{"float": "1"}]}, "is no argument"),
            ("aten.silu", {"name": "input_ids"}, "'input_ids' is no name for a node, or is there twice"),
            ("output", {"args": []}, "is not of the expected shape (IndexError"),
            ("output", {"args": [[]]}, "the graph is not legal (law L2"),
            ("output", {"args": [{"node": "input_ids"}]}, "the graph is not legal (law L2"),
        ],
    )
    def test_a_node_that_nobody_saved(self, part: str, change: dict[str, Any], words: str, artifact: Path) -> None:
        with edited(artifact / "graph.json") as graph:
            self.node(graph, part).update(change)
        message = refused(artifact, words)
        assert message.startswith(("graph.json: ", str(artifact)))

    @pytest.mark.parametrize("data", [[], {}, {"nodes": 3, "ties": {}}, {"nodes": [3], "ties": {}}, {"nodes": []}])
    def test_another_shape(self, data: Any, artifact: Path) -> None:
        (artifact / "graph.json").write_text(json.dumps(data))
        sign(artifact)
        refused(artifact, "graph.json: is not of the expected shape")

    def test_ties_of_another_shape(self, artifact: Path) -> None:
        with edited(artifact / "graph.json") as graph:
            graph["ties"] = {"a": 3}
        refused(artifact, "graph.json: is not of the expected shape (a")

    def test_no_nodes(self, artifact: Path) -> None:
        with edited(artifact / "graph.json") as graph:
            graph["nodes"] = []
        refused(artifact, "is unexpected")

    def test_two_inputs(self, artifact: Path) -> None:
        with edited(artifact / "graph.json") as graph:
            graph["nodes"].insert(0, {"name": "more", "op": "placeholder"})
        refused(artifact, "law L2 is broken after loading: 2 placeholders")

    def test_nothing_is_allocated_while_a_graph_is_read(self, artifact: Path) -> None:
        """An op without a tensor among its arguments would run for real: 80 TB of zeros."""
        with edited(artifact / "graph.json") as graph:
            node = {"name": "huge", "op": "call_function", "target": "aten.zeros.default"}
            graph["nodes"].insert(0, node | {"args": [[10**13]], "kwargs": {"dtype": {"dtype": "int64"}}})
        assert dlqc.load(artifact, backend="reference").graph is not None


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"mask_id": "63"}, "mask_id"),
            ({"mask_id": 64}, "mask id 64"),
            ({"mask_id": True}, "mask_id"),
            ({"attention": "odd"}, "attention"),
            ({"max_length": 0}, "length 0"),
            ({"more": 1}, "more"),
        ],
    )
    def test_a_spec_that_is_none(self, change: dict[str, Any], words: str, artifact: Path) -> None:
        with edited(artifact / "spec.json") as data:
            data["spec"].update(change)
        refused(artifact, "spec.json: is not of the expected shape (", words)

    @pytest.mark.parametrize("key", ["spec", "config"])
    def test_a_part_of_the_spec_is_missing(self, key: str, artifact: Path) -> None:
        with edited(artifact / "spec.json") as data:
            del data[key]
        refused(artifact, f"spec.json: is not of the expected shape (KeyError: '{key}')")

    def test_a_vocabulary_that_the_graph_does_not_have(self, artifact: Path) -> None:
        with edited(artifact / "spec.json") as data:
            data["spec"]["vocab_size"] = 65
        refused(artifact, "law L2 is broken after loading: the logits have 64 columns, the model declares 65")

    @pytest.mark.parametrize("data", [[], {}, {"steps": 3}])
    def test_a_report_that_is_none(self, data: Any, artifact: Path) -> None:
        (artifact / "report.json").write_text(json.dumps(data))
        sign(artifact)
        refused(artifact, "report.json: is not of the expected shape (")
        with pytest.raises(ArtifactError, match="report.json: is not of the expected shape"):
            read_report(artifact)

    @pytest.mark.parametrize(
        "text",
        [
            "passes: [",
            "- pack",
            "passes: [3]",
            "passes: [{pack: {speed: 1}}]",
            "!!python/object/apply:os.system ['touch pwned']",
            "[" * 10_000,
        ],
    )
    def test_a_recipe_that_is_none(self, text: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(artifact.parent)
        (artifact / "recipe.yaml").write_text(text)
        sign(artifact)
        refused(artifact, "recipe.yaml: is not of the expected shape (")
        assert not Path("pwned").exists()

    def test_a_module_that_the_recipe_names_is_not_imported(
        self, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, dlqc.Compiled]
    ) -> None:
        (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        recipe = yaml.safe_load((artifact / "recipe.yaml").read_text())
        recipe["passes"].insert(0, {"evil_module.Evil": {"depth": 3}})
        (artifact / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        sign(artifact)
        loaded = dlqc.load(artifact, backend="reference")
        assert "evil_module" not in sys.modules
        assert torch.equal(loaded(ids()), models["w4a16"](ids()))
        assert loaded.recipe.passes[0] == ForeignPass("evil_module.Evil", {"depth": 3})
        assert str(loaded.recipe).startswith("evil_module.Evil(depth=3), calibrate")
        save(loaded, tmp_path / "again", verify_reload=False)
        assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text()) == recipe

    def test_nothing_is_unpickled(self, originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(*_: Any, **__: Any) -> None:
            raise AssertionError("pickle was used")

        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            monkeypatch.setattr(module, name, forbidden)
        assert dlqc.load(originals / "w4a16")(ids()).shape == (2, 11, 64)

    def test_a_tokenizer_that_wants_code(self, artifact: Path) -> None:
        config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (artifact / "tokenizer_config.json").write_text(json.dumps(config))
        (artifact / "evil.py").write_text("raise SystemExit('imported')")
        sign(artifact)
        refused(artifact, "transformers cannot load the tokenizer (", "needs no code of its own")


@dataclass(frozen=True)
class Nothing(Pass):
    """A pass of a user's own that can be anywhere in a recipe."""

    name: ClassVar[str] = "nothing"
    note: str = "x"

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        return PassReport(sites=1, notes=[self.note])


def test_a_user_s_pass_travels_as_text(tmp_path: Path) -> None:
    model = compiled([QuantizeWeights(group_size=32, method=Rtn()), Nothing(note="hello")])
    saved = save(model, tmp_path / "out")
    assert saved.reload_deviation == 0.0
    loaded = dlqc.load(tmp_path / "out")
    foreign = loaded.recipe.passes[1]
    assert isinstance(foreign, ForeignPass)
    assert foreign.path.endswith("test_artifact.Nothing")
    assert foreign.options == {"required": True, "strict": False, "note": "hello"}
    assert loaded.recipe.to_plain() == model.recipe.to_plain()
    assert loaded.report == model.report
    with pytest.raises(dlqc.DlqcError, match="the pass came with an artifact and was not imported. Write the recipe"):
        compiled(loaded.recipe)


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    yield folder
    folder.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(unwritable: Path, models: dict[str, dlqc.Compiled]) -> None:
    with pytest.raises(ArtifactError, match="cannot be written .*Permission denied"):
        save(models["w2"], unwritable / "out")
