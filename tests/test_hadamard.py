import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc import hadamard as module
from dlqc.errors import ContractError
from dlqc.hadamard import hadamard, largest_block, multiply, multiply_rows, order, signs

SIZES = [1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 64, 96, 240, 512, 768, 1024, 2 * 148]


def dense(n: int, transpose: bool = False) -> torch.Tensor:
    h = hadamard(n) / n**0.5
    return h.T if transpose else h


@pytest.mark.parametrize("n", [*(n for n in range(1, 257) if order(n)), 2 * 148, 344, 2 * 344, 508 + 4, 768, 924])
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard(n)
    assert h.shape == (n, n)
    assert h.dtype == torch.float64
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(
    ("n", "split"),
    [
        (1, (1, 0)),
        (2, (1, 1)),
        (4, (1, 2)),
        (16384, (1, 14)),
        (12, (12, 0)),
        (20, (20, 0)),
        (28, (28, 0)),
        (36, (36, 0)),
        (40, (20, 1)),
        (44, (44, 0)),
        (52, (52, 0)),
        (60, (60, 0)),
        (100, (100, 0)),
        (768, (12, 6)),
        (3584, (28, 7)),
        (5504, (344, 4)),
        (8960, (140, 6)),
        (11008, (344, 5)),
        (12288, (12, 10)),
        (13824, (108, 7)),
        (14336, (28, 9)),
        (18944, (148, 7)),
        (29568, (924, 5)),
        (368, (368, 0)),
        *((n, None) for n in (-4, 0, 3, 6, 14, 92, 116, 156, 172, 184, 188, 428, 13696)),
    ],
)
def test_orders(n: int, split: tuple[int, int] | None) -> None:
    assert order(n) == split


def test_orders_without_a_construction_up_to_256() -> None:
    missing = [n for n in range(4, 257, 4) if order(n) is None]
    assert missing == [92, 116, 156, 172, 184, 188, 232, 236]  # the gaps of Paley's and Sylvester's constructions


def test_core_outermost_and_symmetry() -> None:
    assert torch.equal(hadamard(24), torch.kron(hadamard(12), hadamard(2)))
    assert not torch.equal(hadamard(12), hadamard(12).T)  # Paley I
    assert torch.equal(hadamard(36), hadamard(36).T)  # Paley II: 35 is no prime power, 17 is
    assert torch.equal(hadamard(64), hadamard(64).T)


def test_the_matrix_is_the_callers_own() -> None:
    for n in (1, 12, 16):
        hadamard(n, torch.int8).zero_()
        assert hadamard(n, torch.int8).abs().min() == 1


@pytest.mark.parametrize(("p", "m"), [(3, 1), (3, 2), (3, 3), (5, 2), (7, 2), (7, 3), (13, 1)])
def test_residues_of_the_field(p: int, m: int) -> None:
    q = p**m
    residues = module._jacobsthal(p, m).double()
    sign = -1 if q % 4 == 3 else 1
    assert torch.equal(residues.T, sign * residues)
    assert torch.equal(residues @ residues.T, q * torch.eye(q, dtype=torch.float64) - 1)
    assert not residues.sum(0).any()
    assert residues[1, 0] == 1  # one is a square


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (7, 1), (92, 4), (13696, 128), (12288, 12288), (11008, 11008), (184, 8)]
)
def test_largest_block(n: int, block: int) -> None:
    assert largest_block(n) == block


@given(n=st.integers(1, 3000))
@settings(deadline=None)
def test_largest_block_is_the_largest(n: int) -> None:
    block = largest_block(n)
    assert n % block == 0
    assert order(block) is not None
    assert all(order(d) is None for d in range(block + 1, n + 1) if n % d == 0)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_against_the_definition(n: int, transpose: bool, poisoned: None) -> None:
    x = torch.randn(5, 2 * n, dtype=torch.float64)
    before = x.clone()
    expected = (x.view(5, 2, n) @ dense(n, transpose)).view(5, 2 * n)
    torch.testing.assert_close(multiply(x, n, transpose), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(multiply_rows(x.T.contiguous(), n, transpose), expected.T, rtol=0, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [12288, 11008, 18944])
def test_large_orders_are_rotations(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64)
    y = multiply(x, n)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(multiply(y, n, transpose=True), x, rtol=0, atol=1e-12)
    unit = torch.zeros(1, n, dtype=torch.float64)
    unit[0, 5] = 1
    torch.testing.assert_close(multiply(unit, n).abs(), torch.full((1, n), n**-0.5, dtype=torch.float64))


@given(
    n=st.sampled_from([2, 12, 16, 28]),
    lead=st.lists(st.integers(1, 4), max_size=3),
    blocks=st.integers(1, 3),
    transpose=st.booleans(),
    tile=st.sampled_from([1, 50, 128, 2**18]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_every_shape_and_tile(n: int, lead: list[int], blocks: int, transpose: bool, tile: int, seed: int) -> None:
    x = torch.randn(*lead, blocks * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = (x.unflatten(-1, (blocks, n)) @ dense(n, transpose)).flatten(-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE", tile)
        patch.setattr(module, "_COLUMNS", 3)
        torch.testing.assert_close(multiply(x, n, transpose), expected, rtol=0, atol=1e-13)
        rows = multiply_rows(x.reshape(-1, blocks * n).T, n, transpose)
    torch.testing.assert_close(rows, expected.reshape(-1, blocks * n).T, rtol=0, atol=1e-13)
    torch.testing.assert_close(multiply(multiply(x, n, transpose), n, not transpose), x, rtol=0, atol=1e-13)


def test_many_tiles_of_the_real_size() -> None:
    x = torch.randn(700, 1536, dtype=torch.float64)
    assert x.numel() > 4 * module._TILE
    torch.testing.assert_close(multiply(x, 1536), x @ dense(1536), rtol=0, atol=1e-11)
    torch.testing.assert_close(multiply_rows(x.T, 1536), dense(1536).T @ x.T, rtol=0, atol=1e-11)


def test_blocks_are_independent() -> None:
    x = torch.randn(4, 36)
    changed = x.clone()
    changed[:, 12:24] = torch.nan
    for y, z in ((multiply(x, 12), multiply(changed, 12)), (multiply_rows(x.T, 12).T, multiply_rows(changed.T, 12).T)):
        assert torch.equal(y[:, :12], z[:, :12])
        assert torch.equal(y[:, 24:], z[:, 24:])
        assert z[:, 12:24].isnan().all()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(24, 10, dtype=torch.float64).T,
        torch.randn(10, 48, dtype=torch.float64)[:, ::2],
        torch.randn(1, 24, dtype=torch.float64).expand(10, 24),
        torch.randn(24, 5, 2, dtype=torch.float64).permute(1, 2, 0),
    ],
    ids=["transposed", "every other column", "expanded", "permuted"],
)
def test_strides(x: torch.Tensor) -> None:
    y = multiply(x, 24)
    assert y.is_contiguous()
    assert torch.equal(y, multiply(x.contiguous(), 24))
    if x.dim() == 2:
        assert torch.equal(multiply_rows(x.T, 24), multiply_rows(x.T.contiguous(), 24))


@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert multiply(torch.empty(shape), 12).shape == shape


def test_empty_matrix() -> None:
    assert multiply_rows(torch.empty(12, 0), 12).shape == (12, 0)
    assert multiply_rows(torch.empty(0, 5), 12).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(8, 768).to(dtype)
    assert torch.equal(multiply(x, 768), multiply(x.float(), 768).to(dtype))
    assert torch.equal(multiply_rows(x.T, 768), multiply_rows(x.T.float(), 768).to(dtype))


@pytest.mark.parametrize("n", [768, 4096, 12288])
def test_float32_error(n: int) -> None:
    x = torch.randn(16, n)
    exact = multiply(x.double(), n)
    for y in (multiply(x, n), multiply_rows(x.T, n).T):
        assert y.dtype == torch.float32
        # Five stages of sums of 16: a few roundings of 2^-24 each, relative to the norm, which every stage keeps.
        assert (y.double() - exact).norm() < 2**-21 * exact.norm()


def test_whole_numbers_stay_exact() -> None:
    x = torch.randint(-100, 100, (7, 1024)).float()  # 1/√1024 is a power of two
    assert torch.equal(multiply(x, 1024).double(), x.double() @ dense(1024))
    assert torch.equal(multiply(multiply(x, 1024), 1024, transpose=True), x)


def test_no_gradient_is_recorded() -> None:
    x = torch.randn(2, 12, requires_grad=True)
    assert not multiply(x, 12).requires_grad
    assert not multiply_rows(x.T, 12).requires_grad


def test_signs() -> None:
    state = torch.get_rng_state()
    s = signs(4000, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert s.dtype == torch.float64
    assert torch.equal(s.abs(), torch.ones(4000, dtype=torch.float64))
    assert s.mean().abs() < 0.08  # five standard deviations
    torch.manual_seed(1)
    assert torch.equal(s, signs(4000, 7))
    assert not torch.equal(s, signs(4000, 8))


def test_errors() -> None:
    no92 = r"^n: no Hadamard matrix of order 92 can be built here\. The nearest: 88 and 96; blocks of 4 divide 92$"
    with pytest.raises(ContractError, match=no92):
        hadamard(92)
    with pytest.raises(ContractError, match=no92):
        multiply(torch.ones(92), 92)
    with pytest.raises(ContractError, match=r"^n: no Hadamard matrix of order 0 can be built here\. The nearest: 1$"):
        hadamard(0)
    with pytest.raises(ContractError, match=r"^n: 0 has no blocks\. Give a positive size$"):
        largest_block(0)
    with pytest.raises(
        ContractError,
        match=r"^n: dimension -1 of the shape \[2, 100\] does not divide into blocks of 12\. Use a divisor, for example 100$",
    ):
        multiply(torch.ones(2, 100), 12)
    with pytest.raises(ContractError, match=r"^n: dimension 0 of the shape \[6, 12\] does not .*, for example 2$"):
        multiply_rows(torch.ones(6, 12), 12)
    with pytest.raises(ContractError, match=r"^n: dimension -1 of the shape \[\] .*\. Give at least one dimension$"):
        multiply(torch.ones(()), 1)
    with pytest.raises(ContractError, match=r"^w: 3 dimensions\. Give a matrix \[N, K\], or use multiply$"):
        multiply_rows(torch.ones(2, 2, 2), 2)
    with pytest.raises(
        ContractError, match=r"^dtype: cannot rotate torch\.int64\. Convert to float32 or float64 first$"
    ):
        multiply(torch.ones(4, dtype=torch.int64), 4)
