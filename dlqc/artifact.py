"""The artifact: a folder of safetensors and JSON that holds everything a compiled model is; see docs/format.md.

    manifest.json          format version, versions of dlqc and torch, size and sha256 of every other file
    graph.json             the graph before lowering: nodes with targets from an allow-list, and the declared ties
    weights*.safetensors   constants in their stored dtype
    recipe.yaml            the passes, every option spelled out
    report.json            what the passes did
    spec.json              facts of the diffusion model, and the model's configuration
    tokenizer files        where the model has one

Saving writes a folder beside the target, loads it in a fresh process, compares logits, and then renames it, so that a
crash or a full disk leaves the old artifact whole. Loading is strict and executes nothing from the files: no pickle, no
code, no strings evaluated, no module imported that a file names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx
from typing_extensions import TypedDict

from dlqc.backend import load_backend
from dlqc.check import check
from dlqc.contract import FACTS_OF_CAPTURE, Context
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import ArtifactError, DlqcError
from dlqc.folder import whole_folder
from dlqc.graph import copy_graph
from dlqc.recipe import Recipe, from_plain
from dlqc.report import Report, versions
from dlqc.serialize import decode_graph, encode_graph
from dlqc.weights import Constant, Weights

if TYPE_CHECKING:
    from dlqc.compiled import Compiled

FORMAT = 1
#: `verify` refuses a backend whose logits differ from the reference by more, in norms. Kernels that multiply in bfloat16 stay
#: below 0.01 on weight-only schemes; flipped activation codes compound to 0.15 at four bits. A wrong kernel is at 1 or more.
BACKEND_BOUND = 0.3


class FileFacts(TypedDict):
    sha256: str
    bytes: int


class ManifestData(TypedDict):
    """manifest.json."""

    format: Annotated[int, pydantic.Field(ge=1)]
    versions: dict[str, str]
    files: dict[str, FileFacts]


#: Constants are gathered into files of at most this size.
SHARD_BYTES = 2 << 30

_Manifest = pydantic.TypeAdapter(ManifestData)
_Spec, _Config = pydantic.TypeAdapter(DiffusionSpec), pydantic.TypeAdapter(dict[str, Any])
_Ties = pydantic.TypeAdapter(dict[str, tuple[str, ...]])
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
    """Write an artifact; one that is there already is replaced, a folder that holds anything else is refused."""
    target = Path(os.path.abspath(folder))
    try:
        refuse_foreign(target)
        with whole_folder(target) as staging:
            _write(model, staging)
            deviation = _reload(model, staging) if verify_reload else 0.0
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot be written ({getattr(error, 'strerror', None) or error})",
            where=str(target),
            remedy="Free space or choose another folder; what was there before is unchanged",
        ) from error
    files = {p.name: p.stat().st_size for p in sorted(target.iterdir())}
    return Saved(target, files, deviation)


def refuse_foreign(target: Path) -> None:
    """Refuse a target that holds anything but an artifact, before any work: saving there would delete it."""
    if target.exists() and not target.is_dir():
        raise ArtifactError("is a file, not a folder", where=str(target), remedy="Choose another name")
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        ours = {"manifest.json", *read_manifest(target)["files"]}
    except ArtifactError as error:
        raise ArtifactError(
            "the folder holds something that is no dlqc artifact",
            where=str(target),
            remedy="Choose an empty or new folder",
        ) from error
    for path in sorted(target.iterdir()):
        if path.name not in ours:
            raise ArtifactError(
                f"the folder holds {path.name!r} besides an artifact, and saving would delete it",
                where=str(target),
                remedy="Move it away, or choose an empty or new folder",
            )


def _write(model: Compiled, folder: Path) -> None:
    _write_weights(model.weights, folder)
    ties = {name: list(constant.aliases) for name, constant in model.weights.items() if constant.aliases}
    _json(folder / "graph.json", {"ties": ties} | encode_graph(model.graph))
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
    """Shards of at most `SHARD_BYTES` (or one constant), one constant evaluated at a time until its shard is full."""
    shard: dict[str, torch.Tensor] = {}
    size = count = 0
    for name in weights:
        value = weights.value(name).contiguous()
        if shard and size + value.nbytes > SHARD_BYTES:
            count += 1
            save_file(shard, folder / f"weights-{count:05d}.safetensors")
            shard, size = {}, 0
        shard[name] = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        size += value.nbytes
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
        script = "import sys; from dlqc.artifact import _run_copy; _run_copy(*sys.argv[1:])"
        command = [sys.executable, "-c", script, str(folder), model.report.backend, str(given), str(result)]
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


def load(folder: str | Path, *, backend: str = "auto", check_hashes: bool = True) -> Compiled:
    """Read an artifact and lower it for a backend.

    Args:
        backend: as of `compile`; tensors are read to the CPU, so "auto" is "cpu".
        check_hashes: compare the files with the manifest first.

    Raises:
        ArtifactError: missing, foreign, newer, corrupt or tampered; nothing is executed.
    """
    from dlqc.compiled import Compiled

    path = Path(folder)
    manifest = read_manifest(path)
    if check_hashes:
        verify_files(path, manifest)
    spec, config = _read_spec(path / "spec.json")
    report, recipe = _read_report(path / "report.json"), _read_recipe(path / "recipe.yaml")
    graph, ties = _read_graph(path / "graph.json", spec)
    weights = _read_weights(path, manifest, graph, ties)
    try:
        check(graph, weights, spec, set(), after="loading")
    except DlqcError as error:
        raise ArtifactError(f"the graph is not legal ({error.what})", where=str(path), remedy=_TAMPERED) from error
    target = load_backend(backend)
    lowered, constants = copy_graph(graph), weights.clone()
    lower = next((p for p in recipe.passes if p.name == "lower"), None)
    if lower is not None:
        context = Context(constants, spec, target, facts=set(FACTS_OF_CAPTURE))
        report = report.lowered_anew(target.name, lower.apply(lowered, context))
    return Compiled(
        graph,
        weights,
        (lowered, constants),
        spec=spec,
        recipe=recipe,
        report=report,
        tokenizer=_tokenizer(path) if "tokenizer_config.json" in manifest["files"] else None,
        config=config,
    )


_TAMPERED = "The files were changed after they were written; save the model again"


def read_report(folder: str | Path) -> Report:
    """The report of an artifact, without loading its weights."""
    path = Path(folder)
    manifest = read_manifest(path)
    verify_files(path, manifest, only=("report.json",))
    return _read_report(path / "report.json")


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
    if deviation > BACKEND_BOUND:
        raise ArtifactError(
            f"on backend {backend!r} the logits differ from the reference by {deviation:.3g} (norms), bound {BACKEND_BOUND}",
            where=str(path),
            remedy="A kernel computes something else on this machine: use backend='reference', and report it",
        )
    checks = [
        f"{len(manifest['files'])} files have the sizes and hashes of the manifest",
        f"{len(judge.weights)} tensors are there, none is unexpected, and all have their shapes",
        f"the graph of {len(judge.graph.nodes)} nodes is legal",
        f"the backend's logits differ from the reference by {deviation:.2e} (norms), top-1 agrees at {agreement:.1%}",
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
    try:
        found = _Manifest.validate_python(manifest, strict=True)
    except pydantic.ValidationError as error:
        raise ArtifactError(
            f"is no manifest of dlqc ({_first(error)})", where=str(path / "manifest.json"), remedy=_TAMPERED
        ) from error
    if found["format"] > FORMAT:
        raise ArtifactError(
            f"the artifact has format {found['format']}, this dlqc reads up to {FORMAT}",
            where=str(path),
            remedy=f"Install dlqc {found['versions'].get('dlqc', '')} or newer".replace("  ", " a version "),
        )
    for name in found["files"]:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ArtifactError(
                f"the manifest lists {name!r}, which is no file of the folder", where=str(path), remedy=_TAMPERED
            )
    missing = [name for name in _FILES if name not in found["files"]]
    if missing:
        raise ArtifactError(
            f"the manifest does not list {missing[0]}", where=str(path / "manifest.json"), remedy=_TAMPERED
        )
    return dict(found)


def verify_files(path: Path, manifest: Mapping[str, Any], *, only: Collection[str] = ()) -> None:
    """Compare every file (or `only` some) with its size and hash in the manifest; refuse others but *.md and hidden files."""
    for name, said in manifest["files"].items():
        if only and name not in only:
            continue
        file = path / name
        if not file.is_file():
            raise ArtifactError("is missing", where=str(file), remedy="Copy the whole folder again")
        if file.stat().st_size != said["bytes"]:
            raise ArtifactError(
                f"has {file.stat().st_size} bytes, the manifest says {said['bytes']}",
                where=str(file),
                remedy="The file is truncated or changed; copy it again",
            )
        if _sha256(file) != said["sha256"]:
            raise ArtifactError("does not have the hash in the manifest", where=str(file), remedy=_TAMPERED)
    for file in sorted(path.iterdir()) if not only else ():
        known = file.name in manifest["files"] or file.name == "manifest.json"
        if not known and file.suffix != ".md" and not file.name.startswith("."):
            raise ArtifactError("is not listed in the manifest", where=str(file), remedy="Remove it")


def _read_spec(path: Path) -> tuple[DiffusionSpec, dict[str, Any]]:
    """The facts of the model, and its configuration."""
    facts = _read_json(path)
    try:
        spec = DiffusionSpec(**facts["spec"])
        _Spec.validate_json(json.dumps(facts["spec"]), strict=True)
        config = _Config.validate_python(facts["config"])
        if not 0 <= spec.mask_id < spec.vocab_size or spec.max_length < 1:
            raise ValueError(f"mask id {spec.mask_id}, {spec.vocab_size} tokens, length {spec.max_length}")
    except (KeyError, TypeError, ValueError, DlqcError) as error:
        raise _misshapen(path, error) from error
    return spec, config


def _read_report(path: Path) -> Report:
    data = _read_json(path)
    try:
        return Report.from_plain(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _misshapen(path, error) from error


def _read_recipe(path: Path) -> Recipe:
    """The recipe; passes that are not dlqc's own are kept as text, not imported."""
    try:
        return from_plain(yaml.safe_load(path.read_text(encoding="utf-8")), where=str(path), imports=False)
    except (DlqcError, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise _misshapen(path, error) from error


def _read_graph(path: Path, spec: DiffusionSpec) -> tuple[fx.Graph, dict[str, tuple[str, ...]]]:
    """The graph, and the declared ties: constant → its names in the checkpoint."""
    data = _read_json(path)
    try:
        ties = _Ties.validate_python(data["ties"])
        return decode_graph(data, spec), ties
    except DlqcError:
        raise
    except Exception as error:  # torch and fx raise anything on arguments that no program would write
        raise _misshapen(path, error) from error


def _misshapen(path: Path, error: Exception) -> ArtifactError:
    what = _first(error) if isinstance(error, pydantic.ValidationError) else getattr(error, "what", None)
    reason = what or f"{type(error).__name__}: {error}".splitlines()[0]
    return ArtifactError(f"is not of the expected shape ({reason})", where=str(path), remedy=_TAMPERED)


def _first(error: pydantic.ValidationError) -> str:
    """The first complaint of pydantic, with its place."""
    one = error.errors()[0]
    return f"{'.'.join(map(str, one['loc']))}: {one['msg']}"


def _read_weights(
    path: Path, manifest: Mapping[str, Any], graph: fx.Graph, ties: Mapping[str, tuple[str, ...]]
) -> Weights:
    """All constants; a missing, unexpected, repeated or mis-shaped one is an error."""
    weights = Weights()
    for name in sorted(n for n in manifest["files"] if n.endswith(".safetensors")):
        for key, tensor in _read_tensors(path / name):
            if key in weights:
                raise ArtifactError(f"tensor {key!r} is there twice", where=str(path / name), remedy=_TAMPERED)
            weights.define(key, Constant(tensor, (), ties.get(key, ())))
    wanted = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    for key, node in wanted.items():
        if key not in weights:
            raise ArtifactError(f"tensor {key!r} is missing", where=str(path), remedy="Copy the whole folder again")
        said, found = node.meta["val"], weights[key].leaf
        # A folded norm gain is stored in float32 whatever the graph computes in; integers must agree.
        same = found.dtype == said.dtype or (found.is_floating_point() and said.is_floating_point())
        if not same or tuple(found.shape) != tuple(said.shape):
            raise ArtifactError(
                f"tensor {key!r} is {_type(found)}, the graph says {_type(said)}", where=str(path), remedy=_TAMPERED
            )
    for key in weights:
        if key not in wanted:
            raise ArtifactError(f"tensor {key!r} is unexpected", where=str(path), remedy=_TAMPERED)
    return weights


def _read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as f:
            for key in f.keys():
                yield key, f.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot be read ({error})", where=str(path), remedy="Copy it again") from error


def _type(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything on files that they cannot read
        first = (str(error).strip().splitlines() or [""])[0]
        raise ArtifactError(
            f"transformers cannot load the tokenizer ({type(error).__name__}: {first})",
            where=str(path),
            remedy="Compile the model with a tokenizer that needs no code of its own",
        ) from error


def _json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"cannot be read as JSON ({error})", where=str(path), remedy="Copy it again") from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what JSON cannot hold."""
    found: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _run_copy(folder: str, backend: str, given: str, result: str) -> None:
    """What the fresh process of `_reload` does."""
    with safe_open(given, "pt") as f:
        ids = f.get_tensor("ids")
    save_file({"logits": load(folder, backend=backend)(ids).float().contiguous()}, result)
