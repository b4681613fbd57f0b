"""Native code: how it is built and found, and that its transforms are those of torch."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc import fwht, hadamard, native, shipped
from dlqc.doctor import examine
from dlqc.fwht import Side
from dlqc.hadamard import multiply, side
from dlqc.transform import Chain, Diagonal, Hadamard, Identity, Kronecker, Permutation, Transform, chain, per_head
from dlqc.weights import Constant, OnColumns, OnRows

_reason = native.available()
# Without a compiler there is nothing to test; with one, a source that does not build is a failure and no reason to skip.
if os.environ.get("DLQC_NATIVE") == "0" or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
    pytest.skip(f"native code: {_reason}", allow_module_level=True)

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "dlqc" / "csrc" / "fwht.cpp"


def test_the_source_builds_where_there_is_a_compiler() -> None:
    assert _reason is None


HALVES = [torch.bfloat16, torch.float16]
TYPES = [*HALVES, torch.float32, torch.float64]
GUARD = 64


def dense(n: int, length: int, transpose: bool, inner: int = 1) -> torch.Tensor:
    h = hadamard.hadamard(n) / n**0.5
    one = torch.kron(h.T.contiguous() if transpose else h, torch.eye(inner, dtype=torch.float64))
    return torch.block_diag(*[one] * (length // (n * inner)))


def guarded(rows: int, cols: int, stride: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [rows, cols] of NaN in the middle of a larger buffer of NaN, and the buffer."""
    whole = torch.full((rows * stride + 2 * GUARD,), torch.nan, dtype=dtype)
    return whole.as_strided((rows, cols), (stride, 1), GUARD), whole


sides = st.builds(
    lambda *got: got,
    st.sampled_from([1, 1, 2, 4, 8, 12, 16, 28, 32, 40, 64, 128, 148, 256, 296]),
    st.sampled_from([1, 1, 1, 2, 3, 16]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@given(
    row=sides,
    column=sides,
    dtypes=st.tuples(st.sampled_from(TYPES), st.sampled_from(TYPES)),
    pad=st.integers(0, 5),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_both_sides_against_dense_matrices(row, column, dtypes, pad, threads, seed) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    (found_row, t_row, cols), (found_column, t_column, rows) = (_made(got, generator) for got in (row, column))
    source, target = dtypes
    w, _ = guarded(rows, cols, cols + pad, source)
    w.copy_(torch.randn(rows, cols, generator=generator))
    out, whole = guarded(rows, cols, cols + pad, target)
    wide = torch.float32 if target in HALVES else torch.float64
    before, count = w.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert fwht.run(w, out, wide, found_row, found_column)
    finally:
        torch.set_num_threads(count)
    expected = t_column.T @ w.double() @ t_row
    error = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-23, torch.float64: 1e-13}[target]
    scale = expected.abs().max() + 1e-6
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=float(scale) * (error * 0.02 + 1e-14))
    assert torch.equal(w, before)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside.as_strided((rows, cols), (cols + pad, 1), GUARD).fill_(True)
    assert whole[~inside].isnan().all()


def _made(got: tuple[int, int, int, bool, bool, bool], generator: torch.Generator) -> tuple[Side, torch.Tensor, int]:
    n, inner, blocks, transpose, pre, post = got
    inner, blocks = (inner, blocks) if n * inner * blocks <= 300 else (1, 1)
    length = n * inner * blocks
    vectors = [1 + torch.rand(length, generator=generator, dtype=torch.float64) if v else None for v in (pre, post)]
    core = side(n, transpose).core
    t = dense(n, length, transpose, inner)
    t = t if vectors[0] is None else vectors[0][:, None] * t
    t = t if vectors[1] is None else t * vectors[1]
    return Side(n, core, inner, *vectors), t, length


@pytest.mark.parametrize("n", [12, 28, 148, 768, 4096, 148 * 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [-1, 0])
def test_against_torch(n: int, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(w: torch.Tensor) -> torch.Tensor:
        return multiply(w, n, transpose=True) if dim == -1 else hadamard.multiply_rows(w, n, transpose=True)

    w = torch.randn(7, n, dtype=dtype) if dim == -1 else torch.randn(n, 7, dtype=dtype)
    fast = both(w)
    monkeypatch.setenv("DLQC_NATIVE", "0")
    assert (fast - both(w)).norm() <= (1e-6 if dtype == torch.float32 else 1e-14) * fast.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("column", [False, True])
def test_rounding_is_that_of_torch(dtype: torch.dtype, column: bool) -> None:
    """Every pattern of 16 bits read, and float32 of all sizes written, ties and subnormal numbers among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None].expand(-1, 3)
    bits = torch.randint(-(2**31), 2**31, (40000, 3), dtype=torch.int64).to(torch.int32)
    ties = (bits & ~0x1FFF) | 0x1000, (bits & ~0xFFFF) | 0x8000
    floats = torch.cat([t.view(torch.float32) for t in (bits, *ties)]) * torch.tensor([1, 1e-30, 1e30])
    floats = torch.cat([floats, torch.randn(40000, 3), torch.randn(40000, 3) * 1e-6, torch.randn(40000, 3) * 3e4])
    one = Side(pre=torch.ones(3, dtype=torch.float64))
    blocks = Side(4, inner=len(floats) // 8) if column else fwht.NOTHING
    for source, target in ((every.contiguous(), torch.float32), (floats, dtype)):
        out, expected = torch.empty(source.shape, dtype=target), source.to(target)
        assert fwht.run(source, out, torch.float32, one)
        assert torch.equal(out.isnan(), expected.isnan())
        known = ~expected.isnan()
        whole = torch.int16 if target.itemsize == 2 else torch.int32
        assert torch.equal(out[known].view(whole), expected[known].view(whole))
    if column:
        wide, narrow = torch.empty_like(floats), torch.empty(floats.shape, dtype=dtype)
        assert fwht.run(floats, wide, torch.float32, one, blocks)
        assert fwht.run(floats, narrow, torch.float32, one, blocks)
        known = ~wide.isnan()
        assert torch.equal(narrow[known], wide[known].to(dtype))


def test_the_number_of_threads_changes_nothing() -> None:
    w = torch.randn(768, 1536).to(torch.bfloat16)
    constant = Constant(w, (OnColumns(Hadamard(1536, 1536)), OnRows(Hadamard(768, 768))))
    count = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(constant.stored())
    torch.set_num_threads(count)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_large_two_sided_blocks_are_done_in_parts(poisoned: None) -> None:
    w = torch.randn(2048, 1536)  # more than a slab
    r, c = Hadamard(1536, 1536), Hadamard(2048, 2048, True)
    out = torch.empty_like(w)
    assert fwht.run(w, out, torch.float32, side(1536), side(2048, transpose=True))
    exact = c.rows(r(w.double()))
    assert (out.double() - exact).norm() < 2**-21 * exact.norm()


def diagonal(width: int) -> Diagonal:
    return Diagonal(1 + torch.rand(width, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "columns",
    [
        chain(diagonal(96), Hadamard(96, 24, True), diagonal(96)),
        per_head(Hadamard(12, 12), 8),
        Kronecker(Hadamard(8, 8), Identity(12)),
        Chain((diagonal(96), Chain((Identity(96), diagonal(96))))),
        chain(Hadamard(96, 12), Permutation(torch.randperm(96))),
        chain(Hadamard(96, 12), Hadamard(96, 96)),
    ],
    ids=["diagonals", "heads", "across heads", "scale", "permuted", "twice"],
)
def test_stored_is_exact_rounded(dtype: torch.dtype, columns: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(40, 96).to(dtype)
    rows = chain(diagonal(40), Hadamard(40, 40))
    error = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-23, torch.float64: 1e-13}[dtype]
    for folds in ((OnColumns(columns),), (OnRows(rows), OnColumns(columns)), (OnRows(rows),)):
        constant = Constant(w, (*folds, OnColumns(diagonal(96))))
        fast = constant.stored()
        monkeypatch.setenv("DLQC_NATIVE", "0")
        slow = constant.stored()
        monkeypatch.delenv("DLQC_NATIVE")
        for found in (fast, slow):
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.double(), constant.exact(), rtol=error, atol=1e-5 if error > 1e-9 else 1e-12
            )


def test_what_native_code_does_not_take() -> None:
    w = torch.randn(8, 8)
    out = torch.empty_like(w)
    assert not fwht.run(w.T, out, torch.float32, side(8))
    assert not fwht.run(w[:4], out, torch.float32, side(8))
    assert not fwht.run(w[0], out[0], torch.float32, side(8))
    assert not fwht.run(w.long(), out, torch.float32, side(8))
    assert not fwht.run(w.to("meta"), out, torch.float32, side(8))
    with pytest.raises(ValueError, match="blocks of 16"):
        fwht.run(w, out, torch.float32, side(16))
    with pytest.raises(ValueError, match="3 numbers for 8"):
        fwht.run(w, out, torch.float32, Side(pre=torch.ones(3)))


# ---- building ---------------------------------------------------------------------------------------------------------

CHECK = """
import torch
from dlqc import native
from dlqc.hadamard import multiply
x = torch.arange(48.0).view(2, 24)
assert (multiply(multiply(x, 24), 24, transpose=True) - x).abs().max() < 1e-4
print(native.available())
"""


def start(**environment: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "DLQC_NATIVE")} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", CHECK], env=environment, text=True, cwd=ROOT, **pipes
    )


def told(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


def fresh(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str | None:
    """What a fresh process would be told; here without one, and without compiling where that is not the point."""
    monkeypatch.setattr(native, "_found", {})
    monkeypatch.setattr(shipped, "FOLDER", Path("/nowhere"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return native.available()


def test_two_processes_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "made" / "here"
    assert [told(p) for p in [start(DLQC_CACHE=str(cache)) for _ in range(2)]] == ["None", "None"]
    (file,) = (cache / "native").iterdir()  # nothing else is left behind
    assert file.name.startswith("fwht-")
    assert (cache / "native").stat().st_mode & 0o777 == 0o700
    made = file.stat().st_mtime_ns
    monkeypatch.delenv("CXX", raising=False)
    assert fresh(monkeypatch, DLQC_CACHE=str(cache)) is None
    assert file.stat().st_mtime_ns == made  # found, not built again
    damaged = tmp_path / "native" / file.name
    damaged.parent.mkdir(mode=0o700)
    damaged.write_bytes(b"not a library")
    assert fresh(monkeypatch, DLQC_CACHE=str(tmp_path)) is None
    assert damaged.stat().st_size > 1000


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DLQC_NATIVE": "0"}, "turned off by DLQC_NATIVE=0"),
        ({"CXX": "/bin/false"}, "/bin/false --version failed with 1"),
        ({"CXX": "/nowhere/c++"}, "/nowhere/c++: No such file or directory"),
        ({"CXX": "'"}, 'CXX="\'" is no command: No closing quotation'),
        ({"CXX": "/bin/echo"}, "/bin/echo failed with 0"),
    ],
)
def test_without_a_compiler(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert fresh(monkeypatch, DLQC_CACHE=str(tmp_path), **environment) == reason
    assert native.library("fwht") is None
    assert examine()["machine"]["native code"] == f"not in use ({reason}); torch does its work, more slowly"
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(multiply(x, 12), x @ dense(12, 12, False))
    assert torch.equal(Constant(x, (OnColumns(Hadamard(12, 12)),)).stored(), multiply(x, 12))


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert fresh(monkeypatch, PATH="") == "no C++ compiler (c++, g++, clang++, or $CXX)"


def test_broken_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fwht.cpp").write_text("#error broken\n")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    reason = fresh(monkeypatch, DLQC_CACHE=str(tmp_path / "cache"))
    assert reason is not None
    assert "failed with 1: " in reason
    assert "broken" in reason
    monkeypatch.setattr(native, "SOURCES", tmp_path / "none")
    assert fresh(monkeypatch) == "the source fwht.cpp cannot be read: No such file or directory"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library that compiles in no time."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "fwht.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native, "SOURCES", tmp_path / "src")
    return tmp_path


def answer() -> int:
    found = native.library("fwht")
    assert found is not None
    return int(found.answer())


def test_a_cache_that_cannot_be_used(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tiny / "file"
    blocked.write_text("")
    assert fresh(monkeypatch, DLQC_CACHE=str(blocked)) is None  # no folder can be made here: a private one is used
    assert answer() == 42
    assert blocked.read_text() == ""


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_can_write_to(mode: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny / "cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    assert fresh(monkeypatch, DLQC_CACHE=str(tiny / "cache")) is None
    assert answer() == 42
    assert not list(folder.iterdir())
    folder.chmod(0o700)
    folder.parent.chmod(0o707)
    assert fresh(monkeypatch) is None
    assert not list(folder.iterdir())
    folder.parent.chmod(0o755)
    assert fresh(monkeypatch) is None
    (file,) = folder.iterdir()
    file.unlink()  # it is loaded here: writing into it would end this process
    file.write_bytes(b"planted")
    file.chmod(0o777)
    assert fresh(monkeypatch) is None  # not loaded, but built again
    assert answer() == 42


def test_a_full_disk(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tiny / "c++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *cache*) echo "No space left on device" >&2; exit 1;; *) exec c++ "$@";; esac\n'
    )
    script.chmod(0o755)
    assert fresh(monkeypatch, DLQC_CACHE=str(tiny / "cache"), CXX=str(script)) is None
    assert answer() == 42


def test_the_default_folders(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLQC_CACHE", raising=False)
    assert fresh(monkeypatch, XDG_CACHE_HOME=str(tiny / "xdg")) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fresh(monkeypatch, HOME=str(tiny / "home")) is None
    for folder in (tiny / "xdg" / "dlqc", tiny / "home" / ".cache" / "dlqc"):
        assert len(list((folder / "native").iterdir())) == 1


def _in_child(x: torch.Tensor, queue: "multiprocessing.SimpleQueue[bool]") -> None:
    fresh_one = torch.empty_like(x)
    queue.put(fwht.run(x, fresh_one, torch.float32, side(256)) and bool(torch.isfinite(fresh_one).all()))


def test_fork_after_use() -> None:
    x = torch.randn(2048, 256)
    assert fwht.run(x, torch.empty_like(x), torch.float32, side(256))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(x, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get()


MAIN = """
#include "fwht.cpp"
#include <cstdio>
int main() {
    const int64_t orders[][2] = {{1, 1}, {2, 1}, {12, 12}, {16, 1}, {48, 12}, {64, 1}};
    std::vector<int8_t> h(144, 1);
    std::vector<double> ones(2000, 1.0);
    for (auto& a : orders) for (auto& b : orders) for (int type = 0; type < 4; ++type) for (int64_t inner : {1, 3}) {
        const int64_t cols = 2 * a[0] * inner, rows = 3 * b[0], stride = cols + 1;
        const int64_t bytes = type == 3 ? 8 : type == 2 ? 4 : 2;
        std::vector<char> from(((rows - 1) * stride + cols) * bytes, 1), to(from.size());
        const Side row{a[0], a[1], inner, a[1] > 1 ? h.data() : nullptr, ones.data(), nullptr};
        const Side column{b[0], b[1], 1, b[1] > 1 ? h.data() : nullptr, nullptr, ones.data()};
        if (dlqc_fwht(from.data(), type, stride, to.data(), type, stride, rows, cols, &row, &column, type == 3, 2)) return 1;
    }
    {   // in parts, on two threads
        const int64_t rows = 2048, cols = 1040;
        std::vector<float> from(rows * cols, 1.0f), to(rows * cols);
        const Side row{16, 1, 1, nullptr, nullptr, nullptr}, column{2048, 1, 1, nullptr, nullptr, nullptr};
        if (dlqc_fwht(from.data(), 2, cols, to.data(), 2, cols, rows, cols, &row, &column, 0, 2)) return 1;
    }
    std::puts("clean");
}
"""


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(MAIN)
    compiler, _ = native._compiler()
    program = str(tmp_path / "program")
    command = [
        *compiler,
        "-std=c++17",
        "-O1",
        "-g",
        "-march=native",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
    ]
    command += ["-pthread", "-I", str(SOURCE.parent), "-o", program]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    if subprocess.run([*command, str(tmp_path / "empty.cpp")], capture_output=True).returncode:
        pytest.skip(f"the compiler has no {sanitizers} sanitizer")
    if subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"programs with the {sanitizers} sanitizer do not run here")
    subprocess.run([*command, str(tmp_path / "main.cpp")], check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "clean"), found.stderr[:3000]


def test_plain_c_interface() -> None:
    found = native.library("fwht")
    assert isinstance(found, ctypes.CDLL)
    assert found is native.library("fwht")


def test_fork_while_another_thread_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that holds the lock is not in the child."""
    started, ended = threading.Event(), threading.Event()

    def slow(*arguments: object) -> ctypes.CDLL:
        started.set()
        ended.wait(30)
        raise native._Unavailable("slow")

    monkeypatch.setattr(native, "_load", slow)
    monkeypatch.setattr(native, "_found", {})
    thread = threading.Thread(target=native.library, args=("fwht",))
    thread.start()
    started.wait()
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends it if it waits
        ended.set()
        os._exit(0 if native.library("fwht") is None else 1)
    try:
        assert os.waitpid(child, 0)[1] == 0
    finally:
        ended.set()
        thread.join()


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "build-old", tmp_path / "build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "part.s").write_text("")
    os.utime(old, (0, 0))
    native._sweep(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
