"""Weights as expressions: values, order, storage, and what may not be done."""

from __future__ import annotations

import pytest
import torch

from dlqc.errors import ContractError
from dlqc.transform import Diagonal
from dlqc.weights import Constant, OnColumns, Ones, OnRows, Rows, Weights


def make(leaf: torch.Tensor, *folds: object) -> Weights:
    weights = Weights({"w": Constant(leaf)})
    for fold in folds:
        weights.fold("w", fold)  # type: ignore[arg-type]
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_chain_of_folds_is_evaluated_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    leaf = torch.randn(5, 7).to(dtype)
    u, v, w = (0.5 + torch.rand(n, dtype=torch.float64) for n in (5, 7, 7))
    weights = make(leaf, OnColumns(Diagonal(v)), OnRows(Diagonal(u)), OnColumns(Diagonal(w)))
    expected = torch.diag(u) @ leaf.double() @ torch.diag(v) @ torch.diag(w)
    torch.testing.assert_close(weights.value("w", torch.float64), expected, rtol=1e-15, atol=0)
    assert torch.equal(weights.value("w"), weights.value("w", torch.float64).to(dtype))
    assert weights.value("w").dtype is dtype


def test_folds_apply_in_the_order_in_which_they_came() -> None:
    leaf = torch.randn(6, 3)
    v = torch.arange(1.0, 4.0, dtype=torch.float64)
    assert torch.equal(make(leaf, Ones(), OnColumns(Diagonal(v))).value("w", torch.float64), v.expand(6, 3))
    assert torch.equal(make(leaf, OnColumns(Diagonal(v)), Ones()).value("w", torch.float64), torch.ones(6, 3).double())
    u = torch.tensor([2.0, 3.0], dtype=torch.float64)
    cut = make(leaf, Rows(1, 3), OnRows(Diagonal(u)))
    assert torch.equal(cut.value("w", torch.float64), leaf[1:3].double() * u[:, None])
    assert cut["w"].shape == torch.Size((2, 3))


def test_shapes_without_evaluation() -> None:
    leaf = torch.empty(6, 3, device="meta")
    assert make(leaf)["w"].shape == torch.Size((6, 3))
    assert make(leaf, Rows(2, 6), OnColumns(Diagonal(torch.ones(3))))["w"].shape == torch.Size((4, 3))


@pytest.mark.parametrize(
    ("shape", "folds", "expected"),
    [
        ((3,), (), torch.bfloat16),
        ((3,), (Rows(0, 2),), torch.bfloat16),
        ((3,), (OnColumns(Diagonal(torch.ones(3))),), torch.float32),
        ((3,), (Ones(),), torch.float32),
        ((4, 3), (OnColumns(Diagonal(torch.ones(3))),), torch.bfloat16),
        ((4, 3), (Rows(0, 2),), torch.bfloat16),
    ],
)
def test_modified_vectors_are_stored_in_float32_and_matrices_as_they_were(
    shape: tuple[int, ...], folds: tuple[object, ...], expected: torch.dtype
) -> None:
    weights = make(torch.randn(shape).to(torch.bfloat16), *folds)
    assert weights["w"].storage_dtype is expected
    assert weights.value("w").dtype is expected


def test_arithmetic_uses_the_stored_value_and_float64_the_exact_one() -> None:
    weights = make(
        torch.ones(2, 2, dtype=torch.bfloat16), OnColumns(Diagonal(torch.tensor([1 / 3, 1.0], dtype=torch.float64)))
    )
    third = weights.value("w", torch.float32)[0, 0]
    assert third == torch.tensor(1 / 3).to(torch.bfloat16).float()
    assert weights.value("w", torch.float64)[0, 0] == 1 / 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_a_fold_on_codes_is_refused(dtype: torch.dtype) -> None:
    weights = make(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(ContractError, match=r"^w: a transform reached a weight that is already quantized\. Move the"):
        weights.fold("w", OnColumns(Diagonal(torch.ones(2))))
    assert weights["w"].folds == ()


def test_integers_stay_integers() -> None:
    weights = make(torch.tensor([3, 4], dtype=torch.uint8))
    assert weights.value("w", torch.float64).dtype is torch.uint8
    assert weights.value("w", torch.float32).dtype is torch.uint8


def test_a_clone_is_independent_and_the_leaf_is_untouched() -> None:
    leaf = torch.randn(3, 3)
    before = leaf.clone()
    weights = make(leaf)
    other = weights.clone()
    other.fold("w", Ones())
    other.put("v", torch.zeros(1))
    assert weights["w"].folds == ()
    assert "v" not in weights
    other.drop("w")
    assert torch.equal(weights.value("w"), before)
    assert torch.equal(leaf, before)


def test_folding_keeps_ties_and_putting_ends_them() -> None:
    weights = Weights({"w": Constant(torch.ones(2, 2), (), ("w", "head"))})
    weights.fold("w", OnColumns(Diagonal(torch.ones(2))))
    assert weights["w"].aliases == ("w", "head")
    weights.put("w", torch.zeros(2, 2))
    assert weights["w"].aliases == ()
    assert weights["w"].folds == ()


def test_the_fingerprint_changes_with_every_edit_and_only_then() -> None:
    weights = make(torch.randn(2, 2))
    kept = [weights.clone()]
    assert weights.fingerprint() == kept[0].fingerprint()
    for edit in (
        lambda: weights.fold("w", OnColumns(Diagonal(torch.ones(2)))),
        lambda: weights.put("v", torch.ones(1)),
        lambda: weights.put("v", torch.ones(1)),
        lambda: weights.define("w", Constant(weights["w"].leaf)),
        lambda: weights.drop("v"),
    ):
        edit()
        kept.append(weights.clone())
    marks = [w.fingerprint() for w in kept]
    assert len(set(marks)) == len(marks)
