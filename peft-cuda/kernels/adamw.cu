// AdamW over a list of tensors, with the norm of all gradients and clipping by it, in three launches for any number of
// tensors. Nothing is read by the host in between, and sums are added in one order: the same bits at each run.
//
//     squares    of each chunk the sum of squared gradients
//     norm       the norm, what gradients are multiplied with, whether the step is taken; each tensor's step and rates
//     update     p <- p * decay         m <- m + (1 - beta1) (g - m)         v <- beta2 * v + (1 - beta2) g^2
//                p <- p - rate * m / (sqrt(v) / root + eps)
#include "common.cuh"

// A tensor, as src/adamw.rs writes it. Types: 0 f32, 1 bf16, 2 f16.
struct Entry {
    void *p;
    const void *g;
    float *m, *v;
    int64_t length;
    double lr_scale, weight_decay;
    uint32_t p_type, g_type;
};

struct Chunk {
    uint32_t tensor, index;
};

// What the update of a tensor multiplies with in this step.
struct Rates {
    float decay, rate, root;
};

// The norm, the factor of clipping, and 1 if the step was left out since the norm is not finite.
struct Status {
    double norm, factor, skipped;
};

__device__ __forceinline__ double block_total(double x, double *scratch) {
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) total += scratch[warp];
    return total;
}

// Runs `body(first, count)` over the thread's elements of a chunk, four at a time but for the last few of the tensor.
template <class F> __device__ __forceinline__ void each(const Entry &e, const Chunk &c, int64_t length, F body) {
    int64_t start = c.index * length, end = start + length < e.length ? start + length : e.length;
    for (int64_t i = start + threadIdx.x * 4; i < end; i += blockDim.x * 4) body(i, end - i < 4 ? int(end - i) : 4);
}

// All tensors start at multiples of 16 bytes, and chunks at multiples of four elements.
template <class T> __device__ __forceinline__ Vector<float, 4> read(const T *x, int64_t i, int count) {
    Vector<float, 4> out = {};
    if (count == 4) {
        Vector<T, 4> v = load<T, 4>(x + i);
        for (int j = 0; j < 4; j++) out.at[j] = to_float(v.at[j]);
    } else {
        for (int j = 0; j < 3; j++)
            if (j < count) out.at[j] = to_float(x[i + j]);
    }
    return out;
}
template <class T> __device__ __forceinline__ void write(T *x, int64_t i, int count, const Vector<float, 4> &v) {
    if (count == 4) {
        Vector<T, 4> out;
        for (int j = 0; j < 4; j++) out.at[j] = As<T>::from(v.at[j]);
        store<T, 4>(x + i, out);
    } else {
        for (int j = 0; j < 3; j++)
            if (j < count) x[i + j] = As<T>::from(v.at[j]);
    }
}

template <class G>
__device__ __forceinline__ double squares_of(const Entry &e, const Chunk &c, int64_t length) {
    double sum = 0;
    each(e, c, length, [&](int64_t i, int count) {
        Vector<float, 4> g = read(static_cast<const G *>(e.g), i, count);
        for (int j = 0; j < 4; j++) sum += double(g.at[j]) * g.at[j];
    });
    return sum;
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_squares(const Entry *entries, const Chunk *chunks, double *partial, int64_t length) {
    Chunk c = chunks[blockIdx.x];
    Entry e = entries[c.tensor];
    double sum = e.g_type == 0   ? squares_of<float>(e, c, length)
                 : e.g_type == 1 ? squares_of<bf16>(e, c, length)
                                 : squares_of<f16>(e, c, length);
    sum = block_total(sum, static_cast<double *>(shared_memory()));
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
EXPORT(adamw_squares)

// One block. `max_norm` 0 is none. Steps count the updates of a tensor.
extern "C" __global__ void __launch_bounds__(256)
    adamw_norm(const double *partial, int chunks, const Entry *entries, int tensors, uint32_t *steps, Rates *rates,
               Status *status, double max_norm, double lr, double beta1, double beta2) {
    double sum = 0;
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) sum += partial[i];
    double norm = sqrt(block_total(sum, static_cast<double *>(shared_memory())));
    bool finite = norm <= 1.7976931348623157e308;
    double factor = finite && max_norm > 0 ? max_norm / (norm + 1e-6) : 1.0;
    if (threadIdx.x == 0) *status = Status{norm, factor < 1 ? factor : 1.0, finite ? 0.0 : 1.0};
    if (!finite) return;
    for (int i = threadIdx.x; i < tensors; i += blockDim.x) {
        double step = double(++steps[i]), rate = lr * entries[i].lr_scale;
        rates[i] = Rates{float(1 - rate * entries[i].weight_decay), float(rate / (1 - pow(beta1, step))),
                         float(sqrt(1 - pow(beta2, step)))};
    }
}
EXPORT(adamw_norm)

struct Moments {
    float one_minus_beta1, beta2, one_minus_beta2, eps;
};

template <class P, class G>
__device__ __forceinline__ void update(const Entry &e, const Chunk &c, int64_t length, Rates r, float factor,
                                       Moments k) {
    each(e, c, length, [&](int64_t i, int count) {
        Vector<float, 4> p = read(static_cast<const P *>(e.p), i, count);
        Vector<float, 4> g = read(static_cast<const G *>(e.g), i, count);
        Vector<float, 4> m = read(e.m, i, count), v = read(e.v, i, count);
        for (int j = 0; j < 4; j++) {
            float gradient = g.at[j] * factor;
            m.at[j] += k.one_minus_beta1 * (gradient - m.at[j]);
            v.at[j] = v.at[j] * k.beta2 + k.one_minus_beta2 * gradient * gradient;
            p.at[j] = p.at[j] * r.decay - r.rate * m.at[j] / (sqrtf(v.at[j]) / r.root + k.eps);
        }
        write(e.m, i, count, m);
        write(e.v, i, count, v);
        write(static_cast<P *>(e.p), i, count, p);
    });
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_update(const Entry *entries, const Chunk *chunks, const Rates *rates, const Status *status, int64_t length,
                 float one_minus_beta1, float beta2, float one_minus_beta2, float eps) {
    if (status->skipped != 0) return;
    Chunk c = chunks[blockIdx.x];
    Entry e = entries[c.tensor];
    Rates r = rates[c.tensor];
    Moments k = {one_minus_beta1, beta2, one_minus_beta2, eps};
    float factor = float(status->factor);
    // A gradient has its parameter's type, or is f32.
    switch (e.p_type * 3 + e.g_type) {
    case 0: return update<float, float>(e, c, length, r, factor, k);
    case 3: return update<bf16, float>(e, c, length, r, factor, k);
    case 4: return update<bf16, bf16>(e, c, length, r, factor, k);
    case 6: return update<f16, float>(e, c, length, r, factor, k);
    case 8: return update<f16, f16>(e, c, length, r, factor, k);
    }
}
EXPORT(adamw_update)
