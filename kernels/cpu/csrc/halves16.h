// Integer weights by tokens in bfloat16, two products at a time (AVX512-BF16), where the compiler's target has it.
//
// Codes less 2^(b-1) are whole numbers of at most 8 bits, which bfloat16 holds: the products are exact, sums are float32, and scales
// are applied to the sum over a *run*, features with one scale. So nothing is rounded that the product in float32 does not round,
// but tokens below 2^-126, which the instruction takes for 0.
// What a zero point differs from 2^(b-1) by comes off with the sum of the run's tokens:
//
//   y += (Σ x·(code - 2^(b-1)) - (zero - 2^(b-1))·Σ x) · scale
#pragma once

#include "tiles.h"
#include "weights.h"

#if DLQC_ISA == 2 && defined(__AVX512BF16__)
#define DLQC_HALVES 1

namespace {

constexpr int64_t kHalfSlice = 128;  // input features of a panel at a time: 12 KiB

// Tokens as pairs of neighbouring features, and their sums where weights have zero points.
struct Pairs {
    Tokens x;
    int64_t padded;   // input features, in whole blocks
    uint32_t* pairs;  // of all tokens, in tiles: [K/2][token of the tile]
    float* sums;      // likewise [block][token of the tile], or null

    void take(int64_t k, int64_t tile) const {
        const int64_t token = tile * kRows, rows = std::min<int64_t>(kRows, x.count - token);
        for (int64_t r = 0; r < rows; ++r) {
            const uint16_t* const row = static_cast<const uint16_t*>(x.x) + (token + r) * x.stride;
            uint32_t* const to = pairs + token * (padded / 2) + r;
            int64_t i = 0;
            for (; i + 1 < k; i += 2) std::memcpy(to + i / 2 * rows, row + i, 4);
            if (i < k) to[i / 2 * rows] = row[i], i += 2;
            for (; i < padded; i += 2) to[i / 2 * rows] = 0;
            for (int64_t b = 0; sums && b < padded / kBlock; ++b)
                sums[token * (padded / kBlock) + b * rows + r] =
                    total(values(row, b * kBlock, k) + values(row, b * kBlock + kLanes, k));
        }
    }

  private:
    static float total(const Floats& v) { return _mm512_reduce_add_ps((__m512)v); }
};

// Numbers 0..15 less 2^(b-1) as bfloat16: their lower and their upper bytes.
struct Table {
    __m512i low, high;
    explicit Table(int bits) {
        alignas(16) uint8_t bytes[2][16];
        for (int code = 0; code < 16; ++code) {
            const uint16_t half = to_bfloat16(static_cast<float>(code - (1 << (bits - 1))));
            bytes[0][code] = half & 0xff, bytes[1][code] = half >> 8;
        }
        low = _mm512_broadcast_i32x4(load<__m128i>(bytes[0])), high = _mm512_broadcast_i32x4(load<__m128i>(bytes[1]));
    }
};

// Four features of sixteen columns, a byte each, as two words of two features.
template <int kBits>
DLQC_INLINE void widen(const Bytes& codes, [[maybe_unused]] const Table& table, Words (&words)[2]) {
    if constexpr (kBits == 8) {
        const Words v = (Words)codes;
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
            const Words first = (Words)to_floats((Ints)((v >> (16 * p)) & 0xffu) - 128);
            const Words second = (Words)to_floats((Ints)((v >> (16 * p + 8)) & 0xffu) - 128);
            words[p] = first >> 16 | (second & 0xffff0000u);
        }
    } else {
        const __m512i low = _mm512_shuffle_epi8(table.low, (__m512i)codes), high = _mm512_shuffle_epi8(table.high, (__m512i)codes);
        // Within 16 bytes: columns 0 and 1, then 2 and 3, both words of each.
        const __m512i front = _mm512_unpacklo_epi8(low, high), back = _mm512_unpackhi_epi8(low, high);
        const __m512i even = _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
        words[0] = (Words)_mm512_permutex2var_epi32(front, even, back);
        words[1] = (Words)_mm512_permutex2var_epi32(front, _mm512_add_epi32(even, _mm512_set1_epi32(1)), back);
    }
}

// Input features from..to of a panel as [pair][48 columns].
template <int kBits>
void fill(const Weight& w, const Place& place, const Table& table, int64_t panel, int64_t from, int64_t to, uint32_t* slice) {
    const uint8_t* block = w.codes + place.codes_at(panel, kBits) + from / kBlock * kStrips * kBits * 64;
    for (int64_t k = from; k < to; k += kBlock)
        for (int64_t s = 0; s < kStrips; ++s, block += kBits * 64) {
            uint32_t* out = slice + (k - from) / 2 * kPanel + s * kStrip;
            for (int i = 0; i < kBits; ++i) __builtin_prefetch(block + 4096 + 64 * i);
#pragma GCC unroll 8
            for (int j = 0; j < kSteps; ++j, out += 2 * kPanel) {
                Words words[2];
                widen<kBits>(spread<kBits>(block, j), table, words);
                store(out, words[0]), store(out + kPanel, words[1]);
            }
        }
}

// A run of a panel: `count` pairs of features, which begin at feature k.
struct Run {
    const uint32_t *slice, *pairs;
    int64_t count;
    const float* sums;  // of its blocks, or null
    int64_t scales_at;
};

template <int kR>
__attribute__((noinline)) void multiply(const Weight& w, const Run& run, float* results) {
    Floats acc[kR][kStrips]{};
    const uint32_t *column = run.slice, *a = run.pairs;
    for (int64_t i = 0; i < run.count; ++i, column += kPanel, a += kR) {
        Words of[kStrips];
#pragma GCC unroll 3
        for (int s = 0; s < kStrips; ++s) of[s] = load<Words>(column + s * kStrip);
        each<kR, kStrips>([&](int r, int s) DLQC_LAMBDA {
            acc[r][s] = (Floats)_mm512_dpbf16_ps((__m512)acc[r][s], (__m512bh)of[s],
                                                 (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(a[r])));
        });
    }
    Floats scale[kStrips];
#pragma GCC unroll 3
    for (int s = 0; s < kStrips; ++s) scale[s] = load_scales(w.scales, w.half_scales, run.scales_at + s * kStrip);
    if (run.sums) {
        float sum[kR]{};
        for (int64_t b = 0; b < 2 * run.count / kBlock; ++b)
            for (int r = 0; r < kR; ++r) sum[r] += run.sums[b * kR + r];
        Floats off[kStrips];
#pragma GCC unroll 3
        for (int s = 0; s < kStrips; ++s)
            off[s] = to_floats(load_bytes(w.zeros + run.scales_at + s * kStrip) - (1 << (w.bits - 1)));
        each<kR, kStrips>([&](int r, int s) DLQC_LAMBDA { acc[r][s] -= off[s] * sum[r]; });
    }
    each<kR, kStrips>([&](int r, int s) DLQC_LAMBDA {
        float* const kept = results + r * kPanel + s * kStrip;
        store(kept, load<Floats>(kept) + acc[r][s] * scale[s]);
    });
}

// Of tokens start..end: their products with one panel, [token][48].
inline void multiply_panel(const Weight& w, const Place& place, const Table& table, const Pairs& side, int64_t panel,
                           int64_t start, int64_t end, uint32_t* slice, float* results) {
    std::memset(results, 0, 4 * (end - start) * kPanel);
    for (int64_t from = 0; from < side.padded; from += kHalfSlice) {
        const int64_t to = std::min(from + kHalfSlice, side.padded);
        for_bits(w.bits, [&](auto bits) { fill<bits()>(w, place, table, panel, from, to, slice); });
        for (int64_t token = start; token < end; token += kRows)
            for_rows(std::min<int64_t>(kRows, end - token), [&](auto rows) {
                const uint32_t* const pairs = side.pairs + token * (side.padded / 2);
                const float* const sums = side.sums ? side.sums + token * (side.padded / kBlock) : nullptr;
                for (int64_t k = from, next; k < to; k = next) {
                    next = std::min(to, (k / w.group + 1) * w.group);
                    const Run run{slice + (k - from) / 2 * kPanel, pairs + k / 2 * rows(), (next - k) / 2,
                                  sums ? sums + k / kBlock * rows() : nullptr, place.scales_at(panel) + k / w.group * kPanel};
                    multiply<rows()>(w, run, results + (token - start) * kPanel);
                }
            });
    }
}

}  // namespace

#endif
