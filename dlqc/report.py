"""What the compilation did, as data and as text.

A `Report` is plain data: it goes into the artifact and out of `--json` as it is. `render` draws it as tables.
"""

from __future__ import annotations

import dataclasses
import io
import platform
import statistics
from dataclasses import dataclass, field
from typing import Any

import pydantic
import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from dlqc.contract import Pass, PassReport
from dlqc.formats.coded import decode
from dlqc.formats.contract import WeightFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.sparse import SparseFormat
from dlqc.graph import (
    ADDED_BIAS,
    CODED_LINEARS,
    LINEAR,
    QUANTIZED_LINEARS,
    args_of,
    constant_name,
    is_call,
    uses,
    width,
)
from dlqc.instruments import Record
from dlqc.kept import OUTLIERS, picks_columns
from dlqc.ops import EMBEDDING_PACKED, LOW_RANK, QUANTIZE_ACT_STATIC, QUANTIZE_HEADS_STATIC
from dlqc.weights import Weights


@dataclass(frozen=True)
class Step:
    """One pass in the report."""

    name: str
    options: str
    sites: int
    declined: list[tuple[str, str]]
    seconds: float
    peak_mb: float
    certificate: float | None
    metrics: dict[str, float]
    details: dict[str, dict[str, float]]
    choices: dict[str, str]
    notes: list[str]

    @classmethod
    def of(cls, p: Pass, options: str, report: PassReport, record: Record) -> Step:
        declined = [(d.site, d.reason) for d in report.declined]
        measured = (record.seconds, record.peak_mb, report.certificate)
        return cls(
            p.name,
            options,
            report.sites,
            declined,
            *measured,
            report.metrics,
            report.details,
            report.choices,
            report.notes,
        )


@dataclass(frozen=True)
class Storage:
    """What is stored, counted whole: codes, scales, zero points, embeddings, head, norms.

    Attributes:
        parameters: parameters of the original model, ties counted once.
        quantized: how many of them are stored as codes.
        bits: stored bits in all.
        bits_quantized: stored bits of the quantized ones: scales, zero points, corrections of low rank and biases that were
            added are included.
        original_bits: bits of the checkpoint.
        kept: matrices that stay as they are → (parameters, reason).
        formats: number format → (matrices, their parameters, their stored bits without corrections of low rank).
    """

    parameters: int
    quantized: int
    bits: int
    bits_quantized: int
    original_bits: int
    kept: dict[str, tuple[int, str]]
    formats: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over original parameters, everything included."""
        return self.bits / max(self.parameters, 1)

    @property
    def bits_per_quantized_weight(self) -> float:
        return self.bits_quantized / self.quantized if self.quantized else 0.0


@dataclass(frozen=True)
class Report:
    """The whole story of one compilation.

    `fidelity` tells what the lossy passes cost the model as a whole: by mask ratio, the KL divergence from the captured
    model and the top-1 agreement with it at masked positions.
    """

    model: str
    recipe: str
    backend: str
    seed: int
    calibration: str
    capture: dict[str, Any]
    steps: list[Step]
    storage: Storage
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "bits_per_weight": self.storage.bits_per_weight,
            "bits_per_quantized_weight": self.storage.bits_per_quantized_weight,
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Report:
        """Undo `to_plain`, also after JSON; a ValueError if the data has another shape."""
        return pydantic.TypeAdapter(cls).validate_python(data)

    def lowered_anew(self, backend: str, found: PassReport) -> Report:
        """The report of the same compilation after lowering again, for another backend or on another machine."""
        steps = [
            dataclasses.replace(s, sites=found.sites, choices=found.choices, notes=found.notes)
            if s.name == "lower"
            else s
            for s in self.steps
        ]
        return dataclasses.replace(self, backend=backend, steps=steps)

    def render(self, width: int | None = None) -> str:
        """Tables and sentences, as `explain()` prints them."""
        plain = {"markup": False, "emoji": False, "highlight": False}  # names may hold [brackets] and :colons:
        console = Console(file=io.StringIO(), width=width or 118, force_terminal=False, **plain)  # type: ignore[arg-type]
        console.print(f"{self.model} → {self.recipe}, backend {self.backend}")
        check = self.capture
        console.print(
            f"captured {check['nodes']} nodes in {check['seconds']:.1f} s; differs from the eager model by "
            f"{check['worst']:.1e} (bound {check['tolerance']:.0e}, {check['cases']} cases, {check['dtype']})"
        )
        console.print(self._pass_table())
        for step in self.steps:
            for site, reason in step.declined:
                console.print(f"  {step.name} declined {site}: {reason}")
        console.print(self._storage_lines())
        for ratio, cost in self.fidelity.items():
            console.print(
                f"on {int(cost['rows'])} calibration rows, {float(ratio):.0%} masked: KL {cost['kl']:.4f} nats, "
                f"top-1 agreement {cost['agreement']:.1%}"
            )
        for choice, names in self._choices().items():
            console.print(f"{choice}: {len(names)} sites ({names[0]}{', …' if len(names) > 1 else ''})")
        for note in [n for s in self.steps for n in s.notes] + self.notes:
            console.print(f"note: {note}")
        output = console.file
        assert isinstance(output, io.StringIO)
        return output.getvalue().rstrip()

    def _pass_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in (
            "pass",
            "sites",
            "declined",
            "seconds",
            "peak MB so far",
            "certificate",
            "output SQNR dB, min / median",
        ):
            table.add_column(name, justify="left" if name == "pass" else "right")
        for s in self.steps:
            key = "sqnr_db" if any("sqnr_db" in d for d in s.details.values()) else "weight_sqnr_db"
            ratios = [d[key] for d in s.details.values() if key in d]
            quality = f"{min(ratios):.1f} / {statistics.median(ratios):.1f}" if ratios else ""
            quality += " (of the weights)" if ratios and key == "weight_sqnr_db" else ""
            certificate = "" if s.certificate is None else f"{s.certificate:.1e}"
            row = (
                s.name,
                str(s.sites),
                str(len(s.declined)),
                f"{s.seconds:.2f}",
                f"{s.peak_mb:.0f}",
                certificate,
                quality,
            )
            table.add_row(*row)
        return table

    def _storage_lines(self) -> str:
        s = self.storage
        lines = [
            f"{s.quantized:,} of {s.parameters:,} parameters quantized ({s.quantized / max(s.parameters, 1):.1%}) at "
            f"{s.bits_per_quantized_weight:.3f} bits each, scales and zero points included",
            f"whole model: {s.bits / 8e6:.2f} MB, {s.bits_per_weight:.3f} bits per weight "
            f"(checkpoint {s.original_bits / 8e6:.2f} MB)",
        ]
        for label, (sites, parameters, bits) in sorted(s.formats.items()) if len(s.formats) > 1 else ():
            lines.append(f"{label}: {sites} matrices, {parameters:,} parameters at {bits / parameters:.3f} bits each")
        reasons: dict[str, list[str]] = {}
        for name, (_, reason) in s.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            count = sum(s.kept[n][0] for n in names)
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            lines.append(f"not quantized, {reason}: {shown} ({count:,} parameters)")
        return "\n".join(lines)

    def _choices(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for step in self.steps:
            for site, choice in step.choices.items():
                said = f"kernel {choice}" if step.name == "lower" else f"{step.name} chose {choice}"
                found.setdefault(said, []).append(site)
        return found


def measure_storage(original: Weights, graph: fx.Graph, weights: Weights, kept: dict[str, str]) -> Storage:
    """Count what the graph stores against what the checkpoint stored."""
    seen: set[str] = set()
    bits_quantized = 0
    formats: dict[str, tuple[int, int, int]] = {}
    for node in graph.nodes:
        if is_call(node, QUANTIZE_ACT_STATIC, QUANTIZE_HEADS_STATIC):
            seen |= {str(constant_name(part)) for part in args_of(node)[1:3]}  # counted in the whole, but no weights
        if not is_call(node, *QUANTIZED_LINEARS, LOW_RANK, EMBEDDING_PACKED):
            continue
        parts = _parts(node)
        fresh = [name for name in map(constant_name, parts) if name is not None and name not in seen]
        seen.update(fresh)
        bits = sum(_bits(weights[name].leaf) for name in fresh)
        bits_quantized += bits
        if is_call(node, LOW_RANK) or constant_name(parts[0]) not in fresh:
            continue
        first = weights[str(constant_name(parts[0]))].leaf
        rows = args_of(node)[4] if is_call(node, *CODED_LINEARS) else first.shape[0]
        label = _format_of(node).label
        sites, parameters, before = formats.get(label, (0, 0, 0))
        inner = width(node if is_call(node, EMBEDDING_PACKED) else args_of(node)[0])
        formats[label] = (sites + 1, parameters + int(rows) * inner, before + bits)
    # What is stored, not the leaf it comes from: a part of a fused projection is smaller, a folded gain is wider.
    total = sum(c.shape.numel() * c.storage_dtype.itemsize * 8 for c in weights.values())
    matrices = {
        name: (constant.shape.numel(), _reason(graph, name, kept))
        for name, constant in weights.items()
        if name not in seen and len(constant.shape) > 1 and constant.leaf.is_floating_point()
    }
    distinct = _distinct(original)
    return Storage(
        parameters=sum(c.leaf.numel() for c in distinct),
        quantized=sum(parameters for _, parameters, _ in formats.values()),
        bits=total,
        bits_quantized=bits_quantized,
        original_bits=sum(_bits(c.leaf) for c in distinct),
        kept=matrices,
        formats=formats,
    )


def _format_of(node: fx.Node) -> IntFormat | WeightFormat:
    """The number format of a quantized linear or table."""
    if is_call(node, *CODED_LINEARS):
        fmt = decode(args_of(node)[3])
        return dataclasses.replace(fmt, density=None) if isinstance(fmt, SparseFormat) else fmt
    bits, group = args_of(node)[4:6] if is_call(node, EMBEDDING_PACKED) else args_of(node)[5:7]
    return IntFormat(bits, group or None, args_of(node)[3] is None)


def _parts(node: fx.Node) -> list[Any]:
    """The constants that are stored for a weight: a bias only if a pass added it."""
    if is_call(node, LOW_RANK):
        return list(args_of(node)[2])
    coded = is_call(node, *CODED_LINEARS)
    parts, bias = (args_of(node)[1], args_of(node)[2]) if coded else (args_of(node)[1:4], args_of(node)[4])
    return [*parts, *([bias] if ADDED_BIAS in str(constant_name(bias)).split(".") else [])]


def _distinct(weights: Weights) -> list[Any]:
    return list({id(c.leaf): c for c in weights.values()}.values())


def _bits(leaf: torch.Tensor) -> int:
    return leaf.numel() * leaf.element_size() * 8


def _reason(graph: fx.Graph, name: str, kept: dict[str, str]) -> str:
    module = name.removesuffix(".weight")
    if module in kept:
        return kept[module]
    if any("embedding" in str(user.target) for user in uses(graph, name)):
        return "an embedding"
    if any(is_call(user, LINEAR) and picks_columns(args_of(user)[0]) for user in uses(graph, name)):
        return OUTLIERS
    return "no pass quantizes it"


def versions() -> dict[str, str]:
    """What was used, for the report and the artifact."""
    import transformers

    from dlqc import __version__

    return {
        "dlqc": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
