// The integer product of a tile of tokens with a panel: int32 sums over runs of whole blocks of input features.
//
// Three instruction sets, one contract: kRows tokens at most and kWide strips at a time,
//
//   sums[r][s][lane] += Σ_k spread code [k][strip s][lane] · code of token r [k]
//
// exactly (modulo 2^32, so only the end result must fit).
#pragma once

#include "tiles.h"
#include "vectors.h"
#include "weights.h"

namespace {

// What is fetched into the second-level cache while a product runs; the first has few places for what is awaited.
struct Soon {
    bool weight = false;           // the stored weight, kAhead bytes on
    const int8_t* tokens = nullptr;  // or as many codes of tokens as are used, from here on
};

constexpr int64_t kAhead = 16384;  // time for memory to answer

#if DLQC_ISA == 2

// gcc moves accumulators of the intrinsic between registers and memory; of this it keeps 24 in registers.
DLQC_INLINE void dot(Ints& sum, const Bytes& codes, const int8_t* word) {
    __m512i s = (__m512i)sum;
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(s) : "v"((__m512i)codes), "m"(*reinterpret_cast<const int32_t(*)>(word)));
    sum = (Ints)s;
}

template <int kBits, int kR, int kS>
DLQC_INLINE void multiply(const uint8_t* w, int64_t pitch, const Soon& soon, const int8_t* a, int64_t blocks, Ints (&total)[kR][kS]) {
    Ints sums[kR][kS];  // copies, or gcc keeps them in memory, too, and stores them with every block
    each<kR, kS>([&](int r, int s) DLQC_LAMBDA { sums[r][s] = total[r][s]; });
    for (int64_t b = 0; b < blocks; ++b, w += pitch, a += kBlock * kR) {
        if (soon.weight)
            for (int i = 0; i < kS * kBits; ++i) __builtin_prefetch(w + kAhead + 64 * i, 0, 2);
        else if (soon.tokens)
            for (int i = 0; i < kBlock * kR / 64; ++i) __builtin_prefetch(soon.tokens + b * kBlock * kR + 64 * i, 0, 2);
#pragma GCC unroll 8
        for (int j = 0; j < kSteps; ++j)
#pragma GCC unroll 3
            for (int s = 0; s < kS; ++s) {
                const Bytes codes = spread<kBits>(w + s * kBits * 64, j);
#pragma GCC unroll 8
                for (int r = 0; r < kR; ++r) dot(sums[r][s], codes, a + (j * kR + r) * kStep);
            }
    }
    each<kR, kS>([&](int r, int s) DLQC_LAMBDA { total[r][s] = sums[r][s]; });
}

#else

#if DLQC_ISA == 1

// vpmaddubsw adds two products in 16 bits and saturates. |code · activation| ≤ 15 · 127 for up to 4 bits, so eight products
// fit there. 8-bit codes are taken as code - 128, and go as |code - 128| · ±activation ≤ 128 · 127: two fit.
template <bool kWhole>
DLQC_INLINE __m256i pairs(__m256i codes, __m256i word) {
    if constexpr (!kWhole) return _mm256_maddubs_epi16(codes, word);
    const __m256i centred = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(word, centred));
}

// Four steps of one strip, spread out, for kR tokens.
template <bool kWhole, int kR>
DLQC_INLINE void dots(const Bytes (&codes)[4], const int8_t* a, Ints (&sums)[kR][1]) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
        __m256i half[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                __m256i c;
                std::memcpy(&c, reinterpret_cast<const uint8_t*>(&codes[j]) + 32 * h, 32);
                const __m256i two = pairs<kWhole>(c, _mm256_set1_epi32(load<int32_t>(a + (j * kR + r) * kStep)));
                if constexpr (kWhole)
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(two, ones));
                else
                    sum = _mm256_add_epi16(sum, two);
            }
            half[h] = kWhole ? sum : _mm256_madd_epi16(sum, ones);
        }
        Ints total;
        std::memcpy(&total, half, 64);
        sums[r][0] = (Ints)((Words)sums[r][0] + (Words)total);
    }
}

#else

// 8-bit codes are taken as code - 128 here too, so that both have the same zero points.
template <bool kWhole, int kR>
DLQC_INLINE void dots(const Bytes (&codes)[4], const int8_t* a, Ints (&sums)[kR][1]) {
    for (int r = 0; r < kR; ++r)
        for (int j = 0; j < 4; ++j) {
            const int8_t* const word = a + (j * kR + r) * kStep;
            for (int lane = 0; lane < kLanes; ++lane) {
                int32_t sum = 0;
                for (int i = 0; i < kStep; ++i)
                    sum += (static_cast<int32_t>(codes[j][lane * kStep + i]) - (kWhole ? 128 : 0)) * word[i];
                sums[r][0][lane] = static_cast<int32_t>(static_cast<uint32_t>(sums[r][0][lane]) + static_cast<uint32_t>(sum));
            }
        }
}

#endif

template <int kBits, int kR, int kS>
DLQC_INLINE void multiply(const uint8_t* w, int64_t pitch, const Soon&, const int8_t* a, int64_t blocks, Ints (&sums)[kR][kS]) {
    for (int64_t b = 0; b < blocks; ++b, w += pitch)
#pragma GCC unroll 2
        for (int j = 0; j < kSteps; j += 4, a += 4 * kStep * kR) {
            const Bytes codes[4] = {spread<kBits>(w, j), spread<kBits>(w, j + 1), spread<kBits>(w, j + 2),
                                    spread<kBits>(w, j + 3)};
            dots<kBits == 8>(codes, a, sums);
        }
}

#endif

// What codes are relative to inside the product: an instruction set that takes 8-bit codes as signed has them 128 lower.
DLQC_INLINE int32_t lowered(int bits) { return DLQC_ISA != 2 && bits == 8 ? 128 : 0; }

}  // namespace
