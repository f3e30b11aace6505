#!/usr/bin/env bash
# Sets up a CUDA 13.0 toolkit that compiles and links, on an x86-64 Linux machine with none, and prints the exports:
#
#     eval "$(scripts/cuda-toolkit.sh)"
#     cargo build --release -p peft-cli --features cuda
#
# It stands in target/cuda ($CUDA_TOOLKIT_DIR elsewhere; about 105 MB to download, 210 MB on disk) and is made once.
# nvcc, the headers and libcudart come from NVIDIA's wheels on PyPI (scripts/cuda-wheels.txt). The driver, cuBLAS, cuRAND
# and NVRTC would be another 500 MB and are only needed to run: for the linker they are stood in for by shared objects
# with the right SONAMEs and the functions that cudarc binds, each of which stops the program if it is ever called. On a
# machine with a GPU the real ones must be found at run time (LD_LIBRARY_PATH, or the system's CUDA).
#
# CUDA_COMPUTE_CAP (default 90, Hopper) is the card that kernels are built for: 80 A100, 86/89 RTX 30/40, 90 H100/H200.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
toolkit=${CUDA_TOOLKIT_DIR:-$root/target/cuda}
wheels=$root/scripts/cuda-wheels.txt
say() { echo "cuda-toolkit: $*" >&2; }
fail() { say "$@"; exit 1; }

print_exports() {
    printf 'export CUDA_HOME=%q CUDA_PATH=%q NVCC=%q\n' "$toolkit" "$toolkit" "$toolkit/bin/nvcc"
    # shellcheck disable=SC2016 # the caller's PATH is meant
    printf 'export PATH=%q:"$PATH"\n' "$toolkit/bin"
    printf 'export CUDA_COMPUTE_CAP=%q CUDARC_CUDA_VERSION=13000\n' "${CUDA_COMPUTE_CAP:-90}"
    # Compressed device code halves the binary (57 to 29 MB for candle's kernels).
    printf 'export NVCC_APPEND_FLAGS=--compress-mode=size CUDAFORGE_THREADS=%q\n' "${CUDAFORGE_THREADS:-$(nproc)}"
}

cudarc_version=$(grep -A1 '^name = "cudarc"' "$root/Cargo.lock" | sed -n 's/^version = "\(.*\)"/\1/p')
[ -n "$cudarc_version" ] || fail "Cargo.lock names no cudarc"
stamp=$({ cat "$0" "$wheels"; echo "$cudarc_version"; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$toolkit/.stamp" 2>/dev/null)" = "$stamp" ]; then
    print_exports
    exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "only for x86-64 Linux; install CUDA 13.0 and set CUDA_HOME instead"
for tool in python3 gcc cargo; do command -v "$tool" >/dev/null || fail "needs $tool"; done
python3 -m pip --version >/dev/null 2>&1 || fail "needs pip (apt-get install python3-pip)"

# Everything is made beside its final place and moved there when it is complete.
mkdir -p "$(dirname "$toolkit")"
work=$(mktemp -d "$toolkit.XXXXXX")
trap 'rm -rf "$work"' EXIT

say "downloading $(grep -c == "$wheels") wheels"
python3 -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --require-hashes \
    --dest "$work/wheels" --requirement "$wheels" >&2

cudarc=("${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"cudarc-$cudarc_version")
if [ ! -d "${cudarc[0]}" ]; then
    say "fetching cudarc $cudarc_version"
    (cd "$root" && cargo fetch --quiet --locked >&2)
    cudarc=("${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"cudarc-$cudarc_version")
fi
[ -d "${cudarc[0]}" ] || fail "cudarc $cudarc_version is not in cargo's registry"

say "unpacking, linking stand-ins"
python3 - "$work" "${cudarc[0]}" >&2 <<'PY'
import pathlib, re, shutil, subprocess, sys, zipfile

work, cudarc = map(pathlib.Path, sys.argv[1:])
new = work / "new"
for wheel in sorted((work / "wheels").glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            inside = entry.filename.removeprefix("nvidia/cu13/")
            # cicc carries its own libnvvm, so the shared one (63 MB) stays out.
            if inside == entry.filename or entry.is_dir() or inside.startswith(("lib/cmake/", "lib/libnvvm")):
                continue
            to = new / inside
            to.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(to, "wb") as target:
                shutil.copyfileobj(source, target)
for folder in (new / "bin", new / "nvvm" / "bin"):
    for program in folder.iterdir():
        program.chmod(0o755)
(new / "lib").rename(new / "lib64")
(new / "lib").symlink_to("lib64")
# Only the static runtime gets the plain name, so that is the one -lcudart finds.
(new / "lib64" / "libcudart.a").symlink_to("libcudart_static.a")

stubs = new / "lib64" / "stubs"
stubs.mkdir()
for name, soname, module in [
    ("cuda", "libcuda.so.1", "driver"),
    ("cublas", "libcublas.so.13", "cublas"),
    ("cublasLt", "libcublasLt.so.13", "cublaslt"),
    ("curand", "libcurand.so.10", "curand"),
    ("nvrtc", "libnvrtc.so.13", "nvrtc"),
]:
    source = (cudarc / "src" / module / "sys" / "mod.rs").read_text()
    functions = sorted(set(re.findall(r'load::<\w+>\("(\w+)"\)', source)))
    if len(functions) < 10:
        sys.exit(f"cuda-toolkit: found {len(functions)} functions of {soname} in {cudarc}: its bindings look different now")
    assembly = work / f"{name}.s"
    assembly.write_text(
        ".text\n"
        + "".join(f".globl {f}\n.type {f}, @function\n{f}: ud2\n" for f in functions)
        + '.section .note.GNU-stack,"",@progbits\n'
    )
    subprocess.run(
        ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-o", stubs / f"lib{name}.so", assembly], check=True
    )
PY

say "compiling a kernel"
cat >"$work/probe.cu" <<'CU'
#include <cuda_bf16.h>
#include <cub/block/block_reduce.cuh>
extern "C" __global__ void probe(const __nv_bfloat16 *x, float *sum) {
    typedef cub::BlockReduce<float, 32> Reduce;
    __shared__ typename Reduce::TempStorage scratch;
    float total = Reduce(scratch).Sum(__bfloat162float(x[threadIdx.x]));
    if (threadIdx.x == 0) *sum = total;
}
CU
PATH=$work/new/bin:$PATH "$work/new/bin/nvcc" -arch=sm_90a -c -o "$work/probe.o" "$work/probe.cu" >&2

echo "$stamp" >"$work/new/.stamp"
rm -rf "$toolkit"
mv "$work/new" "$toolkit"
say "made $toolkit ($(du -sm "$toolkit" | cut -f1) MB)"
print_exports
