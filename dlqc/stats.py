"""Statistics of linear inputs, collected in one run of a block.

    hessian   Σ c·xᵀx              [K, K]   float64 sum of float32 products
    drift     Σ c·(x₀ - x)ᵀx       [K, K]   likewise; x₀ is what the linear would read in the model before weights were rounded
    energy    Σ c·x²               [K]      the diagonal of the Hessian alone
    absmax    max |x| over rows with c > 0   [K]
    mean      Σ c·x / Σ c          [K]
    meanabs   Σ c·|x| / Σ c        [K]
    fisher    Σ (∂ℓ/∂W)² / S       [N, K]   of the weight itself, from one backward sweep before the first block (`dlqc.fisher`)
    count     Σ over rows of 1     []
    sample    up to 512 rows x, drawn with probability proportional to c, without replacement   [S, K]
    masked    whether each row of the sample stands at a masked token                           [S] bool

x are the rows that a linear reads, c the token weights of the calibration states. A weight that several linears share
gets the sum (maximum, mean) over all of them; its sample is that of the first. Linears of one block that read the same
number of rows sample the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from dlqc.errors import CalibrationError, ContractError, nearest
from dlqc.execute import placeholder
from dlqc.graph import Linear

STATISTICS = ("absmax", "count", "drift", "energy", "hessian", "masked", "mean", "meanabs", "sample")

#: Statistics that compare with the model before weights were rounded: its states run through the blocks, too.
PAIRED = frozenset({"drift"})
#: Statistics of a weight, which linears that read the same value do not share.
OWN = frozenset({"fisher"})
SAMPLE = 512

_MEANS = frozenset({"mean", "meanabs"})

#: Rows of a second moment that are summed at a time.
PANEL = 1024


class Collector:
    """Accumulates the wanted statistics at the inputs of linears."""

    def __init__(self, wanted: Iterable[str], sites: Sequence[Linear]) -> None:
        self.wanted = frozenset(wanted)
        for name in self.wanted - set(STATISTICS):
            raise ContractError(
                f"no statistic is called {name!r}", where="statistics", remedy=nearest(name, STATISTICS)
            )
        self._sites = sites
        self._sums: dict[fx.Node, dict[str, torch.Tensor]] = {}
        self._weight_sum: dict[fx.Node, float] = {}
        self._row_weights = torch.empty(0, 0)
        self._masked = torch.empty(0, 0, dtype=torch.bool)
        self._exact: Mapping[fx.Node, torch.Tensor] = {}
        self._batches = 0
        self._priority: dict[fx.Node, torch.Tensor] = {}

    def taps(
        self,
        row_weights: torch.Tensor,
        masked: torch.Tensor | None = None,
        exact: Mapping[fx.Node, torch.Tensor] | None = None,
    ) -> Mapping[fx.Node, object]:
        """Callbacks for one batch.

        Args:
            row_weights: c [B, L], one weight a row of x.
            masked: [B, L], which tokens are masked.
            exact: x₀ by the node of x, for paired statistics.
        """
        self._row_weights = row_weights
        self._exact = exact or {}
        self._masked = torch.zeros_like(row_weights, dtype=torch.bool) if masked is None else masked
        self._batches += 1
        return {site.x: self._add for site in self._sites}

    def _rows(self, node: fx.Node, value: torch.Tensor, whose: str) -> torch.Tensor:
        """A value as float32 rows [n, K], all finite."""
        x = value.detach().reshape(-1, value.shape[-1]).float()
        if not bool(torch.isfinite(x).all()):
            site = next(s for s in self._sites if s.x is node)
            bad = int((~torch.isfinite(x)).any(dim=0).sum())
            raise CalibrationError(
                f"NaN or Inf in the input activations{whose} ({bad} of {x.shape[1]} channels)",
                where=site.name,
                remedy="Check the weights before this layer and the calibration text",
            )
        return x

    def _add(self, node: fx.Node, value: torch.Tensor) -> None:
        x = self._rows(node, value, "")
        c = self._weights_for(node, x.shape[0])
        k = x.shape[1]
        sums = self._sums.setdefault(node, {})
        if "count" in self.wanted:
            sums["count"] = sums.get("count", torch.zeros((), dtype=torch.float64)) + x.shape[0]
        if "absmax" in self.wanted:
            peak = x[c > 0].abs().amax(dim=0) if bool((c > 0).any()) else torch.zeros(k)
            sums["absmax"] = torch.maximum(sums.get("absmax", torch.zeros(k)), peak)
        for name in _MEANS & self.wanted:
            term = c.double() @ (x.abs() if name == "meanabs" else x).double()
            sums[name] = sums.get(name, torch.zeros(k, dtype=torch.float64)) + term
        self._weight_sum[node] = self._weight_sum.get(node, 0.0) + float(c.sum(dtype=torch.float64))
        if self.wanted & {"sample", "masked"}:
            self._draw(node, x, c, sums)
        if "energy" in self.wanted:
            term = c.double() @ x.double().square()
            sums["energy"] = sums.get("energy", torch.zeros(k, dtype=torch.float64)) + term
        if "hessian" in self.wanted:
            scaled = x * c.sqrt()[:, None]
            _add_product(sums, "hessian", scaled, scaled)
        if "drift" in self.wanted:
            if node not in self._exact:
                what = "the statistic 'drift' compares with the model before rounding, and what that reads here was not given"
                raise ContractError(what, where="statistics", remedy="Collect it by a PassManager, over blocks")
            shift = self._rows(node, self._exact[node], " of the model before rounding") - x
            _add_product(sums, "drift", shift.mul_(c[:, None]), x)

    def _draw(self, node: fx.Node, x: torch.Tensor, c: torch.Tensor, sums: dict[str, torch.Tensor]) -> None:
        """Weighted reservoir: the rows with the largest u^(1/c), u uniform (Efraimidis and Spirakis 2006)."""
        generator = torch.Generator().manual_seed(self._batches)
        u = torch.rand(self._row_weights.shape, generator=generator, dtype=torch.float64)
        masked = self._masked
        if _sequence_first(node):
            u, masked = u.T, masked.T
        if u.numel() != x.shape[0]:  # other rows than the tokens
            u = torch.rand(x.shape[0], generator=generator, dtype=torch.float64)
            masked = torch.zeros(x.shape[0], dtype=torch.bool)
        u, masked = u.reshape(-1), masked.reshape(-1)
        priority = torch.where(c > 0, u.log() / c.clamp_min(1e-30), -torch.inf)
        if node in self._priority:
            priority = torch.cat((self._priority[node], priority))
            x, masked = torch.cat((sums["sample"], x)), torch.cat((sums["masked"], masked))
        keep = priority.topk(min(SAMPLE, int((priority > -torch.inf).sum()))).indices.sort().values
        self._priority[node], sums["sample"], sums["masked"] = priority[keep], x[keep], masked[keep]

    def _weights_for(self, node: fx.Node, rows: int) -> torch.Tensor:
        """c [rows] of what a linear reads."""
        site = next(s for s in self._sites if s.x is node)
        return weights_of_rows(node, self._row_weights, rows, site.name)

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        """Statistics by weight name. Linears that read the same value share the tensors."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        weight_sum: dict[str, float] = {}
        for site in self._sites:
            sums = self._sums[site.x]
            weight_sum[site.weight] = weight_sum.get(site.weight, 0.0) + self._weight_sum.get(site.x, 0.0)
            if site.weight not in found:
                found[site.weight] = dict(sums)
                continue
            merged = found[site.weight]
            for name, value in sums.items():
                if name in ("sample", "masked"):
                    continue
                merged[name] = torch.maximum(merged[name], value) if name == "absmax" else merged[name] + value
        for weight, sums in found.items():
            for name in _MEANS & sums.keys():
                sums[name] = sums[name] / max(weight_sum[weight], 1e-30)
        return found


class Moments:
    """What a reader should know of the second moments that a pass used, in as few sentences as possible."""

    def __init__(self) -> None:
        self._short: list[tuple[float, int, int]] = []
        self._dead: list[tuple[int, int]] = []
        self._linears = self._few = self._blind = 0

    def add(self, stats: Mapping[str, torch.Tensor], linears: int) -> None:
        """Statistics that so many linears share; nothing is said of those without "hessian" and "count"."""
        if "hessian" not in stats or "count" not in stats:
            return
        rows, width = int(stats["count"]), stats["hessian"].shape[0]
        self._linears += linears
        if rows < width:
            self._few += linears
            self._short.append((rows / width, rows, width))
        dead = int((stats["hessian"].diagonal() == 0).sum())
        if dead:
            self._blind += linears
            self._dead.append((dead, width))

    def notes(self) -> list[str]:
        found = []
        if self._short:
            _, rows, width = min(self._short)
            found.append(
                f"fewer calibration rows than input features at {self._few} of {self._linears} linears of a block "
                f"(at worst {rows:,} for {width:,}): the Hessian is singular but for its damping; use more sequences"
            )
        if self._dead:
            dead, width = max(self._dead)
            found.append(
                f"input features that are zero in all calibration rows at {self._blind} of {self._linears} linears of a "
                f"block (at most {dead:,} of {width:,}): their weights are rounded to nearest"
            )
        return found


def _add_product(sums: dict[str, torch.Tensor], name: str, left: torch.Tensor, right: torch.Tensor) -> None:
    """sums[name] += leftᵀ·right, a panel of PANEL rows at a time, so that no second matrix of that size is made."""
    if name not in sums:
        sums[name] = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for start in range(0, left.shape[1], PANEL):
        rows = slice(start, start + PANEL)
        sums[name][rows] += left[:, rows].T @ right


def weights_of_rows(node: fx.Node, weights: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    """c [rows] of the rows of a value, from the token weights [B, L] of a batch. Other rows than tokens weigh alike.

    Raises:
        CalibrationError: there are other rows than tokens, and tokens do not weigh alike; `name` says where.
    """
    c = weights.reshape(-1)
    if _sequence_first(node):
        return weights.T.reshape(-1)
    batch, length, dims = _dims(node)
    if c.numel() == rows and (dims == [batch, length] or len(dims) == 1):
        return c
    if bool((c == c[0]).all()):
        return torch.ones(rows)
    raise CalibrationError(
        f"reads {rows} rows where the states have {c.numel()} tokens, so token weights do not apply",
        where=name,
        remedy="Use weight=uniform, or exclude it with skip=",
    )


def _sequence_first(node: fx.Node) -> bool:
    """Whether a value is [L, B, K] where the states are [B, L]."""
    batch, length, dims = _dims(node)
    return dims == [length, batch]


def _dims(node: fx.Node) -> tuple[str, str, list[str]]:
    """Spellings of the batch, the length, and the leading sizes of a value."""
    batch, length = (str(size) for size in placeholder(node.graph).meta["val"].shape)
    return batch, length, [str(size) for size in node.meta["val"].shape[:-1]]
