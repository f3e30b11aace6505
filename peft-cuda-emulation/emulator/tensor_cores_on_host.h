// The warp-wide matrix instructions that kernels/tensor_cores.cuh wraps, with the fragment layouts of the PTX ISA ("Matrix
// Fragments for mma.m16n8k16", "… mma.m16n8k8", "ldmatrix"): lane = 4 g + t holds of
//     A (16 rows)    rows g and g + 8, columns 2t, 2t + 1 and those 8 further (of 32-bit elements t and t + 4)
//     B (8 columns)  column g, the same rows as A has columns
//     C (16 x 8)     rows g and g + 8, columns 2t and 2t + 1
// Products are exact and added up in double; how a card rounds between them is its own affair.
#pragma once

namespace emulation {

struct Fragments {
    uint32_t a[4], b[2];
};

// `a(row, k)` and `b(k, column)` give elements of the whole warp's matrices.
template <class A, class B> void multiply(float (&c)[4], int depth, A a, B b) {
    int lane = thread_index.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        double sum = c[i];
        for (int k = 0; k < depth; k++) sum += double(a(g + i / 2 * 8, k)) * b(k, 2 * t + i % 2);
        c[i] = float(sum);
    }
}

template <class T> float half_of(uint32_t both, int which) {
    return to_float(T{uint16_t(both >> 16 * which)});
}

template <class T> void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const char *all = exchange(&mine, sizeof mine);
    Fragments f[32];
    for (int lane = 0; lane < 32; lane++) f[lane] = from_lane<Fragments>(all, lane);
    multiply(
        c, 16,
        [&](int row, int k) { return half_of<T>(f[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2); },
        [&](int k, int column) { return half_of<T>(f[column * 4 + k % 8 / 2].b[k / 8], k % 2); });
}

} // namespace emulation

inline void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    emulation::multiply_halves<bf16>(c, a, b0, b1);
}
inline void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    emulation::multiply_halves<f16>(c, a, b0, b1);
}
// TF32: the low 13 bits of an operand are not looked at.
inline void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
    using namespace emulation;
    Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const char *all = exchange(&mine, sizeof mine);
    Fragments f[32];
    for (int lane = 0; lane < 32; lane++) f[lane] = from_lane<Fragments>(all, lane);
    auto seen = [](uint32_t bits) { return float_of(bits & 0xffffe000u); };
    multiply(
        c, 8, [&](int row, int k) { return seen(f[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
        [&](int k, int column) { return seen(f[column * 4 + k % 4].b[k / 4]); });
}

// To the nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
    uint32_t bits = bits_of(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

namespace emulation {

inline void load_matrices(uint32_t (&out)[4], const void *row, bool turned) {
    uint16_t all[32][8];
    const char *rows = exchange(row, 16);
    for (int lane = 0; lane < 32; lane++) std::memcpy(all[lane], rows + lane * SLOT, 16);
    int lane = thread_index.x % 32, g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; m++) {
        auto at = [&](int i) { return turned ? all[8 * m + 2 * t + i][g] : all[8 * m + g][2 * t + i]; };
        out[m] = uint32_t(at(0)) | uint32_t(at(1)) << 16;
    }
}

} // namespace emulation

inline void load_matrices(uint32_t (&out)[4], const void *row) { emulation::load_matrices(out, row, false); }
inline void load_matrices_turned(uint32_t (&out)[4], const void *row) { emulation::load_matrices(out, row, true); }
