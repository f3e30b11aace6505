// Activations, gates, dropout, and a vector beside every row: one read of the arguments, one write of the result.
#include "common.cuh"

// The order of `Activation` in src/pointwise.rs.
enum Act { SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU_SQUARED, SIGMOID, TANH };

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Both {
    float value, slope;
};

// x * s with s = sigmoid(u), and its derivative for du = u'.
__device__ __forceinline__ Both swish(float x, float s, float du) { return {x * s, s + x * (s * (1.0f - s)) * du}; }

__device__ __forceinline__ Both activate(int act, float x) {
    constexpr float SQRT_2_OVER_PI = 0.7978846f, CUBIC = 0.044715f;
    switch (act) {
    case SILU: return swish(x, sigmoid(x), 1.0f);
    case GELU: {
        float cdf = 0.5f * (1.0f + erff(x * 0.70710678f));
        // Where 1 + erf cancels, the other tail is exact.
        if (x < -1.0f) cdf = 0.5f * erfcf(-x * 0.70710678f);
        return {x * cdf, cdf + x * (0.39894228f * expf(-0.5f * x * x))};
    }
    case GELU_TANH: {
        // (1 + tanh u) / 2 = sigmoid(2u), which is also accurate where tanh u is near -1.
        float u = 2.0f * SQRT_2_OVER_PI * x * (1.0f + CUBIC * (x * x));
        return swish(x, sigmoid(u), 2.0f * SQRT_2_OVER_PI * (1.0f + 3.0f * CUBIC * (x * x)));
    }
    case QUICK_GELU: return swish(x, sigmoid(1.702f * x), 1.702f);
    // Written so that NaN stays NaN.
    case RELU: return {x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};
    case RELU_SQUARED: return {x < 0 ? 0.0f : x * x, x < 0 ? 0.0f : 2.0f * x};
    case SIGMOID: {
        float s = sigmoid(x);
        return {s, s * (1.0f - s)};
    }
    default: {
        // 1 - tanh^2 = 4e / (1 + e)^2 with e = exp(-2|x|), which does not cancel where tanh is near 1.
        float e = expf(-2.0f * fabsf(x));
        return {tanhf(x), 4.0f * e / ((1.0f + e) * (1.0f + e))};
    }
    }
}

__device__ __forceinline__ int64_t my_first(int n) { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * n; }

// Runs its body for the first element of each vector of N that is this thread's; the last one may be cut short.
#define FOR_ELEMENTS(n, N)                                                                                             \
    for (int64_t first = my_first(N), stride = int64_t(gridDim.x) * blockDim.x * N; first < (n); first += stride)

template <class T, int N> __device__ __forceinline__ Vector<T, N> load_some(const T *x, int64_t first, int64_t n) {
    if (first + N <= n) return load<T, N>(x + first);
    Vector<T, N> v = {};
    for (int j = 0; j < N && first + j < n; j++) v.at[j] = x[first + j];
    return v;
}
template <class T, int N>
__device__ __forceinline__ void store_some(T *y, const Vector<T, N> &v, int64_t first, int64_t n) {
    if (first + N <= n) {
        store<T, N>(y + first, v);
        return;
    }
    for (int j = 0; j < N && first + j < n; j++) y[first + j] = v.at[j];
}

// act(x), or with `dy` the gradient of x.
template <class T, int N>
__device__ __forceinline__ void activation(const T *x, const T *dy, T *out, int64_t n, int act) {
    FOR_ELEMENTS(n, N) {
        Vector<T, N> v = load_some<T, N>(x, first, n), d = v, o;
        if (dy) d = load_some<T, N>(dy, first, n);
        for (int j = 0; j < N; j++) {
            Both f = activate(act, to_float(v.at[j]));
            o.at[j] = As<T>::from(dy ? f.slope * to_float(d.at[j]) : f.value);
        }
        store_some<T, N>(out, o, first, n);
    }
}

template <class T, int N>
__device__ __forceinline__ void gated_forward(const T *gate, const T *up, T *out, int64_t n, int act) {
    FOR_ELEMENTS(n, N) {
        Vector<T, N> g = load_some<T, N>(gate, first, n), u = load_some<T, N>(up, first, n), o;
        for (int j = 0; j < N; j++) o.at[j] = As<T>::from(activate(act, to_float(g.at[j])).value * to_float(u.at[j]));
        store_some<T, N>(out, o, first, n);
    }
}

// Either gradient may be null.
template <class T, int N>
__device__ __forceinline__ void gated_backward(const T *gate, const T *up, const T *dy, T *d_gate, T *d_up, int64_t n,
                                               int act) {
    FOR_ELEMENTS(n, N) {
        Vector<T, N> g = load_some<T, N>(gate, first, n), u = load_some<T, N>(up, first, n);
        Vector<T, N> d = load_some<T, N>(dy, first, n), dg, du;
        for (int j = 0; j < N; j++) {
            Both f = activate(act, to_float(g.at[j]));
            float grad = to_float(d.at[j]);
            dg.at[j] = As<T>::from(f.slope * grad * to_float(u.at[j]));
            du.at[j] = As<T>::from(f.value * grad);
        }
        if (d_gate) store_some<T, N>(d_gate, dg, first, n);
        if (d_up) store_some<T, N>(d_up, du, first, n);
    }
}

struct Words {
    uint32_t at[4];
};

// Philox4x32-10 (Salmon et al., SC 2011), as src/philox.rs of peft-kernels.
__device__ __forceinline__ Words philox(uint64_t block, uint32_t step, uint32_t site, uint64_t seed) {
    uint32_t c[4] = {uint32_t(block), uint32_t(block >> 32), step, site};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint32_t h0 = __umulhi(0xD2511F53u, c[0]), l0 = 0xD2511F53u * c[0];
        uint32_t h1 = __umulhi(0xCD9E8D57u, c[2]), l1 = 0xCD9E8D57u * c[2];
        c[0] = h1 ^ c[1] ^ k0;
        c[1] = l1;
        c[2] = h0 ^ c[3] ^ k1;
        c[3] = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c[0], c[1], c[2], c[3]}};
}

// x times the mask: element i stays where word i of the stream is at least `threshold`. N is a multiple of four.
template <class T, int N>
__device__ __forceinline__ void dropout(const T *x, T *y, int64_t n, uint32_t threshold, float scale, uint64_t seed,
                                        uint32_t step, uint32_t site) {
    FOR_ELEMENTS(n, N) {
        Vector<T, N> v = load_some<T, N>(x, first, n), o;
        for (int j = 0; j < N; j += 4) {
            Words words = philox((first + j) / 4, step, site, seed);
            for (int k = 0; k < 4; k++) {
                float factor = words.at[k] >= threshold ? scale : 0.0f;
                o.at[j + k] = As<T>::from(to_float(v.at[j + k]) * rounded<T>(factor));
            }
        }
        store_some<T, N>(y, o, first, n);
    }
}

// x + v or x * v for every row; whole vectors lie in one row, or N is 1.
template <class T, class W, int N>
__device__ __forceinline__ void beside(const T *x, const W *v, T *y, int64_t n, int width, int multiply) {
    FOR_ELEMENTS(n, N) {
        Vector<T, N> a = load<T, N>(x + first), o;
        Vector<W, N> b = load<W, N>(v + first % width);
        for (int j = 0; j < N; j++) {
            // The vector in x's type, as the neutral form takes it.
            float l = to_float(a.at[j]), r = rounded<T>(to_float(b.at[j]));
            o.at[j] = As<T>::from(multiply ? l * r : l + r);
        }
        store<T, N>(y + first, o);
    }
}

// to += from
template <class T, int N> __device__ __forceinline__ void add_in_place(T *to, const T *from, int64_t n) {
    FOR_ELEMENTS(n, N) {
        Vector<T, N> a = load_some<T, N>(to, first, n), b = load_some<T, N>(from, first, n);
        for (int j = 0; j < N; j++) a.at[j] = As<T>::from(to_float(a.at[j]) + to_float(b.at[j]));
        store_some<T, N>(to, a, first, n);
    }
}

#define KERNELS(T, N, SUFFIX)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        activation_##SUFFIX(const T *x, const T *dy, T *out, int64_t n, int act) {                                     \
        activation<T, N>(x, dy, out, n, act);                                                                          \
    }                                                                                                                  \
    EXPORT(activation_##SUFFIX)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        gated_forward_##SUFFIX(const T *gate, const T *up, T *out, int64_t n, int act) {                               \
        gated_forward<T, N>(gate, up, out, n, act);                                                                    \
    }                                                                                                                  \
    EXPORT(gated_forward_##SUFFIX)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) gated_backward_##SUFFIX(                                         \
        const T *gate, const T *up, const T *dy, T *d_gate, T *d_up, int64_t n, int act) {                             \
        gated_backward<T, N>(gate, up, dy, d_gate, d_up, n, act);                                                      \
    }                                                                                                                  \
    EXPORT(gated_backward_##SUFFIX)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        dropout_##SUFFIX(const T *x, T *y, int64_t n, uint32_t threshold, float scale, uint64_t seed, uint32_t step,   \
                         uint32_t site) {                                                                              \
        dropout<T, N>(x, y, n, threshold, scale, seed, step, site);                                                    \
    }                                                                                                                  \
    EXPORT(dropout_##SUFFIX)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) add_in_place_##SUFFIX(T *to, const T *from, int64_t n) {         \
        add_in_place<T, N>(to, from, n);                                                                               \
    }                                                                                                                  \
    EXPORT(add_in_place_##SUFFIX)

KERNELS(float, 4, f32)
KERNELS(bf16, 8, bf16)
KERNELS(f16, 8, f16)

#define BESIDE(T, W, N, SUFFIX)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        beside_##SUFFIX(const T *x, const W *v, T *y, int64_t n, int width, int multiply) {                            \
        beside<T, W, N>(x, v, y, n, width, multiply);                                                                  \
    }                                                                                                                  \
    EXPORT(beside_##SUFFIX)

BESIDE(float, float, 4, f32_f32_vector)
BESIDE(float, float, 1, f32_f32)
BESIDE(bf16, bf16, 8, bf16_bf16_vector)
BESIDE(bf16, bf16, 1, bf16_bf16)
BESIDE(bf16, float, 8, bf16_f32_vector)
BESIDE(bf16, float, 1, bf16_f32)
BESIDE(f16, f16, 8, f16_f16_vector)
BESIDE(f16, f16, 1, f16_f16)
BESIDE(f16, float, 8, f16_f32_vector)
BESIDE(f16, float, 1, f16_f32)
