// What the kernels use of CUDA, for a C++ compiler of the host. One block runs at a time; each of its threads is a fiber
// (fibers.cpp), so that barriers, shuffles and warp-wide matrix instructions mean what they mean on a card.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

namespace emulation {

struct Index {
    unsigned x, y, z;
};

extern thread_local Index thread_index, block_index, block_size, grid_size;

// Waits for all threads of the block.
void block_barrier();
// Hands `bytes` to the other lanes of the warp and waits for theirs; the result is the array of all 32.
constexpr int SLOT = 64;
const char *exchange(const void *mine, int bytes);
// The block's dynamic shared memory.
void *shared();

template <class T> T from_lane(const char *all, int lane) {
    T value;
    std::memcpy(&value, all + lane * SLOT, sizeof(T));
    return value;
}

using Call = void (*)(void **);
void add(const char *name, Call call);

template <auto F, class... A, size_t... I> void unpack(void (*)(A...), void **args, std::index_sequence<I...>) {
    F(*static_cast<A *>(args[I])...);
}
template <auto F> struct Entry;
template <class... A, void (*F)(A...)> struct Entry<F> {
    static void call(void **args) { unpack<F>(F, args, std::index_sequence_for<A...>()); }
};
struct Register {
    Register(const char *name, Call call) { add(name, call); }
};

} // namespace emulation

#define EXPORT(name) static emulation::Register register_##name(#name, emulation::Entry<&name>::call);

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::exchange("", 1); }

template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    const char *all = emulation::exchange(&value, sizeof(T));
    return emulation::from_lane<T>(all, (threadIdx.x % 32) ^ mask);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }

// bfloat16 and IEEE half precision, rounded to the nearest even.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
    uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    float value = float_of(magnitude << 13) * float_of((127u + 127u - 15u) << 23);
    return float_of(bits_of(value) | sign);
}
inline bf16 to_bf16(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t(bits >> 16 | 0x40)};
    return bf16{uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline f16 to_f16(float x) {
    uint32_t bits = bits_of(x);
    uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    float magnitude = float_of(bits & 0x7fffffffu);
    if (magnitude != magnitude) return f16{uint16_t(sign | 0x7e00u)};
    if (magnitude >= 65520.0f) return f16{uint16_t(sign | 0x7c00u)};
    if (magnitude < 6.103515625e-05f) {
        // Subnormal: adding 2^-1 makes the unit in the last place 2^-24, and the addition rounds to even.
        return f16{uint16_t(sign | (bits_of(magnitude + 0.5f) - bits_of(0.5f)))};
    }
    uint32_t b = bits_of(magnitude) - (112u << 23);
    return f16{uint16_t(sign | (b + 0xfffu + (b >> 13 & 1)) >> 13)};
}

#include "tensor_cores_on_host.h"
