// Softmax attention over packed sequences with memory linear in their lengths, forward and backward: tiles of queries and
// keys in shared memory, probabilities made again in the backward pass (FlashAttention-2, Dao 2023, arXiv:2307.08691).
//
// With P the probabilities, dP = dO V^T and delta = rowsum(dO * O):
//     dS = P * (dP - delta) * (derivative of the cap)      dV = P^T dO      dK = scale dS^T Q      dQ = scale dS K
// A warp makes 16 rows of a result alone, and a kernel for each of dQ and (dK, dV) makes P again, so that nothing is added
// up across blocks: the same bits at each run. Keys of a sequence are counted from the first of its prefix; query i stands
// at key p = i + keys - queries and sees the keys p - left .. p + right. Logits are in base 2.
#pragma once
#include "tensor_cores.cuh"

struct Shape {
    int tokens, heads, kv_heads, dim;
    // q.k times `inner` is the logit, or without `outer` 0 the argument of tanh, which `outer` multiplies.
    float scale, inner, outer;
    int left, right;
    // The row of the bias for a query and a key at one position.
    int zero;
    int vector, exact;
};

// A sequence: rows of q, of its own keys and of the keys before them.
struct Span {
    int query, queries, key, keys, prefix, prefix_keys;
};
struct QueryTile {
    int span, first;
};
// Rows of k and v that the same sequences see, and which.
struct KeyTile {
    int row, rows, first_user, users;
};
// Row r is key r + shift of the sequence, whose query i stands at key i + offset.
struct User {
    int query, queries, shift, offset;
};

// Sizes for heads of up to D elements.
template <class T, int D> struct Tiles {
    static constexpr bool WIDE = sizeof(T) == 4;
    static constexpr int WARPS = WIDE && D == 256 ? 2 : 4;
    static constexpr int THREADS = 32 * WARPS;
    // Rows of a block's result; keys (or, for the gradient of keys, queries) that it takes at a time.
    static constexpr int ROWS = 16 * WARPS;
    static constexpr int KEYS = WIDE ? (D == 256 ? 16 : 32) : (D == 256 ? 32 : 64);
    static constexpr int QUERIES = WIDE ? (D == 64 ? 32 : 16) : (D == 256 ? 16 : D == 128 ? 32 : 64);
    // Sixteen bytes more than a row, so that eight rows are in different banks.
    static constexpr int PITCH = D + 16 / sizeof(T);
    // Columns of dK and dV that a block keeps.
    static constexpr int COLUMNS = D == 256 ? 128 : D;
};

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int whole_depth(const Shape &s) { return (s.dim + 15) / 16 * 16; }

__device__ __forceinline__ int key_row(const Span &span, int key) {
    return key < span.prefix_keys ? span.prefix + key : span.key + key - span.prefix_keys;
}

// Rows of one head into shared memory: row i is row `row_of(i)` of `from`, zeros where that is negative and behind `dim`.
template <class T, int ROWS, int N, class F>
__device__ __forceinline__ void load_rows(T *to, int pitch, const T *from, int heads, int head, const Shape &s,
                                          F row_of) {
    int pieces = whole_depth(s) / N;
    for (int i = threadIdx.x; i < ROWS * pieces; i += blockDim.x) {
        int at = i / pieces, column = i % pieces * N, row = row_of(at);
        Vector<T, N> v;
        if (row >= 0 && column < s.dim) v = load<T, N>(from + (int64_t(row) * heads + head) * s.dim + column);
        else
            for (int j = 0; j < N; j++) v.at[j] = As<T>::from(0.0f);
        store<T, N>(to + at * pitch + column, v);
    }
}
template <class T, int ROWS, class F>
__device__ __forceinline__ void load_tile(T *to, int pitch, const T *from, int heads, int head, const Shape &s,
                                          F row_of) {
    if (s.vector) load_rows<T, ROWS, 16 / sizeof(T)>(to, pitch, from, heads, head, s, row_of);
    else load_rows<T, ROWS, 1>(to, pitch, from, heads, head, s, row_of);
}

// A lane's two elements of a row of a result.
template <class T> __device__ __forceinline__ void store_two(T *row, int column, float a, float b, int dim) {
    if (column < dim) row[column] = As<T>::from(a);
    if (column + 1 < dim) row[column + 1] = As<T>::from(b);
}

struct Logit {
    float value, slope;
};
template <class T>
__device__ __forceinline__ Logit logit(float product, int distance, int head, const T *bias, const Shape &s) {
    constexpr float LOG2_E = 1.44269504f;
    if (s.outer != 0.0f) {
        float t = tanhf(product * s.inner);
        return {s.outer * t, (1.0f - t) * (1.0f + t)};
    }
    float value = product * s.inner;
    if (bias) value += LOG2_E * to_float(bias[int64_t(s.zero + distance) * s.heads + head]);
    return {value, 1.0f};
}

__device__ __forceinline__ float quad_most(float x) {
    for (int mask = 1; mask <= 2; mask *= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, mask);
        x = other > x ? other : x;
    }
    return x;
}
__device__ __forceinline__ float quad_sum(float x) {
    for (int mask = 1; mask <= 2; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// What a block knows of its queries.
struct Queries {
    Span span;
    int first, keys, offset, from, to;
    // Of the lane's two rows the query; of the warp's the first and the last.
    int row[2], top, bottom;

    template <int ROWS>
    static __device__ __forceinline__ Queries of(const QueryTile &tile, const Span *spans, const Shape &s) {
        Queries q;
        q.span = spans[tile.span];
        q.first = tile.first;
        q.keys = q.span.prefix_keys + q.span.keys;
        q.offset = q.keys - q.span.queries;
        int last = least(q.first + ROWS, q.span.queries) - 1;
        q.from = most(0, q.first + q.offset - s.left);
        q.to = least(q.keys, last + q.offset + s.right + 1);
        q.top = q.first + int(threadIdx.x / 32) * 16;
        q.bottom = least(q.top + 15, last);
        q.row[0] = q.top + int(threadIdx.x % 32) / 4;
        q.row[1] = q.row[0] + 8;
        return q;
    }
    // Whether the warp's queries see any of `count` keys from `key`.
    __device__ __forceinline__ bool sees(int key, int count, const Shape &s) const {
        return top <= bottom && key <= bottom + offset + s.right && key + count > top + offset - s.left;
    }
    __device__ __forceinline__ bool visible(int half, int key, const Shape &s) const {
        int p = row[half] + offset;
        return row[half] < span.queries && key < keys && key >= p - s.left && key <= p + s.right;
    }
    __device__ __forceinline__ int query_row(int i) const {
        return first + i < span.queries ? span.query + first + i : -1;
    }
};

template <class T, int D>
__device__ __forceinline__ void forward(const T *q, const T *k, const T *v, const T *bias, T *out, float *lse,
                                        const QueryTile *tiles, const Span *spans, const Shape &s) {
    using C = Tiles<T, D>;
    constexpr int PITCH = C::PITCH, KEYS = C::KEYS;
    T *qs = static_cast<T *>(shared_memory()), *ks = qs + C::ROWS * PITCH, *vs = ks + KEYS * PITCH;
    int head = blockIdx.y, kv = head / (s.heads / s.kv_heads), lane = threadIdx.x % 32, depth = whole_depth(s);
    Queries at = Queries::of<C::ROWS>(tiles[blockIdx.x], spans, s);
    T *mine = qs + threadIdx.x / 32 * 16 * PITCH;
    load_tile<T, C::ROWS>(qs, PITCH, q, s.heads, head, s, [&](int i) { return at.query_row(i); });
    float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int key = at.from; key < at.to; key += KEYS) {
        auto row = [&](int i) { return key + i < at.to ? key_row(at.span, key + i) : -1; };
        __syncthreads();
        load_tile<T, KEYS>(ks, PITCH, k, s.kv_heads, kv, s, row);
        load_tile<T, KEYS>(vs, PITCH, v, s.kv_heads, kv, s, row);
        __syncthreads();
        if (!at.sees(key, KEYS, s)) continue;
        float p[KEYS / 8][4] = {};
        product<T>(p, mine, ks, PITCH, depth, s.exact);
        float most_of[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int j = key + n * 8 + lane % 4 * 2 + i % 2, half = i / 2;
                float x = -INFINITY;
                if (at.visible(half, j, s))
                    x = logit(p[n][i], j - at.row[half] - at.offset, head, bias, s).value;
                p[n][i] = x;
                if (x > most_of[half]) most_of[half] = x;
            }
        }
        float base[2], factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most_of[half] = quad_most(most_of[half]);
            // A query that sees nothing yet, or -inf alone: zeros rather than NaN.
            base[half] = most_of[half] == -INFINITY ? 0.0f : most_of[half];
            factor[half] = exp2f(top[half] - base[half]);
            top[half] = most_of[half];
            sum[half] *= factor[half];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] = exp2f(p[n][i] - base[i / 2]);
                sum[i / 2] += p[n][i];
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] *= factor[i / 2];
        }
        product_of_results<T>(o, p, vs, PITCH, s.dim, s.exact);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = quad_sum(sum[half]), share = total == 0.0f ? 0.0f : 1.0f / total;
        if (at.row[half] >= at.span.queries) continue;
        int64_t token = at.span.query + at.row[half];
        T *to = out + (token * s.heads + head) * s.dim;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            store_two(to, n * 8 + lane % 4 * 2, o[n][half * 2] * share, o[n][half * 2 + 1] * share, s.dim);
        // +inf makes all probabilities 0 in the backward pass.
        if (lane % 4 == 0) lse[int64_t(head) * s.tokens + token] = total == 0.0f ? INFINITY : top[half] + log2f(total);
    }
}

// rowsum(dO * O) of each token and head, [heads, tokens]; a warp takes one.
template <class T>
__device__ __forceinline__ void delta_of(const T *out, const T *dout, float *delta, const Shape &s) {
    int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= int64_t(s.tokens) * s.heads) return;
    float sum = 0;
    for (int i = threadIdx.x % 32; i < s.dim; i += 32)
        sum += to_float(out[row * s.dim + i]) * to_float(dout[row * s.dim + i]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[row % s.heads * s.tokens + row / s.heads] = sum;
}

// What both kernels over tiles of queries do with a tile of keys: dS of the warp's rows.
template <class T, int D> struct QueryGradient {
    using C = Tiles<T, D>;
    T *qs, *gs, *ks, *vs;
    int head, kv;
    Queries at;
    float lse[2], delta[2];

    __device__ __forceinline__ void begin(const T *q, const T *dout, const float *lses, const float *deltas,
                                          const QueryTile &tile, const Span *spans, const Shape &s) {
        qs = static_cast<T *>(shared_memory());
        gs = qs + C::ROWS * C::PITCH;
        ks = gs + C::ROWS * C::PITCH;
        vs = ks + C::KEYS * C::PITCH;
        head = blockIdx.y;
        kv = head / (s.heads / s.kv_heads);
        at = Queries::of<C::ROWS>(tile, spans, s);
        auto row = [&](int i) { return at.query_row(i); };
        load_tile<T, C::ROWS>(qs, C::PITCH, q, s.heads, head, s, row);
        load_tile<T, C::ROWS>(gs, C::PITCH, dout, s.heads, head, s, row);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool there = at.row[half] < at.span.queries;
            int64_t token = int64_t(head) * s.tokens + at.span.query + at.row[half];
            lse[half] = there ? lses[token] : INFINITY;
            delta[half] = there ? deltas[token] : 0.0f;
        }
    }
    __device__ __forceinline__ void load(const T *k, const T *v, int key, int end, const Shape &s) {
        auto row = [&](int i) { return key + i >= 0 && key + i < end ? key_row(at.span, key + i) : -1; };
        __syncthreads();
        load_tile<T, C::KEYS>(ks, C::PITCH, k, s.kv_heads, kv, s, row);
        load_tile<T, C::KEYS>(vs, C::PITCH, v, s.kv_heads, kv, s, row);
        __syncthreads();
    }
    __device__ __forceinline__ void make(float (&p)[C::KEYS / 8][4], const T *bias, int key, const Shape &s) const {
        int lane = threadIdx.x % 32, from = threadIdx.x / 32 * 16 * C::PITCH, depth = whole_depth(s);
        float d[C::KEYS / 8][4] = {};
        product<T>(p, qs + from, ks, C::PITCH, depth, s.exact);
        product<T>(d, gs + from, vs, C::PITCH, depth, s.exact);
#pragma unroll
        for (int n = 0; n < C::KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int j = key + n * 8 + lane % 4 * 2 + i % 2, half = i / 2;
                float x = 0;
                if (at.visible(half, j, s)) {
                    Logit l = logit(p[n][i], j - at.row[half] - at.offset, head, bias, s);
                    x = exp2f(l.value - lse[half]) * (d[n][i] - delta[half]) * l.slope;
                }
                p[n][i] = x;
            }
        }
    }
};

template <class T, int D>
__device__ __forceinline__ void query_gradient(const T *q, const T *k, const T *v, const T *bias, const T *dout,
                                               const float *lse, const float *delta, T *dq, const QueryTile *tiles,
                                               const Span *spans, const Shape &s) {
    using C = Tiles<T, D>;
    int lane = threadIdx.x % 32;
    QueryGradient<T, D> g;
    g.begin(q, dout, lse, delta, tiles[blockIdx.x], spans, s);
    float sums[D / 8][4] = {};
    for (int key = g.at.from; key < g.at.to; key += C::KEYS) {
        g.load(k, v, key, g.at.to, s);
        if (!g.at.sees(key, C::KEYS, s)) continue;
        float d[C::KEYS / 8][4] = {};
        g.make(d, bias, key, s);
        product_of_results<T>(sums, d, g.ks, C::PITCH, s.dim, s.exact);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (g.at.row[half] >= g.at.span.queries) continue;
        T *to = dq + (int64_t(g.at.span.query + g.at.row[half]) * s.heads + g.head) * s.dim;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            store_two(to, n * 8 + lane % 4 * 2, sums[n][half * 2] * s.scale, sums[n][half * 2 + 1] * s.scale, s.dim);
    }
}

// A block takes a tile of keys, one key head and some columns of the results; it goes through all queries that see the
// keys. Everything is turned: rows are keys, columns queries. `dk` or `dv` may be null.
template <class T, int D>
__device__ __forceinline__ void key_gradient(const T *q, const T *k, const T *v, const T *bias, const T *dout,
                                             const float *lse, const float *delta, T *dk, T *dv, const KeyTile *tiles,
                                             const User *users, const Shape &s) {
    using C = Tiles<T, D>;
    constexpr int PITCH = C::PITCH, QUERIES = C::QUERIES, COLUMNS = C::COLUMNS;
    T *ks = static_cast<T *>(shared_memory()), *vs = ks + C::ROWS * PITCH;
    T *qs = vs + C::ROWS * PITCH, *gs = qs + QUERIES * PITCH;
    float *lses = reinterpret_cast<float *>(gs + QUERIES * PITCH), *deltas = lses + QUERIES;
    int kv = blockIdx.y, group = s.heads / s.kv_heads, column = blockIdx.z * COLUMNS, lane = threadIdx.x % 32;
    int from = threadIdx.x / 32 * 16, depth = whole_depth(s), width = s.dim - column;
    KeyTile tile = tiles[blockIdx.x];
    auto key = [&](int i) { return i < tile.rows ? tile.row + i : -1; };
    load_tile<T, C::ROWS>(ks, PITCH, k, s.kv_heads, kv, s, key);
    load_tile<T, C::ROWS>(vs, PITCH, v, s.kv_heads, kv, s, key);
    float d_key[COLUMNS / 8][4] = {}, d_value[COLUMNS / 8][4] = {};
    for (int u = tile.first_user; u < tile.first_user + tile.users; u++) {
        User user = users[u];
        // Query i sees key j where j - right <= i + offset <= j + left.
        int low = tile.row + user.shift - user.offset, high = low + tile.rows - 1;
        int begin = most(0, low - s.right), end = least(user.queries, high + s.left + 1);
        int top = low + from, bottom = least(top + 15, high);
        for (int head = kv * group; head < (kv + 1) * group; head++) {
            for (int first = begin; first < end; first += QUERIES) {
                auto row = [&](int i) { return first + i < end ? user.query + first + i : -1; };
                __syncthreads();
                load_tile<T, QUERIES>(qs, PITCH, q, s.heads, head, s, row);
                load_tile<T, QUERIES>(gs, PITCH, dout, s.heads, head, s, row);
                if (int(threadIdx.x) < QUERIES) {
                    int64_t token = int64_t(head) * s.tokens + row(threadIdx.x);
                    bool there = first + int(threadIdx.x) < end;
                    lses[threadIdx.x] = there ? lse[token] : INFINITY;
                    deltas[threadIdx.x] = there ? delta[token] : 0.0f;
                }
                __syncthreads();
                if (top > bottom || first > bottom + s.left || first + QUERIES <= top - s.right) continue;
                float p[QUERIES / 8][4] = {}, d[QUERIES / 8][4] = {};
                product<T>(p, ks + from * PITCH, qs, PITCH, depth, s.exact);
                product<T>(d, vs + from * PITCH, gs, PITCH, depth, s.exact);
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int at = n * 8 + lane % 4 * 2 + i % 2, mine = from + lane / 4 + i / 2 * 8;
                        // The key's position less the query's.
                        int distance = low + mine - (first + at);
                        float probability = 0, x = 0;
                        if (mine < tile.rows && first + at < end && distance >= -s.left && distance <= s.right) {
                            Logit l = logit(p[n][i], distance, head, bias, s);
                            probability = exp2f(l.value - lses[at]);
                            x = probability * (d[n][i] - deltas[at]) * l.slope;
                        }
                        p[n][i] = probability;
                        d[n][i] = x;
                    }
                }
                if (dv) product_of_results<T>(d_value, p, gs + column, PITCH, width, s.exact);
                if (dk) product_of_results<T>(d_key, d, qs + column, PITCH, width, s.exact);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int mine = from + lane / 4 + half * 8;
        if (mine >= tile.rows) continue;
        int64_t at = (int64_t(tile.row + mine) * s.kv_heads + kv) * s.dim + column;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            int c = n * 8 + lane % 4 * 2;
            if (dk) store_two(dk + at, c, d_key[n][half * 2] * s.scale, d_key[n][half * 2 + 1] * s.scale, width);
            if (dv) store_two(dv + at, c, d_value[n][half * 2], d_value[n][half * 2 + 1], width);
        }
    }
}

// The gradient of the bias, a sum of dS over all pairs of one distance. A block takes one head and 64 rows of the table, and
// goes through all tiles of queries; thread d adds up the d-th of its diagonals.
template <class T, int D>
__device__ __forceinline__ void bias_gradient(const T *q, const T *k, const T *v, const T *bias, const T *dout,
                                              const float *lse, const float *delta, T *d_bias, const QueryTile *tiles,
                                              const Span *spans, int count, int distances, const Shape &s) {
    using C = Tiles<T, D>;
    constexpr int BAND = 64, WIDTH = C::KEYS + 1;
    int lane = threadIdx.x % 32, band = blockIdx.x * BAND;
    QueryGradient<T, D> g;
    float sum = 0;
    for (int tile = 0; tile < count; tile++) {
        __syncthreads();
        g.begin(q, dout, lse, delta, tiles[tile], spans, s);
        // Where the first query has the band's first distance, and behind where the last one has its last.
        int first = g.at.first + g.at.offset + band - s.zero, end = first + C::ROWS - 1 + BAND;
        int from = most(first, g.at.from), to = least(end, g.at.to);
        // Over the keys that are no longer needed.
        float *pairs = reinterpret_cast<float *>(g.ks);
        for (int key = from; key < to; key += C::KEYS) {
            g.load(k, v, key, g.at.to, s);
            float d[C::KEYS / 8][4] = {};
            g.make(d, bias, key, s);
            __syncthreads();
#pragma unroll
            for (int n = 0; n < C::KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int row = threadIdx.x / 32 * 16 + lane / 4 + i / 2 * 8;
                    pairs[row * WIDTH + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
                }
            }
            __syncthreads();
            if (threadIdx.x >= BAND) continue;
            for (int row = 0; row < C::ROWS; row++) {
                int j = first + row + int(threadIdx.x) - key;
                if (j >= 0 && j < C::KEYS && key + j < to) sum += pairs[row * WIDTH + j];
            }
        }
    }
    int distance = band + threadIdx.x;
    if (threadIdx.x < BAND && distance < distances)
        d_bias[int64_t(distance) * s.heads + blockIdx.y] = As<T>::from(sum);
}

#define SHAPE_PARAMETERS                                                                                               \
    int tokens, int heads, int kv_heads, int dim, float scale, float inner, float outer, int left, int right,          \
        int zero, int vector, int exact
#define SHAPE                                                                                                          \
    Shape { tokens, heads, kv_heads, dim, scale, inner, outer, left, right, zero, vector, exact }
#define BOUNDS(T, D) __launch_bounds__((Tiles<T, D>::THREADS), 2)

#define ATTENTION(T, D, SUFFIX)                                                                                        \
    extern "C" __global__ void BOUNDS(T, D) attention_forward_##SUFFIX(                                                \
        const T *q, const T *k, const T *v, const T *bias, T *out, float *lse, const QueryTile *tiles,                 \
        const Span *spans, SHAPE_PARAMETERS) {                                                                         \
        forward<T, D>(q, k, v, bias, out, lse, tiles, spans, SHAPE);                                                   \
    }                                                                                                                  \
    EXPORT(attention_forward_##SUFFIX)                                                                                 \
    extern "C" __global__ void BOUNDS(T, D) attention_queries_##SUFFIX(                                                \
        const T *q, const T *k, const T *v, const T *bias, const T *dout, const float *lse, const float *delta,        \
        T *dq, const QueryTile *tiles, const Span *spans, SHAPE_PARAMETERS) {                                          \
        query_gradient<T, D>(q, k, v, bias, dout, lse, delta, dq, tiles, spans, SHAPE);                                \
    }                                                                                                                  \
    EXPORT(attention_queries_##SUFFIX)                                                                                 \
    extern "C" __global__ void BOUNDS(T, D) attention_keys_##SUFFIX(                                                   \
        const T *q, const T *k, const T *v, const T *bias, const T *dout, const float *lse, const float *delta,        \
        T *dk, T *dv, const KeyTile *tiles, const User *users, SHAPE_PARAMETERS) {                                     \
        key_gradient<T, D>(q, k, v, bias, dout, lse, delta, dk, dv, tiles, users, SHAPE);                              \
    }                                                                                                                  \
    EXPORT(attention_keys_##SUFFIX)                                                                                    \
    extern "C" __global__ void BOUNDS(T, D) attention_bias_##SUFFIX(                                                   \
        const T *q, const T *k, const T *v, const T *bias, const T *dout, const float *lse, const float *delta,        \
        T *d_bias, const QueryTile *tiles, const Span *spans, int count, int distances, SHAPE_PARAMETERS) {            \
        bias_gradient<T, D>(q, k, v, bias, dout, lse, delta, d_bias, tiles, spans, count, distances, SHAPE);           \
    }                                                                                                                  \
    EXPORT(attention_bias_##SUFFIX)

#define ATTENTIONS(T, SUFFIX)                                                                                          \
    ATTENTION(T, 64, SUFFIX##_64)                                                                                      \
    ATTENTION(T, 128, SUFFIX##_128)                                                                                    \
    ATTENTION(T, 256, SUFFIX##_256)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        attention_delta_##SUFFIX(const T *out, const T *dout, float *delta, SHAPE_PARAMETERS) {                        \
        delta_of<T>(out, dout, delta, SHAPE);                                                                          \
    }                                                                                                                  \
    EXPORT(attention_delta_##SUFFIX)
