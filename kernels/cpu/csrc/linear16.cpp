// y = x · Ŵᵀ + bias in float32, for weights in any form that `fill.h` knows: activations are not rounded.
//
// A slice of a panel is made float32 in the first-level cache, and meets all tokens of a chunk, a tile at a time. The order of
// all sums depends on shapes alone. Integers meet tokens in bfloat16 as what they are, where the processor multiplies such
// (halves16.h).
#include "fill.h"
#include "halves16.h"
#include "product16.h"
#include "threads.h"

namespace {

template <class S>
struct Call {
    Weight w;
    Place place;
    S side;
    Result y;
    int64_t results_at, bytes;
};

void product(const Call<Side>& call, int64_t panel, int64_t start, int64_t end, char* space, float* results) {
    const auto make = [&](int64_t from, int64_t to, float* slice) { fill(call.w, call.place, panel, from, to, slice); };
    multiply_panel(call.side, make, start, end, reinterpret_cast<float*>(space), results);
}

#ifdef DLQC_HALVES
void product(const Call<Pairs>& call, int64_t panel, int64_t start, int64_t end, char* space, float* results) {
    const Table table(call.w.bits);
    multiply_panel(call.w, call.place, table, call.side, panel, start, end, reinterpret_cast<uint32_t*>(space), results);
}
#endif

template <class S>
void one_panel(const Call<S>& call, int64_t panel, int64_t chunk, char* space) {
    const int64_t start = chunk * kChunk, end = std::min(start + kChunk, call.side.x.count);
    float* const results = reinterpret_cast<float*>(space + call.results_at);
    product(call, panel, start, end, space, results);
    for (int64_t token = start; token < end; token += kRows)
        finish(call.w, call.y, token, std::min<int64_t>(kRows, end - token), panel, results + (token - start) * kPanel, nullptr);
}

thread_local Scratch of_call, of_thread;

template <class S>
int run(Call<S>& call, int threads, Team team) {
    const int64_t m = call.side.x.count, padded = call.side.padded;
    call.results_at = rounded(4 * kSlice * kPanel);
    call.bytes = call.results_at + rounded(4 * std::min(m, kChunk) * kPanel);
    if (!of_thread.get(call.bytes)) return 1;

    const int64_t tiles = (m + kRows - 1) / kRows, chunks = (m + kChunk - 1) / kChunk;
    const auto room = [&] { return of_thread.get(call.bytes); };
    const auto enough = [&](int64_t products) { return static_cast<int>(std::min<int64_t>(threads, products >> 17)); };
    share(enough(m * padded), team, tiles, room, [&](int64_t tile, char*) { call.side.take(call.w.k, tile); });
    share(enough(m * padded * call.place.panels * kPanel), team, call.place.panels * chunks, room,
          [&](int64_t task, char* space) { one_panel(call, task / chunks, task % chunks, space); });
    return 0;
}

}  // namespace

extern "C" {

int dlqc_isa() { return DLQC_ISA; }

// Whether tokens in bfloat16 are multiplied as that.
int dlqc_halves() {
#ifdef DLQC_HALVES
    return 1;
#else
    return 0;
#endif
}

void dlqc_arrange(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* to) { arrange(codes, n, k, bits, to); }

// x [m, k] and y [m, n], each of type 0 (float32) or 1 (bfloat16), rows `*_stride` elements apart.
// Returns 0, or 1 if there is no memory (then y is not written).
int dlqc_linear16(const Weight* weight, const void* x, int type, int64_t m, int64_t x_stride, void* y, int y_type,
                  int64_t y_stride, int threads, Team team) {
    if (m <= 0 || weight->n <= 0) return 0;
    const Tokens tokens{x, type, m, x_stride};
    const Result result{y, y_type, y_stride};
    const Place place(*weight);
    const int64_t padded = place.blocks * kBlock;
    Weight w = *weight;
    if (place.groups == 1) w.group = padded;
#ifdef DLQC_HALVES
    static_assert(2 * kHalfSlice == 4 * kSlice, "both kinds of slice have the same room");
    if (w.kind == kIntegers && type == kBfloat16) {
        const int64_t sums_at = rounded(2 * m * padded), sums = w.zeros ? 4 * m * place.blocks : 0;
        char* const shared = static_cast<char*>(of_call.get(sums_at + sums));
        if (!shared) return 1;
        float* const of_blocks = w.zeros ? reinterpret_cast<float*>(shared + sums_at) : nullptr;
        Call<Pairs> call{w, place, {tokens, padded, reinterpret_cast<uint32_t*>(shared), of_blocks}, result, 0, 0};
        return run(call, threads, team);
    }
#endif
    float* const values = static_cast<float*>(of_call.get(rounded(4 * m * padded)));
    if (!values) return 1;
    Call<Side> call{w, place, {tokens, padded, values}, result, 0, 0};
    return run(call, threads, team);
}

}  // extern "C"
