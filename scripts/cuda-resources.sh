#!/usr/bin/env bash
# Compiles our CUDA kernels for sm_80 and sm_90 and prints what nvcc says each takes, as the table in docs/cuda-resources.md:
# registers, static shared memory, spills. Exit status 1 if a kernel spills.
#
#     scripts/cuda-resources.sh        # the toolkit of scripts/cuda-toolkit.sh, or NVCC
set -euo pipefail
cd "$(dirname "$0")/.."

eval "$(scripts/cuda-toolkit.sh)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for source in peft-cuda/kernels/*.cu; do
    "$NVCC" -fatbin -std=c++17 -O3 -Xptxas -v -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
        -o "$work/out.fatbin" "$source" 2>>"$work/log"
done
python3 - "$work/log" <<'PY'
import re, sys

found, name, arch, spill = {}, None, None, ""
for line in open(sys.argv[1]):
    if m := re.search(r"Compiling entry function '(\w+)' for '(sm_\d+)'", line):
        name, arch = m.groups()
    elif m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
        spill = sum(map(int, m.groups()))
    elif m := re.search(r"Used (\d+) registers", line):
        shared = re.search(r"(\d+) bytes smem", line)
        found.setdefault(name, {})[arch] = (int(m[1]), int(shared[1]) if shared else 0, spill)
print("| kernel | sm_80 registers, shared, spilled | sm_90 |\n|---|---|---|")
for name, archs in sorted(found.items()):
    print(f"| `{name}` | " + " | ".join("{}, {} B, {} B".format(*archs[a]) for a in ("sm_80", "sm_90")) + " |")
sys.exit(any(spill for archs in found.values() for _, _, spill in archs.values()))
PY
