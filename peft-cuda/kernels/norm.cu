// RMSNorm and LayerNorm over the rows of a matrix, a row by a warp or by a block.
//
// Forward:  y = (x - mean) * rstd * (offset + w) + b, mean = 0 for RMSNorm.
// Backward: with n = (x - mean) * rstd and g = dy * (offset + w):
//           dx = rstd * (g - mean(g) - n * mean(g * n)), without mean(g) for RMSNorm.
#include "common.cuh"

struct Row {
    int64_t index;
    int lane, lanes;
    bool by_warp;
};

// Which row this thread works on. Rows of a block by warps end together, so that a warp may leave as a whole.
__device__ __forceinline__ Row my_row(int warp_rows) {
    if (warp_rows) {
        int warps = blockDim.x / 32;
        return Row{int64_t(blockIdx.x) * warps + threadIdx.x / 32, int(threadIdx.x % 32), 32, true};
    }
    return Row{int64_t(blockIdx.x), int(threadIdx.x), int(blockDim.x), false};
}

template <bool CENTRED, class T, int N>
__device__ __forceinline__ void moments(const T *x, int width, float eps, const Row &row, float *scratch, float &mean,
                                        float &rstd) {
    mean = 0;
    if (CENTRED) {
        float sum = 0;
        for (int i = row.lane * N; i < width; i += row.lanes * N) {
            Vector<T, N> v = load<T, N>(x + i);
            for (int j = 0; j < N; j++) sum += to_float(v.at[j]);
        }
        mean = row_sum(sum, row.by_warp, scratch) / width;
    }
    float squares = 0;
    for (int i = row.lane * N; i < width; i += row.lanes * N) {
        Vector<T, N> v = load<T, N>(x + i);
        for (int j = 0; j < N; j++) {
            float d = to_float(v.at[j]) - mean;
            squares += d * d;
        }
    }
    rstd = 1.0f / sqrtf(row_sum(squares, row.by_warp, scratch) / width + eps);
}

// `rounds`: the normalised value, and the weight, are rounded to T before they meet, as transformers' LlamaRMSNorm does.
template <bool CENTRED, class T, class W, int N>
__device__ __forceinline__ void norm_forward(const T *x, const W *w, const W *b, T *y, int64_t rows, int width,
                                             float eps, float offset, int rounds, int warp_rows) {
    float *scratch = static_cast<float *>(shared_memory());
    Row row = my_row(warp_rows);
    if (row.index >= rows) return;
    x += row.index * width;
    y += row.index * width;
    float mean, rstd;
    moments<CENTRED, T, N>(x, width, eps, row, scratch, mean, rstd);
    for (int i = row.lane * N; i < width; i += row.lanes * N) {
        Vector<T, N> v = load<T, N>(x + i), out;
        Vector<W, N> weight = load<W, N>(w + i);
        for (int j = 0; j < N; j++) {
            float n = (to_float(v.at[j]) - mean) * rstd, factor = to_float(weight.at[j]) + offset;
            if (rounds) {
                n = rounded<T>(n);
                factor = rounded<T>(factor);
            }
            float value = n * factor;
            if (b) value += to_float(b[i + j]);
            out.at[j] = As<T>::from(value);
        }
        store<T, N>(y + i, out);
    }
}

// `dx`, or `means` and `rstds` (what the weight's gradient needs), may be null.
template <bool CENTRED, class T, class W, int N>
__device__ __forceinline__ void norm_backward(const T *x, const W *w, const T *dy, T *dx, float *means, float *rstds,
                                              int64_t rows, int width, float eps, float offset, int warp_rows) {
    float *scratch = static_cast<float *>(shared_memory());
    Row row = my_row(warp_rows);
    if (row.index >= rows) return;
    x += row.index * width;
    dy += row.index * width;
    float mean, rstd;
    moments<CENTRED, T, N>(x, width, eps, row, scratch, mean, rstd);
    if (row.lane == 0 && means) means[row.index] = mean;
    if (row.lane == 0 && rstds) rstds[row.index] = rstd;
    if (!dx) return;
    dx += row.index * width;
    float along = 0, sum = 0;
    for (int i = row.lane * N; i < width; i += row.lanes * N) {
        Vector<T, N> v = load<T, N>(x + i), d = load<T, N>(dy + i);
        Vector<W, N> weight = load<W, N>(w + i);
        for (int j = 0; j < N; j++) {
            float g = to_float(d.at[j]) * (to_float(weight.at[j]) + offset);
            along += g * ((to_float(v.at[j]) - mean) * rstd);
            sum += g;
        }
    }
    along = row_sum(along, row.by_warp, scratch) / width;
    sum = CENTRED ? row_sum(sum, row.by_warp, scratch) / width : 0;
    for (int i = row.lane * N; i < width; i += row.lanes * N) {
        Vector<T, N> v = load<T, N>(x + i), d = load<T, N>(dy + i), out;
        Vector<W, N> weight = load<W, N>(w + i);
        for (int j = 0; j < N; j++) {
            float g = to_float(d.at[j]) * (to_float(weight.at[j]) + offset);
            float n = (to_float(v.at[j]) - mean) * rstd;
            out.at[j] = As<T>::from(rstd * (g - sum - n * along));
        }
        store<T, N>(dx + i, out);
    }
}

#define KERNELS(KIND, CENTRED, T, W, N, SUFFIX)                                                                        \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        KIND##_forward_##SUFFIX(const T *x, const W *w, const W *b, T *y, int64_t rows, int width, float eps,          \
                                float offset, int rounds, int warp_rows) {                                             \
        norm_forward<CENTRED, T, W, N>(x, w, b, y, rows, width, eps, offset, rounds, warp_rows);                       \
    }                                                                                                                  \
    EXPORT(KIND##_forward_##SUFFIX)                                                                                    \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        KIND##_backward_##SUFFIX(const T *x, const W *w, const T *dy, T *dx, float *means, float *rstds, int64_t rows, \
                                 int width, float eps, float offset, int warp_rows) {                                  \
        norm_backward<CENTRED, T, W, N>(x, w, dy, dx, means, rstds, rows, width, eps, offset, warp_rows);              \
    }                                                                                                                  \
    EXPORT(KIND##_backward_##SUFFIX)
#define BOTH(T, W, N, SUFFIX) KERNELS(rms_norm, false, T, W, N, SUFFIX) KERNELS(layer_norm, true, T, W, N, SUFFIX)

BOTH(float, float, 4, f32_f32_vector)
BOTH(float, float, 1, f32_f32)
BOTH(bf16, bf16, 8, bf16_bf16_vector)
BOTH(bf16, bf16, 1, bf16_bf16)
BOTH(bf16, float, 8, bf16_f32_vector)
BOTH(bf16, float, 1, bf16_f32)
BOTH(f16, f16, 8, f16_f16_vector)
BOTH(f16, f16, 1, f16_f16)
BOTH(f16, float, 8, f16_f32_vector)
BOTH(f16, float, 1, f16_f32)
