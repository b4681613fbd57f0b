// Sixteen lanes, in the compiler's own vector types: the code that all instruction sets share is written with these.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// What this file was compiled for: DLQC_ISA is 2 for AVX512 with VNNI, 1 for AVX2 with FMA, 0 for anything else.
#if defined(DLQC_PORTABLE)
#define DLQC_ISA 0
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define DLQC_ISA 2
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define DLQC_ISA 1
#include <immintrin.h>
#else
#define DLQC_ISA 0
#endif

#define DLQC_INLINE inline __attribute__((always_inline))
#define DLQC_LAMBDA __attribute__((always_inline))

namespace {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint16_t Sixteen16 __attribute__((vector_size(32)));
typedef uint8_t Sixteen8 __attribute__((vector_size(16)));

constexpr int kLanes = 16;

template <class T>
DLQC_INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
DLQC_INLINE void store(void* to, const T& value) {
    std::memcpy(to, &value, sizeof value);
}

DLQC_INLINE Ints all(int32_t value) { return Ints{} + value; }
DLQC_INLINE Floats all(float value) { return Floats{} + value; }
DLQC_INLINE Floats to_floats(const Ints& value) { return __builtin_convertvector(value, Floats); }

// Sixteen zero points, a byte each.
DLQC_INLINE Ints load_bytes(const uint8_t* from) {
#if DLQC_ISA == 2
    return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from));
#else
    return __builtin_convertvector(load<Sixteen8>(from), Ints);
#endif
}

// Sixteen bfloat16: the upper halves of float32.
DLQC_INLINE Floats load_halves(const uint16_t* from) {
#if DLQC_ISA == 2
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#else
    return (Floats)(__builtin_convertvector(load<Sixteen16>(from), Words) << 16);
#endif
}

DLQC_INLINE Floats load_scales(const void* from, bool half, int64_t at) {
    if (half) return load_halves(static_cast<const uint16_t*>(from) + at);
    return load<Floats>(static_cast<const float*>(from) + at);
}

// The lowest bytes of sixteen numbers.
DLQC_INLINE void store_bytes(void* to, const Ints& value) {
#if DLQC_ISA == 2
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)value));
#else
    store(to, __builtin_convertvector(value, Sixteen8));
#endif
}

DLQC_INLINE int32_t total(const Ints& value) {
#if DLQC_ISA == 2
    return _mm512_reduce_add_epi32((__m512i)value);
#else
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += value[i];
    return sum;
#endif
}

// Blocks of `kStepOf` lanes off the diagonal change places.
template <int kStepOf>
DLQC_INLINE void exchange(Floats (&v)[kLanes]) {
    Ints low, high;
    for (int lane = 0; lane < kLanes; ++lane) {
        low[lane] = lane & kStepOf ? lane - kStepOf + kLanes : lane;
        high[lane] = lane & kStepOf ? lane + kLanes : lane + kStepOf;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & kStepOf) continue;
        const Floats a = v[i], b = v[i + kStepOf];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + kStepOf] = __builtin_shuffle(a, b, high);
    }
}

// Sixteen rows become sixteen columns.
DLQC_INLINE void transpose(Floats (&v)[kLanes]) { exchange<8>(v), exchange<4>(v), exchange<2>(v), exchange<1>(v); }

inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace
