"""fused8: what it takes along is what the ops before and after compute, and it takes along nothing that others read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlqc
from dlqc.backend import LinearSpec
from dlqc.backends import fusion
from dlqc.errors import ContractError
from dlqc.formats.activation import ActFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack
from dlqc.graph import RMS_NORM, SDPA, args_of, aten, is_call
from dlqc.hadamard import hadamard, side
from dlqc.kernels.cpu import build
from dlqc.kernels.cpu.fused8 import FUSED8, KINDS, rms_norm
from dlqc.kernels.cpu.linear8 import Linear8
from dlqc.weights import Weights

CaseMaker = Callable[..., Any]
pytestmark = pytest.mark.skipif(
    build.unavailable("linear8") is not None, reason=f"no native code: {build.unavailable('linear8')}"
)


LIBRARY = "linear8"  # whose paths `isa` takes in turn


def weight(n: int, k: int, bits: int, group: int | None, act: ActFormat) -> tuple[Any, torch.Tensor]:
    """The tensors and scalars of a site, and its float64 weight."""
    g = torch.Generator().manual_seed(n + k)
    stored = IntFormat(bits, group, scale_dtype="float32").quantize(torch.randn(n, k, generator=g))
    spec = LinearSpec(k, n, stored.format, act, True)
    bias = torch.randn(n, generator=g)
    return Linear8().lower(spec, pack(stored.codes, bits), stored.scales, None, bias), stored.dequantize().double()


def before(kind: str, x: torch.Tensor, other: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The definitions, in the dtype of x."""
    made = {
        "as_is": lambda: x,
        "rms_norm": lambda: F.rms_norm(x, gain.shape, gain, 1e-5),
        "layer_norm": lambda: F.layer_norm(x, gain.shape, gain, shift, 1e-5),
        "silu_times": lambda: F.silu(x) * other,
    }
    return made[kind]()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 100), st.integers(1, 130)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    residual=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_by_the_definition_in_float64(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, residual: bool, size: float, seed: int
) -> None:
    """Codes may differ by one where x lies near a tie: the bound is half a step of each token, times Σ|W|, and rounding."""
    m, n, k = shape
    g = torch.Generator().manual_seed(seed)
    lowered, wide = weight(n, k, 4, None, ActFormat(8))
    bias = lowered.tensors["bias"]
    assert bias is not None
    x, other = ((torch.randn(m, 2 * k, generator=g) * size).to(dtype)[:, i::2] for i in (0, 1))
    gain, shift = torch.randn(k, generator=g), torch.randn(k, generator=g)
    added = torch.randn(m, n, generator=g).to(dtype) if residual else None
    parts = (gain, shift) if kind.endswith("norm") else (None, None)
    if kind == "rms_norm":
        parts = (gain, None)
    y = FUSED8(
        KINDS[kind],
        x,
        other if kind == "silu_times" else None,
        *parts,
        1e-5,
        added,
        *lowered.tensors.values(),
        *lowered.scalars,
    )
    exact = before(kind, x.double(), other.double(), gain.double(), shift.double())
    expected = exact @ wide.T + bias.double() + (0 if added is None else added.double())
    step = exact.abs().amax(1, keepdim=True) / 127
    rounding = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8}[dtype] * (expected.abs() + 1)
    reach = 0.5001 * step * wide.abs().sum(1) + 1e-5 * (exact.abs() @ wide.abs().T) + rounding
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= reach).all()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_largest_entry_of_a_token_is_not_rounded(kind: str) -> None:
    """W = 1: the entry that sets the scale has the code 127, and comes back as float32 arithmetic made it."""
    stored = IntFormat(8, None, scale_dtype="float32").quantize(torch.eye(96))
    spec = LinearSpec(96, 96, stored.format, ActFormat(8), False)
    lowered = Linear8().lower(spec, pack(stored.codes, 8), stored.scales, None, None)
    g = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 1, 3000).unsqueeze(1)  # gates near 0 and far from it
    x, other = sizes * torch.randn(3000, 96, generator=g), torch.randn(3000, 96, generator=g)
    gain, shift = torch.randn(96, generator=g), torch.randn(96, generator=g)
    parts = {"rms_norm": (None, gain, None), "layer_norm": (None, gain, shift), "silu_times": (other, None, None)}
    given = (KINDS[kind], x, *parts.get(kind, (None, None, None)), 1e-5, None)
    y = FUSED8(*given, *lowered.tensors.values(), *lowered.scalars).double()
    expected = before(kind, x.double(), other.double(), gain.double(), shift.double())
    largest = expected.abs().argmax(1, keepdim=True)
    wide = stored.dequantize().double().diagonal()[largest]
    torch.testing.assert_close(y.gather(1, largest), expected.gather(1, largest) * wide, rtol=1e-6, atol=0)


def rotated(x: torch.Tensor, block: int, transposed: bool = False) -> torch.Tensor:
    """x · (I ⊗ H/√n) by the dense matrix."""
    h = hadamard(block)
    return (x.unflatten(-1, (-1, block)) @ (h.T if transposed else h)).flatten(-2) / math.sqrt(block)


def rotation(block: int, transposed: bool = False) -> tuple[int, torch.Tensor | None]:
    core = side(block, transposed).core
    return block, None if core is None else core.to(torch.float32).contiguous()


@pytest.mark.usefixtures("isa")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    block=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 512, 192, 384, 576, 640]),  # with cores of 12, 20 and 36
    times=st.integers(1, 3),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    m=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_rotations_by_dense_matrices_in_float64(
    kind: str, block: int, times: int, transposed: bool, dtype: torch.dtype, m: int, seed: int
) -> None:
    """As above, after a block Hadamard matrix; its rounding is that of sums over a block."""
    k, n, g = block * times, 50, torch.Generator().manual_seed(seed)
    lowered, wide = weight(n, k, 4, None, ActFormat(8))
    bias = lowered.tensors["bias"]
    assert bias is not None
    x, other = ((torch.randn(m, k, generator=g) * torch.linspace(0.1, 3, k)).to(dtype) for _ in range(2))
    gain, shift = torch.randn(k, generator=g), torch.randn(k, generator=g)
    parts = {"rms_norm": (None, gain, None), "layer_norm": (None, gain, shift), "silu_times": (other, None, None)}
    given = (KINDS[kind], x, *parts.get(kind, (None, None, None)), 1e-5, None)
    y = FUSED8(*given, *lowered.tensors.values(), *lowered.scalars, *rotation(block, transposed))
    exact = before(kind, x.double(), other.double(), gain.double(), shift.double())
    turned = rotated(exact, block, transposed)
    expected = turned @ wide.T + bias.double()
    sums = (exact.abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / math.sqrt(block)).expand(-1, -1, block)
    step = turned.abs().amax(1, keepdim=True) / 127
    rounding = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8}[dtype] * (expected.abs() + 1)
    reach = 0.5001 * step * wide.abs().sum(1) + 1e-5 * (sums.flatten(1) @ wide.abs().T) + rounding
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= reach).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("block", [8, 128, 192, 384])
def test_codes_of_rotated_rows_are_those_of_float64_but_at_ties(block: int) -> None:
    """W = 1: a result is a code, times two scales."""
    stored = IntFormat(8, None, scale_dtype="float32").quantize(torch.eye(384))
    lowered = Linear8().lower(
        LinearSpec(384, 384, stored.format, ActFormat(8), False), pack(stored.codes, 8), stored.scales, None, None
    )
    x, other = torch.randn(40, 384), torch.randn(40, 384)
    given = (KINDS["silu_times"], x, other, None, None, 0.0, None)
    y = FUSED8(*given, *lowered.tensors.values(), *lowered.scalars, *rotation(block)).double()
    turned = rotated(F.silu(x.double()) * other.double(), block)
    scale = turned.abs().amax(1, keepdim=True) / 127
    codes = y / (scale * stored.dequantize().double().diagonal())
    ties = ((turned / scale).frac().abs() - 0.5).abs() < 1e-4
    assert ties.float().mean() < 1e-3
    torch.testing.assert_close(codes[~ties], (turned / scale).round()[~ties], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "core"),
    [
        (40, None),
        (192, None),
        (-16, None),
        (24, hadamard(12)),
        (192, torch.ones(12, 11)),
        (192, torch.ones(12, 12).T[:1]),
    ],
)
def test_blocks_that_do_not_fit_are_refused(block: int, core: torch.Tensor | None) -> None:
    lowered, _ = weight(50, 192, 4, None, ActFormat(8))
    given = (
        KINDS["as_is"],
        torch.randn(2, 192),
        None,
        None,
        None,
        0.0,
        None,
        *lowered.tensors.values(),
        *lowered.scalars,
    )
    held = None if core is None else core.to(torch.float32)
    with pytest.raises(RuntimeError, match=r"no rotation of (\[2, 192\] by such blocks|192 features by blocks)"):
        FUSED8(*given, block, held)
    with pytest.raises(ContractError, match=rf"no rotation of 192 features by blocks of {block}.*Use blocks of k"):
        torch.ops.dlqc_cpu.fused8_in_python(*given, block, held)


@pytest.mark.parametrize(("block", "taken"), [(32, True), (None, False)])
def test_rotations_that_stay_online_go_along(block: int | None, taken: bool, case: CaseMaker) -> None:
    """The rotation before a down projection, and the gate before it. The order 96 = 12 · 8 has half a vector: it stays."""
    from dlqc.backends.cpu import CpuBackend
    from dlqc.ops import TRANSFORM
    from dlqc.passes.lower import Lower
    from dlqc.passes.pack import Pack
    from dlqc.passes.quantize_activations import QuantizeActivations
    from dlqc.passes.quantize_weights import QuantizeWeights
    from dlqc.passes.rotate_down import RotateDown
    from dlqc.rounding.rtn import Rtn

    k = case("llada", CpuBackend())
    k.apply(RotateDown(block=block))
    sites = sum(is_call(n, TRANSFORM) for n in k.graph.nodes)
    assert sites > 0
    for p in (QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(8), Pack()):
        k.apply(p)
    expected = k.forward(k.ids())
    report = k.apply(Lower())
    joined = [report.metrics.get(f"fused_{what}", 0) for what in ("hadamard", "silu_times")]
    assert joined == ([sites, sites] if taken else [0, 0])
    assert sum(is_call(n, TRANSFORM) for n in k.graph.nodes) == (0 if taken else sites)
    assert (f"{sites} hadamard" in " ".join(report.notes)) == taken
    assert float((k.forward(k.ids()) - expected).norm() / expected.norm()) < 2e-2


def test_it_is_linear8_of_the_same_input() -> None:
    """As it is, and with a sum behind, not a bit differs from the ops one by one."""
    lowered, _ = weight(70, 256, 3, 64, ActFormat(8, 128))
    x, added = torch.randn(2, 9, 256), torch.randn(2, 9, 70)
    plain = lowered.op(x, *lowered.tensors.values(), *lowered.scalars)
    y = FUSED8(KINDS["as_is"], x, None, None, None, 0.0, added, *lowered.tensors.values(), *lowered.scalars)
    assert torch.equal(y, plain + added)
    assert FUSED8(
        KINDS["as_is"], x[:0], None, None, None, 0.0, None, *lowered.tensors.values(), *lowered.scalars
    ).shape == (
        0,
        9,
        70,
    )


@pytest.mark.parametrize(
    "layout", ["flat", "rows of a wider one", "batch and tokens swapped", "features apart", "none", "one row"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_native_op_and_its_twin_in_python_agree(layout: str, dtype: torch.dtype) -> None:
    """Layouts and types that native code has no way for go to the twin; others give the same bits without it."""
    lowered, _ = weight(50, 96, 4, 32, ActFormat(8))

    def tokens(width: int) -> torch.Tensor:
        whole = torch.randn(3, 5, 2 * width, dtype=torch.float32).to(dtype)
        given = {
            "flat": whole[..., :width].contiguous(),
            "rows of a wider one": whole[..., 3 : width + 3],
            "batch and tokens swapped": whole[..., :width].transpose(0, 1),
            "features apart": whole[..., ::2],
            "none": whole[:0, :, :width],
            "one row": whole[0, 0, :width],
        }
        return given[layout]

    given = (KINDS["silu_times"], tokens(96), tokens(96), None, None, 0.0, tokens(50))
    arguments = (*given, *lowered.tensors.values(), *lowered.scalars, 32)
    y, twin = FUSED8(*arguments), torch.ops.dlqc_cpu.fused8_in_python(*arguments)
    assert y.shape == twin.shape == (*given[1].shape[:-1], 50)
    assert y.dtype is dtype
    assert torch.equal(y, twin)


def test_a_wrong_width_is_refused() -> None:
    lowered, _ = weight(50, 96, 4, 32, ActFormat(8))
    with pytest.raises(
        RuntimeError, match=r"x: the input is \(2, 95\) torch.float32, not \[\.\.\., 96\] of a floating dtype"
    ):
        lowered.op(torch.randn(2, 95), *lowered.tensors.values(), *lowered.scalars)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_that_was_moved(dtype: torch.dtype) -> None:
    """Biases, gains and scales in another type are read as what they are."""
    lowered, _ = weight(50, 96, 4, 32, ActFormat(8))
    x, gain = torch.randn(3, 96), torch.randn(96)
    moved = {
        name: part.to(dtype) if name == "bias" else part for name, part in lowered.tensors.items() if part is not None
    }
    if dtype is torch.float64:
        moved["scales"] = moved["scales"].to(dtype)

    def run(gain: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        held = (tensors.get(name) for name in ("codes", "scales", "zeros", "bias"))
        return FUSED8(KINDS["rms_norm"], x, None, gain, None, 1e-5, None, *held, *lowered.scalars)  # type: ignore[no-any-return]

    wide = {name: part if part.dtype == torch.uint8 else part.float() for name, part in moved.items()}
    assert torch.equal(run(gain.to(dtype), moved), run(gain.to(dtype).float(), wide))
    for spread in (torch.randn(192)[::2], torch.randn(1).expand(96), gain.to(dtype)):
        torch.testing.assert_close(rms_norm(x, spread, 1e-5), F.rms_norm(x, (96,), spread.float(), 1e-5))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"residual": (1, 50)}, r"residual: \[1, 50\], not \[3, 50\]"),
        ({"other": (1, 96)}, r"other: \[1, 96\], not \[3, 96\]"),
        ({"gain": (7,)}, r"gain: \[7\], not \[96\]"),
        ({"kind": 9}, "kind: 9 with a factor"),
        ({"codes": torch.zeros(5, dtype=torch.uint8)}, "codes: 5 of torch.uint8 on cpu, not 4608 of uint8 on the CPU"),
        ({"codes": torch.zeros(4608)}, "codes: 4608 of torch.float32 on cpu, not 4608 of uint8 on the CPU"),
        ({"bias": (3,)}, "bias: 3 of torch.float32 on cpu, not 50 of a floating dtype on the CPU"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], said: str) -> None:
    """And nothing is read past its end: the message is that of the twin in Python."""
    lowered, _ = weight(50, 96, 4, 32, ActFormat(8))
    shapes = {name: torch.zeros(size) if isinstance(size, tuple) else size for name, size in change.items()}
    given = {"kind": KINDS["silu_times"], "x": torch.randn(3, 96), "other": torch.randn(3, 96), "gain": None} | {
        **{"shift": None, "eps": 0.0, "residual": None},
        **lowered.tensors,
    }
    for op in (FUSED8, torch.ops.dlqc_cpu.fused8_in_python):
        with pytest.raises((RuntimeError, ContractError), match=said):
            op(*(given | shapes).values(), *lowered.scalars)


def test_nine_dimensions_and_no_dimension() -> None:
    lowered, _ = weight(50, 96, 4, 32, ActFormat(8))
    x = torch.randn(3, 5, 96)
    y = lowered.op(x.reshape(3, 1, 1, 1, 1, 1, 5, 1, 96), *lowered.tensors.values(), *lowered.scalars)
    assert torch.equal(y.reshape(3, 5, 50), lowered.op(x, *lowered.tensors.values(), *lowered.scalars))
    assert rms_norm(x.reshape(3, 1, 1, 1, 1, 1, 5, 1, 96), None, 1e-5).dim() == 9


def test_a_default_device_elsewhere() -> None:
    """Weights are arranged where they are."""
    with torch.device("meta"):
        arranged = build.arrange(torch.ones(50, 96, dtype=torch.uint8, device="cpu"), 4)
        panels = build.in_panels(torch.ones(50, 3, device="cpu"))
    assert arranged.device.type == panels.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eps_of_a_norm_that_names_none(dtype: torch.dtype) -> None:
    """torch takes that of float32 for bfloat16, too."""
    graph = torch.fx.Graph()
    node = graph.call_function(RMS_NORM, (graph.placeholder("x"), [64]))
    x = (torch.randn(4, 64) * 1e-3).to(dtype)
    node.meta["val"] = x
    _, _, eps = fusion.norm(node, graph, Weights(), node)
    torch.testing.assert_close(rms_norm(x, None, eps), F.rms_norm(x, (64,)))


def test_odd_rows() -> None:
    """Zeros, infinities and NaN stay in their own row; a gate far below zero closes."""
    lowered, _ = weight(50, 96, 4, None, ActFormat(8))
    x, other = torch.randn(12, 96), torch.randn(12, 96)

    def run(kind: str) -> torch.Tensor:
        gain = torch.ones(96) if kind == "rms_norm" else None
        tensors = (*lowered.tensors.values(), *lowered.scalars)
        return FUSED8(KINDS[kind], x, other if gain is None else None, gain, None, 1e-5, None, *tensors)  # type: ignore[no-any-return]

    plain = {kind: run(kind) for kind in ("rms_norm", "silu_times")}
    x[3], x[4, 7], x[5, 2], x[6] = 0.0, float("inf"), float("nan"), -1e4
    for kind, expected in plain.items():
        y = run(kind)
        kept = [i for i in range(12) if i not in (3, 4, 5, 6)]
        assert torch.equal(y[kept], expected[kept])
        assert torch.equal(y[3], lowered.tensors["bias"])
    torch.testing.assert_close(run("silu_times")[6], lowered.tensors["bias"])


def test_opcheck() -> None:
    lowered, _ = weight(48, 64, 4, 32, ActFormat(8))
    arguments = (torch.randn(3, 64), torch.randn(3, 64), None, None, 0.0, torch.randn(3, 48))
    given = (KINDS["silu_times"], *arguments, *lowered.tensors.values(), *lowered.scalars)
    torch.library.opcheck(FUSED8, (*given, 64, hadamard(4, torch.float32)))


def test_a_block_is_six_calls() -> None:
    """Of tiny-llada: two norms, one gate, two sums a block are in the four calls of its linears; the function stays."""
    compiled = dlqc.compile(dlqc.load_model("tiny-llada"), "w4a8-rtn", backend="cpu", progress=False)
    blocks = 4
    metrics = next(s.metrics for s in compiled.report.steps if s.name == "lower")
    found = {key.removeprefix("fused_"): n for key, n in metrics.items() if key.startswith("fused_")}
    assert found == {"rms_norm": 2 * blocks, "silu_times": blocks, "residual": 2 * blocks}
    assert (metrics["native_attention"], metrics["native_rope"], metrics["native_norm"]) == (blocks, 2 * blocks, 1)
    nodes = list(compiled.lowered.nodes)
    assert sum(is_call(n, aten.silu.default, aten.add.Tensor) for n in nodes) == 0
    assert sum(is_call(n, SDPA) for n in nodes) == blocks
    reference = dlqc.compile(dlqc.load_model("tiny-llada"), "w4a8-rtn", backend="reference", progress=False)
    ids = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    difference = (compiled(ids) - reference(ids)).norm() / reference(ids).norm()
    assert float(difference) < 2e-2


def test_a_norm_that_others_read_stays(case: CaseMaker) -> None:
    """Without merging, a norm has three readers, and a gate's silu one: only the latter goes."""
    from dlqc.backends.cpu import CpuBackend
    from dlqc.passes.lower import Lower
    from dlqc.passes.pack import Pack
    from dlqc.passes.quantize_activations import QuantizeActivations
    from dlqc.passes.quantize_weights import QuantizeWeights
    from dlqc.rounding.rtn import Rtn

    k = case("dream", CpuBackend(merges=False))
    for p in (QuantizeWeights(4, 32, method=Rtn()), QuantizeActivations(8), Pack()):
        k.apply(p)
    metrics = k.apply(Lower()).metrics
    assert (metrics.get("fused_rms_norm", 0), metrics["fused_silu_times"]) == (1, 2)  # the last norm, before the head
    kinds = [args_of(n)[0] for n in k.graph.nodes if is_call(n, FUSED8)]
    assert kinds.count(KINDS["silu_times"]) == 2
