"""Weights as constant expressions: a checkpoint tensor, then the folds that passes have moved into it.

    W  →  W·T  →  Sᵀ·W·T

A fold is recorded, not computed. The expression is evaluated in float64 when somebody asks for its value, so that
a chain of folds rounds once, and the user's model is never changed. Cloning is cheap: expressions are immutable.

A modified matrix keeps the dtype of its checkpoint tensor when stored; a modified vector (norm gain, bias) is stored in
float32, because a 16-bit gain would cost more than the folding saves. The value used for arithmetic is the stored
one, so a saved and reloaded model computes what the model in memory computes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from dlqc import fwht, hadamard
from dlqc.errors import ContractError
from dlqc.formats.packing import pack, unpack
from dlqc.transform import Chain, Diagonal, Hadamard, Identity, Kronecker, Transform

# Entries of a tile in which a transformed matrix is evaluated, 4 or 8 MiB.
_TILE = 1 << 20


@dataclass(frozen=True, eq=False)
class OnColumns:
    """W [N, K] → W·T, T of width K; for a vector [K], v·T."""

    t: Transform

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return self.t(w)


@dataclass(frozen=True, eq=False)
class OnRows:
    """W [N, K] → Tᵀ·W, T of width N."""

    t: Transform

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return self.t.rows(w)


@dataclass(frozen=True, eq=False)
class Ones:
    """Any tensor → ones of its shape (a gain that was moved elsewhere)."""

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(w)


@dataclass(frozen=True, eq=False)
class Rows:
    """W [N, K] → W[start:stop] (a part of a fused projection)."""

    start: int
    stop: int

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return w[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Columns:
    """W [N, K] → W[:, picked], picked int [n] (the outlier columns of a linear)."""

    picked: torch.Tensor

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return w.index_select(1, self.picked)


@dataclass(frozen=True, eq=False)
class Pruned:
    """W [N, K] → W where it is kept, else 0; or what a pruning method made of the kept weights in place of them.

    Attributes:
        mask: which weights are kept, bits packed by row (`dlqc.formats.packing`, one bit a code).
        moved: [N, K], the kept weights as the method moved them; None leaves them as they are.
    """

    mask: torch.Tensor
    moved: torch.Tensor | None = None

    @classmethod
    def of(cls, kept: torch.Tensor, moved: torch.Tensor | None = None) -> Pruned:
        """From bool [N, K]."""
        return cls(pack(kept.to(torch.uint8), 1), moved)

    def kept(self, width: int) -> torch.Tensor:
        """Bool [N, K], K = `width`."""
        return unpack(self.mask, 1, width).bool()

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        value = w if self.moved is None else self.moved.to(w.dtype)
        return value.masked_fill(~self.kept(w.shape[1]), 0)


@dataclass(frozen=True, eq=False)
class Clamp:
    """W [N, K] → W held within ±limits, limits [N, G], one for each group of K/G neighbours of a row."""

    limits: torch.Tensor

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        n, groups = self.limits.shape
        c = self.limits.to(w.dtype).unsqueeze(-1)
        return w.reshape(n, groups, -1).clamp(-c, c).reshape(w.shape)


@dataclass(frozen=True, eq=False)
class Plus:
    """Any tensor → the tensor plus a number (a gain that its checkpoint holds as w, and its model reads as 1 + w)."""

    number: float

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return w + self.number


Fold = OnColumns | OnRows | Ones | Rows | Columns | Pruned | Clamp | Plus


@dataclass(frozen=True, eq=False)
class Constant:
    """One named constant: `leaf` as it lies in the checkpoint, then `folds` in order.

    `aliases` are other names of the same tensor in the checkpoint (declared ties). `dtype` is the storage dtype where it
    is not the leaf's: a transform is known in float64 and stored in float32. `serial` tells one expression from another
    without looking at numbers.
    """

    leaf: torch.Tensor
    folds: tuple[Fold, ...] = ()
    aliases: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    serial: int = field(default_factory=itertools.count().__next__, init=False)

    @property
    def shape(self) -> torch.Size:
        shape = tuple(self.leaf.shape)
        for f in self.folds:
            if isinstance(f, Rows):
                shape = (f.stop - f.start, *shape[1:])
            elif isinstance(f, Columns):
                shape = (shape[0], len(f.picked))
        return torch.Size(shape)

    @property
    def storage_dtype(self) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        arithmetic = any(not isinstance(f, Rows) for f in self.folds)
        return torch.float32 if arithmetic and self.leaf.dim() == 1 else self.leaf.dtype

    @property
    def unpruned(self) -> Constant:
        """The expression without the masks of pruning; of a weight that pruning has moved, the expression itself."""
        masks = [f for f in self.folds if isinstance(f, Pruned)]
        if any(f.moved is not None for f in masks):
            return self
        return replace(self, folds=tuple(f for f in self.folds if f not in masks))

    def kept(self) -> torch.Tensor | None:
        """Which weights are left of a pruned matrix, bool [N, K]; None if it was not pruned.

        What is folded in later scales rows and columns, bounds, or takes a part (`Weights.fold` sees to it).
        """
        found, width = None, self.leaf.shape[-1]
        for fold in self.folds:
            if isinstance(fold, Pruned):
                own = fold.kept(width)
                found = own if found is None else found & own
            elif isinstance(fold, Rows | Columns):
                width = len(fold.picked) if isinstance(fold, Columns) else width
                found = None if found is None else fold(found)
        return found

    def exact(self) -> torch.Tensor:
        """The expression in float64 (integers as they are), not rounded to the storage dtype."""
        value = self.leaf.detach()
        if value.is_floating_point():
            value = value.to(torch.float64)
        for fold in self.folds:
            value = fold(value)
        return value

    def stored(self) -> torch.Tensor:
        """The value as an artifact stores it."""
        if not self.folds:
            return self.leaf.detach().to(self.storage_dtype)
        transforms = all(isinstance(f, OnColumns | OnRows) for f in self.folds)
        return self._in_tiles() if transforms and self.leaf.dim() == 2 else self.exact().to(self.storage_dtype)

    def _in_tiles(self) -> torch.Tensor:
        """`exact` rounded to the storage dtype, without a wide copy of the whole matrix.

        Tᵀ·(W·S) = (Tᵀ·W)·S, so all that acts on columns is done in tiles of rows, then the rest in tiles of columns. What is
        stored in 16 bits is computed in float32, whose rounding is lost in that of the result. Diagonal and Hadamard matrices go
        through native code where there is some (`dlqc.fwht`), in one reading of the weight for one-sided folds.
        """
        n, k = self.leaf.shape
        rows = [f.t for f in self.folds if isinstance(f, OnRows)]
        final = self.storage_dtype
        wide = torch.float32 if final.itemsize == 2 else torch.float64
        columns = [f.t for f in self.folds if isinstance(f, OnColumns)]
        row, column = _side(columns), _side(rows)
        result = torch.empty(n, k, dtype=final)
        if row and column and fwht.run(self.leaf.detach(), result, wide, row, column):
            return result
        between = wide if rows else final
        out = self.leaf.detach()
        if columns:
            out = torch.empty(n, k, dtype=between) if rows else result
            step = max(1, _TILE // k)
            for i in range(0, n, step):
                tile = self.leaf[i : i + step].detach().to(wide)
                for t in columns:
                    tile = t(tile)
                out[i : i + step] = tile
        if not rows:
            return result
        step = max(1, _TILE // n)
        for i in range(0, k, step):
            tile = out[:, i : i + step].to(wide)
            for t in rows:
                tile = t.rows(tile)
            result[:, i : i + step] = tile
        return result


def _side(transforms: list[Transform]) -> fwht.Side | None:
    """A product of diagonal matrices and at most one Hadamard matrix, as native code takes it; None if it is not that."""
    found = fwht.NOTHING
    diagonals: list[torch.Tensor | None] = [None, None]
    for t in itertools.chain.from_iterable(map(_members, transforms)):
        if isinstance(t, Diagonal):
            place = int(found.order > 1)
            old = diagonals[place]
            diagonals[place] = t.v.double() if old is None else old * t.v
        elif found.order > 1:
            return None
        elif isinstance(t, Hadamard):
            found = hadamard.side(t.block, t.transposed)
        elif isinstance(t, Kronecker) and isinstance(t.left, Hadamard) and isinstance(t.right, Identity):
            found = replace(hadamard.side(t.left.block, t.left.transposed), inner=t.right.width)
        elif not isinstance(t, Identity):
            return None
    return replace(found, pre=diagonals[0], post=diagonals[1])


def _members(t: Transform) -> Iterator[Transform]:
    if isinstance(t, Chain):
        for member in t.members:
            yield from _members(member)
    else:
        yield t


class Weights(Mapping[str, Constant]):
    """The constants of a graph, by fully qualified checkpoint name (or a name that a pass gave)."""

    def __init__(self, constants: Mapping[str, Constant] | None = None) -> None:
        self._constants = dict(constants or {})

    def __getitem__(self, name: str) -> Constant:
        return self._constants[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._constants)

    def __len__(self) -> int:
        return len(self._constants)

    def clone(self) -> Weights:
        return Weights(self._constants)

    def fold(self, name: str, fold: Fold) -> None:
        """Append a fold to a constant."""
        old = self._constants[name]
        if not old.leaf.is_floating_point() or old.leaf.dtype.itemsize == 1:
            raise ContractError(
                "a transform reached a weight that is already quantized",
                where=name,
                remedy="Move the transform before quantize_weights",
            )
        mixes = isinstance(fold, OnColumns | OnRows) and not isinstance(fold.t, Diagonal | Identity)
        if mixes and any(isinstance(f, Pruned) for f in old.folds):
            raise ContractError(
                "a transform would mix the zeros of a pruned weight with others",
                where=name,
                remedy="Move the transform before sparsify",
            )
        self._constants[name] = Constant(old.leaf, (*old.folds, fold), old.aliases, old.dtype)

    def put(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Set a constant to a tensor; folds and ties of an older one are gone."""
        self._constants[name] = Constant(tensor, dtype=dtype)

    def define(self, name: str, constant: Constant) -> None:
        """Set a constant to an expression."""
        self._constants[name] = constant

    def drop(self, name: str) -> None:
        del self._constants[name]

    def value(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The constant's value: float64 asks for the exact expression, anything else goes through the stored form."""
        constant = self._constants[name]
        if dtype is torch.float64:
            return constant.exact()
        value = constant.stored()
        if constant.folds and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ContractError(
                f"a transform made a number that {str(value.dtype).removeprefix('torch.')} cannot hold",
                where=name,
                remedy="Load the model in bfloat16 or float32, or leave this site out",
            )
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    def fingerprint(self) -> str:
        """Hash of which expression each name stands for."""
        digest = hashlib.sha256()
        for name in sorted(self._constants):
            constant = self._constants[name]
            digest.update(repr((name, constant.serial)).encode())
        return digest.hexdigest()
