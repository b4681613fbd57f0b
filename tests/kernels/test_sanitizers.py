"""The native products under AddressSanitizer and UBSan: every width, regime and edge on arrays of the exact size."""

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
int dlqc_linear16(const Weight*, const void*, int, int64_t, int64_t, void*, int64_t, int, void*);
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
    return dlqc_linear16(&w, x.data(), type, m, pitch_x, y.data(), pitch_y, 2, nullptr) == 0;
}
int main() {
    const int64_t shapes[][4] = {{1, 1, 0, 0}, {50, 70, 0, 0}, {97, 384, 64, 128}, {48, 1056, 32, 0}, {33, 640, 320, 64}};
    for (auto& s : shapes) for (int bits : {2, 3, 4, 8}) for (int64_t m : {1, 3, 8, 13, 261}) {
        if (m == 261 && s[1] > 700) continue;
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
            w.scales = halves.data(), w.half_scales = 1, w.zeros = nullptr, w.bias = nullptr;
            if (!run<uint16_t>(w, 1, m, 0)) return 1;
        }
    }
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
    # Both sources have an entry of the same names: those of the first are made local.
    (tmp_path / "eight.cpp").write_text(
        '#define dlqc_isa isa8\n#define dlqc_arrange arrange8\n#include "linear8.cpp"\n'
    )
    sources = [str(tmp_path / "main.cpp"), str(tmp_path / "eight.cpp"), str(build.SOURCES / "linear16.cpp")]
    subprocess.run([*command, *sources], check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "clean"), found.stderr[:3000]
