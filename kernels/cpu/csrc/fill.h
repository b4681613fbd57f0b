// Weights as float32: a slice of a panel, [input feature][48 columns], from whatever form it is stored in.
#pragma once

#include "tiles.h"
#include "vectors.h"
#include "weights.h"

namespace {

// Calls work(out, code of sixteen columns, input feature) for the slice from..to of a panel; start(k, strip) before each block.
template <int kBits, class Start, class Value>
DLQC_INLINE void fill(const Weight& w, const Place& place, int64_t panel, int64_t from, int64_t to, float* slice,
                      const Start& start, const Value& value) {
    const uint8_t* block = w.codes + place.codes_at(panel, kBits) + from / kBlock * kStrips * kBits * 64;
    for (int64_t k = from; k < to; k += kBlock)
        for (int64_t s = 0; s < kStrips; ++s, block += kBits * 64) {
            auto held = start(k, s * kStrip);
            float* out = slice + (k - from) * kPanel + s * kStrip;
            for (int i = 0; i < kBits; ++i) __builtin_prefetch(block + 4096 + 64 * i);
            for (int j = 0; j < kSteps; ++j) {
                const Words codes = (Words)spread<kBits>(block, j);
#pragma GCC unroll 4
                for (int i = 0; i < kStep; ++i, out += kPanel)
                    store(out, value(held, (Ints)((codes >> (8 * i)) & 0xffu), k + j * kStep + i));
            }
        }
}

DLQC_INLINE Floats look_up(const float* table, const Ints& code) {
#if DLQC_ISA == 2
    return (Floats)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(table));
#else
    Floats found;
    for (int lane = 0; lane < kLanes; ++lane) found[lane] = table[code[lane]];
    return found;
#endif
}

struct Parameters {
    Floats scale;
    Ints zero;
};

// (code - zero) · scale
template <int kBits>
void fill_integers(const Weight& w, const Place& place, int64_t panel, int64_t from, int64_t to, float* slice) {
    const auto start = [&](int64_t k, int64_t column) DLQC_LAMBDA {
        const int64_t at = place.scales_at(panel) + k / w.group * kPanel + column;
        return Parameters{load_scales(w.scales, w.half_scales, at),
                          w.zeros ? load_bytes(w.zeros + at) : all(1 << (kBits - 1))};
    };
    fill<kBits>(w, place, panel, from, to, slice, start, [](const Parameters& p, const Ints& code, int64_t) DLQC_LAMBDA {
        return to_floats(code - p.zero) * p.scale;
    });
}

// table[code] · scale
template <int kBits>
void fill_table(const Weight& w, const Place& place, int64_t panel, int64_t from, int64_t to, float* slice) {
    const auto start = [&](int64_t k, int64_t column) DLQC_LAMBDA {
        return load_scales(w.scales, w.half_scales, place.scales_at(panel) + k / w.group * kPanel + column);
    };
    fill<kBits>(w, place, panel, from, to, slice, start, [&](const Floats& scale, const Ints& code, int64_t) DLQC_LAMBDA {
        return look_up(w.table, code) * scale;
    });
}

template <int kBits>
struct Entries {
    Floats entry[1 << kBits];
};

// table of the column and group [code]: a choice between halves for each bit
template <int kBits>
void fill_tables(const Weight& w, const Place& place, int64_t panel, int64_t from, int64_t to, float* slice) {
    constexpr int kCount = 1 << kBits;
    const auto start = [&](int64_t k, int64_t column) DLQC_LAMBDA {
        const float* const table = w.table + (place.scales_at(panel) + k / w.group * kPanel) * kCount + column;
        Entries<kBits> held;
#pragma GCC unroll 16
        for (int e = 0; e < kCount; ++e) held.entry[e] = load<Floats>(table + e * kPanel);
        return held;
    };
    fill<kBits>(w, place, panel, from, to, slice, start, [](const Entries<kBits>& held, const Ints& code, int64_t) DLQC_LAMBDA {
        Floats left[kCount / 2];
        const Ints odd = (code & 1) != 0;
#pragma GCC unroll 8
        for (int e = 0; e < kCount / 2; ++e) left[e] = odd ? held.entry[2 * e + 1] : held.entry[2 * e];
#pragma GCC unroll 3
        for (int bit = 1; bit < kBits; ++bit) {
            const Ints set = (code & (1 << bit)) != 0;
#pragma GCC unroll 4
            for (int e = 0; e < kCount >> (bit + 1); ++e) left[e] = set ? left[2 * e + 1] : left[2 * e];
        }
        return left[0];
    });
}

struct Signs {
    Floats rows[3];
    const float* columns;
    int64_t size;
    int planes;
};

// Σ ±rows[plane][column] · columns[plane][input feature], + where the plane's bit of the code is set
template <int kBits>
void fill_planes(const Weight& w, const Place& place, int64_t panel, int64_t from, int64_t to, float* slice) {
    const int64_t total = w.first[place.groups], size = place.groups == 1 ? w.k : w.group;
    const auto start = [&](int64_t k, int64_t column) DLQC_LAMBDA {
        const int64_t group = k / w.group, plane = w.first[group];
        Signs held{{}, w.columns + (plane - group) * size, size, w.first[group + 1] - w.first[group]};
        for (int p = 0; p < held.planes; ++p)
            held.rows[p] = load<Floats>(w.rows + (panel * total + plane + p) * kPanel + column);
        return held;
    };
    fill<kBits>(w, place, panel, from, to, slice, start, [&](const Signs& held, const Ints& code, int64_t k) DLQC_LAMBDA {
        Floats sum{};
        if (k >= w.k) return sum;
        for (int p = 0; p < held.planes; ++p) {
            const Floats size = held.rows[p] * held.columns[p * held.size + k];
            sum += (code & (1 << p)) != 0 ? size : -size;
        }
        return sum;
    });
}

inline void fill(const Weight& w, const Place& place, int64_t panel, int64_t from, int64_t to, float* slice) {
    for_bits(w.bits, [&](auto bits) {
        if (w.kind == kIntegers) return fill_integers<bits()>(w, place, panel, from, to, slice);
        if constexpr (bits() <= 4) {
            if (w.kind == kTable) return fill_table<bits()>(w, place, panel, from, to, slice);
            if (w.kind == kTables) return fill_tables<bits()>(w, place, panel, from, to, slice);
            if constexpr (bits() <= 3)
                if (w.kind == kPlanes) return fill_planes<bits()>(w, place, panel, from, to, slice);
        }
    });
}

}  // namespace
