import pytest
import torch

from dlqc.errors import RecipeError
from dlqc.formats.integer import IntFormat
from dlqc.rounding.hessian import output_energy, sqnr_db
from dlqc.rounding.rtn import Rtn


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_the_result_is_that_of_the_format_whatever_the_statistics(clip: str) -> None:
    weight, x = torch.randn(20, 64), torch.randn(100, 64)
    fmt = IntFormat(3, 32, symmetric=False)
    plain = Rtn(clip).round(weight, fmt, {})
    measured = Rtn(clip).round(weight, fmt, {"hessian": x.T @ x})
    assert torch.equal(plain.weight.codes, fmt.quantize(weight, clip=clip).codes)
    assert torch.equal(plain.weight.codes, measured.weight.codes)
    assert plain.metrics == {}
    error = (x @ (weight - measured.weight.dequantize()).T).double().square().sum()
    assert measured.metrics["loss"] == pytest.approx(error.item(), rel=1e-4)
    ratio = (x @ weight.T).double().square().sum() / error
    assert measured.metrics["sqnr_db"] == pytest.approx(10 * ratio.log10().item(), abs=1e-3)


@pytest.mark.parametrize("columns", [1, 7, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_energy(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(50, columns, dtype=torch.float64)
    hessian, rows = x.T @ x, torch.randn(6, columns, dtype=torch.float64)
    before = hessian.clone()
    expected = (rows @ x.T).square().sum(1)
    torch.testing.assert_close(
        output_energy(rows.to(dtype), hessian), expected, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=0
    )
    assert torch.equal(hessian, before)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(1, 0, 300), (0, 0, 300), (0, 1, -300), (1, 1e-40, 300), (100, 1, 20), (1, -1, 300)],
)
def test_sqnr_is_always_finite(signal: float, noise: float, expected: float) -> None:
    assert sqnr_db(signal, noise) == pytest.approx(expected)


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"^clip: unknown clip 'trial'\. Use 'minmax' or 'mse'$"):
        Rtn("trial")
