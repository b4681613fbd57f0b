// Attention: y = softmax(scale · q kᵀ + mask) v, without a matrix of queries by keys in memory.
//
// A task is a batch row, a key head and some of the queries that read it. Keys come in blocks: a block is laid out for the
// product, [panel of 48 keys][feature][48], and its values side by side (as they come, rows may lie a power of two apart and share few
// lines of the cache). It meets all queries of the task, a tile of kRows at a time. Sums run along
// (Milakov and Gimelshein, arXiv 1805.02867): with m the largest score so far,
//
//   m' = max(m, scores),  p = e^(scores - m'),  sum = sum · e^(m - m') + Σ p,  y = y · e^(m - m') + p v
//
// All in float32. A key whose score is -inf weighs nothing; a query that sees no key gives zeros.
#include <atomic>
#include <limits>

#include "prepare.h"
#include "threads.h"
#include "tiles.h"
#include "torch_op.h"

extern "C" {

struct Heads {
    void* at;
    int64_t batch, head, row;  // steps in elements; features lie together
};

struct Attention {
    Heads q, k, v, y;
    int64_t batches, heads, key_heads, queries, keys, width;  // width: a multiple of 16
    float scale;
    int32_t type;     // of q, k, v and y: 0 float32, 1 bfloat16
    int32_t causal;   // query i sees keys 0..i
    int32_t masking;  // 0 none, 1 bytes (0: not seen), 2 float32 (added)
    const void* mask;
    int64_t mask_batch, mask_head, mask_row, mask_key;
};

}  // extern "C"

namespace {

constexpr int64_t kKeys = 8 * kPanel;  // of a block
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Task {
    int64_t batch, key_head, first, last;  // queries of all heads of the group, one head after the other
};

// One thread's memory.
struct Room {
    float* keys;     // [panel][width][48]
    float* values;   // [kKeys][width]
    float* queries;  // [kRows][width]
    float* scores;   // [kRows][kKeys]
    float* sums;     // [queries of the task][width]
    float* most;     // [queries of the task]
    float* weight;   // [queries of the task]
};

template <class X>
DLQC_INLINE const X* row_of(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
    return static_cast<const X*>(heads.at) + batch * heads.batch + head * heads.head + row * heads.row;
}

// Keys from..to as [panel][feature][48]; zeros past `to`.
template <class X>
void lay_out(const Attention& a, const Task& task, int64_t from, int64_t to, float* out) {
    for (int64_t key = from; key < to; key += kPanel, out += a.width * kPanel)
        for (int64_t s = 0; s < kPanel; s += kStrip)
            for (int64_t d = 0; d < a.width; d += kLanes) {
                Floats v[kLanes]{};
                for (int64_t i = 0; i < std::min<int64_t>(kLanes, to - key - s); ++i)
                    v[i] = values(row_of<X>(a.k, task.batch, task.key_head, key + s + i) + d, 0, kLanes);
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) store(out + (d + i) * kPanel + s, v[i]);
            }
}

template <int kR, int kS>
DLQC_INLINE void multiply(const float* queries, int64_t width, const float* keys, float* scores) {
    Floats acc[kR][kS]{};
    for (int64_t d = 0; d < width; ++d, keys += kPanel)
#pragma GCC unroll 3
        for (int s = 0; s < kS; ++s) {
            const Floats key = load<Floats>(keys + s * kStrip);
#pragma GCC unroll 8
            for (int r = 0; r < kR; ++r) acc[r][s] += key * queries[r * width + d];
        }
    each<kR, kS>([&](int r, int s) DLQC_LAMBDA { store(scores + r * kKeys + s * kStrip, acc[r][s]); });
}

template <int kR, int kS>
DLQC_INLINE void gather(const float* weights, int64_t count, const float* values, float* sums, int64_t width) {
    Floats acc[kR][kS];
    each<kR, kS>([&](int r, int s) DLQC_LAMBDA { acc[r][s] = load<Floats>(sums + r * width + s * kStrip); });
    for (int64_t key = 0; key < count; ++key, values += width)
#pragma GCC unroll 3
        for (int s = 0; s < kS; ++s) {
            const Floats value = load<Floats>(values + s * kStrip);
#pragma GCC unroll 8
            for (int r = 0; r < kR; ++r) acc[r][s] += value * weights[r * kKeys + key];
        }
    each<kR, kS>([&](int r, int s) DLQC_LAMBDA { store(sums + r * width + s * kStrip, acc[r][s]); });
}

// Puts the mask on the scores of one query with keys from..to, -inf where a key is not seen.
void hide(const Attention& a, int64_t batch, int64_t head, int64_t query, int64_t from, int64_t to, float* scores) {
    if (a.masking) {
        const int64_t at = batch * a.mask_batch + head * a.mask_head + query * a.mask_row;
        for (int64_t key = from; key < to; ++key) {
            const int64_t i = at + key * a.mask_key;
            if (a.masking == 2)
                scores[key - from] += static_cast<const float*>(a.mask)[i];
            else if (!static_cast<const uint8_t*>(a.mask)[i])
                scores[key - from] = kNone;
        }
    }
    if (a.causal)
        for (int64_t key = std::max(from, query + 1); key < to; ++key) scores[key - from] = kNone;
    for (int64_t i = to - from; i % kPanel; ++i) scores[i] = kNone;
}

// Scores [padded to whole strips] to weights against the largest so far; what earlier sums are to be multiplied by.
float weigh(float* scores, int64_t count, float& most, float& weight) {
    const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
    Floats high = all(most);
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats v = load<Floats>(scores + i);
        high = v > high ? v : high;
    }
    float next = most;
    for (int i = 0; i < kLanes; ++i) next = std::max(next, high[i]);
    Floats sum{};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats v = load<Floats>(scores + i);
        const Floats p = (v == kNone) | (v - next < -87.0f) ? Floats{} : exponential(v - next);  // 0, not nearly
        store(scores + i, p);
        sum += p;
    }
    const float kept = most == kNone ? 0.0f : exponential(all(most - next))[0];
    most = next, weight = weight * kept + total(sum);
    return kept;
}

inline void put(float* to, int64_t at, float value) { to[at] = value; }
inline void put(uint16_t* to, int64_t at, float value) { to[at] = to_bfloat16(value); }

template <class X>
void run(const Attention& a, const Task& task, const Room& room) {
    const int64_t count = task.last - task.first, group = a.heads / a.key_heads, strips = a.width / kStrip;
    std::fill_n(room.sums, count * a.width, 0.0f);
    std::fill_n(room.most, count, kNone);
    std::fill_n(room.weight, count, 0.0f);
    const auto head_of = [&](int64_t i) { return task.key_head * group + (task.first + i) / a.queries; };
    const auto query_of = [&](int64_t i) { return (task.first + i) % a.queries; };
    int64_t last_query = 0;
    for (int64_t i = 0; i < count; ++i) last_query = std::max(last_query, query_of(i));
    const int64_t seen = a.causal ? std::min(a.keys, last_query + 1) : a.keys;
    for (int64_t from = 0; from < seen; from += kKeys) {
        const int64_t to = std::min(from + kKeys, seen);
        lay_out<X>(a, task, from, to, room.keys);
        for (int64_t key = from; key < to; ++key)
            for (int64_t d = 0; d < a.width; d += kLanes)
                store(room.values + (key - from) * a.width + d,
                      values(row_of<X>(a.v, task.batch, task.key_head, key) + d, 0, kLanes));
        for (int64_t i = 0; i < count; i += kRows) {
            const int64_t rows = std::min<int64_t>(kRows, count - i);
            for (int64_t r = 0; r < rows; ++r) {
                const X* const q = row_of<X>(a.q, task.batch, head_of(i + r), query_of(i + r));
                for (int64_t d = 0; d < a.width; ++d) room.queries[r * a.width + d] = as_float(q[d]) * a.scale;
            }
            for_rows(rows, [&](auto kR) {
                for (int64_t key = 0; key < to - from; key += kPanel)
                    for (int64_t s = 0; s < kStrips; s += kWide)
                        multiply<kR(), kWide>(room.queries, a.width, room.keys + key * a.width + s * kStrip,
                                              room.scores + key + s * kStrip);
            });
            for (int64_t r = 0; r < rows; ++r) {
                float* const scores = room.scores + r * kKeys;
                hide(a, task.batch, head_of(i + r), query_of(i + r), from, to, scores);
                const float kept = weigh(scores, to - from, room.most[i + r], room.weight[i + r]);
                if (kept != 1.0f)
                    for (int64_t d = 0; d < a.width; ++d) room.sums[(i + r) * a.width + d] *= kept;
            }
            float* const sums = room.sums + i * a.width;
            for_rows(rows, [&](auto kR) {
                int64_t s = 0;
                for (; s + kWide <= strips; s += kWide)
                    gather<kR(), kWide>(room.scores, to - from, room.values + s * kStrip, sums + s * kStrip, a.width);
                for (; s < strips; ++s)
                    gather<kR(), 1>(room.scores, to - from, room.values + s * kStrip, sums + s * kStrip, a.width);
            });
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        X* const y = const_cast<X*>(row_of<X>(a.y, task.batch, head_of(i), query_of(i)));
        const float factor = room.weight[i] > 0 ? 1.0f / room.weight[i] : 0.0f;
        for (int64_t d = 0; d < a.width; ++d) put(y, d, room.sums[i * a.width + d] * factor);
    }
}

thread_local Scratch of_thread;

}  // namespace

extern "C" {

int dlqc_isa() { return DLQC_ISA; }

// Returns 0, or 1 if there is no memory (then y is not written).
int dlqc_attention(const Attention* attention, int threads, Team team) {
    const Attention& a = *attention;
    if (!a.batches || !a.heads || !a.queries) return 0;
    const int64_t all_rows = a.heads / a.key_heads * a.queries, sets = a.batches * a.key_heads;
    // Enough tasks for all threads, each with enough queries to be worth laying out the keys for.
    const int64_t parts = std::max<int64_t>(1, std::min((4 * threads + sets - 1) / sets, all_rows / 32));
    const int64_t rows = (all_rows + parts - 1) / parts, tasks = sets * parts;
    const int64_t keys = (std::min(a.keys, kKeys) + kPanel - 1) / kPanel * kPanel;
    const int64_t sizes[] = {keys * a.width, keys * a.width, kRows * a.width, kRows * kKeys, rows * a.width, rows, rows};
    int64_t bytes = 0;
    for (const int64_t size : sizes) bytes += rounded(4 * size);
    if (!of_thread.get(bytes)) return 1;
    std::atomic<int64_t> next{0};
    auto work = [&] {
        char* space = static_cast<char*>(of_thread.get(bytes));
        if (!space) return;
        float* parts_of[7];
        for (int i = 0; i < 7; ++i) parts_of[i] = reinterpret_cast<float*>(space), space += rounded(4 * sizes[i]);
        const Room room{parts_of[0], parts_of[1], parts_of[2], parts_of[3], parts_of[4], parts_of[5], parts_of[6]};
        for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
            const int64_t set = i / parts, first = i % parts * rows;
            const Task task{set / a.key_heads, set % a.key_heads, first, std::min(first + rows, all_rows)};
            if (task.first >= task.last) continue;
            if (a.type == kFloat32)
                run<float>(a, task, room);
            else
                run<uint16_t>(a, task, room);
        }
    };
    const int64_t products = a.batches * a.heads * a.queries * a.keys * a.width;
    in_threads(static_cast<int>(std::min<int64_t>(threads, products >> 16)), team, work);
    return 0;
}

}  // extern "C"

namespace {

// Heads [B, H, L, D] of a tensor whose features lie together.
bool heads_of(const Tensor& t, Heads* heads) {
    if (t.dim != 4 || t.type() < 0 || (t.size(3) > 1 && t.stride(3) != 1)) return false;
    *heads = {t.data, t.stride(0), t.stride(1), t.stride(2)};
    return true;
}

// Room for [B, H, L, D], of which all that belongs to a position lies together.
Tensor by_position(const Tensor& like, int64_t width) {
    const int64_t b = like.size(0), h = like.size(1), l = like.size(2);
    const int64_t sizes[] = {b, h, l, width}, strides[] = {l * h * width, width, h * width, 1};
    return Tensor::empty(4, sizes, strides, like.dtype);
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, bool causal, double scale, bool grouped) {
    Attention a{};
    if (!heads_of(q, &a.q) || !heads_of(k, &a.k) || !heads_of(v, &a.v)) return Tensor();
    const int64_t width = q.size(3), heads = q.size(1), key_heads = k.size(1);
    if (q.dtype != k.dtype || q.dtype != v.dtype || width % kStrip || !width || k.size(3) != width || v.size(3) != width)
        return Tensor();
    if (k.size(0) != q.size(0) || v.size(0) != q.size(0) || v.size(1) != key_heads || v.size(2) != k.size(2) || !k.size(2))
        return Tensor();
    if (grouped ? !key_heads || heads % key_heads : heads != key_heads) return Tensor();
    a.batches = q.size(0), a.heads = heads, a.key_heads = key_heads, a.queries = q.size(2), a.keys = k.size(2), a.width = width;
    a.scale = static_cast<float>(scale != scale ? 1 / std::sqrt(static_cast<double>(width)) : scale);
    a.type = q.type(), a.causal = causal;
    if (mask) {
        if (mask.dim > 4 || (mask.dtype != torch.boolean && mask.dtype != torch.float32)) return Tensor();
        const int64_t full[] = {a.batches, heads, a.queries, a.keys};
        int64_t steps[4] = {};
        for (int64_t i = 1; i <= mask.dim; ++i) {
            if (mask.size(-i) != 1 && mask.size(-i) != full[4 - i]) return Tensor();
            steps[4 - i] = mask.size(-i) == 1 ? 0 : mask.stride(-i);
        }
        a.masking = mask.dtype == torch.boolean ? 1 : 2, a.mask = mask.data;
        a.mask_batch = steps[0], a.mask_head = steps[1], a.mask_row = steps[2], a.mask_key = steps[3];
    }
    Tensor y = by_position(q, width);
    heads_of(y, &a.y);
    if (dlqc_attention(&a, torch_threads(), torch_team)) throw std::runtime_error("no memory for attention of " + q.shape());
    return y;
}

// x · cos + (x turned by half its width, the first half negated) · sin, for each head of a position
template <class X>
void turn(const Heads& x, const Heads& y, int64_t batch, int64_t heads, int64_t position, int64_t width, const X* cos, const X* sin) {
    const int64_t half = width / 2;
    for (int64_t head = 0; head < heads; ++head) {
        const X* const __restrict from = row_of<X>(x, batch, head, position);
        X* const __restrict to = const_cast<X*>(row_of<X>(y, batch, head, position));
        for (int64_t i = 0; i < half; ++i) put(to, i, as_float(from[i]) * as_float(cos[i]) - as_float(from[i + half]) * as_float(sin[i]));
        for (int64_t i = half; i < width; ++i)
            put(to, i, as_float(from[i]) * as_float(cos[i]) + as_float(from[i - half]) * as_float(sin[i]));
    }
}

// The step of each dimension of a table that broadcasts to x [B, H, L, D]; heads share a row, features lie together.
bool table_of(const Tensor& table, const Tensor& x, int64_t* batch, int64_t* position) {
    if (table.dim < 1 || table.dim > 4 || table.dtype != x.dtype || table.size(-1) != x.size(3) || table.stride(-1) != 1)
        return false;
    int64_t steps[4] = {};
    for (int64_t i = 1; i <= table.dim; ++i) {
        if (table.size(-i) != 1 && table.size(-i) != x.size(4 - i)) return false;
        steps[4 - i] = table.size(-i) == 1 ? 0 : table.stride(-i);
    }
    *batch = steps[0], *position = steps[2];
    return !steps[1];
}

Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin) {
    Heads from, to;
    int64_t cos_batch, cos_position, sin_batch, sin_position;
    if (!heads_of(x, &from) || x.size(3) % 2) return Tensor();
    if (!table_of(cos, x, &cos_batch, &cos_position) || !table_of(sin, x, &sin_batch, &sin_position)) return Tensor();
    Tensor y = by_position(x, x.size(3));
    heads_of(y, &to);
    const int64_t rows = x.size(0) * x.size(2), each_thread = 64;
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t first; (first = next.fetch_add(each_thread)) < rows;)
            for (int64_t i = first; i < std::min(first + each_thread, rows); ++i) {
                const int64_t b = i / x.size(2), l = i % x.size(2);
                const int64_t c = b * cos_batch + l * cos_position, s = b * sin_batch + l * sin_position;
                if (x.type() == kFloat32)
                    turn(from, to, b, x.size(1), l, x.size(3), cos.as<const float>() + c, sin.as<const float>() + s);
                else
                    turn(from, to, b, x.size(1), l, x.size(3), cos.as<const uint16_t>() + c, sin.as<const uint16_t>() + s);
            }
    };
    in_threads(static_cast<int>(std::min<int64_t>(torch_threads(), rows * x.size(1) * x.size(3) >> 16)), torch_team, work);
    return y;
}

}  // namespace

extern "C" {

void dlqc_op_attention(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    Tensor q = args.tensor(), k = args.tensor(), v = args.tensor(), mask = args.optional();
    const double dropout = args.real();
    const bool causal = args.boolean();
    const double scale = args.optional_real(std::numeric_limits<double>::quiet_NaN());
    const bool grouped = args.boolean();
    if (dropout == 0)
        if (Tensor y = attend(q, k, v, mask, causal, scale, grouped)) {
            *stack = word(y.release());
            return;
        }
    Refill words(stack);
    (words << q << k << v).optional(mask) << dropout << static_cast<int64_t>(causal);
    words.optional_real(scale) << static_cast<int64_t>(grouped);
    words.call("dlqc_cpu::attention_in_python");
}

void dlqc_op_rope(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    Tensor x = args.tensor(), cos = args.tensor(), sin = args.tensor();
    if (Tensor y = turned(x, cos, sin)) {
        *stack = word(y.release());
        return;
    }
    Refill words(stack);
    (words << x << cos << sin).call("dlqc_cpu::rope_in_python");
}

}  // extern "C"
