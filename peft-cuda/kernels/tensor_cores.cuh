// Products of 16 rows by a warp on tensor cores: bf16 and f16 by m16n8k16, f32 by m16n8k8 in TF32, or in three products of
// TF32 parts, which keeps 22 bits of each factor. Lane = 4 g + t; see the PTX ISA for who holds what.
#pragma once
#include "common.cuh"

#ifndef PEFT_EMULATION
#define MULTIPLY_ADD(T, SHAPE, TYPE)                                                                                   \
    __device__ __forceinline__ void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) { \
        asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 "                                   \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                 \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                  \
    }
MULTIPLY_ADD(bf16, "m16n8k16", "bf16")
MULTIPLY_ADD(f16, "m16n8k16", "f16")
MULTIPLY_ADD(float, "m16n8k8", "tf32")

__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void load_matrices_turned(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}
#endif

__device__ __forceinline__ uint32_t half_bits(bf16 x) {
#ifdef PEFT_EMULATION
    return x.bits;
#else
    return __bfloat16_as_ushort(x);
#endif
}
__device__ __forceinline__ uint32_t half_bits(f16 x) {
#ifdef PEFT_EMULATION
    return x.bits;
#else
    return __half_as_ushort(x);
#endif
}
template <class T> __device__ __forceinline__ uint32_t pair(float low, float high) {
    return half_bits(As<T>::from(low)) | half_bits(As<T>::from(high)) << 16;
}

// How many columns of A one instruction multiplies.
template <class T> constexpr int DEPTH = sizeof(T) == 4 ? 8 : 16;

// Operands of two multiplications: four registers of A, or two times two of B.
template <class T> struct Operand {
    uint32_t r[4];
};
// `low` is what TF32 leaves of each element.
template <> struct Operand<float> {
    uint32_t r[4], low[4];
    __device__ __forceinline__ void set(int i, float x) {
        r[i] = to_tf32(x);
        low[i] = to_tf32(x - float_of(r[i]));
    }
};

// A of `a[row][k]` (16 rows, from its first element on).
template <class T> __device__ __forceinline__ Operand<T> left(const T *a, int pitch) {
    Operand<T> out;
    int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        load_matrices(out.r, a + lane % 16 * pitch + lane / 16 * 8);
    } else {
        const T *at = a + lane / 4 * pitch + lane % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) out.set(i, at[i % 2 * 8 * pitch + i / 2 * 4]);
    }
    return out;
}

// B of `b[column][k]`, 16 columns.
template <class T> __device__ __forceinline__ Operand<T> right(const T *b, int pitch) {
    Operand<T> out;
    int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        load_matrices(out.r, b + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
    } else {
        const T *at = b + lane / 4 * pitch + lane % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) out.set(i, at[i / 2 * 8 * pitch + i % 2 * 4]);
    }
    return out;
}

// B of `b[k][column]`, 16 columns, for an A of `from_results`.
template <class T> __device__ __forceinline__ Operand<T> right_turned(const T *b, int pitch) {
    Operand<T> out;
    int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        load_matrices_turned(out.r, b + lane % 16 * pitch + lane / 16 * 8);
    } else {
        const T *at = b + lane % 4 * 2 * pitch + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) out.set(i, at[i % 2 * pitch + i / 2 * 8]);
    }
    return out;
}

// A of results of earlier multiplications: of c[0] and c[1] (16 columns) for halves, of c[0] (8 columns) for f32. What f32
// counts as column t and t + 4 are columns 2t and 2t + 1: a product does not mind, as B does the same.
template <class T> __device__ __forceinline__ Operand<T> from_results(const float (*c)[4]) {
    Operand<T> out;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) out.r[i] = pair<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) out.set(i, c[0][i % 2 * 2 + i / 2]);
    }
    return out;
}

// c += a * b for the two columns of tiles that b holds. `exact`: f32 beyond TF32.
template <class T>
__device__ __forceinline__ void multiply_add(float (*c)[4], const Operand<T> &a, const Operand<T> &b, bool exact) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if constexpr (sizeof(T) == 4) {
            if (exact) {
                multiply_fragments(c[i], a.low, b.r[2 * i], b.r[2 * i + 1], T{});
                multiply_fragments(c[i], a.r, b.low[2 * i], b.low[2 * i + 1], T{});
            }
        }
        multiply_fragments(c[i], a.r, b.r[2 * i], b.r[2 * i + 1], T{});
    }
}

// c += a * b for `a[row][k]` (16 rows) and `b[column][k]` (8 N columns), both in shared memory.
template <class T, int N>
__device__ __forceinline__ void product(float (&c)[N][4], const T *a, const T *b, int pitch, int depth, bool exact) {
    // Matrix instructions want the warp together, which a branch before may have parted.
    __syncwarp();
    for (int k = 0; k < depth; k += DEPTH<T>) {
        Operand<T> l = left(a + k, pitch);
#pragma unroll
        for (int n = 0; n < N; n += 2) multiply_add(&c[n], l, right(b + n * 8 * pitch + k, pitch), exact);
    }
}

// c += a * b for results `a` (16 rows, 8 K columns) and `b[k][column]` in shared memory (8 N columns, `width` of them used).
template <class T, int K, int N>
__device__ __forceinline__ void product_of_results(float (&c)[N][4], const float (&a)[K][4], const T *b, int pitch,
                                                   int width, bool exact) {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < K * 8; k += DEPTH<T>) {
        Operand<T> l = from_results<T>(&a[k / 8]);
#pragma unroll
        for (int n = 0; n < N; n += 2)
            if (n * 8 < width) multiply_add(&c[n], l, right_turned(b + k * pitch + n * 8, pitch), exact);
    }
}
