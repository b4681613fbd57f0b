// What comes before the quantizer, done to a row while it is in the cache: a norm, or silu(gate) · up; then a rotation.
//
//   kRmsNorm     x / √(mean x² + eps) · gain
//   kLayerNorm   (x - mean) / √(variance + eps) · gain + shift
//   kSiluTimes   x / (1 + e^-x) · other
//   rotation     of the result, by a block Hadamard matrix (hadamard.h)
//
// In float32, sixteen sums at a time. The result is not rounded to the dtype of x in between.
#pragma once

#include <cmath>
#include <cstdint>

#include "hadamard.h"
#include "tiles.h"
#include "vectors.h"

extern "C" {

enum : int32_t { kAsIs = 0, kRmsNorm = 1, kLayerNorm = 2, kSiluTimes = 3 };

struct Before {
    int32_t kind;
    float eps;
    const float* gain;   // [K] or null: ones
    const float* shift;  // [K] or null: zeros
    const void* other;   // kSiluTimes: rows like those of x, `other_stride` elements apart
    int64_t other_stride;
    Rotation rotation;
};

}  // extern "C"

namespace {

// e^x within 2 units in the last place for |x| <= 87, and held there outside: e^x = 2^n · e^r, |r| <= ln 2 / 2, by its series.
DLQC_INLINE Floats exponential(Floats x) {
    constexpr float kNear = 12582912.0f;  // 1.5 · 2^23
    x = x > 87.0f ? all(87.0f) : x;
    x = x < -87.0f ? all(-87.0f) : x;
    const Floats n = (x * 1.44269504f + kNear) - kNear;
    const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first exact in n of these sizes
    Floats sum = all(1.0f / 5040);
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + term;
    return sum * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

inline float total(const Floats& v) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

template <class X>
void norm(const Before& before, const X* x, int64_t k, float* row) {
    float mean = 0;
    if (before.kind == kLayerNorm) {
        Floats sum{};
        for (int64_t i = 0; i < k; i += kLanes) sum += values(x, i, k);
        mean = total(sum) / static_cast<float>(k);
    }
    Floats squares{};
    for (int64_t i = 0; i < k; i += kLanes) {
        Floats v = values(x, i, k);
        if (mean != 0) {
            v -= mean;
            for (int64_t past = k - i; past < kLanes; ++past) v[past] = 0;
        }
        store(row + i, v);
        squares += v * v;
    }
    const Floats factor = all(1.0f / std::sqrt(total(squares) / static_cast<float>(k) + before.eps));
    for (int64_t i = 0; i < k; i += kLanes) {
        Floats v = load<Floats>(row + i) * factor;
        if (before.gain) v *= values(before.gain, i, k);
        if (before.shift) v += values(before.shift, i, k);
        store(row + i, v);
    }
}

// One row of K values to `row`, which has room for a multiple of kLanes; past K it holds zeros. `space` is for the rotation.
template <class X>
void prepare(const Before& before, const X* x, const X* other, int64_t k, float* row, float* space) {
    if (before.kind == kAsIs) {
        for (int64_t i = 0; i < k; i += kLanes) store(row + i, values(x, i, k));
    } else if (before.kind == kSiluTimes) {
        for (int64_t i = 0; i < k; i += kLanes) {
            const Floats gate = values(x, i, k);
            store(row + i, gate / (exponential(-gate) + 1.0f) * values(other, i, k));
        }
    } else {
        norm(before, x, k, row);
    }
    if (before.rotation.block) rotate(before.rotation, k, row, space);
}

}  // namespace
