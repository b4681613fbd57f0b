// The inner loops of rounding a weight to integers: columns one after the other against the errors of those before
// (dlqc/rounding/gptq.py), and the search for the scale of a group (dlqc/formats/integer.py). Both in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "memory.h"
#include "numbers.h"
#include "parallel.h"

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kTile = 4;  // 32 registers hold a tile of kTile rows by kWide vectors
#elif defined(__AVX__)
constexpr int kBytes = 32, kTile = 2;
#else
constexpr int kBytes = 16, kTile = 2;
#endif

constexpr int kLanes = kBytes / 4, kWide = 4, kChunk = kLanes * kWide;
constexpr int64_t kSearchTask = 1 << 15;  // entries that are worth fetching a task for

typedef float V __attribute__((vector_size(kBytes), may_alias));
typedef float Loose __attribute__((vector_size(kBytes), may_alias, aligned(4)));  // anywhere in memory

inline V spread(float x) { return x - V{}; }
inline V least(V a, V b) { return a < b ? a : b; }
inline V most(V a, V b) { return a > b ? a : b; }

// To nearest, ties to even, for |x| < 2^22: the last place of the sum is that of the integers.
inline V nearest(V x) {
    const V magic = spread(0x1.8p23f);
    return (x + magic) - magic;
}

// kChunk numbers of a row, `count` of which are there; the others are `rest`.
struct Row {
    V v[kWide];
    static Row load(const float* from, int64_t count, float rest) {
        Row row;
        if (count == kChunk) {
            for (int i = 0; i < kWide; ++i) row.v[i] = *reinterpret_cast<const Loose*>(from + i * kLanes);
        } else {
            alignas(kBytes) float padded[kChunk];
            for (int i = 0; i < kChunk; ++i) padded[i] = i < count ? from[i] : rest;
            std::memcpy(&row, padded, sizeof padded);
        }
        return row;
    }
    void store(float* to, int64_t count) const {
        if (count == kChunk) {
            for (int i = 0; i < kWide; ++i) *reinterpret_cast<Loose*>(to + i * kLanes) = v[i];
        } else {
            std::memcpy(to, v, count * sizeof(float));
        }
    }
};

}  // namespace

// A block of columns of the weight; all matrices are transposed, rows of `width` neighbours, `size` rows.
extern "C" struct Block {
    int64_t size, width;
    const float* target;   // t, but for the errors inside the block
    float* work;           // w on entry, w - ŵ on return
    uint8_t* codes;
    const float* near;     // [size, near_pitch], unit upper triangular: how errors of later rows enter earlier ones
    int64_t near_pitch;
    const float* scale;    // [groups, width]
    const float* zero;     // the same, or null
    const int64_t* group;  // [size], rows of `scale`
    float midpoint, top;   // zero point where `zero` is null; largest code
    const float* share;    // [size], weights of the squared residuals
    double* losses;        // [2, width], Σ share·(t - ŵ)² and Σ (w - ŵ)², added to
};

namespace {

// Rounds kChunk columns of the transposed matrices from the last row to the first; `errors` holds [size, kChunk].
void round_chunk(const Block& b, int64_t left, float* errors) {
    const int64_t count = std::min<int64_t>(kChunk, b.width - left);
    Row loss = Row::load(nullptr, 0, 0), spent = loss;
    for (int64_t stop = b.size; stop > 0; stop -= kTile) {
        const int64_t start = std::max<int64_t>(0, stop - kTile), rows = stop - start;
        Row aim[kTile];
        for (int64_t r = 0; r < rows; ++r) aim[r] = Row::load(b.target + (start + r) * b.width + left, count, 0);
        const float* const near = b.near + start * b.near_pitch;
        if (rows == kTile) {
            for (int64_t j = stop; j < b.size; ++j) {
                const Row& error = *reinterpret_cast<const Row*>(errors + j * kChunk);
#pragma GCC unroll 4
                for (int r = 0; r < kTile; ++r) {
                    const float factor = near[r * b.near_pitch + j];
#pragma GCC unroll 4
                    for (int i = 0; i < kWide; ++i) aim[r].v[i] += factor * error.v[i];
                }
            }
        } else {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t j = stop; j < b.size; ++j)
                    for (int i = 0; i < kWide; ++i)
                        aim[r].v[i] += near[r * b.near_pitch + j] * reinterpret_cast<const Row*>(errors + j * kChunk)->v[i];
        }
        for (int64_t r = rows - 1; r >= 0; --r) {
            const int64_t row = start + r;
            for (int64_t j = row + 1; j < stop; ++j)
                for (int i = 0; i < kWide; ++i)
                    aim[r].v[i] += near[r * b.near_pitch + j] * reinterpret_cast<const Row*>(errors + j * kChunk)->v[i];
            const int64_t at = b.group[row] * b.width + left;
            const Row scale = Row::load(b.scale + at, count, 1), old = Row::load(b.work + row * b.width + left, count, 0);
            const Row zero = b.zero ? Row::load(b.zero + at, count, 0) : Row::load(nullptr, 0, b.midpoint);
            Row error, code;
            const V share = spread(b.share[row]);
            for (int i = 0; i < kWide; ++i) {
                const V low = -zero.v[i], high = b.top - zero.v[i];
                const V level = nearest(least(most(aim[r].v[i] / scale.v[i], low), high));
                const V residual = aim[r].v[i] - level * scale.v[i];
                error.v[i] = old.v[i] - level * scale.v[i];
                loss.v[i] += share * (residual * residual);
                spent.v[i] += error.v[i] * error.v[i];
                code.v[i] = level + zero.v[i];
            }
            std::memcpy(errors + row * kChunk, &error, sizeof error);
            error.store(b.work + row * b.width + left, count);
            alignas(kBytes) float codes[kChunk];
            std::memcpy(codes, &code, sizeof code);
            uint8_t* const to = b.codes + row * b.width + left;
            for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>(codes[i]));
        }
    }
    alignas(kBytes) float sums[2 * kChunk];
    std::memcpy(sums, &loss, sizeof loss);
    std::memcpy(sums + kChunk, &spent, sizeof spent);
    for (int64_t i = 0; i < count; ++i) {
        b.losses[left + i] += sums[i];
        b.losses[b.width + left + i] += sums[kChunk + i];
    }
}

float stored(float x, int type) {
    if (type == kBfloat16) return Bfloat16::wide(Bfloat16::narrow(x));
    if (type == kFloat16) return Float16::wide(Float16::narrow(x));
    return x;
}

}  // namespace

// Returns 0, or 1 where memory ran out (nothing is written then).
extern "C" int dlqc_round_block(const Block* block, int threads) {
    try {
        const int64_t chunks = (block->width + kChunk - 1) / kChunk;
        threads = static_cast<int>(std::clamp<int64_t>(chunks, 1, std::max(threads, 1)));
        std::vector<Buffer<float>> space;
        for (int i = 0; i < threads; ++i) {
            space.emplace_back(block->size * kChunk);
            if (!space.back().get()) return 1;
        }
        parallel(chunks, threads, [&](int64_t task, int thread) { round_chunk(*block, task * kChunk, space[thread].get()); });
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// Groups of a weight, [count, size] one below the other, whose ranges are to be shrunk.
extern "C" struct Search {
    int64_t count, size, cycle;  // group i takes root[i % cycle]
    const float *weight, *root;  // root [cycle, size], or null for ones
    const float *least, *most;   // [count], of the whole range
    const float *coarse, *fine;  // ratios that are tried, and steps around the best of them
    int64_t coarse_count, fine_count;
    int symmetric, type;         // type that scales are stored in
    float top, midpoint, floor;
    float *scale, *zero;         // [count], what is found
};

namespace {

struct Grid {
    float scale, zero;
};

Grid grid(const Search& s, float least, float most) {
    float span = 2 * std::max(-least, most);
    if (!s.symmetric) {
        least = std::min(least, 0.0f), most = std::max(most, 0.0f);
        span = most - least;
    }
    const float scale = span == 0 ? 1 : std::max(stored(span / s.top, s.type), s.floor);
    if (s.symmetric) return {scale, s.midpoint};
    return {scale, std::clamp(std::nearbyint(-least / scale), 0.0f, s.top)};
}

// scale · ‖root · (round(w/scale) - w/scale)‖
float error(const Search& s, const float* weight, const float* root, Grid at) {
    const float inverse = 1 / at.scale;
    const V low = spread(-at.zero), high = spread(s.top - at.zero);
    V sum = {};
    int64_t i = 0;
    for (; i + kLanes <= s.size; i += kLanes) {
        const V scaled = *reinterpret_cast<const Loose*>(weight + i) * inverse;
        V off = nearest(least(most(scaled, low), high)) - scaled;
        if (root) off *= *reinterpret_cast<const Loose*>(root + i);
        sum += off * off;
    }
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    for (; i < s.size; ++i) {
        const float scaled = weight[i] * inverse;
        const float off = (std::nearbyint(std::clamp(scaled, low[0], high[0])) - scaled) * (root ? root[i] : 1);
        total += off * off;
    }
    return std::sqrt(total) * at.scale;
}

void search(const Search& s, int64_t i) {
    const float* const weight = s.weight + i * s.size;
    const float* const root = s.root ? s.root + i % s.cycle * s.size : nullptr;
    Grid best = grid(s, s.least[i], s.most[i]);
    float ratio = 1, lowest = error(s, weight, root, best);
    const auto attempt = [&](float tried) {
        const Grid at = grid(s, s.least[i] * tried, s.most[i] * tried);
        const float found = error(s, weight, root, at);
        if (found < lowest) lowest = found, ratio = tried, best = at;
    };
    for (int64_t k = 0; k < s.coarse_count; ++k) attempt(s.coarse[k]);
    const float middle = ratio;
    for (int64_t k = 0; k < s.fine_count; ++k) attempt(std::min(middle + s.fine[k], 1.0f));
    s.scale[i] = best.scale, s.zero[i] = best.zero;
}

}  // namespace

extern "C" void dlqc_search(const Search* s, int threads) {
    const int64_t step = std::max<int64_t>(1, kSearchTask / std::max<int64_t>(s->size, 1));
    parallel((s->count + step - 1) / step, threads, [&](int64_t task, int) {
        for (int64_t i = task * step; i < std::min(s->count, (task + 1) * step); ++i) search(*s, i);
    });
}
