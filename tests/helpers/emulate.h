// The names of kernels/cuda/csrc/gpu.h on a CPU: every thread of a block runs by itself until it waits for others. For tests.
//
// What is checked on the way: threads of a block meet at the same barriers, threads of a warp at the same products and
// shuffles; grids, shared memory and arguments are of a size that a launch takes. A copy to shared memory fills its place with
// ones when it is issued and reads its source only when it is waited for; shared memory begins as ones, and ends before a page
// that may not be touched. Threads and blocks take turns in an order that `dlqc_order` chooses, so what depends on an order that
// CUDA does not promise comes out differently.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define DEVICE static inline
#define DEVICE_MEMBER inline
#define KERNEL(threads) void
#define UNROLL

using std::max;
using std::min;

struct dim3 {
    int x, y, z;
    dim3(int x = 1, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

static dim3 threadIdx, blockIdx;

namespace emulated {

enum What { RUNNING, BARRIER, BF16, S8, SHUFFLE, DONE };

struct Copy { char* to; const char* from; };

struct Thread {
    ucontext_t context;
    char* stack;
    What at;
    std::vector<std::vector<Copy>> groups;  // committed and still under way, the oldest first
    std::vector<Copy> open;
    // Operands of what a warp does together.
    float value;
    int mask;
    uint32_t a[4], b[2];
    union { float f[4]; int32_t i[4]; } c, d;
};

constexpr size_t STACK = 256 << 10;
static ucontext_t scheduler;
static std::vector<Thread> threads;
static int current, seed;
static char* memory;  // shared by a block
static size_t size;
static void (*body)(const void*);
static const void* given;

static void stop(const char* why) {
    std::fprintf(stderr, "emulated kernel: %s (thread %d, block %d, %d)\n", why, threadIdx.x, blockIdx.x, blockIdx.y);
    std::abort();
}

static void wait(What what) {
    Thread& own = threads[current];
    own.at = what;
    swapcontext(&own.context, &scheduler);
}

static void enter() {
    body(given);
    Thread& own = threads[current];
    for (auto& group : own.groups) if (!group.empty()) stop("a thread ended with copies under way");
    if (!own.open.empty()) stop("a thread ended with copies that it never committed");
    own.at = DONE;
    swapcontext(&own.context, &scheduler);
}

static std::vector<int> order(int count) {
    std::vector<int> made(count);
    std::iota(made.begin(), made.end(), 0);
    if (seed == 1) std::reverse(made.begin(), made.end());
    if (seed > 1) std::shuffle(made.begin(), made.end(), std::mt19937(seed));
    return made;
}

static float bf16(uint32_t bits) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Fragments of m16n8k16 and m16n8k32 as the PTX manual gives them, element by element.
static void together(int warp) {
    Thread* lanes = &threads[warp * 32];
    if (lanes[0].at == SHUFFLE) {
        float values[32];
        for (int i = 0; i < 32; ++i) values[i] = lanes[i].value;
        for (int i = 0; i < 32; ++i) lanes[i].value = values[i ^ lanes[i].mask];
        return;
    }
    const bool whole = lanes[0].at == S8;
    static float fa[16][16], fb[16][8];
    static int32_t ia[16][32], ib[32][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int group = lane >> 2, member = lane % 4;
        if (whole) {
            for (int i = 0; i < 16; ++i) {
                const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8, column = member * 4 + (i & 3) + (i < 8 ? 0 : 16);
                ia[row][column] = static_cast<int8_t>(lanes[lane].a[i / 4] >> 8 * (i % 4));
            }
            for (int i = 0; i < 8; ++i) {
                const int row = member * 4 + (i & 3) + (i < 4 ? 0 : 16);
                ib[row][group] = static_cast<int8_t>(lanes[lane].b[i / 4] >> 8 * (i % 4));
            }
        } else {
            for (int i = 0; i < 8; ++i) {
                const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = member * 2 + (i & 1) + (i < 4 ? 0 : 8);
                fa[row][column] = bf16(lanes[lane].a[i / 2] >> 16 * (i % 2) & 0xffff);
            }
            for (int i = 0; i < 4; ++i) {
                const int row = member * 2 + (i & 1) + (i < 2 ? 0 : 8);
                fb[row][group] = bf16(lanes[lane].b[i / 2] >> 16 * (i % 2) & 0xffff);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
        if (whole) {
            uint32_t sum = lanes[lane].c.i[i];
            for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(ia[row][k] * ib[k][column]);
            lanes[lane].d.i[i] = static_cast<int32_t>(sum);
        } else {
            float sum = lanes[lane].c.f[i];
            for (int k = 0; k < 16; ++k) sum += fa[row][k] * fb[k][column];
            lanes[lane].d.f[i] = sum;
        }
    }
}

static void run_block(int count) {
    threads.resize(count);
    for (Thread& thread : threads) {
        if (!thread.stack) thread.stack = static_cast<char*>(std::malloc(STACK));
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack;
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, enter, 0);
        thread.at = RUNNING;
        thread.groups.clear();
        thread.open.clear();
    }
    std::memset(memory, 0xff, size);
    const std::vector<int> turns = order(count);
    for (;;) {
        for (int i : turns) {
            if (threads[i].at != RUNNING) continue;
            current = i;
            threadIdx = dim3(i);
            swapcontext(&scheduler, &threads[i].context);
        }
        bool moved = false, over = true;
        for (int warp = 0; warp < count / 32; ++warp) {
            const What at = threads[warp * 32].at;
            if (at == BARRIER || at == DONE) continue;
            for (int i = 0; i < 32; ++i) if (threads[warp * 32 + i].at != at) stop("a warp is not of one mind");
            together(warp);
            for (int i = 0; i < 32; ++i) threads[warp * 32 + i].at = RUNNING;
            moved = true;
        }
        int waiting = 0;
        for (Thread& thread : threads) waiting += thread.at == BARRIER, over &= thread.at == DONE;
        if (over) return;
        if (moved) continue;
        if (waiting != count) stop("not all threads come to a barrier");
        for (Thread& thread : threads) thread.at = RUNNING;
    }
}

}  // namespace emulated

DEVICE char* shared_memory() { return emulated::memory; }
DEVICE void barrier() { emulated::wait(emulated::BARRIER); }

DEVICE float shuffle_xor(float value, int mask) {
    emulated::Thread& own = emulated::threads[emulated::current];
    own.value = value, own.mask = mask;
    emulated::wait(emulated::SHUFFLE);
    return own.value;
}

DEVICE void copy16(void* shared, const void* global) {
    char* to = static_cast<char*>(shared);
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(global) % 16) emulated::stop("a copy is not aligned");
    if (to < emulated::memory || to + 16 > emulated::memory + emulated::size) emulated::stop("a copy leaves shared memory");
    std::memset(to, 0xff, 16);
    emulated::threads[emulated::current].open.push_back({to, static_cast<const char*>(global)});
}
DEVICE void commit_copies() {
    emulated::Thread& own = emulated::threads[emulated::current];
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}
template <int Pending>
DEVICE void copies_done() {
    emulated::Thread& own = emulated::threads[emulated::current];
    while (own.groups.size() > Pending) {
        for (const auto& copy : own.groups.front()) std::memcpy(copy.to, copy.from, 16);
        own.groups.erase(own.groups.begin());
    }
}

DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    emulated::Thread& own = emulated::threads[emulated::current];
    std::memcpy(own.a, a, 16), std::memcpy(own.c.f, c, 16);
    own.b[0] = b0, own.b[1] = b1;
    emulated::wait(emulated::BF16);
    std::memcpy(d, own.d.f, 16);
}
DEVICE void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
    emulated::Thread& own = emulated::threads[emulated::current];
    std::memcpy(own.a, a, 16), std::memcpy(own.c.i, c, 16);
    own.b[0] = b0, own.b[1] = b1;
    emulated::wait(emulated::S8);
    std::memcpy(d, own.d.i, 16);
}

DEVICE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
DEVICE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// To nearest, ties to even, for finite numbers.
DEVICE uint32_t round_bf16(float value) {
    const uint32_t bits = as_bits(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE uint32_t round_f16(float value) {
    const uint32_t sign = as_bits(value) >> 16 & 0x8000;
    const double size = std::fabs(static_cast<double>(value));
    if (size >= 65520.0) return sign | 0x7c00;
    if (size == 0.0) return sign;
    const int exponent = std::max(std::ilogb(size), -14);
    const uint32_t steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024 … 2048, or subnormal
    return sign | (steps + (static_cast<uint32_t>(exponent + 14) << 10));
}
DEVICE uint32_t pair_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
DEVICE uint32_t pair_f16(float low, float high) { return round_f16(low) | round_f16(high) << 16; }
DEVICE float from_f16(uint16_t half) {
    const int exponent = half >> 10 & 31, digits = half & 1023;
    const float size = exponent ? std::ldexp(1024.0f + digits, exponent - 25) : std::ldexp(static_cast<float>(digits), -24);
    return half >> 15 ? -size : size;
}

template <class Arguments>
static int launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared, void*, const Arguments& given) {
    if (grid.y > 65535 || threads > 1024 || threads % 32) emulated::stop("no such grid");
    if (shared > 232448 || shared % 16 || sizeof(Arguments) > 4096) emulated::stop("more than a launch takes");
    static void (*chosen)(Arguments);
    chosen = kernel;
    const size_t page = sysconf(_SC_PAGESIZE), whole = (shared + page - 1) / page * page;
    void* made = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED || mprotect(static_cast<char*>(made) + whole, page, PROT_NONE)) emulated::stop("no memory");
    emulated::memory = static_cast<char*>(made) + whole - shared;
    emulated::size = shared;
    emulated::body = [](const void* arguments) { chosen(*static_cast<const Arguments*>(arguments)); };
    emulated::given = &given;
    for (int block : emulated::order(grid.x * grid.y)) {
        blockIdx = dim3(block % grid.x, block / grid.x);
        emulated::run_block(threads);
    }
    munmap(made, whole + page);
    return 0;
}
static const char* said(int) { return "nothing"; }

extern "C" void dlqc_order(int seed) { emulated::seed = seed; }
