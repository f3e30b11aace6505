// Kernels with a mistake each, which tests/faults.rs wants found.
#include "cuda_on_host.h"

// Reverses 64 numbers through shared memory; `mistake` leaves the barrier out.
static void faulty_reverse(const float *x, float *y, int mistake) {
    float *all = static_cast<float *>(emulation::shared());
    all[threadIdx.x] = x[threadIdx.x];
    if (!mistake) __syncthreads();
    y[threadIdx.x] = all[blockDim.x - 1 - threadIdx.x];
}
EXPORT(faulty_reverse)

// Half of the threads do not come to the barrier, as they wait for another one.
static void faulty_barrier(int) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncwarp();
    __syncwarp();
    if (threadIdx.x >= 32) return;
    __syncthreads();
}
EXPORT(faulty_barrier)

// A lane leaves before the warp adds up.
static void faulty_shuffle(float *y) {
    if (threadIdx.x == 5) return;
    *y = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
EXPORT(faulty_shuffle)

// Writes one element too many.
static void faulty_write(float *y, int n) {
    for (int i = threadIdx.x; i <= n; i += blockDim.x) y[i] = 1.0f;
}
EXPORT(faulty_write)
