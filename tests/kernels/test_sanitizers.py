"""The native kernels under AddressSanitizer and UBSan: every width, regime and edge on arrays of the exact size."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dlqc import native
from dlqc.kernels.cpu import build

MAIN = """
#include <cstdio>
#include <vector>
#include "prepare.h"
extern "C" {
int dlqc_linear8(const Weight*, const void*, int, int64_t, int64_t, void*, int64_t, int, int64_t,
                 const Before*, const void*, int64_t, int, void*);
int dlqc_linear16(const Weight*, const void*, int, int64_t, int64_t, void*, int, int64_t, int, void*);
struct Matrix { const void* rows; int type; int64_t n, k, pitch; const float* bias; };
int dlqc_head_argmax(const Matrix*, const void*, int, int64_t, int64_t, int64_t, int64_t*, double*, int, void*);
struct Stored {
    void* numbers;
    int64_t batch, head, token, batches, heads, tokens, width;
    int32_t type, bits, keys, shared;
    int64_t group;
    uint8_t* codes;
    uint16_t *steps, *centers;
};
int dlqc_cache(const Stored*, int, int, void*);
}
template <class X>
bool choose(int64_t n, int64_t k, int64_t m, int type) {
    const int64_t pitch = k + 3;
    std::vector<X> x((m - 1) * pitch + k, X(1)), rows((n - 1) * pitch + k, X(1));
    std::vector<float> bias(n, 1.0f);
    bias[n / 2] = 0.0f / 0.0f * float(m == 3), bias[0] = m == 8 ? 1.0f / 0.0f : 0.0f;
    std::vector<int64_t> tokens(m);
    std::vector<double> confidence(m);
    const Matrix w{rows.data(), type, n, k, pitch, m % 2 ? bias.data() : nullptr};
    return dlqc_head_argmax(&w, x.data(), type, m, pitch, n - 1, tokens.data(), confidence.data(), 2, nullptr) == 0;
}
template <class X>
bool store(int type, int bits, int keys, int shared, int64_t tokens, int64_t width) {
    const int64_t group = keys ? std::min<int64_t>(32, tokens) : width, length = keys ? tokens : width;
    const int64_t groups = (length + group - 1) / group, rows = 3 * (keys ? width : tokens);
    std::vector<X> x(3 * tokens * width, X(3));
    std::vector<float> y(x.size());
    std::vector<uint8_t> codes(rows * ((groups * group * bits + 31) / 32) * 4);
    std::vector<uint16_t> steps(rows * groups), centers(rows * (shared ? 1 : groups), 0x3c00);
    Stored s{x.data(), 3 * tokens * width, tokens * width, width, 1, 3, tokens, width, type, bits, keys, shared, group,
             codes.data(), steps.data(), centers.data()};
    if (dlqc_cache(&s, 0, 2, nullptr)) return false;
    s.numbers = y.data();
    return dlqc_cache(&s, 1, 2, nullptr) == 0;
}
template <class X>
bool run(const Weight& w, int type, int64_t m, int64_t act_group) {
    const int64_t pitch_x = w.k + 3, pitch_y = w.n + 1;
    std::vector<X> x((m - 1) * pitch_x + w.k, X(1)), y((m - 1) * pitch_y + w.n);
    std::vector<X> other(x), added(y);
    std::vector<float> gain(w.k, 1.0f);
    // Five calls: nothing before, each kind, and a rotation alone; rotations with a core where the width has room for one.
    const std::vector<float> core(144, 1.0f);
    const Rotation none{}, power{w.k & -w.k, 1, nullptr}, paley{192, 12, core.data()};
    for (int call = 0; w.kind == kIntegers && call < 5; ++call) {
        const int kind = call % 4;
        const Rotation rotation = kind == 3 && w.k % 192 == 0 ? paley : kind == 3 || call == 4 ? power : none;
        Before before{kind, 1e-5f, gain.data(), kind == 2 ? gain.data() : nullptr, other.data(), pitch_x, rotation};
        if (dlqc_linear8(&w, x.data(), type, m, pitch_x, y.data(), pitch_y, 8, act_group, call ? &before : nullptr,
                         call % 2 ? added.data() : nullptr, pitch_y, 2, nullptr)) return false;
    }
    return dlqc_linear16(&w, x.data(), type, m, pitch_x, y.data(), type, pitch_y, 2, nullptr) == 0;
}
int main() {
    const int64_t shapes[][4] = {{1, 1, 0, 0}, {50, 70, 0, 0}, {97, 384, 64, 128}, {48, 1056, 32, 0}, {33, 640, 320, 64}};
    for (auto& s : shapes) for (int bits : {2, 3, 4, 8}) for (int64_t m : {1, 3, 8, 13, 261}) {
        if (m == 261 && s[1] > 400 && (s[1] > 700 || bits != 4)) continue;
        const int64_t n = s[0], k = s[1], group = s[2] ? s[2] : k, groups = (k + group - 1) / group;
        const int64_t panels = (n + 47) / 48, blocks = (k + 31) / 32, parameters = panels * groups * 48;
        std::vector<uint8_t> plain(n * k, 1), codes(panels * blocks * 192 * bits), zeros(parameters, 1);
        arrange(plain.data(), n, k, bits, codes.data());
        std::vector<float> scales(parameters, 1.0f), bias(n, 1.0f), table(std::max<int64_t>(16, parameters << (bits & 7)), 1.0f);
        std::vector<uint16_t> halves(parameters, 0x3f80);
        std::vector<int32_t> first(groups + 1);
        const int planes = bits == 2 ? 2 : 3;
        for (int64_t g = 0; g <= groups; ++g) first[g] = static_cast<int32_t>(planes * g);
        std::vector<float> rows(panels * planes * groups * 48, 1.0f), columns(planes * groups * group, 1.0f);
        for (int kind = 0; kind < 4; ++kind) {
            if (kind == kPlanes ? bits > 3 : kind && bits > 4) continue;
            Weight w{n, k, group, codes.data(), scales.data(), zeros.data(), bias.data(), bits, 0, kind, table.data(),
                     rows.data(), columns.data(), first.data()};
            if (!run<float>(w, 0, m, s[3])) return 1;
            w.scales = halves.data(), w.half_scales = 1, w.zeros = m % 2 ? zeros.data() : nullptr, w.bias = nullptr;
            if (!run<uint16_t>(w, 1, m, 0)) return 1;
        }
    }
    for (int64_t n : {1, 47, 100, 6200}) for (int64_t k : {1, 33, 130}) for (int64_t m : {1, 3, 8, 261}) {
        if (n > 200 && (k > 40 || m > 10)) continue;
        if (!choose<float>(n, k, m, 0) || !choose<uint16_t>(n, k, m, 1)) return 1;
    }
    for (int bits : {2, 3, 4, 8}) for (int64_t tokens : {1, 31, 33, 70}) for (int64_t width : {1, 16, 33})
    for (int kind : {0, 1, 2})
        if (!store<float>(0, bits, kind > 0, kind > 1, tokens, width) ||
            !store<uint16_t>(1, bits, kind > 0, kind > 1, tokens, width)) return 1;
    std::puts("clean");
}
"""


@pytest.mark.skipif(build.unavailable("linear8") is not None, reason=f"{build.unavailable('linear8')}")
def test_sanitizers(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(MAIN)
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    program = str(tmp_path / "program")
    flags = "-std=c++17 -O0 -march=native -ffp-contract=fast -w -pthread -fsanitize=address,undefined"
    command = [
        *native._compiler()[0],
        *flags.split(),
        "-fno-sanitize-recover=all",
        "-I",
        str(build.SOURCES),
        "-o",
        program,
    ]
    if subprocess.run([*command, str(tmp_path / "empty.cpp")], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    if subprocess.run([program], capture_output=True).returncode:
        pytest.skip("programs with sanitizers do not run here")
    # Sources have entries of the same names: those of all but one are made local.
    sources = [str(tmp_path / "main.cpp"), str(build.SOURCES / "linear16.cpp")]
    for name in ("linear8", "head", "cache"):
        others = "".join(f"#define {entry} {entry}_{name}\n" for entry in ("dlqc_isa", "dlqc_arrange", "dlqc_bind"))
        (tmp_path / f"{name}.cpp").write_text(f'{others}#include "{build.SOURCES}/{name}.cpp"\n')
        sources.append(str(tmp_path / f"{name}.cpp"))
    subprocess.run([*command, *sources], check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "clean"), found.stderr[:3000]
