"""Codebooks by weighted k-means, with sparse outliers (SqueezeLLM, Kim et al., arXiv 2306.07629).

Each row (or group) of W is a set of numbers w_i with masses f_i; its table c_1 < … < c_n, n = 2^bits, minimises

    Σ_i f_i·(w_i - nearest(w_i))².

f is the `sensitivity`: "fisher", SqueezeLLM's, the statistic of that name [N, K], E[g²] of the gradients of the masked loss
(`dlqc.fisher`); or "hessian", the diagonal of the Hessian [K], for which the sum is the output error with H taken as diagonal,
and which needs no backward sweep. Masses below FLOOR of their row's mean are
raised to it, so that no weight is left without a say.

In one dimension clusters are intervals of the sorted numbers, and all sums over an interval are differences of prefix
sums of f, f·w and f·w². Two steps:

1. The row is cut into at most BINS intervals and the best grouping of them into n clusters is found exactly, by
   dynamic programming: D_m(j) = min_i D_{m-1}(i) + cost(i, j). Cuts are even in Σ Δ^⅔·f^⅓, Δ the distance of
   neighbours: the density that Panter and Dite's rule gives cells. Rows of at most BINS numbers end here, at the optimum.
2. Lloyd's steps on all numbers: each sets the cuts to the midpoints of the table, the table to the means. They only
   reduce the sum. The result is within 0.2 % of that with 256 bins (Gaussian and heavy-tailed f, 2 to 4 bits), and up
   to 12 % better than Lloyd's steps from quantiles.

Outliers, where the format is sparse: the share `sensitive` of all weights with the largest f, then the largest |w| up to the
format's share. They take no part in the tables.

With `feedback` columns are rounded one after the other against the errors already made (`dlqc.rounding.vector` with
d = 1: GPTQ on tables); with sensitivity="hessian", a column's mass is then its share R_kk² of the loss, as in
`dlqc.rounding.gptq`. An outlier absorbs the error that reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dlqc.errors import CalibrationError, RecipeError
from dlqc.formats.codebook import CodebookFormat, CodebookWeight, midpoints
from dlqc.formats.integer import _not_finite
from dlqc.rounding.contract import Rounded, Rounding
from dlqc.rounding.hessian import MAX_DAMP, output_energy, sqnr_db
from dlqc.rounding.vector import SAMPLE, BlockFactor, check_factor, factorize_blocks, feedback, report

# Intervals that the dynamic programming groups: its time grows with the square, its gain is spent.
BINS = 96

# Smallest mass of a weight over the mean of its row.
FLOOR = 1e-6

# Numbers a chunk of rows may have: a dozen float64 copies are in flight.
CHUNK = 1 << 20

# Rows of the dynamic programming at a time: their cost matrices, BINS² float32 each, stay in the second-level cache.
DP_ROWS = 32


@dataclass(frozen=True)
class Kmeans(Rounding):
    """Weighted k-means.

    Attributes:
        sensitivity: what masses are: "fisher" or "hessian".
        iterations: Lloyd's steps at most.
        sensitive: share of all weights that become outliers for their sensitivity, if the format is sparse.
        feedback: round columns against earlier errors, as GPTQ does; needs "hessian".
        act_order, damp: as in GPTQ, for `feedback`.

    Metrics: `error`, Σ f·(w - ŵ)² over Σ f·w²; with a "hessian" `sqnr_db` and `loss`, tr(E H Eᵀ); with feedback also
    `loss_rtn`, the loss of rounding to nearest in the same tables, `damp` and `damp_tries`.
    """

    name: ClassVar[str] = "kmeans"
    takes: ClassVar[tuple[type[Any], ...]] = (CodebookFormat,)

    sensitivity: Literal["fisher", "hessian"] = "hessian"
    iterations: int = 50
    sensitive: float = 0.0005
    feedback: bool = False
    act_order: bool = True
    damp: float = 0.01

    @property
    def statistics(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"hessian", "fisher"} if self.sensitivity == "fisher" else {"hessian"})

    def __post_init__(self) -> None:
        if self.sensitivity not in ("fisher", "hessian"):
            what = f"unknown sensitivity {self.sensitivity!r}"
            raise RecipeError(what, where="sensitivity", remedy="Use 'fisher' or 'hessian'")
        if self.iterations < 0:
            what = f"{self.iterations} steps are impossible"
            raise RecipeError(what, where="iterations", remedy="Use 50, or 0 for the initial tables")
        if not 0 <= self.sensitive <= 0.5:
            what = f"a share of {self.sensitive} sensitive weights is not within 0 and 0.5"
            raise RecipeError(what, where="sensitive", remedy="Use 0.0005")
        if not 0 <= self.damp <= MAX_DAMP:
            what = f"damping of {self.damp} times the mean diagonal is not within 0 and {MAX_DAMP:g}"
            raise RecipeError(what, where="damp", remedy="Use 0.01")

    def prepare(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """With feedback, factorize the Hessian once for all linears that read the same input."""
        hessian = stats.get("hessian")
        if not self.feedback or not isinstance(hessian, torch.Tensor):
            return stats
        return {**stats, "hessian": factorize_blocks(hessian, 1, act_order=self.act_order, damp=self.damp)}

    def round(self, weight: torch.Tensor, fmt: Any, stats: Mapping[str, Any]) -> Rounded:
        if not isinstance(fmt, CodebookFormat):
            what = f"kmeans rounds to tables, not to {getattr(fmt, 'label', fmt)!r}"
            raise RecipeError(what, where="fmt", remedy="Use CodebookFormat, or another rounding")
        groups = fmt.groups(weight.shape[1])
        hessian = stats.get("hessian")
        if self.feedback:
            if hessian is None:
                remedy = "Collect it, or use feedback=False"
                raise CalibrationError("kmeans with feedback needs the statistic 'hessian'", remedy=remedy)
            if not isinstance(hessian, BlockFactor):
                hessian = factorize_blocks(hessian, 1, act_order=self.act_order, damp=self.damp)
            check_factor(hessian, weight.shape[1], 1)
        exact = weight.float()
        if not bool(torch.isfinite(exact).all()):
            raise _not_finite(weight)
        fisher = stats.get("fisher") if self.sensitivity == "fisher" else None
        if fisher is None and self.sensitivity == "fisher":
            remedy = "Collect it, or use sensitivity='hessian'"
            raise CalibrationError("kmeans needs the statistic 'fisher'", remedy=remedy)
        mass = sensitivity(exact, fisher, hessian)
        outlier = choose_outliers(exact, mass, fmt, self.sensitive) if fmt.sparse else None
        kept = mass if outlier is None else mass.expand_as(exact).masked_fill(outlier, 0)
        parts = exact.reshape(-1, exact.shape[1] // groups)
        tables = kmeans(parts, kept.expand_as(exact).reshape(parts.shape), fmt.entries, iterations=self.iterations)
        tables = fmt.stored(tables.reshape(len(exact), groups, -1))
        if not isinstance(hessian, BlockFactor):
            rounded = fmt.quantize(exact, tables, outlier)
            errors = exact - rounded.dequantize()
            metrics = {"error": _relative(errors, exact, mass)}
            if hessian is not None:
                noise = output_energy(errors, hessian).sum().item()
                signal = output_energy(exact, hessian).sum().item()
                metrics |= {"sqnr_db": sqnr_db(signal, noise), "loss": noise}
            return Rounded(rounded, metrics)
        rounded, errors, losses = _with_feedback(exact, fmt, tables, outlier, hessian)
        count = len(exact)
        rows = torch.linspace(0, count - 1, min(count, SAMPLE), device=exact.device).round().long()
        nearest = CodebookFormat(fmt.bits, fmt.group_size, 0.0, fmt.table_dtype).quantize(exact[rows], tables[rows])
        other = exact[rows] - nearest.dequantize()
        if outlier is not None:
            other = other.masked_fill(outlier[rows], 0)
        metrics = report(exact, errors, losses, other, rows, hessian)
        return Rounded(rounded, {"error": _relative(errors, exact, mass), **metrics})


def sensitivity(
    weight: torch.Tensor, fisher: torch.Tensor | None, hessian: torch.Tensor | BlockFactor | None
) -> torch.Tensor:
    """Masses of the weights, float32 [N, K] or [1, K], scaled to a largest one of 1 and raised to FLOOR of the mean."""
    count, width = weight.shape
    if fisher is not None:
        if fisher.shape != weight.shape:
            what = f"the Fisher information is {tuple(fisher.shape)}, the weight {(count, width)}"
            raise CalibrationError(what, where="fisher", remedy="Use the statistics of this layer")
        mass, source = fisher, "fisher"
    elif isinstance(hessian, BlockFactor):
        mass = torch.empty(width, dtype=torch.float64, device=weight.device)
        mass[hessian.order] = hessian.factor.upper.diagonal().square()
        mass, source = mass.unsqueeze(0), "hessian"
    elif hessian is not None:
        if hessian.shape != (width, width):
            what = f"the Hessian is of {hessian.shape[0]} input features, the weight of {width}"
            raise CalibrationError(what, where="hessian", remedy="Use the statistics of this layer")
        mass, source = hessian.diagonal().unsqueeze(0), "hessian"
    else:
        remedy = "Collect one of them, or use another rounding"
        raise CalibrationError("kmeans needs the statistic 'fisher' or 'hessian'", remedy=remedy)
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()):
        remedy = "Calibrate in bfloat16 or float32, and check the token weights"
        raise CalibrationError(
            "the sensitivity has elements that are negative or not finite", where=source, remedy=remedy
        )
    # Rows without any sensitivity are rounded as if all their weights were alike.
    largest = mass.amax(dim=1, keepdim=True)
    scaled = torch.where(largest > 0, mass / torch.where(largest > 0, largest, 1.0), 1.0).float()
    whole = scaled * (largest / largest.amax().clamp(min=torch.finfo(largest.dtype).tiny)).float().clamp(min=FLOOR)
    return torch.maximum(whole, FLOOR * whole.mean(dim=1, keepdim=True))


def choose_outliers(weight: torch.Tensor, mass: torch.Tensor, fmt: CodebookFormat, sensitive: float) -> torch.Tensor:
    """Bool [N, K], `fmt.outliers(N, K)` of them true: the most sensitive weights, then the largest of the others."""
    total = fmt.outliers(*weight.shape)
    first = min(total, round(sensitive * weight.numel()))
    chosen = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    chosen[torch.topk(mass.expand_as(weight).flatten(), first, sorted=False).indices] = True
    size = weight.abs().flatten().masked_fill(chosen, -1)
    chosen[torch.topk(size, total - first, sorted=False).indices] = True
    return chosen.reshape(weight.shape)


def kmeans(values: torch.Tensor, mass: torch.Tensor, clusters: int, *, iterations: int = 50) -> torch.Tensor:
    """Tables [R, clusters] for finite `values` [R, n] with masses [R, n] ≥ 0, float64, rising.

    Rows with fewer different numbers than clusters repeat some; a row without mass gets the table of its plain values.
    """
    tables = []
    step = max(1, CHUNK // values.shape[1])
    for start in range(0, len(values), step):
        part, order = values[start : start + step].float().sort(dim=1)
        weigh = mass[start : start + step].float().gather(1, order)
        weigh = torch.where(weigh.sum(dim=1, keepdim=True) > 0, weigh, 1.0)
        # In units of the largest number: squares of denormal or huge numbers would leave the range.
        unit = torch.maximum(part[:, :1].abs(), part[:, -1:].abs())
        unit = torch.where(unit > 0, unit, 1.0).double()
        table = _kmeans_sorted(part.double() / unit, weigh.double(), clusters, iterations)
        tables.append(table * unit)
    return torch.cat(tables)


def _kmeans_sorted(values: torch.Tensor, mass: torch.Tensor, clusters: int, iterations: int) -> torch.Tensor:
    """`kmeans` of sorted rows, float64 [R, n] within ±1."""
    zero = torch.zeros_like(values[:, :1])
    sums = [torch.cat([zero, part.cumsum(dim=1)], dim=1) for part in (mass, mass * values, mass * values.square())]
    cuts = _best_cuts(sums, _bins(values, mass), clusters)
    table = _means(sums, cuts, torch.zeros_like(zero.expand(-1, clusters)))
    ends = torch.full_like(cuts[:, :1], values.shape[1])
    for _ in range(iterations):
        inner = torch.searchsorted(values, midpoints(table))
        cuts = torch.cat([torch.zeros_like(ends), inner, ends], dim=1)
        new = _means(sums, cuts, table)
        if torch.equal(new, table):
            break
        table = new
    return table


def _means(sums: list[torch.Tensor], cuts: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Means [R, n] of the clusters between `cuts` [R, n + 1]; a cluster without mass keeps its value of `empty`."""
    mass, first = (part.gather(1, cuts).diff(dim=1) for part in sums[:2])
    means = torch.where(mass > 0, first / torch.where(mass > 0, mass, 1.0), empty)
    return means.sort(dim=1).values


def _bins(values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Cuts [R, b + 1] of sorted rows [R, n] into b = min(n, BINS) intervals; some may be empty."""
    count, width = values.shape
    if width <= BINS:
        return torch.arange(width + 1, device=values.device).expand(count, -1)
    gap = values[:, 2:] - values[:, :-2]
    gap = torch.cat([gap[:, :1], gap, gap[:, -1:]], dim=1)
    density = (gap.square() * mass).pow_(1 / 3).cumsum(dim=1)
    level = density[:, -1:] * (torch.arange(1, BINS, device=values.device) / BINS)
    inner = torch.searchsorted(density, level.contiguous())
    ends = torch.full_like(inner[:, :1], width)
    return torch.cat([torch.zeros_like(ends), inner, ends], dim=1)


def _best_cuts(sums: list[torch.Tensor], bins: torch.Tensor, clusters: int) -> torch.Tensor:
    """Cuts [R, clusters + 1], a choice among `bins` [R, b + 1], with the least squared error; clusters may be empty."""
    found = []
    edges = bins.shape[1]
    backwards = torch.ones(edges, edges, dtype=torch.bool, device=bins.device).triu(1)
    for start in range(0, len(bins), DP_ROWS):
        own = bins[start : start + DP_ROWS]
        mass, first, second = (part[start : start + DP_ROWS].gather(1, own) for part in sums)
        # cost[j, i]: squared error of the interval from edge i to edge j around its mean.
        held = mass.unsqueeze(2) - mass.unsqueeze(1)
        mean_part = (first.unsqueeze(2) - first.unsqueeze(1)).square() / torch.where(held > 0, held, 1.0)
        cost = (second.unsqueeze(2) - second.unsqueeze(1) - mean_part).clamp_(min=0)
        cost = cost.masked_fill_(backwards, torch.inf).float()
        least, steps = cost[:, :, 0], []
        for _ in range(1, clusters):
            least, choice = (cost + least.unsqueeze(1)).min(dim=2)
            steps.append(choice)
        edge = torch.full_like(own[:, :1], edges - 1)
        path = [edge]
        for choice in reversed(steps):
            edge = choice.gather(1, edge)
            path.append(edge)
        path.append(torch.zeros_like(edge))
        found.append(own.gather(1, torch.cat(path[::-1], dim=1)))
    return torch.cat(found)


def _with_feedback(
    exact: torch.Tensor,
    fmt: CodebookFormat,
    tables: torch.Tensor,
    outlier: torch.Tensor | None,
    found: BlockFactor,
) -> tuple[CodebookWeight, torch.Tensor, torch.Tensor]:
    """Round column after column in fixed tables: the weight, the errors [N, K], the damped losses [N]."""
    count, width = exact.shape
    group = width // tables.shape[1]
    # One column at a time, its table values side by side: [G, 2^bits, N].
    values = tables.float().permute(1, 2, 0).contiguous()
    middle = midpoints(tables.float()).permute(1, 2, 0).contiguous()
    codes = torch.empty(width, count, dtype=torch.uint8, device=exact.device)
    held = None if outlier is None else outlier.T.contiguous()
    sparse: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def choose(column: int, aim: torch.Tensor) -> torch.Tensor:
        code = (aim > middle[column // group]).sum(dim=0, keepdim=True)
        codes[column] = code[0].to(torch.uint8)
        chosen = values[column // group].gather(0, code)
        if held is not None:
            rows = torch.nonzero(held[column]).squeeze(1)
            rest = (aim[0, rows] - chosen[0, rows]).to(fmt.dtype)
            sparse.append((rows, torch.full_like(rows, column), rest))
            chosen[0, rows] += rest.float()
        return chosen

    errors, losses = feedback(exact, found, choose)
    stored = codes.T.contiguous()
    if held is None:
        return CodebookWeight(stored, tables, None, None, None, fmt), errors, losses
    rows, columns, rests = (torch.cat(parts) for parts in zip(*sparse, strict=True))
    return fmt.assemble(stored, tables, rows, columns, rests), errors, losses


def _relative(errors: torch.Tensor, exact: torch.Tensor, mass: torch.Tensor) -> float:
    noise = (errors.square() * mass).sum(dtype=torch.float64).item()
    signal = (exact.square() * mass).sum(dtype=torch.float64).item()
    return noise / signal if signal > 0 else noise
