"""Native attention and rotary embedding: by their definitions in float64, in any layout, and in the place of torch's ops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from guarded import at_the_end
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlqc
from dlqc.graph import SDPA, is_call
from dlqc.kernels.cpu.attention import attention, rope, unavailable
from dlqc.ops import ROPE

LIBRARY = "attention"  # whose paths `isa` takes in turn

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native code: {unavailable()}")


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """Softmax over the keys that a query sees, in float64; zeros where it sees none."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = scale * q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    if causal:
        rows, columns = torch.arange(q.shape[2]).unsqueeze(1), torch.arange(k.shape[2])
        scores = scores.masked_fill(columns > rows, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.usefixtures("isa")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 100)),
    long=st.sampled_from([0, 0, 350, 800]),
    width=st.sampled_from([16, 32, 48, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masking=st.sampled_from(["none", "seen", "added", "causal", "a row sees nothing"]),
    by_head=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention(
    sizes: tuple[int, int, int, int, int],
    long: int,
    width: int,
    dtype: torch.dtype,
    masking: str,
    by_head: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    batch, key_heads, group, queries, keys = sizes
    heads, keys = key_heads * group, keys + long

    def tensor(count: int, rows: int) -> torch.Tensor:
        made = 2 * torch.randn(batch, count, rows, width, generator=g)
        return (made if by_head else made.transpose(1, 2).contiguous().transpose(1, 2)).to(dtype)

    q, k, v = tensor(heads, queries), tensor(key_heads, keys), tensor(key_heads, keys)
    mask = None
    if masking in ("seen", "a row sees nothing"):
        mask = torch.rand(queries, keys, generator=g) < 0.5
        mask[:, -1] = True
        if masking == "a row sees nothing":
            mask[0] = False
    elif masking == "added":
        mask = torch.randn(batch, 1, queries, keys, generator=g)
    causal = masking == "causal"
    y = attention(q, k, v, mask, 0.0, causal, scale=0.3, enable_gqa=group > 1)
    assert y.dtype is dtype
    assert y.transpose(1, 2).is_contiguous()
    size = 1e-5 if dtype is torch.float32 else 2.0**-8
    torch.testing.assert_close(y.double(), by_definition(q, k, v, mask, causal, 0.3), rtol=size, atol=size * 8)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_little_and_a_run_nothing(threads: int) -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, rows, 64, generator=g) for rows in (70, 900, 900))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = attention(q, k, v)
        assert all(torch.equal(first, attention(q, k, v)) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(first, F.scaled_dot_product_attention(q, k, v))


def test_large_scores() -> None:
    """Weights are relative to the largest score: nothing overflows, far keys weigh nothing, and infinite masks hide."""
    q = torch.full((1, 1, 1, 16), 100.0)
    k = torch.stack([torch.full((16,), s) for s in (100.0, 99.0, -100.0, 100.0)]).reshape(1, 1, 4, 16)
    v = torch.arange(4.0).reshape(1, 1, 4, 1).expand(1, 1, 4, 16).contiguous()
    assert torch.equal(attention(q, k, v), torch.full((1, 1, 1, 16), 1.5))
    hidden = torch.tensor([[0.0, 0.0, 0.0, -math.inf]])
    assert torch.equal(attention(q, k, v, hidden), torch.zeros(1, 1, 1, 16))


def test_what_native_code_has_no_way_for_goes_to_torch() -> None:
    """Odd widths, other dtypes, features apart: the same values, and the same layout."""
    for dtype, width in ((torch.float64, 16), (torch.float16, 16), (torch.float32, 20)):
        q, k, v = (torch.randn(1, 2, rows, width).to(dtype) for rows in (5, 9, 9))
        y = attention(q, k, v)
        assert y.transpose(1, 2).is_contiguous()
        assert torch.equal(y, F.scaled_dot_product_attention(q, k, v))
    q, k, v = (torch.randn(1, 2, 16, rows).transpose(2, 3) for rows in (5, 9, 9))
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_dropout_is_torchs() -> None:
    q = torch.randn(1, 2, 64, 16)
    torch.manual_seed(0)
    y = attention(q, q, q, None, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, q, q, None, 0.5))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, 40, generator=g).to(dtype).transpose(1, 2)
    for shape in ((7, 40), (1, 1, 7, 40), (2, 1, 7, 40), (1, 40), (2, 3, 7, 40)):  # the last one by the twin in Python
        cos, sin = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
        y = rope(x, cos, sin)
        assert y.transpose(1, 2).is_contiguous()
        expected = ROPE(x.double(), cos.double(), sin.double())
        size = 2e-6 if dtype is torch.float32 else 2.0**-6
        torch.testing.assert_close(y.double(), expected, rtol=size, atol=size)


def test_opcheck() -> None:
    q, k = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 9, 32)
    torch.library.opcheck(attention, (q, k, k.clone()), {"enable_gqa": True})
    torch.library.opcheck(rope, (q, torch.randn(5, 32), torch.randn(5, 32)))


def test_nothing_is_read_or_written_outside() -> None:
    """Tensors that end where a page ends that nobody may touch."""
    q, k, v = (at_the_end(torch.randn(1, 2, rows, 48)) for rows in (13, 50, 50))
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    x, cos, sin = (
        at_the_end(torch.randn(1, 2, 13, 48)),
        at_the_end(torch.randn(13, 48)),
        at_the_end(torch.randn(13, 48)),
    )
    torch.testing.assert_close(rope(x, cos, sin), ROPE(x, cos, sin))


def test_a_lowered_graph_has_them_and_is_still_understood() -> None:
    """Both variants of the graph, and what looks for attention finds it."""
    compiled = dlqc.compile(dlqc.load_model("tiny-llada"), "w8a8-rtn", backend="cpu", progress=False)
    nodes = list(compiled.lowered.nodes)
    assert sum(n.target is attention for n in nodes) == sum(is_call(n, SDPA) for n in nodes) == 4
    assert sum(n.target is rope for n in nodes) == sum(is_call(n, ROPE) for n in nodes) == 8
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    cached = compiled.cached
    cache = cached.new_cache(1, 40)
    step = cached.step(ids, 0, cache)
    torch.testing.assert_close(step, compiled(ids), rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(compiled)
    assert torch.equal(twin(ids), compiled(ids))
    assert twin.cached.module is twin.module  # made anew, over its own buffers
    assert torch.equal(twin.cached.step(ids, 0, twin.cached.new_cache(1, 40)), step)
    assert "cached" not in twin.to(torch.float32).__dict__
