"""Linear transforms of a feature axis: x → x·T, T a width × width matrix that is never spelled out where it need not be.

    Diagonal(v)        x·diag(v)                                      smoothing, equalization
    Permutation(p)     (x·P)_j = x_{p_j}                              zigzag
    Hadamard(d, b)     every b neighbours times H_b/√b                rotation, O(d log b)
    Blocks(M)          every b neighbours times their own b × b matrix; one block is a dense matrix
    Kronecker(A, B)    x·(A ⊗ B); A = Identity(n) repeats B n times   heads, learned affine maps
    Center(d)          x - mean(x)                                    a projection: it has no inverse
    Chain(T₁, T₂, …)   x·T₁·T₂·…

Vectors are rows throughout. A value that becomes x·T is undone where it is read by `contragredient`, T⁻ᵀ:
linear(x, W) = linear(x·T, W·T⁻ᵀ). Everything here is mathematics on tensors; `dlqc.motion` says what may move where.

A transform that stays in the graph is one op, `dlqc::transform(x, parts, spec)`: `spec` is the text of the expression, in which
numbers in brackets name tensors of `parts` (`encode`, `decode`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dlqc import hadamard
from dlqc.errors import ContractError

Group = Literal["diagonal", "permutation", "orthogonal", "invertible"]

#: A learned matrix with a larger condition number loses more than half of float64's digits on the way there and back.
WORST_CONDITION = 1e6
_ORTHOGONAL = 1e-10


class Transform:
    """Base: `t(x)` is x·T for x [..., width]; `t.rows(w)` is Tᵀ·w for w [width, ...]."""

    width: int
    groups: frozenset[Group] = frozenset({"invertible"})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not define x·T")

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        """Tᵀ·w: the transform along dimension 0."""
        return self(w.movedim(0, -1)).movedim(-1, 0)

    def inverse(self) -> Transform:
        raise TypeError(f"{type(self).__name__} has no inverse")

    def transpose(self) -> Transform:
        raise TypeError(f"{type(self).__name__} does not define its transpose")

    def contragredient(self) -> Transform:
        """T⁻ᵀ, with which a reader of x·T undoes it; T itself where T is orthogonal."""
        return self if "orthogonal" in self.groups else self.inverse().transpose()

    def repeat(self, heads: int, times: int) -> Transform:
        """Cut into `heads` equal diagonal blocks, each block `times` times in a row (one per query head of a group).

        Raises:
            ContractError: T is not block diagonal over so many heads.
        """
        if heads == 1:
            return per_head(self, times)
        raise ContractError(
            f"{type(self).__name__} of width {self.width} is not made of {heads} separate heads",
            where="transform",
            remedy="Use a transform per head, such as Kronecker(Identity(heads), T)",
        )

    def matrix(self) -> torch.Tensor:
        """T as a dense matrix, float64 [width, width]. For tests and small sizes."""
        return self(torch.eye(self.width, dtype=torch.float64))

    def encode(self, parts: list[torch.Tensor]) -> str:
        """The text of the expression; appends its tensors to `parts`."""
        raise TypeError(f"{type(self).__name__} has no spelling")


@dataclass(frozen=True, eq=False)
class Identity(Transform):
    """x → x."""

    width: int
    groups = frozenset({"diagonal", "permutation", "orthogonal", "invertible"})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def inverse(self) -> Transform:
        return self

    def transpose(self) -> Transform:
        return self

    def repeat(self, heads: int, times: int) -> Transform:
        return Identity(self.width * times)

    def encode(self, parts: list[torch.Tensor]) -> str:
        return f"id({self.width})"


@dataclass(frozen=True, eq=False)
class Diagonal(Transform):
    """x → x·diag(v), v float64 [d]; without an inverse where v has a zero."""

    v: torch.Tensor

    @property
    def width(self) -> int:  # type: ignore[override]
        return int(self.v.numel())

    @property
    def groups(self) -> frozenset[Group]:  # type: ignore[override]
        signs = bool((self.v.abs() == 1).all())
        return frozenset({"diagonal", "invertible", "orthogonal"} if signs else {"diagonal", "invertible"})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.v.to(x.dtype)

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        return w * self.v.to(w.dtype).reshape(-1, *(1,) * (w.dim() - 1))

    def inverse(self) -> Diagonal:
        if not bool(torch.isfinite(self.v).all()) or bool((self.v == 0).any()):
            raise ContractError(
                "a diagonal transform with a zero, NaN or infinity has no inverse",
                where="transform",
                remedy="Keep scales finite and away from zero",
            )
        return Diagonal(1.0 / self.v)

    def transpose(self) -> Transform:
        return self

    def repeat(self, heads: int, times: int) -> Transform:
        return Diagonal(self.v.reshape(heads, -1).repeat_interleave(times, dim=0).reshape(-1))

    def encode(self, parts: list[torch.Tensor]) -> str:
        parts.append(self.v)
        return f"diag({len(parts) - 1})"


@dataclass(frozen=True, eq=False)
class Permutation(Transform):
    """(x·P)_j = x_{order_j}, order int64 [d]."""

    order: torch.Tensor
    groups = frozenset({"permutation", "orthogonal", "invertible"})

    @property
    def width(self) -> int:  # type: ignore[override]
        return int(self.order.numel())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(-1, self.order)

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        return w.index_select(0, self.order)

    def inverse(self) -> Transform:
        return Permutation(torch.argsort(self.order))

    def transpose(self) -> Transform:
        return self.inverse()

    def repeat(self, heads: int, times: int) -> Transform:
        size = self.width // heads
        own = self.order.reshape(heads, size) - torch.arange(heads)[:, None] * size
        if bool((own < 0).any()) or bool((own >= size).any()):
            return super().repeat(heads, times)
        wide = own.repeat_interleave(times, dim=0)
        return Permutation((wide + torch.arange(heads * times)[:, None] * size).reshape(-1))

    def encode(self, parts: list[torch.Tensor]) -> str:
        parts.append(self.order)
        return f"perm({len(parts) - 1})"


@dataclass(frozen=True, eq=False)
class Hadamard(Transform):
    """Every `block` neighbours times H/√block, H the Hadamard matrix of `dlqc.hadamard`; orthogonal."""

    width: int
    block: int
    transposed: bool = False
    groups = frozenset({"orthogonal", "invertible"})

    def __post_init__(self) -> None:
        if self.width % self.block or hadamard.order(self.block) is None:
            raise ContractError(
                f"{self.width} features do not divide into Hadamard blocks of {self.block}",
                where="transform",
                remedy=f"The largest block that does is {hadamard.largest_block(self.width)}",
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return hadamard.multiply(x, self.block, transpose=self.transposed)

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        return hadamard.multiply_rows(w, self.block, transpose=self.transposed) if w.dim() == 2 else super().rows(w)

    def inverse(self) -> Transform:
        return Hadamard(self.width, self.block, not self.transposed)

    def transpose(self) -> Transform:
        return self.inverse()

    def repeat(self, heads: int, times: int) -> Transform:
        if (self.width // heads) % self.block:
            return super().repeat(heads, times)
        return Hadamard(self.width * times, self.block, self.transposed)

    def encode(self, parts: list[torch.Tensor]) -> str:
        return f"had({self.width},{self.block},{int(self.transposed)})"


@dataclass(frozen=True, eq=False)
class Blocks(Transform):
    """Every b neighbours times their own matrix: m float64 [n, b, b], `inv` its inverses. Make one with `blocks`."""

    m: torch.Tensor
    inv: torch.Tensor

    @property
    def width(self) -> int:  # type: ignore[override]
        return int(self.m.shape[0] * self.m.shape[1])

    @property
    def groups(self) -> frozenset[Group]:  # type: ignore[override]
        same = bool(((self.m - self.inv.transpose(1, 2)).abs() <= _ORTHOGONAL).all())
        return frozenset({"orthogonal", "invertible"} if same else {"invertible"})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        n, b, _ = self.m.shape
        if n == 1:
            return x @ self.m[0].to(x.dtype)
        cut = x.reshape(-1, n, b).transpose(0, 1)
        return torch.bmm(cut, self.m.to(x.dtype)).transpose(0, 1).reshape(x.shape)

    def inverse(self) -> Transform:
        return Blocks(self.inv, self.m)

    def transpose(self) -> Transform:
        return Blocks(self.m.transpose(1, 2), self.inv.transpose(1, 2))

    def repeat(self, heads: int, times: int) -> Transform:
        n = int(self.m.shape[0])
        if n % heads:
            return super().repeat(heads, times)

        def wide(m: torch.Tensor) -> torch.Tensor:
            return m.reshape(heads, n // heads, *m.shape[1:]).repeat_interleave(times, dim=0).flatten(0, 1)

        return Blocks(wide(self.m), wide(self.inv))

    def encode(self, parts: list[torch.Tensor]) -> str:
        parts.append(self.m)
        return f"blocks({len(parts) - 1})"


def blocks(m: torch.Tensor) -> Blocks:
    """A block-diagonal transform from matrices [n, b, b] (or one, [b, b]); orthogonal ones are recognized.

    Raises:
        ContractError: a matrix is singular or so ill-conditioned that undoing it loses the numbers.
    """
    m = m.detach().to(torch.float64)
    m = m[None] if m.dim() == 2 else m
    transposed = m.transpose(1, 2).contiguous()
    eye = torch.eye(m.shape[-1], dtype=torch.float64)
    if bool(((m @ transposed - eye).abs() <= _ORTHOGONAL).all()):
        return Blocks(m, transposed)
    condition = float(torch.linalg.cond(m).max()) if bool(torch.isfinite(m).all()) else float("inf")
    if not condition <= WORST_CONDITION:
        raise ContractError(
            f"the matrix of a transform has condition number {condition:.3g}, more than {WORST_CONDITION:.0e}",
            where="transform",
            remedy="Regularize what learned it, or train for fewer steps",
        )
    return Blocks(m, torch.linalg.inv(m))


@dataclass(frozen=True, eq=False)
class Kronecker(Transform):
    """x·(A ⊗ B): x [..., m·n] seen as [..., m, n] is multiplied by B along n and by A along m."""

    left: Transform
    right: Transform

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.left.width * self.right.width

    @property
    def groups(self) -> frozenset[Group]:  # type: ignore[override]
        return self.left.groups & self.right.groups

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        cut = self.right(x.reshape(*x.shape[:-1], self.left.width, self.right.width))
        if not isinstance(self.left, Identity):
            cut = self.left(cut.transpose(-1, -2)).transpose(-1, -2)
        return cut.reshape(x.shape)

    def inverse(self) -> Transform:
        return Kronecker(self.left.inverse(), self.right.inverse())

    def transpose(self) -> Transform:
        return Kronecker(self.left.transpose(), self.right.transpose())

    def repeat(self, heads: int, times: int) -> Transform:
        if not isinstance(self.left, Identity) or self.left.width % heads:
            return super().repeat(heads, times)
        return Kronecker(Identity(self.left.width * times), self.right)

    def encode(self, parts: list[torch.Tensor]) -> str:
        return f"kron({self.left.encode(parts)},{self.right.encode(parts)})"


def per_head(t: Transform, heads: int) -> Transform:
    """The same transform on each of `heads` equal parts."""
    if isinstance(t, Hadamard):  # it repeats its block anyway, and is fast on both sides of a matrix
        return Hadamard(heads * t.width, t.block, t.transposed)
    return t if heads == 1 else Kronecker(Identity(heads), t)


@dataclass(frozen=True, eq=False)
class Center(Transform):
    """x → x - mean(x): the projection a layer norm begins with. Symmetric, idempotent, not invertible."""

    width: int
    groups = frozenset()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=-1, keepdim=True)

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        return w - w.mean(dim=0, keepdim=True)

    def transpose(self) -> Transform:
        return self

    def encode(self, parts: list[torch.Tensor]) -> str:
        return f"center({self.width})"


@dataclass(frozen=True, eq=False)
class Chain(Transform):
    """x·T₁·T₂·…, transforms of one width."""

    members: tuple[Transform, ...]

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.members[0].width

    @property
    def groups(self) -> frozenset[Group]:  # type: ignore[override]
        return frozenset.intersection(*(t.groups for t in self.members))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for t in self.members:
            x = t(x)
        return x

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        for t in self.members:
            w = t.rows(w)
        return w

    def inverse(self) -> Transform:
        return Chain(tuple(t.inverse() for t in reversed(self.members)))

    def transpose(self) -> Transform:
        return Chain(tuple(t.transpose() for t in reversed(self.members)))

    def repeat(self, heads: int, times: int) -> Transform:
        return Chain(tuple(t.repeat(heads, times) for t in self.members))

    def encode(self, parts: list[torch.Tensor]) -> str:
        return "*".join(t.encode(parts) for t in self.members)


def chain(*members: Transform) -> Transform:
    """The product of transforms, identities left out."""
    real = tuple(t for t in members if not isinstance(t, Identity))
    return real[0] if len(real) == 1 else Chain(real) if real else members[0]


_TOKEN = re.compile(r"[a-z]+|\d+|[(),*]")
# What a file may ask for before anything is allocated: far more than any transform needs.
_LONGEST_SPEC, _WIDEST = 4096, 1 << 24


def decode(spec: str, parts: Sequence[torch.Tensor]) -> Transform:
    """The transform that `encode` spelled; for running it forward (inverses of matrices are not stored).

    Raises:
        ContractError: the text is no expression, or names a part that is not there.
    """
    tokens = _TOKEN.findall(spec) if len(spec) <= _LONGEST_SPEC else []
    if not tokens or "".join(tokens) != spec:
        raise _malformed(spec)
    try:
        found, rest = _product(tokens, parts)
    except (IndexError, ValueError, RecursionError) as error:
        raise _malformed(spec) from error
    if rest:
        raise _malformed(spec)
    return found


def _malformed(spec: str) -> ContractError:
    return ContractError(f"{spec[:80]!r} spells no transform", where="transform", remedy="See dlqc/transform.py")


def _product(tokens: list[str], parts: Sequence[torch.Tensor]) -> tuple[Transform, list[str]]:
    found, rest = _factor(tokens, parts)
    members = [found]
    while rest and rest[0] == "*":
        found, rest = _factor(rest[1:], parts)
        members.append(found)
    if len({t.width for t in members}) > 1:
        raise ValueError("widths")
    return (members[0] if len(members) == 1 else Chain(tuple(members))), rest


def _factor(tokens: list[str], parts: Sequence[torch.Tensor]) -> tuple[Transform, list[str]]:
    name, bracket, rest = tokens[0], tokens[1], tokens[2:]
    if bracket != "(":
        raise ValueError(name)
    if name == "kron":
        left, rest = _product(rest, parts)
        if rest[0] != ",":
            raise ValueError(name)
        right, rest = _product(rest[1:], parts)
        if rest[0] != ")":
            raise ValueError(name)
        return Kronecker(left, right), rest[1:]
    end = rest.index(")")
    if any(token != "," for token in rest[1:end:2]):
        raise ValueError(name)
    numbers = [int(token) for token in rest[:end:2]]
    return _leaf(name, numbers, parts), rest[end + 1 :]


def _leaf(name: str, numbers: list[int], parts: Sequence[torch.Tensor]) -> Transform:
    if max(numbers) > _WIDEST:
        raise ValueError(name)
    if name == "had":
        width, block, transposed = numbers
        return Hadamard(width, block, bool(transposed))
    (number,) = numbers
    if name == "id":
        return Identity(number)
    if name == "center":
        return Center(number)
    part = parts[number]
    real = part.is_floating_point()
    if name == "diag" and part.dim() == 1 and real:
        return Diagonal(part)
    if name == "perm" and part.dim() == 1 and part.dtype == torch.int64:
        return Permutation(part)
    if name == "blocks" and part.dim() == 3 and part.shape[1] == part.shape[2] and real:
        unknown = part.new_full((1, 1, 1), torch.nan)  # so that undoing it gives NaN rather than nonsense
        return Blocks(part, unknown.expand(part.shape))
    raise ValueError(name)
