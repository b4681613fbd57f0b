// Products in float32: tokens in tiles by slices of a panel, whatever form the weight is stored in.
#pragma once

#include "tiles.h"
#include "weights.h"

namespace {

constexpr int64_t kChunk = 256;  // tokens whose results wait in the second-level cache
constexpr int64_t kSlice = 64;   // input features of a panel at a time: 12 KiB

// One side of a product as it lies while the panels of the other pass.
struct Side {
    Tokens x;
    int64_t padded;  // input features, in whole blocks
    float* values;   // of all tokens, in tiles: [K][token of the tile]

    // Puts one tile of tokens there.
    void take(int64_t k, int64_t tile) const {
        const int64_t token = tile * kRows, rows = std::min<int64_t>(kRows, x.count - token);
        for (int64_t r = 0; r < rows; ++r) {
            float* const to = values + token * padded + r;
            const int64_t at = (token + r) * x.stride;
            if (x.type == kFloat32)
                take_row(static_cast<const float*>(x.x) + at, k, rows, to);
            else
                take_row(static_cast<const uint16_t*>(x.x) + at, k, rows, to);
        }
    }

  private:
    template <class X>
    void take_row(const X* row, int64_t k, int64_t rows, float* to) const {
        for (int64_t i = 0; i < padded; i += kLanes) {
            const Floats found = ::values(row, i, k);
            for (int lane = 0; lane < kLanes; ++lane) to[(i + lane) * rows] = found[lane];
        }
    }
};

template <int kR>
__attribute__((noinline)) void multiply(const float* slice, const float* x, int64_t count, float* results) {
    for (int strip = 0; strip < kStrips; strip += kWide) {
        Floats sum[kR][kWide];
        float* const kept = results + strip * kStrip;
        const float* w = slice + strip * kStrip;
        const float* a = x;
        each<kR, kWide>([&](int r, int s) DLQC_LAMBDA { sum[r][s] = load<Floats>(kept + r * kPanel + s * kStrip); });
        for (int64_t k = 0; k < count; ++k, w += kPanel, a += kR) {
            Floats column[kWide];
#pragma GCC unroll 3
            for (int s = 0; s < kWide; ++s) column[s] = load<Floats>(w + s * kStrip);
            each<kR, kWide>([&](int r, int s) DLQC_LAMBDA { sum[r][s] += column[s] * a[r]; });
        }
        each<kR, kWide>([&](int r, int s) DLQC_LAMBDA { store(kept + r * kPanel + s * kStrip, sum[r][s]); });
    }
}

// Of tokens start..end: their products with one panel, [token][48]. fill(from, to, slice) makes input features from..to of the panel
// float32, [feature][48]; `slice` has room for kSlice of them.
template <class Fill>
void multiply_panel(const Side& side, const Fill& fill, int64_t start, int64_t end, float* slice, float* results) {
    std::memset(results, 0, 4 * (end - start) * kPanel);
    for (int64_t from = 0; from < side.padded; from += kSlice) {
        const int64_t to = std::min(from + kSlice, side.padded);
        fill(from, to, slice);
        for (int64_t token = start; token < end; token += kRows)
            for_rows(std::min<int64_t>(kRows, end - token), [&](auto rows) {
                multiply<rows()>(slice, side.values + token * side.padded + from * rows(), to - from,
                                 results + (token - start) * kPanel);
            });
    }
}

}  // namespace
