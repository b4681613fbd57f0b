from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlqc.diffusion.fidelity import divergence, fidelity
from dlqc.diffusion.likelihood import RATIOS
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError

Model = Callable[[Tensor], Tensor]


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(0, 10, (5, 24), generator=torch.Generator().manual_seed(1))


def test_identical_models_have_no_divergence(toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec) -> None:
    table = fidelity(toy(0), toy(0), rows, spec)
    assert table.ratios == RATIOS
    assert table.kl.shape == table.agreement.shape == (5, 8)
    assert not bool(table.kl.any())
    assert bool((table.agreement == 1).all())
    assert (table.mean_kl.mean, table.mean_kl.high, table.mean_agreement.low) == (0.0, 0.0, 1.0)


def test_numbers_are_those_of_plain_loops(toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec) -> None:
    states: list[Tensor] = []

    def reference(ids: Tensor) -> Tensor:
        states.append(ids.clone())
        return toy(0)(ids)

    def candidate(ids: Tensor) -> Tensor:
        return toy(0)(ids) + 0.5 * toy(1)(ids)

    table = fidelity(reference, candidate, rows, spec, ratios=(0.25, 0.75), repeats=2, seed=4, batch_size=5)
    for level in range(2):
        for row in range(5):
            kl, same, count = 0.0, 0, 0
            for state in states[2 * level : 2 * level + 2]:
                p, q = toy(0)(state)[row].softmax(-1), candidate(state)[row].softmax(-1)
                for position in (state[row] == 10).nonzero().flatten().tolist():
                    kl += float((p[position] * (p[position] / q[position]).log()).sum())
                    same += int(p[position].argmax() == q[position].argmax())
                    count += 1
            assert float(table.kl[row, level]) == pytest.approx(kl / count, rel=1e-9)
            assert float(table.agreement[row, level]) == pytest.approx(same / count, rel=1e-9)
    assert [interval.mean for interval in table.kl_by_ratio] == pytest.approx(table.kl.mean(0).tolist())
    assert [interval.mean for interval in table.agreement_by_ratio] == pytest.approx(table.agreement.mean(0).tolist())


def test_batch_size_does_not_matter_and_the_seed_does(
    toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec
) -> None:
    one = fidelity(toy(0), toy(1), rows, spec, batch_size=1)
    assert torch.equal(one.kl, fidelity(toy(0), toy(1), rows, spec, batch_size=3).kl)
    assert not torch.equal(one.kl, fidelity(toy(0), toy(1), rows, spec, seed=1).kl)


def test_divergence_is_not_negative_and_not_symmetric() -> None:
    p, q = torch.randn(100, 7, dtype=torch.float64), torch.randn(100, 7, dtype=torch.float64)
    assert bool((divergence(p, q) > 0).all())
    assert not torch.allclose(divergence(p, q), divergence(q, p))
    assert torch.allclose(divergence(p, q), divergence(p + 3, q - 2))


def test_refusals(toy: Callable[..., Model], rows: Tensor, spec: DiffusionSpec) -> None:
    with pytest.raises(FeasibilityError, match=r"candidate: the reference has 11 logits a position, the candidate 12"):
        fidelity(toy(0), toy(0, vocab=12), rows, spec)
    with pytest.raises(ModelError, match=r"candidate: the logits of row 0 at mask ratio 0.0625 are not finite"):
        fidelity(toy(0), lambda ids: toy(0)(ids) * torch.nan, rows, spec)
    with pytest.raises(FeasibilityError, match=r"rows: the batch is empty"):
        fidelity(toy(0), toy(0), rows[:0], spec)
