// y = x · Ŵᵀ + bias in float32, for weights in any form that `fill.h` knows: activations are not rounded.
//
// A slice of a panel is made float32 in the first-level cache, and meets all tokens of a chunk, a tile at a time. The order of
// all sums depends on shapes alone.
#include <atomic>

#include "fill.h"
#include "threads.h"
#include "tiles.h"
#include "weights.h"

namespace {

constexpr int64_t kChunk = 256;  // tokens whose results wait in the second-level cache
constexpr int64_t kSlice = 64;   // input features of a panel at a time: 12 KiB

struct Call {
    Weight w;
    Place place;
    Tokens x;
    Result y;
    int64_t padded;
    float* values;  // of all tokens, in tiles: [K][token of the tile]
    int64_t results_at, bytes;
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

void one_panel(const Call& call, int64_t panel, int64_t chunk, char* space) {
    const int64_t start = chunk * kChunk, end = std::min(start + kChunk, call.x.count);
    float* const slice = reinterpret_cast<float*>(space);
    float* const results = reinterpret_cast<float*>(space + call.results_at);
    std::memset(results, 0, 4 * (end - start) * kPanel);
    for (int64_t from = 0; from < call.padded; from += kSlice) {
        const int64_t to = std::min(from + kSlice, call.padded);
        fill(call.w, call.place, panel, from, to, slice);
        for (int64_t token = start; token < end; token += kRows)
            for_rows(std::min<int64_t>(kRows, end - token), [&](auto rows) {
                multiply<rows()>(slice, call.values + token * call.padded + from * rows(), to - from,
                                 results + (token - start) * kPanel);
            });
    }
    for (int64_t token = start; token < end; token += kRows)
        finish(call.w, call.y, token, std::min<int64_t>(kRows, end - token), panel, results + (token - start) * kPanel, nullptr);
}

template <class X>
void take_row(const Call& call, const X* x, int64_t rows, float* to) {
    for (int64_t k = 0; k < call.padded; k += kLanes) {
        const Floats found = values(x, k, call.w.k);
        for (int i = 0; i < kLanes; ++i) to[(k + i) * rows] = found[i];
    }
}

void take_tile(const Call& call, int64_t tile) {
    const int64_t token = tile * kRows, rows = std::min<int64_t>(kRows, call.x.count - token);
    for (int64_t r = 0; r < rows; ++r) {
        float* const to = call.values + token * call.padded + r;
        const int64_t at = (token + r) * call.x.stride;
        if (call.x.type == kFloat32)
            take_row(call, static_cast<const float*>(call.x.x) + at, rows, to);
        else
            take_row(call, static_cast<const uint16_t*>(call.x.x) + at, rows, to);
    }
}

thread_local Scratch of_call, of_thread;

}  // namespace

extern "C" {

int dlqc_isa() { return DLQC_ISA; }

void dlqc_arrange(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* to) { arrange(codes, n, k, bits, to); }

// x [m, k] and y [m, n] of type 0 (float32) or 1 (bfloat16), rows `*_stride` elements apart.
// Returns 0, or 1 if there is no memory (then y is not written).
int dlqc_linear16(const Weight* weight, const void* x, int type, int64_t m, int64_t x_stride, void* y, int64_t y_stride,
                  int threads, Team team) {
    if (m <= 0 || weight->n <= 0) return 0;
    Call call{*weight, Place(*weight), {x, type, m, x_stride}, {y, type, y_stride}, 0, nullptr, 0, 0};
    call.padded = call.place.blocks * kBlock;
    if (call.place.groups == 1) call.w.group = call.padded;
    call.values = static_cast<float*>(of_call.get(rounded(4 * m * call.padded)));
    call.results_at = rounded(4 * kSlice * kPanel);
    call.bytes = call.results_at + rounded(4 * std::min(m, kChunk) * kPanel);
    if (!call.values || !of_thread.get(call.bytes)) return 1;

    const int64_t tiles = (m + kRows - 1) / kRows, chunks = (m + kChunk - 1) / kChunk;
    std::atomic<int64_t> next{0};
    auto take = [&] {
        for (int64_t tile; (tile = next.fetch_add(1)) < tiles;) take_tile(call, tile);
    };
    in_threads(static_cast<int>(std::min<int64_t>(threads, m * call.padded >> 17)), team, take);
    next = 0;
    auto multiply = [&] {
        char* const space = static_cast<char*>(of_thread.get(call.bytes));
        if (!space) return;
        for (int64_t task; (task = next.fetch_add(1)) < call.place.panels * chunks;)
            one_panel(call, task / chunks, task % chunks, space);
    };
    in_threads(static_cast<int>(std::min<int64_t>(threads, m * call.padded * call.place.panels * kPanel >> 17)), team, multiply);
    return 0;
}

}  // extern "C"
