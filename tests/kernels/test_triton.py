"""Triton without a GPU: who gets which site, packing, the ops on CPU tensors, tables, and the assembly word by word."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from dlqc.backend import LinearSpec, choose_kernel, load_backend
from dlqc.backends.triton import BACKEND
from dlqc.errors import LoweringError
from dlqc.formats.activation import ActFormat
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.integer import IntFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.packing import pack
from dlqc.formats.planes import PlanesFormat
from dlqc.kernels.triton import dispatch, head, integer, packing, rows, runtime
from dlqc.kernels.triton.device import numbers as device

pytest.importorskip("triton", reason="triton is not installed")


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(128, 64, IntFormat(4, 32), None, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_kernel(BACKEND, spec)[1]["weight_only"] == "torch sees no GPU"
    with pytest.raises(
        LoweringError, match=r"backend 'triton' cannot run here: torch sees no GPU\. Use backend='auto'"
    ):
        load_backend("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_kernel(BACKEND, spec)[1]["weight_only"] == "the GPU has compute capability 7.5, it needs 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_kernel(BACKEND, spec)[0] is BACKEND.kernels[1]


ROOT = Path(__file__).parents[2]
TOKEN8 = ActFormat(8)
CHOICES = [
    (IntFormat(8, None), TOKEN8, "integer"),
    (IntFormat(4, 128, False), TOKEN8, "integer"),
    (IntFormat(4, 64), TOKEN8, "integer: weights have a scale per group of 64, it needs a multiple of 128"),
    (IntFormat(3, None), TOKEN8, "integer: weights have 3 bits, it needs 4 or 8"),
    (IntFormat(4, None), ActFormat(8, 64), "integer: activations have a scale per group of 64, it needs one per token"),
    (IntFormat(4, None), ActFormat(8, None, False), "integer: activations are asymmetric, it needs symmetric ones"),
    (IntFormat(2, 32), None, "integer: activations are not quantized"),
    (IntFormat(4, 16), None, "weight_only: weights have a scale per group of 16, it needs a multiple of 32"),
    (CodebookFormat(4, sparse=0.01), None, "coded_weights: codebook4 channel +1% sparse has a sparse part"),
    (CodebookFormat(4, 16), None, "coded_weights: groups of 16 are not a multiple of 32"),
    (PlanesFormat(2), None, "planes"),
    (PlanesFormat(2, 48), None, "planes: groups of 48 are not a multiple of 32"),
]


@pytest.mark.parametrize(("weight", "act", "said"), CHOICES)
def test_who_gets_which_site(weight: object, act: ActFormat | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "unavailable", lambda: None)
    kernel, refusals = choose_kernel(
        BACKEND, LinearSpec(96 if said.endswith("48 are not a multiple of 32") else 256, 64, weight, act, True)
    )  # type: ignore[arg-type]
    if ":" not in said:
        assert kernel is not None
        assert kernel.name == said
        return
    name, reason = said.split(": ", 1)
    assert refusals[name] == reason
    nobody = name in ("coded_weights", "planes") or (isinstance(weight, IntFormat) and weight.group_size == 16)
    assert kernel is None if nobody else kernel is not None and kernel.name == "weight_only"


def test_sums_that_could_overflow_are_refused() -> None:
    spec = LinearSpec(66312, 64, IntFormat(8, None), TOKEN8, False)
    assert BACKEND.kernels[0].supports(spec) == "sums over 66312 input features can overflow int32"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 300), (64, 256)])
def test_packing_is_undone(bits: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", 1)  # every tile by itself
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    low = packing.arrange(codes, bits)
    assert torch.equal(packing.restore(low, bits, n, k), codes)
    assert low.shape[0] * packing.ROWS == packing.padded(n)
    if bits in (4, 8):
        words = packing.arrange_integers(codes, bits)
        assert torch.equal(packing.restore_integers(words, bits, n, k).int(), codes.int() - (1 << (bits - 1)))


def sites() -> list[tuple[object, tuple[object, ...]]]:
    """Every op with arguments: packed weights as kernels lower them, and the ops on rows."""
    made: list[tuple[object, tuple[object, ...]]] = []
    x = torch.randn(2, 3, 64)
    for kernel, weight, act in (
        (BACKEND.kernels[0], IntFormat(4, None, False), TOKEN8),
        (BACKEND.kernels[1], IntFormat(3, 32, False), None),
    ):
        codes = torch.randint(0, 1 << weight.bits, (48, 64), dtype=torch.uint8)
        scales = torch.rand(48, weight.groups(64)).bfloat16()
        zeros = torch.randint(0, 1 << weight.bits, scales.shape, dtype=torch.uint8)
        spec = LinearSpec(64, 48, weight, act, True)
        lowered = kernel.lower(spec, pack(codes, weight.bits), scales, pack(zeros, weight.bits), torch.randn(48))  # type: ignore[union-attr]
        made.append((lowered.op, (x, *lowered.tensors.values(), *lowered.scalars)))
    made.append((head.head_argmax, made[-1][1][:9]))
    stored = Nf4Format(32, None).quantize(torch.randn(48, 64))
    lowered = BACKEND.kernels[2].lower_coded(LinearSpec(64, 48, stored.format, None, False), stored.pack(), None)  # type: ignore[union-attr]
    made.append((lowered.op, (x, *lowered.tensors.values(), *lowered.scalars)))
    made.append((rows.norm_quantize, (x, x + 1, torch.rand(64), 1e-5, 8)))
    made.append((rows.silu_quantize, (x, x + 1, 32, 8)))
    made.append((rows.block_hadamard, (x, 64)))
    return made


@pytest.mark.parametrize("index", range(7))
def test_ops_are_well_behaved(index: int) -> None:
    """opcheck, and torch.compile without a break; export keeps one node for any number of tokens."""
    op, (x, *rest) = sites()[index]
    torch.library.opcheck(op, (x, *rest), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))

    class Site(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return op(x, *rest)  # type: ignore[operator]

    if index not in (4, 5):  # whose other inputs have their tokens, too
        tokens = torch.export.Dim("tokens", min=1, max=4096)
        program = torch.export.export(Site(), (x,), dynamic_shapes=({1: tokens},))
        assert sum("dlqc_triton" in str(node.target) for node in program.graph.nodes) == 1
        x = torch.randn(2, 9, 64)
        torch.testing.assert_close(program.module()(x), Site()(x), rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(Site(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), Site()(x), rtol=0, atol=0)


SHAPE = dispatch.Shape("w16", 4, 4096, 4096, 128)


def test_a_launch_follows_from_the_bucket() -> None:
    assert [dispatch.bucket(m) for m in (1, 16, 17, 4096, 4097, 9000)] == [16, 16, 32, 4096, 8192, 12288]
    for low, high in ((1, 16), (17, 32), (65, 128), (2049, 4096)):
        assert dispatch.choose(SHAPE, low) == dispatch.choose(SHAPE, high)
    assert not dispatch.choose(SHAPE, 1024).dense
    assert dispatch.choose(SHAPE, 5000).dense


def test_tables_are_complete_and_unknown_devices_follow_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("gpu_tables")
    files = sorted(dispatch.FOLDER.glob("*.json"))
    assert files
    for path in files:
        stored = json.loads(path.read_text())
        assert stored["status"] in ("predicted", "measured")
        held = [shape for k, n in tables.LLADA for shape in tables.shapes(k, n)]
        assert list(stored["configs"]) == [shape.key for shape in held]
        if stored["status"] == "predicted":
            known = {runtime.H200.name: runtime.H200}[stored["device"]]
            assert path.read_text() == tables.spelled(dispatch.as_table(known, held, "predicted", {}))
        for sizes in dispatch.table(stored["device"]).values():
            assert sorted(sizes) == list(dispatch.BUCKETS)
            for size, config in sizes.items():
                whole = config.persistent or 128 % config.bn == 0
                assert config.dense or (config.bm <= size and whole and config.splits >= 1)
    other = runtime.Device("another", 60, 65536, False)
    assert dispatch.choose(SHAPE, 32, other) == dispatch.rule(SHAPE, 32, other)
    assert dispatch.rule(SHAPE, 32, other).splits < dispatch.rule(SHAPE, 32).splits
    assert dispatch.rule(SHAPE, 128, other).stages < dispatch.rule(SHAPE, 128).stages
    int8 = dispatch.Shape("w8", 8, 4096, 4096, 4096)
    assert dispatch.rule(int8, 128, other).warps > dispatch.rule(int8, 128).warps


def test_programs_stay_and_begin_early_on_hopper_alone() -> None:
    int8, hopper = dispatch.Shape("w8", 8, 4096, 12288, 4096), runtime.H200
    ampere, small = runtime.Device("A100", 108, 166912, False), runtime.Device("RTX 5090", 170, 101376)
    assert dispatch.rule(int8, 1024, hopper).persistent
    square = dispatch.Shape("w8", 8, 4096, 4096, 4096)
    for size, fewest, stays in ((1024, 5 * 16, False), (2048, 9 * 16, True)):  # tiles of 513 and of 1025 tokens
        assert (fewest > hopper.units) == dispatch.rule(square, size, hopper).persistent == stays
    for shape, size, device_ in (
        (int8, 512, hopper),
        (int8, 1024, ampere),
        (int8, 1024, small),
        (dispatch.Shape("w8", 8, 4096, 12288, 128), 1024, hopper),
        (dispatch.Shape("w8", 4, 4096, 12288, 4096), 1024, hopper),
        (dispatch.Shape("e4m3", 8, 4096, 12288, 4096), 1024, hopper),
    ):
        assert not dispatch.rule(shape, size, device_).persistent
    apart = integer.config_of(int8, 1024, hopper, apart=True)
    assert not apart.persistent
    assert 128 % apart.bn == 0
    assert integer.config_of(int8, 512, hopper).warps < integer.config_of(int8, 512, hopper, added=True).warps
    assert dispatch.rule(int8, 128, hopper).dependent
    assert not dispatch.rule(int8, 256, hopper).dependent
    assert not dispatch.rule(int8, 16, ampere).dependent


def test_a_launch_begins_early_only_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "interpreting", lambda: False)
    assert runtime.dependent(True) == {"DEPENDENT": True, "launch_pdl": True}
    assert runtime.dependent(False) == {"DEPENDENT": False}
    monkeypatch.setattr(runtime, "DEPENDENT_LAUNCH", False)
    assert runtime.dependent(True) == {"DEPENDENT": False}
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "interpreting", lambda: True)
    assert runtime.dependent(True) == {"DEPENDENT": False}


def test_a_table_has_the_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {(SHAPE.key, 32): dispatch.Config(bn=128, bm=32, splits=2)}
    device_ = runtime.Device("mine", 60, 65536)
    (tmp_path / "mine.json").write_text(json.dumps(dispatch.as_table(device_, [SHAPE], "measured", found)))
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    dispatch.table.cache_clear()
    try:
        assert dispatch.choose(SHAPE, 20, device_) == found[SHAPE.key, 32]
        assert dispatch.choose(SHAPE, 64, device_) == dispatch.rule(SHAPE, 64, device_)
    finally:
        dispatch.table.cache_clear()


# The assembly of the kernels, word by word. Packed 16-bit operands are tensors of bits [.., 2].


def halves(word: torch.Tensor) -> torch.Tensor:
    return torch.stack((word & 0xFFFF, word >> 16 & 0xFFFF), -1).to(torch.int32).to(torch.int16)


def joined(pairs: torch.Tensor) -> torch.Tensor:
    low, high = (pairs.view(torch.int16).to(torch.int64) & 0xFFFF).unbind(-1)
    return low | high << 16


def floats(word: torch.Tensor) -> torch.Tensor:
    return word.to(torch.int32).view(torch.float32)


def bits_of(value: torch.Tensor) -> torch.Tensor:
    return value.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def execute(text: str, operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the few instructions that the kernels use do to 32-bit registers (int64 tensors of their bits)."""
    registers = dict(operands)
    kinds = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}

    def read(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for step in filter(None, (part.strip(" {}") for part in text.split(";"))):
        name, rest = step.split(" ", 1)
        if name == ".reg":
            continue
        to, *names = (part.strip() for part in rest.split(","))
        values = [read(part) for part in names]
        if name == "mov.b32":
            made = values[0]
        elif name == "shr.u32":
            made = values[0] >> values[1]
        elif name == "shl.b32":
            made = values[0] << values[1] & 0xFFFFFFFF
        elif name == "lop3.b32":
            table = int(names[3], 0)
            a, b, c = values[:3]
            made = sum(((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1))) & 1) << i for i in range(32))
        elif name == "prmt.b32":
            bytes_ = [values[i // 4] >> 8 * (i % 4) & 0xFF for i in range(8)]
            made = sum(bytes_[int(names[2], 0) >> 4 * i & 7] << 8 * i for i in range(4))
        elif name == "add.f32":
            made = bits_of(floats(values[0]) + floats(values[1]))
        elif name.startswith("fma.rn."):
            kind = kinds[name.rsplit(".", 1)[1]]
            a, b, c = (halves(v).view(kind).double() for v in values)
            made = joined((a * b + c).to(kind))
        elif name.startswith("cvt.rn."):
            kind = kinds[name.split(".")[2]]
            made = joined(torch.stack((floats(values[1]), floats(values[0])), -1).to(kind))
        else:
            raise AssertionError(f"unknown instruction {step!r}")
        registers[to] = made
    return registers


KINDS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def shifted(zero: float, run: int, bits: int, kind: str) -> torch.Tensor:
    """-(128 / 2ᵖ + zero) or -(1024 / 2ᵖ + zero), twice in a register."""
    middle = (128 if kind == "bf16x2" else 1024) / 2 ** device.place(run, bits)
    value = torch.tensor([-(zero + middle)] * 2, dtype=torch.float64)
    assert torch.equal(value.to(KINDS[kind]).double(), value)
    return joined(value.to(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_assembly_of_fields(bits: int, kind: str) -> None:
    """All words in one half of the register and their complements in the other, each field, the outermost zero points."""
    low = torch.arange(1 << 16)
    word = low | (low ^ 0xFFFF) << 16
    for run in range(16 // bits):
        for zero in (0.5,) if bits == 1 else (0, (1 << bits) - 1):
            text = device.pair(run, bits, kind)
            found = halves(execute(text, {"$1": word, "$2": shifted(zero, run, bits, kind)})["$0"]).view(KINDS[kind])
            expected = torch.stack((low, low ^ 0xFFFF), -1) >> bits * run & ((1 << bits) - 1)
            assert torch.equal(found.double(), expected.double() - zero)


@pytest.mark.parametrize("kind", KINDS)
def test_assembly_of_the_last_of_three_bits(kind: str) -> None:
    low = torch.arange(1 << 16)
    words = [low | (low ^ 0xFFFF) << 16, low * 40503 & 0xFFFFFFFF, low * 2654435761 & 0xFFFFFFFF]
    operands = {f"${i + 1}": word for i, word in enumerate(words)} | {"$4": shifted(5, 15, 3, kind)}
    found = halves(execute(device.pair_of_tops(kind), operands)["$0"]).view(KINDS[kind]).double()
    codes = [sum((word >> 15 + half & 1) << i for i, word in enumerate(words)) for half in (0, 16)]
    assert torch.equal(found, torch.stack(codes, -1).double() - 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", [0, 128, 255])
def test_assembly_of_bytes(zero: int, kind: str) -> None:
    quarter = torch.arange(256)
    parts = [quarter, quarter.flip(0), quarter ^ 0x55, quarter * 7 & 0xFF]
    word = sum(part << 8 * i for i, part in enumerate(parts))
    point = bits_of(torch.tensor(-(2.0**23 + zero)))
    made = execute(device.four_bytes(kind), {"$2": word, **{f"${i}": point for i in range(3, 7)}})
    found = torch.cat([halves(made[name]).view(KINDS[kind]) for name in ("$0", "$1")], -1).double()
    assert torch.equal(found, torch.stack(parts, -1).double() - zero)
