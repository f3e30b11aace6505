// Types, vectors and reductions that all kernels share. Storage is f32, bf16 or f16; arithmetic is f32.
#pragma once

#ifdef PEFT_EMULATION
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
using bf16 = __nv_bfloat16;
using f16 = __half;
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ f16 to_f16(float x) { return __float2half_rn(x); }
// Kernels are found by their names.
#define EXPORT(name)
#endif

__device__ __forceinline__ float to_float(float x) { return x; }

template <class T> struct As;
template <> struct As<float> {
    static __device__ __forceinline__ float from(float x) { return x; }
};
template <> struct As<bf16> {
    static __device__ __forceinline__ bf16 from(float x) { return to_bf16(x); }
};
template <> struct As<f16> {
    static __device__ __forceinline__ f16 from(float x) { return to_f16(x); }
};

// What a value becomes when it is stored as a T and read again.
template <class T> __device__ __forceinline__ float rounded(float x) { return to_float(As<T>::from(x)); }

// N elements that are read and written in accesses of up to 16 bytes; N = 1 where rows are not aligned.
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T at[N];
};
template <class T, int N> __device__ __forceinline__ Vector<T, N> load(const T *from) {
    return *reinterpret_cast<const Vector<T, N> *>(from);
}
template <class T, int N> __device__ __forceinline__ void store(T *to, const Vector<T, N> &value) {
    *reinterpret_cast<Vector<T, N> *>(to) = value;
}

// The block's dynamic shared memory.
__device__ __forceinline__ void *shared_memory() {
#ifdef PEFT_EMULATION
    return emulation::shared();
#else
    extern __shared__ float4 memory[];
    return memory;
#endif
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// The sum over the threads that share a row: a warp, or the whole block. `scratch` holds 32 floats.
__device__ __forceinline__ float row_sum(float x, bool by_warp, float *scratch) {
    x = warp_sum(x);
    if (by_warp) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) total += scratch[warp];
    return total;
}
