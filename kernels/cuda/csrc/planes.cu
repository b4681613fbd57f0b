// Sums of sign planes by 16-bit activations: y[m, n] = Σ_q r_q[n] · Σ_j B_q[n, j] · c_q[j] · x[m, k(q, j)],  B = ±1.
//
// Every plane q of every group is a stretch of one longer K', whatever the orders of the groups: column scales go to x, row
// scales to the sum over the stretch, and what is left is a product by bits. With b = (B + 1) / 2 and z = bf16(c · x):
//
//     Σ B·z = 2 · (Σ b·z - t),    t = Σ z / 2
//
// A bit becomes a bfloat16 by one `and`, where it lies: bit 7 + i of a half word, alone, is the power of two 2^(2^i - 127),
// i = 0 … 7. z was multiplied by 2^(127 - 2^i) for it, which is exact, since tokens are brought below 1 first. A word of 32 signs
// is 16 pairs: 8 are taken as they are, 7 after a shift by 8, one after a shift by 1: 18 integer instructions for 32 weights of a
// plane. -t is what the tensor cores start from.
//
// Layouts, K' cut into steps of 128, a step into two blocks b of 64; k = 64·b + 16·member + 2·i + e within a step:
//     words      uint32 [N'/32, steps, 32 lanes, 4]   pair 8·b + i of feature 4·quad + r; e is the half of the word
//     products   bf16 [steps, M'/8, 4 quarters, 32 lanes, 8]  z, 8 neighbours of k in 16 bytes, ready to be B fragments
//     totals     float32 [K'/BLOCK, M']   -t of a stretch of BLOCK;   rows bf16 [K'/BLOCK, N'];   columns bf16 [K']
#include "tiles.h"

struct Planes {
    Target to;
    const void* x;
    int64_t x_stride;
    int type, k, steps, width, size, padded;  // a plane has `width` places in K', `size` of them in use; M'
    const uint32_t* words;
    const uint16_t *rows, *columns;
    const int32_t *offsets, *first;  // input feature where a plane begins; first plane of each group (and the end)
    uint16_t* products;
    float *totals, *scales;
};

// The place in a word of pair p, and the exponent i of the power of two that it is read as.
DEVICE int place_of(int pair) { return pair < 8 ? 7 + pair : pair < 15 ? pair - 8 : 15; }
DEVICE int exponent_of(int pair) { return pair < 8 ? pair : pair < 15 ? pair - 7 : 7; }

DEVICE uint32_t pair_of(uint32_t word, int pair) {
    if (pair < 8) return word & 0x00800080u << pair;
    if (pair < 15) return word << 8 & 0x00800080u << (pair - 7);
    return word >> 1 & 0x40004000u;
}

// One token: z, its sums, and the power of two that was taken off. Past the last token all is zero.
template <int BLOCK>
KERNEL(ROW_THREADS) prepare(const Planes p) {
    const int m = blockIdx.x;
    const bool inside = m < p.to.m;
    const void* row = static_cast<const char*>(p.x) + (inside ? m * p.x_stride : 0) * (p.type == FLOAT32 ? 4 : 2);
    const float most = largest(row, inside ? p.k : 0, p.type, reinterpret_cast<float*>(shared_memory()));
    int exponent = as_bits(most) >> 23;  // most < 2^(exponent - 126)
    exponent = exponent < 1 ? 1 : exponent > 252 ? 252 : exponent;
    const float down = as_float(static_cast<uint32_t>(253 - exponent) << 23);
    if (threadIdx.x == 0) p.scales[m] = as_float(static_cast<uint32_t>(exponent + 1) << 23);
    const int total = p.steps * STEP;
    for (int base = 0; base < total; base += ROW_THREADS * 8) {
        const int at = base + threadIdx.x * 8;
        float sum = 0.0f;
        if (at < total) {
            const int plane = at / p.width, j = at % p.width, local = at % STEP;
            const int count = !inside || j >= p.size ? 0 : min(8, p.size - j);
            float x[8];
            load8(x, row, count > 0 ? p.offsets[plane] + j : 0, count, p.type);
            uint32_t made[4];
            UNROLL for (int i = 0; i < 4; ++i) {
                const int pair = 8 * (local / 64) + 4 * (local / 8 % 2) + i;
                float z[2];
                UNROLL for (int e = 0; e < 2; ++e) {
                    const float exact = count > 2 * i + e ? x[2 * i + e] * down * from_bf16(p.columns[at + 2 * i + e]) : 0.0f;
                    z[e] = from_bf16(pair_bf16(exact, 0.0f) & 0xffff);
                    sum += z[e];
                }
                const float up = as_float(static_cast<uint32_t>(254 - (1 << exponent_of(pair))) << 23);
                made[i] = pair_bf16(z[0] * up, z[1] * up);
            }
            const int quarter = 2 * (local / 64) + local / 8 % 2, lane = m % 8 * 4 + local / 16 % 4;
            const int64_t tile = static_cast<int64_t>(at / STEP) * (p.padded / 8) + m / 8;
            *reinterpret_cast<uint4*>(p.products + ((tile * 4 + quarter) * WARP + lane) * 8) =
                make_uint4(made[0], made[1], made[2], made[3]);
        }
        UNROLL for (int far = BLOCK / 16; far; far /= 2) sum += shuffle_xor(sum, far);
        if (at < total && at % BLOCK == 0) p.totals[static_cast<int64_t>(at / BLOCK) * p.padded + m] = -0.5f * sum;
    }
}

template <int BM, int BLOCK>
KERNEL(THREADS) product(const Planes p) {
    constexpr int TILES = BM / 8, BLOCKS = STEP / BLOCK, QUARTERS = BLOCK / 32;
    constexpr int WORDS = FEATURES * STEP / 8, TOKENS = BM * STEP * 2, TOTALS = BLOCKS * BM * 4, ROWS = BLOCKS * FEATURES * 2;
    constexpr int STAGE = WORDS + TOKENS + TOTALS + ROWS;
    const Place my(p.to.splits, BM);
    char* const shared = shared_memory();
    const int share = (p.steps + p.to.splits - 1) / p.to.splits, begin = min(my.split * share, p.steps);
    const int count = min(share, p.steps - begin);
    // What this thread copies at each turn, and how far apart the turns lie.
    const int64_t first = begin;
    const char* words = reinterpret_cast<const char*>(p.words) +
                        ((static_cast<int64_t>(my.tile * 4 + my.warp) * p.steps + first) * WARP + my.lane) * 16;
    const char* tokens = reinterpret_cast<const char*>(p.products) + (first * p.padded + my.token) * (STEP * 2) + my.thread * 16;
    const int64_t tokens_stride = static_cast<int64_t>(p.padded) * (STEP * 2);
    const bool is_row = my.thread < BLOCKS * 16;
    const int piece = is_row ? my.thread : my.thread - BLOCKS * 16, pieces = is_row ? 16 : BM / 4;
    const int64_t wide = is_row ? p.to.columns * 2 : p.padded * 4;
    const char* extra = (is_row ? reinterpret_cast<const char*>(p.rows) + my.tile * FEATURES * 2
                                : reinterpret_cast<const char*>(p.totals) + my.token * 4) +
                        (first * BLOCKS + piece / pieces) * wide + piece % pieces * 16;
    const int extra_to = WORDS + TOKENS + (is_row ? TOTALS : 0) + piece * 16;

    auto fetch = [&](int turn) {
        char* stage = shared + turn % STAGES * STAGE;
        copy16(stage + my.thread * 16, words);
        copy_run<TOKENS>(stage + WORDS + my.thread * 16, tokens, my.thread);
        if (my.thread < BLOCKS * (16 + BM / 4)) copy16(stage + extra_to, extra);
        words += WARP * 16, tokens += tokens_stride, extra += BLOCKS * wide;
    };

    float acc[2][TILES][4] = {};
    for (int turn = 0; turn < STAGES - 1; ++turn) {
        if (turn < count) fetch(turn);
        commit_copies();
    }
    for (int turn = 0; turn < count; ++turn) {
        copies_done<STAGES - 2>();
        barrier();
        if (turn + STAGES - 1 < count) fetch(turn + STAGES - 1);
        commit_copies();
        const char* stage = shared + turn % STAGES * STAGE;
        const uint4 four = *reinterpret_cast<const uint4*>(stage + my.thread * 16);
        const uint32_t word[4] = {four.x, four.y, four.z, four.w};
        const uint4* z = reinterpret_cast<const uint4*>(stage + WORDS) + my.lane;
        UNROLL for (int b = 0; b < BLOCKS; ++b) {
            float part[2][TILES][4];
            const float2* totals = reinterpret_cast<const float2*>(stage + WORDS + TOKENS + b * BM * 4) + my.member;
            UNROLL for (int q = 0; q < QUARTERS; ++q) {
                const int quarter = b * QUARTERS + q;
                uint32_t a[2][2][4];  // two products of 16, two tiles of 16 features
                UNROLL for (int s = 0; s < 2; ++s) UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int r = 0; r < 4; ++r) {
                    a[s][i][r] = pair_of(word[2 * i + r % 2], 4 * quarter + 2 * s + r / 2);
                }
                UNROLL for (int t = 0; t < TILES; ++t) {
                    const uint4 pairs = z[(t * 4 + quarter) * WARP];
                    const float2 total = totals[t * 4];
                    const float start[4] = {total.x, total.y, total.x, total.y};
                    UNROLL for (int i = 0; i < 2; ++i) {
                        if (q == 0) multiply_bf16(part[i][t], a[0][i], pairs.x, pairs.y, start);
                        else multiply_bf16(part[i][t], a[0][i], pairs.x, pairs.y, part[i][t]);
                        multiply_bf16(part[i][t], a[1][i], pairs.z, pairs.w, part[i][t]);
                    }
                }
            }
            float r[4];
            load4(r, stage + WORDS + TOKENS + TOTALS + (b * FEATURES + my.warp * WARP + 4 * my.quad) * 2);
            UNROLL for (int i = 0; i < 2; ++i) UNROLL for (int t = 0; t < TILES; ++t) UNROLL for (int c = 0; c < 4; ++c) {
                acc[i][t][c] = fmaf(r[2 * i + c / 2], part[i][t][c], acc[i][t][c]);
            }
        }
    }
    copies_done<0>();
    UNROLL for (int t = 0; t < TILES; ++t) UNROLL for (int e = 0; e < 2; ++e) {
        const int m = my.token + t * 8 + 2 * my.member + e, n = my.feature();
        if (m >= p.to.m) continue;
        const float sum[4] = {acc[0][t][e], acc[0][t][2 + e], acc[1][t][e], acc[1][t][2 + e]};
        if (p.to.splits > 1) {
            *reinterpret_cast<float4*>(part_of<float>(p.to, my.split, m, n)) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        } else {
            finish(p.to, m, n, sum);
        }
    }
}

// Shares in their order, for four features of a token.
KERNEL(THREADS) add_shares(const Planes p) {
    const int m = blockIdx.x, n = (blockIdx.y * THREADS + threadIdx.x) * 4;
    if (n >= p.to.n) return;
    float sum[4] = {};
    for (int split = 0; split < p.to.splits; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(part_of<const float>(p.to, split, m, n));
        sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    }
    finish(p.to, m, n, sum);
}

// Ŵ [N, K] of the type of y: each thread the planes of eight input features.
KERNEL(ROW_THREADS) dense(const Planes p) {
    const int n = blockIdx.x, k = (blockIdx.y * ROW_THREADS + threadIdx.x) * 8;
    if (k >= p.k) return;
    const int group = k / p.size, j = k % p.size;  // eight neighbours share a group: 64 divides its size, or it is the only one
    float value[8] = {};
    for (int plane = p.first[group]; plane < p.first[group + 1]; ++plane) {
        const int at = plane * p.width + j, local = at % STEP;
        const int lane = n % WARP / 4 * 4 + local / 16 % 4;
        const int64_t tile = static_cast<int64_t>(n / WARP) * p.steps + at / STEP;
        const uint32_t word = p.words[(tile * WARP + lane) * 4 + n % 4];
        const int stretch = p.width % STEP ? STEP / 2 : STEP;
        const float r = from_bf16(p.rows[static_cast<int64_t>(at / stretch) * p.to.columns + n]);
        UNROLL for (int i = 0; i < 8; ++i) {
            const int pair = 8 * (local / 64) + 4 * (local / 8 % 2) + i / 2;
            const float size = r * from_bf16(p.columns[at + i]);
            value[i] += word >> (place_of(pair) + 16 * (i % 2)) & 1 ? size : -size;
        }
    }
    UNROLL for (int half = 0; half < 2; ++half) {
        const float four[4] = {value[4 * half] * p.to.unit, value[4 * half + 1] * p.to.unit, value[4 * half + 2] * p.to.unit,
                               value[4 * half + 3] * p.to.unit};
        const int count = p.k - k - 4 * half;
        if (count > 0) store4(p.to.y, n * p.to.stride + k + 4 * half, count, p.to.type, four);
    }
}

template <int BM, int BLOCK>
static int run(const Planes& p, void* stream) {
    const int rows = sizeof(float) * ROW_THREADS / WARP;
    const int stage = FEATURES * STEP / 8 + BM * STEP * 2 + STEP / BLOCK * (BM * 4 + FEATURES * 2);
    if (const int wrong = launch(prepare<BLOCK>, dim3(p.padded), ROW_THREADS, rows, stream, p)) return wrong;
    const dim3 grid(p.to.columns / FEATURES * p.to.splits, p.padded / BM);
    if (const int wrong = launch(product<BM, BLOCK>, grid, THREADS, stage * STAGES, stream, p)) return wrong;
    if (p.to.splits == 1) return 0;
    return launch(add_shares, dim3(p.to.m, (p.to.n + THREADS * 4 - 1) / (THREADS * 4)), THREADS, 0, stream, p);
}

template <int BLOCK>
static int run_by_tokens(const Planes& p, int bm, void* stream) {
    switch (bm) {
        case 8: return run<8, BLOCK>(p, stream);
        case 16: return run<16, BLOCK>(p, stream);
        case 32: return run<32, BLOCK>(p, stream);
        case 64: return run<64, BLOCK>(p, stream);
        default: return -1;
    }
}

// 0, or what `dlqc_said` has words for. M' is a multiple of bm.
extern "C" int dlqc_planes(const Planes* p, int bm, void* stream) {
    return p->width % STEP == 0 ? run_by_tokens<128>(*p, bm, stream) : run_by_tokens<64>(*p, bm, stream);
}

extern "C" int dlqc_planes_dense(const Planes* p, void* stream) {
    const int eights = (p->k + 7) / 8;
    return launch(dense, dim3(p->to.n, (eights + ROW_THREADS - 1) / ROW_THREADS), ROW_THREADS, 0, stream, *p);
}

extern "C" const char* dlqc_said(int error) { return error == -1 ? "no such number of tokens in a block" : said(error); }
