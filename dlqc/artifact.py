"""The artifact: a folder of safetensors and JSON that holds everything a compiled model is.

    manifest.json      format version, versions of dlqc and torch, sha256 and size of every other file, test logits' hash
    graph.json         the graph before lowering: nodes with targets from an allow-list (docs/format.md)
    weights*.safetensors   constants in their stored dtype
    recipe.yaml        the passes, every option spelled out
    report.json        what the passes did
    spec.json          facts of the diffusion model, and the model's configuration
    tokenizer files    where the model has one

Saving writes a folder beside the target and renames it, so that a crash or a full disk leaves the old artifact whole; the
copy is then loaded in a fresh process and its logits compared. Loading is strict and executes nothing from the files: no
pickle, no code, no strings evaluated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dlqc.backend import load_backend
from dlqc.check import check
from dlqc.contract import FACTS_OF_CAPTURE, Context
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ArtifactError, DlqcError
from dlqc.graph import copy_graph
from dlqc.recipe import from_plain, pass_class
from dlqc.report import Report, versions
from dlqc.serialize import decode_graph, encode_graph
from dlqc.weights import Weights

if TYPE_CHECKING:
    from dlqc.compiled import Compiled

FORMAT = 1
SHARD_BYTES = 2 << 30
_FILES = ("graph.json", "recipe.yaml", "report.json", "spec.json")


@dataclass(frozen=True)
class Saved:
    """Where an artifact went and how large it is.

    Attributes:
        files: size in bytes by file name.
        reload_deviation: max |logits(reloaded) - logits| / max |logits|, measured in a fresh process.
    """

    folder: Path
    files: dict[str, int]
    reload_deviation: float

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def save(model: Compiled, folder: str | Path, *, verify_reload: bool = True) -> Saved:
    """Write an artifact. An artifact that is there already is replaced; a folder that holds something else is refused."""
    target = Path(folder)
    refuse_foreign(target)
    parent = target.absolute().parent
    staging: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        _write(model, staging)
        deviation = _reload(model, staging) if verify_reload else 0.0
        _swap(staging, target)
    except OSError as error:
        raise ArtifactError(
            f"cannot be written ({error.strerror or error})",
            where=str(target),
            remedy="Free space or choose another folder; what was there before is unchanged",
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
    files = {p.name: p.stat().st_size for p in sorted(target.iterdir())}
    return Saved(target, files, deviation)


def refuse_foreign(target: Path) -> None:
    """Refuse a target that holds something else than an artifact, before any work."""
    if target.is_file():
        raise ArtifactError("is a file, not a folder", where=str(target), remedy="Choose another name")
    if target.is_dir() and any(target.iterdir()) and not (target / "manifest.json").is_file():
        raise ArtifactError(
            "the folder holds something that is no dlqc artifact",
            where=str(target),
            remedy="Choose an empty or new folder",
        )


def _write(model: Compiled, folder: Path) -> None:
    _write_weights(model.weights, folder)
    _json(folder / "graph.json", encode_graph(model.graph))
    (folder / "recipe.yaml").write_text(model.recipe.to_yaml(), encoding="utf-8")
    _json(folder / "report.json", model.report.to_plain())
    _json(folder / "spec.json", {"spec": dataclasses.asdict(model.spec), "config": _plain(model.config)})
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    names = sorted(p.name for p in folder.iterdir())
    manifest = {
        "format": FORMAT,
        "versions": versions(),
        "files": {n: {"sha256": _sha256(folder / n), "bytes": (folder / n).stat().st_size} for n in names},
    }
    _json(folder / "manifest.json", manifest)


def _write_weights(weights: Weights, folder: Path) -> None:
    """Shards of at most `SHARD_BYTES`, one constant evaluated at a time until its shard is full."""
    shard: dict[str, torch.Tensor] = {}
    size = count = 0
    for name in weights:
        value = weights.value(name).contiguous()
        shard[name] = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        size += value.nbytes
        if size >= SHARD_BYTES:
            count += 1
            save_file(shard, folder / f"weights-{count:05d}.safetensors")
            shard, size = {}, 0
    if shard:
        save_file(shard, folder / ("weights.safetensors" if count == 0 else f"weights-{count + 1:05d}.safetensors"))


def _reload(model: Compiled, folder: Path) -> float:
    """Load the folder in a fresh process, run it on fixed ids, compare with the model in memory."""
    generator = torch.Generator().manual_seed(0)
    length = min(16, model.spec.max_length)
    ids = torch.randint(0, model.spec.vocab_size, (2, length), generator=generator)
    ids[:, length // 2 :] = model.spec.mask_id
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": ids}, given)
        command = [sys.executable, "-m", "dlqc.artifact", str(folder), model.report.backend, str(given), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ArtifactError(f"the saved copy does not load again: {last}", where=str(folder), remedy="Report this")
        with safe_open(result, "pt") as f:
            found = f.get_tensor("logits")
    expected = model(ids).float()
    deviation = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not deviation <= 1e-5:
        raise ArtifactError(
            f"the saved copy computes something else ({deviation:.3g} relative)",
            where=str(folder),
            remedy="Report this",
        )
    return deviation


def _swap(staging: Path, target: Path) -> None:
    """Put the new folder in place of the old one by renaming; the old one is removed last."""
    for path in staging.iterdir():
        os.chmod(path, 0o644)
    os.chmod(staging, 0o755)
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.absolute().parent)) / "old"
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)


def load(folder: str | Path, *, backend: str = "auto", check_hashes: bool = True) -> Compiled:
    """Read an artifact and lower it for a backend.

    Raises:
        ArtifactError: missing, foreign, newer, corrupt or tampered; nothing is executed.
    """
    from dlqc.compiled import Compiled

    path = Path(folder)
    manifest = read_manifest(path)
    if check_hashes:
        verify_files(path, manifest)
    facts = _read_json(path / "spec.json")
    try:
        spec = DiffusionSpec(**facts["spec"])
        report = Report.from_plain(_read_json(path / "report.json"))
        graph = decode_graph(_read_json(path / "graph.json"), spec)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"a JSON file is not of the expected shape ({error})", where=str(path), remedy=_TAMPERED
        ) from error
    recipe = from_plain(
        yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8")), where=str(path / "recipe.yaml")
    )
    weights = _read_weights(path, manifest, graph)
    try:
        check(graph, weights, spec, set(), after="loading")
    except DlqcError as error:
        raise ArtifactError(f"the graph is not legal ({error.what})", where=str(path), remedy=_TAMPERED) from error
    target = load_backend(backend)
    lowered, constants = copy_graph(graph), weights.clone()
    if any(p.name == "lower" for p in recipe.passes):
        context = Context(constants, spec, target, facts=set(FACTS_OF_CAPTURE))
        pass_class("lower")().apply(lowered, context)
    return Compiled(
        graph,
        weights,
        (lowered, constants),
        spec=spec,
        recipe=recipe,
        report=report,
        tokenizer=_tokenizer(path),
        config=facts["config"],
    )


_TAMPERED = "The files were changed after they were written; save the model again"


def read_report(folder: str | Path) -> Report:
    """The report of an artifact, without loading its weights."""
    path = Path(folder)
    read_manifest(path)
    try:
        return Report.from_plain(_read_json(path / "report.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"is not of the expected shape ({error})", where=str(path / "report.json"), remedy=_TAMPERED
        ) from error


def verify(folder: str | Path, *, backend: str = "auto") -> dict[str, Any]:
    """Check an artifact: hashes, strict loading, the graph law, and the backend against the reference.

    Returns:
        `checks`, a sentence for each thing that holds, and the numbers behind them. What does not hold raises.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    verify_files(path, manifest)
    judge = load(path, backend="reference", check_hashes=False)
    model = load(path, backend=backend, check_hashes=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, judge.spec.vocab_size, (2, min(32, judge.spec.max_length)), generator=generator)
    ids[:, 8:] = judge.spec.mask_id
    expected, found = judge(ids).float(), model(ids).float()
    if not bool(torch.isfinite(expected).all()):
        raise ArtifactError(
            "the model returns NaN or Inf", where=str(path), remedy="Compile it again from sound weights"
        )
    deviation = float((found - expected).norm() / expected.norm())
    agreement = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    checks = [
        f"{len(manifest['files'])} files have the sizes and hashes of the manifest",
        f"{len(judge.weights)} tensors are there, none is unexpected, and all have their shapes",
        f"the graph of {len(judge.graph.nodes)} nodes is legal",
        f"the logits on the backend differ from the reference by {deviation:.2e} (norms), top-1 agrees at {agreement:.1%}",
    ]
    return {"folder": str(path), "deviation": deviation, "agreement": agreement, "checks": checks}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after the checks that come before all others."""
    if not path.is_dir():
        raise ArtifactError("there is no such folder", where=str(path), remedy="Check the path")
    if not (path / "manifest.json").is_file():
        raise ArtifactError(
            "no manifest.json in it: this is no dlqc artifact", where=str(path), remedy="Check the path"
        )
    manifest = _read_json(path / "manifest.json")
    version = manifest.get("format")
    if not isinstance(version, int) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError("the manifest names no format", where=str(path / "manifest.json"), remedy=_TAMPERED)
    if version > FORMAT:
        made = manifest.get("versions", {}).get("dlqc", "a newer version")
        raise ArtifactError(
            f"the artifact has format {version}, this dlqc reads up to {FORMAT}",
            where=str(path),
            remedy=f"Install dlqc {made} or newer",
        )
    missing = [name for name in _FILES if name not in manifest["files"]]
    if missing:
        raise ArtifactError(
            f"the manifest does not list {missing[0]}", where=str(path / "manifest.json"), remedy=_TAMPERED
        )
    return manifest


def verify_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with its size and hash in the manifest, and refuse files that it does not list."""
    for name, said in manifest["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ArtifactError("is missing", where=str(file), remedy="Copy the whole folder again")
        if file.stat().st_size != said["bytes"]:
            raise ArtifactError(
                f"has {file.stat().st_size} bytes, the manifest says {said['bytes']}",
                where=str(file),
                remedy="The file is truncated or changed; copy it again",
            )
        if _sha256(file) != said["sha256"]:
            raise ArtifactError("does not have the hash in the manifest", where=str(file), remedy=_TAMPERED)
    for file in path.iterdir():
        if file.suffix == ".safetensors" and file.name not in manifest["files"]:
            raise ArtifactError("is not listed in the manifest", where=str(file), remedy="Remove it")


def _read_weights(path: Path, manifest: Mapping[str, Any], graph: Any) -> Weights:
    weights = Weights()
    for name in sorted(n for n in manifest["files"] if n.endswith(".safetensors")):
        try:
            with safe_open(path / name, "pt") as f:
                for key in f.keys():  # noqa: SIM118  safe_open is no mapping
                    weights.put(key, f.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"cannot be read ({error})", where=str(path / name), remedy="Copy it again") from error
    wanted = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    for key, node in wanted.items():
        if key not in weights:
            raise ArtifactError(f"tensor {key!r} is missing", where=str(path), remedy="Copy the whole folder again")
        shape = tuple(node.meta["val"].shape)
        if tuple(weights[key].shape) != shape:
            raise ArtifactError(
                f"tensor {key!r} is {list(weights[key].shape)}, the graph says {list(shape)}",
                where=str(path),
                remedy=_TAMPERED,
            )
    for key in weights:
        if key not in wanted:
            raise ArtifactError(f"tensor {key!r} is unexpected", where=str(path), remedy=_TAMPERED)
    return weights


def _tokenizer(path: Path) -> Any:
    if not (path / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"cannot be read as JSON ({error})", where=str(path), remedy="Copy it again") from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what JSON cannot hold."""
    found: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _main(folder: str, backend: str, given: str, result: str) -> None:
    with safe_open(given, "pt") as f:
        ids = f.get_tensor("ids")
    save_file({"logits": load(folder, backend=backend)(ids).float().contiguous()}, result)


if __name__ == "__main__":
    _main(*sys.argv[1:])
