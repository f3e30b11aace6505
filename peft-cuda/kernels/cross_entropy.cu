// Cross-entropy of rows of logits with their targets, the gradient in place of the logits.
//
// With z = x, or cap * tanh(x / cap), m the largest z and s = sum exp(z - m):
//     nll = m - z[target] + log s          dx = weight * scale * (exp(z - m) / s - onehot) * dz/dx
// A row is read twice: once for m and s, which threads keep as they go (Milakov and Gimelshein 2018, arXiv:1805.02867),
// and once to be replaced.
#include "common.cuh"

struct Capped {
    float value, slope;
};

// `cap` 0 is none.
__device__ __forceinline__ Capped capped(float x, float cap) {
    if (cap == 0.0f) return {x, 1.0f};
    float t = tanhf(x / cap);
    return {cap * t, (1.0f - t) * (1.0f + t)};
}

// What some elements of a row come to: the largest logit (before the cap, which keeps the order), the first index that has
// it, and the sum of exp(z - m).
struct Part {
    float largest, m, sum;
    int index;
};

// exp(z - m), where an m of -inf (only of elements that are all -inf or NaN) counts as 0.
__device__ __forceinline__ float exponential(float z, float m) { return expf(z - (m == -INFINITY ? 0.0f : m)); }

__device__ __forceinline__ void merge(Part &a, const Part &b) {
    float m = b.m > a.m ? b.m : a.m;
    a.sum = a.sum * exponential(a.m, m) + b.sum * exponential(b.m, m);
    a.m = m;
    if (b.largest > a.largest || (b.largest == a.largest && b.index < a.index)) {
        a.largest = b.largest;
        a.index = b.index;
    }
}

// Of the whole row, in every thread of the block.
__device__ __forceinline__ Part whole_row(Part mine, Part *scratch) {
    for (int mask = 16; mask > 0; mask /= 2) {
        Part other = {__shfl_xor_sync(0xffffffffu, mine.largest, mask), __shfl_xor_sync(0xffffffffu, mine.m, mask),
                      __shfl_xor_sync(0xffffffffu, mine.sum, mask), __shfl_xor_sync(0xffffffffu, mine.index, mask)};
        merge(mine, other);
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
    __syncthreads();
    Part all = scratch[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; warp++) merge(all, scratch[warp]);
    return all;
}

// A block takes a row. `weights` may be null; the gradient is made where `replaces`.
template <class T, int N>
__device__ __forceinline__ void cross_entropy(T *x, const uint32_t *targets, const float *weights, float *nll,
                                              uint32_t *hits, int vocab, float scale, float cap, int replaces) {
    Part *scratch = static_cast<Part *>(shared_memory());
    int64_t row = blockIdx.x;
    x += row * vocab;
    int target = int(targets[row]);
    Part part = {-INFINITY, -INFINITY, 0.0f, 0x7fffffff};
    for (int i = threadIdx.x * N; i < vocab; i += blockDim.x * N) {
        Vector<T, N> v = load<T, N>(x + i);
        float z[N], m = part.m;
        for (int j = 0; j < N; j++) {
            float at = to_float(v.at[j]);
            z[j] = capped(at, cap).value;
            if (z[j] > m) m = z[j];
            if (at > part.largest || (at == part.largest && i + j < part.index)) {
                part.largest = at;
                part.index = i + j;
            }
        }
        if (m > part.m) {
            part.sum *= exponential(part.m, m);
            part.m = m;
        }
        for (int j = 0; j < N; j++) part.sum += exponential(z[j], m);
    }
    // Read before the barrier behind which it is replaced.
    float z = capped(to_float(x[target]), cap).value;
    Part all = whole_row(part, scratch);
    if (threadIdx.x == 0) {
        nll[row] = (all.m - z) + logf(all.sum);
        hits[row] = all.index == target;
    }
    if (!replaces) return;
    float factor = weights ? weights[row] * scale : scale, share = factor / all.sum;
    for (int i = threadIdx.x * N; i < vocab; i += blockDim.x * N) {
        Vector<T, N> v = load<T, N>(x + i);
        for (int j = 0; j < N; j++) {
            Capped c = capped(to_float(v.at[j]), cap);
            float p = exponential(c.value, all.m) * share;
            v.at[j] = As<T>::from((i + j == target ? p - factor : p) * c.slope);
        }
        store<T, N>(x + i, v);
    }
}

__device__ __forceinline__ double warp_total(double x) {
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// totals += {sum of weight * nll, sum of nll, hits}: one block, in the same order each time.
extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_totals(const float *nll, const uint32_t *hits, const float *weights, double *totals, int rows) {
    double *scratch = static_cast<double *>(shared_memory());
    double sums[3] = {0, 0, 0};
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        sums[0] += weights ? double(weights[row]) * nll[row] : double(nll[row]);
        sums[1] += nll[row];
        sums[2] += hits[row];
    }
    int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int i = 0; i < 3; i++) {
        double sum = warp_total(sums[i]);
        if (threadIdx.x % 32 == 0) scratch[i * warps + warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= 3) return;
    double total = totals[threadIdx.x];
    for (int i = 0; i < warps; i++) total += scratch[threadIdx.x * warps + i];
    totals[threadIdx.x] = total;
}
EXPORT(cross_entropy_totals)

#define KERNEL(T, N, SUFFIX)                                                                                           \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        cross_entropy_##SUFFIX(T *x, const uint32_t *targets, const float *weights, float *nll, uint32_t *hits,        \
                               int vocab, float scale, float cap, int replaces) {                                      \
        cross_entropy<T, N>(x, targets, weights, nll, hits, vocab, scale, cap, replaces);                              \
    }                                                                                                                  \
    EXPORT(cross_entropy_##SUFFIX)

KERNEL(float, 4, f32_vector)
KERNEL(float, 1, f32)
KERNEL(bf16, 8, bf16_vector)
KERNEL(bf16, 1, bf16)
KERNEL(f16, 8, f16_vector)
KERNEL(f16, 1, f16)
