#!/usr/bin/env bash
# Type-checks the whole workspace with the `cuda` feature on any machine, GPU and CUDA or not (about 2 minutes from
# nothing). No kernel of candle's is compiled, nothing is linked, nothing runs. If the toolkit of scripts/cuda-toolkit.sh
# is there (or CHECK_CUDA_KERNELS=1 asks to make it), this workspace's own kernels are compiled for real.
# CUDA_CHECK_TARGET is the target folder (target/check-cuda): never one that a real CUDA build uses.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${CHECK_CUDA_KERNELS:-0}" = 1 ]; then
    scripts/cuda-toolkit.sh >/dev/null
fi
if [ -x target/cuda/bin/nvcc ]; then
    export PEFT_REAL_NVCC=$PWD/target/cuda/bin/nvcc
fi
export NVCC=$PWD/scripts/nvcc-stand-in CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000
export CARGO_TARGET_DIR=${CUDA_CHECK_TARGET:-target/check-cuda}
exec cargo check --workspace --all-targets --features cuda "$@"
