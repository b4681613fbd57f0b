"""Transforms against dense matrices that are spelled out here."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc import hadamard, transform
from dlqc.errors import ContractError
from dlqc.transform import (
    Blocks,
    Center,
    Chain,
    Diagonal,
    Hadamard,
    Identity,
    Kronecker,
    Permutation,
    Transform,
    blocks,
    chain,
    decode,
    per_head,
)

Pair = tuple[Transform, torch.Tensor]  # a transform, and its matrix written out
NEAR = {"rtol": 1e-10, "atol": 1e-10}  # products of a few well-conditioned float64 matrices, and their inverses


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def good(n: int, b: int, seed: int) -> torch.Tensor:
    """n matrices [b, b] with singular values between 1/2 and 2."""
    u, _, v = torch.linalg.svd(rand(n, b, b, seed=seed))
    return u @ torch.diag_embed(0.5 + 1.5 * torch.sigmoid(rand(n, b, seed=seed + 1))) @ v


def turn(n: int, b: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(rand(n, b, b, seed=seed))[0]


def sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def a_diagonal(width: int, seed: int) -> Pair:
    v = rand(width, seed=seed)
    v = torch.where(v < 0, -1.0, 1.0) * (0.5 + v.abs())
    return Diagonal(v), torch.diag(v)


def a_permutation(width: int, seed: int) -> Pair:
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    dense = torch.zeros(width, width, dtype=torch.float64)
    for j, i in enumerate(order.tolist()):
        dense[i, j] = 1
    return Permutation(order), dense


def a_hadamard(width: int, seed: int) -> Pair:
    sizes = [b for b in (1, 2, 4, 8, 12) if width % b == 0]
    b = sizes[seed % len(sizes)]
    h = hadamard.hadamard(b) if b == 12 else sylvester(b)
    h = h / b**0.5
    transposed = seed % 2 == 1
    return Hadamard(width, b, transposed), torch.block_diag(*[h.T if transposed else h] * (width // b))


def some_blocks(width: int, seed: int) -> Pair:
    sizes = [b for b in range(1, width + 1) if width % b == 0]
    b = sizes[seed % len(sizes)]
    m = (turn if seed % 3 == 0 else good)(width // b, b, seed)
    return blocks(m), torch.block_diag(*m)


def an_identity(width: int, seed: int) -> Pair:
    return Identity(width), torch.eye(width, dtype=torch.float64)


LEAVES: dict[str, Callable[[int, int], Pair]] = {
    "identity": an_identity,
    "diagonal": a_diagonal,
    "permutation": a_permutation,
    "hadamard": a_hadamard,
    "blocks": some_blocks,
}


def a_center(width: int, seed: int) -> Pair:
    return Center(width), torch.eye(width, dtype=torch.float64) - torch.full(
        (width, width), 1 / width, dtype=torch.float64
    )


@st.composite
def pairs(draw: st.DrawFn, width: int | None = None, depth: int = 2, *, center: bool = False) -> Pair:
    """Any invertible transform (or, with `center`, projections too) of a width, with its matrix."""
    width = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])) if width is None else width
    kinds = [*LEAVES, *(["center"] if center else []), *(["kronecker", "chain"] if depth else [])]
    kind, seed = draw(st.sampled_from(kinds)), draw(st.integers(0, 999))
    if kind == "kronecker":
        m = draw(st.sampled_from([m for m in range(1, width + 1) if width % m == 0]))
        (a, da), (b, db) = (draw(pairs(w, depth - 1, center=center)) for w in (m, width // m))
        return Kronecker(a, b), torch.kron(da, db)
    if kind == "chain":
        members = [draw(pairs(width, depth - 1, center=center)) for _ in range(draw(st.integers(1, 3)))]
        dense = torch.eye(width, dtype=torch.float64)
        for _, factor in members:
            dense = dense @ factor
        return Chain(tuple(t for t, _ in members)), dense
    return a_center(width, seed) if kind == "center" else LEAVES[kind](width, seed)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **NEAR)


# What a transform does


@settings(max_examples=60, deadline=None)
@given(pairs(center=True), st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0)]), st.integers(0, 99))
def test_a_call_is_a_product_with_the_matrix(pair: Pair, batch: tuple[int, ...], seed: int) -> None:
    t, dense = pair
    assert t.width == len(dense)
    x = rand(*batch, t.width, seed=seed)
    before = x.clone()
    close(t(x), x @ dense)
    assert torch.equal(x, before)  # nothing in place
    close(t.matrix(), dense)


@settings(max_examples=50, deadline=None)
@given(pairs(center=True), st.sampled_from([(), (1,), (5,), (3, 2)]), st.integers(0, 99))
def test_rows_multiply_from_the_left(pair: Pair, more: tuple[int, ...], seed: int) -> None:
    t, dense = pair
    w = rand(t.width, *more, seed=seed)
    close(t.rows(w), torch.tensordot(dense.T, w, dims=1))


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_inverse_transpose_and_contragredient(pair: Pair) -> None:
    t, dense = pair
    close(t.inverse().matrix(), torch.linalg.inv(dense))
    close(t.transpose().matrix(), dense.T)
    close(t.contragredient().matrix(), torch.linalg.inv(dense).T)
    # The identity of every reader: x·Wᵀ = (x·T)·(W·T⁻ᵀ)ᵀ.
    x, w = rand(3, t.width, seed=1), rand(4, t.width, seed=2)
    close(t(x) @ t.contragredient()(w).T, x @ w.T)


@settings(max_examples=60, deadline=None)
@given(pairs(center=True))
def test_groups_tell_the_truth(pair: Pair) -> None:
    """A transform may be in more groups than it says (a product of rotations back to the identity), never in fewer."""
    t, dense = pair
    eye = torch.eye(t.width, dtype=torch.float64)
    truth = {
        "diagonal": torch.equal(dense, torch.diag(dense.diagonal())),
        "permutation": bool(((dense == 0) | (dense == 1)).all() and (dense.sum(0) == 1).all()),
        "orthogonal": bool((dense @ dense.T - eye).abs().max() < 1e-9),
        "invertible": int(torch.linalg.matrix_rank(dense)) == t.width,
    }
    for group in t.groups:
        assert truth[group], group


@pytest.mark.parametrize(
    ("t", "groups"),
    [
        (Identity(4), {"diagonal", "permutation", "orthogonal", "invertible"}),
        (Diagonal(torch.tensor([2.0, -1.0])), {"diagonal", "invertible"}),
        (Diagonal(torch.tensor([1.0, -1.0])), {"diagonal", "orthogonal", "invertible"}),
        (Permutation(torch.tensor([1, 0])), {"permutation", "orthogonal", "invertible"}),
        (Hadamard(8, 4), {"orthogonal", "invertible"}),
        (blocks(turn(2, 3, 0)), {"orthogonal", "invertible"}),
        (blocks(good(2, 3, 0)), {"invertible"}),
        (Center(4), set()),
        (Kronecker(Identity(2), Permutation(torch.tensor([1, 0]))), {"permutation", "orthogonal", "invertible"}),
        (Kronecker(Hadamard(2, 2), Diagonal(torch.tensor([2.0, 3.0]))), {"invertible"}),
        (Kronecker(Identity(2), Center(3)), set()),
        (Chain((Diagonal(torch.tensor([1.0, -1.0])), Hadamard(2, 2))), {"orthogonal", "invertible"}),
        (Chain((Diagonal(torch.tensor([2.0, 3.0])), Diagonal(torch.ones(2)))), {"diagonal", "invertible"}),
    ],
)
def test_groups_by_name(t: Transform, groups: set[str]) -> None:
    assert t.groups == groups


def test_an_orthogonal_transform_undoes_itself() -> None:
    for t in (Hadamard(12, 12), Permutation(torch.tensor([2, 0, 1])), blocks(turn(2, 3, 0)), Identity(3)):
        assert t.contragredient() is t


def test_kronecker_is_row_major_and_in_order() -> None:
    a, b = good(1, 2, 0)[0], good(1, 3, 1)[0]
    x = rand(6)
    by_hand = torch.stack([sum(x[i * 3 + j] * a[i, k] * b[j, m] for i in range(2) for j in range(3))
                           for k in range(2) for m in range(3)])  # fmt: skip
    close(Kronecker(blocks(a), blocks(b))(x), by_hand)
    assert (Kronecker(blocks(b), blocks(a))(x) - by_hand).abs().max() > 1e-2


def test_a_chain_goes_from_left_to_right() -> None:
    a, b = blocks(good(1, 3, 0)), blocks(good(1, 3, 1))
    x = rand(2, 3)
    close(Chain((a, b))(x), x @ a.m[0] @ b.m[0])
    assert (Chain((b, a))(x) - Chain((a, b))(x)).abs().max() > 1e-2


def test_chain_leaves_identities_out() -> None:
    t = Hadamard(4, 4)
    assert chain(Identity(4), t, Identity(4)) is t
    assert isinstance(chain(Identity(4), Identity(4)), Identity)
    both = chain(t, Identity(4), t)
    assert isinstance(both, Chain)
    assert both.members == (t, t)


@settings(max_examples=25, deadline=None)
@given(pairs(center=True), st.integers(0, 99))
def test_strides_do_not_matter(pair: Pair, seed: int) -> None:
    t, dense = pair
    turned = rand(t.width, 3, 2, seed=seed).permute(2, 1, 0)
    close(t(turned), turned @ dense)
    gaps = rand(4, 2 * t.width, seed=seed)[:, ::2]
    close(t(gaps), gaps @ dense)
    wide = rand(3, t.width, seed=seed).T
    close(t.rows(wide), dense.T @ wide)
    same = rand(1, t.width, seed=seed).expand(3, t.width)
    close(t(same), same @ dense)


@settings(max_examples=25, deadline=None)
@given(pairs(center=True), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_dtype_of_the_input_is_kept(pair: Pair, dtype: torch.dtype) -> None:
    t, dense = pair
    x = rand(3, t.width).to(dtype)
    found = t(x)
    assert found.dtype is dtype
    assert t.rows(x.T).dtype is dtype
    near = 1e-4 if dtype is torch.float32 else 0.15
    torch.testing.assert_close(found.double(), x.double() @ dense, rtol=near, atol=near)


# Heads


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LEAVES)), st.integers(1, 4), st.sampled_from([1, 2, 4, 12]), st.integers(1, 3),
       st.integers(0, 99))  # fmt: skip
def test_repeat_repeats_every_head(leaf: str, heads: int, size: int, times: int, seed: int) -> None:
    parts = [LEAVES[leaf](size, seed) for _ in range(heads)]
    if leaf in ("blocks", "diagonal"):  # heads of their own
        parts = [LEAVES[leaf](size, seed + 30 * i) for i in range(heads)]
    t: Transform
    if leaf == "diagonal":
        t = Diagonal(torch.cat([torch.diagonal(d) for _, d in parts]))
    elif leaf == "blocks":
        t = blocks(torch.stack([d for _, d in parts]))
    elif leaf == "permutation":
        orders = [LEAVES[leaf](size, seed + i) for i in range(heads)]
        parts = orders
        t = Permutation(torch.cat([p.order + i * size for i, (p, _) in enumerate(orders)]))  # type: ignore[attr-defined]
    else:
        t = per_head(parts[0][0], heads)
    expected = torch.block_diag(*[d for _, d in parts for _ in range(times)])
    close(t.repeat(heads, times).matrix(), expected)
    close(t.repeat(heads, times).contragredient().matrix(), torch.linalg.inv(expected).T)
    close(Chain((t, t)).repeat(heads, times).matrix(), expected @ expected)
    if heads > 1 and isinstance(t, Diagonal | Permutation | Blocks):
        assert t.repeat(heads, times).groups == t.groups


@pytest.mark.parametrize(
    "t", [blocks(good(1, 3, 0)), Kronecker(blocks(good(1, 2, 0)), Hadamard(4, 4)), Center(4), Hadamard(12, 12)]
)
def test_a_single_head_repeats_as_a_whole(t: Transform) -> None:
    close(t.repeat(1, 3).matrix(), torch.block_diag(*[t.matrix()] * 3))
    close(t.repeat(1, 1).matrix(), t.matrix())


@pytest.mark.parametrize(
    ("t", "heads"),
    [
        (Permutation(torch.tensor([0, 2, 1, 3])), 2),
        (Hadamard(8, 8), 2),
        (Hadamard(24, 12), 4),
        (blocks(good(1, 6, 0)), 2),
        (blocks(good(3, 2, 0)), 2),
        (Kronecker(Hadamard(2, 2), Identity(3)), 2),
        (Kronecker(Identity(3), Identity(2)), 2),
        (Center(4), 2),
        (Chain((Identity(4), Hadamard(4, 4))), 2),
    ],
)
def test_transforms_that_mix_heads_do_not_repeat(t: Transform, heads: int) -> None:
    kind = "Hadamard" if isinstance(t, Chain) else type(t).__name__
    message = (
        rf"^transform: {kind} of width {t.width} is not made of {heads} separate heads\. "
        r"Use a transform per head, such as Kronecker\(Identity\(heads\), T\)$"
    )
    for times in (1, 2):
        with pytest.raises(ContractError, match=message):
            t.repeat(heads, times)


# What has no inverse


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
def test_a_diagonal_with_a_zero_has_no_inverse(bad: float) -> None:
    message = r"^transform: a diagonal transform with a zero, NaN or infinity has no inverse\. Keep scales finite and"
    for undo in (Diagonal.inverse, Diagonal.contragredient):
        with pytest.raises(ContractError, match=message):
            undo(Diagonal(torch.tensor([1.0, bad, 2.0])))


def test_center_is_a_projection_without_inverse() -> None:
    t = Center(5)
    close(t(t(rand(3, 5))), t(rand(3, 5)))
    close(t(rand(3, 5)).mean(-1), torch.zeros(3).double())
    for undo in (t.inverse, t.contragredient, Chain((t, t)).inverse, Kronecker(Identity(2), t).contragredient):
        with pytest.raises(TypeError, match="^Center has no inverse$"):
            undo()


@pytest.mark.parametrize(
    ("m", "condition"),
    [
        (torch.diag(torch.tensor([1.0, 1e-7])), "1e+07"),
        (torch.stack((torch.eye(2), torch.diag(torch.tensor([1.0, 2.5e-7])))), "4e+06"),
        (torch.ones(2, 2), "inf|[0-9.]+e\\+\\d+"),
        (torch.zeros(2, 2), "inf|nan"),
        (torch.full((2, 2), float("nan")), "inf"),
        (torch.full((1, 2, 2), float("inf")), "inf"),
    ],
)
def test_matrices_that_cannot_be_undone_are_refused(m: torch.Tensor, condition: str) -> None:
    number = re.escape(condition) if condition[0].isdigit() else f"({condition})"
    message = (
        rf"^transform: the matrix of a transform has condition number {number}, more than 1e\+06\. "
        r"Regularize what learned it, or train for fewer steps$"
    )
    with pytest.raises(ContractError, match=message):
        blocks(m)


def test_just_well_conditioned_matrices_are_taken() -> None:
    t = blocks(torch.diag(torch.tensor([1.0, 1.1e-6], dtype=torch.float64)))
    close(t.inverse().matrix() @ t.matrix(), torch.eye(2).double())
    assert blocks(torch.eye(3, requires_grad=True)).m.requires_grad is False


def test_hadamard_blocks_that_do_not_divide() -> None:
    message = r"^transform: 20 features do not divide into Hadamard blocks of 8\. The largest block that does is 20$"
    with pytest.raises(ContractError, match=message):
        Hadamard(20, 8)
    message = r"^transform: 14 features do not divide into Hadamard blocks of 7\. The largest block that does is 2$"
    with pytest.raises(ContractError, match=message):
        Hadamard(14, 7)


def test_the_base_class_promises_nothing() -> None:
    for ask in (Transform.inverse, Transform.transpose, lambda t: t(rand(1)), lambda t: t.encode([])):
        with pytest.raises(TypeError, match="^Transform "):
            ask(Transform())


# Spelling


@settings(max_examples=60, deadline=None)
@given(pairs(center=True))
def test_a_spelling_reads_back(pair: Pair) -> None:
    t, dense = pair
    parts: list[torch.Tensor] = []
    spec = t.encode(parts)
    again = decode(spec, parts)
    close(again.matrix(), dense)
    assert again.width == t.width
    more: list[torch.Tensor] = []
    assert again.encode(more) == spec
    assert all(a is b for a, b in zip(parts, more, strict=True))


def test_spellings() -> None:
    parts: list[torch.Tensor] = []
    one, two = Diagonal(torch.ones(2)), blocks(good(1, 2, 0))
    t = Kronecker(Chain((one, two)), Kronecker(Identity(3), Hadamard(4, 2, True)))
    assert t.encode(parts) == "kron(diag(0)*blocks(1),kron(id(3),had(4,2,1)))"
    assert parts[0] is one.v
    assert parts[1] is two.m
    assert Chain((Center(4), Permutation(torch.arange(4)))).encode(parts) == "center(4)*perm(2)"


def test_a_decoded_matrix_does_not_claim_to_know_its_inverse() -> None:
    symmetric = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    t = decode("blocks(0)", [symmetric])
    assert t.groups == {"invertible"}
    assert bool(t.inverse().matrix().isnan().all())


V, M = torch.ones(4), torch.eye(2).expand(2, 2, 2)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("", []),
        ("id", []),
        ("id(", []),
        ("id()", []),
        ("id(4", []),
        ("id(4))", []),
        ("id(4)id(4)", []),
        ("id(4)*", []),
        ("id(4)*id(5)", []),
        ("*id(4)", []),
        ("id(4,4)", []),
        ("id(,4)", []),
        ("id(-4)", []),
        ("id(4.5)", []),
        ("id (4)", []),
        ("id(4); import os", []),
        ("eval(0)", [V]),
        ("kron(id(2))", []),
        ("kron(id(2);id(2))", []),
        ("kron(id(2),id(2)", []),
        ("kron(id(2),id(2),id(2))", []),
        ("had(4,2)", []),
        ("had(4,2,0,0)", []),
        ("had(999999999999,7,0)", []),
        ("id(" + "9" * 5000 + ")", []),
        ("id(4)*" * 2000 + "id(4)", []),
        ("kron(" * 700 + "id(1)", []),
        ("diag(0)", []),
        ("diag(1)", [V]),
        ("diag(0)", [V[None]]),
        ("diag(0)", [torch.arange(4)]),
        ("perm(0)", [V]),
        ("perm(0)", [torch.arange(4)[None]]),
        ("perm(0)", [torch.arange(4, dtype=torch.int32)]),
        ("blocks(0)", [torch.eye(2)]),
        ("blocks(0)", [torch.ones(2, 2, 3)]),
        ("blocks(0)", [M.long()]),
    ],
)
def test_nonsense_spells_no_transform(spec: str, parts: list[torch.Tensor]) -> None:
    with pytest.raises(ContractError, match=re.escape(f"transform: {spec[:80]!r} spells no transform")):
        decode(spec, parts)


def test_a_hadamard_that_does_not_exist_is_no_spelling() -> None:
    with pytest.raises(ContractError, match=r"^transform: 9 features do not divide into Hadamard blocks of 2"):
        decode("had(9,2,0)", [])


@pytest.mark.parametrize("name", ["__call__", "rows", "transpose", "inverse"])
def test_a_planted_error_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the matrix fails where a method of Permutation works the wrong way round."""
    t, dense = a_permutation(7, 3)
    other = Permutation.rows if name == "__call__" else lambda self, *rest: self if not rest else self(*rest)
    monkeypatch.setattr(Permutation, name, other)
    x = rand(7, 7)
    found = {
        "__call__": lambda: t(x) - x @ dense,
        "rows": lambda: t.rows(x) - dense.T @ x,
        "transpose": lambda: transform.Transform.matrix(t.transpose()) - dense.T,
        "inverse": lambda: t.inverse().matrix() - dense.T,
    }[name]()
    assert found.abs().max() > 1e-2
