"""Quality of the spine's methods: {RTN, GPTQ on clean text, GPTQ on masked states, smoothing} × {W8A8, W4, W3, W2}.

Two models: tiny-llada, and rxnmapper's ALBERT (a pretrained masked denoiser of chemical reactions that ships inside a
package). Every model sees the same rows and the same masks, so differences are paired; intervals are 95 % t intervals over
rows. Arithmetic is float32 on the reference backend; block linears only; groups of 128 with zero points for W4, W3, W2, per
channel and per token symmetric for W8A8.

    python benchmarks/quality.py --text tales_test.txt --calibration books_calib.txt --reactions rxn_smiles.txt \
        --out docs/results/spine.json

Writes the JSON and, beside it, the table as Markdown.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from torch import nn

import dlqc
from dlqc.calibration import rows_from
from dlqc.diffusion.fidelity import fidelity
from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.diffusion.likelihood import masked_nll
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import DlqcError
from dlqc.evaluate import RATIOS
from dlqc.models.describe import spec_of

ARMS = {
    bits: {
        "RTN": f"{scheme}-rtn",
        "GPTQ, clean text": f"{scheme}-gptq-clean",
        "GPTQ, masked states (MCS)": f"{scheme}-gptq",
        "GPTQ, MCS, certainty weights": f"{scheme}-gptq-cgq",
        "SmoothQuant": f"{scheme}-smooth",
    }
    for bits, scheme in {"W8A8": "w8a8", "W4": "w4a16", "W3": "w3a16", "W2": "w2a16"}.items()
}
TOKEN = re.compile(
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)


@dataclass
class Subject:
    """A model with the rows it is measured on, grouped by length, and the text it is calibrated on."""

    name: str
    model: nn.Module
    spec: DiffusionSpec
    groups: list[torch.Tensor]
    calibration: torch.Tensor


def tiny_llada(text: Path, calibration: Path, rows: int) -> Subject:
    """The bundled model on rows of 128 tokens."""
    model = dlqc.load_model("tiny-llada")
    spec, tokenizer = spec_of(model), dlqc.load_tokenizer(model)
    measured = rows_from(text, tokenizer=tokenizer, spec=spec).ids
    order = torch.randperm(measured.shape[0], generator=torch.Generator().manual_seed(0))[:rows]
    return Subject(
        "tiny-llada", model, spec, [measured[order]], rows_from(calibration, tokenizer=tokenizer, spec=spec).ids
    )


def rxnmapper(reactions: Path, count: int) -> Subject:
    """ALBERT on whole reactions, grouped by length; calibrated on other reactions, joined and cut into rows of 128."""
    root = Path(str(distribution("rxnmapper").locate_file("rxnmapper"))) / "models" / "transformers"
    folder = next(root.glob("*/config.json")).parent
    model = dlqc.load_model(folder)
    words = {word: i for i, word in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    lines = reactions.read_text(encoding="utf-8").split()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = [[words["[CLS]"], *(words[t] for t in TOKEN.findall(lines[i])), words["[SEP]"]] for i in order]
    by_length: dict[int, list[list[int]]] = {}
    for ids in encoded[:count]:
        by_length.setdefault(len(ids), []).append(ids)
    stream = [i for ids in encoded[count:] for i in ids]
    spec = spec_of(model, mask_id=words["[MASK]"])
    calibration = torch.tensor(stream[: len(stream) // 128 * 128]).reshape(-1, 128)
    return Subject("rxnmapper ALBERT", model, spec, [torch.tensor(rows) for rows in by_length.values()], calibration)


def scores(subject: Subject, model: Any, reference: Any | None) -> dict[str, torch.Tensor]:
    """Per-row values: NLL [R, K] by ratio, and KL and agreement [R] against the reference."""
    nll, kl, agreement = [], [], []
    for rows in subject.groups:
        maskable = torch.ones_like(rows, dtype=torch.bool)
        if subject.name.startswith("rxn"):
            maskable[:, 0] = maskable[:, -1] = False
        nll.append(masked_nll(model, rows, subject.spec, maskable=maskable, ratios=RATIOS).values)
        if reference is not None:
            table = fidelity(reference, model, rows, subject.spec, maskable=maskable, ratios=RATIOS)
            kl.append(table.kl.mean(1))
            agreement.append(table.agreement.mean(1))
    found = {"nll": torch.cat(nll)}
    if reference is not None:
        found |= {"kl": torch.cat(kl), "agreement": torch.cat(agreement)}
    return found


def plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def summary(found: dict[str, torch.Tensor], base: torch.Tensor) -> dict[str, Any]:
    nll = found["nll"]
    entry: dict[str, Any] = {
        "nll": plain(mean_interval(nll.mean(1))),
        "nll_by_ratio": {f"{r:g}": plain(mean_interval(column)) for r, column in zip(RATIOS, nll.T, strict=True)},
        "difference": plain(mean_interval((nll - base).mean(1))),
        "difference_by_ratio": {
            f"{r:g}": plain(mean_interval(column)) for r, column in zip(RATIOS, (nll - base).T, strict=True)
        },
    }
    return entry | {name: plain(mean_interval(found[name])) for name in ("kl", "agreement") if name in found}


def measure(subject: Subject) -> dict[str, Any]:
    """All arms on one subject, with paired differences to full precision and between calibrations."""
    options: dict[str, Any] = {"backend": "reference", "progress": False, "mask_id": subject.spec.mask_id}
    original = dlqc.compile(subject.model, passes=(), **options)
    base = scores(subject, original, None)
    result: dict[str, Any] = {"rows": base["nll"].shape[0], "fp32": summary(base, base["nll"]), "arms": {}}
    for bits, methods in ARMS.items():
        kept = {}
        for method, recipe in methods.items():
            started = time.perf_counter()
            try:
                compiled = dlqc.compile(subject.model, recipe, calibration=subject.calibration, **options)
            except DlqcError as error:
                result["arms"].setdefault(bits, {})[method] = {"recipe": recipe, "refused": str(error).split(" (")[0]}
                typer.echo(f"{subject.name} {bits} {method}: {error}")
                continue
            seconds = time.perf_counter() - started
            found = scores(subject, compiled, original)
            kept[method] = {"nll": found["nll"].mean(1), "kl": found["kl"]}
            storage = compiled.report.storage
            entry = {"recipe": recipe, "seconds": seconds, "bits": storage.bits_per_quantized_weight}
            result["arms"].setdefault(bits, {})[method] = entry | summary(found, base["nll"])
            typer.echo(f"{subject.name} {bits} {method}: {mean_interval((found['nll'] - base['nll']).mean(1))}")
        masked, clean = "GPTQ, masked states (MCS)", "GPTQ, clean text"
        if masked in kept and clean in kept:
            result.setdefault("masked_minus_clean", {})[bits] = {
                name: plain(mean_interval(kept[masked][name] - kept[clean][name])) for name in ("nll", "kl")
            }
    return result


def markdown(results: dict[str, Any], command: str) -> str:
    """The table, and the paired comparison of the calibrations."""
    lines = [
        "# Quality of the spine's methods",
        "",
        f"Made by `{command}`;",
        "all numbers are in `spine.json` beside this file; what they say is in `README.md`.",
        "",
    ]
    for name, found in results["models"].items():
        fp = found["fp32"]["nll"]
        ratios = ", ".join(f"{r:g}" for r in RATIOS)
        head = f"Full precision: masked NLL {_interval(fp, 4)} nats ({found['rows']} rows, mask ratios {ratios})."
        lines += [f"## {name}", "", f"{head} Differences are paired; brackets are 95 % intervals.", ""]
        lines += [
            "| bits | method | bits per weight | NLL difference | at 6 % masked | KL | top-1 agreement |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for bits, methods in found["arms"].items():
            for method, e in methods.items():
                if "refused" in e:
                    lines.append(f"| {bits} | {method} | | refused: {e['refused']} | | | |")
                    continue
                low = e["difference_by_ratio"][f"{RATIOS[0]:g}"]
                cells = (
                    _interval(e["difference"], 4),
                    _interval(low, 4),
                    f"{e['kl']['mean']:.4f}",
                    f"{e['agreement']['mean']:.3f}",
                )
                lines.append(f"| {bits} | {method} | {e['bits']:.3f} | {' | '.join(cells)} |")
        lines += [
            "",
            "GPTQ on masked states minus GPTQ on clean text, paired (negative: masking the calibration helps):",
            "",
        ]
        lines += ["| bits | NLL | KL |", "|---|--:|--:|"]
        for bits, pair in found.get("masked_minus_clean", {}).items():
            lines.append(f"| {bits} | {_interval(pair['nll'], 4)} | {_interval(pair['kl'], 4)} |")
        lines.append("")
    return "\n".join(lines)


def _interval(i: dict[str, float], digits: int) -> str:
    return f"{i['mean']:.{digits}f} [{i['low']:.{digits}f}, {i['high']:.{digits}f}]"


def main(
    text: Annotated[Path, typer.Option(help="text to measure tiny-llada on")],
    calibration: Annotated[Path, typer.Option(help="text to calibrate tiny-llada on")],
    reactions: Annotated[Path, typer.Option(help="unmapped reaction SMILES, one a line")],
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("docs/results/spine.json"),
    rows: Annotated[int, typer.Option(help="rows of tiny-llada")] = 128,
    count: Annotated[int, typer.Option(help="reactions to measure; the rest calibrates")] = 200,
) -> None:
    """Measure everything and write the results."""
    started = time.perf_counter()
    subjects = [tiny_llada(text, calibration, rows), rxnmapper(reactions, count)]
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (text, calibration, reactions)}
    inputs = f"--text {text.name} --calibration {calibration.name} --reactions {reactions.name}"
    command = f"python benchmarks/quality.py {inputs} --rows {rows} --count {count}"
    results = {
        "command": command,
        "files": files,
        "machine": machine.facts(),
        "dlqc": dlqc.__version__,
        "argv": [Path(a).name for a in sys.argv[1:]],
        "models": {subject.name: measure(subject) for subject in subjects},
        "seconds": time.perf_counter() - started,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results, command), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
