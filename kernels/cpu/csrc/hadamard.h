// A row times a block Hadamard matrix, in place: every n = k · 2^p neighbours times H/√n, H = H_k ⊗ H_2^p.
//
// H_2^p is Sylvester's: butterflies, first those inside vectors of sixteen, then between vectors, three levels each time that the
// row is walked through. H_k is given as a matrix, and multiplied as one. In float32; the scale comes first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "vectors.h"

extern "C" {

struct Rotation {
    int64_t block;      // n; 0 for none
    int64_t order;      // k; 1 without a matrix
    const float* core;  // [k, k], transposed already if H is to be; null for k = 1
};

}  // extern "C"

namespace {

#if DLQC_ISA == 2
constexpr int kCoreWide = 2;  // vectors that meet four columns of H_k at a time: as many sums as there are registers for
#else
constexpr int kCoreWide = 1;
#endif

// Whether `rotate` can do it to rows of k numbers. A matrix H_k needs whole vectors between its rows.
inline bool fits(const Rotation& by, int64_t k) {
    if (!by.block) return true;
    if (by.block < 1 || by.order < 1 || k % by.block || by.block % by.order) return false;
    const int64_t power = by.block / by.order;
    return !(power & (power - 1)) && (by.order == 1 || (by.core && by.order % 4 == 0 && power >= kLanes));
}

// Numbers that `rotate` needs room for beside the row.
inline int64_t space_of(const Rotation& by) { return by.block && by.order > 1 ? by.order * kCoreWide * kLanes : 0; }

template <int kDistance, std::size_t... I>
DLQC_INLINE Floats with_neighbour(const Floats& v, std::index_sequence<I...>) {
    constexpr Floats sign = {(I & kDistance ? -1.0f : 1.0f)...};
#if defined(__clang__) || __GNUC__ >= 12
    return v * sign + __builtin_shufflevector(v, v, (static_cast<int>(I) ^ kDistance)...);
#else
    return v * sign + __builtin_shuffle(v, Ints{(static_cast<int>(I) ^ kDistance)...});
#endif
}

// Blocks of `width` neighbours, a power of two up to kLanes, inside a vector.
DLQC_INLINE Floats inside(Floats v, int64_t width) {
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    if (width > 1) v = with_neighbour<1>(v, lanes);
    if (width > 2) v = with_neighbour<2>(v, lanes);
    if (width > 4) v = with_neighbour<4>(v, lanes);
    if (width > 8) v = with_neighbour<8>(v, lanes);
    return v;
}

template <int kLevels>
DLQC_INLINE void butterflies(float* x, int64_t pitch) {
    constexpr int kCount = 1 << kLevels;
    Floats v[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) v[i] = load<Floats>(x + i * pitch);
#pragma GCC unroll 3
    for (int level = 0; level < kLevels; ++level) {
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
            if (i >> level & 1) continue;
            const Floats low = v[i], high = v[i | 1 << level];
            v[i] = low + high, v[i | 1 << level] = low - high;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) store(x + i * pitch, v[i]);
}

// The levels of H_2^p between vectors, on `size` = 2^p numbers.
inline void between(float* x, int64_t size) {
    for (int64_t pitch = kLanes; pitch < size;) {
        const int levels = size >= 8 * pitch ? 3 : size == 4 * pitch ? 2 : 1;
        for (int64_t start = 0; start < size; start += pitch << levels)
            for (int64_t i = start; i < start + pitch; i += kLanes) {
                if (levels == 1) butterflies<1>(x + i, pitch);
                if (levels == 2) butterflies<2>(x + i, pitch);
                if (levels == 3) butterflies<3>(x + i, pitch);
            }
        pitch <<= levels;
    }
}

// [k, pitch] times h along k, kWide vectors of columns from x on: out[a] = Σ_c h[c, a] x[c].
template <int kWide>
DLQC_INLINE void multiply_core(float* x, int64_t pitch, const Rotation& by, float* space) {
    for (int64_t c = 0; c < by.order; ++c)
        for (int s = 0; s < kWide; ++s)
            store(space + (c * kWide + s) * kLanes, load<Floats>(x + c * pitch + s * kLanes));
    for (int64_t a = 0; a < by.order; a += 4) {
        Floats sum[4][kWide] = {};
        for (int64_t c = 0; c < by.order; ++c) {
            const float* const h = by.core + c * by.order + a;
#pragma GCC unroll 2
            for (int s = 0; s < kWide; ++s) {
                const Floats v = load<Floats>(space + (c * kWide + s) * kLanes);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) sum[i][s] += v * h[i];
            }
        }
        for (int i = 0; i < 4; ++i)
            for (int s = 0; s < kWide; ++s) store(x + (a + i) * pitch + s * kLanes, sum[i][s]);
    }
}

// A row of k numbers with room for a multiple of kLanes, zeros past k.
inline void rotate(const Rotation& by, int64_t k, float* row, float* space) {
    const int64_t power = by.block / by.order;
    const Floats scale = all(static_cast<float>(1 / std::sqrt(static_cast<double>(by.block))));
    for (int64_t i = 0; i < k; i += kLanes) store(row + i, inside(load<Floats>(row + i) * scale, power));
    for (int64_t i = 0; i < k && power > kLanes; i += power) between(row + i, power);
    for (int64_t i = 0; i < k && by.order > 1; i += by.block) {
        int64_t j = 0;
        for (; j + kCoreWide * kLanes <= power; j += kCoreWide * kLanes) multiply_core<kCoreWide>(row + i + j, power, by, space);
        for (; j < power; j += kLanes) multiply_core<1>(row + i + j, power, by, space);
    }
}

}  // namespace
