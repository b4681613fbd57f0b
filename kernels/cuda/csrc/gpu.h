// What the kernels of this folder use of a GPU, each thing under one name: nothing else in device code is CUDA's own.
//
// A host compiler takes the same sources with an emulate.h in its path that gives these names a meaning on a CPU. That is
// how the tests run whole kernels without a GPU; the package has no such file.
#pragma once
#include <cstdint>

constexpr int WARP = 32;

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define UNROLL _Pragma("unroll")

// The dynamic shared memory of the block.
DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

DEVICE void barrier() { __syncthreads(); }

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 16 bytes from global to shared memory, later; both aligned. A thread sees its own copies after `copies_done`, and those of
// others after a barrier that they reach afterwards.
DEVICE void copy16(void* shared, const void* global) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of the committed groups of copies are under way.
template <int Pending>
DEVICE void copies_done() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// D[16, 8] = A[16, 16] · B[16, 8] + C, bfloat16 pairs, float32 sums; one warp, fragments as PTX defines them for m16n8k16.
DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// D[16, 8] = A[16, 32] · B[32, 8] + C, int8 by fours, int32 sums; m16n8k32.
DEVICE void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// Two floats rounded to 16 bits, the first in the lower half.
DEVICE uint32_t pair_bf16(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE uint32_t pair_f16(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE float from_f16(uint16_t half) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(half));
    return d;
}

template <class Arguments>
static int launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared, void* stream, const Arguments& given) {
    if (shared > 48 << 10) {
        const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (refused != cudaSuccess) return static_cast<int>(refused);
    }
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(given);
    return static_cast<int>(cudaGetLastError());
}
static const char* said(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#else
#include "emulate.h"
#endif

#include <cmath>

DEVICE float from_bf16(uint32_t bits) { return as_float(bits << 16); }
