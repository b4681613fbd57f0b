// Tiles of tokens by strips: what both kinds of product walk through.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"
#include "weights.h"

namespace {

// Tokens of a tile and strips that are multiplied at a time: as many sums as there are registers for.
#if DLQC_ISA == 2
constexpr int kRows = 8, kWide = 3;
#else
constexpr int kRows = 4, kWide = 1;
#endif

enum : int { kFloat32 = 0, kBfloat16 = 1 };

struct Tokens {
    const void* x;
    int type;
    int64_t count, stride;  // of rows, in elements
};

struct Result {
    void* y;
    int type;
    int64_t stride;
    const void* added = nullptr;  // rows like those of y, or null
    int64_t added_stride = 0;
};

inline int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Calls work(r, s) for a tile of constant size, unrolled: accumulators stay in registers.
template <int kR, int kS, class F>
DLQC_INLINE void each(const F& work) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 3
        for (int s = 0; s < kS; ++s) work(r, s);
}

// Calls work(number of rows), a constant where it is called.
template <class F>
DLQC_INLINE void for_rows(int64_t rows, const F& work) {
    switch (rows) {
        case 1: return work(std::integral_constant<int, 1>());
        case 2: return work(std::integral_constant<int, 2>());
        case 3: return work(std::integral_constant<int, 3>());
        case 4: return work(std::integral_constant<int, 4>());
#if DLQC_ISA == 2
        case 5: return work(std::integral_constant<int, 5>());
        case 6: return work(std::integral_constant<int, 6>());
        case 7: return work(std::integral_constant<int, 7>());
        case 8: return work(std::integral_constant<int, 8>());
#endif
    }
}

template <class F>
DLQC_INLINE void for_bits(int bits, const F& work) {
    if (bits == 2) work(std::integral_constant<int, 2>());
    if (bits == 3) work(std::integral_constant<int, 3>());
    if (bits == 4) work(std::integral_constant<int, 4>());
    if (bits == 8) work(std::integral_constant<int, 8>());
}

// Calls work(first strip) for the strips of a panel that have columns, kWide at a time.
template <class F>
DLQC_INLINE void for_strips(int64_t columns, const F& work) {
    for (int64_t strip = 0; strip < kStrips && strip * kStrip < columns; strip += kWide) work(strip);
}

// Sixteen values from x[at] on; 0 past the end.
DLQC_INLINE Floats values(const float* x, int64_t at, int64_t k) {
    if (at + kLanes <= k) return load<Floats>(x + at);
    Floats found{};
    for (int64_t i = at; i < k; ++i) found[i - at] = x[i];
    return found;
}

DLQC_INLINE Floats values(const uint16_t* x, int64_t at, int64_t k) {
    if (at + kLanes <= k) return load_halves(x + at);
    Floats found{};
    for (int64_t i = at; i < k; ++i) found[i - at] = from_bfloat16(x[i]);
    return found;
}

DLQC_INLINE float as_float(float value) { return value; }
DLQC_INLINE float as_float(uint16_t value) { return from_bfloat16(value); }

template <class Y>
void write(const Weight& w, const Result& result, int64_t token, int64_t rows, int64_t panel, const float* results,
           const float* scales) {
    const int64_t first = panel * kPanel, count = std::min(kPanel, w.n - first);
    for (int64_t r = 0; r < rows; ++r) {
        const float* const kept = results + r * kPanel;
        const float scale = scales ? scales[r] : 1.0f;
        float made[kPanel];
        for (int64_t i = 0; i < count; ++i) made[i] = kept[i] * scale;
        if (w.bias)
            for (int64_t i = 0; i < count; ++i) made[i] += w.bias[first + i];
        if (result.added) {
            const Y* const added = static_cast<const Y*>(result.added) + (token + r) * result.added_stride + first;
            for (int64_t i = 0; i < count; ++i) made[i] += as_float(added[i]);
        }
        Y* const y = static_cast<Y*>(result.y) + (token + r) * result.stride + first;
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (sizeof(Y) == 4)
                y[i] = made[i];
            else
                y[i] = to_bfloat16(made[i]);
        }
    }
}

// Writes a tile of results [rows][48], times a scale for each row if there are any, plus bias and what is to be added, to y from
// row `token` on.
inline void finish(const Weight& w, const Result& y, int64_t token, int64_t rows, int64_t panel, const float* results,
                   const float* scales) {
    if (y.type == kFloat32)
        write<float>(w, y, token, rows, panel, results, scales);
    else
        write<uint16_t>(w, y, token, rows, panel, results, scales);
}

}  // namespace
