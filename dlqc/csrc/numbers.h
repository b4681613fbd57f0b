// Rows of bfloat16, float16, float32 or float64: read into float32 or float64, and rounded back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

enum Type : int { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct Bfloat16 {
    uint16_t bits;
    static inline float wide(Bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
    static inline Bfloat16 narrow(float x) {  // to nearest, ties to even
        const uint32_t b = float_to_bits(x);
        const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
        return {static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
    }
};

// Without conversion instructions, so that it compiles and vectorizes anywhere: the exponent is moved by exact products
// with powers of two, and the rounding is that of an addition to a number whose last place is the half's last place.
struct Float16 {
    uint16_t bits;
    static inline float wide(Float16 x) {
        const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
        const uint32_t finite = float_to_bits(bits_to_float(rest << 13) * 0x1p112f);
        return bits_to_float(sign | (rest >= 0x7c00u ? 0x7f800000u | (rest << 13) : finite));
    }
    static inline Float16 narrow(float x) {
        const uint32_t b = float_to_bits(x), sign = b & 0x80000000u, doubled = b + b;
        float base = bits_to_float(b & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
        const uint32_t bias = std::max(doubled & 0xff000000u, 0x71000000u);
        base = bits_to_float((bias >> 1) + 0x07800000u) + base;
        const uint32_t sum = float_to_bits(base);
        const uint32_t finite = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
        return {static_cast<uint16_t>((sign >> 16) | (doubled > 0xff000000u ? 0x7e00u : finite))};
    }
};

struct Float32 {
    float value;
    static inline float wide(Float32 x) { return x.value; }
    static inline Float32 narrow(float x) { return {x}; }
};

struct Float64 {
    double value;
    static inline double wide(Float64 x) { return x.value; }
    static inline Float64 narrow(double x) { return {x}; }
};

// to[j] = Σ_m from_m[j] · factor_m · scale[j] for `terms` rows, 1 or a multiple of 4; a null scale is a vector of ones.
template <class S, class T>
void load_as(const S* from, int64_t stride, const T* factors, int64_t terms, int64_t count, const T* __restrict scale,
             T* __restrict to) {
    if (terms == 1) {
        const T factor = factors[0];
        const S* __restrict const a = from;
        if (scale)
            for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(S::wide(a[j])) * (factor * scale[j]);
        else
            for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(S::wide(a[j])) * factor;
        return;
    }
    for (int64_t m = 0; m < terms; m += 4) {
        const S *__restrict const a = from + m * stride, *__restrict const b = a + stride;
        const S *__restrict const c = b + stride, *__restrict const d = c + stride;
        const T fa = factors[m], fb = factors[m + 1], fc = factors[m + 2], fd = factors[m + 3];
        const auto four = [&](int64_t j) {
            return (static_cast<T>(S::wide(a[j])) * fa + static_cast<T>(S::wide(b[j])) * fb) +
                   (static_cast<T>(S::wide(c[j])) * fc + static_cast<T>(S::wide(d[j])) * fd);
        };
        if (m == 0)
            for (int64_t j = 0; j < count; ++j) to[j] = four(j);
        else
            for (int64_t j = 0; j < count; ++j) to[j] += four(j);
    }
    if (scale)
        for (int64_t j = 0; j < count; ++j) to[j] *= scale[j];
}

template <class T>
void load(const void* from, int type, int64_t at, int64_t stride, const T* factors, int64_t terms, int64_t count,
          const T* scale, T* to) {
    const auto as = [&](auto first) { load_as(first + at, stride, factors, terms, count, scale, to); };
    if (type == kBfloat16) as(static_cast<const Bfloat16*>(from));
    if (type == kFloat16) as(static_cast<const Float16*>(from));
    if (type == kFloat32) as(static_cast<const Float32*>(from));
    if (type == kFloat64) as(static_cast<const Float64*>(from));
}

// to[j] = from[j] · factor · scale[j], rounded.
template <class S, class T>
void store_as(const T* __restrict from, int64_t count, T factor, const T* __restrict scale, S* __restrict to) {
    using Narrow = decltype(S::wide(S{}));  // 16-bit types are rounded from float32, as torch does it
    if (scale)
        for (int64_t j = 0; j < count; ++j) to[j] = S::narrow(static_cast<Narrow>(from[j] * (factor * scale[j])));
    else if (factor != T(1))
        for (int64_t j = 0; j < count; ++j) to[j] = S::narrow(static_cast<Narrow>(from[j] * factor));
    else
        for (int64_t j = 0; j < count; ++j) to[j] = S::narrow(static_cast<Narrow>(from[j]));
}

template <class T>
void store(const T* from, int64_t count, T factor, const T* scale, void* to, int type, int64_t at) {
    if (type == kBfloat16) store_as(from, count, factor, scale, static_cast<Bfloat16*>(to) + at);
    if (type == kFloat16) store_as(from, count, factor, scale, static_cast<Float16*>(to) + at);
    if (type == kFloat32) store_as(from, count, factor, scale, static_cast<Float32*>(to) + at);
    if (type == kFloat64) store_as(from, count, factor, scale, static_cast<Float64*>(to) + at);
}

}  // namespace
