"""Outliers at the inputs of linears: how large, in which channels, on which tokens, by layer and mask ratio.

Two kinds are told apart (Lin et al. 2025, "Quantization meets dLLMs", arXiv 2508.14896; they show them as pictures, the
numbers are ours). Normal outliers are channels that are large for nearly every token; massive ones are extreme values on
few tokens. For the input X [T, d] of a linear, over the masked or the visible rows of all states with one mask ratio:

    normal channel j   max_t |X_tj| > 6·median_j max_t |X_tj|   and   median_t |X_tj| > 6·median_j median_t |X_tj|
    massive entry      |X_tj| > 100 and > 1000·median |X|       (Sun et al. 2024, arXiv 2402.17762)
    spike              |X_tj| > 20·RMS(X), which has no unit, so that small models can have some
    crest of token t   max_j |X_tj| / RMS_j(X_tj), between 1 and √d: what a scale per token has to pay for
    kurtosis           of all entries; 3 for a Gaussian, 0 where all are equal
    top channel        the channel that is most often the largest of its token, and the share of tokens for which it is

Medians are lower medians. Where more than half of the channels are silent (their median is 0) none counts as normal: that
is sparsity. Behind a gated activation most entries are near zero, and normal channels can be many without being large:
read them beside the crest. Where all tokens are masked they differ by their place alone, and more channels look normal.
Each statistic is exact over the rows given, which run through the graph as one batch for each mask ratio; memory holds that
batch and no other activation.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, fx

from dlqc.diffusion.masking import apply_mask, check_clean, ratio_mask
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CalibrationError, FeasibilityError, nearest
from dlqc.execute import Executor, Tap, needed, placeholder
from dlqc.graph import linears
from dlqc.weights import Weights

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)

Rows = Literal["masked", "visible"]
ROWS: tuple[Rows, ...] = ("masked", "visible")


@dataclass(frozen=True)
class Thresholds:
    """What counts as an outlier.

    Attributes:
        normal: multiple of the median channel, for the maximum and for the median over tokens.
        massive_absolute, massive_relative: value, and multiple of the median |X|; both must be exceeded.
        spike: multiple of RMS(X).
    """

    normal: float = 6.0
    massive_absolute: float = 100.0
    massive_relative: float = 1000.0
    spike: float = 20.0


@dataclass(frozen=True)
class Hits:
    """Entries over a threshold, and how many tokens and channels they touch."""

    entries: int
    tokens: int
    channels: int


@dataclass(frozen=True)
class Site:
    """A value that one or more linears read.

    Attributes:
        name: the first of the linears, as the checkpoint calls it.
        linears: all of them.
        layer: the first number in the name, None outside the layers.
        kind: what the linears are called within a layer, such as "q_proj, k_proj, v_proj"; outside, their full names.
        channels: d.
    """

    name: str
    linears: tuple[str, ...]
    layer: int | None
    kind: str
    channels: int


@dataclass(frozen=True)
class Cell:
    """Statistics of one site at one mask ratio, over its masked or its visible rows; see the module's docstring.

    Attributes:
        site: name of the site. ratio: mask ratio. rows: which rows. tokens: how many, T.
        absmax, rms, median: of |X|, in the unit of the activations.
        crest_median, crest_max: over tokens; tokens of zeros have none.
        normal: indices of the normal outlier channels.
    """

    site: str
    ratio: float
    rows: Rows
    tokens: int
    absmax: float
    rms: float
    median: float
    crest_median: float
    crest_max: float
    kurtosis: float
    normal: tuple[int, ...]
    massive: Hits
    spikes: Hits
    top_channel: int
    top_share: float


@dataclass(frozen=True)
class Summary:
    """Cells of one kind of site and one kind of rows, over all layers and the mask ratios that have such rows.

    Attributes:
        sites: how many sites.
        absmax, crest_max, kurtosis_max, top_share: the worst cell.
        crest_median: median over cells of the median crest; crest_low, crest_high: its range over cells.
        normal_mean, normal_max: normal outlier channels of a cell.
        massive_share, spike_share: share of tokens hit, over all cells.
    """

    sites: int
    absmax: float
    crest_median: float
    crest_low: float
    crest_high: float
    crest_max: float
    kurtosis_max: float
    normal_mean: float
    normal_max: int
    massive_share: float
    spike_share: float
    top_share: float


@dataclass(frozen=True)
class OutlierReport:
    """Outliers of a graph at one stage of its compilation; plain data.

    Attributes:
        stage: "as captured", or the pass that ran last.
        ratios: mask ratios, ascending. states: number of rows and tokens a row.
        sites: in graph order. cells: one for each site, ratio and kind of rows that has tokens.
        skipped: linears that read other rows than the tokens, which are neither masked nor visible.
    """

    stage: str
    ratios: tuple[float, ...]
    states: tuple[int, int]
    thresholds: Thresholds
    sites: tuple[Site, ...]
    cells: tuple[Cell, ...]
    skipped: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of sites in graph order."""
        return tuple(dict.fromkeys(site.kind for site in self.sites))

    def select(
        self, *, site: str | None = None, kind: str | None = None, rows: Rows | None = None, ratio: float | None = None
    ) -> list[Cell]:
        """The cells that fit all that is given."""
        names = {s.name for s in self.sites if (site in (None, s.name)) and (kind in (None, s.kind))}
        return [c for c in self.cells if c.site in names and rows in (None, c.rows) and ratio in (None, c.ratio)]

    def summary(self) -> dict[tuple[str, Rows], Summary]:
        """By kind of site and kind of rows, in graph order."""
        found = {}
        for kind in self.kinds:
            for rows in ROWS:
                cells = self.select(kind=kind, rows=rows)
                if cells:
                    found[kind, rows] = _summarize(cells)
        return found

    def to_plain(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> OutlierReport:
        """Undo `to_plain`, also after JSON; a ValueError if the data has another shape."""
        return pydantic.TypeAdapter(cls).validate_python(data)


@dataclass(frozen=True)
class Surface:
    """|X| of one row of tokens at one site.

    Attributes:
        values: float32 [L, d]. masked: bool [L], which tokens are [MASK].
    """

    stage: str
    site: str
    ratio: float
    values: Tensor = field(repr=False)
    masked: Tensor = field(repr=False)


def outliers(
    graph: fx.Graph,
    weights: Weights,
    rows: Tensor,
    spec: DiffusionSpec,
    *,
    ratios: Sequence[float] = RATIOS,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    stage: str = "as captured",
) -> OutlierReport:
    """Measure a captured graph, before or between passes.

    The logits are not computed, and a weight is read when its turn comes: a model larger than memory streams through once for
    each mask ratio.

    Args:
        graph, weights: as captured, or as exact passes left them.
        rows: clean token ids int64 [R, L].
        spec: facts of the model.
        ratios: mask ratios in [0, 1]; round(ratio·L) tokens of each row are masked, the same ones as in `masked_nll`.
        thresholds: what counts as an outlier.
        seed: of the masks.
        stage: name of the stage, for the report.

    Raises:
        FeasibilityError: a ratio outside [0, 1], no linear, or rows that the model cannot read.
        CalibrationError: NaN or Inf on the way.
    """
    limits = thresholds or Thresholds()
    levels = checked_ratios(ratios)
    check_clean(rows, spec, where="rows")
    found, skipped = _sites(graph, weights)
    run = Executor(graph, weights, [placeholder(graph)], _last(graph, list(found)))
    cells: list[Cell] = []
    for ratio in levels:
        masked = _mask(rows, ratio, seed)
        taps = {node: _tap(site, _as_read(node, masked), ratio, limits, cells) for node, site in found.items()}
        run(apply_mask(rows.long(), masked, spec.mask_id), taps=taps)
    size = (rows.shape[0], rows.shape[1])
    return OutlierReport(stage, levels, size, limits, tuple(found.values()), tuple(cells), skipped)


def surface(
    graph: fx.Graph,
    weights: Weights,
    row: Tensor,
    spec: DiffusionSpec,
    site: str,
    *,
    ratio: float = 0.5,
    seed: int = 0,
    stage: str = "as captured",
) -> Surface:
    """|X| of one row of tokens [L] at the input of one linear; computes only what leads there.

    Args:
        site: name of any linear, as in `Site.linears`. The rest as for `outliers`.

    Raises:
        FeasibilityError: no linear has this name, or it reads other rows than the tokens.
    """
    ids = row[None]
    check_clean(ids, spec, where="row")
    (level,) = checked_ratios([ratio])
    found, skipped = _sites(graph, weights)
    node = next((node for node, known in found.items() if site in known.linears), None)
    if node is None:
        names = [name for known in found.values() for name in known.linears]
        what = "reads other rows than the tokens" if site in skipped else "no linear has this name"
        raise FeasibilityError(what, where=site, remedy=nearest(site, names))
    masked = _mask(ids, level, seed)
    run = Executor(graph, weights, [placeholder(graph)], [node])
    value = run(apply_mask(ids.long(), masked, spec.mask_id))[0]
    return Surface(stage, site, level, value.reshape(-1, value.shape[-1]).float().abs(), masked[0].cpu())


def checked_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """Mask ratios ascending, each once; refuses what is no share."""
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise FeasibilityError(
                f"a mask ratio of {ratio:g} is no share", where="ratios", remedy="Use numbers from 0 to 1"
            )
    if not ratios:
        raise FeasibilityError("there is no mask ratio", where="ratios", remedy="Use for example 0,0.25,0.5,0.75,1")
    return tuple(sorted({float(ratio) for ratio in ratios}))


def _mask(rows: Tensor, ratio: float, seed: int) -> Tensor:
    everything = torch.ones_like(rows, dtype=torch.bool)
    return ratio_mask(everything, ratio, seed, 0) if ratio > 0 else ~everything


def _sites(graph: fx.Graph, weights: Weights) -> tuple[dict[fx.Node, Site], tuple[str, ...]]:
    """The values that linears read, in graph order, and the linears that read no rows of tokens."""
    readers: dict[fx.Node, list[str]] = {}
    for site in linears(graph.nodes, weights):
        readers.setdefault(site.x, []).append(site.name)
    if not readers:
        raise FeasibilityError(
            "the graph has no linear on a constant weight that is not quantized",
            where="outliers",
            remedy="Measure before the weights are quantized",
        )
    seen: dict[str, int] = {}
    found, skipped = {}, []
    for node, names in readers.items():
        if _layout(node) is None:
            skipped += names
            continue
        layer, kind = _place(names)
        # A linear that runs several times (ALBERT's) has a site for each time.
        seen[names[0]] = seen.get(names[0], 0) + 1
        name = names[0] if seen[names[0]] == 1 else f"{names[0]} (use {seen[names[0]]})"
        found[node] = Site(name, tuple(dict.fromkeys(names)), layer, kind, int(node.meta["val"].shape[-1]))
    return found, tuple(skipped)


def _place(names: Sequence[str]) -> tuple[int | None, str]:
    """(layer, kind) from checkpoint names.

    >>> _place(["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj"])
    (3, 'self_attn.q_proj, k_proj')
    >>> _place(["lm_head"])
    (None, 'lm_head')
    """
    parts = names[0].split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return None, ", ".join(names)
    inside = ["*" if part.isdigit() else part for part in parts[number + 1 :]]
    return int(parts[number]), ", ".join([".".join(inside), *(name.split(".")[-1] for name in names[1:])])


def _layout(node: fx.Node) -> Literal["batch", "length"] | None:
    """Which of batch and length comes first in the rows that a linear reads; None where they are other rows."""
    batch, length = (str(size) for size in placeholder(node.graph).meta["val"].shape)
    dims = [str(size) for size in node.meta["val"].shape[:-1]]
    if dims in ([batch, length], [f"{batch}*{length}"], [f"{length}*{batch}"]):
        return "batch"
    return "length" if dims == [length, batch] else None


def _as_read(node: fx.Node, masked: Tensor) -> Tensor:
    """The mask [B, L] in the order in which the rows of the node come, [T]."""
    return (masked.T if _layout(node) == "length" else masked).reshape(-1)


def _last(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """As few of the nodes as lead to all of them, so that nothing is computed or kept for longer than it must."""
    covered: set[fx.Node] = set()
    last = []
    for node in reversed(nodes):
        if node not in covered:
            last.append(node)
            covered.update(needed(graph, [placeholder(graph)], [node]))
    return last


def _tap(site: Site, masked: Tensor, ratio: float, limits: Thresholds, cells: list[Cell]) -> Tap:
    def tap(node: fx.Node, value: Tensor) -> None:
        x = value.reshape(-1, value.shape[-1]).float()
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"NaN or Inf in the input activations at mask ratio {ratio:g}",
                where=site.name,
                remedy="Check the weights before this layer",
            )
        for rows in ROWS:
            part = x[masked if rows == "masked" else ~masked]
            if part.shape[0]:
                cells.append(_cell(part, site.name, ratio, rows, limits))

    return tap


def _cell(x: Tensor, site: str, ratio: float, rows: Rows, limits: Thresholds) -> Cell:
    size = x.abs()
    median, rms = float(size.median()), float(x.square().mean().sqrt())
    peak, channel = size.max(dim=1)
    power = x.square().mean(dim=1).sqrt()
    crest = peak[power > 0] / power[power > 0]
    top = channel.bincount(minlength=x.shape[1])
    return Cell(
        site=site,
        ratio=ratio,
        rows=rows,
        tokens=x.shape[0],
        absmax=float(peak.max()),
        rms=rms,
        median=median,
        crest_median=float(crest.median()) if crest.numel() else 0.0,
        crest_max=float(crest.max()) if crest.numel() else 0.0,
        kurtosis=_kurtosis(x),
        normal=tuple(_normal(size, limits.normal).nonzero().flatten().tolist()),
        massive=_hits(size, max(limits.massive_absolute, limits.massive_relative * median)),
        spikes=_hits(size, limits.spike * rms),
        top_channel=int(top.argmax()),
        top_share=float(top.max()) / x.shape[0],
    )


def _normal(size: Tensor, multiple: float) -> Tensor:
    """Which channels of |X| [T, d] are normal outliers, bool [d]."""
    largest, typical = size.amax(dim=0), size.median(dim=0).values
    middle = typical.median()
    return (largest > multiple * largest.median()) & (typical > multiple * middle) & (middle > 0)


def _hits(size: Tensor, threshold: float) -> Hits:
    over = size > threshold
    return Hits(int(over.sum()), int(over.any(dim=1).sum()), int(over.any(dim=0).sum()))


def _kurtosis(x: Tensor) -> float:
    centred = x.double() - x.double().mean()
    variance = float(centred.square().mean())
    return float(centred.square().square().mean()) / variance**2 if variance > 0 else 0.0


def _summarize(cells: Sequence[Cell]) -> Summary:
    crests = [c.crest_median for c in cells]
    normal = [len(c.normal) for c in cells]
    tokens = sum(c.tokens for c in cells)
    return Summary(
        sites=len({c.site for c in cells}),
        absmax=max(c.absmax for c in cells),
        crest_median=statistics.median(crests),
        crest_low=min(crests),
        crest_high=max(crests),
        crest_max=max(c.crest_max for c in cells),
        kurtosis_max=max(c.kurtosis for c in cells),
        normal_mean=statistics.fmean(normal),
        normal_max=max(normal),
        massive_share=sum(c.massive.tokens for c in cells) / tokens,
        spike_share=sum(c.spikes.tokens for c in cells) / tokens,
        top_share=max(c.top_share for c in cells),
    )
