// What both products share: where a block of threads stands, reading x by rows, and what becomes of sums.
//
// A block makes 128 output features by BM tokens: four warps of 32 features each. Weights are the left operand (rows of A),
// tokens its columns. Which feature a row of a fragment stands for is free, since weights are packed for it: row `quad` of the
// upper and lower half of tile t is feature 4·quad + 2·t + half of the warp's 32. So a thread holds four neighbouring features of
// a token, and stores them together.
#pragma once
#include "gpu.h"

enum Type { BFLOAT16, FLOAT16, FLOAT32 };

constexpr int THREADS = 128;   // of a product
constexpr int ROW_THREADS = 256;  // of a kernel that works on one token
constexpr int FEATURES = 128;  // output features of a block
constexpr int STEP = 128;      // input features of a turn of the loop
constexpr int STAGES = 4;

// Where results go. N' is `columns`: the output features with their padding.
struct Target {
    void* y;              // [M, N] of `type`, rows `stride` apart
    void* parts;          // [splits, M, N'] float32 or int32 if splits > 1
    const float* tokens;  // scales of tokens
    const float* bias;    // [N] or null
    int64_t stride;
    int type, m, n, columns, splits;
    float unit;           // what all sums are multiplied by
};

// Eight neighbours of a row, zeros from `count` on.
DEVICE void load8(float (&to)[8], const void* row, int64_t at, int count, int type) {
    const int size = type == FLOAT32 ? 4 : 2;
    const char* from = static_cast<const char*>(row) + at * size;
    if (count >= 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        uint32_t words[8];
        const uint4* wide = reinterpret_cast<const uint4*>(from);
        const uint4 first = wide[0], second = type == FLOAT32 ? wide[1] : first;
        words[0] = first.x, words[1] = first.y, words[2] = first.z, words[3] = first.w;
        words[4] = second.x, words[5] = second.y, words[6] = second.z, words[7] = second.w;
        UNROLL for (int i = 0; i < 8; ++i) {
            const uint32_t half = words[i / 2] >> 16 * (i % 2) & 0xffff;
            to[i] = type == FLOAT32 ? as_float(words[i]) : type == BFLOAT16 ? from_bf16(half) : from_f16(half);
        }
        return;
    }
    UNROLL for (int i = 0; i < 8; ++i) {
        if (i >= count) to[i] = 0.0f;
        else if (type == FLOAT32) to[i] = reinterpret_cast<const float*>(from)[i];
        else if (type == BFLOAT16) to[i] = from_bf16(reinterpret_cast<const uint16_t*>(from)[i]);
        else to[i] = from_f16(reinterpret_cast<const uint16_t*>(from)[i]);
    }
}

// Up to four neighbours, rounded to `type`.
DEVICE void store4(void* to, int64_t at, int count, int type, const float (&value)[4]) {
    char* out = static_cast<char*>(to) + at * (type == FLOAT32 ? 4 : 2);
    if (type == FLOAT32) {
        if (count >= 4 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
            *reinterpret_cast<float4*>(out) = make_float4(value[0], value[1], value[2], value[3]);
            return;
        }
        UNROLL for (int i = 0; i < 4; ++i) if (i < count) reinterpret_cast<float*>(out)[i] = value[i];
        return;
    }
    uint32_t pairs[2];
    UNROLL for (int i = 0; i < 2; ++i) {
        pairs[i] = type == BFLOAT16 ? pair_bf16(value[2 * i], value[2 * i + 1]) : pair_f16(value[2 * i], value[2 * i + 1]);
    }
    if (count >= 4 && reinterpret_cast<uintptr_t>(out) % 8 == 0) {
        *reinterpret_cast<uint2*>(out) = make_uint2(pairs[0], pairs[1]);
        return;
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        if (i < count) reinterpret_cast<uint16_t*>(out)[i] = static_cast<uint16_t>(pairs[i / 2] >> 16 * (i % 2));
    }
}

// The largest |x| of a row, for all threads; `shared` holds a float for each warp.
DEVICE float largest(const void* row, int k, int type, float* shared) {
    float most = 0.0f;
    for (int at = threadIdx.x * 8; at < k; at += ROW_THREADS * 8) {
        float x[8];
        load8(x, row, at, k - at, type);
        UNROLL for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i]));
    }
    UNROLL for (int far = WARP / 2; far; far /= 2) most = fmaxf(most, shuffle_xor(most, far));
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = most;
    barrier();
    UNROLL for (int i = 0; i < ROW_THREADS / WARP; ++i) most = fmaxf(most, shared[i]);
    return most;
}

// Where a thread of a product stands.
struct Place {
    int thread, lane, warp, quad, member;  // lane = 4·quad + member
    int tile, split, token;                // 128 output features, share of K, first token
    DEVICE_MEMBER Place(int splits, int bm)
        : thread(threadIdx.x), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), quad(threadIdx.x % WARP / 4),
          member(threadIdx.x % 4), tile(blockIdx.x / splits), split(blockIdx.x % splits), token(blockIdx.y * bm) {}
    // The first of the four output features of this thread.
    DEVICE_MEMBER int feature() const { return tile * FEATURES + warp * WARP + 4 * quad; }
};

// A run of bytes to shared memory by all threads; `to` and `from` are already at this thread's 16.
template <int BYTES>
DEVICE void copy_run(char* to, const char* from, int thread) {
    UNROLL for (int at = 0; at < BYTES; at += THREADS * 16) {
        if (at + THREADS * 16 <= BYTES || at + thread * 16 < BYTES) copy16(to + at, from + at);
    }
}

// Four neighbours in bfloat16.
DEVICE void load4(float (&to)[4], const char* from) {
    const uint2 pairs = *reinterpret_cast<const uint2*>(from);
    to[0] = as_float(pairs.x << 16), to[1] = as_float(pairs.x & 0xffff0000u);
    to[2] = as_float(pairs.y << 16), to[3] = as_float(pairs.y & 0xffff0000u);
}

// Sums of four neighbouring features of a token to y: the scale of the token, and the bias.
DEVICE void finish(const Target& target, int m, int n, const float (&sum)[4]) {
    float value[4];
    const float scale = target.tokens[m];
    UNROLL for (int i = 0; i < 4; ++i) {
        value[i] = sum[i] * target.unit * scale;
        if (target.bias && n + i < target.n) value[i] += target.bias[n + i];
    }
    store4(target.y, m * target.stride + n, target.n - n, target.type, value);
}

// Where share `split` of a token's sums is kept.
template <class Sum>
DEVICE Sum* part_of(const Target& target, int split, int m, int n) {
    return static_cast<Sum*>(target.parts) + (static_cast<int64_t>(split) * target.m + m) * target.columns + n;
}
