// Token and confidence of rows: argmax and softmax of x · Wᵀ + b, without the logits in memory.
//
// A panel of 48 logits lives as long as its tile is in the cache; what stays of it, for each row, is a `Found`. Sums run along
// (Milakov and Gimelshein, arXiv 1805.02867) in float64: the confidence of a row that is nearly sure is 1 less a small sum, and a
// sampler ranks by that. The vocabulary is cut into parts by shapes alone, and parts are joined in order.
#include <cmath>
#include <limits>

#include "prepare.h"
#include "product16.h"
#include "threads.h"
#include "torch_op.h"

extern "C" {

// The weight [N, K] as it is, rows `pitch` elements apart, and the bias.
struct Matrix {
    const void* rows;
    int type;
    int64_t n, k, pitch;
    const float* bias;  // or null
};

}  // extern "C"

namespace {

constexpr int64_t kMostParts = 128;
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef double Doubles __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));

// Input features from..to of 48 rows as [feature][48], turned sixteen by sixteen; zeros past either end.
template <class X>
void fill(const Matrix& w, int64_t panel, int64_t from, int64_t to, float* slice) {
    for (int64_t s = 0; s < kPanel; s += kStrip) {
        const int64_t first = panel * kPanel + s, rows = std::min<int64_t>(kStrip, w.n - first);
        const X* const matrix = static_cast<const X*>(w.rows) + first * w.pitch;
        for (int64_t k = from; k < to; k += kLanes) {
            Floats v[kLanes]{};
            for (int64_t i = 0; i < rows; ++i) {
                v[i] = values(matrix + i * w.pitch, k, w.k);
                __builtin_prefetch(matrix + i * w.pitch + k + 64, 0, 2);
            }
            transpose(v);
            float* const out = slice + (k - from) * kPanel + s;
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(out + i * kPanel, v[i]);
        }
    }
}

// What is known of one row after some logits.
struct Found {
    float top = kNone;     // the largest
    float best = kNone;    // the largest that may be chosen
    int64_t token = 0;     // whose it is; the first of equal ones
    double sum = 0;        // Σ e^(logit - top)
    int64_t nan = -1;      // the first NaN that may be chosen
    bool finite = true;    // no NaN and no infinity
};
static_assert(sizeof(Found) == 40, "as head.py says");

inline double total(const Doubles& v) {
    double sum = 0;
    for (int i = 0; i < 8; ++i) sum += v[i];
    return sum;
}

inline double shrunk(double sum, float from, float to) { return from == kNone ? 0 : sum * std::exp(static_cast<double>(from) - to); }

// 48 logits of a row, which begin at token `first`.
void meet(const Matrix& w, const float* logits, int64_t first, int64_t excluded, Found& found) {
    Floats v[kStrips];
    float allowed[kPanel];
    Floats high = all(found.top), most = all(kNone);
    Ints lanes, strange{};
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    for (int64_t s = 0; s < kStrips; ++s) {
        const int64_t at = first + s * kStrip;
        const Ints left = lanes < all(static_cast<int32_t>(std::min<int64_t>(w.n - at, kLanes)));
        v[s] = load<Floats>(logits + s * kStrip);
        if (w.bias && at < w.n) v[s] += values(w.bias, at, w.n);
        v[s] = left ? v[s] : all(kNone);
        const Floats may = lanes == all(static_cast<int32_t>(excluded - at)) ? all(kNone) : v[s];
        high = v[s] > high ? v[s] : high;
        most = may > most ? may : most;
        constexpr float kMost = std::numeric_limits<float>::max();
        strange |= (v[s] != v[s]) | (v[s] > kMost) | (left & (v[s] < -kMost));
        store(allowed + s * kStrip, may);
    }
    float top = high[0], best = most[0];
    for (int i = 1; i < kLanes; ++i) top = std::max(top, high[i]), best = std::max(best, most[i]);
    if (best > found.best) {
        found.best = best;
        found.token = first + (std::find(allowed, allowed + kPanel, best) - allowed);
    }
    int32_t odd = 0;
    for (int i = 0; i < kLanes; ++i) odd |= strange[i];
    if (odd) {
        found.finite = false;
        const float* const at = std::find_if(allowed, allowed + kPanel, [](float logit) { return logit != logit; });
        if (found.nan < 0 && at != allowed + kPanel) found.nan = first + (at - allowed);
    }
    if (!found.finite || top == kNone) return;
    if (top > found.top) found.sum = shrunk(found.sum, found.top, top), found.top = top;
    for (int64_t s = 0; s < kStrips; ++s) {
        const Floats past = v[s] - top;
        const Floats e = past < -87.0f ? Floats{} : exponential(past);
        Eight half[2];
        std::memcpy(half, &e, sizeof e);
        found.sum += total(__builtin_convertvector(half[0], Doubles) + __builtin_convertvector(half[1], Doubles));
    }
}

// What was found among earlier logits, and among later ones.
Found joined(const Found& a, const Found& b) {
    Found both = b.best > a.best ? b : a;
    both.top = std::max(a.top, b.top);
    both.sum = shrunk(a.sum, a.top, both.top) + shrunk(b.sum, b.top, both.top);
    both.nan = a.nan < 0 ? b.nan : a.nan;
    both.finite = a.finite && b.finite;
    return both;
}

struct Call {
    Matrix w;
    Side side;
    int64_t excluded, panels, parts;
    Found* found;  // [part][token]
    int64_t results_at, bytes;
};

void one_part(const Call& call, int64_t part, int64_t chunk, char* space) {
    const int64_t start = chunk * kChunk, end = std::min(start + kChunk, call.side.x.count);
    float* const results = reinterpret_cast<float*>(space + call.results_at);
    Found* const found = call.found + part * call.side.x.count;
    const int64_t last = (part + 1) * call.panels / call.parts;
    for (int64_t panel = part * call.panels / call.parts; panel < last; ++panel) {
        const auto make = [&](int64_t from, int64_t to, float* slice) {
            call.w.type == kFloat32 ? fill<float>(call.w, panel, from, to, slice) : fill<uint16_t>(call.w, panel, from, to, slice);
        };
        multiply_panel(call.side, make, start, end, reinterpret_cast<float*>(space), results);
        for (int64_t token = start; token < end; ++token)
            meet(call.w, results + (token - start) * kPanel, panel * kPanel, call.excluded, found[token]);
    }
}

thread_local Scratch of_call, of_thread;

}  // namespace

extern "C" {

int dlqc_isa() { return DLQC_ISA; }

// x [m, k] and the weight [n, k] of type 0 (float32) or 1 (bfloat16); gives tokens [m] and their probabilities. `excluded` is never
// chosen; -1: none.
// Returns 0, or 1 if there is no memory (then nothing is written).
int dlqc_head_argmax(const Matrix* weight, const void* x, int type, int64_t m, int64_t x_stride, int64_t excluded,
                     int64_t* tokens, double* confidence, int threads, Team team) {
    if (m <= 0) return 0;
    const int64_t padded = (weight->k + kBlock - 1) / kBlock * kBlock, panels = (weight->n + kPanel - 1) / kPanel;
    Call call{*weight, {{x, type, m, x_stride}, padded, nullptr}, excluded, panels, std::min(panels, kMostParts), nullptr, 0, 0};
    const int64_t found_at = rounded(4 * m * padded), count = call.parts * m;
    char* const shared = static_cast<char*>(of_call.get(found_at + static_cast<int64_t>(sizeof(Found)) * count));
    call.results_at = rounded(4 * kSlice * kPanel);
    call.bytes = call.results_at + rounded(4 * std::min(m, kChunk) * kPanel);
    if (!shared || !of_thread.get(call.bytes)) return 1;
    call.side.values = reinterpret_cast<float*>(shared);
    call.found = reinterpret_cast<Found*>(shared + found_at);
    std::uninitialized_fill_n(call.found, count, Found{});

    const int64_t tiles = (m + kRows - 1) / kRows, chunks = (m + kChunk - 1) / kChunk;
    const auto room = [&] { return of_thread.get(call.bytes); };
    const auto enough = [&](int64_t products) { return static_cast<int>(std::min<int64_t>(threads, products >> 17)); };
    share(enough(m * padded), team, tiles, room, [&](int64_t tile, char*) { call.side.take(call.w.k, tile); });
    share(enough(m * padded * panels * kPanel), team, call.parts * chunks, room,
          [&](int64_t task, char* space) { one_part(call, task / chunks, task % chunks, space); });
    for (int64_t i = 0; i < m; ++i) {
        Found all;
        for (int64_t part = 0; part < call.parts; ++part) all = joined(all, call.found[part * m + i]);
        tokens[i] = all.nan < 0 ? all.token : all.nan;
        const double chance = std::exp(static_cast<double>(all.best) - all.top) / all.sum;
        confidence[i] = all.finite ? chance : std::numeric_limits<double>::quiet_NaN();
    }
    return 0;
}

}  // extern "C"

namespace {

// False where native code has no way for the arguments.
bool choose(const Tensor& x, const Tensor& matrix, const Tensor& bias, int64_t excluded, Tensor* token, Tensor* confidence) {
    if (matrix.dim != 2 || !x.dim) return false;
    const int64_t n = matrix.size(0), k = matrix.size(1);
    int64_t count, pitch, bias_count, bias_pitch;
    if (n < 1 || k < 1 || n > std::numeric_limits<int32_t>::max() || excluded < -1 || excluded >= n) return false;
    if (matrix.type() < 0 || (k > 1 && matrix.stride(1) != 1) || !x.rows(k, &count, &pitch)) return false;
    if (bias && (bias.dim != 1 || bias.dtype != torch.float32 || !bias.rows(n, &bias_count, &bias_pitch))) return false;
    const Matrix w{matrix.data, matrix.type(), n, k, matrix.stride(0), bias.as<const float>()};
    *token = x.leading(torch.int64), *confidence = x.leading(torch.float64);
    if (dlqc_head_argmax(&w, x.data, x.type(), count, pitch, excluded, token->as<int64_t>(), confidence->as<double>(),
                         torch_threads(), torch_team))
        throw std::runtime_error("no memory to arrange " + x.shape() + " activations");
    return true;
}

}  // namespace

extern "C" {

void dlqc_op_head_argmax(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    Tensor x = args.tensor(), matrix = args.tensor(), bias = args.optional(), token, confidence;
    const int64_t excluded = args.integer();
    if (choose(x, matrix, bias, excluded, &token, &confidence)) {
        stack[0] = word(token.release()), stack[1] = word(confidence.release());
        return;
    }
    Refill words(stack);
    ((words << x << matrix).optional(bias) << excluded).call("dlqc_cpu::head_argmax_in_python");
}

}  // extern "C"
