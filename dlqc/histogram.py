"""Weighted histograms of real numbers in bounded memory, whose bins are as fine for small numbers as for large ones.

    |x| in [0, 2^(E-12))            M bins of equal width
    |x| in [2^(e-1), 2^e), e ≤ E    M bins of equal width, for each of the 12 octaves below 2^E

E follows the largest number seen. When it grows, the equal bins and the lowest octave, which have one width, are merged in
pairs: bins always lie at multiples of powers of two, so that the histogram depends neither on the order of the numbers nor on how
they came in batches (up to the rounding of sums). A number in an octave is known to 1/M of itself, however far it is from the
largest one; that is what a search for a clipping range needs, whose optimum may be far below the largest number.

Memory: 26·M numbers of float64 for each histogram.
"""

from __future__ import annotations

import torch

OCTAVES = 12

# Entries whose bins are computed at a time: 16 bytes each.
_CHUNK = 1 << 22


class Histogram:
    """`count` histograms side by side.

    Attributes:
        size: M.
        exponent: E; None while only zeros were seen.
        mass: float64 [count, 2, 13·M], weight in each bin; side 0 holds the negative numbers, side 1 the others.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.exponent: int | None = None
        self.mass = torch.zeros(count, 2, (OCTAVES + 1) * size, dtype=torch.float64)

    def add(self, x: torch.Tensor, c: torch.Tensor, which: torch.Tensor) -> None:
        """Count finite numbers x [n, m] with weights c [n], in the histograms `which` int64 [n, m] (or what broadcasts to it)."""
        step = max(1, _CHUNK // max(x.shape[-1], 1))
        which = which.expand(x.shape)
        for i in range(0, x.shape[0], step):
            self._add(x[i : i + step].double(), c[i : i + step].double(), which[i : i + step])

    def _add(self, x: torch.Tensor, c: torch.Tensor, which: torch.Tensor) -> None:
        magnitude = x.abs()
        peak = magnitude.amax() if x.numel() else torch.zeros(())
        if float(peak) > 0:
            self._grow(int(torch.frexp(peak).exponent))
        if self.exponent is None:
            place = torch.zeros(x.shape, dtype=torch.int64)
        else:
            scaled = torch.ldexp(magnitude, torch.tensor(OCTAVES - self.exponent))
            mantissa, octave = torch.frexp(scaled)
            inside = torch.where(octave >= 1, 2 * mantissa - 1, scaled)
            place = octave.clamp(min=0).long() * self.size + (inside * self.size).long()
        bins = self.mass.shape[2]
        index = (2 * which + (x >= 0)) * bins + place
        weights = c.unsqueeze(-1).expand(x.shape)
        found = torch.bincount(index.reshape(-1), weights=weights.reshape(-1), minlength=self.mass.numel())
        self.mass += found.reshape(self.mass.shape)

    def _grow(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        for _ in range(exponent - self.exponent):
            m = self.size
            merged = self.mass[..., : 2 * m].reshape(*self.mass.shape[:2], m, 2).sum(-1)
            empty = torch.zeros_like(merged)
            self.mass = torch.cat((merged, self.mass[..., 2 * m :], empty), dim=-1)
        self.exponent = max(self.exponent, exponent)

    @property
    def edges(self) -> torch.Tensor:
        """Where the bins of either side begin, and where the last one ends; float64 [13·M + 1]."""
        part = torch.arange(self.size, dtype=torch.float64) / self.size
        octaves = [2.0**e * (1 + part) for e in range(OCTAVES)]
        relative = torch.cat((part, *octaves, torch.tensor([2.0**OCTAVES], dtype=torch.float64)))
        return torch.ldexp(relative, torch.tensor((self.exponent or 0) - OCTAVES))

    def signed(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The middles of the bins of one histogram that hold something, ascending, and their weights; float64 [n] each."""
        edges = self.edges
        middle = (edges[1:] + edges[:-1]) / 2
        values = torch.cat((-middle.flip(0), middle))
        mass = torch.cat((self.mass[index, 0].flip(0), self.mass[index, 1]))
        live = mass > 0
        return values[live], mass[live]

    def magnitudes(self, index: int) -> torch.Tensor:
        """Weight by bin of |x|, float64 [13·M]."""
        return self.mass[index].sum(0)
