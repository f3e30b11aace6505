// Rotary embedding, sums over rows, and the largest element of each row.
#include "common.cuh"

// Turns pairs of each head by its token's angles (`cos`, `sin`: [tokens, half]); `sign` is -1 to turn back. A thread takes
// one pair, or one of the elements behind them that pass through.
template <class T>
__device__ __forceinline__ void rotary(const T *x, const float *cos, const float *sin, T *y, int64_t n, int heads,
                                       int dim, int half, int interleaved, float sign) {
    int items = dim - half;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        int item = i % items;
        int64_t head = i / items, token = head / heads, base = head * dim;
        if (item >= half) {
            y[base + item + half] = x[base + item + half];
            continue;
        }
        int64_t a = base + (interleaved ? 2 * item : item), b = interleaved ? a + 1 : a + half;
        float c = cos[token * half + item], s = sign * sin[token * half + item];
        float xa = to_float(x[a]), xb = to_float(x[b]);
        y[a] = As<T>::from(xa * c - xb * s);
        y[b] = As<T>::from(xb * c + xa * s);
    }
}

// Sums over a run of rows: of dy, of dy * x, or of dy * (x - mean) * rstd, as pointers are given. A block takes 32 columns
// and `run` rows, eight at a time; its sums are one row of `partial`.
template <class T>
__device__ __forceinline__ void column_sums(const T *dy, const T *x, const float *means, const float *rstds,
                                            float *partial, int64_t rows, int width, int run) {
    float *sums = static_cast<float *>(shared_memory());
    int column = blockIdx.x * 32 + threadIdx.x % 32, line = threadIdx.x / 32, lines = blockDim.x / 32;
    int64_t first = int64_t(blockIdx.y) * run, end = first + run < rows ? first + run : rows;
    float sum = 0;
    if (column < width) {
        for (int64_t row = first + line; row < end; row += lines) {
            float value = to_float(dy[row * width + column]);
            if (x) {
                float v = to_float(x[row * width + column]);
                if (means) v -= means[row];
                if (rstds) v *= rstds[row];
                value *= v;
            }
            sum += value;
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (line == 0 && column < width) {
        for (int i = 1; i < lines; i++) sum += sums[i * 32 + threadIdx.x];
        partial[int64_t(blockIdx.y) * width + column] = sum;
    }
}

// The sum of the rows of `partial`.
template <class T> __device__ __forceinline__ void sum_rows(const float *partial, T *out, int rows, int width) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = 0;
    for (int row = 0; row < rows; row++) sum += partial[int64_t(row) * width + column];
    out[column] = As<T>::from(sum);
}

struct Largest {
    float value;
    int index;
    int nan;
};
__device__ __forceinline__ void take(Largest &best, Largest other) {
    if (other.value > best.value || (other.value == best.value && other.index < best.index)) {
        best.value = other.value;
        best.index = other.index;
    }
    best.nan |= other.nan;
}

// The first of the largest elements of each row; all ones for a row with a NaN.
template <class T> __device__ __forceinline__ void argmax(const T *x, uint32_t *out, int width) {
    Largest *found = static_cast<Largest *>(shared_memory());
    const T *row = x + int64_t(blockIdx.x) * width;
    Largest best = {-INFINITY, 0x7fffffff, 0};
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = to_float(row[i]);
        take(best, Largest{v, i, v != v});
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        Largest other = {__shfl_xor_sync(0xffffffffu, best.value, mask), __shfl_xor_sync(0xffffffffu, best.index, mask),
                         __shfl_xor_sync(0xffffffffu, best.nan, mask)};
        take(best, other);
    }
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned warp = 1; warp < blockDim.x / 32; warp++) take(best, found[warp]);
        out[blockIdx.x] = best.nan ? 0xffffffffu : uint32_t(best.index);
    }
}

// Rows of `dy` added up by the row of the table that they belong to, in the order of tokens: block b makes row rows[b] of
// `out` from tokens[starts[b]..starts[b + 1]].
template <class T>
__device__ __forceinline__ void embedding_backward(const T *dy, const uint32_t *rows, const uint32_t *starts,
                                                   const uint32_t *tokens, T *out, int width) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0;
        for (uint32_t t = starts[blockIdx.x]; t < starts[blockIdx.x + 1]; t++)
            sum += to_float(dy[int64_t(tokens[t]) * width + i]);
        out[int64_t(rows[blockIdx.x]) * width + i] = As<T>::from(sum);
    }
}

#define KERNELS(T, SUFFIX)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        rotary_##SUFFIX(const T *x, const float *cos, const float *sin, T *y, int64_t n, int heads, int dim, int half, \
                        int interleaved, float sign) {                                                                 \
        rotary<T>(x, cos, sin, y, n, heads, dim, half, interleaved, sign);                                             \
    }                                                                                                                  \
    EXPORT(rotary_##SUFFIX)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        column_sums_##SUFFIX(const T *dy, const T *x, const float *means, const float *rstds, float *partial,          \
                             int64_t rows, int width, int run) {                                                       \
        column_sums<T>(dy, x, means, rstds, partial, rows, width, run);                                                \
    }                                                                                                                  \
    EXPORT(column_sums_##SUFFIX)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        sum_rows_##SUFFIX(const float *partial, T *out, int rows, int width) {                                         \
        sum_rows<T>(partial, out, rows, width);                                                                        \
    }                                                                                                                  \
    EXPORT(sum_rows_##SUFFIX)                                                                                          \
    extern "C" __global__ void __launch_bounds__(512) argmax_##SUFFIX(const T *x, uint32_t *out, int width) {          \
        argmax<T>(x, out, width);                                                                                      \
    }                                                                                                                  \
    EXPORT(argmax_##SUFFIX)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        embedding_backward_##SUFFIX(const T *dy, const uint32_t *rows, const uint32_t *starts, const uint32_t *tokens, \
                                    T *out, int width) {                                                               \
        embedding_backward<T>(dy, rows, starts, tokens, out, width);                                                   \
    }                                                                                                                  \
    EXPORT(embedding_backward_##SUFFIX)

KERNELS(float, f32)
KERNELS(bf16, bf16)
KERNELS(f16, f16)
