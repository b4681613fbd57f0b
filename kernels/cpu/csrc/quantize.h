// Dynamic quantization of activations, as dlqc.formats.activation defines it, into the order that the products read.
//
//   scale = max|x| / top over a token or a group of it (1 where that is 0), code = round(x / scale), ties to even
//
// Tokens come in tiles of up to kRows; a tile of r tokens is [K/4][r][4] codes, so that the four codes that meet one step of
// the weight are one word, and the words of all tokens of the tile are neighbours.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"
#include "tiles.h"
#include "weights.h"

namespace {

template <class T>
DLQC_INLINE T larger(const T& a, const T& b) {
    return a > b ? a : b;
}

template <class T>
DLQC_INLINE int32_t largest(T v) {
    int32_t found = v[0];
    for (int i = 1; i < kLanes; ++i) found = std::max(found, v[i]);
    return found;
}

constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest whole number in the lowest bits

// x / scale + kRound. A product with 1 / scale rounds to the same whole number unless it is near a tie: there it is divided.
DLQC_INLINE Floats steps(const Floats& x, const Floats& scale, [[maybe_unused]] const Floats& inverse) {
#if DLQC_ISA == 2
    const Floats quotient = x * inverse, moved = quotient + kRound;
    const __m512 past = _mm512_abs_ps((__m512)(quotient - (moved - kRound)));
    if (__builtin_expect(_mm512_cmp_ps_mask(past, _mm512_set1_ps(0.4999f), _CMP_GT_OQ) == 0, 1)) return moved;
#endif
    return x / scale + kRound;
}

// One token: codes [Kp] (0 past K), a scale for each `group` features, a sum of codes for each `segment`. Both lengths are
// multiples of kBlock, or Kp.
template <class X>
void quantize_row(const X* x, int64_t k, int64_t padded, int bits, int64_t group, int64_t segment, int8_t* codes,
                  float* scales, int32_t* sums) {
    const int32_t top = (1 << (bits - 1)) - 1;
    for (int64_t start = 0; start < padded; start += group) {
        const int64_t end = std::min(start + group, padded);
        Ints most{};
        for (int64_t i = start; i < end; i += kLanes) most = larger<Ints>(most, (Ints)values(x, i, k) & 0x7fffffff);
        const int32_t bits_of_most = largest(most);
        float scale;
        std::memcpy(&scale, &bits_of_most, 4);
        scale /= static_cast<float>(top);
        scale = scale == 0.0f ? 1.0f : std::max(scale, 0x1p-126f);
        scales[start / group] = scale;
        const Floats divisor = all(scale), inverse = all(1.0f / scale);
        for (int64_t first = start; first < end;) {  // to the end of a segment, or of the group
            const int64_t last = std::min(end, first / segment * segment + segment);
            Ints sum{};
            for (int64_t i = first; i < last; i += kLanes) {
                Ints code = (Ints)steps(values(x, i, k), divisor, inverse) - 0x4b400000;
                code = code > top ? all(top) : code;
                code = code < -top ? all(-top) : code;
                store_bytes(codes + i, code);
                sum += code;
            }
            int32_t& kept = sums[first / segment];
            kept = first % segment == 0 ? total(sum) : kept + total(sum);
            first = last;
        }
    }
}

// Rows of codes, `pitch` bytes apart, as a tile.
inline void interleave(const int8_t* codes, int64_t pitch, int64_t padded, int64_t rows, int8_t* tile) {
    for (int64_t k = 0; k < padded; k += kStep)
        for (int64_t r = 0; r < rows; ++r, tile += kStep) std::memcpy(tile, codes + r * pitch + k, kStep);
}

}  // namespace
