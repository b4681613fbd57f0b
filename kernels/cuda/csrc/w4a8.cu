// 4-bit weights by 8-bit activations, exact integer sums: y[m, n] = (Σ_k (code - zero) · q) · s_w · s_x + b.
//
// A word holds eight codes less 8. Its upper nibbles, with the lower ones masked off, are int8 of 16 times their value as they
// lie; the lower ones come there by a shift: three integer instructions for eight weights. The factor 16 leaves with the scale.
// A fragment of the next 64 features is spread out while the tensor cores work on this one, over the end of a turn of the loop,
// too: a thread reads only weights that it copied itself, so they need no barrier.
//
// Groups: sums over 128 features start from the integer whose bits are the float 1.5·2^23, to which small integers add without
// rounding; so they are floats at the price of one subtraction (|sum| ≤ 128·128·127 < 2^22).
//
// Layouts, k = 64·block + 16·member + 8·f + 4·half + e:
//     words    uint32 [N'/32, K'/64, 2 fragments f, 32 lanes, 4]   byte e of word r: feature 4·quad + r, low nibble half 0
//     q        int8 [K'/64, M', 64];   sums float32 [K'/128, M'] of q, or [M'] over all K for one scale per channel
//     scales   bf16 [K'/128, N'], or float32 [N'] per channel;   points bf16 likewise, 16·(8 - zero), or null
#include "tiles.h"

enum Kind { CHANNEL, GROUPS, GROUPS_WITH_ZEROS };
constexpr int32_t MAGIC = 0x4b400000;  // 1.5·2^23

struct Integers {
    Target to;
    const void* x;
    int64_t x_stride;
    int type, k, steps, channel, top, padded;  // steps of 128 in K'; whether a channel has one scale; M'
    const uint32_t* words;
    const void* scales;
    const uint16_t* points;
    int8_t* q;
    float *tokens, *sums;
};

// One token: codes as `ActFormat.quantize_dynamic` has them, to the last one; zero from K on and past the last token.
KERNEL(ROW_THREADS) quantize(const Integers p) {
    const int m = blockIdx.x, warps = ROW_THREADS / WARP;
    const bool inside = m < p.to.m;
    const void* row = static_cast<const char*>(p.x) + (inside ? m * p.x_stride : 0) * (p.type == FLOAT32 ? 4 : 2);
    float* shared = reinterpret_cast<float*>(shared_memory());
    float scale = largest(row, inside ? p.k : 0, p.type, shared) / static_cast<float>(p.top);
    scale = scale == 0.0f ? 1.0f : fmaxf(scale, 1.17549435e-38f);
    if (threadIdx.x == 0) p.tokens[m] = scale;
    const int total = p.steps * STEP;
    float all = 0.0f;
    for (int base = 0; base < total; base += ROW_THREADS * 8) {
        const int at = base + threadIdx.x * 8;
        float sum = 0.0f;
        if (at < total) {
            float x[8];
            load8(x, row, inside ? at : 0, inside ? p.k - at : 0, p.type);
            uint32_t made[2] = {};
            UNROLL for (int i = 0; i < 8; ++i) {
                const float limit = static_cast<float>(p.top), code = fminf(fmaxf(rintf(x[i] / scale), -limit), limit);
                sum += code;
                made[i / 4] |= (static_cast<uint32_t>(static_cast<int32_t>(code)) & 0xff) << 8 * (i % 4);
            }
            const int64_t place = (static_cast<int64_t>(at / 64) * p.padded + m) * 64 + at % 64;
            *reinterpret_cast<uint2*>(p.q + place) = make_uint2(made[0], made[1]);
        }
        all += sum;
        if (!p.channel) {
            UNROLL for (int far = 8; far; far /= 2) sum += shuffle_xor(sum, far);
            if (at < total && at % STEP == 0) p.sums[static_cast<int64_t>(at / STEP) * p.padded + m] = sum;
        }
    }
    if (!p.channel) return;
    UNROLL for (int far = WARP / 2; far; far /= 2) all += shuffle_xor(all, far);
    if (threadIdx.x % WARP == 0) shared[warps + threadIdx.x / WARP] = all;
    barrier();
    if (threadIdx.x) return;
    all = 0.0f;
    UNROLL for (int i = 0; i < warps; ++i) all += shared[warps + i];
    p.sums[m] = all;
}

// Sums of a channel with one scale, still integers.
DEVICE void finish_channel(const Integers& p, int m, int n, const int32_t (&sum)[4]) {
    float value[4];
    const int32_t total = static_cast<int32_t>(p.sums[m]);
    UNROLL for (int i = 0; i < 4; ++i) {
        const int32_t point = p.points ? static_cast<int32_t>(from_bf16(p.points[n + i])) : 0;
        const int32_t whole = (sum[i] >> 4) + (point >> 4) * total;
        value[i] = static_cast<float>(whole) * static_cast<const float*>(p.scales)[n + i];
    }
    finish(p.to, m, n, value);
}

template <int BM, int KIND>
KERNEL(THREADS) product(const Integers p) {
    constexpr int TILES = BM / 8, HALF = BM * 64;
    constexpr int WORDS = FEATURES * STEP / 2, TOKENS = BM * STEP, SCALES = KIND == CHANNEL ? 0 : FEATURES * 2;
    constexpr int POINTS = KIND == GROUPS_WITH_ZEROS ? FEATURES * 2 : 0, SUMS = KIND == GROUPS_WITH_ZEROS ? BM * 4 : 0;
    constexpr int STAGE = WORDS + TOKENS + SCALES + POINTS + SUMS;
    const Place my(p.to.splits, BM);
    char* const shared = shared_memory();
    const int share = (p.steps + p.to.splits - 1) / p.to.splits, begin = min(my.split * share, p.steps);
    const int count = min(share, p.steps - begin);
    // What this thread copies at each turn, and how far apart the turns lie. Of the tokens it takes 16 bytes of either half of 64
    // features, or of one half where they are few.
    const int64_t first = begin;
    constexpr bool FEW = HALF <= THREADS * 8;
    const int side = FEW ? my.thread * 16 / HALF : 0, chunk = FEW ? my.thread * 16 % HALF : my.thread * 16;
    const char* words = reinterpret_cast<const char*>(p.words) +
                        ((static_cast<int64_t>(my.tile * 4 + my.warp) * p.steps + first) * 4 * WARP + my.lane) * 16;
    const int64_t half_stride = static_cast<int64_t>(p.padded) * 64;
    const char* tokens = reinterpret_cast<const char*>(p.q) + (2 * first + side) * half_stride + my.token * 64 + chunk;
    const int role = my.thread / 16;  // 0: scales, 1: points, then sums of tokens
    const int64_t extra_stride = role < 2 ? p.to.columns * 2 : p.padded * 4;
    const char* extra = (role == 0   ? static_cast<const char*>(p.scales) + my.tile * FEATURES * 2
                         : role == 1 ? reinterpret_cast<const char*>(p.points) + my.tile * FEATURES * 2
                                     : reinterpret_cast<const char*>(p.sums) + my.token * 4) +
                        first * extra_stride + (role < 2 ? my.thread % 16 : my.thread - 32) * 16;
    const int extra_to = WORDS + TOKENS + my.thread * 16;

    auto fetch = [&](int turn) {
        char* stage = shared + turn % STAGES * STAGE;
        UNROLL for (int f = 0; f < 4; ++f) {
            copy16(stage + (my.warp * 4 + f) * WARP * 16 + my.lane * 16, words + f * WARP * 16);
        }
        if (FEW) {
            if (my.thread * 16 < TOKENS) copy16(stage + WORDS + my.thread * 16, tokens);
        } else {
            copy_run<HALF>(stage + WORDS + my.thread * 16, tokens, my.thread);
            copy_run<HALF>(stage + WORDS + HALF + my.thread * 16, tokens + half_stride, my.thread);
        }
        if (SCALES && my.thread * 16 < SCALES + POINTS + SUMS) copy16(stage + extra_to, extra);
        words += 4 * WARP * 16, tokens += 2 * half_stride, extra += extra_stride;
    };
    // The weights of 64 features, spread out: two products of 32, two tiles of 16 output features.
    auto spread = [&](uint32_t (&a)[2][2][4], int turn, int half) {
        const char* stage = shared + turn % STAGES * STAGE;
        UNROLL for (int f = 0; f < 2; ++f) {
            const char* from = stage + (my.warp * 4 + 2 * half + f) * WARP * 16 + my.lane * 16;
            const uint4 four = *reinterpret_cast<const uint4*>(from);
            const uint32_t word[4] = {four.x, four.y, four.z, four.w};
            UNROLL for (int r = 0; r < 4; ++r) {
                a[f][r / 2][r % 2] = word[r] << 4 & 0xf0f0f0f0u;
                a[f][r / 2][2 + r % 2] = word[r] & 0xf0f0f0f0u;
            }
        }
    };

    int32_t whole[2][TILES][4];
    float acc[2][TILES][4] = {};
    UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int t = 0; t < TILES; ++t) {
        UNROLL for (int c = 0; c < 4; ++c) whole[i][t][c] = 0;
    }
    for (int turn = 0; turn < STAGES - 1; ++turn) {
        if (turn < count) fetch(turn);
        commit_copies();
    }
    uint32_t a[2][2][2][4];  // this fragment and the next
    copies_done<STAGES - 2>();
    if (count > 0) spread(a[0], 0, 0);
    for (int turn = 0; turn < count; ++turn) {
        copies_done<STAGES - 3>();  // the next turn's are there, too: for its first fragment
        barrier();
        if (turn + STAGES - 1 < count) fetch(turn + STAGES - 1);
        commit_copies();
        const char* stage = shared + turn % STAGES * STAGE;
        UNROLL for (int half = 0; half < 2; ++half) {
            if (half == 0) spread(a[1], turn, 1);
            else if (turn + 1 < count) spread(a[0], turn + 1, 0);
            const uint4* tokens = reinterpret_cast<const uint4*>(stage + WORDS + half * HALF) + my.lane;
            UNROLL for (int t = 0; t < TILES; ++t) {
                const uint4 codes = tokens[t * WARP];
                UNROLL for (int i = 0; i < 2; ++i) {
                    const int32_t magic[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
                    if (KIND != CHANNEL && half == 0) multiply_s8(whole[i][t], a[half][0][i], codes.x, codes.y, magic);
                    else multiply_s8(whole[i][t], a[half][0][i], codes.x, codes.y, whole[i][t]);
                    multiply_s8(whole[i][t], a[half][1][i], codes.z, codes.w, whole[i][t]);
                }
            }
        }
        if (KIND == CHANNEL) continue;
        const char* scales = stage + WORDS + TOKENS + (my.warp * WARP + 4 * my.quad) * 2;
        float scale[4], point[4];
        load4(scale, scales);
        if (KIND == GROUPS_WITH_ZEROS) load4(point, scales + SCALES);
        UNROLL for (int t = 0; t < TILES; ++t) {
            float2 sums = make_float2(0.0f, 0.0f);
            if (KIND == GROUPS_WITH_ZEROS) {
                sums = reinterpret_cast<const float2*>(stage + WORDS + TOKENS + SCALES + POINTS)[t * 4 + my.member];
            }
            UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int c = 0; c < 4; ++c) {
                float part = as_float(static_cast<uint32_t>(whole[i][t][c])) - as_float(MAGIC);
                if (KIND == GROUPS_WITH_ZEROS) part = fmaf(point[2 * i + c / 2], c % 2 ? sums.y : sums.x, part);
                acc[i][t][c] = fmaf(scale[2 * i + c / 2], part, acc[i][t][c]);
            }
        }
    }
    copies_done<0>();
    UNROLL for (int t = 0; t < TILES; ++t) UNROLL for (int e = 0; e < 2; ++e) {
        const int m = my.token + t * 8 + 2 * my.member + e, n = my.feature();
        if (m >= p.to.m) continue;
        if (KIND == CHANNEL) {
            const int32_t sum[4] = {whole[0][t][e], whole[0][t][2 + e], whole[1][t][e], whole[1][t][2 + e]};
            if (p.to.splits > 1) {
                int4* part = reinterpret_cast<int4*>(part_of<int32_t>(p.to, my.split, m, n));
                *part = make_int4(sum[0], sum[1], sum[2], sum[3]);
            } else {
                finish_channel(p, m, n, sum);
            }
        } else {
            const float sum[4] = {acc[0][t][e], acc[0][t][2 + e], acc[1][t][e], acc[1][t][2 + e]};
            if (p.to.splits > 1) {
                float4* part = reinterpret_cast<float4*>(part_of<float>(p.to, my.split, m, n));
                *part = make_float4(sum[0], sum[1], sum[2], sum[3]);
            } else {
                finish(p.to, m, n, sum);
            }
        }
    }
}

// Shares in their order, for four features of a token.
template <bool WHOLE>
KERNEL(THREADS) add_shares(const Integers p) {
    const int m = blockIdx.x, n = (blockIdx.y * THREADS + threadIdx.x) * 4;
    if (n >= p.to.n) return;
    if (WHOLE) {
        int32_t sum[4] = {};
        for (int split = 0; split < p.to.splits; ++split) {
            const int4 part = *reinterpret_cast<const int4*>(part_of<const int32_t>(p.to, split, m, n));
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
        finish_channel(p, m, n, sum);
        return;
    }
    float sum[4] = {};
    for (int split = 0; split < p.to.splits; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(part_of<const float>(p.to, split, m, n));
        sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    }
    finish(p.to, m, n, sum);
}

template <int BM, int KIND>
static int run(const Integers& p, void* stream) {
    const int extra = KIND == CHANNEL ? 0 : KIND == GROUPS ? FEATURES * 2 : FEATURES * 4 + BM * 4;
    const int stage = FEATURES * STEP / 2 + BM * STEP + extra;
    const dim3 grid(p.to.columns / FEATURES * p.to.splits, p.padded / BM);
    if (const int wrong = launch(product<BM, KIND>, grid, THREADS, stage * STAGES, stream, p)) return wrong;
    if (p.to.splits == 1) return 0;
    const dim3 fours(p.to.m, (p.to.n + THREADS * 4 - 1) / (THREADS * 4));
    return launch(add_shares<KIND == CHANNEL>, fours, THREADS, 0, stream, p);
}

template <int KIND>
static int run_by_tokens(const Integers& p, int bm, void* stream) {
    switch (bm) {
        case 8: return run<8, KIND>(p, stream);
        case 16: return run<16, KIND>(p, stream);
        case 32: return run<32, KIND>(p, stream);
        case 64: return run<64, KIND>(p, stream);
        // With sums of groups beside those of all K there are not enough registers for so many.
        case 128: return KIND == CHANNEL ? run<KIND == CHANNEL ? 128 : 64, KIND>(p, stream) : -1;
        default: return -1;
    }
}

extern "C" int dlqc_quantize(const Integers* p, void* stream) {
    return launch(quantize, dim3(p->padded), ROW_THREADS, 2 * sizeof(float) * ROW_THREADS / WARP, stream, *p);
}

// 0, or what `dlqc_said` has words for. M' is a multiple of bm.
extern "C" int dlqc_w4a8(const Integers* p, int bm, void* stream) {
    if (p->channel) return run_by_tokens<CHANNEL>(*p, bm, stream);
    return p->points ? run_by_tokens<GROUPS_WITH_ZEROS>(*p, bm, stream) : run_by_tokens<GROUPS>(*p, bm, stream);
}

extern "C" const char* dlqc_said(int error) { return error == -1 ? "no such number of tokens in a block" : said(error); }
