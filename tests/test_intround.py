"""Native code of rounding, against the same loops in torch."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc import intround, native
from dlqc.formats.integer import IntFormat
from dlqc.rounding.gptq import _Columns

_reason = native.available("rounding")
if os.environ.get("DLQC_NATIVE") == "0" or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
    pytest.skip(f"native code: {_reason}", allow_module_level=True)


def test_the_source_builds_where_there_is_a_compiler() -> None:
    assert _reason is None


def columns(size: int, width: int, groups: int, zeros: bool, top: int, generator: torch.Generator) -> _Columns:
    """A block [size, width] with random feedback; codes and losses are filled with what must be overwritten or added to."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    near = (normal(size, size) * 0.3).triu(1) + torch.eye(size)
    scale = 0.05 + torch.rand(groups, width, generator=generator)
    zero = torch.randint(0, top + 1, (groups, width), generator=generator).float() if zeros else None
    group = torch.randint(0, groups, (size,), generator=generator)
    codes = torch.full((size, width), 255, dtype=torch.uint8)
    share = torch.rand(size, generator=generator)
    return _Columns(normal(size, width), normal(size, width), codes, near, (scale, zero), group, share)


def copied(block: _Columns) -> _Columns:
    return _Columns(block.target.clone(), block.work.clone(), block.codes.clone(), *_rest(block))


def _rest(block: _Columns) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, torch.Tensor]:
    return block.near, block.table, block.group, block.share


@given(
    size=st.integers(1, 40),
    width=st.sampled_from([1, 3, 15, 16, 31, 32, 63, 64, 65, 130, 200]),
    groups=st.integers(1, 3),
    bits=st.sampled_from([2, 3, 4, 8]),
    zeros=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=50)
def test_a_block_is_rounded_as_in_torch(size, width, groups, bits, zeros, threads, seed) -> None:  # type: ignore[no-untyped-def]
    fmt = IntFormat(bits, None, not zeros)
    fast = columns(size, width, groups, zeros, fmt.top, torch.Generator().manual_seed(seed))
    slow = copied(fast)
    losses = torch.ones(2, 2, width, dtype=torch.float64)
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        operands = (fast.target, fast.work, fast.codes, fast.near, *fast.table, fast.group)
        assert intround.round_block(*operands, fmt.midpoint, fmt.top, fast.share, losses[0])
    finally:
        torch.set_num_threads(count)
    slow._round_plainly(fmt, losses[1])
    # Where a number stands at a tie, the order of a sum decides, and the rows below it follow.
    same = (fast.codes == slow.codes).all(dim=0)
    assert same.float().mean() > 0.95 or (~same).sum() <= 1
    torch.testing.assert_close(fast.work[:, same], slow.work[:, same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[0][:, same], losses[1][:, same], rtol=1e-3, atol=1e-4)


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 2, 7, 16, 17, 32, 100, 128]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    weighted=st.booleans(),
    kind=st.sampled_from(["normal", "positive", "zero", "constant", "one large", "tiny", "huge"]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_the_range_found_is_that_of_torch(  # type: ignore[no-untyped-def]
    rows, groups, size, bits, symmetric, scale_dtype, weighted, kind, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    part = torch.randn(rows, groups, size, generator=generator)
    match kind:
        case "positive":
            part = part.abs() + 3
        case "zero":
            part[0] = 0
        case "constant":
            part[0] = -1.7
        case "one large":
            part[..., 0] = 50
        case "tiny":
            part *= 1e-6
        case "huge":
            part *= 1e3
    root = torch.rand(groups, size, generator=generator) + 0.01 if weighted else None
    fmt = IntFormat(bits, size, symmetric, scale_dtype)
    least, most = torch.aminmax(part, dim=-1)
    fast = fmt._search(part, least, most, root)
    slow = fmt._search_plainly(part, least, most, root)
    # Ranges whose errors are equal but for the order of a sum may be taken for one another: the errors tell.
    found, best = (fmt._error(part, *grid, root) for grid in (fast, slow))
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-30)
    assert (fast[0] != slow[0]).float().mean() <= 0.2 or size < 16 or kind != "normal"


def test_what_it_does_not_take_is_left_alone() -> None:
    block = columns(8, 16, 1, True, 15, torch.Generator().manual_seed(0))
    losses = torch.zeros(2, 16, dtype=torch.float64)

    def run(**change: torch.Tensor) -> bool:
        given = {"target": block.target, "work": block.work, "codes": block.codes, "near": block.near} | change
        return intround.round_block(*given.values(), *block.table, block.group, 8, 15, block.share, losses)

    before = block.work.clone()
    for change in (
        {"target": block.target.double()},
        {"work": block.work.T.contiguous().T},
        {"codes": block.codes.int()},
        {"near": block.near.double()},
    ):
        assert not run(**change)
        assert torch.equal(block.work, before)
        assert bool((block.codes == 255).all())
        assert bool((losses == 0).all())
    part = torch.randn(2, 3, 8)
    least, most = torch.aminmax(part, dim=-1)
    options = {"coarse": [0.5], "fine": [], "symmetric": True, "top": 15, "midpoint": 8, "floor": 1e-30}
    found = intround.search(part.double(), least, most, None, stored=torch.bfloat16, **options)  # type: ignore[arg-type]
    assert found is None
    assert intround.search(part, least, most, None, stored=torch.float64, **options) is None  # type: ignore[arg-type]


def test_without_native_code_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block = columns(8, 16, 1, True, 15, torch.Generator().manual_seed(0))
    fast, losses = copied(block), torch.zeros(2, 2, 16, dtype=torch.float64)
    fast.round(IntFormat(4, None, False), losses[0])
    monkeypatch.setenv("DLQC_NATIVE", "0")
    block.round(IntFormat(4, None, False), losses[1])
    assert torch.equal(fast.codes, block.codes)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
