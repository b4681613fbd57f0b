// y = (codes of x · (codes of W - zeros)ᵀ) · scales + bias: low-bit weights by 8-bit activations, in integers.
//
// Tokens are quantized first, once. A panel of the weight stays in the second-level cache while all tokens of a chunk pass, a tile at
// a time, each over all input features; codes are spread out in registers each time, which fits between the products. A *segment* is
// a run of input features with one scale on both sides: its sum is an exact integer,
//
//   sum = Σ code·q - zero·Σ q,      y += sum · scale of W (· scale of x, where groups of x have their own)
//
// and what follows is float32, in an order that depends on shapes alone.
#include <atomic>

#include "prepare.h"
#include "product8.h"
#include "quantize.h"
#include "threads.h"
#include "tiles.h"
#include "torch_op.h"
#include "weights.h"

namespace {

constexpr int64_t kChunk = 128;  // tokens whose codes stay in the second-level cache, too

struct Call {
    Weight w;
    Place place;
    Tokens x;
    Result y;
    int act_bits;
    Before before;
    bool prepares;
    int64_t act_group = 0;  // padded K for one scale a token
    int64_t segment = 0, segments = 0, act_groups = 0, padded = 0;
    // Of all tokens: codes in tiles, sums [M, segments], scales [M, act_groups].
    int8_t* codes = nullptr;
    int32_t* sums = nullptr;
    float* scales = nullptr;
    // Of one thread, from the start of its memory on.
    int64_t row_at = 0, bytes = 0;
};

// Results of a tile in [kRows][kPanel].
struct Tile {
    const int8_t* a;
    int64_t token;  // the first one
    float* results;
    Soon soon;
};

template <int kBits, int kR, int kS>
__attribute__((noinline)) void run(const Call& call, const Tile& tile, int64_t panel, int64_t strip) {
    constexpr int64_t pitch = kStrips * kBits * 64;
    const uint8_t* const w = call.w.codes + call.place.codes_at(panel, kBits) + strip * kBits * 64;
    const int64_t per_group = call.w.group / call.segment;  // segments that share the parameters of the weight
    const int32_t low = lowered(kBits);
    const int32_t* sum = call.sums + tile.token * call.segments;
    float* const results = tile.results + strip * kStrip;
    int64_t at = call.place.scales_at(panel) + strip * kStrip, in_group = 0;
    for (int64_t k = 0; k < call.padded; sum += kR) {
        const int64_t end = std::min(k + call.segment, call.padded);
        Ints acc[kR][kS];
        if (call.w.zeros) {
            Words zero[kS];
#pragma GCC unroll 3
            for (int s = 0; s < kS; ++s) zero[s] = (Words)(all(low) - load_bytes(call.w.zeros + at + s * kStrip));
            each<kR, kS>([&](int r, int s) DLQC_LAMBDA { acc[r][s] = (Ints)(zero[s] * (Words)all(sum[r])); });
        } else {
            each<kR, kS>([&](int r, int s) DLQC_LAMBDA { acc[r][s] = all(sum[r]); });
        }
        multiply<kBits, kR, kS>(w + k / kBlock * pitch, pitch, {tile.soon.weight, tile.soon.tokens ? tile.soon.tokens + k * kR : nullptr},
                                  tile.a + k * kR, (end - k) / kBlock, acc);
        Floats scale[kS];
#pragma GCC unroll 3
        for (int s = 0; s < kS; ++s) scale[s] = load_scales(call.w.scales, call.w.half_scales, at + s * kStrip);
        float* kept = results;
        const auto add = [&](int r, int s, const Floats& by) DLQC_LAMBDA {
            float* const here = kept + r * kPanel + s * kStrip;
            store(here, load<Floats>(here) + to_floats(acc[r][s]) * by);
            // Another address, for all that gcc knows: else it loads all results first, and has no registers for them.
            if (s == kS - 1) asm("" : "+r"(kept));
        };
        if (call.act_groups > 1) {
            const float* const of_x = call.scales + tile.token * call.act_groups + k / call.act_group;
            each<kR, kS>([&](int r, int s) DLQC_LAMBDA { add(r, s, scale[s] * of_x[r * call.act_groups]); });
        } else {
            each<kR, kS>([&](int r, int s) DLQC_LAMBDA { add(r, s, scale[s]); });
        }
        k = end;
        if (++in_group == per_group) in_group = 0, at += kPanel;
    }
}

void finish(const Call& call, const Tile& tile, int64_t rows, int64_t panel) {
    const float* const scales = call.act_groups > 1 ? nullptr : call.scales + tile.token;
    finish(call.w, call.y, tile.token, rows, panel, tile.results, scales);
}

void multiply_panel(const Call& call, int64_t panel, int64_t chunk, float* results) {
    const int64_t start = chunk * kChunk, end = std::min(start + kChunk, call.x.count);
    for (int64_t token = start, next; token < end; token = next) {
        next = std::min(token + kRows, end);
        const int64_t rows = next - token;
        // The first tile fetches the weight, each other one the tokens after its own.
        const Soon soon{token == start, next < end ? call.codes + next * call.padded : nullptr};
        Tile tile{call.codes + token * call.padded, token, results, soon};
        std::memset(results, 0, 4 * rows * kPanel);
        for_strips(call.w.n - panel * kPanel, [&](int64_t strip) {
            for_bits(call.w.bits, [&](auto bits) {
                for_rows(rows, [&](auto count) { run<bits(), count(), kWide>(call, tile, panel, strip); });
            });
            tile.soon = Soon{};
        });
        finish(call, tile, rows, panel);
    }
}

// Rows a power of two apart would share few lines of the cache.
int64_t row_pitch(int64_t padded) { return rounded(padded) + 64; }

// A tile of tokens: codes; scales; and what each segment's sum starts from, the sum of codes, times -zero where that is the
// same everywhere, [segment][row].
void quantize_tile(const Call& call, int64_t tile, int8_t* space) {
    const int64_t token = tile * kRows, rows = std::min<int64_t>(kRows, call.x.count - token);
    int8_t* const to = call.codes + token * call.padded;
    const int64_t pitch = row_pitch(call.padded);
    int32_t* const sums = reinterpret_cast<int32_t*>(space + kRows * pitch);
    const int32_t factor = call.w.zeros ? 1 : lowered(call.w.bits) - (1 << (call.w.bits - 1));
    for (int64_t r = 0; r < rows; ++r) {
        int8_t* const codes = rows == 1 ? to : space + r * pitch;
        float* const scales = call.scales + (token + r) * call.act_groups;
        const auto quantize = [&](const auto* x) {
            const auto finished = [&](const auto* row) {
                quantize_row(row, call.w.k, call.padded, call.act_bits, call.act_group, call.segment, codes, scales, sums);
            };
            x += (token + r) * call.x.stride;
            if (!call.prepares) return finished(x);
            const auto* const other = static_cast<decltype(x)>(call.before.other);
            float* const row = reinterpret_cast<float*>(space + call.row_at);
            prepare(call.before, x, other ? other + (token + r) * call.before.other_stride : nullptr, call.w.k, row,
                    row + call.padded);
            finished(static_cast<const float*>(row));
        };
        if (call.x.type == kFloat32)
            quantize(static_cast<const float*>(call.x.x));
        else
            quantize(static_cast<const uint16_t*>(call.x.x));
        int32_t* const starts = call.sums + token * call.segments + r;
        for (int64_t i = 0; i < call.segments; ++i) starts[i * rows] = factor * sums[i];
    }
    if (rows > 1) interleave(space, pitch, call.padded, rows, to);
}

thread_local Scratch of_call, of_thread;

}  // namespace

extern "C" {

int dlqc_isa() { return DLQC_ISA; }

void dlqc_arrange(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* to) { arrange(codes, n, k, bits, to); }

// x [m, k] and y [m, n] of type 0 (float32) or 1 (bfloat16), rows `*_stride` elements apart; act_group 0: per token.
// `before` is done to x first, or null; `added` [m, n] of the same type goes to y, or null.
// Returns 0; 1 if there is no memory, 2 if there is no such rotation (then y is not written).
int dlqc_linear8(const Weight* weight, const void* x, int type, int64_t m, int64_t x_stride, void* y, int64_t y_stride,
                 int act_bits, int64_t act_group, const Before* before, const void* added, int64_t added_stride, int threads,
                 Team team) {
    if (m <= 0 || weight->n <= 0) return 0;
    const Before none{};
    Call call{*weight, Place(*weight), {x, type, m, x_stride}, {y, type, y_stride, added, added_stride}, act_bits,
              before ? *before : none, before && (before->kind != kAsIs || before->rotation.block)};
    if (!fits(call.before.rotation, weight->k)) return 2;
    call.padded = call.place.blocks * kBlock;
    if (call.place.groups == 1) call.w.group = call.padded;
    call.act_group = act_group ? act_group : call.padded;
    call.segment = std::min(call.act_group, call.w.group);
    call.segments = (call.padded + call.segment - 1) / call.segment;
    call.act_groups = (call.padded + call.act_group - 1) / call.act_group;

    const int64_t sums_at = rounded(m * call.padded), scales_at = sums_at + rounded(4 * m * call.segments);
    char* const shared = static_cast<char*>(of_call.get(scales_at + rounded(4 * m * call.act_groups)));
    if (!shared) return 1;
    call.codes = reinterpret_cast<int8_t*>(shared);
    call.sums = reinterpret_cast<int32_t*>(shared + sums_at);
    call.scales = reinterpret_cast<float*>(shared + scales_at);

    call.row_at = kRows * row_pitch(call.padded) + rounded(4 * call.segments);
    const int64_t row_bytes = call.prepares ? 4 * (call.padded + space_of(call.before.rotation)) : 0;
    const int64_t results_bytes = 4 * kRows * kPanel;
    call.bytes = std::max(call.row_at + row_bytes, results_bytes);
    if (!of_thread.get(call.bytes)) return 1;  // so that at least this thread can do all the work

    const int64_t tiles = (m + kRows - 1) / kRows, chunks = (m + kChunk - 1) / kChunk;
    std::atomic<int64_t> next{0};
    auto quantize = [&] {
        int8_t* const row = static_cast<int8_t*>(of_thread.get(call.bytes));
        if (!row) return;
        for (int64_t tile; (tile = next.fetch_add(1)) < tiles;) quantize_tile(call, tile, row);
    };
    in_threads(static_cast<int>(std::min<int64_t>(threads, m * call.padded >> 16)), team, quantize);

    next = 0;
    auto multiply = [&] {
        float* const results = static_cast<float*>(of_thread.get(call.bytes));
        if (!results) return;
        for (int64_t task; (task = next.fetch_add(1)) < call.place.panels * chunks;)
            multiply_panel(call, task % call.place.panels, task / call.place.panels, results);
    };
    const int64_t work = m * call.padded * call.place.panels * kPanel;
    in_threads(static_cast<int>(std::min<int64_t>(threads, work >> 18)), team, multiply);
    return 0;
}

}  // extern "C"

namespace {

// What comes behind the activations in both ops: the weight, and how x is quantized.
struct Site {
    Tensor codes, scales, zeros, bias;
    int64_t k, n, bits, group, act_bits, act_group;

    explicit Site(Arguments& args)
        : codes(args.tensor()), scales(args.tensor()), zeros(args.optional()), bias(args.optional()), k(args.integer()),
          n(args.integer()), bits(args.integer()), group(args.integer()), act_bits(args.integer()), act_group(args.integer()) {}

    Refill& put(Refill& words) {
        words << codes << scales;
        return words.optional(zeros).optional(bias) << k << n << bits << group << act_bits << act_group;
    }

    // Whether the tensors are those of the weight that the numbers tell of: a module may have been moved to another type.
    bool fits() const {
        const int64_t size = group ? group : k;
        if (k <= 0 || n <= 0 || size <= 0 || (bits != 2 && bits != 3 && bits != 4 && bits != 8)) return false;
        const int64_t panels = (n + kPanel - 1) / kPanel, blocks = (k + kBlock - 1) / kBlock;
        const int64_t count = panels * ((k + size - 1) / size) * kPanel;
        return codes.holds(torch.uint8, panels * blocks * kStrips * bits * 64) &&
               (scales.holds(torch.float32, count) || scales.holds(torch.bfloat16, count)) &&
               (!zeros || zeros.holds(torch.uint8, count)) && (!bias || bias.holds(torch.float32, n));
    }

    // Null where the tensors do not fit together in a way that native code takes: Python computes that, or says what is wrong.
    Tensor run(const Tensor& x, const Before* before, const Tensor* other, const Tensor* added) const {
        int64_t count, pitch, other_pitch = 0, added_pitch = 0;
        if (!x.rows(k, &count, &pitch) || !fits()) return Tensor();
        const auto along = [&](const Tensor* with, int64_t width, int64_t* its_pitch) {
            int64_t its_count;
            return !with || (with->rows(width, &its_count, its_pitch) && with->dtype == x.dtype && with->leads_as(x));
        };
        if (!along(other, k, &other_pitch) || !along(added, n, &added_pitch)) return Tensor();
        Weight weight{};
        weight.n = n, weight.k = k, weight.group = group ? group : k, weight.bits = static_cast<int32_t>(bits);
        weight.codes = codes.as<uint8_t>(), weight.scales = scales.data, weight.half_scales = scales.dtype == torch.bfloat16;
        weight.zeros = zeros.as<uint8_t>(), weight.bias = bias.as<float>();
        Before given{};
        if (before) given = *before, given.other = other ? other->data : nullptr, given.other_stride = other_pitch;
        Tensor y = x.like(n);
        const int failed =
            dlqc_linear8(&weight, x.data, x.type(), count, pitch, y.data, n, static_cast<int>(act_bits), act_group,
                         before ? &given : nullptr, added ? added->data : nullptr, added_pitch, torch_threads(), torch_team);
        if (failed == 2) throw std::runtime_error("no rotation of " + x.shape() + " by such blocks");
        if (failed)
            throw std::runtime_error("no memory to quantize " + x.shape() + " activations");
        return y;
    }
};

}  // namespace

extern "C" {

void dlqc_op_linear8(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    Tensor x = args.tensor();
    Site site(args);
    if (Tensor y = site.run(x, nullptr, nullptr, nullptr)) {
        *stack = word(y.release());
        return;
    }
    Refill words(stack);
    site.put(words << x).call("dlqc_cpu::linear8_in_python");
}

void dlqc_op_fused8(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    const int64_t kind = args.integer();
    Tensor x = args.tensor(), other = args.optional(), gain = args.optional(), shift = args.optional();
    const double eps = args.real();
    Tensor added = args.optional();
    Site site(args);
    const int64_t block = args.integer();
    Tensor core = args.optional();
    const bool square = core && core.dim == 2 && core.size(0) == core.size(1) &&
                        core.holds(torch.float32, core.size(0) * core.size(0));
    const Rotation rotation{block, !core ? 1 : square ? core.size(0) : 0, core.as<float>()};
    const Before before{static_cast<int32_t>(kind), static_cast<float>(eps), gain.as<float>(), shift.as<float>(), nullptr, 0,
                        rotation};
    const bool known = kind >= kAsIs && kind <= kSiluTimes && (kind == kSiluTimes) == static_cast<bool>(other);
    if (known && (!core || square) && (!gain || gain.holds(torch.float32, site.k)) && (!shift || shift.holds(torch.float32, site.k)))
        if (Tensor y = site.run(x, &before, other ? &other : nullptr, added ? &added : nullptr)) {
            *stack = word(y.release());
            return;
        }
    Refill words(stack);
    (words << kind << x).optional(other).optional(gain).optional(shift) << eps;
    (site.put(words.optional(added)) << block).optional(core).call("dlqc_cpu::fused8_in_python");
}

// The same norm where no linear8 takes it along. x [..., K] → [..., K]
void dlqc_op_rms_norm(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    Tensor x = args.tensor(), gain = args.optional();
    const double eps = args.real();
    int64_t count, pitch;
    const int64_t k = x.dim ? x.size(-1) : 0;
    if (!x.rows(k, &count, &pitch) || (gain && !gain.holds(torch.float32, k))) {
        Refill words(stack);
        (words << x).optional(gain) << eps;
        return words.call("dlqc_cpu::rms_norm_in_python");
    }
    Tensor y = x.like(k);
    const Before before{kRmsNorm, static_cast<float>(eps), gain.as<float>(), nullptr, nullptr, 0, {}};
    const int64_t bytes = rounded(4 * (k + kLanes));
    if (!of_thread.get(bytes)) throw std::runtime_error("no memory for a row of " + x.shape());
    std::atomic<int64_t> next{0};
    auto work = [&] {
        float* const row = static_cast<float*>(of_thread.get(bytes));
        if (!row) return;
        for (int64_t i; (i = next.fetch_add(1)) < count;) {
            if (x.type() == kFloat32) {
                prepare<float>(before, x.as<float>() + i * pitch, nullptr, k, row, nullptr);
                std::memcpy(y.as<float>() + i * k, row, 4 * k);
            } else {
                prepare<uint16_t>(before, x.as<uint16_t>() + i * pitch, nullptr, k, row, nullptr);
                for (int64_t j = 0; j < k; ++j) y.as<uint16_t>()[i * k + j] = to_bfloat16(row[j]);
            }
        }
    };
    in_threads(static_cast<int>(std::min<int64_t>(torch_threads(), count * k >> 16)), torch_team, work);
    *stack = word(y.release());
}

}  // extern "C"
