"""Weights as constant expressions: a checkpoint tensor, then the folds that passes have moved into it.

    W  →  W · diag(v)  →  diag(u) · W · diag(v)

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
from dataclasses import dataclass, field

import torch

from dlqc.errors import ContractError


@dataclass(frozen=True, eq=False)
class ScaleColumns:
    """W [N, K] → W · diag(v), v [K]; for a vector [K], the elementwise product."""

    v: torch.Tensor

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return w * self.v.to(w.dtype)


@dataclass(frozen=True, eq=False)
class ScaleRows:
    """W [N, K] → diag(v) · W, v [N]."""

    v: torch.Tensor

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        return w * self.v.to(w.dtype)[:, None]


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


Fold = ScaleColumns | ScaleRows | Ones | Rows


@dataclass(frozen=True, eq=False)
class Constant:
    """One named constant: `leaf` as it lies in the checkpoint, then `folds` in order.

    `aliases` are other names of the same tensor in the checkpoint (declared ties). `serial` tells one expression from
    another without looking at numbers.
    """

    leaf: torch.Tensor
    folds: tuple[Fold, ...] = ()
    aliases: tuple[str, ...] = ()
    serial: int = field(default_factory=itertools.count().__next__, init=False)

    @property
    def shape(self) -> torch.Size:
        rows = next((f for f in reversed(self.folds) if isinstance(f, Rows)), None)
        return self.leaf.shape if rows is None else torch.Size((rows.stop - rows.start, *self.leaf.shape[1:]))

    @property
    def storage_dtype(self) -> torch.dtype:
        arithmetic = any(not isinstance(f, Rows) for f in self.folds)
        return torch.float32 if arithmetic and self.leaf.dim() == 1 else self.leaf.dtype

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
        return self.exact().to(self.storage_dtype) if self.folds else self.leaf.detach()


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
        if old.leaf.dtype in (torch.uint8, torch.int8, torch.int32):
            raise ContractError(
                "a transform reached a weight that is already quantized",
                where=name,
                remedy="Move the transform before quantize_weights",
            )
        self._constants[name] = Constant(old.leaf, (*old.folds, fold), old.aliases)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Set a constant to a tensor; folds and ties of an older one are gone."""
        self._constants[name] = Constant(tensor)

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
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    def fingerprint(self) -> str:
        """Hash of which expression each name stands for."""
        digest = hashlib.sha256()
        for name in sorted(self._constants):
            constant = self._constants[name]
            digest.update(repr((name, constant.serial)).encode())
        return digest.hexdigest()
